"""What is left of a module when its BatchNorm is gone, or when its branches have become one convolution.

Of a norm nothing, mostly: nn.Identity. A subclass with an activation inside goes on doing the rest of what it
does, in the order the graph saw it: the child modules that it calls, and the plain elementwise calls of its own
code. So does a block, with the convolution where its branches were.
"""

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import fx, nn

from normtool.graph import ModelGraph, Op, Role, Tensor
from normtool.reasons import Reason

#: Calls that depend on nothing but the tensors that go in, whatever their shape.
_ELEMENTWISE = frozenset(
    "relu leaky_relu clip sigmoid tanh gelu silu mish elu softplus hard_sigmoid hard_swish erf dropout "
    "identity add sub mul div neg".split()
)


@dataclass(frozen=True)
class Child:
    """One call of a module below the one that goes; `path` starts at the root."""

    path: str

    def __str__(self) -> str:
        return self.path

    def build(self, root: nn.Module) -> nn.Module:
        return root.get_submodule(self.path)


@dataclass(frozen=True)
class OwnCalls:
    """Calls in the module's own code, one after the other, as they appear in the exported program."""

    ops: tuple[Op, ...]

    def __str__(self) -> str:
        """The same for the same calls: operator, plain arguments, and which results go where."""
        position = {op.source: f"#{i}" for i, op in enumerate(self.ops)}
        return "; ".join(_written(op.source, position) for op in self.ops)

    def build(self, root: nn.Module) -> nn.Module:
        """A module that makes these calls on the one tensor that goes in. It needs torch alone."""
        graph = fx.Graph()
        entry = graph.placeholder("input")
        copies: dict[fx.Node, fx.Node] = {}
        for op in self.ops:
            made = graph.node_copy(op.source, lambda node: copies.get(node, entry))
            made.meta.clear()  # the exporter's fake tensors
            copies[op.source] = made
        graph.output(copies[self.ops[-1].source])
        return fx.GraphModule(nn.Module(), graph)


@dataclass(frozen=True, eq=False)
class Shift:
    """What is left of the norm itself where only its scale could move: x + shift."""

    shift: torch.Tensor

    def __str__(self) -> str:
        return "shift"

    def build(self, root: nn.Module) -> nn.Module:
        """A module with the shift as its parameter `bias`. It needs torch alone."""
        holder = nn.Module()
        holder.register_parameter("bias", nn.Parameter(self.shift.clone()))
        graph = fx.Graph()
        entry = graph.placeholder("input")
        graph.output(graph.call_function(operator.add, (entry, graph.get_attr("bias"))))
        return fx.GraphModule(holder, graph)


@dataclass(frozen=True, eq=False)
class MergedConv:
    """The one convolution that parallel branches have become.

    Its parameters are made like `weight` and `bias` (None: like the weight), with `content`; without, as in a
    trial, no number in them means anything.
    """

    #: stride, padding, dilation, groups: arguments of nn.Conv2d
    walk: Mapping[str, Any]
    weight: torch.Tensor
    bias: torch.Tensor | None
    training: bool
    content: tuple[torch.Tensor, torch.Tensor] | None = None

    def __str__(self) -> str:
        return f"conv({dict(self.walk)})"

    def build(self, root: nn.Module) -> nn.Module:
        kinds: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        outputs, inputs, *kernel = self.weight.shape
        # on the meta device nothing is drawn from the user's random generator
        channels = inputs * self.walk["groups"], outputs
        layer: nn.Module = kinds[len(kernel)](*channels, tuple(kernel), device="meta", **self.walk)
        like = self.weight.new_empty(outputs) if self.bias is None else self.bias
        layer.weight = _parameter(torch.empty_like(self.weight), self.weight)
        layer.bias = _parameter(torch.empty_like(like), self.weight if self.bias is None else self.bias)
        if self.content is not None:
            for parameter, content in zip((layer.weight, layer.bias), self.content, strict=True):
                parameter.data.copy_(content)
        return layer.train(self.training)


