"""What a swap comes to on a user's module: what gives way, where Centres go, what tensors hold; or why not.

A LayerNorm module gives way where all that it does, in all of its calls, is to be an RMSNorm, the same one.
A Centre goes behind a module that puts out what has to be centred, if whoever reads that is to read it
centred, or in front of one that takes it in. A layer scale that has gone into a Linear is a module that goes,
or a parameter that becomes 1.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from normtool.edits import Graft, Rebind, Splice, consolidated
from normtool.formats.torch.blocks import innermost, same_numbers
from normtool.formats.torch.model import TorchModel, first_paths
from normtool.formats.torch.module_apply import Review, hooked_on_gradients
from normtool.formats.torch.rest import stack_of
from normtool.formats.torch.state import storage_key
from normtool.formats.torch.swap_constants import Content, Resolver
from normtool.formats.torch.swap_heirs import Centre, Heir, Nothing, Numbers, RmsNorm
from normtool.graph import Op, Read, Tensor
from normtool.planner import Fold, Path
from normtool.reasons import Reason
from normtool.values import Rounded, Value, element_count, exact_array, to_array

Reasons = tuple[Reason, ...]


@dataclass(frozen=True, eq=False)
class NormCall:
    """One call of a LayerNorm module that gives way: the fold, its ops in the user's graph, the module."""

    fold: Fold
    graft: Graft
    ops: tuple[Op, ...]
    #: what it normalises in the user's graph
    entered: Tensor
    path: str
    call: str
    heir: RmsNorm


@dataclass(frozen=True, eq=False)
class GoneCall:
    """One call of a module that does nothing more: these ops are taken out."""

    fold: Fold
    ops: tuple[Op, ...]
    #: what its readers read instead
    entered: Tensor
    path: str
    call: str


@dataclass(frozen=True, eq=False)
class CentreCall:
    """A Centre behind one call of a module, or in front of it."""

    fold: Fold
    graft: Graft
    path: str
    call: str
    centre: Centre
    reads: frozenset[Read]


@dataclass(eq=False)
class Changes:
    norms: list[NormCall] = field(default_factory=list)
    gone: list[GoneCall] = field(default_factory=list)
    centres: list[CentreCall] = field(default_factory=list)
    #: stored tensor → (its new content, who reads it: ops of the graph, and slots)
    contents: dict[str, tuple[Value, list[Read]]] = field(default_factory=dict)
    #: op → the fold that gives it a bias of its module's own
    biased: dict[Op, tuple[Fold, Value]] = field(default_factory=dict)
    against: dict[Path, Reasons] = field(default_factory=dict)

    @property
    def heirs(self) -> dict[str, Heir]:
        norms: dict[str, Heir] = {each.path: each.heir for each in self.norms}
        return norms | {each.path: Nothing() for each in self.gone}

    @property
    def centred(self) -> dict[str, list[Centre]]:
        """Path → the Centres around the module there: one behind it, one in front."""
        found: defaultdict[str, dict[Centre, None]] = defaultdict(dict)
        for each in self.centres:
            found[each.path][each.centre] = None
        return {path: list(centres) for path, centres in found.items()}


def changes_of(model: TorchModel, folds: Sequence[Fold]) -> Changes:
    """Everything a module has to do for these folds. `against` has the folds that it cannot carry out."""
    return _Reader(model, folds).changes


