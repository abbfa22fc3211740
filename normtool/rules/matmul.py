"""MatMul with one constant operand.

It has no bias, so s goes in and t is left over, for an Add.

    s·(x·W) + t = x·(W·diag(s)) + t          channels on the last axis, W on the right
    s·(W·x) + t = (diag(s)·W)·x + t          channels on the last axis but one, W on the left

Which of the two it is follows from the *position* of the channel axis, never from its size.
"""

import numpy as np

from normtool.affine import Affine
from normtool.constants import Constants
from normtool.edits import Rebind
from normtool.graph import Op
from normtool.reasons import Reason
from normtool.travel import Absorb, Answer, BackwardRule, Operands, Stop, mismatch
from normtool.values import Scaled


class MatMul(BackwardRule):
    kinds = ("matmul",)

    def meet(self, constants: Constants, op: Op, affine: Affine) -> Answer:
        rank = constants.graph.rank(constants.graph.output(op))
        if rank is None:
            return Stop((Reason("axis_unknown", "the rank of its output is unknown", op.name),))
        slot, weight_axis = ("b", -1) if affine.axis == rank - 1 else ("a", -2)
        if affine.axis < rank - 2:
            return mismatch(op, f"axis {affine.axis} of {rank} is a batch axis of {op.name!r}")
        operands = Operands(constants, op)
        weight = operands.value(slot)
        if weight is None:
            other = Operands(constants, op).value("a" if slot == "b" else "b")
            if other is not None:
                return mismatch(op, f"the constant of {op.name!r} does not write axis {affine.axis}")
            return operands.stop()
        if len(weight.shape) < 2:
            return mismatch(op, f"a vector operand takes the channel axis out of {op.name!r}")
        channels = weight.shape[weight_axis]
        if affine.s.size not in (1, channels):
            return mismatch(op, f"{op.name!r} writes {channels} channels on axis {affine.axis}")
        map_ = affine.spread(channels)
        factor = np.reshape(
            map_.s, [channels if axis == weight_axis else 1 for axis in range(-len(weight.shape), 0)]
        )
        edit = Rebind(op, slot, Scaled(weight, factor), f"{op.name}.weight")
        return Absorb((edit,), leftover=map_.t)
