"""Convolutions and pooling: operators that look at windows of the spatial axes.

Weights are read a block of rows at a time, so a layer of any size is evaluated within a few megabytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from normtool.semantics_call import Call, wide_rows
from normtool.values import Array, Value, element_count, row_blocks

# ---- where windows lie ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Grid:
    """Windows over the spatial axes; every list has one number per axis.

    `beyond` is what the last window of ceil_mode reaches past the padding.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begins: list[int]
    ends: list[int]
    beyond: list[int]

    @property
    def extents(self) -> list[int]:
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]

    def padded(self, x: Array, fill: float = 0.0) -> Array:
        after = [end + over for end, over in zip(self.ends, self.beyond, strict=True)]
        if not any(self.begins) and not any(after):
            return x
        lead = x.shape[: x.ndim - len(self.kernel)]
        sizes = zip(self.begins, x.shape[len(lead) :], after, strict=True)
        padded = np.full((*lead, *(b + n + a for b, n, a in sizes)), fill)
        inner = zip(self.begins, x.shape[len(lead) :], strict=True)
        place: tuple[Any, ...] = (..., *(slice(b, b + n) for b, n in inner))
        padded[place] = x
        return padded

    def windows(self, padded: Array) -> Array:
        """A view (*lead, *output, *kernel) of what is padded already."""
        axes = tuple(range(-len(self.kernel), 0))
        view = np.lib.stride_tricks.sliding_window_view(padded, self.extents, axis=axes)
        steps = tuple(slice(None, None, step) for step in self.strides + self.dilations)
        return view[(..., *steps)]  # type: ignore[arg-type]


