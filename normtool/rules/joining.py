"""Concat, Split, Slice, Gather and Select.

Along the channel axis each part has its own slice of s and t; along another axis all parts have the same ones.

    Concat(x₁, x₂): (s, t) = (s₁ | s₂, t₁ | t₂)        a part that carries nothing: s = 1, t = 0

A part that is cut out of a tensor wants its own channels changed and leaves the others as they are; who reads
only others does not notice.
"""

from collections.abc import Mapping

import numpy as np

from normtool.affine import Affine, joined
from normtool.constants import Constants
from normtool.edits import Rebind
from normtool.graph import Op, Tensor
from normtool.reasons import Reason
from normtool.travel import Absorb, Answer, Answers, Maps, Operands, Pass, Rule, Stop, mismatch, only, stop
from normtool.values import EXTENDED, Rounded, Scaled, element_count, exact_array


class Concat(Rule):
    kinds = ("concat",)

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        affine, parts = only(wanted), _parts(constants, op)
        axis = _axis(constants, op)
        if isinstance(axis, Stop):
            return axis
        if affine.s.size == 1 or axis not in affine.axes:
            return _to_each(constants, op, dict.fromkeys(parts, affine))
        places = channels_of_parts(constants, op, axis)
        if affine.s.ndim > 1 or places is None or sum(map(len, places.values())) != affine.s.size:
            return mismatch(op, f"the parts of {op.name!r} have unknown lengths")
        maps = {
            slot: Affine(axis, affine.s[own.start : own.stop], affine.t[own.start : own.stop])
            for slot, own in places.items()
        }
        return _to_each(constants, op, maps)

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        parts, axis = _parts(constants, op), _axis(constants, op)
        if isinstance(axis, Stop):
            return axis
        first = next(iter(carried.values()))
        alike = len(carried) == len(parts) and all(first.same_as(other) for other in carried.values())
        if alike and (first.s.size == 1 or axis not in first.axes):
            return Pass(outputs={"y": first})
        if all(_lies_along(affine, axis) for affine in carried.values()):
            lengths = {slot: _length(tensor, axis) for slot, tensor in parts.items()}
            if None in lengths.values():
                return mismatch(op, f"the parts of {op.name!r} have unknown lengths")
            whole = joined(axis, [(carried.get(slot), n) for slot, n in lengths.items()])  # type: ignore[misc]
            return Pass(outputs={"y": whole})
        return stop("multiple_readers", op, f"{op.name!r} joins it with what carries no such map")


def channels_of_parts(constants: Constants, op: Op, axis: int) -> dict[str, range] | None:
    """Slot of a Concat → where its part lies in the whole; None where a length is unknown."""
    lengths = {slot: _length(tensor, axis) for slot, tensor in _parts(constants, op).items()}
    places, start = {}, 0
    for slot, length in lengths.items():
        if length is None:
            return None
        places[slot] = range(start, start + length)
        start += length
    return places


def _parts(constants: Constants, op: Op) -> dict[str, Tensor]:
    inputs = constants.graph.inputs(op)
    return {slot: inputs[slot] for slot in sorted(inputs, key=lambda each: int(each.rpartition(".")[2]))}


def _axis(constants: Constants, op: Op) -> int | Stop:
    """The axis an op works along, counted from the front."""
    axis = constants.attribute(op, "axis") or 0
    tensor = next(iter(constants.graph.outputs(op).values()))
    rank = constants.graph.rank(tensor)
    if axis < 0 and rank is None:
        return stop("axis_unknown", op, f"the rank of the data at {op.name!r} is unknown")
    return int(axis) + (rank or 0) if axis < 0 else int(axis)


def _lies_along(affine: Affine, axis: int) -> bool:
    """Does it lie on this axis and on no other? One number in all lies on any."""
    return affine.s.size == 1 or (affine.s.ndim == 1 and affine.axis == axis)


def _length(tensor: Tensor | None, axis: int) -> int | None:
    shape = tensor.shape if tensor is not None else None
    length = shape[axis] if shape is not None and axis < len(shape) else None
    return length if isinstance(length, int) else None


