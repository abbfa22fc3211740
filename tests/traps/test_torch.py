"""The traps of folding (TRAPS.md 1–24) in PyTorch: right, or refused with a reason."""

import copy
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import normtool
from tests.formats.torch.checks import (
    assert_folds,
    assert_keeps,
    assert_program_folds,
    assert_program_keeps,
    assert_same,
    batch_norms,
    codes,
    decomposed,
    double,
    export,
    fold,
    perturbed,
    randn,
    verdicts,
)
from tests.formats.torch.test_fold_module import BatchNormAct2d, Through, conv_bn

# ---- 1: training mode ----------------------------------------------------------------------------


def test_trap_01_norm_in_training_mode_though_the_rest_is_not():
    module = double(nn.Sequential(conv_bn(3, 3), conv_bn(3, 3)))
    module[0][1].train()
    result = fold(module, (randn(2, 3, 6, 6),))
    assert verdicts(result) == ["kept", "folded"]
    assert codes(result) == {"training_mode"}
    assert result.model[0][1].training


def test_trap_01_whole_module_in_training_mode():
    module = double(conv_bn()).train()
    result = fold(module, (randn(2, 3, 6, 6),))
    assert verdicts(result) == ["kept"]
    assert "training_mode" in codes(result)


def test_trap_01_no_running_statistics():
    module = double(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)))
    assert_keeps(module, randn(2, 3, 6, 6), reason="no_running_stats")


def test_trap_01_statistics_that_another_call_updates():
    """The second call reads what the first has just written."""

    def function(self, x):
        y = F.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=True)
        return self.bn(self.conv(y))

    module = double(Through(function, conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3)))
    result = fold(module, (randn(2, 3, 6, 6),))
    assert result.folded == 0
    assert "dynamic_weight" in codes(result)


def test_trap_01_program_in_training_mode():
    module = double(conv_bn()).train()
    for program in (export(module, randn(2, 3, 6, 6)), decomposed(export(module, randn(2, 3, 6, 6)))):
        result = fold(program)
        assert verdicts(result) == ["kept"]
        assert "training_mode" in codes(result)


# ---- 2 and 13: the axis --------------------------------------------------------------------------


def eight(function, shape):
    """Everything has 8 channels, and every axis a length of 8 or a divisor of it."""
    norm = nn.BatchNorm2d(8) if len(shape) == 4 else nn.BatchNorm1d(8)
    parts = {"conv": nn.Conv2d(8, 8, 1), "linear": nn.Linear(8, 8), "w": nn.Parameter(torch.zeros(8, 8))}
    return double(Through(function, bn=norm, **parts))


AXES = [
    pytest.param(lambda m, x: m.bn((x @ m.w).t()), (8, 8), id="matmul-transpose"),
    pytest.param(lambda m, x: m.bn(m.linear(x).t()), (8, 8), id="linear-transpose"),
    pytest.param(lambda m, x: m.bn(m.conv(x).transpose(1, 2)), (2, 8, 8, 8), id="conv-transpose"),
    pytest.param(lambda m, x: m.bn(m.conv(x).reshape(3, 8, 2, 4)), (2, 8, 3, 4), id="conv-reshape"),
]


@pytest.mark.parametrize(("function", "shape"), AXES)
def test_trap_02_coinciding_sizes_do_not_make_an_axis(function, shape):
    module = eight(function, shape)
    for result in (
        assert_keeps(module, randn(*shape), reason="axis_mismatch"),
        assert_program_keeps(export(module, randn(*shape)), randn(*shape), reason="axis_mismatch"),
    ):
        assert codes(result) - {"not_called"} == {"axis_mismatch", "graph_output"}


