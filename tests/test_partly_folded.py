"""A BatchNorm behind a Concat of which one input cannot take its share: a smaller norm stays there.

Compared in float64 by onnx's reference evaluator, in float32 by ONNX Runtime within its noise floor, and in
programs by PyTorch in float64.
"""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import normtool
from normtool.explain import explain
from tests.formats.torch import checks
from tests.rules.test_every_rule import AGREES, difference
from tests.zoo import Net


def inception(blocked: int = 1, dtype: Any = np.float64, rest: int = 2, **changes: Any) -> onnx.ModelProto:
    """Concat of `rest` convolutions and, in their middle, of `blocked` that a ReLU follows; then the norm."""
    net = Net(dtype=dtype)
    x = net.input([2, 3, 6, 6])
    parts = [net.conv(x, 3, 2 + i, 1, 1, name=f"conv{i}") for i in range(rest)]
    for i in range(blocked):
        parts.insert(1, net.node("Relu", net.conv(x, 3, 4 + i, 3, 3, pads=[1] * 4), name=f"relu{i}"))
    if changes.get("read_beside"):
        net.output(net.node("Sigmoid", parts[1]), [2, 4, 6, 6])
    if changes.get("put_out"):
        net.output(parts[0], [2, 2, 6, 6])
    if changes.get("from_input"):
        parts.insert(1, x)
    channels = (
        sum(2 + i for i in range(rest))
        + sum(4 + i for i in range(blocked))
        + 3 * bool(changes.get("from_input"))
    )
    y = net.batch_norm(net.node("Concat", *parts, axis=1), channels, name="bn", epsilon=1e-3)
    net.output(net.node("Relu", y), [2, channels, 6, 6])
    return net.model()


def norms(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "BatchNormalization"]


def site(result: Any) -> Any:
    return next(each for each in result.sites if each.norm.name == "bn")


def codes(result: Any) -> list[str]:
    return [reason.code for reason in site(result).reasons]


@pytest.mark.parametrize("rest", [1, 2, 4])
def test_one_input_keeps_its_channels_of_the_norm(rest: int) -> None:
    model = inception(rest=rest)
    result = normtool.fold(model, validate=False)
    (left,) = norms(result.model)
    sizes = {t.name: t.dims for t in result.model.graph.initializer}
    assert [list(sizes[name]) for name in left.input[1:]] == [[4]] * 4
    assert difference(model, result.model) < AGREES
    found = site(result)
    assert (found.verdict, codes(result)) == ("kept", ["partly_folded", "nonlinear"])
    assert sorted(found.fold.into) == [f"conv{i}" for i in range(rest)]
    assert found.fold.proof.failures == ()
    assert result.folded == 0
    reader = next(n for n in result.model.graph.node if left.output[0] in n.input)
    assert reader.op_type == "Concat"


def test_parameters_are_counted_in_what_is_left() -> None:
    """9 channels before, 4 after; every convolution has its bias already."""
    result = normtool.fold(inception(rest=2), validate=False)
    before, after = result.to_dict()["before"], result.to_dict()["after"]
    gone = 9 - 4
    assert before["buffers"] - after["buffers"] == 2 * gone
    assert before["learnable"] - after["learnable"] == 2 * gone


def test_a_tampered_norm_disagrees() -> None:
    """What is compared would show a wrong slice: the statistics of other channels are another function."""
    model = inception()
    folded = normtool.fold(model, validate=False).model
    (left,) = norms(folded)
    mean = next(t for t in folded.graph.initializer if t.name == left.input[3])
    mean.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(mean), 1), mean.name))
    assert difference(model, folded) > 1e-3


