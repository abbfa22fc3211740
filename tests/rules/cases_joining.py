"""Concat, Split, Slice and Gather."""

from collections.abc import Iterator

import numpy as np
import onnx

from tests.rules.table import (
    BACKWARD,
    DIRECTIONS,
    FORWARD,
    Case,
    Layer,
    Violation,
    around,
    draw,
    float64_net,
    in_turn,
    layer,
    passes,
    stops,
)
from tests.zoo import Net

# ---- Concat -----------------------------------------------------------------------------------


def _joined(axis: int = 1, constant: bool = False) -> onnx.ModelProto:
    """Two Convs of other widths, and a constant part, in front of one BatchNorm."""
    net = float64_net()
    shapes = ((3, 5), (2, 5)) if axis == 1 else ((4, 3), (4, 2))
    parts = [net.conv(net.input([2, 3, n, 4], f"x{n}{c}"), 3, c, 1, 1) for c, n in shapes]
    if constant:
        c, n = shapes[1]
        parts.insert(1, net.constant(net.rng.normal(size=(2, c, n, 4))))
    y = net.node("Concat", *parts, axis=axis)
    net.output(net.batch_norm(y, (5 + 2 * constant) if axis == 1 else 4))
    return net.model()


def _joined_forward(axis: int = 1, constant: bool = False) -> onnx.ModelProto:
    """A BatchNorm, a tensor without one and a constant, or two ways from one BatchNorm, joined for a Conv."""
    net = float64_net()
    y = net.batch_norm(net.input([2, 4, 5, 4]), 4)
    if axis == 1:
        parts = [net.input([2, 2, 5, 4], "z"), y]
        parts += [net.constant(net.rng.normal(size=(2, 1, 5, 4)))] if constant else []
    else:
        parts = [y, net.node("AveragePool", y, kernel_shape=[2, 1])]
    net.output(net.conv(net.node("Concat", *parts, axis=axis), 6 + constant if axis == 1 else 4, 3, 2, 2))
    return net.model()


def _beside(direction: str, axis: int, careless: bool = False) -> onnx.ModelProto:
    """One part has no place for the map, or does not bring it. `careless`: the other part is moved alone."""
    net = float64_net()
    forward = direction == FORWARD
    map_ = draw(net, 4 if forward or axis != 1 else 8)
    w, v = [net.weight(4, 4, 1, 1), net.weight(4)], net.weight(3, 8 if axis == 1 else 4, 1, 1)
    z, y = net.input([2, 4, 5, 5], "z"), net.input([2, 4, 5, 5])
    y = y if forward else net.node("Conv", y, *w)
    y = map_.norm(net, y) if forward else y
    if careless and not forward:
        half = slice(4) if axis == 1 else slice(None)
        s, t = (net.constant(each[half].reshape(-1, 1, 1)) for each in (map_.s, map_.t))
        y = net.node("Add", net.node("Mul", y, s), t)
    if careless and forward:
        z = map_.norm(net, z)
    y = net.node("Concat", y, z, axis=axis)
    net.output(net.node("Conv", y, v) if forward else y if careless else map_.norm(net, y))
    return net.model()


def _equal_parts(direction: str, careless: bool = False) -> onnx.ModelProto:
    """Two parts as wide as each other. `careless`: their slices of s and t are taken for each other."""
    net = float64_net()
    forward = direction == FORWARD
    maps = [draw(net, 3), draw(net, 3)]
    convs = [[net.weight(3, 3, 1, 1), net.weight(3)] for _ in maps]
    parts = [net.input([2, 3, 5, 5], name) for name in "xz"]
    if not forward:
        parts = [net.node("Conv", x, *each) for x, each in zip(parts, convs, strict=True)]
    if careless:
        maps.reverse()
    if forward:
        parts = [map_.norm(net, x) for map_, x in zip(maps, parts, strict=True)]
        net.output(net.node("Conv", net.node("Concat", *parts, axis=1), net.weight(3, 6, 1, 1)))
        return net.model()
    s, t = (np.concatenate([getattr(map_, name) for map_ in maps]) for name in "st")
    statistics = [net.constant(each) for each in (s, t, np.zeros(6), np.ones(6))]
    y = net.node("Concat", *parts, axis=1)
    net.output(net.batch_norm(y, 6, epsilon=0.0, statistics=statistics))
    return net.model()


