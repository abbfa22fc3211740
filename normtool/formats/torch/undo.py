"""The undo record of a PyTorch model.

Of a program: the original .pt2, its large weights emptied (a zero, spread over the shape), and where each is
found again. Of a module: what it stored, by the keys of its state dict, and the torch.nn class of every norm
that gave way; a block whose branches were merged has another structure and cannot be put back into the module.
"""

import copy
import io
import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from normtool import undo
from normtool.destination import scratch_folder
from normtool.errors import UnreadableModel, UsageError
from normtool.formats.torch.export import undisturbed
from normtool.formats.torch.model import TorchModel, read_exported, read_module
from normtool.formats.torch.sources import read_pt2
from normtool.formats.torch.tensors import TorchValue, to_tensor
from normtool.graph import Op, Tensor
from normtool.planner import Plan
from normtool.proof import Region
from normtool.values import Value

#: Norms that a record may name: nothing else is built from one.
_NORMS: Mapping[str, type[nn.Module]] = {
    name: getattr(nn, name) for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
}


def undo_record(original: TorchModel, folded: TorchModel, plan: Plan) -> dict[str, Any]:
    """What `undo_fold` needs to give back `original` from `folded`."""
    if original.program is not None:
        return _program_record(original, folded, plan)
    return _module_record(original, folded, plan)


def undo_fold(folded: TorchModel, record: Any) -> TorchModel:
    """The model before the fold, its BatchNorms back under their names; a module is copied first.

    Raises UnreadableModel for a record that is none, StalePlan where the weights have changed since.
    """
    if folded.program is not None:
        return _restored_program(folded, undo.check_document(record, "pt2"))
    return _restored_module(folded, undo.check_document(record, "module"))


# ---- programs -----------------------------------------------------------------------------------


def _program_record(original: TorchModel, folded: TorchModel, plan: Plan) -> dict[str, Any]:
    assert original.program is not None
    state, entries = _emptied(original, folded, plan)
    buffer = io.BytesIO()
    with undisturbed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(_with_state(original.program, state), buffer)
    return undo.document("pt2", buffer.getvalue(), entries, plan)


