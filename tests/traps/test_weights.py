"""Traps about weights: Gemm's every form, constants in disguise, the wrong direction, quantised ones."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from normtool.formats.onnx import apply
from tests import zoo
from tests.traps.common import affine, assert_folded, assert_kept, fold, listed, sparse_tensor
from tests.zoo import Net

# ---- 9: Gemm and MatMul ---------------------------------------------------------------------------------

GEMM_C = [None, (), (1,), "n", "1n", "m1", "mn"]


@pytest.mark.parametrize("c", GEMM_C, ids=lambda c: f"c={c}")
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 1.0), (1.0, 2.5), (-0.5, 0.25)])
@pytest.mark.parametrize(("m", "k", "n"), [(3, 4, 5), (4, 4, 4)], ids=["3x4x5", "square"])
def test_trap_09_gemm(m, k, n, alpha, beta, trans_a, trans_b, c):
    net = Net()
    x = net.input([k, m] if trans_a else [m, k])
    operands = [net.weight(*((n, k) if trans_b else (k, n)))]
    shapes = {"n": (n,), "1n": (1, n), "m1": (m, 1), "mn": (m, n)}
    if c is not None:
        operands.append(net.weight(*shapes.get(c, c)))
    y = net.node("Gemm", x, *operands, alpha=alpha, beta=beta, transA=trans_a, transB=trans_b)
    net.output(net.batch_norm(y, n), [m, n])
    assert zoo.op_types(assert_folded(net.model())) == ["Gemm"]


@pytest.mark.parametrize("shared", ["weight", "shift"])
def test_trap_09_a_constant_of_two_matmuls_is_not_scaled_twice(shared):
    net = Net()
    x, weight, shift = net.input([3, 4]), net.weight(4, 5), net.weight(5)
    for _ in range(2):
        y = net.node("MatMul", x, weight if shared == "weight" else net.weight(4, 5))
        y = net.node("Add", y, shift if shared == "shift" else net.weight(5))
        net.output(net.batch_norm(y, 5), [3, 5])
    assert_folded(net.model())


def test_trap_09_gemm_with_its_weights_on_the_left_writes_rows():
    net = Net()
    y = net.node("Gemm", net.weight(4, 4), net.input([4, 4]), net.weight(4))
    net.output(net.batch_norm(y, 4), [4, 4])
    assert_kept(net.model(), "axis_mismatch", "graph_output")


@pytest.mark.parametrize("slot", ["a", "b"])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 5)], ids=str)
def test_trap_09_matmul_and_add(shape, slot):
    net = Net()
    y = net.node("MatMul", net.input([3, 4]), net.weight(4, 5))
    operands = [y, net.weight(*shape)]
    y = net.node("Add", *(operands if slot == "b" else operands[::-1]))
    net.output(net.batch_norm(y, 5), [3, 5])
    assert zoo.op_types(assert_folded(net.model())) == ["MatMul", "Add"]


def test_trap_09_matmul_alone_gets_an_add_for_the_shift():
    net = Net()
    net.output(net.batch_norm(net.node("MatMul", net.input([3, 5]), net.weight(5, 5)), 5), [3, 5])
    assert zoo.op_types(assert_folded(net.model())) == ["MatMul", "Add"]


@pytest.mark.parametrize("shared", ["b", "c"])
def test_trap_09_a_constant_of_two_gemms_is_not_scaled_twice(shared):
    net = Net()
    x, b, c = net.input([3, 4]), net.weight(4, 5), net.weight(5)
    net.output(net.batch_norm(net.node("Gemm", x, b, c, beta=2.0), 5), [3, 5])
    other = [b, net.weight(5)] if shared == "b" else [net.weight(4, 5), c]
    net.output(net.batch_norm(net.node("Gemm", x, *other), 5), [3, 5])
    assert_folded(net.model())


@pytest.mark.parametrize("c", [(), (1,), (3, 1)], ids=str)
def test_trap_09_c_grows_where_the_input_list_states_its_old_shape(c):
    """Before IR version 4 every initializer is listed among the inputs, shape and all."""
    net = Net(opset=9, ir=3)
    y = net.node("Gemm", net.input([3, 4]), net.weight(4, 5), net.weight(*c))
    net.output(net.batch_norm(y, 5), [3, 5])
    assert_folded(listed(net).model())


def empty_optional_bias(net, x):
    return net.node("Conv", x, net.weight(4, 3, 3, 3), "")


def built_zero_bias(net, x):
    """As torch.onnx writes `bias=None`."""
    weight = net.weight(4, 3, 3, 3)
    shape = net.node("Expand", net.node("Shape", weight, start=0, end=1), net.constant(np.array([1])))
    zero = net.node("CastLike", net.constant(np.float32(0)), x)
    return net.node("Conv", x, weight, net.node("Expand", zero, shape))


def constant_of_shape_weight(net, x):
    fill = numpy_helper.from_array(np.array([0.25], np.float32))
    weight = net.node("ConstantOfShape", net.constant(np.array([4, 3, 3, 3])), value=fill)
    return net.node("Conv", x, weight, net.node("ConstantOfShape", net.constant(np.array([4]))))


def constant_node_weight(net, x):
    weight = numpy_helper.from_array(net.rng.standard_normal((4, 3, 3, 3)).astype(np.float32))
    return net.node("Conv", x, net.node("Constant", value=weight))


def value_floats_bias(net, x):
    return net.node("Conv", x, net.weight(4, 3, 3, 3), net.node("Constant", value_floats=[1.5, -2.0, 0.5, 3.0]))


def transposed_weight(net, x):
    return net.node("Conv", x, net.node("Transpose", net.weight(3, 4, 3, 3), perm=[1, 0, 2, 3]))


def cast_weight(net, x):
    weight = net.constant(net.rng.standard_normal((4, 3, 3, 3)).astype(np.float16))
    return net.node("Conv", x, net.node("Cast", weight, to=TensorProto.FLOAT))


def identity_weight(net, x):
    return net.node("Conv", x, net.node("Identity", net.weight(4, 3, 3, 3)))


def reshaped_weight(net, x):
    return net.node("Conv", x, net.node("Reshape", net.weight(4, 27), net.constant(np.array([0, 3, 3, -1]))))


def sparse_weight(net, x):
    dense = net.rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    dense[net.rng.random(dense.shape) < 0.7] = 0
    net.sparse.append(sparse_tensor(dense, "sparse"))
    return net.node("Conv", x, "sparse")


def sparse_constant_weight(net, x):
    dense = net.rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    dense[net.rng.random(dense.shape) < 0.7] = 0
    return net.node("Conv", x, net.node("Constant", sparse_value=sparse_tensor(dense, "")))


DISGUISES = [
    empty_optional_bias,
    built_zero_bias,
    constant_of_shape_weight,
    constant_node_weight,
    value_floats_bias,
    transposed_weight,
    cast_weight,
    identity_weight,
    reshaped_weight,
    sparse_weight,
    sparse_constant_weight,
]


@pytest.mark.parametrize("build", DISGUISES)
def test_trap_12_a_constant_in_disguise_is_a_constant(build):
    """And what computed it is gone with it."""
    net = Net()
    net.output(net.batch_norm(build(net, net.input([2, 3, 6, 6])), 4), [2, 4, 4, 4])
    folded = assert_folded(net.model())
    assert [op for op in zoo.op_types(folded) if op != "Constant"] == ["Conv"]
    assert len(stored_names(folded)) == 2


def stored_names(model: onnx.ModelProto) -> list[str]:
    dense, sparse = model.graph.initializer, model.graph.sparse_initializer
    constants = [node.output[0] for node in model.graph.node if node.op_type == "Constant"]
    return [*(t.name for t in dense), *(s.values.name for s in sparse), *constants]


def test_trap_12_computed_statistics_are_constants_too():
    net = Net()
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3)
    gamma, beta, mean, var = net.statistics(4)
    statistics = [net.node("Identity", gamma), net.node("Neg", beta), mean, net.node("Mul", var, var)]
    net.output(net.batch_norm(y, 4, statistics=statistics), [2, 4, 4, 4])
    assert zoo.op_types(assert_folded(net.model())) == ["Conv"]


def test_trap_12_one_weight_behind_two_identities_belongs_to_both():
    net = Net()
    x, weight = net.input([2, 3, 6, 6]), net.weight(4, 3, 3, 3)
    for _ in range(2):
        y = net.node("Conv", x, net.node("Identity", weight), net.weight(4))
        net.output(net.batch_norm(y, 4), [2, 4, 4, 4])
    assert_folded(net.model())


def test_trap_12_a_weight_computed_from_data_is_none():
    net = Net()
    x = net.input([2, 3, 6, 6])
    scale = net.node("ReduceMean", x, keepdims=0)
    y = net.node("Conv", x, net.node("Mul", net.weight(4, 3, 3, 3), scale))
    net.output(net.batch_norm(y, 4), [2, 4, 4, 4])
    assert_kept(net.model(), "dynamic_weight", "graph_output")


def test_trap_12_a_constant_too_large_to_compute_is_refused_not_fatal():
    """A few bytes of sparse data behind an Identity claim half a gigabyte."""
    net = Net()
    values = numpy_helper.from_array(np.ones(1, np.float32), "huge")
    index = numpy_helper.from_array(np.array([5]), "huge.i")
    net.sparse.append(helper.make_sparse_tensor(values, index, (4, 3, 1 << 13, 1 << 11)))
    y = net.node("Conv", net.input([1, 3, 1 << 13, 1 << 11]), net.node("Identity", "huge"))
    net.output(net.batch_norm(y, 4), [1, 4, 1, 1])
    assert_kept(net.model(), "dynamic_weight", "graph_output")


# ---- 16: the other direction, and γ of every sign -----------------------------------------------------------


FORWARD = [
    pytest.param(lambda net, y: net.conv(y, 4, 4, 3, 3), [2, 4, 7, 7], "Conv", id="conv"),
    pytest.param(lambda net, y: net.conv(y, 4, 4, 3, 3, bias=False), [2, 4, 7, 7], "Conv", id="no-bias"),
    pytest.param(
        lambda net, y: net.conv(y, 4, 6, 3, 3, groups=2, strides=[2, 1], dilations=[1, 2]),
        [2, 4, 7, 7],
        "Conv",
        id="groups-strides-dilations",
    ),
    pytest.param(lambda net, y: net.conv(y, 4, 8, 2, 2, groups=4), [2, 4, 7, 7], "Conv", id="depthwise"),
    pytest.param(lambda net, y: net.conv(y, 4, 4, 3, auto_pad="VALID"), [2, 4, 7], "Conv", id="auto-pad-valid"),
    pytest.param(
        lambda net, y: net.conv_transpose(y, 4, 4, 1, 1, groups=2),
        [2, 4, 7, 7],
        "ConvTranspose",
        id="pointwise",
    ),
    pytest.param(
        lambda net, y: net.node("Gemm", y, net.weight(4, 4), net.weight(4), alpha=0.5, beta=2.0),
        [3, 4],
        "Gemm",
        id="gemm",
    ),
    pytest.param(
        lambda net, y: net.node("Gemm", y, net.weight(5, 4), net.weight(3, 1), transB=1),
        [3, 4],
        "Gemm",
        id="gemm-with-a-column",
    ),
]


@pytest.mark.parametrize(("reader", "shape", "op_type"), FORWARD)
def test_trap_16_a_norm_in_front_of_a_conv_without_padding_goes_forward(reader, shape, op_type):
    net = Net()
    y = reader(net, net.batch_norm(net.input(shape), 4))
    net.output(y, [None] * len(shape))
    assert zoo.op_types(assert_folded(net.model())) == [op_type]


@pytest.mark.parametrize("behind", ["Add", "Relu"])
def test_trap_16_a_matmul_takes_the_scale_and_hands_the_shift_on(behind):
    """(s·x + t)·W = x·(diag(s)·W) + tW, where a constant follows that takes it; else one Add stays in front."""
    net = Net()
    y = net.node("MatMul", net.batch_norm(net.input([3, 4]), 4), net.weight(4, 4))
    net.output(net.node(behind, y, *([net.weight(4)] if behind == "Add" else [])), [3, 4])
    left = ["MatMul", "Add"] if behind == "Add" else ["Add", "MatMul", "Relu"]
    assert zoo.op_types(assert_folded(net.model())) == left


PADDED = [
    pytest.param("conv", (3, 3), {"pads": [1, 1, 1, 1]}, id="pads"),
    pytest.param("conv", (3, 3), {"pads": [0, 0, 0, 1]}, id="one-side"),
    pytest.param("conv", (3, 3), {"auto_pad": "SAME_UPPER"}, id="auto-pad"),
    pytest.param("conv", (3, 3), {"pads": [1, 1, 1, 1], "groups": 4}, id="depthwise"),
    pytest.param("conv_transpose", (3, 3), {}, id="conv-transpose"),
    pytest.param("conv_transpose", (1, 1), {"strides": [2, 2]}, id="conv-transpose-with-holes"),
]


@pytest.mark.parametrize(("layer", "kernel", "attributes"), PADDED)
def test_trap_16_padding_takes_the_scale_and_not_the_shift(layer, kernel, attributes):
    """W ⋆ (s·x + t) = (W·s) ⋆ (x + t/s): the zeros stay zeros, and one Add stays in front."""
    net = Net()
    y = net.batch_norm(net.input([2, 4, 6, 6]), 4)
    net.output(getattr(net, layer)(y, 4, 4, *kernel, **attributes), [2, 4, None, None])
    folded = assert_folded(net.model())
    assert [node.op_type for node in folded.graph.node] == ["Add", net.nodes[-1].op_type]
    assert folded.graph.node[0].input[0] == "x"


@pytest.mark.parametrize(("layer", "kernel", "attributes"), PADDED)
def test_trap_16_a_norm_that_meets_padding_with_a_dead_channel_is_kept(layer, kernel, attributes):
    """Where s is 0, the shift of that channel has nothing to be divided by."""
    net = Net()
    statistics = [net.constant(np.array([1, 0, 2, 3], np.float32)), *net.statistics(4)[1:]]
    y = net.batch_norm(net.input([2, 4, 6, 6]), 4, statistics=statistics)
    net.output(getattr(net, layer)(y, 4, 4, *kernel, **attributes), [2, 4, None, None])
    assert_kept(net.model(), "no_producer", "padded_shift", "degenerate_stats")


def test_trap_16_folding_as_if_there_were_no_padding_would_have_shown():
    net = Net()
    y = net.batch_norm(net.input([2, 4, 6, 6]), 4)
    net.output(net.conv(y, 4, 4, 3, 3, bias=False, pads=[1] * 4), [2, 4, 6, 6])
    model = net.model()
    s, t = affine(model)
    weight = zoo.initializer(model, net.nodes[-1].input[1])
    wrong = Net()
    x = wrong.input([2, 4, 6, 6])
    moved = wrong.constant((weight * s.reshape(1, -1, 1, 1)).astype(np.float32))
    bias = wrong.constant((weight.sum(axis=(2, 3)) @ t).astype(np.float32))
    wrong.output(wrong.node("Conv", x, moved, bias, pads=[1] * 4), [2, 4, 6, 6])
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)}
    (right,), (got,) = zoo.run(model, feeds), zoo.run(wrong.model(), feeds)
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    assert np.abs(got - right)[inside].max() < 1e-5
    assert np.abs(got - right).max() > 0.2 * np.abs(right).max()


@pytest.mark.parametrize("also", ["Relu", "output"])
def test_trap_16_a_norm_that_somebody_else_reads_does_not_go_forward(also):
    net = Net()
    y = net.batch_norm(net.input([2, 4, 6, 6]), 4)
    net.output(net.conv(y, 4, 4, 3, 3), [2, 4, 4, 4])
    net.output(y if also == "output" else net.node(also, y), [2, 4, 6, 6])
    assert_kept(net.model(), "no_producer", "graph_output" if also == "output" else "nonlinear")


def test_trap_16_all_readers_take_it_or_none_does():
    """Two convs and an average over all positions; a third conv has a weight that is computed."""
    net = Net()
    y = net.batch_norm(net.input([2, 4, 6, 6]), 4)
    net.output(net.conv(y, 4, 4, 3, 3), [2, 4, 4, 4])
    net.output(net.conv(y, 4, 5, 1, 1), [2, 5, 6, 6])
    net.output(net.conv(net.node("GlobalAveragePool", y), 4, 2, 1, 1), [2, 2, 1, 1])
    assert zoo.op_types(assert_folded(net.model())) == ["Conv", "Conv", "GlobalAveragePool", "Conv"]
    net.output(net.node("Conv", y, net.input([4, 4, 3, 3], "w")), [2, 4, 4, 4])
    assert_kept(net.model(), "no_producer", "dynamic_weight")


@pytest.mark.parametrize("absorber", ["conv", "conv_transpose", "matmul"])
@pytest.mark.parametrize(
    "gamma", [[0, 0, 0, 0], [0, 1, -1, 0], [-1, -2, -0.5, -3]], ids=["zero", "mixed", "negative"]
)
def test_trap_16_gamma_of_any_sign(gamma, absorber):
    """A dead channel still gives relu(β); a negative γ is no rounding error."""
    net = Net()
    if absorber == "matmul":
        y, shape = net.node("MatMul", net.input([3, 4]), net.weight(4, 4)), [3, 4]
    else:
        y, shape = getattr(net, absorber)(net.input([2, 4, 3, 3]), 4, 4, 1, 1), [2, 4, 3, 3]
    statistics = net.statistics(4)
    statistics[0] = net.constant(np.array(gamma, np.float32))
    statistics[1] = net.constant(np.array([2, 3, 4, 5], np.float32))
    net.output(net.node("Relu", net.batch_norm(y, 4, statistics=statistics)), shape)
    model = net.model()
    folded = assert_folded(model)
    if not any(gamma):
        assert np.allclose(np.moveaxis(zoo.run(folded)[0], 1, -1), [2, 3, 4, 5], rtol=1e-6)


CONVS = [
    pytest.param(3, 4, 1, (3,), {}, id="1d"),
    pytest.param(4, 4, 1, (3, 3), {"pads": [1, 1, 1, 1]}, id="cin-is-cout-padded"),
    pytest.param(4, 4, 4, (3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, id="depthwise-auto-pad"),
    pytest.param(4, 8, 2, (3, 3), {"dilations": [2, 2]}, id="groups-dilated"),
    pytest.param(4, 8, 4, (2, 2), {"pads": [0, 1, 2, 0]}, id="groups-uneven-pads"),
    pytest.param(2, 3, 1, (2, 2, 2), {"strides": [1, 2, 1]}, id="3d"),
]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("cin", "cout", "groups", "kernel", "attributes"), CONVS)
def test_trap_16_padding_does_not_matter_backward(cin, cout, groups, kernel, attributes, bias):
    net = Net()
    y = net.conv(
        net.input([2, cin, *[7] * len(kernel)]), cin, cout, *kernel, groups=groups, bias=bias, **attributes
    )
    net.output(net.batch_norm(y, cout), [2, cout, *[None] * len(kernel)])
    assert_folded(net.model())


# ---- 17: Concat -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (3, 1)], ids=str)
def test_trap_17_a_norm_behind_a_concat_is_split_with_its_epsilon(sizes):
    """With an ε of 0.1 a forgotten one is off by 5 % and more."""
    net = Net()
    x = net.input([2, 3, 6, 6])
    y = net.node("Concat", *(net.conv(x, 3, size, 3, 3) for size in sizes), axis=1)
    net.output(net.batch_norm(y, 4, epsilon=0.1), [2, 4, 4, 4])
    model = net.model()
    folded = assert_folded(model)
    assert zoo.op_types(folded) == ["Conv", "Conv", "Concat"]
    s, t = affine(model)
    for node, part in zip(folded.graph.node, np.split(np.arange(4), [sizes[0]]), strict=False):
        weight, bias = (zoo.initializer(model, name) for name in node.input[1:])
        exact = (weight * s[part].reshape(-1, 1, 1, 1), bias * s[part] + t[part])
        for name, right in zip(node.input[1:], exact, strict=True):
            assert np.array_equal(zoo.initializer(folded, name), right.astype(np.float32))


def test_trap_17_a_norm_behind_a_concat_is_not_split_if_a_part_cannot_take_it():
    net = Net()
    x = net.input([2, 3, 6, 6])
    y = net.node("Concat", net.conv(x, 3, 1, 1, 1), x, axis=1)
    net.output(net.batch_norm(y, 4, epsilon=0.1), [2, 4, 6, 6])
    assert_kept(net.model(), "no_producer", "graph_output")


def test_trap_17_a_concat_along_another_axis_joins_whole_channels():
    net = Net()
    x = net.input([2, 3, 6, 6])
    y = net.node("Concat", net.conv(x, 3, 4, 3, 3), net.conv(x, 3, 4, 3, 3), axis=-1)
    net.output(net.batch_norm(y, 4), [2, 4, 4, 8])
    assert zoo.op_types(assert_folded(net.model())) == ["Conv", "Conv", "Concat"]


@pytest.mark.parametrize("epsilon", [1e-12, 1e-5, 0.1, 10.0])
def test_trap_17_epsilon_is_the_norms_own(epsilon):
    net = Net()
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3)
    net.output(net.batch_norm(y, 4, epsilon=epsilon), [2, 4, 4, 4])
    assert_folded(net.model())


def test_trap_17_an_epsilon_that_is_not_said_is_the_default():
    """With variances of 1e-6 a forgotten 1e-5 is a factor of three."""
    net = Net()
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3)
    statistics = [*net.statistics(4)[:3], net.constant(np.full(4, 1e-6, np.float32))]
    net.output(net.node("BatchNormalization", y, *statistics), [2, 4, 4, 4])
    assert_folded(net.model())


# ---- 23: quantised weights ----------------------------------------------------------------------------------


def dequantised_weight(
    gamma: list[float],
    *,
    lowest: int = -127,
    zero: int | None = None,
    per_channel: bool = True,
    bias: str = "float",
) -> onnx.ModelProto:
    """A conv whose weight is int8, in front of a norm with this γ."""
    net = Net()
    x = net.input([2, 3, 6, 6])
    integers = net.rng.integers(-127, 127, (4, 3, 3, 3)).astype(np.int8)
    integers[:, 0, 0, 0] = lowest
    scale = np.float32([0.01, 0.02, 0.03, 0.04]) if per_channel else np.float32(0.02)
    zeros = [] if zero is None else [net.constant(np.full(scale.shape, zero, np.int8))]
    weight = net.node("DequantizeLinear", net.constant(integers), net.constant(scale), *zeros, axis=0)
    added = net.weight(4)
    if bias == "int32":
        stored = net.constant(np.array([1000, -2000, 30, 4], np.int32))
        added = net.node("DequantizeLinear", stored, net.constant(np.float32([5, 10, 15, 20]) * 1e-4), axis=0)
    statistics = [net.constant(np.float32(gamma)), *net.statistics(4)[1:]]
    net.output(net.batch_norm(net.node("Conv", x, weight, added), 4, statistics=statistics), [2, 4, 4, 4])
    return net.model()


@pytest.mark.parametrize("zero", [None, 0], ids=["no-zero-point", "zero-point-0"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
def test_trap_23_a_dequantised_weight_stays_quantised(per_channel, zero):
    """Its scale takes |s|, its integers turn round where s < 0: nothing is rounded to the grid again."""
    model = dequantised_weight([1, -2, 0.5, 3], per_channel=per_channel, zero=zero)
    folded = assert_folded(model)
    assert zoo.op_types(folded) == ["DequantizeLinear", "Conv"]
    before, after = (zoo.initializer(m, m.graph.node[0].input[0]) for m in (model, folded))
    assert after.dtype == np.int8
    assert np.array_equal(after, before * np.array([1, -1, 1, 1], np.int8).reshape(-1, 1, 1, 1))
    scales = [zoo.initializer(m, m.graph.node[0].input[1]).astype(np.longdouble) for m in (model, folded)]
    s, _ = affine(model)
    assert np.array_equal(scales[1], (scales[0] * np.abs(s)).astype(np.float32))


def test_trap_23_a_quantised_bias_takes_the_scale_and_an_add_the_shift():
    """β − μ·s is no multiple of the bias's scale, and is not rounded to one."""
    folded = assert_folded(dequantised_weight([1, -2, 0.5, 3], bias="int32"))
    assert zoo.op_types(folded) == ["DequantizeLinear", "DequantizeLinear", "Conv", "Add"]


