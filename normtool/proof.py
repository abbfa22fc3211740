"""Shows, for one fold, that it is right, where it was made and before a nonlinearity can hide an error.

Two checks, both independent of the rules that are judged:

(a) coefficients: every stored number lies within half an ulp (of its own dtype) of the exact value. The
    exact s and t are found by pushing the map *forward* through the chain in extended precision, and which
    output channel a weight belongs to is stated here again, by index (`_CHANNEL_OF`).
(b) region: absorber and chain, evaluated in float64 from the operators' definitions (`semantics`) on random
    input, agree with the folded region to 1e-12 of each channel's largest output or largest scaled term,
    whichever is more. Dilations, strides and paddings are cut down to small ones (`_small_geometry`).
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from normtool.constants import Constants
from normtool.edits import Edit, Rebind, Replace, Splice
from normtool.graph import Op
from normtool.ops import ROWS
from normtool.reasons import Reason
from normtool.semantics import evaluate
from normtool.values import (
    BLOCK,
    EXTENDED,
    Array,
    Dense,
    Scaled,
    Value,
    element_count,
    round_to,
    row_blocks,
    to_array,
    widened,
    working_dtype,
)

#: Largest difference of the two regions in float64, relative to the yardstick of (b).
REGION_TOLERANCE = 1e-12

#: Half an ulp, with room for the rounding of the exact value itself.
HALF_ULP = 0.5 * (1 + 2.0**-9)


@dataclass(frozen=True)
class Proof:
    """The outcome of both checks. `failures` is empty when the fold holds."""

    coefficients: int
    worst_ulp: float
    region_error: float
    failures: tuple[Reason, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "coefficients": self.coefficients,
            "worst_ulp": self.worst_ulp,
            "region_max_rel": self.region_error,
        }


def prove(constants: Constants, path: tuple[Op, ...], edits: tuple[Edit, ...]) -> Proof:
    """Check one fold; `path` is the absorber and then its chain, in dataflow order.

    The two checks read the same weights and share nothing else, so for large weights they run side by side:
    numpy lets go of the interpreter while it computes.
    """
    if max(element_count(rebind.value.shape) for rebind in _rebinds(edits)) < BLOCK:
        count, worst, failures = _check_coefficients(constants, path, edits)
        error = _region_error(constants, path, edits)
    else:
        with ThreadPoolExecutor(max_workers=1) as pool:
            region = pool.submit(_region_error, constants, path, edits)
            count, worst, failures = _check_coefficients(constants, path, edits)
            error = region.result()
    if not error <= REGION_TOLERANCE:
        message = f"the folded region differs by {error:.3g} in float64"
        failures.append(Reason("internal", message, path[0].name))
    return Proof(count, worst, error, tuple(failures))


def _rebinds(edits: tuple[Edit, ...]) -> list[Rebind]:
    direct = [edit for edit in edits if isinstance(edit, Rebind)]
    nested = [r for edit in edits if isinstance(edit, Replace) for r in edit.constants.values()]
    return direct + nested


# ---- (a) coefficients -------------------------------------------------------------------------


def _check_coefficients(
    constants: Constants, path: tuple[Op, ...], edits: tuple[Edit, ...]
) -> tuple[int, float, list[Reason]]:
    """(coefficients, the worst distance in ulp, what is wrong with them)."""
    map_ = exact_map(constants, path[1:])
    count, worst, failures = 0, 0.0, []
    for rebind in _rebinds(edits):
        exact = _exact_rows(constants, path[0], rebind, map_)
        fit = _compare(rebind.value, exact)
        count, worst, ulp = count + element_count(rebind.value.shape), max(worst, fit.ulp), fit.ulp
        if fit.overflows or fit.underflows:
            way = "overflows" if fit.overflows else "underflows"
            message = f"a coefficient of {rebind.name!r} {way} {rebind.value.dtype}"
            failures.append(Reason("range_overflow", message, rebind.op.name))
        elif ulp > HALF_ULP:
            message = f"{rebind.name!r} is off by {ulp:.3g} ulp"
            failures.append(Reason("internal", message, rebind.op.name))
    return count, worst, failures


def exact_map(constants: Constants, chain: tuple[Op, ...]) -> tuple[Array, Array]:
    """s and t of the whole chain: start from x ↦ 1·x + 0 and apply one op after the other."""
    s, t = np.ones(1, EXTENDED), np.zeros(1, EXTENDED)
    for op in chain:
        c = {slot: to_wide(value) for slot, value in operands(constants, op).items()}
        with np.errstate(all="ignore"):
            if op.kind == "batch_norm":
                eps = EXTENDED(constants.attribute(op, "epsilon"))
                deviation = np.sqrt(c["var"] + eps)
                gain = c.get("weight", EXTENDED(1)) / deviation
                s, t = s * gain, (t - c["mean"]) * gain + c.get("bias", EXTENDED(0))
            else:
                s, t = _exact_elementwise(op.kind, {k: v.reshape(-1) for k, v in c.items()}, s, t)
    return s, t


def _exact_elementwise(kind: str, c: Mapping[str, Array], s: Array, t: Array) -> tuple[Array, Array]:
    constant, data_first = (c["b"], True) if "b" in c else (c["a"], False)
    if kind == "add":
        return s, t + constant
    if kind == "sub":
        return (s, t - constant) if data_first else (-s, constant - t)
    if kind == "mul":
        return s * constant, t * constant
    return s / constant, t / constant


def to_wide(value: Value) -> Array:
    return widened(to_array(value))


def operands(constants: Constants, op: Op) -> dict[str, Value]:
    """The constant inputs of an op, by slot."""
    found = {slot: constants.value(t) for slot, t in constants.graph.inputs(op).items()}
    return {slot: value for slot, value in found.items() if not isinstance(value, Reason)}


def _by_axis(length: int, axis: int, rank: int) -> Array:
    return np.arange(length).reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def _conv_channel(shape: tuple[int, ...], attributes: Mapping[str, Any], slot: str) -> Array:
    return _by_axis(shape[0], 0, len(shape))


def _conv_transpose_channel(shape: tuple[int, ...], attributes: Mapping[str, Any], slot: str) -> Array:
    """W[i, j] writes channel (i div Cin/g)·Cout/g + j."""
    group = np.arange(shape[0]) // (shape[0] // int(attributes["group"]))
    channel = group[:, None] * shape[1] + np.arange(shape[1])
    return channel.reshape(*shape[:2], *[1] * (len(shape) - 2))


def _linear_channel(shape: tuple[int, ...], attributes: Mapping[str, Any], slot: str) -> Array:
    axis = 0 if attributes["transB"] else 1
    return _by_axis(shape[axis], axis, 2)


def _matmul_channel(shape: tuple[int, ...], attributes: Mapping[str, Any], slot: str) -> Array:
    axis = -1 if slot == "b" else -2
    return _by_axis(shape[axis], axis, len(shape))


#: absorber kind → for each stored weight, the output channel it writes (broadcast against the weight)
_CHANNEL_OF: Mapping[str, Callable[[tuple[int, ...], Mapping[str, Any], str], Array]] = {
    "conv": _conv_channel,
    "conv_transpose": _conv_transpose_channel,
    "linear": _linear_channel,
    "matmul": _matmul_channel,
}

#: absorber kind → slots of its weight
_WEIGHTS = {"conv": "weight", "conv_transpose": "weight", "linear": "b", "matmul": "a b"}

#: A way to ask for rows `start..stop` of the exact coefficients.
ExactRows = Callable[[int, int], Array]


def _attributes(op: Op) -> dict[str, Any]:
    return {**ROWS[op.kind].defaults, **op.attributes}


def _small_geometry(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The same op with dilations, strides and padding cut down to what still tells positions apart.

    A map of the output channels does not depend on them, and a dilation of 36 would ask for megabytes of input.
    """
    limits = {"dilations": 2, "strides": 3, "pads": 1}
    cut = {k: [min(n, limits[k]) for n in v] for k, v in attributes.items() if k in limits}
    stale = (
        {"output_padding": None, "output_shape": None}
        if "strides" in cut or "output_shape" in attributes
        else {}
    )
    return {**attributes, **cut, **stale}


