"""Results as sections: a title, columns, rows of text. Every renderer starts from these."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from normtool.api import Restoration, Rewrite
from normtool.comparison import Comparison, Difference
from normtool.parameters import Census
from normtool.planner import Plan, Site
from normtool.reasons import FOLDED, RESTORED, Reason
from normtool.scanning import Scan
from normtool.timing import CONFIDENCE, Benchmark
from normtool.training import TrainingMemory

if TYPE_CHECKING:
    from normtool.approximate import Approximation
    from normtool.conversion import Conversion


@dataclass(frozen=True)
class Section:
    """`right` names the columns that hold numbers; `note` is one line below the table."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[str] = frozenset()
    note: str = ""


def sections(result: Any, verbose: bool = False) -> list[Section]:
    """The sections of any result. The first that has rows is the one that CSV shows."""
    render = _SECTIONS.get(type(result)) or _LAZY[type(result).__name__]
    return render(result, verbose)


_COUNTS = frozenset(
    ["count", "learnable", "buffers", "elements", "bytes", "before", "after", "change", "norms"]
)


def _scan(scan: Scan, verbose: bool) -> list[Section]:
    norms = tuple(
        (
            norm.name,
            norm.norm.kind,
            norm.spelling,
            _list(norm.norm.axes),
            "" if norm.norm.eps is None else f"{norm.norm.eps:.3g}",
            _count(norm.learnable),
            _count(norm.buffers),
            _sharing(norm.shared_with),
        )
        for norm in scan.norms
    )
    columns = ("name", "kind", "spelling", "axes", "eps", "learnable", "buffers", "shared with")
    kinds = tuple(
        (kind, _count(c.count), _count(c.learnable), _count(c.buffers)) for kind, c in scan.summary.items()
    )
    return [
        Section("Normalisation layers", columns, norms, _COUNTS, "" if norms else "no normalisation layer"),
        Section("By kind (shared storage once)", ("kind", "count", "learnable", "buffers"), kinds, _COUNTS),
        Section("Parameters", ("role", "elements", "bytes"), _census_rows(scan.parameters), _COUNTS),
        _diagnostics(scan.diagnostics),
    ]


def _memory(memory: TrainingMemory, verbose: bool) -> list[Section]:
    rows = tuple((what, _count(size)) for what, size in memory.rows())
    return [Section(f"Training memory ({memory.optimizer})", ("what", "bytes"), rows, _COUNTS)]


def _census_rows(census: Census) -> tuple[tuple[str, str, str], ...]:
    rows = [
        ("learnable", _count(census.learnable), _count(census.learnable_bytes)),
        ("frozen", _count(census.frozen), _count(census.frozen_bytes)),
        ("buffers", _count(census.buffers), _count(census.buffer_bytes)),
        ("constants", _count(census.constants), _count(census.constant_bytes)),
    ]
    if {census.named, census.unique} != {census.parameters}:
        rows.append(("learnable and frozen, every name counted", _count(census.named), ""))
        rows.append(("… every parameter object counted", _count(census.unique), ""))
        rows.append(("… every stored element counted once", _count(census.parameters), ""))
    if census.uninitialised:
        rows.append(("uninitialised tensors", "unknown", ""))
    return tuple(rows)


def _diagnostics(diagnostics: tuple[tuple[str, str, str], ...]) -> Section:
    rows = tuple((code, message, where) for code, message, where in diagnostics)
    return Section("Diagnostics", ("code", "message", "where"), rows)


def _plan(plan: Plan, verbose: bool) -> list[Section]:
    return _sites(plan.sites, verbose)


def _sites(sites: tuple[Site, ...], verbose: bool) -> list[Section]:
    """Sites with reasons one by one; folded ones are summed up unless `verbose`.

    Of a norm that is swapped the report says how; the writers that served it are in the JSON.
    """
    verdicts = Counter((site.norm.kind, site.verdict) for site in sites)
    summary = tuple((kind, verdict, _count(n)) for (kind, verdict), n in verdicts.items())
    shown = [site for site in sites if verbose or site.verdict != FOLDED]
    rows = tuple(
        (
            site.norm.name,
            site.verdict,
            _into(site),
            _reasons(site.reasons),
        )
        for site in shown
    )
    note = "" if verbose or len(shown) == len(sites) else "-v lists the folded ones too"
    detail = Section("Sites", ("name", "verdict", "into", "reasons"), rows, note=note if rows else "")
    total = Section("Verdicts", ("kind", "verdict", "norms"), summary, _COUNTS, "" if rows else note)
    return [detail, total, *_proofs(sites)]


