"""Identity, Dropout in inference, Cast between floats.

The same numbers, so the same map. (A Cast rounds; like every rounding of the original it is no part of the
algebra.)
"""

from normtool.constants import Constants
from normtool.graph import Op, Tensor
from normtool.travel import Answer, Maps, Pass, Rule, Stop, only, stop
from normtool.values import is_float


class Carrier(Rule):
    kinds = ("identity", "dropout", "cast", "cast_like")

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        return refusal(constants, op) or Pass({"x": only(wanted)})

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        return refusal(constants, op) or Pass(outputs={"y": only(carried)})


def refusal(constants: Constants, op: Op) -> Stop | None:
    """Why the op does not just hand on what it reads."""
    tensors = [constants.graph.input(op, "x"), constants.graph.outputs(op).get("y")]
    if drops_out(constants, op):
        return stop("training_mode", op, f"{op.name!r} drops out at random, or may do so")
    if op.kind.startswith("cast") and not all(map(_holds_floats, tensors)):
        return stop("unsupported_op", op, f"{op.spelling} to or from a type that is no float")
    if len(constants.graph.outputs(op)) > 1 and constants.graph.readers(constants.graph.outputs(op)["mask"]):
        return stop("multiple_readers", op, f"the mask of {op.name!r} is read")
    return None


def drops_out(constants: Constants, op: Op) -> bool:
    """Is it a Dropout that runs in training, or that the caller may run so?"""
    told = constants.is_computed(op, "training_mode") or constants.attribute(op, "training_mode")
    return op.kind == "dropout" and bool(told)


def _holds_floats(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype is not None and is_float(tensor.dtype)
