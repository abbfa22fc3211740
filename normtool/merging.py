"""Parallel branches become one Conv.

What a block such as RepVGG's or MobileOne's adds up before its nonlinearity,

    y = Σ_j s_j·(W_j ⋆ x) + t        with identities x = δ ⋆ x and averages among the branches

is linear in x, and one convolution: each kernel is embedded in the largest one at offset `pads_large −
pads_small`,

    W'[o, i] = Σ_j s_j[o]·embed(W_j)[o, i]        b' = Σ_j s_j·b_j + t

    identity: δ[o, i, centre] = 1 for i = o mod Cin/g
    AveragePool(count_include_pad = 1): 1/|k| on that diagonal

Exact when strides, dilations and output grids agree and the padding is zero. Done only where a BatchNorm is
part of it, and where the one Conv multiplies no more often than the branches did (X. Ding et al., "RepVGG",
CVPR 2021).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from normtool.constants import Constants
from normtool.edits import Edit, Rebind, Splice
from normtool.graph import ModelGraph, Op, Tensor
from normtool.reasons import Reason
from normtool.rules._weights import bias_name
from normtool.rules.carriers import refusal
from normtool.travel import Merge
from normtool.values import (
    EXTENDED,
    Array,
    Rounded,
    Value,
    exact_array,
    exact_rows,
    round_to,
    widened,
    working_dtype,
)

#: How an op looks as an affine map; None where it is none.
AsAffine = Callable[[Op], Merge | None]

#: Ops that add what they read, with the sign of each operand.
_SUMS: Mapping[str, Mapping[str, int]] = {"add": {}, "sum": {}, "sub": {"b": -1}}

#: Ops that hand on what they read.
_CARRIERS = frozenset(["identity", "dropout"])

#: What the terms of a sum come out of, where there is anything to merge.
_TERMS = frozenset(["conv", "average_pool", "batch_norm", "mul", "div", *_SUMS, *_CARRIERS])


@dataclass(frozen=True, eq=False)
class Branch:
    """One term s·op(x) of a sum; `op` is None for x itself. `path` leads from the sum down to the term."""

    op: Op | None
    source: Tensor
    s: Array
    path: tuple[tuple[Op, str], ...]


@dataclass(frozen=True, eq=False)
class Merged:
    """A sum of branches and the Conv that does it all."""

    root: Op
    anchor: Op
    source: Tensor
    edits: tuple[Edit, ...]
    #: every op of the sum, in no particular order
    ops: tuple[Op, ...]


@dataclass(frozen=True, eq=False)
class _Grid:
    """How a convolution walks over its input."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Sum:
    branches: tuple[Branch, ...]
    shift: Array
    ops: tuple[Op, ...]


class _NoSum(Exception):
    """What is looked at is no sum of branches."""


