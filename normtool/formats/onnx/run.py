"""Validation of ONNX models: prepares the variants, runs them in child processes, hands over the numbers."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from normtool.comparison import (
    DIFFERENT,
    EQUAL,
    INCONCLUSIVE,
    Comparison,
    Difference,
    OutputRuns,
    Sensitivity,
    compare,
    worst,
)
from normtool.constants import Constants
from normtool.detect import find_norms
from normtool.edits import Rebind
from normtool.errors import BackendUnavailable, RuntimeRefused, UsageError
from normtool.formats.onnx.apply import variant
from normtool.formats.onnx.model import OnnxModel
from normtool.formats.onnx.write import staged
from normtool.graph import ModelGraph, Op, Role, Scope, Tensor
from normtool.inputs import Shapes, attempts, is_dynamic, nudge
from normtool.norms import NORMS
from normtool.parameters import roles
from normtool.reasons import Reason
from normtool.values import Array, Scaled, Value, element_count, is_float, row_blocks

#: Seconds that one child process may take.
TIME_LIMIT = 900.0

#: Seeds of the nudged references.
NUDGES = (1, 2)

#: How many sites are tried until a planted error of 1 % is seen at the outputs.
SITES_TRIED = 3

#: How many tensors inside the models are compared where the outputs are blind.
TAPS = 8

_WEIGHT_SLOTS = {"conv": ("weight",), "conv_transpose": ("weight",), "linear": ("b",), "matmul": ("a", "b")}

T = TypeVar("T")

Progress = Callable[[str], None]


def validate_onnx(
    reference: OnnxModel,
    candidate: OnnxModel,
    *,
    device: str = "cpu",
    seed: int = 0,
    inputs_file: Path | None = None,
    shapes: Shapes | None = None,
    time_limit: float = TIME_LIMIT,
    progress: Progress = lambda step: None,
) -> Comparison:
    """Run both models and compare (see `normtool.comparison`).

    Raises RuntimeRefused (ONNX Runtime refuses the reference, crashes or takes too long),
    BackendUnavailable (no such device), UsageError (inputs that do not fit the models).
    """
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r}: choose cpu or cuda")
    with tempfile.TemporaryDirectory(prefix="normtool-") as folder:
        validation = _Validation(
            reference, candidate, device, seed, inputs_file, shapes or {}, time_limit, progress
        )
        return validation.run(Path(folder))


@dataclass(frozen=True, eq=False)
class Nudged:
    """A stored value, every float of it moved to a neighbour; the same neighbours for the same seed."""

    source: Value
    seed: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.source.dtype

    def rows(self, start: int, stop: int) -> Array:
        return nudge(self.source.rows(start, stop), np.random.default_rng([*self.seed, start]))


@dataclass(frozen=True)
class _Run:
    """One model to run. `sets` None means every input set."""

    name: str
    model: Path
    level: str = "disabled"
    nudge: int | None = None
    sets: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "model": str(self.model)}


@dataclass(eq=False)
class _Validation:
    reference: OnnxModel
    candidate: OnnxModel
    device: str
    seed: int
    inputs_file: Path | None
    shapes: Shapes
    time_limit: float
    progress: Progress
    folder: Path = Path()
    input_sets: list[Any] = field(default_factory=list)
    providers: list[str] = field(default_factory=list)
    output_names: list[str] = field(default_factory=list)
    #: tensors inside both models that are compared beside the outputs (second stage only)
    taps: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def run(self, folder: Path) -> Comparison:
        self.folder = folder
        self._run_reference()
        self._run_candidate()
        differences = self._compared("candidate")
        default, _ = compare(list(self._outputs("candidate-default", [0], reference="reference-default")))
        verdict, sensitivity = worst(differences), None
        sites: list[Difference] = []
        if verdict != DIFFERENT:
            sensitivity = self._sensitivity(_spaced(self._suspects(), SITES_TRIED))
            if sensitivity is None or sensitivity.verdict != DIFFERENT:
                verdict, sensitivity, sites = self._second_stage(sensitivity)
        return Comparison(
            verdict,
            tuple(differences),
            {"requested": self.device, "effective": self.providers},
            self.seed,
            sensitivity,
            tuple(default),
            tuple(sites),
            tuple({entry["name"]: entry["shape"] for entry in specs} for specs in self.input_sets),
            tuple(dict.fromkeys(self.notes)),
        )

    def _second_stage(self, blind: Sensitivity | None) -> tuple[str, Sensitivity | None, list[Difference]]:
        """The outputs do not show an error of 1 %: look inside, at tensors that a fold left with their names.

        A saturated sigmoid or a softmax of equal logits hides everything; its input does not.
        """
        names = self.output_names
        self.taps = tuple(_spaced(self._shared_activations(), TAPS))
        if not self.taps:
            return INCONCLUSIVE, blind, []
        self.notes.append("an error of 1 % does not show at the outputs; folded sites inside were compared too")
        self._run_reference()
        self._run_candidate()
        found = self._compared("candidate")
        sites = [difference for difference in found if difference.name in self.taps]
        sensitivity = self._sensitivity(self._tapped_weights()) if worst(sites) == EQUAL else None
        self.output_names = names
        seen = sensitivity is not None and sensitivity.verdict == DIFFERENT
        return (EQUAL if seen else INCONCLUSIVE), sensitivity or blind, sites

    def _compared(self, who: str) -> list[Difference]:
        differences, notes = compare(list(self._outputs(who, range(len(self.input_sets)))))
        self.notes += notes
        return differences

    # ---- the runs -------------------------------------------------------------------------

    def _run_reference(self) -> None:
        self.progress("running the reference")
        path = self._on_disk(self.reference, "reference")
        runs = [_Run("reference", path)]
        for nudge_seed in NUDGES:
            nudged = self._nudged(nudge_seed)
            runs.append(_Run(f"nudged-{nudge_seed}", nudged, nudge=nudge_seed))
        runs.append(_Run("reference-default", path, level="default", sets=(0,)))
        tries: list[Any] = []
        if self.inputs_file is not None:
            self.input_sets = [_described_inputs(self.inputs_file)]
        elif not self.input_sets:
            tried = attempts(self.reference.graph, self.seed, self.shapes)
            tries = [[spec.to_dict() for spec in specs] for specs in tried]
        steps = self._child("reference", runs, tries)
        if tries:
            self._take_input_sets(steps)
        _refuse_failed("the reference", steps)
        first = next(step for step in steps if step["step"] == "run")
        self.providers, self.output_names = first["providers"], first["outputs"]

    def _run_candidate(self) -> None:
        self.progress("running the candidate")
        path = self._on_disk(self.candidate, "candidate")
        runs = [_Run("candidate", path), _Run("candidate-default", path, level="default", sets=(0,))]
        steps = self._child("candidate", runs, [])
        _refuse_failed("the candidate", steps)
        ran = next(step for step in steps if step["step"] == "run")
        if len(ran["outputs"]) != len(self.output_names):
            counts = f"{len(self.output_names)} and {len(ran['outputs'])}"
            raise UsageError(f"the models have {counts} outputs; they cannot be compared")
        if ran["outputs"] != self.output_names:
            self.notes.append("the outputs have other names; they are compared in their order")

    def _sensitivity(self, suspects: Sequence[Tensor]) -> Sensitivity | None:
        """Plant an error of 1 % and see whether it is found; a site may be dead, so a few are tried."""
        last: Sensitivity | None = None
        for tried, tensor in enumerate(suspects, start=1):
            self.progress("planting an error of 1 %")
            assert tensor.value is not None
            wrong = self._variant(self.candidate, "wrong", {tensor.name: _wrong_by_one_percent(tensor.value)})
            steps = self._child("wrong", [_Run("wrong", wrong)], [])
            _refuse_failed("the candidate with a planted error", steps)
            found, _ = compare(list(self._outputs("wrong", range(len(self.input_sets)))))
            ratio = max((difference.ratio for difference in found), default=0.0)
            last = Sensitivity(tensor.name, worst(found), ratio, tried)
            if last.verdict == DIFFERENT:
                return last
        return last

    # ---- where to look --------------------------------------------------------------------

    def _suspects(self) -> list[Tensor]:
        """Weights of linear ops; those that differ from the reference, if any do."""
        weights = [w for op in self.candidate.graph.ops for w in _weights_of(self.candidate, op)]
        weights = list(dict.fromkeys(weights)) or [
            tensor for tensor, role in _stored_roles(self.candidate).items() if role is Role.PARAMETER
        ]
        stored = {t.name: t.value for t in self.reference.graph.tensors if t.value is not None}
        return [t for t in weights if not _same(t.value, stored.get(t.name))] or weights

    def _shared_activations(self) -> list[str]:
        """Tensors of both main graphs that another kind of op produces now: what a fold leaves behind."""
        ours, theirs = (_producers(model.graph) for model in (self.candidate, self.reference))
        affine = {"batch_norm", "add", "sub", "mul", "div"}
        return [
            name
            for name, op in theirs.items()
            if op.kind in affine
            and name in ours
            and ours[name].kind != op.kind
            and _is_typed(self.candidate.graph, ours[name])
            and _is_typed(self.reference.graph, op)
        ]

    def _tapped_weights(self) -> list[Tensor]:
        """The weights of the ops that produce the taps, through an Add that may stand between."""
        graph, weights = self.candidate.graph, []
        producers = _producers(graph)
        for name in self.taps:
            op: Op | None = producers[name]
            for _ in range(2):
                weights += _weights_of(self.candidate, op) if op else []
                data = graph.input(op, "a") if op else None
                op = graph.producer(data) if data else None
        return list(dict.fromkeys(weights))

    def _nudged(self, seed: int) -> Path:
        """The reference with every float weight one rounding away, computed ones (ConstantOfShape) too."""
        stored = {
            tensor.name: Nudged(tensor.value, (seed, number))
            for number, (tensor, role) in enumerate(_stored_roles(self.reference).items())
            if role is not Role.CONSTANT and tensor.value is not None and is_float(tensor.value.dtype)
        }
        computed = [
            Rebind(op, slot, Nudged(value, (seed, number)), f"{op.name}.{slot}")
            for number, (op, slot, value) in enumerate(_computed_weights(self.reference))
        ]
        return self._variant(self.reference, f"nudged-{seed}", stored, computed)

    # ---- files and processes --------------------------------------------------------------

    def _on_disk(self, model: OnnxModel, name: str) -> Path:
        """Where ONNX Runtime can open the model: its own path, unless it exists in memory only."""
        if self.taps:
            return self._variant(model, name, {})
        return model.path or self._write(model, name)

    def _variant(
        self, model: OnnxModel, name: str, values: Mapping[str, Value], rebinds: Sequence[Rebind] = ()
    ) -> Path:
        return self._write(variant(model, values, rebinds, self.taps), name)

    def _write(self, model: OnnxModel, name: str) -> Path:
        path = self.folder / f"{name}.onnx"
        with staged(model, path, force=True, temporary=True) as stage:
            stage.commit()
        return path

    def _child(self, report: str, runs: Sequence[_Run], tries: list[Any]) -> list[dict[str, Any]]:
        """Run one child process to its end and return the lines it reported."""
        job = {
            "folder": str(self.folder),
            "report": f"{report}.jsonl",
            "device": self.device,
            "seed": self.seed,
            "attempts": tries,
            "input_sets": self.input_sets,
            "inputs_file": str(self.inputs_file) if self.inputs_file else None,
            "runs": [run.to_dict() for run in runs],
        }
        job_path = self.folder / f"{report}.job.json"
        job_path.write_text(json.dumps(job))
        code, complaint = _run_child(job_path, self.time_limit)
        report_path = self.folder / f"{report}.jsonl"
        lines = report_path.read_text().splitlines() if report_path.exists() else []
        steps = [json.loads(line) for line in lines]
        if code != 0:
            done = len([step for step in steps if step["step"] == "run"])
            name = runs[min(done, len(runs) - 1)].name
            raise RuntimeRefused(f"ONNX Runtime {_ending(code)} on {name}{complaint}")
        if self.device == "cuda":
            _require_cuda(steps)
        return steps

    def _take_input_sets(self, steps: list[dict[str, Any]]) -> None:
        probe = next((step for step in steps if step["step"] == "probe"), None)
        if probe is None or "error" in probe:
            error = probe["error"] if probe else "it did not start"
            raise RuntimeRefused(f"ONNX Runtime runs the reference on no input that was tried: {error}")
        self.input_sets = probe["input_sets"]
        if is_dynamic(self.reference.graph) and probe["sizes"] == 1:
            self.notes.append("the dynamic dimensions ran at one size only")

    def _outputs(self, who: str, sets: Sequence[int], reference: str = "reference") -> Iterator[OutputRuns]:
        for number in sets:
            for position, name in enumerate(self.output_names):
                arrays = [
                    self.folder / f"{run}.{number}.{position}.npy"
                    for run in (reference, who, *(f"nudged-{seed}" for seed in NUDGES))
                ]
                if not all(path.exists() for path in arrays):
                    self.notes.append(f"output {name!r} is no tensor; it was not compared")
                    continue
                expected, got, *nudged = (np.load(path) for path in arrays)
                yield OutputRuns(name, expected, nudged, got)


def _refuse_failed(who: str, steps: list[dict[str, Any]]) -> None:
    for step in steps:
        if "error" in step:
            raise RuntimeRefused(f"ONNX Runtime refuses {who}: {step['error']}")


def _described_inputs(path: Path) -> list[dict[str, Any]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [{"name": name, "shape": list(arrays[name].shape)} for name in arrays.files]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: is not a readable .npz file ({error})") from None


def _stored_roles(model: OnnxModel) -> dict[Tensor, Role]:
    """Dense tensors stored in the main graph, and what they are."""
    found = roles(model.graph, find_norms(model.graph))
    return {t: role for t, role in found.items() if t.scope == Scope() and t.stored_elements is None}


def _computed_weights(model: OnnxModel) -> Iterator[tuple[Op, str, Value]]:
    """Float weights that the main graph computes from constants, where they are read."""
    constants = Constants(model.graph)
    for op in model.graph.ops:
        slots = (*_WEIGHT_SLOTS.get(op.kind, ()), *(NORMS[op.kind].learnable if op.kind in NORMS else ()))
        for slot in slots if op.scope == Scope() else ():
            tensor = model.graph.input(op, slot)
            value = constants.value(tensor) if tensor is not None and tensor.value is None else None
            if value is not None and not isinstance(value, Reason) and is_float(value.dtype):
                yield op, slot, value


def _weights_of(model: OnnxModel, op: Op) -> list[Tensor]:
    """The stored float weights of a linear op in the main graph."""
    slots = _WEIGHT_SLOTS.get(op.kind, ()) if op.scope == Scope() else ()
    found = [model.graph.input(op, slot) for slot in slots]
    return [tensor for tensor in found if tensor is not None and _is_weight(tensor)]


def _producers(graph: ModelGraph) -> dict[str, Op]:
    """Activation name → op, for the main graph."""
    return {t.name: op for op in graph.ops if op.scope == Scope() for t in graph.outputs(op).values()}


def _is_typed(graph: ModelGraph, op: Op) -> bool:
    tensor = graph.output(op)
    return tensor.dtype is not None and graph.rank(tensor) is not None


def _run_child(job_path: Path, time_limit: float) -> tuple[int, str]:
    """(exit code, what it said last). A negative code is a signal; a killed one ran out of time."""
    command = [sys.executable, "-m", "normtool.formats.onnx.worker", str(job_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
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


def _is_weight(tensor: Tensor) -> bool:
    value = tensor.value
    return (
        value is not None
        and tensor.scope == Scope()
        and is_float(value.dtype)
        and element_count(value.shape) > 0
    )


def _wrong_by_one_percent(value: Value) -> Value:
    """±1 % row by row: a common factor would vanish behind the next normalisation."""
    if not value.shape:
        return Scaled(value, np.float64(1.01) * np.ones(()))
    sign = np.where(np.random.default_rng(0).integers(0, 2, value.shape[0]) == 1, 1.0, -1.0)
    return Scaled(value, (1 + 0.01 * sign).reshape(-1, *[1] * (len(value.shape) - 1)))


def _same(value: Value | None, other: Value | None) -> bool:
    if value is None or other is None or value.shape != other.shape or value.dtype != other.dtype:
        return False
    return all(value.rows(a, b).tobytes() == other.rows(a, b).tobytes() for a, b in row_blocks(value))


def _spaced(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items, evenly spread from first to last."""
    last = len(items) - 1
    positions = [round(i * last / max(1, count - 1)) for i in range(count)] if items else []
    return [items[position] for position in dict.fromkeys(positions)]
