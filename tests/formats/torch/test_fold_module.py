"""Folding an nn.Module: what gives way, what stays exactly as it was, and what is refused with which reason."""

import copy
import io
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import normtool
from tests.formats.torch.checks import (
    assert_folds,
    assert_keeps,
    assert_same,
    batch_norms,
    codes,
    double,
    export,
    fold,
    perturbed,
    randn,
    run,
    verdicts,
)

IMAGE = (2, 3, 6, 6)


class Through(nn.Module):
    """A module whose forward is a function of itself and x; children and parameters by name."""

    def __init__(self, function, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def conv_bn(cin=3, cout=4, **options):
    return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1, **options), nn.BatchNorm2d(cout))


# ---- layers ------------------------------------------------------------------------------------------

LAYERS = [
    pytest.param(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (2, 3, 7), id="conv1d"),
    pytest.param(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), IMAGE, id="conv2d"),
    pytest.param(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), (2, 3, 4, 4, 4), id="conv3d"),
    pytest.param(nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8), (2, 4, 5, 5), id="groups"),
    pytest.param(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), (2, 4, 5, 5), id="depthwise"),
    pytest.param(nn.Conv2d(3, 4, 3, stride=2, dilation=2, padding=2), nn.BatchNorm2d(4), IMAGE, id="dilated"),
    pytest.param(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), IMAGE, id="same"),
    pytest.param(nn.Conv2d(3, 4, 3, padding="valid"), nn.BatchNorm2d(4), IMAGE, id="valid"),
    pytest.param(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4), IMAGE, id="circular"
    ),
    pytest.param(nn.Linear(5, 4), nn.BatchNorm1d(4), (3, 5), id="linear"),
    pytest.param(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), (4, 4), id="linear-square"),
    pytest.param(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), IMAGE, id="sync-batch-norm"),
    pytest.param(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), IMAGE, id="affine-false"),
    pytest.param(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=0.5), IMAGE, id="epsilon"),
    pytest.param(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), IMAGE, id="no-momentum"),
]


@pytest.mark.parametrize(("layer", "norm", "shape"), LAYERS)
def test_layer_takes_the_norm_in(layer, norm, shape):
    module = double(nn.Sequential(OrderedDict(layer=layer, norm=norm)))
    folded = assert_folds(module, randn(*shape))
    assert type(folded.norm) is nn.Identity
    assert batch_norms(folded) == []
    new = {"layer.weight", "layer.bias"}
    assert set(folded.state_dict()) == new


def test_state_dict_is_the_old_one_less_the_norms_plus_new_biases():
    module = nn.Sequential(conv_bn(bias=False), nn.ReLU(), conv_bn(4, 4), nn.GroupNorm(2, 4))
    folded = assert_folds(double(module), randn(*IMAGE), left=1)
    old = [name for name in module.state_dict() if not name.startswith(("0.1.", "2.1."))]
    assert set(folded.state_dict()) == {*old, "0.0.bias"}


# ---- everything that is not the fold stays ----------------------------------------------------------------


