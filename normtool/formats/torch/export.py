"""`torch.export` without a trace of it left in the user's module.

The program is exported from a *structural copy*: the same parameters and buffers in new module objects. So
whatever `forward` assigns to `self`, and every flag, lands on the copy; tensors are never written, because
export runs on fake ones; the random generators are put back.
"""

import copy
import io
import logging
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as modules

from normtool.errors import NormtoolError

#: Axis 0 of every input, where it can vary.
BATCH = "batch"


@dataclass(frozen=True, eq=False)
class Example:
    """What `forward` is called with: tensors, or nested tuples, lists and dicts of them."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class ExportFailed(NormtoolError):
    """torch.export refuses the module; the message is the exporter's own first line."""


def structural_copy(module: nn.Module, hooks: bool = True) -> nn.Module:
    """New module objects around the same tensors.

    Without `hooks` the user's forward hooks stay behind. Raises ExportFailed where it cannot be copied.
    """
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [t.grad for t in tensors if t.grad is not None]
    same = {id(tensor): tensor for tensor in tensors}
    try:
        twin = copy.deepcopy(module, {id(t): t.detach().clone() for t in _with_history(module)} | same)
    except Exception as error:
        raise ExportFailed(f"the module cannot be copied: {first_line(error)}") from None
    return twin if hooks else drop_hooks(twin)


def _with_history(module: nn.Module) -> Iterator[torch.Tensor]:
    """Plain attributes that deepcopy refuses: the weight of old weight_norm, a cache of activations."""
    for child in module.modules():
        for value in leaves(vars(child)):
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                yield value


def drop_hooks(copied: nn.Module) -> nn.Module:
    """Take the user's forward hooks off a copy: they may put what they see where the user finds it.

    What belongs to the model stays: old weight_norm, spectral_norm and pruning compute their weight in a
    pre-hook, transformers collects the outputs of a backbone's stages in hooks.
    """
    for child in copied.modules():
        for hooks in (child._forward_hooks, child._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if not (_is_of_transformers(hook) or (hooks is child._forward_pre_hooks and is_of_torch(hook))):
                    del hooks[key]
    return copied


def is_of_torch(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.")


def _is_of_transformers(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def export(
    module: nn.Module, example: Example, *, dynamic_batch: bool = False, hooks: bool = True
) -> torch.export.ExportedProgram:
    """The module as a program, in the modes (train, eval) its parts are in. Raises ExportFailed.

    With `dynamic_batch` axis 0 of the inputs is left open where the model allows it.
    """
    with undisturbed(), nullcontext() if hooks else _no_global_hooks():
        twin = structural_copy(module, hooks)
        if dynamic_batch:
            for shapes, enlarged in _dynamic_attempts(example):
                try:
                    return _export(twin, enlarged, shapes)
                except ExportFailed:
                    continue
        return _export(twin, example, None)


def _export(module: nn.Module, example: Example, shapes: Any) -> torch.export.ExportedProgram:
    try:
        with redirect_stderr(io.StringIO()):  # a refused graph is printed there
            return torch.export.export(
                module, example.args, dict(example.kwargs), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:  # the module's own code runs in there: anything can come out
        raise ExportFailed(f"{type(error).__name__}: {first_line(error)}") from None


def _dynamic_attempts(example: Example) -> Iterator[tuple[Any, Example]]:
    """First one symbol for all inputs, then one for each; a batch of 1 would be taken for a constant."""
    enlarged = Example(
        tuple(map(_at_least_two, example.args)), {k: _at_least_two(v) for k, v in example.kwargs.items()}
    )
    lengths = {t.shape[0] for t in leaves((enlarged.args, dict(enlarged.kwargs))) if _has_batch(t)}
    if len(lengths) == 1:
        yield _shapes(enlarged, torch.export.Dim(BATCH)), enlarged
    yield _shapes(enlarged, torch.export.Dim.AUTO), enlarged


def _has_batch(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _at_least_two(value: Any) -> Any:
    if _has_batch(value) and value.shape[0] == 1:
        return torch.cat([value, value])
    return value


def _shapes(example: Example, dim: Any) -> Any:
    """`dynamic_shapes` of torch.export: the structure of the inputs with {0: dim} for each tensor."""

    def spec(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return {0: dim} if value.ndim else None
        if isinstance(value, dict):
            return {key: spec(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(spec(each) for each in value)
        return None

    if example.args and example.kwargs:
        return None  # positions and names together need forward's signature; not worth a wrong guess
    return tuple(map(spec, example.args)) or {name: spec(value) for name, value in example.kwargs.items()}


@contextmanager
def _no_global_hooks() -> Iterator[None]:
    """Profilers hook every module of the process; they are not shown the copy."""
    tables = [modules._global_forward_hooks, modules._global_forward_pre_hooks]
    kept = [dict(table) for table in tables]
    try:
        for table in tables:
            table.clear()
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)


@contextmanager
def undisturbed() -> Iterator[None]:
    """No gradients, nothing of others on our stderr; every random generator is put back afterwards."""
    python, numpy_state = random.getstate(), np.random.get_state()
    logged = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        logging.disable(logged)


def leaves(value: Any) -> Iterator[Any]:
    """The leaves of nested tuples, lists and dicts, in the order torch flattens them; None is none."""
    if isinstance(value, Mapping):
        for each in value.values():
            yield from leaves(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from leaves(each)
    elif value is not None:
        yield value


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
