"""What `scan` finds and counts: every norm, every stored number once, and nothing changed by looking."""

import hashlib
import json
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import normtool
from normtool.errors import UnreadableModel
from normtool.norms import NORMS
from normtool.ops import ATEN, MICROSOFT, ROWS
from tests import zoo
from tests.zoo import Net


def scan(net: Net) -> dict[str, Any]:
    """The document of a scan, by way of JSON text."""
    return json.loads(json.dumps(normtool.scan(net.model()).to_dict(), allow_nan=False))


ROLES = ("learnable", "frozen", "buffers", "constants")


def census(net: Net) -> dict[str, int]:
    return {role: n for role, n in scan(net)["parameters"].items() if n and role in ROLES}


# ---- the norms ------------------------------------------------------------------------------------------


def f32(number: float) -> float:
    return float(np.float32(number))


#: op_type, domain, opset, shape of x, operands after x (elements each), attributes
#: → kind, axes, eps, learnable, buffers
NATIVE = [
    ("BatchNormalization", "", 17, [2, 6, 4, 4], [6] * 4, {}, "batch_norm", [0, 2, 3], 1e-5, 12, 12),
    ("BatchNormalization", "", 9, [2, 6], [6] * 4, {"epsilon": 0.1}, "batch_norm", [0], 0.1, 12, 12),
    ("InstanceNormalization", "", 17, [2, 6, 4], [6] * 2, {}, "instance_norm", [2], 1e-5, 12, 0),
    ("LayerNormalization", "", 17, [2, 5, 6], [6] * 2, {}, "layer_norm", [2], 1e-5, 12, 0),
    ("LayerNormalization", "", 17, [2, 5, 6], [30], {"axis": 1}, "layer_norm", [1, 2], 1e-5, 30, 0),
    ("LayerNormalization", "", 12, [2, 5, 6], [6] * 2, {}, "layer_norm", [2], 1e-5, 12, 0),
    ("RMSNormalization", "", 23, [2, 5, 6], [6], {"epsilon": 1e-6}, "rms_norm", [2], 1e-6, 6, 0),
    ("SimplifiedLayerNormalization", "", 17, [2, 5, 6], [6], {}, "rms_norm", [2], 1e-5, 6, 0),
    ("SimplifiedLayerNormalization", MICROSOFT, 17, [2, 5, 6], [6], {}, "rms_norm", [2], 1e-5, 6, 0),
    ("SkipLayerNormalization", MICROSOFT, 17, [2, 5, 6], ["x", 6, 6], {}, "layer_norm", [2], 1e-12, 12, 0),
    ("SkipLayerNormalization", "", 17, [2, 5, 6], ["x", 6, 6], {}, "layer_norm", [2], 1e-12, 12, 0),
    ("SkipSimplifiedLayerNormalization", MICROSOFT, 17, [2, 5, 6], ["x", 6], {}, "rms_norm", [2], 1e-12, 6, 0),
    ("SkipSimplifiedLayerNormalization", "", 17, [2, 5, 6], ["x", 6], {}, "rms_norm", [2], 1e-12, 6, 0),
    (
        "GroupNormalization",
        "",
        21,
        [2, 6, 4, 4],
        [6] * 2,
        {"num_groups": 3},
        "group_norm",
        [1, 2, 3],
        1e-5,
        12,
        0,
    ),
    (
        "GroupNormalization",
        "",
        18,
        [2, 6, 4, 4],
        [3] * 2,
        {"num_groups": 3},
        "group_norm",
        [1, 2, 3],
        1e-5,
        6,
        0,
    ),
    ("GroupNorm", MICROSOFT, 17, [2, 4, 4, 6], [6] * 2, {"groups": 3}, "group_norm", [1, 2, 3], 1e-5, 12, 0),
    (
        "SkipGroupNorm",
        MICROSOFT,
        17,
        [2, 4, 4, 6],
        [6, 6, "x"],
        {"groups": 3},
        "group_norm",
        [1, 2, 3],
        1e-5,
        12,
        0,
    ),
    ("MeanVarianceNormalization", "", 13, [2, 6, 4, 4], [], {}, "mean_variance_norm", [0, 2, 3], None, 0, 0),
    ("LpNormalization", "", 17, [2, 6, 4], [], {"axis": 1}, "lp_norm", [1], None, 0, 0),
    ("LRN", "", 17, [2, 6, 4, 4], [], {"size": 3}, "local_response_norm", [1], None, 0, 0),
]


