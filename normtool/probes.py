"""What an equation is tried on: the shapes of random inputs that bring out all an op does, and no larger.

Channels keep their number. Strides, dilations, paddings and every axis that neither the op nor the map looks
at are cut down: a Conv with a dilation of 36 would ask for megabytes, a concatenation of feature maps for
gigabytes. Only a reshape, whose meaning lies in the lengths themselves, is tried on those that the model
states.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from normtool.graph import ModelGraph, Shape, Tensor
from normtool.values import Value, to_array

if TYPE_CHECKING:
    from normtool.proof import Form
    from normtool.walk import Carry

Lengths = tuple[int, ...]


class UnknownRank(ValueError):
    """Nothing says how many axes a tensor has, so nothing can be tried on it."""


#: Length of an axis that nobody looks at.
_SMALL = 3

#: Kinds that are reshapes: the same numbers, row by row, in another shape.
_RESHAPES = frozenset(["reshape", "flatten", "squeeze", "unsqueeze"])


@dataclass(frozen=True, eq=False)
class Shapes:
    """The recorded shapes of tensors, and a number for each symbol in them."""

    recorded: Mapping[Tensor, Shape | None]
    ranks: Mapping[Tensor, int | None]
    symbols: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: ModelGraph, tensors: Iterable[Tensor]) -> "Shapes":
        known = list(tensors)
        return cls({t: t.shape for t in known}, {t: graph.rank(t) for t in known})

    def lengths(self, tensor: Tensor) -> list[int | None]:
        """One number per axis, None where nothing is said. Raises UnknownRank when not even the rank is
        known."""
        shape, rank = self.recorded.get(tensor), self.ranks.get(tensor)
        if shape is None and rank is None:
            raise UnknownRank(f"the rank of {tensor.name!r} is unknown")
        return [self._number(n) for n in shape] if shape is not None else [None] * (rank or 0)

    def _number(self, length: int | str | None) -> int | None:
        """`"196*s77"` is 196 times the number of s77; what is no product is a symbol as a whole."""
        if length is None or isinstance(length, int):
            return length
        parts = length.split("*")
        if not all(re.fullmatch(r"\w+", part) for part in parts):
            parts = [length]
        return math.prod(int(part) if part.isdecimal() else self.symbols.setdefault(part, 2) for part in parts)


@dataclass(frozen=True, eq=False)
class Settled:
    """Shapes by slot, and what the op has to be told so that it fits them."""

    shapes: Mapping[str, Lengths]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    #: operands that `attributes` stand for
    without: frozenset[str] = frozenset()

    def fitted(self, form: "Form") -> "Form":
        attributes = {**small_geometry(form.attributes), **self.attributes}
        constants = {slot: value for slot, value in form.constants.items() if slot not in self.without}
        data = {slot: tensor for slot, tensor in form.data.items() if slot not in self.without}
        kind = "reshape" if form.kind in _RESHAPES else form.kind
        return type(form)(kind, attributes, constants, data)  # replace() takes longer than all of this


def settle(
    form: "Form", outputs: Mapping[str, Tensor], carried: Mapping[Tensor, "Carry"], shapes: Shapes
) -> Settled:
    """Shapes for the data of one op. Raises ValueError, KeyError where too little is known."""
    return _SETTLE.get(form.kind, _small)(_Known(form, outputs, carried, shapes))


def as_stated(form: "Form", shapes: Shapes) -> Settled:
    """Every length and every attribute as the model has them; a batch of one where that is open."""
    stated = {
        slot: tuple((n if axis else 1) or _SMALL for axis, n in enumerate(shapes.lengths(tensor)))
        for slot, tensor in form.data.items()
    }
    return Settled(stated, dict(form.attributes))


def tap_shape(form: "Form") -> Lengths:
    """An input of a Conv, as its geometry stands, that every tap and two strides of the kernel see."""
    weight = form.constants["weight"].shape
    rank = len(weight) - 2
    dilations = form.attributes.get("dilations") or [1] * rank
    strides = form.attributes.get("strides") or [1] * rank
    size = [(k - 1) * d + 1 + s for k, d, s in zip(weight[2:], dilations, strides, strict=True)]
    return (1, weight[1] * int(form.attributes["group"]), *size)


def settle_region(form: "Form", graph: ModelGraph) -> Lengths:
    """An input for a weighted op as it stands."""
    if form.kind == "conv":
        return tap_shape(form)
    shapes = Shapes.of(graph, form.data.values())
    settled = settle(replace(form, attributes={**form.attributes}), {}, {}, shapes)
    return next(iter(settled.shapes.values()))


def small_geometry(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The same op with dilations, strides and padding cut down to what still tells positions apart."""
    limits = {"dilations": 2, "strides": 3}
    if "group" in attributes or "kernel_shape" in attributes:
        limits["pads"] = 1
    cut = {k: [min(n, limits[k]) for n in v] for k, v in attributes.items() if k in limits and v}
    stale = (
        {"output_padding": None, "output_shape": None}
        if "strides" in cut or "output_shape" in attributes
        else {}
    )
    return {**attributes, **cut, **stale}


