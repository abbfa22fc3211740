"""Forward into Conv, ConvTranspose, Gemm and MatMul: x → BatchNorm → absorber."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import onnx

from tests.rules.table import FORWARD, Array, Case, Violation, draw, float64_net

#: What a careless folder does: "all" of the map goes in, or the scale alone.
ALL, SCALE = "all", "scale"


def _per_input(numbers: Array, weight: Array, groups: int) -> Array:
    """One number per input channel, laid out as a weight [Cout, Cin/g, k…]."""
    group = np.arange(weight.shape[0]) // (weight.shape[0] // groups)
    channel = group[:, None] * weight.shape[1] + np.arange(weight.shape[1])
    return numbers[channel].reshape(*channel.shape, *[1] * (weight.ndim - 2))


def _conv(
    rank: int,
    groups: int = 1,
    cin: int = 4,
    cout: int = 6,
    kernel: int = 3,
    bias: bool = True,
    only: str = "",
    fold: str = "",
    **attributes: Any,
) -> onnx.ModelProto:
    net = float64_net()
    map_ = draw(net, cin, only)
    w, b = net.rng.normal(size=(cout, cin // groups, *[kernel] * rank)), net.rng.normal(size=cout) * bias
    x = net.input([2, cin, *[7] * rank])
    y = x if fold else map_.norm(net, x)
    if fold:
        b = b + (w * _per_input(map_.t, w, groups)).sum(axis=tuple(range(1, w.ndim)))
        w = w * _per_input(map_.s, w, groups)
    constants = [net.constant(w)] + ([net.constant(b)] if bias or fold else [])
    net.output(net.node("Conv", y, *constants, group=groups, **attributes))
    return net.model()


def _conv_transpose(
    rank: int,
    groups: int,
    cin: int,
    per_group: int,
    kernel: int = 3,
    only: str = "",
    fold: str = "",
    **attributes: Any,
) -> onnx.ModelProto:
    """`fold`: every output takes the shift of every tap, as it does in the middle."""
    net = float64_net()
    map_ = draw(net, cin, only)
    w, b = net.rng.normal(size=(cin, per_group, *[kernel] * rank)), net.rng.normal(size=groups * per_group)
    x = net.input([2, cin, *[4] * rank])
    y = x if fold else map_.norm(net, x)
    if fold:
        taps = np.einsum("i,ij...->ij...", map_.t, w).reshape(groups, cin // groups, per_group, -1)
        w, b = w * map_.s.reshape(-1, *[1] * (w.ndim - 1)), b + taps.sum(axis=(1, 3)).reshape(-1)
    y = net.node("ConvTranspose", y, net.constant(w), net.constant(b), group=groups, **attributes)
    net.output(y)
    return net.model()


def _gemm(trans_a: int, trans_b: int, alpha: float, beta: float, c: tuple[int, ...] | None) -> onnx.ModelProto:
    """K = N: a fold along the wrong axis would still have the right shape."""
    net = float64_net()
    y = draw(net, 5).norm(net, net.input([3, 5]))
    y = net.node("Transpose", y, perm=[1, 0]) if trans_a else y
    operands = [y, net.weight(5, 5)] + ([] if c is None else [net.weight(*c)])
    net.output(net.node("Gemm", *operands, transA=trans_a, transB=trans_b, alpha=alpha, beta=beta))
    return net.model()


def _gemm_of_rows(fold: str = "") -> onnx.ModelProto:
    """transA makes the rows of A the contracted axis; the BatchNorm normalises its columns."""
    net = float64_net()
    map_, w = draw(net, 4), net.rng.normal(size=(4, 4))
    x = net.input([4, 4])
    if fold:
        y = net.node("Gemm", x, net.constant(map_.s[:, None] * w), net.constant(map_.t @ w), transA=1)
    else:
        y = net.node("Gemm", map_.norm(net, x), net.constant(w), transA=1)
    net.output(y)
    return net.model()


def _gemm_b(fold: str = "") -> onnx.ModelProto:
    """The BatchNorm's output is B, whose columns are the output's: nothing contracts them."""
    net = float64_net()
    map_, w = draw(net, 4), net.rng.normal(size=(4, 4))
    x = net.input([4, 4])
    if fold:
        y = net.node("Gemm", net.constant(w * map_.s), x)
    else:
        y = net.node("Gemm", net.constant(w), map_.norm(net, x))
    net.output(y)
    return net.model()


def _matmul(rank: int, side: str, only: str = "", add: bool = True, batched: bool = False) -> onnx.ModelProto:
    """All sizes equal; on the right of (…, C) the channels have to come last first."""
    net = float64_net()
    y = draw(net, 4, only).norm(net, net.input([4] * rank))
    if side == "right" and rank > 2:
        y = net.node("Transpose", y, perm=[0, 2, 1])
    w = net.weight(*[4] * (3 if batched else 2))
    y = net.node("MatMul", y, w) if side == "right" else net.node("MatMul", w, y)
    net.output(net.node("Add", y, net.weight(4, 1) if side == "left" else net.weight(4)) if add else y)
    return net.model()


def _matmul_plain(only: str, fold: str = "", batched: bool = False) -> onnx.ModelProto:
    """Nothing behind the product takes its shift; `fold`: it is forgotten, or one does for all batches."""
    net = float64_net()
    map_, w = draw(net, 4, only), net.rng.normal(size=(*[4] * batched, 4, 4))
    x = net.input([4, 4, 4] if batched else [4, 4])
    y = net.node("Transpose", x, perm=[0, 2, 1]) if batched and fold else x
    if fold:
        y = net.node("MatMul", y, net.constant(map_.s[:, None] * w))
        y = net.node("Add", y, net.constant((map_.t @ w)[0] if batched else 0 * map_.t))
    else:
        y = map_.norm(net, y)
        y = net.node("Transpose", y, perm=[0, 2, 1]) if batched else y
        y = net.node("MatMul", y, net.constant(w))
    net.output(y)
    return net.model()


def _rows_of_product(fold: str = "") -> onnx.ModelProto:
    """x·W on (N, L, C), BatchNorm over L = C: W reads the last axis."""
    net = float64_net()
    map_, w = draw(net, 4), net.rng.normal(size=(4, 4))
    x = net.input([2, 4, 4])
    if fold:
        y = net.node("MatMul", x, net.constant(map_.s[:, None] * w))
        net.output(net.node("Add", y, net.constant(map_.t @ w)))
    else:
        net.output(net.node("MatMul", map_.norm(net, x), net.constant(w)))
    return net.model()


def _computed_product(axis: int, softmax: int | None, only: str = "", fold: str = "") -> onnx.ModelProto:
    """A·V, both computed, then a Conv that reads the channels: of V, or those that A alone has.

    `fold`: the Conv takes all of the map, as if what A does to a shift were nothing.
    """
    net = float64_net()
    map_, w, b = draw(net, 4, only), net.rng.normal(size=(3, 4, 1)), net.rng.normal(size=3)
    x, z = net.input([2, 4, 4]), net.input([2, 4, 4], "z")
    y = x if fold else map_.norm(net, x)
    if fold:
        w, b = w * map_.s[None, :, None], b + w[:, :, 0] @ map_.t
    if axis == 1:
        y = net.node("MatMul", y, z)
    else:
        a = net.node("Softmax", z, axis=softmax) if softmax is not None else net.node("Relu", z)
        y = net.node("MatMul", a, net.node("Transpose", y, perm=[0, 2, 1]))
        y = net.node("Transpose", y, perm=[0, 2, 1])
    net.output(net.node("Conv", y, net.constant(w), net.constant(b)))
    return net.model()


def _dropped(fold: str = "") -> onnx.ModelProto:
    """A Dropout that runs in training stands between the Softmax and the product: its rows sum to anything."""
    net = float64_net()
    map_, w, b = draw(net, 4, "shift"), net.rng.normal(size=(3, 4, 1)), net.rng.normal(size=3)
    x, z = net.input([2, 4, 4]), net.input([2, 4, 4], "z")
    y = x if fold else map_.norm(net, x)
    if fold:
        b = b + w[:, :, 0] @ map_.t
    a = net.node("Softmax", z, axis=-1)
    a = net.node("Dropout", a, net.constant(np.float64(0.5)), net.constant(np.bool_(True)), seed=1)
    y = net.node("MatMul", a, net.node("Transpose", y, perm=[0, 2, 1]))
    y = net.node("Conv", net.node("Transpose", y, perm=[0, 2, 1]), net.constant(w), net.constant(b))
    net.output(y)
    return net.model()


def _as_weight(fold: str = "") -> onnx.ModelProto:
    """The BatchNorm's output is the weight of a Conv: s lies on the right axis, t is another shift."""
    net = float64_net()
    map_, x = draw(net, 4), net.input([2, 4, 5, 5])
    w = net.input([3, 4, 2, 2], "w")
    net.output(net.node("Conv", map_.norm(net, x), w) if fold else net.node("Conv", x, map_.norm(net, w)))
    return net.model()


