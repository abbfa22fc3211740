"""What a runtime will make of the norms of an ONNX model: facts about ONNX Runtime worth knowing before
shipping.

Measured with ONNX Runtime 1.31 on CPU; `code` is explained by `normtool explain`.
"""

from collections.abc import Iterator
from typing import NamedTuple

from normtool.constants import Constants
from normtool.forms import NormForm, norm_forms
from normtool.graph import ModelGraph

#: GroupNormalization has been a function of other ops since this opset, and no kernel on CPU.
_GROUP_NORM_SINCE = 21


class Lint(NamedTuple):
    """One thing to know, and the norms it is about."""

    code: str
    message: str
    where: str


def lints(graph: ModelGraph) -> list[Lint]:
    """One entry for each thing that is true of some norms, with the first of them and how many more."""
    found: dict[str, list[str]] = {}
    for form in norm_forms(graph, Constants(graph)):
        for code in _of(graph, form):
            found.setdefault(code, []).append(form.ops[-1].name)
    return [Lint(code, _MESSAGES[code], _named(names)) for code, names in found.items()]


def _of(graph: ModelGraph, form: NormForm) -> Iterator[str]:
    op = form.ops[-1]
    if op.kind == "rms_norm" and form.x.dtype is not None and form.x.dtype.name == "bfloat16":
        yield "bfloat16_on_cpu"
    if op.kind == "group_norm" and op.domain == "" and op.version >= _GROUP_NORM_SINCE:
        yield "group_norm_inlined"
    if not form.is_native and any(each.kind == "reciprocal" for each in form.ops):
        yield "unfused_reciprocal"
    if form.kind in ("layer_norm", "rms_norm"):
        if not form.is_native and form.axes != ((len(form.x.shape) - 1,) if form.x.shape else (-1,)):
            yield "unfused_axes"
        elif _follows_residual(graph, form):
            yield "skip_layer_norm"


def _follows_residual(graph: ModelGraph, form: NormForm) -> bool:
    """Does it read a sum of two tensors, which ONNX Runtime takes into the norm?"""
    op = graph.producer(form.x)
    return op is not None and op.kind == "add" and all(graph.producer(t) for t in graph.inputs(op).values())


def _named(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


_MESSAGES = {
    "bfloat16_on_cpu": "the CPU provider has no RMSNormalization in bfloat16: such a model does not load there",
    "group_norm_inlined": "the CPU provider has no GroupNormalization and writes it out, which "
    "takes 1.6 times as long",
    "unfused_reciprocal": "spelled with a Reciprocal, which ONNX Runtime does not fuse",
    "unfused_axes": "spelled out over axes that are not the last one, which ONNX Runtime does not fuse",
    "skip_layer_norm": "ONNX Runtime takes the Add in front into a Skip…LayerNormalization, on "
    "CPU slower than both; the "
    "session option optimization.disable_specified_optimizers=SkipLayerNormFusion leaves them apart",
}
