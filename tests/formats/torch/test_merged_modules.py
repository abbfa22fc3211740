"""Modules whose branches become one convolution: what stands in their place, what stays, what is refused."""

import copy
import io
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import normtool
from tests.blocks import BN, FastVitMixer, MobileOne, RepGhost, RepVGG, RepVggDw, SqueezeExcite, conv, conv_bn
from tests.formats.torch import checks
from tests.formats.torch.checks import assert_folds, assert_keeps, assert_same, codes, double, perturbed, randn

IMAGE = (2, 8, 6, 6)
X = randn(*IMAGE)


class Through(nn.Module):
    """A module whose forward is a function of itself and x; children, parameters and settings by name."""

    def __init__(self, function, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def branches(self, x):
    """A convolution and a norm side by side."""
    return self.a(x) + self.b(x)


def two_branches(**members):
    return Through(branches, a=conv_bn(8, 8, 3), b=BN(8), **members)


def net(block):
    """A class of the user's with the block in it."""
    return double(Through(lambda self, x: torch.tanh(self.block(x)), block=block))


def steps(module):
    return [type(part).__name__ for part in module]


# ---- what stands in the place of a block ------------------------------------------------------------

WITH_SE = MobileOne(8, 8, 3, groups=8, branches=2)
WITH_SE.act = nn.Sequential(SqueezeExcite(8), nn.ReLU())

BLOCKS = {
    "repvgg": (RepVGG(), ["conv", "relu"]),
    "repvgg-groups": (RepVGG(groups=2), ["conv", "relu"]),
    "repvgg-stride": (RepVGG(stride=2), ["conv", "relu"]),
    "repvgg-wider": (RepVGG(8, 12), ["conv", "relu"]),
    "mobileone": (MobileOne(8, 8, 3, groups=8, branches=3), ["conv", "act"]),
    "mobileone-pointwise": (MobileOne(8, 8, 1, branches=2), ["conv", "act"]),
    "mobileone-with-se-behind": (WITH_SE, ["conv", "act"]),
    "repmixer-with-layer-scale": (FastVitMixer(), ["conv"]),
    "repmixer": (FastVitMixer(layer_scale=False), ["conv"]),
    "repvit": (RepVggDw(8), ["conv"]),
    # what it does in front of its branches goes on too
    "repghost": (RepGhost(8, 12), ["primary_conv", "conv", "after"]),
    "sum-then-sum": (
        Through(
            lambda self, x: F.gelu(self.c(y := F.relu(self.a(x) + self.b(x))) + self.d(y)),
            a=conv_bn(8, 8, 3),
            b=BN(8),
            c=conv_bn(8, 8, 1),
            d=BN(8),
        ),
        ["conv", "relu", "conv_1", "gelu"],
    ),
    "own-calls-in-front": (
        Through(
            lambda self, x: branches(self, torch.sigmoid(x) * x), a=conv_bn(8, 8, 3, groups=4), b=BN(8)
        ),
        ["mul", "conv"],
    ),
    "average-pool": (
        Through(branches, a=nn.Sequential(nn.AvgPool2d(3, 1, 1), BN(8)), b=conv_bn(8, 8, 5)),
        ["conv"],
    ),
    "functional-convolutions": (
        Through(
            lambda self, x: F.relu(F.conv2d(x, self.w, padding=1) + F.conv2d(x, self.v) + self.bn(x)),
            w=nn.Parameter(torch.ones(8, 8, 3, 3)),
            v=nn.Parameter(torch.ones(8, 8, 1, 1)),
            bn=BN(8),
        ),
        ["conv", "relu"],
    ),
    "a-branch-that-is-called-conv": (
        Through(lambda self, x: F.relu(self.conv(x) + self.bn(x)), conv=conv_bn(8, 8, 3), bn=BN(8)),
        ["conv", "relu"],
    ),
    "a-step-that-is-called-conv": (
        Through(
            lambda self, x: self.conv(torch.relu(self.a(x) + self.b(x))), a=conv_bn(8, 8, 3), b=BN(8),
            conv=conv(8, 4),
        ),
        ["conv_1", "relu", "conv"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_block_becomes_a_sequential_of_what_it_does(name):
    block, parts = BLOCKS[name]
    module = net(copy.deepcopy(block))
    folded = assert_folds(module, X)
    assert type(folded.block) is nn.Sequential
    assert list(folded.block._modules) == parts
    assert checks.batch_norms(folded) == []


@pytest.mark.parametrize("rank", [1, 3])
def test_one_and_three_dimensions(rank):
    norm, layer = {1: (nn.BatchNorm1d, nn.Conv1d), 3: (nn.BatchNorm3d, nn.Conv3d)}[rank]
    dense = nn.Sequential(layer(4, 4, 3, padding=1), norm(4))
    folded = assert_folds(net(Through(branches, a=dense, b=norm(4))), randn(2, 4, *[5] * rank))
    assert steps(folded.block) == [f"Conv{rank}d"]


def test_the_convolution_goes_over_its_input_as_the_branches_did():
    sides = {"stride": (2, 1), "dilation": (1, 2), "bias": False}
    block = Through(
        branches,
        a=nn.Sequential(nn.Conv2d(8, 4, (3, 5), padding=(1, 4), **sides), BN(4)),
        b=nn.Sequential(nn.Conv2d(8, 4, 1, **sides), BN(4)),
    )
    found = assert_folds(net(block), X).block.conv
    assert (found.in_channels, found.out_channels, found.kernel_size, found.groups) == (8, 4, (3, 5), 1)
    assert (found.stride, found.padding, found.dilation) == ((2, 1), (1, 4), (1, 2))
    assert found.padding_mode == "zeros"


def test_blocks_in_blocks():
    """The child that goes on in front of the sum is a block itself, and one behind it is a norm."""
    inner = RepVGG()
    outer = Through(
        lambda self, x: self.bn(F.relu(branches(self, self.inner(x)))),
        a=conv_bn(8, 8, 3), b=BN(8), inner=inner, bn=BN(8),
    )  # fmt: skip
    folded = assert_folds(double(nn.Sequential(outer, conv(8, 4))), X)
    assert list(folded[0]._modules) == ["inner", "conv", "relu", "bn"]
    assert steps(folded[0]) == ["Sequential", "Conv2d", "GraphModule", "Identity"]
    assert list(folded[0].inner._modules) == ["conv", "relu"]


# ---- what stays -----------------------------------------------------------------------------------


def test_classes_outside_and_everything_else_stay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.stage = conv_bn(8, 8, 3), nn.Sequential(RepVGG(), nn.Dropout(0.1), RepVGG())
            self.names = ["cat", "dog"]

        def forward(self, x):
            return self.stage(F.relu(self.stem(x)))

    module = double(Net())
    folded = assert_folds(module, X)
    assert type(folded) is Net
    assert folded.names == ["cat", "dog"]
    assert steps(folded.stage) == ["Sequential", "Dropout", "Sequential"]
    kept = {name for name in module.state_dict() if name.startswith("stem.0.")}
    new = {f"stage.{i}.conv.{name}" for i in (0, 2) for name in ("weight", "bias")}
    assert set(folded.state_dict()) == {*kept, *new, "stem.conv.weight", "stem.conv.bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_stays(dtype):
    module = perturbed(nn.Sequential(RepVGG()).to(dtype))
    folded = checks.fold(module, (X.to(dtype),)).model
    assert {tensor.dtype for tensor in folded.state_dict().values()} == {dtype}
    assert steps(folded[0]) == ["Conv2d", "GraphModule"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_device_stays():
    module = perturbed(nn.Sequential(RepVGG()).cuda())
    result = normtool.fold(module, (X.float().cuda(),), device="cuda")
    assert {tensor.device.type for tensor in result.model.state_dict().values()} == {"cuda"}
    assert (result.folded, result.validation.verdict) == (3, "equal")


@pytest.mark.parametrize("weight", [True, False], ids=["weight-learns", "weight-frozen"])
@pytest.mark.parametrize("bias", [True, False, None], ids=["bias-learns", "bias-frozen", "no-bias"])
def test_requires_grad_is_that_of_the_largest_branch(weight, bias):
    block = Through(branches, a=nn.Conv2d(8, 8, 3, padding=1, bias=bias is not None), b=BN(8))
    block.a.weight.requires_grad_(weight)
    if bias is not None:
        block.a.bias.requires_grad_(bias)
    found = assert_folds(net(block), X).block.conv
    assert found.weight.requires_grad is weight
    assert found.bias.requires_grad is (weight if bias is None else bias)
    assert found.weight.is_leaf


def test_memory_format_stays():
    module = net(RepVGG()).to(memory_format=torch.channels_last)
    folded = assert_folds(module, X.contiguous(memory_format=torch.channels_last))
    assert folded.block.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_modes_stay():
    module = net(RepVGG())
    module.block.training = module.block.rbr_dense.conv.training = True
    found = assert_folds(module, X).block
    assert [part.training for part in (found, found.conv, found.relu)] == [True, True, True]
    module.block.rbr_dense.conv.training = False
    found = assert_folds(module, X).block
    assert [part.training for part in (found, found.conv, found.relu)] == [True, False, True]


def test_settings_of_a_block_can_still_be_read():
    """As networks do that say by numbers which layer reads which."""
    block = two_branches(stride=1, f=-1, name="rep", widths=(8, 8), norm=nn.BatchNorm2d)
    module = Through(
        lambda self, x: self.block(x) * self.block.stride if self.block.f == -1 else x, block=block
    )
    found = assert_folds(double(module), X).block
    assert (found.stride, found.f, found.name, found.widths) == (1, -1, "rep", (8, 8))
    assert not hasattr(found, "norm")


def test_the_result_needs_torch_alone_and_survives_a_copy():
    folded = assert_folds(net(RepVGG()), X).block
    buffer = io.BytesIO()
    torch.save(folded, buffer)
    buffer.seek(0)
    for other in (torch.load(buffer, weights_only=False), copy.deepcopy(folded)):
        assert_same(folded, other, (X,))


def test_inplace_replaces_the_block_in_the_module_that_was_given():
    """Its convolution is computed from weights that the same fold changes elsewhere."""
    module = net(nn.Sequential(RepVGG(), conv_bn(8, 8)))
    reference, first = copy.deepcopy(module), module.block[1].conv.weight
    result = normtool.fold(module, (X,), validate=False, inplace=True)
    assert result.model is module
    assert steps(module.block[0]) == ["Conv2d", "GraphModule"]
    assert module.block[1].conv.weight is first
    assert_same(reference, module, (X,))
    assert result.key_map["block.0.rbr_dense.conv.weight"] == ["block.0.conv.weight"]
    module(X).sum().backward()
    assert module.block[0].conv.weight.grad is not None


def test_a_perturbed_network_is_found_equal():
    module = nn.Sequential(
        conv_bn(3, 8, 3, 2), nn.ReLU(), RepVGG(), MobileOne(8, 8, 3, groups=8), RepGhost(8, 8)
    )
    result = normtool.fold(perturbed(module), (torch.randn(2, 3, 12, 12),))
    assert result.folded == 10
    assert result.validation.verdict == "equal"


# ---- keys -----------------------------------------------------------------------------------------


def test_the_key_map_says_where_every_number_has_gone():
    result = checks.fold(net(two_branches()), (X,))
    both = ["block.conv.weight", "block.conv.bias"]
    norms = {
        f"block.{norm}.{name}": both
        for norm in ("a.bn", "b")
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    counts = {f"block.{norm}.num_batches_tracked": [] for norm in ("a.bn", "b")}
    assert result.key_map == {"block.a.conv.weight": ["block.conv.weight"], **norms, **counts}
    assert result.to_dict()["key_map"] == result.key_map


def test_a_grandchild_that_is_called_directly_gets_another_name():
    block = Through(
        lambda self, x: self.parts.last(F.relu(branches(self, x))),
        a=conv_bn(8, 8, 3),
        b=BN(8),
        parts=nn.ModuleDict(OrderedDict(last=nn.Sequential(conv(8, 8), BN(8), nn.GELU(), BN(8)))),
    )
    module = net(block)
    result = checks.fold(module, (X,))
    assert list(result.model.block._modules) == ["conv", "relu", "parts_last"]
    assert result.key_map["block.parts.last.0.weight"] == ["block.parts_last.0.weight"]
    assert result.key_map["block.parts.last.1.running_var"] == [
        "block.parts_last.0.weight",
        "block.parts_last.0.bias",
    ]
    # the last norm is kept: even what nothing reads is where it was
    assert result.key_map["block.parts.last.3.num_batches_tracked"] == [
        "block.parts_last.3.num_batches_tracked"
    ]
    assert set(result.key_map) == set(module.state_dict()) - set(result.model.state_dict())
    assert {key for keys in result.key_map.values() for key in keys} <= set(result.model.state_dict())


def test_a_key_for_every_name_of_a_shared_block():
    block = RepVGG()
    module = double(Through(lambda self, x: self.second(self.first(x)), first=block, second=block))
    result = checks.fold(module, (X,))
    both = ["first.conv.weight", "second.conv.weight"]
    assert result.key_map["first.rbr_dense.conv.weight"] == both
    assert result.key_map["second.rbr_dense.conv.weight"] == both


# ---- hooks ----------------------------------------------------------------------------------------


def test_hooks_of_the_block_see_what_they_saw():
    module = net(RepVGG())
    seen = []
    module.block.register_forward_pre_hook(lambda part, args: seen.append(args[0]))
    handle = module.block.register_forward_hook(
        lambda part, args, kwargs, output: seen.append(output), with_kwargs=True
    )
    result = normtool.fold(module, (X,), validate=False)
    folded = result.model
    assert result.folded == 3
    assert seen == []
    expected = module(X)
    found = folded(X)
    before, after, again, result = seen
    assert torch.equal(before, again)
    assert_same(lambda x: after, lambda x: result, (X,))
    assert_same(lambda x: expected, lambda x: found, (X,))
    handle.remove()
    module(X)
    assert len(seen) == 5


def test_a_pre_hook_that_changes_what_goes_in_goes_on_doing_so():
    module = net(RepVGG())
    module.block.register_forward_pre_hook(lambda part, args: (args[0] * 2,))
    folded = checks.fold(module, (X,)).model
    assert_same(module, folded, (X,))
    assert steps(folded.block) == ["Conv2d", "GraphModule"]


@pytest.mark.parametrize("path", ["block.rbr_identity", "block.rbr_1x1", "block.rbr_dense.conv"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_on_a_branch_keeps_the_block(path, kind):
    module = net(RepVGG())
    getattr(module.get_submodule(path), kind)(lambda *arguments: None)
    result = checks.fold(module, (X,))
    assert type(result.model.block) is RepVGG
    assert "hook" in codes(result)
    assert_same(module, result.model, (X,))


def test_a_hook_on_gradients_keeps_the_block():
    module = net(RepVGG())
    module.block.register_full_backward_hook(lambda *arguments: None)
    result = checks.fold(module, (X,))
    assert type(result.model.block) is RepVGG
    assert "hook" in codes(result)


# ---- blocks that are called more than once --------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(lambda b: Through(lambda self, x: self.block(self.block(x)), block=b), id="called-twice"),
        pytest.param(lambda b: nn.Sequential(b, nn.GELU(), b), id="registered-twice"),
        pytest.param(
            lambda b: Through(lambda self, x: self.a(x) + self.a[0](-x), a=nn.Sequential(b), b=b),
            id="called-by-its-parent-and-by-itself",
        ),
    ],
)
@pytest.mark.parametrize("block", [RepVGG, lambda: RepGhost(8, 8)], ids=["repvgg", "repghost"])
def test_a_block_whose_calls_come_out_alike(module, block):
    folded = assert_folds(double(module(block())), X)
    blocks = [part for part in folded.modules() if isinstance(getattr(part, "conv", None), nn.Conv2d)]
    assert len(blocks) == 1


def test_a_block_that_would_take_in_more_in_one_call_than_in_another():
    """The norm in between goes forward into the convolution of the second call, which is the first one too."""
    module = double(
        Through(lambda self, x: self.block(self.bn(F.relu(self.block(x)))), block=MobileOne(8, 8, 1), bn=BN(8))
    )
    result = checks.fold(module, (X,))
    assert "shared_parameter" in codes(result)
    assert_same(module, result.model, (X,))
    assert checks.fold(result.model, (X,)).folded == 0


def test_a_block_that_vanishes_in_another_one_at_its_second_call():
    block = RepGhost(8, 8, relu=False)
    outer = Through(lambda self, x: F.relu(self.block(x)), block=block)
    assert_folds(double(nn.Sequential(block, nn.ReLU(), outer)), X)


def test_a_branch_that_two_blocks_share():
    """Each block has a convolution of its own afterwards."""
    shared = conv_bn(8, 8, 3)
    blocks = [Through(branches, a=shared, b=BN(8)) for _ in range(2)]
    folded = assert_folds(double(nn.Sequential(blocks[0], nn.ReLU(), blocks[1])), X)
    assert folded[0].conv is not folded[2].conv


def test_a_weight_that_somebody_else_uses_stays_what_it_is():
    module = net(RepVGG())
    module.other = conv(8, 8, 3).double()
    module.other.weight = module.block.rbr_dense.conv.weight
    module.function = lambda self, x: self.other(F.relu(self.block(x)))
    folded = checks.fold(module, (X,)).model
    assert steps(folded.block) == ["Conv2d", "GraphModule"]
    assert torch.equal(folded.other.weight, module.other.weight)
    assert_same(module, folded, (X,))


# ---- what is refused ------------------------------------------------------------------------------


def refused(module, *inputs, reason="no_module"):
    result = checks.fold(module, inputs or (X,))
    assert reason in codes(result), codes(result)
    assert_same(module, result.model, inputs or (X,))
    assert checks.fold(result.model, inputs or (X,)).folded == 0
    return result


def test_the_model_itself_keeps_its_class():
    result = refused(double(RepVGG()))
    assert type(result.model) is RepVGG
    messages = [reason.message for site in result.sites for reason in site.reasons]
    assert "the model itself would have to change its class" in messages
    # its other norms go as ever
    assert checks.verdicts(result).count("folded") == 2


REFUSED = {
    "what-the-branches-read-is-read-again": lambda self, x: F.relu(branches(self, x)) * x,
    "the-sum-is-read-twice": lambda self, x: F.relu(s := branches(self, x)) + F.gelu(s),
    "it-pads-behind-the-sum": lambda self, x: F.pad(branches(self, x), (0, x.shape[-1] // 6)),
    "two-sums-side-by-side": lambda self, x: torch.relu(branches(self, x)) + torch.relu(self.c(x) + self.d(x)),
    "a-third-branch-is-not-linear": lambda self, x: branches(self, x) + torch.relu(self.c(x)),
    "a-parameter-behind-the-sum": lambda self, x: torch.relu(branches(self, x)) * self.scale,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_block_that_does_more_than_one_thing(name):
    members = {"a": conv_bn(8, 8, 3), "b": BN(8), "c": conv(8, 8), "d": BN(8)}
    block = Through(REFUSED[name], scale=nn.Parameter(torch.ones(1)), **members)
    result = refused(net(block))
    assert type(result.model.block) is Through
    assert "kept" in checks.verdicts(result)


@pytest.mark.parametrize(
    ("outside", "function"),
    [
        pytest.param(lambda self, x: self.block(x, 2), lambda self, x, k: branches(self, x) * k, id="a-number"),
        pytest.param(lambda self, x: self.block(x)[0], lambda self, x: (branches(self, x),), id="a-tuple"),
        pytest.param(
            lambda self, x: self.block(x, torch.sigmoid(x)), lambda self, x, y: branches(self, x) * y, id="two"
        ),
        pytest.param(
            lambda self, x: self.block(x) + self.block.a.bn.eps, branches, id="the-code-outside-looks-inside"
        ),
        pytest.param(
            lambda self, x: self.block(x) if isinstance(self.block, Through) else x, branches, id="its-class"
        ),
    ],
)
def test_a_block_that_other_code_knows(outside, function):
    module = Through(outside, block=Through(function, a=conv_bn(8, 8, 3), b=BN(8)))
    result = refused(double(module))
    assert type(result.model.block) is Through


def test_a_block_with_a_second_input_of_the_model():
    module = Through(
        lambda self, x, y: self.block(x, y),
        block=Through(lambda self, x, y: torch.relu(branches(self, x)) * y, a=conv_bn(8, 8, 3), b=BN(8)),
    )
    refused(double(module), X, randn(*IMAGE, seed=1))


def test_a_parameter_that_nothing_reads_is_not_thrown_away():
    result = refused(net(two_branches(c=conv(8, 8))))
    assert any("'block.c.weight'" in reason.message for site in result.sites for reason in site.reasons)


def test_part_of_a_child_cannot_go():
    """The child adds, and applies a ReLU."""
    merge = Through(lambda self, x, y: F.relu(x + y))
    block = Through(lambda self, x: self.merge(self.a(x), self.b(x)), a=conv_bn(8, 8, 3), b=BN(8), merge=merge)
    result = refused(net(block))
    assert type(result.model.block) is Through


def test_a_block_smaller_than_the_whole_sum_gives_way_by_itself():
    """The sum goes on outside, in code that has to stay; what is in the block becomes one convolution."""
    module = double(Through(lambda self, x: self.block(x) + self.c(x), block=two_branches(), c=conv(8, 8)))
    folded = assert_folds(module, X)
    assert type(folded.block) is nn.Sequential


# ---- random blocks --------------------------------------------------------------------------------

BRANCH = {
    "dense": lambda: conv_bn(8, 8, 3),
    "pointwise": lambda: conv_bn(8, 8),
    "depthwise": lambda: conv_bn(8, 8, 3, groups=8),
    "bias": lambda: conv(8, 8, 3, bias=True),
    "norm": lambda: BN(8),
    "pool": lambda: nn.Sequential(nn.AvgPool2d(3, 1, 1), BN(8)),
    "identity": nn.Identity,
    "relu": lambda: nn.Sequential(conv(8, 8), nn.ReLU()),
    "dilated": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=2, dilation=2), BN(8)),
}
BEHIND = {
    "nothing": nn.Identity,
    "relu": nn.ReLU,
    "se": lambda: SqueezeExcite(8),
    "norm": lambda: BN(8),
    "residual": lambda: Through(lambda self, x: x + self.fn(x), fn=conv(8, 8)),
}


class Random(nn.Module):
    """Branches that are added or subtracted, in front of something; called once or twice."""

    def __init__(self, parts, signs, behind):
        super().__init__()
        self.parts, self.behind = nn.ModuleList(BRANCH[part]() for part in parts), BEHIND[behind]()
        self.signs = signs

    def forward(self, x):
        y = 0
        for part, sign in zip(self.parts, self.signs, strict=False):
            y = y + part(x) if sign else y - part(x)
        return self.behind(y)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from(list(BRANCH)), min_size=2, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.sampled_from(list(BEHIND)),
    st.booleans(),
)
def test_random_blocks(parts, signs, behind, twice):
    block = Random(parts, signs, behind)
    module = double(nn.Sequential(block, nn.Tanh(), block if twice else conv_bn(8, 8)))
    result = checks.fold(module, (X,))
    assert_same(module, result.model, (X,))
    assert set(result.key_map) == set(module.state_dict()) - set(result.model.state_dict())
    assert checks.fold(result.model, (X,)).folded == 0


# ---- a check that must be seen to fail ------------------------------------------------------------


def test_a_convolution_that_walks_otherwise_does_not_pass_the_trial(monkeypatch):
    from normtool.formats.torch import blocks

    def wrong(op):
        return {**right(op), "padding": (0, 0)}

    right = blocks.walk_of
    monkeypatch.setattr(blocks, "walk_of", wrong)  # the trial keeps its own
    assert_keeps(double(nn.Sequential(Through(branches, a=conv(8, 8, 3), b=BN(8)))), X, reason="no_module")
