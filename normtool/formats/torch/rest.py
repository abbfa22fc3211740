"""What is left of a norm module when its BatchNorm is gone.

Nothing, mostly: nn.Identity. A subclass with an activation inside goes on doing the rest of what it does,
in the order the graph saw it: the child modules that it calls, and the plain elementwise calls of its own code.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import fx, nn

from normtool.graph import ModelGraph, Op, Tensor
from normtool.reasons import Reason

#: Calls that depend on nothing but the tensors that go in, whatever their shape.
_ELEMENTWISE = frozenset(
    "relu leaky_relu clip sigmoid tanh gelu silu mish elu softplus hard_sigmoid hard_swish erf dropout "
    "identity add sub mul div neg".split()
)


@dataclass(frozen=True)
class Child:
    """One call of a module below the norm; `path` starts at the root."""

    path: str

    def __str__(self) -> str:
        return self.path

    def build(self, root: nn.Module) -> nn.Module:
        return root.get_submodule(self.path)


@dataclass(frozen=True)
class OwnCalls:
    """Calls in the norm's own code, one after the other, as they appear in the exported program."""

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


def _written(node: fx.Node, position: Mapping[fx.Node, str]) -> str:
    return f"{node.target}{plain_arguments(node, position)}"


def plain_arguments(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """The arguments of a call as text, with a word in the place of every tensor."""
    arguments: Any = (node.args, node.kwargs)
    return repr(fx.node.map_arg(arguments, lambda each: names.get(each, "x")))


@dataclass(frozen=True)
class Rest:
    """The steps behind the BatchNorm."""

    steps: tuple[Child | OwnCalls, ...] = ()

    def __str__(self) -> str:
        return " → ".join(map(str, self.steps))

    @property
    def children(self) -> tuple[str, ...]:
        """Paths of the modules that go on being called."""
        return tuple(step.path for step in self.steps if isinstance(step, Child))

    def build(self, root: nn.Module, path: str) -> nn.Module:
        """A module that does the rest of what `path` does, and runs that module's forward hooks.

        Children keep their names, so that the state dict does.
        """
        norm = root.get_submodule(path)
        heir: nn.Module = nn.Sequential() if self.steps else nn.Identity()
        heir.training = norm.training
        for step in self.steps:
            part = step.build(root)
            if isinstance(step, OwnCalls):
                part.training = norm.training
            heir.add_module(_free_name(heir, step, path), part)
        # the very same dicts: a handle that the user keeps can still remove its hook
        heir._forward_hooks = norm._forward_hooks
        heir._forward_hooks_with_kwargs = norm._forward_hooks_with_kwargs
        heir._forward_hooks_always_called = norm._forward_hooks_always_called
        return heir


def _free_name(heir: nn.Module, step: Child | OwnCalls, path: str) -> str:
    if isinstance(step, OwnCalls):
        wish = step.ops[-1].kind
    else:
        wish = step.path.removeprefix(f"{path}.").replace(".", "_")
    name, number = wish, 0
    while hasattr(heir, name):
        number += 1
        name = f"{wish}_{number}"
    return name


def give_way(root: nn.Module, heirs: Mapping[str, Rest]) -> None:
    """Put what is left of each norm in its place, wherever it is registered."""
    built = {id(root.get_submodule(path)): rest.build(root, path) for path, rest in heirs.items()}
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if id(child) in built:
                parent._modules[name] = built[id(child)]


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
    call = list(_stack(op))[-1]
    inside = [each for each in graph.ops if call in _stack(each)]
    if inside[0] is not op:
        return Reason("no_module", f"{op.owner!r} calls {inside[0].spelling} before it normalises", op.name)
    steps: list[Child | OwnCalls] = []
    tensor = graph.output(op)
    for path, ops in _segments(inside[1:], call):
        if not _is_one_step(graph, ops, tensor):
            message = f"{op.owner!r} does more than one thing behind its BatchNorm"
            return Reason("no_module", message, op.name)
        if path is None and (fixed := next((each for each in ops if not _stands_alone(graph, each)), None)):
            message = f"{op.owner!r} calls {fixed.spelling} itself, which cannot stand alone"
            return Reason("no_module", message, op.name)
        steps.append(OwnCalls(tuple(ops)) if path is None else _child(op, path))
        tensor = graph.output(ops[-1])
    return Rest(tuple(steps))


def _stack(op: Op) -> dict[str, tuple[str, Any]]:
    """The modules a call lies in, outermost first: a key for each call of a module → (path, class)."""
    return op.source.meta.get("nn_module_stack") or {}


def _child(norm: Op, path: str) -> Child:
    """A norm with several names is called by each of them; its children go by the first."""
    called, _ = list(_stack(norm).values())[-1]
    below = path.removeprefix(f"{called}.")
    return Child(f"{norm.owner}.{below}" if below != path else path)


def _segments(ops: list[Op], call: str) -> Iterator[tuple[str | None, list[Op]]]:
    """What a module does in `call`: the ops of each call of a child, with its path; runs of its own without."""
    for key, group in groupby(ops, key=lambda op: _child_call(op, call)):
        run = list(group)
        yield (_stack(run[0])[key][0] if key is not None else None), run


def _child_call(op: Op, call: str) -> str | None:
    keys = list(_stack(op))
    below = keys[keys.index(call) + 1 :]
    return below[0] if below else None


def _is_one_step(graph: ModelGraph, ops: list[Op], tensor: Tensor) -> bool:
    """Do these calls read `tensor` and nothing else computed, and does only the last result leave?"""
    made = {output for op in ops for output in graph.outputs(op).values()}
    read = {t for op in ops for t in graph.inputs(op).values() if graph.producer(t) is not None}
    leaving = [t for t in made if any(each.op not in ops for each in graph.readers(t))]
    alone = all(each.op in ops for each in graph.readers(tensor))
    return alone and read - made == {tensor} and leaving in ([], [graph.outputs(ops[-1]).get("y")])


def _stands_alone(graph: ModelGraph, op: Op) -> bool:
    """Is it elementwise, and is everything it reads computed or a plain number?"""
    nodes = len(op.source.all_input_nodes)
    computed = {tensor for tensor in graph.inputs(op).values() if graph.producer(tensor) is not None}
    return op.kind in _ELEMENTWISE and nodes == len(computed)
