"""What small tensors hold that are made of lengths: Shape → Gather → Mul → Concat, as exporters write it."""

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from normtool import elements
from normtool.constants import Constants
from normtool.elements import Element, elementwise, fitted, listed
from normtool.graph import Tensor
from normtool.lengths import Lengths, product
from normtool.reasons import Reason
from normtool.shape_rules import NotKnown, Site
from normtool.values import Array, element_count, to_array

#: Tensors with more elements are not followed: nothing is made of so many lengths.
MOST_ELEMENTS = 64


def static(shape: Lengths | None) -> tuple[int, ...] | None:
    """The shape, if it has few enough elements and every length is a number."""
    if shape is None:
        return None
    numbers = tuple(n for n in shape if isinstance(n, int))
    fits = len(numbers) == len(shape) and 0 <= element_count(numbers) <= MOST_ELEMENTS
    return numbers if fits else None


def stored(constants: Constants, tensor: Tensor) -> Array | None:
    """The elements of a constant. The caller knows that it is small."""
    array = constants.array(tensor)
    return None if isinstance(array, Reason) else _of_numbers(array)


def _of_numbers(array: Array) -> Array | None:
    if array.dtype.kind not in "iufb" or array.size > MOST_ELEMENTS or not np.isfinite(array).all():
        return None
    if array.dtype.kind == "f":
        return listed([elements.number(Fraction(n)) for n in array.reshape(-1).tolist()], array.shape)
    return listed(array.reshape(-1).tolist(), array.shape)


def evaluate(site: Site, name: str) -> dict[str, Array]:
    """What the op puts out, by slot. Raises as the rules for shapes do."""
    results = VALUED[name](site)
    if not isinstance(results, dict):
        results = {"y": results}
    return {
        slot: fitted(array, site.outputs[slot].dtype)
        for slot, array in results.items()
        if slot in site.outputs and array.size <= MOST_ELEMENTS
    }


def _result_shape(site: Site) -> tuple[int, ...]:
    shape = static(site.state.shape(site.outputs["y"]))
    if shape is None:
        raise NotKnown("the shape of the result")
    return shape


def _shape(site: Site) -> Array:
    lengths = site.shape("x")[site.attribute("start") : site.attribute("end")]
    return listed(list(lengths), (len(lengths),))


def _size(site: Site) -> Array:
    return listed([product(site.shape("x"))], ())


def _carried(site: Site) -> Array:
    """The same numbers, row by row."""
    return site.array("x").reshape(_result_shape(site))


def _expand(site: Site) -> Array:
    return np.broadcast_to(site.array("x"), _result_shape(site))


def _cast(site: Site) -> Array:
    dtype = site.attribute("to")
    return fitted(elementwise(lambda each: elements.cast(each, dtype), site.array("x")), dtype)


def _slice(site: Site) -> Array:
    x, starts, ends = site.array("x"), site.integers("starts") or [], site.integers("ends") or []
    axes = site.integers("axes") or range(len(starts))
    steps = site.integers("steps") or [1] * len(starts)
    cuts = [slice(None)] * x.ndim
    for axis, *bounds in zip(axes, starts, ends, steps, strict=True):
        cuts[axis] = slice(*bounds)
    return x[tuple(cuts)]


def _transpose(site: Site) -> Array:
    return site.array("x").transpose(site.attribute("perm"))


def _gather(site: Site) -> Array:
    indices = site.array("indices")
    if not all(isinstance(index, int) for index in indices.reshape(-1)):
        raise NotKnown("which elements are looked up")
    taken = site.array("table").take(indices.astype(np.int64), int(site.attribute("axis")))
    return taken if isinstance(taken, np.ndarray) else listed([taken], ())


def _concat(site: Site) -> Array:
    return np.concatenate([site.array(slot) for slot in site.listed("inputs")], int(site.attribute("axis", 1)))


def _split(site: Site) -> dict[str, Array]:
    """As the shapes of the results say, one after the other."""
    x, start = site.array("x"), 0
    parts: dict[str, Array] = {}
    if x.ndim != 1:
        raise NotKnown("which axis is split")
    for slot in site.listed("y.", site.outputs):
        (length,) = site.state.shape(site.outputs[slot]) or (None,)
        if not isinstance(length, int) or slot != f"y.{len(parts)}":
            raise NotKnown("where it is split")
        parts[slot] = x[start : start + length]
        start += length
    return parts


def _constant_of_shape(site: Site) -> Array:
    fill = to_array(site.attribute("value")) if "value" in site.op.attributes else np.zeros(1, np.float32)
    found = _of_numbers(fill.reshape(()))
    if found is None:
        raise NotKnown("what it is filled with")
    return np.broadcast_to(found, _result_shape(site))


def _product(site: Site) -> Array:
    """All of them, whatever the axes are: nobody multiplies rows of lengths."""
    total: Element = 1
    for element in site.array("x").reshape(-1):
        total = elements.multiply(total, element)
    return listed([total], ()).reshape(_result_shape(site))


def _divide(site: Site) -> Array:
    dtype = site.outputs["y"].dtype
    kind = "" if dtype is None else dtype.kind
    functions = {"f": elements.divide, "i": elements.divide_integers, "u": elements.divide_integers}
    return elementwise(functions.get(kind, elements.divide_exactly), site.array("a"), site.array("b"))


def _elementwise(function: Callable[..., Element], *slots: str) -> Callable[[Site], Array]:
    return lambda site: elementwise(function, *(site.array(slot) for slot in slots))


VALUED: Mapping[str, Callable[[Site], Any]] = {
    "shape": _shape,
    "size": _size,
    **dict.fromkeys("identity reshape flatten squeeze unsqueeze".split(), _carried),
    "expand": _expand,
    "cast": _cast,
    "slice": _slice,
    "transpose": _transpose,
    "embedding": _gather,
    "concat": _concat,
    "split": _split,
    "constant_of_shape": _constant_of_shape,
    "reduce_prod": _product,
    "div": _divide,
    "add": _elementwise(elements.add, "a", "b"),
    "sub": _elementwise(elements.subtract, "a", "b"),
    "mul": _elementwise(elements.multiply, "a", "b"),
    "neg": _elementwise(elements.negate, "x"),
    "max": _elementwise(elements.larger, "inputs.0", "inputs.1"),
    "Min": _elementwise(elements.smaller, "in.0", "in.1"),
    "Mod": _elementwise(elements.remainder, "in.0", "in.1"),
    "Floor": _elementwise(elements.round_down, "in.0"),
    "Ceil": _elementwise(elements.round_up, "in.0"),
    "Equal": _elementwise(elements.equal, "in.0", "in.1"),
    "where": _elementwise(elements.choose, "condition", "a", "b"),
}
