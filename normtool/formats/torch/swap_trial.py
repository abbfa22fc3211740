"""Does a user's module, with RMSNorms and Centres in their places, make the calls that a swap expects of it?

As for folds (`trial`): what `forward` does is seen only by exporting it. Numbers play no part.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence

import torch

from normtool.formats.torch.export import ExportFailed, structural_copy
from normtool.formats.torch.model import TorchModel, read_module
from normtool.formats.torch.rest import plain_arguments, stack_of
from normtool.formats.torch.swap_changes import CentreCall, Changes, GoneCall, NormCall
from normtool.formats.torch.swap_heirs import Numbers, give_way
from normtool.formats.torch.trial import NEW, Origins, give_bias
from normtool.graph import GRAPH_OUTPUT, ModelGraph, Op, Read, Tensor
from normtool.planner import Fold

#: A call: what it is, plain arguments, slot → origin of what it reads.
_Call = tuple[str, str, dict[str, object]]

#: What is tried together: (path of the module or op, the fold that is blamed).
Item = NormCall | GoneCall | CentreCall | tuple[Op, Fold]


def holds(model: TorchModel, changes: Changes) -> bool:
    """Would the module's code, with all that gives way, do what is left to do?"""
    assert model.module is not None
    try:
        twin = structural_copy(model.module, hooks=False)
    except ExportFailed:
        return False
    fresh: list[torch.Tensor] = [give_bias(twin.get_submodule(op.owner)) for op in changes.biased]
    known = {id(stored.tensor) for stored in model.state.stored}
    old = set(twin.modules())
    built = give_way(twin, changes.heirs, changes.centred)
    fresh += [p for heir in built.values() for p in heir.parameters() if id(p) not in known]
    made = read_module(twin, model.example)
    if made.graph.no_dataflow:
        return False
    ours = {path for path, module in twin.named_modules() if module not in old}
    found = _Flow(made, Changes(), fresh, ours).result()
    return _Flow(model, changes).result() == found


