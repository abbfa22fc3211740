"""What it costs to start: user CPU time of short commands, beside the peers.

    python tests/benchmarks/start_up.py

Commands take turns, seven rounds of them, and medians are shown. User time leaves out
most of the waiting for the disk and for other processes, so that it changes less
between runs than wall time, which is shown beside it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import models

RUNS = 7
BESIDE_PYTHON = Path(sys.executable).parent
PEERS = ["onnxslim", "onnxsim", "onnxoptimizer", "polygraphy"]


@dataclass(frozen=True)
class Usage:
    """What one run of a command took, in seconds."""

    user: float  # The command and its children.
    wall: float


@dataclass
class Row:
    """A command, and what its runs took or why there are none."""

    command: list[str]
    problem: str | None = None
    usages: list[Usage] = field(default_factory=list)


def commands(small_model: Path) -> Iterator[list[str]]:
    """Yield the commands to compare, the program as its full path."""
    normtool = str(BESIDE_PYTHON / "normtool")
    yield [sys.executable, "-c", "pass"]
    yield [sys.executable, "-c", "import onnx"]
    yield [normtool, "--help"]
    yield [normtool, "scan", str(small_model)]
    for peer in PEERS:
        yield [str(BESIDE_PYTHON / peer), "--help"]


def measure(command: list[str]) -> Usage:
    """Run a command and throw away what it prints.

    Raises:
        OSError: it could not be started.
        subprocess.CalledProcessError: it failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Usage(used.ru_utime, wall)


def trial(command: list[str]) -> str | None:
    """Run a command once, which also warms the page cache; return what is wrong."""
    try:
        measure(command)
    except FileNotFoundError:
        return f"skipped: {command[0]} is not installed"
    except subprocess.CalledProcessError as error:
        return f"failed: exit status {error.returncode}"
    return None


def shown(command: list[str]) -> str:
    """Return a command as one would type it, with names in place of full paths."""
    return " ".join(Path(word).name if "/" in word else word for word in command)


def main() -> None:
    """Measure all commands and print a line for each."""
    with tempfile.TemporaryDirectory() as directory:
        rows = [Row(command) for command in commands(models.cached("tiny", Path(directory)))]
        for row in rows:
            row.problem = trial(row.command)
        for _ in range(RUNS):
            for row in rows:
                if not row.problem:
                    row.usages.append(measure(row.command))
    width = max(len(shown(row.command)) for row in rows)
    print(f"{'command':<{width}}      user      wall   (medians of {RUNS})")
    for row in rows:
        print(f"{shown(row.command):<{width}}  {row.problem or medians(row.usages)}")


def medians(usages: list[Usage]) -> str:
    """Return the median user and wall time."""
    user = statistics.median(usage.user for usage in usages)
    wall = statistics.median(usage.wall for usage in usages)
    return f"{1000 * user:5.0f} ms  {1000 * wall:5.0f} ms"


if __name__ == "__main__":
    main()
