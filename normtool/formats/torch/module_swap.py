"""Carries out a swap on a user's own module: LayerNorms give way to nn.RMSNorm, writers are centred in place.

`swap_changes` reads off a plan what that comes to, or why a module cannot do it; `swap_constants` finds the
parameters behind what an op reads; `swap_heirs` has what takes the places of modules; `swap_trial` shows that
the module's code, with that in place, makes the calls that the plan expects.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from normtool.errors import StalePlan
from normtool.formats.torch.model import TorchModel, read_module
from normtool.formats.torch.module_apply import copied, set_numbers, with_names
from normtool.formats.torch.state import state_of_module
from normtool.formats.torch.swap_changes import Changes, changes_of
from normtool.formats.torch.swap_heirs import NORM, SHIFT, give_way
from normtool.formats.torch.swap_trial import refused
from normtool.formats.torch.tensors import to_tensor
from normtool.graph import Op
from normtool.planner import Fold, Path, Plan
from normtool.reasons import Reason

Placed = dict[tuple[Any, str], torch.Tensor]


def review(model: TorchModel, folds: Sequence[Fold]) -> Mapping[Path, tuple[Reason, ...]]:
    """The changes that the user's module has no place for, each with every reason."""
    if not folds:
        return {}
    changes = changes_of(model, folds)
    if changes.against:
        return changes.against
    found: dict[Path, tuple[Reason, ...]] = {}
    for item in refused(model, changes):
        where, fold = (item[0].owner, item[1]) if isinstance(item, tuple) else (item.path, item.fold)
        message = f"the model's code does something else once {where!r} has changed"
        found[fold.path] = (Reason("no_module", message, where),)
    return found


def swap_module(model: TorchModel, plan: Plan, inplace: bool = False) -> TorchModel:
    """The user's module with the swap carried out, a copy unless `inplace`.

    Raises StalePlan when the module has changed since, UsageError when it cannot be copied.
    """
    if plan.fingerprint != model.fingerprint:
        raise StalePlan("the plan was made for another model; make it again with plan()")
    assert model.module is not None
    changes = changes_of(model, plan.folds)
    assert not changes.against, "the plan was not reviewed"
    new = {name: (to_tensor(value), reads) for name, (value, reads) in changes.contents.items()}
    biases = {op: to_tensor(value) for op, (_, value) in changes.biased.items()}
    target = model.module if inplace else copied(model.module)
    placed: Placed = {}
    with torch.no_grad():
        for name, (content, reads) in new.items():
            path, _, last = name.rpartition(".")
            parameter = set_numbers(target.get_submodule(path), last, content)
            placed |= {(read.op.source, read.slot): parameter for read in reads}
        for op, content in biases.items():
            bias = set_numbers(target.get_submodule(op.owner), "bias", content)
            placed[op.source, _bias_slot(op)] = bias
    before = state_of_module(target)
    old_names = {name: stored.tensor for stored in before.stored for name in stored.names}
    built = give_way(target, changes.heirs, changes.centred)
    moved = _place(changes, built, placed)
    result = with_names(read_module(target, model.example), before, placed)
    names = {id(stored.tensor): stored.names[0] for stored in result.state.stored}
    now = {id(stored.tensor) for stored in result.state.stored}
    for name, tensor in moved.items():
        if name in old_names and id(old_names[name]) not in now:
            result.renamed[name] = names[id(tensor)]
    return result


def _bias_slot(op: Op) -> str:
    return "c" if op.kind == "linear" else "bias"


def _place(changes: Changes, built: Mapping[str, nn.Module], placed: Placed) -> dict[str, torch.Tensor]:
    """Note where γ and β of norms are now. Returns those that are new, by the names of what they were."""
    moved: dict[str, torch.Tensor] = {}
    for each in changes.norms:
        heir = built[each.path]
        norm = heir.get_submodule(NORM) if each.heir.bias is not None else heir
        if each.heir.weight is not None:
            placed[(each.graft, 0), "weight"] = norm.weight  # type: ignore[assignment]
            moved[each.heir.weight.like] = norm.weight  # type: ignore[assignment]
        if each.heir.bias is not None:
            bias = heir.get_submodule(SHIFT).bias
            placed[(each.graft, len(each.graft.parts) - 1), "b"] = bias  # type: ignore[assignment]
            moved[each.heir.bias.like] = bias  # type: ignore[assignment]
    return moved
