"""Add, Sub, Mul, Div with one constant per channel, or one in all.

    x + c: (1, c)    x − c: (1, −c)    c − x: (−1, c)    x·c: (c, 0)    x/c: (1/c, 0)

c/x is not affine. The constant is aligned to the right of the *known* rank, as broadcasting does: a (W,)
constant is one value per column even where W equals the number of channels.
"""

import numpy as np

from normtool.affine import Affine
from normtool.constants import Constants
from normtool.graph import Op
from normtool.reasons import Reason
from normtool.travel import Answer, BackwardRule, Pass, Stop, mismatch
from normtool.values import Array, widened


class Elementwise(BackwardRule):
    kinds = ("add", "sub", "mul", "div")

    def meet(self, constants: Constants, op: Op, affine: Affine) -> Answer:
        return constant_map(constants, op, affine.axis)


def constant_map(constants: Constants, op: Op, axis: int) -> Pass | Stop:
    """The op as an affine map along `axis`, and the slot where the data enters."""
    found = _constant_side(constants, op)
    if isinstance(found, Stop):
        return found
    slot, constant = found
    data = constants.graph.input(op, slot)
    rank = constants.graph.rank(data) if data is not None else None
    along = _along_axis(op, constant, rank, axis)
    if isinstance(along, Stop):
        return along
    map_ = _as_affine(op.kind, slot, along, axis)
    if map_ is None:
        return Stop((Reason("nonlinear", "a constant divided by the data", op.name),))
    if not map_.finite:
        return Stop((Reason("degenerate_stats", "its constant is 0 or not finite", op.name),))
    return Pass(map_, slot)


def _constant_side(constants: Constants, op: Op) -> tuple[str, Array] | Stop:
    """(slot of the data, the constant), or why neither operand is constant."""
    reasons = []
    for data, slot in (("a", "b"), ("b", "a")):
        tensor = constants.graph.input(op, slot)
        array = constants.array(tensor) if tensor is not None else None
        if isinstance(array, Reason):
            reasons.append(array)
        elif array is not None:
            return data, widened(array)
    if all(reason.code == "dynamic_weight" for reason in reasons):
        message = f"{op.spelling} of two computed tensors"
        reasons = [Reason("unsupported_op", message, op.name)]
    return Stop(tuple(reasons))


def _along_axis(op: Op, constant: Array, rank: int | None, axis: int) -> Array | Stop:
    """The constant as (C,) or (1,), if it varies along `axis` alone."""
    if constant.size == 1 and constant.ndim <= (rank or 2):
        return constant.reshape(1)
    if rank is None:
        message = f"the rank of the data at {op.name!r} is unknown"
        return Stop((Reason("axis_unknown", message, op.name),))
    aligned = (1,) * (rank - constant.ndim) + constant.shape
    if len(aligned) > rank or any(n != 1 for i, n in enumerate(aligned) if i != axis):
        return mismatch(op, f"a constant of shape {constant.shape} is not per channel of axis {axis}")
    return constant.reshape(-1)


def _as_affine(kind: str, data: str, c: Array, axis: int) -> Affine | None:
    one, zero = np.ones_like(c), np.zeros_like(c)
    with np.errstate(all="ignore"):
        match kind, data:
            case "add", _:
                return Affine(axis, one, c)
            case "sub", "a":
                return Affine(axis, one, -c)
            case "sub", _:
                return Affine(axis, -one, c)
            case "mul", _:
                return Affine(axis, c, zero)
            case "div", "a":
                return Affine(axis, one / c, zero)
    return None
