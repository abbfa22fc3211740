"""Traps about dataflow: who else reads, what is a pair, and that twice is once."""

import numpy as np
import onnx
import pytest

from normtool import planner
from normtool.proof import Proof
from normtool.reasons import Reason
from tests import zoo
from tests.traps.common import (
    affine,
    assert_folded,
    assert_kept,
    assert_same_function,
    codes,
    content,
    fold,
    verdicts,
)
from tests.zoo import Net

# ---- 6 and 7: who else reads -----------------------------------------------------------------------------


def read_by_an_op(net, y):
    net.output(net.node("Relu", y), [2, 4, 4, 4])
    return "multiple_readers"


def read_by_a_second_norm(net, y):
    net.output(net.batch_norm(y, 4), [2, 4, 4, 4])
    return "multiple_readers"


def read_twice_by_a_residual(net, y):
    net.output(net.node("Add", y, y), [2, 4, 4, 4])
    return "multiple_readers"


def read_by_the_caller(net, y):
    net.output(y, [2, 4, 4, 4])
    return "graph_output"


def read_by_a_body(net, y):
    condition = net.input([], "condition", dtype=np.bool_)
    then, otherwise = Net(prefix="then."), Net(prefix="else.")
    then.output(then.node("Relu", y), [2, 4, 4, 4])
    otherwise.output(otherwise.node("Neg", y), [2, 4, 4, 4])
    bodies = {"then_branch": then.graph(), "else_branch": otherwise.graph()}
    net.output(net.node("If", condition, **bodies), [2, 4, 4, 4])
    return "captured"


@pytest.mark.parametrize(
    "reader",
    [read_by_an_op, read_by_a_second_norm, read_twice_by_a_residual, read_by_the_caller, read_by_a_body],
)
def test_trap_06_a_conv_output_that_somebody_else_reads_stays(reader):
    net = Net()
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3)
    net.output(net.batch_norm(y, 4), [2, 4, 4, 4])
    code = reader(net, y)
    assert_kept(net.model(), code, "graph_output")


def test_trap_06_two_norms_that_do_the_same_to_one_tensor_go_together():
    """All its readers want it in the same form; one norm with other statistics beside them does not."""
    net = Net()
    y, statistics = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3), net.statistics(4)
    for _ in range(2):
        net.output(net.batch_norm(y, 4, statistics=statistics), [2, 4, 4, 4])
    model = net.model()
    result = fold(model)
    assert verdicts(result) == ["folded", "folded"]
    assert_same_function(model, result.model)
    net.output(net.batch_norm(y, 4), [2, 4, 4, 4])
    assert_kept(net.model(), "multiple_readers", "graph_output")


def test_trap_06_a_captured_output_names_each_body():
    net = Net()
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3)
    net.output(net.batch_norm(y, 4), [2, 4, 4, 4])
    read_by_a_body(net, y)
    assert codes(fold(net.model())) == ["captured", "captured", "graph_output"]


def two_convs(second: str) -> onnx.ModelProto:
    """Two convs on one weight and one bias; behind the second a BatchNorm, a Relu or nothing."""
    net = Net()
    x = net.input([2, 3, 6, 6])
    weight, bias = net.weight(4, 3, 3, 3), net.weight(4)
    net.output(net.batch_norm(net.node("Conv", x, weight, bias), 4), [2, 4, 4, 4])
    y = net.node("Conv", net.node("Neg", x), weight, bias)
    y = {"norm": lambda: net.batch_norm(y, 4), "relu": lambda: net.node("Relu", y), "": lambda: y}[second]()
    net.output(y, [2, 4, 4, 4])
    return net.model()


def test_trap_06_one_weight_under_two_convs_with_a_norm_each():
    folded = assert_folded(two_convs("norm"))
    assert len(folded.graph.initializer) == 4


@pytest.mark.parametrize("second", ["relu", ""], ids=["relu", "graph-output"])
def test_trap_06_the_shared_weight_of_an_unnormed_conv_is_untouched(second):
    model = two_convs(second)
    folded = assert_folded(model)
    for name in ("w1", "w2"):
        assert np.array_equal(zoo.initializer(folded, name), zoo.initializer(model, name))


