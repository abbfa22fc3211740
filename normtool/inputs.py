"""Example inputs: what to feed a model so that a difference would show.

An `InputSpec` is a few plain values, so it crosses a process border as JSON; `generate` turns it into the
same array everywhere. Integers stay inside the table they index, masks keep one valid element in each row,
and every dynamic dimension is tried at two sizes.
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from normtool.errors import UsageError
from normtool.graph import ModelGraph, Role, Scope, Shape, Tensor
from normtool.values import Array, is_float

#: Sizes of dynamic dimensions by what they are, in the order they are tried. The first two that run are used.
_SIZES: tuple[Mapping[str, int], ...] = tuple(
    {"batch": batch, "spatial": spatial, "sequence": sequence}
    for batch, spatial, sequence in [
        *((2, 64, 8), (3, 96, 13), (2, 224, 16), (3, 320, 24), (2, 32, 5), (3, 48, 7)),
        *((1, 64, 8), (1, 96, 13), (1, 224, 16), (1, 320, 24), (1, 32, 5), (1, 48, 7), (1, 640, 128)),
        (1, 1, 1),
    ]
)

#: distribution → (mean, standard deviation) of float inputs; one input set for each
DISTRIBUTIONS = ("normal", "normal*4", "uniform")

#: Dtypes whose neighbours are a rounding away; 8 bits and fewer are a quantiser's choice.
_NUDGED = frozenset(["float16", "bfloat16", "float32", "float64"])

#: Ops that hand integers on unchanged.
_CARRIERS = frozenset("identity cast reshape squeeze unsqueeze transpose flatten expand".split())

#: (kind, slot of the indices) → slot of the table they index
_TABLES = {
    ("embedding", "indices"): "table",
    ("embed_layer_norm", "input_ids"): "word_embedding",
    ("embed_layer_norm", "segment_ids"): "segment_embedding",
    ("embed_layer_norm", "position_ids"): "position_embedding",
}


@dataclass(frozen=True)
class InputSpec:
    """One input array. `high` bounds integers from above (exclusive); `mask` asks for 0 and 1."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    distribution: str = "normal"
    high: int = 2
    mask: bool = False
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "InputSpec":
        return cls(**{**fields, "shape": tuple(fields["shape"])})


def generate(spec: InputSpec) -> Array:
    """The array a spec stands for: the same on every machine and in every process."""
    rng = np.random.default_rng([spec.seed, zlib.crc32(spec.name.encode())])
    dtype = np.dtype(spec.dtype)
    if not is_float(dtype):
        return np.asarray(_integers(spec, rng)).astype(dtype)
    if spec.distribution == "uniform":
        return np.asarray(rng.random(spec.shape)).astype(dtype)
    scale = 4.0 if spec.distribution == "normal*4" else 1.0
    return np.asarray(rng.standard_normal(spec.shape) * scale).astype(dtype)


def _integers(spec: InputSpec, rng: np.random.Generator) -> Array:
    if spec.mask or spec.dtype == "bool":
        array = np.asarray(rng.integers(0, 2, spec.shape))
        if array.ndim:
            array[..., :1] = 1  # a row without any valid element makes NaN in most attentions
        return array
    return np.asarray(rng.integers(0, max(1, spec.high), spec.shape))


def nudge(array: Array, rng: np.random.Generator) -> Array:
    """Every float moved to one of its two neighbours, up or down at random; anything else as it is.

    Zeros stay: they are exact in any precision, and their neighbours are no rounding away. So do the
    largest number and infinity.
    """
    if array.dtype.name not in _NUDGED or array.size == 0:
        return array
    towards = np.where(rng.integers(0, 2, array.shape) == 1, np.inf, -np.inf).astype(array.dtype)
    with np.errstate(over="ignore"):  # masks are full of the largest number
        moved = np.nextafter(array, towards)
    return np.asarray(np.where((array == 0) | ~np.isfinite(moved) | ~np.isfinite(array), array, moved))


#: What a caller says of an input: its shape, and its dtype if it is not the model's own.
Shapes = Mapping[str, tuple[tuple[int, ...], str | None]]


