"""Are two models the same function, as far as the numbers can tell?

A fixed tolerance proves nothing: 1e-5 is everything to a model whose output varies by 1e-6, and nothing to
one that a rounding moves by a tenth. So the yardstick is measured. The *noise floor* is how far the reference
itself moves when every float input and weight moves to a neighbouring number; a candidate within `LIMIT`
floors is `equal`. Where the reference can be run in float64, everything is compared with that run, and its own
error counts as a movement. And the yardstick is tried: a copy of the candidate that is wrong by 1 % at one
site must come out `different`, else the verdict is `inconclusive`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from normtool.values import Array, is_float

SCHEMA = "normtool.validation/1"

EQUAL, DIFFERENT, INCONCLUSIVE = "equal", "different", "inconclusive"

#: Seeds of the nudged references.
NUDGES = (1, 2)

#: How many weights are tried until a planted error of 1 % is seen at the outputs.
SITES_TRIED = 3

#: A candidate may differ from the reference by this many noise floors.
LIMIT = 4.0


@dataclass(frozen=True)
class Difference:
    """One output on its worst input set.

    `noise_floor` is the largest movement of the reference; `ratio` is the difference in noise floors, by its
    largest element or by its root mean square, whichever is more.
    """

    name: str
    max_abs: float
    max_rel: float
    noise_floor: float
    ratio: float
    #: largest magnitude of the reference
    largest: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return _finite({k: v for k, v in vars(self).items() if k != "largest"})

    @property
    def resolved(self) -> bool:
        """Would an error of a tenth show?"""
        return LIMIT * self.noise_floor <= self.largest / 10

    @property
    def verdict(self) -> str:
        return EQUAL if self.ratio <= LIMIT else DIFFERENT


@dataclass(frozen=True)
class Sensitivity:
    """The same comparison on a copy of the candidate that is wrong by 1 % at `site`."""

    site: str
    verdict: str
    ratio: float
    tried: int


@dataclass(frozen=True)
class Comparison:
    verdict: str
    outputs: tuple[Difference, ...]
    providers: dict[str, Any]
    seed: int
    sensitivity: Sensitivity | None = None
    default_level: tuple[Difference, ...] | None = None
    #: tensors inside the models, compared only where the outputs cannot show an error of 1 %
    sites: tuple[Difference, ...] = ()
    inputs: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The JSON of DESIGN §7."""
        default = None
        if self.default_level is not None:
            default = {
                "verdict": worst(self.default_level),
                "outputs": [difference.to_dict() for difference in self.default_level],
            }
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "outputs": [difference.to_dict() for difference in self.outputs],
            "limit": LIMIT,
            "providers": self.providers,
            "seed": self.seed,
            "sensitivity": None if self.sensitivity is None else _finite(vars(self.sensitivity)),
            "default_level": default,
            "sites": [difference.to_dict() for difference in self.sites],
            "inputs": list(self.inputs),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        from normtool.report.table import to_text

        return to_text(self)


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: an unbounded number is null."""
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in fields.items()}


@dataclass(frozen=True)
class OutputRuns:
    """One output on one input set: the reference, what a rounding makes of it, the candidate.

    `own` is the dtype that the model computes in, where `reference` is wider; the candidate has to have it.
    """

    name: str
    reference: Array
    nudged: Sequence[Array]
    candidate: Array
    own: np.dtype[Any] | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.reference.dtype if self.own is None else self.own


def compare(runs: Sequence[OutputRuns]) -> tuple[list[Difference], list[str]]:
    """The worst difference of each output over all input sets, and notes on sets that prove nothing."""
    worst_of: dict[str, Difference] = {}
    notes: list[str] = []
    for run in runs:
        useless = _useless(run)
        if useless:
            notes.append(f"output {run.name!r}: {useless}; that input set proves nothing")
            continue
        difference = _difference(run)
        if run.name not in worst_of or difference.ratio > worst_of[run.name].ratio:
            worst_of[run.name] = difference
    return list(worst_of.values()), list(dict.fromkeys(notes))


def _useless(run: OutputRuns) -> str:
    """Why this run cannot tell right from wrong, "" if it can. NaN = NaN is no agreement."""
    if _has_nan(run.reference):
        return "the reference computes NaN"
    if any(nudged.shape != run.reference.shape for nudged in run.nudged):
        return "its shape depends on the last bit of the input"
    infinite = np.isinf(_wide(run.reference))
    if any((np.isinf(_wide(nudged)) != infinite).any() for nudged in run.nudged):
        return "it overflows or not depending on the last bit of the input"
    return ""


def _difference(run: OutputRuns) -> Difference:
    if run.candidate.shape != run.reference.shape or run.candidate.dtype != run.dtype:
        return Difference(run.name, np.inf, np.inf, 0.0, np.inf)
    reference, candidate = _wide(run.reference), _wide(run.candidate)
    infinite = np.isinf(reference)
    if _has_nan(run.candidate) or (candidate[infinite] != reference[infinite]).any():
        return Difference(run.name, np.inf, np.inf, 0.0, np.inf)
    kept = reference[~infinite]
    largest = float(np.abs(kept).max(initial=0.0))
    last_bit = _one_rounding(run.dtype, largest)
    gap = _distances(kept, run.candidate, infinite)
    noise = [_distances(kept, nudged, infinite) for nudged in run.nudged]
    floor = tuple(max(last_bit, *measured) for measured in zip(*noise, strict=True))
    ratio = max(_in_floors(distance, unit) for distance, unit in zip(gap, floor, strict=True))
    relative = gap[0] / largest if largest else gap[0]
    return Difference(run.name, gap[0], relative, floor[0], ratio, largest)


def _distances(reference: Array, other: Array, infinite: Array) -> tuple[float, float]:
    """(largest, root mean square). One wild element makes the first, a general error the second."""
    difference = np.abs(_wide(other)[~infinite] - reference)
    if difference.size == 0:
        return 0.0, 0.0
    return float(difference.max()), float(np.sqrt(np.mean(difference**2)))


def _in_floors(distance: float, floor: float) -> float:
    if distance == 0:
        return 0.0
    return distance / floor if floor else np.inf


def _one_rounding(dtype: np.dtype[Any], largest: float) -> float:
    """The output's own last bit: no floor lies below it. Integers have none."""
    if not is_float(dtype):
        return 0.0
    return float(np.spacing(dtype.type(largest)))


def _wide(array: Array) -> Array:
    return array.astype(np.float64)


def _has_nan(array: Array) -> bool:
    return bool(np.isnan(_wide(array)).any())


def worst(differences: Sequence[Difference]) -> str:
    """The verdict of several outputs together; nothing compared is nothing known."""
    if not differences:
        return INCONCLUSIVE
    return DIFFERENT if any(d.verdict == DIFFERENT for d in differences) else EQUAL
