"""What folding costs: time and memory of whole commands, beside `cp` and the peers.

    python tests/benchmarks/fold_cost.py --model resnet50 regnet --runs 3

Needs Linux and `psutil`; a peer that is not installed is shown as skipped.

Every command runs in turn, and then all of them again (A B C A B C …), so that a busy
moment of the machine falls on all of them. Medians are shown. The model is copied once
beforehand and nothing is dropped from the page cache, which is therefore warm.
Outputs are deleted after each run. `normtool` makes sure that its output has reached
the disk; the yardstick that does so too is `cp + sync`.

Where fresh memory is slow, as in many virtual machines, a tool that needs much of it
pays in `sys`, more in some runs than in others: look at three runs or more, and at the
fastest beside the median.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# Neither numpy nor onnx is imported here: on Linux a child's `ru_maxrss` starts from
# the peak of the process that started it, so that this process has to stay small.
MODELS_SCRIPT = Path(__file__).with_name("models.py")
DEFAULT_DIRECTORY = Path(__file__).resolve().parents[2] / ".bench"

POLL = 0.02  # Seconds between two looks at the memory of the process tree.

ONNXRUNTIME = """
import sys
import onnxruntime
model, output, *external = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
options.optimized_model_filepath = output
for name in external:
    key = "session.optimized_model_external_initializers_file_name"
    options.add_session_config_entry(key, name)
onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
"""

ONNXSCRIPT = """
import sys
from onnxscript import ir, optimizer, rewriter
model, output, *external = sys.argv[1:]
graph = rewriter.rewrite(optimizer.optimize(ir.load(model)))
ir.save(graph, output, external_data=external[0] if external else None)
"""

COUNT_BATCHNORMS = """
import sys
import onnx
graph = onnx.load(sys.argv[1], load_external_data=False).graph
print(sum(node.op_type == "BatchNormalization" for node in graph.node))
"""


class ToolError(Exception):
    """A command could not be started, gave up, or left no output; says why."""


@dataclass(frozen=True)
class Model:
    """An ONNX file and, if it has one, the file that holds its weights."""

    path: Path

    @property
    def data(self) -> Path | None:
        """Return the path of the external data."""
        path = self.path.with_suffix(".onnx.data")
        return path if path.exists() else None

    @property
    def files(self) -> list[Path]:
        """Return all files of the model."""
        return [self.path, self.data] if self.data else [self.path]

    @property
    def nbytes(self) -> int:
        """Return the size of all files in bytes."""
        return sum(file.stat().st_size for file in self.files)


@dataclass(frozen=True)
class Tool:
    """A command that reads a model and writes another."""

    name: str
    command: list[str]
    requires: str | None = None  # A module without which the tool is skipped.

    @property
    def installed(self) -> bool:
        """Return whether the tool can be expected to start."""
        return self.requires is None or bool(importlib.util.find_spec(self.requires))

    @property
    def label(self) -> str:
        """Return the name, and the version if it is a Python package."""
        if self.requires is None or not self.installed:
            return self.name
        distributions = importlib.metadata.packages_distributions()[self.requires]
        return f"{self.name} {importlib.metadata.version(distributions[0])}"


@dataclass(frozen=True)
class Usage:
    """What one run of a command took."""

    wall: float  # Seconds from start to exit.
    user: float  # Seconds of processor time, the command and its children.
    system: float  # Seconds of processor time spent in the kernel for them.
    peak: int  # Bytes resident at the worst moment, mapped files included.


@dataclass
class Result:
    """All runs of one tool on one model."""

    tool: Tool
    usages: list[Usage] = field(default_factory=list)
    batchnorms: int | None = None  # Left in the output.
    problem: str | None = None  # Why there is nothing (more) to measure.

    @property
    def median(self) -> Usage:
        """Return the median of each quantity by itself."""
        return Usage(
            wall=statistics.median(usage.wall for usage in self.usages),
            user=statistics.median(usage.user for usage in self.usages),
            system=statistics.median(usage.system for usage in self.usages),
            peak=statistics.median_high(usage.peak for usage in self.usages),
        )

    @property
    def fastest(self) -> float:
        """Return the shortest time in seconds."""
        return min(usage.wall for usage in self.usages)


# -------------------------------------------------------------------- the commands

CP = "cp"
NORMTOOL = "normtool fold --no-validate"


def tools(model: Model, output: Path) -> list[Tool]:
    """Return the tools to compare, yardsticks first."""
    python, beside = sys.executable, Path(sys.executable).parent
    both = [str(model.path), str(output)]
    copy = ["cp", *map(str, model.files), str(output.parent)]
    copies = " ".join(file.name for file in model.files)
    then_sync = ["sh", "-c", f'"$@" && cd "$0" && sync {copies}', str(output.parent)]
    fold = [str(beside / "normtool"), "fold", both[0], "-o", both[1], "--force"]
    # Without these a model of more than 2 GiB cannot be saved at all.
    data = [f"{output.name}.data"] if model.data else []
    flag = ["--save-as-external-data"] if model.data else []
    return [
        Tool(CP, copy),
        Tool("cp + sync", [*then_sync, *copy]),
        Tool(NORMTOOL, [*fold, "--no-validate"]),
        Tool("normtool fold", fold),
        Tool(
            "onnxruntime (basic)",
            [python, "-c", ONNXRUNTIME, *both, *data],
            requires="onnxruntime",
        ),
        Tool(
            "onnxslim",
            [str(beside / "onnxslim"), *both, *flag],
            requires="onnxslim",
        ),
        Tool(
            "onnxscript",
            [python, "-c", ONNXSCRIPT, *both, *data],
            requires="onnxscript",
        ),
        Tool(
            "onnxoptimizer",
            [python, "-m", "onnxoptimizer", *both],
            requires="onnxoptimizer",
        ),
        Tool(
            "onnxsim",
            [str(beside / "onnxsim"), *both, *flag],
            requires="onnxsim",
        ),
    ]


# ------------------------------------------------------------------- the measuring


class TreeWatch(threading.Thread):
    """Follows the memory of a process and its descendants, and ends them in time.

    Resident pages are summed over processes; one that several of them share counts
    several times.
    """

    def __init__(self, pid: int, timeout: float) -> None:
        """Watch the process group led by pid for at most timeout seconds."""
        super().__init__(daemon=True)
        self.pid = pid
        self.deadline = time.monotonic() + timeout
        self.peak = 0  # Bytes.
        self.expired = False  # Whether the time was up.
        self.ended = threading.Event()

    def run(self) -> None:
        """Poll until the process has ended."""
        while not self.ended.wait(POLL):
            self.peak = max(self.peak, tree_memory(self.pid))
            if time.monotonic() > self.deadline:
                self.expired = True
                kill_group(self.pid)


def tree_memory(pid: int) -> int:
    """Return the resident bytes of a process and all its descendants."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # It ended between two lines; the next look will be complete.
    return total


