"""What takes the place of a module when a swap is carried out on it; all of it needs torch alone.

nn.LayerNorm                    nn.RMSNorm, with γ if it did not move
… whose β could not move        nn.Sequential(norm=nn.RMSNorm, shift=…)
… of rows of a table            nn.Identity
a layer scale                   nn.Identity
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from normtool.formats.torch.centred import CentredInput, CentredOutput
from normtool.formats.torch.rest import Shift
from normtool.formats.torch.tensors import to_tensor
from normtool.values import Value

#: Names of the parts in a Sequential.
NORM, SHIFT = "norm", "shift"

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass(frozen=True, eq=False)
class Numbers:
    """γ or β: the parameter `kept` as it is, or a new one with `content`, made like the parameter `like`."""

    content: Value
    kept: str = ""
    like: str = ""

    def build(self, root: nn.Module) -> torch.Tensor:
        if self.kept:
            return stored_in(root, self.kept)
        content = to_tensor(self.content)
        if not self.like:
            return nn.Parameter(content)
        old = stored_in(root, self.like)
        return nn.Parameter(content.to(old.device, old.dtype), requires_grad=old.requires_grad)


@dataclass(frozen=True, eq=False)
class RmsNorm:
    """γ·RMS_ε(x), or that + β."""

    lengths: tuple[int, ...]
    eps: float
    weight: Numbers | None
    bias: Numbers | None

    def build(self, root: nn.Module, old: nn.Module) -> nn.Module:
        norm = nn.RMSNorm(self.lengths, eps=self.eps, elementwise_affine=False)
        if self.weight is not None:
            norm.elementwise_affine = True
            _hold(norm, "weight", self.weight.build(root))
        norm.training = old.training
        if self.bias is None:
            return _with_hooks(norm, old)
        shift = Shift(to_tensor(self.bias.content)).build(root)
        _hold(shift, "bias", self.bias.build(root))
        return _with_hooks(_chain({NORM: norm, SHIFT: shift}, old.training), old)


@dataclass(frozen=True, eq=False)
class Nothing:
    """Hands on what goes in."""

    def build(self, root: nn.Module, old: nn.Module) -> nn.Module:
        return _with_hooks(nn.Identity().train(old.training), old)


Heir = RmsNorm | Nothing


@dataclass(frozen=True)
class Centre:
    """A Centre over `axes`, counted from the back, behind a layer, or in front of it."""

    axes: tuple[int, ...]
    in_front: bool

    def around(self, layer: nn.Module) -> nn.Module:
        return CentredInput(layer, self.axes) if self.in_front else CentredOutput(layer, self.axes)


def give_way(
    root: nn.Module, heirs: Mapping[str, Heir], centres: Mapping[str, Sequence[Centre]]
) -> dict[str, nn.Module]:
    """Put heirs and Centres in the places of modules, wherever these are registered.

    Returns the heirs, by the path of what was there.
    """
    parents = list(root.modules())
    olds = {path: root.get_submodule(path) for path in dict.fromkeys((*heirs, *centres))}
    built = {path: heir.build(root, olds[path]) for path, heir in heirs.items()}
    places: dict[int, nn.Module] = {}
    for path, old in olds.items():
        places[id(old)] = built.get(path, old)
        for centre in centres.get(path, ()):
            places[id(old)] = centre.around(places[id(old)])
    for parent in parents:
        swapped = [name for name, child in parent._modules.items() if id(child) in places]
        for name in swapped:
            parent._modules[name] = places[id(parent._modules[name])]
        if isinstance(parent, nn.TransformerEncoderLayer) and {"norm1", "norm2"} & set(swapped):
            _leave_fast_path(parent)
    return built


def stored_in(root: nn.Module, name: str) -> torch.Tensor:
    path, _, last = name.rpartition(".")
    tensor = getattr(root.get_submodule(path), last)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _leave_fast_path(layer: nn.TransformerEncoderLayer) -> None:
    """In inference torch runs the layer as one kernel, LayerNorms inside; this flag of its own says not to."""
    layer.activation_relu_or_gelu = 0


def _chain(parts: Mapping[str, nn.Module], training: bool) -> nn.Module:
    chain = nn.Sequential(OrderedDict(parts))
    chain.training = training
    return chain


def _hold(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """The very parameter, so that an optimizer and others that share it go on holding it."""
    module._parameters.pop(name, None)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor)


def _with_hooks(heir: nn.Module, old: nn.Module) -> nn.Module:
    """The very same dicts: a handle that the user keeps can still remove its hook."""
    for hooks in _HOOKS:
        setattr(heir, hooks, getattr(old, hooks))
    return heir
