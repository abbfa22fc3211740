"""Axes followed by identity: through permutations, and through reshapes by what flat index they lead to.

Two row-major shapes of one tensor have a common *boundary* (p, q) where the first p lengths of one multiply to
the same number as the first q of the other; so do then the rest of both. What lies between two boundaries is
reshaped by itself. Equal lengths alone mean nothing: (8, 4) → (4, 8) has boundaries only at its ends.
"""

import math
import re
from collections import Counter

import numpy as np

from normtool.affine import Affine
from normtool.graph import Op, Shape
from normtool.travel import Stop, mismatch, stop
from normtool.values import Array

#: A map is not written out over more elements than this on its way through a reshape.
_MOST_ELEMENTS = 1 << 24

#: A product of lengths: its integer factor, and how often each symbol occurs.
_Product = tuple[int, frozenset[tuple[object, int]]]


def reshaped(op: Op, affine: Affine, source: Shape | None, target: Shape | None) -> Affine | Stop:
    """The map of a tensor of shape `source` as a map of the same numbers in shape `target`."""
    if affine.s.size == 1:
        return Affine(0, affine.s.reshape(1), affine.t.reshape(1))
    if source is None or target is None:
        return stop("axis_unknown", op, f"a shape at {op.name!r} is unknown")
    first, last = affine.axes[0], affine.axes[-1] + 1
    boundaries = _boundaries(source, target)
    starts = [(p, q) for p, q in boundaries if p <= first]
    start = max(starts)
    ends = [(p, q) for p, q in boundaries if p >= last and q >= start[1]]
    end = min(ends)
    before, after = source[start[0] : end[0]], target[start[1] : end[1]]
    if len(before) == len(after) == affine.s.ndim == 1:
        return affine.at(start[1])
    lengths = [n for n in (*before, *after) if isinstance(n, int)]
    if None in (*before, *after):
        return stop("axis_unknown", op, f"a length at {op.name!r} is unknown")
    if len(lengths) < len(before) + len(after):
        return mismatch(op, f"axis {affine.axis} does not survive {op.name!r} as a whole axis")
    if math.prod(lengths[: len(before)]) > _MOST_ELEMENTS:
        return mismatch(op, f"the map would have too many elements behind {op.name!r}")
    return _in_block(affine, start, tuple(lengths[: len(before)]), tuple(lengths[len(before) :]))


def _in_block(
    affine: Affine, start: tuple[int, int], before: tuple[int, ...], after: tuple[int, ...]
) -> Affine:
    """Write the map out over the axes that are reshaped together, reshape it, and take back what is
    constant."""
    own = (*[1] * (affine.axis - start[0]), *affine.shape)
    own = (*own, *[1] * (len(before) - len(own)))
    pair = [np.broadcast_to(each.reshape(own), before).reshape(after) for each in (affine.s, affine.t)]
    return trimmed(start[1], *pair)


def trimmed(axis: int, s: Array, t: Array) -> Affine:
    """The same map on the fewest axes: those at either end along which it does not vary are left out."""
    for each in range(s.ndim):
        head = (slice(None),) * each + (slice(0, 1),)
        if np.all(s == s[head]) and np.all(t == t[head]):
            s, t = s[head], t[head]
    while s.ndim > 1 and s.shape[0] == 1:
        s, t, axis = s[0], t[0], axis + 1
    while s.ndim > 1 and s.shape[-1] == 1:
        s, t = s[..., 0], t[..., 0]
    return Affine(axis, s, t)


def permuted(affine: Affine, order: list[int]) -> Affine:
    """The map of x as a map of x.transpose(order)."""
    s, t = affine.along(len(order))
    return trimmed(0, s.transpose(order), t.transpose(order))


def _boundaries(source: Shape, target: Shape) -> set[tuple[int, int]]:
    """All (p, q) at which both shapes are cut into the same two parts."""
    ends = {(0, 0), (len(source), len(target))}
    heads = _running(source), _running(target)
    tails = _running(source[::-1])[::-1], _running(target[::-1])[::-1]
    for p in range(len(source) + 1):
        for q in range(len(target) + 1):
            if heads[0][p] == heads[1][q] is not None or tails[0][p] == tails[1][q] is not None:
                ends.add((p, q))
    return ends


def _running(shape: Shape) -> list[_Product | None]:
    """The product of the first 0, 1, 2, … lengths; None from an unknown one on."""
    factors = [_factor(length) for length in shape]
    products: list[_Product | None] = [(1, frozenset())]
    for factor in factors:
        products.append(_times(products[-1], factor))
    return products


def _factor(length: int | str | None) -> _Product | None:
    """`"196*s77"` is 196 times a symbol; what is no product is a symbol as a whole."""
    if length is None or length == 0:
        return None
    if isinstance(length, int):
        return length, frozenset()
    parts = length.split("*")
    if not all(re.fullmatch(r"\w+", part) for part in parts):
        return 1, frozenset([(length, 1)])
    integer = math.prod(int(part) for part in parts if part.isdecimal())
    return integer, frozenset(Counter(part for part in parts if not part.isdecimal()).items())


def _times(one: _Product | None, other: _Product | None) -> _Product | None:
    if one is None or other is None:
        return None
    symbols = Counter(dict(one[1]))
    symbols.update(dict(other[1]))
    return one[0] * other[0], frozenset(symbols.items())
