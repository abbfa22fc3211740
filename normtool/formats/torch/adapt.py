"""ATen's ways of saying what ONNX says otherwise.

`ops.TABLE` names the arguments of a call; `adapt` then states what ONNX's operator of that kind would: lists
where ONNX has lists, 0 and 1 for flags, what ATen leaves to a default. So one rule per kind serves both
formats. A length that is known only when the model runs is in no attribute (but as the -1 of a reshape): it
is in the shapes of the tensors, by its symbol.

A call that no attributes of its kind describe is none of that kind: `means` says so.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from normtool.formats.torch.tensors import DTYPES
from normtool.graph import Shape

Attributes = dict[str, Any]

#: The end of a slice that has none.
LAST = (1 << 63) - 1


def adapt(kind: str, node: fx.Node, attributes: Attributes) -> None:
    """Restate, in place, the attributes of a call in the words of ONNX."""
    if kind in _ADAPT:
        _ADAPT[kind](node, attributes)


def means(kind: str, node: fx.Node, arguments: Mapping[str, Any]) -> bool:
    """Is the call what its name promises? `arguments` are by ATen name."""
    return kind not in _ONLY_WHERE or _ONLY_WHERE[kind](node, arguments)


# ---- what a node says of itself ---------------------------------------------------------------


def op_type(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


def base_name(node: fx.Node) -> str:
    """`relu_` has the row of `relu`."""
    name = op_type(node)
    in_place = name.endswith("_") and not name.endswith("__")
    return name[:-1] if in_place else name


def schema_arguments(node: fx.Node) -> list[tuple[Any, Any]]:
    """(argument of the schema, its value) for the arguments that are given."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return []
    declared = target._schema.arguments
    by_name = [(each, node.kwargs[each.name]) for each in declared if each.name in node.kwargs]
    return [*zip(declared, node.args, strict=False), *by_name]


def shape_of(tensor: torch.Tensor) -> Shape:
    """Lengths; an open dimension is its symbol."""
    return tuple(int(n) if isinstance(n, int) else str(n) for n in tensor.shape)


def _entry(node: fx.Node) -> torch.Tensor:
    """The first tensor that goes in, without numbers."""
    entry: torch.Tensor = node.all_input_nodes[0].meta["val"]
    return entry


