"""The float64 definitions against ONNX Runtime, over everything their attributes can say."""

import itertools
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normtool import values
from normtool.ops import ROWS, f32
from normtool.semantics import evaluate
from normtool.values import Dense
from tests import zoo

Array = np.ndarray[Any, Any]
Attributes = dict[str, Any]

#: Rounding errors allowed, in units of the dtype's eps times the sum of magnitudes: sums have up to 100 terms.
ROUNDINGS = 16

#: ONNX Runtime's CPU kernels for these exist in float64.
IN_DOUBLE = {"Gemm", "MatMul", "BatchNormalization", "Add", "Sub", "Mul", "Div"}


def check(
    op_type: str, kind: str, attributes: Attributes, x: Array, operands: dict[str, Array], slot: str
) -> None:
    """ONNX Runtime and the definition agree on `x` within the rounding errors of the runtime's dtype."""
    dtype = np.float64 if op_type in IN_DOUBLE else np.float32
    x, operands = x.astype(dtype), {name: array.astype(dtype) for name, array in operands.items()}
    expected = in_runtime(op_type, kind, attributes, x, operands, slot)
    got = defined(kind, attributes, x, operands, slot)
    unsigned = {k: abs(v) if k in ("alpha", "beta") else v for k, v in attributes.items()}
    magnitude = defined(kind, unsigned, np.abs(x), {k: np.abs(v) for k, v in operands.items()}, slot)
    assert got.dtype == np.float64
    assert got.shape == expected.shape
    if kind == "batch_norm":
        magnitude = np.abs(got) + batch_norm_magnitude(attributes, x, operands)
    allowed = ROUNDINGS * np.finfo(dtype).eps * np.abs(magnitude)
    assert np.all(np.abs(got - expected) <= allowed)


def defined(kind: str, attributes: Attributes, x: Array, operands: dict[str, Array], slot: str) -> Array:
    full = {**ROWS[kind].defaults, **attributes}
    return evaluate(kind, full, x.astype(np.float64), {k: Dense(v) for k, v in operands.items()}, slot)


def batch_norm_magnitude(attributes: Attributes, x: Array, operands: dict[str, Array]) -> Array:
    gamma, beta, mean, var = (
        np.abs(operands[name]).reshape(-1, *[1] * (x.ndim - 2)) for name in ("weight", "bias", "mean", "var")
    )
    return (np.abs(x) + mean) / np.sqrt(var) * gamma + beta


def in_runtime(
    op_type: str, kind: str, attributes: Attributes, x: Array, operands: dict[str, Array], slot: str
) -> Array:
    net = zoo.Net(dtype=x.dtype)
    slots = ROWS[kind].spellings[0].slots
    names = {slot: net.input(list(x.shape))} | {name: net.constant(a) for name, a in operands.items()}
    net.output(net.node(op_type, *(names[name] for name in slots if name in names), **attributes))
    (result,) = zoo.run(net.model(), {"x": x})
    return result


def random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def chosen(draw: Any, **attributes: Any) -> Attributes:
    """Some of these attributes; what is left out has its default."""
    return {name: value for name, value in attributes.items() if draw(st.booleans())}


@st.composite
def conv(draw) -> tuple[Attributes, Array, dict[str, Array]]:
    rank, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))

    def per_axis(low: int, high: int, count: int = rank) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    auto_pad = draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    kernel = per_axis(1, 3)
    # ONNX Runtime refuses dilation together with SAME padding
    dilations = [1] * rank if auto_pad.startswith("SAME") else per_axis(1, 3)
    attributes = chosen(draw, strides=per_axis(1, 3), dilations=dilations, kernel_shape=kernel)
    if auto_pad == "NOTSET":
        attributes |= chosen(draw, auto_pad=auto_pad, pads=per_axis(0, 2, 2 * rank))
    else:
        attributes["auto_pad"] = auto_pad
    if groups > 1:
        attributes["group"] = groups
    used = attributes.get("dilations", [1] * rank)
    size = [(k - 1) * d + 1 + more for k, d, more in zip(kernel, used, per_axis(0, 4), strict=True)]
    inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    x = random(draw(st.integers(0, 99)), draw(st.integers(1, 2)), inner * groups, *size)
    operands = {"weight": random(1, outer * groups, inner, *kernel)}
    if draw(st.booleans()):
        operands["bias"] = random(2, outer * groups)
    return attributes, x, operands


