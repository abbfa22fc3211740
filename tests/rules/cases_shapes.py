"""What keeps the numbers: Identity, Dropout, Cast; Reshape and its kin, Transpose, Expand."""

from collections.abc import Iterator

import numpy as np
import onnx

from tests.rules.table import (
    BACKWARD,
    FORWARD,
    Case,
    Layer,
    Violation,
    draw,
    float64_net,
    in_turn,
    layer,
    passes,
    stops,
)
from tests.zoo import Net

# ---- carriers ---------------------------------------------------------------------------------


def _dropout(training: bool | None) -> Layer:
    """None: the caller says whether it runs in training."""

    def put(net: Net, y: str) -> str:
        told = (
            net.input([], "training", dtype=np.bool_) if training is None else net.constant(np.bool_(training))
        )
        return str(net.node("Dropout", y, net.constant(np.float64(0.5)), told, seed=3))

    return put


def _cast(to: int, back: bool = False) -> Layer:
    cast = layer("Cast", to=to)
    return in_turn(cast, layer("Cast", to=onnx.TensorProto.DOUBLE)) if back else cast


def _cast_like(dtype: type, back: bool = False) -> Layer:
    def put(net: Net, y: str) -> str:
        y = net.node("CastLike", y, net.constant(np.ones(1, dtype)))
        return str(net.node("CastLike", y, net.constant(np.ones(1)))) if back else y

    return put


def _read_twice(careless: bool = False) -> onnx.ModelProto:
    """What comes out of the Conv goes two ways, one of them by an Identity and a BatchNorm."""
    net = float64_net()
    map_, w = draw(net, 4), net.weight(4, 4, 1, 1)
    y = net.node("Conv", net.input([2, 4, 5, 5]), w)
    z = map_.norm(net, net.node("Identity", y))
    net.output(net.node("Add", z, z if careless else y))
    return net.model()


def _also_put_out(careless: bool = False) -> onnx.ModelProto:
    """What comes out of BatchNorm and Identity is an output of the model, too."""
    net = float64_net()
    map_, w = draw(net, 4), net.weight(3, 4, 1, 1)
    x = net.input([2, 4, 5, 5])
    y = net.node("Identity", map_.norm(net, x))
    net.output(net.node("Identity", x) if careless else y)
    net.output(net.node("Conv", y, w))
    return net.model()


# ---- axes -------------------------------------------------------------------------------------


def _flat(between: Layer, careless: bool = False, rows: int = 3) -> onnx.ModelProto:
    """BatchNorm over (2, 4, rows, 2), flattened, read by a MatMul with a bias.

    `careless`: s and t of channel c at the places c, c + 4, … instead of side by side.
    """
    net = float64_net()
    map_, w, b = draw(net, 4), net.rng.normal(size=(8 * rows, 5)), net.rng.normal(size=5)
    x = net.input([2, 4, rows, 2])
    y = x if careless else map_.norm(net, x)
    if careless:
        s, t = np.tile(map_.s, 2 * rows), np.tile(map_.t, 2 * rows)
        w, b = s[:, None] * w, b + t @ w
    y = net.node("MatMul", between(net, y), net.constant(w))
    net.output(net.node("Add", y, net.constant(b)))
    return net.model()


def _unflat(between: Layer, careless: bool = False) -> onnx.ModelProto:
    """x·W + b of (2, 24), seen as (2, 4, 3, 2), BatchNorm over the 4."""
    net = float64_net()
    map_, w, b = draw(net, 4), net.rng.normal(size=(5, 24)), net.rng.normal(size=24)
    x = net.input([2, 5])
    if careless:
        s, t = np.tile(map_.s, 6), np.tile(map_.t, 6)
        w, b = w * s, b * s + t
    y = between(net, net.node("Gemm", x, net.constant(w), net.constant(b)))
    net.output(y if careless else map_.norm(net, y))
    return net.model()


