"""What `validate` says of right folds, wrong folds, and of models that show nothing either way."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import normtool
from normtool.api import load
from normtool.errors import BackendUnavailable, NormtoolError, RuntimeRefused, UsageError
from normtool.inputs import attempts, generate
from tests import zoo
from tests.zoo import Net

Array = np.ndarray[Any, Any]
HAS_GPU = Path("/dev/nvidiactl").exists()


pytestmark = pytest.mark.usefixtures("worker_in_this_process")


def right_fold(model: onnx.ModelProto) -> onnx.ModelProto:
    result = normtool.fold(model, validate=False)
    assert result.folded == len(result.sites) > 0
    return result.model


def verdict(reference: onnx.ModelProto, candidate: onnx.ModelProto, **options: Any) -> str:
    return normtool.validate(reference, candidate, **options).verdict


def set_initializer(model: onnx.ModelProto, name: str, change: Callable[[Array], Array]) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(change(array).astype(array.dtype), name))


def conv_bn(
    behind: str = "Relu", statistics: dict[str, Any] | None = None, epsilon: float = 1e-3, **options: Any
):
    """x → Conv → BatchNormalization → some op → y, six channels; `statistics` overrides some of them."""
    net = Net(**options)
    y = net.conv(net.input([2, 3, 8, 8]), 3, 6, 3, 3)
    names = net.statistics(6)
    for name, value in (statistics or {}).items():
        names["gamma beta mean var".split().index(name)] = net.constant(np.full(6, value, net.dtype))
    y = net.batch_norm(y, 6, statistics=names, epsilon=epsilon)
    net.output(net.node(behind, y, outputs=["y"]), [2, 6, 6, 6])
    return net.model()


def wrong_fold(model: onnx.ModelProto, mistake: str) -> onnx.ModelProto:
    """Conv + BatchNormalization folded by hand, with one mistake."""
    conv, norm = model.graph.node[:2]
    gamma, beta, mean, var = (zoo.initializer(model, name).astype(np.float64) for name in norm.input[1:])
    epsilon = (
        0.0 if mistake == "epsilon forgotten" else next(a.f for a in norm.attribute if a.name == "epsilon")
    )
    if mistake == "gamma ignored":
        gamma = np.ones_like(gamma)
    if mistake == "beta ignored":
        beta = 0 * beta
    if mistake == "mean ignored":
        mean = 0 * mean
    s = gamma / np.sqrt(var + epsilon)
    if mistake == "sign of gamma lost":
        s = np.abs(s)
    if mistake == "channels reversed":
        s = s[::-1]
    t = beta - mean * s
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    set_initializer(wrong, conv.input[1], lambda weight: weight * s.reshape(-1, 1, 1, 1))
    scale = 1 if mistake == "bias not scaled" else s
    set_initializer(wrong, conv.input[2], lambda bias: bias * scale + t)
    wrong.graph.node[0].output[0] = norm.output[0]
    del wrong.graph.node[1]
    return wrong


# ---- right and wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["fp32", "fp16"])
def test_a_right_fold_is_equal(dtype):
    model = conv_bn(dtype=dtype)
    found = normtool.validate(model, right_fold(model))
    assert found.verdict == "equal"
    assert found.sensitivity.verdict == "different"
    (output,) = found.outputs
    assert output.noise_floor > 0
    assert output.max_rel < (1e-5 if dtype is np.float32 else 1e-1)


def test_a_fold_made_by_hand_without_mistake_is_equal():
    """The counterpart of every mistake below."""
    model = conv_bn()
    assert verdict(model, wrong_fold(model, "none")) == "equal"


@pytest.mark.parametrize(
    "mistake",
    [
        "sign of gamma lost",
        "gamma ignored",
        "beta ignored",
        "mean ignored",
        "bias not scaled",
        "channels reversed",
        "epsilon forgotten",
    ],
)
def test_trap_39_a_wrong_fold_behind_a_relu_is_different(mistake):
    model = conv_bn()
    assert verdict(model, wrong_fold(model, mistake)) == "different"


def test_trap_39_epsilon_forgotten_at_small_variances_is_different():
    model = conv_bn("Tanh", {"var": 1e-4, "gamma": 0.01}, epsilon=1e-5)
    assert verdict(model, wrong_fold(model, "epsilon forgotten")) == "different"
    assert verdict(model, right_fold(model)) == "equal"


def test_a_wrong_fold_in_half_precision_is_different():
    model = conv_bn(dtype=np.float16)
    assert verdict(model, wrong_fold(model, "gamma ignored")) == "different"


def test_a_model_equals_itself():
    model = conv_bn()
    found = normtool.validate(model, model)
    assert (found.verdict, found.outputs[0].max_abs) == ("equal", 0)


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_integer_outputs_are_compared_exactly(wrong):
    net = Net()
    y = net.batch_norm(net.node("Gemm", net.input([40, 6]), net.weight(6, 5), net.weight(5)), 5)
    net.output(net.node("ArgMax", y, axis=1), [40, 1], dtype=np.int64)
    model = net.model()
    candidate = right_fold(model)
    if wrong:
        set_initializer(candidate, "w1", lambda weight: weight[:, ::-1])
    found = normtool.validate(model, candidate)
    assert found.outputs[0].ratio == (math.inf if wrong else 0)
    assert (found.verdict == "different") == wrong


# ---- 39: what the outputs cannot show -----------------------------------------------------------------


def test_trap_39_an_output_that_is_always_zero_shows_nothing():
    net = Net()
    y = net.batch_norm(net.conv(net.input([2, 3, 8, 8]), 3, 4, 3, 3), 4)
    net.output(net.node("Mul", y, net.constant(np.float32(0))), [2, 4, 6, 6])
    model = net.model()
    assert verdict(model, model) == "inconclusive"


def saturated() -> onnx.ModelProto:
    """β = 40 before a Sigmoid: every output is 1."""
    return conv_bn("Sigmoid", {"beta": 40.0})


def test_trap_40_behind_a_saturated_sigmoid_the_sites_are_compared():
    model = saturated()
    found = normtool.validate(model, right_fold(model))
    assert found.verdict == "equal"
    assert [site.verdict for site in found.sites] == ["equal"]
    assert any("inside" in note for note in found.notes)


@pytest.mark.parametrize("mistake", ["sign of gamma lost", "gamma ignored"])
def test_trap_40_a_saturated_sigmoid_hides_no_wrong_fold(mistake):
    model = saturated()
    wrong = wrong_fold(model, mistake)
    assert zoo.relative_error(zoo.run(model), zoo.run(wrong)) < 1e-6
    assert verdict(model, wrong) != "equal"


def test_trap_40_a_nearly_constant_output_hides_no_wrong_fold():
    """Outputs within 1e-4 of 1: a tolerance of 1e-3 passes everything."""
    model = conv_bn("Sigmoid", {"beta": 15.0, "gamma": -0.2})
    wrong = wrong_fold(model, "sign of gamma lost")
    assert zoo.relative_error(zoo.run(model), zoo.run(wrong)) < 1e-3
    assert verdict(model, wrong) == "different"


def test_trap_40_an_error_behind_the_fold_is_not_excused_by_the_fold():
    """The fold is right, the saturated layer behind it has its sign flipped: no output shows it."""
    net = Net()
    y = net.batch_norm(net.node("Gemm", net.input([3, 4]), net.weight(4, 5), net.weight(5)), 5)
    y = net.node("Gemm", y, net.weight(5, 6, name="head"), net.constant(np.full(6, 100, np.float32)))
    net.output(net.node("Sigmoid", y), [3, 6])
    model = net.model()
    candidate = right_fold(model)
    set_initializer(candidate, "head", np.negative)
    assert verdict(model, candidate) != "equal"


def chaotic() -> onnx.ModelProto:
    """24 layers of gain 30 between sines: the last bit of the input is the first digit of the output."""
    net = Net()
    y = net.input([2, 16])
    for layer in range(24):
        weight = net.constant((net.rng.standard_normal((16, 16)) * 8).astype(np.float32), f"layer{layer}")
        y = net.node("Sin", net.batch_norm(net.node("Gemm", y, weight), 16))
    net.output(y, [2, 16])
    return net.model()


def test_trap_40_a_chaotic_network_does_not_reject_a_right_fold():
    model = chaotic()
    found = normtool.validate(model, right_fold(model))
    (output,) = found.outputs
    assert output.max_rel > 0.1
    assert output.noise_floor > 0.1
    assert found.verdict == "inconclusive"


def test_trap_40_a_chaotic_network_does_not_excuse_a_wrong_fold():
    """What no measurement can show is not shown."""
    model = chaotic()
    candidate = right_fold(model)
    set_initializer(candidate, "layer10", lambda weight: weight * 1.3)
    assert verdict(model, candidate) != "equal"


# ---- 42: NaN, infinity, what was not compared -----------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_trap_42_a_candidate_that_leaves_the_finite_numbers_is_different(poison):
    model = conv_bn("Neg")
    candidate = right_fold(model)
    bias = candidate.graph.node[0].input[2]
    set_initializer(candidate, bias, lambda array: np.where(np.arange(6) == 3, poison, array))
    found = normtool.validate(model, candidate)
    assert found.verdict == "different"
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["outputs"][0]["ratio"] is None


def logarithm(of: str) -> onnx.ModelProto:
    """One good output; another that is the logarithm of |x|, or of −|x| and so NaN."""
    net = Net()
    x = net.input([2, 3, 8, 8])
    net.output(net.batch_norm(net.conv(x, 3, 4, 3, 3), 4, outputs=["good"]), [2, 4, 6, 6])
    y = net.node("Abs", x)
    y = net.node("Neg", y) if of == "negative" else y
    net.output(net.node("Log", y, outputs=["other"]), [2, 3, 8, 8])
    return net.model()


def test_trap_42_nan_equals_nan_is_no_agreement():
    net = Net()
    y = net.node("Neg", net.node("Abs", net.input([2, 4])))
    net.output(net.node("Log", net.node("Gemm", y, net.constant(np.eye(4, dtype=np.float32)))), [2, 4])
    model = net.model()
    found = normtool.validate(model, model)
    assert found.verdict == "inconclusive"
    assert any("NaN" in note for note in found.notes)


def test_trap_42_an_output_that_is_nan_is_not_excused_by_another_that_is_good():
    """The candidate computes finite numbers where the reference computes NaN."""
    assert verdict(logarithm("negative"), logarithm("absolute")) != "equal"


def test_trap_42_finite_where_the_candidate_is_nan_is_different():
    assert verdict(logarithm("absolute"), logarithm("negative")) == "different"


def test_trap_42_nan_on_some_inputs_leaves_the_others():
    """√x of normal inputs is NaN here and there, of uniform ones it is not."""
    net = Net()
    y = net.batch_norm(net.node("Gemm", net.node("Sqrt", net.input([3, 4])), net.weight(4, 5)), 5)
    net.output(y, [3, 5])
    model = net.model()
    found = normtool.validate(model, right_fold(model))
    assert found.verdict == "equal"
    assert any("NaN" in note for note in found.notes)


def with_a_sequence(of: str) -> onnx.ModelProto:
    net = Net()
    x = net.input([2, 3, 8, 8])
    net.output(net.batch_norm(net.conv(x, 3, 4, 3, 3), 4, outputs=["good"]), [2, 4, 6, 6])
    sequence = net.node("SequenceConstruct", net.node(of, x), outputs=["sequence"])
    net.outputs.append(helper.make_tensor_sequence_value_info(sequence, TensorProto.FLOAT, None))
    return net.model()


def test_trap_42_an_output_that_was_not_compared_is_not_equal():
    assert verdict(with_a_sequence("Abs"), with_a_sequence("Neg")) != "equal"


def test_trap_42_a_wrong_candidate_is_not_a_success_with_a_warning():
    model = conv_bn()
    candidate = right_fold(model)
    set_initializer(candidate, "w1", lambda weight: weight * 1923)
    found = normtool.validate(model, candidate)
    assert found.verdict == found.to_dict()["verdict"] == "different"
    assert found.outputs[0].max_abs > 1000


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU here")
def test_trap_42_cuda_without_a_gpu_is_not_the_cpu_under_another_name():
    model = conv_bn()
    with pytest.raises(BackendUnavailable, match="cuda"):
        normtool.validate(model, model, device="cuda")


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU here")
def test_trap_42_cuda_without_a_gpu_is_exit_4_and_one_line(normtool, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(conv_bn(), path)
    done = normtool("validate", path, path, "--device", "cuda")
    assert (done.returncode, done.stdout) == (4, "")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device; run the tests with -m gpu on a machine that has one")
def test_trap_42_cuda_runs_on_cuda_and_says_so():
    model = conv_bn()
    found = normtool.validate(model, right_fold(model), device="cuda")
    assert found.providers["requested"] == "cuda"
    assert "CUDAExecutionProvider" in found.providers["effective"]
    assert found.verdict == "equal"
    assert verdict(model, wrong_fold(model, "gamma ignored"), device="cuda") == "different"


def test_an_unknown_device_is_refused():
    model = conv_bn()
    with pytest.raises(UsageError, match="tpu"):
        normtool.validate(model, model, device="tpu")


# ---- 3 and 41: the runtime's own optimisations ------------------------------------------------------------


def test_trap_41_the_default_level_is_a_run_of_its_own():
    model = conv_bn()
    found = normtool.validate(model, right_fold(model))
    assert [difference.name for difference in found.default_level] == ["y"]
    assert found.to_dict()["default_level"]["verdict"] == "equal"


def test_trap_41_tensors_inside_are_no_outputs_of_the_default_run():
    """An extra output would stop the fusion that the default level is run for."""
    model = saturated()
    found = normtool.validate(model, right_fold(model))
    assert found.sites
    assert [difference.name for difference in found.default_level] == ["y"]


def test_trap_03_an_optimiser_that_breaks_the_model_is_not_blamed_on_the_fold():
    """ONNX Runtime drops Transpose(perm=[0, 1]) and reads the bias wrongly when it fuses MatMul + Add."""
    net = Net()
    y = net.node("Transpose", net.input([4, 4]), perm=[0, 1])
    y = net.node("Add", net.node("MatMul", y, net.weight(4, 4)), net.weight(4))
    net.output(net.batch_norm(y, 4), [4, 4])
    model = net.model()
    assert verdict(model, right_fold(model)) == "equal"


# ---- folds that are right and were not believed ---------------------------------------------------------


def test_a_right_fold_inside_a_branch_is_equal():
    net = Net()
    x, condition = net.input([1, 3, 8, 8]), net.input([], "condition", dtype=np.bool_)
    bodies = []
    for seed, prefix in enumerate(("then.", "else.")):
        body = Net(prefix=prefix, seed=seed)
        body.output(body.batch_norm(body.conv(x, 3, 4, 3, 3), 4), [1, 4, 6, 6])
        bodies.append(body.graph())
    net.output(net.node("If", condition, then_branch=bodies[0], else_branch=bodies[1]), [1, 4, 6, 6])
    model = net.model()
    assert verdict(model, right_fold(model)) == "equal"


@pytest.mark.parametrize("broken", ["then_branch", "else_branch"])
def test_both_branches_are_entered(broken):
    """One set of inputs takes each of them, so neither can hide a difference."""

    def branches(then: str, otherwise: str) -> onnx.ModelProto:
        net = Net()
        y = net.batch_norm(net.conv(net.input([1, 3, 8, 8]), 3, 4, 3, 3), 4)
        condition = net.input([], "condition", dtype=np.bool_)
        bodies = []
        for prefix, op_type in (("then.", then), ("else.", otherwise)):
            body = Net(prefix=prefix)
            body.output(body.node(op_type, y), [1, 4, 6, 6])
            bodies.append(body.graph())
        net.output(net.node("If", condition, then_branch=bodies[0], else_branch=bodies[1]), [1, 4, 6, 6])
        return net.model()

    candidate = branches("Abs", "Relu") if broken == "else_branch" else branches("Relu", "Neg")
    assert verdict(branches("Abs", "Neg"), candidate) == "different"


@pytest.mark.parametrize("calls", [1, 2])
def test_a_right_fold_inside_a_function_is_equal(calls):
    inner, net = Net(seed=1), Net()
    y = inner.conv(inner.input(None), 4, 4, 3, 3, pads=[1] * 4)
    inner.output(inner.batch_norm(y, 4))
    net.define("Block", inner)
    y = net.input([1, 4, 8, 8])
    for _ in range(calls):
        y = net.node("Block", y, domain="local")
    net.output(y, [1, 4, 8, 8])
    model = net.model()
    assert verdict(model, right_fold(model)) == "equal"


def value_floats(net: Net, array: Array) -> str:
    return net.node("Constant", value_floats=array.tolist())


def constant_node(net: Net, array: Array) -> str:
    return net.node("Constant", value=numpy_helper.from_array(array))


def sparse_constant(net: Net, array: Array) -> str:
    index = numpy_helper.from_array(np.arange(array.size), "i")
    tensor = helper.make_sparse_tensor(numpy_helper.from_array(array, ""), index, array.shape)
    return net.node("Constant", sparse_value=tensor)


def sparse_initializer(net: Net, array: Array) -> str:
    name = net.fresh("sparse")
    index = numpy_helper.from_array(np.arange(array.size), f"{name}.i")
    net.sparse.append(helper.make_sparse_tensor(numpy_helper.from_array(array, name), index, array.shape))
    return name


@pytest.mark.parametrize("store", [value_floats, constant_node, sparse_constant, sparse_initializer])
def test_a_model_may_store_its_numbers_in_any_way(store):
    """The kept norm reads them, so they are still there to be nudged after the fold."""
    net = Net()
    y = net.batch_norm(net.conv(net.input([2, 3, 8, 8]), 3, 4, 3, 3), 4)
    y = net.node("InstanceNormalization", y, *(store(net, np.float32([1, -2, 3, 0.5])) for _ in range(2)))
    net.output(y, [2, 4, 6, 6])
    model = net.model()
    found = normtool.fold(model)
    assert found.folded == 1
    assert found.validation.verdict == "equal"


def test_nothing_folded_is_nothing_to_compare():
    net = Net()
    net.output(net.batch_norm(net.input([2, 4]), 4), [2, 4])
    assert normtool.fold(net.model()).validation is None


# ---- inputs -----------------------------------------------------------------------------------------------


def transformer_like() -> onnx.ModelProto:
    """Token ids into a table of 7, positions into one of 50 through an Unsqueeze, a mask."""
    net = Net()
    ids = net.input(["batch", "sequence"], "input_ids", dtype=np.int64)
    positions = net.input(["sequence"], "positions", dtype=np.int64)
    mask = net.input(["batch", "sequence"], "attention_mask", dtype=np.int64)
    positions = net.node("Unsqueeze", positions, net.constant(np.array([0])))
    y = net.node(
        "Add", net.node("Gather", net.weight(7, 8), ids), net.node("Gather", net.weight(50, 8), positions)
    )
    mask = net.node("Unsqueeze", net.node("Cast", mask, to=TensorProto.FLOAT), net.constant(np.array([-1])))
    net.output(net.node("Mul", y, mask), ["batch", "sequence", 8])
    return net.model()


def generated(model: onnx.ModelProto, seed: int = 0) -> list[dict[str, Array]]:
    return [{spec.name: generate(spec) for spec in specs} for specs in attempts(load(model).graph, seed)]


def test_trap_39_integers_stay_inside_their_table_and_are_not_all_zero():
    for arrays in generated(transformer_like()):
        for name, entries in (("input_ids", 7), ("positions", 50)):
            assert 0 <= arrays[name].min() <= arrays[name].max() < entries
    first = generated(transformer_like())[0]
    assert len(np.unique(first["input_ids"])) > 2
    assert first["positions"].max() >= 7


def test_trap_39_every_row_of_a_mask_has_a_valid_element():
    for arrays in generated(transformer_like()):
        mask = arrays["attention_mask"]
        assert set(np.unique(mask)) <= {0, 1}
        assert mask.max(axis=-1).all()
    assert any((arrays["attention_mask"] == 0).any() for arrays in generated(transformer_like()))


def test_trap_39_dynamic_dimensions_run_at_two_sizes_and_not_at_one():
    net = Net()
    y = net.conv(net.input(["batch", 3, "height", "width"]), 3, 4, 3, 3)
    net.output(net.batch_norm(y, 4), ["batch", 4, None, None])
    model = net.model()
    found = normtool.validate(model, right_fold(model))
    shapes = [entry["x"] for entry in found.inputs]
    assert len({tuple(shape) for shape in shapes}) == 2
    assert all(length > 1 for shape in shapes for length in shape)
    assert len({shape[0] for shape in shapes}) == len({shape[2] for shape in shapes}) == 2


def test_dimensions_of_one_name_have_one_size():
    found = normtool.validate(transformer_like(), transformer_like())
    for entry in found.inputs:
        assert entry["input_ids"] == entry["attention_mask"]
        assert entry["input_ids"][1:] == entry["positions"]


def test_a_dynamic_dimension_that_fits_one_size_only_is_noted():
    net = Net()
    y = net.node("Reshape", net.input(["batch", "width"]), net.constant(np.array([3, 13])))
    net.output(net.node("Gemm", y, net.weight(13, 4)), [3, 4])
    found = normtool.validate(net.model(), net.model())
    assert found.inputs[0] == {"x": [3, 13]}
    assert any("one size" in note for note in found.notes)


@pytest.mark.parametrize("scalar", [False, True], ids=["static", "static-with-a-scalar"])
def test_a_static_model_is_not_said_to_be_dynamic(scalar):
    net = Net()
    y = net.node("Gemm", net.input([2, 4]), net.weight(4, 3))
    net.output(net.node("Mul", y, net.input([], "factor")) if scalar else y, [2, 3])
    found = normtool.validate(net.model(), net.model())
    assert found.notes == ()


def clipped(limit: float) -> onnx.ModelProto:
    """Equal on ordinary inputs, whatever the limit; on large ones not."""
    net = Net()
    y = net.node("Clip", net.input([2, 4]), net.constant(np.float32(-limit)), net.constant(np.float32(limit)))
    net.output(net.node("Gemm", y, net.weight(4, 3)), [2, 3])
    return net.model()


def test_given_inputs_are_the_ones_that_run():
    models = clipped(1e3), clipped(1e6)
    assert verdict(*models) == "equal"
    inputs = {"x": np.full((2, 4), 1e5, np.float32)}
    found = normtool.validate(*models, inputs=inputs)
    assert found.verdict == "different"
    assert found.inputs == ({"x": [2, 4]},)


def test_given_inputs_reach_the_fold_too():
    model = conv_bn()
    found = normtool.fold(model, inputs={"x": np.ones((2, 3, 8, 8), np.float32)}).validation
    assert (found.verdict, len(found.inputs)) == ("equal", 1)


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param({"z": np.ones((2, 3, 8, 8), np.float32)}, id="another-name"),
        pytest.param({"x": np.ones((2, 3), np.float32)}, id="another-rank"),
        pytest.param({"x": np.ones((2, 3, 8, 8), np.float64)}, id="another-dtype"),
    ],
)
def test_inputs_that_do_not_fit_are_the_callers_mistake(inputs):
    model = conv_bn()
    with pytest.raises(UsageError):
        normtool.validate(model, model, inputs=inputs)


def test_one_seed_one_result():
    model = conv_bn()
    candidate = right_fold(model)
    first, again, other = (
        json.dumps(normtool.validate(model, candidate, seed=seed).to_dict()) for seed in (3, 3, 4)
    )
    assert first == again != other
    assert json.loads(other)["seed"] == 4


# ---- models that do not match -----------------------------------------------------------------------------


def test_another_number_of_outputs_cannot_be_compared():
    model, other = conv_bn(), conv_bn()
    other.graph.output.append(helper.make_tensor_value_info("t3", TensorProto.FLOAT, None))
    other.graph.output[-1].name = other.graph.node[1].output[0]
    with pytest.raises(UsageError, match="1 and 2 outputs"):
        normtool.validate(model, other)


def test_outputs_of_other_names_are_compared_in_order_and_that_is_noted():
    model, other = conv_bn(), conv_bn()
    other.graph.node[-1].output[0] = other.graph.output[0].name = "renamed"
    found = normtool.validate(model, other)
    assert found.verdict == "equal"
    assert any("names" in note for note in found.notes)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(("Flatten", {}), id="another-shape"),
        pytest.param(("Cast", {"to": TensorProto.DOUBLE}), id="another-dtype"),
    ],
)
def test_outputs_of_another_type_are_different(change):
    op_type, attributes = change
    model, other = conv_bn(), conv_bn()
    other.graph.node[-1].output[0] = "inner"
    other.graph.node.append(helper.make_node(op_type, ["inner"], ["y"], **attributes))
    del other.graph.output[:]
    data_type = attributes.get("to", TensorProto.FLOAT)
    other.graph.output.append(helper.make_tensor_value_info("y", data_type, None))
    assert verdict(model, other) == "different"


def test_inputs_of_another_name_cannot_be_compared():
    model, other = conv_bn(), conv_bn()
    other.graph.input[0].name = other.graph.node[0].input[0] = "image"
    with pytest.raises(NormtoolError, match="image"):
        normtool.validate(model, other)


def unknown_op() -> onnx.ModelProto:
    net = Net()
    net.domains["somebody.else"] = 1
    net.output(net.node("Mystery", net.input([2, 4]), domain="somebody.else"), [2, 4])
    return net.model()


@pytest.mark.parametrize("who", ["reference", "candidate"])
def test_a_model_that_the_runtime_refuses_is_an_error_and_no_verdict(who):
    net = Net()
    net.output(net.node("Relu", net.input([2, 4])), [2, 4])
    models = [net.model(), net.model()]
    models[who == "candidate"] = unknown_op()
    with pytest.raises(RuntimeRefused, match=r"Mystery|somebody"):
        normtool.validate(*models)


def test_a_model_that_the_runtime_refuses_is_exit_3(normtool, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(unknown_op(), path)
    done = normtool("validate", path, path)
    assert (done.returncode, done.stdout) == (3, "")
    assert 1 <= len(done.stderr.splitlines()) <= 2


# ---- the document -----------------------------------------------------------------------------------------


def test_the_document_has_the_keys_of_the_contract():
    model = conv_bn()
    found = json.loads(json.dumps(normtool.validate(model, right_fold(model)).to_dict(), allow_nan=False))
    assert found["schema"] == "normtool.validation/1"
    assert found.keys() >= {"schema", "verdict", "outputs", "providers", "seed"}
    assert found["providers"] == {"requested": "cpu", "effective": ["CPUExecutionProvider"]}
    (output,) = found["outputs"]
    assert list(output) == ["name", "max_abs", "max_rel", "noise_floor", "ratio"]


def test_a_rewrite_carries_its_validation():
    found = normtool.fold(conv_bn()).to_dict()
    assert list(found) == ["schema", "sites", "before", "after", "key_map", "validation", "outputs"]
    assert found["validation"]["verdict"] == "equal"
    (site,) = found["sites"]
    assert list(site) == ["name", "kind", "verdict", "into", "reasons", "proof"]
    assert site["into"] == [conv_bn().graph.node[0].name]


def test_validating_leaves_both_files_as_they_are(tmp_path):
    paths = [tmp_path / name for name in ("reference.onnx", "candidate.onnx")]
    for path in paths:
        onnx.save(conv_bn(), path)
    before = [path.read_bytes() for path in paths]
    assert normtool.validate(*paths).verdict == "equal"
    assert [path.read_bytes() for path in paths] == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["candidate.onnx", "reference.onnx"]
