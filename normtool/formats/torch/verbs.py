"""What the library does with an opened PyTorch model; `formats/onnx/verbs.py` has the same functions."""

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.export import ExportedProgram

from normtool.destination import StagedFile, staged_file
from normtool.errors import UsageError
from normtool.formats.torch import module_apply, program_apply
from normtool.formats.torch.export import export, undisturbed
from normtool.formats.torch.model import TorchModel
from normtool.formats.torch.sources import hash_file, need_example
from normtool.formats.torch.undo import undo_fold, undo_record
from normtool.key_map import Keys
from normtool.options import FoldOptions, SwapOptions
from normtool.parameters import Census
from normtool.planner import Plan, Progress, plan_fold

if TYPE_CHECKING:
    from normtool.formats.torch.watch import Watch
    from normtool.samples import Data
    from normtool.swapping import Drops, SwapPlan

__all__ = [
    "apply",
    "census_of",
    "keys_of",
    "make_plan",
    "make_swap_plan",
    "prepared",
    "stage",
    "to_object",
    "to_program",
    "undo_fold",
    "undo_record",
    "watch",
]


def census_of(opened: TorchModel) -> Census:
    return opened.census


def keys_of(opened: TorchModel) -> Keys:
    """Every key of the state dict; the hooks on `state_dict` are the user's code and not run."""
    stored = opened.state.stored
    every = {name: tuple(each.names) for each in stored if not each.packed for name in each.names}
    if opened.program is not None:
        return {name: names for name, names in every.items() if name in opened.program.state_dict}
    assert opened.module is not None
    modules = opened.module.named_modules(remove_duplicate=False)
    passing = {f"{path}.{name}".lstrip(".") for path, m in modules for name in m._non_persistent_buffers_set}
    return {name: names for name, names in every.items() if name not in passing}


def make_plan(opened: TorchModel, options: FoldOptions, progress: Progress) -> Plan:
    """A module's code makes the calls, so its plan is reviewed."""
    if opened.module is None:
        return plan_fold(opened.graph, opened.fingerprint, options, progress)
    return plan_fold(
        opened.graph,
        opened.fingerprint,
        options,
        progress,
        review=lambda folds: module_apply.review(opened, folds),
    )


def prepared(opened: TorchModel, options: SwapOptions) -> tuple[TorchModel, TorchModel, SwapOptions]:
    """(what the result is compared with, what is swapped, how). PyTorch has an operator for RMSNorm."""
    if options.target not in (None, "onnx"):
        raise UsageError(f"--target {options.target} is for ONNX models; PyTorch has nn.RMSNorm")
    reference = opened if options.outputs is None else program_apply.with_outputs(opened, options.outputs)
    return reference, reference, replace(options, target="onnx")


def make_swap_plan(
    opened: TorchModel, options: SwapOptions, progress: Progress, drops: "Drops | None" = None
) -> "SwapPlan":
    from normtool.swapping import plan_swap

    if opened.module is None:
        return plan_swap(opened.graph, opened.fingerprint, options, progress, drops=drops)
    from normtool.formats.torch import module_swap

    return plan_swap(
        opened.graph,
        opened.fingerprint,
        options,
        progress,
        review=lambda folds: module_swap.review(opened, folds),
        drops=drops,
    )


def watch(data: "Data") -> "Watch":
    """What runs models with their norms laid open."""
    from normtool.formats.torch.watch import Watch

    return Watch(data)


def apply(opened: TorchModel, plan: Plan, inplace: bool = False) -> TorchModel:
    if opened.module is not None and plan.verb == "swap":
        from normtool.formats.torch import module_swap

        return module_swap.swap_module(opened, plan, inplace)
    if opened.module is not None:
        return module_apply.fold_module(opened, plan, inplace)
    if inplace:
        raise UsageError("an ExportedProgram cannot be changed in place; take the result's .model")
    return program_apply.fold_program(opened, plan)


def to_object(opened: TorchModel) -> nn.Module | ExportedProgram:
    made = opened.module if opened.module is not None else opened.program
    assert made is not None
    return made


def to_program(opened: TorchModel) -> ExportedProgram:
    """The model as one that can be saved. Raises UsageError where nothing says what to call it with."""
    if opened.program is not None:
        return opened.program
    need_example(opened)
    assert opened.module is not None
    assert opened.example is not None
    return export(opened.module, opened.example, dynamic_batch=True)


def stage(opened: TorchModel, destination: Path, force: bool) -> AbstractContextManager[StagedFile]:
    """Write a .pt2 file, which torch.export.load opens again without normtool."""
    if destination.suffix != ".pt2":
        raise UsageError(f"{destination}: a PyTorch model is saved as .pt2; `normtool convert` makes ONNX")
    program = to_program(opened)

    def write(path: Path) -> None:
        with undisturbed():
            torch.export.save(program, path)

    return staged_file(destination, force, write, hash_file)
