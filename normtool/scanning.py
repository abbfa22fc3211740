"""`scan`: every norm of a model and what the model stores."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from normtool.constants import Constants
from normtool.detect import find_norms
from normtool.graph import ModelGraph, Tensor
from normtool.norms import Norm
from normtool.parameters import Census, census_of, roles, stored_elements, stored_root

SCHEMA = "normtool.scan/1"


@dataclass(frozen=True)
class NormCount:
    """One norm's own elements. `computed` are operands made at run time, which store nothing.

    `uninitialised` operands of a lazy module exist and have no size yet. `calls` is None where unknown.
    """

    norm: Norm
    calls: int | None
    learnable: int
    frozen: int
    buffers: int
    computed: int
    uninitialised: int
    shared_with: tuple[str, ...]

    @property
    def name(self) -> str:
        """The module path, else the name of the op."""
        return self.norm.module.name if self.norm.module is not None else self.norm.name

    @property
    def spelling(self) -> str:
        return self.norm.module.spelling if self.norm.module is not None else self.norm.spelling

    def to_dict(self) -> dict[str, Any]:
        norm = self.norm
        return {
            "name": self.name,
            "kind": norm.kind,
            "spelling": self.spelling,
            "evidence": norm.evidence,
            "scope": str(norm.scope),
            "axes": None if norm.axes is None else list(norm.axes),
            "eps": norm.eps,
            "form": None if norm.form is None else norm.form.to_dict(),
            "learnable": self.learnable,
            "frozen": self.frozen,
            "buffers": self.buffers,
            "computed_operands": self.computed,
            "uninitialised": self.uninitialised,
            "calls": self.calls,
            "shared_with": list(self.shared_with),
        }


@dataclass(frozen=True)
class KindCount:
    """All norms of one kind; storage that several of them share is counted once."""

    count: int
    learnable: int
    buffers: int


@dataclass(frozen=True)
class Scan:
    model: dict[str, Any]
    parameters: Census
    norms: tuple[NormCount, ...]
    summary: dict[str, KindCount]
    diagnostics: tuple[tuple[str, str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON of DESIGN §7."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "parameters": self.parameters.to_dict(),
            "summary": {kind: dict(vars(count)) for kind, count in self.summary.items()},
            "norms": [norm.to_dict() for norm in self.norms],
            "diagnostics": diagnostics_to_dicts(self.diagnostics),
        }

    def __str__(self) -> str:
        from normtool.report.table import to_text

        return to_text(self)


def diagnostics_to_dicts(diagnostics: tuple[tuple[str, str, str], ...]) -> list[dict[str, str]]:
    return [{"code": code, "message": message, "where": where} for code, message, where in diagnostics]


def scan_graph(graph: ModelGraph, model: dict[str, Any], census: Census | None = None) -> Scan:
    """Count the norms and parameters of a graph; `model` says what it was read from.

    `census` is for formats that know more of their parameters than the graph does.
    """
    norms = find_norms(graph, Constants(graph))
    groups = _by_module(norms)
    return Scan(
        model=model,
        parameters=census if census is not None else census_of(graph, roles(graph, norms)),
        norms=tuple(_count(graph, groups)),
        summary=_summary(graph, groups),
        diagnostics=tuple(graph.diagnostics),
    )


def _by_module(norms: list[Norm]) -> list[list[Norm]]:
    """Sites of one module together: it is one norm, called several times."""
    groups: defaultdict[object, list[Norm]] = defaultdict(list)
    for norm in norms:
        groups[norm.module if norm.module is not None else norm].append(norm)
    return list(groups.values())


def _count(graph: ModelGraph, groups: list[list[Norm]]) -> list[NormCount]:
    users: defaultdict[Tensor, list[Norm]] = defaultdict(list)
    for norm, *_ in groups:
        for root in _roots(graph, (*norm.learnable, *norm.buffers)):
            users[root].append(norm)
    return [_count_one(graph, group, users) for group in groups]


def _count_one(graph: ModelGraph, group: list[Norm], users: dict[Tensor, list[Norm]]) -> NormCount:
    norm = group[0]
    learnable, buffers = _roots(graph, norm.learnable), _roots(graph, norm.buffers)
    shared = dict.fromkeys(other for root in (*learnable, *buffers) for other in users[root])
    return NormCount(
        norm=norm,
        calls=_calls(group),
        learnable=sum(stored_elements(root) for root in learnable if not root.frozen),
        frozen=sum(stored_elements(root) for root in learnable if root.frozen),
        buffers=sum(map(stored_elements, buffers)),
        computed=len(norm.learnable) + len(norm.buffers) - len(learnable) - len(buffers),
        uninitialised=norm.module.unknown if norm.module is not None else 0,
        shared_with=tuple(
            other.module.name if other.module else other.name for other in shared if other is not norm
        ),
    )


def _calls(group: list[Norm]) -> int | None:
    calls = [norm.calls for norm in group if norm.calls is not None]
    return sum(calls) if calls else None


def _roots(graph: ModelGraph, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [root for tensor in tensors if (root := stored_root(graph, tensor)) is not None]


def _summary(graph: ModelGraph, groups: list[list[Norm]]) -> dict[str, KindCount]:
    norms = [group[0] for group in groups]
    counts = Counter(norm.kind for norm in norms)
    learnable: defaultdict[str, set[Tensor]] = defaultdict(set)
    buffers: defaultdict[str, set[Tensor]] = defaultdict(set)
    for norm in norms:
        learnable[norm.kind].update(_roots(graph, norm.learnable))
        buffers[norm.kind].update(_roots(graph, norm.buffers))
    return {
        kind: KindCount(
            count,
            sum(stored_elements(root) for root in learnable[kind] if not root.frozen),
            sum(map(stored_elements, buffers[kind])),
        )
        for kind, count in counts.items()
    }