def _split_channels(direction: str, careless: bool = False) -> onnx.ModelProto:
    """C → (g, C/g), shuffled and joined again, as ShuffleNet does; `careless`: s stays where it was."""
    net = float64_net()
    map_, w = draw(net, 6), [net.weight(6, 6, 1, 1), net.weight(6)]
    forward = direction == FORWARD
    y = net.input([2, 6, 3, 3])
    y = y if forward else net.node("Conv", y, *w)
    y = map_.norm(net, y) if forward != careless else y
    y = _shuffle(net, y)
    y = y if forward != careless else map_.norm(net, y)
    net.output(net.node("Conv", y, *w) if forward else y)
    return net.model()


_shuffle = in_turn(
    layer("Reshape", [2, 2, 3, 3, 3]),
    layer("Transpose", perm=[0, 2, 1, 3, 4]),
    layer("Reshape", [2, 6, 3, 3]),
)


def _tokens(direction: str, careless: bool = False) -> onnx.ModelProto:
    """(N, L, C) with C last, as a MatMul has it, and (N, C, L), as a BatchNorm has it; L = C."""
    net = float64_net()
    map_, w, b = draw(net, 4), net.weight(4, 4), net.weight(4)
    x = net.input([2, 4, 4])
    if direction == FORWARD:
        y = x if careless else map_.norm(net, x)
        y = net.node("Transpose", y, perm=[0, 2, 1])
        y = net.node("MatMul", map_.norm(net, y) if careless else y, w)
        net.output(net.node("Add", y, b))
    else:
        y = net.node("Add", net.node("MatMul", x, w), b)
        y = map_.norm(net, y) if careless else y
        y = net.node("Transpose", y, perm=[0, 2, 1])
        net.output(y if careless else map_.norm(net, y))
    return net.model()


def _one_way(direction: str, inverted: bool = False, careless: bool = False) -> onnx.ModelProto:
    """(N, C, H, W) → (H, N, W, C), all of one length, with the channels last for a MatMul.

    `inverted`: the other way round, so that something else comes last. `careless`: the MatMul takes the map.
    """
    net = float64_net()
    map_, w, b = draw(net, 4), net.rng.normal(size=(4, 4)), net.rng.normal(size=4)
    forward = direction == FORWARD
    perm = [2, 0, 3, 1] if forward != inverted else [1, 3, 0, 2]
    if careless and forward:
        w, b = map_.s[:, None] * w, b + map_.t @ w
    elif careless:
        w, b = w * map_.s, b * map_.s + map_.t
    y = net.input([4] * 4)
    if forward:
        y = net.node("Transpose", y if careless else map_.norm(net, y), perm=perm)
    y = net.node("Add", net.node("MatMul", y, net.constant(w)), net.constant(b))
    if not forward:
        y = net.node("Transpose", y, perm=perm)
    net.output(y if forward or careless else map_.norm(net, y))
    return net.model()


def _batches_as_one(direction: str) -> onnx.ModelProto:
    """(N, L, C) seen as (N·L, C) for a BatchNorm over features, as LeViT does, and back."""
    net = float64_net()
    map_, w, b = draw(net, 4), net.weight(4, 4), net.weight(4)
    shapes = [net.constant(np.array(each)) for each in ([-1, 4], [2, 3, 4])]
    y = net.input([2, 3, 4])
    if direction == BACKWARD:
        y = net.node("Add", net.node("MatMul", y, w), b)
    y = map_.norm(net, net.node("Reshape", y, shapes[0]))
    y = net.node("Reshape", y, shapes[1])
    if direction == FORWARD:
        y = net.node("Add", net.node("MatMul", y, w), b)
    net.output(y)
    return net.model()