def _results(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta["val"]
    return list(value) if isinstance(value, list | tuple) else [value]


def _result(node: fx.Node) -> torch.Tensor:
    return _results(node)[0]


def _computed(node: fx.Node) -> set[str]:
    """Arguments that the model computes; they are inputs, whatever their default."""
    return {argument.name for argument, value in schema_arguments(node) if isinstance(value, fx.Node)}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _state(attributes: Attributes, name: str, lengths: Shape) -> None:
    """Lengths that are all known are an attribute."""
    attributes.pop(name, None)
    if all(isinstance(length, int) for length in lengths):
        attributes[name] = list(lengths)


def _state_flags(attributes: Attributes, *names: str) -> None:
    for name in names:
        attributes[name] = int(attributes.get(name, False))


# ---- convolution and pooling ------------------------------------------------------------------


def _spatial_rank(node: fx.Node) -> int:
    """conv2d says it, convolution does not and always has a batch."""
    digit = re.search(r"(\d)d", base_name(node))
    return int(digit[1]) if digit else _result(node).ndim - 2


def _both_sides(node: fx.Node, attributes: Attributes) -> None:
    """`padding` is one number per axis, or a word; one number stands for every axis."""
    padding = attributes.pop("pads", 0)
    rank = _spatial_rank(node)
    if isinstance(padding, str):
        attributes["auto_pad"] = {"same": "SAME_UPPER", "valid": "VALID"}[padding]
    else:
        attributes["pads"] = _each_axis(padding, rank) * 2
    for name in ("strides", "dilations", "output_padding", "kernel_shape"):
        if name in attributes:
            attributes[name] = _each_axis(attributes[name], rank)


def _each_axis(numbers: Any, rank: int) -> list[Any]:
    listed = _listed(numbers)
    return listed * rank if len(listed) == 1 else listed


def _max_pool(node: fx.Node, attributes: Attributes) -> None:
    """Windows go on by their own length where no stride is given."""
    _both_sides(node, attributes)
    if not attributes.get("strides"):
        attributes["strides"] = attributes["kernel_shape"]
    _state_flags(attributes, "ceil_mode")


def _average_pool(node: fx.Node, attributes: Attributes) -> None:
    _max_pool(node, attributes)
    _state_flags(attributes, "count_include_pad")


def _adaptive_average_pool(node: fx.Node, attributes: Attributes) -> None:
    if "output_size" in attributes:
        attributes["output_size"] = _each_axis(attributes["output_size"], _spatial_rank(node))


def _resize(node: fx.Node, attributes: Attributes) -> None:
    """torch's nearest takes the floor of asymmetric coordinates, its nearest-exact the next of half-pixel ones.

    `sizes` are the output's lengths, of all axes or, where the batch is open, of `axes`. Where the call states
    factors, the coordinates are by these, not by the quotient of the lengths, and `scales` are there as well.
    """
    word = re.sub(r"^_?upsample_|\dd$", "", base_name(node))
    attributes["mode"] = word.removesuffix("_exact").removeprefix("bi").removeprefix("tri")
    by_corners = attributes.pop("align_corners", False)
    if attributes["mode"] == "nearest":
        exact = word == "nearest_exact"
        attributes["nearest_mode"] = "round_prefer_ceil" if exact else "floor"
        attributes["coordinate_transformation_mode"] = "half_pixel" if exact else "asymmetric"
    else:
        attributes["coordinate_transformation_mode"] = "align_corners" if by_corners else "half_pixel"
    separate = [attributes.pop(name) for name in ("scales_d", "scales_h", "scales_w") if name in attributes]
    factors, lengths = attributes.pop("scales", separate), shape_of(_result(node))
    _state(attributes, "sizes", lengths)
    some = "sizes" not in attributes and all(isinstance(length, int) for length in lengths[2:])
    if some:
        attributes |= {"axes": list(range(2, len(lengths))), "sizes": list(lengths[2:])}
    if factors and not by_corners:
        attributes["scales"] = list(factors) if some else [1.0, 1.0, *factors]


# ---- matrix products, attention, norms --------------------------------------------------------


def _transposed_weight(node: fx.Node, attributes: Attributes) -> None:
    """aten.linear holds its weight as (out, in); addmm and mm as (in, out)."""
    if base_name(node) == "linear":
        attributes["transB"] = 1


def _attention(node: fx.Node, attributes: Attributes) -> None:
    """softmax(scale · q kᵀ + mask) v; scale is 1/√E unless given."""
    _state_flags(attributes, "is_causal", "enable_gqa")
    length = shape_of(_entry(node))[-1]
    if "scale" not in attributes and "scale" not in _computed(node) and isinstance(length, int):
        attributes["scale"] = 1 / math.sqrt(length)


def _trailing_axes(node: fx.Node, attributes: Attributes) -> None:
    attributes["axis"] = -len(attributes.pop("normalized_shape"))


def _rms_norm(node: fx.Node, attributes: Attributes) -> None:
    """An ε that is not given is that of the dtype torch computes in: float32 for half precision."""
    _trailing_axes(node, attributes)
    if "epsilon" not in attributes:
        attributes["epsilon"] = torch.finfo(torch.promote_types(_entry(node).dtype, torch.float32)).eps


def _reduction(node: fx.Node, attributes: Attributes) -> None:
    """No axes, or an empty list of them: all."""
    axes = _listed(attributes.get("axes", []))
    attributes["axes"] = axes or list(range(_entry(node).ndim))
    _state_flags(attributes, "keepdims")


def _variance(node: fx.Node, attributes: Attributes) -> None:
    """Divides by N − correction: 1 unless the call says otherwise."""
    _reduction(node, attributes)
    unbiased = attributes.pop("unbiased", True)
    attributes.setdefault("correction", int(unbiased))


def _pow(node: fx.Node, attributes: Attributes) -> None:
    if base_name(node) == "square":
        attributes["exponent"] = 2


def _expand(node: fx.Node, attributes: Attributes) -> None:
    """`expand_as` says only whose shape it takes."""
    if base_name(node) == "expand_as":
        _state(attributes, "shape", shape_of(_result(node)))


def _clip(node: fx.Node, attributes: Attributes) -> None:
    if base_name(node) == "relu6":
        attributes |= {"min": 0.0, "max": 6.0}


# ---- shapes -----------------------------------------------------------------------------------


def _permutation(node: fx.Node, attributes: Attributes) -> None:
    """perm[i] is the axis of the input that becomes axis i of the output."""
    rank = _result(node).ndim
    name = base_name(node)
    order = list(range(rank))
    if "perm" in attributes:
        order = [axis % rank for axis in attributes["perm"]]
    elif "source" in attributes:
        order = _moved(rank, _listed(attributes.pop("source")), _listed(attributes.pop("destination")))
    elif name == "numpy_T":
        order.reverse()
    elif rank > 1:
        last_two = (0, 1) if name == "t" else (-2, -1)
        first, second = attributes.pop("dim0", last_two[0]), attributes.pop("dim1", last_two[1])
        order[first], order[second] = order[second], order[first]
    attributes["perm"] = order


def _moved(rank: int, source: list[int], destination: list[int]) -> list[int]:
    """The axes that move go where they are sent, the others fill up the rest in their order."""
    sent = {target % rank: axis % rank for axis, target in zip(source, destination, strict=True)}
    others = iter(axis for axis in range(rank) if axis not in sent.values())
    return [sent[place] if place in sent else next(others) for place in range(rank)]


def _reshape(node: fx.Node, attributes: Attributes) -> None:
    """The lengths that come out, however the call states them; one open length is -1, more are no attribute."""
    shape = shape_of(_result(node))
    is_open = [not isinstance(length, int) for length in shape]
    attributes.pop("shape", None)
    attributes["allowzero"] = 1  # ATen's 0 is a length
    if sum(is_open) <= 1:
        attributes["shape"] = [-1 if unknown else n for n, unknown in zip(shape, is_open, strict=True)]


def _squeeze(node: fx.Node, attributes: Attributes) -> None:
    """ATen passes over the axes that are longer than 1, which ONNX refuses; none may be left."""
    shape = shape_of(_entry(node))
    axes = _listed(attributes.get("axes", list(range(len(shape)))))
    attributes["axes"] = [axis for axis in axes if shape and shape[axis] == 1]


def _unsqueeze(node: fx.Node, attributes: Attributes) -> None:
    attributes["axes"] = _listed(attributes["axes"])


# ---- structure --------------------------------------------------------------------------------


def _slice(node: fx.Node, attributes: Attributes) -> None:
    """One axis. A bound that the model computes is an input; so is the length of a `narrow`."""
    computed = _computed(node)
    length = attributes.pop("length", None)
    if computed & {"start", "length"} and base_name(node) == "narrow":
        computed.add("end")
    elif length is not None:
        # a start from the back: the end at 0 is the end of the axis
        attributes["ends"] = attributes["starts"] + length or LAST
    for name, default in (("start", 0), ("end", LAST), ("step", 1)):
        if name not in computed:
            attributes.setdefault(f"{name}s", default)
    for name in {"starts", "ends", "axes", "steps"} & set(attributes):
        attributes[name] = [attributes[name]]


def _split(node: fx.Node, attributes: Attributes) -> None:
    """The lengths of the parts, however the call states them."""
    axis = attributes["axis"]
    _state(attributes, "split", tuple(shape_of(part)[axis] for part in _results(node)))


def _pad(node: fx.Node, attributes: Attributes) -> None:
    """ATen pairs begin and end, from the last axis on; ONNX has the begins of all axes, then the ends."""
    name, mode = base_name(node), attributes.get("mode", "constant")
    if name.startswith(("reflection", "replication")):
        mode = name.partition("_")[0]
    attributes["mode"] = _PAD_MODES[mode]
    if mode == "constant":
        attributes.setdefault("value", 0.0)
    else:
        attributes.pop("value", None)
    pairs = attributes.pop("pads", None)
    if pairs is not None:
        rest = [0] * (_result(node).ndim - len(pairs) // 2)
        attributes["pads"] = [*rest, *pairs[-2::-2], *rest, *pairs[::-2]]


_PAD_MODES = {
    "constant": "constant",
    "reflect": "reflect",
    "reflection": "reflect",
    "replicate": "edge",
    "replication": "edge",
    "circular": "wrap",
}


def _gather(node: fx.Node, attributes: Attributes) -> None:
    attributes.setdefault("axis", 0)


def _cast(node: fx.Node, attributes: Attributes) -> None:
    to = attributes.pop("to", None)
    if to in DTYPES:
        attributes["to"] = DTYPES[to]


_ADAPT: Mapping[str, Callable[[fx.Node, Attributes], None]] = {
    "adaptive_average_pool": _adaptive_average_pool,
    "attention": _attention,
    "average_pool": _average_pool,
    "cast": _cast,
    "clip": _clip,
    "conv": _both_sides,
    "conv_transpose": _both_sides,
    "embedding": _gather,
    "expand": _expand,
    "layer_norm": _trailing_axes,
    "linear": _transposed_weight,
    "max_pool": _max_pool,
    "pad": _pad,
    "pow": _pow,
    **dict.fromkeys(("reduce_mean", "reduce_sum", "reduce_l1", "reduce_l2"), _reduction),
    "reshape": _reshape,
    "resize": _resize,
    "rms_norm": _rms_norm,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _permutation,
    "unsqueeze": _unsqueeze,
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), _variance),
}


