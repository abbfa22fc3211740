"""Carries out a plan on a ModelProto.

New weights stay what they are in the plan, values to be computed; the proto refers to them by a key
(`wire.PENDING`). So applying a plan costs the same at any model size.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import onnx
from onnx import FunctionProto, GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from normtool.edits import Edit, Rebind, Replace, Splice
from normtool.errors import NormtoolError, StalePlan
from normtool.formats.onnx.model import OnnxModel
from normtool.formats.onnx.read import all_containers, read_skeleton, walk_nodes
from normtool.formats.onnx.wire import PENDING
from normtool.graph import Op, Scope, Tensor
from normtool.ops import ROWS, find_spelling
from normtool.planner import Plan
from normtool.values import Value, byte_count, to_array

Container = GraphProto | FunctionProto

#: New tensors up to this many bytes are put into the proto at once.
INLINE_BYTES = 1 << 16


def apply_plan(model: OnnxModel, plan: Plan) -> OnnxModel:
    """The rewritten model; `model` itself is untouched.

    Raises StalePlan when the plan was made for another model, or for another state of this one.
    """
    if plan.fingerprint != model.fingerprint:
        raise StalePlan("the plan was made for another model; make it again with plan()")
    rewriter = _Rewriter(model)
    if plan.freeze:
        rewriter.freeze()
    for edit in plan.edits:
        rewriter.carry_out(edit)
    rewriter.remove_dead()
    return rewriter.result()


def variant(
    model: OnnxModel,
    values: Mapping[Tensor, Value],
    rebinds: Iterable[Rebind] = (),
    outputs: Iterable[str] = (),
) -> OnnxModel:
    """The model with other numbers in some constants, and more graph outputs.

    `values` replace what stored tensors hold; `rebinds` are for constants that the model computes.
    """
    rewriter = _Rewriter(model)
    for rebind in rebinds:
        rewriter.rebind(rebind)
    for tensor, value in values.items():
        rewriter.replace_stored(tensor, value)
    known = {tensor.name: tensor for tensor in model.graph.tensors if tensor.scope == Scope()}
    for name in outputs:
        rank, dtype = model.graph.rank(known[name]), known[name].dtype
        if rank is None or dtype is None:
            raise NormtoolError(f"{name!r} has no known type and cannot be made an output")
        data_type = helper.np_dtype_to_tensor_dtype(dtype)
        rewriter.main.output.append(helper.make_tensor_value_info(name, data_type, [None] * rank))
    return rewriter.result()


class _Rewriter:
    def __init__(self, model: OnnxModel) -> None:
        self.model = model
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(model.proto)
        self.main = self.proto.graph
        #: a plan may have been made on another reading of the same file, so ops are matched by number
        self.ops = {op.source: op for op in model.graph.ops}
        placed = list(walk_nodes(self.proto))
        self.nodes = [node for _, node in placed]
        self.containers: list[Container] = [container for container, _ in placed]
        self.names = _all_names(self.proto)
        self.pending: dict[str, Value] = {}
        self.displaced: set[str] = set()
        self.vanished: set[str] = set()
        self.removed: set[int] = set()
        # sibling bodies may use one name twice, so a name means something only within its container
        self.producer = {
            (id(container), name): number
            for number, (container, node) in enumerate(placed)
            for name in node.output
        }
        self.stored = _stored(self.main, placed)
        self.container_of = {op.scope: self.containers[op.source] for op in model.graph.ops}
        self.container_of[Scope()] = self.main

    def result(self) -> OnnxModel:
        tensors = self.model.tensors.with_pending(self.pending)
        rewritten = read_skeleton(self.proto, tensors, path=None, file=self.model.file)
        rewritten.external = self.model.external
        if self.model.checked and not rewritten.checked:
            raise NormtoolError(f"the rewritten model fails the ONNX checker: {rewritten.checker_message}")
        return rewritten

    # ---- edits ----------------------------------------------------------------------------

    def carry_out(self, edit: Edit) -> None:
        match edit:
            case Rebind():
                self.rebind(edit)
            case Splice():
                self.splice(edit)
            case Replace():
                self.replace(edit)

    def rebind(self, edit: Rebind) -> None:
        node = self.nodes[edit.op.source]
        position = _slots_of(edit.op.kind, edit.op).index(edit.slot)
        old = node.input[position] if position < len(node.input) else ""
        if old and self._owned_by(edit.op, edit.slot, old):
            container = self.containers[edit.op.source]
            stored = self.stored[id(container), old]
            if tuple(stored.dims) != edit.value.shape:  # rare, and it looks through every value info
                self._restate(container, old, edit.value)
            self.store(stored, old, edit.value)
            return
        self._connect(edit.op, node, position, edit)
        self.displaced.add(old)

    def splice(self, edit: Splice) -> None:
        number = edit.op.source
        node = self.nodes[number]
        entered = node.input[_slots_of(edit.op.kind, edit.op).index(edit.slot)]
        left = node.output[0]
        container = self.containers[number]
        before = self.producer.pop((id(container), entered))
        self.nodes[before].output[list(self.nodes[before].output).index(entered)] = left
        self.producer[id(container), left] = before
        self.vanished.add(entered)
        self.displaced.update(name for name in node.input if name != entered)
        self.removed.add(number)

    def replace(self, edit: Replace) -> None:
        node = self.nodes[edit.op.source]
        old = dict(zip(_slots_of(edit.op.kind, edit.op), node.input, strict=False))
        kept = {new: old[slot] for new, slot in edit.keep.items() if old.get(slot)}
        slots = _slots_of(edit.kind, edit.op)
        self.displaced.update(set(node.input) - set(kept.values()))
        inputs = [kept.get(slot, "") for slot in slots]
        while inputs and not inputs[-1]:
            inputs.pop()
        del node.input[:]
        node.input.extend(inputs)
        if edit.kind != edit.op.kind:
            node.op_type, node.domain = ROWS[edit.kind].spellings[0].op_type, ""
            del node.attribute[:]
        changed = {k: v for k, v in edit.attributes.items() if edit.op.attributes.get(k) != v}
        for attribute in [a for a in node.attribute if a.name in changed]:
            node.attribute.remove(attribute)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in changed.items())
        for slot, rebind in edit.constants.items():
            self._connect(edit.op, node, slots.index(slot), rebind)

    def replace_stored(self, tensor: Tensor, value: Value) -> None:
        """Other numbers for a stored tensor, whoever reads it."""
        container = self.container_of[tensor.scope]
        proto = self.stored.get((id(container), tensor.name))
        if proto is None:  # a Constant node that states a list of floats, or a sparse tensor
            node = self.nodes[self.producer[id(container), tensor.name]]
            del node.attribute[:]
            proto = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t
        self.store(proto, tensor.name, value, inline=isinstance(container, FunctionProto))

    def freeze(self) -> None:
        """Take initializers off the list of graph inputs, so that no caller can override them."""
        if self.proto.ir_version < 4:  # there the list is an obligation and overrides nothing
            return
        stored = {tensor.name for tensor in self.main.initializer}
        _delete_named(self.main.input, stored)

    # ---- constants ------------------------------------------------------------------------

    def _owned_by(self, op: Op, slot: str, name: str) -> bool:
        """Is `name` an initializer that only this slot reads, so that its numbers may change in place?"""
        tensor = self.model.graph.input(self.ops[op.source], slot)
        return (
            tensor is not None
            and tensor.scope == op.scope
            and not tensor.overridable
            and len(self.model.graph.readers(tensor)) == 1
            and (id(self.containers[op.source]), name) in self.stored
        )

    def _connect(self, op: Op, node: NodeProto, position: int, rebind: Rebind) -> None:
        """Feed input `position` from a new constant with a name that no scope uses."""
        name = self._fresh(rebind.name)
        container = self.containers[op.source]
        # before IR version 4 every initializer had to be listed among the inputs; a body's list is not ours
        listed = self.proto.ir_version < 4
        if isinstance(container, GraphProto) and (container is self.main or not listed):
            self.store(container.initializer.add(), name, rebind.value)
            if listed:
                container.input.append(_value_info(name, rebind.value))
        else:
            constant = helper.make_node("Constant", [], [name])
            attribute = constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
            self.store(attribute.t, name, rebind.value, inline=True)
            container.node.insert(0, constant)
        node.input.extend([""] * (position + 1 - len(node.input)))
        node.input[position] = name

    def store(self, tensor: TensorProto, name: str, value: Value, inline: bool = False) -> None:
        """Let `tensor` hold `value`: at once if it is small, else when the model is written."""
        tensor.Clear()
        tensor.name = name
        tensor.dims.extend(value.shape)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(value.dtype)
        if inline or byte_count(value) <= INLINE_BYTES:
            tensor.raw_data = to_array(value).tobytes()
            return
        key = f"{PENDING}{len(self.model.tensors.pending) + len(self.pending)}"
        self.pending[key] = value
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=key)

    def _restate(self, container: Container, name: str, value: Value) -> None:
        """Correct what the graph says of a stored tensor whose shape has changed (Gemm's C may grow)."""
        inputs = container.input if isinstance(container, GraphProto) else ()
        for info in (*inputs, *container.value_info):
            if info.name == name and isinstance(info, ValueInfoProto):
                info.CopyFrom(_value_info(name, value))

    def _fresh(self, wish: str) -> str:
        name, number = wish, 0
        while name in self.names:
            number += 1
            name = f"{wish}_{number}"
        self.names.add(name)
        return name

    # ---- cleaning up ----------------------------------------------------------------------

    def remove_dead(self) -> None:
        """Remove what the edits left unread, and what only that had read. Other dead code is not ours."""
        reads = _count_reads(self.proto, (n for i, n in enumerate(self.nodes) if i not in self.removed))
        makers = {name: i for i, node in enumerate(self.nodes) for name in node.output}
        unread = [name for name in self.displaced if name and not reads[name]]
        dead: set[str] = set()
        while unread:
            name = unread.pop()
            number = makers.get(name)
            if number is None:
                dead.add(name)  # an initializer
                continue
            node = self.nodes[number]
            if number in self.removed or any(reads[output] for output in node.output):
                continue
            self.removed.add(number)
            dead.update(node.output)
            reads.subtract(node.input)
            unread += [read for read in node.input if read and not reads[read]]
        self._delete_nodes()
        self._delete_stored(dead)

    def _delete_nodes(self) -> None:
        gone = {id(self.nodes[number]) for number in self.removed}
        for container in _distinct(self.containers[number] for number in self.removed):
            _delete(container.node, lambda node: id(node) in gone)

    def _delete_stored(self, dead: set[str]) -> None:
        for container in _distinct([self.main, *self.containers]):
            _delete_named(container.value_info, dead | self.vanished)
            if isinstance(container, GraphProto):
                gone = {tensor.name for tensor in container.initializer if tensor.name in dead}
                _delete_named(container.initializer, gone)
                _delete(container.sparse_initializer, lambda sparse: sparse.values.name in dead)
                _delete_named(container.input, gone)


def _stored(
    main: GraphProto, placed: Iterable[tuple[Container, NodeProto]]
) -> dict[tuple[int, str], TensorProto]:
    """(container, name) → the TensorProto that holds the numbers, in an initializer or a Constant node."""
    placed = list(placed)
    found: dict[tuple[int, str], TensorProto] = {}
    for container in _distinct([main, *(container for container, _ in placed)]):
        for tensor in getattr(container, "initializer", ()):
            found[id(container), tensor.name] = tensor
    for container, node in placed:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.HasField("t"):
                found[id(container), node.output[0]] = attribute.t
    return found


def _slots_of(kind: str, op: Op) -> tuple[str, ...]:
    """The input slots of a node: of `op` as it is spelled, or of the kind it turns into."""
    if kind == op.kind and (found := find_spelling(op.domain, op.spelling, op.version)):
        return found[0].slots
    return ROWS[kind].spellings[0].slots


def _distinct(containers: Iterable[Container]) -> list[Container]:
    return list({id(container): container for container in containers}.values())


def _delete(repeated: Any, condemned: Callable[[Any], bool]) -> None:
    """Remove elements in place; rebuilding the list would copy every tensor in it."""
    for index in reversed([i for i, element in enumerate(repeated) if condemned(element)]):
        del repeated[index]


def _delete_named(repeated: Any, names: set[str]) -> None:
    _delete(repeated, lambda element: element.name in names)


def _count_reads(proto: onnx.ModelProto, nodes: Iterable[NodeProto]) -> Counter[str]:
    """How often each name is read, over all scopes together, by nodes and as an output."""
    reads: Counter[str] = Counter(info.name for info in proto.graph.output)
    for function in proto.functions:
        reads.update(function.output)
    for node in nodes:
        reads.update(node.input)
        for attribute in node.attribute:
            reads.update(info.name for info in attribute.g.output)
    return reads


def _value_info(name: str, value: Value) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)


def _all_names(proto: onnx.ModelProto) -> set[str]:
    """Every value name in any scope: a fresh name must shadow none of them."""
    names: set[str] = set()
    for container in all_containers(proto):
        if isinstance(container, GraphProto):
            for group in (container.input, container.output, container.initializer, container.value_info):
                names.update(element.name for element in group)
            names.update(sparse.values.name for sparse in container.sparse_initializer)
        else:
            names.update([container.name, *container.input, *container.output])
        for node in container.node:
            names.update([*node.input, *node.output])
    return names
