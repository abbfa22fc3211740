"""Finds every normalisation layer of a graph, bodies and functions included.

Native operators are found by kind (`evidence: op`). Norms spelled out in primitive ops get their own
finder here (`evidence: pattern`); the report already has its place for them.
"""

import math
from typing import Any

from normtool.constants import Constants
from normtool.graph import ModelGraph, Op, Scope, Tensor
from normtool.norms import NORMS, Axes, Norm, NormRow


def find_norms(graph: ModelGraph, constants: Constants | None = None) -> list[Norm]:
    """Every norm, in the order the model lists its ops."""
    constants = constants or Constants(graph)
    return [_norm(constants, op, NORMS[op.kind]) for op in graph.ops if op.kind in NORMS]


def _norm(constants: Constants, op: Op, row: NormRow) -> Norm:
    graph = constants.graph
    data = graph.input(op, row.data)
    eps = constants.attribute(op, "epsilon")
    return Norm(
        op=op,
        row=row,
        name=op.name,
        axes=_axes(constants, op, row, graph.rank(data) if data is not None else None),
        eps=_number(eps),
        learnable=_operands(graph, op, row.learnable),
        buffers=_operands(graph, op, row.buffers),
        calls=graph.calls.get(_function_of(op.scope), 1),
    )


def _axes(constants: Constants, op: Op, row: NormRow, rank: int | None) -> Axes | None:
    """The normalised axes; a rank or an attribute the op cannot have leaves them unknown."""
    try:
        return row.axes(constants, op, rank)
    except (TypeError, ValueError, ZeroDivisionError):
        return None


def _number(stated: Any) -> float | None:
    """ε as a float; None where the operator has none, or states what is no finite number."""
    try:
        return float(stated) if math.isfinite(stated) else None
    except TypeError:
        return None


def _operands(graph: ModelGraph, op: Op, slots: tuple[str, ...]) -> tuple[Tensor, ...]:
    tensors = (graph.input(op, slot) for slot in slots)
    return tuple(tensor for tensor in tensors if tensor is not None)


def _function_of(scope: Scope) -> Scope:
    """The function a scope lies in (its calls are the norm's calls), or the scope itself."""
    return Scope(scope.path[:1], True) if scope.function else scope
