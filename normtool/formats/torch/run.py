"""Validation with PyTorch on one side or both.

The reference is run in float64, and the yardstick is how far its own run, in its own precision, is from
that; see `normtool.comparison`. Against an ONNX reference the yardstick is that of `formats/onnx/run.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from normtool.comparison import (
    DIFFERENT,
    EQUAL,
    INCONCLUSIVE,
    SITES_TRIED,
    Comparison,
    Difference,
    OutputRuns,
    Sensitivity,
    compare,
    worst,
)
from normtool.destination import scratch_folder
from normtool.errors import BackendUnavailable, RuntimeRefused, UsageError
from normtool.formats.torch.copies import full_precision
from normtool.formats.torch.export import undisturbed
from normtool.formats.torch.input_sets import Source, find_source
from normtool.formats.torch.model import TorchModel
from normtool.formats.torch.sides import Feed, Outputs, Refusal, Side, Yardstick
from normtool.formats.torch.sources import to_example
from normtool.formats.torch.torch_side import TorchSide
from normtool.inputs import Shapes
from normtool.suspects import spaced

if TYPE_CHECKING:
    from normtool.formats.onnx.model import OnnxModel

#: Seconds that one child process (ONNX Runtime) may take; PyTorch runs here and takes what it takes.
TIME_LIMIT = 900.0

Progress = Callable[[str], None]


def validate_torch(
    reference: "TorchModel | OnnxModel",
    candidate: "TorchModel | OnnxModel",
    *,
    inputs: Any = None,
    device: str = "cpu",
    seed: int = 0,
    shapes: Shapes | None = None,
    inputs_file: Path | None = None,
    time_limit: float = TIME_LIMIT,
    progress: Progress = lambda step: None,
) -> Comparison:
    """Run both models and compare; one of them at least is a PyTorch model.

    Raises RuntimeRefused (a model raises, ONNX Runtime refuses it), BackendUnavailable (no such device),
    UsageError (nothing tells the inputs, or they are not the models').
    """
    _check_device(device)
    source = find_source((reference, candidate), inputs, shapes or {}, inputs_file, seed)
    with scratch_folder() as folder, undisturbed(), full_precision():

        def side(model: "TorchModel | OnnxModel", who: str) -> Side:
            if isinstance(model, TorchModel):
                return TorchSide(model, who, torch.device(device), to_example(inputs))
            from normtool.formats.torch.onnx_side import OnnxSide

            return OnnxSide(model, who, device, folder, time_limit)

        sides = side(reference, "the reference"), side(candidate, "the candidate")
        return _Validation(*sides, source, device, seed, progress).run()


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r}: choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(
            "device cuda: PyTorch sees no CUDA device here; leave out --device, or use cpu"
        )


@dataclass(eq=False)
class _Validation:
    reference: Side
    candidate: Side
    source: Source
    device: str
    seed: int
    progress: Progress
    feeds: list[Feed] = field(default_factory=list)
    own: list[Outputs] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self) -> Comparison:
        if self.device == "cuda":
            self.notes.append("TF32 off")
        self.progress("running the reference")
        base = self._choose_base()
        self._run_reference(base)
        self.progress("running the candidate")
        found = self._run_candidate(base)
        if self._is_random(found):
            return self._comparison(INCONCLUSIVE, [])
        self.progress("measuring the noise floor")
        yardsticks = self.reference.yardsticks(self.feeds, self.own)
        differences, notes = compare(_pairs(yardsticks, found))
        self.notes += notes
        verdict, sensitivity = self._verdict(differences), None
        if verdict == EQUAL:
            sensitivity = self._sensitivity(yardsticks)
            seen = sensitivity is not None and sensitivity.verdict == DIFFERENT
            verdict = EQUAL if seen else INCONCLUSIVE
        if verdict == INCONCLUSIVE:
            self.notes.append("an error of 1 % does not show at the outputs")
        default = self._default_level(yardsticks[0], found[0])
        return self._comparison(verdict, differences, sensitivity, default)

    def _comparison(
        self,
        verdict: str,
        differences: Sequence[Difference],
        sensitivity: Sensitivity | None = None,
        default: tuple[Difference, ...] | None = None,
    ) -> Comparison:
        sides = self.reference, self.candidate
        providers = dict.fromkeys(provider for side in sides for provider in side.providers)
        return Comparison(
            verdict,
            tuple(differences),
            {"requested": self.device, "effective": list(providers)},
            self.seed,
            sensitivity,
            default,
            (),
            tuple({name: list(array.shape) for name, array in feed.items()} for feed in self.feeds),
            tuple(dict.fromkeys([*self.notes, *self.reference.notes, *self.candidate.notes])),
        )

    # ---- inputs ---------------------------------------------------------------------------

    def _choose_base(self) -> Feed:
        names = list(self.source.bases[0])
        self.reference.adopt(names)
        self.candidate.adopt(names)
        if len(self.source.bases) == 1:
            return self.source.bases[0]
        refused: Refusal | None = None
        for base in self.source.bases:
            (run,) = self.reference.attempt([base])
            if not isinstance(run, Refusal):
                return base
            refused = refused or run
        assert refused is not None
        raise self._no_input(refused)

    def _run_reference(self, base: Feed) -> None:
        """Fill `feeds` and `own` with the input sets that run; the example itself only where none does."""
        refused: Refusal | None = None
        for alternatives in self.source.sets(base, self.seed):
            refused = self._take_first(alternatives) or refused
        if not self.feeds:
            refused = self._take_first([base])
        elif refused is not None:
            self.notes.append(f"an input set was left out, the reference refuses it: {refused.message}")
        if not self.feeds and refused is not None:
            raise self._no_input(refused)

    def _take_first(self, alternatives: list[Feed]) -> Refusal | None:
        """Take the first that runs; what the reference says, if there is none."""
        runs = self.reference.attempt(alternatives)
        for number, (feed, run) in enumerate(zip(alternatives, runs, strict=True)):
            if not isinstance(run, Refusal):
                self.feeds.append(feed)
                self.own.append(run)
                if number:
                    self.notes.append(_ONE_SIZE)
                return None
        return next(run for run in runs if isinstance(run, Refusal))

    def _no_input(self, refused: Refusal) -> RuntimeRefused:
        return RuntimeRefused(
            f"{self.reference.runtime} runs the reference on no input that was tried: {refused.message}"
        )

    # ---- runs -----------------------------------------------------------------------------

    def _run_candidate(self, base: Feed) -> list[Outputs]:
        found: list[Outputs] = []
        kept: list[int] = []
        for number, run in enumerate(self.candidate.attempt(self.feeds)):
            if isinstance(run, Refusal):
                self._refuse(run, self.feeds[number], base)
                continue
            kept.append(number)
            found.append(run)
        self.feeds, self.own = [self.feeds[i] for i in kept], [self.own[i] for i in kept]
        self._check_outputs(found[0])
        return found

    def _refuse(self, run: Refusal, feed: Feed, base: Feed) -> None:
        """Raises RuntimeRefused, unless it is a program at another size: its guards allow some only."""
        is_program = isinstance(self.candidate, TorchSide) and self.candidate.model.module is None
        if not is_program or all(array.shape == base[name].shape for name, array in feed.items()):
            raise RuntimeRefused(f"{self.candidate.runtime} refuses the candidate: {run.message}")
        self.notes.append(_ONE_SIZE)

    def _check_outputs(self, found: Outputs) -> None:
        expected = self.own[0]
        if len(found) != len(expected):
            counts = f"{len(expected)} and {len(found)}"
            raise UsageError(f"the models have {counts} outputs; they cannot be compared")
        both_torch = isinstance(self.reference, TorchSide) and isinstance(self.candidate, TorchSide)
        if both_torch and set(found) != set(expected):
            self.notes.append("the outputs have other names; they are compared in their order")

    def _is_random(self, found: Sequence[Outputs]) -> bool:
        return self.reference.is_random(self.feeds[0], self.own[0]) or self.candidate.is_random(
            self.feeds[0], found[0]
        )

    # ---- judgement ------------------------------------------------------------------------

    def _verdict(self, differences: Sequence[Difference]) -> str:
        """An output that was never compared leaves the question open."""
        if worst(differences) == EQUAL and len(differences) < len(self.own[0]):
            return INCONCLUSIVE
        return worst(differences)

    def _sensitivity(self, yardsticks: Sequence[Yardstick]) -> Sensitivity | None:
        """Plant an error of 1 % and see whether it is found; a weight may be dead, so a few are tried."""
        last: Sensitivity | None = None
        suspects = spaced(self.candidate.suspects(self.reference.graph), SITES_TRIED)
        for tried, weight in enumerate(suspects, start=1):
            self.progress("planting an error of 1 %")
            runs = self.candidate.spoiled(weight).attempt(self.feeds)
            done = [(y, run) for y, run in zip(yardsticks, runs, strict=True) if not isinstance(run, Refusal)]
            found, _ = compare(_pairs([y for y, _ in done], [run for _, run in done]))
            ratio = max((difference.ratio for difference in found), default=0.0)
            last = Sensitivity(weight.name, worst(found), ratio, tried)
            if last.verdict == DIFFERENT:
                return last
        return last

    def _default_level(self, yardstick: Yardstick, found: Outputs) -> tuple[Difference, ...] | None:
        """What ONNX Runtime's optimisations make of it, on the first input set."""
        ours = self.reference.at_default_level(self.feeds[0])
        theirs = self.candidate.at_default_level(self.feeds[0])
        if ours is None and theirs is None:
            return None
        yardstick = yardstick if ours is None else replace(yardstick, reference=ours)
        return tuple(compare(yardstick.against(found if theirs is None else theirs))[0])


_ONE_SIZE = "the dynamic dimensions ran at one size only"


def _pairs(yardsticks: Sequence[Yardstick], found: Sequence[Outputs]) -> list[OutputRuns]:
    return [pair for y, outputs in zip(yardsticks, found, strict=True) for pair in y.against(outputs)]