def native(op_type, domain, opset, shape, operands, attributes, *_):
    net = Net(opset=opset)
    if domain:
        net.domains[domain] = 1
    x = net.input(shape)
    names = [x if n == "x" else net.weight(n) for n in operands]
    net.output(net.node(op_type, x, *names, domain=domain, name="the norm", **attributes), shape)
    return net


@pytest.mark.parametrize("row", NATIVE, ids=lambda row: f"{row[1]}:{row[0]}-{row[2]}-{row[6]}")
def test_every_native_norm_is_found(row):
    op_type, domain, *_ = row
    *_, kind, axes, eps, learnable, buffers = row
    found = scan(native(*row))
    (norm,) = found["norms"]
    assert norm["name"] == "the norm"
    assert norm["kind"] == kind
    assert norm["spelling"] == (f"{domain}::{op_type}" if domain else op_type)
    assert norm["evidence"] == "op"
    assert norm["axes"] == axes
    assert norm["eps"] == (None if eps is None else f32(eps))
    assert (norm["learnable"], norm["buffers"]) == (learnable, buffers)
    assert found["summary"] == {kind: {"count": 1, "learnable": learnable, "buffers": buffers}}
    assert (found["parameters"]["learnable"], found["parameters"]["buffers"]) == (learnable, buffers)


def embedded_norm() -> Net:
    net = Net()
    net.domains[MICROSOFT] = 1
    ids = net.input([2, 5], "ids", dtype=np.int32)
    operands = [net.weight(7, 8), net.weight(9, 8), "", net.weight(8), net.weight(8)]
    y = net.node("EmbedLayerNormalization", ids, "", *operands, domain=MICROSOFT, outputs=3)[0]
    net.output(y, [2, 5, 8])
    return net


def test_the_norm_inside_an_embedding_owns_gamma_and_beta_alone():
    """It normalises the last axis of (batch, sequence, hidden), not that of the table."""
    found = scan(embedded_norm())
    (norm,) = found["norms"]
    assert (norm["kind"], norm["learnable"], norm["buffers"]) == ("layer_norm", 16, 0)
    assert norm["eps"] == f32(1e-12)
    assert found["parameters"]["learnable"] == 7 * 8 + 9 * 8 + 16
    assert norm["axes"] == [2]


def test_no_spelling_of_a_norm_is_left_untried():
    tried = {(row[1], row[0]) for row in NATIVE} | {(MICROSOFT, "EmbedLayerNormalization")}
    known = {(s.domain, s.op_type) for kind in NORMS for s in ROWS[kind].spellings if s.domain != ATEN}
    assert known == tried


def test_a_layer_norm_before_its_opset_is_counted_and_the_checkers_word_is_told():
    """The checker rejects LayerNormalization at opset 12, the runtime accepts it."""
    row = next(row for row in NATIVE if row[0] == "LayerNormalization" and row[2] == 12)
    (told,) = scan(native(*row))["diagnostics"]
    assert told["code"] == "checker"
    assert "LayerNormalization" in told["message"]


@pytest.mark.parametrize(
    ("axis", "axes"), [(-1, [-1]), (1, None), (-2, None)], ids=["last", "from-the-front", "last-two"]
)
def test_axes_of_an_unknown_rank_are_not_guessed(axis, axes):
    net = Net()
    net.output(net.node("LayerNormalization", net.input(None), net.weight(6), axis=axis))
    assert scan(net)["norms"][0]["axes"] == axes