@dataclass(frozen=True, eq=False)
class _Known:
    """What is known of one op."""

    form: "Form"
    outputs: Mapping[str, Tensor]
    carried: Mapping[Tensor, "Carry"]
    shapes: Shapes

    def attribute(self, name: str) -> Any:
        value = self.form.constants.get(name)
        return to_array(value).tolist() if value is not None else self.form.attributes.get(name)

    def shape_of(self, slot: str) -> Lengths:
        """Of a constant, or of a weight that is itself computed."""
        value: Value | None = self.form.constants.get(slot)
        if value is not None:
            return value.shape
        lengths = self.shapes.lengths(self.form.data[slot])
        if None in lengths:
            raise ValueError(f"the shape of its {slot} is unknown")
        return tuple(n for n in lengths if n is not None)

    def fixed(self, tensor: Tensor) -> dict[int, int]:
        """Axes whose length a map states."""
        carry = self.carried.get(tensor)
        if carry is None:
            return {}
        return {a: n for a, n in zip(carry.affine.axes, carry.affine.shape, strict=True) if n > 1}

    def with_weights(self, shapes: dict[str, Lengths]) -> Settled:
        """`shapes`, and the stated ones of weights that are computed (a DequantizeLinear makes them)."""
        others = {slot: self.shape_of(slot) for slot in self.form.data if slot not in shapes}
        return Settled({**others, **shapes})


# ---- weights decide -----------------------------------------------------------------------------


def _conv(known: _Known) -> Settled:
    """Just large enough to see every tap and two strides of a kernel."""
    weight, attributes = _batched_weight(known), small_geometry(known.form.attributes)
    rank = len(weight) - 2
    dilations = attributes.get("dilations") or [1] * rank
    strides = attributes.get("strides") or [1] * rank
    size = [(k - 1) * d + 1 + s for k, d, s in zip(weight[2:], dilations, strides, strict=True)]
    return known.with_weights({"x": (1, weight[1] * int(attributes["group"]), *size)})


def _conv_transpose(known: _Known) -> Settled:
    """Wide enough that the padding does not crop everything away."""
    weight, attributes = _batched_weight(known), small_geometry(known.form.attributes)
    rank = len(weight) - 2
    pads = attributes.get("pads") or [0] * 2 * rank
    size = [2 + pads[i] + pads[i + rank] for i in range(rank)]
    return known.with_weights({"x": (1, weight[0], *size)})


def _batched_weight(known: _Known) -> Lengths:
    """The shape of the weight of an op that is tried with a batch axis, and is to have one."""
    weight = known.shape_of("weight")
    if known.shapes.ranks.get(known.form.data["x"]) not in (None, len(weight)):
        raise ValueError("it runs without a batch axis")
    return weight


