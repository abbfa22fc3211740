"""What other tools get wrong when they fold BatchNorm: one test, or one family, per trap.

Each model is right after the fold (ONNX Runtime, optimisations disabled, against the unfolded model) or is
left byte for byte as it was, with the reason named. Every agreement is paired with weights wrong by 1 %,
which must disagree.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import normtool
from tests import zoo
from tests.zoo import Net

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]

#: dtype → the largest relative error of a right fold on a few dozen products
LIMITS = {np.float16: 4e-3, np.float32: 4e-6, np.float64: 1e-13}


def fold(model: onnx.ModelProto, **options: Any) -> normtool.Rewrite:
    return normtool.fold(model, validate=False, **options)


def verdicts(result: normtool.Rewrite) -> list[str]:
    return [site.verdict for site in result.sites]


def codes(result: normtool.Rewrite) -> list[str]:
    return [reason.code for site in result.sites for reason in site.reasons]


def content(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)


def all_graphs(model: onnx.ModelProto) -> Iterator[Any]:
    pending: list[Any] = [model.graph, *model.functions]
    while pending:
        graph = pending.pop()
        yield graph
        pending += [
            attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")
        ]


def stored_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    for graph in all_graphs(model):
        yield from getattr(graph, "initializer", ())
        yield from (sparse.values for sparse in getattr(graph, "sparse_initializer", ()))
        yield from (a.t for node in graph.node for a in node.attribute if a.HasField("t"))


def spoiled(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every stored float wrong by 1 %, 2 %, … (one factor for all could cancel in a quotient)."""
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    for number, tensor in enumerate(stored_tensors(wrong), start=1):
        array = numpy_helper.to_array(tensor)
        if np.issubdtype(array.dtype, np.floating):
            spoilt = (array * (1 + 0.01 * number)).astype(array.dtype)
            tensor.CopyFrom(numpy_helper.from_array(spoilt, tensor.name))
    return wrong


