"""AveragePool, global and adaptive averages, ReduceMean, MaxPool, Pad and Resize.

An average whose weights sum to 1 passes s and t:  Σ wᵢ(s·xᵢ + t) = s·Σ wᵢxᵢ + t.  So do global and adaptive
averages, a mean over other axes, and interpolation. An AveragePool that counts its zero padding passes s alone.

MaxPool passes both where every s ≥ 0: the largest stays the largest.

Pad repeats what is there (reflect, edge, wrap), or puts a constant around it, which changes too:

    s·Pad_c(x) + t = Pad_{s·c+t}(s·x + t)        exact if s·c + t is one number over all channels
"""

import numpy as np

from normtool.affine import Affine
from normtool.constants import Constants
from normtool.edits import Rebind, Replace
from normtool.graph import Op
from normtool.travel import Answer, Maps, Pass, Rule, Stop, mismatch, only, stop
from normtool.values import EXTENDED, Array, Rounded


class Average(Rule):
    kinds = ("average_pool", "global_average_pool", "adaptive_average_pool", "resize")

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        return _refusal(constants, op, only(wanted)) or Pass({"x": only(wanted)})

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        if set(carried) != {"x"}:
            return stop("nonlinear", op, f"{op.spelling} reads it")
        return _refusal(constants, op, only(carried)) or Pass(outputs={"y": only(carried)})


def _refusal(constants: Constants, op: Op, affine: Affine) -> Stop | None:
    if affine.s.size > 1 and (affine.axis != 1 or affine.s.ndim > 1):
        return mismatch(op, f"{op.name!r} averages over axis {affine.axis}")
    if constants.attribute(op, "coordinate_transformation_mode") == "tf_crop_and_resize":
        return stop("padded_shift", op, f"{op.name!r} puts a constant around what it crops")
    if not affine.has_shift:
        return None
    if op.kind == "average_pool":
        counts = constants.attribute(op, "count_include_pad")
        auto = constants.attribute(op, "auto_pad") or "NOTSET"
        padded = any(constants.attribute(op, "pads") or ()) or auto not in ("NOTSET", "VALID")
        if counts and (padded or constants.attribute(op, "ceil_mode")):
            return stop("padded_shift", op, f"{op.name!r} counts its padding, which a shift does not reach")
        if constants.attribute(op, "divisor_override"):
            return stop("padded_shift", op, f"the weights of {op.name!r} do not sum to 1")
    return None


class Mean(Rule):
    kinds = ("reduce_mean",)

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        axes = _reduced(constants, op)
        if isinstance(axes, Stop):
            return axes
        affine = only(wanted)
        if affine.s.size == 1:
            return Pass({"x": affine.at(0)})
        if affine.s.ndim > 1:
            return mismatch(op, f"the map lies on several axes behind {op.name!r}")
        tensor = constants.graph.input(op, "x")
        rank = (constants.graph.rank(tensor) if tensor is not None else None) or 0
        left = [axis for axis in range(rank) if axis not in axes]
        axis = affine.axis if _keeps(constants, op) else left[affine.axis]
        if axis in axes:
            return mismatch(op, f"{op.name!r} averages over axis {axis}")
        return Pass({"x": affine.at(axis)})

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        axes = _reduced(constants, op)
        if isinstance(axes, Stop):
            return axes
        affine = only(carried)
        if affine.s.size == 1:
            return Pass(outputs={"y": affine.at(0)})
        if affine.s.ndim > 1 or affine.axis in axes:
            return mismatch(op, f"{op.name!r} averages over axis {affine.axis}")
        dropped = 0 if _keeps(constants, op) else sum(axis < affine.axis for axis in axes)
        return Pass(outputs={"y": affine.at(affine.axis - dropped)})


def _reduced(constants: Constants, op: Op) -> set[int] | Stop:
    """The axes that are averaged over, counted from the front."""
    tensor = constants.graph.input(op, "x")
    rank = constants.graph.rank(tensor) if tensor is not None else None
    if rank is None:
        return stop("axis_unknown", op, f"the rank of the data at {op.name!r} is unknown")
    if constants.is_computed(op, "axes"):
        return stop("dynamic_weight", op, f"the axes of {op.name!r} are computed")
    axes = constants.attribute(op, "axes")
    if not axes:
        return set() if constants.attribute(op, "noop_with_empty_axes") else set(range(rank))
    return {int(axis) % rank for axis in axes}


