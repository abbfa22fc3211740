"""Backward into Conv, ConvTranspose, Gemm and MatMul."""

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import onnx

from tests.rules.table import BACKWARD, Case, Violation, around, draw, float64_net
from tests.zoo import Net

# ---- where the rules apply --------------------------------------------------------------------


def _conv(rank: int, groups: int, bias: bool, stride: int, pad: int, dilation: int) -> onnx.ModelProto:
    net = float64_net()
    channels, outputs = 4 * groups, 6 * groups
    x = net.input([2, channels, *[7] * rank])
    y = net.conv(
        x,
        channels,
        outputs,
        *[3] * rank,
        groups=groups,
        bias=bias,
        strides=[stride] * rank,
        pads=[pad] * 2 * rank,
        dilations=[dilation] * rank,
    )
    net.output(net.batch_norm(y, outputs))
    return net.model()


def _depthwise(rank: int) -> onnx.ModelProto:
    net = float64_net()
    x = net.input([2, 5, *[6] * rank])
    y = net.conv(x, 5, 5, *[3] * rank, groups=5, pads=[1] * 2 * rank)
    net.output(net.batch_norm(y, 5))
    return net.model()


def _conv_transpose(rank: int, groups: int, cin: int, per_group: int, bias: bool) -> onnx.ModelProto:
    net = float64_net()
    x = net.input([2, cin, *[4] * rank])
    outputs = groups * per_group
    y = net.conv_transpose(
        x, cin, outputs, *[3] * rank, groups=groups, bias=bias, strides=[2] * rank, pads=[1] * 2 * rank
    )
    net.output(net.batch_norm(y, outputs))
    return net.model()


def _gemm(trans_a: int, trans_b: int, alpha: float, beta: float, c: tuple[int, ...] | None) -> onnx.ModelProto:
    """N = K, so that a fold along the wrong axis would still have the right shape."""
    net = float64_net()
    x = net.input([5, 3] if trans_a else [3, 5])
    operands = [x, net.weight(5, 5)] + ([] if c is None else [net.weight(*c)])
    y = net.node("Gemm", *operands, transA=trans_a, transB=trans_b, alpha=alpha, beta=beta)
    net.output(net.batch_norm(y, 5))
    return net.model()


def _matmul(rank: int, side: str, add: bool) -> onnx.ModelProto:
    """All sizes equal, so that only the position of an axis tells it apart."""
    net = float64_net()
    x = net.input([4] * rank)
    w = net.weight(4, 4)
    y = net.node("MatMul", x, w) if side == "right" else net.node("MatMul", w, x)
    if add:
        y = net.node("Add", y, net.weight(4, *[1] * (rank - 2)))
    net.output(net.batch_norm(y, 4))
    return net.model()


def _no_bias(fold: str) -> onnx.ModelProto:
    """x·W takes s and has no place for t; `fold` "t": a careless folder forgets it."""
    net = float64_net()
    x, w, map_ = net.input([4, 4]), net.rng.normal(size=(4, 4)), draw(net, 4)
    y = net.node("MatMul", x, net.constant(w * map_.s if fold else w))
    net.output(y if fold else map_.norm(net, y))
    return net.model()


def _computed_product(axis: int, softmax: int | None, only: str = "", fold: str = "") -> onnx.ModelProto:
    """A·V behind convolutions, V or A with the channels; `fold`: the map is in the convolution, t and all.

    A is (2, 4, 4), its rows a Softmax along axis `softmax`; the BatchNorm lies along `axis` of what comes out.
    """
    net = float64_net()
    map_, w, b = draw(net, 4, only), net.rng.normal(size=(4, 3, 1)), net.rng.normal(size=4)
    x, z = net.input([2, 3, 4]), net.input([2, 4, 4], "z")
    if fold:
        w, b = w * map_.s[:, None, None], b * map_.s + map_.t
    y = net.node("Conv", x, net.constant(w), net.constant(b))
    if axis == 1:
        y = net.node("MatMul", y, z)
    else:
        a = net.node("Softmax", z, axis=softmax) if softmax is not None else net.node("Relu", z)
        y = net.node("MatMul", a, net.node("Transpose", y, perm=[0, 2, 1]))
        y = net.node("Transpose", y, perm=[0, 2, 1])
    net.output(y if fold else map_.norm(net, y))
    return net.model()