def _rows_into_conv(fold: str = "") -> onnx.ModelProto:
    """Transposed in between: the BatchNorm's channels are the Conv's rows, and as many."""
    net = float64_net()
    map_, w = draw(net, 4), net.weight(3, 4, 1, 1)
    x = net.input([2, 4, 4, 4])
    y = x if fold else map_.norm(net, x)
    y = net.node("Transpose", y, perm=[0, 2, 1, 3])
    net.output(net.node("Conv", map_.norm(net, y) if fold else y, w))
    return net.model()


def cases() -> Iterator[Case]:
    yield from _into_conv()
    for rank, (groups, cin, per_group) in product(
        (1, 2), ((1, 4, 4), (1, 3, 5), (2, 4, 2), (2, 6, 3), (4, 4, 1))
    ):
        name, arguments = f"{rank}d-g{groups}-{cin}to{groups * per_group}", (rank, groups, cin, per_group)
        geometry = {"strides": [2] * rank, "pads": [1] * 2 * rank}
        build = lambda a=arguments, g=geometry: _conv_transpose(*a, only="scale", **g)  # noqa: E731
        yield Case(f"conv_transpose-forward-{name}", "conv_transpose", build, ("ConvTranspose",), FORWARD)
        build = lambda a=arguments: _conv_transpose(*a, kernel=1)  # noqa: E731
        yield Case(f"conv_transpose-forward-{name}-1x1", "conv_transpose", build, ("ConvTranspose",), FORWARD)
    shapes = (None, (), (5,), (1, 5), (3, 1), (3, 5))
    for trans_a, trans_b, (alpha, beta), c in product((0, 1), (0, 1), ((1.0, 1.0), (0.5, -2.0)), shapes):
        name = f"{trans_a}{trans_b}-alpha{alpha}-beta{beta}-c{'x'.join(map(str, c)) if c else c}"
        arguments = (trans_a, trans_b, alpha, beta, c)
        left = ("Gemm", *["Transpose"] * trans_a)
        yield Case(f"linear-forward-{name}", "linear", lambda a=arguments: _gemm(*a), left, FORWARD)
    for rank, side in ((2, "right"), (3, "right"), (3, "left")):
        moved = ("Transpose",) if side == "right" and rank > 2 else ()
        build = lambda a=(rank, side): _matmul(*a)  # noqa: E731
        yield Case(f"matmul-forward-rank{rank}-{side}", "matmul", build, ("MatMul", "Add", *moved), FORWARD)
        build = lambda a=(rank, side): _matmul(*a, only="scale", add=False)  # noqa: E731
        yield Case(f"matmul-forward-rank{rank}-{side}-scale", "matmul", build, ("MatMul", *moved), FORWARD)
    build = lambda: _matmul(3, "left", only="scale", add=False, batched=True)  # noqa: E731
    yield Case("matmul-forward-batches-of-weights", "matmul", build, ("MatMul",), FORWARD)
    build = lambda: _computed_product(1, None, "scale")  # noqa: E731
    yield Case("matmul-forward-scale-of-rows", "matmul", build, ("MatMul", "Conv"), FORWARD)
    beside = ("Conv", "Transpose", "MatMul", "Transpose")
    build = lambda: _computed_product(2, None, "scale")  # noqa: E731
    yield Case("matmul-forward-scale-of-values", "matmul", build, (*beside, "Relu"), FORWARD)
    yield Case(
        "matmul-forward-softmax", "matmul", lambda: _computed_product(2, -1), (*beside, "Softmax"), FORWARD
    )


