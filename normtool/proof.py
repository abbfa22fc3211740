"""Shows, for one fold, that it is right, where it was made and before a nonlinearity can hide an error.

A fold says of every tensor on its way what that will hold: new = α(old), or old = α(new). So it is right if
each op alone is: given inputs in their new form, the op as it will be puts out the new form of its output. Two
checks, both independent of the rules that are judged:

(a) equations: each op, as it was and as it will be, in float64 from the operators' definitions (`semantics`)
    on random input with small lengths. Before any rounding both sides agree to 1e-12 of each channel.
(b) coefficients: every number that will be stored lies within half an ulp (of its own dtype) of what the
    equations were checked with, and none has left the range of that dtype.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from normtool.constants import Constants
from normtool.edits import Edit, Graft, Insert, Rebind, Replace, Splice
from normtool.graph import GRAPH_OUTPUT, ModelGraph, Op, Tensor
from normtool.ops import ATEN, ROWS
from normtool.probes import Shapes, UnknownRank, as_stated, settle
from normtool.reasons import Reason
from normtool.semantics import evaluate
from normtool.values import (
    EXTENDED,
    Array,
    Value,
    element_count,
    exact_rows,
    is_float,
    round_to,
    row_blocks,
    to_array,
    widened,
)
from normtool.walk import Carry

#: Largest difference of the two sides in float64, relative to the yardstick of (a).
REGION_TOLERANCE = 1e-12

#: The same, relative to the sum of the magnitudes of all terms, where those cancel.
TERMS_TOLERANCE = 1e-14

#: Half an ulp, with room for the rounding of the exact value itself.
HALF_ULP = 0.5 * (1 + 2.0**-9)

#: Weights of so many elements are worth a second thread.
_SIDE_BY_SIDE = 1 << 18


@dataclass(frozen=True)
class Proof:
    """The outcome of both checks. `failures` is empty when the fold holds."""

    coefficients: int
    worst_ulp: float
    region_error: float
    failures: tuple[Reason, ...] = ()
    #: largest error of a bias that was put on a grid of integers again; at most half a step of that grid
    requantised: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        found = {
            "coefficients": self.coefficients,
            "worst_ulp": self.worst_ulp,
            "region_max_rel": self.region_error,
        }
        return found | ({"requantised": self.requantised} if self.requantised else {})


# ---- what is to be shown ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Form:
    """An op at one moment: what it is, its constants, and where its data enters."""

    kind: str
    attributes: Mapping[str, Any]
    constants: Mapping[str, Value]
    #: slot → the tensor that enters there, by what it was called before the fold
    data: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Step:
    """One op before and after. `after` is empty where it is taken out; then `through` is the slot it leaves
    open.

    More forms than one in `after` follow each other: what an `Insert` puts behind the op.
    """

    op: Op
    before: Form
    after: tuple[Form, ...]
    through: str
    outputs: Mapping[str, Tensor]
    carried: Mapping[Tensor, Carry]
    shapes: Shapes
    #: tensors whose rows sum to 1
    softmaxes: frozenset[Tensor]
    #: outputs that nobody looks at
    unread: frozenset[Tensor]


@dataclass(frozen=True, eq=False)
class Before:
    """The ops a fold touches, as they are before its edits are carried out."""

    forms: Mapping[Op, Form]
    outputs: Mapping[Op, Mapping[str, Tensor]]
    carried: Mapping[Tensor, Carry]
    shapes: Shapes
    softmaxes: frozenset[Tensor]
    unread: frozenset[Tensor]
    #: (outputs of a graph, one of them) that are to hold something else from now on, which none may
    put_out: Sequence[tuple[Op, Tensor]]

    def after(self, graph: ModelGraph, constants: Constants, edits: Sequence[Edit]) -> tuple[Step, ...]:
        """The steps, once `graph` has seen the edits."""
        spliced = {edit.op: edit.slot for edit in edits if isinstance(edit, Splice)}
        replaced = {edit.op: edit for edit in edits if isinstance(edit, Replace)}
        steps = []
        for op, form in self.forms.items():
            after: tuple[Form, ...] = ()
            if op not in spliced:
                after = (_form_after(graph, constants, op, form, replaced.get(op)), *_inserted(op, edits))
            steps.append(self._step(op, form, after, spliced.get(op, ""), self.outputs[op]))
        for op, tensor in self.put_out:
            as_it_is = Form("identity", {}, {}, {"x": tensor})
            steps.append(self._step(op, as_it_is, (as_it_is,), "", {"y": Tensor(tensor.name, tensor.scope)}))
        return tuple(steps)

    def _step(
        self, op: Op, form: Form, after: tuple[Form, ...], through: str, outputs: Mapping[str, Tensor]
    ) -> Step:
        facts = (self.carried, self.shapes, self.softmaxes, self.unread)
        return Step(op, form, after, through, outputs, *facts)


def steps_of(
    graph: ModelGraph, constants: Constants, carried: Mapping[Tensor, Carry], met: Iterable[Op]
) -> Before:
    """Every op that reads or makes a tensor whose content changes, and every op that is edited."""
    ops = dict.fromkeys(met)
    for tensor in carried:
        producer = graph.producer(tensor)
        readers = [read.op for read in graph.readers(tensor)]
        ops |= dict.fromkeys(op for op in (producer, *readers) if op is not None and _computes(op))
    forms = {op: _form(graph, constants, op) for op in ops}
    outputs = {op: graph.outputs(op) for op in ops}
    tensors = {t for op in ops for t in (*forms[op].data.values(), *outputs[op].values())}
    softmaxes = frozenset(t for t in tensors if _is_softmax(constants, t))
    unread = frozenset(t for t in tensors if not graph.readers(t))
    reads = [(read.op, tensor) for tensor in carried for read in graph.readers(tensor)]
    put_out = [(op, tensor) for op, tensor in reads if op.kind == GRAPH_OUTPUT]
    return Before(forms, outputs, dict(carried), Shapes.of(graph, tensors), softmaxes, unread, put_out)


def _computes(op: Op) -> bool:
    """Does it look at numbers at all? (Outputs of a graph do, and are no ops.)"""
    return op.kind not in (GRAPH_OUTPUT, "shape", "size")


def _form(graph: ModelGraph, constants: Constants, op: Op) -> Form:
    found = {slot: constants.value(tensor) for slot, tensor in graph.inputs(op).items()}
    known = {slot: value for slot, value in found.items() if not isinstance(value, Reason)}
    data = {slot: tensor for slot, tensor in graph.inputs(op).items() if slot not in known}
    return Form(op.kind, {**ROWS[op.kind].defaults, **_unsaid(op), **op.attributes}, known, data)


def _unsaid(op: Op) -> dict[str, Any]:
    """What a spelling means without saying so, where the kind alone means something else."""
    if op.kind == "resize" and op.domain == "" and op.version < 11:
        return {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return {"slope_axis": 1} if op.kind == "prelu" and op.domain == ATEN else {}


def _form_after(graph: ModelGraph, constants: Constants, op: Op, form: Form, edit: Replace | None) -> Form:
    """The op as the draft has it now; its data still goes by the old names."""
    keep = {slot: slot for slot in form.data} if edit is None else edit.keep
    current = graph.current(op)  # type: ignore[attr-defined]
    new = _form(graph, constants, current)
    return replace(new, data={slot: form.data[old] for slot, old in keep.items() if old in form.data})


def _inserted(op: Op, edits: Sequence[Edit]) -> list[Form]:
    """What is put behind an op: one form each, whose data is what comes out before."""
    return [
        Form(
            edit.kind,
            {**ROWS[edit.kind].defaults, **edit.attributes},
            {slot: rebind.value for slot, rebind in edit.constants.items()},
            {edit.slot: edit.tensor},
        )
        for edit in edits
        if isinstance(edit, Insert) and edit.behind is op
    ]


def _is_softmax(constants: Constants, tensor: Tensor) -> bool:
    """Do its rows sum to 1, because a Softmax along the last axis made them, and only handed on since?"""
    graph = constants.graph
    while (maker := graph.producer(tensor)) is not None:
        if maker.kind == "softmax":
            rank, axis = graph.rank(tensor), maker.attributes.get("axis", -1 if maker.version >= 13 else 1)
            return rank is not None and axis in (-1, rank - 1)
        source = graph.input(maker, "x")
        if maker.kind not in ("identity", "dropout") or source is None or not _is_idle(constants, maker):
            return False
        tensor = source
    return False


def _is_idle(constants: Constants, op: Op) -> bool:
    """A Dropout does nothing where it is known not to be in training."""
    given = constants.graph.input(op, "training_mode")
    if given is None:
        return not op.attributes.get("training_mode")
    stored = constants.array(given)
    return not isinstance(stored, Reason) and not stored.any()


@dataclass(frozen=True, eq=False)
class Region:
    """Several ops between one tensor and one op, and the single form that does what they all did."""

    op: Op
    #: (form, its output), in dataflow order
    before: tuple[tuple[Form, Tensor], ...]
    source: Tensor
    after: Form
    #: shape of `source` that brings out every tap
    shape: tuple[int, ...]

    @property
    def carried(self) -> Mapping[Tensor, Carry]:
        """Nothing outside sees a tensor in another form."""
        return {}


def region_of(graph: ModelGraph, constants: Constants, ops: Sequence[Op]) -> tuple[tuple[Form, Tensor], ...]:
    return tuple((_form(graph, constants, op), graph.output(op)) for op in ops)


def form_of(graph: ModelGraph, constants: Constants, op: Op) -> Form:
    """An op as the graph has it now."""
    return _form(graph, constants, op)


# ---- showing it -----------------------------------------------------------------------------------


def prove(steps: Sequence[Step | Region], edits: Sequence[Edit]) -> Proof:
    """Check one fold.

    The two checks read the same weights and share nothing else, so for large weights they run side by side:
    numpy lets go of the interpreter while it computes.
    """
    if max((element_count(value.shape) for _, value, _ in _stored(edits)), default=0) < _SIDE_BY_SIDE:
        count, worst, failures = _check_coefficients(edits)
        error, wrong = _check_equations(steps)
    else:
        with ThreadPoolExecutor(max_workers=1) as pool:
            equations = pool.submit(_check_equations, steps)
            count, worst, failures = _check_coefficients(edits)
            error, wrong = equations.result()
    coarse = max((_requantised(step)[0] for step in steps if _is_requantised(step)), default=0.0)
    return Proof(count, worst, error, (*failures, *wrong), coarse)


def _stored(edits: Iterable[Edit]) -> list[tuple[str, Value, str]]:
    """(name, content, name of the op or tensor it is for) of every constant that edits bring along."""
    found = []
    for edit in edits:
        match edit:
            case Rebind():
                found.append((edit.name, edit.value, edit.op.name))
            case Replace() | Insert():
                found += [(each.name, each.value, each.op.name) for each in edit.constants.values()]
            case Graft():
                given = (constant for part in edit.parts for constant in part.constants.values())
                found += [(name, value, edit.tensor.name) for name, value in given]
    return found


# ---- (a) equations --------------------------------------------------------------------------------


def _check_equations(steps: Sequence[Step | Region]) -> tuple[float, list[Reason]]:
    """(the largest relative difference, what is wrong)."""
    worst, failures = 0.0, []
    rng = np.random.default_rng(0)
    for step in steps:
        try:
            if isinstance(step, Region):
                error = _region_error(step)
            elif _is_requantised(step):
                found, half_a_step = _requantised(step)
                error = 0.0 if found <= half_a_step * (1 + REGION_TOLERANCE) else found
            else:
                error = _step_error(step, rng)
        except UnknownRank as unknown:
            failures.append(Reason("axis_unknown", str(unknown), step.op.name))
            continue
        except (ArithmeticError, LookupError, TypeError, ValueError, MemoryError, NotImplementedError) as wrong:
            message = f"it cannot be evaluated: {(str(wrong).splitlines() or [''])[0]}"
            failures.append(Reason("malformed", message, step.op.name))
            continue
        worst = max(worst, error)
        if not error <= REGION_TOLERANCE:
            message = f"{step.op.name!r} and what takes its place differ by {error:.3g} in float64"
            failures.append(Reason("internal", message, step.op.name))
    return worst, failures


def _step_error(step: Step, rng: np.random.Generator) -> float:
    """Largest difference of the two sides of one op, relative to the largest magnitude of its channel."""
    settled = settle(step.before, step.outputs, step.carried, step.shapes)
    if any(form.constants and form.kind == "add" and step.before.kind == "conv" for form in step.after[1:]):
        settled = as_stated(step.before, step.shapes)  # a map of every position
    old, new = _inputs(step, settled.shapes, rng)
    before = settled.fitted(step.before)
    expected = _run([before], old)
    if step.after:
        got = _run([settled.fitted(form) for form in step.after], new)
    else:
        got = {"y": new[step.before.data[step.through]]}
    errors = [_difference(step, slot, expected, got, [before, *step.after], old) for slot in expected]
    return max(errors, default=0.0)


def _is_requantised(step: Step | Region) -> bool:
    """A stored bias of integers that takes a shift: the one thing here that is exact only to its grid."""
    if isinstance(step, Region) or step.before.kind != "dequantize_linear":
        return False
    carry = step.carried.get(step.outputs["y"])
    return carry is not None and carry.affine.has_shift


def _requantised(step: Step | Region) -> tuple[float, float]:
    """(the largest error of the bias, half a step of the grid that error lies on)."""
    assert isinstance(step, Step)
    carry = step.carried[step.outputs["y"]]
    old, new = _run([step.before], {})["y"], _run(step.after, {})["y"]
    steps = np.broadcast_to(widened(to_array(step.after[0].constants["scale"])), old.shape)
    error = np.abs(carry.affine.of(old) - new)
    worst = int(np.argmax(error / steps))
    return float(error[worst]), float(steps[worst]) / 2


def _region_error(region: Region) -> float:
    """Largest difference of the sum of all branches and of the one op, relative to its channel."""
    x = np.random.default_rng(0).standard_normal(region.shape)
    content: dict[Tensor, Array] = {region.source: x}
    for form, output in region.before:
        content[output] = _run([form], content)["y"]
    expected = content[region.before[-1][1]]
    got = _run([region.after], content)["y"]
    if expected.shape != got.shape:
        return np.inf
    others = tuple(axis for axis in range(got.ndim) if axis != 1)
    with np.errstate(all="ignore"):
        error = np.abs(expected - got).max(axis=others)
        relative = np.where(error == 0, 0.0, error / np.abs(expected).max(axis=others))
    return float(relative.max(initial=0.0))


def _inputs(
    step: Step, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator
) -> tuple[dict[Tensor, Array], dict[Tensor, Array]]:
    """What enters before and after, tensor by tensor: standard normal on the side that determines the other."""
    old: dict[Tensor, Array] = {}
    new: dict[Tensor, Array] = {}
    for slot, tensor in step.before.data.items():
        if tensor in old or slot not in shapes:
            continue
        drawn: Array = rng.standard_normal(shapes[slot])
        if tensor.dtype is not None and not is_float(tensor.dtype):
            drawn = rng.integers(0, 2, shapes[slot])
        if tensor in step.softmaxes:
            drawn = np.exp(drawn) / np.exp(drawn).sum(axis=-1, keepdims=True)
        carry = step.carried.get(tensor)
        moved = drawn if carry is None else carry.affine.of(drawn)
        old[tensor], new[tensor] = (moved, drawn) if carry is not None and carry.ahead else (drawn, moved)
    return old, new


def _run(forms: Sequence[Form], content: Mapping[Tensor, Array]) -> dict[str, Array]:
    """The outputs of the last of several forms that follow each other."""
    outputs: dict[str, Array] = {}
    for i, form in enumerate(forms):
        data = {slot: content[tensor] if i == 0 else outputs["y"] for slot, tensor in form.data.items()}
        outputs = evaluate(form.kind, form.attributes, {**form.constants, **data})
    return outputs


def _difference(
    step: Step,
    slot: str,
    expected: Mapping[str, Array],
    got: Mapping[str, Array],
    forms: Sequence[Form],
    content: Mapping[Tensor, Array],
) -> float:
    if slot not in step.outputs or step.outputs[slot] in step.unread:
        return 0.0
    carry = step.carried.get(step.outputs[slot])
    left, right = got[slot], expected[slot]
    if left.shape != right.shape:  # before the map, which would spread one channel over many
        return np.inf
    if carry is not None:
        left, right = (right, carry.affine.of(left)) if carry.ahead else (left, carry.affine.of(right))
    if left.shape != right.shape:
        return np.inf
    axis = _channel_axis(step, carry, left.ndim)
    others = tuple(each for each in range(left.ndim) if each != axis)
    with np.errstate(all="ignore"):
        error = np.abs(left - right).max(axis=others, initial=0.0)
        yard = np.maximum(
            np.abs(left).max(axis=others, initial=0.0), np.abs(right).max(axis=others, initial=0.0)
        )
        yard = np.maximum(yard, _terms(carry, expected[slot], got[slot], others, axis))
        relative = np.where(error == 0, 0.0, error / yard)
    worst = float(relative.max(initial=0.0))
    if REGION_TOLERANCE < worst < 1e-6 and error.max() <= TERMS_TOLERANCE * _all_terms(forms, content):
        return REGION_TOLERANCE  # terms far larger than their sum: nothing more can be asked of float64
    return worst


def _channel_axis(step: Step, carry: Carry | None, rank: int) -> int:
    if carry is not None and carry.affine.s.ndim == 1 and carry.affine.s.size > 1:
        return carry.affine.axis
    return rank - 1 if step.before.kind in ("linear", "matmul", "attention") else min(1, rank - 1)


def _terms(carry: Carry | None, old: Array, new: Array, others: tuple[int, ...], axis: int) -> Array:
    """The scaled term of each channel: a filter that training has emptied writes its bias, and x − μ
    cancels."""
    if carry is None or carry.affine.s.ndim > 1:
        return np.zeros(1)
    inner = new if carry.ahead else old
    scaled = np.abs(inner).max(axis=others, initial=0.0) * np.abs(carry.affine.s).astype(np.float64)
    return np.asarray(scaled)


def _all_terms(forms: Sequence[Form], content: Mapping[Tensor, Array]) -> float:
    """The largest sum of magnitudes of all terms of the op, before and after."""
    largest = 0.0
    for form in forms:
        if not set(form.data.values()) <= content.keys() or form.kind == "batch_norm":
            continue
        data: dict[str, Array | Value] = {slot: np.abs(content[tensor]) for slot, tensor in form.data.items()}
        magnitudes = {slot: _Magnitude(value) for slot, value in form.constants.items()}
        outputs = evaluate(form.kind, form.attributes, {**magnitudes, **data})
        largest = max(largest, *(float(np.abs(each).max(initial=0.0)) for each in outputs.values()))
    return largest


@dataclass(frozen=True, eq=False)
class _Magnitude:
    """|value|, row by row."""

    value: Value

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.value.dtype

    def rows(self, start: int, stop: int) -> Array:
        return np.asarray(np.abs(exact_rows(self.value, start, stop)))

    exact_rows = rows


# ---- (b) coefficients -------------------------------------------------------------------------------


def _check_coefficients(edits: Iterable[Edit]) -> tuple[int, float, list[Reason]]:
    """(coefficients, the worst distance in ulp, what is wrong with them)."""
    count, worst, failures = 0, 0.0, []
    for name, value, where in _stored(edits):
        count += element_count(value.shape)
        if not is_float(value.dtype):
            continue
        fit = _fit(value)
        worst = max(worst, fit.ulp)
        if fit.overflows or fit.underflows:
            way = "overflows" if fit.overflows else "underflows"
            message = f"a coefficient of {name!r} {way} {value.dtype}"
            failures.append(Reason("range_overflow", message, where))
        elif fit.ulp > HALF_ULP:
            failures.append(Reason("internal", f"{name!r} is off by {fit.ulp:.3g} ulp", where))
    return count, worst, failures


@dataclass
class _Fit:
    """How the stored coefficients of one constant sit in their dtype."""

    ulp: float = 0.0
    overflows: bool = False
    underflows: bool = False


def _fit(value: Value) -> _Fit:
    """The worst distance in ulp, and whether the dtype is too narrow. Correctly rounded counts as 0.5."""
    fit = _Fit()
    for start, stop in row_blocks(value):
        wanted = exact_rows(value, start, stop)
        stored = round_to(wanted, value.dtype)  # what `value.rows` gives, which would compute it all again
        fit.overflows |= not np.isfinite(stored).all()
        fit.underflows |= _underflows(stored, wanted)
        if fit.overflows:
            fit.ulp = np.inf
        elif stored.dtype.itemsize >= 4 and _within_half_ulp(stored, wanted):
            fit.ulp = max(fit.ulp, 0.5)
        else:
            fit.ulp = max(fit.ulp, float(np.max(ulp_distance(stored, wanted), initial=0.0)))
    return fit


def _within_half_ulp(stored: Array, exact: Array) -> bool:
    """|stored − exact| ≤ ½ulp for every number: the short way, without taking it apart with frexp.

    A number without its mantissa is 2^e, and its ulp is 2^(e − mantissa bits).
    """
    exponent, smallest, mantissa = _layout(stored.dtype)
    power = (stored.view(exponent.dtype) & exponent).view(stored.dtype)
    error = np.abs(stored - exact) * mantissa  # in the wide dtype: a float32 would round it
    return bool((error <= HALF_ULP * np.maximum(power, smallest)).all())


@cache
def _layout(dtype: np.dtype[Any]) -> tuple[Array, float, float]:
    """(the bits of the exponent, the smallest normal number, 2^mantissa bits) of float32 or float64."""
    limits = np.finfo(dtype)
    exponent = np.array(np.inf, dtype).view(f"u{dtype.itemsize}")
    return exponent, float(limits.smallest_normal), 2.0**limits.nmant


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
