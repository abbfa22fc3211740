"""`torch.export.ExportedProgram` → `ModelGraph`.

Placeholders become the stored tensors that the signature names, every call an op with the module that makes it
(`Op.owner`, from the exporter's `nn_module_stack`). An argument that the op table does not know makes
the op unknown: `div` with a rounding mode is no division.
"""

import operator
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from normtool.formats.torch.adapt import adapt, base_name, means, op_type, schema_arguments, shape_of
from normtool.formats.torch.tensors import DTYPES, TorchValue
from normtool.graph import ModelGraph, Op, Role, Tensor
from normtool.norms import NORMS
from normtool.ops import ATEN, ROWS, UNKNOWN, OpRow, Spelling, aten_spellings, slot_name
from normtool.values import Dense, is_float

#: ATen has no opsets; this one is above all of ONNX's.
VERSION = 1 << 16

#: The op that hands its input on without saying so in its schema (in inference).
_RETURNS_ITS_INPUT = frozenset(["dropout", "feature_dropout", "alpha_dropout"])

#: Outputs of a program that are written back into what it stores.
_MUTATIONS = frozenset(kind for kind in OutputKind if kind.name in ("BUFFER_MUTATION", "PARAMETER_MUTATION"))

#: Calls that look at no number: they are no readers.
_METADATA_CHECKS = frozenset(["_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size"])

#: Plain numbers that stay attributes, though ONNX has a slot for them.
_SETTINGS = frozenset([("pad", "value")])

#: Kinds that are named after the module that owns them, as users know it.
_NAMED_BY_MODULE = frozenset(
    "conv conv_transpose linear embedding batch_norm instance_norm layer_norm rms_norm group_norm".split()
)


def read_program(
    program: ExportedProgram, graph: ModelGraph, stored: Mapping[str, Tensor], paths: Mapping[str, str]
) -> ModelGraph:
    """Fill `graph`, which holds the `stored` tensors, with the program's ops.

    `paths` maps each path of a module to the first one, for modules that have several.
    """
    _Builder(program, graph, stored, paths).build()
    return graph