def test_end_to_end_in_onnx_runtime() -> None:
    model = inception(dtype=np.float32)
    result = normtool.fold(model, undo=True)
    assert result.validation is not None
    assert result.validation.verdict == "equal"
    back = normtool.unfold(result.model, result.undo)
    assert back.validation is not None
    assert back.validation.verdict == "equal"
    assert [n.SerializeToString() for n in back.model.graph.node] == [
        n.SerializeToString() for n in model.graph.node
    ]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"blocked": 2}, "nonlinear"),
        ({"read_beside": True}, "multiple_readers"),
        ({"put_out": True}, "graph_output"),
        ({"from_input": True}, "no_producer"),
        ({"blocked": 0, "from_input": True}, "no_producer"),
    ],
    ids=[
        "two inputs cannot: there would be one norm more",
        "the input that cannot is read beside the Concat",
        "another input is an output of the model",
        "a second input is one of the model's",
        "nothing is there to put the smaller norm behind",
    ],
)
def test_the_norm_stays_whole(changes: dict[str, Any], code: str) -> None:
    model = inception(**changes)
    result = normtool.fold(model, validate=False)
    assert code in codes(result)
    assert "partly_folded" not in codes(result)
    assert [n.SerializeToString() for n in result.model.graph.node] == [
        n.SerializeToString() for n in model.graph.node
    ]


@pytest.mark.parametrize("options", [{"skip": ("bn",)}, {"only": ("other",)}], ids=str)
def test_a_norm_that_was_not_chosen_stays_whole(options: dict[str, Any]) -> None:
    net = Net(dtype=np.float64)
    x = net.input([1, 3, 4, 4])
    parts = [net.conv(x, 3, 2, 1, 1), net.node("Relu", net.conv(x, 3, 2, 1, 1))]
    y = net.batch_norm(net.node("Concat", *parts, axis=1), 4, name="bn")
    net.output(net.batch_norm(net.conv(net.node("Relu", y), 4, 4, 1, 1), 4, name="other"), [1, 4, 4, 4])
    result = normtool.fold(net.model(), validate=False, **options)
    assert codes(result) == ["not_selected"]
    assert len(norms(result.model)) == 1


def test_two_norms_in_a_row_leave_one_small_norm() -> None:
    net = Net(dtype=np.float64)
    x = net.input([1, 3, 4, 4])
    parts = [net.conv(x, 3, 2, 1, 1), net.node("Relu", net.conv(x, 3, 2, 1, 1))]
    y = net.batch_norm(net.node("Concat", *parts, axis=1), 4, name="first")
    net.output(net.node("Relu", net.batch_norm(y, 4, name="bn")), [1, 4, 4, 4])
    model = net.model()
    result = normtool.fold(model, validate=False)
    assert len(norms(result.model)) == 1
    assert difference(model, result.model) < AGREES
    assert sorted(each.verdict for each in result.sites) == ["folded", "kept"]


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.bent = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.norm(torch.cat([self.plain(x), self.bent(x).relu()], 1)))


def test_in_an_exported_program() -> None:
    module = checks.perturbed(Inception().double().eval())
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    program = torch.export.export(module, (x,))
    result = normtool.fold(program, validate=False)
    (found,) = result.sites
    assert (found.verdict, found.reasons[0].code) == ("kept", "partly_folded")
    assert torch.allclose(result.model.module()(x), module(x), rtol=0, atol=1e-12)
    counted = result.to_dict()
    assert counted["before"]["buffers"] - counted["after"]["buffers"] == 2 * 4 + 1  # num_batches_tracked
    assert counted["before"]["learnable"] - counted["after"]["learnable"] == 2 * 4


def test_a_module_keeps_the_whole_norm() -> None:
    module = checks.perturbed(Inception().eval())
    result = checks.fold(module, torch.randn(2, 3, 6, 6))
    (found,) = result.sites
    assert found.verdict == "kept"
    assert {"nonlinear", "no_module"} <= {reason.code for reason in found.reasons}
    assert result.model.norm.num_features == 9


def test_the_reason_is_explained() -> None:
    assert "smaller norm stays" in " ".join(explain("partly_folded").split())