def _linear(known: _Known) -> Settled:
    k = known.shape_of("b")[1 if known.form.attributes["transB"] else 0]
    c = known.form.constants["c"].shape if "c" in known.form.constants else ()
    m = c[0] if len(c) == 2 and c[0] != 1 else _SMALL
    if known.form.attributes["transA"]:
        return known.with_weights({"a": (k, m)})
    rank = known.shapes.ranks.get(known.form.data["a"]) or 2
    return known.with_weights({"a": (*[2] * (rank - 2), m, k)})


def _matmul(known: _Known) -> Settled:
    """Constants keep their shape; the axes that two computed operands share agree."""
    if "a" in known.form.constants or "b" in known.form.constants:
        slot = "a" if "b" in known.form.constants else "b"
        weight = known.form.constants["b" if slot == "a" else "a"].shape
        rank = max(known.shapes.ranks.get(known.form.data[slot]) or 2, 2)
        batch = (2,) * (rank - len(weight)) + weight[:-2]
        if len(weight) < 2:
            return Settled({slot: (*batch, *weight)})
        return Settled({slot: (*batch, _SMALL, weight[-2]) if slot == "a" else (*batch, weight[-1], _SMALL)})
    a, b, y = known.form.data["a"], known.form.data["b"], known.outputs["y"]
    ranks = {t: len(known.shapes.lengths(t)) for t in (a, b, y)}
    m = _stated(known, (a, ranks[a] - 2), (y, ranks[y] - 2))
    k = _stated(known, (a, ranks[a] - 1), (b, ranks[b] - 2))
    n = _stated(known, (b, ranks[b] - 1), (y, ranks[y] - 1))
    ones = {t: [length == 1 for length in known.shapes.lengths(t)[:-2]] for t in (a, b)}
    return Settled(
        {
            "a": (*[1 if one else 2 for one in ones[a]], m, k),
            "b": (*[1 if one else 2 for one in ones[b]], k, n),
        }
    )


def _stated(known: _Known, *places: tuple[Tensor, int]) -> int:
    """The length that a map states at one of these axes, else a small one."""
    for tensor, axis in places:
        if axis in (fixed := known.fixed(tensor)):
            return fixed[axis]
    return _SMALL


def _attention(known: _Known) -> Settled:
    q, k, v = (known.shapes.lengths(known.form.data[slot]) for slot in "qkv")
    width = known.fixed(known.form.data["v"]).get(len(v) - 1) or v[-1] or _SMALL
    batch = [n or 2 for n in k[:-2]]
    keys = 4 if known.form.data["q"] is known.form.data["k"] else 5
    shapes = {
        "q": (*[n or 2 for n in q[:-2]], 4, q[-1] or _SMALL),
        "k": (*batch, keys, q[-1] or _SMALL),
        "v": (*batch, keys, width),
    }
    return Settled(shapes, without=frozenset(["mask"]))


def _batch_norm(known: _Known) -> Settled:
    channels, ranks = known.shape_of("mean")[0], known.shapes.ranks
    rank = ranks.get(known.form.data["x"]) or ranks.get(known.outputs["y"]) or 3
    return Settled({"x": (2, channels, *[_SMALL] * (rank - 2))})


def _norm_per_channel(known: _Known) -> Settled:
    """GroupNorm and InstanceNorm: all channels, which γ may state once for each group of them."""
    tensor, weight = known.form.data["x"], known.form.constants.get("weight")
    lengths = known.shapes.lengths(tensor)
    groups = int(known.form.attributes.get("num_groups") or 1)
    stated = {**known.fixed(known.outputs["y"]), **known.fixed(tensor)}.get(1) or lengths[1]
    channels = stated or (weight.shape[0] if weight is not None and groups == 1 else 2 * groups)
    return Settled({"x": (2, channels, *[_SMALL] * (len(lengths) - 2))})


