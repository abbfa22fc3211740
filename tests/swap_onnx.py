"""What the tests of `swap` do to ONNX models: spell their LayerNorms out, widen them to float64, run them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from tests import zoo

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]

# ---- LayerNormalization in primitive ops ----------------------------------------------------------------


class _Writer:
    """Nodes of one spelled-out norm; every method returns the name of what it puts out."""

    def __init__(self, stem: str, dtype: Any) -> None:
        self.stem, self.dtype = stem, dtype
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, array: Any) -> str:
        name = f"{self.stem}_c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def number(self, value: float) -> str:
        return self.constant(np.asarray(value, self.dtype))

    def __call__(self, op_type: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = output or f"{self.stem}_t{len(self.nodes)}"
        node = helper.make_node(op_type, inputs, [name], name=f"{self.stem}_{len(self.nodes)}", **attributes)
        self.nodes.append(node)
        return name

    def mean(self, x: str, axes: Sequence[int]) -> str:
        return self("ReduceMean", x, self.constant(np.array(axes, np.int64)), keepdims=1)


def _centred_div(put: _Writer, x: str, axes: Sequence[int], eps: float) -> str:
    """d = x − mean; d / √(mean(d²) + ε), as PyTorch's old exporter has it."""
    d = put("Sub", x, put.mean(x, axes))
    variance = put.mean(put("Pow", d, put.number(2)), axes)
    return put("Div", d, put("Sqrt", put("Add", variance, put.number(eps))))


def _reciprocal(put: _Writer, x: str, axes: Sequence[int], eps: float) -> str:
    """(x − mean) · 1/√(ε + mean((x − mean)·(x − mean))), the mean taken twice, as Keras and jax have it."""
    d = put("Sub", x, put.mean(x, axes))
    again = put("Sub", x, put.mean(x, axes))
    variance = put.mean(put("Mul", again, again), axes)
    return put("Mul", put("Reciprocal", put("Sqrt", put("Add", put.number(eps), variance))), d)


Spelling = Callable[[_Writer, str, Sequence[int], float], str]

SPELLINGS: Mapping[str, Spelling] = {"div": _centred_div, "reciprocal": _reciprocal}


def spelled(model: onnx.ModelProto, spelling: str) -> onnx.ModelProto:
    """Every LayerNormalization in primitive ops; γ and β stay the initializers they are."""
    ranks = _ranks(model)
    out = onnx.ModelProto()
    out.CopyFrom(model)
    del out.graph.node[:]
    for number, node in enumerate(model.graph.node):
        if node.op_type != "LayerNormalization":
            out.graph.node.append(node)
            continue
        assert len([name for name in node.output if name]) == 1
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        put = _Writer(f"ln{number}", _dtype(model, node.input[1]))
        rank = ranks[node.input[0]]
        axes = list(range(attributes.get("axis", -1) % rank - rank, 0))
        y = SPELLINGS[spelling](put, node.input[0], axes, attributes.get("epsilon", 1e-5))
        scaled = {"output": node.output[0]} if len(node.input) < 3 else {}
        y = put("Mul", y, node.input[1], **scaled)
        if len(node.input) > 2:
            put("Add", y, node.input[2], output=node.output[0])
        out.graph.node.extend(put.nodes)
        out.graph.initializer.extend(put.initializers)
    onnx.checker.check_model(out)
    return out


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    infos = [*inferred.value_info, *inferred.input, *inferred.output]
    return {info.name: len(info.type.tensor_type.shape.dim) for info in infos}


def _dtype(model: onnx.ModelProto, initializer: str) -> Any:
    found = next(tensor for tensor in model.graph.initializer if tensor.name == initializer)
    return helper.tensor_dtype_to_np_dtype(found.data_type)


# ---- float64 ------------------------------------------------------------------------------------------


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with double for float everywhere: weights, constants, casts, inputs and outputs."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    for tensor in _tensors(wide):
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for node in wide.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
            if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                _as_tensor(attribute)
        _state_defaults(node)
    for info in (*wide.graph.input, *wide.graph.output, *wide.graph.value_info):
        if info.type.tensor_type.elem_type == TensorProto.FLOAT:
            info.type.tensor_type.elem_type = TensorProto.DOUBLE
    return wide


def _as_tensor(attribute: onnx.AttributeProto) -> None:
    number = attribute.f if attribute.name == "value_float" else list(attribute.floats)
    attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(np.asarray(number, np.float64))))


def _state_defaults(node: onnx.NodeProto) -> None:
    """ConstantOfShape makes floats where nothing is said."""
    if node.op_type == "ConstantOfShape" and not node.attribute:
        node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.zeros(1))))


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for node in model.graph.node:
        yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))


# ---- running ------------------------------------------------------------------------------------------


class RMSNormalization(OpRun):
    """The definition, at the width of x: onnx's own rounds to float32 in between (`stash_type`)."""

    op_domain = ""

    def _run(self, x: Any, scale: Any, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Any:
        axes = tuple(range(axis % x.ndim, x.ndim))
        return (x / np.sqrt((x**2).mean(axes, keepdims=True) + epsilon) * scale,)


class LayerNormalization(OpRun):
    op_domain = ""

    def _run(
        self, x: Any, scale: Any, bias: Any = None, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
    ) -> Any:
        axes = tuple(range(axis % x.ndim, x.ndim))
        mean = x.mean(axes, keepdims=True)
        d = x - mean
        root = np.sqrt((d**2).mean(axes, keepdims=True) + epsilon)
        y = d / root * scale
        y = y if bias is None else y + bias
        return (y, mean.astype(np.float32), (1 / root).astype(np.float32))[: len(self.onnx_node.output)]


def run_wide(model: onnx.ModelProto, inputs: Sequence[Feeds]) -> list[Array]:
    """Outputs of a model of doubles for all of the inputs, by onnx's reference implementation."""
    session = ReferenceEvaluator(model, new_ops=[RMSNormalization, LayerNormalization])
    return [np.asarray(each) for feeds in inputs for each in session.run(None, _wide(feeds))]


def _wide(feeds: Feeds) -> Feeds:
    return {
        name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in feeds.items()
    }


def wide_error(model: onnx.ModelProto, swapped: onnx.ModelProto, feeds: Feeds) -> float:
    """max|Δ| / max|expected| of two models of doubles."""
    return zoo.relative_error(run_wide(model, [feeds]), run_wide(swapped, [feeds]))


def error(expected: Sequence[Array], got: Sequence[Array]) -> float:
    """‖Δ‖ / ‖expected‖ over all outputs: one unlucky rounding in one number does not decide it."""
    difference = sum(float(((b.astype(np.float64) - a) ** 2).sum()) for a, b in zip(expected, got, strict=True))
    return float((difference / sum(float((a**2).sum()) for a in expected)) ** 0.5)


def run(model: onnx.ModelProto, inputs: Sequence[Feeds]) -> list[Array]:
    """Outputs from ONNX Runtime as a user has it, with all its optimisations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [each for feeds in inputs for each in session.run(None, feeds)]


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The model with these outputs alone."""
    pruned = onnx.ModelProto()
    pruned.CopyFrom(model)
    kept = [each for each in model.graph.output if each.name in names]
    del pruned.graph.output[:]
    pruned.graph.output.extend(kept)
    return pruned
