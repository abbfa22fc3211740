"""Gemm, and PyTorch's Linear on any number of leading axes.

y = α·A'·B' + β·C, where the channel axis is the N axis of B':

    s·(α·A'B' + β·C) + t = α·A'·(B'·diag(s)) + 1·(β·C·s + t)

α is untouched, β becomes 1. C may be a scalar, (N), (1, N), (M, 1) or (M, N); an (M, 1) grows to (M, N).
"""

from typing import Any

import numpy as np

from normtool.affine import Affine
from normtool.constants import Constants
from normtool.edits import Edit, Rebind, Replace
from normtool.graph import Op
from normtool.travel import Absorb, Answer, BackwardRule, Operands, mismatch
from normtool.values import EXTENDED, Array, Rounded, Scaled


class Linear(BackwardRule):
    kinds = ("linear",)

    def meet(self, constants: Constants, op: Op, affine: Affine) -> Answer:
        operands = Operands(constants, op)
        weight, added = operands.value("b"), operands.wide("c")
        if weight is None and Operands(constants, op).value("a") is not None:
            return mismatch(op, f"the constant of {op.name!r} writes its rows, not the channels on axis 1")
        if weight is None or operands.reasons:
            return operands.stop()
        n_axis = 0 if constants.attribute(op, "transB") else 1
        channels = weight.shape[n_axis]
        last = (constants.graph.rank(constants.graph.output(op)) or 2) - 1
        if affine.axis != last or affine.s.size not in (1, channels):
            return mismatch(op, f"{op.name!r} writes {channels} channels on axis {last}")
        map_ = affine.spread(channels)
        factor = np.expand_dims(map_.s, 1 - n_axis)
        beta = float(constants.attribute(op, "beta"))
        moved = _moved_c(added, beta, map_)
        return Absorb(
            (
                Rebind(op, "b", Scaled(weight, factor), f"{op.name}.weight"),
                *_with_c(constants, op, moved, beta, weight.dtype),
            )
        )


def _moved_c(c: Array | None, beta: float, affine: Affine) -> Array:
    """β·C·s + t: numpy aligns C to the right as ONNX does."""
    if c is None:
        return affine.t
    with np.errstate(all="ignore"):
        return np.asarray(EXTENDED(beta) * c * affine.s + affine.t)


def _with_c(constants: Constants, op: Op, c: Array, beta: float, dtype: np.dtype[Any]) -> tuple[Edit, ...]:
    rebound = Rebind(op, "c", Rounded(c, dtype), f"{op.name}.bias")
    if beta == 1.0:
        return (rebound,)
    slots = {slot: slot for slot in constants.graph.inputs(op)}
    return (Replace(op, "linear", slots, {**op.attributes, "beta": 1.0}), rebound)
