"""`unfold(fold(m))`: names and statistics exactly, the function within its noise floor, in every format.

Every γ, β, bias, mean and variance is perturbed, one γ is 0 (its filter is lost in the fold and has to lie in
the record), and folds go both ways: into a Conv behind, into one ahead, and into a merged branch.
"""

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import normtool
from normtool.cli import cli
from normtool.errors import StalePlan, UnreadableModel, UsageError
from tests.formats.torch import checks
from tests.zoo import Net


def net(merged: bool = False, large: bool = True) -> onnx.ModelProto:
    """Conv → BN → ReLU → BN → 1×1 Conv; the weights are too large to stay in the record's skeleton."""
    width = 40 if large else 4
    built = Net()
    x = built.input([2, width, 6, 6])
    y = built.conv(x, width, width, 3, 3, pads=[1] * 4, name="first")
    y = built.batch_norm(y, width, name="back")
    if merged:
        y = built.node("Add", y, built.batch_norm(x, width, name="identity"))
    y = built.batch_norm(built.node("Relu", y), width, name="ahead")
    built.output(built.node("Sigmoid", built.conv(y, width, width, 1, 1, name="second")), [2, width, 6, 6])
    model = built.model()
    gamma = next(t for t in model.graph.initializer if t.name == model.graph.node[1].input[1])
    spoiled = numpy_helper.to_array(gamma).copy()
    spoiled[1] = 0.0
    gamma.CopyFrom(numpy_helper.from_array(spoiled, gamma.name))
    return model


def arrays(model: onnx.ModelProto) -> dict[str, Any]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def structure(model: onnx.ModelProto) -> list[Any]:
    inputs = [info.SerializeToString() for info in (*model.graph.input, *model.graph.output)]
    return [[node.SerializeToString() for node in model.graph.node], list(arrays(model)), inputs]


@pytest.mark.parametrize("merged", [False, True], ids=["chain", "merged"])
def test_onnx_comes_back_with_its_names_and_statistics(merged: bool) -> None:
    model = net(merged)
    folded = normtool.fold(model, undo=True, validate=False)
    assert [n.op_type for n in folded.model.graph.node] == ["Conv", "Relu", "Conv", "Sigmoid"]
    result = normtool.unfold(folded.model, folded.undo)
    assert result.validation is not None
    assert result.validation.verdict == "equal"
    assert normtool.validate(model, result.model).verdict == "equal"
    assert structure(result.model) == structure(model)
    before, after = arrays(model), arrays(result.model)
    weights = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    parameters = before.keys() - weights
    for name in before:
        if name in parameters:
            assert np.array_equal(before[name], after[name]), name
        else:
            assert np.allclose(before[name], after[name], rtol=2.0**-21, atol=0), name


def test_a_record_is_small_where_weights_can_be_divided() -> None:
    model = Net()
    x = model.input([1, 256, 4, 4])
    y = model.batch_norm(model.conv(x, 256, 256, 3, 3), 256)
    model.output(model.node("Relu", y))
    folded = normtool.fold(model.model(), undo=True, validate=False)
    assert {entry["how"] for entry in folded.undo["tensors"]} == {"divided"}
    assert len(json.dumps(folded.undo)) < 0.02 * 4 * 256 * 256 * 9


def test_weights_that_were_trained_on_are_refused() -> None:
    folded = normtool.fold(net(), undo=True, validate=False)
    changed = copy.deepcopy(folded.model)
    needed = {entry["from"] for entry in folded.undo["tensors"]}
    weight = next(tensor for tensor in changed.graph.initializer if tensor.name in needed)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.5), weight.name))
    with pytest.raises(StalePlan, match="not what the fold has left"):
        normtool.unfold(changed, folded.undo, validate=False)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: "no record",
        lambda record: {**record, "schema": "normtool.rewrite/1"},
        lambda record: {**record, "format": "pt2"},
        lambda record: {**record, "skeleton": "AAAA"},
        lambda record: {**record, "skeleton": record["skeleton"][:-8]},
        lambda record: {**record, "tensors": []},
        lambda record: {key: value for key, value in record.items() if key != "tensors"},
    ],
    ids=["no-record", "schema", "format", "garbage", "truncated", "no-tensors", "tensors-missing"],
)
def test_a_damaged_record_is_refused(spoil: Any) -> None:
    folded = normtool.fold(net(), undo=True, validate=False)
    with pytest.raises(UnreadableModel):
        normtool.unfold(folded.model, spoil(folded.undo), validate=False)


