"""Carries out a plan on a user's own module.

Its code makes the calls, so not every edit is possible: the absorber's weight and bias must be parameters of
one module that can be set, and the norm a module that can give way to nn.Identity, or to the rest of what it
does (an activation inside a BatchNorm subclass). `review` says where that fails; of what it lets through,
`trial` shows that the module's code, with the heirs in place, does what the plan expects.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from normtool.constants import Constants
from normtool.edits import Rebind, Splice
from normtool.errors import StalePlan, UsageError
from normtool.formats.torch.export import first_line, is_of_torch
from normtool.formats.torch.model import TorchModel, read_module
from normtool.formats.torch.rest import Rest, give_way, rest_of
from normtool.formats.torch.state import storage_key
from normtool.formats.torch.tensors import to_tensor
from normtool.formats.torch.trial import holds
from normtool.graph import NormModule, Op, Tensor
from normtool.planner import Fold, Path, Plan
from normtool.reasons import Reason
from normtool.values import Value, row_blocks

Reasons = tuple[Reason, ...]

#: Layers whose `forward` reads `self.bias`, so that one can be given to them.
_BIASED = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
)


# ---- what a module cannot do --------------------------------------------------------------------


def review(model: TorchModel, folds: Sequence[Fold]) -> dict[Path, Reasons]:
    """The folds that the user's module has no place for, each with every reason."""
    return _Review(model, folds).objections() or _tried(model, folds)