@pytest.mark.parametrize("reader", ["another op", "the caller"])
def test_trap_06_a_weight_that_is_data_too_is_copied(reader):
    net = Net()
    x, weight = net.input([2, 3, 6, 6]), net.weight(4, 3, 3, 3)
    net.output(net.batch_norm(net.node("Conv", x, weight), 4), [2, 4, 4, 4])
    net.output(net.node("Abs", weight) if reader == "another op" else weight, [4, 3, 3, 3])
    model = net.model()
    folded = assert_folded(model)
    assert np.array_equal(zoo.initializer(folded, weight), zoo.initializer(model, weight))


def test_trap_07_one_batch_norm_after_two_convs():
    net = Net()
    x, statistics = net.input([2, 3, 6, 6]), net.statistics(4)
    for kernel in (3, 1):
        y = net.conv(x, 3, 4, kernel, kernel)
        net.output(net.batch_norm(y, 4, statistics=statistics), [2, 4, None, None])
    folded = assert_folded(net.model())
    assert not {tensor.name for tensor in folded.graph.initializer} & set(statistics)


def test_trap_07_equal_tensors_that_an_exporter_merged():
    """One initializer is conv bias, β and μ; another is γ and σ² of both norms."""
    net = Net()
    x, ones = net.input([2, 3, 6, 6]), net.constant(np.array([0.5, 1, 2, 3], np.float32))
    shift = net.weight(4)
    for _ in range(2):
        y = net.node("Conv", x, net.weight(4, 3, 3, 3), shift)
        net.output(net.batch_norm(y, 4, statistics=[ones, shift, shift, ones]), [2, 4, 4, 4])
    assert len(assert_folded(net.model()).graph.initializer) == 4


def test_trap_07_statistics_stay_while_a_kept_norm_reads_them():
    net = Net()
    x, statistics = net.input([2, 4, 6, 6]), net.statistics(4)
    net.output(net.batch_norm(net.conv(x, 4, 4, 3, 3), 4, statistics=statistics), [2, 4, 4, 4])
    net.output(net.batch_norm(x, 4, statistics=statistics), [2, 4, 6, 6])
    model = net.model()
    result = fold(model)
    assert verdicts(result) == ["folded", "kept"]
    assert {tensor.name for tensor in result.model.graph.initializer} >= set(statistics)
    assert_same_function(model, result.model)


def test_trap_07_a_norm_that_does_nothing_between_the_caller_and_the_caller():
    """Both names have to stay, so an Identity takes its place."""
    net = Net()
    statistics = [net.constant(np.full(4, value, np.float32)) for value in (1, 0, 0, 1)]
    net.output(net.batch_norm(net.input([2, 4, 6, 6]), 4, statistics=statistics, epsilon=0.0), [2, 4, 6, 6])
    result = fold(net.model())
    assert verdicts(result) == ["folded"]
    assert zoo.op_types(result.model) == ["Identity"]
    assert np.array_equal(*zoo.run(net.model()), *zoo.run(result.model))


# ---- 14: pairing by dataflow ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op_type", "code"),
    [
        *((op_type, "nonlinear") for op_type in ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSwish", "Erf")),
        ("Softplus", "nonlinear"),
        ("Softmax", "nonlinear"),
        ("GlobalMaxPool", "unsupported_op"),
    ],
)
def test_trap_14_an_op_between_conv_and_norm_stops_the_fold(op_type, code):
    net = Net()
    y = net.node(op_type, net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3))
    net.output(net.batch_norm(y, 4), [2, 4, None, None])
    assert_kept(net.model(), code, "graph_output")


@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        pytest.param("Dropout", {}, id="dropout"),
        pytest.param("Identity", {}, id="identity"),
        pytest.param("GlobalAveragePool", {}, id="global-average"),
        pytest.param("AveragePool", {"kernel_shape": [2, 2]}, id="average"),
        pytest.param("AveragePool", {"kernel_shape": [2, 2], "pads": [1] * 4}, id="average-of-what-is-there"),
    ],
)
def test_trap_14_an_op_that_commutes_with_the_norm_lets_it_pass(op_type, attributes):
    """The weights of each average sum to 1: Σ wᵢ·(s·xᵢ + t) = s·Σ wᵢxᵢ + t."""
    net = Net()
    y = net.node(op_type, net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3), **attributes)
    net.output(net.batch_norm(y, 4), [2, 4, None, None])
    assert zoo.op_types(assert_folded(net.model())) == ["Conv", op_type]


