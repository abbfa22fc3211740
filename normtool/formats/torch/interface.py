"""How a PyTorch model is called and what it returns, as named tensors.

`forward` takes and gives nested tuples, lists and dicts; ONNX takes and gives a list. The names here are those
that torch.export gives its placeholders (`x`, `masks_0`, `options_scale`), so they are the same on both sides.
"""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from normtool.formats.torch.export import Example, leaves


@dataclass(frozen=True, eq=False)
class Interface:
    """The structure of a call: one entry for each leaf, a tensor's name or None and then a constant."""

    names: tuple[str | None, ...]
    constants: tuple[Any, ...]
    structure: Any

    @property
    def tensors(self) -> list[str]:
        return [name for name in self.names if name is not None]

    def call(self, feed: Sequence[torch.Tensor]) -> Example:
        """The arguments around these tensors, given in the order of `tensors`."""
        rest = iter(feed)
        pairs = zip(self.names, self.constants, strict=True)
        flat = [constant if name is None else next(rest) for name, constant in pairs]
        args, kwargs = pytree.tree_unflatten(flat, self.structure)
        return Example(args, kwargs)


def interface_of_example(module: nn.Module, example: Example) -> tuple[Interface, list[torch.Tensor]]:
    """The interface that a call has, and the call's tensors."""
    flat, structure = pytree.tree_flatten_with_path((example.args, dict(example.kwargs)))
    positional = _parameter_names(module, len(example.args))
    names = tuple(_name(path, positional) if isinstance(leaf, torch.Tensor) else None for path, leaf in flat)
    constants = tuple(None if isinstance(leaf, torch.Tensor) else leaf for _, leaf in flat)
    tensors = [leaf for _, leaf in flat if isinstance(leaf, torch.Tensor)]
    return Interface(names, constants, structure), tensors


def interface_of_program(program: ExportedProgram) -> Interface:
    """The only one that the program can be called through."""
    arguments = [s.arg for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    names = tuple(None if isinstance(each, ConstantArgument) else each.name for each in arguments)
    constants = tuple(each.value if isinstance(each, ConstantArgument) else None for each in arguments)
    return Interface(names, constants, program.call_spec.in_spec)


def interface_by_names(module: nn.Module, names: Sequence[str]) -> Interface:
    """For a module that nobody has called yet: by name if `forward` knows them all, else in order."""
    by_name = set(names) <= set(_signature(module))
    arguments = ((), dict.fromkeys(names)) if by_name else ((None,) * len(names), {})
    structure = pytree.tree_flatten(arguments, is_leaf=lambda each: each is None)[1]
    return Interface(tuple(names), (None,) * len(names), structure)


def accepts(module: nn.Module, example: Example) -> bool:
    """Has `forward` parameters for these arguments?"""
    try:
        inspect.signature(module.forward).bind(*example.args, **example.kwargs)
    except TypeError:
        return False
    except ValueError:  # no signature to be had: only a run can tell
        return True
    return True


def aligned(program: ExportedProgram, example: Example) -> list[Any]:
    """The leaves of a call in the order of the program's placeholders, whatever that of the keywords."""
    wanted = program.call_spec.in_spec.child(1).context
    kwargs = {name: example.kwargs[name] for name in wanted}
    return list(pytree.tree_leaves((example.args, kwargs)))


def named_outputs(value: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(tensors by name, names of leaves that are none), in the order torch flattens them."""
    tensors: dict[str, torch.Tensor] = {}
    others: list[str] = []
    for name, leaf in _named_leaves(value, ""):
        if not isinstance(leaf, torch.Tensor):
            others.append(name or "output")
            continue
        tensors[_free(name or "output", tensors)] = leaf
    return tensors, others


def _named_leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, Mapping | type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _named_leaves(each, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from _named_leaves(each, f"{prefix}.{i}" if prefix else f"output.{i}")
    elif isinstance(value, torch.Tensor):
        yield prefix, value
    else:  # a cache of transformers is a class that torch knows how to flatten
        for each in leaves(pytree.tree_leaves(value)):
            yield prefix, each


def leaf_names(spec: Any, prefix: str = "") -> list[str]:
    """What `named_outputs` calls the leaves of something with this structure; "" where it is one leaf alone."""
    if spec.is_leaf():
        return [prefix]
    keys = _keys(spec)
    found: list[str] = []
    for i, child in enumerate(spec.children()):
        inner = f"{prefix}.{keys[i] if keys else i}" if prefix else keys[i] if keys else f"output.{i}"
        found += leaf_names(child, inner)
    return found


def pruned(spec: Any, kept: Sequence[int]) -> Any:
    """The structure around these leaves: the same mapping with fewer keys, or else a tuple of leaves."""
    keys, first, chosen = _keys(spec), 0, list[int]()
    for i, child in enumerate(spec.children() if keys else ()):
        inside = set(range(first, first + child.num_leaves))
        first += child.num_leaves
        if inside and inside <= set(kept):
            chosen.append(i)
    children = [spec.child(i) for i in chosen]
    if keys and sum(child.num_leaves for child in children) == len(kept):
        return pytree.TreeSpec(spec.type, [keys[i] for i in chosen], children)
    return pytree.tree_structure(tuple(kept))


def _keys(spec: Any) -> list[str]:
    """The keys of a mapping, as dicts and the outputs of transformers are flattened; of anything else none."""
    context = spec.context
    named = isinstance(context, list) and all(isinstance(key, str) for key in context)
    return context if named and len(context) == spec.num_children else []


def _free(name: str, taken: Mapping[str, Any]) -> str:
    if name not in taken:
        return name
    return next(f"{name}.{i}" for i in range(1, len(taken) + 2) if f"{name}.{i}" not in taken)


def _signature(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return {}


def _parameter_names(module: nn.Module, count: int) -> list[str]:
    """Names of the first `count` positional arguments; `args_1` for one that only `*args` takes."""
    found: list[str] = []
    for name, parameter in _signature(module).items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            found += [f"{name}_{i}" for i in range(count - len(found))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            found.append(name)
    return [*found, *(f"input_{i}" for i in range(len(found), count))]


def _name(path: Sequence[Any], positional: Sequence[str]) -> str:
    """A leaf's name from its path: (0, 1, …) is the second positional argument, (1, "x", …) the keyword x."""
    steps: list[Any] = [getattr(step, "key", getattr(step, "idx", getattr(step, "name", ""))) for step in path]
    first = positional[steps[1]] if steps[0] == 0 else steps[1]
    return "_".join(str(step) for step in (first, *steps[2:]))