class _Review:
    def __init__(self, model: TorchModel, folds: Sequence[Fold]) -> None:
        assert model.module is not None
        self.graph = model.graph
        self.folds = folds
        self.modules = dict(model.module.named_modules(remove_duplicate=False))
        self.constants = Constants(model.graph)
        self.norms = {norm.path: norm for norm in model.graph.norm_modules if norm.kind == "batch_norm"}
        self.stored = model.state.by_name()
        self.absorbers = {fold.absorber: fold for fold in folds}
        self.spliced = {edit.op for fold in folds for edit in fold.edits if isinstance(edit, Splice)}
        self.sharers = _tensors_by_storage(model)

    def objections(self) -> dict[Path, Reasons]:
        found = {fold.path: self._of(fold) for fold in self.folds}
        return {path: reasons for path, reasons in found.items() if reasons}

    def _of(self, fold: Fold) -> Reasons:
        reasons: list[Reason] = []
        for edit in fold.edits:
            if isinstance(edit, Rebind) and edit.op is fold.absorber:
                reasons += self._rebind(edit)
            elif isinstance(edit, Splice):
                reasons += self._splice(edit.op)
            else:
                message = f"{edit.op.name!r} is called by the code of {edit.op.owner or 'the model'!r}"
                reasons.append(Reason("no_module", message, edit.op.name))
        return (*dict.fromkeys(reasons), *self._hooks(fold))

    # ---- the absorber -----------------------------------------------------------------

    def _rebind(self, edit: Rebind) -> Reasons:
        tensor = self.graph.input(edit.op, edit.slot)
        if tensor is None:
            return self._new_bias(edit)
        stored = self.stored.get(tensor.name)
        if stored is None:
            message = f"its {edit.slot} {tensor.name!r} is computed, not stored as a parameter"
            return (Reason("no_module", message, edit.op.name),)
        homes = {id(self.modules.get(name.rpartition(".")[0])) for name in stored.names}
        if len(homes) > 1 or len(self.sharers[storage_key(stored.tensor)]) > 1:
            message = f"{tensor.name!r} shares its storage with another parameter"
            return (Reason("shared_parameter", message, tensor.name),)
        return self._other_readers(tensor, edit)

    def _other_readers(self, tensor: Tensor, edit: Rebind) -> Reasons:
        """A parameter that is read several times takes the fold if every reader wants the same numbers."""
        for read in self.graph.readers(tensor):
            if read.op is edit.op and read.slot == edit.slot:
                continue
            wanted = self._rebound(read.op, read.slot)
            if wanted is None or not _same_numbers(wanted, edit.value):
                message = f"{tensor.name!r} is also read by {read.op.name!r}, which the fold does not reach"
                return (Reason("shared_parameter", message, tensor.name),)
        return ()

    def _rebound(self, op: Op, slot: str) -> Value | None:
        """What the plan puts at a slot of an absorber."""
        fold = self.absorbers.get(op)
        edits = fold.edits if fold is not None else ()
        found = (e.value for e in edits if isinstance(e, Rebind) and e.op is op and e.slot == slot)
        return next(found, None)

    def _new_bias(self, edit: Rebind) -> Reasons:
        op = edit.op
        layer: Any = self.modules.get(op.owner)
        known = next((kind for kind in _BIASED if isinstance(layer, kind)), None)
        if known is None or type(layer).forward is not known.forward:
            message = (
                f"{type(layer).__name__} has a forward of its own and no bias that the shift could go into"
            )
            return (Reason("no_module", message, op.name),)
        for other in self.graph.ops:
            if other.owner != op.owner or other is op or other.kind != op.kind:
                continue
            wanted = self._rebound(other, edit.slot)
            if wanted is None or not _same_numbers(wanted, edit.value):
                message = f"{op.owner!r} is also called as {other.name!r}, which needs another bias"
                return (Reason("shared_parameter", message, op.name),)
        return ()

    # ---- the norm ---------------------------------------------------------------------

    def _splice(self, op: Op) -> Reasons:
        norm = self.norms.get(op.owner)
        if norm is None:
            message = f"{op.name!r} is called by the code of {op.owner or 'the model'!r}, not by a norm module"
            return (Reason("no_module", message, op.name),)
        calls = self._calls_of(op)
        left = [each.name for each in calls if each not in self.spliced]
        if left:
            message = f"the same module is called as {left[0]!r}, where it cannot be folded"
            return (Reason("shared_parameter", message, op.name),)
        rest = rest_of(self.graph, calls) if op.kind == "batch_norm" else Rest()
        if isinstance(rest, Reason):
            return (rest,)
        return (*self._other_eyes(norm, op), *self._lost_hooks(op.owner, rest))

    def _calls_of(self, op: Op) -> list[Op]:
        """All that must go with the module: its BatchNorm ops, or what a spelled-out one does to the data."""
        own = [each for each in self.graph.ops if each.owner == op.owner]
        native = [each for each in own if each.kind == "batch_norm"]
        return native or [each for each in own if not self._is_constant(each)]

    def _is_constant(self, op: Op) -> bool:
        return not isinstance(self.constants.value(self.graph.output(op)), Reason)

    def _other_eyes(self, norm: NormModule, op: Op) -> Reasons:
        """Does anything but the norm's own code look at what it stores?"""
        for tensor in (*norm.learnable, *norm.buffers):
            for read in self.graph.readers(tensor):
                if read.op.owner != norm.path:
                    message = f"{tensor.name!r} is also read by {read.op.name!r}"
                    return (Reason("shared_parameter", message, op.name),)
        return ()

    def _lost_hooks(self, path: str, rest: Rest) -> Reasons:
        """Hooks on parts of a norm that do nothing in the graph, and so do not outlive it."""
        norm = self.modules[path]
        kept = {id(self.modules[child]) for child in rest.children}
        for name, part in norm.named_modules(prefix=path):
            if part is not norm and id(part) not in kept and _hooked(part) and not _below(name, rest.children):
                return (Reason("hook", f"{name!r} has hooks and goes with the norm", name),)
        return ()

    # ---- hooks ------------------------------------------------------------------------

    def _hooks(self, fold: Fold) -> Reasons:
        """Hooks that would see the tensors between absorber and norm: on modules left or entered in between.

        The graph was made without the user's hooks, so it does not show what one does to the absorber's weight.
        """
        absorber = self.modules.get(fold.absorber.owner)
        if absorber is not None and not all(map(is_of_torch, absorber._forward_pre_hooks.values())):
            owner = fold.absorber.owner
            return (Reason("hook", f"a forward pre-hook on {owner!r} may change its weight", owner),)
        for before, after in pairwise(_stack(op) for op in fold.path):
            left = [path for call, path in before.items() if call not in after]
            entered = [path for call, path in after.items() if call not in before]
            if path := self._first_hooked(left, "_forward_hooks"):
                return (Reason("hook", f"a hook on {path!r} sees what it puts out", path),)
            if path := self._first_hooked(entered, "_forward_pre_hooks"):
                return (Reason("hook", f"a hook on {path!r} sees what goes in", path),)
        return ()

    def _first_hooked(self, paths: Iterable[str], kind: str) -> str | None:
        """The first of these modules with hooks of a kind, or with any on its gradients."""
        for path in paths:
            module = self.modules.get(path)
            if module is not None and (
                getattr(module, kind) or module._backward_hooks or module._backward_pre_hooks
            ):
                return path
        return None


def _tensors_by_storage(model: TorchModel) -> defaultdict[object, set[int]]:
    """Storage → the tensors on it: stored ones, and those that modules hold as plain attributes."""
    assert model.module is not None
    sharers: defaultdict[object, set[int]] = defaultdict(set)
    plain = (value for module in model.module.modules() for value in vars(module).values())
    for tensor in (*(stored.tensor for stored in model.state.stored), *plain):
        if isinstance(tensor, torch.Tensor):
            sharers[storage_key(tensor)].add(id(tensor))
    return sharers


