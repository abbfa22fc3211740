"""Operators that move, repeat, pick or interpolate numbers along the axes of a tensor."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from normtool.semantics_call import Call, wide_rows
from normtool.values import Array, element_count, row_blocks

# ---- another shape ----------------------------------------------------------------------------


def transpose(call: Call) -> Array:
    return call.array("x").transpose(call.integers("perm"))


def reshape(call: Call) -> Array:
    """A length of 0 is the input's own, unless `allowzero`; -1 is what remains."""
    x, shape = call.array("x"), call.integers("shape") or []
    keep = not call.attribute("allowzero", 0)
    return x.reshape([x.shape[i] if n == 0 and keep else n for i, n in enumerate(shape)])


def flatten(call: Call) -> Array:
    """ONNX: two axes, cut before `axis`. PyTorch, with `start_dim`: the axes up to `end_dim` are one."""
    x, start = call.array("x"), call.attribute("start_dim")
    if start is None:
        axis = int(call.attribute("axis", 1))
        axis += x.ndim if axis < 0 else 0
        return x.reshape(element_count(x.shape[:axis]), element_count(x.shape[axis:]))
    if x.ndim == 0:
        return x.reshape(1)
    start, stop = start % x.ndim, call.attribute("end_dim", -1) % x.ndim + 1
    return x.reshape(*x.shape[:start], element_count(x.shape[start:stop]), *x.shape[stop:])


def squeeze(call: Call) -> Array:
    """PyTorch leaves a listed axis of another length alone, ONNX knows no such model."""
    x, axes = call.array("x"), call.integers("axes")
    listed = range(x.ndim) if axes is None else [axis % x.ndim for axis in axes]
    return np.squeeze(x, tuple(axis for axis in listed if x.shape[axis] == 1))


def unsqueeze(call: Call) -> Array:
    return np.expand_dims(call.array("x"), tuple(call.integers("axes") or []))


def expand(call: Call) -> Array:
    """Both shapes are broadcast against each other; PyTorch's -1 keeps a length, as ONNX's 1 does."""
    x = call.array("x")
    shape = [1 if n == -1 else n for n in call.integers("shape") or []]
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(shape)))


# ---- parts of tensors -------------------------------------------------------------------------


def concat(call: Call) -> Array:
    return np.concatenate(call.listed("inputs"), axis=int(call.attribute("axis", 0)))


