"""Places followed by their labels, against brute force: which numbers have one mean between them?"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st

from normtool.centring import rows
from normtool.centring.places import Place, from_labels
from normtool.centring.rows import Blocked
from normtool.constants import Constants
from normtool.formats.onnx.read import read_proto
from normtool.graph import GRAPH_OUTPUT
from tests.zoo import Net

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

LENGTHS = st.sampled_from([1, 2, 3, 4, 6])
SHAPES = st.lists(LENGTHS, min_size=1, max_size=4).map(tuple)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def placed(draw: st.DrawFn) -> tuple[Shape, Place]:
    """A shape, and a place on it with a block of two numbers at least."""
    shape = draw(SHAPES.filter(lambda shape: math.prod(shape) > 1))
    spans = [(a, b) for a, b in itertools.combinations(range(len(shape) + 1), 2) if math.prod(shape[a:b]) > 1]
    start, stop = draw(st.sampled_from(spans))
    size = math.prod(shape[start:stop])
    block = draw(st.sampled_from([d for d in divisors(size) if d > 1]))
    outer = draw(st.sampled_from(divisors(size // block)))
    return shape, Place(start, stop, outer, block, size // block // outer)


@st.composite
def factored(draw: st.DrawFn, size: int) -> Shape:
    """A shape of that many numbers."""
    shape = []
    while size > 1 and len(shape) < 3:
        shape.append(draw(st.sampled_from(divisors(size))))
        size //= shape[-1]
    return (*shape, size)


def groups(place: Place, shape: Shape) -> Array:
    """For every number of a tensor, a number that all who share its mean have."""
    apart = place.apart(shape)
    axis = place.start + 1
    count = math.prod(apart) // place.block
    numbers = np.arange(count).reshape([n for i, n in enumerate(apart) if i != axis])
    return np.broadcast_to(np.expand_dims(numbers, axis), apart).reshape(shape)


def same_groups(a: Array, b: Array) -> bool:
    """Do two labellings part the numbers in the same way?"""
    pairs = {(int(x), int(y)) for x, y in zip(a.reshape(-1), b.reshape(-1), strict=True)}
    return len(pairs) == len(set(a.reshape(-1).tolist())) == len(set(b.reshape(-1).tolist()))


def places_on(shape: Shape) -> Iterator[Place]:
    for start, stop in itertools.combinations(range(len(shape) + 1), 2):
        size = math.prod(shape[start:stop])
        for block in divisors(size):
            for outer in divisors(size // block):
                yield Place(start, stop, outer, block, size // block // outer)


def ahead_of(op_type: str, before: Shape, place: Place, *operands: Array, **attributes: Any) -> Any:
    """Where the place is behind one op, as `centring.rows` has it: (place or None, the op's other end)."""
    net = Net(opset=18, dtype=np.float64)
    y = net.node(op_type, net.input(before), *[net.constant(each) for each in operands], **attributes)
    net.outputs.append(onnx.ValueInfoProto(name=y))
    graph = read_proto(onnx.shape_inference.infer_shapes(net.model(), data_prop=True)).graph
    (op,) = (op for op in graph.ops if op.kind != GRAPH_OUTPUT)
    answer = rows.ahead(Constants(graph), op, "x", place)
    if isinstance(answer, Blocked):
        return None
    found = answer["y"]
    assert found is not None
    back = rows.behind(Constants(graph), op, "y", found)
    assert not isinstance(back, Blocked)
    assert same_groups(groups(back["x"], before), groups(place, before))  # type: ignore[arg-type]
    return found


@settings(max_examples=60, deadline=None)
@given(placed(), st.randoms(use_true_random=False))
def test_through_a_transpose(given_place: tuple[Shape, Place], random: Any) -> None:
    shape, place = given_place
    perm = list(range(len(shape)))
    random.shuffle(perm)
    moved = groups(place, shape).transpose(perm)
    found = ahead_of("Transpose", shape, place, perm=perm)
    if found is None:
        together = [perm.index(axis) for axis in range(place.start, place.stop)]
        assert together != list(range(together[0], together[0] + len(together)))
        return
    assert same_groups(groups(found, moved.shape), moved)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_through_a_reshape(data: st.DataObject) -> None:
    shape, place = data.draw(placed())
    after = data.draw(factored(math.prod(shape)))
    moved = groups(place, shape).reshape(after)
    found = ahead_of("Reshape", shape, place, np.array(after))
    if found is not None:
        assert same_groups(groups(found, after), moved)
    elif place.is_one_axis:  # such a one is always followed where it can be
        assert not any(same_groups(groups(each, after), moved) for each in places_on(after))


@settings(max_examples=200, deadline=None)
@given(placed())
def test_labels_say_the_place(given_place: tuple[Shape, Place]) -> None:
    shape, place = given_place
    labels = place.labels(shape)
    assert labels is not None
    found = from_labels(labels, shape)
    assert found is not None
    assert same_groups(groups(found, shape), groups(place, shape))


@settings(max_examples=100, deadline=None)
@given(placed())
def test_centring_takes_out_the_mean_of_each_group(given_place: tuple[Shape, Place]) -> None:
    shape, place = given_place
    x = np.random.default_rng(0).standard_normal(shape)
    centred, number = place.centred(x), groups(place, shape)
    for group in np.unique(number):
        assert abs(centred[number == group].mean()) < 1e-14
        assert np.allclose(centred[number == group], x[number == group] - x[number == group].mean(), atol=1e-14)