def test_class_attributes_and_modes_stay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = conv_bn()
            self.names = ["cat", "dog"]
            self.drop = nn.Dropout(0.5)
            self.register_buffer("mean", torch.zeros(3, 1, 1))
            self.register_buffer("hidden", torch.zeros(2), persistent=False)

        def forward(self, x):
            return self.drop(self.body(x - self.mean))

    module = double(Net())
    module.drop.train()
    module.drop.p = 0.0
    folded = fold(module, (randn(*IMAGE),)).model
    assert type(folded) is Net
    assert folded.names == ["cat", "dog"]
    assert folded.names is not module.names
    assert [m.training for m in folded.modules()] == [m.training for m in module.modules()]
    assert torch.equal(folded.mean, module.mean)
    assert folded.mean is not module.mean
    assert "hidden" not in folded.state_dict()
    assert torch.equal(folded.hidden, module.hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_stays(dtype):
    module = perturbed(conv_bn().to(dtype))
    folded = fold(module, (torch.randn(IMAGE).to(dtype),)).model
    assert {tensor.dtype for tensor in folded.state_dict().values()} == {dtype}
    assert batch_norms(folded) == []


@pytest.mark.parametrize("weight", [True, False], ids=["weight-learns", "weight-frozen"])
@pytest.mark.parametrize("bias", [True, False, None], ids=["bias-learns", "bias-frozen", "no-bias"])
def test_requires_grad_stays(weight, bias):
    module = double(conv_bn(bias=bias is not None))
    module[0].weight.requires_grad_(weight)
    if bias is not None:
        module[0].bias.requires_grad_(bias)
    folded = assert_folds(module, randn(*IMAGE))
    assert folded[0].weight.requires_grad is weight
    assert folded[0].bias.requires_grad is (weight if bias is None else bias)
    assert folded[0].weight.is_leaf


def test_memory_format_stays():
    module = double(conv_bn()).to(memory_format=torch.channels_last)
    folded = assert_folds(module, randn(*IMAGE).contiguous(memory_format=torch.channels_last))
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_non_contiguous_parameters_keep_their_strides():
    module = double(conv_bn())
    with torch.no_grad():
        module[0].weight = nn.Parameter(torch.randn(3, 4, 3, 3, dtype=torch.float64).transpose(0, 1))
        module[1].weight = nn.Parameter(torch.randn(8, dtype=torch.float64)[::2])
        module[1].running_mean = torch.randn(4, 2, dtype=torch.float64)[:, 0]
    folded = assert_folds(module, randn(*IMAGE))
    assert not folded[0].weight.is_contiguous()


def test_inplace_changes_the_very_parameters_that_an_optimizer_holds():
    module = double(conv_bn())
    reference = copy.deepcopy(module)
    optimizer = torch.optim.SGD(module[0].parameters(), lr=0.1)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    result = normtool.fold(module, (randn(*IMAGE),), validate=False, inplace=True)
    assert result.model is module
    assert [id(p) for p in module.parameters()] == held
    assert type(module[1]) is nn.Identity
    assert_same(reference, module, (randn(*IMAGE),))
    module(randn(*IMAGE)).sum().backward()
    optimizer.step()


def test_inplace_leaves_a_module_alone_that_cannot_be_folded():
    module = double(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))
    before = copy.deepcopy(module.state_dict())
    norm = module[1]
    normtool.fold(module, (randn(*IMAGE),), validate=False, inplace=True)
    assert module[1] is norm
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_gradients_and_their_tensors_stay():
    module = double(conv_bn())
    module(randn(*IMAGE)).sum().backward()
    grad = module[0].weight.grad.clone()
    fold(module, (randn(*IMAGE),))
    assert torch.equal(module[0].weight.grad, grad)


# ---- places of a norm ----------------------------------------------------------------------------------

PLACES = [
    pytest.param(
        lambda: Through(
            lambda self, x: self.norms[0](self.conv(x)),
            conv=nn.Conv2d(3, 4, 3),
            norms=nn.ModuleList([nn.BatchNorm2d(4)]),
        ),
        id="module-list",
    ),
    pytest.param(
        lambda: Through(
            lambda self, x: self.norms["eval mode"](self.conv(x)),
            conv=nn.Conv2d(3, 4, 3),
            norms=nn.ModuleDict({"eval mode": nn.BatchNorm2d(4)}),
        ),
        id="module-dict-with-an-odd-key",
    ),
    pytest.param(
        lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())),
        id="in-different-sequentials",
    ),
    pytest.param(
        lambda: Through(
            lambda self, x: self.norm(F.conv2d(x, self.weight, self.bias)),
            weight=nn.Parameter(torch.zeros(4, 3, 3, 3)),
            bias=nn.Parameter(torch.zeros(4)),
            norm=nn.BatchNorm2d(4),
        ),
        id="functional-conv-with-bias",
    ),
]


@pytest.mark.parametrize("build", PLACES)
def test_norm_is_found_wherever_it_is_registered(build):
    assert batch_norms(assert_folds(double(build()), randn(*IMAGE))) == []


