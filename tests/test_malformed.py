"""Broken and hostile files: refused in one or two lines (exit 3), or read with a diagnostic. Never a crash."""

import json
import os
import random
import resource
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import SparseTensorProto, TensorProto, helper, numpy_helper

import normtool as api
from normtool.errors import UnreadableModel
from normtool.formats.onnx.wire import delimited_header, varint
from tests import zoo
from tests.conftest import CORPUS

#: Of each command; nothing here has more than a few hundred nodes.
SECONDS = 20

#: Address space of commands on files that ask for terabytes: ample for normtool, too little for them.
ROOM = 8 << 30

limit_memory = partial(resource.setrlimit, resource.RLIMIT_AS, (ROOM, ROOM))


def refused(done: "subprocess.CompletedProcess[str]", *words: str) -> None:
    assert done.returncode == 3, done.stderr
    assert 1 <= len(done.stderr.splitlines()) <= 2
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def unreadable(path: Path, *words: str) -> None:
    """The same in this process; the command line prints just this message."""
    with pytest.raises(UnreadableModel) as caught:
        api.scan(path)
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    assert "\x1b" not in message
    assert all(word in message for word in (str(path), *words)), message


# ---- files that other people broke ------------------------------------------------------------

#: File → what is wrong, in words of the message.
REFUSED = {
    "Polygraphy_tests_models_bad_graph_with_dup_value_info": "lists an input twice",
    "Polygraphy_tests_models_ext_weights": "'ext_weights.data', which is missing",
    "Polygraphy_tests_models_weightless.matmul.fp16": "'b' of shape [16, 8] and type float16 needs 256 bytes",
    "Polygraphy_tests_models_weightless.qdq_conv": "needs 4680 bytes but holds 0",
    "Polygraphy_tests_models_weightless.sparse.conv": "needs 4096 bytes but holds 0",
    "Polygraphy_tests_models_weightless.transpose_matmul": "needs 512 bytes but holds 0",
    "config-model_src_test_cfg_application_onnx_name_collision_models_foobar": "'bar', which nothing defines",
    "testdata_icm-31000000518082": "unknown data type, -100",
    "testdata_test_evil_weights": "'evil_weights'",
}

#: File → codes of the diagnostics, and whether ONNX Runtime runs it.
READ = {
    "Polygraphy_tests_models_bad_graph_with_parallel_invalid_nodes": ({"checker"}, False),
    "Polygraphy_tests_models_empty": (set(), False),  # no node, no output; the checker has nothing against it
    "Polygraphy_tests_models_inp_dim_val_not_set": ({"checker"}, True),
    "Polygraphy_tests_models_unsorted": ({"checker", "not_sorted"}, True),
    "resources_onnx_layer-zoo_batchnorm": ({"checker", "not_sorted"}, True),
    "test_models_onnx_add_abc_initializers": ({"shape_inference"}, False),
    "test_models_onnx_layer_norm_grad_op": ({"checker", "unrecognised_norm"}, False),
    "test_models_onnx_unsupported_op": ({"checker", "unknown_op"}, False),
    "testdata_multi_stream_models_issue_19480": ({"checker"}, False),
}

FOLDER = CORPUS / "g-malformed-dev"

needs_corpus = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no model corpus at {CORPUS}; set NORMTOOL_CORPUS"
)


@needs_corpus
class TestCorpus:
    def test_the_tables_name_every_file(self):
        assert {path.stem for path in FOLDER.glob("*.onnx")} == {*REFUSED, *READ}

    @pytest.mark.parametrize("name", REFUSED)
    def test_refused(self, normtool, name):
        path = FOLDER / f"{name}.onnx"
        refused(normtool("scan", path, timeout=SECONDS), str(path), REFUSED[name])

    @pytest.mark.parametrize("name", READ)
    def test_read(self, normtool, name):
        path = FOLDER / f"{name}.onnx"
        done = normtool("scan", path, "--format", "json", timeout=SECONDS)
        assert (done.returncode, done.stderr) == (0, "")
        diagnostics = api.scan(path).to_dict()["diagnostics"]
        assert {diagnostic["code"] for diagnostic in diagnostics} == READ[name][0]

    @pytest.mark.parametrize("name", [name for name, (_, runs) in READ.items() if not runs])
    def test_what_the_runtime_refuses(self, normtool, name):
        path = FOLDER / f"{name}.onnx"
        refused(normtool("validate", path, path, timeout=SECONDS), "ONNX Runtime", "reference")

    @pytest.mark.parametrize("name", [name for name, (_, runs) in READ.items() if runs])
    def test_what_the_runtime_accepts(self, normtool, name):
        path = FOLDER / f"{name}.onnx"
        done = normtool("validate", path, path, timeout=SECONDS)
        assert done.returncode in (0, 1), done.stderr  # 1: inconclusive, where no error of 1 % shows


