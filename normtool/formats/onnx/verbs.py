"""What the library does with an opened ONNX model; `formats/torch/verbs.py` has the same functions."""

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from normtool.constants import Constants
from normtool.detect import find_norms
from normtool.formats.onnx.apply import apply_plan
from normtool.formats.onnx.model import OnnxModel
from normtool.formats.onnx.undo import undo_fold, undo_record
from normtool.formats.onnx.write import Staged, staged, to_proto
from normtool.key_map import Keys
from normtool.options import FoldOptions, SwapOptions
from normtool.parameters import Census, census
from normtool.planner import Plan, Progress, plan_fold

if TYPE_CHECKING:
    from normtool.formats.onnx.watch import Watch
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
    "undo_fold",
    "undo_record",
    "watch",
]


def census_of(opened: OnnxModel) -> Census:
    return census(opened.graph, find_norms(opened.graph, Constants(opened.graph)))


def keys_of(opened: OnnxModel) -> Keys:
    """The initializers of the main graph."""
    return {tensor.name: (tensor.name,) for tensor in opened.proto.graph.initializer}


def make_plan(opened: OnnxModel, options: FoldOptions, progress: Progress) -> Plan:
    return plan_fold(opened.graph, opened.fingerprint, options, progress)


def prepared(opened: OnnxModel, options: SwapOptions) -> tuple[OnnxModel, OnnxModel, SwapOptions]:
    """(what the result is compared with, what is swapped, how its RMSNorms are spelled)."""
    from normtool.centring.targets import ONNX, PRIMITIVE, RMS_OPSET
    from normtool.formats.onnx.prepare import default_opset, with_opset, with_outputs

    reference = opened if options.outputs is None else with_outputs(opened, options.outputs)
    target = options.target or (ONNX if default_opset(opened) >= RMS_OPSET else PRIMITIVE)
    swapped = with_opset(reference, RMS_OPSET) if target == ONNX else reference
    return reference, swapped, replace(options, target=target)


def make_swap_plan(
    opened: OnnxModel, options: SwapOptions, progress: Progress, drops: "Drops | None" = None
) -> "SwapPlan":
    from normtool.swapping import plan_swap  # only `swap` pays for it

    return plan_swap(opened.graph, opened.fingerprint, options, progress, drops=drops)


def watch(data: "Data") -> "Watch":
    """What runs models with their norms laid open."""
    from normtool.formats.onnx.watch import Watch

    return Watch(data)


def apply(opened: OnnxModel, plan: Plan) -> OnnxModel:
    return apply_plan(opened, plan)


def to_object(opened: OnnxModel) -> onnx.ModelProto:
    return to_proto(opened)


def stage(opened: OnnxModel, destination: Path, force: bool) -> AbstractContextManager[Staged]:
    return staged(opened, destination, force)
