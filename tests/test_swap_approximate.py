"""`swap --mode approximate`: what is predicted is measured, calibration lowers it, nobody calls it equal.

The formula is checked against brute force, the fit against numpy's least squares, and both against what ONNX
Runtime and PyTorch compute before and after.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from normtool import api
from normtool.drift import FEWEST_ROWS, InputSums, PairSums, Tap, rows_of
from normtool.errors import UsageError
from normtool.formats.torch.export import Example, export
from normtool.graph import ModelGraph, Role, Tensor
from normtool.samples import BATCH, Data
from tests.conftest import Run
from tests.formats.torch.checks import perturbed
from tests.zoo import Net, run

pytestmark = pytest.mark.usefixtures("worker_in_this_process")

Array = np.ndarray[Any, Any]

WIDTH, LENGTH = 64, 6


# ---- models -----------------------------------------------------------------------------------------


def post_ln(
    mean: float = 0.5,
    layers: int = 1,
    opset: int = 17,
    dtype: Any = np.float32,
    batch: Any = "batch",
    bias: bool = True,
    spread: float = 0.3,
) -> onnx.ModelProto:
    """x + ReLU(x·W + b), then LayerNorm: a ReLU writes into the sum, so its mean cannot be taken out.

    `mean` moves b, and with it ρ.
    """
    net = Net(opset=opset, dtype=dtype)
    x = net.input([batch, LENGTH, WIDTH])

    def vector(middle: float) -> str:
        return net.constant((middle + spread * net.rng.standard_normal(WIDTH)).astype(dtype))

    for number in range(layers):
        h = net.node("Relu", net.node("Add", net.node("MatMul", x, net.weight(WIDTH, WIDTH)), vector(mean)))
        affine = [vector(1.0), *([vector(0.2)] if bias else [])]
        x = net.node("LayerNormalization", net.node("Add", x, h), *affine, axis=-1, name=f"ln{number}")
    net.output(net.node("Tanh", x, outputs=["y"]), [batch, LENGTH, WIDTH])
    return net.model()


def pre_and_post() -> onnx.ModelProto:
    """A Linear and a LayerNorm that can be swapped exactly, then a post-LN block that cannot."""
    net = Net(opset=17)
    x = net.input(["batch", LENGTH, WIDTH])

    def vector() -> str:
        return net.constant((1 + 0.3 * net.rng.standard_normal(WIDTH)).astype(np.float32))

    h = net.node("Add", net.node("MatMul", x, net.weight(WIDTH, WIDTH)), vector())
    h = net.node("LayerNormalization", h, vector(), vector(), axis=-1, name="free")
    h = net.node("Relu", net.node("Add", net.node("MatMul", h, net.weight(WIDTH, WIDTH)), vector()))
    h = net.node("LayerNormalization", h, vector(), vector(), axis=-1, name="observed")
    net.output(net.node("Tanh", h, outputs=["y"]), ["batch", LENGTH, WIDTH])
    return net.model()


def samples(count: int = 64, seed: int = 7, dtype: Any = np.float32) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).standard_normal((count, LENGTH, WIDTH)).astype(dtype)}


def approximate(model: Any, inputs: Any = None, **options: Any) -> api.Rewrite:
    return api.swap(model, inputs, mode="approximate", **options)


def drifts(result: api.Rewrite) -> dict[str, dict[str, Any]]:
    sites = result.to_dict()["sites"]
    return {site["name"]: site["drift"] for site in sites if site["verdict"] == "approximated"}


# ---- the formula ------------------------------------------------------------------------------------


def layer_norm(x: Array, eps: float) -> Array:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def rms_norm(x: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def summed(*batches: Array, axes: tuple[int, ...] = (-1,), eps: float = 1e-5) -> InputSums:
    sums = InputSums(axes, eps)
    for batch in batches:
        sums.see(batch)
    return sums


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
@pytest.mark.parametrize("mean", [0.0, 0.1, 1.0, 30.0])
def test_the_formula_is_what_brute_force_finds(mean: float, eps: float) -> None:
    x = np.random.default_rng(0).standard_normal((50, 33)) + mean
    z, r = layer_norm(x, eps), rms_norm(x, eps)
    brute = np.sqrt(np.sum((r - z) ** 2) / np.sum(z**2))
    assert summed(x, eps=eps).predicted == pytest.approx(brute, rel=1e-6, abs=1e-7)


def test_one_rho_for_all_rows_is_the_textbook_formula() -> None:
    u = np.random.default_rng(0).standard_normal((20, 16))
    u = layer_norm(u, 0.0)
    for rho in (0.2, 1.0, 5.0):
        sums = summed(3 * (u + rho), eps=0.0)
        assert sums.rho == pytest.approx(rho)
        assert sums.predicted == pytest.approx(np.sqrt(2 - 2 / np.sqrt(1 + rho**2)))


def test_rho_rms_bounds_the_prediction_from_above() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((200, 16)) + 3 * rng.standard_normal((200, 1))
    sums = summed(x)
    bound = np.sqrt(2 - 2 / np.sqrt(1 + sums.rho**2))
    assert 0.5 * bound < sums.predicted < bound


def test_one_pass_in_any_batches_is_one_pass() -> None:
    x = np.random.default_rng(2).standard_normal((60, 3, 8)) + 1
    whole, parts = summed(x), summed(x[:7], x[7:8], x[8:])
    assert parts.rows == whole.rows == 180
    assert parts.predicted == pytest.approx(whole.predicted)
    assert np.allclose(parts.fit(), whole.fit())  # type: ignore[arg-type]


@pytest.mark.parametrize("axes", [(-1,), (-2, -1), (-3,), (-3, -2)])
def test_rows_lie_along_the_axes(axes: tuple[int, ...]) -> None:
    x = np.random.default_rng(3).standard_normal((4, 5, 6)) + 1
    z = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    r = x / np.sqrt((x**2).mean(axes, keepdims=True) + 1e-5)
    brute = np.sqrt(np.sum((r - z) ** 2) / np.sum(z**2))
    assert summed(x, axes=axes).predicted == pytest.approx(brute)
    assert rows_of(x, axes).shape == (x.size // rows_of(x, axes).shape[1], np.prod([x.shape[a] for a in axes]))


def test_the_fit_is_numpys_least_squares() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((300, 12)) * rng.uniform(0.5, 2, 12) + rng.standard_normal(12) + 2
    sums = summed(x)
    z, r = layer_norm(x, 1e-5), rms_norm(x, 1e-5)
    fit = sums.fit()
    assert fit is not None
    for channel in range(12):
        expected = np.linalg.lstsq(np.stack([r[:, channel], np.ones(300)], 1), z[:, channel])[0]
        assert (fit[0][channel], fit[1][channel]) == pytest.approx(tuple(expected), rel=1e-9)
    gamma = rng.standard_normal(12)
    left = np.sum((gamma * (fit[0] * r + fit[1] - z)) ** 2) / np.sum((gamma * z) ** 2)
    assert sums.predicted_after(*fit, gamma) == pytest.approx(np.sqrt(left))
    worse = sums.predicted_after(fit[0] * 1.01, fit[1], gamma)  # no other slope does better
    assert worse > sums.predicted_after(*fit, gamma)


def test_a_channel_without_spread_gets_a_shift_alone() -> None:
    x = np.random.default_rng(5).standard_normal((100, 2))
    x = np.concatenate([np.full((100, 1), 0.0), x, -x], axis=1)  # channel 0 is 0, and so is every mean
    fit = summed(x).fit()
    assert fit is not None
    assert fit[0][0] == 1.0
    assert fit[1][0] == pytest.approx(0, abs=1e-15)


# ---- rows without a number, and of one number (TRAPS 33) --------------------------------------------


def test_flat_rows_are_counted_and_take_no_part_in_the_fit() -> None:
    x = np.random.default_rng(6).standard_normal((100, 8)) + 1
    padding = np.full((40, 8), 2.0)
    plain, padded = summed(x), summed(x, padding)
    assert (plain.flat, padded.flat) == (0, 40)
    assert np.allclose(plain.fit(), padded.fit())  # type: ignore[arg-type]
    assert padded.rho == pytest.approx(plain.rho)
    z, r = layer_norm(np.concatenate([x, padding]), 1e-5), rms_norm(np.concatenate([x, padding]), 1e-5)
    assert np.abs(z[100:]).max() == 0
    assert np.abs(r[100:] - 1).max() < 1e-5
    brute = np.sqrt(np.sum((r - z) ** 2) / np.sum(z**2))
    assert padded.predicted == pytest.approx(brute)  # and in the prediction they are
    assert padded.predicted > 1.2 * plain.predicted


def test_rows_of_nothing_but_padding_have_no_bound() -> None:
    assert summed(np.full((10, 8), 2.0)).predicted == np.inf
    assert summed(np.full((10, 8), 2.0)).fit() is None


def test_rows_of_zeros_do_not_drift_and_are_not_flat() -> None:
    sums = summed(np.zeros((10, 8)))
    assert (sums.predicted, sums.flat) == (0.0, 0)


def test_rows_that_are_no_numbers_are_left_out() -> None:
    x = np.random.default_rng(7).standard_normal((20, 8)) + 1
    spoiled = np.concatenate([x, np.full((3, 8), np.inf), np.full((2, 8), np.nan)])
    sums = summed(spoiled)
    assert (sums.rows, sums.lost) == (20, 5)
    assert sums.predicted == pytest.approx(summed(x).predicted)


def test_padding_in_a_model_is_said() -> None:
    net = Net(opset=17)
    x = net.input(["batch", LENGTH, WIDTH])
    net.output(net.node("Tanh", net.node("LayerNormalization", x, net.weight(WIDTH), axis=-1), outputs=["y"]))
    data = samples()
    data["x"][:, 4:] = 0.5
    result = approximate(net.model(), calibrate=data)
    (site,) = result.to_dict()["sites"]
    assert site["drift"]["flat_rows"] == 2 * 64
    (reason,) = [reason for reason in site["reasons"] if reason["code"] == "flat_rows"]
    assert "128 of 384 rows of 'x'" in reason["message"]
    assert site["drift"]["measured"] == pytest.approx(site["drift"]["predicted"], rel=1e-4)


def test_a_model_that_reads_nothing_but_padding_is_approximated_without_bound() -> None:
    net = Net(opset=17)
    x = net.input(["batch", LENGTH, WIDTH])
    net.output(net.node("Tanh", net.node("LayerNormalization", x, net.weight(WIDTH), axis=-1), outputs=["y"]))
    result = approximate(net.model(), calibrate={"x": np.ones((8, LENGTH, WIDTH), np.float32)})
    (site,) = result.to_dict()["sites"]
    assert site["drift"]["predicted"] is None
    assert {reason["code"] for reason in site["reasons"]} >= {"flat_rows", "not_fitted"}
    json.dumps(result.to_dict(), allow_nan=False)
    assert "without bound" in str(result)


# ---- prediction and measurement -----------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 0.5, 5.0], ids=["small", "perturbed", "large means"])
@pytest.mark.parametrize("opset", [17, 23])
def test_the_prediction_is_what_is_measured(mean: float, opset: int) -> None:
    """Within 10 %: γ weighs the channels, and the formula does not know how."""
    result = approximate(post_ln(mean, opset=opset))
    (drift,) = drifts(result).values()
    assert drift["measured"] == pytest.approx(drift["predicted"], rel=0.1)
    assert drift["measured"] > 0.1
    assert not result.exact
    assert (result.swapped, result.approximated) == (0, 1)


def test_with_an_even_gamma_the_prediction_is_exact() -> None:
    (drift,) = drifts(approximate(post_ln(2.0, spread=0.0))).values()
    assert drift["measured"] == pytest.approx(drift["predicted"], rel=1e-5)


@pytest.mark.parametrize("mean", [0.5, 5.0])
def test_calibration_lowers_the_drift(mean: float) -> None:
    plain, fitted = approximate(post_ln(mean)), approximate(post_ln(mean), calibrate=samples())
    (before,), (after,) = drifts(plain).values(), drifts(fitted).values()
    assert after["measured"] == pytest.approx(after["predicted"], rel=1e-4)
    assert after["without_calibration"] == pytest.approx(before["measured"], rel=0.2)  # other data
    assert before["measured"] / after["measured"] > (3 if mean < 1 else 9)


def test_the_drift_without_calibration_is_what_gamma_and_beta_as_they_are_would_give() -> None:
    data = samples()
    (fitted,) = drifts(approximate(post_ln(1.0), calibrate=data)).values()
    sums = InputSums.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InputSums, "fit", lambda self: None if sums(self) is None else (np.ones(1), np.zeros(1)))
        (plain,) = drifts(approximate(post_ln(1.0), calibrate=data)).values()
    assert plain["measured"] == pytest.approx(fitted["without_calibration"], rel=1e-4)


def test_calibration_holds_on_other_data_of_the_kind() -> None:
    model = post_ln(5.0)
    fitted = approximate(model, calibrate=samples(256), validate=False)
    other = samples(64, seed=99)
    expected, got = (run(each, other)[0].astype(np.float64) for each in (model, fitted.model))
    naive = run(approximate(model, validate=False).model, other)[0].astype(np.float64)
    assert np.linalg.norm(got - expected) < 0.15 * np.linalg.norm(naive - expected)


def test_the_measured_drift_is_the_models_own() -> None:
    """Against both models, run here, with the LayerNorm's output laid open by hand."""
    model = post_ln(1.0)
    data = samples(16)
    result = approximate(model, calibrate=data)
    (drift,) = drifts(result).values()
    (output,) = result.to_dict()["drift"]["outputs"]
    y, new = (
        np.arctanh(np.clip(run(each, data)[0].astype(np.float64), -0.9999, 0.9999))
        for each in (model, result.model)
    )
    beta = onnx.numpy_helper.to_array(
        next(i for i in model.graph.initializer if i.name == model.graph.node[-2].input[2])
    )
    assert np.linalg.norm(new - y) / np.linalg.norm(y - beta) == pytest.approx(drift["measured"], rel=0.02)
    y, new = (run(each, data)[0].astype(np.float64) for each in (model, result.model))
    assert np.linalg.norm(new - y) / np.linalg.norm(y) == pytest.approx(output["measured"], rel=1e-4)