def _into(site: Site) -> str:
    """Where a norm went: the ops that took it in; of a swapped one, what it cost."""
    if site.fold is not None and "drift" in site.fold.about:
        return _drift(site.fold.about["drift"])
    how = site.fold.about.get("centring") if site.fold is not None else None
    if how is None:
        return ", ".join(site.fold.into) if site.fold is not None else ""
    cost = ["free"] if how["free"] else [f"a Centre behind {name}" for name in how["centres"]]
    cost += ["an Add of β"] if how["added_ops"] else []
    return ", ".join([*cost, *([f"{how['added_bytes']:,} bytes copied"] if how["added_bytes"] else [])])


def _drift(drift: dict[str, Any]) -> str:
    """How far a norm without its mean is from what it was."""
    told = [f"{name} {_share(drift[name])}" for name in ("predicted", "measured") if drift[name] is not None]
    fitted = [f"{_share(drift['without_calibration'])} uncalibrated"] if "without_calibration" in drift else []
    return ", ".join([f"drift {told[0]}" if told else "drift without bound", *told[1:], *fitted])


def _share(number: float | None) -> str:
    return "without bound" if number is None else f"{number:.3g}"


def _reasons(reasons: tuple[Reason, ...]) -> str:
    """`code: message, message; code: message`: each code once."""
    codes = dict.fromkeys(reason.code for reason in reasons)
    messages = {code: ", ".join(r.message for r in reasons if r.code == code) for code in codes}
    return "; ".join(f"{code}: {message}" for code, message in messages.items())


def _proofs(sites: tuple[Site, ...]) -> list[Section]:
    """The evidence of all folds together; one proof may cover several norms of a chain."""
    found = {id(site.fold): site.fold.proof for site in sites if site.fold}.values()
    proofs = [proof for proof in found if proof is not None]
    if not proofs:
        return []
    rows = (
        (
            "stored coefficients, each against its value before rounding",
            f"{sum(p.coefficients for p in proofs):,} checked",
        ),
        ("… farthest from it", f"{max(p.worst_ulp for p in proofs):.3g} ulp"),
        ("equations in float64, largest relative difference", f"{max(p.region_error for p in proofs):.1e}"),
    )
    return [Section("Proof at the sites", ("check", "result"), rows)]


def _rewrite(rewrite: Rewrite, verbose: bool) -> list[Section]:
    found = _sites(rewrite.sites, verbose)
    if rewrite.approximation is not None and not rewrite.exact:
        found.append(_approximation(rewrite.approximation))
    found.append(_parameters(rewrite.before, rewrite.after, "learnable", "buffers", "constants"))
    if rewrite.validation is not None:
        found += _comparison(rewrite.validation, verbose)
    if rewrite.benchmark is not None:
        found += _benchmark(rewrite.benchmark, verbose)
    if rewrite.lints:
        found.append(Section("In ONNX Runtime", ("code", "message", "where"), rewrite.lints))
    return [*found, *_written(rewrite.outputs)]


def _parameters(before: Census, after: Census, *roles: str) -> Section:
    counts = ((role, getattr(before, role), getattr(after, role)) for role in roles)
    rows = tuple((role, _count(old), _count(new), f"{new - old:+,}") for role, old, new in counts)
    return Section("Parameters", ("role", "before", "after", "change"), rows, _COUNTS)


def _approximation(approximation: "Approximation") -> Section:
    stated = approximation.to_dict()
    rows = [("norms, the worst, predicted", _share(stated["predicted"]))]
    if approximation.outputs is not None:
        rows.append(("norms, the worst, measured", _share(stated["measured"])))
        rows += [(f"output {each['name']}", _share(each["measured"])) for each in stated["outputs"]]
    note = f"relative L2, on {stated['data']}; the result does not compute what the model did"
    return Section("Approximate: drift", ("of", "drift"), tuple(rows), frozenset(["drift"]), note)


def _restoration(restoration: Restoration, verbose: bool) -> list[Section]:
    names = tuple((name, RESTORED) for name in restoration.norms)
    found = [Section("Sites", ("name", "verdict"), names)]
    found.append(_parameters(restoration.before, restoration.after, "learnable", "buffers"))
    if restoration.validation is not None:
        found += _comparison(restoration.validation, verbose)
    return [*found, *_written(restoration.outputs)]


