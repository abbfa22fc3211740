"""Gemm, and PyTorch's Linear on any number of leading axes.

y = α·A'·B' + β·C. Backward, where the channel axis is the N axis of B':

    s·(α·A'B' + β·C) + t = α·A'·(B'·diag(s)) + 1·(β·C·s + t)

α is untouched, β becomes 1. C may be a scalar, (N), (1, N), (M, 1) or (M, N); an (M, 1) grows to (M, N).

Forward, where the channel axis is the K axis of A':

    α·(A'·diag(s) + 1·tᵀ)·B' + β·C = α·A'·(diag(s)·B') + 1·(β·C + α·tᵀB')
"""

from typing import Any

import numpy as np

from normtool.affine import Affine
from normtool.constants import Constants
from normtool.edits import Edit, Rebind, Replace
from normtool.graph import Op
from normtool.rules._weights import blocks, entering, on_axis, static_weight
from normtool.travel import Absorb, Answer, Maps, Operands, Rule, Stop, mismatch, only
from normtool.values import EXTENDED, Array, Computed, Rounded, Scaled, Value


class Linear(Rule):
    kinds = ("linear",)

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        operands = Operands(constants, op)
        weight, added = operands.value("b"), operands.wide("c")
        if weight is None and Operands(constants, op).value("a") is not None:
            return mismatch(op, f"the constant of {op.name!r} writes its rows, not the channels on axis 1")
        if weight is None or operands.reasons:
            return operands.stop()
        n_axis = 0 if constants.attribute(op, "transB") else 1
        channels = weight.shape[n_axis]
        last = (constants.graph.rank(constants.graph.output(op)) or 2) - 1
        if refusal := on_axis(op, only(wanted), last, channels, "writes"):
            return refusal
        map_ = only(wanted).spread(channels)
        factor = np.expand_dims(map_.s, 1 - n_axis)
        beta = float(constants.attribute(op, "beta"))
        moved = Rounded(_moved_c(added, beta, map_), weight.dtype)
        return Absorb(
            (
                Rebind(op, "b", Scaled(weight, factor), f"{op.name}.weight"),
                *_with_c(constants, op, moved, beta),
            )
        )

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        operands = Operands(constants, op)
        affine, weight = entering(op, carried, "a"), static_weight(operands, "b")
        if isinstance(affine, Stop):
            return affine
        if isinstance(weight, Stop):
            return weight
        transposed = bool(constants.attribute(op, "transB"))
        k_axis = 1 if transposed else 0
        axis = 0
        if not constants.attribute(op, "transA"):
            axis = (constants.graph.rank(constants.graph.output(op)) or 2) - 1
        if refusal := on_axis(op, affine, axis, weight.shape[k_axis], "reads"):
            return refusal
        map_ = affine.spread(weight.shape[k_axis])
        factor = np.expand_dims(map_.s, 1 - k_axis)
        scaled = Rebind(op, "b", Scaled(weight, factor), f"{op.name}.weight")
        if not affine.has_shift:
            return Absorb((scaled,))
        added = operands.wide("c")
        if operands.reasons:
            return operands.stop()
        alpha, beta = (float(constants.attribute(op, name)) for name in ("alpha", "beta"))
        channels = weight.shape[1 - k_axis]
        shape = (channels,) if added is None else np.broadcast_shapes(added.shape, (channels,))

        def compute() -> Array:
            raised = EXTENDED(alpha) * _sums(weight, map_.t, transposed)
            return raised if added is None else EXTENDED(beta) * added + raised

        return Absorb((scaled, *_with_c(constants, op, Computed(shape, weight.dtype, compute), beta)))


def _moved_c(c: Array | None, beta: float, affine: Affine) -> Array:
    """β·C·s + t: numpy aligns C to the right as ONNX does."""
    if c is None:
        return affine.t
    with np.errstate(all="ignore"):
        return np.asarray(EXTENDED(beta) * c * affine.s + affine.t)


def _sums(weight: Value, t: Array, transposed: bool) -> Array:
    """tᵀB', shape (N,)."""
    if transposed:
        return np.concatenate([(rows * t).sum(axis=1) for _, _, rows in blocks(weight)])
    parts: list[Any] = [(rows * t[start:stop, None]).sum(axis=0) for start, stop, rows in blocks(weight)]
    return np.asarray(np.sum(parts, axis=0))


def _with_c(constants: Constants, op: Op, c: Value, beta: float) -> tuple[Edit, ...]:
    rebound = Rebind(op, "c", c, f"{op.name}.bias")
    if beta == 1.0:
        return (rebound,)
    slots = {slot: slot for slot in constants.graph.inputs(op)}
    return (Replace(op, "linear", slots, {**op.attributes, "beta": 1.0}), rebound)
