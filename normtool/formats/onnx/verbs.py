"""What the library does with an opened ONNX model; `formats/torch/verbs.py` has the same functions."""

from contextlib import AbstractContextManager
from pathlib import Path

import onnx

from normtool.constants import Constants
from normtool.detect import find_norms
from normtool.formats.onnx.apply import apply_plan
from normtool.formats.onnx.model import OnnxModel
from normtool.formats.onnx.undo import undo_fold, undo_record
from normtool.formats.onnx.write import Staged, staged, to_proto
from normtool.key_map import Keys
from normtool.options import FoldOptions
from normtool.parameters import Census, census
from normtool.planner import Plan, Progress, plan_fold

__all__ = ["apply", "census_of", "keys_of", "make_plan", "stage", "to_object", "undo_fold", "undo_record"]


def census_of(opened: OnnxModel) -> Census:
    return census(opened.graph, find_norms(opened.graph, Constants(opened.graph)))


def keys_of(opened: OnnxModel) -> Keys:
    """The initializers of the main graph."""
    return {tensor.name: (tensor.name,) for tensor in opened.proto.graph.initializer}


def make_plan(opened: OnnxModel, options: FoldOptions, progress: Progress) -> Plan:
    return plan_fold(opened.graph, opened.fingerprint, options, progress)


def apply(opened: OnnxModel, plan: Plan) -> OnnxModel:
    return apply_plan(opened, plan)


def to_object(opened: OnnxModel) -> onnx.ModelProto:
    return to_proto(opened)


def stage(opened: OnnxModel, destination: Path, force: bool) -> AbstractContextManager[Staged]:
    return staged(opened, destination, force)
