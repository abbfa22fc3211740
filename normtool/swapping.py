"""The plan of `swap`: which LayerNorms become RMSNorms, what takes their Centres in, and the proof of each.

    LN_{γ,β,ε}(x) = γ · RMS_ε(P·x) + β        P = I − (1/d)·11ᵀ

with the same ε: P·x has no mean, so its biased variance is its second moment. `centring.facts` finds out whose
constants can take P in. Every change is a `Fold` of its own, so that a format can object to one, and the plan
is made again without it:

1. constant scales that stand between a sum and its writers (LayerScale) go into the writers;
2. a LayerNorm of nothing but rows of a table goes into the table;
3. γ and β of norms that will be swapped go forward into what reads them;
4. writers take the Centre in, Centre ops are put where the cut says, norms become RMSNorms;
5. in mode `approximate`, those norms too that nothing centres (`drops`; `approximate` says at which cost). What
   is proved of them is that they compute the same where there is no mean.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from normtool.centring import targets
from normtool.centring.facts import Centre, Centring, Fact, Facts, Solution, Writer
from normtool.centring.places import Place, whole
from normtool.centring.proof import CentreStep, NormStep, OpStep, Relation, Step, TableStep, prove
from normtool.centring.steps import Before
from normtool.centring.tables import looked_up, normalising
from normtool.centring.values import Centred, RowWise, zeros_like
from normtool.constants import Constants
from normtool.detect import find_norms
from normtool.edits import Edit, Graft, Part, Rebind, Splice
from normtool.forms import NormForm, norm_forms
from normtool.graph import ModelGraph, Op, Tensor
from normtool.norm_affine import WITHOUT_BIAS, Tail
from normtool.norms import Norm
from normtool.ops import ATEN, f32
from normtool.options import FoldOptions, SwapOptions
from normtool.planner import Fold, Path, Plan, Planner, Progress, Review, Site
from normtool.proof import prove as prove_fold
from normtool.proof import region_of
from normtool.reasons import APPROXIMATED, FOLDED, KEPT, SWAPPED, Reason
from normtool.values import Array, Rounded, Value, byte_count, element_count, exact_array, is_float
from normtool.walk import Stopped

#: A norm goes into a table that others read too (a tied head) if the copy is at most this share of the model.
TABLE_SHARE = 0.05

#: Modes of which the plan knows; the last does not keep the function.
CENTRE, APPROXIMATE = "centre", "approximate"


@dataclass(frozen=True, eq=False)
class SwapFold(Fold):
    """One change of a swap; `named` says where things went.

    `back` = (s, t) of a norm: s·y′ + t is what stands for y, where γ and β have left it.
    """

    named: tuple[str, ...] = ()
    back: tuple[Array, Array] | None = None

    @property
    def into(self) -> tuple[str, ...]:
        return self.named


@dataclass(frozen=True, eq=False)
class Drop:
    """A LayerNorm that becomes an RMSNorm though nothing centres what it reads.

    `fit` = (a, b), numbers for each channel: γ·a and β + γ·b take the place of γ and β.
    """

    fit: tuple[Array, Array] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    reasons: tuple[Reason, ...] = ()


#: Norms to drop, by the number of their site.
Drops = Mapping[int, Drop]


@dataclass(frozen=True, eq=False)
class SwapPlan(Plan):
    """`kept_forms`: LayerNorms that nothing but their mean keeps from being swapped, by number of their site.

    `dropped_forms`: those that are swapped all the same.
    """

    kept_forms: Mapping[int, NormForm] = field(default_factory=dict)
    dropped_forms: Mapping[int, NormForm] = field(default_factory=dict)


def plan_swap(
    graph: ModelGraph,
    fingerprint: str = "",
    options: SwapOptions | None = None,
    progress: Progress = lambda done, total: None,
    review: Review = lambda folds: {},
    drops: Drops | None = None,
) -> SwapPlan:
    """Decide for every LayerNorm of `graph` whether it becomes an RMSNorm, and prove each change.

    `review` and a failing proof take changes back, as for `plan_fold`; the plan is made again until nothing
    speaks against it. `drops` are swapped without having been centred.
    """
    options = options or SwapOptions()
    against = _Against()
    while True:
        swapper = _Swapper(graph, options, against, drops or {})
        made = swapper.plan(fingerprint, progress)
        refused = dict(review(made.folds)) or {
            fold.path: fold.proof.failures for fold in made.folds if fold.proof and fold.proof.failures
        }
        if not refused:
            return made
        if not against.note(swapper, refused):
            return _given_up(made, refused)


def _given_up(made: SwapPlan, refused: Mapping[Path, tuple[Reason, ...]]) -> SwapPlan:
    """Nothing is changed where planning again would only make the same changes again."""
    reasons = tuple(dict.fromkeys(reason for each in refused.values() for reason in each))
    kept = (site if site.verdict == KEPT else Site(site.norm, KEPT, reasons) for site in made.sites)
    return replace(made, sites=tuple(kept), folds=())


@dataclass
class _Against:
    """What a format or a proof has objected to so far, by the ops of the original graph."""

    folds: dict[Any, tuple[Reason, ...]] = field(default_factory=dict)
    constants: dict[tuple[Op, str], Reason] = field(default_factory=dict)
    centres: dict[Tensor, Reason] = field(default_factory=dict)
    norms: dict[Op, tuple[Reason, ...]] = field(default_factory=dict)

    def note(self, swapper: "_Swapper", refused: Mapping[Path, tuple[Reason, ...]]) -> bool:
        """Remember; False if that is nothing new."""
        before = self._count()
        for path, reasons in refused.items():
            for what in swapper.subject.get(path, ()):
                match what:
                    case Writer(op=op, slot=slot):
                        self.constants[swapper.draft.origin(op), slot] = reasons[0]
                    case Centre(fact=fact):
                        self.centres[fact.tensor] = reasons[0]
                    case Op():
                        self.norms[what] = reasons
            if path not in swapper.subject:
                self.folds[swapper.planner.key(path)] = reasons
        return self._count() > before

    def _count(self) -> int:
        return len(self.folds) + len(self.constants) + len(self.centres) + len(self.norms)


class _Swapper:
    """One pass over all norms."""

    def __init__(self, graph: ModelGraph, options: SwapOptions, against: _Against, drops: Drops) -> None:
        self.original = graph
        self.options = options
        self.drops = drops
        self.against = against
        self.planner = Planner(graph, FoldOptions(freeze=options.freeze), against.folds)
        self.draft, self.constants = self.planner.graph, self.planner.constants
        self.model_bytes = sum(byte_count(tensor.value) for tensor in graph.tensors if tensor.value is not None)
        #: path of a fold → what is given up if that fold is
        self.subject: dict[Path, tuple[Writer | Centre | Op, ...]] = {}
        #: path of a fold → what has to be shown of it
        self.shown_by: dict[Path, list[Step]] = {}
        #: norm → the same as the draft has it now
        self.now: dict[NormForm, NormForm] = {}
        #: why β could not move, and what did
        self.unmoved: dict[NormForm, tuple[Reason, ...]] = {}
        self.moved: dict[NormForm, Fold] = {}
        #: (constant, place) → what takes its place
        self.centred: dict[tuple[Tensor | None, Place | None], Value] = {}
        #: norms that are swapped without having been centred
        self.dropped: dict[NormForm, Drop] = {}
        #: γ and β by other numbers, flat, before anything moves
        self.fitted: dict[NormForm, tuple[Array, Array]] = {}

    def plan(self, fingerprint: str, progress: Progress) -> SwapPlan:
        norms = find_norms(self.original, Constants(self.original, self.options.freeze))
        self.options.check(norm.name for norm in norms)
        forms = norm_forms(self.original, Constants(self.original, self.options.freeze))
        self.now = {form: form for form in forms}
        by_ops = {form.ops: form for form in forms}
        of_norm = {norm: form_of(norm, by_ops) for norm in norms}
        kept = {norm: reasons for norm in norms if (reasons := self._obstacles(norm, of_norm[norm]))}
        chosen = [form for norm, form in of_norm.items() if norm not in kept and form is not None]
        numbers = {form: number for number, norm in enumerate(norms) if (form := of_norm[norm]) is not None}
        self.dropped = {form: self.drops[numbers[form]] for form in chosen if numbers[form] in self.drops}
        rest = [form for form in chosen if form not in self.dropped]
        tables = {form: fold for form in rest if (fold := self._into_table(form)) is not None}
        rest = [form for form in rest if form not in tables]
        if tables:
            # what such a norm put out is no norm's any more, and whoever read that may read what it read
            self.now = {form: self._as_it_is(form) for form in forms if form not in tables}
        facts, solution, unknown = self._solved(rest)
        while self._scales_moved(facts):
            facts, solution, unknown = self._solved(rest)
        self._refit()
        if not self.options.keep_affine:
            self._strip([*(form for form in rest if form in solution.swapped), *self.dropped])
            facts, solution, unknown = self._solved(rest)
        without = {form: _uncentred(facts.wanted(self.now[form])) for form in self.dropped}
        done = self._carried_out(facts, replace(solution, swapped={**solution.swapped, **without}))
        sites = []
        for count, norm in enumerate(norms, 1):
            form = of_norm[norm]
            if form in tables:
                sites.append(Site(norm, FOLDED, fold=tables[form]))
            elif form in done:
                sites.append(self._done(norm, form, done[form]))
            else:
                against = (
                    (kept.get(norm), solution.kept.get(form), unknown.get(form)) if form else (kept.get(norm),)
                )
                sites.append(Site(norm, KEPT, next((reasons for reasons in against if reasons), ())))
            progress(count, len(norms))
        made = SwapPlan(
            tuple(sites),
            tuple(self.planner.folds) if tables or done else (),
            fingerprint,
            self.options.freeze,
            "swap",
            {numbers[form]: form for form in solution.kept},
            {numbers[form]: form for form in self.dropped},
        )
        return self._proved(made) if made.folds else made

    def _done(self, norm: Norm, form: NormForm, fold: SwapFold) -> Site:
        drop = self.dropped.get(form)
        reasons = (*(drop.reasons if drop else ()), *self.unmoved.get(form, ()))
        return Site(norm, APPROXIMATED if drop else SWAPPED, reasons, fold)

    # ---- which norms ------------------------------------------------------------------

    def _obstacles(self, norm: Norm, form: NormForm | None) -> tuple[Reason, ...]:
        """Why a norm cannot even be looked at."""
        name = norm.name
        if norm.kind != "layer_norm":
            return (Reason("not_layer_norm", f"it is a {norm.kind}", name),)
        if self.original.no_dataflow:
            return (Reason("no_dataflow", self.original.no_dataflow, name),)
        if not self.options.chooses(name):
            return (Reason("not_selected", "it is not among the norms that were chosen", name),)
        if norm.calls == 0:
            return (Reason("not_called", "the model never calls it", name),)
        if form is None or form.eps is None:
            return (Reason("unsupported_op", f"how {norm.spelling} computes is not known", name),)
        if form.ops[-1] in self.against.norms:
            return self.against.norms[form.ops[-1]]
        return tuple(self._unlike(form))

    def _unlike(self, form: NormForm) -> Iterator[Reason]:
        """Where a LayerNorm is not γ·RMS_ε(P·x) + β with stored γ and β."""
        name = form.y.name
        if form.unbiased:
            yield Reason("second_moment_differs", "its variance divides by N − 1", name)
        if not form.eps_inside:
            yield Reason("second_moment_differs", "its ε is not under the root", name)
        if form.observed:
            inner = form.observed[0].name
            yield Reason("observed_mean", f"{inner!r}, inside the norm, is read by others", inner)
        for tensor in (form.weight, form.bias):
            value = self.constants.value(tensor) if tensor is not None else None
            if isinstance(value, Reason):
                yield value
        if form.assumed and not self.options.freeze:
            setting = form.assumed[0].name
            yield Reason("overridable", f"{setting!r} is also a graph input", setting)
        if form.x.dtype is None or not is_float(form.x.dtype):
            yield Reason("axis_unknown", f"the dtype of {form.x.name!r} is unknown", name)

    def _solved(self, norms: Sequence[NormForm]) -> tuple[Facts, Solution, dict[NormForm, tuple[Reason, ...]]]:
        """The analysis of the draft as it is: (facts, what to do, norms whose axes are unknown).

        In mode `approximate` nobody may rely on what a norm that is kept puts out: it will be dropped.
        """
        dropped = set(self.dropped)
        while True:
            facts, solution, unknown = self._solved_without(norms, dropped)
            if self.options.mode != APPROXIMATE or dropped.issuperset(solution.kept):
                return facts, solution, unknown
            dropped |= set(solution.kept)

    def _solved_without(
        self, norms: Sequence[NormForm], dropped: Collection[NormForm]
    ) -> tuple[Facts, Solution, dict[NormForm, tuple[Reason, ...]]]:
        facts = Facts(
            self.constants,
            self.now.values(),
            refused=lambda op, slot: self.against.constants.get((self.draft.origin(op), slot)),
            no_centre=self.against.centres.get,
            model_bytes=self.model_bytes,
            dropped=[self.now[form] for form in dropped],
        )
        wanted = {form: facts.wanted(self.now[form]) for form in norms}
        unknown: dict[NormForm, tuple[Reason, ...]] = {
            form: (fact,) for form, fact in wanted.items() if isinstance(fact, Reason)
        }
        known = {self.now[form]: fact for form, fact in wanted.items() if isinstance(fact, Fact)}
        solution = facts.solve(known, at_any_price=self.options.mode == CENTRE)
        originals = {now: form for form, now in self.now.items()}
        return facts, solution.renamed(originals), unknown

    # ---- what makes room --------------------------------------------------------------

    def _into_table(self, form: NormForm) -> Fold | None:
        """A LayerNorm of nothing but rows of a table: the table holds them normalised, and the norm goes."""
        gather = looked_up(self.constants, form)
        table = self.constants.value(self.draft.inputs(gather)["table"]) if gather is not None else None
        if gather is None or table is None or isinstance(table, Reason):
            return None
        path = (gather, *form.ops)
        copied = len(self.draft.readers(self.draft.inputs(gather)["table"])) > 1
        if copied and byte_count(table) > TABLE_SHARE * self.model_bytes:
            return None
        normed = RowWise(table, normalising(self._gamma(form), self._beta(form), form.eps or 0.0))
        before = region_of(self.draft, self.constants, form.ops)
        edits: list[Edit] = [Rebind(gather, "table", normed, f"{gather.name}.table")]
        if form.is_native:
            edits.append(Splice(form.ops[0], "x"))
        else:
            edits.append(Graft(form.y, (Part("identity", {"x": form.x}),)))
        if self.planner.key(path, edits) in self.against.folds:
            return None
        self._carry_out(edits)
        added = byte_count(table) if copied else 0
        fold = SwapFold(path, form.ops, tuple(edits), (), added_bytes=added, named=(gather.name,))
        self.shown_by[path] = [TableStep(form.y.name, form.x, before, table, normed)]
        self.planner.folds.append(fold)  # without it, the norm may still be swapped
        return fold

    def _gamma(self, form: NormForm) -> Array:
        return gamma_of(self.constants, form)

    def _beta(self, form: NormForm) -> Array:
        return beta_of(self.constants, form)

    def _scales_moved(self, facts: Facts) -> bool:
        """Constant scales on the way go into the linear ops behind them."""
        moved = False
        for op in facts.scaled():
            try:
                self.planner.take_back(op)
                moved = True
            except Stopped:
                continue
        if moved:  # a norm may read what stood in front of a scale
            self.now = {form: self._as_it_is(form) for form in self.now}
        return moved

    def _refit(self) -> None:
        """γ·a and β + γ·b take the place of γ and β, where both are stored as they are; else `_norm_fold` has
        them."""
        for form, drop in self.dropped.items():
            if drop.fit is None:
                continue
            a, b = drop.fit
            gamma = self._gamma(form)
            self.fitted[form] = fitted = gamma * a, self._beta(form) + gamma * b
            flat = fitted[0] / form.gain - form.weight_offset, fitted[1]
            edits = [
                self._rebound(form, tensor, numbers)
                for tensor, numbers in zip((form.weight, form.bias), flat, strict=True)
            ]
            if all(edits):
                stored = [edit for edit in edits if edit is not None]
                before = region_of(self.draft, self.constants, form.ops)
                self._carry_out(stored)
                after = region_of(self.draft, self.constants, form.ops)
                path = tuple(dict.fromkeys(edit.op for edit in stored))
                self._note(SwapFold(path, (), tuple(stored), ()), form)
                place = self._place_of(form)
                refit = self._refit_of(form)
                step = NormStep(form.y.name, form.x, place, before, form.x, after, refit=refit)
                self.shown_by[path] = [step]
                self.now[form] = self._as_it_is(form)
                del self.fitted[form]

    def _rebound(self, form: NormForm, tensor: Tensor | None, numbers: Array) -> Rebind | None:
        """Other numbers for γ or β; None where it is not stored for the norm itself, number by number."""
        op = self._reader(form, tensor) if tensor is not None else None
        if tensor is None or op is None or not np.any(form.gain):
            return None
        value = self.constants.value(tensor)
        assert not isinstance(value, Reason)
        if element_count(value.shape) != numbers.size:
            return None
        slot = next(slot for slot, each in self.original.inputs(op).items() if each is tensor)
        return Rebind(op, slot, Rounded(numbers.reshape(value.shape), value.dtype), f"{op.name}.{slot}")

    def _strip(self, norms: Iterable[NormForm]) -> None:
        """γ and β go forward into what reads the norm: a β that stays is an Add, which costs what is gained."""
        for form in norms:
            tail = self._tail(form)
            if form in self.fitted or not tail.ops:
                continue
            try:
                self.moved[form], reasons = self.planner.strip_affine(tail, WITHOUT_BIAS)
            except Stopped as stopped:
                reasons = stopped.reasons
            self.now[form] = self._as_it_is(form)
            if self.now[form].bias is not None and np.any(self._beta(self.now[form])):
                self.unmoved[form] = tuple(reasons)

    def _tail(self, form: NormForm) -> Tail:
        if form.is_native:
            return Tail.of(form.ops[0])
        return Tail(*(self._reader(form, tensor) for tensor in (form.weight, form.bias)))

    def _reader(self, form: NormForm, tensor: Tensor | None) -> Op | None:
        """The op of a norm that reads its x, γ or β."""
        return next((op for op in form.ops if tensor in self.original.inputs(op).values()), None)

    def _as_it_is(self, form: NormForm) -> NormForm:
        """A norm after edits around it."""
        alive = {op: self.draft.current(op) for op in form.ops}
        ops = tuple(now for now in alive.values() if now is not None)
        x, weight, bias = (self._operand(alive, form, tensor) for tensor in (form.x, form.weight, form.bias))
        assert x is not None
        return replace(form, x=x, ops=ops, y=self.draft.output(ops[-1]), weight=weight, bias=bias)

    def _operand(self, alive: Mapping[Op, Op | None], form: NormForm, tensor: Tensor | None) -> Tensor | None:
        """What is now read where a norm used to read its x, γ or β."""
        op = self._reader(form, tensor)
        now = alive[op] if op is not None else None
        if op is None or now is None:
            return None
        slot = next(slot for slot, each in self.original.inputs(op).items() if each is tensor)
        return self.draft.input(now, slot)

    # ---- the swap ---------------------------------------------------------------------

    def _carried_out(self, facts: Facts, solution: Solution) -> dict[NormForm, SwapFold]:
        """Writers, Centres and norms, with what has to be shown of each."""
        steps = Before.of(self.draft, self.constants, facts, solution, self.now.values())
        olds = {form: region_of(self.draft, self.constants, self.now[form].ops) for form in solution.swapped}
        by_op: dict[Op, list[Writer]] = {}
        for writer in solution.writers:
            by_op.setdefault(writer.op, []).append(writer)
        for op, writers in by_op.items():
            edits = [self._centred(writer) for writer in writers]
            self._carry_out(edits)
            added = sum(writer.copied_bytes for writer in writers)
            self._note(SwapFold((op,), (), tuple(edits), (), added_bytes=added), *writers)
        centres = {self._centre(centre): centre.fact for centre in solution.centres}
        after = steps.after(self.draft, self.constants, centres)
        folds = {}
        for form, how in solution.swapped.items():
            was, now = self.now[form], self._as_it_is(form)
            fold, graft = self._norm_fold(form, now, how)
            swapped = NormStep(
                form.y.name,
                was.x,
                how.fact.place,
                olds[form],
                now.x,
                region_of(self.draft, self.constants, self.draft.grafted[graft]),
                (*steps.entering(was.x, centres.get(now.x)), *_without_mean(how)),
                steps.leaving(was.y),
                self._refit_of(form) if form in self.fitted else None,
            )
            around = {op for fact in how.path for op in self.draft.beside(fact.tensor)}
            refitted = self.shown_by.get(fold.path, [])
            self.shown_by[fold.path] = [*refitted, swapped, *(after[op] for op in after if op in around)]
            folds[form] = fold
        self.shown_by[()] = list(after.values())
        return folds

    def _centred(self, writer: Writer) -> Rebind:
        tensor = self.draft.input(writer.op, writer.slot)
        value = self.constants.value(tensor) if tensor is not None else None
        assert value is not None
        assert not isinstance(value, Reason)
        new: Value = zeros_like(value) if writer.place is None else Centred(value, writer.place)
        new = self.centred.setdefault((tensor, writer.place), new)  # one constant for all who want the same
        return Rebind(writer.op, writer.slot, new, f"{writer.op.name}.{writer.slot}")

    def _centre(self, centre: Centre) -> Tensor:
        """Put a Centre op in; returns what it puts out."""
        tensor, place = centre.fact.tensor, centre.fact.place
        producer = self.draft.producer(tensor)
        graft = Graft(tensor, tuple(targets.centre(tensor, place)), centre.readers)
        self._carry_out([graft])
        path = (*([] if producer is None else [producer]), *(read.op for read in centre.readers))
        forms = region_of(self.draft, self.constants, self.draft.grafted[graft])
        self._note(SwapFold(path, (), (graft,), ()), centre)
        self.shown_by[path] = [CentreStep(tensor.name, tensor, place, forms)]
        return self.draft.output(self.draft.put_in[graft])

    def _norm_fold(self, form: NormForm, now: NormForm, how: Centring) -> tuple[SwapFold, Graft]:
        dtype, rank = now.x.dtype, self.draft.rank(now.x)
        assert dtype is not None
        assert rank is not None
        assert now.eps is not None
        axes = list(range(how.fact.place.start, how.fact.place.stop))
        gamma, beta = self.fitted.get(form) or (self._gamma(now), self._beta(now))
        weight = Rounded(self._laid_out(gamma, how, rank), dtype)
        parts = targets.rms_norm(now.x, axes, rank, now.eps, dtype, weight, self._target(now, dtype))
        kept_beta = bool(np.any(beta))
        if kept_beta:
            shift = Rounded(self._laid_out(beta, how, rank), dtype)
            parts.append(Part("add", {"a": len(parts) - 1}, {"b": ("bias", shift)}))
        graft = Graft(now.y, tuple(parts))
        self._carry_out([graft])
        writers = tuple(dict.fromkeys(writer.op.name for writer in how.writers))
        moved = self.moved.get(form)
        about = {
            "free": not how.centres,
            "writers": list(writers),
            "centres": [fact.tensor.name for fact in how.centres],
            "path": [fact.tensor.name for fact in how.path],
            "added_bytes": sum(writer.copied_bytes for writer in how.writers),
            "added_ops": int(kept_beta),
        }
        named = (*writers, *(moved.into if moved is not None else ()))
        drop = self.dropped.get(form)
        fold = SwapFold(
            now.ops,
            now.ops,
            (graft,),
            (),
            about={"centring": about} if drop is None else dict(drop.about),
            named=tuple(dict.fromkeys(named)),
            back=None if drop is None else self._way_back(form, drop, gamma, beta),
        )
        self._note(fold, form)
        return fold, graft

    def _target(self, form: NormForm, dtype: np.dtype[Any]) -> str:
        """ONNX's operators hold ε in float32: what a float64 model spells out with another one stays so."""
        in_onnx = form.ops[-1].domain != ATEN
        if in_onnx and dtype == np.float64 and form.eps != f32(form.eps or 0.0):
            return targets.PRIMITIVE
        return self.options.target or targets.PRIMITIVE

    def _refit_of(self, form: NormForm) -> tuple[Array, Array]:
        """What γ and β by other numbers make of y: a·y + c."""
        a, b = self.dropped[form].fit or (np.ones(1), np.zeros(1))
        gamma, beta = self._gamma(form), self._beta(form)
        how, rank = _uncentred(Fact(form.x, self._place_of(form))), self.original.rank(form.x)
        assert rank is not None
        return self._laid_out(a, how, rank), self._laid_out(beta + gamma * b - a * beta, how, rank)

    def _place_of(self, form: NormForm) -> Place:
        place = whole(form.x, form.axes)
        assert place is not None
        return place

    def _way_back(self, form: NormForm, drop: Drop, gamma: Array, beta: Array) -> tuple[Array, Array]:
        """(s, t) with which γ and β as they are now give those that the norm is to have: s·γ = γ₀,
        t = β₀ − s·β."""
        a, b = drop.fit or (np.ones(1), np.zeros(1))
        wanted = self._gamma(form) * a
        s = np.where(gamma == wanted, 1.0, wanted / np.where(gamma == 0, 1.0, gamma))
        return np.asarray(s), np.asarray(self._beta(form) + self._gamma(form) * b - s * beta)

    def _laid_out(self, numbers: Array, how: Centring, rank: int) -> Array:
        """γ or β over the normalised axes, to broadcast against the axes behind them."""
        place = how.fact.place
        lengths = tuple(int(n) for n in how.fact.tensor.shape[place.start : place.stop])  # type: ignore[index, arg-type]
        whole = np.broadcast_to(numbers, (place.block,)).reshape(lengths)
        return np.asarray(whole.reshape(*lengths, *[1] * (rank - place.stop)))

    # ---- committing -------------------------------------------------------------------

    def _carry_out(self, edits: Sequence[Edit]) -> None:
        self.planner.carry_out(edits)

    def _note(self, fold: SwapFold, *what: Writer | Centre | NormForm) -> None:
        self.planner.folds.append(fold)
        given_up = tuple(each.ops[-1] if isinstance(each, NormForm) else each for each in what)
        self.subject[fold.path] = (*self.subject.get(fold.path, ()), *given_up)

    def _proved(self, made: SwapPlan) -> SwapPlan:
        """The plan with a proof of every change."""
        errors: dict[object, float | Reason] = {}
        shown: dict[Fold, Fold] = {}
        for fold in made.folds:
            if isinstance(fold, SwapFold):
                proof = prove(self.shown_by.get(fold.path, self._touching(fold)), fold.edits, errors)
                proof = replace(proof, failures=(*proof.failures, *self._unshown(fold)))
            else:
                proof = prove_fold(fold.steps, fold.edits)
            shown[fold] = replace(fold, proof=proof)
        sites = tuple(replace(site, fold=shown[site.fold]) if site.fold else site for site in made.sites)
        return replace(made, sites=sites, folds=tuple(shown.values()))

    def _touching(self, fold: Fold) -> list[Step]:
        """Every step of an op that a writer or a Centre changes."""
        return [step for step in self.shown_by[()] if isinstance(step, OpStep) and step.op in fold.path]

    def _unshown(self, fold: Fold) -> Iterator[Reason]:
        """Ops that get another constant, and that no step speaks of: a reader of a tied table, say."""
        spoken = {step.op for step in self.shown_by.get((), ()) if isinstance(step, OpStep)}
        spoken |= {op for form in self.now.values() for op in form.ops}
        spoken |= set(fold.path) if fold.path in self.shown_by else set()
        for edit in fold.edits:
            if isinstance(edit, Rebind) and edit.op not in spoken:
                yield Reason("internal", f"nothing shows what becomes of {edit.op.name!r}", edit.op.name)