def _grid(call: Call, kernel: list[int], size: list[int]) -> _Grid:
    """The grid of a convolution or pooling, `auto_pad` worked out."""
    rank = len(kernel)
    zeros, dilations = [0] * rank, call.per_axis("dilations", rank, 1)
    strides = call.per_axis("strides", rank, 1)
    grid = _Grid(kernel, strides, dilations, zeros, zeros, zeros)
    auto = call.attribute("auto_pad", "NOTSET")
    if auto == "VALID":
        return grid
    if auto == "NOTSET":
        pads = call.per_axis("pads", 2 * rank, 0)
        return replace(grid, begins=pads[:rank], ends=pads[rank:])
    axes = zip(size, grid.extents, strides, strict=True)
    totals = [max(0, (-(-length // stride) - 1) * stride + extent - length) for length, extent, stride in axes]
    small = [total // 2 for total in totals]
    large = [total - half for total, half in zip(totals, small, strict=True)]
    if auto == "SAME_UPPER":
        return replace(grid, begins=small, ends=large)
    return replace(grid, begins=large, ends=small)


# ---- convolution ------------------------------------------------------------------------------


def conv(call: Call) -> Array:
    """x (N, Cin, *S) ⋆ weight (Cout, Cin/g, *K) + bias (Cout): a correlation, zero padded."""
    x, weight, groups = call.array("x"), call.value("weight"), int(call.attribute("group", 1))
    rank = len(weight.shape) - 2
    grid = _grid(call, list(weight.shape[2:]), list(x.shape[2:]))
    windows = grid.windows(grid.padded(x))
    batch, out_spatial = x.shape[0], windows.shape[2 : 2 + rank]
    # (N, Cin, *O, *K) → (g, Cin/g · K, N · O): one column per output position
    columns = windows.transpose(1, *range(2 + rank, 2 + 2 * rank), 0, *range(2, 2 + rank))
    columns = columns.reshape(groups, -1, batch * element_count(out_spatial))
    flat = np.empty((weight.shape[0], columns.shape[2]))
    for start, stop, rows in _group_rows(weight, groups):
        first = start * groups // weight.shape[0]
        part = np.matmul(rows, columns[first : first + rows.shape[0]])
        flat[start:stop] = part.reshape(stop - start, -1)
    y = flat.reshape(weight.shape[0], batch, *out_spatial).swapaxes(0, 1)
    return _plus_bias(call, y)


def _group_rows(weight: Value, groups: int) -> Iterator[tuple[int, int, Array]]:
    """Blocks of output channels as (groups in block, rows, Cin/g · K); none straddles a group border."""
    per_group = weight.shape[0] // groups
    for start, stop in row_blocks(weight):
        while start < stop:
            if start % per_group == 0 and stop - start >= per_group:
                end = start + (stop - start) // per_group * per_group
                blocks = (end - start) // per_group
            else:
                end, blocks = min(stop, (start // per_group + 1) * per_group), 1
            rows = wide_rows(weight, start, end)
            yield start, end, rows.reshape(blocks, (end - start) // blocks, -1)
            start = end


def conv_transpose(call: Call) -> Array:
    """x (N, Cin, *S), weight (Cin, Cout/g, *K): every input position adds a scaled kernel to the output."""
    x, weight, groups = call.array("x"), call.value("weight"), int(call.attribute("group", 1))
    kernel, per_group = weight.shape[2:], weight.shape[0] // groups
    rank, size, channels = len(kernel), list(x.shape[2:]), weight.shape[1] * groups
    dilations, strides = call.per_axis("dilations", rank, 1), call.per_axis("strides", rank, 1)
    extra = call.per_axis("output_padding", rank, 0)
    axes = zip(size, strides, kernel, dilations, extra, strict=True)
    full = [(n - 1) * s + (k - 1) * d + 1 + e for n, s, k, d, e in axes]
    positions = np.moveaxis(x, 0, 1).reshape(weight.shape[0], -1)
    columns = np.zeros((groups, element_count(weight.shape[1:]), positions.shape[1]))
    for start, stop in row_blocks(weight):
        rows = wide_rows(weight, start, stop).reshape(stop - start, -1)
        for group in range(start // per_group, (stop - 1) // per_group + 1):
            lo, hi = max(start, group * per_group), min(stop, (group + 1) * per_group)
            columns[group] += rows[lo - start : hi - start].T @ positions[lo:hi]
    patches = columns.reshape(channels, *kernel, x.shape[0], *size)
    y = np.zeros((channels, x.shape[0], *full))
    for offset in np.ndindex(*kernel):
        axes_of_tap = zip(offset, dilations, size, strides, strict=True)
        target = [slice(o * d, o * d + (n - 1) * s + 1, s) for o, d, n, s in axes_of_tap]
        y[(slice(None), slice(None), *target)] += patches[(slice(None), *offset)]
    return _plus_bias(call, _crop(call, np.moveaxis(y, 0, 1), size, strides))


def _crop(call: Call, y: Array, size: list[int], strides: list[int]) -> Array:
    """Cut a transposed convolution to its padding, `auto_pad` or `output_shape`."""
    rank, full = len(size), list(y.shape[2:])
    auto, wanted = call.attribute("auto_pad", "NOTSET"), call.integers("output_shape")
    if wanted is None and auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [n * s for n, s in zip(size, strides, strict=True)]
    if wanted is None:
        pads = [0] * 2 * rank if auto == "VALID" else call.per_axis("pads", 2 * rank, 0)
        begins, ends = pads[:rank], pads[rank:]
    else:
        totals = [max(0, f - w) for f, w in zip(full, wanted[-rank:], strict=True)]
        halves = [total // 2 for total in totals]
        others = [total - half for total, half in zip(totals, halves, strict=True)]
        begins, ends = (halves, others) if auto == "SAME_UPPER" else (others, halves)
    cuts = [slice(b, f - e) for b, f, e in zip(begins, full, ends, strict=True)]
    return y[(slice(None), slice(None), *cuts)]


def _plus_bias(call: Call, y: Array) -> Array:
    if "bias" not in call.inputs:
        return y
    return y + call.array("bias").reshape(-1, *[1] * (y.ndim - 2))


# ---- pooling ----------------------------------------------------------------------------------


def average_pool(call: Call) -> Array:
    """The mean of each window. What ceil_mode reaches beyond the padding is never counted."""
    x, grid = _pooling(call)
    taps = tuple(range(-len(grid.kernel), 0))
    sums: Array = grid.windows(grid.padded(x)).sum(axis=taps)
    if call.attribute("divisor_override"):
        return sums / float(call.attribute("divisor_override"))
    pads = list(zip(grid.begins, grid.ends, strict=True))
    counted = np.ones(x.shape[-len(pads) :])
    counted = np.pad(counted, pads, constant_values=float(call.attribute("count_include_pad", 0)))
    beyond = [(0, over) for over in grid.beyond]
    counts: Array = grid.windows(np.pad(counted, beyond)).sum(axis=taps)
    return sums / counts


def max_pool(call: Call) -> Array:
    x, grid = _pooling(call)
    largest: Array = grid.windows(grid.padded(x, -np.inf)).max(axis=tuple(range(-len(grid.kernel), 0)))
    return largest


def _pooling(call: Call) -> tuple[Array, _Grid]:
    """x and its windows. A stride that ONNX leaves out is 1; ATen's empty one is the kernel."""
    x, kernel = call.array("x"), call.integers("kernel_shape") or []
    size = list(x.shape[-len(kernel) :])
    if call.integers("strides") == []:
        call = replace(call, attributes={**call.attributes, "strides": kernel})
    grid = _grid(call, kernel, size)
    if not call.attribute("ceil_mode", 0) or call.attribute("auto_pad", "NOTSET") != "NOTSET":
        return x, grid
    axes = zip(size, grid.extents, grid.strides, grid.begins, grid.ends, strict=True)
    return x, replace(grid, beyond=[_reach(*axis) for axis in axes])


def _reach(length: int, extent: int, stride: int, begin: int, end: int) -> int:
    """How far ceil_mode reaches beyond the padding; no window may start in the padding at the end."""
    last = -(-(begin + length + end - extent) // stride) * stride
    if last >= begin + length:
        last -= stride
    return max(0, last + extent - (begin + length + end))


def global_average_pool(call: Call) -> Array:
    x = call.array("x")
    return np.asarray(x.mean(axis=tuple(range(2, x.ndim)), keepdims=True))


def adaptive_average_pool(call: Call) -> Array:
    """PyTorch's: output i is the mean over [⌊i·n/o⌋, ⌈(i+1)·n/o⌉). A size of None keeps the axis."""
    x, sizes = call.array("x"), list(call.attribute("output_size"))
    for axis, size in enumerate(sizes, x.ndim - len(sizes)):
        length = x.shape[axis]
        out = length if size is None else int(size)
        spans = [(i * length // out, -(-(i + 1) * length // out)) for i in range(out)]
        x = np.stack([x.take(range(*span), axis).mean(axis) for span in spans], axis)
    return x