def test_a_wrong_fit_is_seen_in_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = InputSums.fit

    def spoiled(self: InputSums) -> Any:
        found = fit(self)
        return found if found is None else (found[0], found[1] + 0.5)

    monkeypatch.setattr(InputSums, "fit", spoiled)
    monkeypatch.setattr(InputSums, "predicted_after", lambda self, a, b, gamma: 0.01)
    (drift,) = drifts(approximate(post_ln(1.0), calibrate=samples())).values()
    assert drift["measured"] > 20 * drift["predicted"]


@pytest.mark.parametrize("target", ["primitive", "onnx", "ort"])
def test_every_spelling_and_with_gamma_and_beta_moved_on(target: str) -> None:
    """A Linear reads the norm and takes γ′ and β′; the drift of the norm is measured all the same."""
    net = Net(opset=17)
    x = net.input(["batch", LENGTH, WIDTH])
    g, b = (net.constant((m + 0.3 * net.rng.standard_normal(WIDTH)).astype(np.float32)) for m in (1, 0.2))
    h = net.node("LayerNormalization", net.node("Abs", x), g, b, axis=-1, name="ln")
    h = net.node("Add", net.node("MatMul", h, net.weight(WIDTH, 9)), net.weight(9))
    net.output(net.node("Identity", h, outputs=["y"]), ["batch", LENGTH, 9])
    for options in ({}, {"keep_affine": True}):
        result = approximate(net.model(), calibrate=samples(), target=target, **options)
        (site,) = result.to_dict()["sites"]
        assert site["drift"]["measured"] == pytest.approx(site["drift"]["predicted"], rel=1e-4)
        assert bool(site["into"]) == (not options)
        assert site["proof"]["region_max_rel"] < 1e-12


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_without_beta_gets_one(bias: bool) -> None:
    result = approximate(post_ln(2.0, bias=bias), calibrate=samples())
    (drift,) = drifts(result).values()
    assert drift["measured"] == pytest.approx(drift["predicted"], rel=1e-4)
    assert drift["measured"] < 0.3 * drift["without_calibration"]


