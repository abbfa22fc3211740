"""One op with its attributes and inputs, and the ways in which a definition reads them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from normtool.values import Array, Dense, Value, exact_rows, widened


@dataclass(frozen=True, eq=False)
class Call:
    """Inputs stand at their slots: arrays of float64 for data, `Value`s for constants.

    An attribute that is None is absent. Where an opset moved an attribute to an input, either is read.
    """

    attributes: Mapping[str, Any]
    inputs: Mapping[str, Array | Value]

    def attribute(self, name: str, default: Any = None) -> Any:
        given = self.attributes.get(name)
        return default if given is None else given

    def value(self, slot: str) -> Value:
        """An input to be read in blocks of rows."""
        given = self.inputs[slot]
        return Dense(given) if isinstance(given, np.ndarray) else given

    def array(self, slot: str) -> Array:
        """An input as a whole, in float64."""
        given = self.inputs[slot]
        return given if isinstance(given, np.ndarray) else wide(given)

    def listed(self, stem: str) -> list[Array]:
        """The inputs `stem.0`, `stem.1`, … in their order."""
        slots = [slot for slot in self.inputs if slot.startswith(f"{stem}.")]
        return [self.array(slot) for slot in sorted(slots, key=lambda slot: int(slot.rpartition(".")[2]))]

    def numbers(self, name: str) -> list[Any] | None:
        """An attribute, or the input of that name, as Python numbers; None where neither is given."""
        given = self.attribute(name)
        if given is None and name in self.inputs:
            value = self.value(name)
            given = exact_rows(value, 0, value.shape[0] if value.shape else 1)
        return None if given is None else list(np.asarray(given).reshape(-1).tolist())

    def integers(self, name: str) -> list[int] | None:
        """The same as exact integers: a Slice ends at 2⁶³ − 1, which no float64 is."""
        found = self.numbers(name)
        return None if found is None else [int(n) for n in found]

    def per_axis(self, name: str, rank: int, default: int) -> list[int]:
        return self.integers(name) or [default] * rank


def wide_rows(value: Value, start: int, stop: int) -> Array:
    """Rows in float64; what a plan is about to write comes before its rounding."""
    return widened(exact_rows(value, start, stop), np.float64)


def wide(value: Value) -> Array:
    return wide_rows(value, 0, value.shape[0] if value.shape else 1)