def _same_part_twice(careless: bool = False) -> onnx.ModelProto:
    """Concat(y, y): the BatchNorm does something else to each half."""
    net = float64_net()
    map_, w = draw(net, 8), [net.weight(4, 3, 1, 1), net.weight(4)]
    y = net.node("Conv", net.input([2, 3, 5, 5]), *w)
    if careless:
        s, t = (net.constant(each[:4].reshape(-1, 1, 1)) for each in (map_.s, map_.t))
        y = net.node("Add", net.node("Mul", y, s), t)
    y = net.node("Concat", y, y, axis=1)
    net.output(y if careless else map_.norm(net, y))
    return net.model()


def _split_channels_joined(careless: bool = False) -> onnx.ModelProto:
    """Six channels as (2, 3), joined with themselves to (4, 3). `careless`: two of each, side by side."""
    net = float64_net()
    map_, w, b = draw(net, 6), net.rng.normal(size=(4, 12)), net.rng.normal(size=4)
    if careless:
        s, t = (np.repeat(each.reshape(2, 3), 2, axis=0).reshape(-1) for each in (map_.s, map_.t))
        w, b = w * s, b + w @ t
    x = net.input([2, 6, 3, 3])
    y = layer("Reshape", [2, 2, 3, 3, 3])(net, x if careless else map_.norm(net, x))
    y = net.node("Concat", net.node("Identity", y), y, axis=1)
    y = layer("Reshape", [2, 12, 3, 3])(net, y)
    net.output(net.node("Conv", y, net.constant(w[:, :, None, None]), net.constant(b)))
    return net.model()


# ---- Split ------------------------------------------------------------------------------------


def _split(net: Net, y: str, lengths: list[int], axis: int) -> list[str]:
    return list(net.node("Split", y, net.constant(np.array(lengths)), outputs=len(lengths), axis=axis))


def _cut_apart(normed: tuple[int, ...] = (0, 1, 2)) -> onnx.ModelProto:
    """A Conv's channels in three parts, some of which have a BatchNorm."""
    net = float64_net()
    y = net.conv(net.input([2, 3, 5, 5]), 3, 7, 1, 1)
    parts = _split(net, y, [2, 1, 4], 1)
    for i, (part, width) in enumerate(zip(parts, (2, 1, 4), strict=True)):
        net.output(net.batch_norm(part, width) if i in normed else net.node("Relu", part))
    return net.model()


def _cut_apart_forward(axis: int) -> onnx.ModelProto:
    """A BatchNorm whose channels, or whose rows, go different ways."""
    net = float64_net()
    parts = _split(net, net.batch_norm(net.input([2, 6, 6, 5]), 6), [2, 4], axis)
    for part, width in zip(parts, (2, 4) if axis == 1 else (6, 6), strict=True):
        net.output(net.conv(part, width, 3, 1, 1))
    return net.model()


def _rows_exchanged(net: Net, y: str) -> str:
    """Every part is wanted in the same form."""
    one, other = _split(net, y, [2, 4], 2)
    return str(net.node("Concat", other, one, axis=2))


def _halves_exchanged(net: Net, y: str) -> str:
    """The second half of the channels in front of the first."""
    one, other = _split(net, y, [2, 2], 1)
    return str(net.node("Concat", other, one, axis=1))


def _part_of_rows(careless: bool = False) -> onnx.ModelProto:
    """Some rows have a BatchNorm, others are read as they are."""
    net = float64_net()
    map_, w = draw(net, 4), [net.weight(4, 3, 1, 1), net.weight(4)]
    y = net.node("Conv", net.input([2, 3, 6, 5]), *w)
    y = map_.norm(net, y) if careless else y
    one, other = _split(net, y, [2, 4], 2)
    net.output(one if careless else map_.norm(net, one))
    net.output(other)
    return net.model()