@st.composite
def conv_transpose(draw) -> tuple[Attributes, Array, dict[str, Array]]:
    rank, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))

    def per_axis(low: int, high: int, count: int = rank) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    kernel, size = per_axis(1, 3), per_axis(2, 4)
    attributes = chosen(draw, strides=per_axis(1, 3), dilations=per_axis(1, 2), kernel_shape=kernel)
    strides, dilations = (attributes.get(name, [1] * rank) for name in ("strides", "dilations"))
    extra = [min(e, s - 1) for e, s in zip(per_axis(0, 2), strides, strict=True)]
    attributes |= chosen(draw, output_padding=extra)
    extra = attributes.get("output_padding", [0] * rank)
    axes = zip(size, strides, kernel, dilations, extra, strict=True)
    full = [(n - 1) * s + (k - 1) * d + 1 + e for n, s, k, d, e in axes]
    match draw(st.sampled_from(["pads", "auto_pad", "output_shape", "output_shape and auto_pad"])):
        case "pads":
            pads = [min(p, (f - 1) // 2) for p, f in zip(per_axis(0, 2, 2 * rank), full * 2, strict=True)]
            attributes |= chosen(draw, pads=pads)
        case "auto_pad":
            attributes["auto_pad"] = draw(st.sampled_from(["VALID", "SAME_UPPER", "SAME_LOWER"]))
        case form:
            crops = [min(c, f - 1) for c, f in zip(per_axis(0, 3), full, strict=True)]
            attributes["output_shape"] = [f - c for f, c in zip(full, crops, strict=True)]
            if "and" in form:
                attributes["auto_pad"] = draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER"]))
    if groups > 1:
        attributes["group"] = groups
    inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    x = random(draw(st.integers(0, 99)), draw(st.integers(1, 2)), inner * groups, *size)
    operands = {"weight": random(1, inner * groups, outer, *kernel)}
    if draw(st.booleans()):
        operands["bias"] = random(2, outer * groups)
    return attributes, x, operands


@given(conv())
@settings(deadline=None, max_examples=200)
def test_conv(case):
    check("Conv", "conv", *case, "x")


@given(conv_transpose())
@settings(deadline=None, max_examples=200)
def test_conv_transpose(case):
    check("ConvTranspose", "conv_transpose", *case, "x")


@pytest.mark.parametrize("block", range(1, 9))
@pytest.mark.parametrize("kind", ["conv", "conv_transpose"])
def test_blocks_of_rows(kind, block):
    """Weights are read some rows at a time, across the borders of groups; the result is the same."""
    for groups, rows, columns in itertools.product(range(1, 4), range(1, 5), range(1, 3)):
        inputs = groups * (columns if kind == "conv" else rows)
        case = {"group": groups}, random(0, 1, inputs, 3), {"weight": random(1, groups * rows, columns, 1)}
        whole = defined(kind, *case, "x")
        with mock.patch.object(values, "BLOCK", block):
            assert np.allclose(defined(kind, *case, "x"), whole, rtol=1e-13, atol=1e-13)


sides = st.integers(1, 9)
scalars = st.sampled_from([0.0, 1.0, 0.5, -1.5, 3.0])


@given(st.data(), sides, sides, sides)
@settings(deadline=None, max_examples=100)
def test_gemm(data, m, k, n):
    turned = data.draw(st.tuples(st.booleans(), st.booleans()))
    attributes = chosen(data.draw, alpha=data.draw(scalars), beta=data.draw(scalars))
    attributes |= {name: 1 for name, is_turned in zip(("transA", "transB"), turned, strict=True) if is_turned}
    operands = {"b": random(1, *((n, k) if turned[1] else (k, n)))}
    shape = data.draw(st.sampled_from([None, (), (n,), (1, n), (m, 1), (1, 1), (m, n)]))
    if shape is not None:
        operands["c"] = random(2, *shape)
    check("Gemm", "linear", attributes, random(0, *((k, m) if turned[0] else (m, k))), operands, "a")


@given(st.data(), sides, sides, sides)
@settings(deadline=None, max_examples=100)
def test_matmul(data, m, k, n):
    """The constant on either side, with leading axes that broadcast."""
    lead = tuple(data.draw(st.lists(st.integers(1, 3), max_size=2)))
    partial = lead[data.draw(st.integers(0, len(lead))) :]
    left, right = data.draw(st.sampled_from([(lead, partial), (partial, lead), (lead, lead)]))
    a, b = random(0, *left, m, k), random(1, *right, k, n)
    slot = data.draw(st.sampled_from("ab"))
    x, other = (a, b) if slot == "a" else (b, a)
    check("MatMul", "matmul", {}, x, {"b" if slot == "a" else "a": other}, slot)


@given(st.data(), st.integers(1, 5), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_batch_norm(data, channels, spatial):
    shape = (2, channels, *data.draw(st.lists(st.integers(1, 4), min_size=spatial, max_size=spatial)))
    operands = {name: random(seed, channels) for seed, name in enumerate(("weight", "bias", "mean"))}
    operands["var"] = np.abs(random(9, channels)) + data.draw(st.sampled_from([0.01, 1.0]))
    attributes = chosen(data.draw, epsilon=f32(data.draw(st.sampled_from([0.0, 1e-5, 1e-3, 1.0]))))
    check("BatchNormalization", "batch_norm", attributes, random(5, *shape), operands, "x")


@pytest.mark.parametrize(
    "shapes", [((2, 3, 4), (3, 1)), ((2, 1, 4), (2, 3, 1)), ((5,), ()), ((), (2, 2))], ids=str
)
@pytest.mark.parametrize("slot", ["a", "b"])
@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div"])
def test_elementwise(op_type, slot, shapes):
    x, other = random(0, *shapes[0]), random(1, *shapes[1])
    check(op_type, op_type.lower(), {}, x, {"b" if slot == "a" else "a": other}, slot)


WRONG = {
    "conv-weight": (
        "Conv",
        "conv",
        {"pads": [1, 1]},
        (1, 2, 5),
        {"weight": (3, 2, 3), "bias": (3,)},
        "x",
        "weight",
    ),
    "conv-bias": (
        "Conv",
        "conv",
        {"pads": [1, 1]},
        (1, 2, 5),
        {"weight": (3, 2, 3), "bias": (3,)},
        "x",
        "bias",
    ),
    "transpose": ("ConvTranspose", "conv_transpose", {}, (1, 2, 5), {"weight": (2, 3, 3)}, "x", "weight"),
    "gemm": ("Gemm", "linear", {"beta": 0.5}, (3, 4), {"b": (4, 5), "c": (5,)}, "a", "c"),
    "matmul": ("MatMul", "matmul", {}, (3, 4), {"b": (4, 5)}, "a", "b"),
    "batch_norm-mean": (
        "BatchNormalization",
        "batch_norm",
        {},
        (2, 3),
        dict.fromkeys(("weight", "bias", "mean", "var"), (3,)),
        "x",
        "mean",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_operand_is_noticed(case, monkeypatch):
    """The check itself: a relative error of 1e-4 in one operand is far above what it allows."""
    op_type, kind, attributes, shape, shapes, slot, wrong = WRONG[case]
    x = random(0, *shape)
    operands = {name: np.abs(random(i + 1, *s)) for i, (name, s) in enumerate(shapes.items())}
    check(op_type, kind, attributes, x, operands, slot)
    honest = in_runtime

    def tampered(op_type, kind, attributes, x, operands, slot):
        return honest(op_type, kind, attributes, x, {**operands, wrong: operands[wrong] * (1 + 1e-4)}, slot)

    monkeypatch.setitem(globals(), "in_runtime", tampered)
    with pytest.raises(AssertionError):
        check(op_type, kind, attributes, x, operands, slot)


def test_unknown_kind():
    with pytest.raises(KeyError):
        evaluate("relu", {}, np.ones(3), {}, "x")
