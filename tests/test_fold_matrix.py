"""Every kind of fold, times where it happens: all opsets, all scopes, all dtypes.

A kind is a small graph from x to y, built in the form that the opset has. Each result is checked in the same
way (`assert_folded`): by the checker, by its ops, by a second fold that finds nothing, by taking the fold back;
and by what it computes (`error_of`).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import infer_shapes
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, NotImplemented

import normtool
from normtool import undo
from tests import zoo
from tests.rules.test_every_rule import AGREES, BatchNormalization
from tests.traps.common import (
    Feeds,
    all_graphs,
    codes,
    content,
    fold,
    listed,
    nearest,
    spoiled,
    stored_tensors,
    verdicts,
)
from tests.zoo import Array, Net, relative_error

#: The shape of x: no two axes of one length.
SHAPE = (2, 4, 6, 5)

NEWEST = max(version for domain, version in helper.OP_SET_ID_VERSION_MAP if domain == "ai.onnx")
OPSETS = (7, 9, 11, 13, 14, 15, 17, 18, 21, 23, NEWEST)

#: Where nothing is said about it.
USUAL = 17

DTYPES = tuple(map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)))
FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = DTYPES

#: Largest |Δ| / max|y|: eight units in the last place of the largest y; in float64 what the free tests ask for.
LIMITS = {dtype: 8 * float(ml_dtypes.finfo(dtype).eps) for dtype in DTYPES} | {FLOAT64: AGREES}


# ---- ops in the form of the opset ----------------------------------------------------------------


def integers(net: Net, *numbers: int) -> str:
    return net.constant(np.array(numbers, np.int64))


def with_axes(net: Net, op_type: str, x: str, axes: list[int], moved: int, **attributes: Any) -> str:
    """Axes have been an attribute, and are an input since opset `moved`."""
    if net.opset < moved:
        return net.node(op_type, x, axes=axes, **attributes)
    return net.node(op_type, x, integers(net, *axes), **attributes)


def pad(net: Net, x: str, *pads: int, value: float | None = None) -> str:
    """With what lies at the edge, or with one number."""
    mode, stated = ("edge", {}) if value is None else ("constant", {"value": value})
    if net.opset < 11:
        return net.node("Pad", x, pads=pads, mode=mode, **stated)
    operands = [net.constant(np.array(number, net.dtype)) for number in stated.values()]
    return net.node("Pad", x, integers(net, *pads), *operands, mode=mode)


def resize(net: Net, x: str, *scales: float) -> str:
    factors = np.array(scales, np.float32)
    if net.opset < 9:
        return net.node("Upsample", x, scales=factors.tolist(), mode="nearest")
    if net.opset < 11:
        return net.node("Upsample" if net.opset < 10 else "Resize", x, net.constant(factors), mode="nearest")
    roi = net.constant(np.zeros(0, np.float32)) if net.opset < 13 else ""
    return net.node("Resize", x, roi, net.constant(factors), mode="nearest")


def split(net: Net, x: str, *lengths: int) -> list[str]:
    if net.opset < 13:
        return net.node("Split", x, outputs=len(lengths), axis=1, split=lengths)
    return net.node("Split", x, integers(net, *lengths), outputs=len(lengths), axis=1)


def cut(net: Net, x: str, axis: int, start: int, end: int) -> str:
    if net.opset < 10:
        return net.node("Slice", x, axes=[axis], starts=[start], ends=[end])
    return net.node("Slice", x, *(integers(net, n) for n in (start, end, axis)))


def dropout(net: Net, x: str) -> str:
    if net.opset < 12:
        return net.node("Dropout", x, ratio=0.3)
    return net.node("Dropout", x, net.constant(np.array(0.3, np.float32)))


def reshape(net: Net, x: str, *shape: int) -> str:
    return net.node("Reshape", x, integers(net, *shape))


def per_channel(net: Net, *shape: int) -> str:
    """A constant of both signs, nowhere near 0."""
    numbers = net.rng.uniform(0.5, 1.5, shape) * np.where(net.rng.random(shape) < 0.3, -1, 1)
    return net.constant(numbers.astype(net.dtype))


def alike(net: Net, channels: int) -> list[str]:
    """γ, β, μ and σ², in each the same number for all channels."""
    return [net.constant(np.full(channels, n, net.dtype)) for n in (-0.7, 0.3, 0.2, 2.0)]


def dense(net: Net, x: str, inputs: int, outputs: int) -> str:
    return net.node("Add", net.node("MatMul", x, net.weight(inputs, outputs)), net.weight(outputs))


def attention(net: Net, q: str, k: str, v: str) -> str:
    """Of (batch, length, channels) tensors."""
    scores = net.node("MatMul", q, net.node("Transpose", k, perm=[0, 2, 1]))
    scores = net.node("Mul", scores, net.constant(np.array(0.25, net.dtype)))
    return net.node("MatMul", net.node("Softmax", scores, axis=2), v)


# ---- the kinds -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """`build` adds the graph behind x (`SHAPE`) and returns y; `left` are its ops after the fold.

    `since`: the oldest opset. `dtypes`: dtype → the oldest opset for it, None where there is none.
    `refused`: why it stays where its weights come from the caller. `options`: what the user has to ask for.
    """

    build: Callable[[Net, str], str]
    left: tuple[str, ...]
    since: int = 7
    norms: int = 1
    dtypes: dict[Any, int | None] = field(default_factory=dict)
    refused: str = "dynamic_weight"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.build.__name__.replace("_", "-")


KINDS: list[Kind] = []

#: Those that the user has to ask for.
ASKED: list[Kind] = []


def kind(left: str, **known: Any) -> Callable[[Callable[[Net, str], str]], Callable[[Net, str], str]]:
    def register(build: Callable[[Net, str], str]) -> Callable[[Net, str], str]:
        (ASKED if "options" in known else KINDS).append(Kind(build, tuple(left.split()), **known))
        return build

    return register


@kind("Conv")
def into_the_conv_before(net: Net, x: str) -> str:
    return net.batch_norm(net.conv(x, 4, 5, 3, 3, pads=[1] * 4), 5)


@kind("Conv")
def forward_into_conv(net: Net, x: str) -> str:
    return net.conv(net.batch_norm(x, 4), 4, 3, 1, 1)


@kind("Flatten Gemm")
def forward_into_gemm(net: Net, x: str) -> str:
    y = net.node("Flatten", net.batch_norm(x, 4))
    return net.node("Gemm", y, net.weight(3, 120), net.weight(3), alpha=0.5, beta=2.0, transB=1)


@kind("Transpose MatMul Add")
def forward_into_matmul(net: Net, x: str) -> str:
    return dense(net, net.node("Transpose", net.batch_norm(x, 4), perm=[0, 2, 3, 1]), 4, 3)


@kind("ReduceMean Unsqueeze Squeeze Gemm")
def forward_through_a_mean(net: Net, x: str) -> str:
    y = with_axes(net, "ReduceMean", net.batch_norm(x, 4), [2, 3], 18, keepdims=0)
    y = with_axes(net, "Squeeze", with_axes(net, "Unsqueeze", y, [2], 13), [2], 13)
    return net.node("Gemm", y, net.weight(4, 3), net.weight(3))


@kind("Resize Pad Conv")
def forward_through_resize_and_pad(net: Net, x: str) -> str:
    y = pad(net, resize(net, net.batch_norm(x, 4), 1, 1, 2, 3), 0, 0, 1, 0, 0, 0, 2, 1)
    return net.conv(y, 4, 3, 2, 2)


@kind("Add Conv")
def forward_by_its_scale_alone(net: Net, x: str) -> str:
    return net.conv(net.batch_norm(x, 4), 4, 3, 3, 3, pads=[1] * 4)


@kind("Transpose MatMul Add Reshape Reshape", refused="no_producer")
def back_through_reshape(net: Net, x: str) -> str:
    y = dense(net, net.node("Transpose", x, perm=[0, 2, 3, 1]), 4, 3)
    return reshape(net, net.batch_norm(reshape(net, y, -1, 3), 3), 2, 30, 3)


@kind("Transpose MatMul Reshape Add Reshape")
def back_through_reshape_by_its_scale_alone(net: Net, x: str) -> str:
    y = net.node("MatMul", net.node("Transpose", x, perm=[0, 2, 3, 1]), net.weight(4, 3))
    return reshape(net, net.batch_norm(reshape(net, y, 60, 3), 3), 2, 30, 3)


@kind("Transpose MatMul Add Transpose", refused="no_producer")
def back_through_transpose(net: Net, x: str) -> str:
    y = dense(net, net.node("Transpose", x, perm=[0, 2, 3, 1]), 4, 3)
    return net.batch_norm(net.node("Transpose", y, perm=[0, 3, 1, 2]), 3)


@kind("Conv Flatten")
def back_through_flatten(net: Net, x: str) -> str:
    return net.batch_norm(net.node("Flatten", net.conv(x, 4, 5, 6, 5)), 5)


@kind("Conv Squeeze Unsqueeze")
def back_through_squeeze(net: Net, x: str) -> str:
    y = with_axes(net, "Squeeze", net.conv(x, 4, 5, 6, 5), [2, 3], 13)
    return net.batch_norm(with_axes(net, "Unsqueeze", y, [2], 13), 5)


@kind("Conv Identity Dropout AveragePool")
def back_through_carriers(net: Net, x: str) -> str:
    y = dropout(net, net.node("Identity", net.conv(x, 4, 3, 1, 1)))
    return net.batch_norm(net.node("AveragePool", y, kernel_shape=[2, 2]), 3)


@kind("Conv Pad")
def back_through_a_constant_border(net: Net, x: str) -> str:
    """Which changes too: a Pad has one number for all channels, so they have to be alike."""
    y = pad(net, net.conv(x, 4, 3, 3, 3), 0, 0, 1, 1, 0, 0, 0, 2, value=0.5)
    return net.batch_norm(y, 3, statistics=alike(net, 3))


@kind("Conv Split Slice Concat")
def back_through_parts(net: Net, x: str) -> str:
    few, many = split(net, net.conv(x, 4, 5, 1, 1), 2, 3)
    return net.batch_norm(net.node("Concat", cut(net, many, 1, 1, 3), few, axis=1), 4)


@kind("Conv Conv Concat")
def back_into_the_parts_of_a_concat(net: Net, x: str) -> str:
    parts = [net.conv(x, 4, 3, 1, 1), net.conv(x, 4, 2, 1, 1, bias=False)]
    return net.batch_norm(net.node("Concat", *parts, axis=1), 5)


@kind("Neg Conv Conv Conv Sum")
def back_into_the_terms_of_a_sum(net: Net, x: str) -> str:
    terms = [net.conv(net.node("Neg", x), 4, 3, 1, 1), net.conv(x, 4, 3, 1, 1), net.conv(x, 4, 3, 1, 1)]
    return net.batch_norm(net.node("Sum", *terms), 3)


@kind("Reshape Transpose MatMul Add MatMul Add MatMul Add Transpose MatMul Mul Softmax MatMul")
def forward_to_several_readers(net: Net, x: str) -> str:
    y = net.node("Transpose", reshape(net, net.batch_norm(x, 4), 2, 4, 30), perm=[0, 2, 1])
    return attention(net, *(dense(net, y, 4, 3) for _ in range(3)))


@kind("Reshape Reshape Transpose Transpose Transpose MatMul Mul Softmax MatMul MatMul Add")
def forward_through_attention(net: Net, x: str) -> str:
    q, v = (net.node("Transpose", reshape(net, y, 2, 4, 30), perm=[0, 2, 1]) for y in (x, net.batch_norm(x, 4)))
    return dense(net, attention(net, q, q, v), 4, 3)


@kind("Reshape Transpose MatMul Add Transpose MatMul Mul Softmax MatMul Transpose", refused="no_producer")
def back_through_attention(net: Net, x: str) -> str:
    y = net.node("Transpose", reshape(net, x, 2, 4, 30), perm=[0, 2, 1])
    y = attention(net, y, y, dense(net, y, 4, 3))
    return net.batch_norm(net.node("Transpose", y, perm=[0, 2, 1]), 3)


@kind("Conv", norms=3)
def merged_branches(net: Net, x: str) -> str:
    y = net.batch_norm(net.conv(x, 4, 4, 3, 3, pads=[1] * 4, bias=False), 4)
    y = net.node("Add", y, net.batch_norm(net.conv(x, 4, 4, 1, 1, bias=False), 4))
    return net.node("Add", y, net.batch_norm(x, 4))


@kind("Conv", norms=0)
def constants_in_a_chain(net: Net, x: str) -> str:
    y = net.conv(x, 4, 3, 1, 1)
    for op_type in ("Mul", "Add", "Div", "Sub"):
        y = net.node(op_type, y, per_channel(net, 1, 3, 1, 1))
    return y


@kind("Conv")
def constants_behind_a_norm(net: Net, x: str) -> str:
    y = net.batch_norm(net.conv(x, 4, 3, 1, 1, bias=False), 3)
    return net.node("Add", per_channel(net, 3, 1, 1), net.node("Mul", per_channel(net, 3, 1, 1), y))


@kind("DequantizeLinear Conv", since=13, dtypes={FLOAT16: 19, FLOAT64: None})
def back_into_a_dequantised_weight(net: Net, x: str) -> str:
    weight = net.constant(net.rng.integers(-100, 100, (3, 4, 3, 3)).astype(np.int8))
    scale = net.constant(net.rng.uniform(0.001, 0.01, 3).astype(net.dtype))
    zero = net.constant(np.zeros(3, np.int8))
    w = net.node("DequantizeLinear", weight, scale, zero, axis=0)
    return net.batch_norm(net.node("Conv", x, w, net.weight(3)), 3)


@kind("Conv Add Relu", options={"border_maps": True})
def forward_as_a_map_of_the_border(net: Net, x: str) -> str:
    return net.node("Relu", net.conv(net.batch_norm(x, 4), 4, 3, 3, 3, pads=[1] * 4))


@kind("Conv Conv Tanh Add", options={"duplicate": True})
def into_a_copy(net: Net, x: str) -> str:
    y = net.conv(x, 4, 3, 1, 1)
    return net.node("Add", net.node("Tanh", y), net.batch_norm(y, 3))


@kind("Relu Mul Add Relu", options={"lower": "mul-add"})
def lowered(net: Net, x: str) -> str:
    return net.node("Relu", net.batch_norm(net.node("Relu", x), 4))


# ---- the places ----------------------------------------------------------------------------------


class Numbers(Net):
    """A net whose numbers fit into a narrower dtype than the one they are stored in."""

    def __init__(self, narrow: Any, **options: Any) -> None:
        super().__init__(**options)
        self.narrow = narrow

    def constant(self, array: Any, name: str | None = None, *, dtype: Any = None) -> str:
        whole = np.asarray(array)
        same = whole.astype(self.narrow).astype(whole.dtype) if whole.dtype == self.dtype else whole
        return super().constant(same, name, dtype=dtype)


def net_of(opset: int = USUAL, dtype: Any = FLOAT32, narrow: Any = None, **options: Any) -> Net:
    ir = max(10, helper.OP_SET_ID_VERSION_MAP["ai.onnx", opset])  # type: ignore[attr-defined]
    return Numbers(narrow or dtype, **{"opset": opset, "dtype": dtype, "ir": ir, **options})


def described(net: Net) -> onnx.ModelProto:
    """The model with the shapes of everything in it, as exporters write them."""
    return infer_shapes(net.model(), check_type=True, strict_mode=True, data_prop=True)


def shape_of_y(kind: Kind, opset: int) -> list[int]:
    net = net_of(opset)
    net.output(kind.build(net, net.input(SHAPE)))
    return [dim.dim_value for dim in described(net).graph.output[0].type.tensor_type.shape.dim]


def weights_of(net: Net) -> list[onnx.TensorProto]:
    """What is no shape and no list of axes."""
    return [tensor for tensor in net.initializers if tensor.data_type != onnx.TensorProto.INT64]


def as_nodes(net: Net) -> list[onnx.NodeProto]:
    """The initializers as Constant nodes."""
    stored, net.initializers = net.initializers, []
    return [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in stored]


def main_graph(kind: Kind, net: Net) -> onnx.ModelProto:
    """y itself is the output, so that its name has to outlive what made it."""
    net.output(kind.build(net, net.input(SHAPE)), shape_of_y(kind, net.opset))
    return described(net)


def body_of_an_if(kind: Kind, net: Net, shared: bool = False) -> onnx.ModelProto:
    """Both branches use the same names for other numbers; or the same numbers, which lie around them."""
    shape, bodies = shape_of_y(kind, net.opset), []
    x, condition = net.input(SHAPE), net.input([], "condition", dtype=bool)
    for seed in (0, 0) if shared else (1, 2):
        body = net_of(net.opset, net.dtype, prefix="body.", seed=seed)
        body.output(kind.build(body, x), shape)
        if shared:  # but for shapes: onnx infers nothing in a body from what lies around it
            net.initializers = weights_of(body)
            body.initializers = [each for each in body.initializers if each not in net.initializers]
        if net.ir < 4:  # initializers would have to be inputs, and a branch has none
            body.nodes[:0] = as_nodes(body)
        bodies.append(body.graph())
    net.output(net.node("If", condition, then_branch=bodies[0], else_branch=bodies[1]), shape)
    return described(net)


def bodies_that_share_weights(kind: Kind, net: Net) -> onnx.ModelProto:
    return body_of_an_if(kind, net, shared=True)


def body_of_a_loop(kind: Kind, net: Net) -> onnx.ModelProto:
    shape, body = shape_of_y(kind, net.opset), net_of(net.opset, net.dtype, prefix="body.")
    body.input([], "i", dtype=np.int64)
    go, v = body.input([], "go", dtype=bool), body.input(SHAPE, "v")
    body.output(body.node("Identity", go), [], dtype=bool)
    body.output(body.node("Tanh", v), SHAPE)
    body.output(kind.build(body, v), shape)
    operands = net.constant(np.array(2)), net.constant(np.array(True)), net.input(SHAPE)
    last, every_y = net.node("Loop", *operands, body=body.graph(), outputs=2)
    net.output(last, SHAPE)
    net.output(every_y, [2, *shape])
    return described(net)


def functions(kind: Kind, net: Net, given: bool = False) -> onnx.ModelProto:
    """One is called twice; the other, and the main graph, use the same names for something else.

    `given`: the weights are the caller's.
    """
    shape, x = shape_of_y(kind, net.opset), net.input(SHAPE)
    for seed, name in enumerate(("Block", "Other")):
        inner = net_of(net.opset, net.dtype, seed=seed)
        inner.output(kind.build(inner, inner.input(SHAPE, "u")), shape)
        weights = [t for t in weights_of(inner) if given and t.name.startswith(("w", "c"))]
        for tensor in weights:
            inner.initializers.remove(tensor)
            inner.input(list(tensor.dims), tensor.name, helper.tensor_dtype_to_np_dtype(tensor.data_type))
            net.constant(numpy_helper.to_array(tensor), f"{name}.{tensor.name}")
        graph = described(inner).graph
        net.define(name, inner)
        net.functions[-1].value_info.extend([*graph.input, *graph.value_info, *graph.output])
        for u in (x, net.node("Tanh", x)) if name == "Block" else (x,):
            theirs = [f"{name}.{tensor.name}" for tensor in weights]
            net.output(net.node(name, u, *theirs, domain="local"), shape)
    return net.model()


@dataclass(frozen=True)
class Place:
    """`copies` graphs or functions hold the kind, and beside it the ops `also`."""

    build: Callable[[Kind, Net], onnx.ModelProto]
    copies: int = 1
    also: tuple[str, ...] = ()


MAIN = Place(main_graph)
BODIES = (
    Place(body_of_an_if, 2),
    Place(bodies_that_share_weights, 2),
    Place(body_of_a_loop, 1, ("Identity", "Tanh")),
    Place(functions, 2),
)


# ---- what is asked of every result ---------------------------------------------------------------


def drawn(model: onnx.ModelProto, condition: bool) -> Feeds:
    rng, stored = np.random.default_rng(0), {tensor.name for tensor in model.graph.initializer}
    feeds: Feeds = {}
    for info in model.graph.input:
        if info.name not in stored:
            dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
            numbers = rng.standard_normal([dim.dim_value for dim in info.type.tensor_type.shape.dim])
            feeds[info.name] = np.asarray(condition if dtype.kind == "b" else numbers, dtype)
    return feeds


def computed(model: onnx.ModelProto, condition: bool = True) -> list[Array]:
    """By ONNX Runtime, every optimisation disabled; by onnx itself where that lacks the opset or a kernel."""
    feeds = drawn(model, condition)
    try:
        return zoo.run(model, feeds)
    except (Fail, NotImplemented):
        own_ops: Any = [BatchNormalization] if model.opset_import[0].version < 14 else None
        return [np.asarray(y) for y in ReferenceEvaluator(model, new_ops=own_ops).run(None, feeds)]


def error_of(other: onnx.ModelProto, model: onnx.ModelProto) -> float:
    conditions = (True, False) if len(drawn(model, True)) > 1 else (True,)
    return max(relative_error(computed(model, each), computed(other, each)) for each in conditions)


def op_types(model: onnx.ModelProto) -> list[list[str]]:
    """Of every graph and function, Constant aside. Upsample is an old name of Resize."""
    renamed = {"Upsample": "Resize"}
    return [
        sorted(renamed.get(node.op_type, node.op_type) for node in graph.node if node.op_type != "Constant")
        for graph in all_graphs(model)
    ]


def assert_sound(graph: Any, around: Collection[str] = ()) -> None:
    """No name is defined twice where it can be seen; only what exists is described, and all of it is read."""
    given = [each if isinstance(each, str) else each.name for each in graph.input]
    made = [tensor.name for tensor in getattr(graph, "initializer", ())]
    made += [name for node in graph.node for name in node.output]
    names = [*(name for name in given if name not in made), *made]
    assert len(names) == len(set(names))
    assert not set(names) & set(around)
    assert {info.name for info in graph.value_info} <= set(names)
    reads = {name for each in (graph, *bodies_in(graph)) for name in reads_of(each)}
    assert set(made) <= reads
    assert reads_of(graph) <= {"", *names, *around}
    for body in bodies_in(graph):
        assert_sound(body, {*names, *around})


def bodies_in(graph: Any) -> list[onnx.GraphProto]:
    return [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]


def reads_of(graph: Any) -> set[str]:
    outputs = {each if isinstance(each, str) else each.name for each in graph.output}
    return outputs | {name for node in graph.node for name in node.input}


def interface(model: onnx.ModelProto) -> list[bytes]:
    """Names, types and shapes of what the caller gives and gets."""
    stored = {tensor.name for tensor in model.graph.initializer}
    infos = (*model.graph.input, *model.graph.output)
    return [info.SerializeToString(deterministic=True) for info in infos if info.name not in stored]


def assert_folded(model: onnx.ModelProto, kind: Kind, place: Place = MAIN, **options: Any) -> onnx.ModelProto:
    """All but what the result computes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(undo, "SMALL_BYTES", 0)  # the record would simply hold small tensors
        result = fold(model, undo=True, **kind.options, **options)
    assert set(verdicts(result)) == {"lowered" if "lower" in kind.options else "folded"}, codes(result)
    folded: onnx.ModelProto = result.model
    onnx.checker.check_model(folded, full_check=True)
    for graph in (folded.graph, *folded.functions):
        assert_sound(graph)
    types = op_types(folded)
    assert types.count(sorted([*kind.left, *place.also])) == place.copies, types
    assert not any("BatchNormalization" in each for each in types)
    assert interface(folded) == interface(model)
    assert content(fold(folded, **kind.options, **options).model) == content(folded)
    assert_restored(normtool.unfold(folded, result.undo, validate=False).model, model)
    return folded


