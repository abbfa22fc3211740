"""Does a user's module, with its norms gone, do exactly what the plan expects?

What `forward` does is seen only by exporting it. The trial puts the heirs into a structural copy, gives a bias
to the absorbers that lack one, exports that, and compares op by op: the same calls with the same plain
arguments on the same tensors, the spliced ones left out. Numbers play no part in it.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from normtool.edits import Rebind, Splice
from normtool.formats.torch.export import ExportFailed, structural_copy
from normtool.formats.torch.model import TorchModel, read_module
from normtool.formats.torch.rest import Rest, give_way, plain_arguments
from normtool.graph import GRAPH_OUTPUT, ModelGraph, Op, Role, Tensor
from normtool.planner import Fold
from normtool.values import to_array

#: What stands at the slot of a bias that the fold creates.
_NEW = "new"

#: Spelling, plain arguments, and slot → origin of everything a call reads.
_Call = tuple[str, str, dict[str, object]]


def holds(model: TorchModel, folds: Sequence[Fold], heirs: Mapping[str, Rest]) -> bool:
    """Would the module's code, with `heirs` in the places of its norms, do what is left of the graph?"""
    assert model.module is not None
    biased = _new_biases(model, folds)
    try:
        twin = structural_copy(model.module, hooks=False)
    except ExportFailed:
        return False
    fresh = [_give_bias(twin.get_submodule(op.owner)) for op in biased]
    give_way(twin, heirs)
    made = read_module(twin, model.example)
    if made.graph.no_dataflow:
        return False
    spliced = {edit.op: edit.slot for fold in folds for edit in fold.edits if isinstance(edit, Splice)}
    return _flow(model, spliced, biased) == _flow(made, {}, {}, fresh)


def _new_biases(model: TorchModel, folds: Sequence[Fold]) -> dict[Op, str]:
    """Absorber → the slot of the bias that it does not have yet."""
    edits = [edit for fold in folds for edit in fold.edits if isinstance(edit, Rebind)]
    return {edit.op: edit.slot for edit in edits if model.graph.input(edit.op, edit.slot) is None}


def _give_bias(layer: nn.Module) -> torch.Tensor:
    """Zeros, for as many channels as the layer writes."""
    if not isinstance(layer.bias, torch.Tensor):
        channels: int = getattr(layer, "out_channels", 0) or getattr(layer, "out_features", 0)
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        layer.register_parameter("bias", nn.Parameter(weight.new_zeros(channels), requires_grad=False))
    bias: torch.Tensor = layer.bias  # type: ignore[assignment]
    return bias


def _flow(
    model: TorchModel, spliced: Mapping[Op, str], biased: Mapping[Op, str], fresh: Collection[torch.Tensor] = ()
) -> tuple[list[_Call], dict[str, object]]:
    """Every call with the origin of what it reads, and the origin of every output."""
    graph = model.graph
    origins = _Origins(model, fresh)
    calls: list[_Call] = []
    dead = _left_unread(graph, spliced)
    for op in graph.ops:
        if op in dead:
            continue
        reads = {slot: origins.of(tensor) for slot, tensor in graph.inputs(op).items()}
        if op in spliced:
            origins.known[graph.output(op)] = reads[spliced[op]]
            continue
        if op in biased:
            reads[biased[op]] = _NEW
        arguments = "" if _NEW in reads.values() else plain_arguments(op.source, {})
        for slot, tensor in graph.outputs(op).items():
            origins.known[tensor] = (len(calls), slot)
        calls.append((op.spelling, arguments, reads))
    ends = [op for op in graph.nodes if isinstance(op, Op) and op.kind == GRAPH_OUTPUT]
    return calls, {slot: origins.of(t) for op in ends for slot, t in graph.inputs(op).items()}


def _left_unread(graph: ModelGraph, spliced: Mapping[Op, str]) -> set[Op]:
    """Ops that computed something for spliced ones alone: the scale and shift of a frozen BatchNorm."""
    dead: set[Op] = set()
    for op in reversed(graph.ops):
        reads = [read for tensor in graph.outputs(op).values() for read in graph.readers(tensor)]
        gone = [r.op in dead or (r.op in spliced and r.slot != spliced[r.op]) for r in reads]
        if reads and all(gone):
            dead.add(op)
    return dead


class _Origins:
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
            return _NEW if id(stored.tensor) in self.fresh else id(stored.tensor)
        if tensor.role is Role.CONSTANT and tensor.value is not None:
            return repr(to_array(tensor.value))
        return tensor.name