def test_a_batch_norm_of_unknown_rank_has_unknown_axes():
    net = Net()
    net.output(net.batch_norm(net.input(None), 4))
    (norm,) = scan(net)["norms"]
    assert (norm["axes"], norm["learnable"], norm["buffers"]) == (None, 8, 8)


@pytest.mark.parametrize("domain", ["", "somebody.else", MICROSOFT])
@pytest.mark.parametrize("op_type", ["RMSNorm", "LayerNormFusedRelu", "ScaleNorm", "batchnorm"])
def test_an_unknown_op_that_sounds_like_a_norm_is_said_to_be_unknown(op_type, domain):
    net = Net()
    net.domains |= {domain: 1} if domain else {}
    net.output(net.node(op_type, net.input([2, 4]), net.weight(4), domain=domain, name="here"), [2, 4])
    found = scan(net)
    assert found["norms"] == []
    (told,) = [entry for entry in found["diagnostics"] if entry["code"] == "unrecognised_norm"]
    assert op_type in told["message"]
    assert told["where"] == "here"


@pytest.mark.parametrize("op_type", ["RandomNormal", "RandomNormalLike", "Mul", "Softmax"])
def test_an_op_that_is_no_norm_is_not_suspected(op_type):
    net = Net()
    if op_type == "RandomNormal":
        net.output(net.node(op_type, shape=[2, 4]), [2, 4])
    else:
        x = net.input([2, 4])
        net.output(net.node(op_type, *([x, x] if op_type == "Mul" else [x])), [2, 4])
    assert scan(net)["diagnostics"] == []


def test_names_lie_and_are_not_believed():
    net = Net()
    x = net.input([2, 4, 6, 6])
    weight = net.weight(4, 4, 1, 1, name="bn1.running_mean")
    y = net.node("Conv", x, weight, name="encoder.BatchNorm_0")
    y = net.node("LayerNormalization", y, net.weight(6, name="bn1.weight_g"), name="bn1")
    statistics = [net.weight(4, name=name) for name in ("a", "num_batches", "layer_norm.weight", "conv.bias")]
    net.output(net.batch_norm(y, 4, statistics=statistics, name="conv1"), [2, 4, 6, 6])
    found = scan(net)
    assert [(norm["name"], norm["kind"]) for norm in found["norms"]] == [
        ("bn1", "layer_norm"),
        ("conv1", "batch_norm"),
    ]
    assert census(net) == {"learnable": 16 + 6 + 8, "buffers": 8}


def test_a_norm_without_a_name_goes_by_its_output():
    net = Net()
    y = net.batch_norm(net.input([2, 4]), 4)
    net.nodes[0].ClearField("name")
    net.output(y, [2, 4])
    assert scan(net)["norms"][0]["name"] == y


# ---- counting ---------------------------------------------------------------------------------------------


def test_shared_statistics_are_counted_once_and_said_to_be_shared():
    net = Net()
    x, statistics = net.input([2, 4, 6, 6]), net.statistics(4)
    for name in ("one", "two", "three"):
        own = statistics if name != "three" else [*net.statistics(4)[:3], statistics[3]]
        x = net.batch_norm(x, 4, statistics=own, name=name)
    net.output(x, [2, 4, 6, 6])
    found = scan(net)
    assert [(norm["learnable"], norm["buffers"]) for norm in found["norms"]] == [(8, 8)] * 3
    assert [set(norm["shared_with"]) for norm in found["norms"]] == [
        {"two", "three"},
        {"one", "three"},
        {"one", "two"},
    ]
    assert found["summary"] == {"batch_norm": {"count": 3, "learnable": 16, "buffers": 12}}
    # the four tensors that "three" does not use are stored all the same, as somebody's
    assert found["parameters"]["learnable"] + found["parameters"]["buffers"] == 28 + 4