@pytest.mark.parametrize("bias", ["float", "int32"])
@pytest.mark.parametrize(
    ("options", "more"),
    [
        pytest.param({"gamma": [1, -2, 1, 1], "lowest": -128}, (), id="minus-128-has-no-opposite"),
        pytest.param({"gamma": [1, 2, 1, 1], "zero": 3}, (), id="zero-point"),
        pytest.param({"gamma": [1, 0, 1, 1]}, ("degenerate_stats",), id="a-scale-of-0-is-no-scale"),
    ],
)
def test_trap_23_a_grid_that_cannot_hold_the_scaled_weight_is_kept(options, more, bias):
    assert_kept(dequantised_weight(**options, bias=bias), "quantised", "graph_output", *more)


def test_trap_23_minus_128_stays_where_its_scale_is_positive():
    assert_folded(dequantised_weight([1, 2, 1, 1], lowest=-128))


@pytest.mark.parametrize("other", ["conv", "output"])
def test_trap_23_a_dequantised_weight_with_another_reader_is_kept(other):
    net = Net()
    x = net.input([2, 3, 6, 6])
    integers = net.constant(net.rng.integers(-127, 127, (4, 3, 3, 3)).astype(np.int8))
    weight = net.node("DequantizeLinear", integers, net.constant(np.float32(0.02)), axis=0)
    net.output(net.batch_norm(net.node("Conv", x, weight), 4), [2, 4, 4, 4])
    net.output(net.node("Conv", x, weight) if other == "conv" else weight, [None] * 4)
    code = "multiple_readers" if other == "conv" else "graph_output"
    assert_kept(net.model(), code, "graph_output")


