"""A PyTorch model as one side of a validation: run in this process, on copies."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from normtool.comparison import EQUAL, NUDGES, OutputRuns, compare
from normtool.errors import UsageError
from normtool.formats.torch import copies
from normtool.formats.torch.export import Example, ExportFailed, export, first_line, leaves
from normtool.formats.torch.float64 import Float64Program, NotInFloat64
from normtool.formats.torch.interface import (
    Interface,
    accepts,
    interface_by_names,
    interface_of_example,
    interface_of_program,
    named_outputs,
)
from normtool.formats.torch.model import TorchModel
from normtool.formats.torch.sides import Feed, Outputs, Refusal, Yardstick, matched
from normtool.formats.torch.tensors import to_numpy, to_tensor
from normtool.graph import ModelGraph, Tensor
from normtool.inputs import nudge
from normtool.suspects import changed
from normtool.values import Array

#: Where the model's own error against float64 is this many times what a rounding of everything does, it is no
#: rounding error.
_NOT_THE_SAME = 64.0

_OTHER_FUNCTION = "roundings do not explain the distance from the float64 run; the model is its own reference"


@dataclass(eq=False)
class TorchSide:
    model: TorchModel
    who: str
    device: torch.device
    example: Example | None = None
    weight: Tensor | None = None
    notes: list[str] = field(default_factory=list)
    interface: Interface | None = None
    #: position of each of the interface's tensors among the validation's inputs
    order: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if any(stored.tensor.is_meta for stored in self.model.state.stored):
            raise UsageError(f"{self.who}: the weights are not loaded (meta device); load them first")

    @property
    def graph(self) -> ModelGraph:
        return self.model.graph

    @property
    def runtime(self) -> str:
        return "PyTorch"

    @property
    def providers(self) -> list[str]:
        return [f"torch {self.device.type}"]

    def adopt(self, names: Sequence[str]) -> None:
        self.interface = self._interface(names)
        self.order = matched(names, self.interface.tensors, self.who)

    def _interface(self, names: Sequence[str]) -> Interface:
        module = self.model.module
        if module is None:
            assert self.model.program is not None
            return interface_of_program(self.model.program)
        for example in (self.example, self.model.example):
            if example is not None and accepts(module, example):
                return interface_of_example(module, example)[0]
        return interface_by_names(module, names)

    # ---- runs -----------------------------------------------------------------------------

    def attempt(self, feeds: Sequence[Feed]) -> list[Outputs | Refusal]:
        return self._run(self._copy(), feeds, seed=0)

    def _copy(self) -> nn.Module:
        module = copies.copied(self.model, self.device)
        if self.weight is not None:
            copies.spoil(module, self.weight.name)
        return module

    def _run(self, module: nn.Module, feeds: Sequence[Feed], seed: int) -> list[Outputs | Refusal]:
        return [self._run_once(module, feed, seed) for feed in feeds]

    def _run_once(self, module: nn.Module, feed: Feed, seed: int) -> Outputs | Refusal:
        example = self.call(feed)
        try:
            twin = copies.with_own_buffers(module)
            torch.manual_seed(seed)
            return self._outputs(twin(*example.args, **example.kwargs))
        except UsageError:
            raise
        except Exception as error:  # the model's own code
            return Refusal(f"{type(error).__name__}: {first_line(error)}")

    def call(self, feed: Feed) -> Example:
        assert self.interface is not None
        return self.interface.call([to_tensor(feed[name]).to(self.device) for name in self.order])

    def _outputs(self, value: Any) -> Outputs:
        tensors, others = named_outputs(value)
        self.notes += [f"output {name!r} is no tensor; it was not compared" for name in others]
        return {name: _to_array(tensor) for name, tensor in tensors.items()}

    def is_random(self, feed: Feed, own: Outputs) -> bool:
        module = self._copy()
        other = self._run_once(module, feed, seed=1)
        if not isinstance(other, Refusal) and _identical(own, other):
            return False
        again = self._run_once(module, feed, seed=0)  # a GPU that adds in any order is not random
        if not (_other_form(other, own) or _other_form(again, own)):
            found, _ = compare(Yardstick(own, (again,), own).against(other))  # type: ignore[arg-type]
            if all(difference.verdict == EQUAL for difference in found):
                return False
        training = self.model.module is not None and any(m.training for m in self.model.module.modules())
        hint = "it is in training mode (call .eval())" if training else "two seeds give two results"
        self.notes.append(f"{self.who} computes something else each time: {hint}")
        return True

    # ---- the yardstick --------------------------------------------------------------------

    def yardsticks(self, feeds: Sequence[Feed], own: Sequence[Outputs]) -> list[Yardstick]:
        nudged = [self._nudged(feeds, own, seed) for seed in NUDGES]
        exact = self._exact(feeds, own)
        found = []
        for number, plain in enumerate(own):
            moved = tuple(runs[number] for runs in nudged)
            wide = exact[number]
            if wide is not None and not _explains(wide, plain, moved):
                self.notes.append(_OTHER_FUNCTION)
                wide = None
            runs = moved if wide is None else (plain, *moved)
            found.append(Yardstick(plain if wide is None else wide, runs, plain))
        return found

    def _nudged(self, feeds: Sequence[Feed], own: Sequence[Outputs], seed: int) -> list[Outputs]:
        """Where a rounding makes the model raise, nothing is learnt: its own outputs again."""
        module = self._copy()
        copies.nudge_weights(module, seed)
        moved = [
            {
                name: nudge(array, np.random.default_rng([seed, number, i]))
                for i, (name, array) in enumerate(feed.items())
            }
            for number, feed in enumerate(feeds)
        ]
        runs = self._run(module, moved, seed=0)
        return [plain if _other_form(run, plain) else run for run, plain in zip(runs, own, strict=True)]  # type: ignore

    def _exact(self, feeds: Sequence[Feed], own: Sequence[Outputs]) -> list[Outputs | None]:
        """In float64. None, with a note, where that cannot be done."""
        found: list[Outputs | None] = [None] * len(feeds)
        by_shape = sorted(range(len(feeds)), key=lambda number: _shapes(feeds[number]))
        held, wide = None, None  # one at a time: weights in float64 are two models' worth
        for number in by_shape:
            example, shapes = self.call(feeds[number]), _shapes(feeds[number])
            try:
                if wide is None or (self.model.module is not None and shapes != held):
                    wide = None
                    held, wide = shapes, Float64Program(self._program(example), self.device)
                run = self._outputs(wide.run(example))
            except (ExportFailed, NotInFloat64) as error:
                self.notes.append(f"no float64 run of the reference ({error}); it is its own reference")
                return [None] * len(feeds)
            found[number] = None if _other_form(run, own[number]) else run
        return found

    def _program(self, example: Example) -> torch.export.ExportedProgram:
        """The dataflow on these shapes; what was exported to read the model serves, if it saw the same."""
        if self.model.module is None:
            assert self.model.program is not None
            return self.model.program
        if self._was_exported_on(example):
            assert self.model.exported is not None
            return self.model.exported
        return export(copies.copied(self.model, self.device), example, hooks=True)

    def _was_exported_on(self, example: Example) -> bool:
        """Without hooks (reading leaves the user's out), on this device, on tensors of the same shapes?"""
        model = self.model
        if model.exported is None or model.module is None or model.example is None or self.device.type != "cpu":
            return False
        if any(child._forward_hooks or child._forward_pre_hooks for child in model.module.modules()):
            return False
        return _form(model.example) == _form(example)

    def at_default_level(self, feed: Feed) -> Outputs | None:
        return None

    # ---- planted errors -------------------------------------------------------------------

    def suspects(self, reference: ModelGraph) -> list[Tensor]:
        return changed(copies.weights(self.model), reference)

    def spoiled(self, weight: Tensor) -> "TorchSide":
        return replace(self, weight=weight)


def _to_array(tensor: torch.Tensor) -> Array:
    """A copy: the next run may write to the same memory. Complex numbers are pairs."""
    plain = tensor.detach()
    return np.array(to_numpy(torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain))


def _shapes(feed: Feed) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape for array in feed.values())