def test_norms_that_share_nothing_say_so():
    net = Net()
    x = net.input([2, 4])
    for _ in range(2):
        x = net.batch_norm(x, 4)
    net.output(x, [2, 4])
    assert [norm["shared_with"] for norm in scan(net)["norms"]] == [[], []]


@pytest.mark.parametrize("through", ["Identity", "Reshape", "Cast", "Transpose"])
def test_a_table_read_under_another_name_is_counted_once(through):
    """A tied embedding: Gather and, transposed or not, the output head."""
    net = Net()
    table = net.weight(7, 7)
    y = net.node("Gather", table, net.input([2], "ids", dtype=np.int64))
    extra = {"Reshape": [net.constant(np.array([7, 7]))]}.get(through, [])
    head = net.node(through, table, *extra, **({"to": TensorProto.FLOAT} if through == "Cast" else {}))
    net.output(net.node("MatMul", y, head), [2, 7])
    assert census(net)["learnable"] == 49


def test_norms_that_share_a_weight_through_an_identity_share_it():
    net = Net()
    x, weight = net.input([2, 4]), net.weight(4)
    x = net.node("LayerNormalization", x, weight, name="one")
    net.output(net.node("LayerNormalization", x, net.node("Identity", weight), name="two"), [2, 4])
    found = scan(net)
    assert [norm["shared_with"] for norm in found["norms"]] == [["two"], ["one"]]
    assert found["parameters"]["learnable"] == found["summary"]["layer_norm"]["learnable"] == 4


def in_initializers(net, array):
    return net.constant(array)


def in_a_constant_node(net, array):
    return net.node("Constant", value=numpy_helper.from_array(array))


def in_value_floats(net, array):
    return net.node("Constant", value_floats=array.tolist())


@pytest.mark.parametrize("store", [in_initializers, in_a_constant_node, in_value_floats])
def test_weights_are_counted_wherever_they_are_stored(store):
    net = Net()
    statistics = [store(net, net.rng.uniform(0.5, 2, 4).astype(np.float32)) for _ in range(4)]
    net.output(net.batch_norm(net.input([2, 4]), 4, statistics=statistics), [2, 4])
    assert census(net) == {"learnable": 8, "buffers": 8}


def sparse(dense: np.ndarray, name: str) -> onnx.SparseTensorProto:
    index = np.flatnonzero(dense)
    values = numpy_helper.from_array(dense.reshape(-1)[index], name)
    return helper.make_sparse_tensor(values, numpy_helper.from_array(index.astype(np.int64), "i"), dense.shape)


@pytest.mark.parametrize("where", ["initializer", "Constant node"])
def test_of_a_sparse_tensor_the_stored_numbers_count(where):
    net = Net()
    dense = np.diag(np.arange(1, 6)).astype(np.float32)
    if where == "initializer":
        net.sparse.append(sparse(dense, "w"))
        weight = "w"
    else:
        weight = net.node("Constant", sparse_value=sparse(dense, ""))
    net.output(net.node("MatMul", net.input([2, 5]), weight), [2, 5])
    parameters = scan(net)["parameters"]
    assert (parameters["learnable"], parameters["learnable_bytes"]) == (5, 20)


def test_both_branches_of_an_if_are_counted():
    net = Net()
    x, condition = net.input([2, 4]), net.input([], "condition", dtype=np.bool_)
    bodies = []
    for prefix in ("then.", "else."):
        body = Net(prefix=prefix)
        body.output(body.batch_norm(x, 4), [2, 4])
        bodies.append(body.graph())
    net.output(net.node("If", condition, then_branch=bodies[0], else_branch=bodies[1], name="if"), [2, 4])
    assert {norm["scope"] for norm in scan(net)["norms"]} == {"if.then_branch", "if.else_branch"}
    assert census(net) == {"learnable": 16, "buffers": 16}


