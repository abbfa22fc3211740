"""b' = s·b + t, shared by every op with a per-channel bias."""

from typing import Any

import numpy as np

from normtool.affine import Affine
from normtool.constants import Constants
from normtool.edits import Rebind
from normtool.graph import Op
from normtool.values import Array, Rounded


def rebound_bias(
    constants: Constants, op: Op, affine: Affine, bias: Array | None, dtype: np.dtype[Any]
) -> Rebind:
    """The new bias, (C,) in `dtype`; an op that had none gets one named after its weight."""
    with np.errstate(all="ignore"):
        shifted = affine.t if bias is None else affine.s * bias + affine.t
    return Rebind(op, "bias", Rounded(shifted, dtype), _bias_name(constants, op))


def _bias_name(constants: Constants, op: Op) -> str:
    weight = constants.graph.input(op, "weight")
    stem = weight.name if weight is not None else op.name
    return f"{stem.removesuffix('.weight').removesuffix('_weight')}.bias"
