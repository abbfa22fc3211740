"""What the library does with an opened ONNX model; `formats/torch/verbs.py` has the same functions."""

from contextlib import AbstractContextManager
from pathlib import Path

import onnx

from normtool.constants import Constants
from normtool.detect import find_norms
from normtool.formats.onnx.apply import apply_plan
from normtool.formats.onnx.model import OnnxModel
from normtool.formats.onnx.write import Staged, staged, to_proto
from normtool.parameters import Census, census
from normtool.planner import Plan, Progress, plan_fold

__all__ = ["apply", "census_of", "make_plan", "stage", "to_object"]


def census_of(opened: OnnxModel) -> Census:
    return census(opened.graph, find_norms(opened.graph, Constants(opened.graph)))


def make_plan(opened: OnnxModel, freeze: bool, progress: Progress) -> Plan:
    return plan_fold(opened.graph, opened.fingerprint, freeze, progress)


def apply(opened: OnnxModel, plan: Plan) -> OnnxModel:
    return apply_plan(opened, plan)


def to_object(opened: OnnxModel) -> onnx.ModelProto:
    return to_proto(opened)


def stage(opened: OnnxModel, destination: Path, force: bool) -> AbstractContextManager[Staged]:
    return staged(opened, destination, force)