def test_a_weight_captured_by_two_bodies_is_counted_once():
    net = Net()
    x, condition = net.input([2, 4]), net.input([], "condition", dtype=np.bool_)
    statistics, bodies = net.statistics(4), []
    for prefix in ("then.", "else."):
        body = Net(prefix=prefix)
        body.output(body.batch_norm(x, 4, statistics=statistics), [2, 4])
        bodies.append(body.graph())
    net.output(net.node("If", condition, then_branch=bodies[0], else_branch=bodies[1]), [2, 4])
    assert census(net) == {"learnable": 8, "buffers": 8}


def test_a_function_stores_its_weights_once_and_says_how_often_it_runs():
    """`Outer` calls `Inner` three times, the graph calls `Outer` twice and `Inner` once."""
    inner, outer, net = Net(), Net(), Net()
    inner.output(inner.batch_norm(inner.input(None), 4, name="norm"))
    y = outer.input(None)
    for _ in range(3):
        y = outer.node("Inner", y, domain="local")
    outer.output(y)
    outer.domains["local"] = 1
    unused = Net()
    unused.output(unused.batch_norm(unused.input(None), 4, name="never"))
    for name, function in (("Inner", inner), ("Outer", outer), ("Unused", unused)):
        net.define(name, function)
    y = net.input([2, 4])
    for name in ("Outer", "Inner", "Outer"):
        y = net.node(name, y, domain="local")
    net.output(y, [2, 4])
    assert [(norm["name"], norm["scope"], norm["calls"]) for norm in scan(net)["norms"]] == [
        ("norm", "local:Inner", 7),
        ("never", "local:Unused", 0),
    ]
    assert census(net) == {"learnable": 16, "buffers": 16}


def test_a_function_that_the_graph_calls_twice_runs_twice():
    inner, net = Net(), Net()
    inner.output(inner.batch_norm(inner.input(None), 4))
    net.define("Inner", inner)
    y = net.node("Inner", net.node("Inner", net.input([2, 4]), domain="local"), domain="local")
    net.output(y, [2, 4])
    (norm,) = scan(net)["norms"]
    assert (norm["calls"], census(net)) == (2, {"learnable": 8, "buffers": 8})


def test_a_function_that_calls_itself_is_refused():
    inner, net = Net(), Net()
    inner.output(inner.node("Inner", inner.input(None), domain="local"))
    inner.domains["local"] = 1
    net.define("Inner", inner)
    net.output(net.node("Inner", net.input([2, 4]), domain="local"), [2, 4])
    with pytest.raises(UnreadableModel, match="calls itself"):
        normtool.scan(net.model())


def test_operands_made_at_run_time_store_nothing_and_are_said_to_be_computed():
    net = Net()
    x = net.input([2, 4])
    scale = net.node("ReduceMean", x, axes=[0], keepdims=0)
    net.output(net.node("LayerNormalization", x, scale, net.weight(4)), [2, 4])
    (norm,) = scan(net)["norms"]
    assert (norm["learnable"], norm["computed_operands"]) == (4, 1)


def test_integers_and_scalars_that_shape_the_graph_are_constants():
    net = Net()
    x = net.input([2, 3, 4, 4])
    y = net.node("Reshape", x, net.constant(np.array([2, 48])))
    y = net.node("Clip", y, net.constant(np.float32(0)), net.constant(np.float32(6)))
    y = net.node("Pow", net.node("Mul", y, net.constant(np.float32(0.5))), net.constant(np.float32(2)))
    y = net.node("Unsqueeze", y, net.node("Constant", value_ints=[0, 1]))
    y = net.node("Resize", y, "", net.constant(np.float32([1, 1, 1, 2])), mode="nearest")
    net.output(y, [1, 1, 2, 96])
    assert census(net) == {"constants": 2 + 2 + 2 + 2 + 4}


