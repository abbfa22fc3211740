"""γ and β of norms that normalise what they read: LayerNorm, RMSNorm, GroupNorm, InstanceNorm.

The norm stays. Its γ and β are a map of what it puts out, z being what it has normalised, and go forward into
what reads that (`walk`), in the most useful way that ends well:

    both      y = γ·y′ + β    y′ = z
    β alone   y = y′ + β      y′ = γ·z
    γ alone   y = γ·y′        y′ = z + β/γ      where no γ is 0

The last lets the readers have γ where a shift cannot go: where a Conv pads with zeros, or a MatMul has no bias.

A norm that is spelled out in primitive ops ends with a Mul by γ and an Add of β. These are taken out; or, in a
user's module, whose code makes the calls, they become 1 and 0 as γ and β of a single op do.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from normtool.affine import Affine
from normtool.constants import Constants
from normtool.edits import Edit, Rebind, Replace, Splice
from normtool.graph import ModelGraph, Op, Tensor
from normtool.norms import Norm
from normtool.ops import ATEN
from normtool.reasons import Reason
from normtool.rules._axes import trimmed
from normtool.values import Array, Rounded, Value, exact_array
from normtool.walk import Carry, Stopped, Surroundings, Walk

#: Kinds that are one op, with γ at `weight` and β at `bias`.
NATIVE = frozenset(["layer_norm", "rms_norm", "group_norm", "instance_norm"])

WEIGHT, BIAS = "weight", "bias"

#: What leaves a norm together.
Parts = tuple[str, ...]

#: Every way, the most useful first.
WAYS: tuple[Parts, ...] = ((WEIGHT, BIAS), (BIAS,), (WEIGHT,))

#: Ways after which no β is left.
WITHOUT_BIAS: tuple[Parts, ...] = WAYS[:2]

#: Before this opset GroupNormalization had one γ and one β for each group.
_PER_CHANNEL_SINCE = 21


@dataclass(frozen=True)
class Tail:
    """The ops that have γ and β: the norm itself, or the Mul and the Add that a spelled-out one ends with."""

    scale: Op | None
    shift: Op | None

    @classmethod
    def of(cls, op: Op) -> "Tail":
        """Of a norm that is one op."""
        return cls(op, op)

    @property
    def last(self) -> Op:
        last = self.shift or self.scale
        assert last is not None
        return last

    @property
    def ops(self) -> tuple[Op, ...]:
        return tuple(dict.fromkeys(op for op in (self.scale, self.shift) if op is not None))


def tail_of(constants: Constants, norm: Norm) -> Tail | None:
    """Where γ and β of a norm are; None where nothing is known of that."""
    if norm.op is not None and norm.op.kind in NATIVE:
        return Tail.of(norm.op)
    if norm.kind in NATIVE and norm.form is not None:
        return tail_among(constants, norm.form.ops, (norm.form.weight, norm.form.bias))
    if norm.kind in NATIVE and norm.op is None and norm.module is not None and norm.calls == 1:
        own = [op for op in constants.graph.ops if op.owner == norm.module.path]
        return tail_among(constants, own, norm.module.learnable)
    return None


def tail_among(constants: Constants, ops: Iterable[Op], parameters: Iterable[Tensor | None]) -> Tail | None:
    """The one Mul and the one Add among the `ops` of a norm by what is computed from its `parameters`.

    None where there is neither, or more than one.
    """
    graph, found = constants.graph, dict[str, list[Op]]()
    roots = {root for each in parameters for root in _stored(graph, each)}
    for op in ops:
        if op.kind in ("mul", "add"):
            inputs = graph.inputs(op).values()
            known = [each for each in inputs if not isinstance(constants.value(each), Reason)]
            if len(known) == 1 and roots.intersection(_stored(graph, known[0])):
                found.setdefault(op.kind, []).append(op)
    if not found or any(len(those) > 1 for those in found.values()):
        return None
    return Tail(*(found.get(kind, [None])[0] for kind in ("mul", "add")))


def ways(around: Surroundings, tail: Tail, wanted: Sequence[Parts] = WAYS) -> Iterator[Parts]:
    """What may be tried: of `wanted`, all that would change something."""
    own = _own_map(around.constants, tail)
    present = {part for part, there in ((WEIGHT, own.has_scale), (BIAS, own.has_shift)) if there}
    kept = (tuple(part for part in parts if part in present) for parts in wanted)
    yield from dict.fromkeys(parts for parts in kept if parts)


def stripped(around: Surroundings, tail: Tail, parts: Parts) -> Walk:
    """The walk that takes these parts of γ and β from a norm to its readers. Raises Stopped."""
    own = _own_map(around.constants, tail)
    if parts == (WEIGHT,) and own.has_shift and np.any(own.s == 0):
        message = "a channel's scale is 0, so its shift cannot go first"
        raise Stopped(Reason("degenerate_stats", message, tail.last.name))
    walk = Walk(around)
    walk.met.update(dict.fromkeys(tail.ops))
    if tail.scale is tail.shift:
        walk.edits += _in_one_op(around.constants, tail.last, parts, own)
    else:
        walk.edits += _in_two_ops(around.constants, tail, parts, own)
        walk.carried.update(_between(around.graph, tail, parts, own))
    s = own.s if WEIGHT in parts else np.ones_like(own.s)
    t = own.t if BIAS in parts else np.zeros_like(own.t)
    walk.start_behind(tail.last, Affine(own.axis, s, t))
    walk = walk.grow()
    if tied := _tied(around.graph, walk):
        raise Stopped(*tied)
    return walk


# ---- γ and β as they are -----------------------------------------------------------------------


def _own_map(constants: Constants, tail: Tail) -> Affine:
    """γ and β as a map of the output. Raises Stopped where one is no constant, or lies on no known axis."""
    if tail.scale is tail.shift:
        return _of_one_op(constants, tail.last)
    scale = None if tail.scale is None else _of_constant(constants, tail.scale, WEIGHT)
    shift = None if tail.shift is None else _of_constant(constants, tail.shift, BIAS)
    if scale is None or shift is None:
        return _finite(tail.last, scale or shift)
    return _finite(tail.last, shift.after(scale))


def _of_one_op(constants: Constants, op: Op) -> Affine:
    if op.attributes.get("use_input_stats") is False:
        raise Stopped(Reason("unsupported_op", "an InstanceNorm with stored statistics", op.name))
    gamma, beta = (_constant(constants, op, slot) for slot in (WEIGHT, BIAS))
    if op.kind in ("group_norm", "instance_norm"):
        laid = [_per_channel(constants.graph, op, value) for value in (gamma, beta)]
        s, t = _given(laid)
        return _finite(op, trimmed(1, s, t))
    y = constants.graph.output(op)
    rank = constants.graph.rank(y)
    if rank is None:
        raise Stopped(Reason("axis_unknown", f"the rank of {y.name!r} is unknown", y.name))
    s, t = _given([None if value is None else exact_array(value) for value in (gamma, beta)])
    return _finite(op, trimmed(rank - s.ndim, s, t))


def _given(pair: Sequence[Array | None]) -> tuple[Array, Array]:
    """γ and β of one shape; an absent γ is 1, an absent β is 0."""
    gamma, beta = pair
    shape = np.broadcast_shapes(*(each.shape for each in pair if each is not None), (1,))
    s = np.ones(1) if gamma is None else gamma
    t = np.zeros(1) if beta is None else beta
    return np.broadcast_to(s, shape), np.broadcast_to(t, shape)


def _finite(op: Op, affine: Affine | None) -> Affine:
    if affine is None or not affine.finite:
        raise Stopped(Reason("degenerate_stats", "a scale or shift is not finite", op.name))
    return affine


def _constant(constants: Constants, op: Op, slot: str) -> Value | None:
    tensor = constants.graph.input(op, slot)
    found = constants.value(tensor) if tensor is not None else None
    if isinstance(found, Reason):
        raise Stopped(found)
    return found


def _per_channel(graph: ModelGraph, op: Op, value: Value | None) -> Array | None:
    """(C,), also of a GroupNormalization that stores one number for each group."""
    if value is None:
        return None
    array = exact_array(value).reshape(-1)
    by_group = op.kind == "group_norm" and op.domain != ATEN and op.version < _PER_CHANNEL_SINCE
    if not by_group:
        return array
    data = graph.input(op, "x")
    channels = data.shape[1] if data is not None and data.shape is not None else None
    if not isinstance(channels, int):
        raise Stopped(Reason("axis_unknown", f"the number of channels at {op.name!r} is unknown", op.name))
    return np.repeat(array, channels // array.size)


def _of_constant(constants: Constants, op: Op, part: str) -> Affine:
    """The map of a Mul by a constant, or of an Add of one."""
    slot, y = _constant_slot(constants, op), constants.graph.output(op)
    rank, value = constants.graph.rank(y), _constant(constants, op, slot)
    assert value is not None
    if rank is None or len(value.shape) > rank:
        raise Stopped(Reason("axis_unknown", f"the rank of {y.name!r} is unknown", y.name))
    own = exact_array(value).reshape((1,) * (rank - len(value.shape)) + value.shape)
    return trimmed(0, *((own, np.zeros_like(own)) if part == WEIGHT else (np.ones_like(own), own)))


def _constant_slot(constants: Constants, op: Op) -> str:
    inputs = constants.graph.inputs(op)
    found = [slot for slot, tensor in inputs.items() if not isinstance(constants.value(tensor), Reason)]
    if op.kind not in ("mul", "add") or len(found) != 1:
        raise Stopped(Reason("dynamic_weight", f"{op.name!r} applies no constant", op.name))
    return found[0]


# ---- γ and β as they will be --------------------------------------------------------------------


def _in_one_op(constants: Constants, op: Op, parts: Parts, own: Affine) -> list[Edit]:
    """γ = 1; no β, or zeros where the operator wants one, or where the code of a user's module passes it."""
    graph, edits = constants.graph, list[Edit]()
    gamma, beta = (_constant(constants, op, slot) for slot in (WEIGHT, BIAS))
    if beta is not None and (BIAS in parts or not own.has_shift):
        if op.kind == "layer_norm" and op.domain != ATEN:
            kept = {slot: slot for slot in graph.inputs(op) if slot != BIAS}
            edits.append(Replace(op, op.kind, kept, op.attributes))
        else:
            edits.append(_filled(op, BIAS, beta, 0))
    elif beta is not None and WEIGHT in parts and gamma is not None:
        edits.append(_divided(op, BIAS, beta, gamma))
    if gamma is not None and WEIGHT in parts:
        edits.append(_filled(op, WEIGHT, gamma, 1))
    return edits


