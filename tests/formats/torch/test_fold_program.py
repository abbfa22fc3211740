"""Folding an ExportedProgram: the op goes out, the signature follows, and the file loads without normtool."""

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.export import Dim
from torch.export.graph_signature import InputKind

import normtool
from normtool.errors import StalePlan, UsageError
from tests.formats.torch.checks import (
    assert_program_folds,
    assert_program_keeps,
    assert_same,
    codes,
    decomposed,
    double,
    export,
    fold,
    norm_calls,
    randn,
    run,
    snapshot,
    verdicts,
)
from tests.formats.torch.test_fold_module import BatchNormAct2d, Swish, Through, conv_bn

IMAGE = (2, 3, 6, 6)

forms = pytest.mark.parametrize("form", [lambda p: p, decomposed], ids=["exported", "decomposed"])


def targets(program):
    return [spec.target for spec in program.graph_signature.input_specs if spec.target]


# ---- what becomes of the signature -----------------------------------------------------------------------


@forms
def test_parameters_of_the_norm_leave_the_program(form):
    module = double(nn.Sequential(conv_bn(bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    folded = assert_program_folds(form(export(module, randn(*IMAGE))), randn(*IMAGE))
    assert set(targets(folded)) == set(folded.state_dict) == {"0.0.weight", "0.0.bias", "2.weight", "2.bias"}
    kinds = {spec.kind for spec in folded.graph_signature.input_specs}
    assert kinds == {InputKind.PARAMETER, InputKind.USER_INPUT}
    assert all(isinstance(tensor, nn.Parameter) for tensor in folded.state_dict.values())


@forms
def test_running_count_goes_with_the_last_call_of_its_norm(form):
    module = Through(
        lambda m, x: m.bn(m.conv(x)) + m.bn(x.tanh()), conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3)
    )
    folded = assert_program_folds(form(export(double(module), randn(*IMAGE))), randn(*IMAGE), left=1)
    assert "bn.running_mean" in folded.state_dict
    assert "bn.num_batches_tracked" in folded.state_dict


@forms
def test_norm_that_is_the_model_s_output(form):
    program = form(export(double(conv_bn()), randn(*IMAGE)))
    folded = assert_program_folds(program, randn(*IMAGE))
    assert folded.graph_signature.user_outputs != program.graph_signature.user_outputs


@forms
def test_several_outputs_keep_their_order_and_structure(form):
    module = Through(lambda m, x: {"raw": m.a(x), "both": (m.b(x).relu(), x * 1)}, a=conv_bn(), b=conv_bn(3, 5))
    program = form(export(double(module), randn(*IMAGE)))
    folded = assert_program_folds(program, randn(*IMAGE))
    assert set(run(folded)(randn(*IMAGE))) == {"raw", "both"}


def test_the_same_output_twice():
    module = Through(lambda m, x: (lambda y: (y, y.relu(), y))(m.body(x)), body=conv_bn())
    assert_program_folds(export(double(module), randn(*IMAGE)), randn(*IMAGE))


def test_preserved_module_calls_follow():
    module = nn.Sequential(conv_bn(), nn.ReLU())
    program = export(double(module), randn(*IMAGE), preserve_module_call_signature=("0",))
    folded = assert_program_folds(program, randn(*IMAGE))
    named = [entry for entry in folded.module_call_graph if entry.signature is not None]
    nodes = {node.name for node in folded.graph.nodes}
    arguments = [a for entry in named for a in (*entry.signature.inputs, *entry.signature.outputs)]
    assert {argument.name for argument in arguments} <= nodes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(module, torch.export.unflatten(folded), (randn(*IMAGE),))


def test_arguments_with_names_of_python_s_own():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = conv_bn()

        def forward(self, input, max):
            return self.body(input) + max

    module = double(Named())
    assert_program_folds(export(module, randn(*IMAGE), randn(1)), randn(*IMAGE), randn(1))


def test_non_persistent_buffers_and_lifted_constants_stay():
    module = conv_bn()
    module.register_buffer("hidden", torch.zeros(4, 1, 1), persistent=False)
    shifted = Through(lambda m, x: m.body(x) * torch.tensor([2.0, 3, 4, 5]).reshape(4, 1, 1) + m.body.hidden)
    shifted.body = module
    forward = module.forward
    shifted = double(shifted)
    program = export(shifted, randn(*IMAGE))
    assert forward is not None
    folded = assert_program_folds(program, randn(*IMAGE))
    assert "body.hidden" in folded.constants


def test_user_inputs_that_nobody_reads_stay():
    module = Through(lambda m, x, unused: m.body(x), body=conv_bn())
    assert_program_folds(export(double(module), randn(*IMAGE), randn(1)), randn(*IMAGE), randn(1))


# ---- open shapes -----------------------------------------------------------------------------------------


@forms
def test_open_dimensions_stay_open(form):
    shapes = ({0: Dim("n", max=64), 2: Dim("h", min=4, max=32)},)
    program = form(export(double(conv_bn()), randn(*IMAGE), dynamic_shapes=shapes))
    folded = assert_program_folds(program, randn(*IMAGE))
    assert str(folded.range_constraints) == str(program.range_constraints)
    assert_same(run(program), run(folded), (randn(5, 3, 9, 6),))
    with pytest.raises(Exception, match=r"(?i)h|shape|guard"):
        run(folded)(randn(5, 3, 64, 6))


def test_linear_with_an_open_batch():
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    for form in (export(double(module), randn(6, 5), dynamic_shapes=({0: Dim("n")},)),):
        for program in (form, decomposed(form)):
            folded = assert_program_folds(program, randn(6, 5))
            assert_same(run(program), run(folded), (randn(11, 5),))


# ---- ops that a module's own code makes --------------------------------------------------------------------


def functional(m, x):
    y = F.conv2d(x, m.conv.weight)
    return F.batch_norm(y, m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias)


FOLDS = {
    "functional-norm": functional,
    "multiplied-before": lambda m, x: m.bn(m.conv(x) * 3.0),
    "multiplied-after": lambda m, x: (m.bn(m.conv(x)) * 3.0 - m.c).relu(),
    "subtracted-from": lambda m, x: 2.0 - m.bn(m.c - m.conv(x)),
    "divided": lambda m, x: m.bn(m.conv(x) / 4.0) / m.c,
    "in-place": lambda m, x: m.bn(m.conv(x)).mul_(2.0).add_(m.c).relu_(),
    "written-before": lambda m, x: (lambda y: (y.mul_(2), m.bn(y))[1])(m.conv(x)),
    "residual-in-place": lambda m, x: m.bn(m.conv(x)).add_(x),
    "with-activation": lambda m, x: m.bn(m.conv(x)) * torch.sigmoid(x),
}


@forms
@pytest.mark.parametrize("name", list(FOLDS))
def test_constants_around_the_norm(name, form):
    members = {"conv": nn.Conv2d(3, 3, 1, bias=False), "bn": nn.BatchNorm2d(3)}
    module = double(Through(FOLDS[name], **members, c=nn.Parameter(torch.zeros(3, 1, 1))))
    assert_program_folds(form(export(module, randn(*IMAGE))), randn(*IMAGE))


MATRICES = {
    "matmul": lambda m, x: m.bn(x @ m.w),
    "matmul-plus-bias": lambda m, x: m.bn(x @ m.w + m.b),
    "matmul-plus-number": lambda m, x: m.bn(x @ m.w + 1.0),
    "number-plus-matmul": lambda m, x: m.bn(1.0 + x @ m.w),
    "matmul-minus-bias": lambda m, x: m.bn(x @ m.w - m.b),
    "matmul-then-scaled": lambda m, x: m.bn(x @ m.w) * 3.0,
    "matmul-in-place": lambda m, x: m.bn((x @ m.w).add_(m.b)),
    "mm": lambda m, x: m.bn(torch.mm(x, m.w)).relu(),
    "transposed-weight": lambda m, x: m.bn(x @ m.v.t()),
    "addmm-with-factors": lambda m, x: m.bn(torch.addmm(m.b, x, m.w, beta=0.5, alpha=3.0)),
    "addmm-with-scalar-bias": lambda m, x: m.bn(torch.addmm(m.one, x, m.w)),
    "linear": lambda m, x: m.bn(F.linear(x, m.v, bias=m.b)),
}


@forms
@pytest.mark.parametrize("name", list(MATRICES))
def test_matrix_products(name, form):
    module = Through(MATRICES[name], bn=nn.BatchNorm1d(4), w=nn.Parameter(torch.zeros(5, 4)))
    module.v, module.b = nn.Parameter(torch.zeros(4, 5)), nn.Parameter(torch.zeros(4))
    module.one = nn.Parameter(torch.zeros(1))
    program = form(export(double(module), randn(6, 5)))
    folded = assert_program_folds(program, randn(6, 5))
    assert all(node.users or node.op in ("output", "placeholder") for node in folded.graph.nodes)


def test_channels_in_front_of_a_matmul():
    """W·x with the norm on the rows of the product: axis 1 of three."""
    module = Through(lambda m, x: m.bn(m.w @ x), bn=nn.BatchNorm1d(4), w=nn.Parameter(torch.zeros(4, 5)))
    assert_program_folds(export(double(module), randn(2, 5, 3)), randn(2, 5, 3))


def test_computed_weight_is_replaced_and_its_computation_goes():
    module = Through(
        lambda m, x: m.bn(F.conv2d(x, m.w.transpose(0, 1) * 2.0)),
        bn=nn.BatchNorm2d(4),
        w=nn.Parameter(torch.zeros(3, 4, 1, 1)),
    )
    folded = assert_program_folds(export(double(module), randn(*IMAGE)), randn(*IMAGE))
    assert [node.op for node in folded.graph.nodes].count("call_function") == 1
    assert "w" not in folded.state_dict


def test_integer_constant_times_a_fraction():
    """0.5 beside integers is 0.5: as an integer it would be 0."""
    module = Through(
        lambda m, x: m.bn(m.conv(x) * (m.count * 0.5)),
        conv=nn.Conv2d(3, 3, 1),
        bn=nn.BatchNorm2d(3),
        count=nn.Buffer(torch.tensor([[[1]], [[2]], [[3]]])),
    )
    assert_program_folds(export(double(module), randn(*IMAGE)), randn(*IMAGE))


def test_weight_that_is_a_buffer_stays_one():
    module = Through(
        lambda m, x: m.bn(F.conv2d(x, m.w)), bn=nn.BatchNorm2d(4), w=nn.Buffer(torch.zeros(4, 3, 1, 1))
    )
    folded = assert_program_folds(export(double(module), randn(*IMAGE)), randn(*IMAGE))
    assert not isinstance(folded.state_dict["w"], nn.Parameter)


@forms
def test_subclass_with_an_activation(form):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, Swish()))
    assert_program_folds(form(export(double(module), randn(*IMAGE))), randn(*IMAGE))


