"""What can happen when an affine map meets an operator, from behind or from ahead.

*Backward*: whoever reads the op wants its output y to hold α(y) instead. *Forward*: an input x holds x′ where
the op expects x = α(x′). Either way the op *absorbs* the map (its constants change), *passes* it on to other
tensors, on an axis that may be another one, *merges* with it (it is such a map itself, and goes), or *stops* it
with every reason. The planner only follows the answers, so a new operator is a new rule and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from normtool.affine import Affine
from normtool.constants import Constants
from normtool.edits import Edit
from normtool.graph import Op, Tensor
from normtool.reasons import Reason
from normtool.values import Array, Value, exact_array

#: Slot → the map that its tensor carries.
Maps = Mapping[str, Affine]


@dataclass(frozen=True, eq=False)
class Absorb:
    """The op takes the map in by these edits."""

    edits: tuple[Edit, ...]


@dataclass(frozen=True, eq=False)
class Pass:
    """The op stays, and others have to do with the map.

    `inputs`: these must hold α(x) from now on. `outputs`: where these expected y they get y′, with y = α(y′).
    """

    inputs: Maps = field(default_factory=dict)
    outputs: Maps = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True, eq=False)
class Merge:
    """The op is itself the affine map `inner` from `slot` to its output: compose, and take it out."""

    inner: Affine
    slot: str


@dataclass(frozen=True, eq=False)
class Stop:
    reasons: tuple[Reason, ...]


#: A rule may offer several ways, the one that leaves the fewest ops first.
Answer = Absorb | Pass | Merge | Stop
Answers = Answer | tuple[Answer, ...]


class Rule:
    """One family of operators. `kinds` are the op kinds it answers for.

    `lowers`: it holds only where the user asked to do without BatchNorm at the price of other ops.
    """

    kinds: ClassVar[tuple[str, ...]] = ()
    lowers: ClassVar[bool] = False

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answers:
        """What `op` does when its readers want these maps of its outputs."""
        return stop("unsupported_op", op, f"{op.spelling} stands in front of it")

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answers:
        """What `op` does when its inputs carry these maps."""
        return stop("unsupported_op", op, f"{op.spelling} reads it")

    def backward_rounding(self, constants: Constants, op: Op, wanted: Maps) -> Answers:
        """What it does where the user allows a bias to be rounded to the grid of its integers."""
        return self.backward(constants, op, wanted)

    def forward_with_map(self, constants: Constants, op: Op, carried: Maps) -> Answers:
        """What it does where the user allows a shift to become a constant of the size of the output."""
        return self.forward(constants, op, carried)

    def ignores(self, constants: Constants, op: Op, slot: str, affine: Affine) -> bool:
        """Does `op` put out the same, whether it reads x at `slot` or α(x)? (It reads other channels.)"""
        return False


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
        return None if value is None else exact_array(value)

    def stop(self) -> Stop:
        return Stop(tuple(self.reasons))


def stop(code: str, op: Op | Tensor, message: str) -> Stop:
    return Stop((Reason(code, message, op.name),))


def mismatch(op: Op, message: str) -> Stop:
    return stop("axis_mismatch", op, message)


def only(maps: Maps) -> Affine:
    """The one map of an op with one output, or with one input that carries something."""
    (affine,) = maps.values()
    return affine
