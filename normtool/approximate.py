"""`swap --mode approximate`: what an exact swap has to keep becomes an RMSNorm too, without being centred.

    LN(x) = γ·(x − μ)/√(σ² + ε) + β   →   γ′·x/√(μ² + σ² + ε) + β′

That is another function. How far away is predicted, norm by norm, before anything is changed (`drift` has the
algebra); with samples to calibrate on, γ′ and β′ are the best there are; and the result is measured against the
original on the same data. Everything that can be swapped exactly is, first: what is predicted is what the norms
that are left will read then.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from normtool.constants import Constants
from normtool.detect import find_norms
from normtool.drift import FEWEST_ROWS, InputSums, PairSums, Tap, Watched
from normtool.edits import Graft
from normtool.forms import NormForm, norm_forms
from normtool.graph import ModelGraph
from normtool.options import SwapOptions
from normtool.planner import Plan, Progress, Site
from normtool.reasons import APPROXIMATED, KEPT, Reason
from normtool.results import verbs_of
from normtool.samples import Data
from normtool.swapping import Drop, SwapFold, SwapPlan, beta_of, form_of, gamma_of


@dataclass(frozen=True, eq=False)
class Drift:
    """One norm's: relative L2, of what it puts out without β.

    `predicted` of the result as it is written: from ρ, or what is left of a fit; `without_fit` of one that
    keeps γ and β, on the same samples; `measured` in the whole model, where what comes before has drifted too.
    `rho` is over the `rows` that are not `flat`.
    """

    rho: float
    predicted: float
    rows: int
    flat: int
    without_fit: float | None = None
    measured: float | None = None

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"rho": _number(self.rho), "predicted": _number(self.predicted)}
        if self.without_fit is not None:
            found["without_calibration"] = _number(self.without_fit)
        return {**found, "measured": _number(self.measured), "rows": self.rows, "flat_rows": self.flat}


@dataclass(frozen=True, eq=False)
class Approximation:
    """What is known of a plan with norms in it that drift.

    `drifts` are by the number of their site. `outputs` (name → drift) is None before the result was measured.
    """

    model: Any
    watch: Any
    data: Data
    drifts: Mapping[int, Drift] = field(default_factory=dict)
    forms: Mapping[int, NormForm] = field(default_factory=dict)
    outputs: Mapping[str, float] | None = None

    @property
    def exact(self) -> bool:
        return not self.drifts

    def measured(self, plan: Plan, rewritten: Any, written: Any) -> tuple[Plan, "Approximation"]:
        """The same with what the result really does; `written` is what has become of `rewritten`.

        Raises RuntimeRefused where one of the two models does not run.
        """
        numbered = dict(self._taps(plan, rewritten))
        sums: PairSums = self.watch.pair(self.model, written, list(numbered.values()))
        found = dict(self.drifts)
        for place, number in enumerate(numbered):
            found[number] = replace(found[number], measured=sums.drift(place))
        made = replace(self, drifts=found, outputs=sums.output_drifts())
        return made.in_plan(plan), made

    def in_plan(self, plan: Plan) -> Plan:
        """The plan whose sites say how far they drift."""
        sites = list(plan.sites)
        for number, drift in self.drifts.items():
            fold = sites[number].fold
            assert fold is not None
            about = {**fold.about, "drift": drift.to_dict()}
            sites[number] = replace(sites[number], fold=replace(fold, about=about))
        return replace(plan, sites=tuple(sites))

    def _taps(self, plan: Plan, rewritten: Any) -> Iterator[tuple[int, Tap]]:
        """Where each norm's output is in both models; those that cannot be found again are not measured."""
        constants = Constants(self.model.graph, plan.freeze)
        for number, form in self.forms.items():
            fold = plan.sites[number].fold
            assert isinstance(fold, SwapFold)
            assert fold.back is not None
            after = _put_out(rewritten, fold)
            if after is None or not self.watch.can_see(self.model, form.y):
                continue
            rank = self.model.graph.rank(form.x)
            beta = np.asarray(beta_of(constants, form), np.float64)
            s, t = (np.asarray(each, np.float64) for each in fold.back)
            yield number, Tap(form.y.name, after, _from_the_last(form, rank), s, t, beta)

    def to_dict(self) -> dict[str, Any]:
        outputs = [{"name": name, "measured": _number(drift)} for name, drift in (self.outputs or {}).items()]
        return {
            "data": self.data.source,
            "calibrated": any(drift.without_fit is not None for drift in self.drifts.values()),
            "predicted": _number(max((drift.predicted for drift in self.drifts.values()), default=0.0)),
            "measured": _number(self.worst_measured),
            "outputs": outputs,
        }

    @property
    def worst_measured(self) -> float | None:
        return max((d.measured for d in self.drifts.values() if d.measured is not None), default=None)

    def summary(self, plan: Plan) -> str:
        """One line: how many, and how far."""
        norms = sum(site.norm.kind == "layer_norm" for site in plan.sites)
        worst = max(self.drifts, key=lambda number: self.drifts[number].predicted)
        said = f"drift predicted {self.drifts[worst].predicted:.3g} at worst ({plan.sites[worst].norm.name})"
        if self.worst_measured is not None:
            said += f", measured {self.worst_measured:.3g}"
        if self.outputs:
            said += f"; outputs moved by {max(self.outputs.values()):.3g}"
        return f"approximate: {len(self.drifts)} of {norms} LayerNorms without their mean; {said}"