def _embedding(known: _Known) -> Settled:
    if "table" in known.form.data:
        lengths, fixed = (
            known.shapes.lengths(known.form.data["table"]),
            dict(known.fixed(known.form.data["table"])),
        )
        table = tuple(fixed.get(a, _SMALL) for a in range(len(lengths)))
        indices = known.form.data.get("indices")
        own = {} if indices is None else {"indices": (_SMALL,) * len(known.shapes.lengths(indices))}
        if indices is None:  # stored ones may point anywhere
            axis = int(known.form.attributes.get("axis", 0)) % len(lengths)
            table = tuple((n or _SMALL) if a == axis else table[a] for a, n in enumerate(lengths))
        return Settled({"table": table, **own})
    return known.with_weights({"indices": (_SMALL,) * len(known.shapes.lengths(known.form.data["indices"]))})


def _picked(known: _Known) -> Settled:
    """Everything that is picked from has three entries; indices of a small shape point at the first two."""
    shapes: dict[str, Lengths] = {}
    if "x" in known.form.data:
        tensor = known.form.data["x"]
        lengths, fixed = known.shapes.lengths(tensor), dict(known.fixed(tensor))
        shapes = {"x": tuple(fixed.get(a, _SMALL) for a in range(len(lengths)))}
    for slot, each in known.form.data.items():
        if slot.startswith("indices"):
            own = known.shapes.lengths(each)
            last = own[-1:] if known.form.kind == "gather_nd" else [2]
            shapes[slot] = (*[2] * (len(own) - 1), *(n or 2 for n in last))
    if shapes.keys() == {"x"}:  # stored indices may point anywhere
        shapes["x"] = tuple(fixed.get(a) or n or _SMALL for a, n in enumerate(lengths))
    return Settled(shapes)


def _tiled(known: _Known) -> Settled:
    tensor = known.form.data["x"]
    rank, fixed = len(known.shapes.lengths(tensor)), dict(known.fixed(tensor))
    out = known.outputs["y"]
    fixed |= {a - len(known.attribute("repeats")) + rank: n for a, n in known.fixed(out).items()}
    return Settled({"x": tuple(fixed.get(axis, _SMALL) for axis in range(rank))})


# ---- small lengths ------------------------------------------------------------------------------


def _small(known: _Known) -> Settled:
    """Elementwise: operands agree axis by axis, counted from the last; a 1 is spread as it is in the model."""
    ranks = {slot: len(known.shapes.lengths(tensor)) for slot, tensor in known.form.data.items()}
    rank = max([*ranks.values(), *(len(value.shape) for value in known.form.constants.values())])
    common = [_SMALL] * rank
    tensors = {**{t: ranks[slot] for slot, t in known.form.data.items()}, **_ranked(known)}
    for tensor, own in tensors.items():
        for axis, length in known.fixed(tensor).items():
            common[axis - own] = length
    for value in known.form.constants.values():
        for axis, length in enumerate(value.shape, -len(value.shape)):
            common[axis] = length if length != 1 else common[axis]
    shapes = {}
    for slot, tensor in known.form.data.items():
        own_lengths, fixed = known.shapes.lengths(tensor), known.fixed(tensor)
        shapes[slot] = tuple(
            1 if length == 1 and axis not in fixed else common[axis - ranks[slot]]
            for axis, length in enumerate(own_lengths)
        )
    return Settled(shapes)


def _ranked(known: _Known) -> dict[Tensor, int]:
    """Outputs that carry a map, with their ranks."""
    return {
        tensor: len(known.shapes.lengths(tensor))
        for tensor in known.outputs.values()
        if tensor in known.carried
    }


