"""The child process that runs ONNX Runtime: `python -m normtool.formats.onnx.worker JOB.json`.

ONNX Runtime can crash on a hostile or merely unusual model, and then it takes its process along. So it gets
one of its own, which reads a job, writes arrays into the job's folder and a report line after each step.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from normtool.drift import InputSums, PairSums, Tap, Watched
from normtool.formats.onnx.profile import time_by_op
from normtool.inputs import InputSpec, generate, nudge
from normtool.timing import Runner, measure
from normtool.values import Array

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"

#: Runs of a model under ONNX Runtime's profiler; the first is not counted.
PROFILED_RUNS = 11


def main(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    onnxruntime.set_default_logger_severity(4)
    report = Report(Path(job["folder"]) / job["report"])
    input_sets = job["input_sets"]
    if job["attempts"]:
        input_sets = _probe(job, report)
    if job.get("bench"):
        _bench(job, input_sets[0], report)
    elif "watch" in job:
        _watch(job, input_sets, report)
    else:
        for run in job["runs"]:
            _run(job, run, input_sets, report)
    report.line(step="done")


class Report:
    """Lines of JSON, written one by one: what a crash leaves behind is still true."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_text("")

    def line(self, **fields: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(fields) + "\n")


def _session(run: dict[str, Any], device: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if run["level"] == "disabled":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # TF32 keeps ten bits of a product's mantissa: no yardstick for anything
    providers = [(CUDA, {"use_tf32": "0"}), CPU] if device == "cuda" else [CPU]
    return onnxruntime.InferenceSession(run["model"], options, providers=providers)


def _probe(job: dict[str, Any], report: Report) -> list[list[dict[str, Any]]]:
    """The first input sets the reference runs on, two at most, and then in every distribution."""
    from normtool.inputs import spread

    session = _session(job["runs"][0], job["device"])
    working: list[list[InputSpec]] = []
    error = ""
    for attempt in job["attempts"]:
        specs = [InputSpec.from_dict(fields) for fields in attempt]
        try:
            session.run(None, {spec.name: generate(spec) for spec in specs})
        except Exception as failure:
            error = error or _first_line(failure)
            continue
        working.append(specs)
        if len(working) == 2:
            break
    if not working:
        report.line(step="probe", error=error)
        sys.exit(0)
    sets = [[spec.to_dict() for spec in specs] for specs in spread(working, job["seed"])]
    report.line(step="probe", sizes=len(working), input_sets=sets)
    return sets


def _run(job: dict[str, Any], run: dict[str, Any], sets: list[Any], report: Report) -> None:
    """Run one model on some input sets and store every output as an .npy file."""
    try:
        session = _session(run, job["device"])
    except Exception as failure:
        report.line(step="run", name=run["name"], error=_first_line(failure))
        return
    providers = session.get_providers()
    names = [output.name for output in session.get_outputs()]
    known = [entry.name for entry in session.get_inputs()]
    for number in range(len(sets)) if run["sets"] is None else run["sets"]:
        feeds = _feeds(job, sets[number], run, number)
        try:
            outputs = session.run(None, {k: v for k, v in feeds.items() if k in known})
        except Exception as failure:
            report.line(step="run", name=run["name"], error=_first_line(failure))
            return
        for position, output in enumerate(outputs):
            if isinstance(output, np.ndarray) and output.dtype != object:
                np.save(Path(job["folder"]) / f"{run['name']}.{number}.{position}.npy", output)
    report.line(step="run", name=run["name"], providers=providers, outputs=names, inputs=known)


def _bench(job: dict[str, Any], specs: list[Any], report: Report) -> None:
    """Time the two models of a job, interleaved; then where their time goes, in sessions of their own."""
    for run in job["runs"]:  # which of them ONNX Runtime refuses, and where they really run
        try:
            session = _as_users_run_it(job, run)
            _runner(job, run, specs, session)()
        except Exception as failure:
            report.line(step="run", name=run["name"], error=_first_line(failure))
            return
        report.line(step="run", name=run["name"], providers=session.get_providers())
        del session

    def load(candidate_first: bool) -> tuple[Runner, Runner]:
        first, second = reversed(job["runs"]) if candidate_first else job["runs"]
        pair = [_runner(job, run, specs, _as_users_run_it(job, run)) for run in (first, second)]
        return (pair[1], pair[0]) if candidate_first else (pair[0], pair[1])

    report.line(step="bench", processors=_processors(), loads=measure(load, job["bench"]["seconds"]))
    for run in job["runs"] if job["device"] == "cpu" else ():
        report.line(step="profile", name=run["name"], times=_profile(job, run, specs))


def _watch(job: dict[str, Any], sets: list[Any], report: Report) -> None:
    """Sums over what norms read in one model, or over how two models differ, into `watched.npz`."""
    folder, sessions = Path(job["folder"]), []
    try:
        for run in job["runs"]:
            name = run["name"]
            sessions.append(_session(run, job["device"]))
        watcher = _watcher(job["watch"], folder)
        for number, specs in enumerate(sets):
            found = []
            for run, session in zip(job["runs"], sessions, strict=True):
                name = run["name"]
                feeds = _feeds(job, specs, run, number)
                known = [entry.name for entry in session.get_inputs()]
                names = [output.name for output in session.get_outputs()]
                outputs = session.run(None, {k: v for k, v in feeds.items() if k in known})
                found.append((feeds, dict(zip(names, outputs, strict=True))))
            watcher.see(*found)
    except Exception as failure:
        report.line(step="run", name=name, error=_first_line(failure))
        return
    np.savez(folder / "watched.npz", **watcher.to_arrays())
    for run, session in zip(job["runs"], sessions, strict=True):
        report.line(step="run", name=run["name"], providers=session.get_providers())


#: What a model was fed, and what it put out.
_Fed = tuple[dict[str, Array], dict[str, Any]]


class _NormInputs:
    def __init__(self, watch: dict[str, Any]) -> None:
        self.norms = [Watched.from_dict(fields) for fields in watch["norms"]]
        self.sums = [InputSums.of(norm) for norm in self.norms]

    def see(self, run: _Fed) -> None:
        known = run[0] | run[1]
        for norm, sums in zip(self.norms, self.sums, strict=True):
            sums.see(known[norm.tensor])

    def to_arrays(self) -> dict[str, Array]:
        every = (sums.to_arrays() for sums in self.sums)
        return {f"{i}.{name}": array for i, arrays in enumerate(every) for name, array in arrays.items()}


class _Pair:
    def __init__(self, watch: dict[str, Any], folder: Path) -> None:
        self.outputs = watch["outputs"]
        with np.load(folder / "taps.npz", allow_pickle=False) as arrays:
            given = [[arrays[f"{i}.{k}"] for k in ("s", "t", "bias")] for i in range(len(watch["taps"]))]
        self.taps = [
            Tap(tap["before"], tap["after"], tuple(tap["axes"]), *own)
            for tap, own in zip(watch["taps"], given, strict=True)
        ]
        self.sums = PairSums.of(self.taps)

    def see(self, before: _Fed, after: _Fed) -> None:
        self.sums.see(self.taps, before[1], after[1])
        own, others = (list(run[1].values())[: len(self.outputs)] for run in (before, after))
        self.sums.see_outputs(dict(zip(self.outputs, own, strict=True)), others)

    def to_arrays(self) -> dict[str, Array]:
        return self.sums.to_arrays()


def _watcher(watch: dict[str, Any], folder: Path) -> Any:
    return _NormInputs(watch) if "norms" in watch else _Pair(watch, folder)


def _processors() -> int | None:
    """How many of them this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _profile(job: dict[str, Any], run: dict[str, Any], specs: list[Any]) -> dict[str, int]:
    session = _as_users_run_it(job, run, profile=Path(job["folder"]) / run["name"])
    once = _runner(job, run, specs, session)
    for _ in range(PROFILED_RUNS):
        once()
    path = Path(session.end_profiling())
    times = time_by_op(json.loads(path.read_text(errors="replace")))
    path.unlink()
    return times


def _runner(job: dict[str, Any], run: dict[str, Any], specs: list[Any], session: Any) -> Runner:
    known = [entry.name for entry in session.get_inputs()]
    feeds = {name: array for name, array in _feeds(job, specs, run, 0).items() if name in known}
    return lambda: session.run(None, feeds)


def _as_users_run_it(job: dict[str, Any], run: dict[str, Any], profile: Path | None = None) -> Any:
    """A session with every optimisation, and TF32 where the device has it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = job["bench"]["threads"] or 0
    # threads that wait for work in a loop, after a run, would take the processors from the other model
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    providers = [CUDA, CPU] if job["device"] == "cuda" else [CPU]
    return onnxruntime.InferenceSession(run["model"], options, providers=providers)


def _feeds(job: dict[str, Any], specs: list[Any], run: dict[str, Any], number: int) -> dict[str, Array]:
    given = job["set_files"][number] if job.get("set_files") else job["inputs_file"]
    if given:
        with np.load(given, allow_pickle=False) as arrays:
            feeds = {name: arrays[name] for name in arrays.files}
    else:
        feeds = {spec.name: generate(spec) for spec in map(InputSpec.from_dict, specs)}
    if run["nudge"] is None:
        return feeds
    rng = np.random.default_rng([run["nudge"], number])
    return {name: nudge(array, rng) for name, array in feeds.items()}


def _first_line(failure: Exception) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0]


if __name__ == "__main__":
    main(sys.argv[1])