# ---- no model at all --------------------------------------------------------------------------

NO_MODEL = {
    "empty": b"",
    "random": random.Random(0).randbytes(5000),
    "zeros": bytes(5000),
    "text": b"<html>404 Not Found</html>\n",
    "lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 12345\n",
    "no-graph": varint(8) + varint(9),
    "gigantic-length": b"\x3a" + varint(2**63 - 1) + b"graph",
    "length-beyond-64-bits": b"\x3a" + b"\xff" * 20,
    "endless-number": b"\x80" * 5000,
    "truncated": zoo.conv_bn().SerializeToString()[:-7],
    "field-zero": b"\x02\x01\x00",
}


class TestNoModel:
    @pytest.mark.parametrize("content", NO_MODEL.values(), ids=NO_MODEL)
    def test_content(self, tmp_path, content):
        path = tmp_path / "m.onnx"
        path.write_bytes(content)
        unreadable(path, "not an ONNX")

    def test_on_the_command_line(self, tmp_path, normtool):
        path = tmp_path / "m.onnx"
        path.touch()
        refused(normtool("scan", path, timeout=SECONDS), str(path), "not an ONNX")

    @pytest.mark.parametrize(
        ("kind", "says"),
        [
            ("missing", "No such file"),
            ("folder", "is a folder"),
            ("loop", "symbolic links"),
            ("dangling", "No such file"),
            ("below-a-file", "Not a directory"),
            ("name-too-long", "name too long"),
            ("fifo", "regular file"),
            ("device", "/dev/zero"),
        ],
    )
    def test_path(self, tmp_path, normtool, kind, says):
        path = tmp_path / "m.onnx"
        match kind:
            case "folder":
                path.mkdir()
            case "loop" | "dangling":
                path.symlink_to(path.name if kind == "loop" else "nowhere")
            case "below-a-file":
                (tmp_path / "file").touch()
                path = tmp_path / "file" / "m.onnx"
            case "name-too-long":
                path = tmp_path / ("x" * 300)
            case "fifo":
                os.mkfifo(path)  # without a writer, opening it waits for ever
            case "device":
                path = Path("/dev/zero")
        refused(normtool("scan", path, timeout=SECONDS), str(path), says)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads anything")
    def test_no_permission(self, tmp_path, normtool):
        path = tmp_path / "m.onnx"
        path.write_bytes(zoo.conv_bn().SerializeToString())
        path.chmod(0)
        refused(normtool("scan", path), str(path), "Permission denied")


# ---- models that contradict themselves --------------------------------------------------------


def relu(*, reads: str = "x", writes: str = "y") -> onnx.NodeProto:
    return helper.make_node("Relu", [reads], [writes], name="relu")


def one_relu() -> onnx.ModelProto:
    net = zoo.Net()
    net.output(net.node("Relu", net.input([1, 3, 4, 4]), outputs=["y"]), [1, 3, 4, 4])
    return net.model()


def with_tensor(**fields: object) -> onnx.ModelProto:
    model = one_relu()
    model.graph.initializer.append(TensorProto(**({"name": "w", "data_type": 1, "dims": [1]} | fields)))
    return model


