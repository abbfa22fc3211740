"""What the operators mean, in float64 numpy.

This is the yardstick of the site proof, written from the operators' definitions (onnx.ai/onnx/operators)
and sharing nothing with the rules that it judges. Weights are read a block of rows at a time, so a
layer of any size is evaluated within a few megabytes.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from normtool.values import Array, Rounded, Scaled, Value, element_count, row_blocks, widened

Attributes = Mapping[str, Any]
Operands = Mapping[str, Value]


def evaluate(kind: str, attributes: Attributes, x: Array, operands: Operands, slot: str) -> Array:
    """The op's output in float64, with `x` standing at `slot` and constants at the other slots.

    Raises KeyError for a kind without a definition here.
    """
    with np.errstate(all="ignore"):
        return _DEFINITIONS[kind](attributes, x, operands, slot)


def wide_rows(value: Value, start: int, stop: int) -> Array:
    """Rows in float64; what a plan is about to write comes before its rounding."""
    rows = value.exact_rows if isinstance(value, Scaled | Rounded) else value.rows
    return widened(rows(start, stop), np.float64)


def wide(value: Value) -> Array:
    return wide_rows(value, 0, value.shape[0] if value.shape else 1)


# ---- convolution ------------------------------------------------------------------------------


def _spatial(attributes: Attributes, name: str, rank: int, default: int) -> list[int]:
    return [int(n) for n in attributes.get(name) or [default] * rank]


def _conv_pads(attributes: Attributes, size: list[int], kernel: list[int]) -> list[int]:
    """Begin and end padding of each spatial axis, `auto_pad` worked out."""
    rank = len(kernel)
    auto = attributes.get("auto_pad", "NOTSET")
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        return [0] * 2 * rank if auto == "VALID" else _spatial(attributes, "pads", 2 * rank, 0)
    begins, ends = [], []
    for length, extent, stride in zip(size, kernel, _spatial(attributes, "strides", rank, 1), strict=True):
        total = max(0, (-(-length // stride) - 1) * stride + extent - length)
        small, large = total // 2, total - total // 2
        begins.append(small if auto == "SAME_UPPER" else large)
        ends.append(large if auto == "SAME_UPPER" else small)
    return begins + ends


def _conv(attributes: Attributes, x: Array, operands: Operands, slot: str) -> Array:
    """x (N, Cin, *S) ⋆ weight (Cout, Cin/g, *K) + bias (Cout): a correlation, zero padded."""
    weight = operands["weight"]
    groups, rank = int(attributes.get("group", 1)), x.ndim - 2
    dilations = _spatial(attributes, "dilations", rank, 1)
    strides = _spatial(attributes, "strides", rank, 1)
    extents = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    pads = _conv_pads(attributes, list(x.shape[2:]), extents)
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, extents, axis=tuple(range(2, 2 + rank)))
    steps = [slice(None, None, s) for s in strides] + [slice(None, None, d) for d in dilations]
    windows = windows[(slice(None), slice(None), *steps)]
    batch, out_spatial = x.shape[0], windows.shape[2 : 2 + rank]
    # (g, Cin/g · K, N · O): one column per output position
    columns = np.moveaxis(windows, (0, *range(2, 2 + rank)), range(-1 - rank, 0))
    columns = columns.reshape(groups, -1, batch * element_count(out_spatial))
    flat = np.empty((weight.shape[0], columns.shape[2]))
    for start, stop, rows in _group_rows(weight, groups):
        first = start * groups // weight.shape[0]
        part = np.matmul(rows, columns[first : first + rows.shape[0]])
        flat[start:stop] = part.reshape(stop - start, -1)
    y = np.moveaxis(flat.reshape(weight.shape[0], batch, *out_spatial), 0, 1)
    return _plus_channels(y, operands.get("bias"))


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


def _conv_transpose(attributes: Attributes, x: Array, operands: Operands, slot: str) -> Array:
    """x (N, Cin, *S), weight (Cin, Cout/g, *K): every input position adds a scaled kernel to the output."""
    weight = operands["weight"]
    groups, rank = int(attributes.get("group", 1)), x.ndim - 2
    kernel, per_group = weight.shape[2:], weight.shape[0] // groups
    dilations = _spatial(attributes, "dilations", rank, 1)
    strides = _spatial(attributes, "strides", rank, 1)
    extra = _spatial(attributes, "output_padding", rank, 0)
    size = list(x.shape[2:])
    full = [
        (n - 1) * s + (k - 1) * d + 1 + e
        for n, s, k, d, e in zip(size, strides, kernel, dilations, extra, strict=True)
    ]
    channels = weight.shape[1] * groups
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
        target = tuple(
            slice(o * d, o * d + (n - 1) * s + 1, s)
            for o, d, n, s in zip(offset, dilations, size, strides, strict=True)
        )
        y[(slice(None), slice(None), *target)] += patches[(slice(None), *offset)]
    y = _crop(np.moveaxis(y, 0, 1), attributes, size, strides)
    return _plus_channels(y, operands.get("bias"))


def _crop(y: Array, attributes: Attributes, size: list[int], strides: list[int]) -> Array:
    """Cut a transposed convolution to its padding, `auto_pad` or `output_shape`."""
    rank, full = len(size), list(y.shape[2:])
    auto, wanted = attributes.get("auto_pad", "NOTSET"), attributes.get("output_shape")
    if wanted is None and auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [n * s for n, s in zip(size, strides, strict=True)]
    if wanted is None:
        pads = [0] * 2 * rank if auto == "VALID" else _spatial(attributes, "pads", 2 * rank, 0)
        begins, ends = pads[:rank], pads[rank:]
    else:
        totals = [max(0, f - int(w)) for f, w in zip(full, list(wanted)[-rank:], strict=True)]
        halves = [total // 2 for total in totals]
        others = [total - half for total, half in zip(totals, halves, strict=True)]
        begins, ends = (halves, others) if auto == "SAME_UPPER" else (others, halves)
    cuts = [slice(b, f - e) for b, f, e in zip(begins, full, ends, strict=True)]
    return y[(slice(None), slice(None), *cuts)]


def _plus_channels(y: Array, bias: Value | None) -> Array:
    if bias is None:
        return y
    return y + wide(bias).reshape(-1, *[1] * (y.ndim - 2))


# ---- matrix products --------------------------------------------------------------------------


def _linear(attributes: Attributes, x: Array, operands: Operands, slot: str) -> Array:
    """alpha · A' · B' + beta · C."""
    a = x.T if attributes.get("transA", 0) else x
    b = wide(operands["b"])
    y: Array = attributes.get("alpha", 1.0) * (a @ (b.T if attributes.get("transB", 0) else b))
    if "c" in operands:
        y = y + attributes.get("beta", 1.0) * wide(operands["c"])
    return y


def _matmul(attributes: Attributes, x: Array, operands: Operands, slot: str) -> Array:
    return x @ wide(operands["b"]) if slot == "a" else wide(operands["a"]) @ x


# ---- affine maps ------------------------------------------------------------------------------


def _batch_norm(attributes: Attributes, x: Array, operands: Operands, slot: str) -> Array:
    """(x − μ)/√(σ² + ε) · γ + β, in the order of the definition and not as s·x + t."""
    c = {name: wide(value).reshape(-1, *[1] * (x.ndim - 2)) for name, value in operands.items()}
    normal = (x - c["mean"]) / np.sqrt(c["var"] + attributes["epsilon"])
    return np.asarray(normal * c.get("weight", 1.0) + c.get("bias", 0.0))


def _binary(function: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    def define(attributes: Attributes, x: Array, operands: Operands, slot: str) -> Array:
        other = wide(operands["b" if slot == "a" else "a"])
        return function(x, other) if slot == "a" else function(other, x)

    return define


_DEFINITIONS: Mapping[str, Callable[[Attributes, Array, Operands, str], Array]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "linear": _linear,
    "matmul": _matmul,
    "batch_norm": _batch_norm,
    "add": _binary(np.add),
    "sub": _binary(np.subtract),
    "mul": _binary(np.multiply),
    "div": _binary(np.divide),
}