def test_what_can_be_swapped_exactly_is_swapped_exactly_first() -> None:
    result = approximate(pre_and_post())
    sites = {site["name"]: site for site in result.to_dict()["sites"]}
    assert sites["free"]["verdict"] == "swapped"
    assert "drift" not in sites["free"]
    assert sites["observed"]["verdict"] == "approximated"
    assert (result.swapped, result.approximated) == (1, 1)
    assert sites["observed"]["drift"]["measured"] == pytest.approx(
        sites["observed"]["drift"]["predicted"], rel=0.1
    )


def test_where_all_can_be_swapped_exactly_it_is_an_exact_swap() -> None:
    result = approximate(pre_and_post(), skip=("observed",))
    assert result.exact
    assert result.to_dict()["exact"] is True
    assert "drift" not in result.to_dict()
    assert result.validation is not None
    assert result.validation.verdict == "equal"


def test_an_exact_swap_may_not_rely_on_a_norm_that_drifts() -> None:
    """LN(LN(x)) with γ = 1: the second reads what has no mean, until the first no longer takes it away."""
    net = Net(opset=17)
    x = net.input(["batch", LENGTH, WIDTH])
    ones = net.constant(np.ones(WIDTH, np.float32))
    h = net.node("LayerNormalization", net.node("Abs", x), ones, axis=-1, name="first")
    h = net.node("LayerNormalization", h, net.weight(WIDTH), axis=-1, name="second")
    net.output(net.node("Tanh", h, outputs=["y"]), ["batch", LENGTH, WIDTH])
    exact = {site.norm.name: site.verdict for site in api.plan_swap(net.model()).sites}
    assert exact == {"first": "kept", "second": "swapped"}
    both = drifts(approximate(net.model()))
    assert set(both) == {"first", "second"}
    # alone it would not drift at all; what it has is what comes in
    assert both["second"]["predicted"] == pytest.approx(0, abs=1e-5)
    assert both["second"]["measured"] > 0.5


