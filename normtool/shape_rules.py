"""The shape each operator puts out, from the shapes of what it reads.

A rule raises `NotKnown` where too little is known for even the rank, and whatever Python raises where the
operands do not fit: such a model does not run, and its shape stays unknown.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any, Protocol

from normtool.elements import Element
from normtool.graph import Op, Tensor
from normtool.lengths import (
    Length,
    Lengths,
    Product,
    broadcast_shapes,
    computed,
    is_unnamed,
    over,
    plus,
    product,
    times,
    unnamed,
)
from normtool.ops import MICROSOFT, ROWS, UNKNOWN
from normtool.values import Array

#: Slices that reach "to the end" are written with an end beyond any axis.
_BEYOND = (1 << 31) - 1


class NotKnown(Exception):
    """Too little is known for even the rank."""


class State(Protocol):
    """What is known so far."""

    def shape(self, tensor: Tensor) -> Lengths | None: ...

    def elements(self, tensor: Tensor) -> Array | None:
        """What a small integer tensor holds (None among the elements where that is unknown)."""


@dataclass(frozen=True, eq=False)
class Site:
    """One op with its operands."""

    op: Op
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    state: State

    def shape(self, slot: str) -> Lengths:
        shape = self.state.shape(self.inputs[slot]) if slot in self.inputs else None
        if shape is None:
            raise NotKnown(f"the shape of {slot!r}")
        return shape

    def listed(self, stem: str, among: Iterable[str] | None = None) -> list[str]:
        """The slots `inputs.0`, `inputs.1`, … in order."""
        found = [slot for slot in (self.inputs if among is None else among) if slot.startswith(stem)]
        return sorted(found, key=lambda slot: (len(slot), slot))

    def attribute(self, name: str, default: Any = None) -> Any:
        """Raises NotKnown where the caller of a function states it."""
        if name in self.op.attributes:
            value = self.op.attributes[name]
            if value is None:
                raise NotKnown(f"the attribute {name!r}")
            return value
        row = ROWS.get(self.op.kind)
        return default if row is None else row.defaults.get(name, default)

    def array(self, slot: str) -> Array:
        """The elements of a small tensor, None for those that are unknown."""
        array = self.state.elements(self.inputs[slot])
        if array is None:
            raise NotKnown(f"what {slot!r} holds")
        return array

    def elements(self, slot: str) -> list[Element]:
        return list(self.array(slot).reshape(-1))

    def stated(self, name: str, slot: str | None = None) -> list[Element] | None:
        """An operand or the attribute of that name; None where there is neither."""
        if (slot or name) in self.inputs:
            return self.elements(slot or name)
        value = self.attribute(name)
        return value if value is None or isinstance(value, list) else [value]

    def integers(self, name: str, slot: str | None = None) -> list[int] | None:
        """`stated`, where every element is a number."""
        elements = self.stated(name, slot)
        if elements is None:
            return None
        numbers = [each for each in elements if isinstance(each, int)]
        if len(numbers) < len(elements):
            raise NotKnown(f"what {name!r} holds")
        return numbers


Rule = Callable[[Site], Lengths | Mapping[str, Lengths]]


def name_of(op: Op) -> str:
    """The kind, or how an operator without a row of its own is spelled."""
    if op.kind != UNKNOWN:
        return op.kind
    return f"{op.domain}.{op.spelling}" if op.domain else op.spelling


def _any(rank: int) -> Lengths:
    return tuple(unnamed() for _ in range(rank))


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise IndexError(f"axis {axis} of {rank}")
    return axis % rank


def _quotient(a: Length, b: Length) -> Length:
    quotient = over(a, b)
    return computed("quotient", a, b) if quotient is None else quotient


def _sum(a: Length, b: Length) -> Length:
    total = plus(a, b)
    return computed("sum", frozenset([a, b])) if total is None else total


# ---- the same shape ---------------------------------------------------------------------------


def _same(site: Site) -> Lengths:
    return site.shape("x")


def _same_first(site: Site) -> Lengths:
    return site.shape("in.0")


def _same_and(*outputs: str) -> Rule:
    return lambda site: dict.fromkeys(("y", *outputs), site.shape("x"))


def _broadcast(site: Site) -> Lengths:
    return broadcast_shapes(site.shape(slot) for slot in site.inputs)


# ---- products ---------------------------------------------------------------------------------


def _matmul(site: Site) -> Lengths:
    return _product(site.shape("a"), site.shape("b"))


def _product(a: Lengths, b: Lengths) -> Lengths:
    if not a or not b:
        raise ValueError("a scalar in a matrix product")
    rows = a[-2:-1] if len(a) > 1 else ()
    columns = b[-1:] if len(b) > 1 else ()
    return (*broadcast_shapes([a[:-2], b[:-2]]), *rows, *columns)


def _fused_matmul(site: Site) -> Lengths:
    if site.attribute("transBatchA", 0) or site.attribute("transBatchB", 0):
        raise NotKnown("transposed batches")
    a, b = site.shape("in.0"), site.shape("in.1")
    a = (*a[:-2], a[-1], a[-2]) if site.attribute("transA", 0) else a
    return _product(a, (*b[:-2], b[-1], b[-2]) if site.attribute("transB", 0) else b)


def _quantized_matmul(site: Site) -> Lengths:
    if site.op.spelling == "MatMulNBits":
        return (*site.shape("a")[:-1], int(site.attribute("N")))
    return _matmul(site)


def _linear(site: Site) -> Lengths:
    return tuple(_gemm_axis(site, slot, flag, axis) for slot, flag, axis in _GEMM)


#: Of both operands of a Gemm: its slot, what transposes it, and the axis that is not summed over.
_GEMM = (("a", "transA", 0), ("b", "transB", 1))


def _gemm_axis(site: Site, slot: str, flag: str, axis: int) -> Length:
    """Gemm has two axes, whatever is known of its operands."""
    if site.state.shape(site.inputs[slot]) is None:
        return unnamed()
    rows, columns = site.shape(slot)
    return (rows, columns)[axis ^ bool(site.attribute(flag))]


# ---- windows ----------------------------------------------------------------------------------


def _conv(site: Site) -> Lengths:
    x, weight = site.shape("x"), site.shape("weight")
    return (x[0], weight[0], *_windows(site, x[2:], weight[2:]))


def _conv_transpose(site: Site) -> Lengths:
    x, weight = site.shape("x"), site.shape("weight")
    return (x[0], times(weight[1], int(site.attribute("group"))), *_any(len(x) - 2))


def _pool(site: Site) -> dict[str, Lengths]:
    x = site.shape("x")
    shape = (*x[:2], *_windows(site, x[2:], tuple(site.attribute("kernel_shape"))))
    return {"y": shape, "indices": shape}


def _global_pool(site: Site) -> Lengths:
    x = site.shape("x" if "x" in site.inputs else "in.0")
    return (*x[:2], *[1] * (len(x) - 2))


def _windows(site: Site, x: Lengths, kernel: Lengths) -> Lengths:
    ones = [1] * len(x)
    strides, dilations = site.attribute("strides", ones), site.attribute("dilations", ones)
    mode = site.attribute("auto_pad", "NOTSET")
    if site.attribute("ceil_mode", 0):
        return _any(len(x))
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        return tuple(_strided(n, stride) for n, stride in zip(x, strides, strict=True))
    pads = site.attribute("pads", [0] * 2 * len(x)) if mode == "NOTSET" else [0] * 2 * len(x)
    lost = [
        None if not isinstance(k, int) else (k - 1) * dilation - begin - end
        for k, dilation, begin, end in zip(kernel, dilations, pads[: len(x)], pads[len(x) :], strict=True)
    ]
    return tuple(_window(*each) for each in zip(x, lost, strides, strict=True))


def _strided(n: Length, stride: int) -> Length:
    if isinstance(n, int):
        return -(-n // stride)
    return n if stride == 1 else computed("strided", n, stride)


def _window(n: Length, lost: int | None, stride: int) -> Length:
    """`lost`: how much shorter the axis becomes by the kernel's reach, what is padded taken off."""
    if isinstance(n, int) and lost is not None:
        return max(0, (n - lost - 1) // stride + 1)
    if lost is None:
        return unnamed()
    return n if lost == 0 and stride == 1 else computed("window", n, lost, stride)


def _resize(site: Site) -> Lengths:
    x = site.shape("x")
    axes = site.attribute("axes", list(range(len(x))))
    by_ratio = site.attribute("keep_aspect_ratio_policy", "stretch") != "stretch"
    cropped = site.attribute("coordinate_transformation_mode", "") == "tf_crop_and_resize"
    shape = list(x)
    for axis in axes:
        shape[axis] = unnamed()
    try:
        sizes = site.stated("sizes")
        scales = None if sizes else site.stated("scales")
    except NotKnown:
        return tuple(shape)
    if sizes and not by_ratio:
        for axis, size in zip(axes, sizes, strict=True):
            shape[axis] = _as_length(size)
    for axis, scale in zip(axes, scales or [], strict=False):
        shape[axis] = times(x[axis], scale) if isinstance(scale, int) and not cropped else unnamed()
    return tuple(shape)


def _as_length(element: Element) -> Length:
    is_length = isinstance(element, Product) or (isinstance(element, int) and element >= 0)
    return element if is_length else unnamed()  # type: ignore[return-value]


# ---- another shape ----------------------------------------------------------------------------


def _transpose(site: Site) -> Lengths:
    x = site.shape("x")
    order = site.attribute("perm", list(range(len(x)))[::-1])
    if sorted(order) != list(range(len(x))):
        raise ValueError(f"{order} is no order of {len(x)} axes")
    return tuple(x[axis] for axis in order)


def _reshape(site: Site) -> Lengths:
    """A 0 keeps a length, one -1 is what remains. So is one length of which nothing is known."""
    x = site.state.shape(site.inputs["x"])
    target = site.stated("shape") or []
    keep = not site.attribute("allowzero")
    shape = [_reshaped_axis(element, i, x, keep) for i, element in enumerate(target)]
    open_axes = [i for i, length in enumerate(shape) if length is None]
    rest = product(length for length in shape if length is not None)
    if x is not None:
        total = product(x)
        if not open_axes and isinstance(total, int) and isinstance(rest, int) and total != rest:
            raise ValueError(f"{total} numbers do not fill {rest}")
        if len(open_axes) == 1:
            shape[open_axes[0]] = _quotient(total, rest)
    return tuple(unnamed() if length is None else length for length in shape)


def _reshaped_axis(element: Element, axis: int, x: Lengths | None, keep: bool) -> Length | None:
    if element == 0 and keep:
        return x[axis] if x is not None else None
    if isinstance(element, int) and element < -1:
        raise ValueError(f"a length of {element}")
    return element if isinstance(element, int | Product) and element != -1 else None


def _flatten(site: Site) -> Lengths:
    x = site.shape("x")
    axis = int(site.attribute("axis"))
    cut = axis + len(x) if axis < 0 else axis
    return product(x[:cut]), product(x[cut:])


def _squeeze(site: Site) -> Lengths:
    x = site.shape("x")
    axes = site.integers("axes")
    if axes is None:
        if not all(isinstance(n, int) for n in x):
            raise NotKnown("which lengths are 1")
        return tuple(n for n in x if n != 1)
    gone = {_axis(axis, len(x)) for axis in axes}
    return tuple(n for axis, n in enumerate(x) if axis not in gone)


def _unsqueeze(site: Site) -> Lengths:
    x, axes = site.shape("x"), site.integers("axes") or []
    rank = len(x) + len(axes)
    new, rest = {_axis(axis, rank) for axis in axes}, iter(x)
    return tuple(1 if axis in new else next(rest) for axis in range(rank))


def _expand(site: Site) -> Lengths:
    target = tuple(_as_length(element) for element in site.elements("shape"))
    return broadcast_shapes([site.shape("x"), target])


def _constant_of_shape(site: Site) -> Lengths:
    return tuple(_as_length(element) for element in site.elements("shape"))


def _concat(site: Site) -> Lengths:
    """One operand says how many axes there are, and what the others are as long as."""
    shapes = [site.state.shape(site.inputs[slot]) for slot in site.listed("inputs")]
    known = [shape for shape in shapes if shape is not None]
    if not known:
        raise NotKnown("every operand")
    at = _axis(int(site.attribute("axis", 1)), len(known[0]))
    joined: Length = 0 if len(known) == len(shapes) else unnamed()
    for shape in known:
        joined = _sum(joined, shape[at])
    equal = [min(lengths, key=_how_open) for lengths in zip(*known, strict=True)]
    return (*equal[:at], joined, *equal[at + 1 :])


def _how_open(length: Length) -> int:
    """Of axes that have to be equal, the one best known is the smallest."""
    return 0 if isinstance(length, int) else 1 + is_unnamed(length)


def _split(site: Site) -> dict[str, Lengths]:
    x = site.shape("x")
    at = _axis(int(site.attribute("axis")), len(x))
    numbers = {slot: int(slot.rpartition(".")[2]) for slot in site.outputs}
    try:
        parts = site.stated("split")
    except NotKnown:
        parts = [None] * (max(numbers.values()) + 1)
    if parts is None:
        parts = _equal_parts(x[at], int(site.attribute("num_outputs", max(numbers.values()) + 1)))
    return {slot: (*x[:at], _as_length(parts[i]), *x[at + 1 :]) for slot, i in numbers.items()}


def _equal_parts(length: Length, count: int) -> list[Element]:
    """All the same, but for a shorter last one."""
    if isinstance(length, int):
        part = -(-length // count)
        return [*[part] * (count - 1), length - part * (count - 1)]
    return [_quotient(length, count)] * count


def _slice(site: Site) -> Lengths:
    x = site.shape("x")
    shape = list(x)
    try:
        axes = site.integers("axes")
        starts, ends = site.stated("starts") or [], site.stated("ends") or []
        steps = site.stated("steps") or [1] * len(starts)
    except NotKnown:
        return _any(len(x))
    for axis, *bounds in zip(axes or range(len(starts)), starts, ends, steps, strict=True):
        shape[axis] = _cut(x[axis], *bounds)
    return tuple(shape)


def _cut(length: Length, start: Element, end: Element, step: Element) -> Length:
    """Python's slices are ONNX's, clamping and negative steps included."""
    bounds = [each for each in (start, end, step) if isinstance(each, int)]
    if isinstance(length, int) and len(bounds) == 3:
        return len(range(length)[slice(*bounds)])
    forward = start == 0 and step == 1 and (end == length or (isinstance(end, int) and end >= _BEYOND))
    backward = start in (-1, _BEYOND) and step == -1 and isinstance(end, int) and end <= -_BEYOND
    if forward or backward:
        return length
    return unnamed() if None in (start, end, step) else computed("cut", length, start, end, step)


def _gather(site: Site) -> Lengths:
    table, indices = site.shape("table"), site.shape("indices")
    axis = _axis(int(site.attribute("axis")), len(table))
    return (*table[:axis], *indices, *table[axis + 1 :])


def _gather_nd(site: Site) -> Lengths:
    x, indices = site.shape("x"), site.shape("indices")
    if not isinstance(indices[-1], int):
        raise NotKnown("how many axes are looked up")
    return (*indices[:-1], *x[int(site.attribute("batch_dims", 0)) + indices[-1] :])


def _reduced(site: Site) -> Lengths:
    spelled = site.op.kind == UNKNOWN
    x = site.shape("in.0" if spelled else "x")
    keep = site.attribute("keepdims", 1)
    try:
        axes = site.integers("axes", "in.1" if spelled else None)
    except NotKnown:
        if not keep:
            raise
        return _any(len(x))
    if not axes and site.attribute("noop_with_empty_axes", 0):
        return x
    gone = {_axis(axis, len(x)) for axis in axes or range(len(x))}
    return tuple(1 if axis in gone else n for axis, n in enumerate(x) if keep or axis not in gone)


def _arg_reduced(site: Site) -> Lengths:
    x = site.shape("in.0")
    at = _axis(int(site.attribute("axis", 0)), len(x))
    return (*x[:at], *([1] if site.attribute("keepdims", 1) else []), *x[at + 1 :])


def _tile(site: Site) -> Lengths:
    x, repeats = site.shape("x"), [_as_length(each) for each in site.elements("repeats")]
    return tuple(times(n, count) for n, count in zip(x, repeats, strict=True))


def _pad(site: Site) -> Lengths:
    x = site.shape("x")
    try:
        pads, axes = site.integers("pads") or [], site.integers("axes") or range(len(x))
    except NotKnown:
        return _any(len(x))
    shape = list(x)
    for axis, begin, end in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        length = shape[axis]
        if begin or end:
            padded = computed("padded", length, begin + end)
            shape[axis] = max(0, length + begin + end) if isinstance(length, int) else padded
    return tuple(shape)


# ---- shapes as numbers ------------------------------------------------------------------------


def _shape(site: Site) -> Lengths:
    start, end = site.attribute("start"), site.attribute("end")
    return (len(site.shape("x")[start:end]),)


def _scalar(site: Site) -> Lengths:
    return ()


def _range(site: Site) -> Lengths:
    try:
        start, limit, delta = (site.elements(slot)[0] for slot in ("start", "limit", "delta"))
    except NotKnown:
        return _any(1)
    if isinstance(start, int) and isinstance(limit, int) and isinstance(delta, int):
        return (max(0, ceil(Fraction(limit - start, delta))),)
    return (limit,) if start == 0 and delta == 1 and isinstance(limit, Product) else _any(1)


def _one_hot(site: Site) -> Lengths:
    indices = site.shape("indices")
    at = _axis(int(site.attribute("axis")), len(indices) + 1)
    try:
        depth = _as_length(site.elements("depth")[0])
    except NotKnown:
        depth = unnamed()
    return (*indices[:at], depth, *indices[at:])


def _non_zero(site: Site) -> Lengths:
    return (len(site.shape("in.0")), unnamed())


def _top_k(site: Site) -> dict[str, Lengths]:
    x = list(site.shape("in.0"))
    try:
        (count,) = site.stated("k", "in.1") or [None]
    except NotKnown:
        count = None
    x[int(site.attribute("axis", -1))] = _as_length(count)
    return {"y": tuple(x), "extra.0": tuple(x)}


def _second(site: Site) -> Lengths:
    return site.shape("in.1")


def _einsum(site: Site) -> Lengths:
    terms, arrow, result = str(site.attribute("equation")).replace(" ", "").partition("->")
    if not arrow or not terms.replace(",", "").isalpha() or not result.isalpha():
        raise NotKnown("which axes there are")
    lengths: dict[str, list[Length]] = {}
    for term, slot in zip(terms.split(","), site.listed("in."), strict=True):
        for letter, length in zip(term, site.shape(slot), strict=True):
            lengths.setdefault(letter, []).append(length)
    return tuple(broadcast_shapes([(n,) for n in lengths[letter]])[0] for letter in result)


def _depth_to_space(site: Site) -> Lengths:
    n, channels, *sizes = site.shape("in.0")
    block = int(site.attribute("blocksize"))
    return (n, _quotient(channels, block * block), *[times(size, block) for size in sizes])


def _space_to_depth(site: Site) -> Lengths:
    n, channels, *sizes = site.shape("in.0")
    block = int(site.attribute("blocksize"))
    return (n, times(channels, block * block), *[_quotient(size, block) for size in sizes])


# ---- larger operators -------------------------------------------------------------------------


def _recurrent(site: Site) -> dict[str, Lengths]:
    """LSTM, GRU, RNN. With layout 1 the batch comes first."""
    x, recurrence = site.shape("in.0"), site.shape("in.2")
    directions, hidden = recurrence[0], recurrence[2]
    if site.attribute("layout", 0):
        batch, steps = x[0], x[1]
        states = (batch, directions, hidden)
        return {"y": (batch, steps, directions, hidden), "extra.0": states, "extra.1": states}
    steps, batch = x[0], x[1]
    states = (directions, batch, hidden)
    return {"y": (steps, directions, batch, hidden), "extra.0": states, "extra.1": states}


def _embed_layer_norm(site: Site) -> dict[str, Lengths]:
    shape = (*site.shape("input_ids"), site.shape("word_embedding")[1])
    return {"y": shape, "embedding_sum": shape}


def _packed_attention(site: Site) -> Lengths:
    """Attention of com.microsoft: the weights of q, k and v lie side by side."""
    sizes = site.attribute("qkv_hidden_sizes", [])
    wide = sizes[2] if sizes else over(site.shape("in.1")[1], 3)
    return (*site.shape("in.0")[:-1], unnamed() if wide is None else wide)


def _multi_head_attention(site: Site) -> Lengths:
    """Of com.microsoft. The values may come with the heads apart."""
    query, value = site.shape("in.0"), site.shape("in.2")
    if len(query) != 3 or len(value) not in (3, 4):
        raise NotKnown("how the heads are packed")
    return (*query[:2], value[2] if len(value) == 3 else times(value[1], value[3]))


def _grouped_attention(site: Site) -> Lengths:
    if "in.1" not in site.inputs:
        raise NotKnown("how the heads are packed")
    return site.shape("in.0")


def _onnx_attention(site: Site) -> Lengths:
    """Attention of ONNX, with the heads apart (4 axes) or side by side (3)."""
    query, value = site.shape("in.0"), site.shape("in.2")
    if len(query) == 4:
        return (*query[:3], value[3])
    head = over(value[2], int(site.attribute("kv_num_heads")))
    return (*query[:2], times(unnamed() if head is None else head, int(site.attribute("q_num_heads"))))


_SAME = (
    "neg sqrt rsqrt reciprocal abs relu leaky_relu prelu clip sigmoid tanh gelu silu mish elu softplus "
    "hard_sigmoid hard_swish erf softmax identity cast cast_like quantize_linear dequantize_linear batch_norm "
    "instance_norm layer_norm rms_norm group_norm contrib_group_norm mean_variance_norm lp_norm "
    "local_response_norm"
)

#: Operators without a row of their own.
_SAME_FIRST = (
    "Floor Ceil Round Sign Not Exp Log Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh Selu Celu "
    "ThresholdedRelu Softsign Shrink LogSoftmax Hardmax IsNaN IsInf CumSum Trilu BitwiseNot Bernoulli "
    "RandomNormalLike RandomUniformLike EyeLike ReverseSequence Scatter ScatterND ScatterElements "
    f"{MICROSOFT}.FastGelu {MICROSOFT}.BiasGelu {MICROSOFT}.QuickGelu {MICROSOFT}.RotaryEmbedding"
)

_BROADCAST = "add sub mul div sum max maximum where pow"

_BROADCAST_SPELLED = (
    "Equal Less Greater LessOrEqual GreaterOrEqual And Or Xor Mod Min Mean BitShift BitwiseAnd BitwiseOr "
    "BitwiseXor"
)

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_SAME.split(), _same),
    **dict.fromkeys(_SAME_FIRST.split(), _same_first),
    **dict.fromkeys((*_BROADCAST.split(), *_BROADCAST_SPELLED.split()), _broadcast),
    "dropout": _same_and("mask"),
    "skip_layer_norm": _same_and("sum"),
    "skip_rms_norm": _same_and("sum"),
    "skip_group_norm": _same_and("sum"),
    "embed_layer_norm": _embed_layer_norm,
    "matmul": _matmul,
    "quantized_matmul": _quantized_matmul,
    f"{MICROSOFT}.FusedMatMul": _fused_matmul,
    f"{MICROSOFT}.TransposeMatMul": _fused_matmul,
    "linear": _linear,
    "conv": _conv,
    "quantized_conv": _conv,
    "conv_transpose": _conv_transpose,
    "average_pool": _pool,
    "max_pool": _pool,
    "global_average_pool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "resize": _resize,
    "transpose": _transpose,
    "reshape": _reshape,
    "flatten": _flatten,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "expand": _expand,
    "constant_of_shape": _constant_of_shape,
    "concat": _concat,
    "split": _split,
    "slice": _slice,
    "embedding": _gather,
    "gather_nd": _gather_nd,
    "GatherElements": _second,
    **dict.fromkeys(
        "reduce_mean reduce_sum reduce_sum_square reduce_l1 reduce_l2 reduce_prod ReduceMax ReduceMin "
        "ReduceLogSum ReduceLogSumExp".split(),
        _reduced,
    ),
    "ArgMax": _arg_reduced,
    "ArgMin": _arg_reduced,
    "TopK": _top_k,
    "tile": _tile,
    "pad": _pad,
    "shape": _shape,
    "size": _scalar,
    "range": _range,
    "one_hot": _one_hot,
    "NonZero": _non_zero,
    "Einsum": _einsum,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    **dict.fromkeys("LSTM GRU RNN".split(), _recurrent),
    f"{MICROSOFT}.Attention": _packed_attention,
    f"{MICROSOFT}.MultiHeadAttention": _multi_head_attention,
    f"{MICROSOFT}.GroupQueryAttention": _grouped_attention,
    "Attention": _onnx_attention,
}