def test_norm_registered_under_two_names_gives_way_in_both():
    module = Through(lambda self, x: self.alias(self.conv(x)), conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4))
    module.alias = module.norm
    folded = assert_folds(double(module), randn(*IMAGE))
    assert folded.norm is folded.alias
    assert batch_norms(folded) == []


def test_model_with_several_outputs():
    module = Through(lambda self, x: {"raw": self.a(x), "both": (self.b(x), x)}, a=conv_bn(), b=conv_bn(3, 5))
    assert_folds(double(module), randn(*IMAGE))


def test_in_place_residual():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
            self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            y += x
            return self.relu(y)

    assert_folds(double(nn.Sequential(Block(), Block())), randn(*IMAGE))


# ---- BatchNorms with more inside ---------------------------------------------------------------------


class BatchNormAct2d(nn.BatchNorm2d):
    """In the shape of timm's."""

    def __init__(self, channels, act, drop=None):
        super().__init__(channels)
        self.drop = drop or nn.Identity()
        self.act = act

    def normalise(self, x):
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )

    def forward(self, x):
        return self.act(self.drop(self.normalise(x)))


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class FunctionalRelu(BatchNormAct2d):
    def forward(self, x):
        return F.relu(self.normalise(x), inplace=True)


class OwnSwish(BatchNormAct2d):
    """Its own code reads the normalised tensor twice."""

    def forward(self, x):
        y = self.normalise(x)
        return self.act(y * torch.sigmoid(y) + 1.0)


class TwiceAct(BatchNormAct2d):
    def forward(self, x):
        return self.act(self.act(self.normalise(x)))


class SuperForward(BatchNormAct2d):
    def forward(self, x):
        return self.act(nn.BatchNorm2d.forward(self, x))


INSIDE = [
    pytest.param(lambda: BatchNormAct2d(4, nn.ReLU(inplace=True)), ["bn.act"], id="relu"),
    pytest.param(
        lambda: BatchNormAct2d(4, nn.ReLU(), nn.Dropout2d(0.3)), ["bn.drop", "bn.act"], id="drop-relu"
    ),
    pytest.param(lambda: BatchNormAct2d(4, nn.Identity()), [], id="identity"),
    pytest.param(lambda: BatchNormAct2d(4, Swish()), ["bn.act"], id="swish-of-primitive-ops"),
    pytest.param(lambda: BatchNormAct2d(4, nn.PReLU()), ["bn.act"], id="prelu"),
    pytest.param(
        lambda: BatchNormAct2d(4, nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1))), ["bn.act"], id="nested"
    ),
    pytest.param(lambda: FunctionalRelu(4, nn.Identity()), ["bn.relu"], id="functional-relu"),
    pytest.param(lambda: OwnSwish(4, nn.Tanh()), ["bn.add", "bn.act"], id="own-swish"),
    pytest.param(lambda: TwiceAct(4, nn.Softplus()), ["bn.act", "bn.act_1"], id="same-child-twice"),
    pytest.param(lambda: SuperForward(4, nn.LeakyReLU(0.3)), ["bn.act"], id="super-forward"),
]