def attempts(graph: ModelGraph, seed: int, shapes: Shapes | None = None) -> list[list[InputSpec]]:
    """Input sets to try, one for each assignment of sizes; a model without dynamic dimensions has one.

    Raises UsageError when `shapes` names no input of the model.
    """
    tensors, given = model_inputs(graph), shapes or {}
    strangers = set(given) - {tensor.name for tensor in tensors}
    if strangers:
        known = ", ".join(tensor.name for tensor in tensors)
        raise UsageError(f"the model has no input {strangers.pop()!r}; it has {known}")
    for tensor in tensors:
        if tensor.name in given and not fits(given[tensor.name][0], tensor.shape):
            asked = given[tensor.name][0]
            raise UsageError(f"input {tensor.name!r} cannot have shape {asked}; the model wants {tensor.shape}")
    found: list[list[InputSpec]] = []
    for sizes in _SIZES:
        specs = [_given(_spec(graph, tensor, sizes, seed), given.get(tensor.name)) for tensor in tensors]
        if specs not in found:
            found.append(specs)
    return found


def fits(lengths: tuple[int, ...], shape: Shape | None) -> bool:
    """May an input that the model describes as `shape` have these lengths?"""
    if shape is None:
        return True
    pairs = zip(lengths, shape, strict=False)
    return len(lengths) == len(shape) and all(not isinstance(n, int) or n == length for length, n in pairs)


def _given(spec: InputSpec, shape: tuple[tuple[int, ...], str | None] | None) -> InputSpec:
    return spec if shape is None else replace(spec, shape=shape[0], dtype=shape[1] or spec.dtype)


def spread(base: list[list[InputSpec]], seed: int) -> list[list[InputSpec]]:
    """One input set per distribution, going round the size assignments that run."""
    return [
        [replace(spec, distribution=distribution, seed=seed + i) for spec in base[i % len(base)]]
        for i, distribution in enumerate(DISTRIBUTIONS)
    ]


def is_dynamic(graph: ModelGraph) -> bool:
    """Does any input have a dimension that the model leaves open?"""
    shapes = [tensor.shape if tensor.shape is not None else (None,) for tensor in model_inputs(graph)]
    return any(not isinstance(n, int) for shape in shapes for n in shape)


def model_inputs(graph: ModelGraph) -> list[Tensor]:
    """What a caller must feed: inputs of the main graph that store no value of their own."""
    return [t for t in graph.tensors if t.role is Role.INPUT and t.scope == Scope() and t.value is None]


def _spec(graph: ModelGraph, tensor: Tensor, sizes: Mapping[str, int], seed: int) -> InputSpec:
    shape = tensor.shape if tensor.shape is not None else (1,)
    dtype = tensor.dtype if tensor.dtype is not None else np.dtype(np.float32)
    lengths = tuple(_length(n, axis, len(shape), sizes) for axis, n in enumerate(shape))
    high = min(_bounds(graph, tensor), default=2)
    return InputSpec(tensor.name, dtype.name, lengths, high=high, mask="mask" in tensor.name.lower(), seed=seed)


def _length(length: int | str | None, axis: int, rank: int, sizes: Mapping[str, int]) -> int:
    """A dimension's size; a symbol such as `past + seq` is a sum."""
    if isinstance(length, int):
        return length
    if isinstance(length, str) and "+" in length:
        return sum(_length(_term(part), axis, rank, sizes) for part in length.split("+"))
    if isinstance(length, str) and "batch" in length.lower():
        return sizes["batch"]
    if isinstance(length, str) and any(part in length.lower() for part in ("seq", "len", "past")):
        return sizes["sequence"]
    if axis == 0:
        return sizes["batch"]
    return sizes["spatial" if rank >= 4 and axis >= 2 else "sequence"]


def _term(text: str) -> int | str:
    text = text.strip()
    return int(text) if text.isdigit() else text


def _bounds(graph: ModelGraph, tensor: Tensor) -> Iterator[int]:
    """Lengths of the tables that an integer input indexes, straight or through ops that only carry it."""
    pending, seen = [tensor], {tensor}
    while pending:
        for read in graph.readers(pending.pop()):
            table = graph.input(read.op, _TABLES.get((read.op.kind, read.slot), ""))
            if table is not None and table.shape:
                axis = int(read.op.attributes.get("axis") or 0) if read.op.kind == "embedding" else 0
                length = table.shape[axis]
                if isinstance(length, int):
                    yield length
            if read.op.kind in _CARRIERS:
                for output in graph.outputs(read.op).values():
                    if output not in seen:
                        seen.add(output)
                        pending.append(output)