def _exact_rows(constants: Constants, absorber: Op, rebind: Rebind, map_: tuple[Array, Array]) -> ExactRows:
    """The exact value of every coefficient of one rebound constant."""
    old = operands(constants, absorber)
    if rebind.op is absorber and rebind.slot in _WEIGHTS[absorber.kind].split():
        shape = rebind.value.shape
        channel = _CHANNEL_OF[absorber.kind](shape, _attributes(absorber), rebind.slot)
        s = np.broadcast_to(map_[0], (int(channel.max(initial=0)) + 1,))
        factor = Scaled(old[rebind.slot], s[channel].astype(working_dtype(rebind.value.dtype)))
        return factor.exact_rows
    exact = _exact_shift(absorber, rebind, old, map_).reshape(rebind.value.shape)
    return Dense(exact).rows


def _exact_shift(absorber: Op, rebind: Rebind, old: Mapping[str, Value], map_: tuple[Array, Array]) -> Array:
    """s·b + t for what the absorber already added, b; alone t where it added nothing."""
    s, t = map_
    added = EXTENDED(0) * t
    if rebind.op is absorber and rebind.slot in old:
        added = to_wide(old[rebind.slot]) * EXTENDED(_attributes(absorber).get("beta", 1.0))
    with np.errstate(all="ignore"):
        exact = s * added + t
    if exact.size != element_count(rebind.value.shape):
        return np.broadcast_to(exact, rebind.value.shape)
    return exact