class _Builder:
    def __init__(
        self,
        program: ExportedProgram,
        graph: ModelGraph,
        stored: Mapping[str, Tensor],
        paths: Mapping[str, str],
    ) -> None:
        self.program = program
        self.graph = graph
        self.stored = stored
        self.paths = paths
        self.tensors: dict[fx.Node, Tensor] = {}
        #: nodes that return several tensors: getitem picks one
        self.several: dict[fx.Node, list[Tensor]] = {}
        self.names: set[str] = set()
        #: tensor → those whose memory it may be a view of
        self.bases: dict[Tensor, list[Tensor]] = {}
        #: path of a module → the keys of its calls in nn_module_stack, in order
        self.calls: defaultdict[str, list[str]] = defaultdict(list)

    def build(self) -> None:
        inputs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.tensors[node] = self._input(node, inputs[node.name])
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self._outputs(node)

    # ---- tensors --------------------------------------------------------------------------

    def _input(self, node: fx.Node, spec: Any) -> Tensor:
        if spec.kind is not InputKind.USER_INPUT and spec.target in self.stored:
            return self.stored[spec.target]
        lifted = self.program.constants.get(spec.target) if spec.kind is InputKind.CONSTANT_TENSOR else None
        if isinstance(lifted, torch.Tensor) and lifted.dtype in DTYPES and not lifted.is_sparse:
            tensor = self._tensor(node.name, lifted, Role.CONSTANT)
            tensor.value = TorchValue(lifted)
            return tensor
        return self._tensor(node.name, node.meta.get("val"), Role.INPUT)

    def _tensor(self, name: str, value: Any, role: Role = Role.ACTIVATION) -> Tensor:
        dtype, shape = None, None
        if isinstance(value, torch.Tensor):
            dtype, shape = DTYPES.get(value.dtype), shape_of(value)
        elif (number := _number_type(value)) is not None:
            dtype, shape = np.dtype(number), ()
        return self.graph.add_tensor(Tensor(name, self.graph.MAIN, role, dtype, shape))

    def _constant(self, name: str, number: float, like: Tensor | None) -> Tensor:
        """A plain number among the arguments, exact; an integer beside integers is one of them."""
        dtype = like.dtype if like is not None else None
        integral = isinstance(number, int) and dtype is not None and not is_float(dtype)
        value = Dense(np.array(number, dtype if integral else np.float64))
        tensor = Tensor(name, self.graph.MAIN, Role.CONSTANT, value.dtype, (), value)
        return self.graph.add_tensor(tensor)

    def _outputs(self, node: fx.Node) -> None:
        tensors = []
        specs = self.program.graph_signature.output_specs
        results: Any = node.args[0]
        for spec, result in zip(specs, results, strict=True):
            if spec.kind in _MUTATIONS and spec.target in self.stored:
                self.stored[spec.target].written = True
            if isinstance(result, fx.Node):
                tensors += self.several.get(result) or [self.tensors[result]]
        self.graph.add_outputs(self.graph.MAIN, tensors)

    # ---- calls ----------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> None:
        if op_type(node) in _METADATA_CHECKS or (node.target is operator.getitem and self._is_pick(node)):
            return
        kind, spelling, arguments = self._recognise(node)
        owner, call = self._owner(node)
        if spelling is not None:
            inputs, attributes = self._operands(node, kind, spelling, arguments)
            adapt(kind, node, attributes)
        else:
            known = [each for each in node.all_input_nodes if self._known(each)]
            inputs = {f"in.{i}": self.tensors[each] for i, each in enumerate(known)}
            attributes = {}
        if kind in NORMS and self._is_stored(inputs.get(NORMS[kind].data)):
            kind = UNKNOWN  # weight standardisation: it normalises a weight, not what flows through the model
        name = self._name(node, kind, inputs, owner, call)
        op = Op(name, kind, self.graph.MAIN, op_type(node), ATEN, VERSION, attributes, node, owner, call)
        results = self._results(node, kind)
        self.graph.add_op(op, inputs, results)
        self._note_views(node, results.values())
        self._mark_written(node, op)

    def _is_stored(self, tensor: Tensor | None) -> bool:
        """Is it a parameter or buffer, or a view of one?"""
        pending = [tensor] if tensor is not None else []
        while pending:
            each = pending.pop()
            if each.value is not None:
                return True
            pending += self.bases.get(each, [])
        return False

    def _known(self, node: fx.Node) -> bool:
        if node in self.several:
            self.tensors[node] = self.several[node][0]
        return node in self.tensors

    def _is_pick(self, node: fx.Node) -> bool:
        source, position = node.args
        if not isinstance(source, fx.Node) or source not in self.several or not isinstance(position, int):
            return False
        self.tensors[node] = self.several[source][position]
        return True

    def _recognise(self, node: fx.Node) -> tuple[str, Spelling | None, Mapping[str, Any]]:
        """(kind, spelling, arguments by ATen name)."""
        found = spelling_of(node, self.program)
        return (found[1].kind, found[0], found[2]) if found is not None else (UNKNOWN, None, {})

    def _operands(
        self, node: fx.Node, kind: str, spelling: Spelling, arguments: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        inputs: dict[str, Tensor] = {}
        attributes: dict[str, Any] = {}
        slots = _tensor_slots(kind) & {spelling.arguments.get(name, "") for name in _numbers(node)}
        first = next((value for value in arguments.values() if isinstance(value, fx.Node)), None)
        like = self.tensors.get(first) if first is not None else None
        for name, value in arguments.items():
            canonical = spelling.arguments.get(name, "")
            if isinstance(value, fx.Node):
                if self._known(value):
                    inputs[canonical or name] = self.tensors[value]
            elif isinstance(value, list | tuple) and any(isinstance(each, fx.Node) for each in value):
                for i, each in enumerate(value):
                    if isinstance(each, fx.Node) and self._known(each):
                        inputs[f"{canonical or name}.{i}"] = self.tensors[each]
            elif not canonical or value is None:
                continue
            elif canonical in slots and (kind, canonical) not in _SETTINGS and isinstance(value, int | float):
                inputs[canonical] = self._constant(f"{node.name}.{canonical}", value, like)
            else:
                attributes[canonical] = list(value) if isinstance(value, list | tuple) else value
        return inputs, attributes

    def _results(self, node: fx.Node, kind: str) -> dict[str, Tensor]:
        names = ROWS[kind].outputs if kind in ROWS else ("y", "extra*")
        value = node.meta.get("val")
        if not isinstance(value, list | tuple):
            self.tensors[node] = self._tensor(node.name, value)
            return {names[0].rstrip("*"): self.tensors[node]}
        self.several[node] = [self._tensor(f"{node.name}.{i}", each) for i, each in enumerate(value)]
        return {slot_name(names, i): tensor for i, tensor in enumerate(self.several[node])}

    # ---- memory ---------------------------------------------------------------------------

    def _note_views(self, node: fx.Node, results: Iterable[Tensor]) -> None:
        """Remember whose memory the results may be: the schema says it, a foreign op is not trusted."""
        bases = [self.tensors[each] for each in _aliased(node) if each in self.tensors]
        for result in results:
            self.bases[result] = bases

    def _mark_written(self, node: fx.Node, op: Op) -> None:
        """What an op changes in place is no constant, and neither is the stored tensor behind a view of it."""
        pending = [self.tensors[each] for each in _written_arguments(node) if each in self.tensors]
        if op.attributes.get("training_mode") or op.attributes.get("use_input_stats"):
            # batch_norm's schema does not say that it updates its running statistics
            pending += [t for slot, t in self.graph.inputs(op).items() if slot in ("mean", "var")]
        seen: set[Tensor] = set()
        while pending:
            tensor = pending.pop()
            if tensor not in seen:
                seen.add(tensor)
                tensor.written = True
                pending += self.bases.get(tensor, [])

    # ---- names ----------------------------------------------------------------------------

    def _owner(self, node: fx.Node) -> tuple[str, int]:
        """(path of the innermost module whose code makes this call, which call of it)."""
        stack = node.meta.get("nn_module_stack") or {}
        if not stack:
            return "", 0
        key, (path, kind) = list(stack.items())[-1]
        first = self.paths.get(path, path)
        if first not in self.graph.owner_classes:
            name = kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__
            self.graph.owner_classes[first] = name
        # not the number in the key: the exporter counts each name of a module for itself
        calls = self.calls[first]
        if key not in calls:
            calls.append(key)
        return first, calls.index(key)

    def _name(self, node: fx.Node, kind: str, inputs: Mapping[str, Tensor], owner: str, call: int) -> str:
        """The module's path where the op is what the module is for, else the node's own name behind it."""
        name = f"{owner}.{node.name}" if owner else node.name
        own = any(tensor.name.startswith(f"{owner}.") for tensor in inputs.values())
        named = kind in _NAMED_BY_MODULE and op_type(node) != "index_select"  # no module is for that alone
        if owner and named and (own or self._is_of_torch(node)):
            plain = f"{owner}@{call}" if call else owner
            name = name if plain in self.names else plain
        self.names.add(name)
        return name

    def _is_of_torch(self, node: fx.Node) -> bool:
        """Is the module whose code makes this call one of torch's own?"""
        _, kind = list(node.meta["nn_module_stack"].items())[-1][1]
        name = kind if isinstance(kind, str) else kind.__module__
        return name.startswith("torch.nn.")


def spelling_of(node: fx.Node, program: ExportedProgram) -> tuple[Spelling, OpRow, Mapping[str, Any]] | None:
    """The row of a call and its arguments by ATen name; None where one asks for more than any row knows."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != ATEN:
        return None
    normal = node.normalized_arguments(program.graph_module, normalize_to_only_use_kwargs=True)
    if normal is None:
        return None
    for spelling, row in aten_spellings(base_name(node)):
        said = all(_is_said(spelling, name, value) for name, value in normal.kwargs.items())
        if said and means(row.kind, node, normal.kwargs):
            return spelling, row, normal.kwargs
    return None


def _is_said(spelling: Spelling, name: str, value: Any) -> bool:
    """Does the spelling's row say what this argument, with this value, means?"""
    if name in spelling.required:
        return bool(value == spelling.required[name])
    return name in spelling.arguments or value is None


def _number_type(value: Any) -> type | None:
    """The dtype of a plain number, or of one that is known only when the model runs."""
    if isinstance(value, bool | torch.SymBool):
        return np.bool_
    if isinstance(value, int | torch.SymInt):
        return np.int64
    return np.float64 if isinstance(value, float | torch.SymFloat) else None


def _nodes_in(value: Any) -> list[fx.Node]:
    listed = value if isinstance(value, list | tuple) else [value]
    return [each for each in listed if isinstance(each, fx.Node)]


def _written_arguments(node: fx.Node) -> list[fx.Node]:
    """What the schema says is written; of an op without a schema, nothing is known."""
    given = schema_arguments(node)
    return [
        n for each, value in given if each.alias_info and each.alias_info.is_write for n in _nodes_in(value)
    ]


def _aliased(node: fx.Node) -> list[fx.Node]:
    """Inputs whose memory the result may be."""
    if not isinstance(node.target, torch._ops.OpOverload) or op_type(node) in _RETURNS_ITS_INPUT:
        return node.all_input_nodes
    return [n for each, value in schema_arguments(node) if each.alias_info for n in _nodes_in(value)]


def _numbers(node: fx.Node) -> set[str]:
    """Arguments that are tensors or numbers that stand for one, by the names fx normalises to."""
    declared = node.target._schema.arguments  # type: ignore[union-attr]
    names = [each.name for each in declared if re.search("Tensor|number", str(each.type))]
    return {"input" if name == "self" else name for name in names}


def _tensor_slots(kind: str) -> frozenset[str]:
    """Slots of a kind that hold tensors in ONNX; a plain number there is a constant tensor."""
    return frozenset(slot for spelling in ROWS[kind].spellings for slot in spelling.slots)