def test_weights_keep_format_gradient_wish_and_dtype():
    module = double(conv_bn(bias=False)).to(memory_format=torch.channels_last)
    module[0].weight.requires_grad_(False)
    folded = assert_program_folds(export(module, randn(*IMAGE)), randn(*IMAGE))
    weight, bias = folded.state_dict["0.weight"], folded.state_dict["0.bias"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.requires_grad
    assert not bias.requires_grad


# ---- what stays ---------------------------------------------------------------------------------------------


@forms
def test_saved_statistics_that_are_read_keep_the_norm(form):
    module = Through(
        lambda m, x: torch.native_batch_norm(
            m.conv(x), m.bn.weight, m.bn.bias, m.bn.running_mean, m.bn.running_var, False, 0.1, 1e-5
        )[:2],
        conv=nn.Conv2d(3, 3, 1),
        bn=nn.BatchNorm2d(3),
    )
    program = form(export(double(module), randn(*IMAGE)))
    result = fold(program)
    assert result.folded == 0
    assert "multiple_readers" in codes(result)
    assert norm_calls(result.model) == 1


KEPT = {
    "relu-between": (lambda m, x: m.bn(m.conv(x).relu()), "nonlinear"),
    "read-twice": (lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)), "multiple_readers"),
    "also-an-output": (lambda m, x: (lambda y: (m.bn(y), y))(m.conv(x)), "graph_output"),
    "on-the-input": (lambda m, x: m.bn(x), "no_producer"),
    "on-the-input-and-behind-a-relu": (lambda m, x: m.conv(m.bn(x).relu()), "no_producer"),
    "divided-with-rounding": (
        lambda m, x: m.bn(torch.div(m.conv(x), 2.0, rounding_mode="floor")),
        "unsupported_op",
    ),
    "added-with-alpha": (lambda m, x: m.bn(torch.add(m.conv(x), m.c, alpha=2)), "unsupported_op"),
    "cast-to-integers-between": (lambda m, x: m.bn(m.conv(x).int().double()), "unsupported_op"),
}