def test_trap_23_a_fake_quantised_weight_is_not_a_constant_either():
    """QuantizeLinear → DequantizeLinear on a float weight: folding around it would skip the rounding."""
    net = Net()
    x, scale = net.input([2, 3, 6, 6]), net.constant(np.float32(0.02))
    zero = net.constant(np.int8(0))
    weight = net.node("QuantizeLinear", net.weight(4, 3, 3, 3), scale, zero)
    y = net.node("Conv", x, net.node("DequantizeLinear", weight, scale, zero))
    net.output(net.batch_norm(y, 4), [2, 4, 4, 4])
    assert_kept(net.model(), "quantised", "graph_output")


def test_trap_23_a_quantised_statistic_is_not_a_constant():
    net = Net()
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3)
    statistics = net.statistics(4)
    integers = net.constant(np.array([1, 2, 3, 4], np.int8))
    statistics[0] = net.node("DequantizeLinear", integers, net.constant(np.float32(0.5)))
    net.output(net.batch_norm(y, 4, statistics=statistics), [2, 4, 4, 4])
    assert_kept(net.model(), "quantised")


def test_trap_23_a_quantiser_between_conv_and_norm_stops_the_fold():
    net = Net()
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3)
    scale, zero = net.constant(np.float32(0.05)), net.constant(np.int8(0))
    y = net.node("DequantizeLinear", net.node("QuantizeLinear", y, scale, zero), scale, zero)
    net.output(net.batch_norm(y, 4), [2, 4, 4, 4])
    assert_kept(net.model(), "quantised", "graph_output")


def test_what_the_graph_says_of_a_weight_is_looked_up_only_where_its_shape_changes(monkeypatch):
    """A look through every value info for every weight makes a fold of 20,000 ops take minutes."""
    looked_up = []
    right = apply._Rewriter._restate
    monkeypatch.setattr(
        apply._Rewriter, "_restate", lambda self, *about: looked_up.append(about[1]) or right(self, *about)
    )
    assert fold(zoo.conv_bn()).folded == 1
    assert looked_up == []
    net = Net(opset=9, ir=3)
    gemm = net.node("Gemm", net.input([3, 4]), net.weight(4, 4), net.weight(1, name="grows"))
    net.output(net.batch_norm(gemm, 4), [3, 4])
    assert fold(net.model()).folded == 1
    assert looked_up == ["grows"]
