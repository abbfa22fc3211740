"""Which modules are norms, and of what kind.

By class first (subclasses of any name), then by what they store (running statistics make a BatchNorm, frozen or
home-made), then, for classes that merely sound like a norm, by what they do to numbers (`probe`): T5's
LayerNorm is an RMSNorm. What a class under any other name computes, its ops show (`forms`); without dataflow it
is probed too.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from normtool.formats.torch.probe import behaviour
from normtool.graph import NormModule, Role, Tensor

#: class → kind; the first that fits. Base classes, for the lazy, synchronised and quantised ones too.
CLASSES: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.modules.batchnorm._BatchNorm, "batch_norm"),
    (nn.modules.instancenorm._InstanceNorm, "instance_norm"),
    (nn.GroupNorm, "group_norm"),
    (nn.LayerNorm, "layer_norm"),
    (nn.RMSNorm, "rms_norm"),
    (nn.LocalResponseNorm, "local_response_norm"),
    (nn.CrossMapLRN2d, "local_response_norm"),
)

#: TorchScript keeps the name of a class and not the class.
_SCRIPTED = re.compile(r"(Lazy|Sync)?(?P<kind>Batch|Instance|Group|Layer|RMS|LocalResponse)Norm([123]d)?")

#: Class or attribute names worth a probe: anything with "norm" (but not "normal"), and the usual initials.
SOUNDS_LIKE_A_NORM = re.compile(
    r"(?i:norm(?!al(?!i[sz])))|(?:LN|GN|BN|RMS)(?![a-z])|(?:^|_)(?:ln|gn|bn|rms)(?:$|_|\d)"
)

#: Names under which modules keep their ε.
_EPS_NAMES = ("eps", "epsilon", "variance_epsilon", "norm_eps")

#: More than this is no norm's; nothing so large is copied for a probe.
_MOST_ELEMENTS = 1 << 22

_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Known:
    """What is known of a norm module before its tensors are looked up. `axes` where a probe told them."""

    kind: str
    evidence: str
    axes: tuple[int, ...] | None = None


def recognise(module: nn.Module, name: str = "", by_name: bool = True) -> Known | None:
    """The kind of a norm module and how it was recognised; None for anything else.

    `name` is that of the attribute that holds it: a class called `Scale` may sit in `self.norm`. Not `by_name`:
    where no dataflow shows what a module computes, any that holds a few vectors is tried.
    """
    for known, kind in CLASSES:
        if isinstance(module, known):
            return Known(kind, "module")
    if isinstance(module, torch.jit.ScriptModule):
        scripted = _SCRIPTED.fullmatch(class_name(module))
        return Known(_SCRIPTED_KINDS[scripted["kind"]], "name") if scripted else None
    own = dict(own_tensors(module))
    if all(name in own for name in _STATISTICS):
        return Known("batch_norm", "statistics")
    sounds = any(map(SOUNDS_LIKE_A_NORM.search, (type(module).__name__, name)))
    worth_a_try = sounds or (
        not by_name and any(not is_lazy(tensor) and tensor.ndim for tensor in own.values())
    )
    if not worth_a_try or _is_of_torch(module) or not _is_small_leaf(module, own):
        return None
    found = behaviour(module)
    return Known(found.kind, "probe", found.axes) if found else None


_SCRIPTED_KINDS = {
    "Batch": "batch_norm",
    "Instance": "instance_norm",
    "Group": "group_norm",
    "Layer": "layer_norm",
    "RMS": "rms_norm",
    "LocalResponse": "local_response_norm",
}


def class_name(module: nn.Module) -> str:
    """The class as its author called it, behind TorchScript too."""
    return str(getattr(module, "original_name", "")) or type(module).__name__


def _is_of_torch(module: nn.Module) -> bool:
    """Torch's own norms are in `CLASSES`; what else of it sounds like one normalises weights."""
    return type(module).__module__.startswith("torch.")


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of the module itself, and those its parametrisations keep for it."""
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)
    parametrizations = getattr(module, "parametrizations", None)
    if isinstance(parametrizations, nn.Module):
        for name, parameter in parametrizations.named_parameters():
            yield f"parametrizations.{name}", parameter


def _is_small_leaf(module: nn.Module, own: Mapping[str, torch.Tensor]) -> bool:
    """A norm holds a few vectors of one shape and no layers; a block that is called …Norm holds layers."""
    if any(True for child in module.children() for _ in child.parameters()):
        return False
    shapes = {tuple(tensor.shape) for tensor in own.values() if not is_lazy(tensor) and tensor.ndim}
    elements = sum(tensor.numel() for tensor in own.values() if not is_lazy(tensor))
    return len(own) <= 4 and len(shapes) <= 1 and elements <= _MOST_ELEMENTS


def norm_modules(
    module: nn.Module, tensors: Mapping[str, Tensor], calls: Callable[[str], int] | None
) -> Iterator[NormModule]:
    """Every norm below `module` once, under its first path.

    `calls` says how often a path is called; None where there is no dataflow.
    """
    for path, child in module.named_modules():
        known = recognise(child, path.rpartition(".")[2], by_name=calls is not None)
        if known is None:
            continue
        own = dict(own_tensors(child))
        names = (f"{path}.{name}".lstrip(".") for name in own)
        stored = [tensors[name] for name in names if name in tensors]
        yield NormModule(
            name=path or class_name(child),
            kind=known.kind,
            spelling=class_name(child),
            evidence=known.evidence,
            learnable=tuple(tensor for tensor in stored if tensor.role is Role.PARAMETER),
            buffers=tuple(tensor for tensor in stored if tensor.role is not Role.PARAMETER),
            axes=known.axes or _axes(child, known.kind),
            eps=_eps(child),
            unknown=sum(map(is_lazy, own.values())),
            calls=calls(path) if calls is not None else None,
            owner=path,
        )


def _axes(module: nn.Module, kind: str) -> tuple[int, ...] | None:
    """The normalised axes as far as the module itself fixes them; the input's rank does the rest."""
    shape = getattr(module, "normalized_shape", None)
    if kind in ("layer_norm", "rms_norm"):
        count = len(shape) if isinstance(shape, tuple | torch.Size) else 1
        return tuple(range(-count, 0))
    if kind == "local_response_norm":
        return (1,)
    return None


def _eps(module: nn.Module) -> float | None:
    found = (getattr(module, name, None) for name in _EPS_NAMES)
    return next((float(eps) for eps in found if isinstance(eps, int | float)), None)