def _conversion(conversion: "Conversion", verbose: bool) -> list[Section]:
    account = conversion.reconciliation
    roles = ("learnable", "frozen", "buffers", "constants")
    lines = [("the model given", *(_count(getattr(account.source, role)) for role in roles))]
    for difference in account.differences:
        lines.append((difference.message, *(_signed(difference.by_role[role]) for role in roles)))
    if any(account.unexplained.values()):
        lines.append(("not explained", *(_signed(account.unexplained[role]) for role in roles)))
    lines.append(("the file", *(_count(getattr(account.made, role)) for role in roles)))
    found = _sites(conversion.sites, verbose)
    found.append(Section("From the model to the file", ("what", *roles), tuple(lines), frozenset(roles)))
    changes = tuple((c.kind, _count(c.source), _count(c.made), c.message) for c in conversion.norms)
    found.append(Section("Norms", ("kind", "before", "after", "why"), changes, _COUNTS))
    if conversion.validation is not None:
        found += _comparison(conversion.validation, verbose)
    return [*found, *_written(conversion.outputs)]


def _signed(number: int) -> str:
    return f"{number:+,}" if number else ""


def _written(outputs: tuple[dict[str, str], ...]) -> list[Section]:
    rows = tuple((output["path"], output["sha256"]) for output in outputs)
    return [Section("Written", ("path", "sha256"), rows)] if rows else []


def _comparison(comparison: Comparison, verbose: bool) -> list[Section]:
    columns = ("output", "max abs", "max rel", "noise floor", "ratio")
    right = frozenset(columns[1:])
    found = [
        Section(
            f"Validation: {comparison.verdict}",
            columns,
            _differences(comparison.outputs),
            right,
            f"equal up to a ratio of {comparison.to_dict()['limit']:g}; "
            f"{len(comparison.inputs)} input sets, optimisations disabled, "
            f"{', '.join(comparison.providers['effective'])}",
        )
    ]
    if comparison.sites:
        found.append(Section("Inside, at folded sites", columns, _differences(comparison.sites), right))
    if comparison.default_level:
        title = "At the runtime's default optimisation level (first input set)"
        found.append(Section(title, columns, _differences(comparison.default_level), right))
    found.append(Section("Checks", ("check", "result"), tuple(_checks(comparison))))
    return found


def _checks(comparison: Comparison) -> list[tuple[str, str]]:
    rows = [("note", note) for note in comparison.notes]
    sensitivity = comparison.sensitivity
    if sensitivity is not None:
        told = f"{sensitivity.verdict}, ratio {sensitivity.ratio:.3g} ({sensitivity.site})"
        rows.insert(0, ("1 % error planted at one site", told))
    return rows


def _benchmark(benchmark: Benchmark, verbose: bool) -> list[Section]:
    columns = ("model", "median ms", "of it in norm ops")
    rows = (
        ("reference", f"{benchmark.reference_ms:.3f}", _percent(benchmark.norm_share_before)),
        ("candidate", f"{benchmark.candidate_ms:.3f}", _percent(benchmark.norm_share_after)),
    )
    return [
        Section("Benchmark", columns, rows, frozenset(columns[1:]), benchmark.summary),
        Section("How it was measured", ("what", "how"), tuple(_conditions(benchmark))),
    ]


def _conditions(benchmark: Benchmark) -> Iterator[tuple[str, str]]:
    yield "runs", f"{benchmark.runs:,} of each, interleaved; both loaded afresh {benchmark.loads} times"
    yield "ratio", f"median over the loads; in brackets where it lies, at {CONFIDENCE:.0%} or more"
    yield "level", "every optimisation of ONNX Runtime"
    yield "providers", ", ".join(benchmark.providers["effective"])
    threads = "ONNX Runtime's choice" if benchmark.threads is None else str(benchmark.threads)
    yield "threads", f"{threads}, on {benchmark.processors} processors"
    shapes = (f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in benchmark.inputs.items())
    yield "inputs", ", ".join(shapes)
    yield "norm ops", "fused or native ones; those spelled out in primitive ops do not count"
    for note in benchmark.notes:
        yield "note", note


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"


def _differences(differences: tuple[Difference, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (d.name, f"{d.max_abs:.3g}", f"{d.max_rel:.3g}", f"{d.noise_floor:.3g}", f"{d.ratio:.3g}")
        for d in differences
    )


def _count(number: int) -> str:
    return f"{number:,}"


def _list(axes: tuple[int, ...] | None) -> str:
    return "?" if axes is None else ",".join(map(str, axes))


def _sharing(names: tuple[str, ...]) -> str:
    return "" if not names else names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


_SECTIONS: dict[type, Callable[[Any, bool], list[Section]]] = {
    Scan: _scan,
    Plan: _plan,
    Rewrite: _rewrite,
    Restoration: _restoration,
    Comparison: _comparison,
    Benchmark: _benchmark,
    TrainingMemory: _memory,
}

#: Results of formats whose frameworks a report on another must not import, by the name of their class.
_LAZY: dict[str, Callable[[Any, bool], list[Section]]] = {"Conversion": _conversion}
