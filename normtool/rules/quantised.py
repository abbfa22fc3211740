"""DequantizeLinear of a stored weight or bias.

    s·(scale·(q − z)) = (|s|·scale)·(sign(s)·(q − z))

A weight stays quantised: its scale takes |s|, its integers turn round where s < 0, which needs a symmetric
grid (z = 0) and no −128. One scale for the whole weight becomes one per channel. Exact but for the rounding of
the scales.

So does a bias; a shift would have to be put on its grid, up to half a step away from where it belongs, so it
stays behind as an Add. `--requantise` rounds it to that grid instead, and the proof states the error that
makes:

    q' = sign(s)·q + round(t/(|s|·scale))
"""

import numpy as np

from normtool.constants import Constants
from normtool.edits import Edit, Rebind, Replace
from normtool.graph import Op
from normtool.travel import Absorb, Answer, Maps, Operands, Rule, Stop, only, stop
from normtool.values import EXTENDED, Array, Dense, Rounded, exact_array, to_array


class Dequantize(Rule):
    kinds = ("dequantize_linear",)

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        return self._scaled(constants, op, wanted, rounding=False)

    def backward_rounding(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        return self._scaled(constants, op, wanted, rounding=True)

    def _scaled(self, constants: Constants, op: Op, wanted: Maps, rounding: bool) -> Answer:
        affine, stored = only(wanted), _stored(constants, op)
        if isinstance(stored, Stop):
            return stored
        integers, scale, zero = stored
        channels = integers.shape[0]
        axis = int(constants.attribute(op, "axis"))
        along = axis % max(1, integers.ndim)
        if op.version < 13 or constants.attribute(op, "block_size"):
            return stop("quantised", op, f"{op.spelling} has no scale per channel here")
        if affine.axis != 0 or affine.s.shape != (channels,) or (scale.size > 1 and along != 0):
            return stop("quantised", op, f"the scale of {op.name!r} lies on another axis")
        if np.any(zero != 0) or np.any(affine.s == 0):
            return stop("quantised", op, f"{op.name!r} has a zero point, or a channel's scale is 0")
        if affine.has_shift and not rounding:
            return stop("quantised", op, f"{op.name!r} holds multiples of its scale, and a shift is none")
        gain = np.broadcast_to(scale.reshape(-1), (channels,)) * np.abs(affine.s)
        by_channel = (-1, *[1] * (integers.ndim - 1))
        moved = integers.astype(np.int64) * np.sign(affine.s).reshape(by_channel).astype(np.int64)
        if affine.has_shift:
            moved = moved + np.rint(affine.t / gain).reshape(by_channel).astype(np.int64)
        limits = np.iinfo(integers.dtype)
        if moved.min(initial=0) < limits.min or moved.max(initial=0) > limits.max:
            return stop("quantised", op, f"an integer of {op.name!r} would leave {integers.dtype}")
        tensor = constants.graph.input(op, "scale")
        dtype = tensor.dtype if tensor is not None and tensor.dtype is not None else np.dtype(np.float32)
        edits: list[Edit] = []
        if axis not in (0, -integers.ndim):  # one scale so far, and no axis that mattered
            slots = {slot: slot for slot in constants.graph.inputs(op)}
            edits.append(Replace(op, op.kind, slots, {**op.attributes, "axis": 0}))
        edits.append(Rebind(op, "scale", Rounded(gain, dtype), f"{op.name}.scale"))
        if not np.array_equal(moved, integers):
            edits.append(Rebind(op, "x", Dense(moved.astype(integers.dtype)), f"{op.name}.x"))
        if zero.size == 1 and constants.graph.input(op, "zero_point") is not None and scale.size == 1:
            zeros = Dense(np.zeros(channels, integers.dtype))
            edits.append(Rebind(op, "zero_point", zeros, f"{op.name}.zero_point"))
        return Absorb(tuple(edits))


def _stored(constants: Constants, op: Op) -> tuple[Array, Array, Array] | Stop:
    """(integers, scale, zero point), all constant."""
    operands = Operands(constants, op)
    integers, scale = operands.value("x"), operands.wide("scale")
    zero = operands.value("zero_point")
    if integers is None or scale is None or operands.reasons:
        return stop("quantised", op, f"{op.spelling} of what is computed")
    whole = to_array(integers)
    if not np.issubdtype(whole.dtype, np.signedinteger) or whole.ndim == 0:
        return stop("quantised", op, f"{op.name!r} holds {whole.dtype}, whose grid is not symmetric")
    return whole, scale, np.zeros(1, EXTENDED) if zero is None else exact_array(zero)
