"""The key map against the fold itself: what changes in the original changes the result where the map says.

And the other way round: every key that the result lacks is in the map, and every key that it names exists.
"""

import copy

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import normtool
from tests.blocks import BLOCKS, BN, Block, conv
from tests.formats.torch import checks
from tests.test_blocks import Case
from tests.zoo import Net, conv_bn

#: Blocks that fold in every way there is: back, forward, leaving an Add, into one of several branches.
NAMES = """repvgg fastvit-repmixer repghost mobileone-pointwise rep-average-pool norm-padded-conv levit-head
frozen-then-norm norm-then-frozen norm-norm-before-conv concat-norm-relu nextvit-ntb particlenet""".split()

CHOSEN = [block for block in BLOCKS if block.name in NAMES]

RELU_NORM = nn.Sequential(nn.ReLU(), BN(8), nn.GELU())


class TwoReaders(nn.Module):
    """A convolution that a norm reads and a sigmoid too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(8, 8), BN(8)

    def forward(self, x):
        y = self.conv(x)
        return torch.relu(self.norm(y)) + torch.sigmoid(y)


#: What has to be asked for: other ops in the place of a norm, a copied convolution, a shift for each position.
ASKED = {
    "mul-add": (RELU_NORM, {"lower": "mul-add"}, 1),
    "conv": (RELU_NORM, {"lower": "conv"}, 1),
    "duplicate": (TwoReaders(), {"duplicate": True}, 1),
    "border-maps": (nn.Sequential(BN(8), conv(8, 12, 3)), {"border_maps": True}, 1),
}


def check(keys, changed, found, after):
    """`changed(key)`: the names of the tensors in the result that are others when the original's `key` is."""
    assert set(found) == set(keys) - set(after)
    assert {key for now in found.values() for key in now} <= set(after)
    for key, now in found.items():
        if "num_batches_tracked" in key:
            assert now == []
        else:
            seen = changed(key)
            assert seen, key
            assert seen <= set(now), key


def differing(one, other):
    assert one.keys() == other.keys()
    return {key for key in one if not torch.equal(one[key], other[key])}


def check_program(program, **options):
    result = checks.fold(program, **options)
    after = copy.deepcopy(result.model.state_dict)

    def changed(key):
        tensor = program.state_dict[key]
        before = tensor.detach().clone()
        with torch.no_grad():
            tensor.mul_(1.25)
            found = differing(after, checks.fold(program, **options).model.state_dict)
            tensor.copy_(before)
        return found

    check(program.state_dict, changed, result.key_map, after)
    # all of these norms go, and what they have counted with them
    assert not [key for key in after if key.endswith("num_batches_tracked")]


@pytest.mark.parametrize("block", CHOSEN, ids=str)
def test_program(block: Block):
    check_program(Case(block).program)


@pytest.mark.parametrize("name", ASKED)
def test_program_with_what_has_to_be_asked_for(name):
    module, options, norms = ASKED[name]
    program = checks.export(checks.double(copy.deepcopy(module)), checks.randn(2, 8, 6, 6))
    assert checks.fold(program, **options).folded == norms
    check_program(program, **options)


@pytest.mark.parametrize("block", [each for each in CHOSEN if each.left_in_module == 0], ids=str)
def test_module(block: Block):
    of = Case(block)
    result = checks.fold(of.module, of.inputs)

    def changed(key):
        other = copy.deepcopy(of.module)
        with torch.no_grad():
            other.state_dict()[key].mul_(1.25)
        return differing(result.model.state_dict(), checks.fold(other, of.inputs).model.state_dict())

    # each key costs two exports: a few of each kind
    keys = of.module.state_dict()
    some = {key: now for key, now in result.key_map.items() if "running_mean" not in key and "bias" not in key}
    assert set(result.key_map) == set(keys) - set(result.model.state_dict())
    check(some, changed, some, result.model.state_dict())


# ---- ONNX -----------------------------------------------------------------------------------------


def initializers(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    return {t.name: torch.tensor(numpy_helper.to_array(t)) for t in model.graph.initializer}


def relu_norm() -> onnx.ModelProto:
    net = Net()
    x = net.node("Relu", net.input([2, 6, 5, 5]))
    net.output(net.node("Relu", net.batch_norm(x, 6), outputs=["y"]), [2, 6, 5, 5])
    return net.model()


def one_weight_for_two() -> onnx.ModelProto:
    """The second convolution keeps the weight that both read."""
    net = Net()
    x, w = net.input([2, 3, 5, 5]), net.weight(6, 3, 1, 1, name="w")
    y = net.node("Relu", net.batch_norm(net.node("Conv", x, w), 6))
    net.output(net.node("Add", y, net.node("Sigmoid", net.node("Conv", x, w)), outputs=["y"]), [2, 6, 5, 5])
    return net.model()


def branches() -> onnx.ModelProto:
    net = Net()
    x = net.input([2, 6, 5, 5])
    dense = net.batch_norm(net.conv(x, 6, 6, 3, 3, pads=[1] * 4, bias=False), 6)
    net.output(net.node("Relu", net.node("Add", dense, net.batch_norm(x, 6)), outputs=["y"]), [2, 6, 5, 5])
    return net.model()


def before_a_padded_conv() -> onnx.ModelProto:
    net = Net()
    x = net.batch_norm(net.input([2, 6, 5, 5]), 6)
    net.output(net.node("Relu", net.conv(x, 6, 4, 3, 3, pads=[1] * 4), outputs=["y"]), [2, 4, 5, 5])
    return net.model()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(conv_bn, {}, id="behind-a-conv"),
        pytest.param(one_weight_for_two, {}, id="one-weight-for-two"),
        pytest.param(branches, {}, id="branches"),
        pytest.param(before_a_padded_conv, {}, id="before-a-padded-conv"),
        pytest.param(before_a_padded_conv, {"border_maps": True}, id="border-maps"),
        pytest.param(relu_norm, {"lower": "mul-add"}, id="mul-add"),
        pytest.param(relu_norm, {"lower": "conv"}, id="conv"),
    ],
)
def test_onnx(make, options):
    model = make()
    result = normtool.fold(model, validate=False, **options)
    assert result.folded > 0

    def changed(key):
        other = make()
        (tensor,) = (t for t in other.graph.initializer if t.name == key)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * tensor_type(1.25), key))
        return differing(after, initializers(normtool.fold(other, validate=False, **options).model))

    after = initializers(result.model)
    tensor_type = numpy_helper.to_array(model.graph.initializer[0]).dtype.type
    check(initializers(model), changed, result.key_map, after)
    assert result.to_dict()["key_map"] == result.key_map


def test_nothing_folded_is_nothing_to_say():
    model = relu_norm()
    assert normtool.fold(model, validate=False).key_map == {}