def _in_two_ops(constants: Constants, tail: Tail, parts: Parts, own: Affine) -> list[Edit]:
    edits: list[Edit] = []
    for op, part, neutral in ((tail.scale, WEIGHT, 1), (tail.shift, BIAS, 0)):
        if op is None:
            continue
        slot = _constant_slot(constants, op)
        value = _constant(constants, op, slot)
        assert value is not None
        if part in parts or (part == BIAS and not own.has_shift):
            data = "b" if slot == "a" else "a"
            stays = constants.graph.called_by_code
            edits.append(_filled(op, slot, value, neutral) if stays else Splice(op, data))
        elif part == BIAS and tail.scale is not None:
            gamma = _constant(constants, tail.scale, _constant_slot(constants, tail.scale))
            assert gamma is not None
            edits.append(_divided(op, slot, value, gamma))
    return edits


def _filled(op: Op, slot: str, old: Value, number: int) -> Rebind:
    return Rebind(op, slot, Rounded(np.full(old.shape, number, np.float64), old.dtype), f"{op.name}.{slot}")


def _divided(op: Op, slot: str, beta: Value, gamma: Value) -> Rebind:
    quotient = exact_array(beta) / exact_array(gamma)
    if quotient.shape != beta.shape:
        raise Stopped(Reason("axis_mismatch", "its shift has fewer numbers than its scale", op.name))
    return Rebind(op, slot, Rounded(quotient, beta.dtype), f"{op.name}.{slot}")


