"""Reshape, Flatten, Squeeze, Unsqueeze, Expand and Transpose.

The same numbers under other indices, so the same map on another axis. Exact where the axis can be followed by
identity: whole, (N, L, C) → (N·L, C); split, C → (g, C/g); or as a factor of a known block, (C, H, W) → C·H·W,
where each s and t is repeated H·W times.
"""

from normtool.affine import Affine
from normtool.constants import Constants
from normtool.graph import Op, Shape
from normtool.rules._axes import permuted, reshaped
from normtool.travel import Answer, Maps, Pass, Rule, Stop, mismatch, only, stop


class Reshape(Rule):
    kinds = ("reshape", "flatten", "squeeze", "unsqueeze")

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        before, after = _shapes(constants, op)
        moved = reshaped(op, only(wanted), after, before)
        return moved if isinstance(moved, Stop) else Pass({"x": moved})

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        if set(carried) != {"x"}:
            return stop("dynamic_weight", op, f"{op.name!r} takes its shape from it")
        before, after = _shapes(constants, op)
        moved = reshaped(op, only(carried), before, after)
        return moved if isinstance(moved, Stop) else Pass(outputs={"y": moved})


def _shapes(constants: Constants, op: Op) -> tuple[Shape | None, Shape | None]:
    tensor = constants.graph.input(op, "x")
    return (tensor.shape if tensor is not None else None), constants.graph.output(op).shape


class Transpose(Rule):
    kinds = ("transpose",)

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        order = permutation(constants, op)
        if isinstance(order, Stop):
            return order
        back = [order.index(axis) for axis in range(len(order))]
        return Pass({"x": permuted(only(wanted), back)})

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        order = permutation(constants, op)
        return order if isinstance(order, Stop) else Pass(outputs={"y": permuted(only(carried), order)})


def permutation(constants: Constants, op: Op) -> list[int] | Stop:
    """Axis of the output → axis of the input."""
    order, rank = constants.attribute(op, "perm"), constants.graph.rank(constants.graph.output(op))
    if order is None and rank is None:
        return stop("axis_unknown", op, f"the rank of the data at {op.name!r} is unknown")
    return list(order) if order is not None else list(range(rank or 0))[::-1]


class Expand(Rule):
    kinds = ("expand",)

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        affine, (before, after) = only(wanted), _shapes(constants, op)
        if before is None or after is None:
            return stop("axis_unknown", op, f"a shape at {op.name!r} is unknown")
        moved = affine.at(affine.axis - len(after) + len(before))
        refusal = _spread_over(op, moved, before)
        return refusal or Pass({"x": moved})

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        if set(carried) != {"x"}:
            return stop("dynamic_weight", op, f"{op.name!r} takes its shape from it")
        affine, (before, after) = only(carried), _shapes(constants, op)
        if before is None or after is None:
            return stop("axis_unknown", op, f"a shape at {op.name!r} is unknown")
        return Pass(outputs={"y": affine.at(affine.axis - len(before) + len(after))})


def _spread_over(op: Op, affine: Affine, shape: Shape) -> Stop | None:
    for axis, n in zip(affine.axes, affine.shape, strict=True):
        if n != 1 and (axis < 0 or shape[axis] != n):
            return mismatch(op, f"{op.name!r} spreads its input over the channels")
    return None
