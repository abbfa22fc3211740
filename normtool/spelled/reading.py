"""What the search asks of single tensors and ops; nothing larger than a few numbers is ever read."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from normtool.constants import COMPUTABLE, Constants
from normtool.graph import ModelGraph, Op, Role, Tensor
from normtool.reasons import Reason
from normtool.values import Array, element_count, is_float, to_array

Axes = tuple[int, ...]

#: Ops that hand on the same numbers, in another precision perhaps.
CASTS = frozenset(["cast", "cast_like", "identity"])

#: Ops that leave the order of the numbers, row by row. (An Expand to as many elements as there were does.)
RESHAPES = frozenset(["reshape", "unsqueeze", "expand"])

#: A constant expression deeper than this is none.
_MAX_DEPTH = 32

#: Ops that leave as many axes as there were.
_KEEP_RANK = frozenset("pow sqrt neg abs relu sigmoid tanh gelu layer_norm rms_norm dropout softmax".split())

_REDUCTIONS = frozenset("reduce_mean reduce_sum reduce_sum_square reduce_l1 reduce_l2".split())

#: Ops that look at no number of x.
_OF_SHAPE = frozenset(["shape", "size"])

#: Most elements of a tensor that goes into a computed number.
_FEW = 64


@dataclass(frozen=True)
class Reduction:
    """`op` takes the mean or sum of `source` over `axes`; `kept`: they stay, with length 1."""

    op: Op
    source: Tensor
    axes: Axes
    kept: bool


#: What integers computed from shapes go through on their way into a divisor.
_OF_LENGTHS: Mapping[str, Callable[[Mapping[str, Array]], Array]] = {
    **dict.fromkeys(("cast", "cast_like", "identity", "squeeze", "unsqueeze"), lambda inputs: inputs["x"]),
    "embedding": lambda inputs: inputs["table"][inputs["indices"].astype(np.int64)],
    "reduce_prod": lambda inputs: inputs["x"].prod(),
    "add": lambda inputs: inputs["a"] + inputs["b"],
    "sub": lambda inputs: inputs["a"] - inputs["b"],
    "mul": lambda inputs: inputs["a"] * inputs["b"],
}


class Reading:
    def __init__(self, graph: ModelGraph, constants: Constants) -> None:
        self.graph = graph
        self.constants = constants
        self._stored: dict[Tensor, bool] = {}
        self._numbers: dict[Tensor, float | None] = {}
        self._ranks: dict[Tensor, int | None] = {}

    # ---- constants --------------------------------------------------------------------------

    def stored(self, tensor: Tensor, depth: int = 0) -> bool:
        """Does the model store it, or compute it from nothing but what it stores? (Says no number.)"""
        if tensor.written:
            return False
        if tensor.value is not None:
            return True
        if tensor not in self._stored:
            self._stored[tensor] = depth < _MAX_DEPTH and self._computed(tensor, depth)
        return self._stored[tensor]

    def _computed(self, tensor: Tensor, depth: int) -> bool:
        op = self.graph.producer(tensor)
        if op is None or op.kind not in COMPUTABLE | {"dequantize_linear"}:
            return False
        inputs = self.graph.inputs(op)
        if op.kind in _OF_SHAPE:
            shape = inputs["x"].shape if "x" in inputs else None
            return shape is not None and all(isinstance(n, int) for n in shape)
        return all(self.stored(each, depth + 1) for each in inputs.values())

    def is_data(self, tensor: Tensor) -> bool:
        """Does anything that flows through the model go into it? A norm of a weight is none of the model's."""
        pending, seen = [tensor], {tensor}
        while pending and len(seen) <= _MAX_DEPTH:
            each = pending.pop()
            op = self.graph.producer(each)
            if each.value is None and (op is None or not self.graph.inputs(op)):
                return True
            if each.value is None and op is not None:
                before = [t for t in self.graph.inputs(op).values() if t not in seen]
                seen.update(before)
                pending += before
        return bool(pending)

    def number(self, tensor: Tensor) -> float | None:
        """The one number that a constant holds; None for a weight, even a weight of one element."""
        if tensor not in self._numbers:
            self._numbers[tensor] = self._number(tensor)
        return self._numbers[tensor]

    def _number(self, tensor: Tensor) -> float | None:
        if not self.stored(tensor):
            return self._computed_length(tensor)
        if not self._is_small(tensor):
            return None
        if tensor.value is not None and tensor.stored_elements is None:
            value = tensor.value  # a caller may pass another: see NormForm.assumed
        else:
            found = self.constants.value(tensor)
            if isinstance(found, Reason):
                return None
            value = found
        if element_count(value.shape) != 1:
            return None
        return float(to_array(value).reshape(-1)[0])

    def _computed_length(self, tensor: Tensor) -> float | None:
        """A number made of lengths that are known, though others of that shape are open."""
        if tensor.shape is None or element_count(tuple(n for n in tensor.shape if isinstance(n, int))) != 1:
            return None
        found = self._lengths(tensor, 0)
        if found is None or found.size != 1 or not np.isfinite(found).all():
            return None
        return float(found.reshape(-1)[0])

    def _lengths(self, tensor: Tensor, depth: int) -> Array | None:
        """What is computed from shapes; NaN for a length that is not known."""
        if self.stored(tensor):
            value = self.constants.value(tensor) if self._is_small(tensor) else None
            return None if value is None or isinstance(value, Reason) else to_array(value).astype(np.float64)
        op = self.graph.producer(tensor)
        if op is None or depth > 12:
            return None
        if op.kind == "shape":
            source = self.graph.input(op, "x")
            shape = None if source is None else source.shape
            if shape is None:
                return None
            lengths = shape[op.attributes.get("start", 0) : op.attributes.get("end")]
            return np.array([n if isinstance(n, int) else np.nan for n in lengths])
        if op.kind not in _OF_LENGTHS:
            return None
        inputs = {slot: self._lengths(each, depth + 1) for slot, each in self.graph.inputs(op).items()}
        known = {slot: array for slot, array in inputs.items() if array is not None}
        return _OF_LENGTHS[op.kind](known) if len(known) == len(inputs) else None

    def _is_small(self, tensor: Tensor) -> bool:
        """Nothing that goes into it is a parameter or has more than a few elements."""
        pending, seen = [tensor], 0
        while pending:
            each = pending.pop()
            seen += 1
            if each.role is Role.PARAMETER or seen > _FEW:
                return False
            if each.value is not None:
                if element_count(each.value.shape) > (1 if each is tensor else _FEW):
                    return False
            elif (op := self.graph.producer(each)) is not None and op.kind not in _OF_SHAPE:
                pending += self.graph.inputs(op).values()
        return True

    def setting(self, op: Op, slot: str) -> float | None:
        """A number that the op has as an attribute or at a slot."""
        stated = op.attributes.get(slot)
        if stated is not None:
            return float(stated) if isinstance(stated, int | float) else None
        tensor = self.graph.input(op, slot)
        return self.number(tensor) if tensor is not None else None

    # ---- ops --------------------------------------------------------------------------------

    def rank(self, tensor: Tensor, depth: int = 0) -> int | None:
        """Number of axes, also where shapes could not be inferred: elementwise ops keep it."""
        if tensor not in self._ranks:
            known = self.graph.rank(tensor)
            self._ranks[tensor] = known if known is not None or depth > 8 else self._rank(tensor, depth + 1)
        return self._ranks[tensor]

    def _rank(self, tensor: Tensor, depth: int) -> int | None:
        op = self.graph.producer(tensor)
        if op is None:
            return None
        kept = op.kind in _REDUCTIONS and self.constants.attribute(op, "keepdims")
        if kept or op.kind in CASTS or op.kind in _KEEP_RANK:
            x = self.graph.input(op, "x")
            return self.rank(x, depth) if x is not None else None
        if op.kind in ("add", "sub", "mul", "div"):
            ranks = [self.rank(each, depth) for each in self.graph.inputs(op).values()]
            known = [rank for rank in ranks if rank is not None]
            return max(known) if len(known) == len(ranks) and known else None
        return None

    def operands(self, op: Op) -> tuple[Tensor, Tensor] | None:
        """Both operands of a binary op, in order; a Sum or Max of two is one."""
        inputs = self.graph.inputs(op)
        slots = ("inputs.0", "inputs.1") if "inputs.0" in inputs else ("a", "b")
        if len(inputs) != 2 or any(slot not in inputs for slot in slots):
            return None
        return inputs[slots[0]], inputs[slots[1]]

    def uncast(self, tensor: Tensor) -> Tensor:
        """The tensor that holds these numbers first, in whatever float precision."""
        for _ in range(_MAX_DEPTH):
            source = self.cast_source(tensor)
            if source is None:
                break
            tensor = source
        return tensor

    def cast_source(self, tensor: Tensor) -> Tensor | None:
        """What `tensor` is a cast of, from float to float."""
        op = self.graph.producer(tensor)
        if op is None or op.kind not in CASTS:
            return None
        source = self.graph.input(op, "x")
        floats = all(t is None or t.dtype is None or is_float(t.dtype) for t in (source, tensor))
        return source if floats else None

    def lies_against(self, tensor: Tensor, x: Tensor, axes: Axes) -> bool:
        """Is this reshaped statistic of x as long as x along the other axes, and 1 along these?"""
        if x.shape is not None and tensor.shape is not None and None not in tensor.shape:
            count = len(x.shape)
            over = {axis % count for axis in axes if -count <= axis < count}
            return tensor.shape == tuple(1 if axis in over else n for axis, n in enumerate(x.shape))
        op = self.graph.producer(tensor)
        back = self.axes(op, self.rank(tensor)) if op is not None and op.kind == "unsqueeze" else None
        return back == axes

    def aliases(self, tensor: Tensor) -> Iterator[Tensor]:
        """`tensor` and every cast of it."""
        pending = [tensor]
        while pending:
            each = pending.pop()
            yield each
            for read in self.graph.readers(each):
                if read.op.kind in CASTS and read.slot == "x":
                    made = self.graph.outputs(read.op).get("y")
                    if made is not None and self.cast_source(made) is each:
                        pending.append(made)

    def reduction(self, op: Op) -> Reduction | None:
        """Of a mean, sum, variance or length: what it is taken of, over which axes."""
        source = self.graph.input(op, "x")
        if source is None:
            return None
        rank = self.rank(source)
        if op.kind == "global_average_pool":
            return Reduction(op, source, tuple(range(2, rank)), True) if rank is not None else None
        axes = self.axes(op, rank)
        if not axes:
            return None
        kept = bool(self.constants.attribute(op, "keepdims")) or axes == tuple(range(len(axes)))
        return Reduction(op, source, axes, kept)

    def axes(self, op: Op, rank: int | None) -> Axes | None:
        """Sorted, from the front where the rank is known; None where they are not known."""
        if self.constants.is_computed(op, "axes"):
            return None
        stated = self.constants.attribute(op, "axes")
        if stated is None or stated == []:
            if rank is None or self.constants.attribute(op, "noop_with_empty_axes"):
                return None
            return tuple(range(rank))
        listed = [int(axis) for axis in (stated if isinstance(stated, list | tuple) else [stated])]
        if rank is None:
            return tuple(sorted(listed))
        if not all(-rank <= axis < rank for axis in listed):
            return None
        return tuple(sorted({axis % rank for axis in listed}))

    def count(self, tensor: Tensor, axes: Axes) -> int | None:
        """Elements along these axes, where the lengths are known."""
        shape = tensor.shape
        if shape is None or any(not -len(shape) <= axis < len(shape) for axis in axes):
            return None
        product = 1
        for axis in axes:
            length = shape[axis]
            if not isinstance(length, int):
                return None
            product *= length
        return product