def _to_each(constants: Constants, op: Op, maps: Mapping[str, Affine]) -> Answer:
    """Wanted of computed parts; put into constant ones."""
    inputs: dict[str, Affine] = {}
    edits = []
    for slot, affine in maps.items():
        tensor = constants.graph.input(op, slot)
        value = constants.value(tensor) if tensor is not None else None
        if affine.is_identity or value is None:
            continue
        if isinstance(value, Reason):
            inputs[slot] = affine
            continue
        s, t = affine.along(len(value.shape))
        moved = exact_array(value) * s + t
        edits.append(Rebind(op, slot, Rounded(moved, value.dtype), f"{op.name}.{slot}"))
    return Pass(inputs, edits=tuple(edits))


class Split(Rule):
    kinds = ("split",)

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        axis = _axis(constants, op)
        if isinstance(axis, Stop):
            return axis
        outputs = _outputs(constants, op)
        first = next(iter(wanted.values()))
        silent = [slot for slot in outputs if slot not in wanted and constants.graph.readers(outputs[slot])]
        alike = not silent and all(first.same_as(other) for other in wanted.values())
        if alike and (first.s.size == 1 or axis not in first.axes):
            return Pass({"x": first})
        if not all(_lies_along(affine, axis) for affine in wanted.values()):
            return stop("multiple_readers", op, f"the parts of {op.name!r} are not all wanted in one form")
        lengths = [_length(tensor, axis) for tensor in outputs.values()]
        if None in lengths:
            return mismatch(op, f"the parts of {op.name!r} have unknown lengths")
        parts = [(wanted.get(slot), n) for slot, n in zip(outputs, lengths, strict=True)]
        return Pass({"x": joined(axis, parts)})  # type: ignore[arg-type]

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        axis, affine = _axis(constants, op), only(carried)
        if isinstance(axis, Stop):
            return axis
        outputs = _outputs(constants, op)
        if affine.s.size == 1 or axis not in affine.axes:
            return Pass(outputs=dict.fromkeys(outputs, affine))
        lengths = [_length(tensor, axis) for tensor in outputs.values()]
        if affine.s.ndim > 1 or None in lengths or sum(map(int, lengths)) != affine.s.size:  # type: ignore[arg-type]
            return mismatch(op, f"the parts of {op.name!r} have unknown lengths")
        ends = np.cumsum([0, *lengths])
        return Pass(
            outputs={
                slot: Affine(axis, affine.s[start:end], affine.t[start:end])
                for slot, start, end in zip(outputs, ends[:-1], ends[1:], strict=True)
            }
        )


def _outputs(constants: Constants, op: Op) -> dict[str, Tensor]:
    outputs = constants.graph.outputs(op)
    return {slot: outputs[slot] for slot in sorted(outputs, key=lambda each: int(each.rpartition(".")[2] or 0))}


class Slice(Rule):
    """Slice, and Select, which takes one index and loses the axis."""

    kinds = ("slice", "select")

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answers:
        cuts, affine = _cuts(constants, op), only(wanted)
        if isinstance(cuts, Stop):
            return cuts
        affine = _widened_back(constants, op, affine)
        whole = _uncut(constants, op, affine, cuts)
        own = whole if isinstance(whole, Stop) else Pass({"x": whole})
        # one number in all is for everything, or for the one channel that is cut out
        return (Pass({"x": affine}), own) if affine.s.size == 1 else own

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        cuts = _cuts(constants, op)
        if isinstance(cuts, Stop):
            return cuts
        affine = _cut(constants, op, only(carried), cuts)
        return affine if isinstance(affine, Stop) else Pass(outputs={"y": affine})

    def ignores(self, constants: Constants, op: Op, slot: str, affine: Affine) -> bool:
        cuts = _cuts(constants, op)
        if slot != "x" or isinstance(cuts, Stop):
            return False
        left = _cut(constants, op, affine, cuts)
        return isinstance(left, Affine) and left.is_identity


def _uncut(constants: Constants, op: Op, affine: Affine, cuts: Mapping[int, slice]) -> Affine | Stop:
    """The map of the channels that are cut out, and x ↦ x for those that are not.

    Of positions, all are to change: the planner sees to it that all readers want the same.
    """
    for axis, cut in cuts.items():
        if axis not in affine.axes:
            continue
        length = _length(constants.graph.input(op, "x"), axis)
        if length is None or affine.s.ndim > 1:
            return mismatch(op, f"{op.name!r} cuts channels out of an unknown number")
        s, t = np.ones(length, EXTENDED), np.zeros(length, EXTENDED)
        s[cut], t[cut] = affine.s, affine.t
        affine = Affine(axis, s, t)
    return affine


