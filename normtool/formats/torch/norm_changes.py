"""Why an ONNX file has other norms than the model it was made from: kind by kind.

An exporter writes what the opset has a name for, and spells out the rest.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx

from normtool.detect import find_norms
from normtool.formats.onnx.model import OnnxModel
from normtool.graph import GRAPH_OUTPUT, ModelGraph, Op
from normtool.norms import Norm
from normtool.planner import Site
from normtool.reasons import FOLDED, SWAPPED

#: kind → why the file has fewer of them
_FEWER: Mapping[str, str] = {
    "group_norm": "written as Reshape, InstanceNormalization, Reshape, Mul, Add (below opset 21)",
    "instance_norm": "with running statistics it is written as BatchNormalization",
    "rms_norm": "spelled out in primitive ops (below opset 23, or in the model's own code)",
}

#: kind → why the file has more of them
_MORE: Mapping[str, str] = {
    "instance_norm": "what the exporter writes for GroupNorm",
    "batch_norm": "what the exporter writes for InstanceNorm with running statistics",
    "layer_norm": "spelled out in the code, and recognised (a Centre op and an RMSNorm are one)",
    "rms_norm": "spelled out in the code, and recognised by the exporter",
}

#: What no table explains is said to be so, and not guessed.
UNEXPLAINED = "for a reason that is not known here"


@dataclass(frozen=True)
class NormChange:
    """Norms of one kind, by how often they run: in the model given, folded on the way, in the file.

    `unused` ones lead to no output of the model, so the exporter leaves them out. `swapped` LayerNorms are
    RMSNorms now, of which there are so many more.
    """

    kind: str
    source: int
    folded: int
    unused: int
    made: int
    swapped: int = 0

    @property
    def message(self) -> str:
        gained = self.swapped if self.kind == "rms_norm" else -self.swapped
        causes = [f"{self.folded} folded"] if self.folded else []
        causes += [f"{self.unused} lead to no output"] if self.unused else []
        if self.swapped:
            causes.append(f"{self.swapped} " + ("were LayerNorms" if gained > 0 else "swapped for RMSNorms"))
        rest = self.made - (self.source - self.folded - self.unused + gained)
        if rest:
            table = _MORE if rest > 0 else _FEWER
            causes.append(f"{abs(rest)} {table.get(self.kind, UNEXPLAINED)}")
        return "; ".join(causes)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "message": self.message}


def norm_changes(graph: ModelGraph, sites: Iterable[Site], made: OnnxModel) -> tuple[NormChange, ...]:
    """The kinds whose number changes. `sites` are those of `graph`, the model given, each with its verdict."""
    sites, useful = list(sites), _useful(graph)
    before, after = _runs(site.norm for site in sites), _runs(find_norms(made.graph))
    folded = _runs(site.norm for site in sites if site.verdict == FOLDED)
    unused = _runs(
        s.norm for s in sites if s.verdict != FOLDED and s.norm.op is not None and s.norm.op not in useful
    )
    kinds = dict.fromkeys([*before, *after])
    swapped = _runs(site.norm for site in sites if site.verdict == SWAPPED)
    swapped["rms_norm"] = swapped["layer_norm"]
    changes = (
        NormChange(kind, before[kind], folded[kind], unused[kind], after[kind], swapped[kind]) for kind in kinds
    )
    return tuple(change for change in changes if change.source != change.made)


def _useful(graph: ModelGraph) -> set[Any]:
    """Every node from which an output can be reached."""
    ends = [node for node in graph.nodes if isinstance(node, Op) and node.kind == GRAPH_OUTPUT]
    return {each for end in ends for each in nx.ancestors(graph.nodes, end)}


def _runs(norms: Iterable[Norm]) -> Counter[str]:
    runs: Counter[str] = Counter()
    for norm in norms:
        runs[norm.kind] += norm.calls or 0
    return runs
