"""DequantizeLinear of the weight, and of the bias, of a Conv.

It puts out float32 at the most. So that both sides can be compared to the last digit all the same, every number
here is a small multiple of a power of two, and so is every sum of them.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx

from tests.rules.table import Array, Case, Violation
from tests.zoo import Net

#: s and t of the BatchNorm; its mean is 0, its variance 1, its ε 0.
S, T = np.array([-2.0, 0.5, 4.0, -1.0]), np.array([0.25, -1.5, 3.0, 0.125])

#: Scales of the weight, one per channel.
SCALES = np.array([1 / 64, 1 / 32, 1 / 128, 1 / 16])


def _dequantised(
    net: Net, integers: Array, scale: Any, zero: int | None = 0, axis: int | None = 0, stored: bool = True
) -> str:
    """`stored` False: the integers are the caller's."""
    q = net.constant(integers) if stored else net.input(integers.shape, "q", dtype=integers.dtype)
    operands = [q, net.constant(np.asarray(scale, np.float32))]
    if zero is not None:
        operands.append(net.constant(np.full(np.shape(scale), zero, integers.dtype)))
    return str(net.node("DequantizeLinear", *operands, **({} if axis is None else {"axis": axis})))


def _conv(
    scale: Any = SCALES,
    bias: str = "float",
    signs: bool = True,
    shift: bool = True,
    lowest: int = -127,
    dtype: Any = np.int8,
    careless: bool = False,
    **weight: Any,
) -> onnx.ModelProto:
    """`careless`: scales take |s|, integers turn round where s < 0, whatever stands against it."""
    net = Net(opset=19)
    s, t = S if signs else np.abs(S), T if shift else 0 * T
    q, b = net.rng.integers(-100, 100, (4, 3, 3, 3)), np.array([0.5, -0.25, 1.0, 2.0])
    q[0, 0, 0, 0] = lowest
    x = net.node("Round", net.input([2, 3, 6, 6]))
    statistics = [net.constant(each.astype(np.float32)) for each in (s, t, 0 * s, 1 + 0 * s)]
    if careless:
        limits = np.iinfo(dtype)
        q = np.clip(q.astype(dtype) * np.sign(s).astype(int).reshape(4, 1, 1, 1), limits.min, limits.max)
        b, scale = s * b + t, scale * (np.abs(s).mean() if np.size(scale) == 3 else np.abs(s))
    w = _dequantised(net, q.astype(dtype), scale, **weight)
    grid, multiples = np.full(4, 1 / 1024), np.rint(b * 1024).astype(np.int32)
    biases = {
        "": lambda: [],
        "float": lambda: [net.constant(b.astype(np.float32))],
        "quantised": lambda: [_dequantised(net, multiples, grid)],
        "quantised by one scale": lambda: [_dequantised(net, multiples, 1 / 1024, axis=None)],
    }
    y = net.node("Conv", x, w, *biases[bias]())
    net.output(y if careless else net.batch_norm(y, 4, epsilon=0.0, statistics=statistics))
    return net.model()


def cases() -> Iterator[Case]:
    one, two = ("Conv", "DequantizeLinear", "Round"), ("Conv", "DequantizeLinear", "DequantizeLinear", "Round")
    for name, left, options in (
        ("per-channel", one, {}),
        ("plain", one, {"bias": ""}),
        ("positive", one, {"signs": False, "lowest": -128}),
        ("without-zero-point", one, {"zero": None}),
        ("per-tensor", one, {"scale": 1 / 64}),
        ("per-tensor-default-axis", one, {"scale": 1 / 64, "axis": None}),
        ("bias", (*two, "Add"), {"bias": "quantised"}),
        ("bias-scale", two, {"bias": "quantised", "shift": False}),
        ("bias-one-scale", two, {"bias": "quantised by one scale", "shift": False}),
    ):
        build = lambda o=options: _conv(**o)  # noqa: E731
        yield Case(f"dequantised-{name}", "dequantize_linear", build, left)


def violations() -> Iterator[Violation]:
    for name, options in (
        ("lowest", {"lowest": -128}),
        ("zero-point", {"zero": 3}),
        ("unsigned", {"dtype": np.uint8}),
        ("computed", {"stored": False}),
        ("along-inputs", {"scale": SCALES[:3], "axis": 1}),
    ):
        wrong = {**options, "careless": True}
        yield Violation(
            f"dequantised-{name}",
            "dequantize_linear",
            "quantised",
            lambda o=options: _conv(**o),
            lambda o=wrong: _conv(**o),
        )
