"""Modules whose parallel branches have become one convolution (RepVGG's block, MobileOne's).

Their own code makes the additions, so it is the whole module that gives way: the innermost one whose call holds
all of a sum. In its place comes what it does in front of the branches, the convolution, and what it does behind
the sum, one after the other. That is possible where nothing else flows through it, and where every call of it
comes out alike.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from normtool.constants import Constants
from normtool.edits import Copy, Rebind
from normtool.formats.torch.model import TorchModel, first_paths
from normtool.formats.torch.rest import MergedConv, Rest, Step, stack_of, steps_from
from normtool.formats.torch.tensors import to_tensor, torch_dtype
from normtool.graph import ModelGraph, Op, Role, Tensor
from normtool.planner import Fold
from normtool.proof import Region
from normtool.reasons import Reason
from normtool.values import Value, row_blocks

#: (op, slot) → the constant that the whole plan puts there
Final = Mapping[tuple[Op, str], Value]


@dataclass(frozen=True, eq=False)
class Sum:
    """One sum of branches in the graph as it was: its `ops`, from those that read `entry` to `root`."""

    fold: Fold
    anchor: Op
    root: Op
    ops: frozenset[Op]
    entry: Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """One call of the module `path`: the sums in it, and what it comes to step by step."""

    path: str
    call: str
    sums: tuple[Sum, ...]
    rest: Rest

    @property
    def sources(self) -> frozenset[Any]:
        """All ops that go, by their source, which an op that a fold has put in the place of one has too."""
        return frozenset(op.source for each in self.sums for op in each.ops)

    @property
    def owners(self) -> frozenset[str]:
        return frozenset([self.path, *(op.owner for each in self.sums for op in each.ops)])

    def convs(self) -> list[tuple[Sum, str]]:
        """Each sum, and the name below `path` of the convolution that it becomes."""
        names = [name for name, step in self.rest.named(self.path) if isinstance(step, MergedConv)]
        return list(zip(self.sums, names, strict=True))

    def with_numbers(self, final: Final) -> Rest:
        """The rest with the content that the plan gives to the convolutions."""
        sums = iter(self.sums)
        return replace(self.rest, steps=tuple(_filled(step, sums, final) for step in self.rest.steps))


def _filled(step: Step, sums: Iterator[Sum], final: Final) -> Step:
    if not isinstance(step, MergedConv):
        return step
    anchor = next(sums).anchor
    return replace(step, content=(to_tensor(final[anchor, "weight"]), to_tensor(final[anchor, "bias"])))


def is_merge(fold: Fold) -> bool:
    """Does it turn a sum into one op? (A copied op is judged by a region too.)"""
    return any(isinstance(step, Region) for step in fold.steps) and not any(
        isinstance(edit, Copy) for edit in fold.edits
    )


def blocks_of(model: TorchModel, folds: Sequence[Fold]) -> tuple[list[Block], dict[Fold, Reason]]:
    """What becomes of the modules in which `folds` merge branches; the folds that no module can carry out."""
    assert model.module is not None
    reader = _Reader(model)
    against: dict[Fold, Reason] = {}
    calls: defaultdict[str, list[Sum]] = defaultdict(list)
    for fold in filter(is_merge, folds):
        found = reader.sum_of(fold)
        if isinstance(found, Reason):
            against[fold] = found
        else:
            calls[innermost(found.ops)].append(found)
    blocks: list[Block] = []
    for call, sums in calls.items():
        block = reader.block(call, sums)
        if isinstance(block, Reason):
            against |= {each.fold: block for each in sums}
        else:
            blocks.append(block)
    return blocks, against


def innermost(ops: Iterable[Op]) -> str:
    """The key of the innermost call of a module that all of them lie in; "" where they lie in none."""
    first, *others = [list(stack_of(op)) for op in ops]
    shared = [call for call in first if all(call in other for other in others)]
    return shared[-1] if shared else ""


class _Reader:
    """Reads sums and blocks off a graph that no fold has touched."""

    def __init__(self, model: TorchModel) -> None:
        assert model.module is not None
        self.graph: ModelGraph = model.graph
        self.constants = Constants(model.graph)
        self.state, self.stored = model.state, model.state.by_name()
        self.modules = dict(model.module.named_modules(remove_duplicate=False))
        self.paths = first_paths(model.module)
        self.by_source = {op.source: op for op in model.graph.ops}

    # ---- one sum ----------------------------------------------------------------------

    def sum_of(self, fold: Fold) -> Sum | Reason:
        anchor = next(edit.op for edit in fold.edits if isinstance(edit, Rebind))
        made = next((op for op in (*fold.path, anchor) if op.source not in self.by_source), None)
        if made is not None:
            return Reason("no_module", f"{made.name!r} is not of the module's own code", made.name)
        path = [self.by_source[op.source] for op in fold.path]
        root = path[-1]
        ops = self._with_constants(self._between(path, root))
        entered = self._entered(ops)
        if any(op.source is None for op in ops) or len(entered) != 1:
            return Reason("no_module", f"the branches of {root.name!r} do not read one tensor alone", root.name)
        return Sum(fold, self.by_source[anchor.source], root, frozenset(ops), entered[0])

    def _between(self, path: Iterable[Op], root: Op) -> set[Op]:
        """The ops of a sum, and those between them that earlier folds have taken out."""
        found, pending = {root}, list(path)
        while pending:
            op = pending.pop()
            if op not in found:
                found.add(op)
                pending += self._readers(self.graph.outputs(op).values())
        return found

    def _with_constants(self, ops: set[Op]) -> set[Op]:
        """And those that compute constants for them alone: a layer scale in another shape."""
        pending = list(ops)
        while pending:
            for tensor in self.graph.inputs(pending.pop()).values():
                maker = self.graph.producer(tensor)
                if maker is None or maker in ops or self._flows(tensor):
                    continue
                if self._readers(self.graph.outputs(maker).values()) <= ops:
                    ops.add(maker)
                    pending.append(maker)
        return ops

    # ---- one call of a module -----------------------------------------------------------

    def block(self, call: str, sums: Sequence[Sum]) -> Block | Reason:
        where = sums[0].root.name
        called = stack_of(sums[0].root)[call][0] if call else ""
        path = self.paths.get(called, called)
        if not path:
            return Reason("no_module", "the model itself would have to change its class", where)
        inside = [op for op in self.graph.ops if call in stack_of(op)]
        place = {op: i for i, op in enumerate(inside)}
        sums = sorted(sums, key=lambda each: place[each.root])
        steps = self._steps(call, path, place, sums)
        if isinstance(steps, Reason):
            return steps
        block = Block(path, call, tuple(sums), Rest(steps, whole=True))
        if lost := self._unused(block):
            return Reason("no_module", f"{path!r} holds {lost!r} too, which nothing reads here", where)
        return block

    def _steps(
        self, call: str, path: str, inside: Mapping[Op, int], sums: Sequence[Sum]
    ) -> tuple[Step, ...] | Reason:
        """What it does up to the first sum, the sum, what it does up to the next one, and so on."""
        entered = self._entered(inside)
        if len(entered) != 1:
            return Reason("no_module", f"{path!r} does not read one tensor alone", sums[0].root.name)
        (tensor,) = entered
        left = [op for op in inside if not any(op in each.ops for each in sums)]
        steps: list[Step] = []
        for each in (*sums, None):
            run = [op for op in left if each is None or inside[op] < inside[each.root]]
            left = left[len(run) :]
            more = steps_from(self.graph, tensor, run, call, path, entered=tensor in entered)
            if isinstance(more, Reason):
                return more
            steps += more
            tensor = self.graph.output(run[-1]) if run else tensor
            if each is not None:
                if not self._is_all(each, tensor, inside if tensor in entered else None):
                    message = f"{path!r} does more than its sum with what the branches read or make"
                    return Reason("no_module", message, each.root.name)
                steps.append(self._conv(each.anchor))
                tensor = self.graph.output(each.root)
        return tuple(steps)

    def _is_all(self, each: Sum, tensor: Tensor, inside: Collection[Op] | None) -> bool:
        """Is `tensor` read (`inside`) by the sum alone, and does nothing but its result leave it?"""
        others = self._readers([tensor]) - each.ops
        made = [t for op in each.ops for t in self.graph.outputs(op).values()]
        leaving = [t for t in made if self._readers([t]) - each.ops]
        alone = not (others if inside is None else others & set(inside))
        return alone and each.entry is tensor and leaving in ([], [self.graph.output(each.root)])

    def _conv(self, anchor: Op) -> MergedConv:
        weight, bias = self._parameter(anchor, "weight"), self._parameter(anchor, "bias")
        owner = self.modules[anchor.owner]
        if weight is None:  # computed from others
            tensor = self.graph.input(anchor, "weight")
            assert tensor is not None
            assert tensor.dtype is not None
            others = [*owner.parameters()] or [torch.empty(0)]
            dtype, shape = torch_dtype(tensor.dtype), tuple(int(n or 0) for n in tensor.shape or ())
            weight = torch.empty(shape, dtype=dtype, device=others[0].device)
            weight.requires_grad_(others[0].requires_grad)
        return MergedConv(walk_of(anchor), weight, bias, owner.training)

    def _parameter(self, op: Op, slot: str) -> torch.Tensor | None:
        tensor = self.graph.input(op, slot)
        stored = self.stored.get(tensor.name) if tensor is not None else None
        return stored.tensor if stored is not None else None

    def _unused(self, block: Block) -> str | None:
        """A parameter below the module that neither the sums nor what goes on being called reads."""
        kept = tuple(f"{child}." for child in block.rest.children)
        read = {t.name for each in block.sums for op in each.ops for t in self.graph.inputs(op).values()}
        for stored in self.state.stored:
            below = (name for name in stored.names if name.startswith(f"{block.path}."))
            lost = [name for name in below if not name.startswith(kept)]
            if stored.role is Role.PARAMETER and lost and stored.names[0] not in read:
                return lost[0]
        return None

    # ---- the graph ----------------------------------------------------------------------

    def _entered(self, ops: Iterable[Op]) -> list[Tensor]:
        """What flows into several ops taken together."""
        ops = list(ops)
        made = {tensor for op in ops for tensor in self.graph.outputs(op).values()}
        read = {tensor for op in ops for tensor in self.graph.inputs(op).values()}
        return [tensor for tensor in read - made if self._flows(tensor)]

    def _readers(self, tensors: Iterable[Tensor]) -> set[Op]:
        return {read.op for tensor in tensors for read in self.graph.readers(tensor)}

    def _flows(self, tensor: Tensor) -> bool:
        return isinstance(self.constants.value(tensor), Reason)


def walk_of(conv: Op) -> dict[str, Any]:
    """How a convolution goes over its input, in the words of nn.Conv2d."""
    strides = tuple(conv.attributes["strides"])
    pads = conv.attributes.get("pads") or [0] * len(strides)  # none where nothing is padded ("valid")
    return {
        "stride": strides,
        "padding": tuple(pads[: len(strides)]),
        "dilation": tuple(conv.attributes["dilations"]),
        "groups": conv.attributes["group"],
    }


# ---- several calls ------------------------------------------------------------------------------


def unlike(model: TorchModel, blocks: Sequence[Block], final: Final) -> dict[str, Reason]:
    """Paths of modules whose calls do not all become the same."""
    if not blocks:
        return {}
    assert model.module is not None
    paths = first_paths(model.module)
    gone = {source for block in blocks for source in block.sources}
    calls: defaultdict[str, set[str]] = defaultdict(set)
    for op in model.graph.ops:
        if op.source in gone:  # with its own block, or with one around it
            continue
        for call, (path, _) in stack_of(op).items():
            calls[paths.get(path, path)].add(call)
    by_path: defaultdict[str, list[Block]] = defaultdict(list)
    for block in blocks:
        by_path[block.path].append(block)
    found: dict[str, Reason] = {}
    for path, several in by_path.items():
        first, *others = several
        left = calls[path] - {block.call for block in several}
        if left or not all(_alike(first, other, final) for other in others):
            message = f"{path!r} is also called where its branches do not become the same convolution"
            found[path] = Reason("shared_parameter", message, first.sums[0].root.name)
    return found


def _alike(one: Block, other: Block, final: Final) -> bool:
    return str(one.rest) == str(other.rest) and all(
        same_numbers(final[a.anchor, slot], final[b.anchor, slot])
        for a, b in zip(one.sums, other.sums, strict=True)
        for slot in ("weight", "bias")
    )


def same_numbers(one: Value, other: Value) -> bool:
    return one.shape == other.shape and all(
        np.array_equal(one.rows(start, stop), other.rows(start, stop)) for start, stop in row_blocks(one)
    )
