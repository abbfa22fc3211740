"""ConvTranspose.

Its weight is [Cin, Cout/g, k…]: the output channel is axis 1, within the group that axis 0 lies in.

    output channel of W[i, j] = (i div Cin/g)·(Cout/g) + j

Backward, exact always:

    W'[i, j] = s[channel(i, j)]·W[i, j]        b' = s·b + t

Forward, s goes to axis 0. A shift is position dependent, even without padding, unless every output position
sees exactly one input position: kernel and stride 1, no padding added to the output.

    W'[i, j] = s[i]·W[i, j]        b'[channel(i, j)] = b + Σ_i t[i]·W[i, j]
"""

import numpy as np

from normtool.constants import Constants
from normtool.edits import Rebind
from normtool.graph import Op
from normtool.rules._weights import blocks, entering, on_axis, raised_bias, rebound_bias, static_weight
from normtool.travel import Absorb, Answer, Maps, Operands, Rule, Stop, mismatch, only, stop
from normtool.values import EXTENDED, Array, Scaled, Value


class ConvTranspose(Rule):
    kinds = ("conv_transpose",)

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        operands = Operands(constants, op)
        weight, bias = static_weight(operands, "weight"), operands.wide("bias")
        if isinstance(weight, Stop) or operands.reasons:
            return operands.stop()
        groups = int(constants.attribute(op, "group"))
        channels = weight.shape[1] * groups
        if constants.graph.rank(constants.graph.output(op)) not in (None, len(weight.shape)):
            return mismatch(op, f"{op.name!r} runs without a batch axis: its channels are on axis 0")
        if refusal := on_axis(op, only(wanted), 1, channels, "writes"):
            return refusal
        map_ = only(wanted).spread(channels)
        factor = _per_input_row(map_.s, groups, weight.shape)
        return Absorb(
            (
                Rebind(op, "weight", Scaled(weight, factor), f"{op.name}.weight"),
                rebound_bias(constants, op, map_, bias, weight.dtype),
            )
        )

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        operands = Operands(constants, op)
        affine, weight = entering(op, carried, "x"), static_weight(operands, "weight")
        if isinstance(affine, Stop):
            return affine
        if isinstance(weight, Stop):
            return weight
        if constants.graph.rank(constants.graph.output(op)) not in (None, len(weight.shape)):
            return mismatch(op, f"{op.name!r} runs without a batch axis: its channels are on axis 0")
        if refusal := on_axis(op, affine, 1, weight.shape[0], "reads"):
            return refusal
        if affine.has_shift and not _is_pointwise(constants, op, weight.shape):
            message = f"{op.name!r} adds a shift of its input a different number of times at each position"
            return stop("padded_shift", op, message)
        map_ = affine.spread(weight.shape[0])
        factor = map_.s.reshape(-1, *[1] * (len(weight.shape) - 1))
        scaled = Rebind(op, "weight", Scaled(weight, factor), f"{op.name}.weight")
        if not affine.has_shift:
            return Absorb((scaled,))
        bias = operands.wide("bias")
        if operands.reasons:
            return operands.stop()
        groups = int(constants.attribute(op, "group"))
        channels = weight.shape[1] * groups
        moved = raised_bias(constants, op, bias, weight, lambda: _sums(weight, map_.t, groups), channels)
        return Absorb((scaled, moved))


def _per_input_row(s: Array, groups: int, shape: tuple[int, ...]) -> Array:
    """s (Cout,) laid out as [Cin, Cout/g, 1…]; a single group broadcasts over axis 0."""
    by_group = s.reshape(groups, shape[1])
    rows = by_group if groups == 1 else np.repeat(by_group, shape[0] // groups, axis=0)
    return rows.reshape(*rows.shape, *[1] * (len(shape) - 2))


def _is_pointwise(constants: Constants, op: Op, shape: tuple[int, ...]) -> bool:
    stated = (constants.attribute(op, name) for name in ("strides", "output_padding", "pads"))
    strides, added, cropped = (list(each or ()) for each in stated)
    own = constants.attribute(op, "auto_pad") == "NOTSET" and not constants.attribute(op, "output_shape")
    return own and set(shape[2:]) <= {1} and set(strides) <= {1} and not any(added) and not any(cropped)


def _sums(weight: Value, t: Array, groups: int) -> Array:
    """Σ_i t[i]·W[i, j] over the inputs i of each group, shape (Cout,)."""
    sums = np.zeros((groups, weight.shape[1]), EXTENDED)
    per_group = weight.shape[0] // groups
    for first, end, rows in blocks(weight):
        terms = rows.reshape(end - first, weight.shape[1]) * t[first:end, None]
        np.add.at(sums, np.arange(first, end) // per_group, terms)
    return sums.reshape(-1)