def _parameter(content: torch.Tensor, old: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(content.detach(), requires_grad=old.requires_grad)


Step = Child | OwnCalls | Shift | MergedConv


def _written(node: fx.Node, position: Mapping[fx.Node, str]) -> str:
    return f"{node.target}{plain_arguments(node, position)}"


def plain_arguments(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """The arguments of a call as text, with a word in the place of every tensor."""
    arguments: Any = (node.args, node.kwargs)
    return repr(fx.node.map_arg(arguments, lambda each: names.get(each, "x")))


@dataclass(frozen=True)
class Rest:
    """What goes on being done, step by step.

    `whole`: all that the module does, on what it reads (a block). Else it is what comes behind a norm.
    """

    steps: tuple[Step, ...] = ()
    whole: bool = False

    def __str__(self) -> str:
        return " → ".join(map(str, self.steps))

    @property
    def children(self) -> tuple[str, ...]:
        """Paths of the modules that go on being called."""
        return tuple(step.path for step in self.steps if isinstance(step, Child))

    def named(self, path: str) -> list[tuple[str, Step]]:
        """Each step under its name in the heir of `path`. Children keep theirs, so that the state dict does."""
        names: dict[int, str] = {}
        for place, step in sorted(enumerate(self.steps), key=lambda each: not isinstance(each[1], Child)):
            names[place] = _free_name(_wish(step, path), names.values())
        return [(names[place], step) for place, step in enumerate(self.steps)]

    def build(self, root: nn.Module, path: str) -> nn.Module:
        """A module that does the rest of what `path` does, and runs that module's hooks."""
        old = root.get_submodule(path)
        heir: nn.Module = nn.Sequential() if self.steps else nn.Identity()
        heir.training = old.training
        for name, step in self.named(path):
            part = step.build(root)
            if isinstance(step, OwnCalls | Shift):
                part.training = old.training
            heir.add_module(name, part)
        # the very same dicts: a handle that the user keeps can still remove its hook
        for hooks in (*_FORWARD_HOOKS, *(_PRE_HOOKS if self.whole else ())):
            setattr(heir, hooks, getattr(old, hooks))
        if self.whole:
            for name, value in vars(old).items():
                if not name.startswith("_") and not hasattr(heir, name) and _is_setting(value):
                    setattr(heir, name, value)
        return heir


_FORWARD_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_PRE_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


def _is_setting(value: Any) -> bool:
    """A plain number or word, or several: what other code may read off a block (its stride, its place)."""
    if isinstance(value, list | tuple):
        return all(map(_is_setting, value))
    return isinstance(value, bool | int | float | str)


def _wish(step: Step, path: str) -> str:
    match step:
        case Shift():
            return "shift"
        case MergedConv():
            return "conv"
        case OwnCalls():
            return step.ops[-1].kind
        case Child():
            return step.path.removeprefix(f"{path}.").replace(".", "_")


def _free_name(wish: str, taken: Collection[str]) -> str:
    blank, name, number = nn.Sequential(), wish, 0
    while name in taken or hasattr(blank, name):
        number += 1
        name = f"{wish}_{number}"
    return name


def give_way(root: nn.Module, heirs: Mapping[str, Rest]) -> dict[str, nn.Module]:
    """Put what is left of each module in its place, wherever it is registered, in other heirs too.

    Returns the heirs by path: one that lies in another may be called otherwise now.
    """
    built = {path: rest.build(root, path) for path, rest in heirs.items()}
    by_id = {id(root.get_submodule(path)): heir for path, heir in built.items()}
    for parent in [*root.modules(), *built.values()]:
        for name, child in parent._modules.items():
            if id(child) in by_id:
                parent._modules[name] = by_id[id(child)]
    return built


# ---- reading it off the graph ---------------------------------------------------------------------


def rest_of(graph: ModelGraph, calls: Iterable[Op]) -> Rest | Reason:
    """What the module that makes these BatchNorm `calls` does besides, or why that cannot stand alone."""
    rests = {str(rest): (op, rest) for op in calls for rest in [_rest_of_one(graph, op)]}
    for op, rest in rests.values():
        if isinstance(rest, Reason):
            return rest
        if len(rests) > 1:
            return Reason("no_module", f"{op.owner!r} does not do the same in each of its calls", op.name)
    return next(rest for _, rest in rests.values())


def _rest_of_one(graph: ModelGraph, op: Op) -> Rest | Reason:
    call = list(stack_of(op))[-1]
    inside = [each for each in graph.ops if call in stack_of(each)]
    if inside[0] is not op:
        return Reason("no_module", f"{op.owner!r} calls {inside[0].spelling} before it normalises", op.name)
    steps = steps_from(graph, graph.output(op), inside[1:], call, op.owner)
    return steps if isinstance(steps, Reason) else Rest(steps)


def steps_from(
    graph: ModelGraph, tensor: Tensor, ops: list[Op], call: str, owner: str, entered: bool = False
) -> tuple[Child | OwnCalls, ...] | Reason:
    """What `ops`, in one call of the module `owner`, do with `tensor`, each step with what the last has made.

    `entered`: the tensor comes from outside the call, where others may read it.
    """
    steps: list[Child | OwnCalls] = []
    for child, run in _segments(ops, call):
        readers = [read.op for read in graph.readers(tensor) if not entered or call in stack_of(read.op)]
        result = graph.outputs(run[-1]).get("y")
        if result is None or not set(readers) <= set(run) or not _is_one_step(graph, run, tensor):
            message = f"{owner!r} does more than one thing with a tensor"
            return Reason("no_module", message, run[0].name)
        if child is None and (fixed := next((each for each in run if not _stands_alone(graph, each)), None)):
            message = f"{owner!r} calls {fixed.spelling} itself, which cannot stand alone"
            return Reason("no_module", message, fixed.name)
        if child is not None and len(run) < sum(child in stack_of(each) for each in graph.ops):
            message = f"{stack_of(run[0])[child][0]!r} does a part of what has become one convolution"
            return Reason("no_module", message, run[0].name)
        steps.append(OwnCalls(tuple(run)) if child is None else _child(run[0], child, call, owner))
        tensor, entered = result, False
    return tuple(steps)


def stack_of(op: Op) -> dict[str, tuple[str, Any]]:
    """The modules a call lies in, outermost first: a key for each call of a module → (path, class)."""
    return op.source.meta.get("nn_module_stack") or {}


def _child(op: Op, child: str, call: str, owner: str) -> Child:
    """A module with several names is called by each of them; its children go by the first, `owner`."""
    stack = stack_of(op)
    (called, _), (path, _) = stack[call], stack[child]
    below = path.removeprefix(f"{called}.")
    return Child(f"{owner}.{below}" if below != path else path)


def _segments(ops: list[Op], call: str) -> Iterator[tuple[str | None, list[Op]]]:
    """What a module does in `call`: the ops of each call of a child, with its key; runs of its own without."""
    for child, group in groupby(ops, key=lambda op: _child_call(op, call)):
        yield child, list(group)


def _child_call(op: Op, call: str) -> str | None:
    keys = list(stack_of(op))
    below = keys[keys.index(call) + 1 :]
    return below[0] if below else None


def _is_one_step(graph: ModelGraph, ops: list[Op], tensor: Tensor) -> bool:
    """Do these calls read `tensor` and nothing else that flows, and does only the last result leave?"""
    made = {output for op in ops for output in graph.outputs(op).values()}
    read = {t for op in ops for t in graph.inputs(op).values() if _flows(graph, t)}
    leaving = [t for t in made if any(each.op not in ops for each in graph.readers(t))]
    return read - made == {tensor} and leaving in ([], [graph.outputs(ops[-1])["y"]])


def _flows(graph: ModelGraph, tensor: Tensor) -> bool:
    """Is it computed, or given to the model?"""
    return tensor.role is Role.INPUT or graph.producer(tensor) is not None


def _stands_alone(graph: ModelGraph, op: Op) -> bool:
    """Is it elementwise, and is everything it reads computed or a plain number?"""
    nodes = len(op.source.all_input_nodes)
    flowing = {tensor for tensor in graph.inputs(op).values() if _flows(graph, tensor)}
    return op.kind in _ELEMENTWISE and nodes == len(flowing)