@dataclass
class _Fit:
    """How the stored coefficients of one constant sit in their dtype."""

    ulp: float = 0.0
    overflows: bool = False
    underflows: bool = False


def _compare(value: Value, exact: ExactRows) -> _Fit:
    """The worst distance in ulp, and whether the dtype is too narrow. Correctly rounded counts as 0.5."""
    fit = _Fit()
    for start, stop in row_blocks(value):
        stored, wanted = value.rows(start, stop), exact(start, stop)
        fit.overflows |= not np.isfinite(stored).all()
        fit.underflows |= _underflows(stored, wanted)
        if fit.overflows:
            fit.ulp = np.inf
        elif stored.dtype.itemsize >= 4 and np.array_equal(round_to(wanted, value.dtype), stored):
            fit.ulp = max(fit.ulp, 0.5)
        else:
            fit.ulp = max(fit.ulp, float(np.max(ulp_distance(stored, wanted), initial=0.0)))
    return fit


def _underflows(stored: Array, exact: Array) -> bool:
    """Has a whole row of weights (a filter) sunk among the subnormals and lost its digits there?

    Single small weights beside large ones are no loss, and a bias is small only beside its output.
    """
    if stored.dtype != np.float16 or stored.ndim < 2:
        return False
    others = tuple(range(1, stored.ndim))
    largest = np.abs(exact).max(axis=others, initial=0.0)
    error = np.abs(stored.astype(exact.dtype) - exact).max(axis=others, initial=0.0)
    return bool((error > largest * 2.0**-10).any())


def ulp_distance(stored: Array, exact: Array) -> Array:
    """|stored − exact| in units of the last place of `stored`, subnormals included."""
    limits = _limits(stored.dtype)
    wide = widened(stored)
    _, exponent = np.frexp(np.abs(wide))
    exponent = np.where(wide == 0, limits.minexp, exponent - 1)  # frexp(0) has no exponent to speak of
    lowest = np.maximum(exponent, limits.minexp) - limits.nmant
    return np.asarray(np.abs(wide - exact) / np.ldexp(EXTENDED(1), lowest))


def _limits(dtype: np.dtype[Any]) -> Any:
    if np.issubdtype(dtype, np.floating):
        return np.finfo(dtype)
    import ml_dtypes  # only models in bfloat16 and its kin pay for it

    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]


# ---- (b) the region ---------------------------------------------------------------------------


def _region_error(constants: Constants, path: tuple[Op, ...], edits: tuple[Edit, ...]) -> float:
    """Largest difference of the two regions, relative to the largest magnitude of its channel."""
    x, slot = _random_input(constants, path[0])
    absorbed = _run(constants, path[:1], (), x, slot)
    reference = _run(constants, path[1:], (), absorbed, "")
    folded = _run(constants, path, edits, x, slot)
    if reference.shape != folded.shape:
        return np.inf
    others = tuple(axis for axis in range(reference.ndim) if axis != 1)
    # a filter that training has emptied writes its bias, and x − μ cancels: the terms are the yardstick then
    s, _ = exact_map(constants, path[1:])
    with np.errstate(all="ignore"):
        terms = np.abs(absorbed).max(axis=others) * np.abs(s).astype(np.float64)
        scale = np.maximum(np.abs(reference).max(axis=others), terms)
        error = np.abs(reference - folded).max(axis=others)
        relative = np.where(error == 0, 0.0, error / scale)
    return float(relative.max(initial=0.0))


