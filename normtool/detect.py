"""Finds every normalisation layer of a graph, bodies and functions included.

Native operators are found by kind (`evidence: op`), PyTorch's by the module they belong to. Norms spelled out
in primitive ops get their own finder here (`evidence: pattern`); the report already has its place for them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from normtool.constants import Constants
from normtool.graph import ModelGraph, NormModule, Op, Scope, Tensor
from normtool.norms import NORMS, Norm, axes_of, number


def find_norms(graph: ModelGraph, constants: Constants | None = None) -> list[Norm]:
    """Every norm: those that are ops in the order the model lists them, then modules that are none."""
    constants = constants or Constants(graph)
    modules = {module.path: module for module in graph.norm_modules}
    holders = {t: module for module in graph.norm_modules for t in (*module.learnable, *module.buffers)}
    found, covered = [], set()
    for op in graph.ops:
        if op.kind in NORMS:
            module = modules.get(op.owner) or _holder(graph, op, holders)
            found.append(_of_op(constants, op, module))
            covered.add(module)
    for module in graph.norm_modules:
        if module not in covered:
            found += _of_module(graph, module)
    return found


def _holder(graph: ModelGraph, op: Op, holders: Mapping[Tensor, NormModule]) -> NormModule | None:
    """The module with whose tensors somebody else's code normalises: F.batch_norm(x, self.bn.running_mean)."""
    return next((holders[tensor] for tensor in graph.inputs(op).values() if tensor in holders), None)


def _of_op(constants: Constants, op: Op, module: NormModule | None) -> Norm:
    """An op, with what its module knows of it: a running count that no op reads, a parametrised weight."""
    graph, row = constants.graph, NORMS[op.kind]
    data = graph.input(op, row.data)
    return Norm(
        name=op.name,
        kind=row.kind,
        spelling=f"{op.domain}::{op.spelling}" if op.domain else op.spelling,
        evidence=module.evidence if module else "op",
        axes=axes_of(constants, op, graph.rank(data) if data is not None else None),
        eps=number(constants.attribute(op, "epsilon")),
        learnable=module.learnable if module else _operands(graph, op, row.learnable),
        buffers=module.buffers if module else _operands(graph, op, row.buffers),
        calls=graph.calls.get(_function_of(op.scope), 1),
        op=op,
        module=module,
    )


def _of_module(graph: ModelGraph, module: NormModule) -> Iterator[Norm]:
    """A norm that is no single op: once for each call of a spelled-out BatchNorm, else once in all."""
    norm = Norm(
        module.name,
        module.kind,
        module.spelling,
        module.evidence,
        module.axes,
        module.eps,
        module.learnable,
        module.buffers,
        module.calls,
        module=module,
    )
    lasts = _last_ops(graph, module) if module.kind == "batch_norm" else {}
    for call, op in lasts.items():
        yield replace(norm, name=f"{module.name}@{call}" if call else module.name, calls=1, op=op)
    if not lasts:
        yield norm


def _last_ops(graph: ModelGraph, module: NormModule) -> dict[int, Op]:
    """The op that each call of a module ends with. (A frozen BatchNorm ends with the Add of its shift.)"""
    return {op.call: op for op in graph.ops if op.owner == module.path}


def _operands(graph: ModelGraph, op: Op, slots: tuple[str, ...]) -> tuple[Tensor, ...]:
    tensors = (graph.input(op, slot) for slot in slots)
    return tuple(tensor for tensor in tensors if tensor is not None)


def _function_of(scope: Scope) -> Scope:
    """The function a scope lies in (its calls are the norm's calls), or the scope itself."""
    return Scope(scope.path[:1], True) if scope.function else scope