def _expanded(direction: str) -> onnx.ModelProto:
    """(N, C, 1, 1) spread over all positions."""
    net = float64_net()
    map_, w = draw(net, 4), [net.weight(4, 4, 1, 1), net.weight(4)]
    y = net.input([2, 4, 1, 1])
    y = map_.norm(net, y) if direction == FORWARD else net.node("Conv", y, *w)
    y = net.node("Expand", y, net.constant(np.array([1, 1, 3, 3])))
    net.output(net.node("Conv", y, *w) if direction == FORWARD else map_.norm(net, y))
    return net.model()


def _over_channels(careless: bool = False) -> onnx.ModelProto:
    """One channel of a Conv spread over the four that a BatchNorm scales. `careless`: by their mean, before."""
    net = float64_net()
    map_, w = draw(net, 4), net.weight(1, 4, 1, 1)
    y = net.node("Conv", net.input([2, 4, 3, 3]), w)
    y = net.node("Mul", y, net.constant(map_.s.mean())) if careless else y
    y = net.node("Expand", y, net.constant(np.array([1, 4, 1, 1])))
    net.output(y if careless else map_.norm(net, y))
    return net.model()


def _one_channel(between: Layer, *shape: int) -> onnx.ModelProto:
    """A BatchNorm of one channel has one number in all, which lies on any axis; a Gemm reads it."""
    net = float64_net()
    y = between(net, draw(net, 1).norm(net, net.input([2, 1, 3, 4])))
    net.output(net.node("Gemm", y, net.weight(*shape), net.weight(shape[1])))
    return net.model()


def _times_a_constant(net: Net, y: str) -> str:
    return str(net.node("Mul", y, net.constant(net.rng.uniform(0.5, 2, 12))))


def _one_channel_behind() -> onnx.ModelProto:
    """A Gemm, spread by an Expand and added to what a Conv makes, in front of a BatchNorm of one channel."""
    net = float64_net()
    a = net.node("Gemm", net.input([3, 5]), net.weight(5, 4), net.weight(4))
    a = net.node("Expand", a, net.constant(np.array([2, 1, 3, 4])))
    b = net.node("Gemm", net.input([3, 5], "b"), net.weight(5, 4), net.weight(4))
    c = net.conv(net.input([2, 2, 3, 4], "c"), 2, 1, 1, 1)
    net.output(draw(net, 1).norm(net, net.node("Sum", a, b, c)))
    return net.model()


def _in_front(direction: str, careless: bool = False) -> onnx.ModelProto:
    """Expand puts an axis in front, (4, 4) → (3, 4, 4): the channels of axis 1 lie on axis 2 then."""
    net = float64_net()
    map_, w = draw(net, 4), [net.weight(4, 4), net.weight(4)]
    v = net.weight(5, 4, 1)
    forward = direction == FORWARD
    y = net.input([4, 4])
    y = y if forward else net.node("Gemm", y, *w)
    y = map_.norm(net, y) if forward != careless else y
    y = net.node("Expand", y, net.constant(np.array([3, 4, 4])))
    y = y if forward != careless else map_.norm(net, y)
    net.output(net.node("Conv", y, v) if forward else y)
    return net.model()


