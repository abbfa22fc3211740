"""Does folding cost more than it did at another commit? Both take turns, and the ratios are printed.

    python -m tests.benchmarks.against_commit 622f027 --pairs 10

The commit is checked out into a temporary worktree. Two things are measured, each in a process of its own:

fold      the whole command, `normtool fold resnet50.onnx --no-validate`, from its start to its end
plan      planning with every proof for 20,000 small ops (`many_ops.chain`), reading them not counted

Wall time is what a user waits, CPU time (user + sys) what is left of it when others use the machine too. A pair
is one run of the other commit and one of this tree, in alternating order; a ratio is this tree over the other
commit, so that below 1 is cheaper. Shown: the median of the pairs' ratios, and between which two the middle
half of them lies.

`fold` runs with bytecode, as an installed normtool does, and again without, where every import compiles.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
MODEL = TREE / ".bench" / "resnet50-1.onnx"
BLOCKS = 5000

#: Prints the seconds (wall, CPU) that planning alone takes.
PLAN = """
import sys, time
import onnx
from normtool.formats.onnx.read import read_proto
from normtool.planner import plan_fold
opened = read_proto(onnx.load(sys.argv[1]))
started = time.perf_counter(), time.process_time()
plan = plan_fold(opened.graph, opened.fingerprint)
ended = time.perf_counter(), time.process_time()
assert len(plan.folds) == int(sys.argv[2]), f"{len(plan.folds)} folds"
print(*(b - a for a, b in zip(started, ended)))
"""

#: (wall seconds, CPU seconds)
Seconds = tuple[float, float]


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        subprocess.run(["git", "-C", TREE, "worktree", "add", "-q", "--detach", tree, commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", TREE, "worktree", "remove", "--force", tree], check=True)


def environment(tree: Path, bytecode: Path | None) -> dict[str, str]:
    """Python imports normtool from `tree`; its bytecode lies in `bytecode`, or there is none."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    own["PYTHONPATH"] = str(tree)
    if bytecode is None:
        return own | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": os.devnull}
    return own | {"PYTHONPYCACHEPREFIX": str(bytecode / tree.name)}


def fold(tree: Path, model: Path, bytecode: Path | None) -> Seconds:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "normtool", "fold", model, "-o", Path(folder, "folded.onnx")]
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--no-validate", "-q"],
            cwd=tree,
            env=environment(tree, bytecode),
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{tree}: the command failed")
    return wall, usage.ru_utime + usage.ru_stime


def plan(tree: Path, model: Path, bytecode: Path | None) -> Seconds:
    command = [sys.executable, "-c", PLAN, model, str(BLOCKS)]
    done = subprocess.run(
        command, cwd=tree, env=environment(tree, bytecode), check=True, capture_output=True, text=True
    )
    wall, cpu = map(float, done.stdout.split())
    return wall, cpu


def show(name: str, pairs: Sequence[tuple[Seconds, Seconds]]) -> None:
    for index, clock in enumerate(("wall", "CPU")):
        before = statistics.median(old[index] for old, _ in pairs)
        after = statistics.median(new[index] for _, new in pairs)
        ratios = [new[index] / old[index] for old, new in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name:22} {clock:4} {before:7.3f} s → {after:7.3f} s   ratio {middle:.3f} ({low:.3f}–{high:.3f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--pairs", type=int, default=10)
    options = parser.parse_args()
    if not MODEL.exists():
        raise SystemExit(f"no {MODEL}; tests/benchmarks/fold_cost.py makes it")

    import onnx

    from tests.benchmarks.many_ops import chain

    with worktree(options.commit) as other, tempfile.TemporaryDirectory() as folder:
        many, bytecode = Path(folder, "many.onnx"), Path(folder, "bytecode")
        onnx.save(chain(BLOCKS), many)
        print(f"{options.commit} → this tree, {options.pairs} pairs, median (quartiles)")
        measurements = [
            ("fold", fold, MODEL, bytecode),
            ("fold without bytecode", fold, MODEL, None),
            ("plan 20,000 ops", plan, many, bytecode),
        ]
        for name, measure, model, cache in measurements:
            pairs = []
            for turn in range(-1, options.pairs):  # the first warms caches up
                trees = (other, TREE) if turn % 2 else (TREE, other)
                seconds = {tree: measure(tree, model, cache) for tree in trees}
                pairs.append((seconds[other], seconds[TREE]))
            show(name, pairs[1:])


if __name__ == "__main__":
    main()
