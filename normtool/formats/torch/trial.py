"""Does a user's module, with its norms and its branches gone, do exactly what the plan expects?

What `forward` does is seen only by exporting it. The trial puts the heirs into a structural copy, gives a bias
to the absorbers that lack one, exports that, and compares op by op: the same calls with the same plain
arguments on the same tensors, the spliced ones left out, one convolution for each sum of branches. Numbers play
no part in it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from normtool.edits import Rebind, Replace, Splice, consolidated
from normtool.formats.torch.blocks import Block, Sum, walk_of
from normtool.formats.torch.export import ExportFailed, structural_copy
from normtool.formats.torch.model import TorchModel, read_module
from normtool.formats.torch.rest import MergedConv, Rest, Shift, give_way, plain_arguments
from normtool.graph import GRAPH_OUTPUT, ModelGraph, Op, Role, Tensor
from normtool.planner import Fold
from normtool.values import to_array

#: What stands at the slot of a bias that the fold creates.
NEW = "new"

#: Spelling, plain arguments, and slot → origin of everything a call reads.
_Call = tuple[str, str, dict[str, object]]


@dataclass(frozen=True)
class _Changes:
    """What is not as it was in the user's graph."""

    #: op → the slot of what its readers read instead
    spliced: Mapping[Op, str] = field(default_factory=dict)
    #: absorber → the slot of the bias that it does not have yet
    biased: Mapping[Op, str] = field(default_factory=dict)
    #: op that becomes an Add → the slot that goes on feeding it
    shifts: Mapping[Op, str] = field(default_factory=dict)
    #: the last op of each sum that becomes a convolution
    sums: Mapping[Op, Sum] = field(default_factory=dict)


def holds(model: TorchModel, folds: Sequence[Fold], heirs: Mapping[str, Rest], blocks: Sequence[Block]) -> bool:
    """Would the module's code, with `heirs` in the places of its norms and blocks, do what is left to do?"""
    assert model.module is not None
    changes = _changes(model, folds, blocks)
    try:
        twin = structural_copy(model.module, hooks=False)
    except ExportFailed:
        return False
    fresh = [give_bias(twin.get_submodule(op.owner)) for op in changes.biased]
    built = give_way(twin, heirs)
    for path, rest in heirs.items():
        for name, step in rest.named(path):
            if isinstance(step, Shift | MergedConv):
                fresh += built[path].get_submodule(name).parameters()
    made = read_module(twin, model.example)
    if made.graph.no_dataflow:
        return False
    return _flow(model, changes) == _flow(made, _Changes(), fresh)


def _changes(model: TorchModel, folds: Sequence[Fold], blocks: Sequence[Block]) -> _Changes:
    gone = {source for block in blocks for source in block.sources}
    all_edits = [edit for fold in folds for edit in fold.edits]
    edits = [edit for edit in consolidated(all_edits) if isinstance(edit, Splice | Replace)]
    edits = [edit for edit in edits if edit.op.source not in gone]
    originals = {op.source: op for op in model.graph.ops}
    # an op that was put in the place of another, and then taken out
    entries = {edit.op.source: edit.keep for edit in all_edits if isinstance(edit, Replace)}
    spliced = {
        originals[e.op.source]: e.slot if e.op in model.graph.nodes else entries[e.op.source][e.slot]
        for e in edits
        if isinstance(e, Splice)
    }
    return _Changes(
        spliced,
        {op: slot for op, slot in _new_biases(model, folds).items() if op.source not in gone},
        {e.op: e.keep["a"] for e in edits if isinstance(e, Replace)},
        {each.root: each for block in blocks for each in block.sums},
    )


def _new_biases(model: TorchModel, folds: Sequence[Fold]) -> dict[Op, str]:
    """Absorber → the slot of the bias that it does not have yet."""
    all_edits = consolidated(edit for fold in folds for edit in fold.edits)
    edits = [edit for edit in all_edits if isinstance(edit, Rebind) and edit.op in model.graph.nodes]
    return {edit.op: edit.slot for edit in edits if model.graph.input(edit.op, edit.slot) is None}


def give_bias(layer: nn.Module) -> torch.Tensor:
    """Zeros, for as many channels as the layer writes."""
    if not isinstance(layer.bias, torch.Tensor):
        channels: int = getattr(layer, "out_channels", 0) or getattr(layer, "out_features", 0)
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        layer.register_parameter("bias", nn.Parameter(weight.new_zeros(channels), requires_grad=False))
    bias: torch.Tensor = layer.bias  # type: ignore[assignment]
    return bias


def _flow(
    model: TorchModel, changes: _Changes, fresh: Collection[torch.Tensor] = ()
) -> tuple[list[_Call], dict[str, object]]:
    """Every call with the origin of what it reads, and the origin of every output."""
    graph = model.graph
    origins = Origins(model, fresh)
    calls: list[_Call] = []
    gone = {op for each in changes.sums.values() for op in each.ops - {each.root}}
    gone |= _left_unread(graph, {**changes.spliced, **changes.shifts})
    for op in graph.ops:
        if op in gone:
            continue
        if op in changes.spliced:
            origins.known[graph.output(op)] = origins.of(graph.inputs(op)[changes.spliced[op]])
            continue
        for slot, tensor in graph.outputs(op).items():
            origins.known[tensor] = (len(calls), slot)
        calls.append(_call(graph, op, changes, origins))
    ends = [op for op in graph.nodes if isinstance(op, Op) and op.kind == GRAPH_OUTPUT]
    return calls, {slot: origins.of(t) for op in ends for slot, t in graph.inputs(op).items()}


def _call(graph: ModelGraph, op: Op, changes: _Changes, origins: "Origins") -> _Call:
    """An op as it will be."""
    if op in changes.sums:
        conv, entry = changes.sums[op].anchor, changes.sums[op].entry
        walk = walk_of(conv)
        return f"conv{len(walk['stride'])}d", str(walk), {"x": origins.of(entry), "weight": NEW, "bias": NEW}
    reads = {slot: origins.of(tensor) for slot, tensor in graph.inputs(op).items()}
    if op in changes.shifts:
        return "add", "", {"a": reads[changes.shifts[op]], "b": NEW}
    if op in changes.biased:
        reads[changes.biased[op]] = NEW
    if reads.get("weight") == NEW:
        return op.spelling, str(walk_of(op)), reads
    return op.spelling, "" if NEW in reads.values() else plain_arguments(op.source, {}), reads


def _left_unread(graph: ModelGraph, spliced: Mapping[Op, str]) -> set[Op]:
    """Ops that computed something for spliced ones alone: the scale and shift of a frozen BatchNorm."""
    dead: set[Op] = set()
    for op in reversed(graph.ops):
        reads = [read for tensor in graph.outputs(op).values() for read in graph.readers(tensor)]
        gone = [r.op in dead or (r.op in spliced and r.slot != spliced[r.op]) for r in reads]
        if reads and all(gone):
            dead.add(op)
    return dead


class Origins:
    """Where a tensor comes from, in words that mean the same for the module and for its copy."""

    def __init__(self, model: TorchModel, fresh: Collection[torch.Tensor]) -> None:
        self.known: dict[Tensor, object] = {}
        self.stored = model.state.by_name()
        self.fresh = {id(tensor) for tensor in fresh}

    def of(self, tensor: Tensor) -> object:
        if tensor in self.known:
            return self.known[tensor]
        stored = self.stored.get(tensor.name)
        if stored is not None:
            return NEW if id(stored.tensor) in self.fresh else id(stored.tensor)
        if tensor.role is Role.CONSTANT and tensor.value is not None:
            return repr(to_array(tensor.value))
        return tensor.name