def test_drift_adds_up_through_the_layers() -> None:
    found = list(drifts(approximate(post_ln(0.5, layers=3))).values())
    assert found[0]["measured"] == pytest.approx(found[0]["predicted"], rel=0.1)
    assert found[2]["measured"] > found[2]["predicted"]  # predicted alone, measured behind two others


def test_a_plan_can_be_made_and_applied_apart() -> None:
    model = post_ln()
    plan = api.plan_swap(model, mode="approximate")
    made = api.apply(model, plan)
    assert "LayerNormalization" not in {node.op_type for node in made.graph.node}
    x = samples(4)
    whole = approximate(model, validate=False).model
    assert np.array_equal(run(made, x)[0], run(whole, x)[0])


def test_generated_inputs_are_the_same_each_time() -> None:
    assert drifts(approximate(post_ln())) == drifts(approximate(post_ln()))
    assert drifts(approximate(post_ln())) != drifts(approximate(post_ln(), seed=3))


def test_inputs_of_the_callers_own() -> None:
    data = samples(4)
    (drift,) = drifts(approximate(post_ln(), data)).values()
    assert drift["rows"] == 4 * LENGTH
    assert "without_calibration" not in drift


# ---- precisions -----------------------------------------------------------------------------------------


def test_float16() -> None:
    model = post_ln(1.0, dtype=np.float16)
    (plain,) = drifts(approximate(model)).values()
    assert plain["measured"] == pytest.approx(plain["predicted"], rel=0.1)
    (fitted,) = drifts(approximate(model, calibrate=samples(dtype=np.float16))).values()
    assert fitted["measured"] == pytest.approx(fitted["predicted"], rel=0.05)


