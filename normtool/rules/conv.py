"""Conv of any rank, groups, stride, padding, dilation.

    s·(W ⋆ x + b) + t = (s·W) ⋆ x + (s·b + t)

    W'[o] = s[o]·W[o]        b'[o] = s[o]·b[o] + t[o]

Exact always: zero padding happens before the sum over inputs, and the output channel is outside it.
"""

import numpy as np

from normtool.affine import Affine
from normtool.constants import Constants
from normtool.edits import Rebind
from normtool.graph import Op
from normtool.rules._bias import rebound_bias
from normtool.travel import Absorb, Answer, BackwardRule, Operands, mismatch
from normtool.values import Scaled


class Conv(BackwardRule):
    kinds = ("conv",)

    def meet(self, constants: Constants, op: Op, affine: Affine) -> Answer:
        operands = Operands(constants, op)
        weight, bias = operands.value("weight"), operands.wide("bias")
        if weight is None or operands.reasons:
            return operands.stop()
        channels = weight.shape[0]
        if constants.graph.rank(constants.graph.output(op)) not in (None, len(weight.shape)):
            return mismatch(op, f"{op.name!r} runs without a batch axis: its channels are on axis 0")
        if affine.axis != 1 or affine.s.size not in (1, channels):
            return mismatch(op, f"{op.name!r} writes {channels} channels on axis 1")
        map_ = affine.spread(channels)
        factor = np.reshape(map_.s, (channels, *[1] * (len(weight.shape) - 1)))
        return Absorb(
            (
                Rebind(op, "weight", Scaled(weight, factor), f"{op.name}.weight"),
                rebound_bias(constants, op, map_, bias, weight.dtype),
            )
        )