FOLLOWED = [
    pytest.param(lambda m, x: m.bn((m.w @ x).t()), (8, 8), id="matmul-from-the-left-transposed"),
    pytest.param(lambda m, x: m.bn(m.linear(x.t()).t().mT), (8, 8), id="transposed-twice"),
    pytest.param(
        lambda m, x: m.bn(m.conv(x).flatten(2).unflatten(2, (8, 8))), (2, 8, 8, 8), id="flattened-behind"
    ),
    pytest.param(lambda m, x: m.bn(m.conv(x).reshape(2, 8, 4, 16)), (2, 8, 8, 8), id="reshaped-behind"),
    pytest.param(lambda m, x: m.bn(m.conv(x).permute(0, 2, 3, 1).permute(0, 3, 1, 2)), (2, 8, 8, 8), id="nhwc"),
]


@pytest.mark.parametrize(("function", "shape"), FOLLOWED)
def test_trap_02_an_axis_that_can_be_followed_is(function, shape):
    module = eight(function, shape)
    assert_folds(module, randn(*shape))
    assert_program_folds(export(module, randn(*shape)), randn(*shape))


def test_trap_13_constant_along_w_where_w_is_c():
    """(4,) is aligned to the right: one value per column."""
    module = Through(
        lambda self, x: self.bn(self.conv(x) * self.scale),
        conv=nn.Conv2d(3, 4, 1),
        bn=nn.BatchNorm2d(4),
        scale=nn.Parameter(torch.zeros(4)),
    )
    program = export(double(module), randn(2, 3, 4, 4))
    result = assert_program_keeps(program, randn(2, 3, 4, 4), reason="axis_mismatch")
    assert codes(result) == {"axis_mismatch", "graph_output"}


def test_trap_13_constant_per_channel():
    module = Through(
        lambda self, x: self.bn(self.conv(x) * self.scale),
        conv=nn.Conv2d(3, 4, 1),
        bn=nn.BatchNorm2d(4),
        scale=nn.Parameter(torch.zeros(4, 1, 1)),
    )
    program = export(double(module), randn(2, 3, 4, 4))
    assert_program_folds(program, randn(2, 3, 4, 4))


# ---- 4 and 5: ConvTranspose ----------------------------------------------------------------------

TRANSPOSED = [
    pytest.param(4, 6, {}, id="plain"),
    pytest.param(6, 6, {}, id="cin-is-cout"),
    pytest.param(8, 8, {"groups": 4}, id="groups-cin-is-cout"),
    pytest.param(4, 4, {"groups": 2}, id="groups-cin-per-group-is-cout-per-group"),
    pytest.param(4, 8, {"groups": 2}, id="groups-widening"),
    pytest.param(8, 4, {"groups": 2}, id="groups-narrowing"),
    pytest.param(6, 6, {"groups": 6}, id="depthwise"),
    pytest.param(4, 6, {"stride": 2, "output_padding": 1, "padding": 1}, id="output-padding"),
    pytest.param(4, 6, {"dilation": 2, "groups": 2}, id="dilated"),
]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("cin", "cout", "options"), TRANSPOSED)
def test_trap_04_conv_transpose_is_scaled_on_the_output_axis(cin, cout, options, bias):
    module = nn.Sequential(nn.ConvTranspose2d(cin, cout, 3, bias=bias, **options), nn.BatchNorm2d(cout))
    assert_folds(double(module), randn(2, cin, 5, 5))


@pytest.mark.parametrize("decompose", [False, True], ids=["exported", "decomposed"])
@pytest.mark.parametrize("groups", [1, 2])
def test_trap_05_conv_transpose_with_cin_equal_to_cout_in_a_program(groups, decompose):
    module = double(nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=groups), nn.BatchNorm2d(4)))
    program = export(module, randn(2, 4, 5, 5))
    assert_program_folds(decomposed(program) if decompose else program, randn(2, 4, 5, 5))


def test_trap_05_the_other_axis_would_have_shown():
    module = double(nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)))
    folded = fold(module, (randn(2, 4, 5, 5),)).model
    s = module[1].weight / (module[1].running_var + module[1].eps).sqrt()
    with torch.no_grad():
        folded[0].weight.copy_(module[0].weight * s.reshape(4, 1, 1, 1))
    with pytest.raises(AssertionError):
        assert_same(module, folded, (randn(2, 4, 5, 5),))


