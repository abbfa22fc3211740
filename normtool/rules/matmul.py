"""MatMul, with a constant operand or without.

It has no bias, so a constant operand takes s, and a shift only where there is none.

    s·(x·W) = x·(W·diag(s))        channels on the last axis, W on the right
    s·(W·x) = (diag(s)·W)·x        channels on the last axis but one, W on the left

Forward, the shift goes on as a shift of the output: (s·x + t)·W = x·(diag(s)·W) + tW.

Of two computed operands one takes the scale of the axis that it alone has: (A·V)·diag(s) = A·(V·diag(s)). A
shift passes with it if the rows of A sum to 1, because a Softmax made them.

Which axis it is follows from the *position* of the channel axis, never from its size.
"""

import numpy as np

from normtool.affine import Affine
from normtool.constants import Constants
from normtool.edits import Rebind
from normtool.graph import Op, Tensor
from normtool.rules._weights import blocks, on_axis, static_weight
from normtool.rules.carriers import drops_out
from normtool.travel import Absorb, Answer, Maps, Operands, Pass, Rule, Stop, mismatch, only, stop
from normtool.values import Array, Scaled, Value


class MatMul(Rule):
    kinds = ("matmul",)

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        rank, affine = constants.graph.rank(constants.graph.output(op)), only(wanted)
        if rank is None:
            return stop("axis_unknown", op, "the rank of its output is unknown")
        if affine.s.size == 1:  # one number in all lies on any axis
            left = Operands(constants, op).value("a") is not None
            affine = affine.at(rank - 2 if left else rank - 1)
        if affine.s.ndim != 1 or affine.axis < rank - 2:
            return mismatch(op, f"axis {affine.axis} of {rank} is a batch axis of {op.name!r}")
        slot, weight_axis = ("b", -1) if affine.axis == rank - 1 else ("a", -2)
        operands = Operands(constants, op)
        weight = operands.value(slot)
        if weight is None:
            if Operands(constants, op).value("a" if slot == "b" else "b") is not None:
                return mismatch(op, f"the constant of {op.name!r} does not write axis {affine.axis}")
            tensor = constants.graph.input(op, slot)
            made = tensor is not None and constants.graph.producer(tensor) is not None
            computed = made and all(reason.code == "dynamic_weight" for reason in operands.reasons)
            return _pass_back(constants, op, slot, affine, rank) if computed else operands.stop()
        if len(weight.shape) < 2:
            return mismatch(op, f"a vector operand takes the channel axis out of {op.name!r}")
        if refusal := on_axis(op, affine, affine.axis, weight.shape[weight_axis], "writes"):
            return refusal
        if affine.has_shift:
            return stop("no_bias", op, f"{op.name!r} has no bias to take a shift")
        return Absorb((_scaled(op, slot, weight, affine.s, weight_axis),))

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        if len(carried) > 1:
            return stop("dynamic_weight", op, f"both operands of {op.name!r} carry a map")
        (slot,), affine = carried, only(carried)
        ranks = {each: _rank(constants, op, each) for each in ("a", "b")}
        rank = constants.graph.rank(constants.graph.output(op))
        if rank is None or None in ranks.values():
            return stop("axis_unknown", op, "the rank of an operand is unknown")
        own, other = ranks[slot], ranks["b" if slot == "a" else "a"]
        assert own is not None
        assert other is not None
        contracted, free = (own - 1, own - 2) if slot == "a" else (own - 2, own - 1)
        if affine.s.size == 1:  # one number in all lies on any axis
            constant = Operands(constants, op).value("b" if slot == "a" else "a") is not None
            affine = affine.at(contracted if constant else free)
        if affine.s.ndim != 1 or min(own, other) < 2 or affine.axis not in (contracted, free):
            return mismatch(op, f"axis {affine.axis} of {own} is a batch axis of {op.name!r}")
        if affine.axis == free:
            return _pass_on(constants, op, slot, affine, rank)
        operands = Operands(constants, op)
        side = "b" if slot == "a" else "a"
        weight = static_weight(operands, side)
        if isinstance(weight, Stop):
            return weight
        axis = -2 if side == "b" else -1
        if refusal := on_axis(op, affine, affine.axis, weight.shape[axis], "reads"):
            return refusal
        edit = _scaled(op, side, weight, np.broadcast_to(affine.s, weight.shape[axis]), axis)
        if not affine.has_shift:
            return Absorb((edit,))
        if len(weight.shape) > 2:
            return mismatch(op, f"each batch of {op.name!r} would need a shift of its own")
        shift = _sums(weight, np.broadcast_to(affine.t, weight.shape[axis]), axis)
        out = Affine(rank - 1 if side == "b" else rank - 2, np.ones_like(shift), shift)
        return Pass(outputs={"y": out}, edits=(edit,))


