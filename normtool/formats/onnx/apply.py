"""Carries out a plan on a ModelProto.

New weights stay what they are in the plan, values to be computed; the proto refers to them by a key
(`wire.PENDING`). So applying a plan costs the same at any model size.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import FunctionProto, GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from normtool.edits import Copy, Edit, Graft, Insert, Part, Rebind, Replace, Splice
from normtool.errors import NormtoolError, StalePlan
from normtool.formats.onnx.model import OnnxModel
from normtool.formats.onnx.read import all_containers, checker_message, read_skeleton, walk_nodes
from normtool.formats.onnx.wire import PENDING
from normtool.graph import GRAPH_OUTPUT, Op, Read, Scope, Tensor
from normtool.ops import ATEN, MICROSOFT, ROWS, find_spelling
from normtool.planner import Plan
from normtool.values import Dense, Value, byte_count, to_array

Container = GraphProto | FunctionProto

#: (id of a graph or function, name): siblings may use one name twice.
Key = tuple[int, str]

#: What reads a tensor: (number of a node, which input), or (graph or function, which output).
Place = tuple[int | Container, int]

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
    places = rewriter.places(plan.edits)
    rewriter.remove_dead()
    result = rewriter.result()
    result.places = places
    return result


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
        #: id of a body → the body, and the id of what its node lies in
        self.around = dict(_bodies(placed))
        bodies = [body for body, _ in self.around.values()]
        #: every graph and function; held here, so that each has one id as long as this lives
        self.all: list[Container] = _distinct([self.main, *bodies, *self.proto.functions])
        #: what an edit has put in, as `Op.source` names it → its number among the nodes
        self.inserted: dict[Any, int] = {}
        #: what the parts of grafts read
        self.grafted: set[Key] = set()
        self.names = _all_names(self.proto)
        self.pending: dict[str, Value] = {}
        #: (id of a graph or function, value) → the constant that was made for it
        self.stored_already: dict[tuple[int, Value], str] = {}
        # sibling bodies may use one name twice, so a name means something only within its container
        self.displaced: set[Key] = set()
        self.vanished: set[Key] = set()
        self.removed: set[int] = set()
        self.producer = {
            (id(container), name): number
            for number, (container, node) in enumerate(placed)
            for name in node.output
        }
        self.reads: defaultdict[tuple[int, str], set[int]] = defaultdict(set)
        for number, (container, node) in enumerate(placed):
            for name in node.input:
                self.reads[id(container), name].add(number)
        #: names that mean something beyond the nodes of their own graph: its outputs, and what bodies capture
        self.exposed = self._exposed()
        self.stored = _stored(self.main, placed)
        self.container_of = {op.scope: self.containers[op.source] for op in model.graph.ops}
        self.container_of[Scope()] = self.main

    def result(self) -> OnnxModel:
        tensors = self.model.tensors.with_pending(self.pending)
        rewritten = read_skeleton(self.proto, tensors, path=None, file=self.model.file)
        rewritten.external = self.model.external
        if self.model.checked and not rewritten.checked and not _is_accepted_by_runtime(self.proto):
            raise NormtoolError(f"the rewritten model fails the ONNX checker: {rewritten.checker_message}")
        return rewritten

    def places(self, edits: Iterable[Edit]) -> dict[tuple[Any, str], str]:
        """(number of the op, or the edit that made it, slot) → the constant that the edits have put there."""
        found: dict[tuple[Any, str], str] = {}
        for edit in edits:
            match edit:
                case Rebind(op=op, slot=slot):
                    found[op.source, slot] = self.nodes[self._number(op)].input[_position(op, slot)]
                case Replace(op=op, kind=kind):
                    slots, inputs = _slots_of(kind, op), self.nodes[self._number(op)].input
                    found |= {(op.source, slot): inputs[slots.index(slot)] for slot in edit.constants}
                case Insert(kind=kind):
                    slots, inputs = ROWS[kind].spellings[0].slots, self.nodes[self.inserted[edit]].input
                    found |= {(edit, slot): inputs[slots.index(slot)] for slot in edit.constants}
                case Graft(parts=parts):
                    for i, part in enumerate(parts):
                        number = self.inserted[edit, i]
                        slots = self._slots_of_part(part, self.containers[number])
                        inputs = self.nodes[number].input
                        found |= {((edit, i), slot): inputs[slots.index(slot)] for slot in part.constants}
        return found

    # ---- edits ----------------------------------------------------------------------------

    def carry_out(self, edit: Edit) -> None:
        match edit:
            case Rebind():
                self.rebind(edit)
            case Splice():
                self.splice(edit)
            case Replace():
                self.replace(edit)
            case Insert():
                self.insert(edit)
            case Copy():
                self.copy(edit)
            case Graft():
                self.graft(edit)

    def _number(self, op: Op) -> int:
        """The node an op stands for."""
        number: int = self.inserted.get(op.source, op.source)
        return number

    def rebind(self, edit: Rebind) -> None:
        number = self._number(edit.op)
        node = self.nodes[number]
        position = _position(edit.op, edit.slot)
        old = node.input[position] if position < len(node.input) else ""
        if old and self._owned_by(edit.op, edit.slot, old):
            container = self.containers[number]
            stored = self.stored[id(container), old]
            if tuple(stored.dims) != edit.value.shape:  # rare, and it looks through every value info
                self._restate(container, old, edit.value)
            self.store(stored, old, edit.value)
            return
        self._connect(number, position, edit.name, edit.value)
        self.displaced.add((id(self.containers[number]), old))

    def splice(self, edit: Splice) -> None:
        """Its output's name outlives it if that is how the graph puts it out, or if nobody else reads its
        input."""
        number = self._number(edit.op)
        node, here = self.nodes[number], id(self.containers[number])
        entered = here, node.input[_position(edit.op, edit.slot)]
        left = here, node.output[0]
        before = self.producer.get(entered)
        self._unread(number)
        self.displaced.update((here, name) for name in node.input if name != entered[1])
        if left in self.exposed and (before is None or entered in self.exposed):  # both names have to stay
            self.reads[entered].add(number)
            node.CopyFrom(helper.make_node("Identity", [entered[1]], [left[1]], node.name))
            return
        self.removed.add(number)
        alone = before is not None and entered not in self.exposed and not self.reads[entered]
        if left in self.exposed or alone:
            assert before is not None
            outputs = self.nodes[before].output
            outputs[list(outputs).index(entered[1])] = left[1]
            self.producer[left] = self.producer.pop(entered)
            self.vanished.add(entered)
            self._redirect(entered, left)
        else:
            self.producer.pop(left)
            self.vanished.add(left)
            self._redirect(left, entered)

    def _redirect(self, old: Key, new: Key) -> None:
        for number in self.reads.pop(old, set()):
            inputs = self.nodes[number].input
            for position, name in enumerate(inputs):
                if name == old[1]:
                    inputs[position] = new[1]
            self.reads[new].add(number)

    def _unread(self, number: int) -> None:
        for name in self.nodes[number].input:
            self.reads[id(self.containers[number]), name].discard(number)

    def replace(self, edit: Replace) -> None:
        number = self._number(edit.op)
        node = self.nodes[number]
        old = dict(zip(_slots_of(edit.op.kind, edit.op), node.input, strict=False))
        kept = {new: old[slot] for new, slot in edit.keep.items() if old.get(slot)}
        slots = _slots_of(edit.kind, edit.op)
        self._unread(number)
        here = id(self.containers[number])
        self.displaced.update((here, name) for name in set(node.input) - set(kept.values()))
        inputs = [kept.get(slot, "") for slot in slots]
        while inputs and not inputs[-1]:
            inputs.pop()
        del node.input[:]
        node.input.extend(inputs)
        for name in inputs:
            self.reads[here, name].add(number)
        if edit.kind != edit.op.kind:
            node.op_type, node.domain = ROWS[edit.kind].spellings[0].op_type, ""
            del node.attribute[:]
            del node.output[1:]
        changed = {k: v for k, v in edit.attributes.items() if edit.op.attributes.get(k) != v}
        for attribute in [a for a in node.attribute if a.name in changed]:
            node.attribute.remove(attribute)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in changed.items())
        for slot, rebind in edit.constants.items():
            self._connect(number, slots.index(slot), rebind.name, rebind.value)

    def insert(self, edit: Insert) -> None:
        """The new op puts out the old name, so that readers, outputs and bodies find it."""
        behind = self._number(edit.behind)
        maker, container = self.nodes[behind], self.containers[behind]
        spelling = ROWS[edit.kind].spellings[0]
        position = list(self.graph_outputs(edit.behind)).index(edit.tensor)
        name = maker.output[position]
        maker.output[position] = self._fresh(f"{name}.raw")
        node = helper.make_node(
            spelling.op_type,
            [""] * (1 + len(edit.constants)),
            [name],
            self._fresh(f"{name}.{edit.kind}"),
            **edit.attributes,
        )
        node.input[spelling.slots.index(edit.slot)] = maker.output[position]
        self.producer[id(container), maker.output[position]] = behind
        number = self._put_behind(behind, container, node, edit)
        for slot, rebind in edit.constants.items():
            self._connect(number, spelling.slots.index(slot), rebind.name, rebind.value)

    def copy(self, edit: Copy) -> None:
        """The same node once more; the reader gets its output."""
        number, reader = self._number(edit.op), self.nodes[self._number(edit.reader)]
        node = NodeProto()
        node.CopyFrom(self.nodes[number])
        node.name = self._fresh(f"{node.name}.copy")
        del node.output[:]
        node.output.append(self._fresh(f"{self.nodes[number].output[0]}.copy"))
        position = _position(edit.reader, edit.slot)
        key = id(self.containers[number])
        self._unread(self._number(edit.reader))
        reader.input[position] = node.output[0]
        for name in reader.input:
            self.reads[key, name].add(self._number(edit.reader))
        self._put_behind(number, self.containers[number], node, edit)

    def _put_behind(self, behind: int | None, container: Container, node: NodeProto, source: Any) -> int:
        """A new node, listed right behind another one, or first; returns its number."""
        place = 0
        if behind is not None:
            maker = self.nodes[behind]
            place = 1 + next(i for i, each in enumerate(container.node) if each is maker)
        container.node.insert(place, node)
        self.nodes.append(container.node[place])
        self.containers.append(container)
        self.inserted[source] = number = len(self.nodes) - 1
        for name in node.input:
            self.reads[id(container), name].add(number)
        for name in node.output:
            self.producer[id(container), name] = number
        return number

    # ---- grafts ---------------------------------------------------------------------------

    def graft(self, edit: Graft) -> None:
        container, name = self._whereabouts(edit.tensor)
        if edit.readers is None:
            places = list(self._readers_of(container, name))
        else:
            places = [self._place_of(read) for read in edit.readers]
        last = self._put_parts(edit, container, name)
        for holder, position in places:
            if holder is self.main:
                self._take_name(position, last)
        for holder, position in places:
            if holder is not self.main:
                self._read_at(holder, position, container, self.nodes[last].output[0])
        container, name = self._whereabouts(edit.tensor)
        self.displaced.add((id(container), name))

    def _whereabouts(self, tensor: Tensor) -> tuple[Container, str]:
        """Where a tensor is made or stored, and what it is called by now."""
        number, position = self.inserted.get(tensor.source), 0
        if number is None:
            graph = self.model.graph
            own = tensor if tensor in graph.nodes else self._tensors[tensor.scope, tensor.name]
            maker = graph.producer(own)
            if maker is None:
                return self.container_of[own.scope], own.name
            number = maker.source
            position = list(self._original_nodes[number].output).index(own.name)
        return self.containers[number], self.nodes[number].output[position]

    @cached_property
    def _tensors(self) -> dict[tuple[Scope, str], Tensor]:
        return {(tensor.scope, tensor.name): tensor for tensor in self.model.graph.tensors}

    @cached_property
    def _original_nodes(self) -> list[NodeProto]:
        return [node for _, node in walk_nodes(self.model.proto)]

    def _readers_of(self, container: Container, name: str) -> Iterator[Place]:
        """Every place that reads a tensor, in bodies that capture it and among outputs too."""
        key = id(container), name
        far = key in self.exposed  # else only nodes of the same graph can read it
        owner = self._owners() if far else lambda place, read: (place, read)
        for number in range(len(self.nodes)) if far else sorted(self.reads[key]):
            if number not in self.removed:
                here, inputs = id(self.containers[number]), enumerate(self.nodes[number].input)
                yield from ((number, i) for i, read in inputs if read == name and owner(here, read) == key)
        for each in self.all if far else ():
            outputs = enumerate(_names(each.output))
            yield from ((each, i) for i, read in outputs if read == name and owner(id(each), read) == key)

    def _place_of(self, read: Read) -> Place:
        stem, _, position = read.slot.rpartition(".")
        if read.op.kind == GRAPH_OUTPUT:
            return self.container_of[read.op.scope], int(position)
        number = self._number(read.op)
        for attribute in self.nodes[number].attribute:
            if attribute.name == stem and attribute.HasField("g"):
                return attribute.g, int(position)
        return number, _position(read.op, read.slot)

    def _read_at(self, holder: int | Container, position: int, container: Container, name: str) -> None:
        """Let one place read `name`, which lies in `container`."""
        if isinstance(holder, int):
            inputs, here = self.nodes[holder].input, self.containers[holder]
            self._unread(holder)
            inputs[position] = name
            for each in inputs:
                self.reads[id(here), each].add(holder)
            if here is container:
                return
        elif isinstance(holder, FunctionProto):
            holder.output[position] = name
        else:
            holder.output[position].name = name
        self.exposed.add((id(container), name))

    def _take_name(self, position: int, number: int) -> None:
        """Let a node put out the graph output at `position`.

        Whoever else reads that goes on reading what it was.
        """
        name = self.main.output[position].name
        before = self.producer.get((id(self.main), name))
        if before is None:
            raise NormtoolError(f"output {name!r} is an input or a stored tensor and cannot become another")
        readers = [place for place in self._readers_of(self.main, name) if place[0] is not self.main]
        raw, old = self._fresh(f"{name}.raw"), self.nodes[number].output[0]
        outputs = self.nodes[before].output
        outputs[list(outputs).index(name)] = raw
        self.nodes[number].output[0] = name
        del self.producer[id(self.main), old]
        self.producer |= {(id(self.main), raw): before, (id(self.main), name): number}
        for holder, i in readers:
            self._read_at(holder, i, self.main, raw)
        self.displaced.add((id(self.main), raw))

    def _put_parts(self, edit: Graft, container: Container, name: str) -> int:
        """The nodes of a graft, listed behind what they read; returns the number of the last."""
        known = [t for part in edit.parts for t in part.inputs.values() if isinstance(t, Tensor)]
        keys = [(id(holder), read) for holder, read in map(self._source_of, known) if holder is container]
        makers = {
            id(self.nodes[self.producer[key]]): self.producer[key] for key in keys if key in self.producer
        }
        listed = [makers[id(node)] for node in container.node if id(node) in makers]
        behind = listed[-1] if listed else None
        for number, part in enumerate(edit.parts):
            behind = self._put_part(edit, number, part, container, f"{name}.{part.kind}", behind)
        assert behind is not None
        return behind

    def _source_of(self, tensor: Tensor) -> tuple[Container | None, str]:
        """`_whereabouts`; nowhere for a constant that an edit has bound."""
        bound = tensor.value is not None and (tensor.scope, tensor.name) not in self._tensors
        return (None, "") if bound else self._whereabouts(tensor)

    def _put_part(
        self, edit: Graft, index: int, part: Part, container: Container, wish: str, behind: int | None
    ) -> int:
        op_type, domain = _spelling_of(part)
        self._import(domain, container)
        slots = self._slots_of_part(part, container)
        stated = {name: _stated(value) for name, value in part.attributes.items() if name not in slots}
        node = helper.make_node(op_type, [], [self._fresh(wish)], self._fresh(f"{wish}.node"), **stated)
        node.domain = domain
        constants = dict(part.constants)
        for slot, source in part.inputs.items():
            if isinstance(source, int):
                _feed(node, _slot_position(slots, slot), self.nodes[self.inserted[edit, source]].output[0])
                continue
            holder, read = self._source_of(source)
            if holder is None:
                assert source.value is not None
                constants[slot] = source.name, source.value
                continue
            _feed(node, _slot_position(slots, slot), read)
            self.grafted.add((id(holder), read))
            if holder is not container:
                self.exposed.add((id(holder), read))
        number = self._put_behind(behind, container, node, (edit, index))
        for name in set(part.attributes) & set(slots):  # an attribute once, an input since
            constants[name] = f"{wish}.{name}", Dense(np.array(part.attributes[name], np.int64))
        for slot, (name, value) in constants.items():
            self._connect(number, _slot_position(slots, slot), name, value)
        return number

    def _slots_of_part(self, part: Part, container: Container) -> tuple[str, ...]:
        op_type, domain = _spelling_of(part)
        found = find_spelling(domain, op_type, self._versions(container).get(domain, 1))
        return found[0].slots if found else ROWS[part.kind].spellings[0].slots

    def _imports(self, container: Container) -> Any:
        """The opsets that a container is written in: the model's, or the function's that it lies in."""
        place = id(container)
        while place in self.around:
            place = self.around[place][1]
        return next((f for f in self.proto.functions if id(f) == place), self.proto).opset_import

    def _versions(self, container: Container) -> dict[str, int]:
        return {e.domain.removeprefix("ai.onnx"): e.version for e in self._imports(container)}

    def _import(self, domain: str, container: Container) -> None:
        """Say that nodes of `domain` occur there, if nothing has said so yet."""
        for imports, known in (
            (self.proto.opset_import, self._versions(self.main)),
            (self._imports(container), self._versions(container)),
        ):
            if domain not in known and domain not in (each.domain for each in imports):
                imports.add(domain=domain, version=self._versions(self.main).get(domain, 1))

    def graph_outputs(self, op: Op) -> list[Tensor]:
        return list(self.model.graph.outputs(self.ops[op.source]).values())

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
        original = self.ops.get(op.source)
        tensor = self.model.graph.input(original, slot) if original is not None else None
        return (
            tensor is not None
            and tensor.scope == op.scope
            and not tensor.overridable
            and len(self.model.graph.readers(tensor)) == 1
            and tensor.name == name
            and (id(self.containers[op.source]), name) in self.stored.keys() - self.grafted
        )

    def _connect(self, number: int, position: int, wish: str, value: Value) -> None:
        """Feed an input of a node from a new constant with a name that no scope uses.

        One value that several edits hold is stored once.
        """
        container = self.containers[number]
        if (id(container), value) in self.stored_already:
            _feed(self.nodes[number], position, self.stored_already[id(container), value])
            return
        name = self._fresh(wish)
        self.stored_already[id(container), value] = name
        # before IR version 4 every initializer had to be listed among the inputs; a body's list is not ours
        listed = self.proto.ir_version < 4
        if isinstance(container, GraphProto) and (container is self.main or not listed):
            self.store(container.initializer.add(), name, value)
            if listed:
                container.input.append(_value_info(name, value))
        else:
            constant = helper.make_node("Constant", [], [name])
            attribute = constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
            self.store(attribute.t, name, value, inline=True)
            container.node.insert(0, constant)
            self.nodes.append(container.node[0])
            self.containers.append(container)
        _feed(self.nodes[number], position, name)

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
        owner = self._owners()
        reads = Counter(owner(*key) for key in self._all_reads())
        left = [(i, node) for i, node in enumerate(self.nodes) if i not in self.removed]
        makers = {(id(self.containers[i]), name): i for i, node in left for name in node.output}
        unread = [owner(*key) for key in self.displaced if key[1]]
        dead: set[Key] = set()
        while unread:
            key = unread.pop()
            if reads[key] or key in dead:
                continue
            number = makers.get(key)
            if number is None:
                dead.add(key)  # an initializer
                continue
            node, here = self.nodes[number], id(self.containers[number])
            if number in self.removed or any(reads[here, output] for output in node.output):
                continue
            self.removed.add(number)
            dead.update((here, output) for output in node.output)
            inputs = [owner(here, name) for name in node.input if name]
            reads.subtract(inputs)
            unread += inputs
        self._delete_nodes()
        self._delete_stored(dead)

    def _owners(self) -> Callable[[int, str], Key]:
        """Whose name is read in a container: its own, or that of the next one around it that has it."""
        own = {id(container): set(_stated_names(container)) for container in self.all}
        for number, node in enumerate(self.nodes):
            own[id(self.containers[number])].update(node.output)

        def owner(here: int, name: str) -> Key:
            place = here
            while name not in own[place] and place in self.around:
                place = self.around[place][1]
            return place, name

        return owner

    def _all_reads(self) -> Iterator[Key]:
        """(where, name) of every reading: by a node that stays, or as an output."""
        for number, node in enumerate(self.nodes):
            if number not in self.removed:
                yield from ((id(self.containers[number]), name) for name in node.input if name)
        yield from self._all_outputs()

    def _all_outputs(self) -> Iterator[Key]:
        for container in self.all:
            yield from ((id(container), name) for name in _names(container.output))

    def _exposed(self) -> set[Key]:
        """Outputs of every graph and function, and names that a body reads from outside."""
        owner = self._owners()
        captured = {key for each in self._all_reads() if (key := owner(*each)) != each}
        return captured | {owner(*each) for each in self._all_outputs()}

    def _delete_nodes(self) -> None:
        gone = {id(self.nodes[number]) for number in self.removed}
        for container in _distinct(self.containers[number] for number in self.removed):
            _delete(container.node, lambda node: id(node) in gone)

    def _delete_stored(self, dead: set[Key]) -> None:
        for container in self.all:
            unread = {name for place, name in dead if place == id(container)}
            vanished = {name for place, name in self.vanished if place == id(container)}
            _delete_stored(container, unread, vanished)


def _delete_stored(container: Container, dead: set[str], vanished: set[str]) -> None:
    _delete_named(container.value_info, dead | vanished)
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


def _bodies(
    placed: Iterable[tuple[Container, NodeProto]],
) -> Iterator[tuple[int, tuple[GraphProto, int]]]:
    """Of every body its id, itself, and the id of the graph or function that its node lies in."""
    for container, node in placed:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                body = attribute.g
                yield id(body), (body, id(container))


def _stated_names(container: Container) -> Iterator[str]:
    """Inputs and initializers."""
    yield from _names(container.input)
    if isinstance(container, GraphProto):
        yield from _names(container.initializer)
        yield from (sparse.values.name for sparse in container.sparse_initializer)


def _names(repeated: Iterable[Any]) -> Iterator[str]:
    """A function lists names, a graph what has one."""
    return (each if isinstance(each, str) else each.name for each in repeated)


def _slots_of(kind: str, op: Op) -> tuple[str, ...]:
    """The input slots of a node: of `op` as it is spelled, or of the kind it turns into."""
    if kind not in ROWS:
        return ("in*",)
    if kind == op.kind and (found := find_spelling(op.domain, op.spelling, op.version)):
        return found[0].slots
    return ROWS[kind].spellings[0].slots


def _position(op: Op, slot: str) -> int:
    return _slot_position(_slots_of(op.kind, op), slot)


def _slot_position(slots: tuple[str, ...], slot: str) -> int:
    """Where the inputs of a node have a slot: `inputs.2` of a Concat is the third of its `inputs*`."""
    stem, _, number = slot.rpartition(".")
    if stem == "extra":  # beyond all that the table knows
        return int(number)
    return slots.index(f"{stem}*") + int(number) if stem else slots.index(slot)


def _feed(node: NodeProto, position: int, name: str) -> None:
    node.input.extend([""] * (position + 1 - len(node.input)))
    node.input[position] = name


def _spelling_of(part: Part) -> tuple[str, str]:
    """(operator, domain): what the part asks for, or the first that ONNX has for its kind."""
    if part.op_type:
        return part.op_type, part.domain
    first = next((each for each in ROWS[part.kind].spellings if each.domain != ATEN), None)
    if first is None:
        raise NormtoolError(f"ONNX has no operator for {part.kind!r}")
    return first.op_type, first.domain


def _stated(value: Any) -> Any:
    """An attribute as ONNX states it: a dtype is a number there."""
    return helper.np_dtype_to_tensor_dtype(value) if isinstance(value, np.dtype) else value


def _is_accepted_by_runtime(proto: onnx.ModelProto) -> bool:
    """Is all that the checker minds an operator that ONNX Runtime has added to the standard's own domain?

    SimplifiedLayerNormalization is one. The checker passes over nodes of other domains.
    """
    stand_in = onnx.ModelProto()
    stand_in.CopyFrom(proto)
    for _, node in walk_nodes(stand_in):
        if not node.domain and not onnx.defs.has(node.op_type) and find_spelling("", node.op_type, 1):
            node.domain = MICROSOFT
    for holder in (stand_in, *stand_in.functions):
        if MICROSOFT not in (each.domain for each in holder.opset_import):
            holder.opset_import.add(domain=MICROSOFT, version=1)
    return not checker_message(stand_in)


def _distinct(containers: Iterable[Container]) -> list[Container]:
    return list({id(container): container for container in containers}.values())


def _delete(repeated: Any, condemned: Callable[[Any], bool]) -> None:
    """Remove elements in place; rebuilding the list would copy every tensor in it."""
    for index in reversed([i for i, element in enumerate(repeated) if condemned(element)]):
        del repeated[index]


def _delete_named(repeated: Any, names: set[str]) -> None:
    _delete(repeated, lambda element: element.name in names)


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
