"""Validation of ONNX models: prepares the variants, runs them in child processes, hands over the numbers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from normtool.comparison import (
    DIFFERENT,
    EQUAL,
    INCONCLUSIVE,
    NUDGES,
    SITES_TRIED,
    Comparison,
    Difference,
    OutputRuns,
    Sensitivity,
    compare,
    worst,
)
from normtool.destination import scratch_folder
from normtool.errors import RuntimeRefused, UsageError
from normtool.formats.onnx.apply import variant
from normtool.formats.onnx.child import Run, refuse_failed, run_job
from normtool.formats.onnx.model import OnnxModel
from normtool.formats.onnx.variants import (
    differ_elsewhere,
    folded_sites,
    nudged,
    suspects,
    wrong_by_one_percent,
)
from normtool.formats.onnx.write import staged
from normtool.graph import ModelGraph, Tensor
from normtool.inputs import Shapes, attempts, is_dynamic, model_inputs
from normtool.inputs_file import check_given, read_inputs
from normtool.suspects import spaced

#: Seconds that one child process may take.
TIME_LIMIT = 900.0

#: The same, where the outputs are blind and sites inside are compared.
SITES_TRIED_INSIDE = 8

#: With more folded sites than this, they are not compared one by one.
MOST_TAPS = 256

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
    with scratch_folder() as folder:
        validation = _Validation(
            reference, candidate, device, seed, inputs_file, shapes or {}, time_limit, progress
        )
        return validation.run(folder)


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
    same_output_names: bool = True
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
            sensitivity = self._sensitivity(spaced(suspects(self.reference.graph, self.candidate), SITES_TRIED))
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
        found_sites = folded_sites(self.reference, self.candidate)
        if not 0 < len(found_sites.taps) <= MOST_TAPS or not self.same_output_names:
            return INCONCLUSIVE, blind, []
        if differ_elsewhere(self.reference, self.candidate, found_sites):
            return INCONCLUSIVE, blind, []
        self.taps = found_sites.taps
        self.notes.append("an error of 1 % does not show at the outputs; folded sites inside were compared too")
        self._run_reference()
        self._run_candidate()
        found = self._compared("candidate")
        sites = [difference for difference in found if difference.name in self.taps]
        sensitivity = None
        if self._verdict(found) == EQUAL and all(site.resolved for site in sites):
            sensitivity = self._sensitivity(spaced(found_sites.weights(self.candidate), SITES_TRIED_INSIDE))
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
        runs = [Run("reference", path)]
        for nudge_seed in NUDGES:
            name = f"nudged-{nudge_seed}"
            written = self._write(nudged(self.reference, nudge_seed, self.taps), name)
            runs.append(Run(name, written, nudge=nudge_seed))
        runs.append(Run("reference-default", path, level="default", sets=(0,)))
        tries: list[Any] = []
        if self.inputs_file is not None:
            self.input_sets = [described_inputs(self.inputs_file, self.reference.graph)]
        elif not self.input_sets:
            tried = attempts(self.reference.graph, self.seed, self.shapes)
            tries = [[spec.to_dict() for spec in specs] for specs in tried]
        steps = self._child("reference", runs, tries)
        if tries:
            self._take_input_sets(steps)
        refuse_failed("the reference", steps)
        first = next(step for step in steps if step["step"] == "run")
        self.providers, self.output_names = first["providers"], first["outputs"]

    def _run_candidate(self) -> None:
        self.progress("running the candidate")
        path = self._on_disk(self.candidate, "candidate")
        runs = [Run("candidate", path), Run("candidate-default", path, level="default", sets=(0,))]
        steps = self._child("candidate", runs, [])
        refuse_failed("the candidate", steps)
        ran = next(step for step in steps if step["step"] == "run")
        if len(ran["outputs"]) != len(self.output_names):
            counts = f"{len(self.output_names)} and {len(ran['outputs'])}"
            raise UsageError(f"the models have {counts} outputs; they cannot be compared")
        self.same_output_names = ran["outputs"] == self.output_names
        if not self.same_output_names:
            self.notes.append("the outputs have other names; they are compared in their order")

    def _sensitivity(self, weights: Sequence[Tensor]) -> Sensitivity | None:
        """Plant an error of 1 % and see whether it is found; a site may be dead, so a few are tried."""
        last: Sensitivity | None = None
        for tried, weight in enumerate(weights, start=1):
            self.progress("planting an error of 1 %")
            wrong = self._write(wrong_by_one_percent(self.candidate, weight, self.taps), "wrong")
            steps = self._child("wrong", [Run("wrong", wrong)], [])
            refuse_failed("the candidate with a planted error", steps)
            found, _ = compare(list(self._outputs("wrong", range(len(self.input_sets)))))
            ratio = max((difference.ratio for difference in found), default=0.0)
            last = Sensitivity(weight.name, worst(found), ratio, tried)
            if last.verdict == DIFFERENT:
                return last
        return last

    # ---- files and processes --------------------------------------------------------------

    def _on_disk(self, model: OnnxModel, name: str) -> Path:
        """Where ONNX Runtime can open the model: its own path, unless it exists in memory only."""
        if self.taps:
            return self._write(variant(model, {}, outputs=self.taps), name)
        return model.path or self._write(model, name)

    def _write(self, model: OnnxModel, name: str) -> Path:
        path = self.folder / f"{name}.onnx"
        with staged(model, path, force=True, temporary=True) as stage:
            stage.commit()
        return path

    def _child(self, name: str, runs: Sequence[Run], tries: list[Any]) -> list[dict[str, Any]]:
        job = {
            "folder": str(self.folder),
            "device": self.device,
            "seed": self.seed,
            "attempts": tries,
            "input_sets": self.input_sets,
            "inputs_file": str(self.inputs_file) if self.inputs_file else None,
        }
        return run_job(self.folder / f"{name}.json", job, runs, self.time_limit)

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


def described_inputs(path: Path, graph: ModelGraph) -> list[dict[str, Any]]:
    """What a user's .npz holds, for the report. Raises UsageError where it does not fit the model."""
    arrays = read_inputs(path)
    for tensor in model_inputs(graph):
        check_given(path, tensor, arrays.get(tensor.name))
    return [{"name": name, "shape": list(array.shape)} for name, array in arrays.items()]