@pytest.mark.parametrize(
    ("op_type", "shapes", "learnable"),
    [
        pytest.param("Gemm", [(5, 1), (1,)], 6, id="linear-with-one-output"),
        pytest.param("Gemm", [(1, 1), (1,)], 2, id="linear-from-one-to-one"),
        pytest.param("MatMul", [(1, 1)], 1, id="matmul-from-one-to-one"),
        pytest.param("Conv", [(1, 1, 1, 1), (1,)], 2, id="conv-with-one-channel"),
        pytest.param("BatchNormalization", [(1,)] * 4, 2, id="batch-norm-of-one-channel"),
        pytest.param("PRelu", [(1,)], 1, id="one-slope"),
    ],
)
def test_a_weight_of_one_element_is_still_a_weight(op_type, shapes, learnable):
    net = Net()
    channels = shapes[0][0] if op_type in ("Gemm", "MatMul") else 1
    shape = [2, channels, 4, 4] if op_type == "Conv" else [2, channels]
    net.output(net.node(op_type, net.input(shape), *(net.weight(*s) for s in shapes)))
    assert census(net)["learnable"] == learnable


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (np.int8, 30),
        (np.uint8, 30),
        (ml_dtypes.int4, 15),
        (ml_dtypes.uint4, 15),
        (ml_dtypes.float8_e4m3fn, 30),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_quantised_weights_count_as_weights_in_their_own_bytes(dtype, size):
    net = Net(opset=21)
    integers = net.constant(np.arange(30).reshape(5, 6) % 7, dtype=dtype)
    scale = net.constant(np.full(6, 0.1, np.float32))
    weight = net.node("DequantizeLinear", integers, scale, axis=1)
    net.output(net.node("MatMul", net.input([2, 5]), weight), [2, 6])
    parameters = scan(net)["parameters"]
    assert (parameters["learnable"], parameters["learnable_bytes"]) == (30, size)
    assert (parameters["constants"], parameters["constant_bytes"]) == (6, 24)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64], ids=lambda d: np.dtype(d).name)
def test_bytes_follow_the_dtype(dtype):
    net = Net(dtype=dtype, opset=22)
    net.output(net.batch_norm(net.input([2, 4]), 4), [2, 4])
    parameters = scan(net)["parameters"]
    assert parameters["learnable_bytes"] == parameters["buffer_bytes"] == 8 * np.dtype(dtype).itemsize


@pytest.mark.parametrize("ir", [3, 10])
def test_initializers_on_the_input_list_are_counted_all_the_same(ir):
    net = Net(opset=9, ir=ir)
    net.output(net.batch_norm(net.input([2, 4]), 4), [2, 4])
    for tensor in net.initializers:
        net.inputs.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    assert census(net) == {"learnable": 8, "buffers": 8}


def test_an_initializer_nobody_reads_is_stored_and_counted():
    net = Net()
    net.weight(100)
    net.output(net.node("Relu", net.input([2, 4])), [2, 4])
    assert census(net) == {"learnable": 100}


def test_a_model_without_norms_has_none():
    net = Net()
    net.output(net.node("Gemm", net.input([2, 4]), net.weight(4, 3)), [2, 3])
    found = scan(net)
    assert (found["norms"], found["summary"]) == ([], {})


@pytest.mark.parametrize(("bias", "learnable"), [(False, -4), (True, -8)], ids=["no-bias", "bias"])
def test_the_accounting_of_a_fold_adds_up(bias, learnable):
    """Conv + BN over C channels: γ, β, μ, σ² go, a bias comes where there was none."""
    net = Net()
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3, bias=bias)
    net.output(net.batch_norm(y, 4), [2, 4, 4, 4])
    result = normtool.fold(net.model(), validate=False)
    assert result.after.learnable - result.before.learnable == learnable
    assert (result.before.buffers, result.after.buffers) == (8, 0)
    assert result.after == normtool.scan(result.model).parameters


# ---- missing pieces ---------------------------------------------------------------------------------------