class _PostLN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.norm(x + torch.relu(self.linear(x))))


def _program(dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    module = perturbed(_PostLN()).to(dtype).eval()
    x = torch.randn(8, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    return export(module, Example((x,), {}), dynamic_batch=False), x


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 0.02), (torch.bfloat16, 0.05)]
)
def test_programs_in_every_precision(dtype: torch.dtype, tolerance: float) -> None:
    program, _ = _program(dtype)
    (plain,) = drifts(approximate(program)).values()
    assert plain["measured"] == pytest.approx(plain["predicted"], rel=0.15)
    array = torch.randn(64, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    from normtool.formats.torch.tensors import to_numpy

    result = approximate(program, calibrate={"x": to_numpy(array)})
    (fitted,) = drifts(result).values()
    assert fitted["rows"] == 64 * LENGTH
    assert fitted["measured"] == pytest.approx(fitted["predicted"], rel=tolerance)
    assert fitted["measured"] < plain["measured"]
    assert not any("layer_norm" in str(node.target) for node in result.model.graph.nodes)


def test_the_program_given_is_not_touched() -> None:
    program, x = _program(torch.float32)
    before = program.module()(x)
    approximate(program, calibrate={"x": x.numpy()})
    assert torch.equal(program.module()(x), before)


def test_a_module_stays_the_users_own_class() -> None:
    module, x = perturbed(_PostLN()).eval(), torch.randn(8, LENGTH, WIDTH)
    before = module(x).detach()
    result = approximate(module, x, calibrate=samples())
    (drift,) = drifts(result).values()
    assert drift["measured"] == pytest.approx(drift["predicted"], rel=1e-4)
    assert type(result.model) is _PostLN
    assert isinstance(module.norm, nn.LayerNorm)
    assert torch.equal(module(x), before)
    assert not torch.allclose(result.model(x), before, atol=1e-3)


def test_in_place_is_what_was_asked_for_though_it_is_not_equal() -> None:
    module, x = perturbed(_PostLN()).eval(), torch.randn(8, LENGTH, WIDTH)
    result = approximate(module, x, inplace=True)
    assert result.validation is not None
    assert result.validation.verdict == "different"
    assert not isinstance(module.norm, nn.LayerNorm)
    assert drifts(result)["norm"]["measured"] > 0


def test_a_program_on_the_command_line(normtool: Run, tmp_path: Path) -> None:
    program, _ = _program(torch.float32)
    torch.export.save(program, tmp_path / "model.pt2")
    np.savez(tmp_path / "samples.npz", **samples(16))
    out, options = tmp_path / "out.pt2", ("--mode", "approximate", "--calibrate", tmp_path / "samples.npz")
    done = normtool("swap", tmp_path / "model.pt2", "-o", out, *options, "--format", "json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (site,) = document["sites"]
    assert document["exact"] is False
    assert site["drift"]["measured"] == pytest.approx(site["drift"]["predicted"], rel=1e-4)
    torch.export.load(out).module()(torch.randn(8, LENGTH, WIDTH))


# ---- samples ----------------------------------------------------------------------------------------


def _input(name: str, *shape: Any, dtype: Any = np.float32) -> Tensor:
    return Tensor(name, ModelGraph.MAIN, Role.INPUT, np.dtype(dtype), shape)


def _data(**arrays: Array) -> Data:
    return Data.of(arrays)


def test_an_open_batch_takes_a_few_samples_at_a_time() -> None:
    found = _data(x=np.arange(20, dtype=np.float32).reshape(20, 1)).batches([_input("x", "n", 1)])
    assert all(len(batch["x"]) <= BATCH for batch in found)
    assert np.concatenate([batch["x"] for batch in found]).ravel().tolist() == list(range(20))


def test_a_fixed_batch_sets_the_size() -> None:
    x, y = np.zeros((6, 3), np.float32), np.arange(6, dtype=np.float32)
    found = _data(x=x, y=y).batches([_input("x", 2, 3), _input("y", "n")])
    assert [(len(batch["x"]), batch["y"].tolist()) for batch in found] == [
        (2, [0, 1]),
        (2, [2, 3]),
        (2, [4, 5]),
    ]


def test_what_a_fixed_input_wants_is_fed_every_time() -> None:
    x, positions = np.zeros((20, 3), np.float32), np.arange(3).reshape(1, 3)
    found = _data(x=x, p=positions).batches([_input("x", "n", 3), _input("p", 1, 3, dtype=np.int64)])
    assert len(found) == 3
    assert all(batch["p"].tolist() == [[0, 1, 2]] for batch in found)


@pytest.mark.parametrize(
    ("arrays", "inputs", "told"),
    [
        ({"y": np.zeros((4, 3), np.float32)}, [("x", "n", 3)], "lacks the model's input 'x'"),
        ({"x": np.zeros((4, 3))}, [("x", "n", 3)], "'x' is float64, the model wants float32"),
        ({"x": np.zeros((4, 5), np.float32)}, [("x", "n", 3)], r"'x' has shape \(4, 5\)"),
        ({"x": np.zeros((0, 3), np.float32)}, [("x", "n", 3)], r"'x' has shape \(0, 3\)"),
        ({"x": np.zeros((3, 3), np.float32)}, [("x", 2, 3)], "has 3 samples, the model takes 2 at a time"),
        (
            {"x": np.zeros((4, 3), np.float32), "y": np.zeros((5, 3), np.float32)},
            [("x", "n", 3), ("y", "n", 3)],
            r"not have the same number of samples \('x' 4, 'y' 5\)",
        ),
        (
            {"x": np.zeros((4, 3), np.float32), "y": np.zeros((6, 3), np.float32)},
            [("x", 2, 3), ("y", 2, 3)],
            "not have the same number of samples",
        ),
    ],
    ids="missing dtype shape empty remainder counts fixed-counts".split(),
)
def test_samples_that_do_not_fit_are_one_line(arrays: Any, inputs: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told) as raised:
        _data(**arrays).batches([_input(name, *shape) for name, *shape in inputs])
    assert "\n" not in str(raised.value)


def test_what_is_no_data_is_refused() -> None:
    with pytest.raises(UsageError, match="not a list"):
        approximate(post_ln(), calibrate=[1, 2])


@pytest.mark.parametrize("mode", ["exact", "centre"])
def test_calibration_of_an_exact_swap_is_refused(mode: str) -> None:
    with pytest.raises(UsageError, match="add --mode approximate"):
        api.swap(post_ln(), mode=mode, calibrate=samples())


def test_too_few_rows_leave_gamma_and_beta_as_they_are() -> None:
    net = Net(opset=17)
    x = net.input(["batch", WIDTH])
    net.output(net.node("Tanh", net.node("LayerNormalization", x, net.weight(WIDTH), axis=-1), outputs=["y"]))
    few = {"x": samples(1)["x"][0, : FEWEST_ROWS - 1] + 1}
    (site,) = approximate(net.model(), calibrate=few).to_dict()["sites"]
    assert "not_fitted" in {reason["code"] for reason in site["reasons"]}
    assert "without_calibration" not in site["drift"]


# ---- where it does nothing ----------------------------------------------------------------------------


def _conditional(inner: bool) -> onnx.ModelProto:
    """An If whose branch has a LayerNorm, of what is computed there or outside."""
    body = Net(opset=17, prefix="b_")
    read = body.node("Abs", "x") if inner else "x"
    h = body.node("LayerNormalization", read, body.weight(WIDTH), axis=-1, name="inside")
    body.output(body.node("Tanh", h, outputs=["b_y"]), [2, WIDTH])
    other = Net(opset=17, prefix="c_")
    other.output(other.node("Tanh", "x", outputs=["c_y"]), [2, WIDTH])
    net = Net(opset=17)
    net.input([2, WIDTH])
    flag = net.input([], "flag", dtype=bool)
    y = net.node("If", flag, outputs=["y"], then_branch=body.graph(), else_branch=other.graph())
    net.output(y, [2, WIDTH])
    return net.model()


def test_a_norm_of_what_is_computed_in_a_body_is_kept_for_nobody_sees_it() -> None:
    result = approximate(_conditional(inner=True), validate=False)
    (site,) = result.to_dict()["sites"]
    assert site["verdict"] == "kept"
    assert "not_measured" in {reason["code"] for reason in site["reasons"]}
    assert result.exact
    assert not result.changed


def test_a_norm_in_a_body_of_what_comes_from_outside_is_predicted_and_not_measured() -> None:
    result = approximate(_conditional(inner=False))
    (site,) = result.to_dict()["sites"]
    assert site["verdict"] == "approximated"
    assert site["drift"]["predicted"] is not None
    assert site["drift"]["measured"] is None
    assert result.to_dict()["drift"]["outputs"][0]["measured"] >= 0


@pytest.mark.parametrize("options", [{"skip": ("ln0",)}, {"only": ("ln1",)}])
def test_norms_that_are_not_chosen_stay(options: Any) -> None:
    sites = {site["name"]: site for site in approximate(post_ln(layers=2), **options).to_dict()["sites"]}
    assert (sites["ln0"]["verdict"], sites["ln1"]["verdict"]) == ("kept", "approximated")
    assert [reason["code"] for reason in sites["ln0"]["reasons"]] == ["not_selected"]


def test_a_model_without_layer_norms_is_left_alone() -> None:
    net = Net(opset=17)
    net.output(net.node("Tanh", net.input([2, 3]), outputs=["y"]), [2, 3])
    result = approximate(net.model())
    assert not result.changed
    assert result.exact
    assert result.validation is None


def test_an_exact_swap_still_writes_nothing_that_differs(tmp_path: Path) -> None:
    result = api.swap(post_ln())
    assert result.exact
    assert not result.changed


# ---- pairs ------------------------------------------------------------------------------------------


def test_pairs_undo_what_has_moved_and_leave_beta_out() -> None:
    rng = np.random.default_rng(0)
    y, beta, s = rng.standard_normal((10, 4)), rng.standard_normal(4), rng.uniform(1, 2, 4)
    moved = (1.1 * (y - beta)) / s  # γ and β are gone, and 10 % are wrong
    sums = PairSums.of([tap := Tap("y", "n", (-1,), s, beta, beta)])
    sums.see([tap], {"y": y}, {"n": moved})
    assert sums.drift(0) == pytest.approx(0.1)
    sums.see_outputs({"o": y}, [2 * y])
    assert sums.output_drifts() == {"o": pytest.approx(1.0)}
    assert PairSums.of([tap]).drift(0) is None


def test_a_result_that_is_no_number_has_no_bound() -> None:
    sums = PairSums.of([])
    sums.see_outputs({"o": np.ones(3)}, [np.array([1.0, np.nan, 1.0])])
    assert sums.output_drifts() == {"o": np.inf}


# ---- the command line ---------------------------------------------------------------------------------


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    onnx.save(post_ln(1.0, layers=2), tmp_path / "model.onnx")
    np.savez(tmp_path / "samples.npz", **samples(16))
    return tmp_path / "model.onnx"


def test_the_result_is_written_labelled_and_said(normtool: Run, model_file: Path) -> None:
    out = model_file.with_name("out.onnx")
    done = normtool("swap", model_file, "-o", out, "--mode", "approximate", "--format", "json")
    assert done.returncode == 0
    document = json.loads(done.stdout)
    assert document["exact"] is False
    assert document["validation"]["verdict"] == "different"
    assert [site["verdict"] for site in document["sites"]] == ["approximated"] * 2
    assert [written["path"] for written in document["outputs"]] == [str(out)]
    (line,) = done.stderr.splitlines()
    assert line.startswith("normtool: approximate: 2 of 2 LayerNorms without their mean; drift predicted 0.")
    assert ", measured " in line
    assert "outputs moved by" in line
    assert {path.name for path in model_file.parent.iterdir()} == {"model.onnx", "out.onnx", "samples.npz"}
    (drifted,) = document["drift"]["outputs"]
    x = samples(8)
    expected, got = (run(path, x)[0] for path in (model_file, out))
    assert 0.3 * drifted["measured"] < np.linalg.norm(got - expected) / np.linalg.norm(expected)


def test_calibration_from_a_file(normtool: Run, model_file: Path) -> None:
    out, data = model_file.with_name("out.onnx"), model_file.with_name("samples.npz")
    done = normtool("swap", model_file, "-o", out, "--mode", "approximate", "--calibrate", data)
    assert done.returncode == 0
    assert "Approximate: drift" in done.stdout
    assert "uncalibrated" in done.stdout
    assert "samples.npz; the result does not compute what the model did" in done.stdout


def test_a_dry_run_predicts_and_writes_nothing(normtool: Run, model_file: Path) -> None:
    before = sorted(model_file.parent.iterdir())
    done = normtool("swap", model_file, "--dry-run", "--mode", "approximate", "--format", "json")
    assert done.returncode == 0
    document = json.loads(done.stdout)
    assert all(site["drift"]["predicted"] > 0.1 for site in document["sites"])
    assert all(site["drift"]["measured"] is None for site in document["sites"])
    assert document["outputs"] == []
    assert sorted(model_file.parent.iterdir()) == before


def test_without_validation_it_is_predicted_and_not_measured(normtool: Run, model_file: Path) -> None:
    out = model_file.with_name("out.onnx")
    done = normtool("swap", model_file, "-o", out, "--mode", "approximate", "--no-validate", "--format", "json")
    assert (done.returncode, out.exists()) == (0, True)
    assert json.loads(done.stdout)["drift"]["measured"] is None
    assert "measured" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--calibrate", "samples.npz"), "add --mode approximate"),
        (("--mode", "approximate", "--calibrate", "none.npz"), "none.npz: is not a readable .npz file"),
        (("--mode", "approximate", "--calibrate", "wrong.npz"), "wrong.npz: lacks the model's input 'x'"),
    ],
    ids="mode file array".split(),
)
def test_refusals_are_one_line_and_nothing_is_written(
    normtool: Run, model_file: Path, arguments: tuple[str, ...], told: str
) -> None:
    folder = model_file.parent
    np.savez(folder / "wrong.npz", y=np.zeros((4, LENGTH, WIDTH), np.float32))
    placed = [str(folder / each) if each.endswith(".npz") else each for each in arguments]
    done = normtool("swap", model_file, "-o", folder / "out.onnx", *placed)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert told in line
    assert not (folder / "out.onnx").exists()


def test_an_existing_file_is_not_written_over(normtool: Run, model_file: Path) -> None:
    out = model_file.with_name("out.onnx")
    out.write_bytes(b"mine")
    done = normtool("swap", model_file, "-o", out, "--mode", "approximate")
    assert (done.returncode, out.read_bytes()) == (5, b"mine")


@pytest.mark.parametrize("code", ["approximated", "not_measured", "flat_rows", "not_fitted"])
def test_every_word_is_explained(normtool: Run, code: str) -> None:
    assert normtool("explain", code).stdout.startswith(code)
