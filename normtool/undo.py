"""What a fold has to remember so that it can be undone.

The record holds the original model without its large weights (the *skeleton*: every name, attribute and small
tensor), and for each large tensor how to find it again: it is still there (`same`), it is W' divided by a
factor (`divided`: W' = s·W, so W = W'/s up to two roundings), or it lies in the record itself (`stored`: s = 0
somewhere, or a kernel that went into another one). Statistics, γ, β and biases are never computed: they come
back bit for bit.

Each tensor of the folded model that is needed is named with its SHA-256; trained any further, it is refused.
"""

import base64
import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from normtool.edits import Graft, Rebind
from normtool.errors import StalePlan, UnreadableModel, UsageError
from normtool.graph import Op, Tensor
from normtool.planner import Plan
from normtool.values import Array, Scaled, Value, row_blocks

SCHEMA = "normtool.undo/1"

#: Tensors up to this many bytes stay in the skeleton.
SMALL_BYTES = 1 << 12

#: A record may not unpack to more than this: a few bytes can claim gigabytes.
_MOST_BYTES = 1 << 31

#: (op, slot) → the name of the tensor that the folded model has there.
Places = Mapping[tuple[Any, str], str]


@dataclass(frozen=True, eq=False)
class Division:
    """An original weight as a tensor of the folded model divided by `factor`."""

    name: str
    value: Value
    factor: Array


def divisions(plan: Plan, original: Mapping[tuple[Op, str], Tensor], places: Places) -> dict[Tensor, Division]:
    """Original tensor → how it comes out of the folded model. What is not here must be stored.

    Raises UsageError for a swap: what is centred has lost its mean for good.
    """
    if any(isinstance(edit, Graft) for edit in plan.edits):
        raise UsageError("a swap cannot be undone from a record; keep the original")
    found: dict[Tensor, Division] = {}
    for edit in plan.edits:
        if not isinstance(edit, Rebind) or (edit.op, edit.slot) not in original:
            continue
        tensor = original[edit.op, edit.slot]
        factor = _factor(edit.value, tensor.value)
        name = places.get((edit.op.source, edit.slot))
        if factor is not None and name is not None:
            found[tensor] = Division(name, edit.value, factor)
    return found


def _factor(value: Value, original: Value | None) -> Array | None:
    """s where `value` is s·`original`, s without zeros; None where it is something else."""
    factor = np.ones(1)
    while isinstance(value, Scaled):
        factor = factor * value.factor.astype(np.float64)
        value = value.source
    usable = value is original and np.isfinite(factor).all() and np.all(factor != 0)
    return factor if usable else None


# ---- as JSON ----------------------------------------------------------------------------------


def to_text(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 9)).decode("ascii")


def from_text(text: str) -> bytes:
    """Raises UnreadableModel for what is no packed content, or unpacks beyond all bounds."""
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(base64.b64decode(text, validate=True), _MOST_BYTES)
    except (ValueError, TypeError, zlib.error):
        raise UnreadableModel("the undo record is damaged") from None
    if not unpacker.eof:
        raise UnreadableModel("the undo record is damaged, or unpacks to gigabytes")
    return content


def packed(array: Array) -> dict[str, Any]:
    """An array of float64 as JSON."""
    wide = np.ascontiguousarray(array, np.float64)
    return {"shape": list(wide.shape), "data": to_text(wide.tobytes())}


def unpacked(entry: Mapping[str, Any]) -> Array:
    try:
        shape = tuple(int(n) for n in entry["shape"])
        return np.frombuffer(from_text(entry["data"]), np.float64).reshape(shape)
    except (KeyError, TypeError, ValueError):
        raise UnreadableModel("the undo record is damaged") from None


def digest(value: Value) -> str:
    """SHA-256 over the numbers of a tensor, row by row."""
    found = hashlib.sha256()
    for start, stop in row_blocks(value):
        found.update(np.ascontiguousarray(value.rows(start, stop)).tobytes())
    return found.hexdigest()


def same_entry(name: str, value: Value) -> dict[str, Any]:
    return {"how": "same", "from": name, "sha256": digest(value)}


def divided_entry(division: Division) -> dict[str, Any]:
    factor = packed(division.factor)
    return {"how": "divided", "from": division.name, "factor": factor, "sha256": digest(division.value)}


def recovered(entry: Mapping[str, Any], folded: Mapping[str, Value]) -> Value:
    """The content of an original tensor. Raises StalePlan where the folded model has changed since."""
    value = folded.get(str(entry.get("from")))
    if value is None or digest(value) != entry.get("sha256"):
        raise StalePlan(f"{entry.get('from')!r} is not what the fold has left; the record is of another model")
    if entry.get("how") == "same":
        return value
    return Scaled(value, 1 / unpacked(entry["factor"]))


def document(format: str, skeleton: bytes, tensors: list[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The record as JSON; `norms` says in words what the skeleton holds."""
    norms = [
        {
            "name": site.norm.name,
            "kind": site.norm.kind,
            "eps": site.norm.eps,
            "tensors": [tensor.name for tensor in (*site.norm.learnable, *site.norm.buffers)],
        }
        for site in plan.sites
        if site.fold is not None
    ]
    return {
        "schema": SCHEMA,
        "format": format,
        "norms": norms,
        "tensors": tensors,
        "skeleton": to_text(skeleton),
    }


def check_document(record: Any, format: str) -> Mapping[str, Any]:
    """Raises UnreadableModel for what is no undo record, or one of another kind of model."""
    if not isinstance(record, Mapping) or record.get("schema") != SCHEMA:
        raise UnreadableModel("not an undo record; `normtool fold --undo --report FILE` writes one")
    if record.get("format") != format:
        raise UnreadableModel(f"the undo record is of a {record.get('format')} model, this one is {format}")
    return record
