"""The norm modules of an exported program, which has no modules any more.

What is left of them: the path and class name of the module behind each call (`nn_module_stack`), and the names
of the tensors. A norm that is one op is found by its op; running statistics make a BatchNorm; and the calls of
a class that sounds like a norm are cut out of the program and probed, as a module would be.
"""

import operator
from collections.abc import Iterator, Mapping

import torch
from torch import fx, nn

from normtool.formats.torch.modules import CLASSES, SOUNDS_LIKE_A_NORM
from normtool.formats.torch.probe import Behaviour, behaviour_of_piece
from normtool.graph import ModelGraph, NormModule, Op, Read, Role, Tensor
from normtool.norms import NORMS

_STATISTICS = ("running_mean", "running_var")

_PARAMETRISED = ".parametrizations."

#: class name → kind, for norms of torch's own
_KINDS = {known.__name__: kind for known, kind in reversed(CLASSES)}


def norms_of_program(graph: ModelGraph, tensors: Mapping[str, Tensor]) -> Iterator[NormModule]:
    """Every norm module once, in the order of the program; then those that only their statistics show."""
    groups = _by_owner(graph)
    own = _by_prefix(tensors)
    for path in dict.fromkeys([*groups, *own]):
        ops, held = groups.get(path, []), own.get(path, {})
        known = _known(graph, ops, held)
        if known is not None:
            yield _norm(path, *known, ops, held)


def _by_owner(graph: ModelGraph) -> dict[str, list[Op]]:
    groups: dict[str, list[Op]] = {}
    for op in graph.ops:
        groups.setdefault(op.owner, []).append(op)
    return groups


def _by_prefix(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module path → its own tensors by their last name, and those its parametrisations keep for it."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, last = name.partition(_PARAMETRISED) if _PARAMETRISED in name else name.rpartition(".")
        groups.setdefault(path, {})[last] = tensor
    return groups


def _known(graph: ModelGraph, ops: list[Op], held: Mapping[str, Tensor]) -> tuple[Behaviour, str, str] | None:
    """(kind and axes, evidence, spelling); None for no norm, and for F.layer_norm in somebody's code."""
    name = _class_name(ops)
    native = next((op for op in ops if op.kind in NORMS), None)
    if native is not None and (name in _KINDS or SOUNDS_LIKE_A_NORM.search(name)):
        return Behaviour(NORMS[native.kind].kind, None), "op", f"{native.domain}::{native.spelling}"
    if all(statistic in held for statistic in _STATISTICS):
        return Behaviour("batch_norm", None), "statistics", name or "state_dict"
    if name in _KINDS:
        return Behaviour(_KINDS[name], None), "module", name
    if native is not None or not SOUNDS_LIKE_A_NORM.search(name):
        return None
    found = _probed(graph, [op for op in ops if op.call == 0])
    return (found, "probe", name) if found is not None else None


def _class_name(ops: list[Op]) -> str:
    stack = list((ops[0].source.meta.get("nn_module_stack") or {}).values()) if ops else []
    kind = stack[-1][1] if stack else ""
    return kind.rpartition(".")[2] if isinstance(kind, str) else str(kind.__name__)


def _norm(
    path: str, found: Behaviour, evidence: str, spelling: str, ops: list[Op], held: Mapping[str, Tensor]
) -> NormModule:
    return NormModule(
        name=path or _class_name(ops) or spelling,
        owner=path,
        kind=found.kind,
        spelling=spelling,
        evidence=evidence,
        learnable=tuple(tensor for tensor in held.values() if tensor.role is Role.PARAMETER),
        buffers=tuple(tensor for tensor in held.values() if tensor.role is not Role.PARAMETER),
        axes=found.axes,
        calls=len({op.call for op in ops}),
    )


# ---- probing a piece of a program ---------------------------------------------------------------


def _probed(graph: ModelGraph, ops: list[Op]) -> Behaviour | None:
    """What these calls do to the one tensor that enters them; None where several do, or none."""
    inside = set(ops)
    read = dict.fromkeys(t for op in ops for t in graph.inputs(op).values() if graph.producer(t) not in inside)
    entering = [tensor for tensor in read if tensor.role in (Role.ACTIVATION, Role.INPUT)]
    seen = [op for op in ops if any(each.op not in inside for each in _readers(graph, op))]
    # x.to(x.dtype) is x itself, and the exporter lets everybody read it from there
    leaving = [op for op in seen if op.kind not in ("cast", "identity") or op is ops[-1]]
    if len(entering) != 1 or len(leaving) != 1 or not entering[0].shape:
        return None
    shape = tuple(n if isinstance(n, int) else 2 for n in entering[0].shape)
    nodes = [op.source for op in ops]
    entries = [e for node in nodes for e in node.all_input_nodes if _tensor_name(e) == entering[0].name]
    return behaviour_of_piece(_cut_out(nodes, entries[0], leaving[0].source), shape) if entries else None


def _readers(graph: ModelGraph, op: Op) -> list[Read]:
    """Of everything that an op puts out: a Split has several outputs."""
    return [read for tensor in graph.outputs(op).values() for read in graph.readers(tensor)]


def _tensor_name(node: fx.Node) -> str:
    """As the reader calls what a node computes, or picks out of several."""
    return f"{node.args[0]}.{node.args[1]}" if node.target is operator.getitem else node.name


def _cut_out(nodes: list[fx.Node], entry: fx.Node, leaving: fx.Node) -> fx.GraphModule:
    """The calls as a module of one input; stored tensors are random, away from 0."""
    graph = fx.Graph()
    root = nn.Module()
    copies: dict[fx.Node, fx.Node] = {entry: graph.placeholder("x")}
    generator = torch.Generator().manual_seed(0)
    for node in nodes:
        for each in node.all_input_nodes:
            if each not in copies:
                value = each.meta["val"]
                shape = tuple(int(n) for n in value.shape)
                root.register_buffer(each.name, torch.rand(shape, generator=generator).to(value.dtype) + 0.5)
                copies[each] = graph.get_attr(each.name)
        copies[node] = graph.node_copy(node, lambda each: copies[each])
    graph.output(copies[leaving])
    return fx.GraphModule(root, graph)
