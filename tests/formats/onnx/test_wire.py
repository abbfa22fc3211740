"""The skeleton leaves large weights in the file and loses nothing else, whatever the file holds."""

import functools
import random
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from normtool.errors import UnreadableModel
from normtool.formats.onnx import wire
from normtool.formats.onnx.read import read_path
from normtool.formats.onnx.wire import STAYS_IN_FILE, delimited_header, varint
from normtool.formats.onnx.write import staged
from normtool.values import Dense, Value, to_array
from tests import zoo


def tensor(name: str, size: int) -> TensorProto:
    """`size` random bytes in raw_data."""
    rng = np.random.default_rng([size, *name.encode()])
    return numpy_helper.from_array(rng.integers(0, 256, size, np.uint8), name)


def body(name: str, size: int) -> onnx.GraphProto:
    """Holds one weight of `size` bytes in an initializer and one in a Constant node."""
    nodes = [
        helper.make_node("Constant", [], [f"{name}_c"], value=tensor("", size)),
        helper.make_node("Concat", [f"{name}_w", f"{name}_c"], [f"{name}_y"], axis=0),
    ]
    output = helper.make_tensor_value_info(f"{name}_y", TensorProto.UINT8, [None])
    return helper.make_graph(nodes, name, [], [output], [tensor(f"{name}_w", size)])


def model_with(initializers: list[int], constants: list[int], bodies: list[int]) -> onnx.ModelProto:
    """Weights of these many bytes in every place where a model can keep them."""
    net = zoo.Net(dtype=np.uint8)
    net.initializers += [tensor(f"w{i}", size) for i, size in enumerate(initializers)]
    constant_names = [net.node("Constant", value=tensor("", size)) for size in constants]
    condition = net.input([1], "condition", np.bool_)
    results = [
        net.node("If", condition, then_branch=body(f"t{i}", size), else_branch=body(f"e{i}", size))
        for i, size in enumerate(bodies)
    ]
    names = [f"w{i}" for i in range(len(initializers))] + constant_names + results
    net.output(net.node("Concat", *names, axis=0), [None])
    return net.model()


def inflated(content: bytes) -> bytes:
    """`content` taken apart and put together again."""

    def resolve(entries: dict[str, str]) -> Value:
        assert entries["location"] == wire.EMBEDDED
        start = int(entries["offset"])
        return Dense(np.frombuffer(content[start : start + int(entries["length"])], np.uint8))

    pieces = wire.inflate(wire.skeleton(memoryview(content)), resolve)
    written = b"".join(p if isinstance(p, bytes) else to_array(p).tobytes() for p in pieces)
    assert wire.size_of(pieces) == len(written)
    return written


#: Both sides of the limit, lengths whose varints grow by a byte (128, 16384), and nothing at all.
SIZES = st.one_of(
    st.integers(STAYS_IN_FILE - 2, STAYS_IN_FILE + 2),
    st.sampled_from([0, 1, 127, 128, 2 * STAYS_IN_FILE, 16383, 16384]),
    st.integers(0, 3 * STAYS_IN_FILE),
)


class TestRoundTrip:
    @given(st.lists(SIZES, min_size=1, max_size=4), st.lists(SIZES, max_size=3), st.lists(SIZES, max_size=2))
    @settings(deadline=None, max_examples=60)
    def test_every_weight_comes_back(self, initializers, constants, bodies):
        model = model_with(initializers, constants, bodies)
        content = model.SerializeToString()
        assert onnx.ModelProto.FromString(inflated(content)) == model

    @given(st.lists(SIZES, min_size=1, max_size=4), st.lists(SIZES, max_size=3))
    @settings(deadline=None, max_examples=40)
    def test_large_weights_stay_in_the_file(self, initializers, constants):
        content = model_with(initializers, constants, []).SerializeToString()
        small = onnx.ModelProto.FromString(wire.skeleton(memoryview(content)))
        stored = [*small.graph.initializer, *(n.attribute[0].t for n in small.graph.node if not n.input)]
        for kept, size in zip(stored, initializers + constants, strict=True):
            lazy = kept.data_location == TensorProto.EXTERNAL
            assert lazy == (size > STAYS_IN_FILE)
            assert len(kept.raw_data) == (0 if lazy else size)

    @pytest.mark.parametrize("size", [16, STAYS_IN_FILE + 1], ids=["small", "large"])
    def test_explicit_default_location(self, tmp_path, size):
        # onnx.load of a model with external data leaves the field set, so such files are common
        model = model_with([size], [], [])
        model.graph.initializer[0].data_location = TensorProto.DEFAULT
        assert onnx.ModelProto.FromString(saved_again(model.SerializeToString(), tmp_path)) == model

    @pytest.mark.parametrize("where", ["raw_data", "name", "tensor_doc", "node_doc", "graph_doc", "model_doc"])
    def test_our_own_marker_in_the_file(self, tmp_path, where):
        # \0normtool: is what the skeleton calls its own; a user's bytes may spell it by chance or on purpose
        text = wire.EMBEDDED
        model = model_with([STAYS_IN_FILE + 1], [8], [8])
        small = model.graph.initializer.add(name="small", data_type=TensorProto.UINT8, dims=[len(text)])
        small.raw_data = bytes(len(text))
        match where:
            case "raw_data":
                small.raw_data = text.encode()
            case "name":
                small.name = text
            case "tensor_doc":
                small.doc_string = text
            case "node_doc":
                model.graph.node[0].doc_string = text
            case "graph_doc":
                model.graph.doc_string = text
            case "model_doc":
                model.doc_string = text
        assert onnx.ModelProto.FromString(saved_again(model.SerializeToString(), tmp_path)) == model


