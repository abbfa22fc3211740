"""The undo record of an ONNX model: its skeleton proto, and where each large tensor is found again."""

from collections.abc import Mapping
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from normtool import undo
from normtool.errors import UnreadableModel
from normtool.formats.onnx.model import OnnxModel
from normtool.formats.onnx.read import all_tensors, is_external, read_skeleton
from normtool.formats.onnx.wire import PENDING
from normtool.graph import Op, Tensor
from normtool.planner import Plan
from normtool.values import Value, byte_count, to_array

#: Stands in the skeleton for the key of a tensor in the record.
_KEY = "normtool-undo-"


def undo_record(original: OnnxModel, folded: OnnxModel, plan: Plan) -> dict[str, Any]:
    """What `undo_fold` needs to give back `original` from `folded`."""
    proto = onnx.ModelProto()
    proto.CopyFrom(original.proto)
    divided = undo.divisions(plan, _inputs(original, plan), folded.places)
    by_name = {tensor.name: division for tensor, division in divided.items()}
    left = _stored(folded)
    entries: list[dict[str, Any]] = []
    for tensor, stored in zip(all_tensors(proto), all_tensors(original.proto), strict=True):
        value = original.tensors.value(stored)
        if not is_external(tensor) and byte_count(value) <= undo.SMALL_BYTES:
            continue
        entry = _entry(tensor.name, value, by_name.get(tensor.name), left)
        _empty(tensor)
        if entry is None:
            tensor.raw_data = to_array(value).tobytes()
            continue
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=f"{_KEY}{len(entries)}")
        entries.append({"name": tensor.name, **entry})
    return undo.document("onnx", proto.SerializeToString(deterministic=True), entries, plan)


def _entry(
    name: str, value: Value, division: undo.Division | None, left: Mapping[str, Value]
) -> dict[str, Any] | None:
    """Where a tensor is found again; None where the record has to hold it."""
    if name in left and undo.digest(left[name]) == undo.digest(value):
        return undo.same_entry(name, value)
    if division is not None and division.name in left:
        return undo.divided_entry(division)
    return None


def _inputs(original: OnnxModel, plan: Plan) -> dict[tuple[Op, str], Tensor]:
    """What the original has at every place that the plan gives another constant."""
    ops = {op.source: op for op in original.graph.ops}
    found: dict[tuple[Op, str], Tensor] = {}
    for edit in plan.edits:
        op, slot = getattr(edit, "op", None), getattr(edit, "slot", "")
        own = ops.get(op.source) if op is not None and isinstance(op.source, int) else None
        tensor = original.graph.input(own, slot) if own is not None else None
        if op is not None and tensor is not None:
            found[op, slot] = tensor
    return found


def _stored(model: OnnxModel) -> dict[str, Value]:
    """Every stored tensor whose name means one thing in the whole model."""
    found: dict[str, Value] = {}
    twice: set[str] = set()
    for tensor in model.graph.tensors:
        if tensor.value is not None and tensor.stored_elements is None:
            twice |= {tensor.name} & found.keys()
            found[tensor.name] = tensor.value
    return {name: value for name, value in found.items() if name not in twice}


def _empty(tensor: TensorProto) -> None:
    """Keep name, shape and type."""
    name, dims, data_type = tensor.name, list(tensor.dims), tensor.data_type
    tensor.Clear()
    tensor.name, tensor.data_type = name, data_type
    tensor.dims.extend(dims)


def undo_fold(folded: OnnxModel, record: Any) -> OnnxModel:
    """The model before the fold, its BatchNorms back under their names.

    Raises UnreadableModel for a record that is none, StalePlan where the weights have changed since.
    """
    document = undo.check_document(record, "onnx")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(undo.from_text(document["skeleton"]))
        entries = list(document["tensors"])
    except (DecodeError, KeyError, TypeError):
        raise UnreadableModel("the undo record is damaged") from None
    left = _stored(folded)
    pending: dict[str, Value] = {}
    for tensor in all_tensors(proto):
        for location in (entry for entry in tensor.external_data if entry.key == "location"):
            number = location.value.removeprefix(_KEY)
            if not number.isdecimal() or int(number) >= len(entries):
                raise UnreadableModel("the undo record is damaged")
            location.value = f"{PENDING}undo-{number}"
            pending[location.value] = undo.recovered(entries[int(number)], left)
            if pending[location.value].shape != tuple(tensor.dims):
                raise UnreadableModel("the undo record is damaged")
    restored = read_skeleton(proto, folded.tensors.with_pending(pending), path=None, file=folded.file)
    restored.external = folded.external
    return restored
