"""Shapes filled in where onnx gives up: every length that is stated is the one ONNX Runtime sees."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from normtool import elements, shapes
from normtool.constants import Constants
from normtool.errors import NormtoolError, UnreadableModel
from normtool.formats.onnx.read import read_path, read_proto
from normtool.graph import ModelGraph, Scope, Shape, Tensor
from normtool.inputs import attempts, generate
from normtool.lengths import Product, broadcast, crossed_out, over, plus, product, read, times, written
from normtool.ops import ROWS, find_spelling
from normtool.reasons import Reason
from normtool.shape_rules import RULES
from normtool.shape_values import VALUED
from tests.conftest import CORPUS, corpus_cases
from tests.zoo import Array, Net

Lengths = tuple[int, ...]
Feeds = dict[str, Array]

onnxruntime.set_default_logger_severity(4)


# ---- what ONNX Runtime sees -------------------------------------------------------------------


def observed(model: onnx.ModelProto, *runs: Feeds) -> list[dict[str, Lengths]]:
    """The shape of every tensor of the main graph, in each run."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    already = {info.name for info in watched.graph.output}
    names = [name for node in watched.graph.node for name in node.output if name and name not in already]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs = [entry.name for entry in session.get_outputs()]
    seen = []
    for feeds in runs:
        arrays = dict(zip(outputs, session.run(outputs, feeds), strict=True)) | feeds
        seen.append({name: array.shape for name, array in arrays.items() if isinstance(array, np.ndarray)})
    return seen


def contradictions(stated: Mapping[str, Shape | None], seen: Mapping[str, Lengths]) -> list[str]:
    """What is stated and not so. A symbol is one number throughout a run, and a product is the product."""
    pairs = [(name, shape, seen[name]) for name, shape in stated.items() if shape is not None and name in seen]
    pairs = [(name, tuple(None if n == "?" else n for n in shape), true) for name, shape, true in pairs]
    wrong = [f"{name}: {shape} is {true}" for name, shape, true in pairs if len(shape) != len(true)]
    axes = [
        (name, n, true_n)
        for name, shape, true in pairs
        if len(shape) == len(true)
        for n, true_n in zip(shape, true, strict=True)
        if n is not None
    ]
    symbols: dict[str, int] = {}
    for name, n, true_n in axes:
        if isinstance(n, str) and "*" not in n and symbols.setdefault(n, true_n) != true_n:
            wrong.append(f"{name}: {n} is {true_n} and {symbols[n]}")
    for name, n, true_n in axes:
        number = _number(n, symbols)
        if number is not None and number != true_n:
            wrong.append(f"{name}: {n} is {true_n}, not {number}")
    return wrong


def _number(length: int | str, symbols: Mapping[str, int]) -> int | None:
    if isinstance(length, int):
        return length
    parts = [int(part) if part.isdecimal() else symbols.get(part) for part in length.split("*")]
    return None if None in parts else int(np.prod(parts))  # type: ignore[arg-type]


def main_shapes(graph: ModelGraph) -> dict[str, Shape | None]:
    return {tensor.name: tensor.shape for tensor in graph.tensors if tensor.scope == ModelGraph.MAIN}


def checked(model: onnx.ModelProto, *runs: Feeds) -> dict[str, Shape | None]:
    """The shapes as they are read, each of them right in every run."""
    stated = main_shapes(read_proto(model).graph)
    for seen in observed(model, *runs):
        assert contradictions(stated, seen) == []
    return stated


@pytest.mark.parametrize(
    "stated",
    [(2, "s", 8), (2, 3), (2, "s", "2*s"), ("s", "s", 12), (2, 3, "5*s")],
    ids=["number", "rank", "product", "symbol_twice", "wrong_product"],
)
def test_the_check_sees_a_wrong_shape(stated: Shape) -> None:
    assert contradictions({"x": (3, "s"), "y": stated}, {"x": (3, 3), "y": (2, 3, 12)})


def test_the_check_lets_a_right_shape_pass() -> None:
    assert not contradictions({"x": ("s", None), "y": ("2", "s", "4*s")}, {"x": (3, 3), "y": (2, 3, 12)})


# ---- patterns of exporters --------------------------------------------------------------------


def floats(*shape: int) -> Array:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def size(net: Net, x: str, axis: int) -> str:
    """torch 1.x: x.size(axis)"""
    return str(net.node("Gather", net.node("Shape", x), net.constant(np.int64(axis)), axis=0))


def packed(net: Net, *lengths: str | int) -> str:
    """Unsqueeze → Concat, as torch 1.x makes a shape of numbers (opset below 13)."""
    parts = [
        net.constant(np.array([n])) if isinstance(n, int) else net.node("Unsqueeze", n, axes=[0])
        for n in lengths
    ]
    return str(net.node("Concat", *parts, axis=0))


def halved(net: Net, number: str, by: int, style: str) -> str:
    """number // by, as three exporters write it."""
    if style == "integers":
        return str(net.node("Div", number, net.constant(np.int64(by))))
    if style == "floor":
        as_float = net.node("Cast", number, to=onnx.TensorProto.FLOAT)
        quotient = net.node("Div", as_float, net.constant(np.float32(by)))
        return str(net.node("Cast", net.node("Floor", quotient), to=onnx.TensorProto.INT64))
    remainder = net.node("Mod", number, net.constant(np.int64(by)))
    return str(net.node("Div", net.node("Sub", number, remainder), net.constant(np.int64(by))))


def finished(net: Net, y: str) -> onnx.ModelProto:
    net.output(net.node("Identity", y, outputs=["y"]))
    return net.model()


