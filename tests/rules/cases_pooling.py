"""Averages, MaxPool, Pad and Resize."""

from collections.abc import Iterator
from typing import Any

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

#: What was the channel axis is a spatial one, with as many positions.
TURNED = layer("Transpose", perm=[0, 2, 1, 3])

#: An average that counts its padding, and one that does not.
COUNTED = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}
UNCOUNTED = {"kernel_shape": [3, 2], "pads": [1, 0, 0, 1], "strides": [2, 1], "count_include_pad": 0}


def _resize(scales: tuple[float, ...] = (), sizes: tuple[int, ...] = (), **attributes: Any) -> Layer:
    def put(net: Net, y: str) -> str:
        stated = net.constant(np.array(scales, np.float32)) if scales else ""
        operands = [net.constant(np.array(sizes, np.int64))] if sizes else []
        return str(net.node("Resize", y, "", stated, *operands, **attributes))

    return put


def _to_the_size_of_another(net: Net, y: str) -> str:
    other = net.input([2, 4, 9, 8], "other")
    return str(net.node("Resize", y, "", "", net.node("Shape", net.node("Relu", other)), mode="linear"))


def _cropped(net: Net, y: str) -> str:
    """tf_crop_and_resize puts a constant where it reads beyond the input."""
    roi = net.constant(np.array([0, 0, -0.5, 0, 1, 1, 1, 1.5]))
    scales = net.constant(np.array([1, 1, 2, 2], np.float32))
    attributes = {"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 0.5}
    return str(net.node("Resize", y, roi, scales, mode="linear", **attributes))


def _pad(
    *pads: int,
    value: float | None = None,
    axes: tuple[int, ...] = (),
    mode: str = "constant",
    computed: bool = False,
) -> Layer:
    def put(net: Net, y: str) -> str:
        operands = [net.constant(np.array(pads))]
        if computed:
            operands.append(net.node("Relu", net.input([], "value")))
        elif value is not None or axes:
            operands.append(net.constant(np.float64(value)) if value is not None else "")
        if axes:
            operands.append(net.constant(np.array(axes)))
        return str(net.node("Pad", y, *operands, mode=mode))

    return put


def _pad_before_opset_11(direction: str, fill: float = 0.25) -> onnx.ModelProto:
    """The constant is an attribute then, in float32: 1/4 becomes 0, or 1/8, for y = 1/2 − 2x."""
    net = float64_net(opset=10)
    statistics = [net.constant(np.array([number])) for number in (-2.0, 0.5, 0.0, 1.0)]
    y = net.input([2, 1, 5, 5])
    y = net.conv(y, 1, 1, 2, 2) if direction == BACKWARD else y
    y = net.batch_norm(y, 1, epsilon=0.0, statistics=statistics) if direction == FORWARD else y
    y = net.node("Pad", y, pads=[0, 0, 1, 0, 0, 0, 2, 1], value=fill)
    y = net.batch_norm(y, 1, epsilon=0.0, statistics=statistics) if direction == BACKWARD else y
    net.output(net.conv(y, 1, 1, 2, 2) if direction == FORWARD else y)
    return net.model()


def _mean(*axes: int, keep: int = 1) -> Layer:
    """ReduceMean at opset 18; the axes it loses are put back by an Unsqueeze."""
    reduced = layer("ReduceMean", axes, keepdims=keep)
    return reduced if keep else in_turn(reduced, layer("Unsqueeze", axes))


def _flat_mean(forward: bool) -> onnx.ModelProto:
    """The mean over all positions loses two axes; a Gemm reads what is left."""
    net = float64_net(opset=18)
    y = net.batch_norm(net.input([2, 4, 5, 3]), 4) if forward else net.conv(net.input([2, 3, 5, 3]), 3, 4, 2, 2)
    y = net.node("ReduceMean", y, net.constant(np.array([-1, 2])), keepdims=0)
    net.output(net.node("Gemm", y, net.weight(4, 3), net.weight(3)) if forward else net.batch_norm(y, 4))
    return net.model()


def _tokens_mean() -> onnx.ModelProto:
    """(N, C, L) turned to (N, L, C), averaged over the positions in front of the channels, read by a Gemm."""
    net = float64_net(opset=18)
    y = net.node("Transpose", net.batch_norm(net.input([2, 4, 5]), 4), perm=[0, 2, 1])
    y = net.node("ReduceMean", y, net.constant(np.array([1])), keepdims=0)
    net.output(net.node("Gemm", y, net.weight(4, 3), net.weight(3)))
    return net.model()


def _max_with_indices(forward: bool, careless: bool = False) -> onnx.ModelProto:
    """Where the maximum is, a negative scale would change; and whoever reads the indices would see it."""
    net = float64_net()
    map_, w = draw(net, 4), [net.weight(4, 4, 1, 1), net.weight(4)]
    y = net.input([2, 4, 4, 4])
    y = y if forward else net.node("Conv", y, *w)
    y = map_.norm(net, y) if forward != careless else y
    y, indices = net.node("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2], outputs=2)
    y = y if forward != careless else map_.norm(net, y)
    net.output(net.node("Conv", y, *w) if forward else y)
    net.output(indices, dtype=np.int64)
    return net.model()


def cases() -> Iterator[Case]:
    averages: dict[str, Layer] = {
        "average": layer("AveragePool", kernel_shape=[2, 3], strides=[1, 2]),
        "average-uncounted": layer("AveragePool", **UNCOUNTED),
        "average-counts-nothing": layer("AveragePool", kernel_shape=[2, 2], count_include_pad=1),
        "average-same": layer("AveragePool", kernel_shape=[3, 3], auto_pad="SAME_UPPER"),
        "average-ceil": layer("AveragePool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    }
    for name, each in averages.items():
        yield from passes(name, "average_pool", each, "AveragePool")
    counted = layer("AveragePool", **COUNTED)
    yield from passes("average-counted-scale", "average_pool", counted, "AveragePool", only="scale")
    yield from passes("global-average", "global_average_pool", layer("GlobalAveragePool"), "GlobalAveragePool")
    yield from passes("mean", "reduce_mean", _mean(-1, 2), "ReduceMean", opset=18)
    yield from passes("mean-of-samples", "reduce_mean", _mean(0), "ReduceMean", opset=18)
    yield from passes("mean-axes-attribute", "reduce_mean", layer("ReduceMean", axes=[2]), "ReduceMean")
    dropped = _mean(0, 3, keep=0)
    yield from passes("mean-without-axes", "reduce_mean", dropped, "ReduceMean", "Unsqueeze", opset=18)
    yield Case("mean-flat", "reduce_mean", lambda: _flat_mean(False), ("Conv", "ReduceMean"))
    yield Case("mean-flat-forward", "reduce_mean", lambda: _flat_mean(True), ("Gemm", "ReduceMean"), FORWARD)
    tokens = ("Gemm", "ReduceMean", "Transpose")
    yield Case("mean-of-tokens", "reduce_mean", _tokens_mean, tokens, FORWARD)
    largest = layer("MaxPool", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1])
    yield from passes("max", "max_pool", largest, "MaxPool", positive=True)
    yield from passes("max-shift", "max_pool", largest, "MaxPool", only="shift")
    yield from _paddings()
    resizes: dict[str, Layer] = {
        "nearest": _resize(scales=(1, 1, 2, 2)),
        "linear": _resize(scales=(1, 1, 2, 1.5), mode="linear"),
        "cubic": _resize(scales=(1, 1, 2, 2), mode="cubic", exclude_outside=1),
        "smaller": _resize(sizes=(2, 4, 3, 5), mode="linear", coordinate_transformation_mode="asymmetric"),
    }
    for name, each in resizes.items():
        yield from passes(f"resize-{name}", "resize", each, "Resize")
    another = ("Resize", "Relu", "Shape")
    yield from passes("resize-to-the-size-of-another", "resize", _to_the_size_of_another, *another)


def _paddings() -> Iterator[Case]:
    for mode in ("reflect", "edge", "wrap"):
        each = _pad(0, 0, 1, 2, 0, 0, 0, 1, mode=mode)
        yield from passes(f"pad-{mode}", "pad", each, "Pad", opset=19)
    # c = 0 becomes t, which is one number for all channels; forward −t/s, where s is one number, too
    zeros = _pad(0, 0, 1, 0, 0, 0, 2, 1)
    yield Case("pad-zeros-refilled", "pad", lambda: around(zeros, BACKWARD, level=True), ("Conv", "Pad"))
    yield from passes("pad-zeros-scale", "pad", zeros, "Pad", only="scale")
    one = {"shape": (2, 1, 6, 6)}
    for direction in DIRECTIONS:
        build = lambda d=direction: _pad_before_opset_11(d)  # noqa: E731
        yield Case(f"pad-opset-10-{direction}", "pad", build, ("Conv", "Pad"), direction)
    for name, each, opset in (
        ("zeros", zeros, 17),
        ("value", _pad(0, 0, 1, 0, 0, 0, 2, 1, value=-0.75), 17),
        ("axes", _pad(1, 2, 0, 1, value=0.5, axes=(-1, 2)), 18),
    ):
        yield from passes(f"pad-{name}-one-channel", "pad", each, "Pad", opset=opset, **one)


def violations() -> Iterator[Violation]:
    counted = layer("AveragePool", **COUNTED)
    yield from stops("average-counted", "average_pool", "padded_shift", counted, only="shift")
    square = {"shape": (2, 4, 4, 4)}
    windows = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    turned = {
        "average_pool": layer("AveragePool", **windows),
        "max_pool": layer("MaxPool", **windows),
        "resize": in_turn(_resize(scales=(1, 1, 2, 1), mode="linear"), layer("Slice", [0], [8], [2], [2])),
    }
    for kind, each in turned.items():
        options = {"positive": kind == "max_pool", **square}
        yield from stops(
            f"{kind}-over-channels", kind, "axis_mismatch", in_turn(TURNED, each, TURNED), **options
        )
    # what a global average or a mean leaves of the channels is spread over as many again
    spread = layer("Expand", [1, 4, 1, 1])
    turned_average = in_turn(TURNED, layer("GlobalAveragePool"), TURNED, spread)
    for direction in DIRECTIONS:
        yield Violation(
            f"global-average-over-channels-{direction}",
            "global_average_pool",
            "axis_mismatch",
            lambda d=direction: around(turned_average, d, **square),
            lambda d=direction: around(turned_average, d, swapped=True, **square),
            direction,
        )
        mean = in_turn(_mean(1, 2), spread)
        yield Violation(
            f"mean-over-channels-{direction}",
            "reduce_mean",
            "axis_mismatch",
            lambda d=direction, m=mean: around(m, d, opset=18, **square),
            lambda d=direction, m=mean: around(m, d, opset=18, swapped=True, **square),
            direction,
        )
    yield from stops("max-negative", "max_pool", "negative_scale", layer("MaxPool", kernel_shape=[2, 2]))
    for forward in (False, True):
        yield Violation(
            f"max-with-indices-{'forward' if forward else 'backward'}",
            "max_pool",
            "multiple_readers",
            lambda f=forward: _max_with_indices(f),
            lambda f=forward: _max_with_indices(f, careless=True),
            FORWARD if forward else BACKWARD,
        )
    border = _pad(0, 0, 1, 0, 0, 0, 2, 1)
    yield from stops("pad-shift-per-channel", "pad", "padded_shift", border, only="shift")
    filled = _pad(0, 0, 1, 0, 0, 0, 2, 1, value=1.5)
    yield from stops("pad-value-per-channel", "pad", "padded_shift", filled)
    for direction in DIRECTIONS:
        yield Violation(
            f"pad-value-kept-{direction}",
            "pad",
            "",
            lambda d=direction: around(filled, d, shape=(2, 1, 6, 6)),
            lambda d=direction: around(filled, d, swapped=True, shape=(2, 1, 6, 6)),
            direction,
            ("Conv", "Pad"),
        )
    old = {"opset": 10, "shape": (2, 1, 6, 6)}
    attribute = layer("Pad", pads=[0, 0, 1, 0, 0, 0, 2, 1], value=0.25)
    yield from stops("pad-opset-10-in-float32", "pad", "padded_shift", attribute, **old)
    told = _pad(0, 0, 1, 0, 0, 0, 2, 1, computed=True)
    yield from stops("pad-value-computed", "pad", "dynamic_weight", told, only="shift")
    shifted = in_turn(_pad(0, 1, 0, 0, 0, 0, 0, 0, mode="reflect"), layer("Slice", [0], [4], [1]))
    yield from stops("pad-channels", "pad", "axis_mismatch", shifted)
    for only in ("", "scale"):
        yield from stops(
            f"resize-cropped{'-' * bool(only)}{only}", "resize", "padded_shift", _cropped, only=only
        )