def _cut(constants: Constants, op: Op, affine: Affine, cuts: Mapping[int, slice]) -> Affine | Stop:
    for axis, cut in cuts.items():
        if axis in affine.axes and affine.s.size > 1:
            if affine.s.ndim > 1 or affine.s.size != _length(constants.graph.input(op, "x"), axis):
                return mismatch(op, f"{op.name!r} cuts channels out of an unknown number")
            affine = Affine(axis, affine.s[cut], affine.t[cut])
    if op.kind == "select":
        (axis,) = cuts
        affine = affine.at(affine.axis - 1) if affine.axis > axis else affine
        if axis in affine.axes and affine.s.size == 1:
            affine = affine.at(0)
    return affine


def _widened_back(constants: Constants, op: Op, affine: Affine) -> Affine:
    """Where Select has lost an axis, the channels of its input lie one axis further back."""
    if op.kind != "select":
        return affine
    axis = _select_axis(constants, op)
    return affine.at(affine.axis + 1) if affine.axis >= axis else affine


def _select_axis(constants: Constants, op: Op) -> int:
    axis = int(constants.attribute(op, "axis"))
    tensor = constants.graph.input(op, "x")
    rank = constants.graph.rank(tensor) if tensor is not None else None
    return axis + (rank or 0) if axis < 0 else axis


def _cuts(constants: Constants, op: Op) -> dict[int, slice] | Stop:
    """Axis of the input → what is cut out of it."""
    tensor = constants.graph.input(op, "x")
    rank = constants.graph.rank(tensor) if tensor is not None else None
    if rank is None:
        return stop("axis_unknown", op, f"the rank of the data at {op.name!r} is unknown")
    if op.kind == "select":
        index = int(constants.attribute(op, "index"))
        return {_select_axis(constants, op): slice(index, index + 1 or None)}
    starts, ends = (constants.attribute(op, name) for name in ("starts", "ends"))
    if starts is None or ends is None or any(constants.is_computed(op, name) for name in ("axes", "steps")):
        return stop("dynamic_weight", op, f"{op.name!r} cuts at computed positions")
    axes = constants.attribute(op, "axes") or range(len(starts))
    steps = constants.attribute(op, "steps") or [1] * len(starts)
    cuts = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:
            return stop("unsupported_op", op, f"{op.name!r} runs backward")
        cuts[int(axis) % rank] = slice(int(start), int(end), int(step))
    return cuts


class Gather(Rule):
    """Rows of a constant table take s and t in its columns; what is gathered from computed data passes them."""

    kinds = ("embedding",)

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        affine, operands = only(wanted), Operands(constants, op)
        places = _gathered(constants, op)
        if isinstance(places, Stop):
            return places
        axis, added = places
        if affine.s.size > 1 and affine.axis < axis + added and affine.axes[-1] >= axis:
            return mismatch(op, f"axis {affine.axis} is the one {op.name!r} gathers along")
        moved = affine.at(affine.axis - added + 1) if affine.axis >= axis + added else affine
        if affine.s.size == 1:
            moved = affine.at(0)
        table = operands.value("table")
        if table is None:
            computed = all(reason.code == "dynamic_weight" for reason in operands.reasons)
            return Pass({"table": moved}) if computed else operands.stop()
        s, t = moved.along(len(table.shape))
        if not affine.has_shift:
            return Absorb((Rebind(op, "table", Scaled(table, s), f"{op.name}.table"),))
        if element_count(table.shape) > _MOST_ELEMENTS:
            return stop("unsupported_op", op, f"the table of {op.name!r} is too large to be shifted")
        shifted = Rounded(exact_array(table) * s + t, table.dtype)
        return Absorb((Rebind(op, "table", shifted, f"{op.name}.table"),))

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        places = _gathered(constants, op)
        if isinstance(places, Stop):
            return places
        if set(carried) != {"table"}:
            return stop("nonlinear", op, f"{op.spelling} takes its indices from it")
        (axis, added), affine = places, only(carried)
        if affine.s.size == 1:
            return Pass(outputs={"y": affine.at(0)})
        if axis in affine.axes:
            return mismatch(op, f"axis {affine.axis} is the one {op.name!r} gathers along")
        return Pass(outputs={"y": affine.at(affine.axis + added - 1) if affine.axis > axis else affine})


