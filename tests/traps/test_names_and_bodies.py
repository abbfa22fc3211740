"""Traps about scopes: fresh names, bodies of If and Loop, functions."""

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests import zoo
from tests.traps.common import LIMITS, all_graphs, assert_folded, assert_kept, feeds_of, fold, sparse_tensor
from tests.zoo import Net

# ---- 10: names ------------------------------------------------------------------------------------------


def taken_by_an_initializer(net, y, name):
    net.constant(np.full((1, 4, 1, 1), 7, np.float32), name)
    return net.node("Max", y, name)


def taken_by_an_activation(net, y, name):
    return net.node("Mul", net.node("Neg", y, outputs=[name]), y)


def taken_by_an_input(net, y, name):
    net.input([1, 4, 4, 4], name)
    return net.node("Add", y, name)


def taken_by_an_output(net, y, name):
    return net.node("Relu", y, outputs=[name])


def taken_by_a_sparse_initializer(net, y, name):
    net.sparse.append(sparse_tensor(np.diag([1, 2, 3, 4]).astype(np.float32), name))
    return net.node("Add", y, name)


def taken_inside_a_body(net, y, name):
    then, otherwise = Net(prefix="then."), Net(prefix="else.")
    then.output(then.node("Mul", y, then.constant(np.float32(3), name)), [1, 4, 4, 4])
    otherwise.output(otherwise.node("Neg", y), [1, 4, 4, 4])
    return branch(net, then, otherwise)


def taken_inside_a_body_without_nodes(net, y, name):
    then, otherwise = Net(prefix="then."), Net(prefix="else.")
    then.output(then.constant(np.full((1, 4, 4, 4), 3, np.float32), name), [1, 4, 4, 4])
    otherwise.output(otherwise.constant(np.full((1, 4, 4, 4), 5, np.float32)), [1, 4, 4, 4])
    return net.node("Add", y, branch(net, then, otherwise))


def taken_inside_a_function(net, y, name):
    inner = Net()
    inner.output(inner.node("Neg", inner.input(None), outputs=[name]))
    net.define("Negate", inner)
    return net.node("Negate", y, domain="local")


def taken_by_a_function(net, y, name):
    inner = Net()
    inner.output(inner.node("Neg", inner.input(None)))
    net.define(name, inner)
    return net.node(name, y, domain="local")


def branch(net: Net, then: Net, otherwise: Net) -> str:
    condition = net.input([], "condition", dtype=np.bool_)
    return net.node("If", condition, then_branch=then.graph(), else_branch=otherwise.graph())


TAKEN = [
    taken_by_an_initializer,
    taken_by_an_activation,
    taken_by_an_input,
    taken_by_an_output,
    taken_by_a_sparse_initializer,
    taken_inside_a_body,
    taken_inside_a_body_without_nodes,
    taken_inside_a_function,
    taken_by_a_function,
]


@pytest.mark.parametrize("take", TAKEN)
def test_trap_10_a_new_name_is_new_in_every_scope(take):
    """What an innocent fold calls its new bias is taken here before it comes."""
    net = Net()
    y = net.batch_norm(net.conv(net.input([1, 3, 6, 6]), 3, 4, 3, 3, bias=False), 4)
    plain = Net()
    plain.nodes, plain.inputs, plain.initializers = [*net.nodes], [*net.inputs], [*net.initializers]
    plain.output(y, [1, 4, 4, 4])
    (wish,) = {t.name for t in fold(plain.model()).model.graph.initializer} - {"w1"}
    net.output(take(net, y, wish), [1, 4, 4, 4])
    model = net.model()
    folded = assert_folded(model, feeds_of(model))
    definitions = Counter(name for graph in all_graphs(folded) for name in defined_in(graph))
    assert [name for name, count in definitions.items() if count > 1] == []
    assert definitions.keys() >= {wish} or take is taken_by_a_function


def defined_in(graph: Any) -> set[str]:
    """Every value a graph or function defines, once each."""
    names = {name for node in graph.node for name in node.output}
    if isinstance(graph, onnx.FunctionProto):
        return names | set(graph.input) - {"x"}
    names |= {tensor.name for tensor in graph.initializer} | {s.values.name for s in graph.sparse_initializer}
    return names | {info.name for info in graph.input} - {"x"}


def test_trap_10_the_new_weight_of_a_shared_one_has_a_new_name_too():
    net = Net()
    x, weight = net.input([1, 3, 6, 6]), net.weight(4, 3, 3, 3)
    y = net.node("Conv", x, weight, name="block")
    net.output(net.batch_norm(y, 4), [1, 4, 4, 4])
    net.output(net.node("Conv", x, weight), [1, 4, 4, 4])
    net.output(net.node("Add", x, net.constant(np.float32(2), "block.weight")), [1, 3, 6, 6])
    assert_folded(net.model())


# ---- 20: bodies and functions ---------------------------------------------------------------------------