@pytest.mark.parametrize("style", ["integers", "floor", "remainder"])
def test_gpt2_splits_heads(style: str) -> None:
    """view(*x.size()[:-1], heads, x.size(-1) // heads), attention, and back by the same."""
    net = Net(opset=11)
    x = net.input(["batch", "tokens", 8])
    heads = [
        net.node(
            "Transpose",
            net.node(
                "Reshape",
                part,
                packed(
                    net, size(net, part, 0), size(net, part, 1), 2, halved(net, size(net, part, -1), 2, style)
                ),
            ),
            perm=order,
        )
        for part, order in zip(
            net.node("Split", net.node("MatMul", x, net.weight(8, 24)), outputs=3, axis=2, split=[8, 8, 8]),
            ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]),
            strict=True,
        )
    ]
    scores = net.node("Softmax", net.node("MatMul", heads[0], heads[1]), axis=3)
    merged = net.node("Transpose", net.node("MatMul", scores, heads[2]), perm=[0, 2, 1, 3])
    width = net.node("Mul", size(net, merged, -2), size(net, merged, -1))
    flat = net.node("Reshape", merged, packed(net, size(net, merged, 0), size(net, merged, 1), width))
    net.node("Add", x, flat, outputs=["sum"])
    stated = checked(finished(net, "sum"), {"x": floats(2, 3, 8)}, {"x": floats(5, 7, 8)})
    assert stated[heads[1]] == ("batch", 2, 4, "tokens")
    assert stated[scores] == ("batch", 2, "tokens", "tokens")
    assert stated["y"] == ("batch", "tokens", 8)


def test_multihead_attention_merges_batch_and_heads() -> None:
    """nn.MultiheadAttention of torch 1.x: (T, N, E) → (T, N·heads, E/heads) → (N·heads, T, …) and back."""
    net = Net(opset=11)
    x = net.input(["tokens", "batch", 8])
    tokens, batch, width = (size(net, x, axis) for axis in range(3))
    rows = net.node("Mul", batch, net.constant(np.int64(4)))
    view = net.node("Reshape", x, packed(net, tokens, rows, halved(net, width, 4, "floor")))
    q = net.node("Transpose", view, perm=[1, 0, 2])
    weights = net.node("Softmax", net.node("MatMul", q, net.node("Transpose", q, perm=[0, 2, 1])), axis=2)
    mixed = net.node("Transpose", net.node("MatMul", weights, q), perm=[1, 0, 2])
    merged = net.node("Reshape", mixed, packed(net, tokens, batch, width))
    apart = net.node("Reshape", weights, packed(net, batch, 4, tokens, tokens))
    net.output(apart)
    stated = checked(finished(net, merged), {"x": floats(3, 2, 8)}, {"x": floats(6, 5, 8)})
    assert stated[q] == ("4*batch", "tokens", 2)
    assert stated[apart] == ("batch", 4, "tokens", "tokens")
    assert stated["y"] == ("tokens", "batch", 8)


def test_paddle_flattens_and_reshapes_with_0_and_minus_1() -> None:
    """The height that is 1 follows from the reshape back: nothing else says so."""
    net = Net(opset=11)
    x = net.input(["n", 8, None, "w"])
    head = net.node("Slice", net.node("Shape", x), *(net.constant(np.array([n])) for n in (0, 2)))
    flat = net.node("Reshape", x, net.node("Concat", head, net.constant(np.array([-1])), axis=0))
    rows = net.node("Transpose", flat, perm=[0, 2, 1])
    split = net.node("Reshape", rows, net.constant(np.array([0, -1, 2, 4])))
    joined = net.node("Reshape", split, net.constant(np.array([0, 0, 8])))
    width = net.node("Cast", net.node("Slice", net.node("Shape", x), *_bounds(net, 3, 4)), to=6)
    first = net.node("Cast", net.node("Slice", net.node("Shape", x), *_bounds(net, 0, 1)), to=6)
    shape = net.node("Concat", first, *(net.constant(np.array([n], np.int32)) for n in (1,)), width, axis=0)
    shape = net.node("Concat", shape, net.constant(np.array([8], np.int32)), axis=0)
    back = net.node("Reshape", joined, net.node("Cast", shape, to=7))
    stated = checked(finished(net, back), {"x": floats(2, 8, 1, 5)}, {"x": floats(3, 8, 1, 9)})
    assert stated[flat] == ("n", 8, "w")
    assert stated[split] == ("n", "w", 2, 4)
    assert stated["y"] == ("n", 1, "w", 8)


def _bounds(net: Net, start: int, end: int) -> list[str]:
    return [net.constant(np.array([start])), net.constant(np.array([end]))]


def test_bert_expands_its_mask() -> None:
    """mask[:, None, None, :].expand(b, 1, s, s) with the -1s that torch puts a Where around."""
    net = Net(opset=11)
    mask = net.input(["batch", "tokens"], "mask", np.int64)
    wide = net.node("Unsqueeze", mask, axes=[1, 2])
    wanted = packed(net, size(net, mask, 0), 1, size(net, mask, 1), -1)
    ones = net.node(
        "ConstantOfShape",
        net.constant(np.array([4])),
        value=helper.make_tensor("one", onnx.TensorProto.INT64, [1], [1]),
    )
    minus = net.node("Mul", ones, net.constant(np.int64(-1)))
    target = net.node("Where", net.node("Equal", wanted, minus), ones, wanted)
    spread = net.node("Cast", net.node("Expand", wide, target), to=onnx.TensorProto.FLOAT)
    bias = net.node("Mul", net.node("Sub", net.constant(np.float32(1)), spread), net.constant(np.float32(-1e4)))
    runs = [{"mask": np.ones(shape, np.int64)} for shape in ((2, 3), (4, 9))]
    stated = checked(finished(net, bias), *runs)
    assert stated["y"] == ("batch", 1, "tokens", "tokens")


def test_positions_are_as_many_as_tokens() -> None:
    """BERT: table[arange(input_ids.size(1))], an embedding behind a Range, added to another."""
    net = Net(opset=11)
    ids = net.input(["batch", "tokens"], "ids", np.int64)
    count = net.node("Cast", size(net, ids, 1), to=onnx.TensorProto.INT64)
    positions = net.node("Range", net.constant(np.int64(0)), count, net.constant(np.int64(1)))
    row = net.node("Unsqueeze", positions, axes=[0])
    spread = net.node("Expand", row, net.node("Shape", ids))
    words = net.node("Gather", net.weight(10, 6), ids)
    total = net.node("Add", words, net.node("Gather", net.weight(12, 6), spread))
    runs = [{"ids": np.ones(shape, np.int64)} for shape in ((2, 3), (4, 9))]
    stated = checked(finished(net, total), *runs)
    assert stated[row] == (1, "tokens")
    assert stated["y"] == ("batch", "tokens", 6)


