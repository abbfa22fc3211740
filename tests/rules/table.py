"""What the rows of the test table are, and the pieces of the small nets they are about.

A `Case` is a model whose norms fold exactly. A `Violation` is a model in which a condition of the rule does not
hold, beside the model that a folder would make which did not look: the two must differ.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from torch.export import ExportedProgram

from tests.zoo import Net

Model = onnx.ModelProto | ExportedProgram
Build = Callable[[], Model]

#: An op of a row: puts it behind a tensor and returns what comes out.
Layer = Callable[[Net, str], str]

Array = np.ndarray[Any, Any]

BACKWARD, FORWARD = "backward", "forward"
DIRECTIONS = (BACKWARD, FORWARD)


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    build: Build
    #: op types that must be left, in any order
    left: tuple[str, ...]
    direction: str = BACKWARD
    #: norms that stay, having taken in the others
    kept: int = 0
    #: what is asked of the fold
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Violation:
    name: str
    kind: str
    #: why a norm is kept; "" where none is
    reason: str
    build: Build
    wrong: Build
    direction: str = BACKWARD
    #: op types that are left where no norm is kept: only the scale has moved, or another fold is the right one
    left: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def float64_net(seed: int = 0, opset: int = 17) -> Net:
    return Net(opset=opset, seed=seed, dtype=np.float64)


@dataclass(frozen=True)
class Map:
    """The statistics of one BatchNorm, and the s and t they come to, each (C,)."""

    statistics: tuple[str, ...]
    epsilon: float
    s: Array
    t: Array

    def norm(self, net: Net, x: str) -> str:
        """The BatchNorm behind x."""
        return net.batch_norm(x, len(self.s), epsilon=self.epsilon, statistics=self.statistics)


def draw(net: Net, channels: int, only: str = "", positive: bool = False, level: bool = False) -> Map:
    """A perturbed BatchNorm: `only` a "scale" or a "shift", `positive` scales, one `level` shift for all."""
    rng = net.rng
    gamma = rng.uniform(0.5, 1.5, channels) * np.where(rng.random(channels) < 0.4, -1, 1)
    gamma[0] = -abs(gamma[0])  # one at the least
    gamma = np.abs(gamma) if positive else gamma
    beta, mean, var = rng.normal(size=channels), rng.normal(size=channels), rng.uniform(0.3, 2, channels)
    epsilon = 1e-3
    if level or only == "scale":
        beta, mean = np.full(channels, 0.0 if only else 0.7), np.zeros(channels)
    if only == "shift":
        gamma, var, epsilon = np.ones(channels), np.ones(channels), 0.0
    s = gamma / np.sqrt(var + np.float32(epsilon))
    names = tuple(net.constant(each) for each in (gamma, beta, mean, var))
    return Map(names, epsilon, s, beta - mean * s)


def layer(op_type: str, *integers: Sequence[int] | int, **attributes: object) -> Layer:
    """One op with integer operands: a Reshape and its shape, a Squeeze and its axes."""

    def put(net: Net, y: str) -> str:
        operands = [net.constant(np.array(each, np.int64)) for each in integers]
        return str(net.node(op_type, y, *operands, **attributes))

    return put


def in_turn(*layers: Layer) -> Layer:
    """One layer behind the other."""

    def put(net: Net, y: str) -> str:
        for each in layers:
            y = each(net, y)
        return y

    return put


def around(
    between: Layer,
    direction: str,
    swapped: bool = False,
    shape: Sequence[int] = (2, 4, 6, 6),
    channels_behind: int = 0,
    opset: int = 17,
    **norm: Any,
) -> onnx.ModelProto:
    """A 1×1 Conv, what is `between`, a BatchNorm (backward); the BatchNorm, this, the Conv (forward).

    What is between keeps the rank, and the channels on axis 1; it leaves `channels_behind` of them, if not as
    many. `swapped`: the BatchNorm on the other side of it, where whoever does not look would move it.
    """
    net = float64_net(opset=opset)
    channels, rank = shape[1], len(shape) - 2
    behind = channels_behind or channels
    map_ = draw(net, channels if (direction == FORWARD) != swapped else behind, **norm)
    read, written = (3, channels) if direction == BACKWARD else (behind, 5)
    conv = [net.weight(written, read, *[1] * rank), net.weight(written)]
    x = net.input([shape[0], read if direction == BACKWARD else channels, *shape[2:]])
    y = net.node("Conv", x, *conv) if direction == BACKWARD else x
    before = (direction == FORWARD) != swapped
    y = map_.norm(net, y) if before else y
    y = between(net, y)
    y = y if before else map_.norm(net, y)
    net.output(net.node("Conv", y, *conv) if direction == FORWARD else y)
    return net.model()


def passes(
    name: str, kind: str, between: Layer, *ops: str, asked: Mapping[str, Any] | None = None, **options: Any
) -> list[Case]:
    """The map passes what is `between` in both directions, which stays: `ops` beside the Conv."""
    return [
        Case(
            f"{name}-{direction}",
            kind,
            lambda d=direction: around(between, d, **options),  # type: ignore[misc]
            ("Conv", *ops),
            direction,
            options=asked or {},
        )
        for direction in DIRECTIONS
    ]


def stops(
    name: str, kind: str, reason: str, between: Layer, asked: Mapping[str, Any] | None = None, **options: Any
) -> list[Violation]:
    """The map passes what is `between` in neither direction; wrongly, the BatchNorm is on its other side."""
    return [
        Violation(
            f"{name}-{direction}",
            kind,
            reason,
            lambda d=direction: around(between, d, **options),  # type: ignore[misc]
            lambda d=direction: around(between, d, swapped=True, **options),  # type: ignore[misc]
            direction,
            options=asked or {},
        )
        for direction in DIRECTIONS
    ]