def cases() -> Iterator[Case]:
    for rank, groups, bias, stride, pad, dilation in product(
        (1, 2, 3), (1, 2), (True, False), (1, 2), (0, 1), (1, 2)
    ):
        if rank == 3 and (stride, pad, dilation) not in ((1, 0, 1), (2, 1, 2)):
            continue
        name = f"{rank}d-g{groups}-{'bias' if bias else 'plain'}-s{stride}-p{pad}-d{dilation}"
        arguments = (rank, groups, bias, stride, pad, dilation)
        yield Case(f"conv-{name}", "conv", lambda a=arguments: _conv(*a), ("Conv",))
    for rank in (1, 2, 3):
        yield Case(f"conv-{rank}d-depthwise", "conv", lambda r=rank: _depthwise(r), ("Conv",))
    # Cin = Cout, and g > 1 with Cout/g > 1: where a wrong axis or a wrong order still has the right shape
    for rank, (groups, cin, per_group), bias in product(
        (1, 2, 3), ((1, 4, 4), (1, 3, 5), (2, 4, 2), (2, 6, 3), (4, 4, 1)), (True, False)
    ):
        name = f"{rank}d-g{groups}-{cin}to{groups * per_group}-{'bias' if bias else 'plain'}"
        arguments = (rank, groups, cin, per_group, bias)
        build = lambda a=arguments: _conv_transpose(*a)  # noqa: E731
        yield Case(f"conv_transpose-{name}", "conv_transpose", build, ("ConvTranspose",))
    shapes = (None, (), (5,), (1, 5), (3, 1), (3, 5))
    for trans_a, trans_b, (alpha, beta), c in product((0, 1), (0, 1), ((1.0, 1.0), (0.5, -2.0)), shapes):
        name = f"{trans_a}{trans_b}-alpha{alpha}-beta{beta}-c{'x'.join(map(str, c)) if c else c}"
        arguments = (trans_a, trans_b, alpha, beta, c)
        yield Case(f"linear-{name}", "linear", lambda a=arguments: _gemm(*a), ("Gemm",))
    for rank, side in ((2, "right"), (3, "left")):
        for add in (True, False):
            if rank == 2 and add:
                continue  # a (4, 1) constant there lies along the rows: see the violations
            name = f"matmul-rank{rank}-{side}{'-add' if add else ''}"
            build = lambda a=(rank, side, add): _matmul(*a)  # noqa: E731
            yield Case(name, "matmul", build, ("MatMul", "Add"))
    yield Case(
        "matmul-scale-of-rows", "matmul", lambda: _computed_product(1, None, "scale"), ("Conv", "MatMul")
    )
    beside = ("Conv", "Transpose", "MatMul", "Transpose")
    build = lambda: _computed_product(2, None, "scale")  # noqa: E731
    yield Case("matmul-scale-of-values", "matmul", build, (*beside, "Relu"))
    yield Case("matmul-softmax", "matmul", lambda: _computed_product(2, -1), (*beside, "Softmax"))


# ---- where they must not ----------------------------------------------------------------------


def _transposed(fold_on: str | None) -> onnx.ModelProto:
    """TRAPS 2: x·W, transposed, then BN over what were the rows. K = N hides it by size."""
    net = float64_net()
    x = net.input([4, 4])
    w, (g, b, m, v) = net.rng.normal(size=(4, 4)), net.rng.uniform(0.5, 2, (4, 4))
    s = g / np.sqrt(v + 1e-3)
    if fold_on is None:
        y = net.node("Transpose", net.node("MatMul", x, net.constant(w)), perm=[1, 0])
        statistics = [net.constant(array) for array in (g, b, m, v)]
        net.output(net.batch_norm(y, 4, statistics=statistics))
    else:
        y = net.node("Transpose", net.node("MatMul", x, net.constant(w * s)), perm=[1, 0])
        net.output(net.node("Add", y, net.constant(b - m * s)))
    return net.model()


def _batched_linear(folded: bool) -> onnx.ModelProto:
    """TRAPS 8: Linear on (N, L, C) writes the last axis, BN normalises axis 1; L = C hides it."""
    net = float64_net()
    x = net.input([2, 4, 4])
    w, (g, b, m, v) = net.rng.normal(size=(4, 4)), net.rng.uniform(0.5, 2, (4, 4))
    s = g / np.sqrt(v + 1e-3)
    if folded:
        net.output(net.node("Add", net.node("MatMul", x, net.constant(w * s)), net.constant(b - m * s)))
    else:
        y = net.node("MatMul", x, net.constant(w))
        net.output(net.batch_norm(y, 4, statistics=[net.constant(array) for array in (g, b, m, v)]))
    return net.model()


