"""Numbers that are loaded when somebody needs them.

A `Value` is a tensor's content: its shape and dtype are known at once, its numbers come in slices of
axis 0, so that a model of any size is rewritten, proved and written within a few megabytes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: The precision of per-channel algebra: 64 bits of mantissa on x86, never less than float64.
EXTENDED = np.longdouble

#: Elements per block. 32 Ki float64 are 256 KiB: a few of them stay in a core's own cache, the allocator keeps
#: them for the next block (with 2 MiB, half of the proof's system time was page faults), and BLAS starts no
#: threads for their products, which would wait for each other wherever others use the machine.
BLOCK = 1 << 15


class Value(Protocol):
    """A tensor's content, sliced along axis 0 (a scalar is one row)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def rows(self, start: int, stop: int) -> Array:
        """Rows `start..stop` in the value's own dtype; a scalar comes back as shape `()`."""
        ...


@dataclass(frozen=True, eq=False)
class Dense:
    """A value held in memory."""

    content: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.content.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.content.dtype

    def rows(self, start: int, stop: int) -> Array:
        return self.content[start:stop] if self.content.ndim else self.content


@dataclass(frozen=True, eq=False)
class Scaled:
    """`source · factor`, the shape of nearly every fold: multiplied wide, rounded once.

    `factor` has the rank of `source` and broadcasts against it.
    """

    source: Value
    factor: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.source.dtype

    def exact_rows(self, start: int, stop: int) -> Array:
        """The product before it is rounded to the destination dtype."""
        factor = self.factor
        if factor.ndim and factor.shape[0] != 1:
            factor = factor[start:stop]
        wide = working_dtype(self.dtype)
        product = widened(exact_rows(self.source, start, stop), wide)
        with np.errstate(all="ignore"):
            product *= factor.astype(wide)
        return product

    def rows(self, start: int, stop: int) -> Array:
        return round_to(self.exact_rows(start, stop), self.dtype)


@dataclass(frozen=True, eq=False)
class Rounded:
    """An exact array on its way into `dtype`; small enough (a bias) to be held whole."""

    exact: Array
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.exact.shape)

    def exact_rows(self, start: int, stop: int) -> Array:
        return self.exact[start:stop] if self.exact.ndim else self.exact

    def rows(self, start: int, stop: int) -> Array:
        return round_to(self.exact_rows(start, stop), self.dtype)


@dataclass(frozen=True, eq=False)
class Computed:
    """Like `Rounded`, for numbers that are worth computing only if somebody asks (a sum over a whole
    weight)."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    compute: Callable[[], Array]

    @cached_property
    def exact(self) -> Array:
        return np.broadcast_to(self.compute(), self.shape)

    def exact_rows(self, start: int, stop: int) -> Array:
        return self.exact[start:stop] if self.exact.ndim else self.exact

    def rows(self, start: int, stop: int) -> Array:
        return round_to(self.exact_rows(start, stop), self.dtype)


def exact_rows(value: Value, start: int, stop: int) -> Array:
    """Rows before their rounding, of what a plan is about to write; of anything else its rows."""
    exact: Callable[[int, int], Array] = getattr(value, "exact_rows", value.rows)
    return exact(start, stop)


def exact_array(value: Value) -> Array:
    """The whole content before its rounding, in extended precision."""
    return widened(exact_rows(value, 0, value.shape[0] if value.shape else 1))


def widened(array: Array, dtype: np.dtype[Any] | type = EXTENDED) -> Array:
    """The same numbers in a wider dtype, by way of float64 (ml_dtypes knows no other).

    Weights that are no numbers (infinities, a signalling NaN) are judged by whoever asked, not warned about.
    """
    with np.errstate(invalid="ignore"):
        if array.dtype == EXTENDED:
            return np.array(array, dtype)
        return np.asarray(array.astype(np.float64).astype(dtype, copy=False))


def working_dtype(destination: np.dtype[Any]) -> np.dtype[Any]:
    """What products are formed in: float64, or wider where float64 is itself the destination."""
    return np.dtype(EXTENDED if destination == np.float64 else np.float64)


def round_to(wide: Array, dtype: np.dtype[Any]) -> Array:
    """The one rounding. Overflow to infinity is judged by whoever asked, not warned about here."""
    with np.errstate(over="ignore", under="ignore"):
        if dtype.itemsize < 4 and is_float(dtype):
            return np.asarray(_odd_float32(wide).astype(dtype))
        return np.asarray(wide.astype(dtype))


def _odd_float32(wide: Array) -> Array:
    """Round to odd, so that the way to a half type through float32 does not round twice.

    ml_dtypes takes that way to bfloat16, numpy takes it from long double to float16.
    Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums" (2008), theorem 3.
    """
    single = np.asarray(wide.astype(np.float32))
    bits = single.view(np.uint32)
    inexact = np.isfinite(single) & (single.astype(wide.dtype) != wide)
    away = inexact & (np.abs(single.astype(wide.dtype)) > np.abs(wide))
    odd = (bits - away.astype(np.uint32)) | inexact.astype(np.uint32)
    return np.asarray(odd.view(np.float32))


def element_count(shape: tuple[int, ...]) -> int:
    """Elements of a tensor of this shape (exact: Python integers do not overflow)."""
    count = 1
    for length in shape:
        count *= length
    return count


def byte_count(value: Value) -> int:
    return (element_count(value.shape) * bits_per_element(value.dtype) + 7) // 8


def bits_per_element(dtype: np.dtype[Any]) -> int:
    """Stored bits: ONNX packs 4-bit and 2-bit types, ml_dtypes gives them a byte each in memory."""
    name = dtype.name
    if name.endswith(("int4", "float4_e2m1fn")):
        return 4
    if name.endswith("int2"):
        return 2
    return dtype.itemsize * 8


def is_float(dtype: np.dtype[Any]) -> bool:
    """True for IEEE floats and for bfloat16 and the float8 family of ml_dtypes."""
    return dtype.kind == "f" or "float" in dtype.name


def row_blocks(value: Value) -> Iterator[tuple[int, int]]:
    """Slices of axis 0 that cover the value, about `BLOCK` elements each (never less than a row)."""
    if not value.shape:
        yield 0, 1
        return
    rows = value.shape[0]
    per_row = max(1, element_count(value.shape[1:]))
    step = max(1, BLOCK // per_row)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def to_array(value: Value) -> Array:
    """The whole content, in its own dtype."""
    return value.rows(0, value.shape[0] if value.shape else 1)