def normed_body(prefix: str, x: str, seed: int = 1, channels: int = 3, opset: int = 17) -> Net:
    """Conv → BatchNorm on an outer tensor, with its own initializers."""
    body = Net(prefix=prefix, seed=seed, opset=opset)
    y = body.batch_norm(body.conv(x, channels, channels, 3, 3), channels)
    body.output(y, [1, channels, 4, 4])
    return body


@pytest.mark.parametrize("condition", [True, False])
def test_trap_20_a_norm_in_a_branch_folds_into_the_conv_beside_it(condition):
    net = Net()
    x = net.input([1, 3, 6, 6])
    net.output(branch(net, normed_body("then.", x), normed_body("else.", x, seed=2)), [1, 3, 4, 4])
    model = net.model()
    assert_folded(model, feeds_of(model, condition))


@pytest.mark.parametrize("condition", [True, False])
def test_trap_20_a_body_that_captures_its_weights(condition):
    """Both branches read one outer weight: neither may change it for the other, nor for the main graph."""
    net = Net()
    x, weight = net.input([1, 3, 6, 6]), net.weight(3, 3, 3, 3)
    then, otherwise = Net(prefix="then.", seed=1), Net(prefix="else.", seed=2)
    for body in (then, otherwise):
        body.output(body.batch_norm(body.node("Conv", x, weight), 3), [1, 3, 4, 4])
    net.output(net.node("Add", branch(net, then, otherwise), net.node("Conv", x, weight)), [1, 3, 4, 4])
    model = net.model()
    folded = assert_folded(model, feeds_of(model, condition))
    assert np.array_equal(zoo.initializer(folded, weight), zoo.initializer(model, weight))


def test_trap_20_sibling_bodies_may_use_the_same_names():
    net = Net()
    x = net.input([1, 3, 6, 6])
    net.output(branch(net, normed_body("body.", x), normed_body("body.", x, seed=2)), [1, 3, 4, 4])
    model = net.model()
    for condition in (True, False):
        assert_folded(model, feeds_of(model, condition))


@pytest.mark.parametrize("alone", [True, False], ids=["only-reader", "read-in-both-branches"])
def test_trap_20_a_norm_in_a_body_does_not_reach_a_conv_outside(alone):
    net = Net()
    x = net.input([1, 3, 6, 6])
    y = net.conv(x, 3, 3, 3, 3)
    then, otherwise = Net(prefix="then."), Net(prefix="else.")
    then.output(then.batch_norm(y, 3), [1, 3, 4, 4])
    z = otherwise.conv(x, 3, 3, 3, 3) if alone else otherwise.node("Neg", y)
    otherwise.output(z, [1, 3, 4, 4])
    net.output(branch(net, then, otherwise), [1, 3, 4, 4])
    assert_kept(net.model(), "captured", "graph_output")


def test_trap_20_a_conv_output_that_leaves_its_body_stays():
    net = Net()
    x = net.input([1, 3, 6, 6])
    condition = net.input([], "condition", dtype=np.bool_)
    bodies = {}
    for which in ("then_branch", "else_branch"):
        body = Net(prefix=f"{which}.")
        y = body.conv(x, 3, 3, 3, 3)
        for output in (y, body.batch_norm(y, 3)):
            body.output(output, [1, 3, 4, 4])
        bodies[which] = body.graph()
    for y in net.node("If", condition, outputs=2, **bodies):
        net.output(y, [1, 3, 4, 4])
    assert_kept(net.model(), "graph_output")


def test_trap_20_a_norm_behind_an_if_is_kept():
    net = Net()
    x = net.input([1, 3, 6, 6])
    bodies = [Net(prefix=prefix) for prefix in ("then.", "else.")]
    for body in bodies:
        body.output(body.conv(x, 3, 3, 3, 3), [1, 3, 4, 4])
    net.output(net.batch_norm(branch(net, *bodies), 3), [1, 3, 4, 4])
    assert_kept(net.model(), "unsupported_op", "graph_output")


def test_trap_20_a_norm_in_front_of_an_if_is_kept():
    """Each body would have to take its scale and shift; both could."""
    net = Net()
    y = net.batch_norm(net.input([1, 3, 6, 6]), 3)
    bodies = [Net(prefix=prefix) for prefix in ("then.", "else.")]
    for body in bodies:
        body.output(body.conv(y, 3, 3, 3, 3), [1, 3, 4, 4])
    net.output(branch(net, *bodies), [1, 3, 4, 4])
    assert_kept(net.model(), "no_producer", "captured")


@pytest.mark.parametrize("condition", [True, False])
def test_trap_20_a_norm_in_a_branch_folds_into_the_conv_behind_it(condition):
    net = Net()
    x = net.input([1, 3, 6, 6])
    bodies = [Net(prefix=prefix, seed=seed) for seed, prefix in enumerate(("then.", "else."))]
    for body in bodies:
        body.output(body.conv(body.batch_norm(x, 3), 3, 3, 3, 3), [1, 3, 4, 4])
    net.output(branch(net, *bodies), [1, 3, 4, 4])
    model = net.model()
    assert_folded(model, feeds_of(model, condition))