def _rank(constants: Constants, op: Op, slot: str) -> int | None:
    tensor = constants.graph.input(op, slot)
    return None if tensor is None else constants.graph.rank(tensor)


def _scaled(op: Op, slot: str, weight: Value, s: Array, axis: int) -> Rebind:
    factor = np.reshape(
        np.broadcast_to(s, weight.shape[axis]),
        [weight.shape[axis] if each == axis else 1 for each in range(-len(weight.shape), 0)],
    )
    return Rebind(op, slot, Scaled(weight, factor), f"{op.name}.weight")


def _sums(weight: Value, t: Array, axis: int) -> Array:
    """tᵀW for W (K, N), or W·t for W (M, K)."""
    if axis == -1:
        return np.concatenate([(rows * t).sum(axis=1) for _, _, rows in blocks(weight)])
    parts = [(rows * t[start:stop, None]).sum(axis=0) for start, stop, rows in blocks(weight)]
    return np.asarray(np.sum(parts, axis=0))


def _pass_back(constants: Constants, op: Op, slot: str, affine: Affine, rank: int) -> Answer:
    """Neither operand is constant: the one that alone has the axis is to hold the map."""
    own = _rank(constants, op, slot)
    if own is None or own < 2:
        return stop("axis_unknown", op, "the rank of an operand is unknown")
    if affine.has_shift and not (slot == "b" and _sums_to_one(constants, op)):
        return stop("no_bias", op, f"{op.name!r} multiplies a shift of its operand by what it computes")
    return Pass({slot: affine.at(affine.axis - rank + own)})


def _pass_on(constants: Constants, op: Op, slot: str, affine: Affine, rank: int) -> Answer:
    own = _rank(constants, op, slot)
    assert own is not None
    if affine.has_shift and not (slot == "b" and _sums_to_one(constants, op)):
        return stop("no_bias", op, f"{op.name!r} multiplies a shift of its operand by what it computes")
    return Pass(outputs={"y": affine.at(affine.axis - own + rank)})


def _sums_to_one(constants: Constants, op: Op) -> bool:
    tensor = constants.graph.input(op, "a")
    return tensor is not None and is_softmax(constants, tensor)


def is_softmax(constants: Constants, tensor: Tensor) -> bool:
    """Was it made by a Softmax over its last axis, and only handed on since?"""
    graph = constants.graph
    while (maker := graph.producer(tensor)) is not None:
        if maker.kind == "softmax":
            axis, rank = constants.attribute(maker, "axis"), graph.rank(tensor)
            if axis is None:
                axis = -1 if maker.version >= 13 else 1
            return rank is not None and axis % rank == rank - 1
        source = graph.input(maker, "x")
        if maker.kind not in ("identity", "dropout") or source is None or drops_out(constants, maker):
            return False
        tensor = source
    return False


class Attention(Rule):
    """softmax(q·kᵀ)·v: the rows that multiply v sum to 1, so its channels pass as they are."""

    kinds = ("attention",)

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        affine, rank = only(wanted), _rank(constants, op, "v")
        if rank is None or (affine.axis != rank - 1 and affine.s.size > 1):
            return mismatch(op, f"axis {affine.axis} of {op.name!r} is not that of its values' channels")
        if constants.attribute(op, "dropout_p"):
            return stop("unsupported_op", op, f"{op.name!r} drops out at random")
        return Pass({"v": affine})

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        affine, rank = only(carried), _rank(constants, op, "v")
        if set(carried) != {"v"} or rank is None or (affine.axis != rank - 1 and affine.s.size > 1):
            return stop("nonlinear", op, f"{op.spelling} reads it")
        if constants.attribute(op, "dropout_p"):
            return stop("unsupported_op", op, f"{op.name!r} drops out at random")
        return Pass(outputs={"y": affine})