def test_a_cache_grows_by_a_length_that_nobody_names() -> None:
    """GPT-2 with a past: past + new is a third length, the same in keys, scores and the cache put out."""
    net = Net(opset=11)
    x, past = net.input(["b", "new", 8]), net.input(["b", 2, "past", 4], "past")
    q = net.node("Transpose", net.node("Reshape", x, net.constant(np.array([0, 0, 2, 4]))), perm=[0, 2, 1, 3])
    keys = net.node("Concat", past, q, axis=-2)
    scores = net.node("MatMul", q, net.node("Transpose", keys, perm=[0, 1, 3, 2]))
    bottom, top = size(net, keys, -2), size(net, q, -2)
    rows = net.node(
        "Slice",
        net.constant(np.ones((1, 1, 16, 16), np.float32)),
        net.node("Unsqueeze", net.node("Sub", bottom, top), axes=[0]),
        net.node("Unsqueeze", bottom, axes=[0]),
        net.constant(np.array([2])),
    )
    y = net.node("MatMul", scores, keys)
    net.output(rows)
    merged = net.node("Transpose", y, perm=[0, 2, 1, 3])
    flat = net.node("Reshape", merged, packed(net, size(net, merged, 0), size(net, merged, 1), 8))
    runs = [{"x": floats(2, 3, 8), "past": floats(2, 2, p, 4)} for p in (1, 5)]
    stated = checked(finished(net, flat), *runs)
    assert stated[scores] == ("b", 2, "new", stated[keys][2])  # type: ignore[index]
    assert str(stated[keys][2]).startswith("unk__")  # type: ignore[index]
    assert stated["y"] == ("b", "new", 8)


def test_what_is_multiplied_by_a_weight_has_its_length() -> None:
    """Nothing says how long the last axis is, but a MatMul does, and that helps what lies before it."""
    net = Net(opset=11)
    x = net.input(["b", "t", None])
    y = net.node("Reshape", net.node("Relu", x), packed(net, -1, size(net, x, -1)))
    z = net.node("MatMul", y, net.weight(8, 3))
    stated = checked(finished(net, z), {"x": floats(2, 3, 8)})
    assert stated["x"] == ("b", "t", 8)
    assert stated[y] == ("b*t", 8)


def test_branches_of_one_image_are_as_large() -> None:
    """Nobody knows how long half of h is, but both branches have it."""
    net = Net(opset=11)
    x = net.input(["n", 3, "h", "w"])
    branches = [
        net.conv(x, 3, 4, k, k, strides=[2, 2], pads=[p] * 4, kernel_shape=[k, k]) for k, p in ((3, 1), (1, 0))
    ]
    y = net.node("Add", *branches)
    stated = checked(finished(net, y), {"x": floats(1, 3, 8, 6)}, {"x": floats(2, 3, 7, 9)})
    assert stated["y"] == stated[branches[0]] == stated[branches[1]]
    assert None not in stated["y"]


def test_inputs_stay_as_the_model_describes_them() -> None:
    net = Net(opset=11)
    x = net.input([None, "?", 4])
    stated = checked(
        finished(net, net.node("Reshape", x, packed(net, size(net, x, 1), -1, 4))), {"x": floats(2, 3, 4)}
    )
    assert stated["x"] == (None, "?", 4)


def test_a_question_mark_is_no_name() -> None:
    """MXNet and Paddle write one for every length they do not know; these two are different ones."""
    net = Net(opset=11)
    x = net.input(["?", "?"])
    y = net.node("Add", x, net.node("Transpose", x, perm=[1, 0]))
    model = finished(net, net.node("Reshape", y, packed(net, size(net, y, 0), size(net, y, 1), 1)))
    stated = checked(model, {"x": floats(1, 4)})
    assert stated["y"] is not None
    assert len({*stated["y"]}) == 3


@pytest.mark.parametrize(("first", "second"), [((1, 4), (3, 4)), ((3, 4), (1, 4)), ((3, 4), (3, 4))])
def test_two_symbols_that_are_broadcast_are_neither(first: Lengths, second: Lengths) -> None:
    net = Net()
    a, b = net.input(["a", 4], "a"), net.input(["b", 4], "b")
    sum_ = net.node(
        "Add", net.node("Reshape", a, net.node("Shape", a)), net.node("Reshape", b, net.node("Shape", b))
    )
    stated = checked(finished(net, sum_), {"a": floats(*first), "b": floats(*second)})
    assert stated["y"] is not None
    assert stated["y"][0] not in ("a", "b", None)


# ---- operators one by one ---------------------------------------------------------------------

_Build = Callable[[Net, str], Any]