def _part_into_relu(op_type: str, careless: bool = False) -> onnx.ModelProto:
    """Half of the channels goes into a Conv, the other half into a Relu; `careless`: that one is forgotten."""
    net = float64_net()
    map_, w = draw(net, 4), net.weight(3, 2, 1, 1)
    x = net.input([2, 4, 5, 5])
    y = map_.norm(net, x)
    one, other = _halves(net, y, op_type)
    if careless:
        other = _halves(net, x, op_type)[1]
    net.output(net.node("Conv", one, w))
    net.output(net.node("Relu", other))
    return net.model()


def _halves(net: Net, y: str, op_type: str) -> list[str]:
    if op_type == "Split":
        return _split(net, y, [2, 2], 1)
    return [_slice(start, start + 2, 1)(net, y) for start in (0, 2)]


# ---- Slice ------------------------------------------------------------------------------------


def _slice(start: int, end: int, axis: int, step: int = 1) -> Layer:
    return layer("Slice", [start], [end], [axis], [step])


def _cut_out(*cuts: tuple[int, int, int]) -> onnx.ModelProto:
    """Pieces of a Conv's channels, the first with a BatchNorm, the last without."""
    net = float64_net()
    y = net.conv(net.input([2, 3, 5, 5]), 3, 8, 1, 1)
    parts = [_slice(start, end, 1, step)(net, y) for start, end, step in cuts]
    for part, (start, end, step) in zip(parts, cuts, strict=True):
        last = part is parts[-1] and len(parts) > 1
        net.output(net.node("Relu", part) if last else net.batch_norm(part, len(range(8)[start:end:step])))
    return net.model()


def _overlapping(careless: bool = False) -> onnx.ModelProto:
    """Channels 0 to 2 have a BatchNorm, channels 2 and 3 are read as they are."""
    net = float64_net()
    map_, w, b = draw(net, 3), net.rng.normal(size=(4, 3, 1, 1)), net.rng.normal(size=4)
    if careless:
        w[:3], b[:3] = w[:3] * map_.s.reshape(-1, 1, 1, 1), b[:3] * map_.s + map_.t
    y = net.node("Conv", net.input([2, 3, 5, 5]), net.constant(w), net.constant(b))
    one, other = _slice(0, 3, 1)(net, y), _slice(2, 4, 1)(net, y)
    net.output(one if careless else map_.norm(net, one))
    net.output(other)
    return net.model()


# ---- Gather -----------------------------------------------------------------------------------


def _looked_up(only: str = "", twice: bool = False) -> onnx.ModelProto:
    """Rows of a table, and a BatchNorm over its columns; `twice`: the table is also read as it is."""
    net = float64_net()
    table, indices = net.weight(7, 4), net.input([5], "indices", dtype=np.int64)
    y = net.node("Gather", table, indices)
    net.output(draw(net, 4, only).norm(net, y))
    if twice:
        net.output(net.node("Gather", table, indices))
    return net.model()


def _looked_up_sequences() -> onnx.ModelProto:
    """(N, L) indices give (N, L, C), turned to (N, C, L) for the BatchNorm."""
    net = float64_net()
    y = net.node("Gather", net.weight(7, 4), net.input([2, 4], "indices", dtype=np.int64))
    net.output(net.batch_norm(net.node("Transpose", y, perm=[0, 2, 1]), 4))
    return net.model()


def _from_axis_one(careless: bool = False) -> onnx.ModelProto:
    """The table's axis 1 is gathered along; the BatchNorm's channels are as many, and other ones."""
    net = float64_net()
    table, map_ = net.rng.normal(size=(4, 4)), draw(net, 4)
    indices = net.input([4], "indices", dtype=np.int64)
    table = map_.s * table + map_.t if careless else table
    y = net.node("Gather", net.constant(table), indices, axis=1)
    net.output(y if careless else map_.norm(net, y))
    return net.model()


def _rows_of_a_table(careless: bool = False) -> onnx.ModelProto:
    """(N, L) indices give (N, L, C); the BatchNorm normalises L = C."""
    net = float64_net()
    table, map_ = net.rng.normal(size=(7, 4)), draw(net, 4)
    table = map_.s * table + map_.t if careless else table
    y = net.node("Gather", net.constant(table), net.input([2, 4], "indices", dtype=np.int64))
    net.output(y if careless else map_.norm(net, y))
    return net.model()