@pytest.mark.parametrize(("norm", "steps"), INSIDE)
def test_subclass_gives_way_to_the_rest_of_what_it_does(norm, steps):
    module = Through(lambda self, x: self.bn(self.conv(x)) * 1, conv=nn.Conv2d(3, 4, 3), bn=norm())
    folded = assert_folds(double(module), randn(*IMAGE))
    assert batch_norms(folded) == []
    assert [name for name, _ in folded.named_modules(remove_duplicate=False) if name.count(".") == 1] == steps
    norms_own = {
        f"bn.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert set(folded.state_dict()) >= set(module.state_dict()) - norms_own


def test_one_activation_shared_by_all_norms():
    act = nn.ReLU(inplace=True)
    layers = [nn.Conv2d(3, 3, 1), BatchNormAct2d(3, act), nn.Conv2d(3, 3, 1), BatchNormAct2d(3, act)]
    folded = assert_folds(double(nn.Sequential(*layers)), randn(*IMAGE))
    assert folded[1].act is folded[3].act


def test_subclass_used_twice_in_a_sequential():
    norm, conv = BatchNormAct2d(3, nn.PReLU()), nn.Conv2d(3, 3, 1)
    folded = assert_folds(double(nn.Sequential(conv, norm, conv, norm)), randn(*IMAGE))
    assert folded[1] is folded[3]
    assert len(fold(folded, (randn(*IMAGE),)).sites) == 0


class WithResidual(BatchNormAct2d):
    def forward(self, x, residual=None):
        y = self.normalise(x)
        return F.relu(y if residual is None else y + residual)


class ScaleFirst(BatchNormAct2d):
    def forward(self, x):
        return self.normalise(x * 2.0)


class TwoOutputs(BatchNormAct2d):
    def forward(self, x):
        y = self.normalise(x)
        return F.relu(y), y


class OwnParameter(BatchNormAct2d):
    def __init__(self, channels):
        super().__init__(channels, nn.Identity())
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return torch.tanh(self.normalise(x)) * self.gain


class Sometimes(BatchNormAct2d):
    """Another thing in each call."""

    def forward(self, x, act=True):
        return F.relu(self.normalise(x)) if act else self.normalise(x)


REFUSED_INSIDE = [
    pytest.param(lambda self, x: self.bn(self.conv(x), x), WithResidual(3, nn.Identity()), id="second-input"),
    pytest.param(lambda self, x: self.bn(self.conv(x)), ScaleFirst(3, nn.Identity()), id="something-before"),
    pytest.param(lambda self, x: self.bn(self.conv(x)), TwoOutputs(3, nn.Identity()), id="two-outputs"),
    pytest.param(lambda self, x: self.bn(self.conv(x)), OwnParameter(3), id="a-parameter-of-its-own"),
    pytest.param(
        lambda self, x: self.bn(self.conv(self.bn(self.conv(x))), act=False),
        Sometimes(3, nn.Identity()),
        id="not-the-same-in-each-call",
    ),
]


@pytest.mark.parametrize(("function", "norm"), REFUSED_INSIDE)
def test_subclass_that_cannot_give_way_is_kept(function, norm):
    module = Through(function, conv=nn.Conv2d(3, 3, 1), bn=norm)
    assert_keeps(double(module), randn(*IMAGE), reason="no_module")


# ---- code that looks at its norm ---------------------------------------------------------------------------

LOOKS = {
    "reads-eps": lambda self, x: self.bn(self.conv(x)) + self.bn.eps,
    "asks-for-the-class": lambda self, x: (
        self.bn(self.conv(x)) if isinstance(self.bn, nn.BatchNorm2d) else self.conv(x) * 2
    ),
    "calls-it-by-keyword": lambda self, x: self.bn(x=self.conv(x)),
    "calls-a-hidden-reference": lambda self, x: self.hidden[0](self.conv(x)),
    "calls-forward-alone": lambda self, x: self.bn.forward(self.conv(x)),
}


class PlainForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("look", list(LOOKS))
def test_code_that_would_notice_is_left_alone(look):
    module = Through(LOOKS[look], conv=nn.Conv2d(3, 4, 3), bn=PlainForward(4))
    module.hidden = [module.bn]
    assert_keeps(double(module), randn(*IMAGE), reason="no_module")


def test_only_the_norm_that_would_be_missed_stays():
    """The others fold: the one at fault is found by halves."""
    blocks = [conv_bn(3, 3) for _ in range(4)]
    blocks[2] = Through(LOOKS["reads-eps"], conv=nn.Conv2d(3, 3, 3, padding=1), bn=nn.BatchNorm2d(3))
    folded = assert_folds(double(nn.Sequential(*blocks)), randn(*IMAGE), left=1)
    assert batch_norms(folded) == ["2.bn"]


def test_functional_norm_is_the_code_s_own():
    def function(self, x):
        y = self.conv(x)
        return F.batch_norm(y, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)

    module = Through(function, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    result = assert_keeps(double(module), randn(*IMAGE), reason="no_module")
    assert "not by a norm module" in str([site.reasons for site in result.sites])


def test_norm_parameters_read_elsewhere():
    module = Through(
        lambda self, x: self.bn(self.conv(x)) + self.bn.weight.sum(),
        conv=nn.Conv2d(3, 4, 3),
        bn=nn.BatchNorm2d(4),
    )
    assert_keeps(double(module), randn(*IMAGE), reason="shared_parameter")


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, None, self.stride, self.padding)


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


def test_conv_with_a_forward_of_its_own_and_no_bias():
    module = nn.Sequential(OwnConv(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    assert_keeps(double(module), randn(*IMAGE), reason="no_module")


def test_conv_with_a_forward_of_its_own_that_has_a_bias_to_read():
    class OwnWithBias(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight, self.bias)

    folded = assert_folds(double(nn.Sequential(OwnWithBias(3, 4, 3), nn.BatchNorm2d(4))), randn(*IMAGE))
    assert type(folded[0]) is OwnWithBias


def test_conv_that_ignores_a_bias_in_its_inner_forward():
    class Ignores(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return F.conv2d(x, weight, None)

    module = nn.Sequential(Ignores(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    assert_keeps(double(module), randn(*IMAGE), reason="no_module")


def test_standardised_weight_is_computed():
    module = nn.Sequential(StandardisedConv(3, 4, 3), nn.BatchNorm2d(4))
    assert_keeps(double(module), randn(*IMAGE), reason="dynamic_weight")


# ---- parametrised weights -----------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2.0


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


PARAMETRISED = [
    pytest.param(parametrizations.weight_norm, "dynamic_weight", id="weight-norm"),
    pytest.param(parametrizations.spectral_norm, "dynamic_weight", id="spectral-norm"),
    pytest.param(old_weight_norm, "dynamic_weight", id="old-weight-norm"),
    pytest.param(nn.utils.spectral_norm, "dynamic_weight", id="old-spectral-norm"),
    pytest.param(
        lambda conv: nn.utils.parametrize.register_parametrization(conv, "weight", Doubled()),
        "no_module",
        id="constant-factor",
    ),
]


@pytest.mark.parametrize(("parametrise", "reason"), PARAMETRISED)
def test_parametrised_weight_is_refused_and_still_runs(parametrise, reason):
    module = nn.Sequential(parametrise(nn.Conv2d(3, 4, 3).double()), nn.BatchNorm2d(4)).double().eval()
    module(randn(*IMAGE))
    perturbed(module[1])
    assert_keeps(module, randn(*IMAGE), reason=reason)


def test_parametrised_norm_is_refused():
    module = double(conv_bn())
    nn.utils.parametrize.register_parametrization(module[1], "weight", Doubled())
    assert_keeps(module, randn(*IMAGE), reason="no_module")


def test_plain_conv_folds_beside_an_old_weight_norm():
    """Its non-leaf weight refuses to be copied by deepcopy."""
    module = nn.Sequential(old_weight_norm(nn.Conv2d(3, 3, 1)), nn.ReLU(), *conv_bn())
    folded = assert_folds(double(module), randn(*IMAGE))
    assert folded[0].weight_g.shape == module[0].weight_g.shape


# ---- hooks ---------------------------------------------------------------------------------------------


def double_output(module, inputs, output):
    return output * 2


def test_forward_hook_on_the_norm_is_kept_and_can_still_be_removed():
    module = double(conv_bn())
    handle = module[1].register_forward_hook(double_output)
    plain = copy.deepcopy(module)
    handle_of_plain = plain[1]._forward_hooks
    handle_of_plain.clear()
    folded = assert_folds(module, randn(*IMAGE))
    assert len(folded[1]._forward_hooks) == 1
    x = randn(*IMAGE)
    torch.testing.assert_close(folded(x), plain(x) * 2)
    normtool.fold(module, (x,), validate=False, inplace=True)
    torch.testing.assert_close(module(x), plain(x) * 2)
    handle.remove()
    torch.testing.assert_close(module(x), plain(x))


def test_hook_with_kwargs_and_always_called():
    calls = []
    module = double(conv_bn())
    module[1].register_forward_hook(lambda m, a, k, out: calls.append(k), with_kwargs=True, always_call=True)
    folded = assert_folds(module, randn(*IMAGE))
    calls.clear()
    folded(randn(*IMAGE))
    assert calls == [{}]


def test_hook_on_a_subclass_sees_the_activated_output():
    seen = []
    module = Through(
        lambda self, x: self.bn(self.conv(x)), conv=nn.Conv2d(3, 4, 3), bn=BatchNormAct2d(4, nn.ReLU())
    )
    module.bn.register_forward_hook(lambda m, i, out: seen.append(out))
    folded = assert_folds(double(module), randn(*IMAGE))
    seen.clear()
    assert folded(randn(*IMAGE)) is seen[0]


def test_hook_on_a_wrapping_sequential_is_no_obstacle():
    seen = []
    module = nn.Sequential(conv_bn(), nn.ReLU())
    module[0].register_forward_hook(lambda m, i, out: seen.append(out))
    module[0].register_forward_pre_hook(lambda m, i: seen.append(i))
    folded = assert_folds(double(module), randn(*IMAGE))
    assert len(folded[0]._forward_hooks) == 1


HOOKS = {
    "forward-on-conv": lambda m: m[0][0].register_forward_hook(double_output),
    "forward-on-what-holds-only-the-conv": lambda m: m[0].register_forward_hook(double_output),
    "pre-on-norm": lambda m: m[1][0].register_forward_pre_hook(lambda m, x: (x[0] * 2,)),
    "pre-on-what-holds-only-the-norm": lambda m: m[1].register_forward_pre_hook(lambda m, x: None),
    "backward-on-norm": lambda m: m[1][0].register_full_backward_hook(lambda m, i, o: None),
    "backward-pre-on-norm": lambda m: m[1][0].register_full_backward_pre_hook(lambda m, o: None),
    "backward-on-conv": lambda m: m[0][0].register_full_backward_hook(lambda m, i, o: None),
}


@pytest.mark.parametrize("name", list(HOOKS))
def test_hook_that_sees_the_tensor_in_between(name):
    module = double(nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), nn.Sequential(nn.BatchNorm2d(3))))
    HOOKS[name](module)
    assert_keeps(module, randn(*IMAGE), reason="hook")


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "no-affine"])
def test_norms_in_a_row_go_forward_together(affine):
    """The first may go into the second, whether that has γ and β or not, before both go on."""
    norms = [nn.BatchNorm2d(4, affine=affine), nn.BatchNorm2d(4, affine=affine)]
    folded = assert_folds(double(nn.Sequential(*norms, nn.Conv2d(4, 3, 1, bias=False))), randn(2, 4, 5, 5))
    assert batch_norms(folded) == []
    assert list(folded.state_dict()) == ["2.weight", "2.bias"]


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "no-affine"])
def test_one_norm_called_twice_in_a_row_takes_nothing_in(affine):
    """γ and β of the second call are those of the first."""
    module = Through(lambda m, x: m.norm(m.norm(x).relu() + x), norm=nn.BatchNorm2d(4, affine=affine))
    result = assert_keeps(double(module), randn(2, 4, 5, 5), reason="no_producer")
    assert verdicts(result) == ["kept", "kept"]


