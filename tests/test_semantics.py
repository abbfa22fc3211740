"""The float64 definitions against ONNX Runtime and PyTorch, over everything their attributes can say."""

import itertools
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from normtool import values
from normtool.ops import ROWS, OpRow, Spelling, f32, find_spelling
from normtool.semantics import KINDS, evaluate
from normtool.values import Dense
from tests import zoo

Array = np.ndarray[Any, Any]
Attributes = dict[str, Any]
functional = torch.nn.functional

#: Rounding errors allowed, in units of the dtype's eps times the sum of magnitudes: sums have up to 100 terms.
ROUNDINGS = 16

#: ONNX Runtime's CPU kernels for these exist in float32 alone.
IN_SINGLE = set(
    "Conv ConvTranspose AveragePool GlobalAveragePool LeakyRelu PRelu Resize Upsample "
    "QuantizeLinear DequantizeLinear InstanceNormalization GroupNormalization".split()
)

#: Operators whose outputs are sums of products: |inputs| give the magnitude of the terms.
PRODUCTS = {"conv", "conv_transpose", "linear", "matmul"}


@dataclass(frozen=True)
class Case:
    """One call of an operator. `data` names the slots that are inputs of the model and not constants."""

    op_type: str
    attributes: Attributes
    inputs: dict[str, Array]
    data: str = "x"
    opset: int = 21
    outputs: int = 1
    #: what ONNX Runtime cannot be told, and the definition is
    beside: Attributes = field(default_factory=dict)

    @property
    def spelling(self) -> tuple[Spelling, OpRow]:
        found = find_spelling("", self.op_type, self.opset)
        assert found is not None
        return found

    @property
    def kind(self) -> str:
        return self.spelling[1].kind

    @property
    def dtype(self) -> Any:
        return np.float32 if self.op_type in IN_SINGLE else np.float64

    def rounded(self) -> "Case":
        """The case with its floats in the dtype that ONNX Runtime computes in."""
        inputs = {slot: a.astype(self.dtype) if a.dtype == float else a for slot, a in self.inputs.items()}
        return replace(self, inputs=inputs)


def defined(case: Case) -> list[Array]:
    inputs = {
        slot: array.astype(np.float64) if slot in case.data.split() else Dense(array)
        for slot, array in case.inputs.items()
    }
    return list(evaluate(case.kind, {**case.attributes, **case.beside}, inputs).values())[
        : case.outputs
    ]  # statistics: below


def in_runtime(case: Case) -> list[Array]:
    return zoo.run(model_of(case), {slot: case.inputs[slot] for slot in case.data.split()})


def in_reference(case: Case) -> list[Array]:
    """onnx's own evaluator, in float64."""
    feeds = {slot: case.inputs[slot].astype(np.float64) for slot in case.data.split()}
    results: list[Array] = ReferenceEvaluator(model_of(case)).run(None, feeds)
    return results


def model_of(case: Case) -> onnx.ModelProto:
    net, data = zoo.Net(opset=case.opset), case.data.split()
    names = {
        slot: net.input(list(array.shape), slot, array.dtype) if slot in data else net.constant(array)
        for slot, array in case.inputs.items()
    }
    slots = case.spelling[0].slots
    if slots[-1].endswith("*"):
        slots = tuple(names)
    while slots[-1] not in names:
        slots = slots[:-1]
    inputs = [names.get(slot, "") for slot in slots]
    outputs = [net.fresh("y") for _ in range(case.outputs)]
    net.node(case.op_type, *inputs, outputs=outputs, **case.attributes)
    net.outputs.extend(onnx.ValueInfoProto(name=name) for name in outputs)  # ONNX Runtime infers their types
    return net.model()


def magnitudes(case: Case, got: Array) -> Array:
    """What rounding errors are relative to: the sum of the magnitudes of what was added up."""
    if case.kind in PRODUCTS:
        unsigned = {k: abs(v) if k in ("alpha", "beta") else v for k, v in case.attributes.items()}
        inputs = {slot: np.abs(array) for slot, array in case.inputs.items()}
        return defined(replace(case, attributes=unsigned, inputs=inputs))[0]
    if case.kind == "batch_norm":
        along = (-1, *[1] * (got.ndim - 2))
        gamma, beta, mean = (np.abs(case.inputs[slot].reshape(along)) for slot in ("weight", "bias", "mean"))
        deviation = np.sqrt(case.inputs["var"].reshape(along))
        return np.asarray(np.abs(got) + (np.abs(case.inputs["x"]) + mean) / deviation * gamma + beta)
    floats = [np.abs(a).max(initial=0.0) for a in case.inputs.values() if a.dtype == case.dtype]
    return np.asarray(np.abs(got) + max(floats))


def check(case: Case, run: Any = in_runtime) -> None:
    """The definition agrees with ONNX Runtime within the rounding errors of the runtime's dtype."""
    case = case.rounded()
    expected, got = run(case), defined(case)
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == np.float64
        assert mine.shape == theirs.shape
        allowed = ROUNDINGS * np.finfo(case.dtype).eps * magnitudes(case, mine)
        assert np.all(np.abs(mine - theirs.astype(np.float64)) <= allowed)


def random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def integers(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


def chosen(draw: Any, **attributes: Any) -> Attributes:
    """Some of these attributes; what is left out has its default."""
    return {name: value for name, value in attributes.items() if draw(st.booleans())}


def per_axis(draw: Any, low: int, high: int, count: int) -> list[int]:
    return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))


# ---- convolution and pooling ------------------------------------------------------------------


