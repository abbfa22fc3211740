"""Carries out a plan on an exported program: any edit is possible, parameters and signature follow.

The result is an ordinary ExportedProgram. Tensors that no edit touches are shared with the original; new
numbers are new tensors.
"""

import copy
import operator
import re
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    TensorArgument,
)

from normtool.edits import Copy, Edit, Insert, Rebind, Replace, Splice
from normtool.errors import StalePlan
from normtool.formats.torch.model import TorchModel, read_exported
from normtool.formats.torch.read import spelling_of
from normtool.formats.torch.state import storage_key
from normtool.formats.torch.tensors import to_tensor
from normtool.graph import Op, Tensor
from normtool.planner import Plan


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
        placeholder = self._new_placeholder(edit.name, self._parameter(content, like))
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
        """`entered` with new parameters: plus one, times one, or through a Conv."""
        parameters = [self._new_constant(rebind) for rebind in edit.constants.values()]
        for slot, parameter in zip(edit.constants, parameters, strict=True):
            self._note(edit if isinstance(edit, Insert) else edit.op.source, slot, parameter)
        conv = edit.kind == "conv"
        groups = [edit.attributes["group"]] if conv else []
        rank = len(edit.attributes.get("kernel_shape", ()))
        steps = [[1] * rank, [0] * rank, [1] * rank] if conv else []
        targets: dict[str, Any] = {"add": torch.ops.aten.add.Tensor, "mul": torch.ops.aten.mul.Tensor}
        target = targets.get(edit.kind) or getattr(torch.ops.aten, f"conv{rank}d").default
        with self.graph.inserting_before(before):
            made = self.graph.call_function(target, (entered, *parameters, *steps, *groups))
        made.meta = {**before.meta, "val": _first(entered.meta.get("val"))}
        return made

    def _new_constant(self, rebind: Rebind) -> fx.Node:
        graph = self.model.graph
        known = graph.inputs(rebind.op) if rebind.op in graph.nodes else {}
        beside = (known.get(slot) for slot in ("weight", "mean", "a", "b"))
        like = next((tensor for tensor in beside if tensor is not None and tensor.name in self.state), None)
        return self._new_placeholder(rebind.name, self._parameter(to_tensor(rebind.value), like))

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

    def _set_argument(self, node: fx.Node, op: Op, slot: str, value: fx.Node) -> None:
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

    def _new_placeholder(self, wish: str, parameter: nn.Parameter) -> fx.Node:
        """A parameter of the program's own, behind the others, under a name that is free."""
        stem = re.sub(r"[^\w.]", "_", wish)
        parent = stem.rpartition(".")[0]
        if parent in self.state or parent in self.constants:
            stem = stem.replace(".", "_")
        target, number = stem, 0
        while not self._is_free(target):
            number += 1
            target = f"{stem}_{number}"
        self.state[target] = parameter
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        ahead = [node for node in placeholders if self._is_parameter(node)]
        where = self.graph.inserting_after(ahead[-1]) if ahead else self.graph.inserting_before(placeholders[0])
        with where:
            node = self.graph.placeholder("p_" + target.replace(".", "_"))
        node.target = node.name  # free of the names of other nodes
        node.meta["val"] = self._fake(parameter)
        argument = TensorArgument(name=node.name)
        self.specs[node.name] = InputSpec(InputKind.PARAMETER, argument, target)
        return node

    def _is_free(self, target: str) -> bool:
        """No tensor has this name, or one that makes a module of it, or of which it would make a module."""
        taken = {*self.state, *self.constants}
        parents = {target[:i] for i, letter in enumerate(target) if letter == "."}
        nested = any(name.startswith(f"{target}.") for name in taken)
        return target not in taken and not parents & taken and not nested

    def _is_parameter(self, node: fx.Node) -> bool:
        return node.name in self.specs and self.specs[node.name].kind is InputKind.PARAMETER

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
            if node.users or (node not in self.displaced and not counted):
                continue
            if spec is not None and spec.target is not None:
                self._forget(spec)
            elif spec is not None:
                continue  # an input of the user's
            self.displaced.update(node.all_input_nodes)
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
        signature = ExportGraphSignature(
            input_specs=[self.specs[name] for name in placeholders],
            output_specs=[self._renamed(spec) for spec in self.program.graph_signature.output_specs],
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

    def _renamed(self, spec: Any) -> Any:
        """An output that a spliced op produced has the name of the op before it."""
        return replace(spec, arg=self._renamed_argument(spec.arg))

    def _renamed_argument(self, argument: Any) -> Any:
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
        return replace(entry, signature=signature)


#: op kind → the slot of its weight, where that is not `weight`
_WEIGHT_SLOT = {"linear": "b"}


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) and value else value


def _aliases(model: TorchModel) -> set[str]:
    """First names of tensors whose storage another name or tensor has too."""
    groups: dict[object, list[str]] = {}
    for stored in model.state.stored:
        groups.setdefault(storage_key(stored.tensor), []).extend(stored.names)
    return {name for names in groups.values() if len(names) > 1 for name in names}
