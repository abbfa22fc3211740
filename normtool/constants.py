"""Which tensors are constant, and what they hold.

A stored value is constant unless the caller may override it. A tensor computed only from constants is one
too: exporters write a zero bias as Shape → Expand → CastLike → Expand, and a transposed weight as
Transpose(initializer). Whatever is not constant comes back as the `Reason`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from normtool.graph import ModelGraph, Op, Tensor
from normtool.ops import ROWS
from normtool.reasons import Reason
from normtool.values import Array, Dense, Value, element_count, to_array

#: A computed constant may not have more elements than this: 75 bytes of ONNX can ask for gigabytes.
MAX_COMPUTED_ELEMENTS = 1 << 26

#: Constant expressions deeper than this are not followed.
MAX_DEPTH = 100

Inputs = Mapping[str, Array]


class Constants:
    """Answers for one graph; what was computed once is kept.

    `freeze`: treat initializers that are also graph inputs as constants.
    """

    def __init__(self, graph: ModelGraph, freeze: bool = False) -> None:
        self.graph = graph
        self.freeze = freeze
        self._computed: dict[Tensor, Value | Reason] = {}

    def value(self, tensor: Tensor, depth: int = 0) -> Value | Reason:
        """The content of `tensor`, or why it is not constant."""
        if tensor.written:
            return Reason(
                "dynamic_weight", f"{tensor.name!r} is changed in place when the model runs", tensor.name
            )
        if tensor.value is not None:
            if tensor.overridable and not self.freeze:
                return Reason("overridable", f"{tensor.name!r} is also a graph input", tensor.name)
            if tensor.stored_elements is None:
                return tensor.value
        if tensor not in self._computed:
            self._computed[tensor] = self._compute(tensor, depth)
        return self._computed[tensor]

    def array(self, tensor: Tensor) -> Array | Reason:
        value = self.value(tensor)
        return value if isinstance(value, Reason) else to_array(value)

    def attribute(self, op: Op, name: str) -> Any:
        """An attribute, or the constant input of that name, or the operator's default (None if it has none)."""
        if name in op.attributes:
            return op.attributes[name]
        tensor = self.graph.input(op, name)
        if tensor is not None:
            array = self.array(tensor)
            return None if isinstance(array, Reason) else array.tolist()
        return ROWS[op.kind].defaults.get(name)

    def is_computed(self, op: Op, name: str) -> bool:
        """Is there such an operand, and it is no constant? (Its `attribute` is None, as if there were none.)"""
        tensor = self.graph.input(op, name)
        return tensor is not None and isinstance(self.value(tensor), Reason)

    def _compute(self, tensor: Tensor, depth: int) -> Value | Reason:
        if tensor.value is not None:
            return _written_out(tensor, tensor.value)
        op = self.graph.producer(tensor)
        if op is None:
            return Reason("dynamic_weight", f"{tensor.name!r} is a model input", tensor.name)
        if op.kind in ("dequantize_linear", "quantize_linear"):
            return Reason("quantised", f"{tensor.name!r} comes out of {op.spelling}", op.name)
        compute = _COMPUTE.get(op.kind)
        if compute is None:
            return Reason("dynamic_weight", f"{tensor.name!r} is computed by {op.spelling}", op.name)
        if depth > MAX_DEPTH:
            return Reason("dynamic_weight", f"{tensor.name!r} is computed too deeply", op.name)
        if op.scope.function and any(stated is None for stated in op.attributes.values()):
            message = f"the caller of the function says how {op.spelling} computes {tensor.name!r}"
            return Reason("dynamic_weight", message, op.name)
        try:
            inputs = self._operands(op, depth)
            return inputs if isinstance(inputs, Reason) else Dense(compute(self, op, inputs))
        except (ValueError, TypeError, IndexError, KeyError, MemoryError) as error:
            return Reason("dynamic_weight", f"{op.spelling} of constants failed: {error}", op.name)

    def _operands(self, op: Op, depth: int) -> dict[str, Array] | Reason:
        """The arrays an op computes from. Shape and CastLike look at no numbers of some operands.

        None is read before all are known to be constant: of a table, its indices are not.
        """
        values: dict[str, Value] = {}
        for slot, tensor in self.graph.inputs(op).items():
            if (op.kind, slot) in _METADATA_ONLY:
                continue
            value = self.value(tensor, depth + 1)
            if isinstance(value, Reason):
                return value
            values[slot] = value
        for value in values.values():
            _bound(value.shape)
        return {slot: to_array(value) for slot, value in values.items()}


def _written_out(tensor: Tensor, sparse: Value) -> Value | Reason:
    """A sparse tensor, dense: a few stored numbers can claim any size, and point anywhere."""
    try:
        return Dense(to_array(sparse))
    except (ValueError, IndexError, MemoryError) as error:
        message = f"sparse {tensor.name!r} cannot be written out: {error}"
        return Reason("dynamic_weight", message, tensor.name)


_METADATA_ONLY = {("shape", "x"), ("size", "x"), ("cast_like", "like")}


def _bound(shape: tuple[int, ...]) -> tuple[int, ...]:
    if element_count(shape) > MAX_COMPUTED_ELEMENTS:
        raise MemoryError(f"{element_count(shape)} elements")
    return shape