def test_trap_04_one_and_three_dimensions():
    one = nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6))
    assert_folds(double(one), randn(2, 4, 7))
    three = nn.Sequential(nn.ConvTranspose3d(4, 6, 2, groups=2), nn.BatchNorm3d(6))
    assert_folds(double(three), randn(2, 4, 3, 3, 3))


# ---- 6 and 7: shared use -------------------------------------------------------------------------


def convs_and_norms(function):
    members = {"conv": nn.Conv2d(3, 3, 1), "other": nn.Conv2d(3, 3, 1, bias=False)}
    return double(Through(function, **members, bn=nn.BatchNorm2d(3), bn2=nn.BatchNorm2d(3)))


SHARED = {
    "conv-used-twice-norm-on-one-path": (
        lambda m, x: m.bn(m.conv(x)) + m.conv(x + 1),
        ["kept", "kept"],
        {"shared_parameter", "not_called", "graph_output"},
    ),
    "conv-read-by-norm-and-something-else": (
        lambda m, x: (lambda y: m.bn(y) + y.relu())(m.conv(x)),
        ["kept", "kept"],
        {"multiple_readers", "not_called", "graph_output"},
    ),
    "conv-read-by-norm-and-output": (
        lambda m, x: (lambda y: (m.bn(y), y))(m.conv(x)),
        ["kept", "kept"],
        {"graph_output", "not_called"},
    ),
    "conv-used-twice-with-two-norms": (
        lambda m, x: m.bn(m.conv(x)) + m.bn2(m.conv(x + 1)),
        ["kept", "kept"],
        {"shared_parameter", "graph_output"},
    ),
    "conv-without-bias-used-twice-with-two-norms": (
        lambda m, x: m.bn(m.other(x)) + m.bn2(m.other(x + 1)),
        ["kept", "kept"],
        {"shared_parameter", "graph_output"},
    ),
    "one-norm-after-two-convs-and-once-after-nothing": (
        lambda m, x: m.bn(m.conv(x)) + m.bn(m.other(x)) + m.bn(x.relu()),
        ["kept", "kept", "kept", "kept"],
        {"shared_parameter", "nonlinear", "no_module", "not_called", "graph_output"},
    ),
    "one-norm-twice-in-a-row": (
        lambda m, x: m.bn(m.bn(m.conv(x))),
        ["folded", "folded", "kept"],
        {"not_called"},
    ),
    "siamese": (
        lambda m, x: m.bn(m.conv(x)) * m.bn(m.conv(x + 1)),
        ["folded", "folded", "kept"],
        {"not_called"},
    ),
    "siamese-without-bias": (
        lambda m, x: m.bn(m.other(x)) * m.bn(m.other(x + 1)),
        ["folded", "folded", "kept"],
        {"not_called"},
    ),
    "siamese-in-different-order": (
        lambda m, x: m.bn2(m.bn(m.conv(x))) * m.bn(m.bn2(m.conv(x + 1))),
        ["kept", "kept", "kept", "kept"],
        {"shared_parameter", "unsupported_op", "graph_output"},
    ),
    "norm-in-front-of-one-call-of-a-conv": (
        lambda m, x: m.conv(m.bn(x)) + m.conv(x.relu()),
        ["kept", "kept"],
        {"no_producer", "shared_parameter", "not_called"},
    ),
    "norm-in-front-of-both-calls-of-a-conv": (
        lambda m, x: m.conv(m.bn(x)) * m.conv(m.bn(x + 1)),
        ["folded", "folded", "kept"],
        {"not_called"},
    ),
    "two-norms-in-front-of-one-conv": (
        lambda m, x: m.conv(m.bn(x)) + m.conv(m.bn2(x.relu())),
        ["kept", "kept"],
        {"no_producer", "nonlinear", "shared_parameter"},
    ),
    "norm-in-front-of-a-conv-whose-weight-is-read-too": (
        lambda m, x: m.conv(m.bn(x)) * m.conv.weight.sum(),
        ["kept", "kept"],
        {"no_producer", "shared_parameter", "not_called"},
    ),
    "one-norm-called-twice-in-front-of-two-convs": (
        lambda m, x: m.conv(m.bn(x)) + m.other(m.bn(x)),
        ["folded", "folded", "kept"],
        {"not_called"},
    ),
    "parallel-branches-called-twice": (
        lambda m, x: (lambda block: block(block(x).relu()))(lambda z: m.bn(m.conv(z)) + m.bn2(m.other(z))),
        ["folded"] * 4,
        set(),
    ),
}