class Merger:
    """Finds sums of branches in one state of a graph."""

    def __init__(self, constants: Constants, as_affine: AsAffine, had_norm: Callable[[Op], bool]) -> None:
        self.constants = constants
        self.graph: ModelGraph = constants.graph
        self.as_affine = as_affine
        #: did a BatchNorm go into this op?
        self.had_norm = had_norm

    def merge(self, root: Op) -> Merged | None:
        """The Conv that does what the sum behind `root` does; None where there is none."""
        makers = [self.graph.producer(tensor) for tensor in self.graph.inputs(root).values()]
        if not any(maker is not None and maker.kind in _TERMS for maker in makers):
            return None
        try:
            whole = self._sum(self.graph.output(root), first=True)
            if len(whole.branches) < 2 or not self._is_about_norms(whole):
                return None
            return self._as_conv(root, whole)
        except (_NoSum, LookupError, TypeError, ValueError, ArithmeticError):
            return None

    def _is_about_norms(self, whole: _Sum) -> bool:
        branches = [branch.op for branch in whole.branches if branch.op is not None]
        return any(op.kind == "batch_norm" for op in whole.ops) or any(map(self.had_norm, branches))

    # ---- the sum ----------------------------------------------------------------------

    def _sum(self, tensor: Tensor, first: bool = False) -> _Sum:
        """`tensor` as a sum of branches. Tensors within are read nowhere else."""
        op = self.graph.producer(tensor)
        alone = first or len(self.graph.readers(tensor)) == 1
        if op is None or not alone:
            return _identity(tensor)
        if op.kind in _SUMS and (terms := self._terms(op)) is not None:
            parts = [(self._sum(t), sign, slot) for slot, (t, sign) in terms.items()]
            branches = [
                _behind(branch, op, slot, np.full(1, sign, EXTENDED))
                for p, sign, slot in parts
                for branch in p.branches
            ]
            shift = sum((sign * p.shift for p, sign, _ in parts), np.zeros(1, EXTENDED))
            return _Sum(tuple(branches), shift, (op, *(each for p, _, _ in parts for each in p.ops)))
        if op.kind in _CARRIERS and refusal(self.constants, op) is None:
            entered = self.graph.input(op, "x")
            assert entered is not None
            inner = self._sum(entered)
            branches = [_behind(branch, op, "x", np.ones(1, EXTENDED)) for branch in inner.branches]
            return _Sum(tuple(branches), inner.shift, (op, *inner.ops))
        merge = self.as_affine(op)
        if merge is not None and merge.inner.s.ndim == 1 and (merge.inner.axis == 1 or merge.inner.s.size == 1):
            entered = self.graph.input(op, merge.slot)
            assert entered is not None
            inner, map_ = self._sum(entered), merge.inner
            branches = [_behind(branch, op, merge.slot, map_.s) for branch in inner.branches]
            return _Sum(tuple(branches), map_.s * inner.shift + map_.t, (op, *inner.ops))
        if op.kind in ("conv", "average_pool") and (source := self.graph.input(op, "x")) is not None:
            return _Sum((Branch(op, source, np.ones(1, EXTENDED), ()),), np.zeros(1, EXTENDED), (op,))
        if first:
            raise _NoSum
        return _identity(tensor)

    def _terms(self, op: Op) -> dict[str, tuple[Tensor, int]] | None:
        """Slot → (computed term, its sign); None if a term is constant."""
        terms = {slot: (t, _SUMS[op.kind].get(slot, 1)) for slot, t in self.graph.inputs(op).items()}
        constant = [t for t, _ in terms.values() if not isinstance(self.constants.value(t), Reason)]
        return None if constant or len({t.shape for t, _ in terms.values()}) > 1 else terms

    # ---- the one Conv -----------------------------------------------------------------

    def _as_conv(self, root: Op, whole: _Sum) -> Merged | None:
        sources = {branch.source for branch in whole.branches}
        convs = [b for b in whole.branches if b.op is not None and b.op.kind == "conv"]
        if len(sources) > 1 or not convs:
            return None
        (source,) = sources
        anchor = max(convs, key=lambda b: (math.prod(self._weight(b).shape[2:]), -self._groups(b)))
        assert anchor.op is not None
        weight, groups = self._weight(anchor), self._groups(anchor)
        grid = self._grid(anchor.op, len(weight.shape) - 2)
        parts = [self._part(branch, weight, groups, grid) for branch in whole.branches]
        if any(part is None for part in parts) or self._cost(anchor, weight.shape[0]) > self._cost_of(whole):
            return None
        embedded = [part for part in parts if part is not None]
        dtype = weight.dtype
        value = _Embedded(weight.shape, dtype, groups, tuple(embedded))
        bias = self._bias(whole, weight.shape[0])
        edits: list[Edit] = [
            Rebind(anchor.op, "weight", value, f"{anchor.op.name}.weight"),
            Rebind(anchor.op, "bias", Rounded(bias, dtype), bias_name(self.constants, anchor.op)),
            *(Splice(op, slot) for op, slot in reversed(anchor.path)),
        ]
        return Merged(root, anchor.op, source, tuple(edits), whole.ops)

    def _weight(self, branch: Branch) -> Value:
        assert branch.op is not None
        tensor = self.graph.input(branch.op, "weight")
        value = self.constants.value(tensor) if tensor is not None else None
        if value is None or isinstance(value, Reason):
            raise _NoSum
        return value

    def _groups(self, branch: Branch) -> int:
        assert branch.op is not None
        return int(self.constants.attribute(branch.op, "group"))

    def _grid(self, op: Op, rank: int) -> _Grid:
        stated = {name: self.constants.attribute(op, name) for name in ("strides", "dilations", "pads")}
        if (self.constants.attribute(op, "auto_pad") or "NOTSET") not in ("NOTSET", "VALID"):
            raise _NoSum
        pads = tuple(stated["pads"] or [0] * 2 * rank)
        weight = self.graph.input(op, "weight")
        value = self.constants.value(weight) if weight is not None else None
        kernel = self.constants.attribute(op, "kernel_shape") if value is None else value.shape[2:]  # type: ignore[union-attr]
        ones = [1] * rank
        return _Grid(
            tuple(kernel),
            tuple(stated["strides"] or ones),
            tuple(stated["dilations"] or ones),
            pads[:rank],
            pads[rank:],
        )

    def _part(self, branch: Branch, anchor: Value, groups: int, grid: _Grid) -> "_Part | None":
        """One branch as a kernel of the anchor's shape; None where it does not fit."""
        channels, rank = anchor.shape[0], len(anchor.shape) - 2
        s = np.broadcast_to(branch.s, (channels,)) if branch.s.size in (1, channels) else None
        if s is None:
            return None
        if branch.op is not None and branch.op.kind == "conv":
            own, weight = self._grid(branch.op, rank), self._weight(branch)
            offset = _offset(own, grid)
            if offset is None or weight.shape[0] != channels or self._groups(branch) % groups:
                return None
            if weight.shape[1] * self._groups(branch) != anchor.shape[1] * groups:
                return None
            return _Part(s, weight, 1.0, offset, self._groups(branch), own.kernel)
        if anchor.shape[1] * groups != channels:
            return None
        if branch.op is None:
            own = _Grid(*[(1,) * rank] * 3, *[(0,) * rank] * 2)
            offset = _offset(own, grid)
            return None if offset is None else _Part(s, None, 1.0, offset, channels, own.kernel)
        own = self._grid(branch.op, rank)
        counts = self.constants.attribute(branch.op, "count_include_pad")
        stated = [self.constants.attribute(branch.op, name) for name in ("ceil_mode", "divisor_override")]
        offset = _offset(own, grid)
        if offset is None or any(stated) or (any((*own.begins, *own.ends)) and not counts):
            return None
        return _Part(s, None, 1.0 / math.prod(own.kernel), offset, channels, own.kernel)

    def _bias(self, whole: _Sum, channels: int) -> Array:
        bias = np.broadcast_to(whole.shift, (channels,)).astype(EXTENDED)
        for branch in whole.branches:
            tensor = self.graph.input(branch.op, "bias") if branch.op is not None else None
            if tensor is None:
                continue
            value = self.constants.value(tensor)
            if isinstance(value, Reason):
                raise _NoSum
            bias = bias + branch.s * exact_array(value)
        return bias

    # ---- what it costs ----------------------------------------------------------------

    def _cost_of(self, whole: _Sum) -> int:
        """Multiplications per output position, affine maps counted as what they are."""
        channels = max(branch.s.size for branch in whole.branches)
        maps = sum(op.kind not in ("conv", "average_pool", *_SUMS, *_CARRIERS) for op in whole.ops)
        return maps * channels + sum(self._cost(branch, channels) for branch in whole.branches)

    def _cost(self, branch: Branch, channels: int) -> int:
        if branch.op is None:
            return channels
        if branch.op.kind == "conv":
            return math.prod(self._weight(branch).shape)
        kernel: list[int] = self.constants.attribute(branch.op, "kernel_shape")
        return channels * math.prod(kernel)