@pytest.mark.parametrize("name", list(KEPT))
def test_norm_is_kept(name):
    function, reason = KEPT[name]
    members = {"conv": nn.Conv2d(3, 3, 1), "bn": nn.BatchNorm2d(3), "c": nn.Parameter(torch.zeros(3, 1, 1))}
    program = export(double(Through(function, **members)), randn(*IMAGE))
    result = assert_program_keeps(program, randn(*IMAGE), reason=reason)
    ahead = "nonlinear" if "behind" in name else "graph_output"
    assert codes(result) == {reason, ahead}


# ---- what goes forward --------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("padding", [0, 1], ids=["all-of-it", "all-but-the-shift"])
def test_norm_on_the_input(form, padding):
    module = Through(
        lambda m, x: m.conv(m.bn(x)), conv=nn.Conv2d(3, 4, 3, padding=padding), bn=nn.BatchNorm2d(3)
    )
    folded = assert_program_folds(form(export(double(module), randn(*IMAGE))), randn(*IMAGE))
    assert [str(node.target) for node in folded.graph.nodes].count("aten.add.Tensor") == padding


def test_norm_behind_a_cast_between_floats():
    """A cast is a rounding, as there are others: the map passes it."""
    module = Through(
        lambda m, x: m.bn(m.conv(x).float().double()), conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3)
    )
    program = export(double(module), randn(*IMAGE))
    result = fold(program)
    assert (result.folded, norm_calls(result.model)) == (1, 0)
    expected, found = run(program)(randn(*IMAGE)), run(result.model)(randn(*IMAGE))
    assert 1e-12 < (expected - found).abs().max() / expected.abs().max() < 2**-22