@pytest.mark.parametrize("name", list(SHARED))
def test_trap_06_every_call_site_is_counted(name):
    function, expected, reasons = SHARED[name]
    module = convs_and_norms(function)
    result = fold(module, (randn(2, 3, 5, 5),))
    assert Counter(verdicts(result)) == Counter(expected), [site.to_dict() for site in result.sites]
    assert codes(result) == reasons
    assert_same(module, result.model, (randn(2, 3, 5, 5),))
    assert fold(result.model, (randn(2, 3, 5, 5),)).folded == 0


def test_trap_06_one_norm_called_twice_on_one_tensor_goes_at_both():
    module = convs_and_norms(lambda m, x: (lambda y: (m.bn(y), m.bn(y)))(m.conv(x)))
    assert batch_norms(assert_folds(module, randn(2, 3, 5, 5), left=1)) == ["bn2"]
    assert_program_folds(export(module, randn(2, 3, 5, 5)), randn(2, 3, 5, 5))


def test_trap_06_in_a_program_each_call_gets_a_weight_of_its_own():
    module = convs_and_norms(lambda m, x: m.bn(m.other(x)) + m.bn2(m.other(x + 1)) + m.other(x - 1))
    program = export(module, randn(2, 3, 5, 5))
    folded = assert_program_folds(program, randn(2, 3, 5, 5))
    assert torch.equal(folded.state_dict["other.weight"], module.other.weight)
    assert sum(t.ndim == 4 for t in folded.state_dict.values()) == 3 + 1  # conv is not called, and stays


class Heads(nn.Module):
    """Five norms at ten sites: each behind a conv of its own on two paths."""

    def __init__(self, spoil=False):
        super().__init__()
        self.left = nn.ModuleList([nn.Conv2d(3, 3, 1, bias=False) for _ in range(5)])
        self.right = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(5)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(3) for _ in range(5)])
        self.spoil = spoil

    def forward(self, x):
        y = x
        for i, norm in enumerate(self.norms):
            x = norm(self.left[i](x)).relu()
            z = self.right[i](y)
            y = norm(z.tanh() if self.spoil and i == 2 else z).relu()
        return x, y


def test_trap_07_five_norms_at_ten_sites_fold_fully():
    module = double(Heads())
    folded = assert_folds(module, randn(2, 3, 5, 5))
    assert batch_norms(folded) == []
    assert len(fold(module, (randn(2, 3, 5, 5),)).sites) == 10


def test_trap_07_a_norm_with_one_bad_site_stays_at_both():
    module = double(Heads(spoil=True))
    result = fold(module, (randn(2, 3, 5, 5),))
    assert batch_norms(result.model) == ["norms.2"]
    assert Counter(verdicts(result)) == {"folded": 8, "kept": 2}
    assert codes(result) == {"shared_parameter", "nonlinear"}
    assert_same(module, result.model, (randn(2, 3, 5, 5),))


def test_trap_07_in_a_program_the_good_site_folds():
    program = export(double(Heads(spoil=True)), randn(2, 3, 5, 5))
    assert_program_folds(program, randn(2, 3, 5, 5), left=1)


