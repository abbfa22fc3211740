"""ReLU, LeakyReLU and PReLU: a positive scale passes, a shift does not.

    relu(s·x) = s·relu(x)        exact for s ≥ 0

Only on request (`--lower`): the shift stays behind as an Add, so that an op takes the place of another.
"""

import numpy as np

from normtool.affine import Affine
from normtool.constants import Constants
from normtool.edits import Edit, Insert, Rebind, Replace
from normtool.graph import Op
from normtool.travel import Answer, Maps, Merge, Pass, Rule, Stop, only, stop
from normtool.values import Array, Rounded


class Rectifier(Rule):
    kinds = ("relu", "leaky_relu", "prelu")
    lowers = True

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        return _refusal(op, only(wanted)) or Pass({"x": only(wanted)})

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        if set(carried) != {"x"}:
            return stop("nonlinear", op, f"{op.spelling} reads it")
        return _refusal(op, only(carried)) or Pass(outputs={"y": only(carried)})


def _refusal(op: Op, affine: Affine) -> Stop | None:
    if affine.has_shift:
        return stop("nonlinear", op, f"{op.spelling} does not pass a shift")
    if np.any(affine.s < 0):
        return stop("negative_scale", op, f"{op.spelling} does not pass a negative scale")
    return None


def lowering_edits(constants: Constants, op: Op, merge: Merge, how: str) -> list[Edit]:
    """A norm as Mul and Add (`mul-add`), or as a depthwise 1×1 Conv (`conv`, for data with spatial axes)."""
    graph, affine = constants.graph, merge.inner
    rank = graph.rank(graph.output(op))
    if rank is None:
        raise ValueError(f"the rank of the data at {op.name!r} is unknown")
    dtype = graph.output(op).dtype or np.dtype(np.float32)

    def constant(array: Array, slot: str, name: str) -> Rebind:
        return Rebind(op, slot, Rounded(array, dtype), f"{op.name}.{name}")

    trailing = [1] * (rank - 2)
    if how == "conv" and rank > 2:
        weight = constant(affine.s.reshape(-1, 1, *trailing), "weight", "weight")
        attributes = {"group": affine.s.size, "kernel_shape": trailing}
        constants_ = {"weight": weight, "bias": constant(affine.t, "bias", "bias")}
        return [Replace(op, "conv", {"x": merge.slot}, attributes, constants_)]
    scale = constant(affine.s.reshape(-1, *trailing), "b", "scale")
    edits: list[Edit] = [Replace(op, "mul", {"a": merge.slot}, constants={"b": scale})]
    if affine.has_shift:
        shift = constant(affine.t.reshape(-1, *trailing), "b", "shift")
        edits.append(Insert(graph.output(op), op, "add", "a", {"b": shift}))
    return edits
