"""The two sides of a validation, each of either format, behind one interface: `Side`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from normtool.comparison import OutputRuns
from normtool.errors import UsageError
from normtool.graph import ModelGraph, Tensor
from normtool.values import Array

#: One input set, by the names of the validation.
Feed: TypeAlias = Mapping[str, Array]

#: Outputs by name, in their order.
Outputs: TypeAlias = Mapping[str, Array]


@dataclass(frozen=True)
class Refusal:
    """The model raised on this input set; `message` is one line."""

    message: str


@dataclass(frozen=True, eq=False)
class Yardstick:
    """The reference on one input set. `nudged` are runs that differ from it by roundings only."""

    reference: Outputs
    nudged: tuple[Outputs, ...]
    own: Outputs

    def against(self, candidate: Outputs) -> list[OutputRuns]:
        """Paired by name if all agree, else in their order."""
        same_names = set(candidate) == set(self.own)
        pairs = zip(self.own, candidate.values(), strict=True)
        return [
            OutputRuns(
                name,
                self.reference[name],
                [each[name] for each in self.nudged],
                candidate[name] if same_names else got,
                self.own[name].dtype,
            )
            for name, got in pairs
        ]


class Side(Protocol):
    """A model that can be run. `names` of its inputs are known once `adopt` has been called."""

    @property
    def graph(self) -> ModelGraph: ...

    @property
    def runtime(self) -> str: ...

    @property
    def providers(self) -> list[str]: ...

    @property
    def notes(self) -> list[str]: ...

    def adopt(self, names: Sequence[str]) -> None:
        """Settle which of the validation's inputs is which of the model's. Raises UsageError."""

    def attempt(self, feeds: Sequence[Feed]) -> list[Outputs | Refusal]:
        """The model as it is, on each input set."""

    def is_random(self, feed: Feed, own: Outputs) -> bool:
        """Does it compute something else than `own` with another seed?"""

    def yardsticks(self, feeds: Sequence[Feed], own: Sequence[Outputs]) -> list[Yardstick]: ...

    def at_default_level(self, feed: Feed) -> Outputs | None:
        """With the runtime's optimisations on; None for a runtime that has none."""

    def suspects(self, reference: ModelGraph) -> list[Tensor]:
        """Weights in which an error may be planted, those that differ from the reference first of all."""

    def spoiled(self, weight: Tensor) -> "Side":
        """The same with one weight wrong by 1 %."""


def matched(names: Sequence[str], wanted: Sequence[str], who: str) -> tuple[str, ...]:
    """For each input of a model the validation's input that it gets: by name if all agree, else in order."""
    if len(names) != len(wanted):
        lists = f"{', '.join(names) or 'none'}; {who} has {', '.join(wanted) or 'none'}"
        raise UsageError(f"the inputs do not match: there are {lists}")
    return tuple(wanted) if set(names) == set(wanted) else tuple(names)