def _into_conv() -> Iterator[Case]:
    """Shifts where nothing is padded; scales under any padding."""
    widths = ((1, 4, 6), (1, 4, 4), (2, 4, 6), (2, 4, 4), (4, 4, 4), (4, 4, 8))
    for rank, (groups, cin, cout), bias in product((1, 2, 3), widths, (True, False)):
        if rank == 3 and groups != 2:
            continue
        name = f"conv-forward-{rank}d-g{groups}-{cin}to{cout}-{'bias' if bias else 'plain'}"
        arguments = (rank, groups, cin, cout, 3, bias)
        yield Case(name, "conv", lambda a=arguments: _conv(*a), ("Conv",), FORWARD)
    geometries: dict[str, dict[str, Any]] = {
        "1x1": {"kernel": 1},
        "strided": {"strides": [2, 3]},
        "dilated": {"dilations": [2, 1]},
        "valid": {"auto_pad": "VALID"},
        "padded-scale": {"only": "scale", "pads": [1, 0, 2, 1]},
        "same-upper-scale": {"only": "scale", "auto_pad": "SAME_UPPER"},
        "same-lower-scale": {"only": "scale", "auto_pad": "SAME_LOWER", "strides": [2, 2]},
    }
    for name, geometry in geometries.items():
        build = lambda g=geometry: _conv(2, 2, **g)  # noqa: E731
        yield Case(f"conv-forward-{name}", "conv", build, ("Conv",), FORWARD)
    borders: dict[str, dict[str, Any]] = {
        "padded": {"pads": [1, 0, 2, 1], "strides": [2, 1]},
        "dilated": {"pads": [3, 2, 3, 2], "dilations": [3, 2], "bias": False},
        "same": {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        "shift": {"pads": [1, 1, 1, 1], "only": "shift"},
    }
    for name, geometry in borders.items():
        build = lambda g=geometry: _conv(2, 2, **g)  # noqa: E731
        asked = {"border_maps": True}
        yield Case(f"conv-border-map-{name}", "conv", build, ("Conv", "Add"), FORWARD, options=asked)


def violations() -> Iterator[Violation]:
    paddings: dict[str, dict[str, Any]] = {
        "padded": {"pads": [1, 1, 1, 1]},
        "padded-behind": {"pads": [0, 0, 0, 1]},
        "same-upper": {"auto_pad": "SAME_UPPER"},
        "same-lower": {"auto_pad": "SAME_LOWER"},
    }
    for name, padding in paddings.items():
        for only, left in (("", ("Add", "Conv")), ("shift", ())):
            yield Violation(
                f"conv-forward-{name}{'-shift' if only else ''}",
                "conv",
                "padded_shift",
                lambda p=padding, o=only: _conv(2, 2, only=o, **p),
                lambda p=padding, o=only: _conv(2, 2, only=o, fold=ALL, **p),
                FORWARD,
                left,
            )
    transposed: dict[str, dict[str, Any]] = {
        "3x3": {},
        "strided": {"kernel": 1, "strides": [2, 2]},
        "output-padding": {"kernel": 1, "strides": [2, 2], "output_padding": [1, 1]},
    }
    for name, geometry in transposed.items():
        for only, left in (("", ("Add", "ConvTranspose")), ("shift", ())):
            yield Violation(
                f"conv_transpose-forward-{name}{'-shift' if only else ''}",
                "conv_transpose",
                "padded_shift",
                lambda g=geometry, o=only: _conv_transpose(2, 2, 4, 2, only=o, **g),
                lambda g=geometry, o=only: _conv_transpose(2, 2, 4, 2, only=o, fold=ALL, **g),
                FORWARD,
                left,
            )
    pairs = (
        ("conv-forward-weight", "conv", "dynamic_weight", _as_weight),
        ("conv-forward-rows", "conv", "axis_mismatch", _rows_into_conv),
        ("linear-forward-rows", "linear", "axis_mismatch", _gemm_of_rows),
        ("linear-forward-b", "linear", "dynamic_weight", _gemm_b),
        ("matmul-forward-rows", "matmul", "no_bias", _rows_of_product),
        ("matmul-forward-dropout", "matmul", "no_bias", _dropped),
    )
    for name, kind, reason, build in pairs:
        yield Violation(name, kind, reason, build, lambda b=build: b(ALL), FORWARD)
    for name, softmax in (("softmax-of-columns", 1), ("no-softmax", None)):
        yield Violation(
            f"matmul-forward-{name}",
            "matmul",
            "no_bias",
            lambda each=softmax: _computed_product(2, each, "shift"),
            lambda each=softmax: _computed_product(2, each, "shift", fold=ALL),
            FORWARD,
        )
    yield Violation(
        "matmul-forward-shift-of-rows",
        "matmul",
        "no_bias",
        lambda: _computed_product(1, None, "shift"),
        lambda: _computed_product(1, None, "shift", fold=ALL),
        FORWARD,
    )
    yield Violation(
        "matmul-forward-no-bias",
        "matmul",
        "graph_output",
        lambda: _matmul_plain("shift"),
        lambda: _matmul_plain("shift", fold=SCALE),
        FORWARD,
    )
    yield Violation(
        "matmul-forward-shift-per-batch",
        "matmul",
        "axis_mismatch",
        lambda: _matmul_plain("shift", batched=True),
        lambda: _matmul_plain("shift", fold=ALL, batched=True),
        FORWARD,
    )