def _joined(known: _Known) -> Settled:
    """Concat: the axes of every map agree over the parts and with the whole."""
    first = next(iter(known.form.data.values()))
    axis = int(known.attribute("axis")) % len(known.shapes.lengths(first))
    stated: dict[int, int] = {}
    for tensor in (*known.form.data.values(), *known.outputs.values()):
        stated |= {a: n for a, n in known.fixed(tensor).items() if a != axis}
    for value in known.form.constants.values():
        stated |= {a: n for a, n in enumerate(value.shape) if a != axis}
    shapes = {}
    for slot, tensor in known.form.data.items():
        lengths, fixed = known.shapes.lengths(tensor), known.fixed(tensor)
        shapes[slot] = tuple(
            (fixed.get(a) or length or _SMALL) if a == axis else stated.get(a, _SMALL)
            for a, length in enumerate(lengths)
        )
    return Settled(shapes)


def _split(known: _Known) -> Settled:
    tensor = known.form.data["x"]
    lengths = known.shapes.lengths(tensor)
    axis = int(known.attribute("axis") or 0) % len(lengths)
    fixed = known.fixed(tensor)
    for part in known.outputs.values():
        fixed = {**{a: n for a, n in known.fixed(part).items() if a != axis}, **fixed}
    parts = [known.shapes.lengths(part)[axis] for part in known.outputs.values()]
    if None in parts:
        raise ValueError("the lengths of the parts are unknown")
    shape = [fixed.get(a, _SMALL) for a in range(len(lengths))]
    shape[axis] = sum(n for n in parts if n is not None)
    return Settled({"x": tuple(shape)}, {"split": parts, "num_outputs": None}, frozenset(["split"]))


def _cut(known: _Known) -> Settled:
    """Slice and select: what is cut keeps its length. Of a constant, computed positions are the first two."""
    if "x" in known.form.constants:
        bounds = {"starts": [0], "ends": [2], "steps": [1]} if known.form.kind == "slice" else {"index": 0}
        computed = {name: value for name, value in bounds.items() if name in known.form.data}
        return Settled({}, computed, frozenset(computed))
    tensor = known.form.data["x"]
    lengths = known.shapes.lengths(tensor)
    stated = known.attribute("axes" if known.form.kind == "slice" else "axis")
    listed = list(range(len(known.attribute("starts")))) if stated is None else np.atleast_1d(stated).tolist()
    axes = {int(axis) % len(lengths) for axis in listed}
    fixed = dict(known.fixed(tensor))
    for part in known.outputs.values():
        lost = [a for a in range(len(lengths)) if known.form.kind != "select" or a not in axes]
        fixed |= {lost[a]: n for a, n in known.fixed(part).items() if lost[a] not in axes}
    shape = [(n or _SMALL) if a in axes else fixed.get(a, _SMALL) for a, n in enumerate(lengths)]
    return Settled({"x": tuple(shape)})


def _transposed(known: _Known) -> Settled:
    tensor = known.form.data["x"]
    rank = len(known.shapes.lengths(tensor))
    order = known.attribute("perm") or list(range(rank))[::-1]
    fixed = dict(known.fixed(tensor))
    fixed |= {order[a]: n for a, n in known.fixed(known.outputs["y"]).items()}
    # distinct lengths, so that no two axes can be taken for each other
    return Settled({"x": tuple(fixed.get(axis, 2 + axis) for axis in range(rank))})


def _window(known: _Known) -> Settled:
    """Pooling: two strides of the kernel."""
    tensor, attributes = known.form.data["x"], small_geometry(known.form.attributes)
    rank = len(known.shapes.lengths(tensor))
    kernel = attributes.get("kernel_shape") or attributes.get("output_size") or [_SMALL] * (rank - 2)
    dilations = attributes.get("dilations") or [1] * (rank - 2)
    size = [(k - 1) * d + 4 for k, d in zip(kernel, dilations, strict=True)]
    fixed = {**known.fixed(known.outputs["y"]), **known.fixed(tensor)}
    return Settled({"x": (2, fixed.get(1, _SMALL), *size)})