class _Flow:
    """Every call with the origin of what it reads, and the origin of every output."""

    def __init__(
        self,
        model: TorchModel,
        changes: Changes,
        fresh: Collection[torch.Tensor] = (),
        ours: Collection[str] = (),
    ) -> None:
        self.graph: ModelGraph = model.graph
        self.changes = changes
        self.origins = Origins(model, fresh)
        self.ours = ours
        self.calls: list[_Call] = []
        self.norm_ops = {op: each for each in changes.norms for op in each.ops}
        self.gone_ops = {op: each for each in changes.gone for op in each.ops}
        self.behind = _ops_beside(
            self.graph, [each for each in changes.centres if not each.centre.in_front], -1
        )
        self.in_front = _ops_beside(self.graph, [each for each in changes.centres if each.centre.in_front], 0)
        #: who reads a Centre → what that puts out
        self.redirected: dict[Read, object] = {}

    def result(self) -> tuple[list[_Call], dict[str, object]]:
        dead = self._dead()
        for op in self.graph.ops:
            for centre in self.in_front.get(op, ()):
                self._centre(centre)
            if op in self.norm_ops:
                if op is self.norm_ops[op].ops[-1]:
                    self._norm(self.norm_ops[op])
            elif op in self.gone_ops:
                each = self.gone_ops[op]
                if op is each.ops[-1]:
                    reading = next(r for r in self.graph.readers(each.entered) if r.op in each.ops)
                    self.origins.known[self.graph.output(op)] = self._read(reading, each.entered)
            elif op not in dead:
                self._ordinary(op)
            for centre in self.behind.get(op, ()):
                self._centre(centre)
        ends = [op for op in self.graph.nodes if isinstance(op, Op) and op.kind == GRAPH_OUTPUT]
        return self.calls, {
            slot: self._read(Read(op, slot), t) for op in ends for slot, t in self.graph.inputs(op).items()
        }

    def _read(self, read: Read, tensor: Tensor) -> object:
        return self.redirected.get(read) or self.origins.of(tensor)

    def _make(self, kind: str, plain: str, reads: dict[str, object]) -> tuple[int, str]:
        self.calls.append((kind, plain, reads))
        return len(self.calls) - 1, "y"

    def _ordinary(self, op: Op) -> None:
        reads = {slot: self._read(Read(op, slot), t) for slot, t in self.graph.inputs(op).items()}
        if op in self.changes.biased:
            reads["bias" if op.kind != "linear" else "c"] = NEW
        for slot, tensor in self.graph.outputs(op).items():
            self.origins.known[tensor] = (len(self.calls), slot)
        if op.owner in self.ours and op.kind in ("rms_norm", "add", "sub", "reduce_mean"):
            self._make(op.kind, "", {slot: each for slot, each in reads.items() if slot != "axes"})
            return
        self._make(op.spelling, "" if NEW in reads.values() else plain_arguments(op.source, {}), reads)

    def _norm(self, each: NormCall) -> None:
        reads = {"x": self._entering(each)}
        if each.heir.weight is not None:
            reads["weight"] = self._parameter(each.heir.weight)
        made = self._make("rms_norm", "", reads)
        if each.heir.bias is not None:
            made = self._make("add", "", {"a": made, "b": self._parameter(each.heir.bias)})
        self.origins.known[each.graft.tensor] = made

    def _entering(self, each: NormCall) -> object:
        tensor = each.entered
        read = next(read for read in self.graph.readers(tensor) if read.op in each.ops)
        return self._read(read, tensor)

    def _parameter(self, numbers: Numbers) -> object:
        return id(self.origins.stored[numbers.kept].tensor) if numbers.kept else NEW

    def _centre(self, each: CentreCall) -> None:
        entered = self.origins.of(each.graft.tensor)
        mean = self._make("reduce_mean", "", {"x": entered})
        made = self._make("sub", "", {"a": entered, "b": mean})
        self.redirected |= dict.fromkeys(each.reads, made)

    def _dead(self) -> set[Op]:
        """Ops that computed something for those alone that are gone."""
        dead: set[Op] = set()
        for op in reversed(self.graph.ops):
            tensors = list(self.graph.outputs(op).values())
            reads = [(read, tensor) for tensor in tensors for read in self.graph.readers(tensor)]
            if op in self.norm_ops or op in self.gone_ops:
                continue
            if reads and all(read.op in dead or self._dropped(read, tensor) for read, tensor in reads):
                dead.add(op)
        return dead

    def _dropped(self, read: Read, tensor: Tensor) -> bool:
        if read.op in self.norm_ops:
            return tensor is not self.norm_ops[read.op].entered
        return read.op in self.gone_ops and tensor is not self.gone_ops[read.op].entered


def _ops_beside(graph: ModelGraph, centres: Sequence[CentreCall], end: int) -> dict[Op, list[CentreCall]]:
    """Each Centre by the first (0) or last (-1) op of its call."""
    found: defaultdict[Op, list[CentreCall]] = defaultdict(list)
    for each in centres:
        found[[op for op in graph.ops if each.call in stack_of(op)][end]].append(each)
    return found


def refused(model: TorchModel, changes: Changes) -> list[Item]:
    """What gives way although the module's code minds. Halves are tried until those that fail are found."""
    items: list[Item] = [*changes.norms, *changes.gone, *changes.centres]
    items += [(op, fold) for op, (fold, _) in changes.biased.items()]
    return _failing(model, changes, _together(items))


def _failing(model: TorchModel, changes: Changes, groups: list[list[Item]]) -> list[Item]:
    items = [item for group in groups for item in group]
    if not items or holds(model, _only(changes, items)):
        return []
    if len(groups) == 1:
        return items
    half = len(groups) // 2
    return [
        *_failing(model, changes, groups[:half]),
        *_failing(model, changes, groups[half:]),
    ] or items


def _together(items: Sequence[Item]) -> list[list[Item]]:
    """All calls of a module give way at once."""
    groups: dict[object, list[Item]] = {}
    for item in items:
        key = item[0].owner if isinstance(item, tuple) else item.path
        groups.setdefault(key, []).append(item)
    return list(groups.values())


def _only(changes: Changes, items: Sequence[Item]) -> Changes:
    chosen = {id(item) for item in items if not isinstance(item, tuple)}
    ops = {item[0] for item in items if isinstance(item, tuple)}
    return Changes(
        [each for each in changes.norms if id(each) in chosen],
        [each for each in changes.gone if id(each) in chosen],
        [each for each in changes.centres if id(each) in chosen],
        biased={op: what for op, what in changes.biased.items() if op in ops},
    )
