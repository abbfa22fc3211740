"""What Conv, ConvTranspose, Gemm and MatMul have in common: weights that scale, biases that take a shift."""

from collections.abc import Callable
from typing import Any

import numpy as np

from normtool.affine import Affine
from normtool.constants import Constants
from normtool.edits import Rebind
from normtool.graph import Op
from normtool.travel import Maps, Operands, Stop, mismatch, stop
from normtool.values import Array, Computed, Rounded, Value, exact_rows, row_blocks


def rebound_bias(
    constants: Constants, op: Op, affine: Affine, bias: Array | None, dtype: np.dtype[Any]
) -> Rebind:
    """b' = s·b + t, (C,) in `dtype`; an op that had none gets one named after its weight."""
    with np.errstate(all="ignore"):
        shifted = affine.t if bias is None else affine.s * bias + affine.t
    return Rebind(op, "bias", Rounded(shifted, dtype), bias_name(constants, op))


def bias_name(constants: Constants, op: Op, slot: str = "weight") -> str:
    weight = constants.graph.input(op, slot)
    stem = weight.name if weight is not None else op.name
    return f"{stem.removesuffix('.weight').removesuffix('_weight')}.bias"


def raised_bias(
    constants: Constants, op: Op, bias: Array | None, weight: Value, sums: Callable[[], Array], channels: int
) -> Rebind:
    """b' = b + Σ W·t; the sum over the whole weight is not formed before somebody asks for it."""

    def compute() -> Array:
        return sums() if bias is None else bias + sums()

    value = Computed((channels,), weight.dtype, compute)
    return Rebind(op, "bias", value, bias_name(constants, op))


def blocks(weight: Value) -> list[tuple[int, int, Array]]:
    """(first row, end, rows in extended precision before any rounding) over the whole weight."""
    return [(start, stop, exact_rows(weight, start, stop)) for start, stop in row_blocks(weight)]


def entering(op: Op, carried: Maps, slot: str) -> Affine | Stop:
    """The map at the slot of the data, if it is the only one that arrives."""
    if set(carried) != {slot}:
        return stop("dynamic_weight", op, f"the map reaches {op.name!r} at {', '.join(sorted(carried))}")
    return carried[slot]


def on_axis(op: Op, affine: Affine, axis: int, channels: int, does: str) -> Stop | None:
    """None if the map lies on this axis of this many channels, and on no other. One number in all lies on
    any."""
    if affine.s.size == 1 or (affine.s.shape == (channels,) and affine.axis == axis):
        return None
    return mismatch(op, f"{op.name!r} {does} {channels} channels on axis {axis}")


def static_weight(operands: Operands, slot: str) -> Value | Stop:
    """The constant weight, or all reasons why the op's constants cannot be changed."""
    weight = operands.value(slot)
    return operands.stop() if weight is None or operands.reasons else weight