def with_nodes(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    model = one_relu()
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def calling(*bodies: list[str]) -> onnx.ModelProto:
    """Function `F0` calls the functions named in `bodies[0]` one after the other, and so on."""
    net = zoo.Net()
    net.domains["local"] = 1
    opsets = [helper.make_opsetid("local", 1), helper.make_opsetid("", 17)]
    for number, body in enumerate(bodies):
        nodes = [
            helper.make_node(name, [f"t{i}"], [f"t{i + 1}"], domain="" if name == "Relu" else "local")
            for i, name in enumerate(body)
        ]
        result = f"t{len(body)}"
        net.functions.append(helper.make_function("local", f"F{number}", ["t0"], [result], nodes, opsets))
    net.output(net.node("F0", net.input([1, 3]), domain="local"), [1, 3])
    return net.model()


def twice(group: str) -> onnx.ModelProto:
    """Something is listed twice."""
    model = with_tensor(raw_data=bytes(4))
    repeated = getattr(model.graph, group)
    repeated.append(repeated[0])
    return model


CONTRADICTIONS = {
    "dtype": (with_tensor(data_type=-100), "unknown data type, -100"),
    "dtype-of-an-input": (one_relu(), "unknown data type, 99"),
    "negative-dimension": (with_tensor(dims=[-3, 2]), "negative dimension"),
    "terabytes-claimed": (
        with_tensor(dims=[2**40, 2**40]),
        "needs 1208925819614629174706176 numbers but holds 0",
    ),
    "bytes-short": (with_tensor(raw_data=bytes(3)), "needs 4 bytes but holds 3"),
    "numbers-short": (with_tensor(dims=[5], float_data=[1.0]), "needs 5 numbers but holds 1"),
    "undefined-input": (with_nodes(relu(reads="nothing")), "reads 'nothing', which nothing defines"),
    "undefined-output": (with_nodes(), "'y', which nothing defines"),
    "cycle": (with_nodes(relu(reads="z"), relu(reads="y", writes="z")), "cycle"),
    "reads-itself": (with_nodes(relu(reads="y")), "cycle"),
    "defined-twice": (with_nodes(relu(), relu()), "'y' is defined twice"),
    "writes-over-the-input": (with_nodes(relu(writes="x"), relu()), "'x' is defined twice"),
    "initializer-twice": (twice("initializer"), "two initializers are called 'w'"),
    "input-twice": (twice("input"), "lists an input twice"),
    "recursive-function": (calling(["F0"]), "recursive"),
    "mutually-recursive": (calling(["F1"], ["F2"], ["F0"]), "recursive"),
}
CONTRADICTIONS["dtype-of-an-input"][0].graph.input[0].type.tensor_type.elem_type = 99


class TestContradictions:
    @pytest.mark.parametrize("case", CONTRADICTIONS)
    def test_refused(self, tmp_path, case):
        model, says = CONTRADICTIONS[case]
        path = tmp_path / "m.onnx"
        path.write_bytes(model.SerializeToString())
        unreadable(path, says)

    @pytest.mark.parametrize("field", ["op_type", "domain", "node-name", "input", "location"])
    def test_text_that_is_no_utf8(self, tmp_path, field):
        model = one_relu()
        match field:
            case "op_type":
                model.graph.node[0].op_type = "QQQQ"
            case "domain":
                model.graph.node[0].domain = "QQQQ"
            case "node-name":
                model.graph.node[0].name = "QQQQ"
            case "input":
                model.graph.input[0].name = model.graph.node[0].input[0] = "QQQQ"
            case "location":
                model = with_tensor(data_location=1)
                model.graph.initializer[0].external_data.add(key="location", value="QQQQ")
        path = tmp_path / "m.onnx"
        path.write_bytes(model.SerializeToString().replace(b"QQQQ", b"\xff\xfeQQ"))
        unreadable(path)

    @pytest.mark.parametrize("axis", [2**63 - 1, 2**32 - 1, -(2**31)])
    def test_axis_that_onnx_crashes_on(self, tmp_path, normtool, axis):
        """onnx 1.23 dies of SIGSEGV when it infers the shapes of this one."""
        net = zoo.Net()
        x = net.input([2, 3, 4])
        y, _ = net.node("LayerNormalization", x, net.weight(4), outputs=["y", "mean"], axis=axis)
        net.output(y, [2, 3, 4])
        path = tmp_path / "m.onnx"
        path.write_bytes(net.model().SerializeToString())
        done = normtool("scan", path, timeout=SECONDS)
        assert done.returncode in (0, 3), done.stderr

    def test_functions_that_multiply(self, tmp_path, normtool):
        """60 functions, each calling the next twice: inlined, they are 2^60 nodes."""
        path = tmp_path / "m.onnx"
        path.write_bytes(calling(*[[f"F{i + 1}"] * 2 for i in range(60)], ["Relu"]).SerializeToString())
        assert normtool("scan", path, timeout=SECONDS).returncode in (0, 3)


# ---- depth ------------------------------------------------------------------------------------


def nested(depth: int) -> bytes:
    """`If` in `If` in `If`, encoded by hand: protobuf's own encoder stops at 31."""

    def field(number: int, content: bytes) -> bytes:
        return delimited_header(number, len(content)) + content

    def info(name: str, data_type: int) -> bytes:
        return helper.make_tensor_value_info(name, data_type, [1]).SerializeToString()

    def closing(output: str) -> bytes:
        return field(2, output.encode()) + field(12, info(output, TensorProto.FLOAT))

    kind = varint(20 << 3) + varint(onnx.AttributeProto.GRAPH)
    innermost = field(1, relu(writes="y").SerializeToString()) + closing("y")
    before, after, size = [], [innermost], len(innermost)  # bytes around what is already there
    for level in range(depth):
        other = field(1, relu(writes=f"e{level}").SerializeToString()) + closing(f"e{level}")
        node = field(1, b"c") + field(2, f"o{level}".encode()) + field(4, b"If")
        node += field(5, field(1, b"else_branch") + field(6, other) + kind)
        body = field(1, b"then_branch") + kind + delimited_header(6, size)
        attribute = delimited_header(5, len(body) + size) + body
        graph = delimited_header(1, len(node) + len(attribute) + size) + node + attribute
        before.append(graph)
        after.append(closing(f"o{level}"))
        size += len(before[-1]) + len(after[-1])
    content = b"".join([*reversed(before), *after])
    content += field(11, info("x", TensorProto.FLOAT)) + field(11, info("c", TensorProto.BOOL))
    opset = field(8, helper.make_opsetid("", 17).SerializeToString())
    return varint(8) + varint(8) + field(7, content) + opset


class TestDepth:
    def test_as_deep_as_protobuf_goes(self, tmp_path):
        # 100 messages in each other: model, graph, then node, attribute and graph for every If
        path = tmp_path / "m.onnx"
        path.write_bytes(nested(31))
        assert api.scan(path).to_dict()["norms"] == []

    @pytest.mark.parametrize("depth", [32, 60, 5000])
    def test_deeper(self, tmp_path, depth):
        # neither onnx.load nor ONNX Runtime opens these
        path = tmp_path / "m.onnx"
        path.write_bytes(nested(depth))
        unreadable(path)

    @pytest.mark.parametrize("where", ["weight", "activation"])
    def test_long_chain(self, where):
        net = zoo.Net()
        x, w = net.input([1, 3, 4, 4]), net.weight(4, 3, 1, 1)
        for _ in range(3000):
            if where == "weight":
                w = net.node("Identity", w)
            else:
                x = net.node("Identity", x)
        net.output(net.batch_norm(net.node("Conv", x, w), 4), [1, 4, 4, 4])
        (site,) = api.plan(net.model()).sites
        assert (site.verdict, bool(site.reasons)) == (
            ("kept", True) if where == "weight" else ("folded", False)
        )


# ---- models that ask for too much -------------------------------------------------------------


def with_weight(make, channels: int = 4, **attributes: object) -> onnx.ModelProto:
    """Conv → BatchNormalization whose Conv weight is what `make` adds to the net."""
    net = zoo.Net()
    y = net.node("Conv", net.input([1, None, None, None]), make(net), **attributes)
    net.output(net.batch_norm(y, channels), [None] * 4)
    return net.model()


def constant_of_shape(*shape: int):
    return lambda net: net.node("ConstantOfShape", net.constant(np.array(shape)))


def expanded(*shape: int):
    return lambda net: net.node("Expand", net.weight(1, 1, 1, 1), net.constant(np.array(shape)))


def sparse(*shape: int, indices: object = (0, 5)):
    def add(net: zoo.Net) -> str:
        values = numpy_helper.from_array(np.ones(2, np.float32), "w")
        net.sparse.append(
            SparseTensorProto(
                values=values, indices=numpy_helper.from_array(np.array(indices), "i"), dims=shape
            )
        )
        return "w"

    return add


GREEDY = {
    "constant-of-shape": constant_of_shape(4, 10**12, 1, 1),
    "constant-of-shape-beyond-64-bits": constant_of_shape(4, 2**62, 2**62, 1),
    "constant-of-shape-negative": constant_of_shape(4, 3, -3, 1),
    "expand": expanded(4, 10**12, 1, 1),
    "sparse": sparse(4, 2**38, 1, 1),
    "sparse-index-outside": sparse(4, 3, 1, 1, indices=(0, 99)),
    "sparse-negative-index": sparse(4, 3, 1, 1, indices=(0, -99)),
    "sparse-indices-short": sparse(4, 3, 1, 1, indices=(0,)),
    "sparse-float-indices": sparse(4, 3, 1, 1, indices=(0.0, 1.0)),
}


class TestGreedy:
    @pytest.mark.parametrize("case", GREEDY)
    def test_kept_with_a_reason(self, tmp_path, normtool, case):
        """Or refused; but in little memory and without an internal error."""
        path = tmp_path / "m.onnx"
        path.write_bytes(with_weight(GREEDY[case]).SerializeToString())
        done = normtool("fold", path, "--dry-run", "--format", "json", timeout=SECONDS, preexec_fn=limit_memory)
        if done.returncode == 3:
            refused(done, str(path))
            return
        assert done.returncode == 0, done.stderr
        (site,) = api.plan(path).sites
        assert site.verdict == "kept"
        assert site.reasons[0].code == "dynamic_weight"

    def test_a_billion_elements_by_reference(self, tmp_path, normtool):
        """A parameter of the norm itself."""
        net = zoo.Net()
        gamma = net.node("ConstantOfShape", net.constant(np.array([10**12])))
        _, *rest = net.statistics(4)
        y = net.node("BatchNormalization", net.conv(net.input([1, 3, 4, 4]), 3, 4, 1, 1), gamma, *rest)
        net.output(y, [None] * 4)
        path = tmp_path / "m.onnx"
        path.write_bytes(net.model().SerializeToString())
        done = normtool("fold", path, "--dry-run", timeout=SECONDS, preexec_fn=limit_memory)
        assert (done.returncode, "kept" in done.stdout) == (0, True), done.stderr

    @pytest.mark.parametrize(
        "attributes", [{"dilations": [20000, 20000]}, {"strides": [20000, 20000]}], ids=str
    )
    def test_a_proof_that_would_need_gigabytes(self, tmp_path, normtool, attributes):
        """Legal, if absurd: a region wide enough to see every tap has 10^9 elements."""
        path = tmp_path / "m.onnx"
        path.write_bytes(with_weight(lambda net: net.weight(4, 3, 3, 3), **attributes).SerializeToString())
        done = normtool("fold", path, "--dry-run", timeout=SECONDS, preexec_fn=limit_memory)
        assert done.returncode == 0, done.stderr


# ---- attributes that mean nothing -------------------------------------------------------------

CONV_NONSENSE = [
    {"group": 0},
    {"group": -1},
    {"group": 7},
    {"group": "a"},
    {"auto_pad": 3},
    {"strides": [0, 0]},
    {"strides": [-1, -1]},
    {"strides": [1]},
    {"strides": "ab"},
    {"strides": [10**12, 10**12]},
    {"pads": [-1] * 4},
    {"pads": [1]},
    {"pads": [10**12] * 4},
    {"dilations": [0, 0]},
    {"dilations": [10**12, 10**12]},
    {"kernel_shape": [9, 9]},
]

NORM_NONSENSE = [
    ("InstanceNormalization", {"epsilon": "abc"}),
    ("LayerNormalization", {"axis": "x"}),
    ("LayerNormalization", {"axis": [1]}),
    ("LayerNormalization", {"axis": 9}),
    ("LpNormalization", {"axis": "x"}),
    ("MeanVarianceNormalization", {"axes": "xx"}),
    ("MeanVarianceNormalization", {"axes": 3}),
    ("MeanVarianceNormalization", {"axes": [99]}),
    ("LRN", {"size": "a"}),
]

BATCH_NORM_NONSENSE = [
    {"epsilon": "abc"},
    {"epsilon": [1.0]},
    {"epsilon": float("nan")},
    {"epsilon": -10.0},
    {"training_mode": "yes"},
]


class TestNonsense:
    """ONNX Runtime refuses these models; normtool refuses them too, or says what it makes of each norm."""

    @pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
    @pytest.mark.parametrize("attributes", CONV_NONSENSE, ids=str)
    def test_conv_attributes(self, op_type, attributes):
        net = zoo.Net()
        shape = (4, 3, 3, 3) if op_type == "Conv" else (3, 4, 3, 3)
        y = net.node(op_type, net.input([1, 3, 8, 8]), net.weight(*shape), **attributes)
        net.output(net.batch_norm(y, 4), [None] * 4)
        folds(net.model())

    @pytest.mark.parametrize(("op_type", "attributes"), NORM_NONSENSE, ids=str)
    def test_norm_attributes(self, op_type, attributes):
        net = zoo.Net()
        operands = (
            [net.weight(4), net.weight(4)] if op_type in ("InstanceNormalization", "LayerNormalization") else []
        )
        net.output(net.node(op_type, net.input([1, 4, 4, 4]), *operands, **attributes), [None] * 4)
        folds(net.model())

    @pytest.mark.parametrize("attributes", [{}, {"to": "x"}, {"to": [1]}, {"to": 1.5}, {"to": 99}], ids=str)
    def test_cast(self, attributes):
        net = zoo.Net()
        net.output(net.node("Cast", net.input([1, 4, 4, 4]), **attributes), [None] * 4)
        folds(net.model())

    @pytest.mark.parametrize("attributes", BATCH_NORM_NONSENSE, ids=str)
    def test_batch_norm_attributes(self, attributes):
        assert folds(conv_and_norm(lambda statistics: statistics, **attributes)) == 0

    @pytest.mark.parametrize("slot", range(4), ids="weight bias mean var".split())
    @pytest.mark.parametrize("length", [0, 3, 5])
    def test_parameter_of_the_wrong_length(self, slot, length):
        values = np.arange(1, length + 1, dtype=np.float32)
        assert folds(conv_and_norm(lambda statistics: statistics, replaced={slot: values})) == 0

    @pytest.mark.parametrize(
        "bits", [0x7FA00000, 0x7FC00000, 0x7F800000], ids=["signalling-nan", "nan", "infinity"]
    )
    def test_weight_that_is_no_number(self, bits):
        model = conv_and_norm(lambda statistics: statistics)
        weight = model.graph.initializer[0]
        weight.raw_data = np.full(12, bits, np.uint32).tobytes()
        assert folds(model) == 0

    @pytest.mark.parametrize("count", range(4))
    def test_parameters_missing(self, count):
        assert folds(conv_and_norm(lambda statistics: statistics[:count])) == 0

    def test_no_input_at_all(self):
        net = zoo.Net()
        net.output(net.node("BatchNormalization"), [None] * 4)
        assert folds(net.model()) == 0

    @pytest.mark.parametrize("outputs", [[], [""]], ids=["none", "unnamed"])
    def test_no_output(self, outputs):
        model = conv_and_norm(lambda statistics: statistics)
        conv, norm = model.graph.node
        norm.output[:] = outputs
        model.graph.output[0].name = conv.output[0]
        assert folds(model) == 0


def conv_and_norm(choose, replaced=None, **attributes: object) -> onnx.ModelProto:
    """Conv → BatchNormalization that reads `choose(γ, β, μ, σ²)`."""
    net = zoo.Net()
    y = net.conv(net.input([1, 3, 4, 4]), 3, 4, 1, 1)
    statistics = net.statistics(4)
    for slot, values in (replaced or {}).items():
        statistics[slot] = net.constant(values)
    net.output(net.node("BatchNormalization", y, *choose(statistics), **attributes), [None] * 4)
    return net.model()


def folds(model: onnx.ModelProto) -> int:
    """How many folds are planned, 0 where the model is refused. All that is found can be printed and stored."""
    try:
        scanned, made = api.scan(model), api.plan(model)
    except UnreadableModel:
        return 0
    assert str(scanned)
    json.dumps([scanned.to_dict(), made.to_dict()], allow_nan=False)
    assert all(site.reasons for site in made.sites if site.verdict == "kept")
    return len(made.folds)


# ---- text -------------------------------------------------------------------------------------

HOSTILE_NAMES = [
    "\x1b[31mred",
    "two\nlines",
    "=HYPERLINK(1)",
    "<script>",
    "|pipe|",
    "γ" * 300,
    "\u202eright-to-left",
]


class TestNames:
    @pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
    def test_in_an_error(self, tmp_path, name):
        path = tmp_path / "m.onnx"
        path.write_bytes(with_nodes(relu(reads=name)).SerializeToString())
        unreadable(path, "which nothing defines")
