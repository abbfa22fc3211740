"""What the operators mean, in float64 numpy.

This is the yardstick of the proof, written from the operators' definitions (onnx.ai/onnx/operators; PyTorch's
where only ATen has the operator) and sharing nothing with the rules that it judges. Inference only. Kinds,
slots and attributes are those of `ops`; what a row leaves out has ONNX's default.
"""

import re
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import numpy as np

from normtool import semantics_shapes as shapes
from normtool import semantics_windows as windows
from normtool.ops import f32, slot_name
from normtool.semantics_call import Call, wide, wide_rows
from normtool.values import Array, Value, is_float

__all__ = ["KINDS", "evaluate", "wide", "wide_rows"]


def evaluate(kind: str, attributes: Mapping[str, Any], inputs: Mapping[str, Array | Value]) -> dict[str, Array]:
    """The op's outputs by slot: `y`, or `y.0`, `y.1`, … of a split; a norm's statistics are outputs too.

    They may be views of the inputs.

    An input is a float64 array (data) or a Value (a constant). Raises KeyError for a kind that is not in
    `KINDS`, NotImplementedError for a variant that its definition leaves out.
    """
    define = _DEFINITIONS[kind]
    with np.errstate(all="ignore"):
        result = define(Call(attributes, inputs))
    if isinstance(result, dict):
        return result
    if isinstance(result, list):
        return {slot_name(("y*",), i): part for i, part in enumerate(result)}
    return {"y": np.asarray(result, np.float64)}


# ---- matrix products --------------------------------------------------------------------------


def _linear(call: Call) -> Array:
    """alpha · A' · B' + beta · C; PyTorch's `linear` has an A with any number of leading axes."""
    a, b = call.array("a"), call.array("b")
    if a.ndim == 2 and call.attribute("transA", 0):
        a = a.T
    y: Array = call.attribute("alpha", 1.0) * (a @ (b.T if call.attribute("transB", 0) else b))
    if "c" in call.inputs:
        y = y + call.attribute("beta", 1.0) * call.array("c")
    return y


# ---- normalisation ----------------------------------------------------------------------------


def _batch_norm(call: Call) -> Array:
    """(x − μ)/√(σ² + ε) · γ + β, in the order of the definition and not as s·x + t."""
    if call.attribute("training_mode", 0):
        raise NotImplementedError("batch_norm that computes its own statistics")
    x = call.array("x")

    def per_channel(slot: str) -> Array:
        given = call.array(slot)
        return given.reshape(*given.shape, *[1] * (x.ndim - 1 - given.ndim))

    y = (x - per_channel("mean")) / np.sqrt(per_channel("var") + call.attribute("epsilon", f32(1e-5)))
    if "weight" in call.inputs:
        y = y * per_channel("weight")
    return np.asarray(y + per_channel("bias") if "bias" in call.inputs else y)


def _layer_norm(call: Call) -> dict[str, Array]:
    """z/√(mean(z²) + ε) · γ + β with z = x − mean(x), from `axis` to the last; beside it mean and 1/√(…)."""
    x = call.array("x")
    axes = _from_axis(call, x)
    mean = x.mean(axes, keepdims=True)
    inv_std_dev = 1 / np.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + _epsilon(call))
    y = (x - mean) * inv_std_dev * _given(call, "weight", 1) + _given(call, "bias", 0)
    return {"y": np.asarray(y), "mean": mean, "inv_std_dev": inv_std_dev}


def _rms_norm(call: Call) -> dict[str, Array]:
    """x/√(mean(x²) + ε) · γ: what LayerNorm does to an x of mean 0."""
    x = call.array("x")
    inv_std_dev = 1 / np.sqrt((x**2).mean(_from_axis(call, x), keepdims=True) + _epsilon(call))
    return {"y": np.asarray(x * inv_std_dev * _given(call, "weight", 1)), "inv_std_dev": inv_std_dev}


def _instance_norm(call: Call) -> Array:
    """Over the spatial axes; γ, β per channel. PyTorch's may use stored statistics instead."""
    x = call.array("x")
    axes = tuple(range(2, x.ndim))
    if call.attribute("use_input_stats", 1):
        mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    else:
        mean, var = (_per_channel(call.array(slot), x) for slot in ("mean", "var"))
    return _scaled_per_channel(call, (x - mean) / np.sqrt(var + _epsilon(call)))


def _group_norm(call: Call) -> Array:
    """Over the channels of a group and every spatial axis; γ, β per channel, or per group at opset 18."""
    x = call.array("x")
    groups = int(call.attribute("num_groups"))
    grouped = x.reshape(x.shape[0], groups, -1)
    mean, var = grouped.mean(-1, keepdims=True), grouped.var(-1, keepdims=True)
    return _scaled_per_channel(call, ((grouped - mean) / np.sqrt(var + _epsilon(call))).reshape(x.shape))


def _scaled_per_channel(call: Call, y: Array) -> Array:
    if "weight" in call.inputs:
        y = y * _per_channel(call.array("weight"), y)
    return np.asarray(y + _per_channel(call.array("bias"), y) if "bias" in call.inputs else y)


