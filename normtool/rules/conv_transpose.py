"""ConvTranspose.

Its weight is [Cin, Cout/g, k…]: the output channel is axis 1, within the group that axis 0 lies in.

    output channel of W[i, j] = (i div Cin/g)·(Cout/g) + j

    W'[i, j] = s[channel(i, j)]·W[i, j]        b' = s·b + t

Exact always.
"""

import numpy as np

from normtool.affine import Affine
from normtool.constants import Constants
from normtool.edits import Rebind
from normtool.graph import Op
from normtool.rules._bias import rebound_bias
from normtool.travel import Absorb, Answer, BackwardRule, Operands, mismatch
from normtool.values import Array, Scaled


class ConvTranspose(BackwardRule):
    kinds = ("conv_transpose",)

    def meet(self, constants: Constants, op: Op, affine: Affine) -> Answer:
        operands = Operands(constants, op)
        weight, bias = operands.value("weight"), operands.wide("bias")
        if weight is None or operands.reasons:
            return operands.stop()
        groups = int(constants.attribute(op, "group"))
        channels = weight.shape[1] * groups
        if constants.graph.rank(constants.graph.output(op)) not in (None, len(weight.shape)):
            return mismatch(op, f"{op.name!r} runs without a batch axis: its channels are on axis 0")
        if affine.axis != 1 or affine.s.size not in (1, channels):
            return mismatch(op, f"{op.name!r} writes {channels} channels on axis 1")
        map_ = affine.spread(channels)
        factor = _per_input_row(map_.s, groups, weight.shape)
        return Absorb(
            (
                Rebind(op, "weight", Scaled(weight, factor), f"{op.name}.weight"),
                rebound_bias(constants, op, map_, bias, weight.dtype),
            )
        )


def _per_input_row(s: Array, groups: int, shape: tuple[int, ...]) -> Array:
    """s (Cout,) laid out as [Cin, Cout/g, 1…]; a single group broadcasts over axis 0."""
    by_group = s.reshape(groups, shape[1])
    rows = by_group if groups == 1 else np.repeat(by_group, shape[0] // groups, axis=0)
    return rows.reshape(*rows.shape, *[1] * (len(shape) - 2))
