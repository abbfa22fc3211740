"""Runs ONNX models with norms laid open: what they read, and how far a result lies from the original there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper

from normtool.destination import scratch_folder
from normtool.drift import InputSums, PairSums, Tap, Watched
from normtool.errors import RuntimeRefused, UsageError
from normtool.formats.onnx.apply import variant
from normtool.formats.onnx.child import Run, refuse_failed, run_job
from normtool.formats.onnx.model import OnnxModel
from normtool.formats.onnx.run import TIME_LIMIT, described_inputs
from normtool.formats.onnx.write import staged
from normtool.graph import Scope, Tensor
from normtool.inputs import attempts, model_inputs
from normtool.samples import Data


@dataclass(frozen=True, eq=False)
class Watch:
    """All runs of one swap, on the same data."""

    data: Data
    time_limit: float = TIME_LIMIT

    def can_see(self, model: OnnxModel, tensor: Tensor) -> bool:
        """Only tensors of the main graph whose dtype is known can be put out."""
        return tensor.scope == Scope() and tensor.dtype is not None and tensor.value is None

    def inputs(self, model: OnnxModel, norms: Sequence[Watched]) -> list[InputSums]:
        """What norms read, summed up in one pass over the data.

        Raises RuntimeRefused (ONNX Runtime refuses the model, crashes or takes too long), UsageError (samples
        that do not fit it).
        """
        with scratch_folder() as folder:
            known = _by_name(model)
            path = _laid_open(model, folder, "model", {norm.tensor: known[norm.tensor] for norm in norms})
            watch = {"norms": [vars(norm) for norm in norms]}
            found = self._watched(folder, model, [Run("the model", path)], watch)
        sums = [InputSums.of(norm) for norm in norms]
        for number, each in enumerate(sums):
            each.take(found[f"{number}.numbers"], found[f"{number}.channels"])
        return sums

    def pair(self, before: OnnxModel, after: OnnxModel, taps: Sequence[Tap]) -> PairSums:
        """How far two models differ at norms and at outputs. Raises what `inputs` raises."""
        names = [output.name for output in before.proto.graph.output]
        known = _by_name(before)
        ours, theirs = ({getattr(tap, who): known[tap.before] for tap in taps} for who in ("before", "after"))
        with scratch_folder() as folder:
            runs = [
                Run("the model", _laid_open(before, folder, "before", ours)),
                Run("the result", _laid_open(after, folder, "after", theirs)),
            ]
            arrays = {f"{i}.{k}": getattr(tap, k) for i, tap in enumerate(taps) for k in ("s", "t", "bias")}
            np.savez(folder / "taps.npz", **arrays)
            plain = [{"before": tap.before, "after": tap.after, "axes": tap.axes} for tap in taps]
            found = self._watched(folder, before, runs, {"taps": plain, "outputs": names})
        sums = PairSums.of(taps)
        sums.take(found["taps"], found["outputs"], names)
        return sums

    def _watched(
        self, folder: Path, model: OnnxModel, runs: Sequence[Run], watch: dict[str, Any]
    ) -> dict[str, Any]:
        job = {"folder": str(folder), "device": self.data.device, "seed": self.data.seed, "watch": watch}
        steps = run_job(folder / "watch.json", {**job, **self._sets(folder, model)}, runs, self.time_limit)
        probe = next((step for step in steps if step["step"] == "probe"), {})
        if "error" in probe:
            raise RuntimeRefused(
                f"ONNX Runtime runs the model on no input that was tried: {probe['error']}\n"
                "--calibrate FILE.npz gives it inputs of its own"
            )
        for step in steps:
            refuse_failed(step.get("name", "the model"), [step])
        with np.load(folder / "watched.npz", allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def _sets(self, folder: Path, model: OnnxModel) -> dict[str, Any]:
        """What to run on: the samples batch by batch, a user's file, or specs of arrays to generate."""
        data = self.data
        none: dict[str, Any] = {"attempts": [], "inputs_file": None}
        if data.samples is not None:
            files = []
            for number, batch in enumerate(data.batches(model_inputs(model.graph))):
                files.append(str(folder / f"batch.{number}.npz"))
                np.savez(files[-1], **batch)  # type: ignore[arg-type]
            return {**none, "input_sets": [[]] * len(files), "set_files": files}
        path = data.inputs_file if data.inputs is None else _as_file(data.inputs, folder)
        if path is not None:
            return {**none, "input_sets": [described_inputs(path, model.graph)], "inputs_file": str(path)}
        tried = attempts(model.graph, data.seed, data.shapes)
        return {**none, "input_sets": [], "attempts": [[spec.to_dict() for spec in specs] for specs in tried]}


def _by_name(model: OnnxModel) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in model.graph.tensors if tensor.scope == Scope()}


def _laid_open(model: OnnxModel, folder: Path, name: str, tensors: Mapping[str, Tensor]) -> Path:
    """The model on disk with more outputs, behind its own: by name, of the dtypes that these tensors have.

    Nobody infers what an RMSNorm of ONNX Runtime's own puts out; it is what the LayerNorm did.
    """
    there = {each.name for each in (*model.proto.graph.output, *model.proto.graph.input)}
    path, opened = folder / f"{name}.onnx", variant(model, {})
    for each, tensor in tensors.items():
        if each not in there:
            assert tensor.dtype is not None
            data_type = helper.np_dtype_to_tensor_dtype(tensor.dtype)
            opened.proto.graph.output.append(helper.make_tensor_value_info(each, data_type, None))
    with staged(opened, path, force=True, temporary=True) as stage:
        stage.commit()
    return path


def _as_file(inputs: Any, folder: Path) -> Path:
    if not isinstance(inputs, Mapping):
        raise UsageError("inputs of ONNX models are given by name: {name: array}")
    path = folder / "inputs.npz"
    np.savez(path, **{name: np.asarray(array) for name, array in inputs.items()})  # type: ignore[arg-type]
    return path