def _same_numbers(one: Value, other: Value) -> bool:
    return one.shape == other.shape and all(
        np.array_equal(one.rows(start, stop), other.rows(start, stop)) for start, stop in row_blocks(one)
    )


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _below(path: str, others: Sequence[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in others)


def _stack(op: Op) -> dict[str, str]:
    """The modules a call lies in, outermost first: a key for each call of a module → its path."""
    stack = op.source.meta.get("nn_module_stack") or {}
    return {key: path for key, (path, _) in stack.items()}


# ---- the trial ------------------------------------------------------------------------------------


def _tried(model: TorchModel, folds: Sequence[Fold]) -> dict[Path, Reasons]:
    """Folds behind which the module's code would do something else than the plan expects.

    Python can look at anything: at `self.bn.eps`, at the class of a child, at a list of modules that nobody
    registered. Halves are tried until those that fail are found.
    """
    if not folds or holds(model, folds, _heirs(model, folds)):
        return {}
    groups = _groups(folds)
    if len(groups) == 1:
        path = folds[0].path
        message = f"the model's code does something else once {path[-1].owner!r} has given way"
        return {fold.path: (Reason("no_module", message, fold.path[-1].name),) for fold in folds}
    half = len(groups) // 2
    found: dict[Path, Reasons] = {}
    for part in (groups[:half], groups[half:]):
        found |= _tried(model, [fold for group in part for fold in group])
    return found or _tried_as_one(folds)


def _tried_as_one(folds: Sequence[Fold]) -> dict[Path, Reasons]:
    """Each half goes through and both together do not: none is folded."""
    message = "the model's code does something else once all of its norms have given way"
    return {fold.path: (Reason("no_module", message, fold.path[-1].name),) for fold in folds}


def _groups(folds: Sequence[Fold]) -> list[list[Fold]]:
    """Folds that must go together: those that touch the same module."""
    groups: list[tuple[set[str], list[Fold]]] = []
    for fold in folds:
        touched, members = {op.owner for op in fold.path}, [fold]
        apart = []
        for owners, others in groups:
            if owners & touched:
                touched, members = owners | touched, [*others, *members]
            else:
                apart.append((owners, others))
        groups = [*apart, (touched, members)]
    return [members for _, members in groups]


def _heirs(model: TorchModel, folds: Sequence[Fold]) -> dict[str, Rest]:
    """Path of each norm module that goes → what is left of it."""
    calls: defaultdict[str, list[Op]] = defaultdict(list)
    for fold in folds:
        for op in fold.path[1:]:
            calls[op.owner] += [op] if op.kind == "batch_norm" else []
    rests = {path: rest_of(model.graph, ops) if ops else Rest() for path, ops in calls.items()}
    return {path: rest for path, rest in rests.items() if isinstance(rest, Rest)}


# ---- carrying it out ----------------------------------------------------------------------------


def fold_module(model: TorchModel, plan: Plan, inplace: bool = False) -> TorchModel:
    """The user's module with the plan carried out, a copy unless `inplace`.

    Raises StalePlan when the module has changed since, UsageError when it cannot be copied.
    """
    if plan.fingerprint != model.fingerprint:
        raise StalePlan("the plan was made for another model; make it again with plan()")
    assert model.module is not None
    heirs = _heirs(model, plan.folds)
    numbers = _new_numbers(model, plan)
    target = model.module if inplace else _copy(model.module)
    with torch.no_grad():
        for (path, name), tensor in numbers.items():
            _set(target.get_submodule(path), name, tensor)
    give_way(target, heirs)
    return read_module(target, model.example)


def _copy(module: nn.Module) -> nn.Module:
    """Tensors that carry a gradient's history cannot be copied as they are; weight_norm of old keeps one."""
    plain = (tensor for child in module.modules() for tensor in vars(child).values())
    derived = [t for t in plain if isinstance(t, torch.Tensor) and not t.is_leaf]
    try:
        return copy.deepcopy(module, {id(tensor): tensor.detach().clone() for tensor in derived})
    except Exception as error:
        message = f"the module cannot be copied ({first_line(error)}); inplace=True changes it"
        raise UsageError(message) from None


def _new_numbers(model: TorchModel, plan: Plan) -> dict[tuple[str, str], torch.Tensor]:
    """(module path, parameter name) → its new content; all of it is computed before anything is changed."""
    numbers: dict[tuple[str, str], torch.Tensor] = {}
    for edit in _rebinds(plan):
        tensor = model.graph.input(edit.op, edit.slot)
        name = tensor.name if tensor is not None else f"{edit.op.owner}.bias"
        path, _, last = name.rpartition(".")
        if (path, last) not in numbers:
            numbers[path, last] = to_tensor(edit.value)
    return numbers


def _rebinds(plan: Plan) -> Iterator[Rebind]:
    return (edit for edit in plan.edits if isinstance(edit, Rebind))


def _set(module: nn.Module, name: str, content: torch.Tensor) -> None:
    """New numbers in the old parameter: its dtype, device, memory format and requires_grad stay."""
    old = getattr(module, name, None)
    if isinstance(old, torch.Tensor):
        old.copy_(content.reshape(old.shape))
        return
    weight: Any = module.weight
    fresh = nn.Parameter(content.to(weight.device, weight.dtype), requires_grad=weight.requires_grad)
    module.register_parameter(name, fresh)
