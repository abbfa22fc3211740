"""Conv of any rank, groups, stride, padding, dilation.

Backward, over the output channels o:

    s·(W ⋆ x + b) + t = (s·W) ⋆ x + (s·b + t)        W'[o] = s[o]·W[o]        b'[o] = s[o]·b[o] + t[o]

Exact always: zero padding happens before the sum over inputs, and the output channel is outside it.

Forward, over the input channels, where grp(o) is the group that o lies in and I = Cin/g:

    W ⋆ (s·x + t) + b        W'[o,i] = W[o,i]·s[grp(o)·I+i]        b'[o] = b[o] + Σ_i,k W[o,i,k]·t[grp(o)·I+i]

Exact without zero padding (`auto_pad` SAME counts as padding), or where t = 0: padding commutes with a scale
and not with a shift.

A weight that comes out of a DequantizeLinear is asked to take s itself.
"""

import numpy as np

from normtool.affine import Affine
from normtool.constants import Constants
from normtool.edits import Insert, Rebind
from normtool.graph import Op
from normtool.ops import ROWS
from normtool.rules._weights import (
    blocks,
    entering,
    on_axis,
    raised_bias,
    rebound_bias,
    static_weight,
)
from normtool.semantics import evaluate
from normtool.travel import Absorb, Answer, Maps, Operands, Pass, Rule, Stop, mismatch, only, stop
from normtool.values import Array, Computed, Scaled, Value


class Conv(Rule):
    kinds = ("conv",)

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answer:
        operands = Operands(constants, op)
        weight = static_weight(operands, "weight")
        if isinstance(weight, Stop):
            return _into_quantised(constants, op, wanted) or weight
        bias = operands.wide("bias")
        if operands.reasons:
            return operands.stop()
        if refusal := _refusal(constants, op, only(wanted), weight.shape):
            return refusal
        map_ = only(wanted).spread(weight.shape[0])
        factor = np.reshape(map_.s, (weight.shape[0], *[1] * (len(weight.shape) - 1)))
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
        groups = int(constants.attribute(op, "group"))
        channels = weight.shape[1] * groups
        if refusal := on_axis(op, affine, 1, channels, "reads"):
            return refusal
        if constants.graph.rank(constants.graph.output(op)) not in (None, len(weight.shape)):
            return mismatch(op, f"{op.name!r} runs without a batch axis: its channels are on axis 0")
        if affine.has_shift and pads(constants, op):
            return stop("padded_shift", op, f"{op.name!r} pads with zeros, which a shift does not reach")
        map_ = affine.spread(channels)
        scaled = Rebind(
            op, "weight", Scaled(weight, _by_input(map_.s, groups, weight.shape)), f"{op.name}.weight"
        )
        if not affine.has_shift:
            return Absorb((scaled,))
        bias = operands.wide("bias")
        if operands.reasons:
            return operands.stop()
        moved = raised_bias(constants, op, bias, weight, lambda: _sums(weight, map_.t, groups), weight.shape[0])
        return Absorb((scaled, moved))

    def forward_with_map(self, constants: Constants, op: Op, carried: Maps) -> Answer:
        """A padded Conv: its shift is the constant Conv_W(t·1), one number per output position."""
        scaled, affine = (
            self.forward(constants, op, {slot: a.scale for slot, a in carried.items()}),
            only(carried),
        )
        y, x = constants.graph.output(op), constants.graph.input(op, "x")
        weight = Operands(constants, op).value("weight")
        if not isinstance(scaled, Absorb) or x is None or x.shape is None or weight is None:
            return (
                scaled
                if isinstance(scaled, Stop)
                else mismatch(op, f"the size of what {op.name!r} reads is unknown")
            )
        size = [n for n in x.shape[2:] if isinstance(n, int)]
        if len(size) < len(x.shape) - 2:
            return mismatch(op, f"the size of what {op.name!r} reads is not fixed")
        groups = int(constants.attribute(op, "group"))
        t = affine.spread(weight.shape[1] * groups).t
        content = np.broadcast_to(t.astype(np.float64).reshape(-1, *[1] * len(size)), (t.size, *size))
        attributes = {**ROWS["conv"].defaults, **op.attributes}

        def compute() -> Array:
            return evaluate("conv", attributes, {"x": content[None], "weight": weight})["y"]

        shape = compute().shape
        border = Rebind(op, "b", Computed(shape, weight.dtype, compute), f"{op.name}.border")
        return Absorb((*scaled.edits, Insert(y, op, "add", "a", {"b": border})))


def _refusal(constants: Constants, op: Op, affine: Affine, shape: tuple[int, ...]) -> Stop | None:
    if constants.graph.rank(constants.graph.output(op)) not in (None, len(shape)):
        return mismatch(op, f"{op.name!r} runs without a batch axis: its channels are on axis 0")
    return on_axis(op, affine, 1, shape[0], "writes")


def pads(constants: Constants, op: Op) -> bool:
    """Are zeros put around the input?"""
    auto = constants.attribute(op, "auto_pad")
    return auto in ("SAME_UPPER", "SAME_LOWER") or any(constants.attribute(op, "pads") or ())


def _by_input(s: Array, groups: int, shape: tuple[int, ...]) -> Array:
    """s (Cin,) laid out as [Cout, Cin/g, 1…]; a single group broadcasts over axis 0."""
    by_group = s.reshape(groups, shape[1])
    rows = by_group if groups == 1 else np.repeat(by_group, shape[0] // groups, axis=0)
    return rows.reshape(*rows.shape, *[1] * (len(shape) - 2))


def _sums(weight: Value, t: Array, groups: int) -> Array:
    """Σ_i,k W[o,i,k]·t[grp(o)·I+i], shape (Cout,)."""
    factor = _by_input(t, groups, weight.shape)
    parts = [
        (rows * (factor if len(factor) == 1 else factor[start:stop])).sum(axis=tuple(range(1, rows.ndim)))
        for start, stop, rows in blocks(weight)
    ]
    return np.concatenate(parts)


def _into_quantised(constants: Constants, op: Op, wanted: Maps) -> Answer | None:
    """Weight and bias that are dequantised: let what dequantises them take the map, on axis 0 of each."""
    graph = constants.graph
    makers = {
        slot: graph.producer(t) for slot in ("weight", "bias") if (t := graph.input(op, slot)) is not None
    }
    made = {slot for slot, maker in makers.items() if maker is not None and maker.kind == "dequantize_linear"}
    weight = graph.input(op, "weight")
    if "weight" not in made or weight is None or not weight.shape or not isinstance(weight.shape[0], int):
        return None
    if refusal := _refusal(constants, op, only(wanted), tuple(weight.shape)):  # type: ignore[arg-type]
        return refusal
    map_ = only(wanted).spread(weight.shape[0])
    inputs = {"weight": Affine(0, map_.s, np.zeros_like(map_.t))}
    if "bias" in made:
        return Pass(inputs | {"bias": map_.at(0)})
    operands = Operands(constants, op)
    bias = operands.wide("bias")
    if operands.reasons:
        return operands.stop()
    dtype = weight.dtype or np.dtype(np.float32)
    return Pass(inputs, edits=(rebound_bias(constants, op, map_, bias, dtype),))