#: Each reads x: (b, s, 12), whose shape onnx has lost, at opset 17.
OPS: dict[str, tuple[_Build, Shape | None]] = {
    "flatten": (lambda net, x: net.node("Flatten", x, axis=2), ("b*s", 12)),
    "flatten_from_the_end": (lambda net, x: net.node("Flatten", x, axis=-2), ("b", "12*s")),
    "squeeze": (
        lambda net, x: net.node("Squeeze", net.node("Unsqueeze", x, ints(net, 1, -1)), ints(net, -1)),
        ("b", 1, "s", 12),
    ),
    "slice_to_the_end": (
        lambda net, x: net.node("Slice", x, *(ints(net, n) for n in (0, 2**40, 1))),
        ("b", "s", 12),
    ),
    "slice_backwards": (
        lambda net, x: net.node("Slice", x, *(ints(net, n) for n in (-1, -(2**40), 1, -1))),
        ("b", "s", 12),
    ),
    "slice_of_numbers": (
        lambda net, x: net.node("Slice", x, *(ints(net, n) for n in (-5, -1, 2, 2))),
        ("b", "s", 2),
    ),
    "gather": (lambda net, x: net.node("Gather", x, ints(net, 1, 0), axis=2), ("b", "s", 2)),
    "gather_elements": (
        lambda net, x: net.node("GatherElements", x, net.node("ArgMax", x, axis=-1), axis=-1),
        ("b", "s", 1),
    ),
    "gather_nd": (lambda net, x: net.node("GatherND", x, net.constant(np.array([[0, 1], [0, 0]]))), (2, 12)),
    "reduce_all": (lambda net, x: net.node("ReduceMean", x, keepdims=0), ()),
    "reduce_one": (lambda net, x: net.node("ReduceMax", x, axes=[-2], keepdims=0), ("b", 12)),
    "reduce_operand": (lambda net, x: net.node("ReduceSum", x, ints(net, 1)), ("b", 1, 12)),
    "arg_max": (lambda net, x: real(net, net.node("ArgMax", x, axis=1, keepdims=0)), ("b", 12)),
    "top_k": (lambda net, x: net.node("TopK", x, ints(net, 5), outputs=2)[0], ("b", "s", 5)),
    "split": (lambda net, x: net.node("Split", x, ints(net, 2, 10), axis=-1, outputs=2)[1], ("b", "s", 10)),
    "split_equally": (lambda net, x: net.node("Split", x, axis=2, outputs=3)[2], ("b", "s", 4)),
    "concat": (lambda net, x: net.node("Concat", x, x, axis=1), ("b", "2*s", 12)),
    "tile": (lambda net, x: net.node("Tile", x, ints(net, 1, 3, 2)), ("b", "3*s", 24)),
    "pad": (lambda net, x: net.node("Pad", x, ints(net, 0, 0, 2, 0, 0, -1)), ("b", "s", 13)),
    "expand": (lambda net, x: net.node("Expand", x, ints(net, 2, 1, 1, 1)), (2, "b", "s", 12)),
    "where": (
        lambda net, x: net.node(
            "Where", net.node("Less", x, net.constant(np.zeros((3, 1, 1, 12), np.float32))), x, x
        ),
        (3, "b", "s", 12),
    ),
    "matmul_with_a_vector": (lambda net, x: net.node("MatMul", x, net.weight(12)), ("b", "s")),
    "matmul_of_batches": (
        lambda net, x: net.node("MatMul", x, net.node("Transpose", x, perm=[0, 2, 1])),
        ("b", "s", "s"),
    ),
    "gemm": (
        lambda net, x: net.node("Gemm", net.node("Flatten", x, axis=2), net.weight(5, 12), transB=1),
        ("b*s", 5),
    ),
    "einsum": (lambda net, x: net.node("Einsum", x, net.weight(12, 4), equation="bsd,dk->bks"), ("b", 4, "s")),
    "conv": (
        lambda net, x: net.conv(net.node("Transpose", x, perm=[0, 2, 1]), 12, 6, 3, pads=[1, 1]),
        ("b", 6, "s"),
    ),
    "average_pool": (lambda net, x: net.node("AveragePool", x, kernel_shape=[3], strides=[2]), ("b", "s", 5)),
    "max_pool_padded": (
        lambda net, x: net.node("MaxPool", x, kernel_shape=[2], strides=[2], auto_pad="SAME_UPPER"),
        ("b", "s", 6),
    ),
    "global_pool": (lambda net, x: net.node("GlobalMaxPool", x), ("b", "s", 1)),
    "resize": (
        lambda net, x: net.node("Resize", x, "", net.constant(np.array([1, 1, 2], np.float32)), mode="nearest"),
        ("b", "s", 24),
    ),
    "gru": (
        lambda net, x: net.node(
            "GRU", x, net.weight(2, 9, 12), net.weight(2, 9, 3), hidden_size=3, direction="bidirectional"
        ),
        ("b", 2, "s", 3),
    ),
    "norm": (lambda net, x: net.node("LayerNormalization", x, net.weight(12), net.weight(12)), ("b", "s", 12)),
    "one_hot": (
        lambda net, x: real(
            net,
            net.node("OneHot", net.node("ArgMax", x, axis=2, keepdims=0), ints(net, 7), ints(net, 0, 1)),
        ),
        ("b", "s", 7),
    ),
    "size": (
        lambda net, x: net.node("ConstantOfShape", net.node("Unsqueeze", net.node("Size", x), ints(net, 0))),
        ("12*b*s",),
    ),
    "numel": (
        lambda net, x: net.node("ConstantOfShape", net.node("ReduceProd", net.node("Shape", x))),
        ("12*b*s",),
    ),
    "space_to_depth": (
        lambda net, x: net.node(
            "SpaceToDepth", net.node("Unsqueeze", net.node("Concat", x, x, axis=1), ints(net, 0)), blocksize=2
        ),
        (1, "4*b", "s", 6),
    ),
    "split_a_shape": (
        lambda net, x: net.node(
            "ConstantOfShape", net.node("Split", net.node("Shape", x), ints(net, 1, 2), outputs=2)[1]
        ),
        ("s", 12),
    ),
    "shape_from_the_end": (
        lambda net, x: net.node("ConstantOfShape", net.node("Shape", x, start=-2)),
        ("s", 12),
    ),
    "max_of_a_length_and_0": (
        lambda net, x: net.node("ConstantOfShape", net.node("Max", net.node("Shape", x), ints(net, 0, 0, 4))),
        ("b", "s", 12),
    ),
}


def real(net: Net, x: str) -> str:
    return str(net.node("Cast", x, to=onnx.TensorProto.FLOAT))


def ints(net: Net, *numbers: int) -> str:
    return net.constant(np.array(numbers, np.int64))


def hidden(net: Net) -> str:
    """x: (b, s, 12) behind a Reshape that onnx cannot see through."""
    x = net.input(["b", "s", 12])
    pieces = net.node("Split", net.node("Shape", x), ints(net, 1, 1, 1), outputs=3)
    return str(net.node("Reshape", x, net.node("Concat", *pieces, axis=0)))


def test_rules_are_of_kinds_or_of_operators_without_a_row() -> None:
    """An operator that gets a row in `ops.TABLE` has other slots from then on."""
    for name in {*RULES, *VALUED}:
        domain, _, op_type = name.rpartition(".")
        assert name in ROWS or find_spelling(domain, op_type, 99) is None, name


@pytest.mark.parametrize("case", OPS)
def test_operator(case: str) -> None:
    build, wanted = OPS[case]
    net = Net()
    model = finished(net, build(net, hidden(net)))
    stated = checked(model, {"x": floats(2, 4, 12)}, {"x": floats(4, 6, 12)})
    assert stated["y"] == wanted


