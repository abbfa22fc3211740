"""Relu, LeakyRelu and PRelu, which a positive scale passes if the user asks for it."""

from collections.abc import Iterator

from tests.rules.table import Case, Layer, Violation, layer, passes, stops
from tests.zoo import Net

ASKED = {"lower": "relu"}


def _prelu(net: Net, y: str) -> str:
    return str(net.node("PRelu", y, net.constant(net.rng.uniform(-0.5, 0.5, (4, 1, 1)))))


RECTIFIERS: dict[str, Layer] = {
    "Relu": layer("Relu"),
    "LeakyRelu": layer("LeakyRelu", alpha=0.1),
    "PRelu": _prelu,
}
KINDS = {"Relu": "relu", "LeakyRelu": "leaky_relu", "PRelu": "prelu"}


def cases() -> Iterator[Case]:
    for name, each in RECTIFIERS.items():
        yield from passes(KINDS[name], KINDS[name], each, name, "Add", asked=ASKED, positive=True)


def violations() -> Iterator[Violation]:
    for name, each in RECTIFIERS.items():
        kind = KINDS[name]
        yield from stops(f"{kind}-negative", kind, "negative_scale", each, asked=ASKED)
        yield from stops(f"{kind}-shift", kind, "nonlinear", each, asked=ASKED, only="shift")
        yield from stops(f"{kind}-not-asked", kind, "nonlinear", each, positive=True)
