"""The operator that travels: y = s·x + t, one s and one t per channel.

A BatchNorm in inference (Ioffe and Szegedy, 2015, algorithm 2) is

    s = γ/√(σ² + ε)        t = β − μ·s

and a constant Mul, Add, Sub or Div along the channel axis is one too. Algebra is done on the *stored*
values in extended precision and rounded once, when a constant is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from normtool.values import EXTENDED, Array


@dataclass(frozen=True, eq=False)
class Affine:
    """`s·x + t`; s and t have one shape, and lie on the axes `axis`, `axis + 1`, … (counted from the front).

    Nearly always that is (C,), one number per channel of one axis; a length of 1 stands for any length.
    Channels that a reshape has split, C → (g, C/g), lie on two axes.
    """

    axis: int
    s: Array
    t: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.s.shape)

    @property
    def axes(self) -> range:
        return range(self.axis, self.axis + self.s.ndim)

    def after(self, inner: "Affine") -> "Affine":
        """self ∘ inner: s₂(s₁x + t₁) + t₂ = (s₂s₁)x + (s₂t₁ + t₂), on the axes of both (a number: on any)."""
        known = [each for each in (self, inner) if each.s.size > 1] or [self]
        axes = range(min(each.axis for each in known), max(each.axes.stop for each in known))
        (s2, t2), (s1, t1) = self._over(axes), inner._over(axes)
        with np.errstate(all="ignore"):
            s, t = np.broadcast_arrays(s2 * s1, s2 * t1 + t2)
        return Affine(axes.start, s, t)

    def _over(self, axes: range) -> tuple[Array, Array]:
        """s and t with one axis for each of `axes`, which contain their own."""
        shape = [1] * len(axes)
        if self.s.size > 1:
            shape[self.axis - axes.start : self.axes.stop - axes.start] = self.shape
        return self.s.reshape(shape), self.t.reshape(shape)

    def spread(self, channels: int) -> "Affine":
        """The same map with s and t of shape (channels,).

        Raises ValueError when they hold another number of channels.
        """
        return Affine(
            self.axis,
            np.broadcast_to(self.s, (channels,)),
            np.broadcast_to(self.t, (channels,)),
        )

    def at(self, axis: int) -> "Affine":
        """The same numbers on another axis. One number in all lies on any, also where there is no such axis."""
        return Affine(max(axis, 0) if self.s.size == 1 else axis, self.s, self.t)

    @property
    def scale(self) -> "Affine":
        """x ↦ s·x, what is left without the shift."""
        return Affine(self.axis, self.s, np.zeros_like(self.t))

    @property
    def has_shift(self) -> bool:
        return bool(np.any(self.t != 0))

    @property
    def has_scale(self) -> bool:
        return bool(np.any(self.s != 1))

    @property
    def is_identity(self) -> bool:
        return not self.has_scale and not self.has_shift

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.s).all() and np.isfinite(self.t).all())

    def same_as(self, other: "Affine") -> bool:
        """Do both do the same to every tensor? Compared number by number, without tolerance."""
        apart = (self.axis, self.shape) != (other.axis, other.shape)
        if apart and self.s.size > 1 and other.s.size > 1:
            return False
        return bool(np.all(self.s == other.s) and np.all(self.t == other.t))

    def along(self, rank: int) -> tuple[Array, Array]:
        """s and t with `rank` axes, to broadcast against a tensor."""
        shape = (*[1] * self.axis, *self.shape, *[1] * (rank - self.axis - self.s.ndim))
        return self.s.reshape(shape), self.t.reshape(shape)

    def of(self, x: Array) -> Array:
        """s·x + t for a tensor, in its own precision."""
        s, t = self.along(x.ndim)
        with np.errstate(all="ignore"):
            return np.asarray(s.astype(x.dtype) * x + t.astype(x.dtype))


def joined(axis: int, parts: Sequence[tuple[Affine | None, int]]) -> Affine:
    """One map for a concatenation along `axis`, from those of its parts and their lengths (None: x ↦ x)."""
    known = [_part(part, length) for part, length in parts]
    return Affine(axis, np.concatenate([s for s, _ in known]), np.concatenate([t for _, t in known]))


def _part(part: Affine | None, length: int) -> tuple[Array, Array]:
    if part is None:
        return np.ones(length, EXTENDED), np.zeros(length, EXTENDED)
    spread = part.spread(length)
    return spread.s, spread.t


def batch_norm(gamma: Array, beta: Array, mean: Array, var: Array, eps: float) -> Affine:
    """The affine map of an inference BatchNorm over axis 1; every argument has shape (C,)."""
    with np.errstate(all="ignore"):
        s = gamma.astype(EXTENDED) / np.sqrt(var.astype(EXTENDED) + EXTENDED(eps))
        return Affine(1, s, beta.astype(EXTENDED) - mean.astype(EXTENDED) * s)
