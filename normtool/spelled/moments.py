"""From a root back to the tensor whose mean of squares is under it.

    σ = √V,   V = scale · S + ε,   S = mean or sum, over some axes, of x² or (x − mean(x))²

S may be written as ReduceMean(Pow(z, 2)), as a sum divided by N, as var(x), or as mean(x²) − mean(x)².
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from normtool.graph import Op, Tensor
from normtool.spelled.reading import CASTS, RESHAPES, Axes, Reading, Reduction
from normtool.values import is_float

#: More ops than this do not stand between a root and what is under it.
_MAX_STEPS = 12


@dataclass(frozen=True, eq=False)
class Moment:
    """V = max(scale · S + eps, least); S divides by N − correction, or by nothing (`is_sum`).

    `ops` are those between x and V. `precision`: to how much the numbers are what they stand for (a 1/N in
    float16). `kept`: V has the axes of x, those that are reduced with length 1.
    """

    x: Tensor
    centred: bool
    axes: Axes
    is_sum: bool = False
    correction: float = 0.0
    scale: float = 1.0
    eps: float = 0.0
    least: float = 0.0
    kept: bool = True
    precision: float = 1e-6
    ops: tuple[Op, ...] = field(default=())


class MomentReader:
    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.graph = reading.graph

    # ---- V --------------------------------------------------------------------------------------

    def under(self, tensor: Tensor) -> list[Moment]:
        """All that V = `tensor` may be read as, the largest first: one with a mean is one without as well."""
        scale, eps, least, precision = 1.0, 0.0, 0.0, 1e-6
        ops: list[Op] = []
        put_back: Tensor | None = None  # the last with other axes than what is under it
        for _ in range(_MAX_STEPS):
            op = self.graph.producer(tensor)
            if op is None:
                return []
            found = self._squares(op, tensor)
            if found:
                return [
                    replace(
                        moment,
                        scale=scale,
                        eps=eps,
                        least=least,
                        precision=precision,
                        kept=self._is_kept(moment, put_back),
                        ops=(*moment.ops, *ops),
                    )
                    for moment in found
                    if not (eps and least)
                ]
            ops.append(op)
            if op.kind in CASTS:
                following = self.graph.input(op, "x")
            elif op.kind in RESHAPES:
                following, put_back = self.graph.input(op, "x"), put_back or tensor
            elif op.kind in ("max", "maximum", "clip", "relu"):
                bound, following = self.bounded(op)
                if bound is None or (bound > 0 and (eps or least)):
                    return []
                least = max(scale * bound, 0.0)
            else:
                number, following = self.with_number(op)
                if following is None:
                    return []
                precision = max(precision, self._precision_of(op, following))
                if op.kind in ("add", "sum"):
                    eps += scale * number
                elif op.kind == "mul":
                    scale *= number
                elif op.kind == "div" and number and self.graph.input(op, "a") is following:
                    scale /= number
                else:
                    return []
            if following is None:
                return []
            tensor = following
        return []

    def _is_kept(self, moment: Moment, put_back: Tensor | None) -> bool:
        if put_back is None:
            return moment.kept
        return self.reading.lies_against(put_back, moment.x, moment.axes)

    def with_number(self, op: Op) -> tuple[float, Tensor | None]:
        """(the number, the other operand) of a binary op."""
        pair = self.reading.operands(op) if op.kind in ("add", "sum", "mul", "div") else None
        if pair is None:
            return 0.0, None
        for stated, other in (pair[::-1], pair):
            number = self.reading.number(stated)
            if number is not None:
                return number, other
        return 0.0, None

    def bounded(self, op: Op) -> tuple[float | None, Tensor | None]:
        """(bound, x) of max(x, bound)."""
        if op.kind == "relu":
            return 0.0, self.graph.input(op, "x")
        if op.kind == "clip":
            if self.graph.input(op, "max") is not None or op.attributes.get("max") is not None:
                return None, None
            return self.reading.setting(op, "min"), self.graph.input(op, "x")
        pair = self.reading.operands(op)
        for stated, other in (pair[::-1], pair) if pair else ():
            number = self.reading.number(stated)
            if number is not None:
                return number, other
        return None, None

    def _precision_of(self, op: Op, other: Tensor) -> float:
        dtypes = [t.dtype for t in self.graph.inputs(op).values() if t is not other and t.dtype is not None]
        low = any(is_float(dtype) and dtype.itemsize < 4 for dtype in dtypes)
        return 5e-3 if low else 1e-6

    # ---- S --------------------------------------------------------------------------------------

    def _squares(self, op: Op, made: Tensor) -> list[Moment]:
        if op.kind in ("var", "var_mean") and made is self.graph.outputs(op).get("y"):
            return list(self.variance(op))
        if op.kind in ("reduce_mean", "reduce_sum", "reduce_sum_square", "global_average_pool"):
            return list(self._mean_of_squares(op))
        if op.kind == "sub":
            return list(self._difference_of_moments(op))
        return []

    def variance(self, op: Op) -> Iterator[Moment]:
        """ATen's var and std."""
        reduced = self.reading.reduction(op)
        if reduced is not None and op.attributes.get("correction") is not None:
            correction = float(op.attributes["correction"])
            yield Moment(
                reduced.source, True, reduced.axes, correction=correction, kept=reduced.kept, ops=(op,)
            )

    def _mean_of_squares(self, op: Op) -> Iterator[Moment]:
        reduced = self.reading.reduction(op)
        if reduced is None:
            return
        squared: tuple[Tensor, tuple[Op, ...]] | None = (reduced.source, ())
        if op.kind != "reduce_sum_square":
            squared = self._squared(reduced.source)
        if squared is None:
            return
        z, ops = squared
        plain = Moment(
            z, False, reduced.axes, op.kind.startswith("reduce_sum"), kept=reduced.kept, ops=(op, *ops)
        )
        difference = self._centred(z, reduced.axes)
        if difference is not None:
            x, more = difference
            yield replace(plain, x=x, centred=True, ops=(*plain.ops, *more))
        yield plain

    def _squared(self, tensor: Tensor) -> tuple[Tensor, tuple[Op, ...]] | None:
        """(z, the ops that make it z²)."""
        ops: list[Op] = []
        for _ in range(_MAX_STEPS):
            op = self.graph.producer(tensor)
            if op is None:
                return None
            ops.append(op)
            x = self.graph.input(op, "x")
            if op.kind in CASTS and x is not None:
                tensor = x
            elif op.kind == "pow" and x is not None and self.reading.setting(op, "exponent") == 2:
                return x, tuple(ops)
            elif op.kind == "mul" and (pair := self._same_operands(op)) is not None:
                return pair, tuple(ops)
            else:
                return None
        return None

    def _same_operands(self, op: Op) -> Tensor | None:
        """x of Mul(x, x): one tensor at two slots."""
        inputs = self.graph.inputs(op)
        a, b = inputs.get("a"), inputs.get("b")
        return a if a is not None and a is b else None

    def _centred(self, z: Tensor, axes: Axes) -> tuple[Tensor, tuple[Op, ...]] | None:
        """(x, ops) where z is x − mean(x), or mean(x) − x, over these axes."""
        ops: list[Op] = []
        while (op := self.graph.producer(z)) is not None and op.kind in CASTS:
            ops.append(op)
            source = self.graph.input(op, "x")
            if source is None or len(ops) > _MAX_STEPS:
                return None
            z = source
        if op is None or op.kind not in ("sub", "add"):
            return None
        pair = self.reading.operands(op)
        if pair is None:
            return None
        for x, other in (pair, pair[::-1]):
            mean = self._mean(other, negated=op.kind == "add")
            if mean is not None and mean[0].axes == axes and self._same(mean[0].source, x):
                return x, (*ops, op, *mean[1])
        return None

    def _mean(self, tensor: Tensor, negated: bool = False) -> tuple[Reduction, tuple[Op, ...]] | None:
        """The ReduceMean behind `tensor`, or behind −`tensor`, with the ops from there on."""
        ops: list[Op] = []
        factor, put_back = 1.0, None
        for _ in range(_MAX_STEPS):
            op = self.graph.producer(tensor)
            if op is None:
                return None
            ops.append(op)
            reduced = self._is_mean(op, tensor)
            if reduced is not None:
                is_sum = op.kind == "reduce_sum"
                count = self.reading.count(reduced.source, reduced.axes) if is_sum else 1
                right = count is not None and abs(factor * count - (-1 if negated else 1)) < 1e-6
                kept = reduced.kept
                if put_back is not None:
                    kept = self.reading.lies_against(put_back, reduced.source, reduced.axes)
                return (reduced, tuple(ops)) if right and kept else None
            if op.kind in CASTS:
                following = self.graph.input(op, "x")
            elif op.kind in RESHAPES:
                following, put_back = self.graph.input(op, "x"), put_back or tensor
            elif op.kind == "neg":
                following, factor = self.graph.input(op, "x"), -factor
            else:
                number, following = self.with_number(op)
                if op.kind == "mul":
                    factor *= number
                elif op.kind == "div" and number and self.graph.input(op, "a") is following:
                    factor /= number
                else:
                    return None
            if following is None:
                return None
            tensor = following
        return None

    def _is_mean(self, op: Op, made: Tensor) -> Reduction | None:
        several = op.kind in ("var_mean", "std_mean")
        if several and made is not self.graph.outputs(op).get("mean"):
            return None
        if several or op.kind in ("reduce_mean", "reduce_sum", "global_average_pool"):
            return self.reading.reduction(op)
        return None

    def _difference_of_moments(self, op: Op) -> Iterator[Moment]:
        """mean(x²) − mean(x)²."""
        pair = self.reading.operands(op)
        if pair is None:
            return
        second, first = self.under(pair[0]), self._squared(pair[1])
        if first is None or not second:
            return
        moment = second[-1]
        mean = self._unaligned_mean(first[0])
        plain = (moment.scale, moment.eps, moment.least, moment.is_sum) == (1.0, 0.0, 0.0, False)
        if not plain or mean is None or mean[0].axes != moment.axes or not self._same(mean[0].source, moment.x):
            return
        yield replace(moment, centred=True, ops=(op, *moment.ops, *first[1], *mean[1]))

    def _unaligned_mean(self, tensor: Tensor) -> tuple[Reduction, tuple[Op, ...]] | None:
        """A mean that meets nothing but another one: both may have lost the axes."""
        found = self._mean(tensor)
        if found is not None:
            return found
        op = self.graph.producer(tensor)
        reduced = self._is_mean(op, tensor) if op is not None and op.kind != "reduce_sum" else None
        return (reduced, (op,)) if reduced is not None and op is not None else None

    def _same(self, a: Tensor, b: Tensor) -> bool:
        return a is b or self.reading.uncast(a) is self.reading.uncast(b)


def close(a: float, b: float, precision: float) -> bool:
    return bool(np.isfinite(a)) and abs(a - b) <= precision * max(abs(a), abs(b))
