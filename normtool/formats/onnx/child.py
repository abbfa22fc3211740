"""ONNX Runtime in a process of its own, with a time limit: its crash is a finding and not ours.

The parent writes a job and reads the report that `worker` leaves, line by line, even behind a crash.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normtool.errors import BackendUnavailable, RuntimeRefused


@dataclass(frozen=True)
class Run:
    """One model to run. `sets` None means every input set."""

    name: str
    model: Path
    level: str = "disabled"
    nudge: int | None = None
    sets: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "model": str(self.model)}


def run_job(
    job_path: Path, job: dict[str, Any], runs: Sequence[Run], time_limit: float
) -> list[dict[str, Any]]:
    """Run one child process to its end and return the steps it reported.

    Raises RuntimeRefused when it crashes or takes longer than `time_limit` seconds, BackendUnavailable when
    the device was not used.
    """
    job = {**job, "report": f"{job_path.stem}.jsonl", "runs": [run.to_dict() for run in runs]}
    job_path.write_text(json.dumps(job))
    code, complaint = start(job_path, time_limit)
    report_path = job_path.with_suffix(".jsonl")
    lines = report_path.read_text().splitlines() if report_path.exists() else []
    steps = [json.loads(line) for line in lines]
    if code != 0:
        done = len([step for step in steps if step["step"] == "run"])
        name = runs[min(done, len(runs) - 1)].name
        raise RuntimeRefused(f"ONNX Runtime {_ending(code)} on {name}{complaint}")
    if job["device"] == "cuda":
        _require_cuda(steps)
    return steps


def refuse_failed(who: str, steps: list[dict[str, Any]]) -> None:
    """Raises RuntimeRefused with what ONNX Runtime said, if it refused a model."""
    for step in steps:
        if "error" in step:
            raise RuntimeRefused(f"ONNX Runtime refuses {who}: {step['error']}")


def start(job_path: Path, time_limit: float) -> tuple[int, str]:
    """(exit code, what it said last). A negative code is a signal; a killed one ran out of time."""
    command = [sys.executable, "-m", "normtool.formats.onnx.worker", str(job_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment["TMPDIR"] = str(job_path.parent)  # ONNX Runtime may leave a file (.ses) where temporary ones go
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            timeout=time_limit,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return -int(signal.SIGALRM), f" after {time_limit:.0f} s"
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return done.returncode, f": {said[-1]}" if said else ""


def _ending(code: int) -> str:
    if code == -signal.SIGALRM:
        return "did not finish"
    return f"crashed ({signal.Signals(-code).name})" if code < 0 else f"failed (exit {code})"


def _require_cuda(steps: list[dict[str, Any]]) -> None:
    for step in steps:
        if step["step"] == "run" and "CUDAExecutionProvider" not in step.get("providers", ()):
            detail = step.get("error", f"it used {', '.join(step.get('providers', ()))}")
            raise BackendUnavailable(f"device cuda: ONNX Runtime could not use it ({detail})")