def _random_input(constants: Constants, absorber: Op) -> tuple[Array, str]:
    """Standard normal float64 input, just large enough to see every tap and two strides of a kernel."""
    inputs = operands(constants, absorber)
    attributes = _small_geometry(_attributes(absorber))
    shape, slot = _INPUT_SHAPES[absorber.kind](inputs, attributes, constants, absorber)
    return np.random.default_rng(0).standard_normal(shape), slot


def _conv_input(
    inputs: Mapping[str, Value], attributes: Mapping[str, Any], constants: Constants, op: Op
) -> tuple[tuple[int, ...], str]:
    weight = inputs["weight"].shape
    rank = len(weight) - 2
    dilations = attributes.get("dilations") or [1] * rank
    strides = attributes.get("strides") or [1] * rank
    size = [(k - 1) * d + 1 + s for k, d, s in zip(weight[2:], dilations, strides, strict=True)]
    return (1, weight[1] * int(attributes["group"]), *size), "x"


def _conv_transpose_input(
    inputs: Mapping[str, Value], attributes: Mapping[str, Any], constants: Constants, op: Op
) -> tuple[tuple[int, ...], str]:
    """Wide enough that the padding does not crop everything away."""
    weight = inputs["weight"].shape
    rank = len(weight) - 2
    pads = attributes.get("pads") or [0] * 2 * rank
    size = [2 + pads[i] + pads[i + rank] for i in range(rank)]
    return (1, weight[0], *size), "x"


def _linear_input(
    inputs: Mapping[str, Value], attributes: Mapping[str, Any], constants: Constants, op: Op
) -> tuple[tuple[int, ...], str]:
    k = inputs["b"].shape[1 if attributes["transB"] else 0]
    c = inputs["c"].shape if "c" in inputs else ()
    m = c[0] if len(c) == 2 and c[0] != 1 else 3
    return ((k, m) if attributes["transA"] else (m, k)), "a"


def _matmul_input(
    inputs: Mapping[str, Value], attributes: Mapping[str, Any], constants: Constants, op: Op
) -> tuple[tuple[int, ...], str]:
    slot, weight = ("a", inputs["b"].shape) if "b" in inputs else ("b", inputs["a"].shape)
    rank = constants.graph.rank(constants.graph.output(op)) or 2
    batch = (2,) * (rank - len(weight)) + weight[:-2]
    return ((*batch, 3, weight[-2]) if slot == "a" else (*batch, weight[-1], 3)), slot


_INPUT_SHAPES: Mapping[str, Callable[..., tuple[tuple[int, ...], str]]] = {
    "conv": _conv_input,
    "conv_transpose": _conv_transpose_input,
    "linear": _linear_input,
    "matmul": _matmul_input,
}


def _run(constants: Constants, path: tuple[Op, ...], edits: tuple[Edit, ...], x: Array, slot: str) -> Array:
    """The output of the ops of `path`, with the edits carried out (before their rounding).

    `slot` is where x enters the first op; "" where that is the one slot without a constant.
    """
    for op in path:
        entry = slot if op is path[0] and slot else _data_slot(constants, op)
        step = _edited(constants, op, entry, edits)
        if step is not None:
            x = evaluate(step.kind, step.attributes, x, step.operands, step.slot)
    return x


@dataclass(frozen=True)
class _Step:
    kind: str
    attributes: Mapping[str, Any]
    operands: Mapping[str, Value]
    slot: str


def _edited(constants: Constants, op: Op, slot: str, edits: tuple[Edit, ...]) -> _Step | None:
    """One op as it is after the edits; None where it was spliced out."""
    kind, attributes, given = op.kind, _small_geometry(_attributes(op)), operands(constants, op)
    for edit in edits:
        if edit.op is not op:
            continue
        match edit:
            case Splice():
                return None
            case Replace():
                kind = edit.kind
                attributes = {**ROWS[kind].defaults, **edit.attributes}
                slot = next(new for new, old in edit.keep.items() if old == slot)
                given = {new: given[old] for new, old in edit.keep.items() if old in given}
                given |= {new: rebind.value for new, rebind in edit.constants.items()}
            case Rebind():
                given[edit.slot] = edit.value
    given.pop(slot, None)
    return _Step(kind, attributes, given, slot)


def _data_slot(constants: Constants, op: Op) -> str:
    """The slot where the chain enters an op: the one input that is not constant."""
    known = operands(constants, op)
    return next(slot for slot in constants.graph.inputs(op) if slot not in known)