# ---- 8: Linear and BatchNorm1d on different axes -------------------------------------------------

UNBATCHED = [
    pytest.param(nn.Linear(5, 4), nn.BatchNorm1d(4), (3, 4, 5), id="linear-l-is-c"),
    pytest.param(nn.Linear(5, 6), nn.BatchNorm1d(4), (3, 4, 5), id="linear-l-is-not-c"),
    pytest.param(nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4), (4, 4), id="unbatched-conv1d-l-is-c"),
    pytest.param(nn.ConvTranspose1d(4, 4, 1), nn.BatchNorm1d(4), (4, 4), id="unbatched-conv-transpose1d"),
    pytest.param(nn.Conv2d(4, 4, 1), nn.BatchNorm1d(4), (4, 4, 4), id="unbatched-conv2d"),
]


@pytest.mark.parametrize(("layer", "norm", "shape"), UNBATCHED)
def test_trap_08_the_norm_s_axis_is_not_the_layer_s(layer, norm, shape):
    module = double(nn.Sequential(layer, norm))
    assert_keeps(module, randn(*shape), reason="axis_mismatch")
    assert_program_keeps(export(module, randn(*shape)), randn(*shape), reason="axis_mismatch")


# ---- 9: biases and affines that are there or not -------------------------------------------------


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "no-affine"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d, nn.Linear])
def test_trap_09_bias_and_affine(layer, bias, affine):
    linear = layer is nn.Linear
    options = {"bias": bias} if linear else {"bias": bias, "kernel_size": 1}
    norm = (nn.BatchNorm1d if linear else nn.BatchNorm2d)(4, affine=affine)
    shape = (5, 3) if linear else (2, 3, 4, 4)
    module = double(nn.Sequential(layer(3, 4, **options), norm))
    assert_folds(module, randn(*shape))
    for program in (export(module, randn(*shape)), decomposed(export(module, randn(*shape)))):
        assert_program_folds(program, randn(*shape))


def test_trap_09_norm_with_a_weight_and_no_bias():
    module = double(conv_bn())
    module[1].bias = None
    assert_folds(module, randn(2, 3, 6, 6))


def test_trap_09_addmm_with_factors():
    module = Through(
        lambda self, x: self.bn(torch.addmm(self.c, x, self.w, beta=0.5, alpha=3.0)),
        c=nn.Parameter(torch.zeros(4)),
        w=nn.Parameter(torch.zeros(5, 4)),
        bn=nn.BatchNorm1d(4),
    )
    module = double(module)
    assert_keeps(module, randn(3, 5), reason="no_module")
    assert_program_folds(export(module, randn(3, 5)), randn(3, 5))


# ---- 8 and 10: tied and shared storage; names ----------------------------------------------------


def test_trap_10_one_storage_under_two_parameters():
    module = double(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)))
    module[2].weight = nn.Parameter(module[0].weight.data.view(3, 3, 1, 1))
    assert module[2].weight is not module[0].weight
    assert_keeps(module, randn(2, 3, 5, 5), reason="shared_parameter")


def test_trap_10_tied_weights():
    module = double(nn.Sequential(conv_bn(3, 3), nn.ReLU(), conv_bn(3, 3)))
    module[2][0].weight = module[0][0].weight
    assert_keeps(module, randn(2, 3, 5, 5), reason="shared_parameter")


def test_trap_10_tied_weights_in_a_program_are_cloned():
    module = double(nn.Sequential(conv_bn(3, 3), nn.ReLU(), conv_bn(3, 3)))
    module[2][0].weight = module[0][0].weight
    assert_program_folds(export(module, randn(2, 3, 5, 5)), randn(2, 3, 5, 5))


def test_trap_10_a_view_of_the_weight_as_plain_attribute():
    module = Through(lambda self, x: self.body(x) * self.view.sum(), body=double(conv_bn(3, 3, bias=False)))
    module.view = module.body[0].weight.detach()[0]
    assert_keeps(module.eval(), randn(2, 3, 5, 5), reason="shared_parameter")


