"""Traps about modes: training, opsets and domains, values a caller may override; and all traps at once."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests import zoo
from tests.traps.common import assert_folded, assert_kept, codes, content, feeds_of, fold, listed
from tests.zoo import Net

# ---- 1: training mode ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opset", "outputs", "attributes"),
    [
        pytest.param(14, 3, {"training_mode": 1}, id="opset14"),
        pytest.param(15, 3, {"training_mode": 1}, id="opset15"),
        pytest.param(22, 3, {"training_mode": 1}, id="opset22"),
        pytest.param(15, 1, {"training_mode": 1}, id="even-with-one-output"),
        pytest.param(9, 5, {}, id="opset9-says-it-by-its-outputs"),
        pytest.param(7, 5, {}, id="opset7-says-it-by-its-outputs"),
    ],
)
def test_trap_01_training_mode_is_no_affine_map(opset, outputs, attributes):
    net = Net(opset=opset)
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3)
    y = net.batch_norm(y, 4, outputs=outputs, **attributes)
    net.output(y if isinstance(y, str) else y[0], [2, 4, 4, 4])
    assert_kept(net.model(), "training_mode")


@pytest.mark.parametrize("opset", [14, 15, 22])
def test_trap_01_training_mode_said_to_be_off_is_inference(opset):
    net = Net(opset=opset)
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3)
    net.output(net.batch_norm(y, 4, training_mode=0, momentum=0.5), [2, 4, 4, 4])
    assert_folded(net.model())


# ---- 18: opsets and domains ---------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 13, 14, 15, 17, 21, 22, 23])
def test_trap_18_the_textbook_pattern_at_every_opset(opset):
    assert zoo.op_types(assert_folded(zoo.conv_bn(opset=opset))) == ["Conv", "Relu"]


def test_trap_18_an_opset_from_the_future_is_no_silent_no():
    """Nobody has defined it yet: fold what is recognised, or say why not."""
    model = zoo.conv_bn()
    model.opset_import[0].version = 99
    result = fold(model)
    assert result.folded or codes(result)


def test_trap_18_an_opset_before_the_operators_meant_this_is_refused():
    assert_kept(zoo.conv_bn(opset=6), "unsupported_op")


def test_trap_18_statistics_per_element_are_not_per_channel():
    """spatial=0, up to opset 8."""
    net = Net(opset=8)
    y = net.conv(net.input([2, 3, 4, 4]), 3, 4, 1, 1)
    statistics = [net.constant(net.rng.uniform(0.5, 2, (4, 4, 4)).astype(np.float32)) for _ in range(4)]
    net.output(net.batch_norm(y, 4, statistics=statistics, spatial=0), [2, 4, 4, 4])
    assert_kept(net.model(), "axis_mismatch")


@pytest.mark.parametrize(
    ("op_type", "domain"),
    [
        pytest.param("FusedConv", "com.microsoft", id="a-fused-activation-inside"),
        pytest.param("Conv", "com.ms.internal.nhwc", id="channels-last"),
        pytest.param("Conv", "somebody.else", id="unknown-domain"),
        pytest.param("FusedGemm", "com.microsoft", id="fused-gemm"),
    ],
)
def test_trap_18_what_is_called_conv_elsewhere_is_no_conv(op_type, domain):
    net = Net()
    net.domains[domain] = 1
    activation = {"activation": "Relu"} if op_type.startswith("Fused") else {}
    y = net.node(
        op_type, net.input([2, 3, 6, 6]), net.weight(4, 3, 3, 3), net.weight(4), domain=domain, **activation
    )
    net.output(net.batch_norm(y, 4), [2, 4, 4, 4])
    assert_kept(net.model(), "unsupported_op", "graph_output")


@pytest.mark.parametrize("domain", ["somebody.else", "com.microsoft"])
def test_trap_18_a_batch_norm_of_another_domain_is_not_ours(domain):
    net = Net()
    net.domains[domain] = 1
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3)
    net.output(net.batch_norm(y, 4, domain=domain), [2, 4, 4, 4])
    result = fold(net.model())
    assert result.sites == ()
    assert content(result.model) == content(net.model())


def test_trap_18_the_default_domain_by_its_long_name():
    model = zoo.conv_bn()
    for node in model.graph.node:
        node.domain = "ai.onnx"
    model.opset_import[0].domain = "ai.onnx"
    assert_folded(model)


# ---- 19: overridable initializers -----------------------------------------------------------------------


@pytest.mark.parametrize("number", range(6), ids=["weight", "bias", "gamma", "beta", "mean", "var"])
def test_trap_19_what_a_caller_may_override_is_no_constant(number):
    model = zoo.conv_bn()
    tensor = model.graph.initializer[number]
    model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    behind = ["nonlinear"] if number < 2 else []  # what is no affine map does not go forward at all
    assert_kept(model, "overridable", *behind)


@pytest.mark.parametrize("ir", [4, 10])
def test_trap_19_freezing_folds_and_takes_the_inputs_off(ir):
    net = Net(opset=9, ir=ir)
    y = net.batch_norm(net.conv(net.input([2, 3, 8, 8]), 3, 4, 3, 3), 4)
    net.output(y, [2, 4, 6, 6])
    model = listed(net).model()
    assert_kept(model, "overridable")
    folded = assert_folded(model, feeds_of(model), freeze=True)
    assert [info.name for info in folded.graph.input] == ["x"]


@pytest.mark.parametrize("freeze", [False, True], ids=["as-it-is", "frozen"])
def test_trap_19_before_ir_4_listed_initializers_are_constants(freeze):
    """There every initializer had to be listed; to unlist one would make the model invalid."""
    net = Net(opset=9, ir=3)
    y = net.batch_norm(net.conv(net.input([2, 3, 8, 8]), 3, 4, 3, 3, bias=False), 4)
    net.output(y, [2, 4, 6, 6])
    model = listed(net).model()
    folded = assert_folded(model, feeds_of(model), freeze=freeze)
    assert {info.name for info in folded.graph.input} == {"x", *(t.name for t in folded.graph.initializer)}


# ---- 33: constant rows --------------------------------------------------------------------------------------


def test_trap_33_constant_rows_fold_like_any_other():
    net = Net()
    y = net.node("Gemm", net.input([3, 4]), net.weight(4, 5), net.weight(5))
    net.output(net.batch_norm(y, 5), [3, 5])
    rows = np.array([[0, 0, 0, 0], [7, 7, 7, 7], [1, 2, 3, 4]], np.float32)
    assert_folded(net.model(), {"x": rows})


# ---- all of them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op_type", "parameters", "attributes", "opset"),
    [
        ("LayerNormalization", 2, {"axis": -1}, 17),
        ("InstanceNormalization", 2, {}, 17),
        ("GroupNormalization", 2, {"num_groups": 2}, 21),
        ("RMSNormalization", 1, {"axis": -1}, 23),
        ("LpNormalization", 0, {"axis": 1}, 17),
        ("LRN", 0, {"size": 3}, 17),
        ("MeanVarianceNormalization", 0, {}, 17),
    ],
)
def test_norms_with_statistics_of_their_own_input_are_kept(op_type, parameters, attributes, opset):
    net = Net(opset=opset)
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3)
    y = net.node(op_type, y, *(net.weight(4) for _ in range(parameters)), **attributes)
    net.output(y, [2, 4, 4, 4])
    assert_kept(net.model(), "data_dependent")


def test_every_reason_is_told_not_only_the_first():
    """Training mode, a data-dependent weight, another reader and a caller who wants the conv output."""
    net = Net()
    x = net.input([2, 3, 6, 6])
    y = net.node("Conv", x, net.input([4, 3, 3, 3], "w"))
    net.output(net.batch_norm(y, 4, outputs=3, training_mode=1)[0], [2, 4, 4, 4])
    net.output(net.node("Relu", y), [2, 4, 4, 4])
    net.output(y, [2, 4, 4, 4])
    assert_kept(net.model(), "training_mode", "multiple_readers", "graph_output", "dynamic_weight")


def test_every_reason_of_the_constants_is_told():
    """γ from a quantiser, μ from the caller, W overridable."""
    net = Net()
    x = net.input([2, 3, 6, 6])
    weight = net.weight(4, 3, 3, 3)
    statistics = net.statistics(4)
    integers = net.constant(np.array([1, 2, 3, 4], np.int8))
    statistics[0] = net.node("DequantizeLinear", integers, net.constant(np.float32(0.5)))
    statistics[2] = net.input([4], "mean")
    net.output(net.batch_norm(net.node("Conv", x, weight), 4, statistics=statistics), [2, 4, 4, 4])
    net.inputs.append(helper.make_tensor_value_info(weight, TensorProto.FLOAT, [4, 3, 3, 3]))
    assert_kept(net.model(), "quantised", "dynamic_weight", "overridable")


def test_every_reason_says_where():
    net = Net()
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3)
    net.output(net.batch_norm(y, 4), [2, 4, 4, 4])
    net.output(net.node("Relu", y, name="reader"), [2, 4, 4, 4])
    (site,) = fold(net.model()).sites
    found = [(reason.code, reason.where) for reason in site.reasons]
    assert found == [("multiple_readers", y), ("graph_output", net.outputs[0].name)]
    assert "'reader'" in site.reasons[0].message