def _shape(constants: Constants, op: Op, inputs: Inputs) -> Array:
    tensor = constants.graph.input(op, "x")
    if tensor is None or tensor.shape is None:
        raise ValueError("the shape is not known")
    start, end = op.attributes.get("start", 0), op.attributes.get("end")
    lengths = tensor.shape[start:end]
    if not all(isinstance(length, int) for length in lengths):
        raise ValueError(f"the shape {lengths} is not static")
    return np.array(lengths, dtype=np.int64)


def _cast_like(constants: Constants, op: Op, inputs: Inputs) -> Array:
    like = constants.graph.input(op, "like")
    if like is None or like.dtype is None:
        raise ValueError("the dtype to cast to is not known")
    return inputs["x"].astype(like.dtype)


def _expand(constants: Constants, op: Op, inputs: Inputs) -> Array:
    target = tuple(int(n) for n in inputs["shape"])
    return np.broadcast_to(inputs["x"], _bound(np.broadcast_shapes(inputs["x"].shape, target)))


def _size(constants: Constants, op: Op, inputs: Inputs) -> Array:
    return np.array(np.prod(_shape(constants, op, inputs)), np.int64)


def _range(constants: Constants, op: Op, inputs: Inputs) -> Array:
    start, limit, delta = (inputs[slot].reshape(()) for slot in ("start", "limit", "delta"))
    _bound((max(0, int(np.ceil((limit - start) / delta))),))
    return np.asarray(np.arange(start, limit, delta, inputs["start"].dtype))  # type: ignore[call-overload]


def _constant_of_shape(constants: Constants, op: Op, inputs: Inputs) -> Array:
    fill = to_array(op.attributes["value"]) if "value" in op.attributes else np.zeros(1, np.float32)
    return np.broadcast_to(fill.reshape(()), _bound(tuple(int(n) for n in inputs["shape"])))


def _reshape(constants: Constants, op: Op, inputs: Inputs) -> Array:
    x = inputs["x"]
    keep_zero = bool(op.attributes.get("allowzero", 0))
    shape = inputs["shape"].tolist() if "shape" in inputs else op.attributes["shape"]
    return x.reshape([x.shape[i] if n == 0 and not keep_zero else n for i, n in enumerate(shape)])


def _squeeze(constants: Constants, op: Op, inputs: Inputs) -> Array:
    axes = constants.attribute(op, "axes")
    return np.squeeze(inputs["x"], None if axes is None else tuple(axes))


def _concat(constants: Constants, op: Op, inputs: Inputs) -> Array:
    ordered = sorted(inputs.items(), key=lambda item: int(item[0].rpartition(".")[2]))
    return np.concatenate([array for _, array in ordered], axis=op.attributes["axis"])


def _elementwise(function: Callable[..., Any], *slots: str) -> Callable[..., Array]:
    def compute(constants: Constants, op: Op, inputs: Inputs) -> Array:
        with np.errstate(all="ignore"):
            result = np.asarray(function(*(inputs[slot] for slot in slots)))
        _bound(result.shape)
        # ATen mixes dtypes (integers times 0.5), and says what comes out
        made = constants.graph.output(op).dtype
        return result.astype(inputs[slots[0]].dtype if made is None else made)

    return compute


def _slice(constants: Constants, op: Op, inputs: Inputs) -> Array:
    """Python's slices are ONNX's, clamping and negative steps included."""
    stated = {name: constants.attribute(op, name) for name in ("starts", "ends", "axes", "steps")}
    count = len(stated["starts"])
    cuts = [slice(None)] * inputs["x"].ndim
    axes, steps = stated["axes"] or range(count), stated["steps"] or [1] * count
    for axis, *bounds in zip(axes, stated["starts"], stated["ends"], steps, strict=True):
        cuts[axis] = slice(*bounds)
    return inputs["x"][tuple(cuts)]


def _gather(constants: Constants, op: Op, inputs: Inputs) -> Array:
    return np.take(inputs["table"], inputs["indices"], axis=int(constants.attribute(op, "axis") or 0))


_COMPUTE: Mapping[str, Callable[[Constants, Op, Inputs], Array]] = {
    "constant_of_shape": _constant_of_shape,
    "shape": _shape,
    "size": _size,
    "range": _range,
    "identity": lambda constants, op, inputs: inputs["x"],
    "cast": lambda constants, op, inputs: inputs["x"].astype(op.attributes["to"]),
    "cast_like": _cast_like,
    "transpose": lambda constants, op, inputs: inputs["x"].transpose(op.attributes.get("perm")),
    "reshape": _reshape,
    "squeeze": _squeeze,
    "unsqueeze": lambda constants, op, inputs: np.expand_dims(
        inputs["x"], tuple(constants.attribute(op, "axes"))
    ),
    "expand": _expand,
    "concat": _concat,
    "slice": _slice,
    "embedding": _gather,
    "neg": _elementwise(np.negative, "x"),
    "sqrt": _elementwise(np.sqrt, "x"),
    "rsqrt": _elementwise(lambda x: 1 / np.sqrt(x), "x"),
    "reciprocal": _elementwise(np.reciprocal, "x"),
    "add": _elementwise(np.add, "a", "b"),
    "sub": _elementwise(np.subtract, "a", "b"),
    "mul": _elementwise(np.multiply, "a", "b"),
}

#: Kinds that make a constant of constants.
COMPUTABLE = frozenset(_COMPUTE)