def test_hook_between_two_norms():
    module = double(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    module[1].register_forward_hook(double_output)
    folded = fold(module, (randn(*IMAGE),))
    assert verdicts(folded) == ["folded", "kept"]
    assert "hook" in codes(folded)
    assert_same(module, folded.model, (randn(*IMAGE),))


def test_hook_on_a_part_of_the_norm_that_would_be_lost():
    module = Through(
        lambda self, x: self.bn(self.conv(x)), conv=nn.Conv2d(3, 4, 3), bn=BatchNormAct2d(4, nn.ReLU())
    )
    module.bn.drop.register_forward_hook(double_output)
    assert_keeps(double(module), randn(*IMAGE), reason="hook")


def test_hook_seen_in_another_call_of_the_same_wrapper():
    """The wrapper is left between conv and norm, though both lie in it: in two calls of it."""

    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x, first):
            return self.conv(x) if first else self.bn(x)

    module = Through(lambda self, x: self.either(self.either(x, True), False), either=Either())
    module.either.register_forward_hook(double_output)
    assert_keeps(double(module), randn(*IMAGE), reason="hook")


# ---- what the folded module is still good for --------------------------------------------------------------


@pytest.fixture(scope="module")
def subclassed():
    layers = [
        nn.Conv2d(3, 4, 3),
        FunctionalRelu(4, nn.Identity()),
        nn.Conv2d(4, 4, 3),
        BatchNormAct2d(4, Swish()),
    ]
    module = double(nn.Sequential(*layers))
    return module, fold(module, (randn(*IMAGE),)).model


