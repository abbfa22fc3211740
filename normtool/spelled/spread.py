"""From a root forward to everything that is made of x, μ and σ, and to the tensors where a norm is complete."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from normtool.graph import Op, Tensor
from normtool.spelled.labels import Label
from normtool.spelled.moments import Moment, MomentReader, close
from normtool.spelled.reading import CASTS, RESHAPES, Reading
from normtool.values import is_float

#: No norm has more tensors than this between x and y.
_MAX_LABELS = 120

_BINARY = frozenset(["mul", "div", "add", "sub", "sum"])


@dataclass(frozen=True, eq=False)
class End:
    """A tensor that a norm ends with, and the labelled tensors that it is made of."""

    y: Tensor
    label: Label
    ops: tuple[Op, ...]
    read: frozenset[Tensor]


class Spread:
    """The labelled tensors around one root."""

    def __init__(
        self, reading: Reading, moments: MomentReader, moment: Moment, roots: Mapping[Tensor, Label]
    ) -> None:
        self.reading = reading
        self.graph = reading.graph
        self.moments = moments
        self.moment = moment
        self.scope = next(op.scope for op in moment.ops)
        self.rank = reading.rank(moment.x)
        self.aliases = dict.fromkeys(reading.aliases(reading.uncast(moment.x)))
        #: op that made a labelled tensor (none for x and its casts)
        self.made: dict[Tensor, Op] = {}
        self.labels: dict[Tensor, Label] = {alias: Label(x=1.0) for alias in self.aliases}
        self._add_means()
        for tensor, label in roots.items():
            op = self.graph.producer(tensor)
            assert op is not None
            self._note(tensor, label, op)
        self._grow()

    # ---- the seeds --------------------------------------------------------------------------------

    def _note(self, tensor: Tensor, label: Label, op: Op) -> None:
        self.labels[tensor], self.made[tensor] = label, op

    def _add_means(self) -> None:
        """Every mean of x over these axes: some spellings take it twice."""
        for alias in list(self.aliases):
            for read in self.graph.readers(alias):
                if read.op.kind in _MEANS and read.op.scope == self.scope:
                    self._add_mean(read.op)

    def _add_mean(self, op: Op) -> None:
        outputs = self.graph.outputs(op)
        tensor = outputs.get("mean" if op.kind in ("var_mean", "std_mean") else "y")
        reduced = self.reading.reduction(op)
        if reduced is None or tensor is None or reduced.axes != self.moment.axes:
            return
        count = self.reading.count(reduced.source, reduced.axes) if op.kind == "reduce_sum" else 1
        if count:
            self._note(tensor, Label(mean=float(count), kept=reduced.kept), op)

    # ---- growing ----------------------------------------------------------------------------------

    def _grow(self) -> None:
        queue = deque(self.labels)
        while queue and len(self.labels) < _MAX_LABELS + len(self.aliases):
            for read in self.graph.readers(queue.popleft()):
                op = read.op
                if op.scope != self.scope:
                    continue
                y = self.graph.outputs(op).get("y")
                if y is None or y in self.labels:
                    continue
                label = self._label(op, y)
                if label is not None:
                    self._note(y, label, op)
                    queue.append(y)

    def _label(self, op: Op, y: Tensor) -> Label | None:
        if op.kind in _BINARY:
            pair = self.reading.operands(op)
            return self._binary(op.kind, *pair) if pair is not None else None
        x = self.graph.input(op, "x")
        label = self.labels.get(x) if x is not None else None
        if op.kind in ("max", "maximum", "clip"):
            return self._bounded(op)
        if label is None or x is None:
            return None
        if op.kind in CASTS:
            return label if y.dtype is None or is_float(y.dtype) else None
        if op.kind == "neg":
            return label.times(-1)
        if op.kind == "reciprocal":
            return label.inverse()
        if op.kind == "pow" and self.reading.setting(op, "exponent") == -1:
            return label.inverse()
        if label.is_like_x:
            return None
        return self._put_back(op, label, y) if op.kind in RESHAPES else None

    def _bounded(self, op: Op) -> Label | None:
        """max(σ, ε)."""
        bound, other = self.moments.bounded(op)
        label = self.labels.get(other) if other is not None else None
        if bound is None or label is None or self.moment.eps or self.moment.least:
            return None
        return label if bound <= 0 and label.is_factor else label.with_eps(bound, "max")

    def _put_back(self, op: Op, label: Label, y: Tensor) -> Label | None:
        """A statistic gets the axes back that it lost, or is spread over those of x."""
        if op.kind == "expand" and label.kept:
            return label
        if self.reading.lies_against(y, self.moment.x, self.moment.axes):
            return replace(label, kept=True)
        on_the_way = all(read.op.kind in RESHAPES for read in self.graph.readers(y))
        return label if on_the_way and not label.kept else None

    # ---- binary ops -------------------------------------------------------------------------------

    def _binary(self, kind: str, first: Tensor, second: Tensor) -> Label | None:
        a, b = self.labels.get(first), self.labels.get(second)
        if a is not None and b is not None:
            if kind == "mul":
                return a.by(b)
            if kind == "div":
                inverse = b.inverse()
                return a.by(inverse) if inverse is not None else None
            return a.plus(b, -1.0 if kind == "sub" else 1.0)
        if a is not None:
            return self._with_constant(kind, a, second, behind=True)
        return self._with_constant(kind, b, first, behind=False) if b is not None else None

    def _with_constant(self, kind: str, label: Label, constant: Tensor, behind: bool) -> Label | None:
        """`behind`: the constant is the second operand."""
        number = self.reading.number(constant)
        if number is not None:
            return self._with_number(kind, label, number, behind)
        if not label.kept or not self.reading.stored(constant):
            return None
        if kind == "sub" and not behind:  # β − T
            negative = label.times(-1)
            return self._shifted(negative, constant) if negative is not None else None
        if kind in ("add", "sum"):
            return self._shifted(label, constant)
        if kind == "mul":
            return self._weighted(label, constant)
        if kind == "div" and not behind:  # γ / σ
            inverse = label.inverse()
            return self._weighted(inverse, constant) if inverse is not None else None
        return None

    def _with_number(self, kind: str, label: Label, number: float, behind: bool) -> Label | None:
        if kind == "mul":
            return label.times(number)
        if kind == "div" and behind:
            return label.times(1 / number) if number else None
        if kind == "div":
            inverse = label.inverse()
            return inverse.times(number) if inverse is not None else None
        if kind in ("add", "sum") and number >= 0 and not (self.moment.eps or self.moment.least):
            return label.with_eps(number, "outside")
        return None

    def _weighted(self, label: Label, weight: Tensor) -> Label | None:
        if not self._fits(weight):
            return None
        return label.weighted(*self._offset(weight))

    def _shifted(self, label: Label, bias: Tensor) -> Label | None:
        return label.shifted(bias) if self._fits(bias) else None

    def _offset(self, weight: Tensor) -> tuple[Tensor, float]:
        """(γ, 1) of Gemma's 1 + γ."""
        op = self.graph.producer(weight)
        if op is not None and op.kind == "add":
            number, other = self.moments.with_number(op)
            if other is not None and number:
                return other, number
        return weight, 0.0

    # ---- γ and β ----------------------------------------------------------------------------------

    def _fits(self, tensor: Tensor) -> bool:
        """Does it vary along the normalised axes, or along the channels, and along no other?"""
        along = self.axes_of(tensor)
        if along is None:
            return False
        return along <= set(self.moment.axes) or (self.moment.centred and along == self._channels())

    def axes_of(self, tensor: Tensor) -> set[int] | None:
        """The axes of x along which a constant varies; None where that is not known, or it has more of them."""
        shape = tensor.shape
        if shape is None:
            return None
        if self.rank is None:
            return {axis - len(shape) for axis, n in enumerate(shape) if n != 1}
        start = self.rank - len(shape)
        return {start + axis for axis, n in enumerate(shape) if n != 1} if start >= 0 else None

    def _channels(self) -> set[int] | None:
        """The channel axis that an InstanceNorm leaves alone, in N, C, H, W or in N, H, W, C."""
        if self.rank is None or self.rank < 3:
            return None
        if self.moment.axes == tuple(range(2, self.rank)):
            return {1}
        return {self.rank - 1} if self.moment.axes == tuple(range(1, self.rank - 1)) else None

    # ---- the ends ---------------------------------------------------------------------------------

    def ends(self) -> list[End]:
        """The largest norms: several where one pair of statistics serves several pairs of γ and β."""
        complete = {t: label for t, label in self.labels.items() if self.is_complete(label) and t in self.made}
        parents = {
            t: [each for each in dict.fromkeys(self.graph.inputs(self.made[t]).values()) if each in complete]
            for t in complete
        }
        worthy = {t for t in complete if self._adds(t, parents[t])}
        surpassed = {each for t in worthy for each in _ancestors(t, parents)}
        return [self._end(t) for t in complete if t in worthy and t not in surpassed]

    def is_complete(self, label: Label) -> bool:
        if label.power != -1 or not label.is_like_x or label.one or not label.kept:
            return False
        mean = -label.x if self.moment.centred else 0.0
        return label.x > 0 and (close(label.mean, mean, self.moment.precision) or label.mean == mean)

    def _adds(self, tensor: Tensor, parents: list[Tensor]) -> bool:
        """The first of a norm, γ, β, or the cast back. A number behind them (1/√d) is the reader's own."""
        if not parents:
            return True
        label, before = self.labels[tensor], self.labels[parents[0]]
        if (label.weight, label.bias) != (before.weight, before.bias):
            return True
        return self.made[tensor].kind in CASTS and self._is_cast_back(parents[0], tensor)

    def _is_cast_back(self, source: Tensor, made: Tensor) -> bool:
        root = self.reading.uncast(self.moment.x)
        return made.dtype == root.dtype and source.dtype != made.dtype and made.dtype is not None

    def _end(self, y: Tensor) -> End:
        ops: dict[Op, None] = dict.fromkeys(self.moment.ops)
        read: set[Tensor] = set()
        pending, seen = [y], {y}
        while pending:
            tensor = pending.pop()
            if tensor not in self.made:
                read.add(tensor)
                continue
            op = self.made[tensor]
            ops[op] = None
            for each in self.graph.inputs(op).values():
                if each in self.labels and each not in seen:
                    seen.add(each)
                    pending.append(each)
        own = {t for op in ops for t in self.graph.outputs(op).values()}
        read |= {t for op in ops for t in self.graph.inputs(op).values() if t in self.aliases} - own
        return End(y, self.labels[y], tuple(ops), frozenset(read))


def _ancestors(tensor: Tensor, parents: dict[Tensor, list[Tensor]]) -> Iterable[Tensor]:
    pending = list(parents[tensor])
    while pending:
        each = pending.pop()
        yield each
        pending += parents[each]


_MEANS = frozenset(["reduce_mean", "reduce_sum", "global_average_pool", "var_mean", "std_mean"])
