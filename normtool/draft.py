"""A graph on which a plan is carried out while it is made.

So that the second fold sees what the first has done: a Conv that took in one BatchNorm takes in another, a
BatchNorm whose predecessor is gone reads what that read. Ops and tensors are those of the original as long as
no edit replaces them; only the edges that edits change are held here, so a draft costs what was changed.
"""

from typing import Any

from normtool.edits import Copy, Edit, Insert, Rebind, Replace, Splice
from normtool.graph import ModelGraph, Op, Read, Role, Tensor
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
        self.made: dict[Op, Op] = {}
        #: what an edit has put in
        self.put_in: dict[Insert | Copy, Op] = {}

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
        while op in self.made:
            op = self.made[op]
        return op

    # ---- edges ------------------------------------------------------------------------

    def _connect(self, op: Op, slot: str, tensor: Tensor | None) -> None:
        """Let `op` read `tensor` at `slot`, or nothing."""
        old = self.input(op, slot) if op in self else None
        self._ins[op] = self.inputs(op) if op in self else {}
        if old is not None:
            self._own_reads(old).pop((op, slot), None)
            del self._ins[op][slot]
        if tensor is not None:
            self._own_reads(tensor)[op, slot] = None
            self._ins[op][slot] = tensor

    def _own_reads(self, tensor: Tensor) -> dict[tuple[Op, str], None]:
        if tensor not in self._reads:
            self._reads[tensor] = {(read.op, read.slot): None for read in self.readers(tensor)}
        return self._reads[tensor]

    def _put(self, op: Op, behind: Op, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
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
        new = Tensor(f"{edit.tensor.name}.{edit.kind}", edit.tensor.scope, Role.ACTIVATION)
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
        new = Tensor(f"{old.name}.copy", old.scope, Role.ACTIVATION, old.dtype, old.shape)
        twin = Op(
            *(f"{op.name}.copy", op.kind, op.scope, op.spelling, op.domain, op.version, op.attributes, edit),
            *(op.owner, op.call),
        )
        self._put(twin, op, self.inputs(op), {"y": new})
        self._connect(reader, edit.slot, new)
        self.put_in[edit] = twin

    def _new_op(self, old: Op, kind: str, attributes: dict[str, Any], source: Any) -> Op:
        same = kind == old.kind and not isinstance(source, Insert)
        spelling, domain = (old.spelling, old.domain) if same else (ROWS[kind].spellings[0].op_type, "")
        return Op(
            *(old.name, kind, old.scope, spelling, domain, old.version, attributes, source),
            *(old.owner, old.call),
        )
