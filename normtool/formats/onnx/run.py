"""Validation of ONNX models: prepares the variants, runs them in child processes, hands over the numbers."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
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
from normtool.inputs import Shapes, attempts, fits, is_dynamic, model_inputs, nudge
from normtool.norms import NORMS
from normtool.parameters import roles
from normtool.reasons import Reason
from normtool.values import Array, Scaled, Value, element_count, is_float, row_blocks, to_array

#: Seconds that one child process may take.
TIME_LIMIT = 900.0

#: Seeds of the nudged references.
NUDGES = (1, 2)

#: How many sites are tried until a planted error of 1 % is seen at the outputs.
SITES_TRIED = 3

#: The same, where the outputs are blind and sites inside are compared.
SITES_TRIED_INSIDE = 8

#: With more folded sites than this, they are not compared one by one.
MOST_TAPS = 256

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
        verdict, sensitivity = self._verdict(differences), None
        sites: list[Difference] = []
        if verdict == EQUAL:
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

    def _verdict(self, differences: list[Difference]) -> str:
        """An output that was never compared (NaN in the reference, no tensor) leaves the question open."""
        if worst(differences) == EQUAL and len(differences) < len(set(self.output_names)):
            return INCONCLUSIVE
        return worst(differences)

    def _second_stage(self, blind: Sensitivity | None) -> tuple[str, Sensitivity | None, list[Difference]]:
        """The outputs do not show an error of 1 %: look inside, at tensors that a fold left with their names.

        A saturated sigmoid or a softmax of equal logits hides everything; its input does not. But it hides the
        rest of the model too, so the rest must be the same, op by op and number by number. And where the noise
        has grown to a tenth of a tensor, as in chaotic models, nothing is shown there.
        """
        names = self.output_names
        taps = self._shared_activations()
        if not taps or len(taps) > MOST_TAPS or self._differs_elsewhere(taps):
            return INCONCLUSIVE, blind, []
        self.taps = tuple(taps)
        self.notes.append("an error of 1 % does not show at the outputs; folded sites inside were compared too")
        self._run_reference()
        self._run_candidate()
        found = self._compared("candidate")
        sites = [difference for difference in found if difference.name in self.taps]
        sensitivity = None
        if self._verdict(found) == EQUAL and all(site.resolved for site in sites):
            sensitivity = self._sensitivity(_spaced(list(self._tapped_weights()), SITES_TRIED_INSIDE))
        self.output_names = names
        seen = sensitivity is not None and sensitivity.verdict == DIFFERENT
        return (EQUAL if seen else INCONCLUSIVE), sensitivity or blind, sites

    def _differs_elsewhere(self, taps: list[str]) -> bool:
        """Do the models differ in anything but the ops that produce the taps?"""
        changed = {op for name in taps for op in self._behind(name)}
        ours, theirs = (_described(model) for model in (self.candidate, self.reference))
        for op in self.candidate.graph.ops:
            if op in changed or op.kind == "constant":
                continue
            twin = theirs.get(ours_key := _key(self.candidate.graph, op))
            if twin != ours[ours_key] or not self._reads_the_same(op):
                return True
        return False

    def _reads_the_same(self, op: Op) -> bool:
        """Are the stored operands of an op of the candidate those of the reference, number by number?"""
        stored = {(t.scope, t.name): t.value for t in self.reference.graph.tensors}
        own = [t for t in self.candidate.graph.inputs(op).values() if t.value is not None]
        return all(_same(t.value, stored.get((t.scope, t.name))) for t in own)

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
            self.input_sets = [_described_inputs(self.inputs_file, self.reference.graph)]
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
            wrong = self._variant(self.candidate, "wrong", {tensor: _wrong_by_one_percent(tensor.value)})
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
        stored = {(t.scope, t.name): t.value for t in self.reference.graph.tensors}
        return [t for t in weights if not _same(t.value, stored.get((t.scope, t.name)))] or weights

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

    def _tapped_weights(self) -> dict[Tensor, None]:
        """The weights of the ops that produce the taps."""
        ops = (op for name in self.taps for op in self._behind(name))
        return dict.fromkeys(weight for op in ops for weight in _weights_of(self.candidate, op))

    def _behind(self, tap: str) -> Iterator[Op]:
        """The op of the candidate that produces a tap; where that only adds the shift, the absorber too."""
        graph = self.candidate.graph
        op = _producers(graph)[tap]
        yield op
        data = graph.input(op, "a") if op.kind == "add" else None
        absorber = graph.producer(data) if data is not None else None
        if absorber is not None:
            yield absorber

    def _nudged(self, seed: int) -> Path:
        """The reference with every float weight one rounding away, computed ones (ConstantOfShape) too."""
        stored = {
            tensor: Nudged(tensor.value, (seed, number))
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
        self, model: OnnxModel, name: str, values: Mapping[Tensor, Value], rebinds: Sequence[Rebind] = ()
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


def _described_inputs(path: Path, graph: ModelGraph) -> list[dict[str, Any]]:
    """What a user's .npz holds, for the report. Raises UsageError where it does not fit the model."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise UsageError(
                    f"{path}: holds one array without a name; save it with numpy.savez(path, NAME=…)"
                )
            arrays = {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        detail = (str(error).splitlines() or ["empty"])[0]
        raise UsageError(f"{path}: is not a readable .npz file ({detail})") from None
    for tensor in model_inputs(graph):
        _check_given(path, tensor, arrays.get(tensor.name))
    return [{"name": name, "shape": list(array.shape)} for name, array in arrays.items()]


def _check_given(path: Path, tensor: Tensor, array: Array | None) -> None:
    if array is None:
        raise UsageError(f"{path}: lacks the model's input {tensor.name!r}")
    if tensor.dtype is not None and array.dtype != tensor.dtype:
        raise UsageError(f"{path}: {tensor.name!r} is {array.dtype}, the model wants {tensor.dtype}")
    if not fits(array.shape, tensor.shape):
        raise UsageError(f"{path}: {tensor.name!r} has shape {array.shape}, the model wants {tensor.shape}")


def _stored_roles(model: OnnxModel) -> dict[Tensor, Role]:
    """Dense stored tensors, and what they are."""
    found = roles(model.graph, find_norms(model.graph))
    return {t: role for t, role in found.items() if t.stored_elements is None}


def _computed_weights(model: OnnxModel) -> Iterator[tuple[Op, str, Value]]:
    """Float weights that the model computes from constants, where they are read."""
    constants = Constants(model.graph)
    for op in model.graph.ops:
        slots = (*_WEIGHT_SLOTS.get(op.kind, ()), *(NORMS[op.kind].learnable if op.kind in NORMS else ()))
        for slot in slots:
            tensor = model.graph.input(op, slot)
            value = constants.value(tensor) if tensor is not None and tensor.value is None else None
            if value is not None and not isinstance(value, Reason) and is_float(value.dtype):
                yield op, slot, value


def _weights_of(model: OnnxModel, op: Op) -> list[Tensor]:
    """The stored float weights of a linear op."""
    found = [model.graph.input(op, slot) for slot in _WEIGHT_SLOTS.get(op.kind, ())]
    return [tensor for tensor in found if tensor is not None and _is_weight(tensor)]


def _producers(graph: ModelGraph) -> dict[str, Op]:
    """Activation name → op, for the main graph."""
    return {t.name: op for op in graph.ops if op.scope == Scope() for t in graph.outputs(op).values()}


def _key(graph: ModelGraph, op: Op) -> tuple[str, tuple[str, ...]]:
    """What identifies an op in two models: its scope and the names it gives."""
    return str(op.scope), tuple(sorted(tensor.name for tensor in graph.outputs(op).values()))


def _described(model: OnnxModel) -> dict[tuple[str, tuple[str, ...]], Any]:
    """Each op by its key: spelling, attributes, names of what it reads."""
    graph = model.graph
    return {
        _key(graph, op): (
            op.spelling,
            op.domain,
            {name: _plain(value) for name, value in op.attributes.items()},
            {slot: tensor.name for slot, tensor in graph.inputs(op).items()},
        )
        for op in graph.ops
    }


def _plain(attribute: Any) -> Any:
    """An attribute as something that compares: tensors by their content."""
    return to_array(attribute).tobytes() if hasattr(attribute, "rows") else attribute


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