def kill_group(pid: int) -> None:
    """Kill the process group led by pid, if there is any of it left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def measure(command: list[str], directory: Path, timeout: float) -> Usage:
    """Run a command in a directory, which receives its stdout and stderr, too.

    Raises:
        ToolError: the command did not start or did not succeed.
    """
    stdout, stderr = directory / "stdout", directory / "stderr"
    with stdout.open("wb") as out, stderr.open("wb") as err:
        start = time.perf_counter()
        try:
            process = subprocess.Popen(command, cwd=directory, stdout=out, stderr=err, start_new_session=True)
        except OSError as error:
            raise ToolError(f"{error.strerror}: {command[0]}") from error
        watch = TreeWatch(process.pid, timeout)
        watch.start()
        try:
            # Not process.wait(), which would not say what the process used.
            _, status, used = os.wait4(process.pid, 0)
            wall = time.perf_counter() - start
        finally:
            watch.ended.set()
            kill_group(process.pid)  # What an interrupt, or the command, left behind.
        watch.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if watch.expired:
        raise ToolError(f"stopped after {timeout:.0f} s")
    if process.returncode:
        raise ToolError(complaint(process.returncode, stdout, stderr))
    maxrss = used.ru_maxrss * 1024
    return Usage(wall, used.ru_utime, used.ru_stime, max(maxrss, watch.peak))


def complaint(code: int, stdout: Path, stderr: Path) -> str:
    """Return the line that best says why a command failed.

    That is the exception below the last traceback, or else the signal that ended the
    command, or else the first line on stderr or stdout.
    """
    text = "\n".join(path.read_text(errors="replace") for path in (stderr, stdout))
    _, traceback, below = text.rpartition("Traceback (most recent call last):\n")
    if not traceback and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    unindented, not_blank = r"^\S.*", r"^.*\S.*"
    line = re.search(unindented if traceback else not_blank, below, re.MULTILINE)
    return line[0].strip() if line else f"exit status {code}"


def count_batchnorms(path: Path) -> int:
    """Return the number of BatchNormalization nodes in an ONNX file.

    Raises:
        ToolError: there is no such file, or it cannot be read.
    """
    if not path.exists():
        raise ToolError("success reported, but no output written")
    command = [sys.executable, "-c", COUNT_BATCHNORMS, str(path)]
    counted = subprocess.run(command, capture_output=True, text=True, check=False)
    if counted.returncode:
        raise ToolError("success reported, but the output cannot be read")
    return int(counted.stdout)


def compare(model: Model, scratch: Path, arguments: argparse.Namespace) -> list[Result]:
    """Run all tools in turn, as often as asked, and return what each one took."""
    output = scratch / "out" / model.path.name
    results = [Result(tool) for tool in tools(model, output) if wanted(tool, arguments)]
    for result in results:
        if not result.tool.installed:
            result.problem = f"skipped: {result.tool.requires} is not installed"
    run_once(Result(tools(model, output)[0]), output, arguments.timeout)  # Warms up.
    for round_number in range(arguments.runs):
        for result in results:
            if not result.problem:
                run_once(result, output, arguments.timeout)
                report_progress(round_number, result)
    return results


def wanted(tool: Tool, arguments: argparse.Namespace) -> bool:
    """Return whether the options ask for a tool."""
    if tool.name == "normtool fold" and not arguments.validated:
        return False
    return not arguments.only or any(tool.name.startswith(n) for n in arguments.only)


def run_once(result: Result, output: Path, timeout: float) -> None:
    """Run a tool, add what it took to its result, and delete its output."""
    output.parent.mkdir()
    try:
        usage = measure(result.tool.command, output.parent.parent, timeout)
        if result.batchnorms is None:
            result.batchnorms = count_batchnorms(output)
        result.usages.append(usage)
    except ToolError as failure:
        result.problem = f"failed: {failure}"
    finally:
        shutil.rmtree(output.parent)


def report_progress(round_number: int, result: Result) -> None:
    """Say on stderr what just happened."""
    what = result.problem or f"{result.usages[-1].wall:.2f} s"
    print(f"run {round_number + 1}: {result.tool.name}: {what}", file=sys.stderr)


# ------------------------------------------------------------------- the reporting

HEADINGS = [
    "tool",
    "time",
    "/ cp",
    "/ normtool",
    "fastest",
    "user",
    "sys",
    "peak memory",
    "/ file",
    "BatchNorms left",
]


def table(results: list[Result], nbytes: int) -> str:
    """Return the results as a table; ratios are those of median times."""
    walls = {result.tool.name: result.median.wall for result in results if result.usages}
    rows = [HEADINGS, *(row(result, walls, nbytes) for result in results)]
    measured = [cells for cells in rows if len(cells) == len(HEADINGS)]
    widths = [max(map(len, column)) for column in zip(*measured, strict=True)]
    widths[0] = max(len(cells[0]) for cells in rows)
    lines = [aligned(cells, widths) for cells in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def row(result: Result, walls: dict[str, float], nbytes: int) -> list[str]:
    """Return the cells of a tool, only two of them if it has a problem."""
    if result.problem:
        return [result.tool.label, result.problem]
    median = result.median
    return [
        result.tool.label,
        f"{median.wall:.2f} s",
        ratio(median.wall, walls.get(CP)),
        ratio(median.wall, walls.get(NORMTOOL)),
        f"{result.fastest:.2f} s",
        f"{median.user:.2f} s",
        f"{median.system:.2f} s",
        f"{median.peak / 1e6:,.0f} MB",
        ratio(median.peak, nbytes),
        str(result.batchnorms),
    ]


def ratio(value: float, unit: float | None) -> str:
    """Return how many units a value is, or a dash if the unit was not measured."""
    return f"{value / unit:.2f}" if unit else "–"


def aligned(cells: list[str], widths: list[int]) -> str:
    """Return a line of the table: names to the left, numbers to the right."""
    if len(cells) < len(widths):
        return f"{cells[0]:<{widths[0]}}  {cells[1]}"
    numbers = [f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([f"{cells[0]:<{widths[0]}}", *numbers])


def conditions(runs: int) -> str:
    """Return what a reader needs to know to compare the numbers with others."""
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}; medians of {runs}, interleaved; "
        f"warm page cache; peaks of {own_peak / 1e6:.0f} MB or less are this script's own"
    )


def prepared(name: str, directory: Path) -> Model:
    """Return the named model, written by a process of its own if need be."""
    command = [sys.executable, str(MODELS_SCRIPT), name, "--dir", str(directory)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Model(Path(done.stdout.strip()))


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        default=["resnet50"],
        metavar="NAME",
        help="resnet50 (0.1 GB), regnet (1.1 GB) or regnet-external (2.6 GB)",
    )
    add("--runs", type=int, default=3, help="runs of each tool (default: 3)")
    add(
        "--dir",
        type=Path,
        default=DEFAULT_DIRECTORY,
        help="where models are kept and outputs written (default: .bench)",
    )
    add(
        "--only",
        nargs="+",
        metavar="TOOL",
        help="tools to run, by the start of their names",
    )
    add(
        "--no-validated",
        dest="validated",
        action="store_false",
        help="leave out normtool with its own validation",
    )
    add("--timeout", type=float, default=600, help="seconds for a run (default: 600)")
    return parser.parse_args()


def main() -> None:
    """Measure each model asked for and print one table for each."""
    arguments = parse_arguments()
    directory = arguments.dir.resolve()
    for name in arguments.model:
        model = prepared(name, directory)
        # Beside the model: a copy within one file system is the fair yardstick.
        with tempfile.TemporaryDirectory(dir=directory, prefix="run-") as scratch:
            results = compare(model, Path(scratch), arguments)
        print(f"\n{name}, {model.nbytes / 1e6:,.0f} MB; {conditions(arguments.runs)}\n")
        print(table(results, model.nbytes))


if __name__ == "__main__":
    main()