def _chosen_rows(net: Net, y: str) -> str:
    """Some of the rows, some of them twice; then the channels are where they were."""
    return str(net.node("Gather", y, net.constant(np.array([3, 0, 0, 5, 1, 2])), axis=2))


def _one_row(net: Net, y: str) -> str:
    """A scalar index takes the axis with it, here in front of the channels."""
    y = net.node("Transpose", y, perm=[2, 0, 1, 3])
    y = net.node("Gather", y, net.constant(np.array(2)), axis=0)
    return str(net.node("Unsqueeze", y, net.constant(np.array([3]))))


def _channels_chosen(net: Net, y: str) -> str:
    return str(net.node("Gather", y, net.constant(np.array([3, 0, 0, 2])), axis=1))


def _picked(*indices: object) -> Layer:
    return layer("GatherND", list(indices))


#: (N, C, H, W) → (N, H, W, C), all of three columns of two rows of two samples, and back.
COLUMNS = in_turn(
    layer("Transpose", perm=[0, 3, 2, 1]),
    _picked([[0, 1], [0, 3], [1, 2]], [[1, 0], [0, 5], [1, 4]]),
    layer("Transpose", perm=[0, 3, 2, 1]),
)


def cases() -> Iterator[Case]:
    for constant in (False, True):
        name = "-with-a-constant" if constant else ""
        for axis in (1, 2):
            left = ("Conv", "Conv", "Concat")
            build = lambda a=(axis, constant): _joined(*a)  # noqa: E731
            yield Case(f"concat-axis{axis}{name}", "concat", build, left)
        build = lambda c=constant: _joined_forward(1, c)  # noqa: E731
        yield Case(f"concat-axis1{name}-forward", "concat", build, ("Conv", "Concat"), FORWARD)
    left = ("AveragePool", "Concat", "Conv")
    yield Case("concat-axis2-forward", "concat", lambda: _joined_forward(2), left, FORWARD)
    for direction, left in ((BACKWARD, ("Conv", "Conv", "Concat")), (FORWARD, ("Conv", "Concat"))):
        build = lambda d=direction: _equal_parts(d)  # noqa: E731
        yield Case(f"concat-equal-parts-{direction}", "concat", build, left, direction)
    parts = ("Conv", "Split")
    yield Case("split", "split", _cut_apart, parts)
    yield Case("split-one-part", "split", lambda: _cut_apart((1,)), (*parts, "Relu", "Relu"))
    for axis in (1, 2):
        build = lambda a=axis: _cut_apart_forward(a)  # noqa: E731
        yield Case(f"split-axis{axis}-forward", "split", build, ("Split", "Conv", "Conv"), FORWARD)
    yield from passes("split-rows-exchanged", "split", _rows_exchanged, "Split", "Concat")
    yield from passes("split-halves-exchanged", "split", _halves_exchanged, "Split", "Concat")
    slices = ("Conv", "Slice")
    yield Case("slice-channels", "slice", lambda: _cut_out((2, 5, 1)), slices)
    yield Case("slice-every-second", "slice", lambda: _cut_out((1, 8, 2)), slices)
    apart = lambda: _cut_out((-3, 8, 1), (0, 3, 1), (3, 5, 1))  # noqa: E731
    yield Case("slice-apart", "slice", apart, (*slices, "Slice", "Slice", "Relu"))
    single = lambda: _cut_out((2, 3, 1), (3, 6, 1), (6, 7, 1))  # noqa: E731
    yield Case("slice-one-channel", "slice", single, (*slices, "Slice", "Slice", "Relu"))
    yield from passes("slice-rows", "slice", _slice(1, -1, 2), "Slice")
    yield from passes(
        "slice-rows-backward", "slice", in_turn(_slice(0, 4, 3, 2), _slice(0, 9, 0)), "Slice", "Slice"
    )
    halves = in_turn(_slice(1, 3, 1))
    build = lambda: around(halves, FORWARD, channels_behind=2)  # noqa: E731
    yield Case("slice-channels-forward", "slice", build, slices, FORWARD)
    for only in ("", "scale"):
        build = lambda o=only: _looked_up(o)  # noqa: E731
        yield Case(f"embedding{'-' * bool(only)}{only}", "embedding", build, ("Gather",))
    yield Case("embedding-read-twice", "embedding", lambda: _looked_up(twice=True), ("Gather", "Gather"))
    yield Case("embedding-sequences", "embedding", _looked_up_sequences, ("Gather", "Transpose"))
    yield from passes("gather-rows", "embedding", _chosen_rows, "Gather")
    yield from passes("gather_nd-samples", "gather_nd", _picked([1], [0], [1]), "GatherND")
    yield from passes("gather_nd-columns", "gather_nd", COLUMNS, "GatherND", "Transpose", "Transpose")
    yield from passes("tile-rows", "tile", layer("Tile", [2, 1, 1, 3]), "Tile")
    yield from passes("gather-one-row", "embedding", _one_row, "Gather", "Transpose", "Unsqueeze")