def test_trap_20_a_norm_in_a_loop():
    net = Net()
    body = Net(prefix="body.")
    body.inputs += [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
    ]
    carried = body.input([1, 3, 6, 6], "carried")
    y = body.batch_norm(body.conv(carried, 3, 3, 3, 3, pads=[1] * 4), 3)
    body.output(body.node("Identity", "go"), [], dtype=np.bool_)
    body.output(y, [1, 3, 6, 6])
    trips, go = net.constant(np.array(3)), net.constant(np.array(True))
    net.output(net.node("Loop", trips, go, net.input([1, 3, 6, 6]), body=body.graph()), [1, 3, 6, 6])
    assert_folded(net.model())


def test_trap_20_a_norm_in_a_scan():
    net = Net()
    body = Net(prefix="body.")
    y = body.conv(body.input([2, 3, 6, 6], "slice"), 3, 3, 3, 3)
    body.output(body.batch_norm(y, 3), [2, 3, 4, 4])
    x = net.input([3, 2, 3, 6, 6])
    net.output(net.node("Scan", x, body=body.graph(), num_scan_inputs=1), [3, 2, 3, 4, 4])
    assert_folded(net.model())


def called_twice(channels: int = 3) -> onnx.ModelProto:
    """Conv → BatchNorm inside a function, weights in Constant nodes, called two times."""
    inner = Net(seed=1)
    y = inner.conv(inner.input(None), channels, channels, 3, 3)
    inner.output(inner.batch_norm(y, channels))
    net = Net()
    net.define("Block", inner)
    y = net.input([1, channels, 8, 8])
    for _ in range(2):
        y = net.node("Block", y, domain="local")
    net.output(y, [1, channels, 4, 4])
    return net.model()


def test_trap_20_a_norm_in_a_function_folds_once_for_all_calls():
    model = called_twice()
    folded = assert_folded(model)
    assert Counter(node.op_type for node in folded.functions[0].node) == {"Constant": 2, "Conv": 1}


def test_trap_20_weights_that_a_function_is_given_are_not_constant():
    inner = Net()
    for name in ("x", "w"):
        inner.input(None, name)
    inner.output(inner.batch_norm(inner.node("Conv", "x", "w"), 3))
    net = Net()
    net.define("Block", inner)
    y = net.node("Block", net.input([1, 3, 6, 6]), net.weight(3, 3, 3, 3), domain="local")
    net.output(y, [1, 3, 4, 4])
    assert_kept(net.model(), "dynamic_weight", "graph_output")


def test_trap_20_attributes_that_a_function_is_given_are_not_known():
    inner = Net()
    y = inner.conv(inner.input(None), 3, 3, 3, 3)
    inner.output(inner.batch_norm(y, 3))
    net = Net()
    net.define("Block", inner)
    (norm,) = [node for node in net.functions[0].node if node.op_type == "BatchNormalization"]
    (epsilon,) = norm.attribute
    epsilon.ClearField("f")
    epsilon.ref_attr_name = "eps"
    net.functions[0].attribute.append("eps")
    net.output(net.node("Block", net.input([1, 3, 6, 6]), domain="local", eps=0.5), [1, 3, 4, 4])
    assert_kept(net.model(), "dynamic_weight")


def branches_of_64_channels() -> onnx.ModelProto:
    net = Net()
    x = net.input([1, 64, 6, 6])
    bodies = normed_body("then.", x, channels=64), normed_body("else.", x, channels=64)
    net.output(branch(net, *bodies), [1, 64, 4, 4])
    return net.model()


@pytest.mark.parametrize("build", [branches_of_64_channels, lambda: called_twice(64)], ids=["body", "function"])
def test_trap_20_large_weights_in_a_body_reach_the_file(build, tmp_path):
    """147 KB each: too large to be put into the graph before it is written."""
    model = build()
    path = tmp_path / "folded.onnx"
    fold(model).save(path)
    feeds = feeds_of(model)
    assert zoo.relative_error(zoo.run(model, feeds), zoo.run(path, feeds)) < LIMITS[np.float32]


def test_trap_20_a_body_before_ir_4_lists_its_new_bias():
    """Its weights lie in Constant nodes, because a body's inputs are not free to grow."""
    net = Net(opset=9, ir=3)
    x = net.input([1, 3, 6, 6])
    bodies = []
    for prefix in ("then.", "else."):
        body = Net(prefix=prefix, opset=9)
        body.output(body.batch_norm(body.conv(x, 3, 3, 3, 3, bias=False), 3), [1, 3, 4, 4])
        body.nodes[:0] = [helper.make_node("Constant", [], [t.name], value=t) for t in body.initializers]
        body.initializers.clear()
        bodies.append(body)
    net.output(branch(net, *bodies), [1, 3, 4, 4])
    model = net.model()
    onnx.checker.check_model(model)
    assert_folded(model, feeds_of(model))