def test_trap_10_new_names_meet_old_ones():
    """A parameter already has the name that the new bias would like."""
    module = nn.Module()
    module.conv = nn.Conv2d(3, 4, 1, bias=False)
    module.bn = nn.BatchNorm2d(4)
    program = export(
        double(Through(lambda self, x: self.bn(self.conv(x)), conv=module.conv, bn=module.bn)),
        randn(2, 3, 4, 4),
    )
    program.state_dict["conv.bias"] = torch.ones(1)
    folded = fold(program).model
    assert torch.equal(folded.state_dict["conv.bias"], torch.ones(1))
    assert folded.state_dict["conv.bias_1"].shape == (4,)


# ---- 11: narrow dtypes ---------------------------------------------------------------------------


def narrow(dtype, gamma, var, weight):
    module = conv_bn(3, 4, bias=False)
    with torch.no_grad():
        module[0].weight.fill_(weight)
        module[1].weight.fill_(gamma)
        module[1].running_var.fill_(var)
    return module.to(dtype).eval()


def test_trap_11_scale_that_overflows_fp16_though_the_product_fits():
    module = narrow(torch.float16, 300.0, 1e-6, 3e-3)
    module[1].eps = 1e-7
    folded = fold(module, (torch.randn(1, 3, 4, 4).half(),)).model
    assert batch_norms(folded) == []
    s = 300 / (module[1].running_var.double() + 1e-7).sqrt()
    assert s.max() > torch.finfo(torch.float16).max
    exact = module[0].weight.double() * s.reshape(4, 1, 1, 1)
    assert torch.equal(folded[0].weight, exact.half())


def test_trap_11_product_that_overflows_fp16():
    module = narrow(torch.float16, 300.0, 1e-6, 3.0)
    result = fold(module, (torch.randn(1, 3, 4, 4).half(),))
    assert codes(result) == {"range_overflow", "graph_output"}
    assert batch_norms(result.model) == ["1"]


def test_trap_11_bfloat16_is_rounded_once():
    module = perturbed(conv_bn().to(torch.bfloat16))
    folded = fold(module, (torch.randn(1, 3, 4, 4).bfloat16(),)).model
    s = module[1].weight.double() / (module[1].running_var.double() + module[1].eps).sqrt()
    exact = module[0].weight.double() * s.reshape(4, 1, 1, 1)
    assert torch.equal(folded[0].weight, exact.bfloat16())
    t = module[1].bias.double() - module[1].running_mean.double() * s
    assert torch.equal(folded[0].bias, (module[0].bias.double() * s + t).bfloat16())


def test_trap_11_half_conv_and_single_norm():
    module = perturbed(conv_bn(3, 4, bias=False))
    module[0].half()
    folded = fold(module, (torch.randn(1, 3, 4, 4).half(),)).model
    assert folded[0].bias.dtype is torch.float16


# ---- 14 and 15 -----------------------------------------------------------------------------------


def test_trap_14_pairs_are_made_by_dataflow_not_by_registration():
    """Registered conv, bn, but called conv, relu, bn; and bn, conv called in order of conv, bn."""
    across = Through(lambda m, x: m.bn(m.conv(x).relu()), conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3))
    assert_keeps(double(across), randn(2, 3, 4, 4), reason="nonlinear")
    reverse = Through(lambda m, x: m.bn(m.conv(x)), bn=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 3, 1))
    assert_folds(double(reverse), randn(2, 3, 4, 4))


FORWARD = [
    pytest.param(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 5), 0, id="conv"),
    pytest.param(nn.BatchNorm1d(4), nn.Linear(4, 3), (5, 4), 0, id="linear"),
    pytest.param(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1, groups=2), (2, 4, 5, 5), 0, id="pointwise"),
    pytest.param(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5), 1, id="padded"),
    pytest.param(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 5, 5), 1, id="same"),
    pytest.param(
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        (2, 4, 5, 5),
        0,
        id="circular-is-no-zero-padding",
    ),
    pytest.param(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5), 1, id="conv-transpose"),
]


