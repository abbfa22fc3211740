"""The operator that travels: y = s·x + t, one s and one t per channel of one axis.

A BatchNorm in inference (Ioffe and Szegedy, 2015, algorithm 2) is

    s = γ/√(σ² + ε)        t = β − μ·s

and a constant Mul, Add, Sub or Div along the channel axis is one too. Algebra is done on the *stored*
values in extended precision and rounded once, when a constant is written.
"""

from dataclasses import dataclass

import numpy as np

from normtool.values import EXTENDED, Array


@dataclass(frozen=True, eq=False)
class Affine:
    """`s·x + t` along `axis` (counted from the front); s and t have shape (C,), or (1,) for all channels."""

    axis: int
    s: Array
    t: Array

    def after(self, inner: "Affine") -> "Affine":
        """self ∘ inner: s₂(s₁x + t₁) + t₂ = (s₂s₁)x + (s₂t₁ + t₂). Both on the same axis."""
        with np.errstate(all="ignore"):
            return Affine(self.axis, self.s * inner.s, self.s * inner.t + self.t)

    def spread(self, channels: int) -> "Affine":
        """The same map with s and t of shape (channels,).

        Raises ValueError when they hold another number of channels.
        """
        return Affine(
            self.axis,
            np.broadcast_to(self.s, (channels,)),
            np.broadcast_to(self.t, (channels,)),
        )

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.s).all() and np.isfinite(self.t).all())


def batch_norm(gamma: Array, beta: Array, mean: Array, var: Array, eps: float) -> Affine:
    """The affine map of an inference BatchNorm over axis 1; every argument has shape (C,)."""
    with np.errstate(all="ignore"):
        s = gamma.astype(EXTENDED) / np.sqrt(var.astype(EXTENDED) + EXTENDED(eps))
        return Affine(1, s, beta.astype(EXTENDED) - mean.astype(EXTENDED) * s)
