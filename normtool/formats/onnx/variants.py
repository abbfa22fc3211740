"""What a validation looks at: variants of models, weights worth spoiling, tensors worth comparing inside."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from normtool.constants import Constants
from normtool.detect import find_norms
from normtool.edits import Rebind
from normtool.formats.onnx.apply import variant
from normtool.formats.onnx.model import OnnxModel
from normtool.graph import ModelGraph, Op, Role, Scope, Tensor
from normtool.inputs import nudge
from normtool.norms import NORMS
from normtool.parameters import roles
from normtool.reasons import Reason
from normtool.suspects import WEIGHT_SLOTS, changed, linear_weights, one_percent_off, same_value, weights_of
from normtool.values import Array, Scaled, Value, is_float, to_array

#: What identifies an op in two models: its scope and the names it gives.
Key = tuple[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Nudged:
    """A stored value, every float of it moved to a neighbour; the same neighbours for the same seed."""

    source: Value
    seed: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.source.dtype

    def rows(self, start: int, stop: int) -> Array:
        return nudge(self.source.rows(start, stop), np.random.default_rng([*self.seed, start]))


def nudged(model: OnnxModel, seed: int, outputs: Sequence[str]) -> OnnxModel:
    """The model with every float weight one rounding away, computed ones (ConstantOfShape) too."""
    stored = {
        tensor: Nudged(tensor.value, (seed, number))
        for number, (tensor, role) in enumerate(_stored_roles(model).items())
        if role is not Role.CONSTANT and tensor.value is not None and is_float(tensor.value.dtype)
    }
    computed = [
        Rebind(op, slot, Nudged(value, (seed, number)), f"{op.name}.{slot}")
        for number, (op, slot, value) in enumerate(_computed_weights(model))
    ]
    return variant(model, stored, computed, outputs)


def wrong_by_one_percent(model: OnnxModel, weight: Tensor, outputs: Sequence[str]) -> OnnxModel:
    """One weight wrong by ±1 %, row by row."""
    assert weight.value is not None
    return variant(model, {weight: Scaled(weight.value, one_percent_off(weight.value.shape))}, outputs=outputs)


def suspects(reference: ModelGraph, candidate: OnnxModel) -> list[Tensor]:
    """Weights of the candidate's linear ops; those that differ from the reference, if any do."""
    weights = linear_weights(candidate.graph)
    weights = weights or [t for t, role in _stored_roles(candidate).items() if role is Role.PARAMETER]
    return changed(weights, reference)


@dataclass(frozen=True, eq=False)
class FoldedSites:
    """Tensors of both main graphs that another kind of op produces now: what a fold leaves behind.

    `taps` are their names. `ops` are the ops of the candidate that produce them, and where such an op only
    adds the shift, the absorber in front of it.
    """

    taps: tuple[str, ...]
    ops: tuple[Op, ...]

    def weights(self, candidate: OnnxModel) -> list[Tensor]:
        """The stored weights of those ops."""
        return list(dict.fromkeys(w for op in self.ops for w in weights_of(candidate.graph, op)))


def folded_sites(reference: OnnxModel, candidate: OnnxModel) -> FoldedSites:
    ours, theirs = _producers(candidate.graph), _producers(reference.graph)
    affine = {"batch_norm", "add", "sub", "mul", "div"}
    taps = [
        name
        for name, op in theirs.items()
        if op.kind in affine
        and name in ours
        and ours[name].kind != op.kind
        and _is_typed(candidate.graph, ours[name])
        and _is_typed(reference.graph, op)
    ]
    ops: dict[Op, None] = {}
    for name in taps:
        ops[ours[name]] = None
        data = candidate.graph.input(ours[name], "a") if ours[name].kind == "add" else None
        absorber = candidate.graph.producer(data) if data is not None else None
        if absorber is not None:
            ops[absorber] = None
    return FoldedSites(tuple(taps), tuple(ops))


def differ_elsewhere(reference: OnnxModel, candidate: OnnxModel, sites: FoldedSites) -> bool:
    """Do the models differ in anything but the folded sites, op by op and number by number?"""
    changed = set(sites.ops)
    ours, theirs = _described(candidate.graph), _described(reference.graph)
    stored = _stored_values(reference.graph)
    for op in candidate.graph.ops:
        key = _key(candidate.graph, op)
        if op in changed or op.kind == "constant":
            continue
        own = [t for t in candidate.graph.inputs(op).values() if t.value is not None]
        if ours[key] != theirs.get(key):
            return True
        if not all(same_value(t.value, stored.get((t.scope, t.name))) for t in own):
            return True
    return False


def _stored_roles(model: OnnxModel) -> dict[Tensor, Role]:
    """Dense stored tensors, and what they are."""
    found = roles(model.graph, find_norms(model.graph))
    return {t: role for t, role in found.items() if t.stored_elements is None}


def _computed_weights(model: OnnxModel) -> Iterator[tuple[Op, str, Value]]:
    """Float weights that the model computes from constants, where they are read."""
    constants = Constants(model.graph)
    for op in model.graph.ops:
        slots = (*WEIGHT_SLOTS.get(op.kind, ()), *(NORMS[op.kind].learnable if op.kind in NORMS else ()))
        for slot in slots:
            tensor = model.graph.input(op, slot)
            value = constants.value(tensor) if tensor is not None and tensor.value is None else None
            if value is not None and not isinstance(value, Reason) and is_float(value.dtype):
                yield op, slot, value


def _producers(graph: ModelGraph) -> dict[str, Op]:
    """Activation name → op, for the main graph."""
    return {t.name: op for op in graph.ops if op.scope == Scope() for t in graph.outputs(op).values()}


def _stored_values(graph: ModelGraph) -> dict[tuple[Scope, str], Value | None]:
    return {(tensor.scope, tensor.name): tensor.value for tensor in graph.tensors}


def _key(graph: ModelGraph, op: Op) -> Key:
    return str(op.scope), tuple(sorted(tensor.name for tensor in graph.outputs(op).values()))


def _described(graph: ModelGraph) -> dict[Key, Any]:
    """Each op by its key: spelling, attributes, names of what it reads."""
    return {
        _key(graph, op): (
            op.spelling,
            op.domain,
            {name: _plain(value) for name, value in op.attributes.items()},
            {slot: tensor.name for slot, tensor in graph.inputs(op).items()},
        )
        for op in graph.ops
    }


def _plain(attribute: Any) -> Any:
    """An attribute as something that compares: tensors by their content."""
    return to_array(attribute).tobytes() if hasattr(attribute, "rows") else attribute


def _is_typed(graph: ModelGraph, op: Op) -> bool:
    tensor = graph.output(op)
    return tensor.dtype is not None and graph.rank(tensor) is not None