@pytest.mark.parametrize(("norm", "layer", "shape", "adds"), FORWARD)
def test_trap_14_norm_in_front_of_the_layer(norm, layer, shape, adds):
    """Padding takes the scale and leaves the shift as an Add in front."""
    module = double(nn.Sequential(norm, layer))
    folded = assert_folds(module, randn(*shape))
    assert batch_norms(folded) == []
    assert [key for key in folded.state_dict() if key.startswith("0.")] == ["0.shift.bias"] * adds
    program = assert_program_folds(export(module, randn(*shape)), randn(*shape))
    assert sum("aten.add" in str(node.target) for node in program.graph.nodes) == adds


@pytest.mark.parametrize(("norm", "layer", "shape", "adds"), FORWARD)
def test_trap_14_norm_in_front_of_the_layer_that_the_caller_sees(norm, layer, shape, adds):
    module = Through(lambda m, x: (lambda y: (m.layer(y), y))(m.norm(x)), norm=norm, layer=layer)
    result = assert_keeps(double(module), randn(*shape), reason="no_producer")
    assert codes(result) == {"no_producer", "graph_output"}


def test_trap_15_second_run_does_not_fold_across_the_activation():
    """conv, bn, relu, bn: after the first fold the second norm still stands behind the relu."""
    module = double(nn.Sequential(*conv_bn(3, 3), nn.ReLU(), nn.BatchNorm2d(3)))
    folded = assert_folds(module, randn(2, 3, 4, 4), left=1)
    assert batch_norms(folded) == ["3"]


@pytest.mark.parametrize("decompose", [False, True], ids=["exported", "decomposed"])
def test_trap_15_what_stays_behind_of_a_norm_is_folded_at_once_too(decompose):
    """An Add would stay in front of a padded conv; the conv before the sum takes it in, nothing more."""

    def function(m, x):
        x = x.relu()
        return m.padded(m.bn(x + m.mix(F.adaptive_avg_pool2d(x, 1))))

    convs = {"mix": nn.Conv2d(4, 4, 1), "padded": nn.Conv2d(4, 4, 3, padding=1)}
    module, x = double(Through(function, **convs, bn=nn.BatchNorm2d(4))), randn(2, 4, 6, 6)
    assert isinstance(assert_folds(module, x).bn, nn.Identity)
    program = export(module, x)
    folded = assert_program_folds(decomposed(program) if decompose else program, x)
    assert [str(node.target) for node in folded.graph.nodes].count("aten.add.Tensor") == 1


# ---- 19, 22, 23 ----------------------------------------------------------------------------------