def saved_again(content: bytes, folder: Path) -> bytes:
    """Read from a file and written to another one, with no edit in between."""
    source, target = folder / "source.onnx", folder / "target.onnx"
    source.write_bytes(content)
    with staged(read_path(source), target) as stage:
        stage.commit()
    return target.read_bytes()


class TestUnknownFields:
    """A newer onnx may have fields that the installed one does not know."""

    @pytest.mark.parametrize("size", [16, 3 * STAYS_IN_FILE], ids=["small", "large"])
    @pytest.mark.parametrize("place", ["model", "graph", "node", "attribute", "initializer", "constant"])
    def test_survives(self, tmp_path, place, size):
        secret = varint(900 << 3) + varint(5) + delimited_header(901, 9) + b"from 2040"
        content = encoded(size, {place: secret})
        onnx.ModelProto.FromString(content)  # still a model
        for written in (inflated(content), saved_again(content, tmp_path)):
            assert written.count(b"from 2040") == 1
            assert parsed_away(written) == parsed_away(content)


def encoded(size: int, extra: dict[str, bytes]) -> bytes:
    """A model put together by hand, with `extra` bytes at the end of one of its messages."""

    def field(number: int, content: bytes) -> bytes:
        return delimited_header(number, len(content)) + content

    def with_extra(place: str, content: bytes) -> bytes:
        return content + extra.get(place, b"")

    info = helper.make_tensor_value_info("y", TensorProto.UINT8, [2 * size]).SerializeToString()
    stored = with_extra("initializer", tensor("w", size).SerializeToString())
    value = field(1, b"value") + varint(20 << 3) + varint(onnx.AttributeProto.TENSOR)
    value += field(5, with_extra("constant", tensor("", size).SerializeToString()))
    constant = field(2, b"c") + field(4, b"Constant") + field(5, with_extra("attribute", value))
    concat = helper.make_node("Concat", ["w", "c"], ["y"], axis=0).SerializeToString()
    graph = field(1, with_extra("node", constant)) + field(1, concat) + field(2, b"g")
    graph += field(5, stored) + field(12, info)
    imports = helper.make_opsetid("", 17).SerializeToString()
    return with_extra(
        "model", varint(1 << 3) + varint(8) + field(7, with_extra("graph", graph)) + field(8, imports)
    )


def parsed_away(content: bytes) -> bytes:
    """The message as protobuf writes it, unknown fields included."""
    return onnx.ModelProto.FromString(content).SerializeToString(deterministic=True)


@functools.cache
def every_container() -> bytes:
    """A small model with every kind of container in it, and one weight that stays in the file."""
    net = zoo.Net()
    x = net.input([2, 3, "h", 8])
    y = net.batch_norm(net.conv(x, 3, 2, 10, 10, pads=[5, 5, 5, 5]), 2)
    y = net.node("Reshape", y, net.constant(np.array([2, -1])))
    condition = net.node("Constant", value=numpy_helper.from_array(np.array([True])))
    branches = []
    for prefix in ("then_", "else_"):
        branch = zoo.Net(prefix=prefix)
        branch.output(branch.node("Relu", y))
        branches.append(branch.graph())
    y = net.node("If", condition, then_branch=branches[0], else_branch=branches[1])
    function = zoo.Net()
    function.output(function.node("Relu", function.input(None, "a")))
    net.define("F", function)
    net.output(net.node("F", y, domain="local"), [2, None])
    return net.model().SerializeToString()


#: Bytes of the Conv weight in it; its middle looks the same everywhere.
WEIGHT = 2 * 3 * 10 * 10 * 4


class TestDamage:
    """Whatever the bytes: a model, or UnreadableModel. Never another exception."""

    def test_truncations(self, tmp_path):
        content = every_container()
        weight = content.index(varint(WEIGHT)) + 2
        ends = [n for n in range(len(content)) if not weight < n < weight + WEIGHT - 9 or n % 97 == 0]
        assert_survives(tmp_path, {f"first {n} bytes": content[:n] for n in ends})

    @pytest.mark.parametrize("seed", range(4))
    def test_flips(self, tmp_path, seed):
        content, rng = every_container(), random.Random(seed)
        weight = content.index(varint(WEIGHT)) + 2
        positions = [n for n in range(len(content)) if not weight < n < weight + WEIGHT]
        damaged = {}
        for _ in range(250):
            chosen = rng.sample(positions, rng.choice([1, 1, 1, 2, 4]))
            changes = {n: rng.choice([0, 0x7F, 0x80, 0xFF, content[n] ^ 1 << rng.randrange(8)]) for n in chosen}
            damaged[str(changes)] = bytes(changes.get(n, byte) for n, byte in enumerate(content))
        assert_survives(tmp_path, damaged)

    def test_the_undamaged_file_is_read(self, tmp_path):
        path = tmp_path / "whole.onnx"
        path.write_bytes(every_container())
        model = read_path(path)
        assert model.checked
        assert [op.kind for op in model.graph.ops][:3] == ["conv", "batch_norm", "reshape"]


def assert_survives(folder: Path, damaged: dict[str, bytes]) -> None:
    """Read every file; say for each kind of crash where it happened and one file that does it."""
    path, crashes, refused = folder / "damaged.onnx", dict[str, Any](), 0
    for what, content in damaged.items():
        path.write_bytes(content)
        try:
            read_path(path)
        except UnreadableModel:
            refused += 1
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            crashes.setdefault(f"{type(error).__name__} at {place.name}:{place.lineno}", what)
    assert not crashes
    assert refused > len(damaged) // 2  # else the damage was none
