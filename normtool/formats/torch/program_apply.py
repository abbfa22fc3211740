"""Carries out a plan on an exported program: any edit is possible, parameters and signature follow.

The result is an ordinary ExportedProgram. Tensors that no edit touches are shared with the original; new
numbers are new tensors.
"""

import copy
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from normtool.edits import Copy, Edit, Graft, Insert, Part, Rebind, Replace, Splice
from normtool.errors import NormtoolError, StalePlan, UsageError
from normtool.formats.torch.interface import leaf_names, pruned
from normtool.formats.torch.model import TorchModel, read_exported
from normtool.formats.torch.read import spelling_of
from normtool.formats.torch.state import storage_key
from normtool.formats.torch.tensors import to_tensor, torch_dtype
from normtool.graph import GRAPH_OUTPUT, Op, Read, Tensor
from normtool.planner import Plan
from normtool.values import Value, to_array


def fold_program(model: TorchModel, plan: Plan) -> TorchModel:
    """The program with the plan carried out. Raises StalePlan when the plan was made for another one."""
    if plan.fingerprint != model.fingerprint:
        raise StalePlan("the plan was made for another model; make it again with plan()")
    rewriter = _Rewriter(model)
    for edit in plan.edits:
        rewriter.carry_out(edit)
    rewriter.remove_dead()
    folded = read_exported(rewriter.result())
    folded.places = rewriter.places
    return folded


def with_outputs(model: TorchModel, names: Sequence[str]) -> TorchModel:
    """The program without its other outputs, and without what computed only those.

    `names` are those of the program's own nodes, or those that a caller sees (`pooler_output`, `output.1`).
    Raises UsageError for a name that there is not, and for a module, whose code returns what it returns.
    """
    if model.program is None:
        raise UsageError(
            "a module returns what its code returns; wrap it in one that returns less, or give a program "
            "(torch.export.export), to choose outputs"
        )
    kept = _positions_of(model.program, names)
    rewriter = _Rewriter(model)
    rewriter.keep_outputs(kept)
    rewriter.remove_dead()
    return read_exported(rewriter.result())


def _positions_of(program: ExportedProgram, names: Sequence[str]) -> list[int]:
    """Which of the user's outputs have these names, in the order of the program."""
    seen = [name or "output" for name in leaf_names(program.call_spec.out_spec)]
    called = list(zip(seen, map(str, program.graph_signature.user_outputs), strict=True))
    kept: set[int] = set()
    for name in names:
        found = [i for i, each in enumerate(called) if name in each or each[0].startswith(f"{name}.")]
        if not found:
            known = ", ".join(f"{one} ({other})" for one, other in called)
            raise UsageError(f"no output is called {name!r}; the outputs are {known}")
        kept.update(found)
    if not kept:
        raise UsageError("no output would be left")
    return sorted(kept)


