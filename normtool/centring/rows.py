"""What a Centre meets: for each kind of op, whose centring makes its output centred, and who sees a shift.

P = I − (1/d)·11ᵀ takes the mean out of a block. Two questions, one for each direction:

*Behind* an output that is to be centred, P·y: it is as soon as these operands are, because P commutes with the
op, or goes into its constants: P(W·x + b) = (P·W)·x + P·b, P(a + b) = P·a + P·b, P(c·x) = c·P·x for one c in
each block.

*Ahead* of a tensor that comes shifted, x + c·1 with one c for each block: who puts out the same, as
LN(x + c·1) = LN(x) and Softmax(x + c·1) = Softmax(x) do; who puts out a shifted tensor itself; and who
observes the mean.

Ops that only move numbers need no row: their axes are followed by labels (`places`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from normtool.centring.places import Place, from_labels, known_lengths, of_operand
from normtool.constants import Constants
from normtool.graph import Op, Read, Tensor
from normtool.ops import SHAPE_ONLY
from normtool.reasons import Reason
from normtool.rules import all_rules
from normtool.travel import Pass, Stop

#: Slot → the place of its tensor; None where an operand is uniform over the block, and so has to go.
Places: TypeAlias = Mapping[str, Place | None]


@dataclass(frozen=True, eq=False)
class Blocked:
    """It cannot be centred, or it observes the mean; `reason` says why."""

    reason: Reason


@dataclass(frozen=True, eq=False)
class Call:
    """One op, and the place on one of its tensors."""

    constants: Constants
    op: Op
    slot: str
    place: Place

    def input(self, slot: str) -> Tensor | None:
        return self.constants.graph.input(self.op, slot)

    @property
    def output(self) -> Tensor:
        return self.constants.graph.output(self.op)

    def rank(self, slot: str) -> int | None:
        tensor = self.input(slot)
        return self.constants.graph.rank(tensor) if tensor is not None else None

    def axes(self, name: str, rank: int) -> set[int] | None:
        """An attribute that lists axes, counted from the front."""
        stated = self.constants.attribute(self.op, name)
        return None if stated is None else {int(axis) % rank for axis in stated}

    def blocked(self, message: str, code: str = "not_centrable") -> Blocked:
        return Blocked(Reason(code, f"{self.op.name!r} ({self.op.spelling}) {message}", self.op.name))

    def observes(self) -> Blocked:
        return Blocked(
            Reason("observed_mean", f"{self.op.name!r} ({self.op.spelling}) sees the mean", self.op.name)
        )


Answer: TypeAlias = Places | Blocked


def behind(constants: Constants, op: Op, slot: str, place: Place) -> Answer:
    """Operands whose centring centres the output at `slot`."""
    call = Call(constants, op, slot, place)
    if op.kind in _BEHIND:
        return _BEHIND[op.kind](call)
    return _moved_back(call) if op.kind in CARRIERS else call.blocked("writes it, and cannot be centred")


def looks_at_numbers(read: Read) -> bool:
    return (read.op.kind, read.slot) not in SHAPE_ONLY


def ahead(constants: Constants, op: Op, slot: str, place: Place) -> Answer:
    """Outputs that are shifted when the input at `slot` is. Empty: op puts out what it did."""
    call = Call(constants, op, slot, place)
    if (op.kind, slot) in SHAPE_ONLY:
        return {}
    if op.kind in _AHEAD:
        return _AHEAD[op.kind](call)
    return _moved_ahead(call) if op.kind in CARRIERS else call.observes()


# ---- who only moves numbers -----------------------------------------------------------------------

#: Each number that comes out is one that went in.
CARRIERS = frozenset(
    """identity dropout cast cast_like transpose reshape flatten squeeze unsqueeze expand split slice select
    embedding gather_nd index tile""".split()
)


def _moved_back(call: Call) -> Answer:
    tensor = call.constants.graph.outputs(call.op)[call.slot]
    labels = call.place.labels(tensor.shape) if tensor.shape is not None else None
    if labels is None:
        return call.blocked("has an output of unknown shape", "axis_unknown")
    if call.op.kind == "embedding":
        return _looked_up(call)
    answer = all_rules()[call.op.kind].backward(call.constants, call.op, {call.slot: labels})
    if isinstance(answer, tuple):
        answer = next((each for each in answer if isinstance(each, Pass)), answer[0])
    if not isinstance(answer, Pass):
        return (
            Blocked(answer.reasons[0]) if isinstance(answer, Stop) else call.blocked("cannot be followed back")
        )
    places = {}
    for slot, affine in answer.inputs.items():
        operand = call.input(slot)
        place = from_labels(affine, operand.shape if operand is not None else None)
        if place is None:
            return call.blocked("takes the block apart", "axis_mismatch")
        places[slot] = place
    return places


def _moved_ahead(call: Call) -> Answer:
    tensor = call.input(call.slot)
    labels = call.place.labels(tensor.shape) if tensor is not None and tensor.shape is not None else None
    if labels is None:
        return call.blocked("reads a tensor of unknown shape", "axis_unknown")
    answer = all_rules()[call.op.kind].forward(call.constants, call.op, {call.slot: labels})
    if isinstance(answer, tuple):
        answer = next((each for each in answer if isinstance(each, Pass)), answer[0])
    if not isinstance(answer, Pass):
        return call.observes()
    outputs = call.constants.graph.outputs(call.op)
    places = {}
    for slot, affine in answer.outputs.items():
        place = from_labels(affine, outputs[slot].shape)
        if place is None:
            return call.observes()
        places[slot] = place
    return places


def _looked_up(call: Call) -> Answer:
    """Rows of a table: an axis behind the indices is one of the table's."""
    table, indices = call.rank("table"), call.rank("indices")
    if table is None or indices is None:
        return call.blocked("has an operand of unknown rank", "axis_unknown")
    axis = int(call.constants.attribute(call.op, "axis") or 0) % table
    if call.place.stop <= axis:
        return {"table": call.place}
    if call.place.start >= axis + indices:
        return {"table": call.place.moved(1 - indices)}
    return call.blocked("gathers along that axis", "axis_mismatch")