#: What cannot be known is not stated, though how many axes there are may be.
UNKNOWN: dict[str, tuple[_Build, int | None]] = {
    "slice_by_a_symbol": (
        lambda net, x: net.node("Slice", x, ints(net, 0), ints(net, 1), ints(net, 1)),
        3,
    ),
    "cut_from_the_front": (lambda net, x: net.node("Slice", x, *(ints(net, n) for n in (1, 2**40, 1))), 3),
    "reduced_over_computed_axes": (
        lambda net, x: net.node("ReduceSum", x, net.input([1], "axes", np.int64)),
        3,
    ),
    "squeezed_wherever_it_is_1": (
        lambda net, x: net.node("Squeeze", net.node("Unsqueeze", x, ints(net, 0))),
        None,
    ),
    "shape_as_an_input": (lambda net, x: net.node("Reshape", x, net.input([2], "axes", np.int64)), 2),
    "as_many_axes_as_the_caller_likes": (
        lambda net, x: net.node("Reshape", x, net.input(["n"], "axes", np.int64)),
        None,
    ),
    "overridable_shape": (lambda net, x: net.node("Reshape", x, overridable(net, [4, -1])), 2),
    "half_of_a_symbol": (
        lambda net, x: net.node("ConstantOfShape", net.node("Div", net.node("Shape", x, end=1), ints(net, 2))),
        1,
    ),
    "a_symbol_and_1": (
        lambda net, x: net.node("ConstantOfShape", net.node("Add", net.node("Shape", x, end=1), ints(net, 1))),
        1,
    ),
}


def overridable(net: Net, numbers: Sequence[int]) -> str:
    """Stored, and also an input: the caller may pass others."""
    name = ints(net, *numbers)
    return net.input([len(numbers)], name, np.int64)


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_unknown_stays_unknown(case: str) -> None:
    build, rank = UNKNOWN[case]
    net = Net()
    y = build(net, hidden(net))
    shape = main_shapes(read_proto(finished(net, y)).graph)[y]
    if rank is None:
        assert shape is None
    else:
        assert shape is not None
        assert len(shape) == rank
        assert any(n is None or str(n).startswith("unk__") for n in shape)


# ---- models that are wrong --------------------------------------------------------------------