class _Reader:
    def __init__(self, model: TorchModel, folds: Sequence[Fold]) -> None:
        assert model.module is not None
        self.model, self.graph, self.folds = model, model.graph, folds
        self.module = model.module
        self.modules = dict(model.module.named_modules(remove_duplicate=False))
        self.paths = first_paths(model.module)
        self.stored = model.state.by_name()
        self.originals = {op.source: op for op in model.graph.ops}
        self.review = Review(model, folds)
        self.resolver = Resolver(model)
        self.changes = Changes()
        self.ops_of_call, self.calls_of = _calls(model.graph.ops, self.paths)
        #: ops that are no longer there, or are there as an RMSNorm
        self.left: set[Op] = set()
        self.wanted: defaultdict[Tensor, list[tuple[Fold, Content]]] = defaultdict(list)
        for fold in folds:
            self._structure(fold)
        self._alike()
        self._constants()
        self._hooks()

    def _object(self, fold: Fold, *reasons: Reason) -> None:
        known = self.changes.against.get(fold.path, ())
        self.changes.against[fold.path] = tuple(dict.fromkeys((*known, *reasons)))

    def _original(self, op: Op) -> Op:
        return self.originals.get(op.source, op)

    # ---- what gives way -----------------------------------------------------------------

    def _structure(self, fold: Fold) -> None:
        for edit in fold.edits:
            match edit:
                case Graft(readers=None, parts=[part, *_]) if part.kind == "identity":
                    ops = tuple(map(self._original, fold.gone))
                    self._gone(fold, ops, part.inputs["x"])
                case Graft(readers=None):
                    self._norm(fold, edit)
                case Graft():
                    self._centre(fold, edit)
                case Splice(op=op, slot=slot):
                    self._gone(fold, (self._original(op),), self.graph.input(self._original(op), slot))
                case Rebind():
                    pass
                case _:
                    where = self._original(getattr(edit, "op", fold.path[0]))
                    message = f"{where.name!r} is called by the code of {where.owner or 'the model'!r}"
                    self._object(fold, Reason("no_module", message, where.name))

    def _norm(self, fold: Fold, graft: Graft) -> None:
        ops = tuple(map(self._original, fold.gone))
        name, part, found = graft.tensor.name, graft.parts[0], self._whole_module(ops)
        self.left.update(ops)
        if isinstance(found, Reason):
            self._object(fold, found)
            return
        call, path = found
        x = part.inputs["x"]
        entered = self._entered(ops)
        shape = x.shape if isinstance(x, Tensor) else None
        own = shape[part.attributes["axis"] :] if shape is not None and part.kind == "rms_norm" else ()
        lengths = tuple(n for n in own if isinstance(n, int))
        if entered is None or not isinstance(x, Tensor) or not lengths or len(lengths) < len(own):
            self._object(fold, Reason("no_module", "nn.RMSNorm normalises the last axes alone", name))
            return
        if x.dtype != graft.tensor.dtype:
            message = f"{path!r} takes {x.dtype} and returns {graft.tensor.dtype}; nn.RMSNorm does not"
            self._object(fold, Reason("no_module", message, name))
            return
        weight, bias = self._gamma(fold, graft, ops, lengths), self._beta(graft, ops, lengths)
        heir = RmsNorm(lengths, part.attributes["epsilon"], weight, bias)
        self.changes.norms.append(NormCall(fold, graft, ops, entered, path, call, heir))

    def _entered(self, ops: Sequence[Op]) -> Tensor | None:
        """What a norm reads in the user's graph that flows there, if that is one tensor."""
        made = {tensor for op in ops for tensor in self.graph.outputs(op).values()}
        read = {tensor: None for op in ops for tensor in self.graph.inputs(op).values() if tensor not in made}
        constants = self.resolver.constants
        flowing = [tensor for tensor in read if isinstance(constants.value(tensor), Reason)]
        return flowing[0] if len(flowing) == 1 else None

    def _whole_module(self, ops: Sequence[Op]) -> tuple[str, str] | Reason:
        """The innermost call that holds these ops, and the path of its module, which does nothing else."""
        call = innermost(ops)
        path = self.paths.get(stack_of(ops[0])[call][0], "") if call else ""
        inside = [each for each in self.ops_of_call[call] if each not in ops] if call else []
        busy = next((each for each in inside if not self._is_constant(each)), None)
        if not path or busy is not None:
            message = f"{ops[-1].name!r} is called by the code of {path or 'the model'!r}, which does more"
            return Reason("no_module", message, ops[-1].name)
        if hooked_on_gradients(self.modules[path]):
            return Reason("hook", f"{path!r} has hooks on its gradients", path)
        return call, path

    def _is_constant(self, op: Op) -> bool:
        outputs = self.graph.outputs(op).values()
        return all(not isinstance(self.resolver.constants.value(each), Reason) for each in outputs)

    def _gamma(self, fold: Fold, graft: Graft, ops: Sequence[Op], lengths: tuple[int, ...]) -> Numbers | None:
        """None where γ has gone forward, or never was."""
        _, value = graft.parts[0].constants["weight"]
        moved = any("weight" in each.moved and set(each.moved_from) & set(fold.gone) for each in self.folds)
        own = self._operands(ops, "weight", "mul")
        if (moved or not own) and np.all(to_array(value) == 1):
            return None
        return self._numbers(value, own, lengths)

    def _beta(self, graft: Graft, ops: Sequence[Op], lengths: tuple[int, ...]) -> Numbers | None:
        if len(graft.parts) == 1:
            return None
        _, value = graft.parts[-1].constants["b"]
        return self._numbers(value, self._operands(ops, "bias", "add"), lengths)

    def _operands(self, ops: Sequence[Op], slot: str, kind: str) -> list[Tensor]:
        """Stored tensors that may be the norm's γ, or its β."""
        if len(ops) == 1:
            tensor = self.graph.input(ops[0], slot)
            found = [] if tensor is None else [tensor]
        else:
            found = [t for op in ops if op.kind == kind for t in self.graph.inputs(op).values()]
        return [tensor for tensor in found if tensor.name in self.stored]

    def _numbers(self, value: Value, own: Sequence[Tensor], lengths: tuple[int, ...]) -> Numbers:
        content = Rounded(exact_array(value).reshape(lengths), value.dtype)
        for each in own:
            if each.shape == lengths and each.value is not None and same_numbers(each.value, content):
                return Numbers(content, kept=each.name)
        return Numbers(content, like=own[0].name if own else "")

    def _gone(self, fold: Fold, ops: tuple[Op, ...], entered: Any) -> None:
        found = self._whole_module(ops)
        if not isinstance(found, Reason):
            self.left.update(ops)
            self.changes.gone.append(GoneCall(fold, ops, entered, found[1], found[0]))
        elif not (len(ops) == 1 and self._neutral(fold, ops[0], entered)):
            self._object(fold, found)

    def _neutral(self, fold: Fold, op: Op, entered: Tensor) -> bool:
        """Let the user's code go on multiplying (or adding): by 1 (or 0)."""
        slots = [slot for slot, tensor in self.graph.inputs(op).items() if tensor is not entered]
        tensor = self.graph.input(op, slots[0]) if len(slots) == 1 else None
        number = {"mul": 1, "div": 1, "add": 0, "sub": 0}.get(op.kind)
        if tensor is None or number is None or tensor.name not in self.stored or tensor.value is None:
            return False
        if op.kind == "div" and slots != ["b"]:
            return False
        value = Rounded(np.full(tensor.value.shape, number, np.float64), tensor.value.dtype)
        self._put(fold, Content(tensor, value, Read(op, slots[0])))
        return True

    def _alike(self) -> None:
        """A module that is called several times gives way in all of its calls, to the same."""
        found: defaultdict[tuple[str, object], list[Call]] = defaultdict(list)
        every: list[Call] = [*self.changes.norms, *self.changes.gone, *self.changes.centres]
        for each in every:
            found[each.path, each.centre.in_front if isinstance(each, CentreCall) else None].append(each)
        for (path, _), calls in found.items():
            if self.calls_of[path] <= {each.call for each in calls} and len(set(map(_said, calls))) == 1:
                continue
            message = f"{path!r} is called several times, and not all of them come out alike"
            for each in calls:
                self._object(each.fold, Reason("shared_parameter", message, path))

    # ---- Centres ------------------------------------------------------------------------

    def _centre(self, fold: Fold, graft: Graft) -> None:
        tensor = graft.tensor
        reads = frozenset(Read(self._original(each.op), each.slot) for each in graft.readers or ())
        found = self._place(tensor, reads) if tensor in self.graph.nodes else None
        if found is None:
            message = f"no module puts out {tensor.name!r}, or takes it in, for those alone who need its Centre"
            self._object(fold, Reason("no_module", message, tensor.name))
            return
        call, path, in_front = found
        assert tensor.shape is not None
        axes = tuple(axis - len(tensor.shape) for axis in graft.parts[0].attributes["axes"])
        self.changes.centres.append(CentreCall(fold, graft, path, call, Centre(axes, in_front), reads))

    def _place(self, tensor: Tensor, reads: frozenset[Read]) -> tuple[str, str, bool] | None:
        """Where a Centre can go: (a call, the path of its module, in front of it?).

        Behind the innermost module that puts the tensor out to these readers alone; else in front of the
        outermost in which these alone read it. One in front of a norm would make a LayerNorm of it again.
        """
        maker = self.graph.producer(tensor)
        before = _calls_around(maker)
        everyone = set(self.graph.readers(tensor))
        for call, path in reversed(before.items()):
            outside = {read for read in everyone if call not in _calls_around(read.op)}
            if self._may_hold(path) and outside == reads:
                return call, self.paths.get(path, path), False
        around = [_calls_around(read.op) for read in reads]
        for call, path in around[0].items():
            inside = {read for read in everyone if call in _calls_around(read.op)}
            if call not in before and self._may_hold(path) and inside == reads and not self._is_norm(path):
                return call, self.paths.get(path, path), True
        return None

    def _may_hold(self, path: str) -> bool:
        return bool(path) and not hooked_on_gradients(self.modules[path])

    def _is_norm(self, path: str) -> bool:
        return any(norm.path == self.paths.get(path, path) for norm in self.graph.norm_modules)

    # ---- what is stored -----------------------------------------------------------------

    def _constants(self) -> None:
        edits = consolidated(edit for fold in self.folds for edit in fold.edits)
        final = {(self._original(e.op), e.slot): e for e in edits if isinstance(e, Rebind)}
        times: defaultdict[tuple[Op, str], list[Fold]] = defaultdict(list)
        for fold in self.folds:
            for edit in fold.edits:
                if isinstance(edit, Rebind):
                    times[self._original(edit.op), edit.slot].append(fold)
        for (op, slot), edit in final.items():
            if op in self.left:
                continue
            folds = times[op, slot]
            if op not in self.graph.nodes:
                where = Reason("no_module", f"{op.name!r} is no call of the module's code", op.name)
                self._object(folds[-1], where)
            elif self.graph.input(op, slot) is None:
                for reason in self.review.new_bias(edit):
                    self._object(folds[-1], reason)
                self.changes.biased[op] = (folds[-1], edit.value)
            else:
                self._stored(op, edit, folds)
        self._shared()

    def _stored(self, op: Op, edit: Rebind, folds: Sequence[Fold]) -> None:
        found = self.resolver.contents(op, edit, alone=len(folds) == 1)
        if isinstance(found, Reason):
            for fold in folds:
                self._object(fold, found)
            return
        for content in found:
            for fold in folds:
                self._put(fold, content)

    def _put(self, fold: Fold, content: Content) -> None:
        self.wanted[content.tensor].append((fold, content))

    def _shared(self) -> None:
        """Whoever reads a stored tensor has to want the same numbers."""
        for tensor, wanted in self.wanted.items():
            value = wanted[0][1].value
            reason = self._against_content(tensor, value, [content for _, content in wanted])
            if reason is not None:
                for fold, _ in wanted:
                    self._object(fold, reason)
            else:
                self.changes.contents[tensor.name] = value, [content.read for _, content in wanted]

    def _against_content(self, tensor: Tensor, value: Value, contents: Sequence[Content]) -> Reason | None:
        stored, name = self.stored[tensor.name], tensor.name
        reads = {content.read for content in contents}
        others = [r for r in self.graph.readers(tensor) if r not in reads and r.op not in self.left]
        if others:
            message = f"{name!r} is also read by {others[0].op.name!r}, which wants it as it is"
            return Reason("shared_parameter", message, name)
        if any(not same_numbers(content.value, value) for content in contents if content.value is not value):
            return Reason("shared_parameter", f"the readers of {name!r} would need different numbers", name)
        if len(self.review.sharers[storage_key(stored.tensor)]) > 1:
            return Reason("shared_parameter", f"{name!r} shares its storage with another tensor", name)
        owners = {read.op.owner for read in self.graph.readers(tensor)}
        homes = {self.paths.get(each.rpartition(".")[0], "") for each in stored.names}
        if len(homes) > 1 and homes - owners:
            message = f"{name!r} also belongs to {min(homes - owners)!r}, which is not called here"
            return Reason("shared_parameter", message, name)
        if element_count(value.shape) != stored.tensor.numel():
            return Reason("no_module", f"{name!r} would need the shape {value.shape}", name)
        return None

    # ---- hooks --------------------------------------------------------------------------

    def _hooks(self) -> None:
        """Hooks of the user's that would see a tensor in its new form."""
        if not any(m._forward_hooks or m._forward_pre_hooks for m in self.modules.values()):
            return
        for fold in self.folds:
            if fold.steps or any(isinstance(edit, Rebind) for edit in fold.edits):
                self._object_if(fold, self.review.hooks(fold))
            path = fold.about.get("centring", {}).get("path")
            if path is not None:
                self._object_if(fold, self._seen(set(path)))

    def _object_if(self, fold: Fold, reasons: Iterable[Reason]) -> None:
        if found := tuple(reasons):
            self._object(fold, *found)

    def _seen(self, names: set[str]) -> Reasons:
        """A hook on a module between whoever makes one of these tensors and whoever reads it."""
        for tensor in self._shifted(names):
            maker = self.graph.producer(tensor)
            before = _calls_around(maker)
            for read in self.graph.readers(tensor):
                after = _calls_around(read.op)
                left = [path for call, path in before.items() if call not in after]
                entered = [path for call, path in after.items() if call not in before]
                if path := self.review.first_hooked(left, "_forward_hooks"):
                    return (Reason("hook", f"a hook on {path!r} sees what it puts out", path),)
                if path := self.review.first_hooked(entered, "_forward_pre_hooks"):
                    return (Reason("hook", f"a hook on {path!r} sees what goes in", path),)
        return ()

    def _shifted(self, names: set[str]) -> Iterable[Tensor]:
        """These tensors, and what is shifted with them until something puts out the same as before."""
        pending = [tensor for tensor in self.graph.tensors if tensor.name in names]
        seen = set(pending)
        norms = {op for each in self.changes.norms for op in each.ops}
        while pending:
            tensor = pending.pop()
            yield tensor
            for read in self.graph.readers(tensor):
                if read.op in norms or read.op.kind in ("layer_norm", "softmax"):
                    continue
                more = set(self.graph.outputs(read.op).values()) - seen
                seen |= more
                pending += more


def _calls_around(op: Op | None) -> dict[str, str]:
    """The calls of modules that an op lies in, outermost first, with their paths; the outputs lie in none."""
    if op is None or op.source is None:
        return {}
    return {key: path for key, (path, _) in stack_of(op).items()}


def _calls(
    ops: Iterable[Op], paths: Mapping[str, str]
) -> tuple[dict[str, list[Op]], defaultdict[str, set[str]]]:
    """(ops by the calls they lie in, calls by the first path of their module)."""
    inside: dict[str, list[Op]] = {}
    calls: defaultdict[str, set[str]] = defaultdict(set)
    for op in ops:
        for call, (path, _) in stack_of(op).items():
            inside.setdefault(call, []).append(op)
            calls[paths.get(path, path)].add(call)
    return inside, calls


Call = NormCall | GoneCall | CentreCall


def _said(call: Call) -> str:
    """The same for calls that come out alike."""
    match call:
        case GoneCall():
            return "gone"
        case CentreCall(centre=centre):
            return str(centre)
        case NormCall(heir=heir):
            parts = [heir.weight, heir.bias]
            numbers = [None if each is None else to_array(each.content).tobytes() for each in parts]
            return repr((heir.lengths, heir.eps, numbers))
