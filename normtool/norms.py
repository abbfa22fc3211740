"""What each normalisation layer is: a table from op kind to norm kind, operand roles and axes.

A new norm op is a row in `ops.TABLE` and a row here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from normtool.constants import Constants
from normtool.graph import NormModule, Op, Scope, Tensor

if TYPE_CHECKING:
    from normtool.forms import NormForm

#: Axes counted from the front where the rank is known, else as the op states them.
Axes = tuple[int, ...]
AxesOf = Callable[[Constants, Op, int | None], Axes | None]


@dataclass(frozen=True)
class NormRow:
    """`learnable` and `buffers` are slots."""

    kind: str
    axes: AxesOf
    learnable: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    data: str = "x"


@dataclass(frozen=True, eq=False)
class Norm:
    """One normalisation site: an op, a module, or both.

    `eps` is None where the operator has none, `calls` where nothing says how often it runs. `op` is None for a
    norm that is spelled out in primitive ops (`form` says what they compute, if that is known), for one that is
    never called, or any where there is no dataflow.
    """

    name: str
    kind: str
    spelling: str
    evidence: str
    axes: Axes | None
    eps: float | None
    learnable: tuple[Tensor, ...]
    buffers: tuple[Tensor, ...]
    calls: int | None = 1
    op: Op | None = None
    module: NormModule | None = None
    form: "NormForm | None" = None

    @property
    def scope(self) -> Scope:
        if self.op is None and self.form is not None:
            return self.form.ops[-1].scope
        return self.op.scope if self.op is not None else Scope()


def _all_but_channels(constants: Constants, op: Op, rank: int | None) -> Axes | None:
    """BatchNorm: over the batch and every spatial axis."""
    return None if rank is None else (0, *range(2, rank))


def _spatial(constants: Constants, op: Op, rank: int | None) -> Axes | None:
    """InstanceNorm: over every spatial axis, per sample and channel."""
    return None if rank is None else tuple(range(2, rank))


def _grouped(constants: Constants, op: Op, rank: int | None) -> Axes | None:
    """GroupNorm: over the channels of a group and every spatial axis, per sample.

    The contrib operators read N, H, W, C; the axes are the same.
    """
    return None if rank is None else tuple(range(1, rank))


def _from_axis_on(constants: Constants, op: Op, rank: int | None) -> Axes | None:
    """LayerNorm, RMSNorm: from `axis` to the last."""
    axis = int(constants.attribute(op, "axis"))
    if rank is None:
        return (axis,) if axis == -1 else None
    return tuple(range(axis % rank, rank)) if rank else None


def _last(constants: Constants, op: Op, rank: int | None) -> Axes:
    return (-1,) if rank is None else (rank - 1,)


def _behind_the_indices(constants: Constants, op: Op, rank: int | None) -> Axes:
    """EmbedLayerNorm reads indices (batch, sequence) and normalises the axis that the lookup adds."""
    return (-1,) if rank is None else (rank,)


def _given_axis(constants: Constants, op: Op, rank: int | None) -> Axes:
    axis = int(constants.attribute(op, "axis"))
    return (axis,) if rank is None else (axis % rank,)


def _given_axes(constants: Constants, op: Op, rank: int | None) -> Axes:
    axes = tuple(int(axis) for axis in constants.attribute(op, "axes"))
    return axes if rank is None else tuple(axis % rank for axis in axes)


def _channel_window(constants: Constants, op: Op, rank: int | None) -> Axes:
    """LRN: over a window of neighbouring channels."""
    return (1,)


_WEIGHT_BIAS = ("weight", "bias")

NORMS: Mapping[str, NormRow] = {
    "batch_norm": NormRow("batch_norm", _all_but_channels, _WEIGHT_BIAS, ("mean", "var")),
    "instance_norm": NormRow("instance_norm", _spatial, _WEIGHT_BIAS, ("mean", "var")),
    "layer_norm": NormRow("layer_norm", _from_axis_on, _WEIGHT_BIAS),
    "skip_layer_norm": NormRow("layer_norm", _last, (*_WEIGHT_BIAS, "skip_bias")),
    "embed_layer_norm": NormRow("layer_norm", _behind_the_indices, _WEIGHT_BIAS, data="input_ids"),
    "rms_norm": NormRow("rms_norm", _from_axis_on, ("weight",)),
    "skip_rms_norm": NormRow("rms_norm", _last, ("weight", "skip_bias")),
    "group_norm": NormRow("group_norm", _grouped, _WEIGHT_BIAS),
    "contrib_group_norm": NormRow("group_norm", _grouped, _WEIGHT_BIAS),
    "skip_group_norm": NormRow("group_norm", _grouped, (*_WEIGHT_BIAS, "skip_bias")),
    "mean_variance_norm": NormRow("mean_variance_norm", _given_axes),
    "lp_norm": NormRow("lp_norm", _given_axis),
    "local_response_norm": NormRow("local_response_norm", _channel_window),
}


def axes_of(constants: Constants, op: Op, rank: int | None) -> Axes | None:
    """The axes that a norm op normalises; a rank or an attribute it cannot have leaves them unknown."""
    try:
        return NORMS[op.kind].axes(constants, op, rank)
    except (TypeError, ValueError, ZeroDivisionError):
        return None


def number(stated: Any) -> float | None:
    """ε as a float; None where the operator has none, or states what is no finite number."""
    try:
        return float(stated) if math.isfinite(stated) else None
    except TypeError:
        return None