def _between(graph: ModelGraph, tail: Tail, parts: Parts, own: Affine) -> dict[Tensor, Carry]:
    """What the Mul puts out, which the Add alone may read, comes without γ."""
    if tail.scale is None or tail.shift is None or WEIGHT not in parts:
        return {}
    tensor = graph.output(tail.scale)
    others = [read.op.name for read in graph.readers(tensor) if read.op is not tail.shift]
    if others:
        message = f"{tensor.name!r} is also read by {others[0]!r}"
        raise Stopped(Reason("multiple_readers", message, tensor.name))
    return {tensor: Carry(own.scale, ahead=True)}


# ---- tied tables ----------------------------------------------------------------------------------


def _tied(graph: ModelGraph, walk: Walk) -> list[Reason]:
    """Weights that are the table of an embedding too: γ in the head alone would store the table twice."""
    reasons = []
    for edit in walk.edits:
        tensor = graph.input(edit.op, edit.slot) if isinstance(edit, Rebind) and edit.op in graph else None
        for root in _stored(graph, tensor):
            for read in graph.readers(root):
                if read.op.kind == "embedding" and read.op not in walk.met:
                    message = f"{root.name!r} is also the table of {read.op.name!r}"
                    reasons.append(Reason("shared_parameter", message, root.name))
    return reasons


def _stored(graph: ModelGraph, tensor: Tensor | None) -> list[Tensor]:
    """The stored tensors that a constant is computed from: a head reads its table transposed."""
    found, pending = [], [tensor] if tensor is not None else []
    while pending:
        each = pending.pop()
        maker = graph.producer(each)
        if each.value is not None or maker is None:
            found.append(each)
        else:
            pending += graph.inputs(maker).values()
    return found