def cases() -> Iterator[Case]:
    yield from passes("identity", "identity", layer("Identity"), "Identity")
    yield from passes("dropout", "dropout", layer("Dropout"), "Dropout")
    yield from passes("dropout-told", "dropout", _dropout(training=False), "Dropout")
    yield from passes("cast", "cast", _cast(onnx.TensorProto.DOUBLE), "Cast")
    yield from passes("cast_like", "cast_like", _cast_like(np.float64), "CastLike")
    for direction in (BACKWARD, FORWARD):
        yield Case(
            f"shuffle-{direction}",
            "reshape",
            lambda d=direction: _split_channels(d),
            ("Conv", "Reshape", "Reshape", "Transpose"),
            direction,
        )
        tokens = ("MatMul", "Add", "Transpose")
        yield Case(f"transpose-{direction}", "transpose", lambda d=direction: _tokens(d), tokens, direction)
        one_way = lambda d=direction: _one_way(d)  # noqa: E731
        yield Case(f"transposed-one-way-{direction}", "transpose", one_way, tokens, direction)
        joined = ("MatMul", "Add", "Reshape", "Reshape")
        yield Case(f"batches-{direction}", "reshape", lambda d=direction: _batches_as_one(d), joined, direction)
        expanded = ("Conv", "Expand")
        yield Case(f"expand-{direction}", "expand", lambda d=direction: _expanded(d), expanded, direction)
    for name, op, kind in (
        ("Reshape", layer("Reshape", [2, -1]), "reshape"),
        ("Flatten", layer("Flatten"), "flatten"),
    ):
        yield Case(f"{name}-flat", kind, lambda o=op: _flat(o), ("MatMul", "Add", name), FORWARD)
    square = lambda: _flat(layer("Flatten"), rows=4)  # noqa: E731
    yield Case("Flatten-flat-square", "flatten", square, ("MatMul", "Add", "Flatten"), FORWARD)
    unflat = layer("Reshape", [2, 4, 3, 2])
    yield Case("Reshape-unflat", "reshape", lambda: _unflat(unflat), ("Gemm", "Reshape"))
    # the first axes joined, (N, C, L) → (N·C, L): the BatchNorm's channels are those of a Conv before or behind
    square = {"shape": (2, 4, 6, 6)}
    there_and_back = in_turn(layer("Flatten", axis=2), layer("Reshape", [2, 4, 6, 6]))
    yield from passes("flatten-rows", "flatten", there_and_back, "Flatten", "Reshape", **square)
    wide = in_turn(layer("Unsqueeze", [2, 5]), layer("Squeeze", [2, 5]))
    yield from passes("squeeze", "squeeze", wide, "Squeeze", "Unsqueeze")
    in_front = in_turn(layer("Unsqueeze", [0]), layer("Squeeze", [0]))
    yield from passes("unsqueeze", "unsqueeze", in_front, "Squeeze", "Unsqueeze")
    rows = layer("Reshape", [2, 4, 36, 1])
    yield from passes("reshape-behind", "reshape", rows, "Reshape")
    turned = in_turn(layer("Transpose", perm=[1, 3, 0, 2]), layer("Transpose", perm=[2, 0, 3, 1]))
    yield from passes("transpose-there-and-back", "transpose", turned, "Transpose", "Transpose")
    reversed_ = in_turn(layer("Transpose"), layer("Transpose"))
    yield from passes("transpose-reversed", "transpose", reversed_, "Transpose", "Transpose")
    flat = lambda: _one_channel(layer("Flatten"), 12, 5)  # noqa: E731
    yield Case("flatten-one-channel", "flatten", flat, ("Flatten", "Gemm"), FORWARD)
    constants = in_turn(layer("Flatten"), _times_a_constant, layer("Identity"))
    times = lambda: _one_channel(constants, 12, 5)  # noqa: E731
    yield Case("flatten-one-channel-times", "flatten", times, ("Flatten", "Gemm", "Identity"), FORWARD)
    rows = lambda: _one_channel(layer("Reshape", [6, 4]), 4, 5)  # noqa: E731
    yield Case("reshape-one-channel", "reshape", rows, ("Reshape", "Gemm"), FORWARD)
    left = ("Conv", "Expand", "Gemm", "Gemm", "Sum")
    yield Case("expand-one-channel", "expand", _one_channel_behind, left)


# ---- where they must not ----------------------------------------------------------------------