def test_folded_weights_can_be_saved_and_loaded(subclassed):
    _, folded = subclassed
    file = io.BytesIO()
    torch.save(folded.state_dict(), file)
    file.seek(0)
    fresh = copy.deepcopy(folded)
    perturbed(fresh, seed=9)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_same(folded, fresh, (randn(*IMAGE),))


def test_folded_module_can_be_pickled(subclassed):
    _, folded = subclassed
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    assert b"normtool" not in file.getvalue()
    assert_same(folded, torch.load(file, weights_only=False), (randn(*IMAGE),))


def test_folded_module_can_be_exported_and_traced(subclassed):
    module, folded = subclassed
    program = export(folded, randn(*IMAGE))
    assert_same(module, run(program), (randn(*IMAGE),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace(folded, randn(*IMAGE))
    assert_same(module, traced, (randn(*IMAGE),))


def test_folded_module_can_be_copied_trained_and_moved(subclassed):
    _, folded = subclassed
    other = copy.deepcopy(folded).train().float()
    other(torch.randn(IMAGE)).sum().backward()
    assert other[0].weight.grad is not None


# ---- random modules ---------------------------------------------------------------------------------------


def layer(kind, channels):
    return {
        "conv": lambda: nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        "conv-bias": lambda: nn.Conv2d(channels, channels, 1, groups=2),
        "transposed": lambda: nn.ConvTranspose2d(channels, channels, 3, padding=1, groups=2),
        "bn": lambda: nn.BatchNorm2d(channels),
        "bn-act": lambda: BatchNormAct2d(channels, nn.PReLU()),
        "relu": lambda: nn.ReLU(inplace=True),
        "tanh": nn.Tanh,
    }[kind]()


class RandomNet(nn.Module):
    """A tape of steps: each calls a module, perhaps one called before, and adds an earlier result or not."""

    def __init__(self, kinds, steps):
        super().__init__()
        self.parts = nn.ModuleList([layer(kind, 4) for kind in kinds])
        self.steps = steps

    def forward(self, x):
        tape = [x]
        for part, source, addend in self.steps:
            x = self.parts[part % len(self.parts)](tape[-1 - source % min(2, len(tape))] * 1)
            if addend:
                x = x + tape[-1 - addend % len(tape)]
            tape.append(x)
        return x


KINDS = st.sampled_from(["conv", "conv-bias", "transposed", "bn", "bn", "bn-act", "relu", "tanh"])
STEP = st.tuples(st.integers(0, 9), st.sampled_from([0, 0, 0, 0, 1]), st.sampled_from([0, 0, 0, 1, 2]))
PLAIN = st.tuples(st.integers(0, 9), st.just(0), st.just(0))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(KINDS, min_size=2, max_size=6), st.lists(st.one_of(PLAIN, STEP), min_size=2, max_size=7))
def test_random_modules(kinds, steps):
    module = double(RandomNet(kinds, steps))
    inputs = (randn(2, 4, 5, 5),)
    result = fold(module, inputs)
    assert_same(module, result.model, inputs)
    assert fold(result.model, inputs).folded == 0


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(KINDS, st.booleans()), min_size=1, max_size=5))
def test_random_chains(chain):
    """Each norm right behind something, some parts twice: these do fold."""
    parts = [layer("conv", 4)]
    for kind, twice in chain:
        parts += [layer(kind, 4)] if kind.startswith("bn") else [layer(kind, 4), layer("bn", 4)]
        parts += parts[-2:] if twice else []
    module = double(nn.Sequential(*parts))
    inputs = (randn(2, 4, 5, 5),)
    result = fold(module, inputs)
    assert_same(module, result.model, inputs)
    assert fold(result.model, inputs).folded == 0


