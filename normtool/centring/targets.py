"""How an RMSNorm and a Centre are spelled in the model that is written.

    onnx        RMSNormalization, an operator since opset 23
    primitive   Pow, ReduceMean, Add, Sqrt, Div, Mul: ONNX Runtime fuses this, and nothing with a Reciprocal
    ort         SimplifiedLayerNormalization, ONNX Runtime's own operator

An RMSNorm of 16-bit data takes its statistics in float32, as LayerNormalization does (`stash_type`); a Centre
op works in the precision of the model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from normtool.centring.places import Place
from normtool.edits import Part
from normtool.graph import Tensor
from normtool.values import Array, Dense, Value

ONNX, PRIMITIVE, ORT = TARGETS = ("onnx", "primitive", "ort")

#: From this opset on RMSNormalization is an operator of the standard.
RMS_OPSET = 23


def rms_norm(
    x: Tensor, axes: Sequence[int], rank: int, eps: float, dtype: np.dtype[Any], weight: Value, target: str
) -> list[Part]:
    """y = γ · x/√(mean(x²) + ε) over `axes` (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019).

    The operators normalise trailing axes; over others the norm is spelled out.
    """
    trailing = list(axes) == list(range(axes[0], rank))
    if target == PRIMITIVE or not trailing:
        return _primitive(x, axes, eps, dtype, weight)
    name = "SimplifiedLayerNormalization" if target == ORT else ""
    attributes = {"axis": axes[0] - rank, "epsilon": eps}
    return [Part("rms_norm", {"x": x}, {"weight": ("weight", weight)}, attributes, op_type=name)]


def _primitive(x: Tensor, axes: Sequence[int], eps: float, dtype: np.dtype[Any], weight: Value) -> list[Part]:
    single = np.dtype(np.float32)
    narrow = dtype.itemsize < single.itemsize
    wide = single if narrow else dtype
    parts = [Part("cast", {"x": x}, attributes={"to": wide})] if narrow else []
    entered: Tensor | int = 0 if narrow else x
    first = len(parts)
    parts += [
        Part("pow", {"x": entered}, {"exponent": ("two", number(2, wide))}),
        Part("reduce_mean", {"x": first}, attributes={"axes": list(axes), "keepdims": 1}),
        Part("add", {"a": first + 1}, {"b": ("epsilon", number(eps, wide))}),
        Part("sqrt", {"x": first + 2}),
        Part("div", {"a": entered, "b": first + 3}),
    ]
    if narrow:
        parts.append(Part("cast", {"x": len(parts) - 1}, attributes={"to": dtype}))
    return [*parts, Part("mul", {"a": len(parts) - 1}, {"b": ("weight", weight)})]


def centre(x: Tensor, place: Place) -> list[Part]:
    """x − mean(x) over the place."""
    if place.outer == place.inner == 1:
        axes = list(range(place.start, place.stop))
        return [
            Part("reduce_mean", {"x": x}, attributes={"axes": axes, "keepdims": 1}),
            Part("sub", {"a": x, "b": 0}),
        ]
    raise ValueError(f"a Centre over parts of an axis of {x.name!r} has no spelling")


def number(value: float, dtype: np.dtype[Any]) -> Value:
    return Dense(np.asarray(value).astype(dtype))


def ones(shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    return np.ones(shape).astype(dtype)
