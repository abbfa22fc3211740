"""Traps about dataflow: who else reads, what is a pair, and that twice is once."""

import numpy as np
import onnx
import pytest

from tests import zoo
from tests.traps.common import assert_folded, assert_kept, assert_same_function, codes, content, fold, verdicts
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
    assert_kept(net.model(), code)


def test_trap_06_a_captured_output_names_each_body():
    net = Net()
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3)
    net.output(net.batch_norm(y, 4), [2, 4, 4, 4])
    read_by_a_body(net, y)
    assert codes(fold(net.model())) == ["captured", "captured"]


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


# ---- 14: pairing by dataflow ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op_type", "code"),
    [
        *((op_type, "nonlinear") for op_type in ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSwish", "Erf")),
        ("Softplus", "nonlinear"),
        ("Dropout", "unsupported_op"),
        ("Identity", "unsupported_op"),
        ("GlobalAveragePool", "unsupported_op"),
    ],
)
def test_trap_14_an_op_between_conv_and_norm_stops_the_fold(op_type, code):
    net = Net()
    y = net.node(op_type, net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3))
    net.output(net.batch_norm(y, 4), [2, 4, None, None])
    assert_kept(net.model(), code)


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


# ---- 15: twice is once ----------------------------------------------------------------------------------


def several_verdicts() -> onnx.ModelProto:
    """Folded, kept, half of a chain: one of each."""
    net = Net()
    x = net.input([2, 4, 6, 6])
    y = net.batch_norm(net.node("Relu", net.batch_norm(net.conv(x, 4, 4, 3, 3), 4)), 4)
    y = net.node("Add", net.conv(y, 4, 4, 3, 3, pads=[1] * 4, bias=False), y)
    y = net.batch_norm(net.conv_transpose(y, 4, 4, 3, 3, groups=2), 4)
    net.output(net.node("Sub", y, net.weight(6)), [2, 4, 6, 6])
    z = net.node("MatMul", net.node("Reshape", x, net.constant(np.array([2, -1]))), net.weight(144, 5))
    net.output(net.node("Div", net.batch_norm(z, 5), net.weight(1, 5)), [2, 5])
    return net.model()


@pytest.mark.parametrize("build", [zoo.conv_bn, several_verdicts, lambda: two_convs("norm")])
def test_trap_15_folding_twice_is_folding_once(build):
    model = build()
    once = fold(model).model
    twice = fold(once).model
    assert content(twice) == content(once) != content(model)
    assert_same_function(model, once)


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
    assert (verdicts(result), codes(result)) == (["kept"], ["nonlinear"])
