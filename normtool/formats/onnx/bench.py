"""Times two ONNX models in ONNX Runtime, in one child process: see `normtool.timing` for how."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from normtool.destination import scratch_folder
from normtool.errors import RuntimeRefused, UsageError
from normtool.formats.onnx.child import Run, refuse_failed, run_job
from normtool.formats.onnx.model import OnnxModel
from normtool.formats.onnx.profile import norm_share
from normtool.formats.onnx.run import TIME_LIMIT, described_inputs
from normtool.formats.onnx.write import staged
from normtool.inputs import Shapes, attempts
from normtool.timing import Benchmark, median, median_interval, milliseconds, ratio_of

#: Seconds that the timed runs take, about.
SECONDS = 10.0


def bench_onnx(
    reference: OnnxModel,
    candidate: OnnxModel,
    *,
    device: str = "cpu",
    seed: int = 0,
    inputs_file: Path | None = None,
    shapes: Shapes | None = None,
    seconds: float = SECONDS,
    threads: int | None = None,
    time_limit: float = TIME_LIMIT,
    progress: Callable[[str], None] = lambda step: None,
) -> Benchmark:
    """Interleaved runs with every optimisation of ONNX Runtime, on the first inputs that validation runs on.

    `threads` are those of one op; None leaves them to ONNX Runtime. A dynamic batch is 2, unless `shapes` or
    the inputs say otherwise.

    Raises RuntimeRefused (ONNX Runtime refuses a model, crashes or takes too long), BackendUnavailable (no
    such device), UsageError (inputs that do not fit the models).
    """
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r}: choose cpu or cuda")
    if seconds <= 0 or (threads is not None and threads < 1):
        raise UsageError(f"a benchmark takes time and threads, not {seconds} s with {threads} threads")
    sets = [] if inputs_file is None else [described_inputs(inputs_file, reference.graph)]
    tries = [] if inputs_file else attempts(reference.graph, seed, shapes)
    with scratch_folder() as folder:
        progress("timing")
        models = {"reference": reference, "candidate": candidate}
        runs = [Run(name, _on_disk(model, folder, name), "default") for name, model in models.items()]
        job = {
            "folder": str(folder),
            "device": device,
            "seed": seed,
            "attempts": [[spec.to_dict() for spec in specs] for specs in tries],
            "input_sets": sets,
            "inputs_file": str(inputs_file) if inputs_file else None,
            "bench": {"seconds": seconds, "threads": threads},
        }
        steps = run_job(folder / "bench.json", job, runs, time_limit)
    return _benchmark(steps, sets, device, threads)


def _on_disk(model: OnnxModel, folder: Path, name: str) -> Path:
    """Where ONNX Runtime can open the model: its own path, unless it exists in memory only."""
    if model.path:
        return model.path
    path = folder / f"{name}.onnx"
    with staged(model, path, force=True, temporary=True) as stage:
        stage.commit()
    return path


def _benchmark(steps: list[dict[str, Any]], sets: list[Any], device: str, threads: int | None) -> Benchmark:
    """The child's report as a value. Raises RuntimeRefused where it holds an error."""
    named = {(step["step"], step.get("name")): step for step in steps}
    probe = named.get(("probe", None), {"input_sets": sets})
    if "error" in probe:
        raise RuntimeRefused(f"ONNX Runtime runs the reference on no input that was tried: {probe['error']}")
    for name in ("reference", "candidate"):
        refuse_failed(f"the {name}", [step for step in steps if step.get("name") == name])
    timed = named["bench", None]
    loads = timed["loads"]
    ratios = [ratio_of(load) for load in loads]
    before, after = (
        norm_share(named["profile", name]["times"]) if ("profile", name) in named else None
        for name in ("reference", "candidate")
    )
    return Benchmark(
        *milliseconds(loads),
        median(ratios),
        *median_interval(ratios),
        len(loads),
        sum(len(reference) for reference, _ in loads),
        before,
        after,
        threads,
        timed["processors"],
        {"requested": device, "effective": named["run", "reference"]["providers"]},
        {spec["name"]: list(spec["shape"]) for spec in probe["input_sets"][0]},
        _notes(device, before, after),
    )


def _notes(device: str, before: float | None, after: float | None) -> tuple[str, ...]:
    if device == "cuda":
        return (
            "inputs and outputs are copied to and from the device in every run",
            "ONNX Runtime's profile of a device counts launches and not work: no share of the norms is told",
        )
    if before == 0 and not after:
        return (
            "ONNX Runtime runs no norm op even before: it folds some itself, runs some as other ops "
            "(BatchNormalization as Conv), and others are spelled out",
        )
    return ()