def gamma_of(constants: Constants, form: NormForm) -> Array:
    """γ, with what some norms add to it, flat."""
    gamma = np.ones(1) if form.weight is None else _wide(constants, form.weight)
    return np.asarray(form.gain * (gamma.reshape(-1) + form.weight_offset))


def beta_of(constants: Constants, form: NormForm) -> Array:
    """β, flat."""
    return np.zeros(1) if form.bias is None else _wide(constants, form.bias).reshape(-1)


def _wide(constants: Constants, tensor: Tensor) -> Array:
    value = constants.value(tensor)
    assert not isinstance(value, Reason)
    return exact_array(value)


def form_of(norm: Norm, forms: Mapping[tuple[Op, ...], NormForm]) -> NormForm | None:
    """What a norm computes: the form that consists of the same ops."""
    if norm.form is not None:
        return forms.get(norm.form.ops)
    return forms.get((norm.op,)) if norm.op is not None else None


def _uncentred(fact: Fact | Reason) -> Centring:
    """How a norm that is dropped comes to be centred: not at all."""
    assert isinstance(fact, Fact)
    return Centring(fact, (), (), (), dropped=True)


def _without_mean(how: Centring) -> tuple[Relation, ...]:
    """What is assumed of the input of a norm that is dropped."""
    return (Relation(how.fact.place, "held"),) if how.dropped else ()
