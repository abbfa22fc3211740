"""Add, Sub, Mul, Div, Neg and Sum.

With one constant per channel, or one in all, each is an affine map itself; it merges, and goes:

    x + c: (1, c)    x − c: (1, −c)    c − x: (−1, c)    x·c: (c, 0)    x/c: (1/c, 0)    −x: (−1, 0)

c/x is not affine. The constant is aligned to the right of the *known* rank, as broadcasting does: a (W,)
constant is one value per column even where W equals the number of channels.

Any constant that is added can take a shift: s·(x + c) + t = s·x + (s·c + t). A sum of computed tensors passes
s to all of them and t to one; a product passes s to one factor, and no shift:

    s·(a + b) + t = (s·a + t) + s·b        s·(a·b) = (s·a)·b

Forward, every term must come scaled alike; a term that does not is asked for itself divided by s (s ≠ 0), and a
constant is divided: (s·x + t) + c = s·(x + (c + t)/s).
"""

from collections.abc import Mapping

import numpy as np

from normtool.affine import Affine
from normtool.constants import Constants
from normtool.edits import Rebind
from normtool.graph import Op, Tensor
from normtool.reasons import Reason
from normtool.travel import (
    Absorb,
    Answer,
    Answers,
    Maps,
    Merge,
    Pass,
    Rule,
    Stop,
    mismatch,
    only,
    stop,
)
from normtool.values import Array, Rounded, exact_array

#: What an operand counts for in the sum.
_SIGNS = {"add": {"a": 1, "b": 1}, "sub": {"a": 1, "b": -1}}


class Sums(Rule):
    kinds = ("add", "sub", "sum")

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answers:
        affine = only(wanted)
        constant = _constant_slot(constants, op)
        if constant is None:
            return _among_terms(constants, op, affine)
        merge = constant_map(constants, op, _axis(constants, op, affine))
        kept = _with_constant(constants, op, constant, affine)
        return (merge, kept) if isinstance(merge, Merge) else (kept if isinstance(kept, Pass) else merge)

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answers:
        constant = _constant_slot(constants, op)
        if constant is None:
            return _from_terms(constants, op, carried)
        merge = constant_map(constants, op, _axis(constants, op, only(carried)))
        kept = _from_constant(constants, op, constant, carried)
        if isinstance(kept, Stop):
            return merge
        if isinstance(merge, Stop):
            return kept
        # where the constant takes everything in, it may as well stay
        return (kept, merge) if isinstance(kept, Absorb) else (merge, kept)


class Products(Rule):
    kinds = ("mul", "div")

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answers:
        affine = only(wanted)
        constant = _constant_slot(constants, op)
        if constant is not None:
            return constant_map(constants, op, _axis(constants, op, affine))
        if affine.has_shift:
            return stop("unsupported_op", op, f"{op.spelling} of two computed tensors takes no shift")
        factors = ("a", "b") if op.kind == "mul" else ("a",)
        ways = [_passed(constants, op, slot, affine) for slot in factors]
        return tuple(
            Pass({slot: way}) if isinstance(way, Affine) else way
            for slot, way in zip(factors, ways, strict=True)
        )

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answers:
        affine = only(carried) if len(carried) == 1 else None
        if affine is None:
            return stop("nonlinear", op, f"{op.spelling} multiplies it by itself")
        if _constant_slot(constants, op) is not None:
            return constant_map(constants, op, _axis(constants, op, affine))
        (slot,) = carried
        if affine.has_shift or (op.kind == "div" and slot == "b"):
            return stop("unsupported_op", op, f"{op.spelling} of two computed tensors takes no shift")
        out = _outgoing(constants, op, slot, affine)
        return Pass(outputs={"y": out}) if isinstance(out, Affine) else out


class Negation(Rule):
    kinds = ("neg",)

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answers:
        map_ = only(wanted)
        one, zero = np.ones_like(map_.s), np.zeros_like(map_.t)
        return Merge(Affine(map_.axis, -one, zero), "x"), Pass({"x": Affine(map_.axis, map_.s, -map_.t)})

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answers:
        map_ = only(carried)
        return Pass(outputs={"y": Affine(map_.axis, map_.s, -map_.t)})


# ---- one operand is constant --------------------------------------------------------------------


def _axis(constants: Constants, op: Op, affine: Affine) -> int:
    """Where a map meets the constant operand; one number in all meets it wherever it varies."""
    found = channel_axis(constants, op) if affine.s.size == 1 else None
    return affine.axis if found is None else found


def constant_map(constants: Constants, op: Op, axis: int) -> Merge | Stop:
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
    if along.size > 1 and _length(data, axis) not in (None, along.size):
        return mismatch(op, f"{op.name!r} spreads its data over the channels of axis {axis}")
    map_ = _as_affine(op.kind, slot, along, axis)
    if map_ is None:
        return stop("nonlinear", op, "a constant divided by the data")
    if not map_.finite:
        return stop("degenerate_stats", op, "its constant is 0 or not finite")
    return Merge(map_, slot)


