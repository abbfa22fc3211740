"""A graph on which a plan is carried out while it is made.

So that the second fold sees what the first has done: a Conv that took in one BatchNorm takes in another, a
BatchNorm whose predecessor is gone reads what that read. Ops and tensors are those of the original as long as
no edit replaces them; only the edges that edits change are held here, so a draft costs what was changed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from normtool.edits import Copy, Edit, Graft, Insert, Part, Rebind, Replace, Splice
from normtool.graph import ModelGraph, Op, Read, Role, Scope, Shape, Tensor
from normtool.ops import ROWS
from normtool.values import Value


class Draft(ModelGraph):
    """Edits change the draft; the graph it was made from stays as it is."""

    def __init__(self, graph: ModelGraph) -> None:
        super().__init__()
        self.base = graph
        self.calls, self.norm_modules = graph.calls, graph.norm_modules
        self.no_dataflow, self.diagnostics = graph.no_dataflow, graph.diagnostics
        self.called_by_code = graph.called_by_code
        #: ops and tensors whose edges are no longer those of `base`
        self._ins: dict[Op, dict[str, Tensor]] = {}
        self._outs: dict[Op, dict[str, Tensor]] = {}
        self._reads: dict[Tensor, dict[tuple[Op, str], None]] = {}
        self._makers: dict[Tensor, Op] = {}
        #: op that was replaced → the op it has become
        self.heirs: dict[Op, Op] = {}
        self.spliced: set[Op] = set()
        #: ops that edits have made → the op that each was made from, or put behind
        self.made: dict[Op, Op | None] = {}
        #: what an edit has put in
        self.put_in: dict[Insert | Copy | Graft, Op] = {}
        #: the ops of each graft, in the order of its parts; `put_in` has the last
        self.grafted: dict[Graft, tuple[Op, ...]] = {}
        #: (domain, function or "") → opset version of the graph's ops there
        self._versions: dict[tuple[str, str], int] = {}
        self._names: set[str] = set()

    # ---- asking -----------------------------------------------------------------------

    def inputs(self, op: Op) -> dict[str, Tensor]:
        return dict(self._ins[op]) if op in self._ins else self.base.inputs(op)

    def outputs(self, op: Op) -> dict[str, Tensor]:
        return dict(self._outs[op]) if op in self._outs else self.base.outputs(op)

    def input(self, op: Op, slot: str) -> Tensor | None:
        return self._ins[op].get(slot) if op in self._ins else self.base.input(op, slot)

    def producer(self, tensor: Tensor) -> Op | None:
        if tensor in self._makers:
            return self._makers[tensor]
        return self.base.producer(tensor) if tensor in self.base else None

    def readers(self, tensor: Tensor) -> list[Read]:
        if tensor in self._reads:
            return [Read(op, slot) for op, slot in self._reads[tensor]]
        return self.base.readers(tensor) if tensor in self.base else []

    def __contains__(self, node: Op | Tensor) -> bool:
        known = node in self._ins or node in self._reads or node in self._makers
        return (known or node in self.base) and node not in self.spliced and node not in self.heirs

    def living(self) -> list[Op]:
        """Every op that there is now."""
        return [op for op in (*self.base.ops, *self.made) if op not in self.spliced and op not in self.heirs]

    def current(self, op: Op) -> Op | None:
        """What has become of an op: itself, its heir, or None where it is gone."""
        while op in self.heirs:
            op = self.heirs[op]
        return None if op in self.spliced else op

    def origin(self, op: Op) -> Op:
        """The op of the original graph that an op stands for, or behind."""
        while (behind := self.made.get(op)) is not None:
            op = behind
        return op

    # ---- edges ------------------------------------------------------------------------

    def _connect(self, op: Op, slot: str, tensor: Tensor | None) -> None:
        """Let `op` read `tensor` at `slot`, or nothing."""
        if op not in self._ins:
            self._ins[op] = self.base.inputs(op)
        old = self._ins[op].pop(slot, None)
        if old is not None:
            self._own_reads(old).pop((op, slot), None)
        if tensor is not None:
            self._own_reads(tensor)[op, slot] = None
            self._ins[op][slot] = tensor

    def _own_reads(self, tensor: Tensor) -> dict[tuple[Op, str], None]:
        if tensor not in self._reads:
            self._reads[tensor] = {(read.op, read.slot): None for read in self.readers(tensor)}
        return self._reads[tensor]

    def _put(self, op: Op, behind: Op | None, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        self.made[op] = behind
        self._ins[op], self._outs[op] = {}, dict(outputs)
        for slot, tensor in inputs.items():
            self._connect(op, slot, tensor)
        for tensor in outputs.values():
            self._makers[tensor] = op

    def _disconnect(self, op: Op) -> None:
        for slot in self.inputs(op):
            self._connect(op, slot, None)

    # ---- edits ------------------------------------------------------------------------

    def carry_out(self, edit: Edit) -> None:
        match edit:
            case Rebind():
                self._bind(self._living(edit.op), edit.slot, edit.value, edit.name)
            case Splice():
                self._splice(edit)
            case Replace():
                self._replace(edit)
            case Insert():
                self._insert(edit)
            case Copy():
                self._copy(edit)
            case Graft():
                self._graft(edit)

    def _living(self, op: Op) -> Op:
        found = self.current(op)
        assert found is not None, f"{op.name!r} was taken out before"
        return found

    def _bind(self, op: Op, slot: str, value: Value, name: str) -> None:
        self._connect(op, slot, Tensor(name, op.scope, Role.CONSTANT, value.dtype, value.shape, value))

    def _splice(self, edit: Splice) -> None:
        op = self._living(edit.op)
        entered = self.input(op, edit.slot)
        assert entered is not None
        self._read_instead(self.output(op), entered)
        others = [tensor for tensor in self.inputs(op).values() if tensor is not entered]
        self._take_out(op)
        for tensor in others:
            self._forget_unread(tensor)

    def _take_out(self, op: Op) -> None:
        self._disconnect(op)
        self.spliced.add(op)

    def _forget_unread(self, tensor: Tensor) -> None:
        """What a spliced op alone has read goes with it, and what only that had read."""
        pending = [tensor]
        while pending:
            op = self.producer(pending.pop())
            if op is None or op in self.spliced or any(self.readers(t) for t in self.outputs(op).values()):
                continue
            pending += self.inputs(op).values()
            self._take_out(op)

    def _read_instead(self, old: Tensor, new: Tensor) -> None:
        for read in self.readers(old):
            self._connect(read.op, read.slot, new)

    def _replace(self, edit: Replace) -> None:
        op = self._living(edit.op)
        inputs, outputs = self.inputs(op), self.outputs(op)
        self._disconnect(op)
        heir = self._new_op(op, edit.kind, dict(edit.attributes), op.source)
        kept = {new: inputs[old] for new, old in edit.keep.items() if old in inputs}
        self._put(heir, op, kept, outputs if edit.kind == op.kind else {"y": outputs["y"]})
        self.heirs[op] = heir
        for slot, rebind in edit.constants.items():
            self._bind(heir, slot, rebind.value, rebind.name)

    def _insert(self, edit: Insert) -> None:
        new = Tensor(f"{edit.tensor.name}.{edit.kind}", edit.tensor.scope, source=edit)
        new.dtype, new.shape = edit.tensor.dtype, edit.tensor.shape
        self._read_instead(edit.tensor, new)
        op = self._new_op(edit.behind, edit.kind, dict(edit.attributes), edit)
        self._put(op, edit.behind, {edit.slot: edit.tensor}, {"y": new})
        self.put_in[edit] = op
        for slot, rebind in edit.constants.items():
            self._bind(op, slot, rebind.value, rebind.name)

    def _copy(self, edit: Copy) -> None:
        op, reader = self._living(edit.op), self._living(edit.reader)
        old = self.input(reader, edit.slot)
        assert old is not None
        new = Tensor(f"{old.name}.copy", old.scope, Role.ACTIVATION, old.dtype, old.shape, source=edit)
        twin = Op(
            *(f"{op.name}.copy", op.kind, op.scope, op.spelling, op.domain, op.version, op.attributes, edit),
            *(op.owner, op.call),
        )
        self._put(twin, op, self.inputs(op), {"y": new})
        self._connect(reader, edit.slot, new)
        self.put_in[edit] = twin

    def _graft(self, edit: Graft) -> None:
        everyone = self.readers(edit.tensor)  # before the parts are
        readers = everyone if edit.readers is None else edit.readers
        maker = self.producer(edit.tensor)
        behind = maker or next((read.op for read in everyone), None)
        made: list[Op] = []
        for number, part in enumerate(edit.parts):
            found = {
                slot: self.output(made[source]) if isinstance(source, int) else source
                for slot, source in part.inputs.items()
            }
            result = self._result_of(edit, number, part, found)
            op = self._part(edit, number, maker)
            self._put(op, behind, found, {"y": result})
            for slot, (name, value) in part.constants.items():
                self._bind(op, slot, value, name)
            made.append(op)
        for read in readers:
            self._connect(self._living(read.op), read.slot, self.output(made[-1]))
        self.grafted[edit], self.put_in[edit] = tuple(made), made[-1]
        self._forget_unread(edit.tensor)

    def _result_of(self, edit: Graft, number: int, part: Part, inputs: Mapping[str, Tensor]) -> Tensor:
        name = self._unused(f"{edit.tensor.name}.{part.kind}")
        new = Tensor(name, edit.tensor.scope, dtype=edit.tensor.dtype, source=(edit, number))
        if number == len(edit.parts) - 1:
            new.shape = edit.tensor.shape
            return new
        first = next(iter(inputs.values()), edit.tensor)
        new.dtype = np.dtype(part.attributes["to"]) if part.kind == "cast" else first.dtype or new.dtype
        new.shape = _reduced(part, first.shape) if part.kind.startswith("reduce_") else first.shape
        return new

    def _part(self, edit: Graft, number: int, maker: Op | None) -> Op:
        part, scope = edit.parts[number], edit.tensor.scope
        first = ROWS[part.kind].spellings[0]
        spelling, domain = (part.op_type, part.domain) if part.op_type else (first.op_type, first.domain)
        name = self._unused(f"{edit.tensor.name}.{part.kind}.op")
        owner, call = (maker.owner, maker.call) if maker is not None else ("", 0)
        version = self._version(domain, scope)
        attributes = dict(part.attributes)
        return Op(name, part.kind, scope, spelling, domain, version, attributes, (edit, number), owner, call)

    def _unused(self, wish: str) -> str:
        name, number = wish, 0
        while name in self._names:
            number += 1
            name = f"{wish}_{number}"
        self._names.add(name)
        return name

    def _version(self, domain: str, scope: Scope) -> int:
        """The opset of a domain in the main graph or in a function, by the ops that are there."""
        place = scope.path[0] if scope.function else ""
        if not self._versions:
            for op in self.base.ops:
                inside = op.scope.path[0] if op.scope.function else ""
                self._versions.setdefault((op.domain, inside), op.version)
        return self._versions.get((domain, place), 1)

    def _new_op(self, old: Op, kind: str, attributes: dict[str, Any], source: Any) -> Op:
        same = kind == old.kind and not isinstance(source, Insert)
        spelling, domain = (old.spelling, old.domain) if same else (ROWS[kind].spellings[0].op_type, "")
        return Op(
            *(old.name, kind, old.scope, spelling, domain, old.version, attributes, source),
            *(old.owner, old.call),
        )


def _reduced(part: Part, shape: Shape | None) -> Shape | None:
    """The shape behind a reduction, where its axes are known."""
    axes = part.attributes.get("axes")
    if shape is None or axes is None:
        return None
    gone = {axis % len(shape) for axis in axes}
    if part.attributes.get("keepdims", 1):
        return tuple(1 if axis in gone else length for axis, length in enumerate(shape))
    return tuple(length for axis, length in enumerate(shape) if axis not in gone)
