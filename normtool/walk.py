"""Follows an affine map outward until every path ends in constants, or says why one does not.

Two fronts grow from the op that is to go. *Backward*, a tensor is wanted in another form: whoever reads it must
want the same, and its producer is asked. *Forward*, a tensor comes in another form: all its readers are asked.
Ops are taken in dataflow order, so that an op which several paths reach is asked once, with all it is to know.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from normtool.affine import Affine
from normtool.constants import Constants
from normtool.edits import Edit, Insert, Rebind, Replace, Splice
from normtool.graph import GRAPH_OUTPUT, ModelGraph, Op, Read, Tensor
from normtool.ops import SHAPE_ONLY
from normtool.reasons import Reason
from normtool.travel import Absorb, Answer, Answers, Merge, Pass, Rule, Stop, stop
from normtool.values import Array, Rounded

#: Ways tried for one map before the walk gives up; an Add in front of an Add offers two each.
MOST_WAYS = 64

#: Ops an affine map cannot pass, told apart from ops that merely lack a rule.
NONLINEAR = frozenset(
    """relu leaky_relu prelu clip sigmoid tanh gelu hard_sigmoid hard_swish silu mish elu softplus erf softmax
    max_pool pow sqrt layer_norm rms_norm instance_norm group_norm local_response_norm lp_norm
    mean_variance_norm""".split()
)


class Stopped(Exception):
    """One path does not end well."""

    def __init__(self, *reasons: Reason) -> None:
        super().__init__(*reasons)
        self.reasons = tuple(dict.fromkeys(reasons))


@dataclass(frozen=True, eq=False)
class Carry:
    """What a tensor holds in the rewritten model, in terms of what it held.

    `ahead` False: new = α(old); True: old = α(new), which says less where a channel's s is 0.
    """

    affine: Affine
    ahead: bool


class Surroundings:
    """What every walk on one state of the graph shares."""

    def __init__(
        self,
        constants: Constants,
        rules: Mapping[str, Rule],
        order: Mapping[Op, float],
        lower: bool = False,
        border_maps: bool = False,
        requantise: bool = False,
    ) -> None:
        self.constants = constants
        self.graph: ModelGraph = constants.graph
        self.rules = rules
        self.order = order
        self.lower = lower
        self.border_maps = border_maps
        self.requantise = requantise
        #: norms that the user did not choose
        self.untouchable: set[Op] = set()

    def rule(self, op: Op) -> Rule | None:
        rule = self.rules.get(op.kind)
        return None if rule is not None and rule.lowers and not self.lower else rule


class Walk:
    """One attempt. `grow` returns the walk that ended well, or raises Stopped."""

    def __init__(self, around: Surroundings) -> None:
        self.around = around
        self.graph = around.graph
        self.carried: dict[Tensor, Carry] = {}
        self.edits: list[Edit] = []
        #: ops met so far, in the order they were met
        self.met: dict[Op, None] = {}
        #: tensor → who wants it in which form
        self.wanted: dict[Tensor, dict[tuple[Op, str], Affine]] = {}
        #: op → what is put behind it, where its tensor is wanted in another form that it cannot give
        self.behind: dict[Op, Insert] = {}
        self._backward: list[tuple[float, int, Op]] = []
        self._forward: list[tuple[float, int, Op]] = []
        self._queued: set[tuple[Op, bool]] = set()
        self._ways = [MOST_WAYS]

    # ---- starting ---------------------------------------------------------------------

    def start_backward(self, op: Op, merge: Merge) -> None:
        """Take `op` out; what enters it is wanted as it used to leave."""
        self._splice(op, merge.slot)
        self._want(op, merge.slot, merge.inner)

    def start_forward(self, op: Op, merge: Merge) -> None:
        """Take `op` out; what used to leave it now comes as it entered."""
        self._splice(op, merge.slot)
        self._supply(op, "y", merge.inner)

    def start_behind(self, op: Op, affine: Affine) -> None:
        """`op` stays, changed by edits that are known: what it used to put out is `affine` of what it will."""
        self.met[op] = None
        self._supply(op, "y", affine)

    def leave_shift(self, op: Op, merge: Merge, ahead: bool) -> None:
        """Let an Add stand where `op` was: s·x, then + t; `ahead`, + t/s and then s·x."""
        affine = merge.inner
        self.met[op] = None
        self.edits.append(_to_add(self.around, op, merge, affine.t / affine.s if ahead else affine.t))
        if ahead:
            self._supply(op, "y", affine.scale)
        else:
            self._want(op, merge.slot, affine.scale)

    def start_at(self, op: Op, wanted: Mapping[str, Affine]) -> None:
        """Let `op`, which stays as it is, want these forms of what it reads."""
        for slot, affine in wanted.items():
            self._want(op, slot, affine)

    # ---- growing ----------------------------------------------------------------------

    def grow(self) -> "Walk":
        while self._forward or self._backward:
            ahead = bool(self._forward)
            op = heapq.heappop(self._forward if ahead else self._backward)[2]
            answers = self._ask_forward(op) if ahead else self._ask_backward(op)
            ways = [answer for answer in answers if not isinstance(answer, Stop)]
            if not ways:
                raise Stopped(*_reasons(answers))
            if len(ways) > 1:
                return self._try_each(op, ways, ahead)
            self._take(op, ways[0], ahead)
        return self

    def _try_each(self, op: Op, ways: Sequence[Answer], ahead: bool) -> "Walk":
        reasons: list[Reason] = []
        for way in ways:
            if self._ways[0] <= 0:
                break
            self._ways[0] -= 1
            fork = self._fork()
            try:
                fork._take(op, way, ahead)
                return fork.grow()
            except Stopped as stopped:
                reasons += stopped.reasons
        raise Stopped(*reasons)

    def _fork(self) -> "Walk":
        fork = Walk(self.around)
        fork.carried, fork.edits, fork.met = dict(self.carried), list(self.edits), dict(self.met)
        fork.wanted = {tensor: dict(by) for tensor, by in self.wanted.items()}
        fork._backward, fork._forward = list(self._backward), list(self._forward)
        fork._queued, fork._ways, fork.behind = set(self._queued), self._ways, self.behind
        return fork

    def _take(self, op: Op, answer: Answer, ahead: bool) -> None:
        if op in self.met and not isinstance(answer, Pass):
            raise Stopped(Reason("multiple_readers", f"the map reaches {op.name!r} on two ways", op.name))
        self.met[op] = None
        match answer:
            case Absorb(edits=edits):
                self.edits += edits
            case Pass(inputs=inputs, outputs=outputs, edits=edits):
                self.edits += edits
                for slot, affine in inputs.items():
                    self._want(op, slot, affine)
                for slot, affine in outputs.items():
                    self._supply(op, slot, affine)
            case Merge(inner=inner, slot=slot):
                self._splice(op, slot)
                if ahead:
                    self._supply(op, "y", inner.after(self._carried_at(op)[slot]))
                else:
                    (affine,) = self._wanted_of(op).values()
                    self._want(op, slot, affine.after(inner))

    def _splice(self, op: Op, slot: str) -> None:
        self.met[op] = None
        self.edits.append(Splice(op, slot))

    # ---- backward ---------------------------------------------------------------------

    def _want(self, op: Op, slot: str, affine: Affine) -> None:
        """`op` wants another form of what it reads at `slot`."""
        tensor = self.graph.input(op, slot)
        if tensor is None:
            raise Stopped(Reason("malformed", f"{op.name!r} has no input at {slot}", op.name))
        if affine.is_identity:
            return
        if tensor in self.carried:
            raise Stopped(Reason("multiple_readers", f"{tensor.name!r} is wanted in two forms", tensor.name))
        self.wanted.setdefault(tensor, {})[op, slot] = affine
        producer = self.graph.producer(tensor)
        if producer is None:
            message = f"{op.name!r} reads a model input or a constant"
            raise Stopped(Reason("no_producer", message, op.name))
        self._enqueue(producer, ahead=False)

    def _ask_backward(self, op: Op) -> tuple[Answer, ...]:
        observers = []
        for tensor in self.graph.outputs(op).values():
            if tensor in self.wanted:
                observers += self._agree(tensor)
        wanted = self._wanted_of(op)
        rule = self.around.rule(op)
        if op in self.behind:
            answers: tuple[Answer, ...] = (Absorb((self.behind[op],)),)
        elif op in self.around.untouchable:
            answers = (_not_chosen(op),)
        elif rule is None:
            answers = (_no_rule(op, "stands in front of it"),)
        else:
            ask = rule.backward_rounding if self.around.requantise else rule.backward
            answers = _evaluated(op, lambda: ask(self.around.constants, op, wanted))
        if observers:
            # a user who removes the other reader would meet the producer's reasons next
            behind = _reasons(answers) if all(isinstance(each, Stop) for each in answers) else ()
            raise Stopped(*observers, *behind)
        return answers

    def _wanted_of(self, op: Op) -> dict[str, Affine]:
        return {
            slot: self.carried[tensor].affine
            for slot, tensor in self.graph.outputs(op).items()
            if tensor in self.carried and not self.carried[tensor].ahead
        }

    def _agree(self, tensor: Tensor) -> list[Reason]:
        """Note the form in which a tensor is wanted; everyone who would see a change they did not ask for."""
        by = self.wanted[tensor]
        (first, _), *_ = by
        united = _united(list(by.values()))
        affine = next(iter(by.values())) if united is None else united
        self.carried[tensor] = Carry(affine, ahead=False)
        reasons = []
        producer = self.graph.producer(tensor)
        if producer is not None and producer.scope != first.scope:
            message = f"{tensor.name!r} is captured from outside the body of {first.name!r}"
            reasons.append(Reason("captured", message, tensor.name))
        for read in self.graph.readers(tensor):
            asked = by.get((read.op, read.slot))
            if not self._unharmed(read, affine if asked is None else _difference(affine, asked)):
                reasons.append(_observer(tensor, read))
        return reasons

    def _unharmed(self, read: Read, affine: Affine) -> bool:
        """Does this reader put out the same, whether it gets x or α(x)?"""
        if affine.is_identity or (read.op.kind, read.slot) in SHAPE_ONLY:
            return True
        rule = self.around.rules.get(read.op.kind)
        if rule is None or read.op.scope != self.graph.input(read.op, read.slot).scope:  # type: ignore[union-attr]
            return False
        if rule.ignores(self.around.constants, read.op, read.slot, affine):
            self.met[read.op] = None
            return True
        return False

    # ---- forward ----------------------------------------------------------------------

    def _supply(self, op: Op, slot: str, affine: Affine) -> None:
        """The readers of what `op` puts out at `slot` get another form of it."""
        tensor = self.graph.output(op, slot)
        if affine.is_identity:
            return
        if not affine.finite:
            raise Stopped(Reason("degenerate_stats", "a scale or shift is not finite", op.name))
        if tensor in self.carried or tensor in self.wanted:
            raise Stopped(Reason("multiple_readers", f"{tensor.name!r} is wanted in two forms", tensor.name))
        self.carried[tensor] = Carry(affine, ahead=True)
        readers = self.graph.readers(tensor)
        foreign = [_observer(tensor, read) for read in readers if _is_foreign(tensor, read)]
        if foreign:
            raise Stopped(*foreign)
        for read in readers:
            if (read.op.kind, read.slot) not in SHAPE_ONLY:
                self._enqueue(read.op, ahead=True)

    def _ask_forward(self, op: Op) -> tuple[Answer, ...]:
        rule = self.around.rule(op)
        if op in self.around.untouchable:
            return (_not_chosen(op),)
        if rule is None:
            return (_no_rule(op, "reads it"),)
        carried = self._carried_at(op)
        answers = _evaluated(op, lambda: rule.forward(self.around.constants, op, carried))
        if self.around.border_maps and {reason.code for reason in _reasons(answers)} == {"padded_shift"}:
            return _evaluated(op, lambda: rule.forward_with_map(self.around.constants, op, carried))
        return answers

    def _carried_at(self, op: Op) -> dict[str, Affine]:
        return {
            slot: self.carried[tensor].affine
            for slot, tensor in self.graph.inputs(op).items()
            if tensor in self.carried and self.carried[tensor].ahead
        }

    # ---- order ------------------------------------------------------------------------

    def _enqueue(self, op: Op, ahead: bool) -> None:
        if (op, ahead) in self._queued:
            return
        self._queued.add((op, ahead))
        place = self.around.order.get(op, 0.0)
        entry = (place if ahead else -place, len(self._queued), op)
        heapq.heappush(self._forward if ahead else self._backward, entry)


def _evaluated(op: Op, ask: Any) -> tuple[Answer, ...]:
    """A rule's answers; attributes and operands that contradict each other stop the map."""
    unknown = [name for name, value in op.attributes.items() if value is None]
    if unknown:
        message = f"attribute {unknown[0]!r} is set by the caller of its function"
        return (stop("dynamic_weight", op, message),)
    try:
        answers: Answers = ask()
    except (ArithmeticError, LookupError, TypeError, ValueError, MemoryError) as error:
        message = f"it cannot be evaluated: {(str(error).splitlines() or [''])[0]}"
        return (stop("malformed", op, message),)
    return answers if isinstance(answers, tuple) else (answers,)