def complaint(model: onnx.ModelProto) -> str:
    """What the strictest check says; "" if nothing."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error)
    return ""


def assert_same_function(
    model: onnx.ModelProto, folded: onnx.ModelProto, feeds: Feeds | None = None, dtype: Any = np.float32
) -> None:
    assert complaint(folded) == "" or complaint(model) != ""
    expected = zoo.run(model, feeds)
    assert zoo.relative_error(expected, zoo.run(folded, feeds)) < LIMITS[dtype]
    assert zoo.relative_error(expected, zoo.run(spoiled(folded), feeds)) > 1.2 * LIMITS[dtype]


def assert_folded(
    model: onnx.ModelProto, feeds: Feeds | None = None, dtype: Any = np.float32, **options: Any
) -> onnx.ModelProto:
    """Every norm is gone, the function is the same, and a second fold finds nothing to do."""
    result = fold(model, **options)
    assert set(verdicts(result)) == {"folded"}, codes(result)
    remaining = [node.op_type for graph in all_graphs(result.model) for node in graph.node]
    assert "BatchNormalization" not in remaining
    assert content(fold(result.model, **options).model) == content(result.model)
    assert_same_function(model, result.model, feeds, dtype)
    return result.model


def assert_kept(model: onnx.ModelProto, *reasons: str, **options: Any) -> None:
    """Nothing happened, and these are the reasons."""
    result = fold(model, **options)
    assert set(verdicts(result)) == {"kept"}
    assert set(codes(result)) == set(reasons)
    assert content(result.model) == content(model)


def nearest(exact: Array, dtype: Any) -> Array:
    """The numbers of `dtype` nearest to `exact`, found by trying the neighbours."""
    guess = exact.astype(dtype)
    candidates = [guess, *(np.nextafter(guess, np.asarray(end, dtype)) for end in (-np.inf, np.inf))]
    wide = np.stack([extended(candidate) for candidate in candidates])
    best = np.abs(wide - exact).argmin(axis=0)
    return np.choose(best, [c.astype(np.float64) for c in candidates]).astype(dtype)


def extended(array: Array) -> Array:
    return array.astype(np.float64).astype(np.longdouble)


def affine(model: onnx.ModelProto) -> tuple[Array, Array]:
    """s and t of the first BatchNormalization, in extended precision from the stored values."""
    node = next(node for node in model.graph.node if node.op_type == "BatchNormalization")
    gamma, beta, mean, var = (extended(zoo.initializer(model, name)) for name in node.input[1:])
    epsilon = next(attribute.f for attribute in node.attribute if attribute.name == "epsilon")
    s = gamma / np.sqrt(var + np.longdouble(epsilon))
    return s, beta - mean * s


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
    """(2, 4, 4, 4) → (2, 4, 16): the axis survives, but no rule may guess so from the sizes alone."""
    y = net.conv(net.input([2, 2, 6, 6]), 2, 16, 3, 3)
    return net.node("Reshape", y, net.constant(np.array([2, 4, 4, 16]))), 4, [2, 4, 4, 16]


@pytest.mark.parametrize("build", [transposed_matmul, transposed_gemm, transposed_conv, reshaped_conv])
def test_trap_02_coinciding_sizes_do_not_make_an_axis(build):
    net = Net()
    y, channels, shape = build(net)
    net.output(net.batch_norm(y, channels), shape)
    assert_kept(net.model(), "unsupported_op")


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
    assert_kept(net.model(), code)


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
    assert_kept(net.model(), "axis_mismatch")


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
    assert_kept(net.model(), "axis_mismatch")


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


def listed(net: Net) -> Net:
    """Every initializer among the graph inputs too."""
    for tensor in net.initializers:
        net.inputs.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return net


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


def feeds_of(model: onnx.ModelProto, condition: bool = True) -> Feeds:
    rng = np.random.default_rng(0)
    stored = {tensor.name for tensor in model.graph.initializer}
    shapes = {
        info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in model.graph.input
        if info.name not in stored
    }
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return feeds | ({"condition": np.array(condition)} if "condition" in feeds else {})


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


# ---- 11: dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64], ids=lambda dtype: np.dtype(dtype).name
)
def test_trap_11_coefficients_are_rounded_once_to_their_dtype(dtype, bias):
    net = Net(dtype=dtype, opset=22)
    net.output(net.batch_norm(net.conv(net.input([2, 3, 6, 6]), 3, 8, 3, 3, bias=bias), 8), [2, 8, 4, 4])
    model = net.model()
    folded = fold(model).model
    assert complaint(folded) == ""
    s, t = affine(model)
    name = folded.graph.node[0].input[2]
    old_bias = extended(zoo.initializer(model, name)) if bias else 0
    weight, new_bias = zoo.initializer(folded, "w1"), zoo.initializer(folded, name)
    assert weight.dtype == new_bias.dtype == dtype
    exact = extended(zoo.initializer(model, "w1")) * s.reshape(-1, 1, 1, 1)
    assert np.array_equal(weight, nearest(exact, dtype))
    assert np.array_equal(new_bias, nearest(old_bias * s + t, dtype))


@pytest.mark.parametrize(
    ("dtype", "half_ulp", "more"),
    [(np.float16, 2.0**-11, 2.0**-24), (ml_dtypes.bfloat16, 2.0**-8, 2.0**-30)],
    ids=["float16", "bfloat16"],
)
def test_trap_11_rounding_by_way_of_float32_would_round_twice(dtype, half_ulp, more):
    """1 + half an ulp + a little rounds up; float32 loses the little, and the tie goes down to 1."""
    net = Net(dtype=dtype, opset=22)
    gamma, beta, mean, var = (net.constant(np.array([v], dtype)) for v in (1, half_ulp, -more, 1))
    y = net.node("Conv", net.input([1, 1, 2, 2]), net.constant(np.ones((1, 1, 1, 1), dtype)), gamma)
    net.output(net.batch_norm(y, 1, statistics=[gamma, beta, mean, var], epsilon=0.0), [1, 1, 2, 2])
    folded = fold(net.model()).model
    assert zoo.initializer(folded, folded.graph.node[0].input[2]).astype(float) == 1 + 2 * half_ulp
    assert np.float32(1 + half_ulp + more).astype(dtype).astype(float) == 1


def test_trap_11_folding_in_bfloat16_would_have_shown():
    """Half of the weights differ when the product is formed from an s that was rounded before."""
    net = Net(dtype=ml_dtypes.bfloat16, opset=22)
    net.output(net.batch_norm(net.conv(net.input([2, 3, 6, 6]), 3, 8, 3, 3), 8), [2, 8, 4, 4])
    model = net.model()
    s = affine(model)[0].astype(ml_dtypes.bfloat16)
    twice = zoo.initializer(model, "w1") * s.reshape(-1, 1, 1, 1)
    assert (zoo.initializer(fold(model).model, "w1") != twice).mean() > 0.2


@pytest.mark.parametrize("dtype", [np.float16, np.float64], ids=lambda dtype: dtype.__name__)
def test_trap_11_the_runtime_agrees_in_other_precisions(dtype):
    net = Net(dtype=dtype)
    y = net.node("Gemm", net.input([3, 4]), net.weight(4, 5), net.weight(5), beta=2.0)
    net.output(net.batch_norm(y, 5), [3, 5])
    assert_folded(net.model(), dtype=dtype)


@pytest.mark.parametrize("scale_dtype", [np.float16, np.float32], ids=["fp16-scale", "fp32-scale"])
def test_trap_11_mixed_dtypes_of_opset_15(scale_dtype):
    """X fp16 with statistics in fp32: what is folded must come out in fp16."""
    net = Net(opset=15, dtype=np.float16)
    y = net.conv(net.input([2, 3, 6, 6]), 3, 4, 3, 3, bias=False)
    rng = net.rng
    gamma, beta = (net.constant(a.astype(scale_dtype)) for a in (rng.uniform(0.5, 1.5, 4), rng.normal(size=4)))
    mean, var = (net.constant(a.astype(np.float32)) for a in (rng.normal(size=4), rng.uniform(0.3, 2, 4)))
    net.output(net.batch_norm(y, 4, statistics=[gamma, beta, mean, var]), [2, 4, 4, 4])
    folded = assert_folded(net.model(), dtype=np.float16)
    assert {tensor.data_type for tensor in folded.graph.initializer} == {TensorProto.FLOAT16}


def half_precision(gamma: float, beta: float, mean: float, var: float, weight: float) -> onnx.ModelProto:
    """A 1×1 conv in fp16 whose channel 0 has these statistics and weights of about this size."""
    net = Net(dtype=np.float16)
    x = net.input([1, 3, 4, 4])
    weights = net.rng.uniform(0.5, 1.5, (2, 3, 1, 1)) * [[[[weight]]], [[[1.0]]]]
    stats = [net.constant(np.array([v, 1.0], np.float16)) for v in (gamma, beta, mean, var)]
    y = net.node("Conv", x, net.constant(weights.astype(np.float16)))
    net.output(net.batch_norm(y, 2, statistics=stats, epsilon=1e-12), [1, 2, 4, 4])
    return net.model()


def test_trap_11_a_scale_beyond_fp16_whose_product_fits():
    """s = 3e5 is infinite in fp16; s·W = 900 is not."""
    model = half_precision(gamma=300, beta=1, mean=1e-3, var=1e-6, weight=3e-3)
    result = fold(model)
    assert verdicts(result) == ["folded"]
    s, t = affine(model)
    assert s[0] > 65504
    name = result.model.graph.node[0].input[1]
    exact = extended(zoo.initializer(model, name)) * s.reshape(-1, 1, 1, 1)
    assert np.array_equal(zoo.initializer(result.model, name), nearest(exact, np.float16))
    bias = zoo.initializer(result.model, result.model.graph.node[0].input[2])
    assert np.array_equal(bias, nearest(t, np.float16))


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param({"weight": 1.0, "mean": 0.0}, id="weight"),
        pytest.param({"weight": 1e-6, "mean": 3.0}, id="bias"),
    ],
)
def test_trap_11_a_coefficient_beyond_fp16_is_refused(parts):
    assert_kept(half_precision(gamma=300, beta=0, var=1e-6, **parts), "range_overflow")


def test_trap_11_a_product_below_fp16_is_refused_or_still_right():
    """s·W = 1e-7 keeps a single bit in fp16. On inputs of 1000 every number of the unfolded model is normal."""
    net = Net(dtype=np.float16)
    x = net.input([1, 3, 4, 4])
    weight = net.constant((net.rng.standard_normal((2, 3, 3, 3)) * 0.01).astype(np.float16))
    stats = [net.constant(np.full(2, v, np.float16)) for v in (1e-3, 0, 0, 1e4)]
    net.output(net.batch_norm(net.node("Conv", x, weight), 2, statistics=stats), [1, 2, 2, 2])
    model = net.model()
    x = (net.rng.standard_normal((1, 3, 4, 4)) * 1000).astype(np.float16)
    result = fold(model)
    error = zoo.relative_error(zoo.run(model, {"x": x}), zoo.run(result.model, {"x": x}))
    assert verdicts(result) == ["kept"] or error < 0.01


# ---- 12: constants in disguise --------------------------------------------------------------------------


def sparse_tensor(dense: Array, name: str) -> onnx.SparseTensorProto:
    index = np.flatnonzero(dense)
    values = numpy_helper.from_array(dense.reshape(-1)[index], name)
    return helper.make_sparse_tensor(
        values, numpy_helper.from_array(index.astype(np.int64), f"{name}.i"), dense.shape
    )


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
    assert_kept(net.model(), "dynamic_weight")


def test_trap_12_a_constant_too_large_to_compute_is_refused_not_fatal():
    """A few bytes of sparse data behind an Identity claim half a gigabyte."""
    net = Net()
    values = numpy_helper.from_array(np.ones(1, np.float32), "huge")
    index = numpy_helper.from_array(np.array([5]), "huge.i")
    net.sparse.append(helper.make_sparse_tensor(values, index, (4, 3, 1 << 13, 1 << 11)))
    y = net.node("Conv", net.input([1, 3, 1 << 13, 1 << 11]), net.node("Identity", "huge"))
    net.output(net.batch_norm(y, 4), [1, 4, 1, 1])
    assert_kept(net.model(), "dynamic_weight")


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
    """N = C = H = W = 4: only the position tells which axis a constant runs along."""
    net = Net()
    y = net.conv(net.input([4, 3, 6, 6]), 3, 4, 3, 3)
    constant = net.constant(net.rng.uniform(0.5, 2, shape).astype(np.float32))
    y = net.node(op_type, y, constant)
    if len(shape) > 4:
        y = net.node("Squeeze", y, net.constant(np.array([0])))
    net.output(net.batch_norm(y, 4), [4, 4, 4, 4])
    if folds:
        assert zoo.op_types(assert_folded(net.model())) == ["Conv"]
    else:
        assert_kept(net.model(), "unsupported_op" if len(shape) > 4 else "axis_mismatch")


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
    assert_kept(net.model(), "axis_unknown")


def test_trap_13_a_constant_wider_than_the_data_makes_new_channels():
    """One channel + (4, 1, 1) is four: the conv has no place for them."""
    net = Net()
    y = net.node("Add", net.conv(net.input([2, 3, 6, 6]), 3, 1, 3, 3), net.weight(4, 1, 1))
    net.output(net.batch_norm(y, 4), [2, 4, 4, 4])
    assert_kept(net.model(), "axis_mismatch")


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
        assert_kept(net.model(), "nonlinear")
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
    assert_kept(net.model(), "degenerate_stats")


def test_trap_13_a_residual_is_no_constant():
    net = Net()
    x = net.input([2, 4, 6, 6])
    y = net.node("Add", net.conv(x, 4, 4, 3, 3, pads=[1] * 4), x)
    net.output(net.batch_norm(y, 4), [2, 4, 6, 6])
    assert_kept(net.model(), "unsupported_op")


# ---- 14: pairing by dataflow ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op_type", "code"),
    [
        *((op_type, "nonlinear") for op_type in ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSwish", "Erf")),
        ("Softplus", "unsupported_op"),
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


# ---- 16: the other direction, and γ of every sign -----------------------------------------------------------


@pytest.mark.parametrize("pads", [0, 1], ids=["unpadded", "padded"])
def test_trap_16_a_norm_in_front_of_a_conv_does_not_go_forward(pads):
    net = Net()
    y = net.batch_norm(net.input([2, 4, 6, 6]), 4)
    net.output(net.conv(y, 4, 4, 3, 3, pads=[pads] * 4), [2, 4, None, None])
    assert_kept(net.model(), "no_producer")


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


def test_trap_17_a_norm_behind_a_concat_is_not_split():
    net = Net()
    x = net.input([2, 3, 6, 6])
    y = net.node("Concat", net.conv(x, 3, 2, 3, 3), net.conv(x, 3, 2, 3, 3), axis=1)
    net.output(net.batch_norm(y, 4, epsilon=0.1), [2, 4, 4, 4])
    assert_kept(net.model(), "unsupported_op")


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
    assert_kept(net.model(), "unsupported_op")


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
    assert_kept(model, "overridable")


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
    assert_kept(net.model(), "captured")


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
    assert_kept(net.model(), "unsupported_op")


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
    assert_kept(net.model(), "dynamic_weight")


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


# ---- 22: extreme statistics -------------------------------------------------------------------------------


def with_statistics(channel_0: dict[str, float], epsilon: float = 1e-5) -> onnx.ModelProto:
    """Four ordinary channels, of which the first gets these values."""
    net = Net()
    x = net.input([2, 3, 6, 6])
    rng = net.rng
    values = {
        "gamma": rng.uniform(0.5, 1.5, 4),
        "beta": rng.normal(size=4),
        "mean": rng.normal(size=4),
        "var": rng.uniform(0.3, 2, 4),
        "weight": rng.standard_normal((4, 3, 3, 3)) * 0.2,
        "bias": rng.normal(size=4),
    }
    for name, value in channel_0.items():
        values[name][0] = values[name][0] * value if name == "weight" else value
    constants = {name: net.constant(array.astype(np.float32)) for name, array in values.items()}
    y = net.node("Conv", x, constants.pop("weight"), constants.pop("bias"))
    y = net.node("BatchNormalization", y, *constants.values(), epsilon=epsilon)
    net.output(y, [2, 4, 4, 4])
    return net.model()


@pytest.mark.parametrize(
    ("statistics", "epsilon"),
    [
        pytest.param({"var": 0.0}, 1e-5, id="zero-variance"),
        pytest.param({"var": 5.6e-45}, 1e-5, id="denormal-variance"),
        pytest.param({"var": 5.6e-45}, 0.0, id="denormal-variance-without-epsilon"),
        pytest.param({"var": 0.0, "gamma": 8.1}, 1e-5, id="s-of-2557"),
        pytest.param({"var": 1e-12, "gamma": -300.0}, 1e-12, id="s-of-minus-2e8"),
        pytest.param({"var": 1e30, "mean": 1e10}, 1e-5, id="s-of-1e-15"),
        pytest.param({"var": -1e-6}, 1e-5, id="negative-variance-within-epsilon"),
        pytest.param({"gamma": 1.0, "beta": 0.0, "mean": 0.0, "var": 1.0}, 1e-5, id="as-initialised"),
    ],
)
def test_trap_22_extreme_statistics_fold(statistics, epsilon):
    assert_folded(with_statistics(statistics, epsilon))


@pytest.mark.parametrize(
    "statistics",
    [
        pytest.param({"var": 0.0, "mean": 0.0, "beta": 0.1, "weight": 0.0, "bias": 0.0}, id="no-bias"),
        pytest.param(
            {"var": 0.0, "mean": 0.5, "beta": 1e-9, "weight": 0.0, "bias": 0.5}, id="mean-is-the-bias"
        ),
        pytest.param({"var": 1e-10, "mean": 0.5, "beta": 0.01, "weight": 1e-5, "bias": 0.5}, id="nearly-dead"),
        pytest.param(
            {"var": 1e-14, "mean": 1.0, "beta": 0.01, "weight": 1e-7, "bias": 1.0}, id="decayed-to-1e-7"
        ),
        pytest.param(
            {"var": 1e-16, "mean": 1.0, "beta": 1e-3, "weight": 1e-8, "bias": 1.0}, id="decayed-to-1e-8"
        ),
    ],
)
def test_trap_22_a_dead_filter_is_no_bug_of_ours(statistics):
    """Its output is s·(b − μ) + β: the two large terms cancel, in the check as in the runtime."""
    result = fold(with_statistics(statistics))
    assert verdicts(result) == ["folded"], result.sites[0].reasons


@pytest.mark.parametrize(
    ("statistics", "epsilon"),
    [
        pytest.param({"var": -1.0}, 1e-5, id="negative-variance"),
        pytest.param({"var": np.nan}, 1e-5, id="nan-variance"),
        pytest.param({"var": 0.0}, 0.0, id="zero-variance-without-epsilon"),
        pytest.param({"mean": np.inf}, 1e-5, id="infinite-mean"),
        pytest.param({"gamma": np.nan}, 1e-5, id="nan-gamma"),
        pytest.param({"beta": -np.inf}, 1e-5, id="infinite-beta"),
    ],
)
def test_trap_22_statistics_without_a_finite_map_are_refused(statistics, epsilon):
    assert_kept(with_statistics(statistics, epsilon), "degenerate_stats")


def test_trap_22_a_scale_that_overflows_the_weights_is_refused():
    assert_kept(with_statistics({"var": 0.0, "gamma": 1e23, "mean": 0.0}, 1e-38), "range_overflow")


# ---- 23: quantised weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
def test_trap_23_a_dequantised_weight_is_not_a_constant(per_channel):
    net = Net()
    x = net.input([2, 3, 6, 6])
    integers = net.constant(net.rng.integers(-127, 127, (4, 3, 3, 3)).astype(np.int8))
    scale = net.constant(np.float32([0.01, 0.02, 0.03, 0.04]) if per_channel else np.float32(0.02))
    weight = net.node("DequantizeLinear", integers, scale, axis=0)
    net.output(net.batch_norm(net.node("Conv", x, weight, net.weight(4)), 4), [2, 4, 4, 4])
    assert_kept(net.model(), "quantised")


def test_trap_23_a_fake_quantised_weight_is_not_a_constant_either():
    """QuantizeLinear → DequantizeLinear on a float weight: folding around it would skip the rounding."""
    net = Net()
    x, scale = net.input([2, 3, 6, 6]), net.constant(np.float32(0.02))
    zero = net.constant(np.int8(0))
    weight = net.node("QuantizeLinear", net.weight(4, 3, 3, 3), scale, zero)
    y = net.node("Conv", x, net.node("DequantizeLinear", weight, scale, zero))
    net.output(net.batch_norm(y, 4), [2, 4, 4, 4])
    assert_kept(net.model(), "quantised")


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
    assert_kept(net.model(), "unsupported_op")


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
    assert [(reason.code, reason.where) for reason in site.reasons] == [("multiple_readers", y)]
    assert "'reader'" in site.reasons[0].message
