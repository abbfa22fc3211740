"""Traps about axes: which one a weight writes, which one a norm or a constant lies along."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests import zoo
from tests.traps.common import affine, assert_folded, assert_kept, fold, verdicts
from tests.zoo import Net

# ---- 2: the axis through Transpose and Reshape -----------------------------------------------------


def transposed_matmul(net):
    """x [8, 4]·W [4, 8] writes channels on axis 1; after the Transpose BatchNorm reads axis 0 as channels."""
    y = net.node("MatMul", net.input([8, 4]), net.weight(4, 8))
    return net.node("Transpose", y, perm=[1, 0]), 8, [8, 8]


def transposed_gemm(net):
    y = net.node("Gemm", net.input([5, 4]), net.weight(4, 5), net.weight(5))
    return net.node("Transpose", y, perm=[1, 0]), 5, [5, 5]


def transposed_conv(net):
    """(N, C, H, W) with H = C: after perm (0, 2, 1, 3) axis 1 is a spatial axis."""
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3)
    return net.node("Transpose", y, perm=[0, 2, 1, 3]), 4, [2, 4, 4, 4]


def reshaped_conv(net):
    """(2, 4, 3, 3) → (3, 4, 2, 3): both have 4 channels on axis 1, and they are not the same ones."""
    y = net.conv(net.input([2, 3, 5, 5]), 3, 4, 3, 3)
    return net.node("Reshape", y, net.constant(np.array([3, 4, 2, 3]))), 4, [3, 4, 2, 3]


@pytest.mark.parametrize("build", [transposed_matmul, transposed_gemm, transposed_conv, reshaped_conv])
def test_trap_02_coinciding_sizes_do_not_make_an_axis(build):
    net = Net()
    y, channels, shape = build(net)
    net.output(net.batch_norm(y, channels), shape)
    assert_kept(net.model(), "axis_mismatch", "graph_output")


def test_trap_02_the_wrong_axis_would_have_shown():
    """What a fold along the coinciding axis computes differs by more than the size of the output."""
    net = Net()
    y, channels, shape = transposed_matmul(net)
    net.output(net.batch_norm(y, channels), shape)
    model = net.model()
    s, t = affine(model)
    x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    (right,) = zoo.run(model, {"x": x})
    wrong = (x @ (zoo.initializer(model, "w1") * s) + t).T
    assert np.abs(wrong - right).max() > 0.5 * np.abs(right).max()


@pytest.mark.parametrize(
    ("shape", "repeats"),
    [
        pytest.param([2, 4, 4, 16], 4, id="four-channels-of-the-conv-are-one-of-the-norm"),
        pytest.param([2, 16, 16], 1, id="whole"),
        pytest.param([2, 8, 2, 4, 4], 2, id="groups"),
    ],
)
def test_trap_02_an_axis_that_can_be_followed_through_a_reshape_is(shape, repeats):
    """C → (C/r, r): each s and t of the norm belongs to r channels in a row."""
    net = Net()
    y = net.conv(net.input([2, 2, 6, 6]), 2, 16, 3, 3)
    net.output(net.batch_norm(net.node("Reshape", y, net.constant(np.array(shape))), shape[1]), shape)
    model = net.model()
    folded = assert_folded(model)
    assert zoo.op_types(folded) == ["Conv", "Reshape"]
    s, _ = affine(model)
    exact = zoo.initializer(model, "w1") * np.repeat(s, repeats).reshape(-1, 1, 1, 1)
    assert np.array_equal(zoo.initializer(folded, "w1"), exact.astype(np.float32))


def test_trap_02_a_constant_between_two_reshapes_lies_on_the_axis_it_lies_on():
    """C → (g, C/g): one number for each of the two groups, then one for each channel within both."""
    net = Net()
    y = net.batch_norm(net.node("Relu", net.input([2, 4, 2, 2])), 4)
    y = net.node("Reshape", y, net.constant(np.array([2, 2, 2, 4])))
    for shape in ((2, 1, 1), (2, 1), (4,)):
        y = net.node("Add", y, net.weight(*shape))
    y = net.node("Reshape", y, net.constant(np.array([2, 4, 2, 2])))
    net.output(net.conv(y, 4, 4, 2, 2), [2, 4, 1, 1])
    assert zoo.op_types(assert_folded(net.model()))[-1] == "Conv"


# ---- 3: an identity Transpose breaks the runtime's own fusion ------------------------------------------


def test_trap_03_identity_transpose_before_matmul_is_judged_without_optimisations():
    net = Net()
    y = net.node("Transpose", net.input([4, 4]), perm=[0, 1])
    y = net.node("Add", net.node("MatMul", y, net.weight(4, 4)), net.weight(4))
    net.output(net.batch_norm(y, 4), [4, 4])
    assert zoo.op_types(assert_folded(net.model())) == ["Transpose", "MatMul", "Add"]


# ---- 4 and 5: ConvTranspose ------------------------------------------------------------------------------

TRANSPOSED = [
    pytest.param(4, 6, 1, (3, 3), {}, id="plain"),
    pytest.param(6, 6, 1, (3, 3), {}, id="cin-is-cout"),
    pytest.param(4, 8, 2, (3, 3), {}, id="groups"),
    pytest.param(8, 8, 4, (2, 2), {"strides": [2, 2]}, id="groups-cin-is-cout"),
    pytest.param(4, 4, 2, (2, 2), {}, id="groups-cin-per-group-is-cout-per-group"),
    pytest.param(8, 4, 2, (3, 3), {}, id="groups-narrowing"),
    pytest.param(6, 6, 6, (3, 3), {"pads": [1, 1, 1, 1]}, id="depthwise"),
    pytest.param(6, 12, 3, (3,), {"pads": [1, 0]}, id="groups-1d"),
    pytest.param(4, 6, 2, (2, 3, 2), {}, id="groups-3d"),
    pytest.param(4, 6, 2, (3, 3), {"dilations": [2, 2]}, id="groups-dilated"),
    pytest.param(
        4,
        6,
        2,
        (3, 3),
        {"strides": [2, 2], "output_padding": [1, 1], "pads": [1, 1, 1, 1]},
        id="output-padding",
    ),
    pytest.param(4, 6, 1, (3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}, id="auto-pad"),
    pytest.param(4, 6, 2, (3, 3), {"strides": [2, 2], "output_shape": [10, 10]}, id="output-shape"),
]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("cin", "cout", "groups", "kernel", "attributes"), TRANSPOSED)
def test_trap_04_conv_transpose_is_scaled_on_the_output_axis(cin, cout, groups, kernel, attributes, bias):
    net = Net()
    x = net.input([2, cin, *[5] * len(kernel)])
    y = net.conv_transpose(x, cin, cout, *kernel, groups=groups, bias=bias, **attributes)
    net.output(net.batch_norm(y, cout), [2, cout, *[None] * len(kernel)])
    assert zoo.op_types(assert_folded(net.model())) == ["ConvTranspose"]


@pytest.mark.parametrize("groups", [1, 2])
def test_trap_05_conv_transpose_with_cin_equal_to_cout_tells_the_axes_apart(groups):
    """Scaling the input axis instead fits the shapes, and is off by more than a twentieth."""
    net = Net()
    y = net.conv_transpose(net.input([1, 4, 5, 5]), 4, 4, 3, 3, groups=groups, bias=False)
    net.output(net.batch_norm(y, 4), [1, 4, 7, 7])
    model = net.model()
    folded = assert_folded(model)
    wrong = onnx.ModelProto()
    wrong.CopyFrom(folded)
    s, _ = affine(model)
    scaled = (zoo.initializer(model, "w1") * s.reshape(4, 1, 1, 1)).astype(np.float32)
    weight = next(tensor for tensor in wrong.graph.initializer if tensor.name == "w1")
    assert weight.dims == list(scaled.shape)
    weight.CopyFrom(numpy_helper.from_array(scaled, "w1"))
    assert zoo.relative_error(zoo.run(model), zoo.run(wrong)) > 0.05


# ---- 8: (N, L, C) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("shape", "code"),
    [
        pytest.param([2, 6, 6], "axis_mismatch", id="length-is-channels"),
        pytest.param(None, "axis_unknown", id="unknown-rank"),
    ],
)
def test_trap_08_linear_writes_the_last_axis_and_batch_norm_reads_axis_1(shape, code, bias):
    net = Net()
    y = net.node("MatMul", net.input(shape), net.weight(6, 6))
    y = net.node("Add", y, net.weight(6)) if bias else y
    net.output(net.batch_norm(y, 6), shape)
    assert_kept(net.model(), code, "graph_output")


def test_trap_08_a_matmul_of_unknown_rank_may_be_rank_3():
    """With the rank known to be 2 the very same ops fold."""
    net = Net()
    net.output(net.batch_norm(net.node("MatMul", net.input(["n", 6]), net.weight(6, 6)), 6), ["n", 6])
    assert_folded(net.model())


@pytest.mark.parametrize("length", [5, 6], ids=["length-is-not-channels", "length-is-channels"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_trap_08_a_constant_on_the_left_writes_axis_1(length, bias):
    """W [6, 4]·x [N, 4, L] is a 1×1 convolution: its channels are the rows."""
    net = Net()
    y = net.node("MatMul", net.weight(6, 4), net.input([2, 4, length]))
    y = net.node("Add", net.weight(6, 1), y) if bias else y
    net.output(net.batch_norm(y, 6), [2, 6, length])
    assert zoo.op_types(assert_folded(net.model())) == ["MatMul", "Add"]


def test_trap_08_a_batched_weight_scales_its_own_last_axis():
    """x [2, 3, 4]·W [2, 4, 3]: axis 1 belongs to x, though both axes have 3 entries."""
    net = Net()
    y = net.node("MatMul", net.input([2, 3, 4]), net.weight(2, 4, 3))
    net.output(net.batch_norm(y, 3), [2, 3, 3])
    assert_kept(net.model(), "axis_mismatch", "graph_output")


# ---- 13: broadcasting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("op_type", ["Add", "Mul", "Sub", "Div"])
@pytest.mark.parametrize(
    ("shape", "folds"),
    [
        pytest.param((4, 1, 1), True, id="per-channel"),
        pytest.param((1, 4, 1, 1), True, id="per-channel-with-batch-axis"),
        pytest.param((), True, id="scalar"),
        pytest.param((1,), True, id="one"),
        pytest.param((1, 1, 1, 1), True, id="one-of-rank-4"),
        pytest.param((4,), False, id="along-w"),
        pytest.param((1, 4), False, id="along-w-rank-2"),
        pytest.param((4, 1), False, id="along-h"),
        pytest.param((4, 4), False, id="h-by-w"),
        pytest.param((4, 1, 1, 1), False, id="along-n"),
        pytest.param((4, 4, 4), False, id="every-element"),
        pytest.param((1, 1, 4, 1, 1), False, id="rank-5"),
    ],
)
def test_trap_13_a_constant_is_aligned_to_the_right(op_type, shape, folds):
    """N = C = H = W = 4: only the position tells which axis a constant runs along.

    What is not per channel stays where it is. An added constant takes s·c + t, whatever it runs along; a factor
    has no place for t.
    """
    net = Net()
    y = net.conv(net.input([4, 3, 6, 6]), 3, 4, 3, 3)
    constant = net.constant(net.rng.uniform(0.5, 2, shape).astype(np.float32))
    y = net.node(op_type, y, constant)
    if len(shape) > 4:
        y = net.node("Squeeze", y, net.constant(np.array([0])))
    net.output(net.batch_norm(y, 4), [4, 4, 4, 4])
    if folds:
        assert zoo.op_types(assert_folded(net.model())) == ["Conv"]
    elif op_type in ("Add", "Sub"):
        folded = assert_folded(net.model())
        assert zoo.op_types(folded)[:2] == ["Conv", op_type]
        varies = {axis for axis, n in enumerate(shape, 4 - len(shape)) if n == 4}
        assert zoo.initializer(folded, constant).size == 4 ** len(varies | {1})
    else:
        assert_kept(net.model(), "axis_mismatch", "graph_output")


@pytest.mark.parametrize("op_type", ["Add", "Mul", "Sub", "Div"])
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1, 1)], ids=["along-w", "along-h", "along-n"])
def test_trap_13_behind_the_norm_too(op_type, shape):
    """The norm folds; the constant that is not per channel stays where it is."""
    net = Net()
    y = net.batch_norm(net.conv(net.input([4, 3, 6, 6]), 3, 4, 3, 3), 4)
    net.output(net.node(op_type, y, net.constant(net.rng.uniform(0.5, 2, shape).astype(np.float32))), [4] * 4)
    assert zoo.op_types(assert_folded(net.model())) == ["Conv", op_type]


def test_trap_13_without_a_known_rank_a_constant_has_no_axis():
    net = Net()
    y = net.node("Gelu", net.input(None), domain="com.microsoft")
    net.domains["com.microsoft"] = 1
    net.output(net.batch_norm(net.node("Add", y, net.weight(4)), 4))
    assert_kept(net.model(), "axis_unknown", "graph_output")


def test_trap_13_a_constant_wider_than_the_data_makes_new_channels():
    """One channel + (4, 1, 1) is four: the conv has no place for them."""
    net = Net()
    y = net.node("Add", net.conv(net.input([2, 3, 6, 6]), 3, 1, 3, 3), net.weight(4, 1, 1))
    net.output(net.batch_norm(y, 4), [2, 4, 4, 4])
    assert_kept(net.model(), "axis_mismatch", "graph_output")


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("data_first", [True, False], ids=["x-op-c", "c-op-x"])
@pytest.mark.parametrize("op_type", ["Add", "Mul", "Sub", "Div"])
def test_trap_13_constant_arithmetic_around_the_norm(op_type, data_first, before):
    """c ÷ x alone is no affine map."""
    net = Net()
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3)
    y = y if before else net.batch_norm(y, 4)
    constant = net.constant(net.rng.uniform(0.5, 2, (4, 1, 1)).astype(np.float32))
    y = net.node(op_type, *((y, constant) if data_first else (constant, y)))
    net.output(net.batch_norm(y, 4) if before else y, [2, 4, 4, 4])
    if op_type != "Div" or data_first:
        assert zoo.op_types(assert_folded(net.model())) == ["Conv"]
    elif before:
        assert_kept(net.model(), "nonlinear", "graph_output")
    else:
        result = fold(net.model())
        assert zoo.op_types(result.model) == ["Conv", "Div"]


def test_trap_13_a_long_chain_is_one_fold():
    net = Net()
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3)
    for op_type in ("Sub", "Norm", "Mul", "Norm", "Div", "Add"):
        y = net.batch_norm(y, 4) if op_type == "Norm" else net.node(op_type, y, net.weight(4, 1, 1))
    net.output(y, [2, 4, 4, 4])
    model = net.model()
    assert zoo.op_types(assert_folded(model)) == ["Conv"]
    assert len({site.fold for site in fold(model).sites}) == 1


def test_trap_13_a_chain_that_overflows_folds_as_far_as_the_norm():
    net = Net()
    y = net.batch_norm(net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3), 4)
    y = net.node("Mul", net.node("Mul", y, net.constant(np.float32(1e30))), net.constant(np.float32(1e30)))
    net.output(net.node("Tanh", y), [2, 4, 4, 4])
    result = fold(net.model())
    assert verdicts(result) == ["folded"]
    assert zoo.op_types(result.model) == ["Conv", "Mul", "Mul", "Tanh"]


def test_trap_13_division_by_a_zero_is_left_alone():
    net = Net()
    zero = net.constant(np.array([1, 0, 1, 1], np.float32).reshape(4, 1, 1))
    y = net.node("Div", net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3), zero)
    net.output(net.batch_norm(y, 4), [2, 4, 4, 4])
    assert_kept(net.model(), "degenerate_stats", "graph_output")


def test_trap_13_a_residual_is_no_constant():
    net = Net()
    y = net.node("Add", net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3), net.input([2, 4, 4, 4], "residual"))
    net.output(net.batch_norm(y, 4), [2, 4, 4, 4])
    assert_kept(net.model(), "no_producer", "graph_output")


def test_trap_13_a_residual_of_the_convs_own_input_becomes_part_of_its_kernel():
    """W ⋆ x + x = (W + δ) ⋆ x: the norm scales both terms."""
    net = Net()
    x = net.input([2, 4, 6, 6])
    y = net.node("Add", net.conv(x, 4, 4, 3, 3, pads=[1] * 4), x)
    net.output(net.batch_norm(y, 4), [2, 4, 6, 6])
    assert zoo.op_types(assert_folded(net.model())) == ["Conv"]