def violations() -> Iterator[Violation]:
    yield Violation(
        "identity-read-twice", "identity", "multiple_readers", _read_twice, lambda: _read_twice(True)
    )
    put_out = lambda: _also_put_out(careless=True)  # noqa: E731
    yield Violation("identity-put-out", "identity", "graph_output", _also_put_out, put_out, FORWARD)
    yield from stops("dropout-in-training", "dropout", "training_mode", _dropout(training=True))
    yield from stops("dropout-told-by-the-caller", "dropout", "training_mode", _dropout(training=None))
    integers = onnx.TensorProto.INT64
    yield from stops("cast-to-integers", "cast", "unsupported_op", _cast(integers, back=True))
    yield from stops("cast_like-integers", "cast_like", "unsupported_op", _cast_like(np.int64, back=True))
    # sizes coincide: (N, C, H, W) with C = H, and what was C is H
    square = {"shape": (2, 4, 4, 6)}
    yield from stops(
        "transposed", "transpose", "axis_mismatch", layer("Transpose", perm=[0, 2, 1, 3]), **square
    )
    yield from stops("mixed", "reshape", "axis_mismatch", _mixed, shape=(2, 4, 6, 6))
    yield from stops("flattened", "flatten", "axis_mismatch", _rows_for_channels, shape=(4, 4, 2, 2))
    # an axis of length 1 goes from the front to the back: the channels move, and others take their place
    to_back = in_turn(layer("Squeeze", [0]), layer("Unsqueeze", [3]))
    yield from stops("squeezed", "squeeze", "axis_mismatch", to_back, shape=(1, 4, 4, 6))
    to_front = in_turn(layer("Unsqueeze", [0]), layer("Squeeze", [4]))
    yield from stops("unsqueezed", "unsqueeze", "axis_mismatch", to_front, shape=(4, 4, 4, 1))
    spread = lambda: _over_channels(careless=True)  # noqa: E731
    yield Violation("expand-over-channels", "expand", "axis_mismatch", _over_channels, spread)
    for direction in (BACKWARD, FORWARD):
        yield Violation(
            f"transposed-the-other-way-{direction}",
            "transpose",
            "axis_mismatch",
            lambda d=direction: _one_way(d, inverted=True),
            lambda d=direction: _one_way(d, inverted=True, careless=True),
            direction,
        )
        yield Violation(
            f"expand-in-front-{direction}",
            "expand",
            "axis_mismatch",
            lambda d=direction: _in_front(d),
            lambda d=direction: _in_front(d, careless=True),
            direction,
        )
    for direction in (BACKWARD, FORWARD):
        yield Violation(
            f"flat-wrong-order-{direction}",
            "reshape",
            "",
            _unflattened if direction == BACKWARD else _flattened,
            (lambda: _unflattened(True)) if direction == BACKWARD else (lambda: _flattened(True)),
            direction,
            ("Gemm", "Reshape") if direction == BACKWARD else ("Add", "MatMul", "Reshape"),
        )
        yield Violation(
            f"shuffle-in-place-{direction}",
            "reshape",
            "",
            lambda d=direction: _split_channels(d),
            lambda d=direction: _split_channels(d, careless=True),
            direction,
            ("Conv", "Reshape", "Reshape", "Transpose"),
        )


def _flattened(careless: bool = False) -> onnx.ModelProto:
    return _flat(layer("Reshape", [2, -1]), careless=careless)


def _unflattened(careless: bool = False) -> onnx.ModelProto:
    return _unflat(layer("Reshape", [2, 4, 3, 2]), careless=careless)


def _mixed(net: Net, y: str) -> str:
    """(N, 4, 6, 6) → (N, 6, 6, 4) → (N, 4, 6, 6): 4 channels again, and others."""
    return in_turn(layer("Transpose", perm=[0, 2, 3, 1]), layer("Reshape", [2, 4, 6, 6]))(net, y)


def _rows_for_channels(net: Net, y: str) -> str:
    """(4, 4, 2, 2) turned, its rows flattened and seen again with the rows where the channels were."""
    return in_turn(
        layer("Transpose", perm=[1, 0, 2, 3]), layer("Flatten", axis=2), layer("Reshape", [4, 4, 2, 2])
    )(net, y)