class _Rewriter:
    def __init__(self, model: TorchModel) -> None:
        assert model.program is not None
        self.model = model
        self.program: ExportedProgram = model.program
        self.module = copy.deepcopy(self.program.graph_module)
        self.graph: fx.Graph = self.module.graph
        self.node = dict(zip(self.program.graph.nodes, self.graph.nodes, strict=True))
        for original, copied in self.node.items():
            # the copy avoids Python's own names; the signature knows the argument `input` by that name
            copied.name, copied.target = original.name, original.target
        self.specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        self.output_specs: list[OutputSpec] = list(self.program.graph_signature.output_specs)
        self.out_spec = self.program.call_spec.out_spec
        self.state: dict[str, Any] = dict(self.program.state_dict)
        self.constants: dict[str, Any] = dict(self.program.constants)
        #: nodes whose last reader an edit may have taken away
        self.displaced: set[fx.Node] = set()
        #: ops that are gone, or have become another one
        self.gone: set[Op] = set()
        #: name of a node that is gone → of the one that stands for it in the signature
        self.renamed: dict[str, str] = {}
        self.aliases = _aliases(model)
        #: (op of the original or edit that made it, slot) → the parameter it reads now
        self.places: dict[tuple[Any, str], str] = {}
        #: value of an edit → the placeholder that was made for it
        self.stored_already: dict[Value, fx.Node] = {}

    # ---- edits ----------------------------------------------------------------------------

    def carry_out(self, edit: Edit) -> None:
        match edit:
            case Rebind():
                self.rebind(self.node[edit.op.source], edit.op, edit)
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

    def rebind(self, node: fx.Node, op: Op, edit: Rebind) -> None:
        """New numbers: in the op's own parameter if nobody else reads it, else in a new one."""
        content = to_tensor(edit.value)
        graph = self.model.graph
        if isinstance(op.source, Copy) or op not in graph.nodes:  # what an edit has made
            placeholder = self._new_placeholder(edit.name, self._parameter(content, None))
            self._set_argument(node, op, edit.slot, placeholder)
            self._note(op.source, edit.slot, placeholder)
            return
        old = graph.input(op, edit.slot)
        like = old if old is not None else graph.input(op, _WEIGHT_SLOT.get(op.kind, "weight"))
        if old is not None and self._is_own(old, tuple(content.shape)):
            self.state[old.name] = self._stored_like(content, old)
            self.places[op.source, edit.slot] = old.name
            return
        if edit.value not in self.stored_already:  # one value that several edits hold is stored once
            parameter = self._parameter(content, like)
            self.stored_already[edit.value] = self._new_placeholder(edit.name, parameter)
        placeholder = self.stored_already[edit.value]
        self._set_argument(node, op, edit.slot, placeholder)
        self._note(op.source, edit.slot, placeholder)

    def _note(self, source: Any, slot: str, placeholder: fx.Node) -> None:
        target = self.specs[placeholder.name].target
        assert target is not None
        self.places[source, slot] = target

    def splice(self, edit: Splice) -> None:
        node = self.node[edit.op.source]
        entered = self._argument(node, edit.op, edit.slot)
        self._displace(node, entered)
        for each in self._results(node):
            self._stand_in(each, entered)
        self.graph.erase_node(node)
        self.gone.add(edit.op)

    def replace(self, edit: Replace) -> None:
        """An affine op of the chain that turns into the Add of the shift, or addmm with other factors."""
        node = self.node[edit.op.source]
        if edit.kind == edit.op.kind:
            self._restate(node, edit)
            return
        (entry,) = edit.keep.values()
        entered = self._argument(node, edit.op, entry)
        self._displace(node, entered)
        made = self._call(edit, node, entered)
        for each in self._results(node):
            self._stand_in(each, made)
        self.graph.erase_node(node)
        self.gone.add(edit.op)
        self.node[edit.op.source] = made

    def _restate(self, node: fx.Node, edit: Replace) -> None:
        """Other plain arguments: the factors of addmm, the value that pad puts around."""
        found = spelling_of(node, self.program)
        assert found is not None
        names = {canonical: name for name, canonical in found[0].arguments.items()}
        changed = {k: v for k, v in edit.attributes.items() if edit.op.attributes.get(k) != v}
        arguments = self._arguments(node) | {names[name]: value for name, value in changed.items()}
        node.args, node.kwargs = tuple(arguments.values()), {}
        declared = node.target._schema.arguments  # type: ignore[union-attr]
        keyword_only = {each.name for each in declared if each.kwarg_only}
        node.args = tuple(value for name, value in arguments.items() if name not in keyword_only)
        node.kwargs = {name: value for name, value in arguments.items() if name in keyword_only}

    def insert(self, edit: Insert) -> None:
        """An op behind another: its readers, and the program's outputs, get what it makes."""
        node = self.node[edit.behind.source]
        made = self._call(edit, next(iter(node.users)), node)
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        self.renamed[node.name] = made.name
        self.node[edit] = made

    def copy(self, edit: Copy) -> None:
        """The same call once more, for one reader."""
        node, reader = self.node[edit.op.source], self.node[edit.reader.source]
        with self.graph.inserting_after(node):
            twin = self.graph.node_copy(node)
        reader.replace_input_with(node, twin)
        self.node[edit] = twin

    def _call(self, edit: Replace | Insert, before: fx.Node, entered: fx.Node) -> fx.Node:
        """`entered` with new parameters: plus one, times one, through a Conv or a smaller BatchNorm."""
        given = {slot: self._new_constant(slot, rebind) for slot, rebind in edit.constants.items()}
        for slot, placeholder in given.items():
            self._note(edit if isinstance(edit, Insert) else edit.op.source, slot, placeholder)
        parameters: list[Any] = list(given.values())
        rank = len(edit.attributes.get("kernel_shape", ()))
        if edit.kind == "conv":
            parameters += [[1] * rank, [0] * rank, [1] * rank, edit.attributes["group"]]
        if edit.kind == "batch_norm":
            operands = [given.get(slot) for slot in ("weight", "bias", "mean", "var")]
            parameters = [*operands, False, 0.0, edit.attributes["epsilon"], False]
        targets: dict[str, Any] = {"add": _aten.add.Tensor, "mul": _aten.mul.Tensor}
        targets["batch_norm"] = _aten.batch_norm.default
        target = targets.get(edit.kind) or getattr(_aten, f"conv{rank}d").default
        with self.graph.inserting_before(before):
            made = self.graph.call_function(target, (entered, *parameters))
        made.meta = {**before.meta, "val": _first(entered.meta.get("val"))}
        return made

    def _new_constant(self, slot: str, rebind: Rebind) -> fx.Node:
        """A parameter; for the statistics of a BatchNorm a buffer."""
        content = self._parameter(to_tensor(rebind.value), self._stored_beside(rebind.op))
        return self._new_placeholder(rebind.name, content, buffer=slot in ("mean", "var"))

    def _stored_beside(self, op: Op | None) -> Tensor | None:
        """A stored tensor that an op reads: what is new there lies on the same device."""
        graph = self.model.graph
        known = graph.inputs(op) if op is not None and op in graph.nodes else {}
        beside = (known.get(slot) for slot in ("weight", "mean", "a", "b"))
        return next((tensor for tensor in beside if tensor is not None and tensor.name in self.state), None)

    def _results(self, node: fx.Node) -> list[fx.Node]:
        """The node, and the getitems that pick its first result: the native forms return three."""
        several = isinstance(node.meta.get("val"), list | tuple)
        return [*(user for user in node.users if several and user.target is operator.getitem), node]

    def _stand_in(self, old: fx.Node, new: fx.Node) -> None:
        old.replace_all_uses_with(new)
        self.renamed[old.name] = new.name
        if old.target is operator.getitem:
            self.graph.erase_node(old)

    def _displace(self, node: fx.Node, entered: fx.Node) -> None:
        self.displaced.update(each for each in node.all_input_nodes if each is not entered)

    # ---- grafts ---------------------------------------------------------------------------

    def graft(self, edit: Graft) -> None:
        old = self._node_of(edit.tensor)
        made = self._put_parts(edit, old)
        if edit.readers is None:
            own = {self.node[edit, number] for number in range(len(edit.parts))}
            old.replace_all_uses_with(made, delete_user_cb=lambda user: user not in own)
        else:
            self._redirect(edit.readers, old, made)
        if edit.readers is None or not old.users:
            self.renamed[old.name] = made.name
        self.displaced.add(old)
        if old.target is operator.getitem:  # the native norms return three tensors; nobody may want any
            self.displaced.update(old.all_input_nodes[0].users)

    def _node_of(self, tensor: Tensor) -> fx.Node:
        """The node that stands for a tensor by now. Raises KeyError for a plain number among arguments."""
        maker = self.model.graph.producer(tensor) if tensor.source is None else None
        if tensor.source is None and maker is None:
            return self._placeholders[tensor.name]
        node: fx.Node = self.node[tensor.source if maker is None else maker.source]
        if not isinstance(node.meta.get("val"), list | tuple):
            return node
        number = int(tensor.name.rpartition(".")[2])  # as the reader of the program has called it
        picks = [user for user in node.users if user.target is operator.getitem and user.args[1] == number]
        if not picks:
            with self.graph.inserting_after(node):
                picks = [self.graph.call_function(operator.getitem, (node, number))]
            picks[0].meta = {**_place(node), "val": node.meta["val"][number]}
        return picks[0]

    @cached_property
    def _placeholders(self) -> dict[str, fx.Node]:
        """The original's stored tensors, lifted constants and inputs, as its graph names them."""
        found: dict[str, fx.Node] = {}
        first = {name: each.names[0] for each in self.model.state.stored for name in each.names}
        for original in self.program.graph.nodes:
            if original.op == "placeholder":
                target = self.specs[original.name].target
                name = first.get(target) if target is not None else None
                found[name or original.name] = self.node[original]
        return found

    def _put_parts(self, edit: Graft, old: fx.Node) -> fx.Node:
        """The calls of a graft, behind what they read; returns the last."""
        like = self._stored_beside(
            self.model.graph.producer(edit.tensor) if edit.tensor.source is None else None
        )
        given: dict[tuple[int, str], Any] = {}
        for number, part in enumerate(edit.parts):
            for slot, source in part.inputs.items():
                if isinstance(source, Tensor):
                    given[number, slot] = self._operand(edit, number, slot, source, like)
            for slot, (name, value) in part.constants.items():
                given[number, slot] = self._constant(edit, number, slot, name, value, like)
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        last = max((node for node in given.values() if isinstance(node, fx.Node)), key=order.__getitem__)
        for number, part in enumerate(edit.parts):
            slots = {slot: value for (of, slot), value in given.items() if of == number}
            slots |= {s: self.node[edit, n] for s, n in part.inputs.items() if isinstance(n, int)}
            last = self.node[edit, number] = self._put_part(part, slots, last, _place(old))
        return last

    def _operand(self, edit: Graft, number: int, slot: str, source: Tensor, like: Tensor | None) -> Any:
        """What feeds a part: a node, or the constant that an earlier edit has bound, or a plain number."""
        graph = self.model.graph
        known = source in graph.nodes and (graph.producer(source) or source.name in self._placeholders)
        if known or source.value is None:
            return self._node_of(source)
        return self._constant(edit, number, slot, source.name, source.value, like)

    def _constant(
        self, edit: Graft, number: int, slot: str, name: str, value: Value, like: Tensor | None
    ) -> Any:
        """A plain number where ATen takes one, else a new parameter."""
        if value.shape == () and slot in ("b", "exponent"):
            return to_array(value).item()
        placeholder = self._new_placeholder(name, self._parameter(to_tensor(value), like))
        self._note((edit, number), slot, placeholder)
        return placeholder

    def _put_part(self, part: Part, slots: Mapping[str, Any], behind: fx.Node, meta: dict[str, Any]) -> fx.Node:
        call = _CALLS.get(part.kind)
        if call is None:
            raise NormtoolError(f"no call of ATen is known for {part.kind!r}")
        target, arguments = call(slots, part.attributes)
        where = self.graph.inserting_after(behind)
        if behind.op == "placeholder":
            where = self.graph.inserting_before(next(n for n in self.graph.nodes if n.op != "placeholder"))
        with where:
            made = self.graph.call_function(target, arguments)
        with torch.no_grad():
            value = target(*fx.map_arg(arguments, lambda node: node.meta["val"]))
        made.meta = {**meta, "val": value}
        return made

    def _redirect(self, readers: tuple[Read, ...], old: fx.Node, new: fx.Node) -> None:
        slots: defaultdict[Op, list[str]] = defaultdict(list)
        for read in readers:
            slots[read.op].append(read.slot)
        for op, named in slots.items():
            if op.kind == GRAPH_OUTPUT:
                self._put_out({int(slot.rpartition(".")[2]) for slot in named}, new)
                continue
            node = self.node[op.source]
            if len(named) >= _count(node, old) or named[0].startswith(
                "in."
            ):  # an unknown op has no other slots
                node.replace_input_with(old, new)
                continue
            for slot in named:
                self._feed(node, op, slot, new)

    def _feed(self, node: fx.Node, op: Op, slot: str, new: fx.Node) -> None:
        """One of several arguments that are the same tensor."""
        stem, _, number = slot.rpartition(".")
        if not stem:
            self._set_argument(node, op, slot, new)
            return
        name = self._argument_name(op, stem)
        listed: Any = self._arguments(node)[name]
        self._set_argument(node, op, stem, [new if i == int(number) else each for i, each in enumerate(listed)])

    def _put_out(self, positions: set[int], new: fx.Node) -> None:
        """Another result at some of the program's outputs; the reader counts each tensor of a list."""
        output = next(node for node in reversed(self.graph.nodes) if node.op == "output")
        results, position = list(output.args[0]), 0
        for number, result in enumerate(results):
            if isinstance(result, fx.Node):
                results[number] = new if position in positions else result
                value = result.meta.get("val")
                position += len(value) if isinstance(value, list | tuple) else 1
        output.args = (tuple(results), *output.args[1:])

    # ---- outputs --------------------------------------------------------------------------

    def keep_outputs(self, kept: Sequence[int]) -> None:
        """Of what the user is given, these leaves."""
        (output,) = self.graph.find_nodes(op="output")
        results = list(zip(self.output_specs, output.args[0], strict=True))
        given = [each for each in results if each[0].kind is OutputKind.USER_OUTPUT]
        chosen = [given[i] for i in kept]
        self.displaced.update(r for _, r in given if isinstance(r, fx.Node))
        left = [each for each in results if each[0].kind is not OutputKind.USER_OUTPUT] + chosen
        self.output_specs = [spec for spec, _ in left]
        output.args = (tuple(result for _, result in left), *output.args[1:])
        self.out_spec = pruned(self.out_spec, kept)

    # ---- arguments ------------------------------------------------------------------------

    def _argument(self, node: fx.Node, op: Op, slot: str) -> fx.Node:
        found = self._arguments(node)[self._argument_name(op, slot)]
        assert isinstance(found, fx.Node)
        return found

    def _argument_name(self, op: Op, slot: str) -> str:
        """The ATen name of the argument at a slot."""
        found = spelling_of(self.node[op.source], self.program)
        assert found is not None
        return next(name for name, canonical in found[0].arguments.items() if canonical == slot)

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        """Every argument by name, defaults included, in the order of the schema."""
        normal = node.normalized_arguments(self.module, normalize_to_only_use_kwargs=True)
        assert normal is not None
        return dict(normal.kwargs)

    def _set_argument(self, node: fx.Node, op: Op, slot: str, value: Any) -> None:
        name = self._argument_name(op, slot)
        arguments = self._arguments(node)
        if isinstance(arguments[name], fx.Node):
            self.displaced.add(arguments[name])
        arguments[name] = value
        last = max(list(arguments).index(name), len(node.args) - 1)
        positional = list(arguments)[: last + 1]
        node.args = tuple(arguments[each] for each in positional)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k not in (*positional, "self")}
        if node.target is torch.ops.aten.add.Scalar:
            node.target = torch.ops.aten.add.Tensor

    # ---- parameters -----------------------------------------------------------------------

    def _is_own(self, tensor: Tensor, shape: tuple[int, ...]) -> bool:
        """Is it a stored tensor that one op reads once, whose storage nobody shares?"""
        return (
            tensor.name in self.state
            and tensor.shape == shape
            and len(self.model.graph.readers(tensor)) == 1
            and tensor.name not in self.aliases
        )

    def _stored_like(self, content: torch.Tensor, old: Tensor) -> torch.Tensor:
        """A parameter where the old one is a parameter, else a plain tensor."""
        parameter = self._parameter(content, old)
        return parameter if isinstance(self.state[old.name], nn.Parameter) else parameter.detach()

    def _parameter(self, content: torch.Tensor, like: Tensor | None) -> nn.Parameter:
        """`content` on the device of `like`, with its memory format and its wish for a gradient."""
        old = self.state.get(like.name) if like is not None else None
        if not isinstance(old, torch.Tensor):
            return nn.Parameter(content, requires_grad=False)
        new = torch.empty_like(old) if old.shape == content.shape else content.to(old.device)
        new = new if new is content else new.copy_(content)
        return nn.Parameter(new.detach(), requires_grad=old.requires_grad)

    def _new_placeholder(self, wish: str, parameter: nn.Parameter, buffer: bool = False) -> fx.Node:
        """A parameter of the program's own, or a buffer, behind the others, under a name that is free."""
        stem = re.sub(r"[^\w.]", "_", wish)
        parent = stem.rpartition(".")[0]
        if parent in self.state or parent in self.constants:
            stem = stem.replace(".", "_")
        target, number = stem, 0
        while not self._is_free(target):
            number += 1
            target = f"{stem}_{number}"
        self.state[target] = parameter.detach() if buffer else parameter
        kinds = (InputKind.PARAMETER, InputKind.BUFFER) if buffer else (InputKind.PARAMETER,)
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        ahead = [node for node in placeholders if self._is_stored(node, kinds)]
        where = self.graph.inserting_after(ahead[-1]) if ahead else self.graph.inserting_before(placeholders[0])
        with where:
            node = self.graph.placeholder(("b_" if buffer else "p_") + target.replace(".", "_"))
        node.target = node.name  # free of the names of other nodes
        node.meta["val"] = self._fake(parameter)
        argument = TensorArgument(name=node.name)
        self.specs[node.name] = InputSpec(kinds[-1], argument, target, persistent=True if buffer else None)
        return node

    def _is_free(self, target: str) -> bool:
        """No tensor has this name, or one that makes a module of it, or of which it would make a module."""
        taken = {*self.state, *self.constants}
        parents = {target[:i] for i, letter in enumerate(target) if letter == "."}
        nested = any(name.startswith(f"{target}.") for name in taken)
        return target not in taken and not parents & taken and not nested

    def _is_stored(self, node: fx.Node, kinds: Sequence[InputKind]) -> bool:
        return node.name in self.specs and self.specs[node.name].kind in kinds

    def _fake(self, parameter: nn.Parameter) -> torch.Tensor:
        """What torch.export notes of a tensor: its metadata, in the program's own fake mode."""
        known = (_first(node.meta.get("val")) for node in self.graph.nodes)
        mode = next(value.fake_mode for value in known if hasattr(value, "fake_mode"))
        fake: torch.Tensor = mode.from_tensor(parameter, static_shapes=True)
        return fake

    # ---- closing --------------------------------------------------------------------------

    def remove_dead(self) -> None:
        """Take out what only the edits have left unread, and the running counts of norms that are gone."""
        counts: set[str] | None = None
        for node in reversed(list(self.graph.nodes)):
            if node.op == "placeholder" and counts is None:  # every other node has been seen
                counts = {f"{owner}.num_batches_tracked" for owner in self._owners_gone()}
            spec = self.specs.get(node.name) if node.op == "placeholder" else None
            counted = spec is not None and spec.target in (counts or ())
            if node.users or _writes(node) or (node not in self.displaced and not counted):
                continue
            if spec is not None and spec.target is not None:
                self._forget(spec)
            elif spec is not None:
                continue  # an input of the user's
            self.displaced.update(node.all_input_nodes)
            self.graph.erase_node(node)
        self._remove_namesakes()

    def _remove_namesakes(self) -> None:
        """Other names of a parameter that is gone: nobody reads them, and they would keep its numbers."""
        gone = {storage_key(t) for name, t in self.program.state_dict.items() if name not in self.state}
        for node in list(self.graph.nodes):
            spec = self.specs.get(node.name) if node.op == "placeholder" else None
            stored = self.state.get(spec.target) if spec is not None and spec.target is not None else None
            if spec is not None and not node.users and stored is not None and storage_key(stored) in gone:
                self._forget(spec)
                self.graph.erase_node(node)

    def _forget(self, spec: InputSpec) -> None:
        del self.specs[spec.arg.name]
        assert spec.target is not None
        self.state.pop(spec.target, None)
        self.constants.pop(spec.target, None)

    def _owners_gone(self) -> set[str]:
        """Modules of which no BatchNorm goes on."""
        ops = [op for op in self.model.graph.ops if op.kind == "batch_norm"]
        left = set(self.graph.nodes)
        goes_on = {op.owner for op in ops if op not in self.gone and self.node[op.source] in left}
        return {op.owner for op in ops} - goes_on

    def result(self) -> ExportedProgram:
        self.graph.lint()
        self.module.recompile()
        placeholders = [node.name for node in self.graph.nodes if node.op == "placeholder"]
        (output,) = self.graph.find_nodes(op="output")
        specs = zip(self.output_specs, output.args[0], strict=True)
        signature = ExportGraphSignature(
            input_specs=[self.specs[name] for name in placeholders],
            output_specs=[_puts_out(spec, result) for spec, result in specs],
        )
        return ExportedProgram(
            root=self.module,
            graph=self.graph,
            graph_signature=signature,
            state_dict=self.state,
            range_constraints=self.program.range_constraints,
            module_call_graph=[self._renamed_call(entry) for entry in self.program.module_call_graph],
            example_inputs=self.program.example_inputs,
            constants=self.constants,
            verifiers=self.program.verifiers,
        )

    def _renamed_argument(self, argument: Any) -> Any:
        """What a spliced op produced has the name of the op before it."""
        if not isinstance(argument, TensorArgument):
            return argument
        name = argument.name
        while name in self.renamed:
            name = self.renamed[name]
        return TensorArgument(name=name)

    def _renamed_call(self, entry: ModuleCallEntry) -> ModuleCallEntry:
        """The calls that `preserve_module_call_signature` keeps name their tensors too."""
        if entry.signature is None:
            return entry
        signature = replace(
            entry.signature,
            inputs=[self._renamed_argument(each) for each in entry.signature.inputs],
            outputs=[self._renamed_argument(each) for each in entry.signature.outputs],
        )
        if not entry.fqn:
            return replace(entry, signature=replace(signature, out_spec=self.out_spec))
        there = {node.name for node in self.graph.nodes}
        arguments = (*signature.inputs, *signature.outputs)
        named = [each.name for each in arguments if isinstance(each, TensorArgument)]
        return replace(entry, signature=signature if there.issuperset(named) else None)


