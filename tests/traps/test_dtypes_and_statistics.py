"""Traps about numbers: half types, mixed types, overflow, extreme statistics."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tests import zoo
from tests.traps.common import affine, assert_folded, assert_kept, complaint, extended, fold, nearest, verdicts
from tests.zoo import Net

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
    assert_kept(half_precision(gamma=300, beta=0, var=1e-6, **parts), "range_overflow", "graph_output")


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
    model = with_statistics({"var": 0.0, "gamma": 1e23, "mean": 0.0}, 1e-38)
    assert_kept(model, "range_overflow", "graph_output")
