"""Shows that a swap is right, op by op, in float64 and before a nonlinearity can hide an error.

Every tensor that a swap touches has a *relation*: it is centred (new = P·old), or shifted by one number for
each block (P·new = P·old), or what it was. Each op that reads or writes such a tensor is evaluated twice from
its definition: as it was on random numbers, and as it will be on numbers in that relation to them; what comes
out must be in the relation that is claimed of it. A norm is evaluated as a whole: γ·(x − mean)/√(var + ε) + β
as the graph had it, on x, and what takes its place, on P·x.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from normtool.affine import Affine
from normtool.centring.places import Place, known_lengths
from normtool.edits import Edit
from normtool.graph import Op, Tensor
from normtool.probes import Shapes, UnknownRank, settle
from normtool.proof import REGION_TOLERANCE, Form, Proof, _check_coefficients
from normtool.reasons import Reason
from normtool.semantics import evaluate
from normtool.values import Array, Value, exact_rows, is_float
from normtool.walk import Carry


@dataclass(frozen=True)
class Relation:
    """How a tensor changes.

    centred   its blocks lose their mean
    shifted   its blocks get another mean, whichever
    held      it does not change, and has no mean to lose
    """

    place: Place
    kind: Literal["centred", "shifted", "held"]

    def pair(self, old: Array, new: Array, rng: np.random.Generator) -> tuple[Array, Array]:
        """(old, new) in this relation, made from what they are without."""
        if self.kind == "held":
            return self.place.centred(old), self.place.centred(new)
        if self.kind == "centred":
            return old, self.place.centred(new)
        apart = new.reshape(self.place.apart(new.shape))
        return old, (apart + rng.standard_normal(self.place.mean(new).shape)).reshape(new.shape)

    def error(self, old: Array, new: Array) -> Array:
        """How far the two are from being in it."""
        return (self.place.centred(new) if self.kind == "shifted" else new) - self.place.centred(old)


Relations = Mapping[Tensor, tuple[Relation, ...]]


@dataclass(frozen=True, eq=False)
class OpStep:
    """One op, before and after. `entering` and `leaving` are the relations of what it reads (slot by slot: one
    reader may get a Centre that another does not) and puts out."""

    op: Op
    before: Form
    after: Form
    outputs: Mapping[str, Tensor]
    entering: Mapping[str, tuple[Relation, ...]]
    leaving: Mapping[str, tuple[Relation, ...]]
    shapes: Shapes


@dataclass(frozen=True, eq=False)
class NormStep:
    """A norm: the forms between x and y as they were, and those that take their place.

    `read` is what these read, which is in the relations `entering` to x. `refit` = (a, c), over the place: they
    are to put out a·y + c.
    """

    name: str
    x: Tensor
    place: Place
    before: Sequence[tuple[Form, Tensor]]
    read: Tensor
    after: Sequence[tuple[Form, Tensor]] = ()
    entering: tuple[Relation, ...] = ()
    leaving: tuple[Relation, ...] = ()
    refit: tuple[Array, Array] | None = None


@dataclass(frozen=True, eq=False)
class CentreStep:
    """A Centre op: forms that are to take the mean out of x."""

    name: str
    x: Tensor
    place: Place
    forms: Sequence[tuple[Form, Tensor]]


@dataclass(frozen=True, eq=False)
class TableStep:
    """A norm of rows of a table, and the table that has it in."""

    name: str
    x: Tensor
    before: Sequence[tuple[Form, Tensor]]
    table: Value
    normed: Value


Step = OpStep | NormStep | CentreStep | TableStep


def prove(steps: Iterable[Step], edits: Sequence[Edit], errors: dict[object, float | Reason]) -> Proof:
    """Check one fold; `errors` holds what other folds have shown already."""
    count, worst_ulp, failures = _check_coefficients(edits)
    worst = 0.0
    for step in steps:
        key = step.op if isinstance(step, OpStep) else step
        if key not in errors:
            errors[key] = _evaluated(step)
        found = errors[key]
        if isinstance(found, Reason):
            failures.append(found)
        else:
            worst = max(worst, found)
    return Proof(count, worst_ulp, worst, tuple(failures))


def _evaluated(step: Step) -> float | Reason:
    name = step.op.name if isinstance(step, OpStep) else step.name
    try:
        match step:
            case OpStep():
                error = _op_error(step)
            case NormStep():
                error = _norm_error(step)
            case CentreStep():
                error = _centre_error(step)
            case TableStep():
                error = _table_error(step)
    except UnknownRank as unknown:
        return Reason("axis_unknown", str(unknown), name)
    except (ArithmeticError, LookupError, TypeError, ValueError, MemoryError, NotImplementedError) as wrong:
        return Reason("malformed", f"it cannot be evaluated: {(str(wrong).splitlines() or [''])[0]}", name)
    if not error <= REGION_TOLERANCE:
        return Reason("internal", f"{name!r} and what takes its place differ by {error:.3g} in float64", name)
    return error


def _op_error(step: OpStep) -> float:
    rng = np.random.default_rng(0)
    settled = settle(step.before, step.outputs, _lengths_of(step), step.shapes)
    old: dict[str, Array] = {}
    new: dict[str, Array] = {}
    drawn: dict[Tensor, Array] = {}
    for slot, tensor in step.before.data.items():
        if slot not in settled.shapes:
            continue
        if tensor not in drawn:
            whole = tensor.dtype is not None and not is_float(tensor.dtype)
            shape = settled.shapes[slot]
            drawn[tensor] = rng.integers(0, 2, shape).astype(float) if whole else rng.standard_normal(shape)
        old[slot] = new[slot] = drawn[tensor]
        for relation in step.entering.get(slot, ()):
            old[slot], new[slot] = relation.pair(old[slot], new[slot], rng)
    expected = _outputs(settled.fitted(step.before), old)
    got = _outputs(settled.fitted(step.after), new)
    worst = 0.0
    for slot, value in expected.items():
        difference = got[slot] - value
        for relation in step.leaving.get(slot, ()):
            difference = relation.error(value, got[slot])
        scale = max(float(np.abs(value).max(initial=0.0)), 1e-300)
        worst = max(worst, float(np.abs(difference).max(initial=0.0)) / scale)
    return worst


def _lengths_of(step: OpStep) -> dict[Tensor, Carry]:
    """The lengths that the places state, said as maps (`probes` keeps the lengths of those)."""
    named = [(step.before.data.get(slot), found) for slot, found in step.entering.items()]
    named += [(step.outputs[slot], found) for slot, found in step.leaving.items()]
    carries = {}
    for tensor, relations in named:
        for relation in relations:
            if tensor is not None and tensor.shape is not None:
                place = relation.place
                lengths = known_lengths(tensor.shape[place.start : place.stop]) or ()
                carries[tensor] = Carry(Affine(place.start, np.ones(lengths), np.zeros(lengths)), ahead=False)
    return carries


def _norm_error(step: NormStep) -> float:
    rng = np.random.default_rng(0)
    old = new = _drawn(step.x, step.place) + 0.5
    for relation in step.entering:
        old, new = relation.pair(old, new, rng)
    expected, got = _through(step.before, {step.x: old}), _through(step.after, {step.read: new})
    if step.refit is not None:
        a, c = step.refit
        expected = a * expected + c
    difference = got - expected
    for relation in step.leaving:
        difference = relation.error(expected, got)
    return float(np.abs(difference).max(initial=0.0) / np.abs(expected).max(initial=1e-300))


def _centre_error(step: CentreStep) -> float:
    x = _drawn(step.x, step.place) + 0.5
    return float(np.abs(_through(step.forms, {step.x: x}) - step.place.centred(x)).max(initial=0.0))


def _drawn(tensor: Tensor, place: Place) -> Array:
    """Random numbers for a tensor: the place has the lengths that the model states, all else is small."""
    assert tensor.shape is not None
    own = range(place.start, place.stop)
    shape = tuple(int(n or 1) if axis in own else 2 for axis, n in enumerate(tensor.shape))
    return np.random.default_rng(0).standard_normal(shape)


#: Rows of a table that a proof looks at.
_ROWS = 64


def _table_error(step: TableStep) -> float:
    rows = min(_ROWS, step.table.shape[0])
    table = np.asarray(exact_rows(step.table, 0, rows), np.float64)
    x = table.reshape(*[1] * (len(step.x.shape or table.shape) - table.ndim), *table.shape)
    expected = _through(step.before, {step.x: x}).reshape(table.shape)
    got = exact_rows(step.normed, 0, rows)
    return float(np.abs(got - expected).max(initial=0.0) / np.abs(expected).max(initial=1e-300))


def _through(forms: Sequence[tuple[Form, Tensor]], content: dict[Tensor, Array]) -> Array:
    """What the last of several forms puts out."""
    y = np.zeros(0)
    for form, output in forms:
        y = _outputs(form, {slot: content[tensor] for slot, tensor in form.data.items()})["y"]
        content[output] = y
    return y


def _outputs(form: Form, data: Mapping[str, Array]) -> dict[str, Array]:
    return evaluate(form.kind, form.attributes, {**form.constants, **data})