# ---- frozen BatchNorms, spelled out in primitive ops -----------------------------------------------


class FrozenBatchNorm(nn.Module):
    """As detection models have it: four buffers, and scale and shift computed in every call."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, tensor in {
            "weight": torch.randn(channels),
            "bias": torch.randn(channels),
            "running_mean": torch.randn(channels),
            "running_var": torch.rand(channels) + 0.5,
        }.items():
            self.register_buffer(name, tensor)

    def forward(self, x):
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


class Clipped(FrozenBatchNorm):
    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


class Peeks(nn.Module):
    """Its own code reads the statistics of its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), FrozenBatchNorm(4)

    def forward(self, x):
        return self.bn(self.conv(x)) + self.bn.running_mean.sum()


def test_a_frozen_batch_norm_folds_and_gives_way_to_identity():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), FrozenBatchNorm(4), nn.ReLU()).eval()
    inputs = (torch.randn(2, 3, 6, 6),)
    result = normtool.fold(module, inputs)
    assert [site.verdict for site in result.sites] == ["folded"]
    assert isinstance(result.model[1], nn.Identity)
    assert (result.before.buffers, result.after.buffers) == (16, 0)
    assert result.validation.verdict == "equal"


def test_a_frozen_batch_norm_that_is_called_twice_folds_at_both_sites():
    torch.manual_seed(0)
    norm = FrozenBatchNorm(4)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3), norm).eval()
    result = normtool.fold(module, (torch.randn(2, 3, 8, 8),))
    assert [site.verdict for site in result.sites] == ["folded", "folded"]
    assert result.validation.verdict == "equal"