def plan_approximate(
    opened: Any, options: SwapOptions, data: Data, progress: Progress
) -> tuple[Plan, Approximation]:
    """The plan that swaps exactly what can be, and approximates the rest.

    Raises RuntimeRefused (the model does not run), UsageError (samples that do not fit it).
    """
    verbs = verbs_of(opened)
    watch = verbs.watch(data)
    exact: SwapPlan = verbs.make_swap_plan(opened, options, progress)
    if not exact.kept_forms:
        return exact, Approximation(opened, watch, data)
    base = verbs.apply(opened, exact) if exact.folds else opened
    forms = {number: form for number, form in _as_they_are(exact, base) if watch.can_see(base, form.x)}
    watched = [_watched(base.graph, form) for form in forms.values()]
    sums: Sequence[InputSums] = watch.inputs(base, watched) if watched else []
    constants = Constants(base.graph, options.freeze)
    drops: dict[int, Drop] = {}
    drifts: dict[int, Drift] = {}
    for (number, form), seen in zip(forms.items(), sums, strict=True):
        if seen.rows:
            fit = None if data.samples is None else seen.fit()
            drifts[number] = drift = _drift(seen, fit, constants, form)
            drops[number] = Drop(
                fit, {"drift": drift.to_dict()}, tuple(_warnings(seen, form, data.samples is not None))
            )
    made: SwapPlan = verbs.make_swap_plan(opened, options, progress, drops)
    sites = [_with_reason(number, site, exact, drops) for number, site in enumerate(made.sites)]
    made = replace(made, sites=tuple(sites))
    kept = {number for number, site in enumerate(made.sites) if site.verdict != APPROXIMATED}
    drifts = {number: drift for number, drift in drifts.items() if number not in kept}
    dropped = {number: form for number, form in made.dropped_forms.items() if number not in kept}
    return made, Approximation(opened, watch, data, drifts, dropped)


def _as_they_are(exact: SwapPlan, base: Any) -> Iterator[tuple[int, NormForm]]:
    """Each norm that was kept for its mean, as it stands in the model that is swapped as far as can be.

    Nothing has changed the norms that were kept, nor their order.
    """
    kept = [n for n, site in enumerate(exact.sites) if site.norm.kind == "layer_norm" and site.verdict == KEPT]
    constants = Constants(base.graph, exact.freeze)
    there = [norm for norm in find_norms(base.graph, constants) if norm.kind == "layer_norm"]
    names = [norm.name for norm in there]
    forms = {form.ops: form for form in norm_forms(base.graph, constants)}
    for place, number in enumerate(kept):
        name = exact.sites[number].norm.name
        alone = names.count(name) == 1
        found = there[names.index(name)] if alone else there[place] if len(there) == len(kept) else None
        form = form_of(found, forms) if found is not None else None
        if form is not None and number in exact.kept_forms:
            yield number, form


def _drift(seen: InputSums, fit: tuple[Any, Any] | None, constants: Constants, form: NormForm) -> Drift:
    if fit is None:
        return Drift(seen.rho, seen.predicted, seen.rows, seen.flat)
    gamma = np.asarray(gamma_of(constants, form), np.float64)
    as_it_is = seen.predicted_after(np.ones(1), np.zeros(1), gamma)
    return Drift(seen.rho, seen.predicted_after(*fit, gamma), seen.rows, seen.flat, without_fit=as_it_is)


def _warnings(seen: InputSums, form: NormForm, calibrated: bool) -> Iterator[Reason]:
    name = form.x.name
    if seen.flat:
        message = f"{seen.flat:,} of {seen.rows:,} rows of {name!r} are one number all along"
        yield Reason("flat_rows", message, name)
    if calibrated and seen.fit() is None:
        message = f"{seen.rows - seen.flat:,} rows of {name!r} are too few; {FEWEST_ROWS} fit γ and β"
        yield Reason("not_fitted", message, name)


def _with_reason(number: int, site: Site, exact: SwapPlan, drops: Mapping[int, Drop]) -> Site:
    if number not in exact.kept_forms or number in drops:
        return site
    message = f"no row of {exact.kept_forms[number].x.name!r} could be looked at"
    return replace(site, reasons=(*site.reasons, Reason("not_measured", message, site.norm.name)))


def _watched(graph: ModelGraph, form: NormForm) -> Watched:
    assert form.eps is not None
    return Watched(form.x.name, _from_the_last(form, graph.rank(form.x)), form.eps)


def _from_the_last(form: NormForm, rank: int | None) -> tuple[int, ...]:
    assert rank is not None
    return tuple(axis % rank - rank for axis in form.axes)


def _put_out(rewritten: Any, fold: SwapFold) -> str | None:
    """Name of what an RMSNorm puts out in the result, found by its last constant, γ or β."""
    graft = fold.edits[-1]
    assert isinstance(graft, Graft)
    number = len(graft.parts) - 1
    names = {rewritten.places.get(((graft, number), slot)) for slot in graft.parts[number].constants}
    graph: ModelGraph = rewritten.graph
    for op in graph.ops:
        if any(tensor.name in names for tensor in graph.inputs(op).values()):
            return graph.output(op).name
    return None


def _number(value: float | None) -> float | None:
    """JSON has no infinity."""
    return None if value is None or not np.isfinite(value) else float(value)
