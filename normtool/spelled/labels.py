"""What the tensors around a root are, in terms of x, its mean μ and the root σ.

    T = (a·x + m·μ + c) · σ^p · γ + β

A label is (a, m, c, p, γ, β). Each op makes a label of the labels and constants that it reads, or is no part of
the norm. A tensor with a = 1, m = −1, c = 0, p = −1 is a LayerNorm, however it came about:
TensorFlow's x·(γ/σ) + (β − μ·γ/σ) as much as γ·(x − μ)/σ + β.
"""

from dataclasses import dataclass, replace

from normtool.graph import Tensor


@dataclass(frozen=True)
class Label:
    """`eps_mode`: what has been done to σ itself, σ + eps ("outside") or max(σ, eps) ("max").

    `kept`: a statistic lies against x as it is; else the axes it was reduced over are gone. `weight` may have
    an offset: γ = weight + offset.
    """

    x: float = 0.0
    mean: float = 0.0
    one: float = 0.0
    power: int = 0
    weight: Tensor | None = None
    offset: float = 0.0
    bias: Tensor | None = None
    eps: float = 0.0
    eps_mode: str = "inside"
    kept: bool = True

    @property
    def is_factor(self) -> bool:
        """c · σ^p · γ: the same for all x of one mean."""
        return self.one != 0 and self.x == self.mean == 0 and self.bias is None

    @property
    def is_like_x(self) -> bool:
        return self.x != 0

    def times(self, number: float) -> "Label | None":
        if self.bias is not None or number == 0:
            return None
        return replace(self, x=self.x * number, mean=self.mean * number, one=self.one * number)

    def weighted(self, weight: Tensor, offset: float) -> "Label | None":
        if self.weight is not None or self.bias is not None:
            return None
        return replace(self, weight=weight, offset=offset)

    def shifted(self, bias: Tensor) -> "Label | None":
        """β belongs behind the division, not in front of it."""
        if self.bias is not None or self.power != -1 or self.one != 0:
            return None
        return replace(self, bias=bias)

    def inverse(self) -> "Label | None":
        if not self.is_factor or self.weight is not None:
            return None
        return replace(self, one=1 / self.one, power=-self.power)

    def by(self, other: "Label") -> "Label | None":
        """The product; one of the two is a factor."""
        if not other.is_factor:
            if not self.is_factor:
                return None
            self, other = other, self
        state = _state(self, other)
        layout = _layout(self, other)
        if state is None or layout is None or self.bias is not None:
            return None
        if self.weight is not None and other.weight is not None:
            return None
        return Label(
            x=self.x * other.one,
            mean=self.mean * other.one,
            one=self.one * other.one,
            power=self.power + other.power,
            weight=self.weight or other.weight,
            offset=self.offset or other.offset,
            eps=state[0],
            eps_mode=state[1],
            kept=layout,
        )

    def plus(self, other: "Label", sign: float = 1.0) -> "Label | None":
        if self.power != other.power or (self.weight, self.offset) != (other.weight, other.offset):
            return None
        state = _state(self, other)
        layout = _layout(self, other)
        both = self.bias is not None and other.bias is not None
        if state is None or layout is None or both or (sign < 0 and other.bias is not None):
            return None
        return replace(
            self,
            x=self.x + sign * other.x,
            mean=self.mean + sign * other.mean,
            one=self.one + sign * other.one,
            bias=self.bias or other.bias,
            eps=state[0],
            eps_mode=state[1],
            kept=layout,
        )

    def with_eps(self, eps: float, mode: str) -> "Label | None":
        """σ + eps or max(σ, eps), of σ alone."""
        plain = self.is_factor and self.power == 1 and self.weight is None and self.eps_mode == "inside"
        return replace(self, eps=eps / self.one, eps_mode=mode) if plain and self.one > 0 else None


def _state(a: Label, b: Label) -> tuple[float, str] | None:
    """What both say of σ; who has no σ says nothing."""
    if a.power == 0:
        return b.eps, b.eps_mode
    if b.power == 0 or (a.eps, a.eps_mode) == (b.eps, b.eps_mode):
        return a.eps, a.eps_mode
    return None


def _layout(a: Label, b: Label) -> bool | None:
    """Do the axes lie against each other? x has all of them; two statistics have the same ones."""
    if a.kept == b.kept:
        return a.kept
    return None