def test_the_command_line_puts_norms_back(tmp_path: Path) -> None:
    onnx.save(net(), tmp_path / "m.onnx")

    def run(*arguments: str) -> int:
        code = cli.main([*arguments], standalone_mode=False, obj=io.StringIO())
        assert isinstance(code, int)
        return code

    paths = {name: str(tmp_path / name) for name in ("m.onnx", "folded.onnx", "back.onnx", "r.json")}
    with pytest.raises(UsageError, match="--report"):
        run("fold", paths["m.onnx"], "-o", paths["folded.onnx"], "--undo")
    report = ("--undo", "--report", paths["r.json"])
    assert run("fold", paths["m.onnx"], "-o", paths["folded.onnx"], *report) == 0
    assert run("unfold", paths["folded.onnx"], "--record", paths["r.json"], "-o", paths["back.onnx"]) == 0
    assert structure(onnx.load(paths["back.onnx"])) == structure(onnx.load(paths["m.onnx"]))
    with pytest.raises(StalePlan):
        run("unfold", paths["m.onnx"], "--record", paths["r.json"], "-o", str(tmp_path / "no.onnx"))
    assert not (tmp_path / "no.onnx").exists()


# ---- PyTorch ------------------------------------------------------------------------------------


class Both(nn.Module):
    """One norm goes back into a layer without a bias, one ahead into a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 24, 5, bias=False), nn.BatchNorm2d(24, eps=1e-3, momentum=0.2)
        self.last, self.head = nn.BatchNorm1d(24), nn.Linear(24, 60)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(torch.relu(self.bn(self.conv(x))).mean((2, 3))))


def both() -> nn.Module:
    module = checks.perturbed(Both())
    with torch.no_grad():
        module.bn.weight[2] = 0.0
    module.last.weight.requires_grad_(False)
    return module


def assert_restored(original: dict[str, torch.Tensor], restored: dict[str, torch.Tensor]) -> None:
    assert list(original) == list(restored)
    for name, tensor in original.items():
        exact = not name.endswith(("conv.weight", "head.weight"))
        assert (
            torch.equal(tensor, restored[name]) if exact else torch.allclose(tensor, restored[name], rtol=1e-6)
        )


X = torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def test_a_module_comes_back_in_its_own_class() -> None:
    module = both()
    folded = normtool.fold(module, (X,), undo=True)
    assert folded.folded == 2
    result = normtool.unfold(folded.model, json.loads(json.dumps(folded.undo)), (X,))
    assert result.validation is not None
    assert result.validation.verdict == "equal"
    back = result.model
    assert type(back) is Both
    assert (type(back.bn), back.bn.eps, back.bn.momentum) == (nn.BatchNorm2d, 1e-3, 0.2)
    assert back.conv.bias is None
    assert_restored(module.state_dict(), back.state_dict())
    assert normtool.validate(module, back, (X,)).verdict == "equal"
    back.train()(X).sum().backward()  # trainable again
    assert back.bn.weight.grad is not None
    assert type(folded.model.bn) is nn.Identity


def test_a_program_comes_back() -> None:
    program = torch.export.export(both(), (X,))
    folded = normtool.fold(program, undo=True, validate=False)
    result = normtool.unfold(folded.model, json.loads(json.dumps(folded.undo)))
    assert result.validation is not None
    assert result.validation.verdict == "equal"
    assert_restored(program.state_dict, result.model.state_dict)
    assert str(result.model.graph_signature) == str(program.graph_signature)
    assert normtool.validate(program, result.model).verdict == "equal"


def test_a_norm_of_the_users_own_class_is_not_built_from_a_report() -> None:
    class MyNorm(nn.BatchNorm2d):
        pass

    module = checks.perturbed(nn.Sequential(nn.Conv2d(3, 4, 1), MyNorm(4)))
    with pytest.raises(UsageError, match="MyNorm"):
        normtool.fold(module, (X,), undo=True, validate=False)


def test_a_record_names_no_class_but_torchs() -> None:
    folded = normtool.fold(both(), (X,), undo=True, validate=False)
    from normtool.undo import from_text, to_text

    norms = json.loads(from_text(folded.undo["skeleton"]))
    norms[0]["class"] = "os.system"
    with pytest.raises(UnreadableModel):
        normtool.unfold(folded.model, {**folded.undo, "skeleton": to_text(json.dumps(norms).encode())}, (X,))