def _gemm_rows(folded: bool) -> onnx.ModelProto:
    """The constant operand of the Gemm is A: it writes rows, and the channels are columns."""
    net = float64_net()
    w, (g, b, m, v) = net.rng.normal(size=(4, 4)), net.rng.uniform(0.5, 2, (4, 4))
    s = g / np.sqrt(v + 1e-3)
    x = net.input([4, 4])
    if folded:
        y = net.node("Gemm", net.constant(w * s), x)
        net.output(net.node("Add", y, net.constant(b - m * s)))
    else:
        y = net.node("Gemm", net.constant(w), x)
        net.output(net.batch_norm(y, 4, statistics=[net.constant(array) for array in (g, b, m, v)]))
    return net.model()


def _two_readers(make: Callable[[Net, str], str], folded: bool) -> onnx.ModelProto:
    """The absorber's output is read beside the BatchNorm: the other reader would see folded values."""
    net = float64_net()
    x = net.input([2, 4, 3, 3])
    y = make(net, x)
    z = net.batch_norm(y, 4)
    net.output(net.node("Add", z, z if folded else y))
    return net.model()


def _also_put_out(careless: bool = False) -> onnx.ModelProto:
    """What the Conv puts out is an output of the model beside what the BatchNorm makes of it."""
    net = float64_net()
    map_, w = draw(net, 4), [net.weight(4, 4, 1, 1), net.weight(4)]
    y = net.node("Conv", net.input([2, 4, 3, 3]), *w)
    z = map_.norm(net, y)
    net.output(z)
    net.output(net.node("Identity", z) if careless else y)
    return net.model()


def _conv4(net: Net, x: str) -> str:
    return net.conv(x, 4, 4, 1, 1)


def _conv_transpose4(net: Net, x: str) -> str:
    return net.conv_transpose(x, 4, 4, 1, 1, groups=2)


def _rows_become_channels(net: Net, x: str) -> str:
    return str(net.node("Transpose", x, perm=[0, 2, 1, 3]))


def violations() -> Iterator[Violation]:
    read_twice = (("conv", _conv4), ("conv_transpose", _conv_transpose4))
    for kind, make in read_twice:
        yield Violation(
            f"{kind}-read-twice",
            kind,
            "multiple_readers",
            lambda m=make: _two_readers(m, folded=False),
            lambda m=make: _two_readers(m, folded=True),
        )
    put_out = lambda: _also_put_out(careless=True)  # noqa: E731
    yield Violation("conv-put-out", "conv", "graph_output", _also_put_out, put_out)
    square = {"direction": BACKWARD, "shape": (2, 4, 4, 4)}
    yield Violation(
        "conv-rows",
        "conv",
        "axis_mismatch",
        lambda: around(_rows_become_channels, **square),
        lambda: around(_rows_become_channels, swapped=True, **square),
    )
    yield Violation(
        "matmul-transposed", "matmul", "axis_mismatch", lambda: _transposed(None), lambda: _transposed("W")
    )
    yield Violation(
        "matmul-last-axis",
        "matmul",
        "axis_mismatch",
        lambda: _batched_linear(folded=False),
        lambda: _batched_linear(folded=True),
    )
    yield Violation(
        "matmul-no-bias",
        "matmul",
        "no_bias",
        lambda: _no_bias(""),
        lambda: _no_bias("t"),
        left=("MatMul", "Add"),
    )
    for name, softmax in (("softmax-of-columns", 1), ("no-softmax", None)):
        yield Violation(
            f"matmul-{name}",
            "matmul",
            "no_bias",
            lambda each=softmax: _computed_product(2, each, "shift"),
            lambda each=softmax: _computed_product(2, each, "shift", fold="s and t"),
        )
    yield Violation(
        "matmul-shift-of-rows",
        "matmul",
        "no_bias",
        lambda: _computed_product(1, None, "shift"),
        lambda: _computed_product(1, None, "shift", fold="s and t"),
    )
    yield Violation(
        "linear-constant-a",
        "linear",
        "axis_mismatch",
        lambda: _gemm_rows(folded=False),
        lambda: _gemm_rows(folded=True),
    )