def _identity(tensor: Tensor) -> _Sum:
    return _Sum((Branch(None, tensor, np.ones(1, EXTENDED), ()),), np.zeros(1, EXTENDED), ())


def _behind(branch: Branch, op: Op, slot: str, s: Array) -> Branch:
    return Branch(branch.op, branch.source, np.asarray(s * branch.s), ((op, slot), *branch.path))


def _offset(own: _Grid, large: _Grid) -> tuple[int, ...] | None:
    """Where the small kernel lies in the large one, tap by tap; None where their grids differ."""
    if own.strides != large.strides:
        return None
    offset = []
    for axis, (small, big) in enumerate(zip(own.kernel, large.kernel, strict=True)):
        dilation = large.dilations[axis]
        if small > 1 and own.dilations[axis] != dilation:
            return None
        taps, rest = divmod(large.begins[axis] - own.begins[axis], dilation)
        behind, left = divmod(large.ends[axis] - own.ends[axis], dilation)
        if rest or left or taps < 0 or behind < 0 or taps + small + behind != big:
            return None
        offset.append(taps)
    return tuple(offset)


@dataclass(frozen=True, eq=False)
class _Part:
    """s·W in `groups` groups, or s times a constant on the diagonal, at an offset in a larger kernel."""

    s: Array
    weight: Value | None
    constant: float
    offset: tuple[int, ...]
    groups: int
    kernel: tuple[int, ...]

    def add_to(self, rows: Array, start: int, stop: int, channels: int, groups: int) -> None:
        """Add rows `start..stop` of the embedded kernel, which has `groups` groups, to `rows`."""
        window = tuple(slice(o, o + k) for o, k in zip(self.offset, self.kernel, strict=True))
        s = self.s[start:stop].astype(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1))
        if self.weight is not None:
            own = widened(exact_rows(self.weight, start, stop), rows.dtype) * s
        else:
            own = np.broadcast_to(s * rows.dtype.type(self.constant), (stop - start, 1, *self.kernel))
        width = own.shape[1]
        if width == rows.shape[1]:
            rows[(slice(None), slice(None), *window)] += own
            return
        # output o reads inputs from (group of o)·width on; its row in the large kernel begins at another one
        output = np.arange(start, stop)
        first = output * self.groups // channels * width - output * groups // channels * rows.shape[1]
        for i, begin in enumerate(first.tolist()):
            rows[i][(slice(begin, begin + width), *window)] += own[i]


@dataclass(frozen=True, eq=False)
class _Embedded:
    """The sum of several kernels in one, computed a block of rows at a time."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    groups: int
    parts: tuple[_Part, ...]

    def exact_rows(self, start: int, stop: int) -> Array:
        rows = np.zeros((stop - start, *self.shape[1:]), working_dtype(self.dtype))
        for part in self.parts:
            part.add_to(rows, start, stop, self.shape[0], self.groups)
        return rows

    def rows(self, start: int, stop: int) -> Array:
        return round_to(self.exact_rows(start, stop), self.dtype)
