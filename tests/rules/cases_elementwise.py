"""Add, Sub, Sum, Mul, Div, Neg and BatchNorm, with a constant beside the data or with two computed terms."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx

from tests.rules.table import BACKWARD, FORWARD, Case, Violation, around, draw, float64_net, stops
from tests.zoo import Net

#: Constant ops; `s` before one: the constant is a scalar; `r`: the constant comes first.
CONSTANT_OPS = ("Add", "Sub", "rSub", "Mul", "Div", "sAdd", "sSub", "srSub", "sMul", "sDiv")


# ---- beside constants -------------------------------------------------------------------------


def _constant_op(net: Net, y: str, op: str) -> str:
    """`Add`, `Sub`, `rSub` (constant − y), `sMul` (a scalar), …; BN is one more BatchNorm."""
    if op == "BN":
        return net.batch_norm(y, 4)
    if op == "Neg":
        return str(net.node("Neg", y))
    shape = () if op.startswith("s") else (4, 1, 1)
    constant = net.constant(net.rng.uniform(0.5, 2, shape) * np.where(net.rng.random(shape) < 0.5, -1, 1))
    name = op.removeprefix("s").removeprefix("r")
    operands = (constant, y) if op.removeprefix("s").startswith("r") else (y, constant)
    return str(net.node(name, *operands))


def _chain(before: str, after: str) -> onnx.ModelProto:
    """Conv, constant ops, BatchNorm, constant ops; every constant per channel or a scalar."""
    net = float64_net()
    y = net.conv(net.input([2, 3, 5, 5]), 3, 4, 1, 1)
    for op in before.split():
        y = _constant_op(net, y, op)
    y = net.batch_norm(y, 4)
    for op in after.split():
        y = _constant_op(net, y, op)
    net.output(y)
    return net.model()


def _chain_forward(ops: str) -> onnx.ModelProto:
    """BatchNorm, constant ops, Conv."""
    net = float64_net()
    y = net.batch_norm(net.input([2, 4, 5, 5]), 4)
    for op in ops.split():
        y = _constant_op(net, y, op)
    net.output(net.conv(y, 4, 3, 2, 2))
    return net.model()


def _with(op: str, *shape: int, first: bool = False) -> Any:
    """A layer: `op` with a constant of this shape."""

    def layer(net: Net, y: str) -> str:
        constant = net.constant(net.rng.uniform(0.5, 2, shape))
        return str(net.node(op, *((constant, y) if first else (y, constant))))

    return layer


def _gray(op: str, swapped: bool = False) -> onnx.ModelProto:
    """One channel normalised, then spread over three by a constant per channel, as a gray image is."""
    net = float64_net()
    map_, three = draw(net, 1), net.constant(net.rng.uniform(0.5, 2, (3, 1, 1)))
    x, w = net.input([2, 1, 5, 5]), net.weight(4, 3, 2, 2)
    y = net.node(op, x, three) if swapped else net.node(op, map_.norm(net, x), three)
    if swapped:
        y = net.node("Mul", y, net.constant(map_.s.reshape(1, 1, 1)))
    net.output(net.node("Conv", y, w))
    return net.model()


def _of_lower_rank(wrong: bool = False) -> onnx.ModelProto:
    """(N, C) + (3, 1, C) is (3, N, C): axis 1 of the data is axis 2 of the sum."""
    net = float64_net()
    map_, c, w = draw(net, 4, "shift"), net.rng.normal(size=(3, 1, 4)), net.weight(4, 5)
    x = net.input([4, 4])
    if wrong:
        y = net.node("Add", x, net.constant(c + map_.t[:, None]))
    else:
        y = net.node("Add", map_.norm(net, x), net.constant(c))
    net.output(net.node("Relu", net.node("MatMul", y, w)))
    return net.model()


# ---- computed terms ---------------------------------------------------------------------------


def _terms(op: str, count: int, forward: bool) -> onnx.ModelProto:
    """A residual sum: of convolutions, with a BatchNorm behind; or of a BatchNorm and convolutions."""
    net = float64_net()
    inputs = [net.input([2, 4, 5, 5], f"x{i}") for i in range(count)]
    if forward:
        first, *others = inputs
        terms = [net.batch_norm(first, 4), *(net.conv(x, 4, 4, 3, 3, pads=[1] * 4) for x in others)]
        net.output(net.conv(net.node(op, *reversed(terms)), 4, 3, 2, 2))
    else:
        terms = [net.conv(x, 4, 4, 1, 1) for x in inputs]
        net.output(net.batch_norm(net.node(op, *terms), 4))
    return net.model()


def _shift_to_the_second() -> onnx.ModelProto:
    """a − b where only b has a place for the shift, which comes there with the other sign."""
    net = float64_net()
    a = net.node("MatMul", net.weight(4, 4), net.input([2, 4, 4], "a"))
    b = net.conv(net.input([2, 4, 4], "b"), 4, 4, 1)
    net.output(net.batch_norm(net.node("Sub", a, b), 4))
    return net.model()


def _two_norms(op: str) -> onnx.ModelProto:
    """BN(x) ± BN(z) read by a Conv: one goes forward, the other takes in what that asks of it and stays."""
    net = float64_net()
    x, z = (net.batch_norm(net.input([2, 4, 5, 5], name), 4) for name in "xz")
    net.output(net.conv(net.node(op, x, z), 4, 3, 2, 2))
    return net.model()


def _same_scale(op: str) -> onnx.ModelProto:
    """Both terms come from one BatchNorm, by two ways."""
    net = float64_net()
    y = net.batch_norm(net.input([2, 4, 5, 5]), 4)
    a, b = net.node("AveragePool", y, kernel_shape=[2, 2]), net.node("Slice", y, *_from_one(net))
    net.output(net.conv(net.node(op, a, b), 4, 3, 2, 2))
    return net.model()


def _from_one(net: Net) -> list[str]:
    return [net.constant(np.array(each)) for each in ([1, 1], [5, 5], [2, 3])]


def _norm_stays(after: str) -> onnx.ModelProto:
    """The first BatchNorm reads the input of the model; the second goes into it."""
    net = float64_net()
    y = net.batch_norm(net.input([2, 4, 5, 5]), 4)
    y = _constant_op(net, y, after)
    net.output(net.node("Relu", y))
    return net.model()


def _two_norms_behind() -> onnx.ModelProto:
    """One BatchNorm in front of two others, each of which stands before a Relu."""
    net = float64_net()
    y = net.batch_norm(net.input([2, 4, 5, 5]), 4)
    for _ in range(2):
        net.output(net.node("Relu", net.batch_norm(y, 4)))
    return net.model()


def _product(op: str, slot: int, direction: str, only: str = "scale", swapped: bool = False) -> onnx.ModelProto:
    """A BatchNorm before or after a product with another computed tensor; `swapped`: on its other side."""
    net = float64_net()
    map_, w = draw(net, 4, only), [net.weight(4, 4, 1, 1), net.weight(4)]
    x, z = net.input([2, 4, 5, 5]), net.node("Exp", net.input([2, 4, 5, 5], "z"))
    forward = direction == FORWARD
    y = x if forward else net.node("Conv", x, *w)
    y = map_.norm(net, y) if forward != swapped else y
    y = net.node(op, *((y, z) if slot == 0 else (z, y)))
    y = y if forward != swapped else map_.norm(net, y)
    net.output(net.node("Conv", y, *w) if forward else y)
    return net.model()


def _gated(direction: str) -> onnx.ModelProto:
    """Every channel times a number of its own that the model computes, (N, C, 1, 1)."""
    net = float64_net()
    map_, w = draw(net, 4, "scale"), [net.weight(4, 4, 1, 1), net.weight(4)]
    gate = net.node("Sigmoid", net.input([2, 4, 1, 1], "gate"))
    y = net.input([2, 4, 5, 5])
    y = map_.norm(net, y) if direction == FORWARD else net.node("Conv", y, *w)
    y = net.node("Mul", gate, y)
    net.output(net.node("Conv", y, *w) if direction == FORWARD else map_.norm(net, y))
    return net.model()


def _squared(folded: bool = False) -> onnx.ModelProto:
    """x·x behind a Conv: s cannot go into one factor alone."""
    net = float64_net()
    map_, w = draw(net, 4, "scale"), [net.weight(4, 3, 1, 1), net.weight(4)]
    y = net.node("Conv", net.input([2, 3, 5, 5]), *w)
    y = map_.norm(net, y) if folded else y
    y = net.node("Mul", y, y)
    net.output(y if folded else map_.norm(net, y))
    return net.model()


def _squared_forward(folded: bool = False) -> onnx.ModelProto:
    net = float64_net()
    map_, w = draw(net, 4, "scale"), net.weight(3, 4, 1, 1)
    y = net.input([2, 4, 5, 5])
    y = y if folded else map_.norm(net, y)
    y = net.node("Mul", y, y)
    net.output(net.node("Conv", map_.norm(net, y) if folded else y, w))
    return net.model()


def _other_term(
    op: str, other: str, forward: bool, careless: bool = False, shape: tuple[int, ...] = (2, 4, 5, 5)
) -> onnx.ModelProto:
    """Conv(x) ± z with BatchNorm behind, or BatchNorm(x) ± z read by a Conv; z has no place for s.

    `other` is what z is: an "input", or a "conv" with the channels of `shape`. `careless`: x's term moves.
    """
    net = float64_net()
    map_, w = draw(net, 4), [net.weight(4, 4, 1, 1), net.weight(4)]
    v = [net.weight(shape[1], 3, 1, 1), net.weight(shape[1])]
    x = net.input([2, 4, 5, 5])
    z = net.input([shape[0], 3, *shape[2:]] if other == "conv" else shape, "z")
    z = net.node("Conv", z, *v) if other == "conv" else z
    y = x if forward else net.node("Conv", x, *w)
    y = map_.norm(net, y) if forward != careless else y
    y = net.node(op, y, z)
    y = y if forward != careless else map_.norm(net, y)
    net.output(net.node("Conv", y, *w) if forward else y)
    return net.model()


def cases() -> Iterator[Case]:
    for op in CONSTANT_OPS:
        kind = op.lstrip("rs").lower()
        yield Case(f"{op}-before", kind, lambda o=op: _chain(o, ""), ("Conv",))
        yield Case(f"{op}-after", kind, lambda o=op: _chain("", o), ("Conv",))
        yield Case(f"{op}-forward", kind, lambda o=op: _chain_forward(o), ("Conv",), FORWARD)
    yield Case("neg-before", "neg", lambda: _chain("Neg", ""), ("Conv",))
    yield Case("neg-forward", "neg", lambda: _chain_forward("Neg"), ("Conv", "Neg"), FORWARD)
    yield Case("bn-bn", "batch_norm", lambda: _chain("BN", ""), ("Conv",))
    yield Case("bn-bn-forward", "batch_norm", lambda: _chain_forward("BN BN"), ("Conv",), FORWARD)
    yield Case("long", "batch_norm", lambda: _chain("Mul Add BN rSub Neg", "Div sMul BN Add"), ("Conv",))
    long = "Mul Add Neg BN rSub Div sMul BN Add"
    yield Case("long-forward", "batch_norm", lambda: _chain_forward(long), ("Conv",), FORWARD)
    stays = ("BatchNormalization", "Relu")
    yield Case("bn-stays", "batch_norm", lambda: _norm_stays("BN"), stays, kept=1)
    two = (*stays, *stays)
    yield Case("bn-into-two-norms", "batch_norm", _two_norms_behind, two, FORWARD, kept=2)
    for op in ("Mul", "Add", "rSub"):
        yield Case(f"{op}-into-bn", "batch_norm", lambda o=op: _norm_stays(o), stays, kept=1)
    for op, kind in (("Add", "add"), ("Sub", "sub")):
        # a constant of every position: s·(x + c) + t = s·x + (s·c + t)
        for first in (False, True):
            layer, name = _with(op, 1, 5, 5, first=first), f"{op}{'-first' if first else ''}-of-every-position"
            options = {"shape": (2, 4, 5, 5)}
            yield Case(name, kind, lambda y=layer, o=options: around(y, BACKWARD, **o), ("Conv", op))
            for only in ("", "shift", "scale"):
                build = lambda y=layer, n=only, o=options: around(y, FORWARD, only=n, **o)  # noqa: E731
                yield Case(f"{name}-forward{only}", kind, build, ("Conv", op), FORWARD)
        yield Case(f"{op}-terms", kind, lambda o=op: _terms(o, 2, forward=False), ("Conv", "Conv", op))
        build = lambda o=op: _terms(o, 2, forward=True)  # noqa: E731
        yield Case(f"{op}-terms-forward", kind, build, ("Conv", "Conv", op), FORWARD)
        left = ("BatchNormalization", "Conv", op)
        yield Case(f"{op}-of-norms", kind, lambda o=op: _two_norms(o), left, FORWARD, kept=1)
        left = ("AveragePool", "Conv", "Slice", op)
        yield Case(f"{op}-of-one-scale", kind, lambda o=op: _same_scale(o), left, FORWARD)
    yield Case("Sub-shift-to-the-second", "sub", _shift_to_the_second, ("Conv", "MatMul", "Sub"))
    three = ("Conv", "Conv", "Conv", "Sum")
    yield Case("Sum-terms", "sum", lambda: _terms("Sum", 3, forward=False), three)
    yield Case("Sum-terms-forward", "sum", lambda: _terms("Sum", 3, forward=True), three, FORWARD)
    for direction in (BACKWARD, FORWARD):
        gated = lambda d=direction: _gated(d)  # noqa: E731
        yield Case(f"Mul-gated-{direction}", "mul", gated, ("Conv", "Mul", "Sigmoid"), direction)
    for op, slots in (("Mul", (0, 1)), ("Div", (0,))):
        for slot in slots:
            for direction in (BACKWARD, FORWARD):
                build = lambda a=(op, slot, direction): _product(*a)  # noqa: E731
                left = ("Conv", "Exp", op)
                yield Case(f"{op}-computed-{slot}-{direction}", op.lower(), build, left, direction)


# ---- where they must not ----------------------------------------------------------------------


def _along_w(op: str, folded: bool) -> onnx.ModelProto:
    """TRAPS 13: a (W,) constant is one value per column, though W = C."""
    net = float64_net()
    x = net.input([2, 4, 4, 4])
    w, c = net.rng.normal(size=(4, 4, 1, 1)), net.rng.uniform(0.5, 2, 4)
    statistics = [net.constant(array) for array in net.rng.uniform(0.5, 2, (4, 4))]
    y = net.node("Conv", x, net.constant(w))
    constant = net.constant(c.reshape(4, 1, 1) if folded else c)
    net.output(net.batch_norm(net.node(op, y, constant), 4, statistics=statistics))
    return net.model()


def _training(second: bool, careless: bool = False) -> onnx.ModelProto:
    """Two BatchNorms, one of them in training mode: only the other one is an affine map."""
    net = float64_net()
    y = net.input([2, 4, 5, 5])
    y = y if second else net.conv(y, 4, 4, 1, 1)
    for i, statistics in enumerate((net.statistics(4), net.statistics(4))):
        if careless or bool(i) != second:
            y = net.batch_norm(y, 4, statistics=statistics)
        else:
            y, *_ = net.node("BatchNormalization", y, *statistics, outputs=3, epsilon=1e-3, training_mode=1)
    net.output(net.conv(y, 4, 4, 1, 1) if second else y)
    return net.model()


def _read_twice(op: str, careless: bool = False) -> onnx.ModelProto:
    """What Neg puts out is read beside the BatchNorm, too."""
    net = float64_net()
    map_, w = draw(net, 4), net.weight(4, 4, 1, 1)
    y = net.node(op, net.node("Conv", net.input([2, 4, 5, 5]), w))
    z = map_.norm(net, y)
    net.output(net.node("Add", z, z if careless else y))
    return net.model()


def _also_put_out(op: str, careless: bool = False) -> onnx.ModelProto:
    """What comes out of BatchNorm and `op` is an output of the model beside what the Conv makes of it."""
    net = float64_net()
    map_, w = draw(net, 4), net.weight(3, 4, 1, 1)
    x = net.input([2, 4, 5, 5])
    y = net.node(op, map_.norm(net, x))
    net.output(net.node("Identity", net.node(op, x)) if careless else y)
    net.output(net.node("Conv", y, w))
    return net.model()


def violations() -> Iterator[Violation]:
    for op in ("Mul", "Div"):
        yield Violation(
            f"{op}-along-w",
            op.lower(),
            "axis_mismatch",
            lambda o=op: _along_w(o, folded=False),
            lambda o=op: _along_w(o, folded=True),
        )
        per_position = {"shape": (2, 4, 5, 5)}
        yield from stops(f"{op}-per-position", op.lower(), "axis_mismatch", _with(op, 1, 5, 5), **per_position)
    yield from stops("Div-of-a-constant", "div", "nonlinear", _with("Div", 4, 1, 1, first=True))
    for op in ("Add", "Sub"):
        # the constant stays, and has to take s: whoever leaves it as it is, is wrong
        yield Violation(
            f"{op}-constant-unscaled",
            op.lower(),
            "",
            lambda o=op: around(_with(o, 1, 5, 5), BACKWARD, shape=(2, 4, 5, 5)),
            lambda o=op: around(_with(o, 1, 5, 5), BACKWARD, swapped=True, shape=(2, 4, 5, 5)),
            left=("Conv", op),
        )
    # a constant that is added may stay and take its part; one that multiplies would have to go
    for op, reason, left in (("Add", "", ("Add", "Conv")), ("Mul", "axis_mismatch", ())):
        yield Violation(
            f"{op}-spreads-the-data",
            op.lower(),
            reason,
            lambda o=op: _gray(o),
            lambda o=op: _gray(o, swapped=True),
            FORWARD,
            left,
        )
    wrong_axis = lambda: _of_lower_rank(wrong=True)  # noqa: E731
    left = ("Add", "MatMul", "Relu")
    yield Violation("Add-of-lower-rank", "add", "", _of_lower_rank, wrong_axis, FORWARD, left)
    for op, kind in (("Add", "add"), ("Sub", "sub"), ("Sum", "sum")):
        for forward in (False, True):
            direction = FORWARD if forward else BACKWARD
            for name, reason, other, shape in (
                ("input", "no_producer", "input", (2, 4, 5, 5)),
                ("spread", "axis_mismatch", "conv", (2, 1, 5, 5)),
            ):
                arguments = (op, other, forward)
                yield Violation(
                    f"{op}-beside-{name}-{direction}",
                    kind,
                    reason,
                    lambda a=arguments, s=shape: _other_term(*a, shape=s),
                    lambda a=arguments, s=shape: _other_term(*a, careless=True, shape=s),
                    direction,
                )
    for op, slot in (("Mul", 0), ("Mul", 1), ("Div", 0)):
        for direction in (BACKWARD, FORWARD):
            arguments = (op, slot, direction, "shift")
            yield Violation(
                f"{op}-shift-{slot}-{direction}",
                op.lower(),
                "unsupported_op",
                lambda a=arguments: _product(*a),
                lambda a=arguments: _product(*a, swapped=True),
                direction,
            )
    for direction in (BACKWARD, FORWARD):
        yield Violation(
            f"Div-by-it-{direction}",
            "div",
            "unsupported_op" if direction == FORWARD else "no_producer",
            lambda d=direction: _product("Div", 1, d) if d == FORWARD else _divided(),
            lambda d=direction: (
                _product("Div", 1, d, swapped=True) if d == FORWARD else _divided(careless=True)
            ),
            direction,
        )
    yield Violation("Mul-squared", "mul", "multiple_readers", _squared, lambda: _squared(folded=True))
    yield Violation(
        "Mul-squared-forward",
        "mul",
        "nonlinear",
        _squared_forward,
        lambda: _squared_forward(folded=True),
        FORWARD,
    )
    for second, direction in ((False, BACKWARD), (True, FORWARD)):
        yield Violation(
            f"bn-training-{direction}",
            "batch_norm",
            "training_mode",
            lambda s=second: _training(s),
            lambda s=second: _training(s, careless=True),
            direction,
        )
    twice = lambda: _read_twice("Neg", careless=True)  # noqa: E731
    yield Violation("neg-read-twice", "neg", "multiple_readers", lambda: _read_twice("Neg"), twice)
    put_out = lambda: _also_put_out("Neg", careless=True)  # noqa: E731
    yield Violation("neg-put-out", "neg", "graph_output", lambda: _also_put_out("Neg"), put_out, FORWARD)


def _divided(careless: bool = False) -> onnx.ModelProto:
    """x/Conv(z): s would have to go into the Conv as 1/s, and x has no other place for it."""
    net = float64_net()
    map_, w = draw(net, 4, "scale"), [net.weight(4, 3, 1, 1), net.weight(4)]
    z = net.node("Conv", net.input([2, 3, 5, 5], "z"), *w)
    z = map_.norm(net, z) if careless else z
    y = net.node("Div", net.input([2, 4, 5, 5]), z)
    net.output(y if careless else map_.norm(net, y))
    return net.model()