@st.composite
def windows(draw, rank: int, kernel: list[int], autos: str) -> tuple[Attributes, list[int]]:
    """Attributes that place windows, and a size of the input that holds one."""
    auto_pad = draw(st.sampled_from(autos.split()))
    strides, dilations = per_axis(draw, 1, 3, rank), per_axis(draw, 1, 3, rank)
    if auto_pad.startswith("SAME"):
        # ONNX Runtime refuses dilation here, and nobody defines the padding of strides beyond the kernel
        strides = [min(s, k) for s, k in zip(strides, kernel, strict=True)]
        dilations = [1] * rank
    attributes = chosen(draw, strides=strides, dilations=dilations)
    if auto_pad == "NOTSET":
        # padding of a whole window and more is refused
        pads = [min(p, k - 1) for p, k in zip(per_axis(draw, 0, 2, 2 * rank), kernel * 2, strict=True)]
        attributes |= chosen(draw, auto_pad=auto_pad, pads=pads)
    else:
        attributes["auto_pad"] = auto_pad
    used = attributes.get("dilations", [1] * rank)
    more = per_axis(draw, 0, 4, rank)
    return attributes, [(k - 1) * d + 1 + m for k, d, m in zip(kernel, used, more, strict=True)]


@st.composite
def conv(draw) -> Case:
    rank, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = per_axis(draw, 1, 3, rank)
    attributes, size = draw(windows(rank, kernel, "NOTSET VALID SAME_UPPER SAME_LOWER"))
    attributes |= chosen(draw, kernel_shape=kernel)
    if groups > 1:
        attributes["group"] = groups
    inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    inputs = {
        "x": random(draw(st.integers(0, 99)), draw(st.integers(1, 2)), inner * groups, *size),
        "weight": random(1, outer * groups, inner, *kernel),
    }
    if draw(st.booleans()):
        inputs["bias"] = random(2, outer * groups)
    return Case("Conv", attributes, inputs)


