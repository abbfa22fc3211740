"""What a user may ask of a fold: which norms, and other ops or more work for those that cannot go.

Each result is compared with the original in float64 by onnx's reference evaluator, or by PyTorch.
"""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import normtool
from normtool.errors import UsageError
from tests.formats.torch import checks
from tests.rules.test_every_rule import AGREES, difference
from tests.zoo import Net, run


def double_net() -> Net:
    return Net(dtype=np.float64)


def op_types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def verdicts(result: normtool.Rewrite) -> dict[str, str]:
    return {site.norm.name: site.verdict for site in result.sites}


# ---- which norms --------------------------------------------------------------------------------


def two_stages() -> onnx.ModelProto:
    net = double_net()
    x = net.input([1, 3, 6, 6])
    for stage in ("stem", "head"):
        x = net.node("Relu", net.batch_norm(net.conv(x, 3, 3, 3, 3, pads=[1] * 4), 3, name=f"{stage}.bn"))
    net.output(x)
    return net.model()


@pytest.mark.parametrize(
    ("options", "folded"),
    [
        ({}, {"stem.bn", "head.bn"}),
        ({"only": ("stem.*",)}, {"stem.bn"}),
        ({"skip": ("stem.*",)}, {"head.bn"}),
        ({"only": ("*.bn",), "skip": ("head.bn",)}, {"stem.bn"}),
    ],
)
def test_norms_are_chosen_by_name(options: dict[str, Any], folded: set[str]) -> None:
    model = two_stages()
    result = normtool.fold(model, validate=False, **options)
    assert {name for name, verdict in verdicts(result).items() if verdict == "folded"} == folded
    left = [site for site in result.sites if site.verdict == "kept"]
    assert all([reason.code for reason in site.reasons] == ["not_selected"] for site in left)
    assert op_types(result.model).count("BatchNormalization") == 2 - len(folded)
    assert difference(model, result.model) < AGREES


def test_a_norm_that_was_not_chosen_is_not_taken_along() -> None:
    net = double_net()
    y = net.batch_norm(net.conv(net.input([1, 3, 6, 6]), 3, 3, 3, 3), 3, name="first")
    net.output(net.node("Relu", net.batch_norm(y, 3, name="second")))
    model = net.model()
    result = normtool.fold(model, validate=False, only=("second",))
    assert verdicts(result) == {"first": "kept", "second": "kept"}
    assert "not_selected" in {
        r.code for site in result.sites for r in site.reasons if site.norm.name == "second"
    }
    assert op_types(result.model) == op_types(model)


def test_a_pattern_that_matches_nothing_is_a_mistake() -> None:
    with pytest.raises(UsageError, match=r"no norm is called 'stam\.\*'"):
        normtool.fold(two_stages(), only=("stam.*",))


# ---- other ops in their place ---------------------------------------------------------------------


def between_relus(rank: int = 4, positive: bool = False) -> onnx.ModelProto:
    net = double_net()
    x = net.input([2, 3, 5, 4][:rank])
    y = net.node("Relu", net.conv(x, 3, 3, 1, 1) if rank == 4 else net.node("MatMul", x, net.weight(3, 3)))
    rng = np.random.default_rng(0)
    gamma = np.abs(rng.standard_normal(3)) + 0.3 if positive else np.array([0.7, -1.2, 0.0])
    statistics = [gamma, rng.standard_normal(3), rng.standard_normal(3), rng.uniform(0.5, 2, 3)]
    names = [net.constant(array) for array in statistics]
    net.output(net.node("Sigmoid", net.batch_norm(y, 3, name="bn", statistics=names)), [2, 3, 5, 4][:rank])
    return net.model()


@pytest.mark.parametrize(
    ("how", "rank", "positive", "left"),
    [
        ("mul-add", 4, False, ["Conv", "Relu", "Mul", "Add", "Sigmoid"]),
        ("mul-add", 2, False, ["MatMul", "Relu", "Mul", "Add", "Sigmoid"]),
        ("conv", 4, False, ["Conv", "Relu", "Conv", "Sigmoid"]),
        ("conv", 2, False, ["MatMul", "Relu", "Mul", "Add", "Sigmoid"]),
        ("relu", 4, True, ["Conv", "Relu", "Add", "Sigmoid"]),
        ("relu", 4, False, ["Conv", "Relu", "BatchNormalization", "Sigmoid"]),
    ],
)
def test_lowering_in_onnx(how: str, rank: int, positive: bool, left: list[str]) -> None:
    model = between_relus(rank, positive)
    assert verdicts(normtool.fold(model, validate=False)) == {"bn": "kept"}
    result = normtool.fold(model, validate=False, lower=how)
    onnx.checker.check_model(result.model)
    assert op_types(result.model) == left
    assert verdicts(result) == {"bn": "kept" if "BatchNormalization" in left else "lowered"}
    assert all(site.reasons for site in result.sites)  # why it could not be folded
    assert difference(model, result.model) < AGREES


class BetweenRelus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.bn(torch.relu(self.conv(x))))


@pytest.mark.parametrize("how", ["mul-add", "conv"])
def test_lowering_in_a_program(how: str) -> None:
    module, x = checks.double(BetweenRelus()), checks.randn(2, 3, 6, 6)
    program = torch.export.export(module, (x,))
    result = normtool.fold(program, lower=how, validate=False)
    assert [site.verdict for site in result.sites] == ["lowered"]
    assert checks.norm_calls(result.model) == 0
    assert torch.allclose(result.model.module()(x), module(x), rtol=checks.LIMIT, atol=checks.LIMIT)