# ---- calls that mean something else -----------------------------------------------------------

Arguments = Mapping[str, Any]


def _has_a_batch(node: fx.Node, arguments: Arguments) -> bool:
    """ATen pools (C, H, W) too; ONNX would take C for the batch."""
    return _entry(node).ndim == _spatial_rank(node) + 2


def _indices_are_a_list(node: fx.Node, arguments: Arguments) -> bool:
    """By a single index index_select leaves an axis of length 1, Gather none."""
    return "index" not in arguments or arguments["index"].meta["val"].ndim == 1


def _conjugates_nothing(node: fx.Node, arguments: Arguments) -> bool:
    return base_name(node) not in ("adjoint", "mH", "matrix_H") or not _entry(node).is_complex()


def _ranks_are_equal(node: fx.Node, arguments: Arguments) -> bool:
    """cat passes over an empty tensor of one axis."""
    return all(each.meta["val"].ndim == _result(node).ndim for each in node.all_input_nodes)


def _states_every_factor(node: fx.Node, arguments: Arguments) -> bool:
    """Factors for some axes only are in no attribute of ONNX."""
    stated = [arguments[name] is None for name in ("scales_d", "scales_h", "scales_w") if name in arguments]
    return all(stated) or not any(stated)


def _fill_is_a_number(node: fx.Node, arguments: Arguments) -> bool:
    return not isinstance(arguments.get("value"), fx.Node)


_ONLY_WHERE: Mapping[str, Callable[[fx.Node, Arguments], bool]] = {
    "adaptive_average_pool": _has_a_batch,
    "average_pool": _has_a_batch,
    "concat": _ranks_are_equal,
    "embedding": _indices_are_a_list,
    "global_average_pool": _has_a_batch,
    "max_pool": _has_a_batch,
    "pad": _fill_is_a_number,
    "resize": _states_every_factor,
    "transpose": _conjugates_nothing,
}
