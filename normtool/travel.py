"""What can happen when an affine map, going backward, meets an operator.

A rule answers one of three things: the op *absorbs* the map (its constants change), *passes* it to the
input behind it, or *stops* it with every reason. The planner only follows the answers, so a new operator
is a new rule and nothing else.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from normtool.affine import Affine
from normtool.constants import Constants
from normtool.edits import Edit
from normtool.graph import Op
from normtool.reasons import Reason
from normtool.values import Array, Value, to_array, widened


@dataclass(frozen=True, eq=False)
class Absorb:
    """The op takes the map in by these edits; `leftover` (C,) is a shift it has no place for."""

    edits: tuple[Edit, ...]
    leftover: Array | None = None


@dataclass(frozen=True, eq=False)
class Pass:
    """The op is itself the affine map `inner`: compose, take it out, go on behind `slot`."""

    inner: Affine
    slot: str


@dataclass(frozen=True, eq=False)
class Stop:
    reasons: tuple[Reason, ...]


Answer = Absorb | Pass | Stop


class BackwardRule(ABC):
    """One family of producers. `kinds` are the op kinds it answers for."""

    kinds: ClassVar[tuple[str, ...]]

    @abstractmethod
    def meet(self, constants: Constants, op: Op, affine: Affine) -> Answer:
        """What `op`, whose only reader applies `affine` to its output, does with the map."""


class Operands:
    """Reads the constants a rule needs and remembers every reason why one is missing."""

    def __init__(self, constants: Constants, op: Op) -> None:
        self._constants = constants
        self._op = op
        self.reasons: list[Reason] = []

    def value(self, slot: str) -> Value | None:
        """The constant at `slot`; None when the op has none there or when it is not constant."""
        tensor = self._constants.graph.input(self._op, slot)
        if tensor is None:
            return None
        found = self._constants.value(tensor)
        if isinstance(found, Reason):
            self.reasons.append(found)
            return None
        return found

    def wide(self, slot: str) -> Array | None:
        """The constant at `slot` in extended precision."""
        value = self.value(slot)
        return None if value is None else widened(to_array(value))

    def stop(self) -> Stop:
        return Stop(tuple(self.reasons))


def mismatch(op: Op, message: str) -> Stop:
    return Stop((Reason("axis_mismatch", message, op.name),))