class WrittenWeight(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.register_buffer("w", torch.zeros(3, 3, 1, 1))
        self.write = write

    def forward(self, x):
        self.write(self.w)
        return self.bn(F.conv2d(x, self.w, self.conv.bias))


WRITES = {
    "directly": lambda w: w.mul_(0.5),
    "through-a-view": lambda w: w.view(-1).mul_(0.5),
    "through-an-element": lambda w: w[0].mul_(0.5),
    "through-a-slice-of-a-transpose": lambda w: w.transpose(0, 1)[1:].add_(0.5),
    "by-copying": lambda w: w.copy_(w * 0.5),
}


@pytest.mark.parametrize("decompose", [False, True], ids=["exported", "decomposed"])
@pytest.mark.parametrize("name", list(WRITES))
def test_trap_19_weight_that_forward_changes_is_no_constant(name, decompose):
    module = double(WrittenWeight(WRITES[name]))
    program = export(module, randn(2, 3, 4, 4))
    result = fold(decomposed(program) if decompose else program)
    assert result.folded == 0
    assert "dynamic_weight" in codes(result)
    result = fold(module, (randn(2, 3, 4, 4),))
    assert result.folded == 0
    assert "dynamic_weight" in codes(result)


@pytest.mark.parametrize("var", [0.0, 5.6e-45, 1e-30], ids=["zero", "denormal", "tiny"])
def test_trap_22_small_variances(var):
    module = double(conv_bn())
    with torch.no_grad():
        module[1].running_var[0] = var
    assert_folds(module, randn(2, 3, 6, 6))


@pytest.mark.parametrize("gamma", [0.0, -2.0, 2557.0], ids=["zero", "negative", "large"])
def test_trap_22_odd_scales(gamma):
    module = double(conv_bn())
    with torch.no_grad():
        module[1].weight[0] = gamma
    assert_folds(module, randn(2, 3, 6, 6))


@pytest.mark.parametrize("var", [float("nan"), -1.0], ids=["nan", "negative"])
def test_trap_22_statistics_that_are_none(var):
    module = double(conv_bn())
    with torch.no_grad():
        module[1].running_var[0] = var
    result = fold(module, (randn(2, 3, 6, 6),))
    assert codes(result) == {"degenerate_stats"}


def test_trap_23_norm_parameters_that_are_computed():
    module = Through(
        lambda self, x, g: F.batch_norm(self.conv(x), self.mean, self.running_var, g, None),
        conv=nn.Conv2d(3, 3, 1),
        mean=nn.Buffer(torch.zeros(3)),
        running_var=nn.Buffer(torch.zeros(3)),
    )
    module = double(module)
    program = export(module, randn(2, 3, 4, 4), randn(3))
    assert_program_keeps(program, randn(2, 3, 4, 4), randn(3), reason="dynamic_weight")


def test_trap_23_fake_quantised_weight():
    def function(self, x):
        weight = torch.fake_quantize_per_tensor_affine(self.conv.weight, 0.1, 0, -128, 127)
        return self.bn(F.conv2d(x, weight, self.conv.bias))

    module = perturbed(Through(function, conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3)))
    result = fold(module, (torch.randn(2, 3, 4, 4),))
    assert result.folded == 0
    assert "dynamic_weight" in codes(result)


# ---- 21: what rebuilding tools lose --------------------------------------------------------------


def test_trap_21_hook_on_the_norm_runs_and_flags_stay():
    module = double(conv_bn()).to(memory_format=torch.channels_last)
    module[0].weight.requires_grad_(False)
    module[1].register_forward_hook(lambda m, i, out: out * 2)
    x = randn(2, 3, 6, 6)
    folded = assert_folds(module, x)
    assert not folded[0].weight.requires_grad
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_trap_21_subclass_with_an_activation_folds():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, nn.SiLU(inplace=True)), nn.Dropout(0.1))
    assert batch_norms(assert_folds(double(module), randn(2, 3, 6, 6))) == []


# ---- 24: what the exporter does on its own -------------------------------------------------------


def test_trap_24_norms_are_counted_before_any_exporter_folds_them():
    """torch.onnx.export at its default folds on its own; normtool reads the module itself."""
    module = perturbed(conv_bn(bias=False))
    x = torch.randn(1, 3, 6, 6)
    counted = normtool.scan(module, (x,))
    assert [norm["kind"] for norm in counted.to_dict()["norms"]] == ["batch_norm"]
    before = copy.deepcopy(module.state_dict())
    result = normtool.fold(module, (x,), validate=False)
    assert result.before.learnable - result.after.learnable == 4  # γ and β go, a bias comes
    assert result.before.buffers - result.after.buffers == 2 * 4 + 1
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())


def test_nothing_is_leaked():
    """Warnings are errors here, so folding under the exporter's own warnings shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = double(conv_bn())
        normtool.fold(module, (randn(1, 3, 6, 6),), validate=False)
        program = normtool.load(module, (randn(1, 3, 6, 6),)).exported
        normtool.fold(program, validate=False)