def _per_channel(given: Array, x: Array) -> Array:
    """One number for each index of axis 1, or for each group of neighbours."""
    return np.asarray(np.repeat(given, x.shape[1] // given.size).reshape(_along(1, x.ndim)))


def _lp_norm(call: Call) -> Array:
    """x/(Σ|x|^p)^(1/p) along one axis; ONNX's knows p = 1 and 2, and has no ε. 0/0 is 0 there."""
    x, axis = call.array("x"), int(call.attribute("axis", -1))
    length = np.linalg.norm(x, int(call.attribute("p", 2)), axis, keepdims=True)
    return np.asarray(np.divide(x, length, out=np.zeros_like(x), where=length != 0))


def _from_axis(call: Call, x: Array) -> tuple[int, ...]:
    return tuple(range(int(call.attribute("axis", -1)) % x.ndim, x.ndim))


def _epsilon(call: Call) -> float:
    return float(call.attribute("epsilon", f32(1e-5)))


def _given(call: Call, slot: str, default: float) -> Array | float:
    return call.array(slot) if slot in call.inputs else default


def _softmax(call: Call) -> Array:
    return _softmax_of(call.array("x"), int(call.attribute("axis", -1)))


def _softmax_of(x: Array, axis: int) -> Array:
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis=axis, keepdims=True))