# ---- products -------------------------------------------------------------------------------------


def _linear_behind(call: Call) -> Answer:
    """P(x·W + b) = x·(W·P) + P·b along the axis of the features that come out."""
    rank = call.constants.graph.rank(call.output)
    if rank is None or (call.place.start, call.place.stop) != (rank - 1, rank):
        return call.blocked("writes its features along another axis", "axis_mismatch")
    added = {} if call.input("c") is None else _terms(call, ["c"])
    if isinstance(added, Blocked):
        return added
    axis = 0 if call.constants.attribute(call.op, "transB") else 1
    return {"b": call.place.moved(axis - rank + 1), **added}


def _conv_behind(call: Call) -> Answer:
    """The mean over the filters; those of one group see other channels than those of another."""
    weight = call.input("weight")
    if weight is None or weight.shape is None or (call.place.start, call.place.stop) != (1, 2):
        return call.blocked("writes its channels along another axis", "axis_mismatch")
    groups = int(call.constants.attribute(call.op, "group") or 1)
    place, transposed = call.place, call.op.kind == "conv_transpose"
    if groups > 1 and (transposed or place.inner > 1 or (place.outer * place.block // groups) % place.block):
        return call.blocked(f"has {groups} groups of channels, and the mean is over all", "not_centrable")
    places: dict[str, Place | None] = {"weight": place if transposed else place.moved(-1)}
    return places | ({"bias": place.moved(-1)} if call.input("bias") is not None else {})


def _matmul_behind(call: Call) -> Answer:
    """Columns of the product are combinations of a's, its rows of b's."""
    ranks = call.constants.graph.rank(call.output), call.rank("a"), call.rank("b")
    if None in ranks:
        return call.blocked("has an operand of unknown rank", "axis_unknown")
    rank, a, b = (int(each or 0) for each in ranks)
    if a >= 2 and b >= 2 and call.place.stop - call.place.start == 1:
        if call.place.start == rank - 1:
            return {"b": call.place.moved(b - rank)}
        if call.place.start == rank - 2:
            return {"a": call.place.moved(a - rank)}
    return call.blocked("multiplies along another axis", "axis_mismatch")


def _matmul_ahead(call: Call) -> Answer:
    own, rank = call.rank(call.slot), call.constants.graph.rank(call.output)
    other = call.rank("b" if call.slot == "a" else "a")
    if own is None or rank is None or other is None or min(own, other) < 2:
        return call.observes()
    if call.place.start == own - (1 if call.slot == "b" else 2) and call.place.stop == call.place.start + 1:
        return {"y": call.place.moved(rank - own)}
    return call.observes()


def _attention_behind(call: Call) -> Answer:
    """Rows of the output are combinations of those of v."""
    rank = call.rank("v")
    if rank is None or (call.place.start, call.place.stop) != (rank - 1, rank):
        return call.blocked("writes along another axis", "axis_mismatch")
    return {"v": call.place}


def _attention_ahead(call: Call) -> Answer:
    rank = call.rank("v")
    last = rank is not None and (call.place.start, call.place.stop) == (rank - 1, rank)
    return {"y": call.place} if call.slot == "v" and last else call.observes()


# ---- elementwise ----------------------------------------------------------------------------------


def _sum_behind(call: Call) -> Answer:
    return _terms(call, sorted(call.constants.graph.inputs(call.op)))


def _terms(call: Call, slots: list[str]) -> Answer:
    rank = call.constants.graph.rank(call.output)
    if rank is None:
        return call.blocked("has an output of unknown rank", "axis_unknown")
    places: dict[str, Place | None] = {}
    for slot in slots:
        operand = call.input(slot)
        place = of_operand(call.place, rank, operand.shape if operand is not None else None)
        if isinstance(place, str):
            known = operand is not None and operand.shape is not None and known_lengths(operand.shape)
            code = "axis_mismatch" if known else "axis_unknown"
            return call.blocked(f"reads {operand.name if operand else slot!r}: {place}", code)
        places[slot] = place
    return places


def _sum_ahead(call: Call) -> Answer:
    own, rank = call.rank(call.slot), call.constants.graph.rank(call.output)
    return call.observes() if own is None or rank is None else {"y": call.place.moved(rank - own)}


def _where_behind(call: Call) -> Answer:
    """A choice made for the whole block."""
    return (
        _terms(call, ["a", "b"]) if _is_uniform(call, "condition") else call.blocked("chooses within the block")
    )


def _where_ahead(call: Call) -> Answer:
    chosen = call.slot != "condition" and _is_uniform_ahead(call, "condition")
    return _sum_ahead(call) if chosen else call.observes()


def _is_uniform(call: Call, slot: str) -> bool:
    """Has the operand one number for the whole block of the output?"""
    rank, operand = call.constants.graph.rank(call.output), call.input(slot)
    return rank is not None and operand is not None and of_operand(call.place, rank, operand.shape) is None


def _is_uniform_ahead(call: Call, slot: str) -> bool:
    """The same, asked of a place on the operand at `call.slot`."""
    own, rank, operand = call.rank(call.slot), call.constants.graph.rank(call.output), call.input(slot)
    if own is None or rank is None or operand is None:
        return False
    return of_operand(call.place.moved(rank - own), rank, operand.shape) is None


def _product_behind(call: Call) -> Answer:
    """One factor for each block; the other operand is what has to be centred."""
    pairs = [("a", "b")] if call.op.kind == "div" else [("a", "b"), ("b", "a")]
    for data, factor in pairs:
        if _is_uniform(call, factor):
            return _terms(call, [data])
    constant = [slot for slot in "ab" if _is_constant(call, slot)]
    if constant and call.op.kind == "mul":
        return call.blocked("scales every number of the block by another constant", "scaled")
    return call.blocked("multiplies by data within the block")


def _is_constant(call: Call, slot: str) -> bool:
    operand = call.input(slot)
    return operand is not None and not isinstance(call.constants.value(operand), Reason)


def _product_ahead(call: Call) -> Answer:
    """A uniform factor passes the shift on; a factor within the block makes it anything but uniform."""
    if call.op.kind == "div" and call.slot == "b":
        return call.observes()
    other = "a" if call.slot == "b" else "b"
    return _sum_ahead(call) if _is_uniform_ahead(call, other) else call.observes()


def _same(slot: str) -> Callable[[Call], Answer]:
    return lambda call: {slot: call.place}


# ---- along other axes -------------------------------------------------------------------------------


def _concat_behind(call: Call) -> Answer:
    """Parts that lie beside each other along another axis are centred each by itself."""
    if _lies_on(call, "axis"):
        return call.blocked("joins parts along that axis", "axis_mismatch")
    return dict.fromkeys(call.constants.graph.inputs(call.op), call.place)


def _concat_ahead(call: Call) -> Answer:
    return call.observes() if _lies_on(call, "axis") else {"y": call.place}


def _split_behind(call: Call) -> Answer:
    """Parts along another axis are centred with the whole, whoever reads the others."""
    rank, axis = call.rank("x"), int(call.constants.attribute(call.op, "axis") or 0)
    if rank is None or axis % rank in range(call.place.start, call.place.stop):
        return call.blocked("cuts along that axis", "axis_mismatch")
    return {"x": call.place}


def _lies_on(call: Call, name: str) -> bool:
    """Does the op work along an axis of the place, or along one that is not known?"""
    rank, stated = call.constants.graph.rank(call.output), call.constants.attribute(call.op, name)
    return rank is None or stated is None or int(stated) % rank in range(call.place.start, call.place.stop)


def _mean_axes(call: Call) -> set[int] | None:
    rank = call.rank("x")
    return None if rank is None else call.axes("axes", rank)


def _mean_behind(call: Call) -> Answer:
    """The mean, or the sum, over other axes."""
    rank, axes = call.rank("x"), _mean_axes(call)
    if rank is None or not axes:
        return call.blocked("takes a mean along unknown axes", "axis_unknown")
    kept = [axis for axis in range(rank) if call.constants.attribute(call.op, "keepdims") or axis not in axes]
    own = [kept[axis] for axis in range(call.place.start, call.place.stop)]
    if own != list(range(own[0], own[-1] + 1)) or axes & set(own):
        return call.blocked("takes a mean along that axis", "axis_mismatch")
    return {"x": call.place.moved(own[0] - call.place.start)}


def _mean_ahead(call: Call) -> Answer:
    rank, axes = call.rank("x"), _mean_axes(call)
    own = set(range(call.place.start, call.place.stop))
    if rank is None or not axes or axes & own:
        return call.observes()
    if call.constants.attribute(call.op, "keepdims"):
        return {"y": call.place}
    return {"y": call.place.moved(-sum(axis < call.place.start for axis in axes))}


def _works_along(call: Call, slot: str) -> Blocked:
    """Refused behind the op (`slot` is what it reads), and ahead of it (what it puts out)."""
    return call.observes() if slot == "y" else call.blocked("works along that axis", "axis_mismatch")


def _window(slot: str) -> Callable[[Call], Answer]:
    """Averages over positions, where the block lies among the channels: padding with 0 is centred."""
    return lambda call: {slot: call.place} if call.place.stop <= 2 else _works_along(call, slot)


def _resize(slot: str) -> Callable[[Call], Answer]:
    def answer(call: Call) -> Answer:
        before, after = call.input("x"), call.output.shape
        own = slice(call.place.start, call.place.stop)
        cropped = call.constants.attribute(call.op, "coordinate_transformation_mode") == "tf_crop_and_resize"
        shape = before.shape if before is not None else None
        if cropped or shape is None or after is None or known_lengths(shape[own]) is None:
            return _works_along(call, slot)
        return {slot: call.place} if shape[own] == after[own] else _works_along(call, slot)

    return answer


def _pad_behind(call: Call) -> Answer:
    """A border that is copied, or 0, is centred with the rest."""
    return (
        {"x": call.place}
        if _pads_elsewhere(call) and _fills_with_zero(call)
        else call.blocked("fills a border")
    )


def _pad_ahead(call: Call) -> Answer:
    """The border is not shifted; it is still one shift for each block."""
    return {"y": call.place} if call.slot == "x" and _pads_elsewhere(call) else call.observes()


def _pads_elsewhere(call: Call) -> bool:
    rank, pads = call.rank("x"), call.constants.attribute(call.op, "pads")
    if rank is None or pads is None:
        return False
    stated = call.constants.attribute(call.op, "axes")
    axes = [int(axis) % rank for axis in (range(rank) if stated is None else stated)]
    padded = {axis for i, axis in enumerate(axes) if pads[i] or pads[i + len(axes)]}
    return not padded & set(range(call.place.start, call.place.stop))


def _fills_with_zero(call: Call) -> bool:
    mode = call.constants.attribute(call.op, "mode") or "constant"
    filled = call.constants.attribute(call.op, "value")
    return mode != "constant" or (not call.constants.is_computed(call.op, "value") and not filled)


def _roll(slot: str) -> Callable[[Call], Answer]:
    def answer(call: Call) -> Answer:
        rank = call.rank("x")
        axes = None if rank is None else call.axes("axes", rank)
        elsewhere = axes and not axes & set(range(call.place.start, call.place.stop))
        return {slot: call.place} if elsewhere else _works_along(call, slot)

    return answer


# ---- who puts out the same --------------------------------------------------------------------------


def _softmax_ahead(call: Call) -> Answer:
    """Softmax(x + c·1) = Softmax(x), where the block is the whole axis."""
    rank, axis = call.rank("x"), call.constants.attribute(call.op, "axis")
    if rank is None or axis is None or not call.place.is_one_axis:
        return call.observes()
    if call.op.domain == "" and call.op.version < 13 and int(axis) % rank != rank - 1:
        return call.observes()  # there it is over all axes from that one on
    return {} if int(axis) % rank == call.place.start else call.observes()


_BEHIND: Mapping[str, Callable[[Call], Answer]] = {
    "linear": _linear_behind,
    "conv": _conv_behind,
    "conv_transpose": _conv_behind,
    "matmul": _matmul_behind,
    "attention": _attention_behind,
    "add": _sum_behind,
    "sub": _sum_behind,
    "sum": _sum_behind,
    "where": _where_behind,
    "mul": _product_behind,
    "div": _product_behind,
    "neg": _same("x"),
    "concat": _concat_behind,
    "split": _split_behind,
    "reduce_mean": _mean_behind,
    "reduce_sum": _mean_behind,
    "average_pool": _window("x"),
    "global_average_pool": _window("x"),
    "adaptive_average_pool": _window("x"),
    "resize": _resize("x"),
    "pad": _pad_behind,
    "roll": _roll("x"),
}

_AHEAD: Mapping[str, Callable[[Call], Answer]] = {
    "matmul": _matmul_ahead,
    "attention": _attention_ahead,
    "add": _sum_ahead,
    "sub": _sum_ahead,
    "sum": _sum_ahead,
    "where": _where_ahead,
    "mul": _product_ahead,
    "div": _product_ahead,
    "neg": _same("y"),
    "concat": _concat_ahead,
    "reduce_mean": _mean_ahead,
    "reduce_sum": _mean_ahead,
    "average_pool": _window("y"),
    "global_average_pool": _window("y"),
    "adaptive_average_pool": _window("y"),
    "resize": _resize("y"),
    "pad": _pad_ahead,
    "roll": _roll("y"),
    "softmax": _softmax_ahead,
}
