"""Carries out a plan on a user's own module.

Its code makes the calls, so not every edit is possible: the absorber's weight and bias must be parameters of
one module that can be set, and the norm a module that can give way to nn.Identity, or to the rest of what it
does (an activation inside a BatchNorm subclass). Where parallel branches have become one convolution, the whole
module that adds them up gives way (`blocks`). `review` says where that fails; of what it lets through, `trial`
shows that the module's code, with the heirs in place, does what the plan expects.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from normtool.constants import Constants
from normtool.edits import Edit, Graft, Insert, Rebind, Replace, Splice, consolidated
from normtool.errors import StalePlan, UsageError
from normtool.formats.torch.blocks import Block, blocks_of, is_merge, same_numbers, unlike
from normtool.formats.torch.export import first_line, is_of_torch
from normtool.formats.torch.model import TorchModel, read_module
from normtool.formats.torch.rest import Rest, Shift, give_way, rest_of, stack_of
from normtool.formats.torch.state import State, state_of_module, storage_key
from normtool.formats.torch.tensors import to_tensor
from normtool.formats.torch.trial import holds
from normtool.graph import NormModule, Op, Read, Tensor
from normtool.planner import Fold, Path, Plan
from normtool.reasons import Reason
from normtool.values import Value, element_count

Reasons = tuple[Reason, ...]

#: Layers whose `forward` reads `self.bias`, so that one can be given to them.
_BIASED = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
)

#: op kind → the slot of its bias
_BIAS = {"conv": "bias", "conv_transpose": "bias", "linear": "c"}


# ---- what a module cannot do --------------------------------------------------------------------


def review(model: TorchModel, folds: Sequence[Fold]) -> dict[Path, Reasons]:
    """The folds that the user's module has no place for, each with every reason."""
    found = Review(model, folds)
    return found.objections() or _tried(model, folds, found.blocks)