def assert_restored(restored: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Bit for bit, but for the two roundings of a weight that was multiplied and divided."""
    expected = onnx.ModelProto()
    expected.CopyFrom(model)
    for tensor, back in zip(stored_tensors(expected), stored_tensors(restored), strict=True):
        old, new = numpy_helper.to_array(tensor), numpy_helper.to_array(back)
        assert old.dtype == new.dtype
        room = ml_dtypes.finfo(old.dtype) if old.dtype in DTYPES else None
        rtol, atol = (2 * float(room.eps), 4 * float(room.smallest_subnormal)) if room else (0.0, 0.0)
        assert np.allclose(new.astype(np.float64), old.astype(np.float64), rtol, atol)
        tensor.CopyFrom(back)
    assert content(restored) == content(expected)


# ---- the matrix ----------------------------------------------------------------------------------

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@pytest.mark.parametrize(
    ("kind", "opset"),
    [pytest.param(k, n, id=f"{k.name}-{n}") for k in (*KINDS, *ASKED) for n in OPSETS if n >= k.since],
)
def test_at_every_opset(kind: Kind, opset: int) -> None:
    model = main_graph(kind, net_of(opset))
    assert error_of(assert_folded(model, kind), model) < LIMITS[FLOAT32]


@pytest.mark.parametrize("place", BODIES, ids=lambda place: place.build.__name__.replace("_", "-"))
@pytest.mark.parametrize("kind", [*KINDS, *ASKED], ids=lambda kind: kind.name)
def test_in_every_place(kind: Kind, place: Place) -> None:
    model = place.build(kind, net_of(USUAL))
    assert error_of(assert_folded(model, kind, place), model) < LIMITS[FLOAT32]


def oldest_opset(kind: Kind, dtype: Any) -> int | None:
    """The usual one where it will do; no Conv had bfloat16 before 22."""
    return kind.dtypes.get(dtype, 22 if dtype == BFLOAT16 else USUAL)


@pytest.mark.parametrize(
    ("kind", "dtype", "opset"),
    [
        pytest.param(k, dtype, opset, id=f"{k.name}-{dtype}")
        for k in KINDS
        for dtype in DTYPES
        if (opset := oldest_opset(k, dtype)) is not None
    ],
)
def test_in_every_dtype(kind: Kind, dtype: Any, opset: int) -> None:
    """Each weight is that of a fold in float64, rounded once; this holds for what nothing can run, too."""
    model = main_graph(kind, net_of(opset, dtype))
    folded = assert_folded(model, kind)
    wide = FLOAT64 if FLOAT64 not in kind.dtypes else FLOAT32
    same = main_graph(kind, net_of(opset, wide, narrow=dtype))
    exact = assert_folded(same, kind)
    for stored, tensor in zip(stored_tensors(folded), stored_tensors(exact), strict=True):
        got, wanted = numpy_helper.to_array(stored), numpy_helper.to_array(tensor)
        if got.dtype == dtype != wide:
            wanted = nearest(wanted.astype(np.longdouble), dtype)
        assert np.array_equal(got, wanted)
    assert error_of(exact, same) < LIMITS[wide]
    if dtype != BFLOAT16:  # ONNX Runtime has no kernels for it on a CPU, and onnx evaluates it in float32
        assert error_of(folded, model) < LIMITS[dtype]


class Alike(Numbers):
    """All channels of a norm have the same numbers, as before training: one number in all lies on any axis."""

    def statistics(self, channels: int) -> list[str]:
        return alike(self, channels)


@every_kind
def test_where_all_channels_are_alike(kind: Kind) -> None:
    model = main_graph(kind, Alike(FLOAT32))
    assert error_of(assert_folded(model, kind), model) < LIMITS[FLOAT32]


def test_a_wrong_fold_would_be_seen() -> None:
    model = main_graph(KINDS[0], net_of())
    assert error_of(spoiled(assert_folded(model, KINDS[0])), model) > 100 * LIMITS[FLOAT32]


# ---- what must not happen ------------------------------------------------------------------------


def assert_kept(model: onnx.ModelProto, kind: Kind, reason: str) -> None:
    result = fold(model)
    assert set(verdicts(result)) == ({"kept"} if kind.norms else set()), op_types(result.model)
    assert reason in codes(result) or not kind.norms
    assert content(result.model) == content(model)


@every_kind
def test_weights_that_come_from_the_caller_stop_it(kind: Kind) -> None:
    assert_kept(functions(kind, net_of(), given=True), kind, kind.refused)


def add_reader_in_bodies(net: Net, captured: str) -> None:
    bodies = []
    for op_type in ("Neg", "Abs"):
        body = net_of(prefix=f"{op_type}.")
        body.output(body.node(op_type, captured))
        bodies.append(body.graph())
    condition = net.input([], "condition", dtype=bool)
    net.output(net.node("If", condition, then_branch=bodies[0], else_branch=bodies[1]))


@every_kind
def test_a_body_that_captures_a_tensor_on_the_way_stops_it(kind: Kind) -> None:
    net = net_of()
    net.output(kind.build(net, net.input(SHAPE)), shape_of_y(kind, USUAL))
    stage = next(node for node in net.nodes if node.op_type == ("BatchNormalization" if kind.norms else "Mul"))
    captured = stage.output[0] if stage.input[0] == "x" else stage.input[0]
    add_reader_in_bodies(net, captured)
    model = described(net)
    result = fold(model)
    assert "captured" in codes(result) or not kind.norms
    assert stage.op_type in op_types(result.model)[0]
    assert error_of(result.model, model) < LIMITS[FLOAT32]


class Huge(Numbers):
    """γ/√(σ² + ε) is about 10⁶, and float16 ends at 65504."""

    def batch_norm(self, x: str, channels: int, **_: Any) -> str:
        statistics = [self.constant(np.full(channels, n, self.dtype)) for n in (3e4, 1.0, 1.0, 1e-4)]
        return super().batch_norm(x, channels, statistics=statistics)


@pytest.mark.parametrize(
    "kind", [k for k in KINDS if k.norms and FLOAT16 not in k.dtypes], ids=lambda k: k.name
)
def test_what_leaves_the_range_of_float16_is_refused(kind: Kind) -> None:
    assert_kept(main_graph(kind, Huge(FLOAT16, dtype=FLOAT16)), kind, "range_overflow")


def test_what_leaves_the_range_on_one_way_takes_another() -> None:
    net = Huge(FLOAT16, dtype=FLOAT16)
    x = net.node("Mul", net.input(SHAPE), net.constant(np.array(1e-4, FLOAT16)))
    weights = [
        net.constant((net.rng.standard_normal((4, 4, 1, 1)) * size).astype(FLOAT16)) for size in (9, 1e-2)
    ]
    y = net.batch_norm(net.node("Conv", x, weights[0]), 4)
    net.output(net.node("Conv", y, weights[1]), SHAPE)
    model = described(net)
    result = fold(model)
    assert verdicts(result) == ["folded"]
    assert result.sites[0].fold.into == (model.graph.node[-1].name,)
    assert error_of(result.model, model) < LIMITS[FLOAT16]


# ---- inputs, names -------------------------------------------------------------------------------


def listed_graph(kind: Kind, **options: Any) -> onnx.ModelProto:
    """Every initializer is an input too: a duty before IR version 4, an offer to the caller since."""
    net = net_of(**options)
    net.output(kind.build(net, net.input(SHAPE)), shape_of_y(kind, net.opset))
    return described(listed(net))


@pytest.mark.parametrize("place", ["main", "if"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.since <= 8], ids=lambda kind: kind.name)
def test_before_ir_version_4(kind: Kind, place: str) -> None:
    if place == "main":
        model = listed_graph(kind, opset=8, ir=3)
        folded = assert_folded(model, kind)
        assert {t.name for t in folded.graph.initializer} <= {info.name for info in folded.graph.input}
    else:
        model = body_of_an_if(kind, net_of(9, ir=3))
        folded = assert_folded(model, kind, BODIES[0])
    assert error_of(folded, model) < LIMITS[FLOAT32]


@every_kind
def test_what_the_caller_may_override_is_kept_unless_it_is_frozen(kind: Kind) -> None:
    model = listed_graph(kind)
    assert_kept(model, kind, "overridable")
    folded = assert_folded(model, kind, freeze=True)
    assert [info.name for info in folded.graph.input] == ["x"]
    assert error_of(folded, model) < LIMITS[FLOAT32]


@every_kind
def test_what_enters_keeps_its_name_for_others(kind: Kind) -> None:
    """An output of the model, and a body, read what a norm reads that goes forward."""
    net = net_of()
    u = net.node("Neg", net.input(SHAPE))
    y = kind.build(net, u)
    add_reader_in_bodies(net, u)
    net.output(u, SHAPE)
    net.output(y, shape_of_y(kind, USUAL))
    model = described(net)
    folded = fold(model).model
    assert sorted(["Neg", "If", *kind.left]) in op_types(folded)
    assert_sound(folded.graph)
    assert interface(folded) == interface(model)
    assert error_of(folded, model) < LIMITS[FLOAT32]


def test_two_outputs_that_become_one_tensor_keep_both_names() -> None:
    net = net_of()
    y, statistics = net.conv(net.input(SHAPE), 4, 3, 1, 1), net.statistics(3)
    for _ in range(2):
        net.output(net.batch_norm(y, 3, statistics=statistics), [2, 3, 6, 5])
    model = described(net)
    folded = assert_folded(model, Kind(main_graph, ("Conv", "Identity")))
    assert error_of(folded, model) < LIMITS[FLOAT32]


@every_kind
def test_a_new_name_is_one_that_no_body_uses(kind: Kind) -> None:
    plain = main_graph(kind, net_of())
    before, after = (names_of(model.graph) for model in (plain, fold(plain).model))
    taken = sorted(after - before) or ["another"]
    net, bodies = net_of(), []
    y = kind.build(net, net.input(SHAPE))
    for op_type in ("Neg", "Abs"):
        body = net_of()
        for name in taken:
            body.node(op_type, "x", outputs=[name], name=name)
        body.output(taken[-1], SHAPE)
        bodies.append(body.graph())
    condition = net.input([], "condition", dtype=bool)
    net.output(net.node("If", condition, then_branch=bodies[0], else_branch=bodies[1]), SHAPE)
    net.output(y, shape_of_y(kind, USUAL))
    model = described(net)
    folded = fold(model).model
    assert_sound(folded.graph)
    assert len(names_of(folded.graph)) == len(after) + 2
    assert error_of(folded, model) < LIMITS[FLOAT32]


def names_of(graph: onnx.GraphProto) -> set[str]:
    made = {name for node in graph.node for name in node.output}
    return made | {tensor.name for tensor in (*graph.initializer, *graph.input)}


# ---- the whole way -------------------------------------------------------------------------------

VALIDATED = (
    forward_by_its_scale_alone,
    forward_to_several_readers,
    merged_branches,
    back_into_a_dequantised_weight,
)


@pytest.mark.usefixtures("worker_in_this_process")
@pytest.mark.parametrize("build", VALIDATED, ids=lambda build: build.__name__.replace("_", "-"))
def test_normtool_says_so_itself(build: Any) -> None:
    kind = next(kind for kind in KINDS if kind.build is build)
    result = normtool.fold(main_graph(kind, net_of()), undo=True)
    back = normtool.unfold(result.model, result.undo)
    for each in (result, back):
        assert each.validation is not None
        assert each.validation.verdict == "equal"
