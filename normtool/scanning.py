"""`scan`: every norm of a model and what the model stores."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from normtool.constants import Constants
from normtool.detect import find_norms
from normtool.graph import ModelGraph, Tensor
from normtool.norms import Norm
from normtool.parameters import Census, census, stored_elements, stored_root

SCHEMA = "normtool.scan/1"


@dataclass(frozen=True)
class NormCount:
    """One norm's own elements. `computed` are operands made at run time, which store nothing."""

    norm: Norm
    learnable: int
    buffers: int
    computed: int
    shared_with: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        norm = self.norm
        return {
            "name": norm.name,
            "kind": norm.kind,
            "spelling": f"{norm.op.domain}::{norm.op.spelling}" if norm.op.domain else norm.op.spelling,
            "evidence": norm.row.evidence,
            "scope": str(norm.scope),
            "axes": None if norm.axes is None else list(norm.axes),
            "eps": norm.eps,
            "learnable": self.learnable,
            "frozen": 0,
            "buffers": self.buffers,
            "computed_operands": self.computed,
            "calls": norm.calls,
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


def scan_graph(graph: ModelGraph, model: dict[str, Any]) -> Scan:
    """Count the norms and parameters of a graph; `model` says what it was read from."""
    norms = find_norms(graph, Constants(graph))
    return Scan(
        model=model,
        parameters=census(graph, norms),
        norms=tuple(_count(graph, norms)),
        summary=_summary(graph, norms),
        diagnostics=tuple(graph.diagnostics),
    )


def _count(graph: ModelGraph, norms: list[Norm]) -> list[NormCount]:
    users: defaultdict[Tensor, list[str]] = defaultdict(list)
    for norm in norms:
        for root in _roots(graph, (*norm.learnable, *norm.buffers)):
            users[root].append(norm.name)
    return [_count_one(graph, norm, users) for norm in norms]


def _count_one(graph: ModelGraph, norm: Norm, users: dict[Tensor, list[str]]) -> NormCount:
    learnable, buffers = _roots(graph, norm.learnable), _roots(graph, norm.buffers)
    shared = dict.fromkeys(name for root in (*learnable, *buffers) for name in users[root])
    return NormCount(
        norm=norm,
        learnable=sum(map(stored_elements, learnable)),
        buffers=sum(map(stored_elements, buffers)),
        computed=len(norm.learnable) + len(norm.buffers) - len(learnable) - len(buffers),
        shared_with=tuple(name for name in shared if name != norm.name),
    )


def _roots(graph: ModelGraph, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [root for tensor in tensors if (root := stored_root(graph, tensor)) is not None]


def _summary(graph: ModelGraph, norms: list[Norm]) -> dict[str, KindCount]:
    counts = Counter(norm.kind for norm in norms)
    learnable: defaultdict[str, set[Tensor]] = defaultdict(set)
    buffers: defaultdict[str, set[Tensor]] = defaultdict(set)
    for norm in norms:
        learnable[norm.kind].update(_roots(graph, norm.learnable))
        buffers[norm.kind].update(_roots(graph, norm.buffers))
    return {
        kind: KindCount(
            count, sum(map(stored_elements, learnable[kind])), sum(map(stored_elements, buffers[kind]))
        )
        for kind, count in counts.items()
    }
