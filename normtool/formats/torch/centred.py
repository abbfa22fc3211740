"""A Centre in a user's module: x − mean(x), behind a layer or in front of one.

The wrapper is the layer for whoever looks at its attributes: `wte.weight` goes on being the table. Unpickling a
whole module with one inside needs normtool; its state dict, and what is exported of it, do not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

#: The name of the layer in its wrapper.
LAYER = "layer"


class _Around(nn.Module):
    def __init__(self, layer: nn.Module, axes: Sequence[int]) -> None:
        super().__init__()
        self.layer = layer
        self.axes = tuple(axes)
        self.training = layer.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(LAYER), name)

    def extra_repr(self) -> str:
        return f"axes={self.axes}"

    def _centred(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(dim=self.axes, keepdim=True)


class CentredOutput(_Around):
    """What the layer puts out, less its mean over `axes`."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._centred(self.layer(*args, **kwargs))


class CentredInput(_Around):
    """The layer on its first argument less that one's mean over `axes`."""

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.layer(self._centred(input), *args, **kwargs)