def _attention(call: Call) -> Array:
    """PyTorch's: softmax(scale · q kᵀ + mask) v over [batch…, heads, positions, features].

    `is_causal`: a query sees the keys up to its own place; `enable_gqa`: several heads of queries share one of
    keys.
    """
    if call.attribute("dropout_p", 0):
        raise NotImplementedError("attention that drops out at random")
    q, k, v = (call.array(slot) for slot in "qkv")
    if call.attribute("enable_gqa", 0):
        k, v = (np.repeat(each, q.shape[-3] // each.shape[-3], axis=-3) for each in (k, v))
    scores = q @ k.swapaxes(-1, -2) * call.attribute("scale", 1 / np.sqrt(q.shape[-1]))
    if call.attribute("is_causal", 0):
        scores = np.where(np.tri(*scores.shape[-2:]) > 0, scores, -np.inf)
    if "mask" in call.inputs:
        scores = scores + call.array("mask")
    return np.asarray(_softmax_of(scores, -1) @ v)


def _reduction(function: Callable[..., Array]) -> Callable[[Call], Array]:
    def reduced(call: Call) -> Array:
        x, axes = call.array("x"), call.integers("axes")
        if not axes and call.attribute("noop_with_empty_axes", 0):
            return x
        keep = bool(call.attribute("keepdims", 1))
        return np.asarray(function(x, axis=tuple(axes) if axes else None, keepdims=keep))

    return reduced


def _var_mean(call: Call) -> dict[str, Array]:
    """PyTorch's: Σ(x − mean)²/(N − correction), which is 1 unless it is given."""
    x, axes = call.array("x"), call.integers("axes")
    over = tuple(axes) if axes else None
    correction = call.attribute("correction", call.attribute("unbiased", 1))
    keep = bool(call.attribute("keepdims", 0))
    var = x.var(axis=over, ddof=float(1 if correction is None else correction), keepdims=keep)
    return {"var": np.asarray(var), "mean": np.asarray(x.mean(axis=over, keepdims=keep)), "y": np.asarray(var)}


# ---- elementwise ------------------------------------------------------------------------------


def _unary(function: Callable[[Array], Array]) -> Callable[[Call], Array]:
    return lambda call: function(call.array("x"))


def _binary(function: Callable[[Array, Array], Array]) -> Callable[[Call], Array]:
    return lambda call: function(call.array("a"), call.array("b"))


def _pow(call: Call) -> Array:
    """PyTorch's `square` has no exponent."""
    exponent = call.array("exponent") if "exponent" in call.inputs else call.attribute("exponent", 2)
    return np.asarray(call.array("x") ** exponent)


def _roll(call: Call) -> Array:
    return np.roll(call.array("x"), call.attribute("shifts"), call.attribute("axes"))


def _where(call: Call) -> Array:
    return np.where(call.array("condition") != 0, call.array("a"), call.array("b"))


def _sum(call: Call) -> Array:
    return np.asarray(reduce(np.add, call.listed("inputs")))


def _leaky_relu(call: Call) -> Array:
    x = call.array("x")
    return np.where(x < 0, call.attribute("alpha", f32(0.01)) * x, x)


def _prelu(call: Call) -> Array:
    """ONNX broadcasts the slope from the last axis. PyTorch's runs along axis 1: attribute `slope_axis`."""
    x, slope, axis = call.array("x"), call.array("slope"), call.attribute("slope_axis")
    if axis is not None:
        slope = slope.reshape(_along(int(axis), x.ndim))
    return np.where(x < 0, slope * x, x)


def _dropout(call: Call) -> Array:
    """In inference. One that the caller may put in training is none, and is told by data at its slot."""
    told = call.inputs.get("training_mode")
    if isinstance(told, np.ndarray) or any(call.numbers("training_mode") or []):
        raise NotImplementedError("dropout in training")
    return call.array("x")


def _cast(call: Call) -> Array:
    """No float dtype loses anything here; to an integer the fraction is cut off, to bool all but 0 is 1."""
    x, dtype = call.array("x"), call.attribute("to")
    if "like" in call.inputs:
        dtype = call.value("like").dtype
    if dtype is None or is_float(np.dtype(dtype)):
        return x
    return np.trunc(x) if np.dtype(dtype) != np.bool_ else (x != 0).astype(np.float64)


# ---- quantisation -----------------------------------------------------------------------------

#: TensorProto.DataType of the integers that QuantizeLinear writes without a zero point
_OUTPUT_DTYPES = {2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 21: "uint4", 22: "int4"}


def _quantize_linear(call: Call) -> Array:
    """round(x / scale) + zero point, half to even, saturated to the zero point's dtype."""
    x = call.array("x")
    low, high = _integer_range(call)
    steps = np.rint(x / _per_axis(call, "scale", x)) + _per_axis(call, "zero_point", x)
    return np.asarray(np.clip(steps, low, high))


def _dequantize_linear(call: Call) -> Array:
    x = call.array("x")
    return (x - _per_axis(call, "zero_point", x)) * _per_axis(call, "scale", x)


def _per_axis(call: Call, slot: str, x: Array) -> Array:
    """A scale or zero point laid out against x: one for all, one per index of `axis`, or one per block."""
    given = call.array(slot) if slot in call.inputs else np.zeros(())
    if given.size == 1:
        return given.reshape(())
    axis, block = int(call.attribute("axis", 1)) % x.ndim, int(call.attribute("block_size", 0))
    if block:
        return np.repeat(given, block, axis).take(range(x.shape[axis]), axis)
    return given.reshape(_along(axis, x.ndim))


def _along(axis: int, rank: int) -> list[int]:
    return [-1 if i == axis % rank else 1 for i in range(rank)]


def _integer_range(call: Call) -> tuple[int, int]:
    if "zero_point" in call.inputs:
        name = call.value("zero_point").dtype.name
    else:
        name = _OUTPUT_DTYPES.get(call.attribute("output_dtype") or 2, "a float")
    integer = re.fullmatch(r"(u?)int(\d+)", name)
    if integer is None:
        raise NotImplementedError(f"quantize_linear to {name}: it saturates to the range of an integer dtype")
    bits = int(integer[2]) - (not integer[1])
    return (0 if integer[1] else -(2**bits)), 2**bits - 1


_DEFINITIONS: Mapping[str, Callable[[Call], Array | list[Array] | dict[str, Array]]] = {
    "conv": windows.conv,
    "conv_transpose": windows.conv_transpose,
    "linear": _linear,
    "matmul": _binary(np.matmul),
    "embedding": shapes.embedding,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "instance_norm": _instance_norm,
    "group_norm": _group_norm,
    "lp_norm": _lp_norm,
    "softmax": _softmax,
    "attention": _attention,
    "add": _binary(np.add),
    "sub": _binary(np.subtract),
    "mul": _binary(np.multiply),
    "div": _binary(np.divide),
    "sum": _sum,
    "pow": _pow,
    "sqrt": _unary(np.sqrt),
    "rsqrt": _unary(lambda x: 1 / np.sqrt(x)),
    "reciprocal": _unary(lambda x: 1 / x),
    "where": _where,
    "neg": _unary(np.negative),
    "relu": _unary(lambda x: np.maximum(x, 0)),
    "leaky_relu": _leaky_relu,
    "prelu": _prelu,
    "identity": _unary(lambda x: x),
    "dropout": _dropout,
    "cast": _cast,
    "cast_like": _cast,
    "transpose": shapes.transpose,
    "reshape": shapes.reshape,
    "flatten": shapes.flatten,
    "squeeze": shapes.squeeze,
    "unsqueeze": shapes.unsqueeze,
    "expand": shapes.expand,
    "concat": shapes.concat,
    "split": shapes.split,
    "slice": shapes.slice_,
    "select": shapes.select,
    "gather_nd": shapes.gather_nd,
    "index": shapes.index,
    "tile": shapes.tile,
    "roll": _roll,
    "pad": shapes.pad,
    "resize": shapes.resize,
    "upsample": shapes.upsample,
    "average_pool": windows.average_pool,
    "global_average_pool": windows.global_average_pool,
    "adaptive_average_pool": windows.adaptive_average_pool,
    "max_pool": windows.max_pool,
    "reduce_mean": _reduction(np.mean),
    "reduce_sum": _reduction(np.sum),
    "var": _var_mean,
    "var_mean": _var_mean,
    "quantize_linear": _quantize_linear,
    "dequantize_linear": _dequantize_linear,
}

#: Kinds that `evaluate` knows.
KINDS = frozenset(_DEFINITIONS)
