"""What the times say: statistics on recorded and on made-up clocks. No model is run here."""

import gc
import math

import numpy as np
import pytest

from normtool.timing import (
    LEAST_LOADS,
    LEAST_ROUNDS,
    LOADS,
    WARM_UP_RUNS,
    Benchmark,
    measure,
    median_interval,
    milliseconds,
    ratio_of,
)


def benchmark(ratio: float, low: float, high: float) -> Benchmark:
    providers = {"requested": "cpu", "effective": ["CPUExecutionProvider"]}
    numbers = (2.0, 2.0 * ratio, ratio, low, high, 10, 400, 0.25, 0.0, None, 2)
    return Benchmark(*numbers, providers, {"x": [1, 3]}, ("a note",))


class Clock:
    """Nanoseconds that pass only while a model runs or is loaded."""

    def __init__(self) -> None:
        self.now = 0
        self.runs: list[str] = []

    def __call__(self) -> int:
        return self.now

    def model(self, name: str, nanoseconds: float) -> object:
        def run() -> None:
            self.runs.append(name)
            self.now += int(nanoseconds)

        return run


def timed(reference: float, candidate: float, seconds: float, loading: float = 0) -> tuple[Clock, list, list]:
    """(the clock, the order of loading, what was measured) of models that take so many nanoseconds."""
    clock, firsts = Clock(), []

    def load(candidate_first: bool):
        firsts.append(candidate_first)
        clock.runs.append("load")
        clock.now += int(loading)
        return clock.model("A", reference), clock.model("B", candidate)

    return clock, firsts, measure(load, seconds, clock)


# ---- what is run --------------------------------------------------------------------------------


def test_runs_are_interleaved_and_both_orders_are_as_frequent():
    clock, firsts, loads = timed(1e6, 2e6, seconds=1)
    assert firsts == [False, True] * (LOADS // 2)
    first = "".join(clock.runs[1 : clock.runs.index("load", 1)])
    rounds = len(loads[0][0]) // 2
    warm, timed_runs = first[: -4 * rounds], first[-4 * rounds :]
    assert warm == "AB" * (len(warm) // 2)
    assert len(warm) >= 2 * WARM_UP_RUNS
    orders = [timed_runs[at : at + 4] for at in range(0, 4 * rounds, 4)]
    assert set(orders) == {"ABBA", "BAAB"}
    assert set(loads[0][0]) == {1_000_000}
    assert set(loads[0][1]) == {2_000_000}
    assert len(loads) == LOADS
    assert clock.now == pytest.approx(1e9, rel=0.1)


def test_slow_models_are_run_twenty_times_and_more_and_no_longer():
    _, _, loads = timed(3e9, 3e9, seconds=1)
    assert [len(reference) for reference, _ in loads] == [2 * LEAST_ROUNDS] * LEAST_LOADS
    assert 2 * LEAST_ROUNDS * LEAST_LOADS >= 20


def test_time_spent_on_loading_counts():
    _, _, loads = timed(1e6, 1e6, seconds=1, loading=3e9)
    assert len(loads) == LEAST_LOADS


def test_the_garbage_collector_rests_and_comes_back():
    seen = []

    def load(candidate_first):
        seen.append(gc.isenabled())
        raise RuntimeError

    with pytest.raises(RuntimeError):
        measure(load, 1)
    assert seen == [False]
    assert gc.isenabled()


# ---- ratios -------------------------------------------------------------------------------------


def test_a_drift_is_no_difference():
    """Every run takes 1 % longer than the one before; A A … B B … would see a factor of two."""
    clock = Clock()

    def load(candidate_first: bool):
        def run():
            clock.now += int(1e6 * 1.01 ** len(clock.runs))
            clock.runs.append("")

        return run, run

    for found in measure(load, 2, clock):
        assert len(found[0]) >= 4
        assert ratio_of(found) == pytest.approx(1, abs=0.03)


def test_runs_that_were_interrupted_change_nothing():
    """Every fourth run, as on a busy machine: ratios of pairs would be 0.4 or 2.4."""
    rng = np.random.default_rng(0)
    clock = Clock()

    def load(candidate_first: bool):
        def run():
            clock.now += int(1.4e6 + rng.normal(scale=2e4) + (4e6 if rng.random() < 0.25 else 0))

        return run, run

    assert [ratio_of(found) for found in measure(load, 3, clock)] == pytest.approx([1] * LOADS, abs=0.02)


def test_the_ratio_is_of_the_candidate_to_the_reference():
    assert ratio_of(([100, 100, 90_000], [110, 110, 80_000])) == pytest.approx(1.1)


def test_milliseconds_are_medians_of_all_runs():
    loads = [([1_000_000, 2_000_000], [4_000_000, 5_000_000]), ([3_000_000, 9_000_000], [6_000_000, 9_000_000])]
    assert milliseconds(loads) == (2.5, 5.5)


# ---- the spread ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [6, 7, 8, 9, 10, 15, 20, 25, 50])
def test_the_spread_is_the_narrowest_that_holds_the_median_with_95_percent(n):
    low, high = median_interval([float(value) for value in range(1, n + 1)])
    k = int(low)
    assert high == n + 1 - k

    def outside(rank: int) -> float:
        return 2 * sum(math.comb(n, i) for i in range(rank)) / 2**n

    assert outside(k) <= 0.05 < outside(k + 1)


def test_ranks_are_those_of_the_published_tables():
    """Ranks of the 95 % interval of a median: Hollander and Wolfe, Conover; n = 20 has the 6th and 15th."""
    assert [median_interval(range(1, n + 1)) for n in (6, 9, 10, 20)] == [(1, 6), (2, 8), (2, 9), (6, 15)]


def test_too_few_values_hold_no_spread():
    with pytest.raises(ValueError, match="5 values"):
        median_interval([1.0] * 5)
    assert LEAST_LOADS >= 6


def test_the_spread_misses_the_median_as_rarely_as_it_says():
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(2000):
        low, high = median_interval(rng.lognormal(sigma=0.3, size=LOADS))  # skewed; its median is 1
        missed += not low <= 1 <= high
    assert 0.01 < missed / 2000 < 0.05


# ---- the verdict --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spread", "verdict", "summary"),
    [
        ((1.03, 1.01, 1.05), "slower", "slower: ratio 1.030 (1.010–1.050)"),
        ((0.9, 0.85, 0.99), "faster", "faster: ratio 0.900 (0.850–0.990)"),
        ((1.03, 0.99, 1.05), "no_difference", "no difference measured: ratio 1.030 (0.990–1.050)"),
        ((1.0, 1.0, 1.05), "no_difference", "no difference measured: ratio 1.000 (1.000–1.050)"),
    ],
    ids=["slower", "faster", "covers-1", "touches-1"],
)
def test_the_verdict_is_where_the_spread_lies(spread, verdict, summary):
    found = benchmark(*spread)
    assert (found.verdict, found.summary) == (verdict, summary)
    assert found.to_dict()["verdict"] == verdict


def test_a_benchmark_prints_its_summary_and_how_it_was_measured():
    text = str(benchmark(1.03, 1.01, 1.05))
    for said in (
        "slower: ratio 1.030 (1.010–1.050)",
        "25.0%",
        "400 of each, interleaved; both loaded afresh 10 times",
        "ONNX Runtime's choice, on 2 processors",
        "x 1x3",
        "a note",
    ):
        assert said in text