def violations() -> Iterator[Violation]:
    for direction in DIRECTIONS:
        reason = "no_producer" if direction == BACKWARD else "multiple_readers"
        for axis in (1, 2):
            if (axis, direction) == (1, FORWARD):
                continue  # there it is legal
            yield Violation(
                f"concat-axis{axis}-beside-{direction}",
                "concat",
                reason,
                lambda a=(direction, axis): _beside(*a),
                lambda a=(direction, axis): _beside(*a, careless=True),
                direction,
            )
    split = lambda: _split_channels_joined(careless=True)  # noqa: E731
    yield Violation(
        "concat-split-channels", "concat", "multiple_readers", _split_channels_joined, split, FORWARD
    )
    same = lambda: _same_part_twice(careless=True)  # noqa: E731
    yield Violation("concat-same-part-twice", "concat", "multiple_readers", _same_part_twice, same)
    for direction in DIRECTIONS:
        yield Violation(
            f"concat-slices-swapped-{direction}",
            "concat",
            "",
            lambda d=direction: _equal_parts(d),
            lambda d=direction: _equal_parts(d, careless=True),
            direction,
            ("Concat", "Conv", *["Conv"] * (direction == BACKWARD)),
        )
        yield Violation(
            f"split-halves-in-place-{direction}",
            "split",
            "",
            lambda d=direction: around(_halves_exchanged, d),
            lambda d=direction: around(_halves_exchanged, d, swapped=True),
            direction,
            ("Concat", "Conv", "Split"),
        )
    yield Violation(
        "split-part-of-rows", "split", "multiple_readers", _part_of_rows, lambda: _part_of_rows(careless=True)
    )
    for op_type in ("Split", "Slice"):
        yield Violation(
            f"{op_type}-part-into-relu",
            op_type.lower(),
            "nonlinear",
            lambda o=op_type: _part_into_relu(o),
            lambda o=op_type: _part_into_relu(o, careless=True),
            FORWARD,
        )
    yield Violation(
        "slice-overlapping", "slice", "multiple_readers", _overlapping, lambda: _overlapping(careless=True)
    )
    yield from stops("slice-reversed", "slice", "unsupported_op", _slice(3, -5, 1, -1))
    yield from stops("gather-channels", "embedding", "axis_mismatch", _channels_chosen)
    channels = _picked([[0, 3], [0, 0], [1, 0], [1, 2]], [[1, 1], [0, 2], [0, 1], [1, 3]])
    yield from stops("gather_nd-channels", "gather_nd", "axis_mismatch", channels)
    turned = in_turn(layer("Tile", [1, 2, 1, 1]), _slice(2, 6, 1))
    yield from stops("tile-channels", "tile", "axis_mismatch", turned)
    yield Violation(
        "embedding-axis-1", "embedding", "axis_mismatch", _from_axis_one, lambda: _from_axis_one(careless=True)
    )
    yield Violation(
        "embedding-rows",
        "embedding",
        "axis_mismatch",
        _rows_of_a_table,
        lambda: _rows_of_a_table(careless=True),
    )
