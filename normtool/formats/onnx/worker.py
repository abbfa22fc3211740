"""The child process that runs ONNX Runtime: `python -m normtool.formats.onnx.worker JOB.json`.

ONNX Runtime can crash on a hostile or merely unusual model, and then it takes its process along. So it gets
one of its own, which reads a job, writes arrays into the job's folder and a report line after each step.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from normtool.inputs import InputSpec, generate, nudge
from normtool.values import Array

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"


def main(job_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    onnxruntime.set_default_logger_severity(4)
    report = Report(Path(job["folder"]) / job["report"])
    input_sets = job["input_sets"]
    if job["attempts"]:
        input_sets = _probe(job, report)
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