def _not_chosen(op: Op) -> Stop:
    return stop("not_selected", op, f"{op.name!r} is not among the norms that were chosen")


def _no_rule(op: Op, where: str) -> Stop:
    code = "nonlinear" if op.kind in NONLINEAR else "unsupported_op"
    return stop(code, op, f"{op.spelling} {where}")


def _reasons(answers: tuple[Answer, ...]) -> tuple[Reason, ...]:
    return tuple(reason for answer in answers if isinstance(answer, Stop) for reason in answer.reasons)


def _is_foreign(tensor: Tensor, read: Read) -> bool:
    """A reader that is no op of the tensor's own graph: an output of it, or a body."""
    return read.op.kind == GRAPH_OUTPUT or read.op.scope != tensor.scope


def _observer(tensor: Tensor, read: Read) -> Reason:
    if read.op.kind == GRAPH_OUTPUT or ("." in read.slot and read.op.scope != tensor.scope):
        return Reason("graph_output", f"{tensor.name!r} is a graph output", tensor.name)
    if read.op.scope != tensor.scope:
        return Reason("captured", f"{tensor.name!r} is captured by {read.op.name!r}", tensor.name)
    return Reason("multiple_readers", f"{tensor.name!r} is also read by {read.op.name!r}", tensor.name)


