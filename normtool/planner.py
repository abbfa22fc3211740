"""The plan: one site per norm, each with a verdict, its reasons, and the fold it takes part in.

A norm's map may go backward, into what made its input, or forward, into what reads its output (`walk`). A fold
is made only when every path ends well, and stays only when its proof holds. Folds are carried out on a draft
of the graph one after the other, so that each sees what the last has left.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from normtool import norm_affine
from normtool.affine import Affine
from normtool.constants import Constants
from normtool.detect import find_norms
from normtool.draft import Draft
from normtool.edits import Copy, Edit, Graft, Insert, Rebind, Replace, Splice, consolidated
from normtool.graph import ModelGraph, Op, Tensor
from normtool.merging import Merged, Merger
from normtool.norms import NORMS, Norm
from normtool.options import FoldOptions
from normtool.probes import settle_region, tap_shape
from normtool.proof import Proof, Region, Step, form_of, prove, region_of, steps_of
from normtool.reasons import FOLDED, KEPT, LOWERED, Reason
from normtool.rules import all_rules
from normtool.rules.batch_norm import inference_affine
from normtool.rules.elementwise import channel_axis, constant_map
from normtool.rules.joining import channels_of_parts
from normtool.rules.lowering import lowering_edits
from normtool.travel import Absorb, Merge, Operands, Pass, Stop
from normtool.values import EXTENDED, Dense, byte_count
from normtool.walk import Stopped, Surroundings, Walk

#: Below this the operators themselves meant something else (broadcast attributes, training by default).
OLDEST_OPSET = 7

#: Ops that are affine maps themselves when one operand is constant.
ELEMENTWISE = frozenset(["add", "sub", "mul", "div"])

#: Ops that a sum of branches may end with.
MERGED_AT = frozenset(["add", "sub", "sum", "mul", "batch_norm"])

#: What a fold does unless it is told otherwise.
DEFAULT = FoldOptions()

#: A map like any other.
_STAND_IN = Affine(1, np.full(1, 2, EXTENDED), np.ones(1, EXTENDED))

#: Kind of a site that is no norm: a constant Mul, Add, Sub or Div per channel.
AFFINE = "affine"


@dataclass(frozen=True, eq=False)
class Fold:
    """One map that leaves its place: the ops that are taken out or changed for it, and by which edits.

    `path` holds the ops in dataflow order; those in `gone` are taken out. `steps` say what the proof has to
    show.
    """

    path: tuple[Op, ...]
    gone: tuple[Op, ...]
    edits: tuple[Edit, ...]
    steps: tuple[Step | Region, ...]
    proof: Proof | None = None
    #: what a copied op stores a second time
    added_bytes: int = 0
    #: what else the report says of it
    about: Mapping[str, Any] = field(default_factory=dict)
    #: of a norm that stays: which of its `weight` and `bias` went forward, and the ops that had them
    moved: tuple[str, ...] = ()
    moved_from: tuple[Op, ...] = ()

    @property
    def into(self) -> tuple[str, ...]:
        changed = [edit.op.name for edit in self.edits if not isinstance(edit, Splice) and hasattr(edit, "op")]
        apart = {op.name for op in (*self.gone, *self.moved_from)}
        return tuple(dict.fromkeys(name for name in changed if name not in apart))


@dataclass(frozen=True, eq=False)
class Site:
    """What becomes of one norm, and why."""

    norm: Norm
    verdict: str
    reasons: tuple[Reason, ...] = ()
    fold: Fold | None = None

    def to_dict(self) -> dict[str, Any]:
        site: dict[str, Any] = {
            "name": self.norm.name,
            "kind": self.norm.kind,
            "verdict": self.verdict,
            "into": list(self.fold.into) if self.fold else [],
            "reasons": [reason.to_dict() for reason in self.reasons],
            "proof": self.fold.proof.to_dict() if self.fold and self.fold.proof else None,
        }
        if self.fold is not None and self.fold.moved:
            site["moved"] = list(self.fold.moved)
        if self.fold is not None:
            site |= self.fold.about
        if self.fold is not None and self.fold.added_bytes:
            site["added"] = {"ops": 1, "bytes": self.fold.added_bytes}
        return site


@dataclass(frozen=True, eq=False)
class Plan:
    """A value: printable, serialisable. `fingerprint` names the model state it was made for."""

    sites: tuple[Site, ...]
    folds: tuple[Fold, ...]
    fingerprint: str
    freeze: bool = False
    #: what made it: "fold" or "swap"
    verb: str = "fold"

    @property
    def edits(self) -> tuple[Edit, ...]:
        return consolidated(edit for fold in self.folds for edit in fold.edits)

    def to_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "sites": [site.to_dict() for site in self.sites]}

    def __str__(self) -> str:
        from normtool.report.table import to_text

        return to_text(self)


#: Called with (norms done, norms in all) while planning goes on.
Progress = Callable[[int, int], None]

#: One way to fold a norm: a walk to be followed, or the whole fold. Raises Stopped.
Attempt = Callable[[], "Walk | Fold"]

#: The ops of a fold in dataflow order.
Path = tuple[Op, ...]

#: What a fold leaves where ops were or beside them: (class of the edit, kind of the op).
Outline = tuple[tuple[str, str], ...]

#: The same for every plan of one graph, whose edits make ops of their own: what each op of the path stands for,
#: and its kind; and what is left there, since one path may be folded in several ways.
Key = tuple[tuple[tuple[Op, str], ...], Outline]

#: Looks at all folds together and objects to those that a format cannot carry out: path → reasons.
Review = Callable[[Sequence[Fold]], Mapping[Path, tuple[Reason, ...]]]


def plan_fold(
    graph: ModelGraph,
    fingerprint: str = "",
    options: FoldOptions = DEFAULT,
    progress: Progress = lambda done, total: None,
    review: Review = lambda folds: {},
) -> Plan:
    """Decide for every norm of `graph` whether it is folded, and prove each fold.

    A model file takes any edit. A PyTorch module does not: its code calls what it calls. `review` says which
    folds cannot be carried out there. They are taken back, as are those whose proof fails; that may cost others
    their reason to be, or open another way, so the plan is made again until nothing speaks against it.
    """
    with _collecting_rarely():
        return _plan_until_settled(graph, fingerprint, options, progress, review)


@contextmanager
def _collecting_rarely() -> Iterator[None]:
    """A plan is many small values that live as long as it does; to look for cycles among them costs a third
    more."""
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], 200_000), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _plan_until_settled(
    graph: ModelGraph, fingerprint: str, options: FoldOptions, progress: Progress, review: Review
) -> Plan:
    forbidden: dict[Key, tuple[Reason, ...]] = {}
    proofs: dict[Any, Proof] = {}
    while True:
        planner = Planner(graph, options, forbidden)
        made = planner.plan(fingerprint, progress)
        against = {path: why for path, why in review(made.folds).items() if planner.key(path) not in forbidden}
        if not against:
            made = _proved(made, proofs)
            against = {
                fold.path: fold.proof.failures for fold in made.folds if fold.proof and fold.proof.failures
            }
        if not against:
            return made
        forbidden.update((planner.key(path), why) for path, why in against.items())


def _proved(made: Plan, proofs: dict[Any, Proof]) -> Plan:
    """The plan with a proof of every fold; what was shown before is not shown again."""
    shown: dict[Fold, Fold] = {}
    before: dict[Any, tuple[Path, ...]] = {}
    for fold in made.folds:
        # the same fold, after the same folds of the same ops, is the same
        key = (fold.path, outline(fold.edits), tuple(before.get(op, ()) for op in fold.path))
        if key not in proofs:
            proofs[key] = prove(fold.steps, fold.edits)
        shown[fold] = replace(fold, proof=proofs[key])
        for op in fold.path:
            before[op] = (*before.get(op, ()), fold.path)
    sites = tuple(replace(site, fold=shown[site.fold]) if site.fold else site for site in made.sites)
    return replace(made, sites=sites, folds=tuple(shown.values()))


def outline(edits: Iterable[Edit]) -> Outline:
    """What edits leave: a Conv takes a shift in as a constant of every position, or an Add stays behind it."""
    left = (edit for edit in edits if not isinstance(edit, Rebind | Splice))
    return tuple((type(edit).__name__, getattr(edit, "kind", "")) for edit in left)


class Planner:
    """One pass over all norms."""

    def __init__(
        self,
        graph: ModelGraph,
        options: FoldOptions,
        forbidden: Mapping[Key, tuple[Reason, ...]],
    ) -> None:
        self.original = graph
        self.options = options
        self.forbidden = forbidden
        self.graph = Draft(graph)
        self.constants = Constants(self.graph, options.freeze)
        self.order: dict[Op, float] = {op: float(i) for i, op in enumerate(graph.sorted_ops())}
        self.around = Surroundings(
            self.constants,
            all_rules(),
            self.order,
            border_maps=options.border_maps,
            requantise=options.requantise,
        )
        #: norms that did not go, but have become other ops
        self.lowered: set[Op] = set()
        self.folds: list[Fold] = []
        #: ops that a BatchNorm went into
        self.took_in: set[Op] = set()
        #: op that is gone → the fold that took it
        self.folded: dict[Op, Fold] = {}
        #: norm of which a smaller one stays → that, and why
        self.shrunk: dict[Op, tuple[Insert, tuple[Reason, ...]]] = {}
        #: op → why the sum of branches that it is part of stays
        self.unmerged: dict[Op, tuple[Reason, ...]] = {}
        #: path of a fold → what it took from a norm that stays; tried last, if several were
        self.moved: dict[Path, tuple[str, ...]] = {}
        #: norm that stays → the fold that took its γ and β along
        self.stripped: dict[Norm, Fold] = {}

    def plan(self, fingerprint: str, progress: Progress) -> Plan:
        norms = find_norms(self.original, Constants(self.original, self.options.freeze))
        self.options.check(norm.name for norm in norms)
        # last first: of BatchNorm → BatchNorm the second takes the first along
        order = sorted(norms, key=lambda n: -self.order[n.op] if n.op else 0)
        reasons: dict[Norm, dict[Reason, None]] = {norm: dict.fromkeys(self._obstacles(norm)) for norm in norms}
        self.around.untouchable.update(
            norm.op for norm in norms if norm.op and not self.options.chooses(norm.name)
        )
        left = [norm for norm in order if not reasons[norm]]
        done, chains, stage = len(norms) - len(left), [], 0
        # what goes backward leaves nothing behind; then branches merge, which takes what could only go halfway
        stages = (
            *(self._backward_ways, self._forward_ways, self._shift_ways),
            *(self._partial_ways, self._costly_ways),
        )
        while stage < len(stages):
            made = len(self.folds)
            if stage == 1:
                self._merge_branches()
            for norm in left:
                reasons[norm] = (reasons[norm] if stage else {}) | self._try(norm, stages[stage])
                progress(done := min(done + 1, len(norms)), len(norms))
            if stage == 1:
                chains += self._fold_chains(norms)
            left = [norm for norm in left if norm.op not in self.folded]
            # what one fold has taken away may have stood in another's way
            stage = 0 if stage and len(self.folds) > made else stage + 1
        if self.options.affine:
            reasons |= self._strip_norms([norm for norm in order if norm.kind != "batch_norm"])
        sites = [self._site(norm, tuple(reasons[norm])) for norm in norms]
        return Plan((*sites, *chains), tuple(self.folds), fingerprint, self.options.freeze)

    # ---- sites ------------------------------------------------------------------------

    def _site(self, norm: Norm, reasons: tuple[Reason, ...]) -> Site:
        fold = self.folded.get(norm.op) if norm.op is not None else None
        fold = self.stripped.get(norm, fold)
        if fold is None:
            unmerged = self.unmerged.get(norm.op, ()) if norm.op is not None else ()
            return Site(norm, KEPT, tuple(dict.fromkeys((*unmerged, *reasons))))
        if norm.op in self.shrunk:
            smaller, why = self.shrunk[norm.op]
            if self.graph.current(self.graph.put_in[smaller]) is not None:  # no other fold took it along
                return Site(norm, KEPT, why, fold)
        if norm.op in self.lowered or norm in self.stripped:
            return Site(norm, LOWERED if norm.op in self.lowered else FOLDED, reasons, fold)
        return Site(norm, FOLDED, fold=fold)

    def _obstacles(self, norm: Norm) -> tuple[Reason, ...]:
        """Why a norm cannot even be looked at."""
        if norm.op is None or norm.kind != "batch_norm":
            return (self._unfoldable(norm),)
        if "y" not in self.graph.outputs(norm.op):
            return (Reason("malformed", "it has no output", norm.name),)
        if not self.options.chooses(norm.name):
            return (_not_selected(norm),)
        if norm.op.domain == "" and norm.op.version < OLDEST_OPSET:
            message = f"opset {norm.op.version} is older than {OLDEST_OPSET}"
            return (Reason("unsupported_op", message, norm.name),)
        return ()

    def _try(self, norm: Norm, ways: Callable[[Op], Iterator[Attempt]]) -> dict[Reason, None]:
        """Fold one norm the first way that works; else everything that speaks against it."""
        op = norm.op
        assert op is not None
        reasons: dict[Reason, None] = {}
        if op in self.folded:
            return reasons
        for attempt in ways(op):
            try:
                made = attempt()
                if isinstance(made, Walk):
                    self._fold(made.grow())
            except Stopped as stopped:
                reasons |= dict.fromkeys(stopped.reasons)
                continue
            if op in self.folded:  # not only the Mul by 1 behind it
                return {}
        return reasons

    def _unfoldable(self, norm: Norm) -> Reason:
        """Why a norm that is no BatchNorm op cannot even be looked at."""
        if norm.op is not None and norm.op.attributes.get("use_input_stats") is False:
            message = "an InstanceNorm with stored statistics is affine, but no rule folds it yet"
            return Reason("unsupported_op", message, norm.name)
        if norm.kind != "batch_norm":
            message = "its statistics are computed from the input at run time"
            return Reason("data_dependent", message, norm.name)
        if self.graph.no_dataflow:
            return Reason("no_dataflow", self.graph.no_dataflow, norm.name)
        if norm.calls == 0:
            return Reason("not_called", "the model never calls it", norm.name)
        return Reason("unsupported_op", f"{norm.spelling} is spelled out in primitive ops", norm.name)

    # ---- ways to fold one norm --------------------------------------------------------

    def _backward_ways(self, op: Op) -> Iterator[Attempt]:
        for last in self._chain_ends(op):
            yield lambda last=last: self._backward(last)  # type: ignore[misc]

    def _forward_ways(self, op: Op) -> Iterator[Attempt]:
        yield lambda: self._forward(op)

    def _shift_ways(self, op: Op) -> Iterator[Attempt]:
        """The scale alone, and an Add stays; unless the one before it has made way for both."""
        yield from self._backward_ways(op)
        yield lambda: self._forward(op)
        yield lambda: self._leaving_shift(op, ahead=False)
        yield lambda: self._leaving_shift(op, ahead=True)

    def _partial_ways(self, op: Op) -> Iterator[Attempt]:
        """Behind a Concat: all parts but one take their share in, and a smaller norm stays on that one."""
        entered = self.graph.input(op, "x")
        concat = self.graph.producer(entered) if entered is not None else None
        if concat is not None and concat.kind == "concat":
            yield lambda: self._leaving_part(op, concat)

    def _costly_ways(self, op: Op) -> Iterator[Attempt]:
        """What the user has to ask for: more work for fewer norms, or other ops in their place."""
        if self.options.duplicate:
            yield lambda: self._duplicate(op)
        if self.options.lower is not None:
            yield from self._lowerings(op, self.options.lower)

    def _lowerings(self, op: Op, how: str) -> Iterator[Attempt]:
        if how == "relu":
            self.around.lower = True
            for ahead in (False, True):
                yield lambda ahead=ahead: self._lowered(op, self._leaving_shift(op, ahead).grow())  # type: ignore[misc]
            return
        yield lambda: self._lowered(op, self._as_other_ops(op, how))

    def _lowered(self, op: Op, walk: Walk) -> Fold:
        fold = self._fold(walk)
        self.lowered.add(op)
        return fold

    def _as_other_ops(self, op: Op, how: str) -> Walk:
        walk = Walk(self.around)
        walk.met[op] = None
        walk.edits += lowering_edits(self.constants, op, self._own_map(op), how)
        return walk

    def _duplicate(self, op: Op) -> Fold:
        """Copy the op in front, which others read too, and let the copy take the norm in."""
        merge = self._own_map(op)
        tensor = self.graph.input(op, merge.slot)
        maker = self.graph.producer(tensor) if tensor is not None else None
        rule = self.around.rule(maker) if maker is not None else None
        if tensor is None or maker is None or rule is None or maker.scope != op.scope:
            raise Stopped()
        wanted = {"y": merge.inner}
        answer = rule.backward(self.constants, maker, wanted)
        if not isinstance(answer, Absorb):
            raise Stopped()
        path, copy = (maker, op), Copy(maker, op, merge.slot)
        self._check_allowed(path, (copy, *answer.edits))
        before = region_of(self.graph, self.constants, path)
        source = next(iter(before[0][0].data.values()))
        self.carry_out([copy])
        twin = self.graph.put_in[copy]
        absorbed = rule.backward(self.constants, twin, wanted)
        assert isinstance(absorbed, Absorb)
        edits = (*absorbed.edits, Splice(op, merge.slot))
        self.carry_out(edits)
        after = form_of(self.graph, self.constants, twin)
        region = Region(twin, before, source, after, settle_region(before[0][0], self.graph))
        weights = [edit.value for edit in absorbed.edits if isinstance(edit, Rebind)]
        fold = Fold(path, (op,), (copy, *edits), (region,), added_bytes=sum(map(byte_count, weights)))
        self._note(fold)
        return fold

    def _backward(self, last: Op) -> Walk:
        try:
            merge = self._own_map(last)
        except Stopped as stopped:
            raise Stopped(*stopped.reasons, *self._reasons_behind(last)) from None
        walk = Walk(self.around)
        walk.start_backward(last, merge)
        for twin in self._twins(last, merge):
            walk.start_backward(twin, merge)
        return walk

    def _reasons_behind(self, op: Op) -> tuple[Reason, ...]:
        """If a norm is itself no affine map: what would stop one, which its user would meet next."""
        walk = Walk(self.around)
        try:
            if op.kind == "batch_norm":
                walk.start_backward(op, Merge(_STAND_IN, "x"))
                walk.grow()
        except Stopped as stopped:
            return stopped.reasons
        return ()

    def take_back(self, op: Op) -> Fold:
        """Take a constant scale or shift into what makes its input. Raises Stopped."""
        return self._fold(self._backward(op).grow())

    def _forward(self, op: Op) -> Walk:
        walk = Walk(self.around)
        walk.start_forward(op, self._own_map(op))
        return walk

    def _leaving_shift(self, op: Op, ahead: bool) -> Walk:
        merge = self._own_map(op)
        if not merge.inner.has_scale:
            raise Stopped()  # it is a shift already
        if ahead and np.any(merge.inner.s == 0):
            message = "a channel's scale is 0, so its shift cannot go first"
            raise Stopped(Reason("degenerate_stats", message, op.name))
        walk = Walk(self.around)
        walk.leave_shift(op, merge, ahead)
        return walk

    def _leaving_part(self, op: Op, concat: Op) -> Fold:
        """With two parts that stay there would be more norms than before, so there it stays whole."""
        merge, places = self._own_map(op), channels_of_parts(self.constants, concat, 1)
        rule = self.around.rule(concat)
        answer = rule.backward(self.constants, concat, {"y": merge.inner}) if rule is not None else None
        if not isinstance(answer, Pass) or places is None or len(answer.inputs) < 2:
            raise Stopped()
        stays: dict[str, tuple[Reason, ...]] = {}
        for slot, affine in answer.inputs.items():
            alone = Walk(self.around)
            try:
                alone.start_at(concat, {slot: affine})
                alone.grow()
            except Stopped as stopped:
                stays[slot] = stopped.reasons
            if len(stays) > 1:
                break
        if len(stays) != 1:
            raise Stopped(*(reason for reasons in stays.values() for reason in reasons))
        ((slot, reasons),) = stays.items()
        tensor = self.graph.input(concat, slot)
        maker = self.graph.producer(tensor) if tensor is not None else None
        if tensor is None or maker is None or answer.inputs[slot].s.size != len(places[slot]):
            raise Stopped()
        smaller = self._smaller(op, tensor, maker, places[slot])
        walk = Walk(self.around)
        walk.behind[maker] = smaller
        walk.start_backward(op, merge)
        fold = self._fold(walk.grow())
        own, whole = len(places[slot]), sum(map(len, places.values()))
        message = f"{own} of its {whole} channels, {tensor.name!r}, keep a norm of their own"
        self.shrunk[op] = smaller, (Reason("partly_folded", message, tensor.name), *reasons)
        return fold

    def _smaller(self, op: Op, tensor: Tensor, maker: Op, channels: range) -> Insert:
        """The same BatchNorm behind `tensor`, with its channels of γ, β, μ and σ²."""
        found = {slot: Operands(self.constants, op).value(slot) for slot in ("weight", "bias", "mean", "var")}
        stem = tensor.name
        constants = {
            slot: Rebind(op, slot, Dense(value.rows(channels.start, channels.stop)), f"{stem}.{slot}")
            for slot, value in found.items()
            if value is not None
        }
        epsilon = self.constants.attribute(op, "epsilon")
        return Insert(tensor, maker, "batch_norm", "x", constants, {"epsilon": epsilon})

    def _own_map(self, op: Op) -> Merge:
        """The affine map that an op is. Raises Stopped with what stands against it."""
        unknown = [name for name, value in op.attributes.items() if value is None]
        if unknown:
            message = f"attribute {unknown[0]!r} is set by the caller of its function"
            raise Stopped(Reason("dynamic_weight", message, op.name))
        found: Merge | Stop
        if op.kind == "batch_norm":
            inner = inference_affine(self.constants, op)
            found = inner if isinstance(inner, Stop) else Merge(inner, "x")
        elif op.kind in ELEMENTWISE:
            axis = channel_axis(self.constants, op)
            found = constant_map(self.constants, op, 1 if axis is None else axis)
        else:
            message = f"{op.spelling} is no affine map that is known here"
            found = Stop((Reason("unsupported_op", message, op.name),))
        if isinstance(found, Stop):
            raise Stopped(*found.reasons)
        return found

    def _twins(self, op: Op, merge: Merge) -> list[Op]:
        """Other ops that apply the very same map to the same tensor: they go together."""
        tensor = self.graph.input(op, merge.slot)
        twins = []
        for read in self.graph.readers(tensor) if tensor is not None else ():
            if read.op is op or read.op.kind != op.kind or read.slot != merge.slot or op.kind not in NORMS:
                continue
            if read.op.scope == op.scope and self._same_map(read.op, merge):
                twins.append(read.op)
        return twins

    def _same_map(self, op: Op, merge: Merge) -> bool:
        try:
            return self._own_map(op).inner.same_as(merge.inner)
        except Stopped:
            return False

    def _chain_ends(self, op: Op) -> Iterator[Op]:
        """The last of the constant Mul/Add ops that follow, then the norm itself."""
        last = op
        while (follower := self._constant_follower(last)) is not None:
            last = follower
        if last is not op:
            yield last
        yield op

    def _constant_follower(self, op: Op) -> Op | None:
        """The only reader of `op`, if it is a constant affine op on the channel axis."""
        readers = self.graph.readers(self.graph.output(op))
        if len(readers) != 1:
            return None
        follower = readers[0].op
        if follower.kind not in ELEMENTWISE or follower.scope != op.scope:
            return None
        answer = constant_map(self.constants, follower, axis=1)
        return follower if isinstance(answer, Merge) and answer.slot == readers[0].slot else None

    # ---- what is no norm by itself ----------------------------------------------------

    def _merge_branches(self) -> None:
        """Sums of convolutions of one tensor become one, from the last op of each sum on."""
        merger = Merger(self.constants, self._as_affine, lambda op: op in self.took_in)
        roots = [op for op in self.graph.living() if op.kind in MERGED_AT and op not in self.around.untouchable]
        for op in sorted(roots, key=self._place, reverse=True):
            if self.graph.current(op) is not op:
                continue
            merged = merger.merge(op)
            if merged is not None and not any(each in self.around.untouchable for each in merged.ops):
                self._commit_merge(merged)

    def _commit_merge(self, merged: Merged) -> None:
        path = tuple(sorted(merged.ops, key=self._place))
        key = self.key(path, merged.edits)
        if key in self.forbidden:
            self.unmerged.update(dict.fromkeys(path, self.forbidden[key]))
            return
        before = region_of(self.graph, self.constants, path)
        source = merged.source
        self.carry_out(merged.edits)
        after = form_of(self.graph, self.constants, merged.anchor)
        region = Region(merged.anchor, before, source, after, tap_shape(after))
        gone = tuple(op for op in path if self.graph.current(op) is None)
        self._note(Fold(path, gone, merged.edits, (region,)))

    def _as_affine(self, op: Op) -> Merge | None:
        try:
            return self._own_map(op) if op.kind == "batch_norm" or op.kind in ELEMENTWISE else None
        except Stopped:
            return None

    def _fold_chains(self, norms: Sequence[Norm]) -> list[Site]:
        """Mul, Add, Sub and Div by one constant per channel: a layer scale, a frozen BatchNorm spelled out."""
        own = {norm.op for norm in norms}
        sites = []
        maps = [op for op in self.graph.living() if op.kind in ELEMENTWISE and op not in own]
        for op in sorted(maps, key=self._place, reverse=True):
            if self.graph.current(op) is not op:
                continue
            if channel_axis(self.constants, op) is None:
                continue
            try:
                fold = self.take_back(op)
            except Stopped:
                continue
            if op not in self.graph.made:  # what a norm has left behind is no site of its own
                sites.append(Site(_as_norm(op), FOLDED, fold=fold))
        return sites

    # ---- norms that stay --------------------------------------------------------------

    def _strip_norms(self, norms: Sequence[Norm]) -> dict[Norm, dict[Reason, None]]:
        """Take γ and β of norms that stay to what reads them; why some or all of that stays too."""
        found: dict[Norm, dict[Reason, None]] = {}
        constants = Constants(self.original, self.options.freeze)
        for norm in norms:
            tail = norm_affine.tail_of(constants, norm)
            if tail is None or any(self.graph.current(op) is not op for op in tail.ops):
                continue
            if not self.options.chooses(norm.name):
                found[norm] = dict.fromkeys((_not_selected(norm),))
                continue
            try:
                self.stripped[norm], reasons = self.strip_affine(tail)
            except Stopped as stopped:
                reasons = stopped.reasons
            if reasons:
                found[norm] = dict.fromkeys(reasons)
            elif norm in self.stripped:
                found[norm] = {}
        return found

    def strip_affine(
        self, tail: norm_affine.Tail, wanted: Sequence[norm_affine.Parts] = norm_affine.WAYS
    ) -> tuple[Fold, tuple[Reason, ...]]:
        """Take γ and β of a norm to what reads it, in the first of the ways `wanted` that ends well.

        Returns the fold, and why the ways before it failed. Raises Stopped with every reason; with none where
        there is no γ and no β that does anything.
        """
        reasons: dict[Reason, None] = {}
        for parts in norm_affine.ways(self.around, tail, wanted):
            try:
                walk = norm_affine.stripped(self.around, tail, parts)
                return self._fold(walk, parts, tail.ops), tuple(reasons)
            except Stopped as stopped:
                reasons |= dict.fromkeys(stopped.reasons)
        raise Stopped(*reasons)

    # ---- committing -------------------------------------------------------------------

    def _fold(self, walk: Walk, moved: tuple[str, ...] = (), moved_from: tuple[Op, ...] = ()) -> Fold:
        """Carry the walk's edits out on the draft. Raises Stopped if this fold was taken back before."""
        met = sorted(walk.met, key=lambda op: self.order.get(op, 0.0))
        path = tuple(met)
        self.moved[path] = moved
        self._check_allowed(path, walk.edits)
        before = steps_of(self.graph, self.constants, walk.carried, walk.met)
        gone = tuple(edit.op for edit in walk.edits if isinstance(edit, Splice))
        self.carry_out(walk.edits)
        steps = before.after(self.graph, self.constants, walk.edits)
        fold = Fold(path, gone, tuple(walk.edits), steps, moved=moved, moved_from=moved_from)
        self._note(fold)
        return fold

    def carry_out(self, edits: Sequence[Edit]) -> None:
        for edit in edits:
            self.graph.carry_out(edit)
            match edit:
                case Replace(op=op):
                    heir = self.graph.current(op)
                    assert heir is not None
                    self.order[heir] = self._place(op)
                case Insert(behind=op) | Copy(op=op):
                    self.order[self.graph.put_in[edit]] = self._place(op) + 0.5
                case Graft(tensor=tensor):
                    behind = self.graph.producer(tensor)
                    place = self._place(behind) if behind is not None else -1.0
                    place += (1 - place % 1) / 2  # grafts on grafts stay ahead of the next op
                    self.order |= dict.fromkeys(self.graph.grafted[edit], place)

    def _note(self, fold: Fold) -> None:
        self.folds.append(fold)
        self.folded.update(dict.fromkeys(fold.gone, fold))
        self.folded.update({edit.op: fold for edit in fold.edits if isinstance(edit, Replace)})
        if any(op.kind == "batch_norm" for op in fold.gone):
            self.took_in.update(edit.op for edit in fold.edits if isinstance(edit, Rebind))

    def key(self, path: Path, edits: Sequence[Edit] | None = None) -> Key:
        """`edits` may be left out of a fold that was made."""
        if edits is None:
            edits = next((fold.edits for fold in reversed(self.folds) if fold.path == path), ())
        ops = tuple((self.graph.origin(op), op.kind) for op in path)
        parts = ((self.graph.origin(path[0]), part) for part in self.moved.get(path, ()))
        return (*ops, *parts), outline(edits)

    def _check_allowed(self, path: Path, edits: Sequence[Edit]) -> None:
        """Raises Stopped if this fold was taken back before."""
        reasons = self.forbidden.get(self.key(path, edits))
        if reasons is not None:
            raise Stopped(*reasons)

    def _place(self, op: Op) -> float:
        return self.order.get(op, 0.0)


def _not_selected(norm: Norm) -> Reason:
    return Reason("not_selected", "it is not among the norms that were chosen", norm.name)


def _as_norm(op: Op) -> Norm:
    """A constant affine op as the report names it."""
    return Norm(op.name, AFFINE, op.spelling, "pattern", None, None, (), (), op=op)