def _gathered(constants: Constants, op: Op) -> tuple[int, int] | Stop:
    """(the axis that is gathered along, how many axes the indices put in its place)."""
    table, indices = constants.graph.input(op, "table"), constants.graph.input(op, "indices")
    ranks = [constants.graph.rank(each) if each is not None else None for each in (table, indices)]
    if ranks[0] is None or ranks[1] is None:
        return stop("axis_unknown", op, f"a rank at {op.name!r} is unknown")
    return int(constants.attribute(op, "axis") or 0) % ranks[0], ranks[1]


class Picked(Rule):
    """GatherND, and PyTorch's x[:, i]: whole slices are picked by computed indices, with all their channels."""

    kinds = ("gather_nd", "index")

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        places = _picked(constants, op)
        if isinstance(places, Stop):
            return places
        first, lost, gained = places
        affine = only(wanted)
        if affine.s.size == 1:
            return Pass({"x": affine.at(0)})
        if affine.axis >= first + gained:
            return Pass({"x": affine.at(affine.axis - gained + lost)})
        return Pass({"x": affine}) if affine.axes[-1] < first else _picked_away(op, affine)

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        places = _picked(constants, op)
        if isinstance(places, Stop):
            return places
        first, lost, gained = places
        affine = only(carried)
        if set(carried) != {"x"}:
            return stop("nonlinear", op, f"{op.spelling} takes its indices from it")
        if affine.s.size == 1:
            return Pass(outputs={"y": affine.at(0)})
        if affine.axis >= first + lost:
            return Pass(outputs={"y": affine.at(affine.axis - lost + gained)})
        return Pass(outputs={"y": affine}) if affine.axes[-1] < first else _picked_away(op, affine)


def _picked_away(op: Op, affine: Affine) -> Stop:
    return mismatch(op, f"axis {affine.axis} is one that {op.name!r} picks from")


def _picked(constants: Constants, op: Op) -> tuple[int, int, int] | Stop:
    """(the first axis that is picked from, how many are, how many take their place)."""
    inputs = constants.graph.inputs(op)
    if op.kind == "gather_nd":
        indices = inputs.get("indices")
        depth = indices.shape[-1] if indices is not None and indices.shape else None
        if not isinstance(depth, int) or constants.attribute(op, "batch_dims"):
            return stop("axis_unknown", op, f"how deep {op.name!r} picks is unknown")
        return 0, depth, len(indices.shape) - 1  # type: ignore[union-attr, arg-type]
    slots = [slot for slot in inputs if slot.startswith("indices.")]
    indices = inputs[slots[0]] if len(slots) == 1 else None
    if indices is None or indices.shape is None or indices.dtype is None or indices.dtype.kind != "i":
        return stop("unsupported_op", op, f"{op.spelling} picks by a mask, or along several axes")
    return int(slots[0].rpartition(".")[2]), 1, len(indices.shape)


class Tile(Rule):
    """Each axis is repeated; the channels keep their map if theirs is not."""

    kinds = ("tile",)

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        affine = only(wanted)
        added = _repeated(constants, op, affine, 0)
        return added if isinstance(added, Stop) else Pass({"x": affine.at(max(0, affine.axis - added))})

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        affine = only(carried)
        added = _repeated(constants, op, affine, 1)
        return added if isinstance(added, Stop) else Pass(outputs={"y": affine.at(affine.axis + added)})


def _repeated(constants: Constants, op: Op, affine: Affine, ahead: int) -> int | Stop:
    """How many leading axes are new, where none of the map's is repeated."""
    repeats, tensor = constants.attribute(op, "repeats"), constants.graph.input(op, "x")
    rank = constants.graph.rank(tensor) if tensor is not None else None
    if repeats is None or rank is None:
        return stop("dynamic_weight", op, f"how often {op.name!r} repeats is computed")
    added = len(repeats) - rank
    axes = [axis + ahead * added for axis in affine.axes]
    if affine.s.size > 1 and any(axis >= len(repeats) or axis < added or repeats[axis] != 1 for axis in axes):
        return mismatch(op, f"{op.name!r} repeats the channels")
    return added


#: A shifted table is held in memory as a whole, in extended precision.
_MOST_ELEMENTS = 1 << 24