class Review:
    def __init__(self, model: TorchModel, folds: Sequence[Fold]) -> None:
        assert model.module is not None
        self.graph = model.graph
        self.folds = folds
        self.modules = dict(model.module.named_modules(remove_duplicate=False))
        self.constants = Constants(model.graph)
        self.norms = {norm.path: norm for norm in model.graph.norm_modules if norm.kind == "batch_norm"}
        self.stored = model.state.by_name()
        self.final = _final(folds)
        self.originals = {op.source: op for op in model.graph.ops}
        self.spliced = {self._original(edit.op) for edit in _all_edits(folds) if isinstance(edit, Splice)}
        #: norm → the shift that stays in its place
        self.shifts = _shifts(folds)
        self.sharers = tensors_by_storage(model)
        self.blocks, self.unmerged = blocks_of(model, folds)
        self.block_of = {each.fold: block for block in self.blocks for each in block.sums}
        self.unlike = unlike(model, self.blocks, self.final)
        #: sources of ops that vanish with their blocks: nobody has to carry out what else becomes of those
        self.vanish = {source for block in self.blocks for source in block.sources}

    def objections(self) -> dict[Path, Reasons]:
        found = {fold.path: self._of(fold) for fold in self.folds}
        return {path: reasons for path, reasons in found.items() if reasons}

    def _of(self, fold: Fold) -> Reasons:
        if is_merge(fold):
            return self._merge(fold)
        reasons: list[Reason] = []
        for edit in fold.edits:
            if isinstance(edit, Graft):
                message = f"the model's code hands on {edit.tensor.name!r} as it is"
                reasons.append(Reason("no_module", message, edit.tensor.name))
                continue
            if not isinstance(edit, Insert) and edit.op.source in self.vanish:
                continue
            op = edit.behind if isinstance(edit, Insert) else self._original(edit.op)
            if isinstance(edit, Rebind) and edit.op in self.graph.nodes:
                reasons += self._rebind(edit)
            elif isinstance(edit, Rebind | Splice | Replace) and (op in self.spliced or op in self.shifts):
                reasons += self._give_way(op)
            else:
                message = f"{op.name!r} is called by the code of {op.owner or 'the model'!r}"
                reasons.append(Reason("no_module", message, op.name))
        return (*dict.fromkeys(reasons), *self.hooks(fold))

    def _original(self, op: Op) -> Op:
        """The op of the user's in whose place a fold has put this one."""
        return self.originals.get(op.source, op)

    # ---- the block --------------------------------------------------------------------

    def _merge(self, fold: Fold) -> Reasons:
        if fold in self.unmerged:
            return (self.unmerged[fold],)
        block = self.block_of[fold]
        if block.path in self.unlike:
            return (self.unlike[block.path],)
        if hooked_on_gradients(self.modules[block.path]):
            return (Reason("hook", f"{block.path!r} has hooks on its gradients", block.path),)
        return self._lost_hooks(block.path, block.rest)

    # ---- the absorber -----------------------------------------------------------------

    def _rebind(self, edit: Rebind) -> Reasons:
        if (edit.op, edit.slot) not in self.final:  # a later fold takes the op out
            return ()
        tensor = self.graph.input(edit.op, edit.slot)
        if tensor is None:
            return self.new_bias(edit)
        stored = self.stored.get(tensor.name)
        if stored is None:
            message = f"its {edit.slot} {tensor.name!r} is computed, not stored as a parameter"
            return (Reason("no_module", message, edit.op.name),)
        homes = {id(self.modules.get(name.rpartition(".")[0])) for name in stored.names}
        if len(homes) > 1 or len(self.sharers[storage_key(stored.tensor)]) > 1:
            message = f"{tensor.name!r} shares its storage with another parameter"
            return (Reason("shared_parameter", message, tensor.name),)
        if element_count(edit.value.shape) != stored.tensor.numel():
            message = f"{tensor.name!r} would need the shape {edit.value.shape}"
            return (Reason("no_module", message, edit.op.name),)
        return self._other_readers(tensor, edit)

    def _other_readers(self, tensor: Tensor, edit: Rebind) -> Reasons:
        """A parameter that is read several times takes the fold if every reader wants the same numbers."""
        for read in self._readers(tensor):
            if read.op is edit.op and read.slot == edit.slot:
                continue
            wanted = self.final.get((read.op, read.slot))
            if wanted is None or not same_numbers(wanted, self.final[edit.op, edit.slot]):
                message = f"{tensor.name!r} is also read by {read.op.name!r}, which the fold does not reach"
                return (Reason("shared_parameter", message, tensor.name),)
        return ()

    def new_bias(self, edit: Rebind) -> Reasons:
        op = edit.op
        layer: Any = self.modules.get(op.owner)
        known = next((kind for kind in _BIASED if isinstance(layer, kind)), None)
        new_bias = edit.slot == _BIAS.get(op.kind)
        if known is None or not new_bias or type(layer).forward is not known.forward:
            message = (
                f"{type(layer).__name__} has a forward of its own and no bias that the shift could go into"
            )
            return (Reason("no_module", message, op.name),)
        for other in self.graph.ops:
            if other.owner != op.owner or other is op or other.kind != op.kind or other.source in self.vanish:
                continue
            wanted = self.final.get((other, edit.slot))
            if wanted is None or not same_numbers(wanted, self.final[op, edit.slot]):
                message = f"{op.owner!r} is also called as {other.name!r}, which needs another bias"
                return (Reason("shared_parameter", message, op.name),)
        return ()

    # ---- the norm ---------------------------------------------------------------------

    def _give_way(self, op: Op) -> Reasons:
        norm = self.norms.get(op.owner)
        if norm is None:
            message = f"{op.name!r} is called by the code of {op.owner or 'the model'!r}, not by a norm module"
            return (Reason("no_module", message, op.name),)
        calls = self._calls_of(op)
        left = [each.name for each in calls if not self._goes_alike(each, op)]
        if left:
            message = f"the same module is called as {left[0]!r}, where it cannot be folded"
            return (Reason("shared_parameter", message, op.name),)
        rest = rest_of(self.graph, calls) if op.kind == "batch_norm" else Rest()
        if isinstance(rest, Reason):
            return (rest,)
        return (*self._other_eyes(norm, op), *self._lost_hooks(op.owner, rest))

    def _goes_alike(self, op: Op, other: Op) -> bool:
        """Do two calls of one norm leave the same behind: nothing, or the same shift?"""
        if op in self.shifts and other in self.shifts:
            return same_numbers(self.shifts[op], self.shifts[other])
        return op in self.spliced and (other in self.spliced or other is op)

    def _calls_of(self, op: Op) -> list[Op]:
        """All that must go with the module: its BatchNorm ops, or what a spelled-out one does to the data."""
        own = [each for each in self.graph.ops if each.owner == op.owner and each.source not in self.vanish]
        native = [each for each in own if each.kind == "batch_norm"]
        return native or [each for each in own if not self._is_constant(each)]

    def _is_constant(self, op: Op) -> bool:
        return not isinstance(self.constants.value(self.graph.output(op)), Reason)

    def _other_eyes(self, norm: NormModule, op: Op) -> Reasons:
        """Does anything but the norm's own code look at what it stores?"""
        for tensor in (*norm.learnable, *norm.buffers):
            for read in self._readers(tensor):
                if read.op.owner != norm.path:
                    message = f"{tensor.name!r} is also read by {read.op.name!r}"
                    return (Reason("shared_parameter", message, op.name),)
        return ()

    def _readers(self, tensor: Tensor) -> list[Read]:
        return [read for read in self.graph.readers(tensor) if read.op.source not in self.vanish]

    def _lost_hooks(self, path: str, rest: Rest) -> Reasons:
        """Hooks on parts of a module that do not outlive it."""
        whole = self.modules[path]
        kept = {id(self.modules[child]) for child in rest.children}
        for name, part in whole.named_modules(prefix=path):
            if part is not whole and id(part) not in kept and _hooked(part) and not _below(name, rest.children):
                return (Reason("hook", f"{name!r} has hooks and goes with {path!r}", name),)
        return ()

    # ---- hooks ------------------------------------------------------------------------

    def hooks(self, fold: Fold) -> Reasons:
        """Hooks that would see a tensor in its new form: on modules left or entered between producer and
        reader.

        The graph was made without the user's hooks, so it does not show what one does to the absorber's weight.
        """
        for edit in fold.edits:
            owner = edit.op.owner if isinstance(edit, Rebind) else ""
            module = self.modules.get(owner)
            if module is not None and not all(map(is_of_torch, module._forward_pre_hooks.values())):
                return (Reason("hook", f"a forward pre-hook on {owner!r} may change its weight", owner),)
        for before, after in map(_stacks, self._edges(fold)):
            left = [path for call, path in before.items() if call not in after]
            entered = [path for call, path in after.items() if call not in before]
            if path := self.first_hooked(left, "_forward_hooks"):
                return (Reason("hook", f"a hook on {path!r} sees what it puts out", path),)
            if path := self.first_hooked(entered, "_forward_pre_hooks"):
                return (Reason("hook", f"a hook on {path!r} sees what goes in", path),)
        return ()

    def _edges(self, fold: Fold) -> Iterator[tuple[Op, Op]]:
        """Who makes and who reads each tensor that changes, behind ops too that were taken out before."""
        earlier = (edit for each in self.folds[: self.folds.index(fold)] for edit in each.edits)
        spliced = {self._original(edit.op) for edit in earlier if isinstance(edit, Splice)}
        pending = list(fold.steps[0].carried if fold.steps else ())
        while pending:
            tensor = pending.pop()
            maker = self.graph.producer(tensor) if tensor in self.graph.nodes else None
            if maker is None:
                continue
            for read in self.graph.readers(tensor):
                if read.op.source is not None:
                    yield maker, read.op
                if read.op in spliced:
                    pending.append(self.graph.output(read.op))

    def first_hooked(self, paths: Iterable[str], kind: str) -> str | None:
        """The first of these modules with hooks of a kind, or with any on its gradients."""
        for path in paths:
            module = self.modules.get(path)
            if module is not None and (getattr(module, kind) or hooked_on_gradients(module)):
                return path
        return None


