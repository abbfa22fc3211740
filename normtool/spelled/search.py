"""Every root of a graph, and the norms around it."""

from collections.abc import Iterator
from dataclasses import replace
from math import sqrt
from typing import Any

import numpy as np

from normtool.constants import Constants
from normtool.forms import ROOTS, NormForm
from normtool.graph import ModelGraph, Op, Tensor
from normtool.spelled.groups import grouped, of_instance_norm
from normtool.spelled.labels import Label
from normtool.spelled.moments import Moment, MomentReader, close
from normtool.spelled.reading import CASTS, Reading
from normtool.spelled.spread import End, Spread


class Search:
    def __init__(self, graph: ModelGraph, constants: Constants) -> None:
        self.graph = graph
        self.reading = Reading(graph, constants)
        self.moments = MomentReader(self.reading)

    def forms(self) -> list[NormForm]:
        self.order = {op: position for position, op in enumerate(self.graph.ops)}
        found: dict[Tensor, NormForm] = {}
        for op in [op for op in self.graph.ops if op.kind in ROOTS]:
            for form in self._around(op):
                known = found.get(form.y)
                if known is None or len(known.ops) < len(form.ops):
                    found[form.y] = form
        for op in [op for op in self.graph.ops if op.kind == "instance_norm"]:
            whole = of_instance_norm(self.reading, op)
            if whole is not None:
                found[whole.y] = whole
        forms = sorted(found.values(), key=lambda form: self.order[form.ops[-1]])
        return self._with_sharing(forms)

    # ---- one root -----------------------------------------------------------------------------------

    def _around(self, op: Op) -> list[NormForm]:
        for moment, label in self._moments(op):
            if not self.reading.is_data(moment.x) or any(each.scope != op.scope for each in moment.ops):
                continue
            y = self.graph.outputs(op).get("y")
            if y is None:
                return []
            spread = Spread(self.reading, self.moments, moment, {y: label})
            forms = [form for end in spread.ends() if (form := self._form(spread, end)) is not None]
            if forms:
                return forms
        return []

    def _moments(self, op: Op) -> Iterator[tuple[Moment, Label]]:
        """What may be under this root, and what the op makes of it: σ, or 1/σ."""
        source = self.graph.input(op, "x")
        if source is None:
            return
        if op.kind in ("std", "std_mean"):
            for moment in self.moments.variance(op):
                yield moment, Label(one=1.0, power=1, kept=moment.kept)
            return
        if op.kind in ("reduce_l1", "reduce_l2"):
            reduced = self.reading.reduction(op)
            if reduced is not None:
                moment = Moment(source, False, reduced.axes, is_sum=True, kept=reduced.kept, ops=(op,))
                yield moment, Label(one=1.0, power=1, kept=reduced.kept)
            return
        power = {"sqrt": 1.0, "rsqrt": -1.0}.get(op.kind)
        if power is None:
            exponent = self.reading.setting(op, "exponent")
            power = 2 * exponent if exponent is not None else 0
        inverted = self._inverted(source)
        if inverted is not None:  # √(1/V)
            source, power = inverted[0], -power
        if power not in (1.0, -1.0):
            return
        for moment in self.moments.under(source):
            ops = (*moment.ops, *(inverted[1:] if inverted else ()), op)
            yield replace(moment, ops=ops), Label(one=1.0, power=int(power), kept=moment.kept)

    def _inverted(self, tensor: Tensor) -> tuple[Any, ...] | None:
        """(V, op) where `tensor` is 1/V."""
        op = self.graph.producer(tensor)
        if op is None:
            return None
        if op.kind == "reciprocal":
            source = self.graph.input(op, "x")
            return (source, op) if source is not None else None
        pair = self.reading.operands(op) if op.kind == "div" else None
        return (pair[1], op) if pair is not None and self.reading.number(pair[0]) == 1 else None

    # ---- the form -----------------------------------------------------------------------------------

    def _form(self, spread: Spread, end: End) -> NormForm | None:
        facts = self._facts(spread.moment, end.label)
        if (
            facts is None
            or self._is_of_batch(spread, facts[0])
            or self._disturbed(end)
            or not self._keeps_shape(spread.moment.x, end.y)
        ):
            return None
        kind, eps, gain, unbiased = facts
        x, casts = self._entry(end)
        ops = self._in_dataflow_order(end.y, {*end.ops, *casts})
        if any(op.scope != ops[-1].scope for op in ops):
            return None
        label, moment = end.label, spread.moment
        root_dtype = self._dtype_of_statistics(moment)
        is_cast = root_dtype is not None and x.dtype is not None and root_dtype != x.dtype
        p = 1 if any(op.kind == "reduce_l1" for op in end.ops) else 2
        form = NormForm(
            kind=self._kind(kind, spread, label),
            x=x,
            y=end.y,
            axes=moment.axes,
            eps=eps,
            weight=label.weight,
            bias=label.bias,
            ops=ops,
            weight_offset=label.offset,
            gain=gain,
            eps_mode=self._mode(moment, label),
            unbiased=unbiased,
            compute_dtype=root_dtype if is_cast else None,
            cast_before_weight=self._cast_before_weight(spread, end, x) if is_cast else None,
            p=p,
        )
        whole = grouped(self.reading, form) if moment.centred and label.weight is label.bias is None else None
        return whole or form

    def _facts(self, moment: Moment, label: Label) -> tuple[str, float, float, bool] | None:
        """(kind, ε, gain, unbiased), or None where the sum is divided by what is no count of its terms."""
        count = self.reading.count(moment.x, moment.axes)
        scale, near = moment.scale, moment.precision
        gain, eps = label.x, self._eps(moment, label)
        if moment.is_sum and count:
            per_term = scale * count
        elif moment.is_sum:
            per_term = None
        else:
            per_term = scale
        if moment.correction:
            if per_term is None or not close(per_term, 1.0, near) or moment.correction != 1:
                return None
            return "layer_norm", eps, gain, True
        if per_term is not None and close(per_term, 1.0, near) and not (moment.is_sum and count == 1):
            return ("layer_norm" if moment.centred else "rms_norm"), eps, gain, False
        if moment.centred:
            unbiased = count and count > 1 and per_term is not None
            if unbiased and close(per_term, count / (count - 1), near):  # type: ignore[arg-type,operator]
                return "layer_norm", eps, gain, True
            return None
        if not moment.is_sum or scale != 1:
            return None
        if count and count > 1 and close(gain * gain, count, 1e-5) and moment.ops[0].kind != "reduce_l1":
            # x/‖x‖ · √N: an RMSNorm, whose ε stands before the division by N
            inside = self._mode(moment, label) == "inside"
            return "rms_norm", eps / count if inside else eps / sqrt(count), 1.0, False
        return "lp_norm", eps, gain, False

    def _eps(self, moment: Moment, label: Label) -> float:
        if label.eps_mode != "inside":
            return label.eps
        return sqrt(moment.least) if moment.least else moment.eps

    def _mode(self, moment: Moment, label: Label) -> Any:
        return label.eps_mode if label.eps_mode != "inside" else "max" if moment.least else "inside"

    def _kind(self, kind: str, spread: Spread, label: Label) -> str:
        """Over every spatial axis, with γ per channel or without γ: an InstanceNorm. γ tells the two apart."""
        if kind != "layer_norm" or spread.rank is None or spread.rank < 3:
            return kind
        weights = [t for t in (label.weight, label.bias) if t is not None]
        along = set[int]().union(*(spread.axes_of(t) or set() for t in weights))
        axes = spread.moment.axes
        if along and not along <= set(axes):
            return "instance_norm"
        if not weights and spread.rank > 3 and axes == tuple(range(2, spread.rank)):
            return "instance_norm"
        if along == {1} and axes == tuple(range(1, spread.rank)):
            return "group_norm"
        return kind

    def _dtype_of_statistics(self, moment: Moment) -> np.dtype[Any] | None:
        made = self.graph.outputs(moment.ops[0])
        return next((tensor.dtype for tensor in made.values()), None)

    def _cast_before_weight(self, spread: Spread, end: End, x: Tensor) -> bool | None:
        """Is what γ multiplies in the precision of x again? None where nothing is cast back, or γ is absent."""
        if end.label.weight is None:
            return None
        for op in end.ops:
            for tensor in self.graph.outputs(op).values():
                label = spread.labels.get(tensor)
                bare = label is not None and label.weight is None and spread.is_complete(label)
                if bare and op.kind in CASTS and tensor.dtype == x.dtype:
                    return True
        return False if end.y.dtype == x.dtype else None

    # ---- x --------------------------------------------------------------------------------------------

    def _entry(self, end: End) -> tuple[Tensor, list[Op]]:
        """x in front of the casts that only the norm reads, or that lie between two of its uses."""
        chains = [self._chain(tensor) for tensor in end.read]
        common = [tensors[0] for tensors in zip(*chains, strict=False) if len(set(tensors)) == 1]
        x = common[-1]
        between = [tensor for chain in chains for tensor in chain[len(common) :]]
        casts = {op for tensor in between if (op := self.graph.producer(tensor)) is not None}
        own = {*end.ops, *casts}
        in_front: list[Op] = []
        while (source := self.reading.cast_source(x)) is not None:
            op = self.graph.producer(x)
            assert op is not None
            in_front.append(op)
            outside = any(read.op not in own for read in self.graph.readers(x))
            if outside or op.scope != end.ops[0].scope or not self._widens(source, x):
                break
            own.add(op)
            x = source
            if x.dtype == end.y.dtype:  # what is cast back, or was never narrower
                casts.update(in_front)
                common.append(x)
        return common[-1], list(casts)

    def _in_dataflow_order(self, y: Tensor, ops: set[Op]) -> tuple[Op, ...]:
        """Each op behind those that it reads; the file need not list them so."""
        done: dict[Op, None] = {}
        pending: list[tuple[Op, bool]] = [(op, False) for op in sorted(ops, key=self.order.__getitem__)[::-1]]
        while pending:
            op, ready = pending.pop()
            if ready:
                done[op] = None
            elif op not in done:
                pending.append((op, True))
                before = (self.graph.producer(t) for t in self.graph.inputs(op).values())
                pending += [(each, False) for each in before if each in ops and each not in done]
        return tuple(done)

    def _chain(self, tensor: Tensor) -> list[Tensor]:
        """A cast, what it is a cast of, and so on; the first one in front."""
        chain = [tensor]
        while (source := self.reading.cast_source(chain[0])) is not None:
            chain.insert(0, source)
        return chain

    def _widens(self, source: Tensor, made: Tensor) -> bool:
        if source.dtype is None or made.dtype is None:
            return False
        return made.dtype.itemsize >= source.dtype.itemsize

    # ---- what speaks against it ---------------------------------------------------------------------

    def _is_of_batch(self, spread: Spread, kind: str) -> bool:
        """Over axis 0 and not over every axis: a BatchNorm in training, which is no such norm."""
        axes = spread.moment.axes
        return kind != "lp_norm" and 0 in axes and (spread.rank is None or len(axes) < spread.rank)

    def _keeps_shape(self, x: Tensor, y: Tensor) -> bool:
        if x.shape is None or y.shape is None:
            return True
        if len(x.shape) != len(y.shape):
            return False
        pairs = zip(x.shape, y.shape, strict=True)
        return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))

    def _disturbed(self, end: End) -> bool:
        """Is something changed in place while the norm is being computed?"""
        own = set(end.ops)
        last = max(self.order[op] for op in own)
        tensors = {t for op in own for t in self.graph.inputs(op).values()}
        for tensor in tensors:
            if not tensor.written:
                continue
            readers = [read.op for read in self.graph.readers(tensor)]
            writers = [op for op in readers if op.spelling.endswith("_") and not op.spelling.endswith("__")]
            if not writers:
                return True  # through a view
            early = [op for op in writers if self.order.get(op, -1) <= last]
            if early and len(readers) > 1:
                return True
        return False

    # ---- several forms ------------------------------------------------------------------------------

    def _with_sharing(self, forms: list[NormForm]) -> list[NormForm]:
        """Fill in `shares`, `observed` and `assumed`, which need to know every form."""
        users: dict[Op, list[NormForm]] = {}
        for form in forms:
            for op in form.ops:
                users.setdefault(op, []).append(form)
        return [self._completed(form, users) for form in forms]

    def _completed(self, form: NormForm, users: dict[Op, list[NormForm]]) -> NormForm:
        shares = tuple(op for op in form.ops if len(users[op]) > 1)
        family = {op for shared in shares for other in users[shared] for op in other.ops} | set(form.ops)
        made = [t for op in form.ops for t in self.graph.outputs(op).values() if t is not form.y]
        ends = {other.y for shared in shares for other in users[shared]}
        observed = [
            t for t in made if t not in ends and any(read.op not in family for read in self.graph.readers(t))
        ]
        read = dict.fromkeys(t for op in form.ops for t in self.graph.inputs(op).values())
        weights = (form.weight, form.bias)
        assumed = [t for t in read if t.overridable and t.value is not None and t not in weights]
        return replace(form, shares=shares, observed=tuple(observed), assumed=tuple(assumed))
