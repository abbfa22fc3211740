"""Weights worth spoiling: where an error of 1 % is planted to see whether a comparison finds it."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from normtool.graph import ModelGraph, Op, Tensor
from normtool.values import Array, Value, element_count, is_float, row_blocks

#: kind → slots that may hold its weight
WEIGHT_SLOTS = {"conv": ("weight",), "conv_transpose": ("weight",), "linear": ("b",), "matmul": ("a", "b")}

T = TypeVar("T")


def weights_of(graph: ModelGraph, op: Op) -> list[Tensor]:
    """The stored float weights of a linear op."""
    found = [graph.input(op, slot) for slot in WEIGHT_SLOTS.get(op.kind, ())]
    return [tensor for tensor in found if tensor is not None and _is_weight(tensor)]


def linear_weights(graph: ModelGraph) -> list[Tensor]:
    return list(dict.fromkeys(weight for op in graph.ops for weight in weights_of(graph, op)))


def changed(weights: Sequence[Tensor], reference: ModelGraph) -> list[Tensor]:
    """Those that the reference does not store, or stores differently; all of them if there is none."""
    stored = {(tensor.scope, tensor.name): tensor.value for tensor in reference.tensors}
    return [t for t in weights if not same_value(t.value, stored.get((t.scope, t.name)))] or list(weights)


def one_percent_off(shape: Sequence[int]) -> Array:
    """Factors of 1 ± 0.01, row by row: a common factor would vanish behind the next normalisation."""
    sign = np.where(np.random.default_rng(0).integers(0, 2, shape[:1]) == 1, 1.0, -1.0)
    return np.reshape(1 + 0.01 * sign, (*shape[:1], *[1] * (len(shape) - 1)))


def spaced(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items, evenly spread from first to last."""
    last = len(items) - 1
    positions = [round(i * last / max(1, count - 1)) for i in range(count)] if items else []
    return [items[position] for position in dict.fromkeys(positions)]


def same_value(value: Value | None, other: Value | None) -> bool:
    """Bit for bit."""
    if value is None or other is None or value.shape != other.shape or value.dtype != other.dtype:
        return False
    return all(value.rows(a, b).tobytes() == other.rows(a, b).tobytes() for a, b in row_blocks(value))


def _is_weight(tensor: Tensor) -> bool:
    value = tensor.value
    return value is not None and is_float(value.dtype) and element_count(value.shape) > 0
