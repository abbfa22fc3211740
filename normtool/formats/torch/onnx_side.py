"""An ONNX model as one side of a validation against PyTorch: run in child processes, fed from files."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from normtool.comparison import NUDGES
from normtool.errors import RuntimeRefused
from normtool.formats.onnx.child import Run, run_job
from normtool.formats.onnx.model import OnnxModel
from normtool.formats.onnx.variants import nudged, suspects, wrong_by_one_percent
from normtool.formats.onnx.write import staged
from normtool.formats.torch.sides import Feed, Outputs, Refusal, Yardstick, matched
from normtool.graph import ModelGraph, Tensor
from normtool.inputs import model_inputs


@dataclass(eq=False)
class OnnxSide:
    model: OnnxModel
    who: str
    device: str
    folder: Path
    time_limit: float
    notes: list[str] = field(default_factory=list)
    providers: list[str] = field(default_factory=list)
    names: tuple[str, ...] = ()
    order: tuple[str, ...] = ()

    @property
    def graph(self) -> ModelGraph:
        return self.model.graph

    @property
    def runtime(self) -> str:
        return "ONNX Runtime"

    def adopt(self, names: Sequence[str]) -> None:
        self.names = tuple(tensor.name for tensor in model_inputs(self.graph))
        self.order = matched(names, self.names, self.who)

    @cached_property
    def path(self) -> Path:
        return self.model.path or self._written(self.model)

    def _written(self, model: OnnxModel) -> Path:
        path = Path(tempfile.mkdtemp(dir=self.folder)) / "model.onnx"
        with staged(model, path, force=True, temporary=True) as stage:
            stage.commit()
        return path

    # ---- runs -----------------------------------------------------------------------------

    def attempt(self, feeds: Sequence[Feed]) -> list[Outputs | Refusal]:
        runs = [Run(f"{number}", self.path, sets=(number,)) for number in range(len(feeds))]
        return self._run(runs, feeds)

    def _run(self, runs: Sequence[Run], feeds: Sequence[Feed]) -> list[Outputs | Refusal]:
        """One child process. Raises RuntimeRefused where it crashes or takes too long."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            folder = Path(name)
            files = [str(self._fed(folder / f"inputs-{i}.npz", feed)) for i, feed in enumerate(feeds)]
            job = {
                "folder": name,
                "device": self.device,
                "seed": 0,
                "attempts": [],
                "input_sets": [[]] * len(feeds),
                "inputs_file": None,
                "set_files": files,
            }
            steps = run_job(folder / "job.json", job, runs, self.time_limit)
            done = [step for step in steps if step["step"] == "run"]
            return [self._outputs(folder, run, step) for run, step in zip(runs, done, strict=True)]

    def _fed(self, path: Path, feed: Feed) -> Path:
        arrays: Any = {name: feed[source] for name, source in zip(self.names, self.order, strict=True)}
        with path.open("wb") as file:
            np.savez(file, **arrays)
        return path

    def _outputs(self, folder: Path, run: Run, step: dict[str, Any]) -> Outputs | Refusal:
        if "error" in step:
            return Refusal(step["error"])
        assert run.sets is not None
        self.providers = step["providers"]
        found = {}
        for position, name in enumerate(step["outputs"]):
            path = folder / f"{run.name}.{run.sets[0]}.{position}.npy"
            if path.exists():
                found[name] = np.load(path)
            else:
                self.notes.append(f"output {name!r} is no tensor; it was not compared")
        return found

    def is_random(self, feed: Feed, own: Outputs) -> bool:
        return False

    def at_default_level(self, feed: Feed) -> Outputs | None:
        """None too where the runtime refuses it: the question was about the model."""
        (found,) = self._run([Run("default", self.path, level="default", sets=(0,))], [feed])
        if isinstance(found, Refusal):
            self.notes.append(f"ONNX Runtime refuses {self.who} with its optimisations on: {found.message}")
            return None
        return found

    # ---- variants -------------------------------------------------------------------------

    def yardsticks(self, feeds: Sequence[Feed], own: Sequence[Outputs]) -> list[Yardstick]:
        moved = [self._nudged(feeds, seed) for seed in NUDGES]
        return [Yardstick(plain, tuple(runs[i] for runs in moved), plain) for i, plain in enumerate(own)]

    def _nudged(self, feeds: Sequence[Feed], seed: int) -> list[Outputs]:
        path = self._written(nudged(self.model, seed, ()))
        runs = self._run([Run(f"{i}", path, nudge=seed, sets=(i,)) for i in range(len(feeds))], feeds)
        path.unlink()
        found = []
        for run in runs:
            if isinstance(run, Refusal):
                raise RuntimeRefused(f"ONNX Runtime refuses {self.who}: {run.message}")
            found.append(run)
        return found

    def suspects(self, reference: ModelGraph) -> list[Tensor]:
        return suspects(reference, self.model)

    def spoiled(self, weight: Tensor) -> "OnnxSide":
        wrong = replace(self, model=wrong_by_one_percent(self.model, weight, ()))
        wrong.__dict__["path"] = wrong._written(wrong.model)  # its model still has the path of the right one
        return wrong