#: op kind → the slot of its weight, where that is not `weight`
_WEIGHT_SLOT = {"linear": "b"}


def _puts_out(spec: OutputSpec, result: Any) -> OutputSpec:
    """The same output, under the name of the node that the program puts out there now."""
    if not isinstance(spec.arg, TensorArgument) or not isinstance(result, fx.Node):
        return spec
    return replace(spec, arg=TensorArgument(name=result.name))


def _writes(node: fx.Node) -> bool:
    """Does it change one of its arguments in place?"""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def _place(node: fx.Node) -> dict[str, Any]:
    """Whose code makes a call."""
    return {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}


def _count(node: fx.Node, argument: fx.Node) -> int:
    """How often a call names another one among its arguments."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found.count(argument)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) and value else value


def _aliases(model: TorchModel) -> set[str]:
    """First names of tensors whose storage another name or tensor has too."""
    groups: dict[object, list[str]] = {}
    for stored in model.state.stored:
        groups.setdefault(storage_key(stored.tensor), []).extend(stored.names)
    return {name for names in groups.values() if len(names) > 1 for name in names}


# ---- calls of ATen for the parts of a graft ------------------------------------------------------

_aten = torch.ops.aten

#: slots and attributes → what to call, and with which arguments
_Call = Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[Any, tuple[Any, ...]]]


def _unary(overload: Any) -> _Call:
    return lambda slots, attributes: (overload, (slots["x"],))


def _binary(overload: Any) -> _Call:
    return lambda slots, attributes: (overload, (slots["a"], slots["b"]))


def _reduce(overload: Any) -> _Call:
    return lambda slots, attributes: (
        overload,
        (slots["x"], list(attributes["axes"]), bool(attributes.get("keepdims", 1))),
    )


def _pow(slots: Mapping[str, Any], attributes: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    known = not isinstance(slots["exponent"], fx.Node)
    return _aten.pow.Tensor_Scalar if known else _aten.pow.Tensor_Tensor, (slots["x"], slots["exponent"])


def _normalized_shape(slots: Mapping[str, Any], attributes: Mapping[str, Any]) -> list[int]:
    shape = slots["x"].meta["val"].shape
    return list(shape[attributes.get("axis", -1) % len(shape) :])


def _rms_norm(slots: Mapping[str, Any], attributes: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    lengths = _normalized_shape(slots, attributes)
    return _aten.rms_norm.default, (slots["x"], lengths, slots.get("weight"), attributes["epsilon"])


def _layer_norm(slots: Mapping[str, Any], attributes: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    given = slots.get("weight"), slots.get("bias"), attributes["epsilon"]
    return _aten.layer_norm.default, (slots["x"], _normalized_shape(slots, attributes), *given)


_CALLS: Mapping[str, _Call] = {
    "add": _binary(_aten.add.Tensor),
    "sub": _binary(_aten.sub.Tensor),
    "mul": _binary(_aten.mul.Tensor),
    "div": _binary(_aten.div.Tensor),
    "neg": _unary(_aten.neg.default),
    "sqrt": _unary(_aten.sqrt.default),
    "rsqrt": _unary(_aten.rsqrt.default),
    "reciprocal": _unary(_aten.reciprocal.default),
    "pow": _pow,
    "reduce_mean": _reduce(_aten.mean.dim),
    "reduce_sum": _reduce(_aten.sum.dim_IntList),
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "transpose": lambda slots, attributes: (_aten.permute.default, (slots["x"], list(attributes["perm"]))),
    "cast": lambda slots, attributes: (
        _aten.to.dtype,
        (slots["x"], torch_dtype(attributes["to"])),
    ),
}