def _mean(known: _Known) -> Settled:
    tensor = known.form.data["x"]
    rank = len(known.shapes.lengths(tensor))
    fixed = dict(known.fixed(tensor))
    return Settled({"x": tuple(fixed.get(axis, 2 + axis) for axis in range(rank))})


def _padded(known: _Known) -> Settled:
    tensor = known.form.data["x"]
    rank = len(known.shapes.lengths(tensor))
    pads = [abs(int(n)) for n in known.attribute("pads") or [0] * 2 * rank]
    axes = [int(a) % rank for a in known.attribute("axes") or range(rank)]
    room = {a: 2 + max(pads[i], pads[i + len(axes)]) for i, a in enumerate(axes)}
    fixed = {**room, **known.fixed(known.outputs["y"]), **known.fixed(tensor)}
    return Settled({"x": tuple(fixed.get(axis, _SMALL) for axis in range(rank))})


def _resized(known: _Known) -> Settled:
    """Five rows become seven where the model states sizes, or computes them; scales are taken as they are."""
    tensor = known.form.data["x"]
    rank = len(known.shapes.lengths(tensor))
    fixed = {**known.fixed(known.outputs["y"]), **known.fixed(tensor)}
    shape = (2, fixed.get(1, _SMALL), *[5, 4, 3][: rank - 2])
    if known.attribute("sizes") or {"sizes", "scales"} & set(known.form.data):
        sizes = [*shape[:2], *[7, 6, 5][: rank - 2]]
        return Settled({"x": shape}, {"sizes": sizes, "axes": None}, frozenset(["sizes", "scales", "roi"]))
    return Settled({"x": shape})


def _expanded(known: _Known) -> Settled:
    target = [n or 2 for n in known.shapes.lengths(known.outputs["y"])]
    if "x" in known.form.constants:
        return Settled({}, {"shape": target}, frozenset(["shape"]))
    lengths = [n or 2 for n in known.shapes.lengths(known.form.data["x"])]
    others = frozenset((*known.form.data, *known.form.constants)) - {"x"}
    return Settled({"x": tuple(lengths)}, {"shape": target}, others)


# ---- lengths as they are --------------------------------------------------------------------------


def _reshaped(known: _Known) -> Settled:
    """The stated shapes, with a number for every symbol; one unknown length follows from all the others."""
    stored = "x" in known.form.constants
    source = (
        list(known.shape_of("x")) if stored else [n or 2 for n in known.shapes.lengths(known.form.data["x"])]
    )
    target = known.shapes.lengths(known.outputs["y"])
    open_axes = [axis for axis, n in enumerate(target) if n is None]
    count = math.prod(source)
    if len(open_axes) == 1:
        target[open_axes[0]] = count // max(1, math.prod(n for n in target if n is not None))
    whole = [n for n in target if n is not None]
    if len(whole) < len(target) or math.prod(whole) != count:
        raise ValueError(f"{source} cannot be seen as {target}")
    others = frozenset((*known.form.data, *known.form.constants)) - {"x"}
    return Settled({} if stored else {"x": tuple(source)}, {"shape": whole, "allowzero": 1}, others)


_SETTLE: Mapping[str, Callable[[_Known], Settled]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "linear": _linear,
    "matmul": _matmul,
    "attention": _attention,
    "batch_norm": _batch_norm,
    "group_norm": _norm_per_channel,
    "instance_norm": _norm_per_channel,
    "embedding": _embedding,
    "gather_nd": _picked,
    "index": _picked,
    "tile": _tiled,
    "concat": _joined,
    "split": _split,
    "slice": _cut,
    "select": _cut,
    "transpose": _transposed,
    "average_pool": _window,
    "max_pool": _window,
    "global_average_pool": _window,
    "adaptive_average_pool": _window,
    "reduce_mean": _mean,
    "pad": _padded,
    "resize": _resized,
    "expand": _expanded,
    **dict.fromkeys(_RESHAPES, _reshaped),
}