def _keeps(constants: Constants, op: Op) -> bool:
    stated = constants.attribute(op, "keepdims")
    return True if stated is None else bool(stated)


class MaxPool(Rule):
    kinds = ("max_pool",)

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        return _max_refusal(constants, op, only(wanted)) or Pass({"x": only(wanted)})

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        return _max_refusal(constants, op, only(carried)) or Pass(outputs={"y": only(carried)})


def _max_refusal(constants: Constants, op: Op, affine: Affine) -> Stop | None:
    if affine.s.size > 1 and (affine.axis != 1 or affine.s.ndim > 1):
        return mismatch(op, f"{op.name!r} takes maxima over axis {affine.axis}")
    indices = constants.graph.outputs(op).get("indices")
    if indices is not None and constants.graph.readers(indices):
        return stop("multiple_readers", op, f"the indices of {op.name!r} are read")
    if np.any(affine.s < 0):
        return stop("negative_scale", op, f"{op.name!r} would find the smallest where a scale is negative")
    return None


class Pad(Rule):
    kinds = ("pad",)

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        """Pad_{s·c+t}(s·x + t)."""
        affine = only(wanted)
        filled = _fill(constants, op, affine)
        if isinstance(filled, Stop):
            return filled
        value = None if filled is None else affine.s * EXTENDED(filled) + affine.t
        edits = () if filled is None or value is None else _refilled(constants, op, filled, value)
        return edits if isinstance(edits, Stop) else Pass({"x": affine}, edits=edits)

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        """Pad_c(s·x + t) = s·Pad_{(c−t)/s}(x) + t."""
        affine = only(carried)
        filled = _fill(constants, op, affine)
        if isinstance(filled, Stop):
            return filled
        if filled is not None and np.any(affine.s == 0):
            return stop("degenerate_stats", op, "a channel's scale is 0, which cannot be taken back")
        value = None if filled is None else (EXTENDED(filled) - affine.t) / affine.s
        edits = () if filled is None or value is None else _refilled(constants, op, filled, value)
        return edits if isinstance(edits, Stop) else Pass(outputs={"y": affine}, edits=edits)


def _fill(constants: Constants, op: Op, affine: Affine) -> float | Stop | None:
    """The constant that is put around; None where what is there is repeated."""
    mode = constants.attribute(op, "mode") or "constant"
    pads, rank = constants.attribute(op, "pads"), constants.graph.rank(constants.graph.output(op))
    if pads is None or rank is None or constants.is_computed(op, "axes"):
        return stop("dynamic_weight", op, f"the padding of {op.name!r} is computed")
    axes = constants.attribute(op, "axes") or range(rank)
    half = len(pads) // 2
    touched = {int(a) % rank for i, a in enumerate(axes) if pads[i] or pads[i + half]}
    if affine.s.size > 1 and touched & set(affine.axes):
        return mismatch(op, f"{op.name!r} pads the channels themselves")
    if mode != "constant":
        return None
    if constants.is_computed(op, "value"):
        return stop("dynamic_weight", op, f"what {op.name!r} puts around is computed")
    value = constants.attribute(op, "value")
    return float(np.asarray(value).reshape(())) if value is not None else 0.0


def _refilled(constants: Constants, op: Op, filled: float, value: Array) -> tuple[Rebind | Replace, ...] | Stop:
    """The edits for one new constant; ONNX Pad holds one scalar for all channels."""
    if np.any(value != value.flat[0]):
        return stop("padded_shift", op, f"{op.name!r} puts one constant around all channels")
    if value.flat[0] == filled:
        return ()
    dtype = constants.graph.output(op).dtype or np.dtype(np.float32)
    if "value" in op.attributes or op.domain != "" or op.version < 11:
        number, slots = float(value.flat[0]), {slot: slot for slot in constants.graph.inputs(op)}
        if op.domain == "" and dtype.itemsize > 4 and float(np.float32(number)) != number:
            return stop("padded_shift", op, f"{op.name!r} holds its constant in float32, beside {dtype}")
        return (Replace(op, "pad", slots, {**op.attributes, "value": number}),)
    return (Rebind(op, "value", Rounded(value.reshape(-1)[:1].reshape(()), dtype), f"{op.name}.value"),)