def split(call: Call) -> list[Array]:
    """Parts of these lengths, or `num_outputs` equal ones, of which the last may be shorter."""
    x, axis, lengths = call.array("x"), int(call.attribute("axis", 0)), call.integers("split")
    if lengths is None:
        part = -(-x.shape[axis] // int(call.attribute("num_outputs")))
        return np.split(x, range(part, x.shape[axis], part), axis)
    return np.split(x, np.cumsum(lengths)[:-1], axis)


def slice_(call: Call) -> Array:
    """Python's slices are ONNX's, clamping and negative steps included."""
    x, starts, ends = call.array("x"), call.integers("starts") or [], call.integers("ends") or []
    axes = call.integers("axes") or range(len(starts))
    steps = call.integers("steps") or [1] * len(starts)
    cuts = [slice(None)] * x.ndim
    for axis, *bounds in zip(axes, starts, ends, steps, strict=True):
        cuts[axis] = slice(*bounds)
    return x[tuple(cuts)]


def select(call: Call) -> Array:
    """One index of an axis, which is lost."""
    return np.asarray(call.array("x").take(int(call.attribute("index")), int(call.attribute("axis"))))


def embedding(call: Call) -> Array:
    """Gather: the entries of `table` along `axis` at `indices`. Of a table only the blocks used are read."""
    table, indices = call.value("table"), call.array("indices").astype(np.int64)
    axis = int(call.attribute("axis", 0)) % len(table.shape)
    if axis:
        return call.array("table").take(indices, axis)
    rows = table.shape[0]
    if (indices < -rows).any() or (indices >= rows).any():
        raise IndexError(f"indices beyond the {rows} rows of the table")
    indices = indices % rows
    y = np.empty((*indices.shape, *table.shape[1:]))
    for start, stop in row_blocks(table):
        here = (start <= indices) & (indices < stop)
        if here.any():
            y[here] = wide_rows(table, start, stop)[indices[here] - start]
    return y


def gather_nd(call: Call) -> Array:
    """Each row of `indices` is a position among the leading axes of x, behind `batch_dims` axes they share."""
    if call.attribute("batch_dims", 0):
        raise NotImplementedError("gather_nd with batch_dims")
    x, indices = call.array("x"), call.array("indices").astype(np.int64)
    return np.asarray(x[tuple(np.moveaxis(indices, -1, 0))])


def index(call: Call) -> Array:
    """PyTorch's x[:, i]: one tensor of indices, at the axis that its slot `indices.N` names."""
    (slot,) = (each for each in call.inputs if each.startswith("indices."))
    return call.array("x").take(call.array(slot).astype(np.int64), int(slot.rpartition(".")[2]))


def tile(call: Call) -> Array:
    return np.tile(call.array("x"), call.integers("repeats") or [])


def pad(call: Call) -> Array:
    """`pads` are the begins of all axes, then the ends; a negative one crops."""
    x, pads = call.array("x"), call.integers("pads") or []
    axes = call.integers("axes") or range(len(pads) // 2)
    before, after = [0] * x.ndim, [0] * x.ndim
    for axis, begin, end in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        before[axis], after[axis] = begin, end
    x = x[tuple(slice(max(0, -b), n - max(0, -a)) for n, b, a in zip(x.shape, before, after, strict=True))]
    widths = [(max(0, b), max(0, a)) for b, a in zip(before, after, strict=True)]
    mode: Any = call.attribute("mode", "constant")
    if mode == "constant":
        fill = call.numbers("value") or [0.0]
        return np.pad(x, widths, constant_values=fill[0])
    return np.pad(x, widths, mode=mode)


# ---- interpolation ----------------------------------------------------------------------------


def resize(call: Call) -> Array:
    """Resize from opset 11 on, one axis after the other: interpolation is separable.

    Raises NotImplementedError for antialias, tf_crop_and_resize and kept aspect ratios.
    """
    _refuse(call, "antialias", 0)
    _refuse(call, "keep_aspect_ratio_policy", "stretch")
    x = call.array("x")
    axes = call.integers("axes") or range(x.ndim)
    scales, sizes = call.numbers("scales") or [], call.integers("sizes") or []
    for axis, wanted in zip(axes, sizes or scales, strict=True):
        length = x.shape[axis]
        # a scale is a float32, and so is what shape inference and runtimes multiply it to
        size = wanted if sizes else int(np.float32(length) * np.float32(wanted))
        x = _resize_axis(call, x, axis, size, size / length if sizes else wanted)
    return x


def upsample(call: Call) -> Array:
    """Upsample, and Resize at opset 10: they know one way to transform coordinates."""
    old = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return resize(replace(call, attributes={**old, **call.attributes}))


def _refuse(call: Call, name: str, known: Any) -> None:
    if call.attribute(name, known) != known:
        raise NotImplementedError(f"resize with {name} = {call.attribute(name)!r}")


def _resize_axis(call: Call, x: Array, axis: int, size: int, scale: float) -> Array:
    length = x.shape[axis]
    if scale == 1:
        return x
    mode = call.attribute("mode", "nearest")
    position = _original_position(call, length, size, scale)
    if mode == "nearest":
        taps = _NEAREST[call.attribute("nearest_mode", "round_prefer_floor")](position)
        return x.take(taps.astype(int).clip(0, length - 1), axis)
    weights = _taps(call, mode, position, length)
    return np.moveaxis(np.moveaxis(x, axis, -1) @ weights.T, -1, axis)


def _original_position(call: Call, length: int, size: int, scale: float) -> Array:
    """x_original of every x_resized."""
    mode, x = call.attribute("coordinate_transformation_mode", "half_pixel"), np.arange(size, dtype=float)
    half_pixel = (x + 0.5) / scale - 0.5
    match mode:
        case "half_pixel":
            return half_pixel
        case "half_pixel_symmetric":
            return half_pixel + length / 2 * (1 - size / (scale * length))
        case "pytorch_half_pixel":
            return half_pixel if size > 1 else x
        case "align_corners":
            return x * ((length - 1) / (size - 1)) if size > 1 else x
        case "asymmetric":
            return x / scale
    raise NotImplementedError(f"resize with coordinate_transformation_mode = {mode!r}")


_NEAREST: Mapping[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda position: np.ceil(position - 0.5),
    "round_prefer_ceil": lambda position: np.floor(position + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _taps(call: Call, mode: str, position: Array, length: int) -> Array:
    """(size, length): how much each number of the input weighs in each of the output."""
    reach = {"linear": 1, "cubic": 2}[mode]
    taps = np.floor(position).astype(int)[:, None] + np.arange(1 - reach, 1 + reach)
    distance = np.abs(position[:, None] - taps)
    weights = 1 - distance if mode == "linear" else _cubic(distance, call.attribute("cubic_coeff_a", -0.75))
    if call.attribute("exclude_outside", 0):
        weights = np.where((taps >= 0) & (taps < length), weights, 0.0)
        weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((len(position), length))
    np.add.at(matrix, (np.arange(len(position))[:, None], taps.clip(0, length - 1)), weights)
    return matrix


def _cubic(distance: Array, a: float) -> Array:
    """Keys, "Cubic convolution interpolation" (1981), equation (4), for distances up to 2."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, far)