def _emptied(
    original: TorchModel, folded: TorchModel, plan: Plan
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The state without what can be found again, and where that is."""
    assert original.program is not None
    divided = _divisions(original, folded, plan)
    left = _stored(folded)
    state: dict[str, torch.Tensor] = {}
    entries: list[dict[str, Any]] = []
    for name, tensor in original.program.state_dict.items():
        entry = None
        if tensor.nbytes > undo.SMALL_BYTES:
            entry = _entry(name, tensor, divided.get(name), left)
        state[name] = tensor
        if entry is not None:
            state[name] = _like(torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape), tensor)
            entries.append({"name": name, **entry})
    return state, entries


def _divisions(original: TorchModel, folded: TorchModel, plan: Plan) -> dict[str, undo.Division]:
    inputs: dict[tuple[Op, str], Tensor] = {}
    for edit in plan.edits:
        op, slot = getattr(edit, "op", None), getattr(edit, "slot", "")
        if op is not None and op in original.graph.nodes and (t := original.graph.input(op, slot)) is not None:
            inputs[op, slot] = t
    return {t.name: found for t, found in undo.divisions(plan, inputs, folded.places).items()}


def _entry(
    name: str, tensor: torch.Tensor, division: undo.Division | None, left: Mapping[str, Value]
) -> dict[str, Any] | None:
    value = TorchValue(tensor)
    if name in left and undo.digest(left[name]) == undo.digest(value):
        return undo.same_entry(name, value)
    if division is not None and division.name in left:
        return undo.divided_entry(division)
    return None


def _stored(model: TorchModel) -> dict[str, Value]:
    return {name: TorchValue(stored.tensor) for name, stored in model.state.by_name().items()}


def _like(content: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    if not isinstance(old, nn.Parameter):
        return content
    return nn.Parameter(content, requires_grad=old.requires_grad)


def _with_state(program: ExportedProgram, state: Mapping[str, torch.Tensor]) -> ExportedProgram:
    return ExportedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=program.graph_signature,
        state_dict=dict(state),
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _restored_program(folded: TorchModel, document: Mapping[str, Any]) -> TorchModel:
    with scratch_folder() as folder:
        path = folder / "skeleton.pt2"
        path.write_bytes(undo.from_text(str(document.get("skeleton"))))
        program = read_pt2(path).program
    assert program is not None
    left, state = _stored(folded), dict(program.state_dict)
    for entry in _entries(document):
        old = state.get(entry.get("name", ""))
        value = undo.recovered(entry, left)
        if old is None or tuple(old.shape) != value.shape:
            raise UnreadableModel("the undo record is damaged")
        state[entry["name"]] = _like(to_tensor(value).to(old.dtype), old)
    return read_exported(_with_state(program, state))


def _entries(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    entries = document.get("tensors")
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise UnreadableModel("the undo record is damaged")
    return entries


# ---- modules ------------------------------------------------------------------------------------


def _module_record(original: TorchModel, folded: TorchModel, plan: Plan) -> dict[str, Any]:
    assert original.module is not None
    assert folded.module is not None
    if any(isinstance(step, Region) for fold in plan.folds for step in fold.steps):
        raise UsageError("merged branches cannot be put back into a module; fold its exported program instead")
    divided, left = _divisions(original, folded, plan), folded.module.state_dict()
    entries, norms = [], []
    for name, tensor in original.module.state_dict().items():
        value = TorchValue(tensor)
        division = divided.get(name)
        if name in left and undo.digest(TorchValue(left[name])) == undo.digest(value):
            entries.append({"name": name, "how": "same"})
        elif division is not None:
            entries.append({"name": name, **undo.divided_entry(division)})
        else:
            entries.append({"name": name, "how": "stored", "content": _written(tensor)})
    for path, module in original.module.named_modules():
        heir = dict(folded.module.named_modules()).get(path)
        if type(heir) is not type(module) and isinstance(module, nn.modules.batchnorm._BatchNorm):
            norms.append(_described(path, module))
    return undo.document("module", json.dumps(norms).encode(), entries, plan)


def _described(path: str, norm: Any) -> dict[str, Any]:
    name = type(norm).__name__
    if _NORMS.get(name) is not type(norm):
        raise UsageError(f"{path!r} is a {name}: only norms of torch.nn can be built again from a record")
    return {
        "path": path,
        "class": name,
        "num_features": norm.num_features,
        "eps": norm.eps,
        "momentum": norm.momentum,
        "affine": norm.affine,
        "track_running_stats": norm.track_running_stats,
        "training": norm.training,
        "requires_grad": norm.weight is not None and norm.weight.requires_grad,
    }


def _written(tensor: torch.Tensor) -> str:
    buffer = io.BytesIO()
    torch.save(tensor.detach().clone(), buffer)
    return undo.to_text(buffer.getvalue())


def _read_back(text: str) -> torch.Tensor:
    found = torch.load(io.BytesIO(undo.from_text(text)), weights_only=True)
    if not isinstance(found, torch.Tensor):
        raise UnreadableModel("the undo record is damaged")
    return found


def _restored_module(folded: TorchModel, document: Mapping[str, Any]) -> TorchModel:
    assert folded.module is not None
    left = {name: TorchValue(tensor) for name, tensor in folded.module.state_dict().items()}
    module = copy.deepcopy(folded.module)
    for norm in json.loads(undo.from_text(str(document.get("skeleton")))):
        _put_back(module, norm)
    entries = {str(entry.get("name")): entry for entry in _entries(document)}
    _take_off_new_biases(module, set(entries))
    state = module.state_dict()
    if set(state) != set(entries):
        raise UnreadableModel("the undo record is of another model")
    with torch.no_grad():
        for name, entry in entries.items():
            if entry.get("how") == "same":
                continue
            stored = entry.get("how") == "stored"
            new = _read_back(str(entry["content"])) if stored else to_tensor(undo.recovered(entry, left))
            state[name].copy_(new.reshape(state[name].shape))
    return read_module(module, folded.example)


def _put_back(module: nn.Module, norm: Mapping[str, Any]) -> None:
    """A norm of torch.nn where another module stands now."""
    kind = _NORMS.get(str(norm.get("class")))
    parent, _, name = str(norm.get("path")).rpartition(".")
    if kind is None or not name:
        raise UnreadableModel("the undo record is damaged")
    stated = ("eps", "momentum", "affine", "track_running_stats")
    made = kind(int(norm["num_features"]), **{each: norm[each] for each in stated})
    heir = module.get_submodule(str(norm["path"]))
    like = next(module.parameters(), None)
    if like is not None:
        made.to(like.device, like.dtype)
    made.train(bool(norm["training"])).requires_grad_(bool(norm["requires_grad"]))
    made._forward_hooks = heir._forward_hooks
    setattr(module.get_submodule(parent), name, made)


def _take_off_new_biases(module: nn.Module, known: set[str]) -> None:
    """Biases that the fold has given to layers without one."""
    for path, child in module.named_modules():
        name = f"{path}.bias" if path else "bias"
        if "bias" in child._parameters and child._parameters["bias"] is not None and name not in known:
            child.register_parameter("bias", None)