def test_missing_external_data_is_an_error_and_not_a_zero(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(zoo.conv_bn(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert normtool.scan(path).parameters.buffers == 12
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(UnreadableModel, match=r"weights\.bin"):
        normtool.scan(path)


def test_short_external_data_is_an_error_too(tmp_path):
    path, data = tmp_path / "model.onnx", tmp_path / "weights.bin"
    onnx.save(zoo.conv_bn(), path, save_as_external_data=True, location=data.name, size_threshold=0)
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(UnreadableModel, match=r"weights\.bin"):
        normtool.scan(path)


def test_an_input_that_nothing_defines_is_an_error():
    model = zoo.conv_bn()
    del model.graph.initializer[0]
    with pytest.raises(UnreadableModel, match="nothing defines"):
        normtool.scan(model)


# ---- looking changes nothing ------------------------------------------------------------------------------


def with_everything() -> onnx.ModelProto:
    net = embedded_norm()
    net.sparse.append(sparse(np.eye(4, dtype=np.float32), "sparse"))
    condition = net.input([], "condition", dtype=np.bool_)
    x = net.input([2, 4])
    body = Net(prefix="body.")
    body.output(body.batch_norm(x, 4), [2, 4])
    net.output(net.node("If", condition, then_branch=body.graph(), else_branch=body.graph()), [2, 4])
    inner = Net()
    inner.output(inner.batch_norm(inner.input(None), 4))
    net.define("Inner", inner)
    net.output(net.node("Inner", net.node("MatMul", x, "sparse"), domain="local"), [2, 4])
    return net.model()


@pytest.mark.parametrize("build", [zoo.conv_bn, with_everything, lambda: native(*NATIVE[5]).model()])
def test_scan_and_plan_leave_the_given_model_as_it_is(build):
    model = build()
    before = model.SerializeToString(deterministic=True)
    normtool.scan(model)
    normtool.plan(model)
    assert model.SerializeToString(deterministic=True) == before


def test_fold_works_on_a_copy():
    model = zoo.conv_bn()
    before = model.SerializeToString(deterministic=True)
    assert normtool.fold(model, validate=False).folded == 1
    assert model.SerializeToString(deterministic=True) == before


def test_scanning_draws_no_random_numbers():
    state = np.random.get_state()[1].copy()
    normtool.scan(zoo.conv_bn())
    assert np.array_equal(np.random.get_state()[1], state)


def test_scanning_a_file_does_not_touch_it(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(zoo.conv_bn(), path)
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    normtool.scan(path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


# ---- the document -----------------------------------------------------------------------------------------


def test_the_document_has_the_keys_of_the_contract(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(with_everything(), path)
    found = json.loads(json.dumps(normtool.scan(path).to_dict()))
    assert list(found) == ["schema", "model", "parameters", "summary", "norms", "diagnostics"]
    assert found["schema"] == "normtool.scan/1"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found["model"] == {"path": str(path), "format": "onnx", "sha256": sha256}
    roles = {"learnable", "frozen", "buffers", "constants", "learnable_bytes", "buffer_bytes"}
    assert found["parameters"].keys() >= roles
    assert all(type(number) is int for number in found["parameters"].values())
    assert found["summary"].keys() == {"batch_norm", "layer_norm"}
    for count in found["summary"].values():
        assert count.keys() == {"count", "learnable", "buffers"}
    wanted = "name kind spelling evidence axes eps learnable frozen buffers calls shared_with".split()
    for norm in found["norms"]:
        assert norm.keys() >= set(wanted)


def test_a_diagnostic_has_a_code_a_message_and_a_place():
    row = next(row for row in NATIVE if row[0] == "LayerNormalization" and row[2] == 12)
    for entry in scan(native(*row))["diagnostics"]:
        assert list(entry) == ["code", "message", "where"]


def test_the_printed_scan_names_every_norm():
    text = str(normtool.scan(with_everything()))
    assert all(norm["name"] in text for norm in normtool.scan(with_everything()).to_dict()["norms"])