WRONG: dict[str, _Build] = {
    "reshape_of_too_few": lambda net, x: net.node(
        "Reshape",
        net.node("Slice", x, ints(net, 0), ints(net, 5), ints(net, 2)),
        net.node("Concat", ints(net, 7, 0, 9), axis=0),
    ),
    "two_minus_ones": lambda net, x: net.node("Reshape", x, net.node("Neg", ints(net, 1, 1))),
    "a_length_of_minus_2": lambda net, x: net.node("Reshape", x, net.node("Neg", ints(net, 2, 1))),
    "0_beyond_the_rank": lambda net, x: net.node("Reshape", x, ints(net, 0, 0, 0, 0, -1)),
    "ranks_of_a_concat": lambda net, x: net.node("Concat", x, net.node("Flatten", x), axis=2),
    "axis_of_a_concat": lambda net, x: net.node("Concat", x, x, axis=5),
    "no_order_of_axes": lambda net, x: net.node("Transpose", x, perm=[0, 0, 1]),
    "order_of_another_rank": lambda net, x: net.node("Transpose", x, perm=[0, 1]),
    "no_such_axis": lambda net, x: net.node("Squeeze", x, ints(net, 9)),
    "unsqueeze_beyond": lambda net, x: net.node("Unsqueeze", x, ints(net, 9)),
    "step_0": lambda net, x: net.node("Slice", x, *(ints(net, n) for n in (0, 5, 2, 0))),
    "bounds_that_do_not_fit": lambda net, x: net.node("Slice", x, ints(net, 0, 1), ints(net, 5), ints(net, 2)),
    "range_of_step_0": lambda net, x: net.node("Range", *(net.constant(np.int64(n)) for n in (0, 5, 0))),
    "matmul_that_does_not_fit": lambda net, x: net.node("MatMul", x, net.weight(7, 3)),
    "matmul_with_a_scalar": lambda net, x: net.node("MatMul", x, net.constant(np.float32(1))),
    "gemm_of_three_axes": lambda net, x: net.node("Gemm", x, net.weight(12, 3)),
    "sum_that_does_not_fit": lambda net, x: net.node("Add", x, net.weight(5)),
    "split_into_nothing": lambda net, x: net.node("Split", x, ints(net), axis=9, outputs=2)[0],
    "split_into_too_few": lambda net, x: net.node("Split", x, ints(net, 12), axis=2, outputs=2)[1],
    "tile_of_another_rank": lambda net, x: net.node("Tile", x, ints(net, 2)),
    "pads_of_another_rank": lambda net, x: net.node("Pad", x, ints(net, 1, 1)),
    "einsum_of_another_rank": lambda net, x: net.node("Einsum", x, equation="ab->ba"),
    "a_letter_from_nowhere": lambda net, x: net.node("Einsum", x, equation="abc->z"),
    "divided_by_0": lambda net, x: net.node(
        "ConstantOfShape", net.node("Div", net.node("Shape", x), ints(net, 0))
    ),
    "looked_up_beyond": lambda net, x: net.node(
        "ConstantOfShape", net.node("Gather", net.node("Shape", x), ints(net, 9))
    ),
    "no_operands": lambda net, x: net.node("Concat", axis=0),
    "no_operand": lambda net, x: net.node("MatMul", x),
    "no_kernel": lambda net, x: net.node("MaxPool", x),
    "strides_of_another_rank": lambda net, x: net.node("MaxPool", x, kernel_shape=[2, 2, 2], strides=[1]),
    "stride_0": lambda net, x: net.node("MaxPool", x, kernel_shape=[2], strides=[0]),
    "dtype_of_an_attribute": lambda net, x: net.node("Transpose", x, perm="no"),
    "huge": lambda net, x: net.node("ConstantOfShape", ints(net, 2**62, 2**62)),
    "negative": lambda net, x: net.node("ConstantOfShape", ints(net, -3)),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_read_all_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnx's own inference may refuse the whole model; what lies before the wrong op has its shape still."""
    net = Net()
    x = hidden(net)
    y = WRONG[case](net, x)
    model = finished(net, y)
    try:
        stated = main_shapes(read_proto(model).graph)
    except UnreadableModel:
        return
    monkeypatch.setattr("normtool.formats.onnx.read.fill_in", lambda graph, ops: None)
    by_onnx = main_shapes(read_proto(model).graph)
    assert stated[x] == ("b", "s", 12)
    assert stated[y] is None or by_onnx[y] is not None or case in RANKED, stated[y]


#: How many axes there would be is plain all the same.
RANKED = ("two_minus_ones", "huge", "negative", "divided_by_0", "looked_up_beyond", "range_of_step_0")


# ---- bodies and functions ---------------------------------------------------------------------


def split_heads() -> Net:
    """x ↦ view(*x.size()[:-1], 2, -1)"""
    inner = Net()
    x = inner.input(None)
    shape = inner.node("Concat", inner.node("Shape", x, end=-1), ints(inner, 2, -1), axis=0)
    inner.output(inner.node("Relu", inner.node("Reshape", x, shape, outputs=["apart"])))
    return inner


def of_function(graph: ModelGraph, name: str) -> Tensor:
    return next(t for t in graph.tensors if t.scope == Scope(("local:heads",), True) and t.name == name)


def calls(*inputs: Sequence[int | str | None]) -> tuple[Net, list[str]]:
    net = Net()
    net.define("heads", split_heads())
    names = [net.input(shape, f"x{i}") for i, shape in enumerate(inputs)]
    return net, [str(net.node("heads", name, domain="local")) for name in names]


def test_a_function_called_once_has_the_shapes_of_its_call() -> None:
    net, (y,) = calls(["b", "t", 8])
    model = finished(net, y)
    graph = read_proto(model).graph
    assert of_function(graph, "x").shape == ("b", "t", 8)
    assert of_function(graph, "apart").shape == ("b", "t", 2, 4)
    assert checked(model, {"x0": floats(2, 3, 8)})["y"] == ("b", "t", 2, 4)


def test_a_function_has_what_all_its_calls_agree_on() -> None:
    net, outputs = calls(["b", "t", 8], ["b", "u", 8])
    graph = read_proto(finished(net, net.node("Concat", *outputs, axis=1))).graph
    shape = of_function(graph, "apart").shape
    assert shape is not None
    assert (shape[0], shape[2:]) == ("b", (2, 4))
    assert shape[1] not in ("t", "u")


def test_a_function_whose_calls_disagree_knows_nothing() -> None:
    net, outputs = calls(["b", "t", 8], ["b", 8])
    graph = read_proto(finished(net, net.node("Add", *outputs))).graph
    assert of_function(graph, "x").shape is None
    assert of_function(graph, "apart").shape is None


def test_a_function_that_is_never_called_is_read() -> None:
    net, _ = calls()
    graph = read_proto(finished(net, net.input([2, 3]))).graph
    assert of_function(graph, "apart").shape is None


def test_overloads_are_not_taken_for_each_other() -> None:
    """An op does not say which it calls."""
    net, (y,) = calls(["b", "t", 8])
    model = finished(net, y)
    other = model.functions.add()
    other.CopyFrom(model.functions[0])
    other.overload = "2"
    assert of_function(read_proto(model).graph, "apart").shape is None


def test_names_of_lengths_in_a_function_are_its_own() -> None:
    """`b` in the function's own value_info is not the model's."""
    net, (y,) = calls(["b", "t", 8])
    model = finished(net, y)
    inner = model.functions[0]
    inner.value_info.append(helper.make_tensor_value_info("apart", onnx.TensorProto.FLOAT, ["t", "b", 2, None]))
    graph = read_proto(model).graph
    assert of_function(graph, "apart").shape == ("t", "b", 2, 4)
    last = of_function(graph, model.functions[0].output[0]).shape
    assert last == ("t", "b", 2, 4)
    assert of_function(graph, "x").shape is not None
    assert of_function(graph, "x").shape[:2] != ("b", "t")  # type: ignore[index]


def test_what_the_caller_states_is_unknown_in_a_function() -> None:
    """Of Transpose(perm = @order) neither the shape is known nor what it makes of a constant."""
    net = Net()
    x = net.input([2, 3])
    inner = onnx.FunctionProto(domain="local", name="turn", input=["x"], output=["y"], attribute=["order"])
    inner.opset_import.append(helper.make_opsetid("", 17))
    constant = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", 1, [2, 3], range(6)))
    turns = [helper.make_node("Transpose", [name], [f"{name}t"], name=name) for name in "xc"]
    for turn in turns:
        turn.attribute.add(name="perm", ref_attr_name="order", type=onnx.AttributeProto.INTS)
    inner.node.extend([constant, *turns, helper.make_node("Add", ["xt", "ct"], ["y"])])
    net.functions.append(inner)
    net.domains["local"] = 1
    graph = read_proto(finished(net, net.node("turn", x, domain="local", order=[0, 1]))).graph
    turned = {t.name: t for t in graph.tensors if t.scope.function}
    assert turned["xt"].shape is None
    assert isinstance(Constants(graph).value(turned["ct"]), Reason)


def branch(prefix: str, build: Callable[[Net], str]) -> onnx.GraphProto:
    body = Net(prefix=prefix)
    body.output(build(body))
    return body.graph()


def if_model(then: Callable[[Net], str], otherwise: Callable[[Net], str]) -> tuple[onnx.ModelProto, str]:
    net = Net()
    hidden(net)
    condition = net.input([], "condition", np.bool_)
    y = net.node("If", condition, then_branch=branch("a", then), else_branch=branch("b", otherwise))
    return finished(net, y), y


def test_an_if_has_what_both_branches_have() -> None:
    flat = lambda body: body.node("Reshape", "x", body.node("Shape", "x"))  # noqa: E731
    model, y = if_model(flat, lambda body: body.node("Relu", flat(body)))
    runs: list[Feeds] = [{"x": floats(2, 3, 12), "condition": np.array(c)} for c in (True, False)]
    assert checked(model, *runs)[y] == ("b", "s", 12)


def test_an_if_of_different_ranks_has_none() -> None:
    model, y = if_model(
        lambda body: body.node("Reshape", "x", body.node("Shape", "x")), lambda body: body.node("Flatten", "x")
    )
    runs: list[Feeds] = [{"x": floats(2, 3, 12), "condition": np.array(c)} for c in (True, False)]
    assert checked(model, *runs)[y] is None


def test_what_a_branch_does_says_nothing_about_the_model() -> None:
    """x has eight columns if the branch is taken, and any number if it is not."""
    net = Net()
    x, condition = net.input(["b", None]), net.input([], "condition", np.bool_)
    y = net.node("Reshape", x, net.node("Shape", x))
    weight = net.weight(8, 8)
    taken = branch("a", lambda body: body.node("MatMul", y, weight))
    z = net.node("If", condition, then_branch=taken, else_branch=branch("b", lambda body: body.node("Relu", y)))
    runs: list[Feeds] = [
        {"x": floats(2, 8), "condition": np.array(True)},
        {"x": floats(2, 5), "condition": np.array(False)},
    ]
    stated = checked(finished(net, z), *runs)
    assert stated["x"] == ("b", None)


# ---- chance -----------------------------------------------------------------------------------


class Chain:
    """Random ops on x: (a, b, 4), each valid for both sizes, with shapes computed as the model runs."""

    def __init__(self, draw: st.DataObject) -> None:
        self.draw, self.net = draw.draw, Net()
        self.x = self.net.input(["a", "b", 4])
        self.lengths = [(2, 5), (3, 7), (4, 4)]

    def axis(self) -> int:
        return self.draw(st.integers(0, len(self.lengths) - 1))

    def length(self, axis: int) -> str:
        return str(self.net.node("Gather", self.net.node("Shape", self.x), ints(self.net, axis)))

    def transpose(self) -> None:
        order = self.draw(st.permutations(range(len(self.lengths))))
        self.x = self.net.node("Transpose", self.x, perm=order)
        self.lengths = [self.lengths[axis] for axis in order]

    def merge(self) -> None:
        axis = self.axis()
        if axis + 1 == len(self.lengths):
            return
        parts = [self.length(i) for i in range(len(self.lengths))]
        both = self.net.node("Mul", parts[axis], parts[axis + 1])
        parts[axis : axis + 2] = [ints(self.net, -1) if self.draw(st.booleans()) else both]
        self.x = self.net.node("Reshape", self.x, self.net.node("Concat", *parts, axis=0))
        (p, q), (r, s) = self.lengths[axis : axis + 2]
        self.lengths[axis : axis + 2] = [(p * r, q * s)]

    def divide(self) -> None:
        axis = self.axis()
        p, q = self.lengths[axis]
        if p % 2 or q % 2 or len(self.lengths) > 5:
            return
        parts = [self.length(i) for i in range(len(self.lengths))]
        half = self.net.node("Div", parts[axis], ints(self.net, 2))
        parts[axis : axis + 1] = [ints(self.net, 2), ints(self.net, -1) if self.draw(st.booleans()) else half]
        self.x = self.net.node("Reshape", self.x, self.net.node("Concat", *parts, axis=0))
        self.lengths[axis : axis + 1] = [(2, 2), (p // 2, q // 2)]

    def concat(self) -> None:
        axis = self.axis()
        self.x = self.net.node("Concat", self.x, self.net.node("Relu", self.x), axis=axis)
        self.lengths[axis] = (2 * self.lengths[axis][0], 2 * self.lengths[axis][1])

    def cut(self) -> None:
        axis, start = self.axis(), self.draw(st.integers(-2, 1))
        p, q = (len(range(n)[start:]) for n in self.lengths[axis])
        if p and q:
            self.x = self.net.node("Slice", self.x, *(ints(self.net, n) for n in (start, 2**40, axis)))
            self.lengths[axis] = (p, q)

    def unsqueeze(self) -> None:
        if len(self.lengths) < 6:
            axis = self.axis()
            self.x = self.net.node("Unsqueeze", self.x, ints(self.net, axis))
            self.lengths.insert(axis, (1, 1))

    def reduce(self) -> None:
        axis = self.axis()
        mean = self.net.node("ReduceMean", self.x, axes=[axis])
        if self.draw(st.booleans()):
            self.x = self.net.node("Sub", self.x, mean)
        else:
            self.x, self.lengths[axis] = mean, (1, 1)

    def spread(self) -> None:
        target = self.net.node("Concat", ints(self.net, 2), self.net.node("Shape", self.x), axis=0)
        if len(self.lengths) < 6:
            self.x = self.net.node("Expand", self.x, target)
            self.lengths.insert(0, (2, 2))

    def project(self) -> None:
        p, q = self.lengths[-1]
        if p == q and len(self.lengths) > 1:
            self.x = self.net.node("MatMul", self.x, self.net.weight(p, 3))
            self.lengths[-1] = (3, 3)

    def flatten(self) -> None:
        axis = self.axis()
        self.x = self.net.node("Flatten", self.x, axis=axis)
        heads, tails = [self.lengths[:axis], self.lengths[axis:]]
        self.lengths = [(_times(n[0] for n in part), _times(n[1] for n in part)) for part in (heads, tails)]

    def step(self) -> None:
        moves = [self.transpose, self.merge, self.divide, self.concat, self.cut, self.unsqueeze]
        moves += [self.reduce, self.spread, self.project, self.flatten]
        if max(_times(n[i] for n in self.lengths) for i in (0, 1)) < 1 << 14:
            self.draw(st.sampled_from(moves))()


def _times(numbers: Iterable[int]) -> int:
    return int(np.prod(list(numbers), dtype=np.int64))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_chance(draw: st.DataObject) -> None:
    chain = Chain(draw)
    for _ in range(draw.draw(st.integers(1, 10))):
        chain.step()
    model = finished(chain.net, chain.x)
    stated = checked(model, {"x": floats(2, 3, 4)}, {"x": floats(5, 7, 4)})
    assert stated["y"] is not None
    assert len(stated["y"]) == len(chain.lengths)
    fixed = [n for n in stated["y"] if isinstance(n, int)]
    assert len(fixed) <= sum(p == q for p, q in chain.lengths)


# ---- arithmetic -------------------------------------------------------------------------------

S, T = Product(1, ("s",)), Product(1, ("t",))


@pytest.mark.parametrize(
    ("function", "operands", "expected"),
    [
        (elements.add, (S, 0), S),
        (elements.add, (S, S), Product(2, ("s",))),
        (elements.add, (S, T), None),
        (elements.add, (S, 1), None),
        (elements.add, (Fraction(1, 2), Fraction(1, 2)), 1),
        (elements.add, (Fraction(1, 3), Fraction(2, 3)), None),
        (elements.subtract, (S, S), 0),
        (elements.subtract, (Product(3, ("s",)), S), Product(2, ("s",))),
        (elements.subtract, (S, Product(3, ("s",))), None),
        (elements.subtract, (0, S), None),
        (elements.multiply, (S, 12), Product(12, ("s",))),
        (elements.multiply, (S, T), Product(1, ("s", "t"))),
        (elements.multiply, (S, -1), None),
        (elements.multiply, (S, 0), 0),
        (elements.multiply, (Product(12, ("s",)), Fraction(1, 4)), Product(3, ("s",))),
        (elements.multiply, (S, Fraction(1, 2)), None),
        (elements.multiply, (10, Fraction(float(np.float32(0.7)))), None),
        (elements.multiply, (7, Fraction(1, 2)), Fraction(7, 2)),
        (elements.divide, (Product(12, ("s",)), 12), S),
        (elements.divide, (Product(12, ("s", "t")), Product(4, ("t",))), Product(3, ("s",))),
        (elements.divide, (S, 2), None),
        (elements.divide, (7, 2), Fraction(7, 2)),
        (elements.divide, (7, 0), None),
        (elements.divide, (1 << 22, 3), None),
        (elements.divide_integers, (-7, 2), -3),
        (elements.divide_integers, (7, 0), None),
        (elements.divide_exactly, (7, 2), None),
        (elements.divide_exactly, (8, 2), 4),
        (elements.remainder, (Product(12, ("s",)), 4), 0),
        (elements.remainder, (S, 2), None),
        (elements.remainder, (-7, 2), None),
        (elements.round_down, (Fraction(-7, 2),), -4),
        (elements.round_up, (Fraction(7, 2),), 4),
        (elements.equal, (S, -1), False),
        (elements.equal, (S, 1), None),
        (elements.equal, (S, T), None),
        (elements.equal, (S, S), True),
        (elements.choose, (None, S, T), None),
        (elements.choose, (None, S, S), S),
        (elements.choose, (True, S, T), S),
        (elements.larger, (S, 0), S),
        (elements.larger, (S, 1), None),
        (elements.smaller, (S, 1), None),
        (elements.negate, (S,), None),
    ],
)
def test_arithmetic(
    function: Callable[..., elements.Element],
    operands: tuple[elements.Element, ...],
    expected: elements.Element,
) -> None:
    assert function(*operands) == expected


@pytest.mark.parametrize(
    ("element", "dtype", "expected"),
    [
        (300, np.uint8, None),
        (300, np.int32, 300),
        (1 << 40, np.int32, None),
        ((1 << 24) + 1, np.float32, None),
        (5, np.float16, None),
        (S, np.float16, None),
        (S, np.int8, None),
        (S, np.int64, S),
        (Fraction(7, 2), np.int64, None),
        (Fraction(7, 2), np.float32, Fraction(7, 2)),
        (True, np.bool_, True),
    ],
)
def test_what_a_dtype_cannot_hold_is_unknown(
    element: elements.Element, dtype: Any, expected: elements.Element
) -> None:
    assert elements.fitted(elements.listed([element], (1,)), np.dtype(dtype))[0] == expected


def test_lengths() -> None:
    assert read("196*s77") == Product(196, ("s77",))
    assert written(read("b*12"), str) == "12*b"
    assert written(read("s0 + 1"), str) == "s0 + 1"
    assert written(times(read("s0 + 1"), 2), str) is None
    assert read("?") != read("?")
    assert read(None) != read(None)
    assert read("unk__3") == read("unk__3")
    assert over(product([S, T, 12]), times(T, 4)) == Product(3, ("s",))
    assert over(S, T) is None
    assert over(0, 0) is None
    assert plus(S, T) is None
    assert crossed_out(product([S, T, 4]), times(S, 8)) == (Product(4, ("t",)), 8)


@pytest.mark.parametrize(("a", "b", "expected"), [(S, 1, S), (1, S, S), (S, 4, 4), (4, 1, 4), (S, S, S)])
def test_broadcast(a: Any, b: Any, expected: Any) -> None:
    assert broadcast(a, b) == expected


def test_broadcast_of_different_lengths() -> None:
    assert broadcast(S, T) not in (S, T)
    assert broadcast(S, T) == broadcast(T, S)
    with pytest.raises(ValueError, match="cannot be broadcast"):
        broadcast(3, 4)


# ---- cost, and the corpus ---------------------------------------------------------------------


def test_a_model_with_every_shape_known_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_Pass", None)
    net = Net()
    read_proto(finished(net, net.node("Relu", net.input([2, "n", 3]))))


@pytest.mark.parametrize("length", [10, 1000])
def test_every_op_is_visited_once_or_twice(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    visits = []
    visit = shapes._Pass._visit
    monkeypatch.setattr(shapes._Pass, "_visit", lambda self, op: (visits.append(op), visit(self, op)))
    net = Net()
    x = hidden(net)
    for _ in range(length):
        x = net.node("Reshape", x, net.node("Shape", x))
    read_proto(finished(net, net.node("MatMul", x, net.weight(12, 3))))
    assert len(visits) <= 2 * (2 * length + 6)


#: Files that are broken by design, or ask for what no machine has.
_NOT_RUN = re.compile("malformed")


@pytest.mark.long
@pytest.mark.parametrize("entry", corpus_cases(lambda entry: not _NOT_RUN.search(entry["file"])))
def test_corpus(entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is deduced of a real model is what ONNX Runtime sees, for each of two inputs that run.

    A few files contradict themselves: they state shapes of outputs that nothing put out has.
    """
    path = CORPUS / str(entry["file"])
    try:
        opened = read_path(path)
        model = onnx.load(path)
    except (NormtoolError, OSError) as error:
        pytest.skip(f"cannot be read: {error}")
    if model.ByteSize() > 1 << 28:
        pytest.skip("it is large")
    stated, runs = main_shapes(opened.graph), 0
    monkeypatch.setattr("normtool.formats.onnx.read.fill_in", lambda graph, ops: None)
    by_file = main_shapes(read_path(path).graph)
    for specs in attempts(opened.graph, seed=0)[:6]:
        try:
            (seen,) = observed(model, {spec.name: generate(spec) for spec in specs})
        except Exception as error:  # ONNX Runtime raises what it likes
            refusal = str(error).splitlines()[0][:200]
            continue
        wrong = [line for line in contradictions(stated, seen) if line not in contradictions(by_file, seen)]
        assert wrong == []
        runs += 1
        if runs == 2:
            return
    if not runs:
        pytest.skip(f"ONNX Runtime runs it on no input that was tried: {refusal}")
