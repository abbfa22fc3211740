"""Constants that take a Centre in, computed block by block like every other value of a plan."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from normtool.centring.places import Place
from normtool.values import (
    Array,
    Value,
    element_count,
    exact_rows,
    round_to,
    row_blocks,
    widened,
    working_dtype,
)


class _Wide:
    """A value whose rows are computed wide and rounded once."""

    dtype: np.dtype[Any]

    def exact_rows(self, start: int, stop: int) -> Array:
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Array:
        return round_to(self.exact_rows(start, stop), self.dtype)


@dataclass(frozen=True, eq=False)
class _Changed(_Wide):
    """Other numbers in the shape and dtype of `source`."""

    source: Value

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> np.dtype[Any]:  # type: ignore[override]
        return self.source.dtype

    def _wide(self, start: int, stop: int) -> Array:
        return widened(exact_rows(self.source, start, stop), working_dtype(self.dtype))


@dataclass(frozen=True, eq=False)
class Centred(_Changed):
    """P·source: the mean over the place's block subtracted, in float64 at least, and rounded once."""

    place: Place

    def exact_rows(self, start: int, stop: int) -> Array:
        wide = self._wide(start, stop)
        if self.place.start > 0:
            return self.place.centred(wide)
        if self.place.stop > 1:  # the block lies across rows of several axes
            return self.place.centred(self._wide(0, self.shape[0]))[start:stop]
        return np.asarray(wide - self._means[self._groups(start, stop)])

    def _groups(self, start: int, stop: int) -> Array:
        """The mean that belongs to each row: rows are (outer, block, inner)."""
        rows = np.arange(start, stop)
        return np.asarray(
            rows // (self.place.block * self.place.inner) * self.place.inner + rows % self.place.inner
        )

    @cached_property
    def _means(self) -> Array:
        """The mean of the rows of each block, shape (outer · inner, …)."""
        count = self.place.outer * self.place.inner
        sums = np.zeros((count, *self.shape[1:]), working_dtype(self.dtype))
        for start, stop in row_blocks(self.source):
            np.add.at(sums, self._groups(start, stop), self._wide(start, stop))
        return np.asarray(sums / self.place.block)


@dataclass(frozen=True, eq=False)
class Zeros(_Wide):
    """What is left of a constant that is the same all over a block."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def exact_rows(self, start: int, stop: int) -> Array:
        return np.zeros((stop - start, *self.shape[1:]) if self.shape else ())


@dataclass(frozen=True, eq=False)
class RowWise(_Changed):
    """A table whose rows (numbers along its last axis) have gone through a function."""

    function: Callable[[Array], Array]

    def exact_rows(self, start: int, stop: int) -> Array:
        return self.function(self._wide(start, stop))


def zeros_like(value: Value) -> Zeros:
    return Zeros(value.shape, value.dtype)


def is_uniform(value: Value) -> bool:
    """One number all over? (Looked at only where a plan depends on it: a γ, never a matrix.)"""
    if element_count(value.shape) == 0:
        return True
    array = value.rows(0, value.shape[0] if value.shape else 1)
    return bool(np.all(array == array.reshape(-1)[0]))