def _united(maps: list[Affine]) -> Affine | None:
    """One map that gives every reader what it wants, where each leaves alone what is not its own."""
    whole = maps[0]
    for other in maps[1:]:
        if whole.same_as(other):
            continue
        if whole.axis != other.axis or whole.shape != other.shape:
            return None
        free, silent = _untouched(whole), _untouched(other)
        clash = ~free & ~silent & ((whole.s != other.s) | (whole.t != other.t))
        if clash.any():
            return None
        whole = Affine(whole.axis, np.where(free, other.s, whole.s), np.where(free, other.t, whole.t))
    return whole


def _untouched(affine: Affine) -> Array:
    return np.asarray((affine.s == 1) & (affine.t == 0))


def _difference(whole: Affine, asked: Affine) -> Affine:
    """What a reader gets beside what it asked for."""
    if whole.same_as(asked):
        return Affine(0, np.ones(1), np.zeros(1))
    if whole.axis != asked.axis or whole.shape != asked.shape:
        return whole
    same = (whole.s == asked.s) & (whole.t == asked.t)
    return Affine(whole.axis, np.where(same, 1, whole.s), np.where(same, 0, whole.t))


def _to_add(around: Surroundings, op: Op, merge: Merge, shift: Array) -> Replace:
    """`op` as the Add of a shift, which has the shape of the map's own."""
    graph, affine = around.graph, merge.inner
    rank = graph.rank(graph.output(op))
    if rank is None:
        raise Stopped(Reason("axis_unknown", f"the rank of the data at {op.name!r} is unknown", op.name))
    data = graph.input(op, merge.slot)
    dtype = (data.dtype if data is not None else None) or _dtype_beside(graph, op)
    trailing = rank - affine.axis - affine.s.ndim
    constant = Rounded(shift.reshape(*affine.shape, *[1] * trailing), dtype)
    rebind = Rebind(op, "b", constant, f"{op.name}.bias")
    return Replace(op, "add", {"a": merge.slot}, constants={"b": rebind})


def _dtype_beside(graph: ModelGraph, op: Op) -> np.dtype[Any]:
    known = [t.dtype for t in graph.inputs(op).values() if t.dtype is not None]
    return known[0] if known else np.dtype(np.float32)