def test_trap_14_an_average_that_counts_its_padding_passes_no_shift():
    """At the border its weights sum to less than 1: the scale goes, and one Add stays behind it."""
    net = Net()
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3)
    y = net.node("AveragePool", y, kernel_shape=[2, 2], pads=[1] * 4, count_include_pad=1)
    net.output(net.batch_norm(y, 4), [2, 4, 5, 5])
    model = net.model()
    assert zoo.op_types(assert_folded(model)) == ["Conv", "AveragePool", "Add"]
    s, t = affine(model)
    right, conv = zoo.run(model)[0], zoo.run(without_the_norm(model))[0]
    shifted = s.reshape(-1, 1, 1) * conv + t.reshape(-1, 1, 1)
    border = np.ones((5, 5), bool)
    border[1:-1, 1:-1] = False
    counts = np.where(border, 0.5, 1)
    counts[0, 0] = counts[0, -1] = counts[-1, 0] = counts[-1, -1] = 0.25
    wrong = shifted + (counts - 1) * t.reshape(-1, 1, 1)
    assert np.abs(right - shifted).max() < 1e-5 * np.abs(right).max()
    assert np.abs(right - wrong).max() > 0.1 * np.abs(right).max()


@pytest.mark.parametrize(
    "gamma", [[1, 2, 3, 4], [1, 2, -3, 4], [1, 2, 0, 4]], ids=["positive", "mixed", "zero"]
)
def test_trap_14_the_largest_stays_the_largest_under_positive_scales_alone(gamma):
    net = Net()
    y = net.node("MaxPool", net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3), kernel_shape=[2, 2], pads=[1] * 4)
    statistics = [net.constant(np.float32(gamma)), *net.statistics(4)[1:]]
    net.output(net.batch_norm(y, 4, statistics=statistics), [2, 4, 5, 5])
    if min(gamma) < 0:
        assert_kept(net.model(), "negative_scale", "graph_output")
    else:
        assert zoo.op_types(assert_folded(net.model())) == ["Conv", "MaxPool"]


def test_trap_14_neighbours_by_name_are_not_neighbours_by_dataflow():
    """conv_1 → relu → bn_1 and conv_2 → bn_2, listed so that conv_2 precedes bn_1."""
    net = Net()
    x = net.input([2, 3, 6, 6])
    one, two = (net.node("Conv", x, net.weight(4, 3, 3, 3), net.weight(4), name=f"conv_{i}") for i in (1, 2))
    one = net.node("Relu", one)
    net.output(net.batch_norm(one, 4, name="bn_1"), [2, 4, 4, 4])
    net.output(net.batch_norm(two, 4, name="bn_2"), [2, 4, 4, 4])
    net.nodes = [net.nodes[i] for i in (0, 2, 1, 3, 4)]
    model = net.model()
    result = fold(model)
    assert [(site.norm.name, site.verdict) for site in result.sites] == [("bn_1", "kept"), ("bn_2", "folded")]
    assert result.sites[1].fold.into == ("conv_2",)
    assert_same_function(model, result.model)


