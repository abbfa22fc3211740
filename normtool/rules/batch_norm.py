"""BatchNorm in inference.

    s₂·(s₁·x + t₁) + t₂ = (s₂s₁)·x + (s₂t₁ + t₂)        s₁ = γ/√(σ² + ε), t₁ = β − μ·s₁

It is an affine map itself: met by another one, the two merge and it goes. Where that leads nowhere it takes the
other one in and stays:

    from behind: γ' = s·γ, β' = s·β + t        from ahead: γ' = s·γ, β' = β + (γ/√(σ² + ε))·(s·μ + t − μ)

Exact when it runs with its stored statistics (no training mode, no statistics per element) and s₁, t₁ are
finite.
"""

import numpy as np

from normtool.affine import Affine, batch_norm
from normtool.constants import Constants
from normtool.edits import Rebind
from normtool.graph import Op
from normtool.reasons import Reason
from normtool.rules._weights import entering, on_axis
from normtool.travel import Absorb, Answer, Answers, Maps, Merge, Operands, Rule, Stop, only
from normtool.values import EXTENDED, Array, Rounded


class BatchNorm(Rule):
    kinds = ("batch_norm",)

    def backward(self, constants: Constants, op: Op, wanted: Maps) -> Answers:
        inner = inference_affine(constants, op)
        if isinstance(inner, Stop):
            return inner
        gamma, beta, _, _ = _parameters(constants, op)
        if refusal := on_axis(op, only(wanted), 1, gamma.size, "scales"):
            return refusal
        map_ = only(wanted).spread(gamma.size)
        return Merge(inner, "x"), _rebound(constants, op, map_.s * gamma, map_.s * beta + map_.t)

    def forward(self, constants: Constants, op: Op, carried: Maps) -> Answers:
        map_, inner = entering(op, carried, "x"), inference_affine(constants, op)
        if isinstance(map_, Stop):
            return map_
        if isinstance(inner, Stop):
            return inner
        gamma, beta, mean, _ = _parameters(constants, op)
        if refusal := on_axis(op, map_, 1, gamma.size, "scales"):
            return refusal
        map_ = map_.spread(gamma.size)
        shifted = beta + inner.s * (map_.s * mean + map_.t - mean)
        return Merge(inner, "x"), _rebound(constants, op, map_.s * gamma, shifted)


def _rebound(constants: Constants, op: Op, gamma: Array, beta: Array) -> Answer:
    known = {slot: constants.graph.input(op, slot) for slot in ("weight", "bias", "var")}
    stored = next((t.dtype for t in known.values() if t is not None and t.dtype is not None), None)
    dtype = stored or np.dtype(np.float32)
    return Absorb(
        (
            Rebind(op, "weight", Rounded(gamma, dtype), f"{op.name}.weight"),
            Rebind(op, "bias", Rounded(beta, dtype), f"{op.name}.bias"),
        )
    )


def _parameters(constants: Constants, op: Op) -> tuple[Array, Array, Array, Array]:
    """γ, β, μ, σ² of a BatchNorm whose `inference_affine` exists, each (C,)."""
    operands = Operands(constants, op)
    gamma, beta, mean, var = (operands.wide(slot) for slot in ("weight", "bias", "mean", "var"))
    assert mean is not None
    assert var is not None
    return _given(gamma, mean, 1), _given(beta, mean, 0), mean, var


def inference_affine(constants: Constants, op: Op) -> Affine | Stop:
    """The map a BatchNorm computes with its stored statistics, or every reason why it has none."""
    reasons = _mode_reasons(constants, op)
    operands = Operands(constants, op)
    gamma, beta = operands.wide("weight"), operands.wide("bias")
    # in training it updates its own statistics: that they are no constants is the same reason again
    mean, var = (None if reasons else operands.wide(slot) for slot in ("mean", "var"))
    reasons += operands.reasons
    absent = [slot for slot in ("mean", "var") if constants.graph.input(op, slot) is None]
    if absent or (not reasons and (mean is None or var is None)):
        reasons.append(Reason("no_running_stats", "it stores no mean and variance", op.name))
    if reasons or mean is None or var is None:
        return Stop(tuple(reasons))
    eps = constants.attribute(op, "epsilon")
    if not isinstance(eps, int | float):
        return Stop((Reason("malformed", f"its epsilon is {eps!r}", op.name),))
    sizes = {p.shape for p in (gamma, beta, mean, var) if p is not None}
    if len(sizes) > 1 or len(mean.shape) != 1:
        message = f"its parameters have shapes {', '.join(map(str, sorted(sizes)))}"
        return Stop((Reason("malformed", message, op.name),))
    map_ = batch_norm(_given(gamma, mean, 1), _given(beta, mean, 0), mean, var, eps)
    if not map_.finite:
        return Stop((Reason("degenerate_stats", "γ/√(σ²+ε) or β − μ·s is not finite", op.name),))
    return map_


def _mode_reasons(constants: Constants, op: Op) -> list[Reason]:
    """Every sign that the op does not use its stored statistics, over all opsets.

    training_mode since 14, is_test up to 6; in between a second output meant training.
    """
    reasons = []
    extra = [slot for slot in constants.graph.outputs(op) if slot != "y"]
    old_training = op.version < 7 and not constants.attribute(op, "is_test")
    if constants.attribute(op, "training_mode") or (extra and op.version < 14) or old_training:
        message = "it normalises with the statistics of the batch"
        reasons.append(Reason("training_mode", message, op.name))
    elif any(constants.graph.readers(constants.graph.output(op, slot)) for slot in extra):
        message = "its statistics are read besides its output"
        reasons.append(Reason("multiple_readers", message, op.name))
    if op.version < 9 and not constants.attribute(op, "spatial"):
        message = "spatial=0 keeps statistics per element, not per channel"
        reasons.append(Reason("axis_mismatch", message, op.name))
    return reasons


def _given(parameter: Array | None, like: Array, default: int) -> Array:
    """An absent γ is 1 and an absent β is 0."""
    return parameter if parameter is not None else like * 0 + EXTENDED(default)
