"""Rules whose operator only PyTorch has, or says otherwise: tried on exported programs."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - everyone's name for it
from torch import Tensor, nn
from torch.export import ExportedProgram

from tests.rules.table import BACKWARD, DIRECTIONS, FORWARD, Case, Violation

Function = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """As `table.around`: what is `between` lies between a Conv and a BatchNorm."""

    def __init__(self, between: Function, direction: str, swapped: bool, rank: int, only: str) -> None:
        super().__init__()
        convs, norms = (nn.Conv1d, nn.Conv2d), (nn.BatchNorm1d, nn.BatchNorm2d)
        self.conv, self.norm = convs[rank - 1](4, 4, 1), norms[rank - 1](4)
        self.between, self.first = between, (direction == FORWARD) != swapped
        self.forward_ = direction == FORWARD
        self._perturb(only)

    def _perturb(self, only: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.double().eval()
        with torch.no_grad():
            for tensor in (*self.conv.parameters(), self.norm.bias, self.norm.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
            self.norm.weight.copy_(torch.tensor([-1.25, 0.75, 1.5, -0.5]))
            self.norm.running_var.copy_(torch.tensor([0.5, 2.0, 1.25, 0.75]))
            if only == "scale":
                self.norm.bias.zero_()
                self.norm.running_mean.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.forward_ else self.conv(x)
        x = self.norm(x) if self.first else x
        x = self.between(x)
        x = x if self.first else self.norm(x)
        return self.conv(x) if self.forward_ else x


@cache
def program(
    between: Function, direction: str, shape: tuple[int, ...], swapped: bool = False, only: str = ""
) -> ExportedProgram:
    module = Around(between, direction, swapped, len(shape) - 2, only)
    return torch.export.export(module, (torch.zeros(shape, dtype=torch.float64),))


# ---- what is between --------------------------------------------------------------------------


def _adaptive(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, (3, 2))


def _adaptive_over_channels(x: Tensor) -> Tensor:
    """The channels are rows for as long as the average takes, of which one is left for all."""
    return F.adaptive_avg_pool2d(x.transpose(1, 2), (1, 5)).transpose(1, 2).expand(-1, 4, -1, -1)


def _values(x: Tensor) -> Tensor:
    """The channels are the features of the values, (N, positions, features); queries and keys are constant."""
    q = torch.linspace(-1, 2, 2 * 5 * 3, dtype=torch.float64).reshape(2, 5, 3)
    y: Tensor = F.scaled_dot_product_attention(q, q.flip(1), x.transpose(1, 2)).transpose(1, 2)
    return y


def _keys(x: Tensor) -> Tensor:
    """The channels are the features of the keys: a Softmax is made of them."""
    q = torch.linspace(-1, 2, 2 * 5 * 4, dtype=torch.float64).reshape(2, 5, 4)
    y: Tensor = F.scaled_dot_product_attention(q, x.transpose(1, 2), q).transpose(1, 2)
    return y


def _positions(x: Tensor) -> Tensor:
    """The channels are the positions of the values, which are averaged over."""
    q = torch.linspace(-1, 2, 2 * 4 * 3, dtype=torch.float64).reshape(2, 4, 3)
    return F.scaled_dot_product_attention(q, q.flip(1), x)


def _one_row(x: Tensor) -> Tensor:
    return x.select(2, -2).unsqueeze(2)


def _one_sample(x: Tensor) -> Tensor:
    return x.select(0, 1).unsqueeze(0)


def _one_channel(x: Tensor) -> Tensor:
    """One of the channels, for all of them."""
    return x.select(1, 2).unsqueeze(1).expand(-1, 4, -1, -1)


def _some_rows(x: Tensor) -> Tensor:
    return x[:, :, torch.tensor([4, 0, 0, 2])]


def _some_channels(x: Tensor) -> Tensor:
    return x[:, torch.tensor([3, 0, 0, 2])]


def _repeated(x: Tensor) -> Tensor:
    """One more axis in front, so that the channels lie on axis 2."""
    return x.repeat(3, 1, 1, 2, 1)[1]


class WithoutBatch(nn.Module):
    """(4, 4): four samples of four features for the BatchNorm, four channels of four positions for the Conv."""

    def __init__(self, kind: str, direction: str, careless: bool) -> None:
        super().__init__()
        layers = Around(lambda x: x, direction, False, 1, "")
        self.conv = {"conv": nn.Conv1d, "conv_transpose": nn.ConvTranspose1d}[kind](4, 4, 1)
        self.norm, self.careless, self.first = layers.norm, careless, direction == FORWARD
        with torch.no_grad():
            weight = layers.conv.weight if kind == "conv" else layers.conv.weight.transpose(0, 1)
            self.conv.double().weight.copy_(weight)
            self.conv.bias.copy_(layers.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`careless`: the Conv's channels are normalised."""
        norm = (lambda y: self.norm(y.T).T) if self.careless else self.norm
        y: Tensor = self.conv(norm(x)) if self.first else norm(self.conv(x))
        return y