def _form(example: Example) -> list[Any]:
    """What tensors an example has where; anything else by its value."""
    pairs = [*enumerate(example.args), *sorted(example.kwargs.items())]
    return [(key, [_described(leaf) for leaf in leaves((value,))]) for key, value in pairs]


def _described(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf


def _identical(one: Outputs, other: Outputs) -> bool:
    return all(_same_bytes(one[name], other.get(name)) for name in one)


def _same_bytes(one: Array, other: Array | None) -> bool:
    return other is not None and one.shape == other.shape and one.tobytes() == other.tobytes()


def _other_form(run: Outputs | Refusal, plain: Outputs) -> bool:
    """Has the run other outputs than the model's own, by number?"""
    return isinstance(run, Refusal) or list(run) != list(plain)


def _explains(wide: Outputs, plain: Outputs, nudged: Sequence[Outputs]) -> bool:
    """Is the model's own distance from float64 one that roundings can cause?"""
    for name, own in plain.items():
        if own.shape != wide[name].shape or np.isnan(own.astype(np.float64)).any():
            return False
        found, _ = compare(
            [OutputRuns(name, own, [each[name] for each in nudged], wide[name].astype(own.dtype), own.dtype)]
        )
        if found and found[0].ratio > _NOT_THE_SAME:
            return False
    return True