@pytest.mark.parametrize(
    ("module", "code"),
    [
        pytest.param(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), FrozenBatchNorm(4)), "nonlinear", id="behind-a-relu"
        ),
        pytest.param(
            nn.Sequential(nn.Conv2d(3, 4, 3), Clipped(4)), "unsupported_op", id="it-does-more-than-its-map"
        ),
        pytest.param(Peeks(), "shared_parameter", id="its-statistics-are-read-elsewhere"),
    ],
)
def test_a_frozen_batch_norm_is_kept(module, code):
    result = normtool.fold(module.eval(), (torch.randn(2, 3, 6, 6),))
    (site,) = result.sites
    assert site.verdict == "kept"
    assert code in {reason.code for reason in site.reasons}


def test_a_norm_whose_tensors_somebody_else_uses_is_one_norm():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            bn = self.bn
            return nn.functional.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias)

    scan = normtool.scan(Functional().eval(), (torch.randn(2, 3, 6, 6),))
    (norm,) = scan.norms
    assert (norm.name, norm.calls, norm.learnable, norm.buffers) == ("bn", 1, 8, 9)


def test_an_instance_norm_with_stored_statistics_is_kept_for_the_right_reason():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
    (site,) = normtool.fold(module.eval(), (torch.randn(2, 3, 6, 6),), validate=False).sites
    assert [reason.code for reason in site.reasons] == ["unsupported_op"]


# ---- folds that follow each other ----------------------------------------------------------------


def test_a_shift_that_stays_takes_in_what_comes_later():
    """The second norm has become an Add in front of the padding; then the first one's shift reaches it."""
    parts = [nn.BatchNorm2d(3), nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)]
    folded = assert_folds(double(nn.Sequential(*parts)), randn(*IMAGE))
    assert [type(part) for part in folded] == [nn.Sequential, nn.AvgPool2d, nn.Sequential, nn.Conv2d]


def test_a_shift_that_stays_for_a_while_goes_after_all():
    """Its scale goes forward, and what is left, an Add, backward through the MaxPool."""
    parts = [nn.Conv2d(3, 3, 1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)]
    folded = assert_folds(double(nn.Sequential(*parts)), randn(*IMAGE))
    assert [type(part) for part in folded] == [nn.Conv2d, nn.MaxPool2d, nn.Identity, nn.Conv2d]
