"""Where a mean is taken: a block of numbers within consecutive axes of a tensor.

A LayerNorm takes the mean of a whole axis, one per head that of every m-th part of it. So a place names axes,
and how their numbers, row by row, fall into blocks. It is followed by identity through whatever only moves
numbers: each number is given a label, its position in its block; the labels travel by the rules that affine
maps travel by; and at the other end they must form blocks again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from normtool.affine import Affine
from normtool.graph import Shape, Tensor
from normtool.values import EXTENDED, Array

#: Labels begin here: 0 and 1 are what rules put where they have nothing to say.
_FIRST = 2

#: Labels are not written out over more elements than this.
_MOST_LABELS = 1 << 20


@dataclass(frozen=True)
class Place:
    """Axes `start`, …, `stop - 1` of a tensor, whose numbers are seen as (outer, block, inner).

    The mean is over `block`, one for each of the outer · inner others (and of every other axis).
    """

    start: int
    stop: int
    outer: int
    block: int
    inner: int

    @property
    def is_one_axis(self) -> bool:
        """Is the block one axis as a whole?"""
        return self.stop - self.start == 1 and self.outer == self.inner == 1

    def moved(self, by: int) -> "Place":
        """The same on axes further back, or (negative) further to the front."""
        return replace(self, start=self.start + by, stop=self.stop + by)

    def apart(self, shape: Sequence[int]) -> tuple[int, ...]:
        """`shape` with the place's axes seen as (outer, block, inner)."""
        return (*shape[: self.start], self.outer, self.block, self.inner, *shape[self.stop :])

    def mean(self, x: Array) -> Array:
        """The means, laid out to be subtracted from `x.reshape(self.apart(x.shape))`."""
        return np.asarray(x.reshape(self.apart(x.shape)).mean(axis=self.start + 1, keepdims=True))

    def centred(self, x: Array) -> Array:
        """x − mean(x), P·x in the algebra."""
        return (x.reshape(self.apart(x.shape)) - self.mean(x)).reshape(x.shape)

    def labels(self, shape: Shape) -> Affine | None:
        """A map that gives every number of a block a scale of its own; None where a length is unknown."""
        lengths = known_lengths(shape[self.start : self.stop])
        size = self.outer * self.block * self.inner
        if lengths is None or math.prod(lengths) != size or size > _MOST_LABELS:
            return None
        s = self._pattern().reshape(lengths)
        return Affine(self.start, s, np.zeros_like(s))

    def _pattern(self) -> Array:
        positions = np.arange(_FIRST, _FIRST + self.block, dtype=EXTENDED)
        return np.tile(np.repeat(positions, self.inner), self.outer)


def whole(tensor: Tensor, axes: Sequence[int]) -> Place | None:
    """The place of a norm over these axes of a tensor; None where they are not consecutive, or a length is
    unknown."""
    if tensor.shape is None or not axes:
        return None
    own = sorted(axis % len(tensor.shape) for axis in axes)
    lengths = known_lengths(tensor.shape[own[0] : own[-1] + 1])
    if own != list(range(own[0], own[-1] + 1)) or lengths is None:
        return None
    return Place(own[0], own[-1] + 1, 1, math.prod(lengths), 1)


def from_labels(affine: Affine, shape: Shape | None) -> Place | None:
    """The place whose labels a map carries, if they still form blocks."""
    s = affine.s
    if shape is None or affine.axes.stop > len(shape):
        return None
    lengths = known_lengths(shape[affine.axis : affine.axes.stop])
    if lengths is None or math.prod(lengths) > _MOST_LABELS:
        return None
    labels = np.broadcast_to(s, lengths).reshape(-1)
    block = int(labels.max()) - _FIRST + 1
    inner = int(np.argmax(labels != labels[0])) or labels.size
    if block < 2 or labels.size % (block * inner):
        return None
    place = Place(affine.axis, affine.axes.stop, labels.size // (block * inner), block, inner)
    return place if np.array_equal(labels, place._pattern()) else None


def known_lengths(shape: Shape) -> tuple[int, ...] | None:
    lengths = tuple(n for n in shape if isinstance(n, int))
    return lengths if len(lengths) == len(shape) else None


def of_operand(place: Place, rank: int, operand: Shape | None) -> Place | str | None:
    """A place of a tensor with `rank` axes as one of an operand that is broadcast to it.

    None: the operand has one number for the whole block, so all it adds is a uniform shift. A string says why
    it is neither.
    """
    if operand is None:
        return "its shape is unknown"
    by = len(operand) - rank
    own = [operand[axis + by] if axis + by >= 0 else 1 for axis in range(place.start, place.stop)]
    if all(n == 1 for n in own):
        return None
    lengths = known_lengths(tuple(own))
    if lengths is None:
        return "its lengths are unknown"
    if math.prod(lengths) != place.outer * place.block * place.inner or place.start + by < 0:
        return "it is spread over a part of the block"
    return place.moved(by)