def channel_axis(constants: Constants, op: Op) -> int | None:
    """The one axis along which the constant operand varies; None where there is no such constant."""
    slot = _constant_slot(constants, op)
    if slot is None:
        return None
    data = constants.graph.input(op, "b" if slot == "a" else "a")
    tensor = constants.graph.input(op, slot)
    rank = constants.graph.rank(data) if data is not None else None
    value = constants.value(tensor) if tensor is not None else None
    if rank is None or value is None or isinstance(value, Reason) or len(value.shape) > rank:
        return None
    varying = [axis for axis, n in enumerate(value.shape, rank - len(value.shape)) if n != 1]
    return varying[0] if len(varying) == 1 else None


def _constant_slot(constants: Constants, op: Op) -> str | None:
    """The slot of an operand that is constant beside one that is not."""
    known = [
        slot for slot, t in constants.graph.inputs(op).items() if not isinstance(constants.value(t), Reason)
    ]
    return known[0] if len(known) == 1 and op.kind != "sum" else None


def _constant_side(constants: Constants, op: Op) -> tuple[str, Array] | Stop:
    """(slot of the data, the constant), or why neither operand is constant."""
    reasons = []
    for data, slot in (("a", "b"), ("b", "a")):
        tensor = constants.graph.input(op, slot)
        value = constants.value(tensor) if tensor is not None else None
        if isinstance(value, Reason):
            reasons.append(value)
        elif value is not None:
            return data, exact_array(value)
    if all(reason.code == "dynamic_weight" for reason in reasons):
        reasons = [Reason("unsupported_op", f"{op.spelling} of two computed tensors", op.name)]
    return Stop(tuple(reasons))


def _along_axis(op: Op, constant: Array, rank: int | None, axis: int) -> Array | Stop:
    """The constant as (C,) or (1,), if it varies along `axis` alone."""
    if constant.size == 1 and constant.ndim <= (rank or 2):
        return constant.reshape(1)
    if rank is None:
        return stop("axis_unknown", op, f"the rank of the data at {op.name!r} is unknown")
    aligned = (1,) * (rank - constant.ndim) + constant.shape
    if len(aligned) > rank or any(n != 1 for i, n in enumerate(aligned) if i != axis):
        return mismatch(op, f"a constant of shape {constant.shape} is not per channel of axis {axis}")
    return constant.reshape(-1)


def _length(tensor: Tensor | None, axis: int) -> int | str | None:
    return tensor.shape[axis] if tensor is not None and tensor.shape is not None else None


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


def _with_constant(constants: Constants, op: Op, slot: str, affine: Affine) -> Pass | Stop:
    """s·(±x ± c) + t: the data takes s, the constant s and t."""
    data = "b" if slot == "a" else "a"
    edit = _moved_constant(constants, op, slot, affine, _SIGNS[op.kind][slot])
    passed = _passed(constants, op, data, affine.scale)
    if isinstance(edit, Stop):
        return edit
    return Pass({data: passed}, edits=(edit,)) if isinstance(passed, Affine) else passed


def _from_constant(constants: Constants, op: Op, constant: str, carried: Maps) -> Absorb | Pass | Stop:
    """±(s·x + t) ± c = s·(±x + (±c ± t)/s): the constant takes t, and is divided by s."""
    (slot,) = carried
    out = _outgoing(constants, op, slot, only(carried))
    if isinstance(out, Stop):
        return out
    if np.any(out.s == 0):
        return stop("degenerate_stats", op, "a channel's scale is 0, which cannot be taken back")
    signs = _SIGNS.get(op.kind, {})
    inverse = Affine(out.axis, 1 / out.s, out.t / out.s)
    edit = _moved_constant(constants, op, constant, inverse, signs.get(slot, 1) * signs.get(constant, 1))
    if isinstance(edit, Stop):
        return edit
    return Pass(outputs={"y": out.scale}, edits=(edit,)) if out.has_scale else Absorb((edit,))


def _moved_constant(constants: Constants, op: Op, slot: str, affine: Affine, sign: int) -> Rebind | Stop:
    """c' = s·c ± t, spread over what c did not vary along before."""
    tensor, rank = constants.graph.input(op, slot), constants.graph.rank(constants.graph.output(op))
    value = constants.value(tensor) if tensor is not None else None
    if rank is None:
        return stop("axis_unknown", op, f"the rank of the data at {op.name!r} is unknown")
    if value is None or isinstance(value, Reason) or len(value.shape) > rank:
        return stop("dynamic_weight", op, "its constant cannot be read")
    wide = exact_array(value).reshape((1,) * (rank - len(value.shape)) + value.shape)
    s, t = affine.along(rank)
    with np.errstate(all="ignore"):
        moved = s * wide + sign * t
    data = constants.graph.input(op, "b" if slot == "a" else "a")
    dtype = data.dtype if data is not None and data.dtype is not None else value.dtype
    return Rebind(op, slot, Rounded(_trimmed(moved, len(value.shape)), dtype), f"{op.name}.{slot}")


