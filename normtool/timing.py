"""Is one model faster than another, as far as the clock can tell?

Two runs of one and the same model never take equally long, so the yardstick is in the method:

- the runs are interleaved, in rounds A B B A or B A A B, drawn at random: whatever drifts (frequency,
  temperature, neighbours) meets both, each model runs as often behind itself as behind the other, and nothing
  that strikes at regular intervals strikes one of them more;
- a load's ratio is that of the medians, median(B) / median(A). Ratios of single pairs look finer and are not:
  where every fourth run is interrupted they are 0.4 or 2.4, and their median is either (seen, on a model and
  itself);
- both models are loaded afresh several times, in alternating order. Where memory happens to lie makes two loads
  of one model differ by up to a percent, and no number of runs within one load shows that (Kalibera and Jones,
  "Rigorous benchmarking in reasonable time", 2013: repeat at the level that varies);
- the result is the median over the loads, and its spread the order statistics of the loads that hold the true
  median with a probability of at least 95 %, whatever the distribution (the sign test, inverted: Conover,
  "Practical Nonparametric Statistics", §3.2). Where the spread covers 1, no difference was measured.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from random import Random
from typing import Any

import numpy as np

SCHEMA = "normtool.benchmark/1"

FASTER, SLOWER, NO_DIFFERENCE = "faster", "slower", "no_difference"

#: How often both models are loaded; with fewer than the least, no spread holds the median with `CONFIDENCE`.
LOADS, LEAST_LOADS = 10, 6

#: Rounds of each load, however slow the models: six loads of two rounds are 24 runs of each.
LEAST_ROUNDS = 2

#: Runs of each model before its load is timed, at least, and the part of a load's time they may take.
WARM_UP_RUNS, WARM_UP = 2, 0.1

CONFIDENCE = 0.95

#: Runs a model once.
Runner = Callable[[], object]

#: Nanoseconds of every timed run of the reference, and of the candidate, while both were loaded.
Load = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Benchmark:
    """What `measure` found. `ratio` is candidate / reference; [`low`, `high`] is its spread.

    `runs` counts the timed runs of each model, over all `loads`. The shares are the parts of the time in ops
    that are spent in norm ops, fused or native: a norm that is spelled out in primitive ops, and not fused by
    the runtime, is none. None where the runtime does not tell. `threads` is None for the runtime's own choice.
    """

    reference_ms: float
    candidate_ms: float
    ratio: float
    low: float
    high: float
    loads: int
    runs: int
    norm_share_before: float | None
    norm_share_after: float | None
    threads: int | None
    processors: int | None
    providers: dict[str, Any]
    inputs: dict[str, list[int]]
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        if self.low > 1:
            return SLOWER
        return FASTER if self.high < 1 else NO_DIFFERENCE

    @property
    def summary(self) -> str:
        """`slower: ratio 1.030 (1.010–1.050)`."""
        words = "no difference measured" if self.verdict == NO_DIFFERENCE else self.verdict
        return f"{words}: ratio {self.ratio:.3f} ({self.low:.3f}–{self.high:.3f})"

    def to_dict(self) -> dict[str, Any]:
        fields = {**vars(self), "notes": list(self.notes)}
        return {"schema": SCHEMA, "verdict": self.verdict, "confidence": CONFIDENCE, **fields}

    def __str__(self) -> str:
        from normtool.report.table import to_text

        return to_text(self)


def measure(
    load: Callable[[bool], tuple[Runner, Runner]],
    seconds: float,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> list[Load]:
    """The runs of every load, in about `seconds`; longer where the least number of runs takes longer.

    `load` loads both models and returns the reference and the candidate; True asks for the candidate first.
    """
    deadline = clock() + int(seconds * 1e9)
    found: list[Load] = []
    random, collecting = Random(0), gc.isenabled()
    gc.disable()
    try:
        while len(found) < LEAST_LOADS or (len(found) < LOADS and clock() < deadline):
            reference, candidate = load(len(found) % 2 == 1)
            found.append(_timed((reference, candidate), int(seconds * 1e9 / LOADS), random, clock))
            del reference, candidate  # before the next ones take as much memory again
    finally:
        if collecting:
            gc.enable()
    return found


def _timed(models: tuple[Runner, Runner], nanoseconds: int, random: Random, clock: Callable[[], int]) -> Load:
    start, warm = clock(), 0
    while warm < WARM_UP_RUNS or clock() - start < WARM_UP * nanoseconds:
        for run in models:
            run()
        warm += 1
    times: Load = ([], [])
    rounds = 0
    while rounds < LEAST_ROUNDS or clock() - start < nanoseconds:
        first = random.randrange(2)
        for which in (first, 1 - first, 1 - first, first):
            before = clock()
            models[which]()
            times[which].append(clock() - before)
        rounds += 1
    return times


def ratio_of(load: Load) -> float:
    """Candidate / reference."""
    reference, candidate = load
    return median(candidate) / median(reference)


def milliseconds(loads: Sequence[Load]) -> tuple[float, float]:
    """The median run of the reference and of the candidate."""
    reference, candidate = ([run for load in loads for run in load[which]] for which in (0, 1))
    return median(reference) / 1e6, median(candidate) / 1e6


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The k-th smallest and the k-th largest of n values, with the largest k that `confidence` allows.

    The true median lies below the k-th smallest with probability Σ_{i<k} C(n, i) / 2ⁿ, and as probably above
    the k-th largest. Raises ValueError where n is too small for any k: five, at 95 %.
    """
    n = len(values)
    ordered = sorted(values)
    tail, k = 1, 0  # Σ_{i≤k} C(n, i)
    while 2 * tail <= (1 - confidence) * 2**n:
        k += 1
        tail += comb(n, k)
    if k == 0:
        raise ValueError(f"{n} values hold no interval of {confidence:.0%}")
    return ordered[k - 1], ordered[n - k]