class LayerNormOfMyOwn(nn.Module):
    def forward(self, x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


@forms
def test_norm_of_ones_own_behind_what_puts_out_two_tensors(form):
    """In core ATen a max pool has indices too, and its readers read a getitem of it."""
    module = Through(lambda m, x: m.norm(F.max_pool2d(m.body(x), 2)), norm=LayerNormOfMyOwn(), body=conv_bn())
    program = form(export(double(module), randn(*IMAGE)))
    assert [norm.norm.kind for norm in normtool.scan(program).norms] == ["batch_norm", "layer_norm"]
    folded = fold(program)
    assert {site.norm.kind: site.verdict for site in folded.sites} == {
        "batch_norm": "folded",
        "layer_norm": "kept",
    }
    assert_same(run(program), run(folded.model), (randn(*IMAGE),))


def test_inplace_is_refused():
    with pytest.raises(UsageError, match="inplace"):
        normtool.fold(export(double(conv_bn()), randn(*IMAGE)), validate=False, inplace=True)


def test_plan_of_another_program_is_refused():
    one, other = (export(double(conv_bn(), seed), randn(*IMAGE)) for seed in (1, 2))
    with pytest.raises(StalePlan):
        normtool.apply(other, normtool.plan(one))


def test_parameters_of_two_programs_are_not_written():
    """Two programs of one module share its tensors."""
    module = double(conv_bn())
    one, other = export(module, randn(*IMAGE)), export(module, randn(*IMAGE))
    before, weights = snapshot(other), module[0].weight.clone()
    folded = assert_program_folds(one, randn(*IMAGE))
    assert snapshot(other) == before
    assert torch.equal(module[0].weight, weights)
    assert folded.state_dict["0.weight"] is not module[0].weight


def test_untouched_tensors_are_shared_with_the_original():
    module = double(nn.Sequential(conv_bn(), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    program = export(module, randn(*IMAGE))
    folded = assert_program_folds(program, randn(*IMAGE))
    assert folded.state_dict["2.weight"] is program.state_dict["2.weight"]


# ---- files ---------------------------------------------------------------------------------------------------

ELSEWHERE = """
import sys, warnings
sys.modules["normtool"] = None
warnings.simplefilter("ignore")
import torch
program = torch.export.load(sys.argv[1])
x = torch.load(sys.argv[2], weights_only=True)
torch.save([program.module()(each) for each in x], sys.argv[3])
"""


@pytest.mark.parametrize("open_batch", [False, True], ids=["static", "open-batch"])
def test_saved_program_loads_and_runs_without_normtool(tmp_path, open_batch):
    shapes = ({0: Dim("n")},) if open_batch else None
    layers = [conv_bn(3, 4, bias=False), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)]
    module = double(nn.Sequential(*layers))
    program = export(module, randn(*IMAGE), dynamic_shapes=shapes)
    result = fold(program)
    assert verdicts(result) == ["folded", "folded"]
    result.save(tmp_path / "folded.pt2")
    examples = [randn(*IMAGE), randn(7, 3, 6, 6)] if open_batch else [randn(*IMAGE)]
    torch.save(examples, tmp_path / "x.pt")
    names = [str(tmp_path / name) for name in ("folded.pt2", "x.pt", "y.pt")]
    command = [sys.executable, "-c", textwrap.dedent(ELSEWHERE), *names]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    for x, y in zip(examples, torch.load(tmp_path / "y.pt", weights_only=True), strict=True):
        torch.testing.assert_close(y, module(x), rtol=1e-10, atol=1e-10)
    again = normtool.fold(tmp_path / "folded.pt2", validate=False)
    assert again.sites == ()


def test_file_that_was_saved_folds_like_the_program_in_memory(tmp_path):
    program = export(double(conv_bn(bias=False)), randn(*IMAGE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, tmp_path / "m.pt2")
    from_file = normtool.fold(tmp_path / "m.pt2", validate=False).model
    in_memory = fold(program).model
    assert set(from_file.state_dict) == set(in_memory.state_dict)
    assert all(torch.equal(t, from_file.state_dict[name]) for name, t in in_memory.state_dict.items())
    assert_same(run(program), run(from_file), (randn(*IMAGE),))