def _trimmed(array: Array, rank: int) -> Array:
    """Without the leading axes of length 1 that the constant did not have before."""
    while array.ndim > rank and array.shape[0] == 1:
        array = array[0]
    return array


# ---- all operands are computed ------------------------------------------------------------------


def _terms(op: Op, inputs: Mapping[str, object]) -> dict[str, int]:
    return {slot: _SIGNS.get(op.kind, {}).get(slot, 1) for slot in sorted(inputs)}


def _among_terms(constants: Constants, op: Op, affine: Affine) -> tuple[Answer, ...]:
    """s to every term; t to one of them, the likeliest to have a place for it first."""
    slots = _terms(op, constants.graph.inputs(op))
    passed = {slot: _passed(constants, op, slot, affine) for slot in slots}
    refusals = [way for way in passed.values() if isinstance(way, Stop)]
    if refusals:
        return (refusals[0],)
    maps = {slot: way.scale for slot, way in passed.items() if isinstance(way, Affine)}
    if not affine.has_shift:
        return (Pass(maps),)
    ways = []
    for slot in sorted(slots, key=lambda each: not _takes_shift(constants, op, each)):
        way = passed[slot]
        assert isinstance(way, Affine)
        ways.append(Pass({**maps, slot: Affine(way.axis, way.s, way.t * slots[slot])}))
    return tuple(ways)


def _takes_shift(constants: Constants, op: Op, slot: str) -> bool:
    tensor = constants.graph.input(op, slot)
    maker = constants.graph.producer(tensor) if tensor is not None else None
    return maker is not None and maker.kind in ("conv", "conv_transpose", "linear", "batch_norm")


def _from_terms(constants: Constants, op: Op, carried: Maps) -> Answer:
    """Σ ±(s·xᵢ + tᵢ) = s·Σ ±xᵢ + Σ ±tᵢ; a term that carries nothing is asked for itself divided by s."""
    slots = _terms(op, constants.graph.inputs(op))
    arriving = {slot: _outgoing(constants, op, slot, affine) for slot, affine in carried.items()}
    maps = {slot: out for slot, out in arriving.items() if isinstance(out, Affine)}
    for out in arriving.values():
        if isinstance(out, Stop):
            return out
    first = max(maps.values(), key=lambda map_: map_.s.size)  # the others lie on its axes, or are uniform
    for other in maps.values():
        if not other.scale.same_as(first.scale):
            return stop("multiple_readers", op, f"the terms of {op.name!r} come in different scales")
    t = sum((slots[slot] * out.t for slot, out in maps.items()), np.zeros_like(first.t))
    asked: dict[str, Affine] = {}
    if first.has_scale:
        if np.any(first.s == 0):
            return stop("degenerate_stats", op, "a channel's scale is 0, which cannot be taken back")
        for slot in slots.keys() - carried.keys():
            way = _passed(constants, op, slot, Affine(first.axis, 1 / first.s, np.zeros_like(t)))
            if isinstance(way, Stop):
                return way
            asked[slot] = way
    return Pass(asked, {"y": Affine(first.axis, first.s, t)})


def _passed(constants: Constants, op: Op, slot: str, affine: Affine) -> Affine | Stop:
    """The map of the output as a map of one operand, if that has the channels and is not spread over them."""
    tensor = constants.graph.input(op, slot)
    rank = constants.graph.rank(constants.graph.output(op))
    own_rank = constants.graph.rank(tensor) if tensor is not None else None
    if tensor is None or rank is None or own_rank is None:
        return stop("axis_unknown", op, f"the rank of the data at {op.name!r} is unknown")
    if affine.s.size == 1:
        return affine.at(0)
    moved = affine.at(affine.axis - rank + own_rank)
    for axis, n in zip(moved.axes, moved.shape, strict=True):
        length = tensor.shape[axis] if tensor.shape is not None and axis >= 0 else None
        if n != 1 and length != n:
            what = "is not known to have" if axis >= 0 and length is None else "is spread over"
            return mismatch(op, f"an operand of {op.name!r} {what} the channels of axis {affine.axis}")
    return moved


def _outgoing(constants: Constants, op: Op, slot: str, affine: Affine) -> Affine | Stop:
    """The map of one operand as a map of the output."""
    out, own = constants.graph.output(op), constants.graph.input(op, slot)
    ranks = (constants.graph.rank(own) if own is not None else None, constants.graph.rank(out))
    if None in ranks:
        return stop("axis_unknown", op, f"the rank of the data at {op.name!r} is unknown")
    if affine.s.size == 1:
        return affine.at(0)
    moved = affine.at(affine.axis + ranks[1] - ranks[0])  # type: ignore[operator]
    back = _passed(constants, op, slot, moved)
    return back if isinstance(back, Stop) else moved