@st.composite
def conv_transpose(draw) -> Case:
    rank, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, size = per_axis(draw, 1, 3, rank), per_axis(draw, 2, 4, rank)
    attributes = chosen(
        draw,
        strides=per_axis(draw, 1, 3, rank),
        dilations=per_axis(draw, 1, 2, rank),
        kernel_shape=kernel,
    )
    strides, dilations = (attributes.get(name, [1] * rank) for name in ("strides", "dilations"))
    extra = [min(e, s - 1) for e, s in zip(per_axis(draw, 0, 2, rank), strides, strict=True)]
    attributes |= chosen(draw, output_padding=extra)
    extra = attributes.get("output_padding", [0] * rank)
    axes = zip(size, strides, kernel, dilations, extra, strict=True)
    full = [(n - 1) * s + (k - 1) * d + 1 + e for n, s, k, d, e in axes]
    match draw(st.sampled_from(["pads", "auto_pad", "output_shape", "output_shape and auto_pad"])):
        case "pads":
            drawn = per_axis(draw, 0, 2, 2 * rank)
            pads = [min(p, (f - 1) // 2) for p, f in zip(drawn, full * 2, strict=True)]
            attributes |= chosen(draw, pads=pads)
        case "auto_pad":
            attributes["auto_pad"] = draw(st.sampled_from(["VALID", "SAME_UPPER", "SAME_LOWER"]))
        case form:
            crops = [min(c, f - 1) for c, f in zip(per_axis(draw, 0, 3, rank), full, strict=True)]
            attributes["output_shape"] = [f - c for f, c in zip(full, crops, strict=True)]
            if "and" in form:
                attributes["auto_pad"] = draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER"]))
    if groups > 1:
        attributes["group"] = groups
    inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    inputs = {
        "x": random(draw(st.integers(0, 99)), draw(st.integers(1, 2)), inner * groups, *size),
        "weight": random(1, inner * groups, outer, *kernel),
    }
    if draw(st.booleans()):
        inputs["bias"] = random(2, outer * groups)
    return Case("ConvTranspose", attributes, inputs)


@st.composite
def pool(draw) -> Case:
    rank, op_type = draw(st.integers(1, 3)), draw(st.sampled_from(["AveragePool", "MaxPool"]))
    kernel = per_axis(draw, 1, 4, rank)
    attributes, size = draw(windows(rank, kernel, "NOTSET NOTSET VALID SAME_UPPER SAME_LOWER"))
    attributes["kernel_shape"] = kernel
    if attributes.get("auto_pad", "NOTSET") == "NOTSET":
        attributes |= chosen(draw, ceil_mode=1)
    if op_type == "AveragePool":
        attributes |= chosen(draw, count_include_pad=1)
    return Case(op_type, attributes, {"x": random(draw(st.integers(0, 99)), 2, 2, *size)})


@given(conv())
@settings(deadline=None, max_examples=200)
def test_conv(case):
    check(case)


@given(conv_transpose())
@settings(deadline=None, max_examples=200)
def test_conv_transpose(case):
    check(case)


@given(pool())
@settings(deadline=None, max_examples=200)
def test_pool(case):
    check(case)


# ---- matrix products and normalisation --------------------------------------------------------

sides = st.integers(1, 9)
scalars = st.sampled_from([0.0, 1.0, 0.5, -1.5, 3.0])


@given(st.data(), sides, sides, sides)
@settings(deadline=None, max_examples=100)
def test_gemm(data, m, k, n):
    turned = data.draw(st.tuples(st.booleans(), st.booleans()))
    attributes = chosen(data.draw, alpha=data.draw(scalars), beta=data.draw(scalars))
    attributes |= {name: 1 for name, is_turned in zip(("transA", "transB"), turned, strict=True) if is_turned}
    inputs = {"a": random(0, *((k, m) if turned[0] else (m, k)))}
    inputs["b"] = random(1, *((n, k) if turned[1] else (k, n)))
    shape = data.draw(st.sampled_from([None, (), (n,), (1, n), (m, 1), (1, 1), (m, n)]))
    if shape is not None:
        inputs["c"] = random(2, *shape)
    check(Case("Gemm", attributes, inputs, data="a"))


@given(st.data(), sides, sides, sides)
@settings(deadline=None, max_examples=100)
def test_matmul(data, m, k, n):
    """A constant on either side or on none, with leading axes that broadcast."""
    lead = tuple(data.draw(st.lists(st.integers(1, 3), max_size=2)))
    partial = lead[data.draw(st.integers(0, len(lead))) :]
    left, right = data.draw(st.sampled_from([(lead, partial), (partial, lead), (lead, lead)]))
    inputs = {"a": random(0, *left, m, k), "b": random(1, *right, k, n)}
    check(Case("MatMul", {}, inputs, data=data.draw(st.sampled_from(["a", "b", "a b"]))))


@given(st.data(), st.integers(1, 5), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_batch_norm(data, channels, spatial):
    inputs = {"x": random(5, 2, channels, *per_axis(data.draw, 1, 4, spatial))}
    inputs |= {slot: random(seed, channels) for seed, slot in enumerate(("weight", "bias", "mean"))}
    inputs["var"] = np.abs(random(9, channels)) + data.draw(st.sampled_from([0.01, 1.0]))
    attributes = chosen(data.draw, epsilon=f32(data.draw(st.sampled_from([0.0, 1e-5, 1e-3, 1.0]))))
    check(Case("BatchNormalization", attributes, inputs))


# ---- everything else, one case per line -------------------------------------------------------


def shaped(
    op_type: str, size: tuple[int, ...], attributes: Attributes | None = None, opset: int = 21, **inputs: Array
) -> Case:
    return Case(op_type, attributes or {}, {"x": random(0, *size), **inputs}, opset=opset)


def parts(count: int, size: tuple[int, ...], attributes: Attributes, **more: Any) -> Case:
    return replace(shaped("Split", size, attributes, **more), outputs=count)


def several(op_type: str, attributes: Attributes, *shapes: tuple[int, ...], data: str) -> Case:
    return Case(op_type, attributes, {f"inputs.{i}": random(i, *s) for i, s in enumerate(shapes)}, data=data)


def quantized(op_type: str, attributes: Attributes, shape: tuple[int, ...], zero_point: Any) -> Case:
    """Scales that are powers of two, so that float32 divides as float64 does."""
    scale = 2.0 ** -np.arange(1, 1 + np.size(zero_point)).reshape(np.shape(zero_point))
    x = random(0, *shape) * 60
    half_way = np.round(x * 4) / 4
    x = x.clip(0, 100).astype(zero_point.dtype) if op_type == "DequantizeLinear" else half_way
    return Case(op_type, attributes, {"x": x, "scale": scale, "zero_point": zero_point})


def normed(
    op_type: str,
    size: tuple[int, ...],
    weight: int | tuple[int, ...],
    attributes: Attributes | None = None,
    bias: bool = True,
    opset: int = 21,
) -> Case:
    """γ of both signs, β away from 0, x with a mean that is not."""
    shape = (weight,) if isinstance(weight, int) else weight
    inputs = {"x": random(0, *size) * 0.5 + 0.4, "weight": random(1, *shape)}
    inputs |= {"bias": random(2, *shape)} if bias else {}
    return Case(op_type, attributes or {}, inputs, opset=opset)


LAST = 2**63 - 1

CASES = {
    "relu": shaped("Relu", (3, 4)),
    "neg": shaped("Neg", (3, 4)),
    "leaky_relu": shaped("LeakyRelu", (3, 4)),
    "leaky_relu-alpha": shaped("LeakyRelu", (3, 4), {"alpha": f32(0.3)}),
    "prelu": shaped("PRelu", (2, 3, 4, 5), slope=random(1, 3, 1, 1)),
    "prelu-last-axis": shaped("PRelu", (2, 3, 4), slope=random(1, 4)),
    "identity": shaped("Identity", (3, 4)),
    "dropout": shaped("Dropout", (3, 4), ratio=np.array(0.5)),
    "sum": several("Sum", {}, (2, 3, 4), (3, 1), (4,), data="inputs.0 inputs.2"),
    "concat": several("Concat", {"axis": 1}, (2, 3), (2, 1), (2, 4), data="inputs.1"),
    "concat-many": several("Concat", {"axis": -1}, *[(2, i % 3) for i in range(12)], data="inputs.11"),
    "tile": shaped("Tile", (2, 3), repeats=np.array([3, 2])),
    "gather_nd": Case("GatherND", {}, {"x": random(0, 3, 4, 5), "indices": np.array([[2, 0], [1, 3]])}),
    "gather_nd-negative": Case("GatherND", {}, {"x": random(0, 3, 4), "indices": np.array([[-1], [0], [1]])}),
    "transpose": shaped("Transpose", (2, 3, 4)),
    "transpose-perm": shaped("Transpose", (2, 3, 4), {"perm": [2, 0, 1]}),
    "reshape": shaped("Reshape", (2, 3, 4), shape=integers(4, -1, 2)),
    "reshape-zero": shaped("Reshape", (2, 3, 4), shape=integers(0, -1)),
    "reshape-allowzero": shaped("Reshape", (2, 0, 4), {"allowzero": 1}, shape=integers(0, 3, 5)),
    "flatten": shaped("Flatten", (2, 3, 4)),
    "flatten-0": shaped("Flatten", (2, 3, 4), {"axis": 0}),
    "flatten-negative": shaped("Flatten", (2, 3, 4), {"axis": -1}),
    "flatten-end": shaped("Flatten", (2, 3, 4), {"axis": 3}),
    "squeeze": shaped("Squeeze", (1, 3, 1, 4)),
    "squeeze-axes": shaped("Squeeze", (1, 3, 1, 4), axes=integers(-2)),
    "squeeze-attribute": shaped("Squeeze", (1, 3, 1, 4), {"axes": [2]}, opset=11),
    "unsqueeze": shaped("Unsqueeze", (3, 4), axes=integers(0, -1)),
    "unsqueeze-attribute": shaped("Unsqueeze", (3, 4), {"axes": [1, 2]}, opset=11),
    "expand": shaped("Expand", (3, 1), shape=integers(2, 1, 4)),
    "split": parts(3, (2, 7), {"axis": -1}, split=integers(3, 0, 4)),
    "split-attribute": parts(2, (5, 2), {"split": [2, 3]}, opset=11),
    "split-num_outputs": parts(3, (2, 7), {"axis": 1, "num_outputs": 3}),
    "split-equal": replace(parts(2, (2, 6), {"axis": 1}, opset=13), beside={"num_outputs": 2}),
    "slice": shaped(
        "Slice",
        (5, 6, 7),
        starts=integers(-9, 1, LAST),
        ends=integers(LAST, -1, -LAST - 1),
        axes=integers(0, -1, 1),
        steps=integers(2, 3, -2),
    ),
    "slice-leading-axes": shaped("Slice", (5, 6), starts=integers(1), ends=integers(9)),
    "slice-negative-clamped": shaped(
        "Slice", (5, 6), starts=integers(9), ends=integers(-99), axes=integers(1), steps=integers(-1)
    ),
    "slice-empty": shaped("Slice", (5, 6), starts=integers(4), ends=integers(2)),
    "slice-attributes": shaped("Slice", (5, 6), {"starts": [1], "ends": [-1], "axes": [1]}, opset=9),
    "gather": Case(
        "Gather",
        {},
        {"table": random(0, 5, 3), "indices": integers(4, -5, 2, 0).reshape(2, 2)},
        data="indices",
    ),
    "gather-scalar": Case("Gather", {}, {"table": random(0, 5, 3), "indices": np.array(-2)}, data="indices"),
    "gather-axis": Case(
        "Gather", {"axis": -1}, {"table": random(0, 2, 3, 4), "indices": integers(-1, 0)}, data="table"
    ),
    **{
        f"pad-{mode}": shaped("Pad", (4, 5), {"mode": mode}, pads=integers(1, 3, 2, 0))
        for mode in ("reflect", "edge", "wrap")
    },
    "pad": shaped("Pad", (4, 5), pads=integers(1, 3, 2, 0)),
    "pad-value": shaped("Pad", (4, 5), pads=integers(1, -2, 2, 3), value=np.array(1.5)),
    "pad-axes": shaped("Pad", (4, 5, 6), pads=integers(1, 2, 0, -3), axes=integers(-1, 0)),
    "pad-attributes": shaped("Pad", (4, 5), {"pads": [1, 3, 2, 0], "value": f32(0.3)}, opset=10),
    "resize-default": shaped("Resize", (1, 2, 5, 6), scales=np.float32([1, 1, 2, 0.5])),
    "resize-axes": shaped("Resize", (1, 2, 5, 6), {"axes": [-1, 2], "mode": "linear"}, sizes=integers(4, 7)),
    "resize-cubic_coeff_a": shaped(
        "Resize", (1, 1, 5, 6), {"mode": "cubic", "cubic_coeff_a": -0.5}, sizes=integers(1, 1, 4, 9)
    ),
    "resize-exclude_outside": shaped(
        "Resize", (1, 1, 5, 6), {"mode": "cubic", "exclude_outside": 1}, sizes=integers(1, 1, 4, 9)
    ),
    "resize-half_pixel_symmetric": shaped(
        "Resize",
        (1, 1, 5, 6),
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel_symmetric"},
        scales=np.float32([1, 1, 0.5, 1.25]),
    ),
    "resize-float32-scale": shaped("Resize", (1, 1, 10), {"mode": "linear"}, scales=np.float32([1, 1, 0.7])),
    **{
        f"resize-to-one-{transformation}": shaped(
            "Resize",
            (1, 1, 5, 6),
            {"mode": "cubic", "coordinate_transformation_mode": transformation},
            sizes=integers(1, 1, 1, 9),
        )
        for transformation in ("pytorch_half_pixel", "align_corners")
    },
    "resize-empty-scales": shaped(
        "Resize", (1, 2, 5, 6), scales=np.float32([]), sizes=integers(1, 2, 9, 4), opset=11, roi=np.float32([])
    ),
    "global_average_pool": shaped("GlobalAveragePool", (2, 3, 4, 5)),
    "reduce_mean": shaped("ReduceMean", (2, 3, 4)),
    "reduce_mean-axes": shaped("ReduceMean", (2, 3, 4), {"keepdims": 0}, axes=integers(-1, 0)),
    "reduce_mean-attribute": shaped("ReduceMean", (2, 3, 4), {"axes": [1]}, opset=13),
    "reduce_mean-noop": shaped("ReduceMean", (2, 3), {"noop_with_empty_axes": 1}),
    "reduce_sum": shaped("ReduceSum", (2, 3, 4)),
    "reduce_sum-axes": shaped("ReduceSum", (2, 3, 4), {"keepdims": 0}, axes=integers(-1, 0)),
    "reduce_sum-attribute": shaped("ReduceSum", (2, 3, 4), {"axes": [1]}, opset=12),
    "reduce_sum-noop": shaped("ReduceSum", (2, 3), {"noop_with_empty_axes": 1}),
    "sqrt": Case("Sqrt", {}, {"x": random(0, 3, 4) ** 2 + 0.1}),
    "reciprocal": shaped("Reciprocal", (3, 4)),
    "pow": Case("Pow", {}, {"x": random(0, 3, 4) ** 2 + 0.1, "exponent": np.array(1.5)}),
    "layer_norm": normed("LayerNormalization", (3, 4, 5), 5),
    "layer_norm-axes": normed("LayerNormalization", (3, 4, 5), (4, 5), {"axis": 1, "epsilon": f32(0.3)}),
    "layer_norm-negative-axis": normed("LayerNormalization", (3, 4, 5), (4, 5), {"axis": -2}),
    "layer_norm-no-bias": normed("LayerNormalization", (3, 4, 5), 5, bias=False),
    "rms_norm": normed("RMSNormalization", (3, 4, 5), 5, bias=False, opset=23),
    "rms_norm-axes": normed(
        "RMSNormalization", (3, 4, 5), (4, 5), {"axis": -2, "epsilon": f32(0.3)}, bias=False, opset=23
    ),
    "instance_norm": normed("InstanceNormalization", (2, 3, 4, 5), 3, {"epsilon": f32(0.3)}),
    "instance_norm-1d": normed("InstanceNormalization", (2, 3, 9), 3),
    "group_norm": normed("GroupNormalization", (2, 6, 4, 5), 6, {"num_groups": 3, "epsilon": f32(0.3)}),
    "group_norm-one": normed("GroupNormalization", (2, 6, 7), 6, {"num_groups": 1}),
    "group_norm-weight-per-group": normed("GroupNormalization", (2, 6, 4, 5), 3, {"num_groups": 3}, opset=18),
    "lp_norm": shaped("LpNormalization", (3, 4, 5)),
    "lp_norm-1": shaped("LpNormalization", (3, 4, 5), {"p": 1, "axis": 1}),
    "softmax": shaped("Softmax", (2, 3, 4)),
    "softmax-axis": shaped("Softmax", (2, 3, 4), {"axis": 1}),
    "quantize": quantized("QuantizeLinear", {}, (5, 6), np.uint8(128)),
    "quantize-int8": quantized("QuantizeLinear", {}, (5, 6), np.int8(-7)),
    "quantize-axis": quantized("QuantizeLinear", {"axis": 0}, (3, 6), np.array([0, 9, -40], np.int8)),
    "quantize-block": quantized(
        "QuantizeLinear", {"axis": 0, "block_size": 3}, (5, 2), np.array([[1, 2], [3, 4]], np.uint8)
    ),
    "dequantize": quantized("DequantizeLinear", {}, (5, 6), np.uint8(128)),
    "dequantize-default-axis": quantized("DequantizeLinear", {}, (2, 3, 6), np.array([0, 9, -40], np.int8)),
    "dequantize-axis": quantized("DequantizeLinear", {"axis": -2}, (3, 6), np.array([0, 9, -40], np.int8)),
    "dequantize-block": quantized(
        "DequantizeLinear", {"axis": 0, "block_size": 2}, (4, 2), np.array([[1, 2], [3, 4]], np.int8)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_definition(name):
    check(CASES[name])


@pytest.mark.parametrize(
    ("name", "attribute"),
    [(name, attribute) for name, case in CASES.items() for attribute in case.attributes if attribute != "to"],
)
def test_every_attribute_matters(name, attribute):
    """The checks themselves: without any one of its attributes the definition says something else."""
    case = CASES[name]
    less = {key: value for key, value in case.attributes.items() if key != attribute}
    expected = in_runtime(case.rounded())
    with pytest.raises((AssertionError, ValueError, TypeError)):
        check(replace(case, attributes=less), lambda _: expected)


@pytest.mark.parametrize("name", CASES)
def test_other_numbers_are_noticed(name):
    """The checks themselves: numbers in another order, or off by 1e-4, are not what the operator writes."""
    case = CASES[name].rounded()
    expected = in_runtime(case)
    for wrong in (
        [np.flip(array) for array in expected],
        [array.astype(np.float64) * (1 + 1e-4) for array in expected],
    ):
        if sum(array.size for array in expected) > 1:
            with pytest.raises(AssertionError):
                check(case, lambda _, wrong=wrong: wrong)


@pytest.mark.parametrize(
    "shapes", [((2, 3, 4), (3, 1)), ((2, 1, 4), (2, 3, 1)), ((5,), ()), ((), (2, 2))], ids=str
)
@pytest.mark.parametrize("data", ["a", "b", "a b"])
@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div"])
def test_elementwise(op_type, data, shapes):
    check(Case(op_type, {}, {"a": random(0, *shapes[0]), "b": random(1, *shapes[1])}, data=data))


# ---- interpolation ----------------------------------------------------------------------------

MODES = ["nearest", "linear", "cubic"]


@pytest.mark.parametrize("transformation", ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("given", [{"sizes": [1, 2, 9, 4]}, {"scales": [1.0, 1.0, 2.0, 0.5]}], ids=str)
def test_resize(given, mode, transformation):
    """Up along one axis, down along the other; steps that float32 knows exactly, so that no tie is missed."""
    attributes = {"mode": mode, "coordinate_transformation_mode": transformation}
    inputs = {name: np.array(v, np.int64 if name == "sizes" else np.float32) for name, v in given.items()}
    case = Case("Resize", attributes, {"x": random(0, 1, 2, 5, 8), **inputs})
    check(case)
    check(case, in_reference)


def test_resize_to_the_same_length():
    """A scale too small to add a number still moves them; ONNX Runtime copies, onnx's evaluator does not."""
    check(shaped("Resize", (1, 1, 5), {"mode": "linear"}, scales=np.float32([1, 1, 1.125])), in_reference)


@pytest.mark.parametrize("nearest_mode", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("scale", [2.0, 4.0, 0.5, 0.75])
def test_resize_nearest(scale, nearest_mode):
    check(
        Case(
            "Resize",
            {"nearest_mode": nearest_mode, "coordinate_transformation_mode": "asymmetric"},
            {"x": random(0, 1, 1, 6), "scales": np.float32([1, 1, scale])},
        )
    )


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("opset", [7, 9])
def test_upsample(opset, mode):
    """Before opset 11 there was one transformation of coordinates, and no attribute to say so."""
    attributes: Attributes = {"mode": mode}
    x, scales = np.float32(random(0, 1, 2, 3, 4)), [1.0, 1.0, 2.0, 3.0]
    given = {"scales": scales} if opset == 7 else {}
    case = Case("Upsample", {**attributes, **given}, {"x": x}, opset=opset)
    if opset == 9:
        case = replace(case, inputs={"x": x, "scales": np.float32(scales)})
    got = evaluate("upsample", case.attributes, {slot: Dense(array) for slot, array in case.inputs.items()})
    assert np.allclose(got["y"], in_runtime(case)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "attributes",
    [
        {"antialias": 1},
        {"keep_aspect_ratio_policy": "not_larger"},
        {"coordinate_transformation_mode": "tf_crop_and_resize"},
    ],
    ids=str,
)
def test_resize_refuses_what_it_does_not_know(attributes):
    with pytest.raises(NotImplementedError):
        evaluate("resize", {"mode": "linear", **attributes}, {"x": random(0, 2, 3), "sizes": integers(3, 4)})


# ---- PyTorch ----------------------------------------------------------------------------------


def in_torch(kind: str, attributes: Attributes, expected: torch.Tensor, **inputs: Array) -> None:
    """The definition agrees with PyTorch in float64."""
    got = evaluate(kind, {**ROWS[kind].defaults, **attributes} if kind in ROWS else attributes, inputs)["y"]
    assert got.shape == tuple(expected.shape)
    assert np.allclose(got, expected.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 1, 3, 4)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_torch_linear(shape, biased):
    a, b, c = random(0, *shape), random(1, 5, 4), random(2, 5)
    inputs = {"a": a, "b": b, "c": c} if biased else {"a": a, "b": b}
    expected = functional.linear(*(torch.from_numpy(array) for array in inputs.values()))
    in_torch("linear", {"transB": 1}, expected, **inputs)


@pytest.mark.parametrize("output_size", [[1], [3], [7, 2], [None, 3], [2, 3, 9]], ids=str)
def test_torch_adaptive_average_pool(output_size):
    x = random(0, 2, 3, *(5, 7, 8)[: len(output_size)])
    rank = len(output_size)
    expected = getattr(functional, f"adaptive_avg_pool{rank}d")(torch.from_numpy(x), output_size)
    in_torch("adaptive_average_pool", {"output_size": output_size}, expected, x=x)


@pytest.mark.parametrize("ceil_mode", [0, 1])
@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("divisor", [None, 7])
@pytest.mark.parametrize("strides", [[], [2, 3]], ids=str)
def test_torch_average_pool(strides, divisor, include, ceil_mode):
    """An empty stride is the kernel's, and there may be no batch axis."""
    x = random(0, 3, 8, 9)
    expected = functional.avg_pool2d(
        torch.from_numpy(x), [3, 2], strides, [1, 1], bool(ceil_mode), bool(include), divisor
    )
    attributes = {"kernel_shape": [3, 2], "strides": strides, "pads": [1, 1, 1, 1], "ceil_mode": ceil_mode}
    attributes |= {"count_include_pad": include, "divisor_override": divisor}
    in_torch("average_pool", attributes, expected, x=x)


@pytest.mark.parametrize("ceil_mode", [0, 1])
def test_torch_max_pool(ceil_mode):
    x = random(0, 2, 3, 8, 9)
    expected = functional.max_pool2d(torch.from_numpy(x), [3, 2], [], [1, 0], [1, 3], bool(ceil_mode))
    attributes = {"kernel_shape": [3, 2], "strides": [], "pads": [1, 0, 1, 0], "dilations": [1, 3]}
    in_torch("max_pool", {**attributes, "ceil_mode": ceil_mode}, expected, x=x)


@pytest.mark.parametrize(("start", "end"), [(1, -1), (0, -1), (1, 2), (-3, -2), (2, 2)])
def test_torch_flatten(start, end):
    x = random(0, 2, 3, 4, 5)
    expected = torch.flatten(torch.from_numpy(x), start, end)
    in_torch("flatten", {"start_dim": start, "end_dim": end}, expected, x=x)


def test_torch_shapes():
    x = random(0, 1, 3, 1, 4)
    tensor = torch.from_numpy(x)
    in_torch("squeeze", {"axes": [1, -2]}, tensor.squeeze((1, -2)), x=x)
    in_torch("expand", {"shape": [2, 1, -1, 6, -1]}, tensor.expand(2, 1, 3, 6, 4), x=x)
    in_torch("reduce_mean", {"axes": [-1, 1], "keepdims": False}, tensor.mean((-1, 1)), x=x)
    in_torch("select", {"axis": -3, "index": -1}, tensor.select(-3, -1), x=x)
    picked = np.array([[2, 0], [1, 1]])
    in_torch("index", {}, tensor[:, torch.from_numpy(picked)], x=x, **{"indices.1": picked})
    in_torch("tile", {"repeats": [2, 1, 1, 2, 1]}, tensor.repeat(2, 1, 1, 2, 1), x=x)
    in_torch("roll", {"shifts": [1, -2], "axes": [1, 3]}, tensor.roll((1, -2), (1, 3)), x=x)


def test_torch_elementwise():
    x, condition = random(0, 3, 4) ** 2 + 0.1, random(1, 3, 1) > 0
    tensor = torch.from_numpy(x)
    in_torch("rsqrt", {}, tensor.rsqrt(), x=x)
    in_torch("pow", {}, tensor.square(), x=x)
    in_torch("pow", {"exponent": -0.5}, tensor.pow(-0.5), x=x)
    chosen = torch.where(torch.from_numpy(condition), tensor, -tensor)
    in_torch("where", {}, chosen, condition=condition, a=x, b=-x)


@pytest.mark.parametrize(
    ("attributes", "arguments"),
    [
        ({"axes": [1]}, {"dim": 1}),
        (
            {"axes": [0, -1], "correction": 0, "keepdims": True},
            {"dim": (0, -1), "correction": 0, "keepdim": True},
        ),
        ({"axes": [2], "unbiased": False}, {"dim": 2, "unbiased": False}),
        ({}, {}),
    ],
)
def test_torch_variance(attributes, arguments):
    x = random(0, 3, 4, 5) + 0.7
    var, mean = torch.var_mean(torch.from_numpy(x), **arguments)
    in_torch("var", attributes, var, x=x)
    found = evaluate("var_mean", attributes, {"x": x})
    assert np.allclose(found["var"], var.numpy(), rtol=1e-12)
    assert np.allclose(found["mean"], mean.numpy(), rtol=1e-12)


def test_torch_statistics_of_norms():
    """ONNX Runtime gives them in float32 alone."""
    x, weight = random(0, 3, 4, 5) + 0.7, random(1, 5)
    tensors = torch.from_numpy(x), [5], torch.from_numpy(weight)
    got = evaluate("layer_norm", {"epsilon": 0.1}, {"x": x, "weight": weight})
    for mine, theirs in zip(got.values(), torch.native_layer_norm(*tensors, None, 0.1), strict=True):
        assert np.allclose(mine, theirs.numpy(), rtol=1e-12, atol=1e-12)
    got = evaluate("rms_norm", {"epsilon": 0.1}, {"x": x, "weight": weight})
    assert np.allclose(got["y"], torch.rms_norm(*tensors, 0.1).numpy(), rtol=1e-12, atol=1e-12)
    assert np.allclose(got["y"], x * got["inv_std_dev"] * weight, rtol=1e-12, atol=1e-12)


def test_torch_instance_norm_with_stored_statistics():
    x, mean, var = random(0, 2, 3, 4) + 0.7, random(1, 3), random(2, 3) ** 2
    expected = functional.instance_norm(
        *map(torch.from_numpy, (x, mean, var)), use_input_stats=False, eps=f32(1e-5)
    )
    in_torch("instance_norm", {"use_input_stats": False}, expected, x=x, mean=mean, var=var)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("attributes", [{}, {"scale": 0.3}, {"is_causal": 1}, {"enable_gqa": 1}], ids=str)
def test_torch_attention(attributes, masked):
    if masked and "is_causal" in attributes:
        pytest.skip("PyTorch takes one of the two")
    heads = 1 if "enable_gqa" in attributes else 2
    inputs = {"q": random(0, 3, 2, 4, 6), "k": random(1, 3, heads, 5, 6), "v": random(2, 3, heads, 5, 7)}
    if masked:
        inputs["mask"] = random(3, 4, 5)
    tensors = {("attn_mask" if slot == "mask" else slot): torch.from_numpy(a) for slot, a in inputs.items()}
    q, k, v = (tensors.pop(slot) for slot in "qkv")
    flags = {name: value if name == "scale" else bool(value) for name, value in attributes.items()}
    expected = functional.scaled_dot_product_attention(q, k, v, **tensors, **flags)
    in_torch("attention", attributes, expected, **inputs)


def test_dropout_in_training_is_refused():
    for told in (Dense(np.array(True)), np.array(0.0)):  # stored; told by the caller
        with pytest.raises(NotImplementedError):
            evaluate("dropout", {}, {"x": np.ones(3), "training_mode": told})
    with pytest.raises(NotImplementedError):
        evaluate("attention", {"dropout_p": 0.5}, dict.fromkeys("qkv", np.ones((3, 3))))


@pytest.mark.parametrize("slopes", [1, 4])
def test_torch_prelu(slopes):
    """The slope runs along axis 1, which only an attribute can tell where the axes are as long."""
    x, slope = random(0, 2, 4, 5, 4), random(1, slopes)
    expected = functional.prelu(torch.from_numpy(x), torch.from_numpy(slope))
    in_torch("prelu", {"slope_axis": 1}, expected, x=x, slope=slope)
    if slopes > 1:
        with pytest.raises(AssertionError):
            in_torch("prelu", {}, expected, x=x, slope=slope)


@pytest.mark.parametrize(
    ("mode", "align"), [("nearest", None), ("bilinear", False), ("bilinear", True), ("bicubic", False)]
)
def test_torch_interpolate(mode, align):
    x, sizes = random(0, 2, 3, 5, 7), [8, 4]
    expected = functional.interpolate(torch.from_numpy(x), sizes, mode=mode, align_corners=align)
    attributes = {
        "mode": {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode),
        "coordinate_transformation_mode": {None: "asymmetric", True: "align_corners", False: "half_pixel"}[
            align
        ],
        "nearest_mode": "floor",
    }
    in_torch("resize", attributes, expected, x=x, sizes=integers(2, 3, *sizes))


# ---- reading ----------------------------------------------------------------------------------


class Lazy:
    """A float16 weight that is not rounded yet, and that remembers what was asked of it."""

    dtype = np.dtype(np.float16)

    def __init__(self, exact: Array) -> None:
        self.exact, self.shape, self.asked = exact, exact.shape, 0

    def exact_rows(self, start: int, stop: int) -> Array:
        self.asked = max(self.asked, stop - start)
        return self.exact[start:stop]

    def rows(self, start: int, stop: int) -> Array:
        return self.exact[start:stop].astype(np.float16)


@pytest.mark.parametrize(
    ("kind", "inputs"),
    {
        "conv": {"x": (2, 3, 5), "weight": (4, 3, 2), "bias": (4,)},
        "conv_transpose": {"x": (2, 3, 5), "weight": (3, 4, 2), "bias": (4,)},
        "linear": {"a": (2, 3), "b": (3, 4), "c": (4,)},
        "matmul": {"a": (2, 3), "b": (3, 4)},
        "embedding": {"indices": (2, 3), "table": (4, 5)},
        "mul": {"a": (2, 3), "b": (3,)},
    }.items(),
)
def test_a_plan_is_read_before_its_rounding(kind, inputs):
    """Of whatever has `exact_rows`; data in its place gives the same."""
    arrays = {slot: random(i, *shape) for i, (slot, shape) in enumerate(inputs.items())}
    if "indices" in arrays:
        arrays["indices"] = np.trunc(arrays["indices"])
    first = next(iter(arrays))
    lazy = {slot: array if slot == first else Lazy(array) for slot, array in arrays.items()}
    assert np.array_equal(evaluate(kind, {}, lazy)["y"], evaluate(kind, {}, arrays)["y"])


@pytest.mark.parametrize(
    ("kind", "slot", "x"),
    [
        ("conv", "weight", {"x": random(0, 1, 1, 5)}),
        ("conv_transpose", "weight", {"x": random(0, 1, 12, 5)}),
        ("embedding", "table", {"indices": np.array([0.0, 11.0, -8.0])}),
    ],
)
def test_weights_are_never_read_whole(kind, slot, x):
    """Blocks of 4 rows give what all 12 do; of a table, the blocks without an index are not read."""
    whole, weight = random(1, 12, 1, 2), Lazy(random(1, 12, 1, 2))
    with mock.patch.object(values, "BLOCK", 8):
        got = evaluate(kind, {}, {**x, slot: weight})["y"]
    assert np.allclose(got, evaluate(kind, {}, {**x, slot: whole})["y"], rtol=1e-13, atol=1e-13)
    assert weight.asked == 4


@pytest.mark.parametrize("block", range(1, 9))
@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
def test_blocks_of_rows(op_type, block):
    """Weights are read some rows at a time, across the borders of groups; the result is the same."""
    for groups, rows, columns in itertools.product(range(1, 4), range(1, 5), range(1, 3)):
        channels = groups * (columns if op_type == "Conv" else rows)
        inputs = {"x": random(0, 1, channels, 3), "weight": random(1, groups * rows, columns, 1)}
        case = Case(op_type, {"group": groups}, inputs)
        (whole,) = defined(case)
        with mock.patch.object(values, "BLOCK", block):
            assert np.allclose(defined(case)[0], whole, rtol=1e-13, atol=1e-13)


def test_indices_beyond_the_table():
    with pytest.raises(IndexError):
        evaluate("embedding", {}, {"table": Dense(random(0, 5, 3)), "indices": Dense(integers(5))})


def test_casts_to_integers():
    x = np.array([-1.5, -0.5, 0.0, 2.7])
    assert evaluate("cast", {"to": np.dtype(np.int32)}, {"x": x})["y"].tolist() == [-1, 0, 0, 2]
    assert evaluate("cast", {"to": np.dtype(np.bool_)}, {"x": x})["y"].tolist() == [1, 1, 0, 1]
    assert evaluate("cast", {"to": np.dtype(ml_dtypes.bfloat16)}, {"x": x})["y"] is x
    assert evaluate("cast_like", {}, {"x": x, "like": Dense(integers(0))})["y"].tolist() == [-1, 0, 0, 2]
    assert evaluate("cast_like", {}, {"x": x, "like": x})["y"] is x


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        (None, 0, 255),
        ("UINT8", 0, 255),
        ("INT8", -128, 127),
        ("UINT16", 0, 65535),
        ("INT16", -32768, 32767),
        ("UINT4", 0, 15),
        ("INT4", -8, 7),
    ],
)
def test_quantize_without_a_zero_point(name, low, high):
    inputs = {"x": np.array([-1e6, 1e6]), "scale": Dense(np.float32(1))}
    attributes = {"output_dtype": None if name is None else getattr(onnx.TensorProto, name)}
    assert evaluate("quantize_linear", attributes, inputs)["y"].tolist() == [low, high]


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4, np.uint16])
def test_quantize_to_other_integers(dtype):
    """The integers that ONNX Runtime cannot hand out."""
    case = quantized("QuantizeLinear", {}, (5, 6), np.asarray(1, dtype))
    check(replace(case, inputs={**case.inputs, "x": case.inputs["x"] * 1000}), in_reference)


def test_quantize_to_a_float_is_refused():
    inputs = {"x": random(0, 3), "scale": Dense(np.float32(1)), "zero_point": np.zeros(())}
    with pytest.raises(NotImplementedError):
        evaluate("quantize_linear", {}, inputs)


def test_training_statistics_are_refused():
    inputs = {slot: np.ones(3) for slot in ("weight", "bias", "mean", "var")}
    with pytest.raises(NotImplementedError):
        evaluate("batch_norm", {"training_mode": 1}, {"x": random(0, 2, 3), **inputs})


# ---- the checks themselves --------------------------------------------------------------------

WRONG = {
    "conv-weight": Case(
        "Conv", {"pads": [1, 1]}, {"x": random(0, 1, 2, 5), "weight": random(1, 3, 2, 3), "bias": random(2, 3)}
    ),
    "conv-bias": Case(
        "Conv", {"pads": [1, 1]}, {"x": random(0, 1, 2, 5), "weight": random(1, 3, 2, 3), "bias": random(2, 3)}
    ),
    "transpose-weight": Case("ConvTranspose", {}, {"x": random(0, 1, 2, 5), "weight": random(1, 2, 3, 3)}),
    "gemm-c": Case(
        "Gemm", {"beta": 0.5}, {"a": random(0, 3, 4), "b": random(1, 4, 5), "c": random(2, 5)}, data="a"
    ),
    "matmul-b": Case("MatMul", {}, {"a": random(0, 3, 4), "b": random(1, 4, 5)}, data="a"),
    "batch_norm-mean": Case(
        "BatchNormalization",
        {},
        {"x": random(0, 2, 3)}
        | {slot: np.abs(random(i, 3)) for i, slot in enumerate(("weight", "bias", "mean", "var"), 1)},
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_operand_is_noticed(name):
    """A relative error of 1e-4 in one operand is far above what the check allows."""
    case, wrong = WRONG[name].rounded(), name.rpartition("-")[2]
    check(case)
    tampered = replace(case, inputs={**case.inputs, wrong: case.inputs[wrong] * np.float32(1 + 1e-4)})
    with pytest.raises(AssertionError):
        check(case, lambda _: in_runtime(tampered))


def test_unknown_kind():
    with pytest.raises(KeyError):
        evaluate("lstm", {}, {"x": np.ones(3)})


def test_every_kind_is_tested():
    cases = [*CASES.values(), *WRONG.values()]
    elsewhere = """add sub mul div average_pool max_pool adaptive_average_pool upsample cast cast_like attention
    select index roll where rsqrt var var_mean"""
    assert {case.kind for case in cases} | set(elsewhere.split()) == KINDS