def tensors_by_storage(model: TorchModel) -> defaultdict[object, set[int]]:
    """Storage → the tensors on it: stored ones, and those that modules hold as plain attributes."""
    assert model.module is not None
    sharers: defaultdict[object, set[int]] = defaultdict(set)
    plain = (value for module in model.module.modules() for value in vars(module).values())
    for tensor in (*(stored.tensor for stored in model.state.stored), *plain):
        if isinstance(tensor, torch.Tensor):
            sharers[storage_key(tensor)].add(id(tensor))
    return sharers


def _hooked(module: nn.Module) -> bool:
    """With hooks of the user's: torch computes the weight of old weight_norm in one."""
    own = [hook for hook in module._forward_pre_hooks.values() if not is_of_torch(hook)]
    return bool(module._forward_hooks or own) or hooked_on_gradients(module)


def hooked_on_gradients(module: nn.Module) -> bool:
    return bool(module._backward_hooks or module._backward_pre_hooks)


def _below(path: str, others: Sequence[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in others)


def _stacks(edge: tuple[Op, Op]) -> tuple[dict[str, str], dict[str, str]]:
    return calls_around(edge[0]), calls_around(edge[1])


def calls_around(op: Op) -> dict[str, str]:
    """The modules a call lies in, outermost first: a key for each call of a module → its path."""
    return {key: path for key, (path, _) in stack_of(op).items()}


# ---- the trial ------------------------------------------------------------------------------------


def _tried(model: TorchModel, folds: Sequence[Fold], blocks: Sequence[Block]) -> dict[Path, Reasons]:
    """Folds behind which the module's code would do something else than the plan expects.

    Python can look at anything: at `self.bn.eps`, at the class of a child, at a list of modules that nobody
    registered. Halves are tried until those that fail are found.
    """
    present = [block for block in blocks if any(each.fold in folds for each in block.sums)]
    if not folds or holds(model, folds, _heirs(model, folds, present), present):
        return {}
    groups = _groups(folds, present)
    if len(groups) > 1:
        half = len(groups) // 2
        found: dict[Path, Reasons] = {}
        for part in (groups[:half], groups[half:]):
            found |= _tried(model, [fold for group in part for fold in group], present)
        return found or _blamed(folds, present, "all of its norms and blocks have")
    where = present[0].path if present else _norm_of(folds[0]).owner
    return _blamed(folds, present, f"{where!r} has")


def _blamed(folds: Sequence[Fold], blocks: Sequence[Block], what: str) -> dict[Path, Reasons]:
    """None of these is folded; where there are blocks among them, their norms may yet go without them."""
    message = f"the model's code does something else once {what} given way"
    merges = [each.fold for block in blocks for each in block.sums]
    return {fold.path: (Reason("no_module", message, _norm_of(fold).name),) for fold in (merges or folds)}


def _norm_of(fold: Fold) -> Op:
    return next((op for op in fold.path if op.kind == "batch_norm"), fold.path[0])


def _groups(folds: Sequence[Fold], blocks: Sequence[Block]) -> list[list[Fold]]:
    """Folds that must go together: those that touch the same module, or a part of the same block."""
    groups: list[tuple[set[str], list[Fold]]] = []
    parts = {each.fold: block.owners for block in blocks for each in block.sums}
    for fold in folds:
        touched = {edit.op.owner for edit in fold.edits if not isinstance(edit, Insert | Graft)}
        members = [fold]
        touched |= parts.get(fold, frozenset())
        apart = []
        for owners, others in groups:
            if owners & touched:
                touched, members = owners | touched, [*others, *members]
            else:
                apart.append((owners, others))
        groups = [*apart, (touched, members)]
    return [members for _, members in groups]


def _heirs(
    model: TorchModel, folds: Sequence[Fold], blocks: Sequence[Block], numbers: bool = False
) -> dict[str, Rest]:
    """Path of each norm and block that goes → what is left of it; its convolutions hold `numbers`, or none."""
    shifts = _shifts(folds)
    vanish = {source for block in blocks for source in block.sources}
    originals = {op.source: op for op in model.graph.ops}
    gone = [originals.get(e.op.source, e.op) for e in _all_edits(folds) if isinstance(e, Splice)]
    calls: defaultdict[str, list[Op]] = defaultdict(list)
    for op in (*gone, *shifts):
        if op.source not in vanish:
            calls[op.owner] += [op] if op.kind == "batch_norm" else []
    final = _final(folds)
    heirs = {block.path: block.with_numbers(final) if numbers else block.rest for block in blocks}
    for path, ops in calls.items():
        rest = rest_of(model.graph, ops) if ops else Rest()
        if isinstance(rest, Rest):
            heirs[path] = (
                Rest((Shift(to_tensor(shifts[ops[0]])), *rest.steps)) if ops and ops[0] in shifts else rest
            )
    return heirs


def _all_edits(folds: Sequence[Fold]) -> tuple[Edit, ...]:
    return consolidated(edit for fold in folds for edit in fold.edits)


def _final(folds: Sequence[Fold]) -> dict[tuple[Op, str], Value]:
    """(op, slot) → what all folds together put there."""
    return {(e.op, e.slot): e.value for e in _all_edits(folds) if isinstance(e, Rebind)}


def _shifts(folds: Sequence[Fold]) -> dict[Op, Value]:
    """BatchNorms that become the Add of a shift, with the shift as the last fold leaves it."""
    shifts: dict[Op, Value] = {}
    by_source = {}
    for edit in _all_edits(folds):
        match edit:
            case Replace(op=op, kind="add") if op.kind == "batch_norm":
                shifts[op], by_source[op.source] = edit.constants["b"].value, op
            case Rebind(op=op, slot="b") if op.source in by_source:
                shifts[by_source[op.source]] = edit.value
    return shifts


# ---- carrying it out ----------------------------------------------------------------------------


def fold_module(model: TorchModel, plan: Plan, inplace: bool = False) -> TorchModel:
    """The user's module with the plan carried out, a copy unless `inplace`.

    Raises StalePlan when the module has changed since, UsageError when it cannot be copied.
    """
    if plan.fingerprint != model.fingerprint:
        raise StalePlan("the plan was made for another model; make it again with plan()")
    assert model.module is not None
    blocks, _ = blocks_of(model, plan.folds)
    heirs = _heirs(model, plan.folds, blocks, numbers=True)
    numbers = _new_numbers(model, plan, blocks)
    target = model.module if inplace else copied(model.module)
    placed: dict[tuple[Any, str], torch.Tensor] = {}
    with torch.no_grad():
        for (path, name), (tensor, readers) in numbers.items():
            parameter = set_numbers(target.get_submodule(path), name, tensor)
            placed |= dict.fromkeys(readers, parameter)
    before = state_of_module(target)
    built = give_way(target, heirs)
    for block in blocks:
        for each, name in block.convs():
            parameters = built[block.path].get_submodule(name).named_parameters()
            placed |= {(each.anchor.source, slot): parameter for slot, parameter in parameters}
    for op in _shifts(plan.folds):
        (name,) = (name for name, step in heirs[op.owner].named(op.owner) if isinstance(step, Shift))
        placed[op.source, "b"] = built[op.owner].get_parameter(f"{name}.bias")
    return with_names(read_module(target, model.example), before, placed)


def with_names(folded: TorchModel, before: State, placed: Mapping[tuple[Any, str], torch.Tensor]) -> TorchModel:
    """What each tensor is called in the module now."""
    names = {id(stored.tensor): stored.names for stored in folded.state.stored}
    folded.places = {place: names[id(t)][0] for place, t in placed.items() if id(t) in names}
    for stored in before.stored:
        now = names.get(id(stored.tensor), stored.names)
        folded.renamed |= {name: now[0] for name in stored.names if name not in now}
    return folded


def copied(module: nn.Module) -> nn.Module:
    """Tensors that carry a gradient's history cannot be copied as they are; weight_norm of old keeps one."""
    plain = (tensor for child in module.modules() for tensor in vars(child).values())
    derived = [t for t in plain if isinstance(t, torch.Tensor) and not t.is_leaf]
    try:
        return copy.deepcopy(module, {id(tensor): tensor.detach().clone() for tensor in derived})
    except Exception as error:
        message = f"the module cannot be copied ({first_line(error)}); inplace=True changes it"
        raise UsageError(message) from None


def _new_numbers(
    model: TorchModel, plan: Plan, blocks: Sequence[Block]
) -> dict[tuple[str, str], tuple[torch.Tensor, list[tuple[Any, str]]]]:
    """(module path, parameter name) → its new content, and the ops and slots that read it.

    All of it is computed before anything is changed.
    """
    numbers: dict[tuple[str, str], tuple[torch.Tensor, list[tuple[Any, str]]]] = {}
    elsewhere = {
        edit.op.source for edit in plan.edits if isinstance(edit, Replace)
    }  # in the shift that is left
    elsewhere |= {source for block in blocks for source in block.sources}  # in the convolution
    for edit in _rebinds(plan):
        if edit.op.source in elsewhere:
            continue
        tensor = model.graph.input(edit.op, edit.slot)
        name = tensor.name if tensor is not None else f"{edit.op.owner}.bias"
        path, _, last = name.rpartition(".")
        if (path, last) not in numbers:
            numbers[path, last] = to_tensor(edit.value), []
        numbers[path, last][1].append((edit.op.source, edit.slot))
    return numbers


def _rebinds(plan: Plan) -> Iterator[Rebind]:
    return (edit for edit in plan.edits if isinstance(edit, Rebind))


def set_numbers(module: nn.Module, name: str, content: torch.Tensor) -> torch.Tensor:
    """New numbers in the old parameter: its dtype, device, memory format and requires_grad stay."""
    old = getattr(module, name, None)
    if isinstance(old, torch.Tensor):
        old.copy_(content.reshape(old.shape))
        return old
    weight: Any = module.weight
    fresh = nn.Parameter(content.to(weight.device, weight.dtype), requires_grad=weight.requires_grad)
    module.register_parameter(name, fresh)
    return fresh