@cache
def without_batch(kind: str, direction: str, careless: bool = False) -> ExportedProgram:
    module = WithoutBatch(kind, direction, careless).eval()
    return torch.export.export(module, (torch.zeros(4, 4, dtype=torch.float64),))


def cases() -> Iterator[Case]:
    image, sequence = (2, 4, 6, 5), (2, 4, 5)
    beside = "flip linspace reshape scaled_dot_product_attention transpose transpose"
    rows: tuple[tuple[str, str, Function, tuple[int, ...], str], ...] = (
        ("adaptive", "adaptive_average_pool", _adaptive, image, "adaptive_avg_pool2d"),
        ("attention", "attention", _values, sequence, beside),
        ("index", "index", _some_rows, image, "detach_ index lift_fresh_copy"),
        ("repeat", "tile", _repeated, image, "repeat select"),
        ("select-row", "select", _one_row, image, "select unsqueeze"),
        ("select-sample", "select", _one_sample, image, "select unsqueeze"),
    )
    for name, kind, between, shape, ops in rows:
        for direction in DIRECTIONS:
            arguments: tuple[Any, ...] = (between, direction, shape)
            build = lambda a=arguments: program(*a)  # noqa: E731
            left = (f"conv{len(shape) - 2}d", *ops.split())
            yield Case(f"torch-{name}-{direction}", kind, build, left, direction)


def violations() -> Iterator[Violation]:
    square, sequence = (2, 4, 4, 5), (2, 4, 4)
    rows: tuple[tuple[str, str, str, str, Function, tuple[int, ...]], ...] = (
        (
            "adaptive-over-channels",
            "adaptive_average_pool",
            "axis_mismatch",
            "",
            _adaptive_over_channels,
            square,
        ),
        ("attention-keys", "attention", "nonlinear", FORWARD, _keys, (2, 4, 5)),
        ("attention-positions", "attention", "axis_mismatch", BACKWARD, _positions, sequence),
        ("attention-positions", "attention", "nonlinear", FORWARD, _positions, sequence),
        ("index-channels", "index", "axis_mismatch", "", _some_channels, square),
        ("select-channel", "select", "axis_mismatch", BACKWARD, _one_channel, square),
        ("select-channel", "select", "", FORWARD, _one_channel, square),
    )
    for name, kind, reason, only, between, shape in rows:
        for direction in [only] if only else DIRECTIONS:
            yield Violation(
                f"torch-{name}-{direction}",
                kind,
                reason,
                lambda a=(between, direction, shape): program(*a),
                lambda a=(between, direction, shape): program(*a, swapped=True),
                direction,
                () if reason else ("conv2d", "expand", "select", "unsqueeze"),
            )
    for kind in ("conv", "conv_transpose"):
        for direction in DIRECTIONS:
            yield Violation(
                f"torch-{kind}-without-batch-{direction}",
                kind,
                "axis_mismatch",
                lambda a=(kind, direction): without_batch(*a),
                lambda a=(kind, direction): without_batch(*a, careless=True),
                direction,
            )
