"""Where the numbers of a rewritten model have gone: key of the original → keys of the result.

Keys are those of a state dict, or the names of ONNX initializers. Only those that the result lacks are listed.
What they held is now

- where the op that reads it reads it: in a block that has become one convolution, under another name;
- where a fold that took that op out has put its own numbers, and in turn wherever these went;
- where the constants are that were computed from it.

What no op reads (the number of batches that a norm has seen) is nowhere: [].
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from normtool.edits import Insert, Rebind, Replace
from normtool.graph import ModelGraph, Op, Role, Tensor
from normtool.planner import Fold, Plan

#: (op of the original, or the edit that has made it, slot) → key of the result.
Places = Mapping[tuple[Any, str], str]

#: Key → every key of the same tensor, the one that the graph knows it by first.
Keys = Mapping[str, tuple[str, ...]]


def key_map(
    graph: ModelGraph, plan: Plan, before: Keys, after: Keys, places: Places, renamed: Mapping[str, str]
) -> dict[str, list[str]]:
    """Every key of `before` that is not in `after` → the keys of what it held.

    `renamed`: keys of tensors that are what they were, under another name.
    """
    trail = _Trail(graph, plan, places)
    tensors = {t.name: t for t in graph.tensors if t.value is not None and t.scope == graph.MAIN}
    found: dict[str, list[str]] = {}
    for key, names in before.items():
        if key not in after:
            tensor = tensors.get(names[0])
            now = list(trail.of(tensor)) if tensor is not None else []
            now = now or [renamed[key]] if key in renamed else now
            found[key] = list(dict.fromkeys(each for name in now for each in after.get(name, ())))
    return found


class _Trail:
    """Follows what an op read through the folds that took the op out."""

    def __init__(self, graph: ModelGraph, plan: Plan, places: Places) -> None:
        self.graph = graph
        self.places = places
        self.ops = {op.source: op for op in graph.ops}
        #: of each fold, in their order: (sources of the ops that it took out, what it has stored)
        self.folds = [(_taken(fold), _stored(fold)) for fold in plan.folds]
        #: of each fold: (source of a norm that stays, slot) of what went forward
        self.moved = [_moved(fold) for fold in plan.folds]

    def of(self, tensor: Tensor) -> Iterator[str]:
        for read in self.graph.readers(tensor):
            yield from self._from(read.op.source, read.slot, 0)

    def _from(self, source: Any, slot: str, start: int) -> Iterator[str]:
        """Where what an op reads at `slot` has gone, the first `start` folds being carried out."""
        for number, (taken, stored) in enumerate(self.folds[start:], start):
            if source in taken or (source, slot) in self.moved[number]:
                for place in stored:
                    yield from self._from(*place, number + 1)
                return
        op = self.ops.get(source)
        if (source, slot) in self.places:
            yield self.places[source, slot]
        elif op is not None and op not in self._in_the_flow:
            for result in self.graph.outputs(op).values():
                for read in self.graph.readers(result):
                    yield from self._from(read.op.source, read.slot, start)

    @cached_property
    def _in_the_flow(self) -> set[Op]:
        """Ops that compute something from the model's inputs. The others compute constants."""
        found: set[Op] = set()
        pending = [tensor for tensor in self.graph.tensors if tensor.role is Role.INPUT]
        while pending:
            reached = {read.op for read in self.graph.readers(pending.pop())} - found
            found |= reached
            pending += [tensor for op in reached for tensor in self.graph.outputs(op).values()]
        return found


def _taken(fold: Fold) -> set[Any]:
    """Sources of the ops that are gone, or have become others."""
    changed = {e.op.source for e in fold.edits if isinstance(e, Replace) and e.kind != e.op.kind}
    return changed | {op.source for op in fold.gone}


def _moved(fold: Fold) -> set[tuple[Any, str]]:
    return {(op.source, slot) for op in fold.moved_from for slot in fold.moved}


def _stored(fold: Fold) -> list[tuple[Any, str]]:
    """(source of the op, slot) of everything that a fold has stored, but for what it left in a norm."""
    found: list[tuple[Any, str]] = []
    for edit in fold.edits:
        match edit:
            case Rebind(op=op, slot=slot):
                found.append((op.source, slot))
            case Replace(op=op, constants=constants):
                found += [(op.source, slot) for slot in constants]
            case Insert(constants=constants):
                found += [(edit, slot) for slot in constants]
    left = _moved(fold)
    return [place for place in found if place not in left]
