"""What a module does to numbers, when its class does not say.

A norm ignores the scale of its input; those that subtract the mean ignore a shift of it as well:

    f(c·x) ≈ f(x) for every norm       f(x + k) ≈ f(x) for LayerNorm, GroupNorm, InstanceNorm, BatchNorm

It normalises over an axis if what it puts out at one place depends on what lies elsewhere along that axis,
which tells those four apart. Dividing by the length (‖y‖² = 1) is no RMSNorm (‖y‖² = n). And with equal
weights it keeps the order of the numbers along that axis; a linear layer behind a normalisation does not.

The module is run on a copy without the user's hooks, on inputs so large (10⁴) that ε does not show. A frozen
BatchNorm, and anything else that is affine, ignores no scale: it is not found here.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from normtool.formats.torch.export import drop_hooks, undisturbed

Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Behaviour:
    """`axes` are the normalised ones, from the end where they are the last; None where the kind says it."""

    kind: str
    axes: tuple[int, ...] | None


#: Two outputs are the same when they agree to this, relative to their largest element.
_TOLERANCE = 1e-3

_LARGE = 1e4

#: Channels of a norm that has no parameters to say so.
_WIDTH = 8

#: Lengths for the other axes, prime so that none is mistaken for the channels by accident.
_LENGTHS = (5, 7, 11)


def behaviour(module: nn.Module) -> Behaviour | None:
    """None for what is no norm, or will not run."""
    with undisturbed():
        try:
            twin = _runnable_copy(module)
            torch.manual_seed(0)
            return next((found for shape in _shapes(twin) if (found := _on_shape(twin, shape))), None)
        except Exception:  # a class of the user's, and anything can be in it; then nothing is known of it
            return None


def behaviour_of_piece(piece: nn.Module, shape: tuple[int, ...]) -> Behaviour | None:
    """The same for a piece of a program, which runs on this shape and no other."""
    with undisturbed():
        torch.manual_seed(0)
        return _on_shape(piece.to(torch.float64), shape)


def _runnable_copy(module: nn.Module) -> nn.Module:
    """In float64 on the CPU, with weights of which none is 0: γ = 0 would make anything look invariant."""
    twin = drop_hooks(copy.deepcopy(module)).eval()
    has_numbers = not any(t.is_meta for t in (*twin.parameters(), *twin.buffers()))
    twin = (twin.to("cpu") if has_numbers else twin.to_empty(device="cpu")).to(torch.float64)
    for tensor in _numbers(twin):
        tensor.copy_(torch.rand(tensor.shape, dtype=torch.float64) + 0.5)
    return twin


def _numbers(module: nn.Module) -> list[torch.Tensor]:
    return [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]


def _shapes(module: nn.Module) -> Iterator[tuple[int, ...]]:
    """Inputs it may be made for: images first, because only they tell all kinds apart."""
    shape = next((tuple(t.shape) for t in (*module.parameters(), *module.buffers()) if t.ndim), ())
    if len(shape) > 1 and 1 not in shape:
        yield 2, *shape
    width = max(shape, default=1)
    width = width if width > 1 else _WIDTH
    first, second = [length for length in _LENGTHS if length != width][:2]
    yield 2, width, first, second
    yield 2, first, width
    yield 2, width, first
    yield 3, width


def _on_shape(function: nn.Module, shape: tuple[int, ...]) -> Behaviour | None:
    x = _large(*shape)
    try:
        y = function(x)
        if not isinstance(y, torch.Tensor) or y.shape != x.shape or not _close(y, function(3 * x)):
            return None
        axes = [axis for axis in range(x.ndim) if _looks_along(function, x, y, axis)]
        return _judge(function, x, axes, centred=_close(y, function(x + 2 * _LARGE)))
    except Exception:  # the wrong rank or width for this module
        return None


def _large(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64) * _LARGE


def _looks_along(function: Function, x: torch.Tensor, y: torch.Tensor, axis: int, first: int = 1) -> bool:
    """Does the output at place 0 of an axis depend on the input from place `first` on?"""
    changed = x.clone()
    elsewhere = changed.narrow(axis, first, x.shape[axis] - first)
    elsewhere.copy_(_large(*elsewhere.shape))
    return not _close(y.select(axis, 0), function(changed).select(axis, 0))


def _judge(function: nn.Module, x: torch.Tensor, axes: list[int], centred: bool) -> Behaviour | None:
    for tensor in _numbers(function):
        tensor.fill_(1)
    if not axes or not _keeps_order(function, x, axes[-1]):
        return None  # elementwise, such as a sign; or more than a norm
    if 0 in axes:
        return Behaviour("batch_norm", None) if centred else None
    if centred and x.ndim > 3 and axes == list(range(2, x.ndim)):
        return Behaviour("instance_norm", None)
    if centred and x.ndim > 3 and axes == list(range(1, x.ndim)) and _is_grouped(function, x):
        return Behaviour("group_norm", None)
    kind = "layer_norm" if centred else "lp_norm" if _divides_by_length(function, x, axes) else "rms_norm"
    trailing = axes[-1] == x.ndim - 1
    return Behaviour(kind, tuple(axis - x.ndim if trailing else axis for axis in axes))


def _keeps_order(function: Function, x: torch.Tensor, axis: int) -> bool:
    return torch.equal(x.argsort(axis), function(x).argsort(axis))


def _is_grouped(function: nn.Module, x: torch.Tensor) -> bool:
    """Several groups of channels, or one weight for each channel; LayerNorm has one for each element."""
    if any(tensor.numel() == x.shape[1] for tensor in _numbers(function)):
        return True
    return not _looks_along(function, x, function(x), axis=1, first=x.shape[1] - 1)


def _divides_by_length(function: nn.Module, x: torch.Tensor, axes: list[int]) -> bool:
    """With γ = 1 (or 1 + γ = 2), is ‖y‖² 1 (4)? The odd part of f knows no bias."""
    squares = ((function(x) - function(-x)) / 2).pow(2)
    mean, total = squares.mean(axes), squares.sum(axes)
    return not _is_square_of_gain(mean) and _is_square_of_gain(total)


def _is_square_of_gain(values: torch.Tensor) -> bool:
    return any(_close(torch.full_like(values, gain), values) for gain in (1.0, 4.0))


def _close(y: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((y - other).abs().max() <= _TOLERANCE * y.abs().max())