def without_the_norm(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model up to what enters its BatchNormalization, which ends it."""
    shorter = onnx.ModelProto()
    shorter.CopyFrom(model)
    norm = shorter.graph.node.pop()
    shorter.graph.output[0].name = norm.input[0]
    return shorter


# ---- 15: twice is once ----------------------------------------------------------------------------------


def several_verdicts() -> onnx.ModelProto:
    """Folded, kept, half of a chain: one of each. (A padded conv and a residual read the one that is kept.)"""
    net = Net()
    x = net.input([2, 4, 6, 6])
    y = net.batch_norm(net.node("Relu", net.batch_norm(net.conv(x, 4, 4, 3, 3), 4)), 4)
    y = net.node("Add", net.conv(y, 4, 4, 3, 3, pads=[1] * 4, bias=False), y)
    y = net.batch_norm(net.conv_transpose(y, 4, 4, 3, 3, groups=2), 4)
    net.output(net.node("Sub", y, net.weight(6)), [2, 4, 6, 6])
    z = net.node("MatMul", net.node("Reshape", x, net.constant(np.array([2, -1]))), net.weight(144, 5))
    net.output(net.node("Div", net.batch_norm(z, 5), net.weight(1, 5)), [2, 5])
    return net.model()


def norms_that_nobody_reads() -> onnx.ModelProto:
    """While they are there, they are readers of the conv beside the norm that counts."""
    net = Net()
    y = net.conv(net.input([2, 4, 6, 6]), 4, 4, 3, 3)
    z = net.batch_norm(y, 4)
    net.batch_norm(net.batch_norm(z, 4), 4)
    net.batch_norm(y, 4)
    net.output(net.node("Relu", z), [2, 4, 4, 4])
    return net.model()


def an_add_that_could_go_back() -> onnx.ModelProto:
    """In front of a padded conv an Add stays; the conv before the sum takes it, and could not take the norm."""
    net = Net()
    x = net.node("Relu", net.input([2, 4, 6, 6]))
    y = net.node("Add", x, net.conv(net.node("GlobalAveragePool", x), 4, 4, 1, 1))
    net.output(net.conv(net.batch_norm(y, 4), 4, 4, 3, 3, pads=[1] * 4), [2, 4, 6, 6])
    return net.model()


def a_split_that_is_half_used() -> onnx.ModelProto:
    net = Net()
    y = net.batch_norm(net.node("Relu", net.input([2, 4, 6, 6])), 4)
    halves = net.node("Split", y, net.constant(np.array([3, 3])), axis=2, outputs=2)
    net.output(net.batch_norm(halves[0], 4), [2, 4, 3, 6])
    return net.model()


BUILDS = [
    zoo.conv_bn,
    several_verdicts,
    lambda: two_convs("norm"),
    norms_that_nobody_reads,
    an_add_that_could_go_back,
    a_split_that_is_half_used,
]


@pytest.mark.parametrize("build", BUILDS)
def test_trap_15_folding_twice_is_folding_once(build):
    model = build()
    once = fold(model).model
    twice = fold(once).model
    left = {several_verdicts: 1, a_split_that_is_half_used: 1}
    assert zoo.op_types(once).count("BatchNormalization") == left.get(build, 0)
    assert not {"internal", "malformed"} & set(codes(fold(model)))
    assert content(twice) == content(once) != content(model)
    assert_same_function(model, once)


def test_trap_15_what_stays_behind_of_a_norm_is_folded_at_once_too():
    once = fold(an_add_that_could_go_back())
    assert [site.norm.kind for site in once.sites] == ["batch_norm"]
    assert zoo.op_types(once.model) == ["Relu", "GlobalAveragePool", "Conv", "Add", "Conv"]


@pytest.mark.parametrize("build", BUILDS)
def test_trap_15_a_proof_that_never_holds_leaves_everything_as_it_is(build, monkeypatch):
    """Each refused fold opens another way; they come to an end."""
    failed = Proof(0, 0.0, 1.0, (Reason("internal", "it is made to fail"),))
    monkeypatch.setattr(planner, "prove", lambda *arguments: failed)
    model = build()
    result = fold(model)
    assert set(verdicts(result)) == {"kept"}
    assert "internal" in codes(result)
    assert content(result.model) == content(model)


def test_trap_15_a_file_and_an_object_fold_alike(tmp_path):
    """Weights of 9 KB stay in the file until they are needed."""
    net = Net()
    y = net.conv(net.input([1, 16, 6, 6]), 16, 16, 3, 3)
    net.output(net.batch_norm(y, 16), [1, 16, 4, 4])
    model = net.model()
    path, folded = tmp_path / "model.onnx", tmp_path / "folded.onnx"
    onnx.save(model, path)
    result = fold(path)
    result.save(folded)
    assert content(result.model) == content(fold(model).model) == content(onnx.load(folded))
    assert_same_function(model, result.model)


def test_trap_15_nodes_in_any_order_fold_alike():
    """ONNX Runtime sorts the nodes itself, so such models exist."""
    net = Net()
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3)
    net.output(net.batch_norm(y, 4), [2, 4, 4, 4])
    net.nodes.reverse()
    assert_folded(net.model())


def test_trap_15_an_activation_that_was_fused_stays_a_border():
    """Conv → BN → Relu → BN: the second norm may not follow the first into the conv on a second run."""
    net = Net()
    y = net.batch_norm(net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3), 4)
    net.output(net.batch_norm(net.node("Relu", y), 4), [2, 4, 4, 4])
    result = fold(fold(net.model()).model)
    assert (verdicts(result), codes(result)) == (["kept"], ["nonlinear", "graph_output"])
