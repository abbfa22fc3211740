"""What the tests of the traps share: building blocks, and what right and refused mean."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import normtool
from tests import zoo
from tests.zoo import Net

Array = np.ndarray[Any, Any]


Feeds = dict[str, Array]


#: dtype → the largest relative error of a right fold on a few dozen products
LIMITS = {np.float16: 4e-3, np.float32: 4e-6, np.float64: 1e-13}


def fold(model: onnx.ModelProto, **options: Any) -> normtool.Rewrite:
    return normtool.fold(model, validate=False, **options)


def verdicts(result: normtool.Rewrite) -> list[str]:
    return [site.verdict for site in result.sites]


def codes(result: normtool.Rewrite) -> list[str]:
    return [reason.code for site in result.sites for reason in site.reasons]


def content(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)


def all_graphs(model: onnx.ModelProto) -> Iterator[Any]:
    pending: list[Any] = [model.graph, *model.functions]
    while pending:
        graph = pending.pop()
        yield graph
        pending += [
            attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")
        ]


def stored_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    for graph in all_graphs(model):
        yield from getattr(graph, "initializer", ())
        yield from (sparse.values for sparse in getattr(graph, "sparse_initializer", ()))
        yield from (a.t for node in graph.node for a in node.attribute if a.HasField("t"))


def spoiled(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every stored float wrong by 1 %, 2 %, … (one factor for all could cancel in a quotient)."""
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    for number, tensor in enumerate(stored_tensors(wrong), start=1):
        array = numpy_helper.to_array(tensor)
        if np.issubdtype(array.dtype, np.floating):
            spoilt = (array * (1 + 0.01 * number)).astype(array.dtype)
            tensor.CopyFrom(numpy_helper.from_array(spoilt, tensor.name))
    return wrong


def complaint(model: onnx.ModelProto) -> str:
    """What the strictest check says; "" if nothing."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error)
    return ""


def assert_same_function(
    model: onnx.ModelProto, folded: onnx.ModelProto, feeds: Feeds | None = None, dtype: Any = np.float32
) -> None:
    assert complaint(folded) == "" or complaint(model) != ""
    expected = zoo.run(model, feeds)
    assert zoo.relative_error(expected, zoo.run(folded, feeds)) < LIMITS[dtype]
    assert zoo.relative_error(expected, zoo.run(spoiled(folded), feeds)) > 1.2 * LIMITS[dtype]


def assert_folded(
    model: onnx.ModelProto, feeds: Feeds | None = None, dtype: Any = np.float32, **options: Any
) -> onnx.ModelProto:
    """Every norm is gone, the function is the same, and a second fold finds nothing to do."""
    result = fold(model, **options)
    assert set(verdicts(result)) == {"folded"}, codes(result)
    remaining = [node.op_type for graph in all_graphs(result.model) for node in graph.node]
    assert "BatchNormalization" not in remaining
    assert content(fold(result.model, **options).model) == content(result.model)
    assert_same_function(model, result.model, feeds, dtype)
    return result.model


def assert_kept(model: onnx.ModelProto, *reasons: str, **options: Any) -> None:
    """Nothing happened, and these are the reasons."""
    result = fold(model, **options)
    assert set(verdicts(result)) == {"kept"}, zoo.op_types(result.model)
    assert set(codes(result)) == set(reasons), [reason for site in result.sites for reason in site.reasons]
    assert content(result.model) == content(model)


def nearest(exact: Array, dtype: Any) -> Array:
    """The numbers of `dtype` nearest to `exact`, found by trying the neighbours."""
    guess = exact.astype(dtype)
    candidates = [guess, *(np.nextafter(guess, np.asarray(end, dtype)) for end in (-np.inf, np.inf))]
    wide = np.stack([extended(candidate) for candidate in candidates])
    best = np.abs(wide - exact).argmin(axis=0)
    return np.choose(best, [c.astype(np.float64) for c in candidates]).astype(dtype)


def extended(array: Array) -> Array:
    return array.astype(np.float64).astype(np.longdouble)


def affine(model: onnx.ModelProto) -> tuple[Array, Array]:
    """s and t of the first BatchNormalization, in extended precision from the stored values."""
    node = next(node for node in model.graph.node if node.op_type == "BatchNormalization")
    gamma, beta, mean, var = (extended(zoo.initializer(model, name)) for name in node.input[1:])
    epsilon = next(attribute.f for attribute in node.attribute if attribute.name == "epsilon")
    s = gamma / np.sqrt(var + np.longdouble(epsilon))
    return s, beta - mean * s


def listed(net: Net) -> Net:
    """Every initializer among the graph inputs too."""
    for tensor in net.initializers:
        net.inputs.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return net


def feeds_of(model: onnx.ModelProto, condition: bool = True) -> Feeds:
    rng = np.random.default_rng(0)
    stored = {tensor.name for tensor in model.graph.initializer}
    shapes = {
        info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in model.graph.input
        if info.name not in stored
    }
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return feeds | ({"condition": np.array(condition)} if "condition" in feeds else {})


def sparse_tensor(dense: Array, name: str) -> onnx.SparseTensorProto:
    index = np.flatnonzero(dense)
    values = numpy_helper.from_array(dense.reshape(-1)[index], name)
    return helper.make_sparse_tensor(
        values, numpy_helper.from_array(index.astype(np.int64), f"{name}.i"), dense.shape
    )