def test_an_unknown_way_to_lower_is_refused() -> None:
    with pytest.raises(UsageError, match="choose one of"):
        normtool.fold(between_relus(), lower="everything")


# ---- more work for fewer norms ----------------------------------------------------------------------


def read_twice() -> onnx.ModelProto:
    net = double_net()
    y = net.conv(net.input([1, 3, 6, 6]), 3, 4, 3, 3, name="conv")
    net.output(y, [1, 4, 4, 4])
    net.output(net.node("Relu", net.batch_norm(y, 4, name="bn")), [1, 4, 4, 4])
    return net.model()


def test_a_conv_is_copied_only_on_request_and_the_cost_is_said() -> None:
    model = read_twice()
    kept = normtool.fold(model, validate=False)
    assert verdicts(kept) == {"bn": "kept"}
    assert kept.sites[0].to_dict().get("added") is None
    result = normtool.fold(model, validate=False, duplicate=True)
    assert op_types(result.model) == ["Conv", "Conv", "Relu"]
    assert result.sites[0].to_dict()["added"] == {"ops": 1, "bytes": 8 * (4 * 3 * 3 * 3 + 4)}
    assert difference(model, result.model) < AGREES


def test_a_program_may_copy_a_conv_too() -> None:
    class ReadTwice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.conv(x)
            return y, torch.relu(self.bn(y))

    module, x = checks.double(ReadTwice()), checks.randn(2, 3, 6, 6)
    result = normtool.fold(torch.export.export(module, (x,)), duplicate=True, validate=False)
    assert checks.norm_calls(result.model) == 0
    for got, expected in zip(result.model.module()(x), module(x), strict=True):
        assert torch.allclose(got, expected, rtol=checks.LIMIT, atol=checks.LIMIT)


# ---- border maps --------------------------------------------------------------------------------------


def before_padded_conv(size: Any = 6) -> onnx.ModelProto:
    net = double_net()
    x = net.input([2, 3, size, 5])
    y = net.conv(net.batch_norm(x, 3, name="bn"), 3, 4, 3, 3, pads=[1, 0, 1, 1], strides=[2, 1])
    net.output(net.node("Sigmoid", y))
    return net.model()


def test_a_padded_conv_takes_a_shift_as_a_map_of_its_border_on_request() -> None:
    model = before_padded_conv()
    plain = normtool.fold(model, validate=False)
    assert op_types(plain.model) == ["Add", "Conv", "Sigmoid"]  # s goes in, one Add stays
    assert difference(model, plain.model) < AGREES
    result = normtool.fold(model, validate=False, border_maps=True)
    assert op_types(result.model) == ["Conv", "Add", "Sigmoid"]
    shapes = [list(tensor.dims) for tensor in result.model.graph.initializer]
    assert [1, 4, 3, 4] in shapes
    assert difference(model, result.model) < AGREES


def test_a_border_map_needs_a_fixed_size() -> None:
    model = before_padded_conv("height")
    result = normtool.fold(model, validate=False, border_maps=True)
    assert op_types(result.model) == ["Add", "Conv", "Sigmoid"]


# ---- quantised biases -----------------------------------------------------------------------------------


def quantised_conv() -> onnx.ModelProto:
    net, rng = Net(), np.random.default_rng(0)
    x = net.input([2, 3, 6, 5])
    scales = [net.constant(rng.uniform(0.01, 0.02, 4), dtype=np.float32) for _ in range(2)]
    stored = net.constant(rng.integers(-127, 128, (4, 3, 3, 3)), dtype=np.int8)
    weight = net.node("DequantizeLinear", stored, scales[0], axis=0)
    bias = net.node("DequantizeLinear", net.constant([7, -20, 3, 15], dtype=np.int32), scales[1], axis=0)
    net.output(net.batch_norm(net.node("Conv", x, weight, bias), 4, name="bn"), [2, 4, 4, 3])
    return net.model()


def test_a_quantised_bias_is_rounded_only_on_request_and_the_error_is_stated() -> None:
    model = quantised_conv()
    (before,) = run(model)
    exact = normtool.fold(model, validate=False)
    assert op_types(exact.model)[-1] == "Add"
    assert np.abs(run(exact.model)[0] - before).max() < 1e-5
    rounded = normtool.fold(model, validate=False, requantise=True)
    assert "Add" not in op_types(rounded.model)
    assert verdicts(rounded) == {"bn": "folded"}
    stated = rounded.sites[0].to_dict()["proof"]["requantised"]
    assert 1e-3 < stated < 0.02  # half a step of the grid
    assert np.abs(run(rounded.model)[0] - before).max() == pytest.approx(stated, abs=1e-5)


def test_a_module_that_takes_no_border_map_still_gives_its_scale_away() -> None:
    """The two folds touch the same ops; that the one was refused is no reason against the other."""
    module = checks.perturbed(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()).eval())
    example = checks.randn(2, 3, 6, 5).float()
    plain, asked = checks.fold(module, example), checks.fold(module, example, border_maps=True)
    assert verdicts(plain) == verdicts(asked) == {"0": "folded"}
    with torch.no_grad():
        assert torch.allclose(asked.model(example), module(example), rtol=1e-4, atol=1e-5)
