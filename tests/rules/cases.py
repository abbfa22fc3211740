"""The test table of the rules: where each applies, and where it must not.

A `Case` is a model whose every norm folds exactly. A `Violation` is a model in which a condition of the rule
does not hold, beside the model that a folder would make which did not look: the two must differ.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import onnx

from tests.zoo import Net


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    build: Callable[[], onnx.ModelProto]
    #: op types that must be left, in any order
    left: tuple[str, ...]


@dataclass(frozen=True)
class Violation:
    name: str
    kind: str
    reason: str
    build: Callable[[], onnx.ModelProto]
    wrong: Callable[[], onnx.ModelProto]


def _net(seed: int = 0) -> Net:
    return Net(opset=17, seed=seed, dtype=np.float64)


# ---- where the rules apply --------------------------------------------------------------------


def _conv(rank: int, groups: int, bias: bool, stride: int, pad: int, dilation: int) -> onnx.ModelProto:
    net = _net()
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
    net = _net()
    x = net.input([2, 5, *[6] * rank])
    y = net.conv(x, 5, 5, *[3] * rank, groups=5, pads=[1] * 2 * rank)
    net.output(net.batch_norm(y, 5))
    return net.model()


def _conv_transpose(rank: int, groups: int, cin: int, per_group: int, bias: bool) -> onnx.ModelProto:
    net = _net()
    x = net.input([2, cin, *[4] * rank])
    outputs = groups * per_group
    y = net.conv_transpose(
        x, cin, outputs, *[3] * rank, groups=groups, bias=bias, strides=[2] * rank, pads=[1] * 2 * rank
    )
    net.output(net.batch_norm(y, outputs))
    return net.model()


def _gemm(trans_a: int, trans_b: int, alpha: float, beta: float, c: tuple[int, ...] | None) -> onnx.ModelProto:
    """N = K, so that a fold along the wrong axis would still have the right shape."""
    net = _net()
    x = net.input([5, 3] if trans_a else [3, 5])
    operands = [x, net.weight(5, 5)] + ([] if c is None else [net.weight(*c)])
    y = net.node("Gemm", *operands, transA=trans_a, transB=trans_b, alpha=alpha, beta=beta)
    net.output(net.batch_norm(y, 5))
    return net.model()


def _matmul(rank: int, side: str, add: bool) -> onnx.ModelProto:
    """All sizes equal, so that only the position of an axis tells it apart."""
    net = _net()
    x = net.input([4] * rank)
    w = net.weight(4, 4)
    y = net.node("MatMul", x, w) if side == "right" else net.node("MatMul", w, x)
    if add:
        y = net.node("Add", y, net.weight(4, *[1] * (rank - 2)))
    net.output(net.batch_norm(y, 4))
    return net.model()


def _chain(before: str, after: str) -> onnx.ModelProto:
    """Conv, constant ops, BatchNorm, constant ops; every constant per channel or a scalar."""
    net = _net()
    y = net.conv(net.input([2, 3, 5, 5]), 3, 4, 1, 1)
    for op in before.split():
        y = _constant_op(net, y, op)
    y = net.batch_norm(y, 4)
    for op in after.split():
        y = _constant_op(net, y, op)
    net.output(y)
    return net.model()


def _constant_op(net: Net, y: str, op: str) -> str:
    """`Add`, `Sub`, `rSub` (constant − y), `sMul` (a scalar), …; BN is one more BatchNorm."""
    if op == "BN":
        return net.batch_norm(y, 4)
    shape = () if op.startswith("s") else (4, 1, 1)
    constant = net.constant(net.rng.uniform(0.5, 2, shape) * np.where(net.rng.random(shape) < 0.5, -1, 1))
    name = op.removeprefix("s").removeprefix("r")
    return str(net.node(name, *((constant, y) if op.startswith("r") else (y, constant))))


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
            name = f"matmul-rank{rank}-{side}{'-add' if add else ''}"
            if rank == 2 and add:
                continue  # a (4, 1) constant there lies along the rows: see the violations
            build = lambda a=(rank, side, add): _matmul(*a)  # noqa: E731
            yield Case(name, "matmul", build, ("MatMul", "Add"))
    for op in ("Add", "Sub", "rSub", "Mul", "Div", "sAdd", "sMul", "sDiv"):
        kind = op.lstrip("rs").lower()
        yield Case(f"{op}-before", kind, lambda o=op: _chain(o, ""), ("Conv",))
        yield Case(f"{op}-after", kind, lambda o=op: _chain("", o), ("Conv",))
    yield Case("bn-bn", "batch_norm", lambda: _chain("BN", ""), ("Conv",))
    yield Case("long", "batch_norm", lambda: _chain("Mul Add BN rSub", "Div sMul BN Add"), ("Conv",))


# ---- where they must not ----------------------------------------------------------------------


def _transposed(fold_on: str | None) -> onnx.ModelProto:
    """TRAPS 2: x·W, transposed, then BN over what were the rows. K = N hides it by size."""
    net = _net()
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
    net = _net()
    x = net.input([2, 4, 4])
    w, (g, b, m, v) = net.rng.normal(size=(4, 4)), net.rng.uniform(0.5, 2, (4, 4))
    s = g / np.sqrt(v + 1e-3)
    if folded:
        net.output(net.node("Add", net.node("MatMul", x, net.constant(w * s)), net.constant(b - m * s)))
    else:
        y = net.node("MatMul", x, net.constant(w))
        net.output(net.batch_norm(y, 4, statistics=[net.constant(array) for array in (g, b, m, v)]))
    return net.model()


def _along_w(op: str, folded: bool) -> onnx.ModelProto:
    """TRAPS 13: a (W,) constant is one value per column, though W = C."""
    net = _net()
    x = net.input([2, 4, 4, 4])
    w, c = net.rng.normal(size=(4, 4, 1, 1)), net.rng.uniform(0.5, 2, 4)
    statistics = [net.constant(array) for array in net.rng.uniform(0.5, 2, (4, 4))]
    y = net.node("Conv", x, net.constant(w))
    constant = net.constant(c.reshape(4, 1, 1) if folded else c)
    net.output(net.batch_norm(net.node(op, y, constant), 4, statistics=statistics))
    return net.model()


def _gemm_rows(folded: bool) -> onnx.ModelProto:
    """The constant operand of the Gemm is A: it writes rows, and the channels are columns."""
    net = _net()
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
    net = _net()
    x = net.input([2, 4, 3, 3])
    y = make(net, x)
    z = net.batch_norm(y, 4)
    net.output(net.node("Add", z, z if folded else y))
    return net.model()


def _spatial_bn(folded: bool) -> onnx.ModelProto:
    """BatchNorm in training mode behind a BatchNorm in inference: only the second is an affine map."""
    net = _net()
    y = net.conv(net.input([2, 3, 5, 5]), 3, 4, 1, 1)
    statistics = net.statistics(4)
    if folded:
        y = net.batch_norm(y, 4, statistics=statistics)
    else:
        y, *_ = net.node("BatchNormalization", y, *statistics, outputs=3, epsilon=1e-3, training_mode=1)
    net.output(net.batch_norm(y, 4))
    return net.model()


def _conv4(net: Net, x: str) -> str:
    return net.conv(x, 4, 4, 1, 1)


def _conv_transpose4(net: Net, x: str) -> str:
    return net.conv_transpose(x, 4, 4, 1, 1, groups=2)


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
    yield Violation(
        "matmul-transposed", "matmul", "unsupported_op", lambda: _transposed(None), lambda: _transposed("W")
    )
    yield Violation(
        "matmul-last-axis",
        "matmul",
        "axis_mismatch",
        lambda: _batched_linear(folded=False),
        lambda: _batched_linear(folded=True),
    )
    yield Violation(
        "linear-constant-a",
        "linear",
        "axis_mismatch",
        lambda: _gemm_rows(folded=False),
        lambda: _gemm_rows(folded=True),
    )
    for op in ("Add", "Sub", "Mul", "Div"):
        yield Violation(
            f"{op}-along-w",
            op.lower(),
            "axis_mismatch",
            lambda o=op: _along_w(o, folded=False),
            lambda o=op: _along_w(o, folded=True),
        )
    yield Violation(
        "bn-training-before",
        "batch_norm",
        "training_mode",
        lambda: _spatial_bn(folded=False),
        lambda: _spatial_bn(folded=True),
    )
