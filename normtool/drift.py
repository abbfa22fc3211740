"""How far a LayerNorm moves when nobody takes its mean away: predicted from its input, fitted, and measured.

A row x of d numbers has mean μ and (biased) variance σ². With S = √(σ² + ε), ρ = μ/S and τ = σ²/S²

    z = (x − μ)/S            is what LayerNorm makes of it before γ and β
    r = x/√(μ² + σ² + ε)     is what RMSNorm does

and since Σ(x − μ) = 0, the three sums over a row depend on μ and σ alone:

    Σz² = d·τ      Σr² = d·(ρ² + τ)/(1 + ρ²)      Σz·r = d·τ/√(1 + ρ²)

    e(x) = Σ(r − z)²/d = τ + (ρ² + τ)/(1 + ρ²) − 2τ/√(1 + ρ²)

Where ε is small beside σ², τ = 1 and e = 2 − 2/√(1 + ρ²). Over many rows the relative L2 drift is

    D = √(Σe / Στ)           ≤ √(2 − 2/√(1 + ρ_rms²))     as 2 − 2/√(1 + u) is concave in u

That is what is predicted of γ·z + β, measured against γ·z: β takes no part in a difference, and a large one
would hide it. γ is taken to be independent of how the channels of x differ.

Given data, γ·a and β + γ·b are better: z_c ≈ a_c·r_c + b_c by ordinary least squares, channel by channel, from
sums over all rows (Legendre, 1805). Rows that are *flat* (padding: one number all along, so that z ≈ 0 and
r = ±1) are counted, take no part in the fit, and are in every drift.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from normtool.values import BLOCK, Array

#: A row is flat where its variance is less than this share of σ² + ε, while its mean square is more than that.
FLAT = 0.01

#: Rows that a fit of two numbers for each channel needs at least.
FEWEST_ROWS = 8

#: A channel whose r varies by less than this share of its mean square has no slope of its own.
_NO_SLOPE = 1e-9

_R, _Z, _RR, _ZR, _ZZ = range(5)


@dataclass(frozen=True)
class Watched:
    """A norm to be looked at: what it reads, by name; its axes, from the last one backwards; its ε."""

    tensor: str
    axes: tuple[int, ...]
    eps: float

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Watched":
        return cls(fields["tensor"], tuple(fields["axes"]), fields["eps"])


@dataclass(eq=False)
class InputSums:
    """Sums over the rows that a norm has read so far; one pass, whatever the data's size."""

    axes: tuple[int, ...]
    eps: float
    rows: int = 0
    flat: int = 0
    #: rows with an infinity or a NaN, which are left out
    lost: int = 0
    rho2: float = 0.0
    tau: float = 0.0
    error: float = 0.0
    #: (of all rows, of the flat ones) × (Σr, Σz, Σr², Σzr, Σz²) × channel
    channels: Array = field(default_factory=lambda: np.zeros((2, 5, 0)))

    @classmethod
    def of(cls, norm: Watched) -> "InputSums":
        return cls(norm.axes, norm.eps)

    def see(self, x: Array) -> None:
        """Add every row of what the norm reads."""
        table = rows_of(x, self.axes)
        if not self.channels.size:
            self.channels = np.zeros((2, 5, table.shape[1]))
        step = max(1, 8 * BLOCK // max(1, table.shape[1]))
        for start in range(0, len(table), step):
            self._see_rows(table[start : start + step].astype(np.float64))

    def _see_rows(self, x: Array) -> None:
        finite = np.isfinite(x).all(axis=1)
        self.lost += int((~finite).sum())
        x = x[finite]
        mu = x.mean(axis=1, keepdims=True)
        variance = np.mean((x - mu) ** 2, axis=1, keepdims=True)
        spread = variance + self.eps
        if not spread.all():  # ε = 0, and a row without variance: LayerNorm itself divides 0 by 0
            known = spread[:, 0] > 0
            self.lost += int((~known).sum())
            x, mu, variance, spread = x[known], mu[known], variance[known], spread[known]
        rho2, tau = mu**2 / spread, variance / spread
        flat = ((tau < FLAT) & (rho2 > FLAT))[:, 0]
        error = tau + (rho2 + tau) / (1 + rho2) - 2 * tau / np.sqrt(1 + rho2)
        self.rows, self.flat = self.rows + len(x), self.flat + int(flat.sum())
        self.rho2 += float(rho2[~flat].sum())
        self.tau, self.error = self.tau + float(tau.sum()), self.error + float(error.sum())
        z, r = (x - mu) / np.sqrt(spread), x / np.sqrt(mu**2 + spread)
        self.channels[0] += _moments(r, z)
        self.channels[1] += _moments(r[flat], z[flat])

    # ---- what they say --------------------------------------------------------------------

    @property
    def rho(self) -> float:
        """Root mean square of ρ over the rows that are not flat."""
        return float(np.sqrt(self.rho2 / max(1, self.rows - self.flat)))

    @property
    def predicted(self) -> float:
        """D; infinite where LayerNorm makes nothing of the rows, and RMSNorm something."""
        return _relative(max(0.0, self.error), self.tau)

    def fit(self) -> tuple[Array, Array] | None:
        """(a, b) of the least squares; None where there are too few rows."""
        count = self.rows - self.flat
        if count < FEWEST_ROWS:
            return None
        sums = self.channels[0] - self.channels[1]
        spread = sums[_RR] - sums[_R] ** 2 / count
        together = sums[_ZR] - sums[_R] * sums[_Z] / count
        sloped = spread > _NO_SLOPE * np.maximum(sums[_RR], np.finfo(float).tiny)
        a = np.where(sloped, together / np.where(sloped, spread, 1.0), 1.0)
        return a, (sums[_Z] - a * sums[_R]) / count

    def predicted_after(self, a: Array, b: Array, gamma: Array) -> float:
        """The drift of γ·(a·r + b) from γ·z on the rows seen, flat ones included."""
        r, z, rr, zr, zz = self.channels[0]
        left = zz - 2 * a * zr - 2 * b * z + a**2 * rr + 2 * a * b * r + self.rows * b**2
        return _relative(float(np.sum(gamma**2 * np.maximum(left, 0))), float(np.sum(gamma**2 * zz)))

    # ---- between processes ----------------------------------------------------------------

    def to_arrays(self) -> dict[str, Array]:
        numbers = [self.rows, self.flat, self.lost, self.rho2, self.tau, self.error]
        return {"numbers": np.array(numbers, np.float64), "channels": self.channels}

    def take(self, numbers: Array, channels: Array) -> None:
        """What another process has summed up."""
        self.rows, self.flat, self.lost = (int(n) for n in numbers[:3])
        self.rho2, self.tau, self.error = (float(n) for n in numbers[3:])
        self.channels = channels


@dataclass(frozen=True, eq=False)
class Tap:
    """One norm in two models. `back` = (s, t): s·y′ + t is what stands for y where γ and β have moved on.

    Arrays are over the normalised `axes`, flat, or of one number.
    """

    before: str
    after: str
    axes: tuple[int, ...]
    s: Array
    t: Array
    bias: Array


@dataclass(eq=False)
class PairSums:
    """Squares of differences between two models that run on the same data: at norms, and at outputs."""

    #: (Σ(y′ − y)², Σ(y − β)²) of each norm
    taps: Array
    #: output → (Σ(o′ − o)², Σo²)
    outputs: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, taps: Sequence[Tap]) -> "PairSums":
        return cls(np.zeros((len(taps), 2)))

    def see(self, taps: Sequence[Tap], before: Mapping[str, Array], after: Mapping[str, Array]) -> None:
        """One run of both: tensors by name."""
        for number, tap in enumerate(taps):
            if tap.after in after and tap.before in before:
                y = rows_of(before[tap.before], tap.axes).astype(np.float64)
                new = rows_of(after[tap.after], tap.axes).astype(np.float64) * tap.s + tap.t
                self.taps[number] += _squares(new - y), _squares(y - tap.bias)

    def see_outputs(self, before: Mapping[str, Array], after: Sequence[Array]) -> None:
        for (name, old), new in zip(before.items(), after, strict=True):
            wide = old.astype(np.float64)
            moved, size = self.outputs.get(name, (0.0, 0.0))
            gap = _squares(new.astype(np.float64) - wide) if new.shape == old.shape else np.inf
            self.outputs[name] = moved + gap, size + _squares(wide)

    def drift(self, number: int) -> float | None:
        """Of a norm; None where it was never seen in both models."""
        moved, size = self.taps[number]
        return _relative(moved, size) if moved or size else None

    def output_drifts(self) -> dict[str, float]:
        return {name: _relative(*sums) for name, sums in self.outputs.items()}

    def to_arrays(self) -> dict[str, Array]:
        return {"taps": self.taps, "outputs": np.array(list(self.outputs.values())).reshape(-1, 2)}

    def take(self, taps: Array, outputs: Array, names: Sequence[str]) -> None:
        self.taps = taps
        self.outputs = {name: (float(a), float(b)) for name, (a, b) in zip(names, outputs, strict=True)}


def rows_of(x: Array, axes: Sequence[int]) -> Array:
    """(rows, numbers of a row): the `axes`, consecutive and counted from the last, lie along a row."""
    count = len(axes)
    moved = np.moveaxis(x, sorted(axes), range(-count, 0))
    return np.asarray(moved.reshape(-1, int(np.prod(moved.shape[-count:]))))


def _moments(r: Array, z: Array) -> Array:
    return np.stack([r.sum(0), z.sum(0), (r * r).sum(0), (z * r).sum(0), (z * z).sum(0)])


def _squares(x: Array) -> float:
    """Σx²; infinite where there is no number."""
    total = float(np.sum(np.square(x)))
    return total if np.isfinite(total) else np.inf


def _relative(moved: float, size: float) -> float:
    if moved == 0:
        return 0.0
    return float(np.sqrt(moved / size)) if size and np.isfinite(moved) else np.inf
