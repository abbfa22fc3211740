"""ExportedProgram → ModelGraph: kinds, slots, owners, and what is written in place."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import normtool
from normtool.ops import UNKNOWN
from normtool.values import to_array
from tests.formats.torch.checks import decomposed, double, export, randn
from tests.formats.torch.test_fold_module import Through, conv_bn

IMAGE = (2, 3, 6, 6)


def read(module, *inputs, form=lambda program: program):
    return normtool.load(form(export(module, *inputs))).graph


def one_op(function, *inputs, **members):
    """The graph of a single call, and its op."""
    graph = read(double(Through(lambda m, *x: function(m, *x), **members)), *inputs)
    (op,) = graph.ops
    return graph, op


# ---- one call ---------------------------------------------------------------------------------------------

ATTRIBUTES = [
    pytest.param(
        lambda m, x: F.conv2d(x, x[:, :3, :1, :1] * 1, None, 2, (1, 0)),
        "conv",
        {"strides": [2, 2], "pads": [1, 0, 1, 0], "group": 1},
        id="conv",
    ),
    pytest.param(
        lambda m, x: F.conv_transpose2d(x, x[:3] * 1, None, 2, 1, 1),
        "conv_transpose",
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
        id="conv-transpose",
    ),
    pytest.param(lambda m, x: x.transpose(-1, 1), "transpose", {"perm": [0, 3, 2, 1]}, id="transpose"),
    pytest.param(lambda m, x: x.permute(0, -1, 1, 2), "transpose", {"perm": [0, 3, 1, 2]}, id="permute"),
    pytest.param(lambda m, x: x.unsqueeze(-1), "unsqueeze", {"axes": [-1]}, id="unsqueeze"),
    pytest.param(lambda m, x: x.mean((2, 3)), "reduce_mean", {"axes": [2, 3], "keepdims": 0}, id="mean"),
    pytest.param(lambda m, x: F.layer_norm(x, (6, 6)), "layer_norm", {"axis": -2}, id="layer-norm"),
    pytest.param(
        lambda m, x: F.rms_norm(x, (6,)), "rms_norm", {"axis": -1, "epsilon": 2.0**-52}, id="rms-norm"
    ),
    pytest.param(lambda m, x: F.dropout(x, 0.3, False), "dropout", {"training_mode": False}, id="dropout"),
    pytest.param(lambda m, x: x.float(), "cast", {"to": np.dtype(np.float32)}, id="cast"),
    pytest.param(
        lambda m, x: x.to(dtype=torch.float32, device="cpu"),
        "cast",
        {"to": np.dtype(np.float32)},
        id="cast-to-device",
    ),
]


@pytest.mark.parametrize(("function", "kind", "attributes"), ATTRIBUTES)
def test_attributes_say_what_onnx_would(function, kind, attributes):
    graph = read(Through(function), randn(3, 3, 6, 6))
    op = next(op for op in graph.ops if op.kind == kind)
    assert {name: op.attributes.get(name) for name in attributes} == attributes


UNKNOWNS = {
    "rounded-division": lambda m, x: torch.div(x, 2.0, rounding_mode="floor"),
    "add-with-alpha": lambda m, x: torch.add(x, x, alpha=2),
    "no-row": lambda m, x: torch.cumsum(x, 1),
}


@pytest.mark.parametrize("name", list(UNKNOWNS))
def test_argument_that_no_row_knows_makes_the_op_unknown(name):
    _, op = one_op(UNKNOWNS[name], randn(*IMAGE))
    assert op.kind == UNKNOWN


@pytest.mark.parametrize(
    ("function", "slots"),
    [
        pytest.param(lambda m, x: x + 2.0, {"a", "b"}, id="number"),
        pytest.param(lambda m, x: 2.0 - x, {"a", "b"}, id="reversed"),
        pytest.param(lambda m, x: x.squeeze(1), {"x"}, id="axes-are-no-tensor"),
        pytest.param(lambda m, x: x.clamp(0, 1), {"x", "min", "max"}, id="bounds"),
    ],
)
def test_numbers_become_constants_only_where_a_tensor_could_stand(function, slots):
    graph, op = one_op(function, randn(*IMAGE))
    assert set(graph.inputs(op)) == slots


def test_fraction_beside_integers_stays_a_fraction():
    graph = read(Through(lambda m, x: x * 0.5), torch.ones(3, dtype=torch.int64))
    (op,) = graph.ops
    assert to_array(graph.inputs(op)["b"].value) == 0.5


def test_lifted_constant_has_its_value():
    graph = read(Through(lambda m, x: x * torch.tensor([2.0, 3.0])), torch.ones(2))
    held = [t for t in graph.tensors if t.value is not None]
    assert [to_array(t.value).tolist() for t in held] == [[2.0, 3.0]]


# ---- forms after decomposition ----------------------------------------------------------------------------

LAYERS = [
    pytest.param(nn.Conv2d(3, 4, 3), IMAGE, "conv", id="conv"),
    pytest.param(nn.ConvTranspose2d(3, 4, 3), IMAGE, "conv_transpose", id="conv-transpose"),
    pytest.param(nn.Linear(6, 4), (5, 6), "linear", id="linear"),
    pytest.param(nn.BatchNorm2d(3).eval(), IMAGE, "batch_norm", id="batch-norm"),
    pytest.param(nn.BatchNorm2d(3).train(), IMAGE, "batch_norm", id="batch-norm-in-training"),
    pytest.param(nn.BatchNorm2d(3, track_running_stats=False), IMAGE, "batch_norm", id="no-running-stats"),
    pytest.param(nn.LayerNorm(6), IMAGE, "layer_norm", id="layer-norm"),
    pytest.param(nn.GroupNorm(3, 3), IMAGE, "group_norm", id="group-norm"),
]


@pytest.mark.parametrize(("layer", "shape", "kind"), LAYERS)
def test_kinds_survive_decomposition(layer, shape, kind):
    for form in (lambda program: program, decomposed):
        assert kind in [op.kind for op in read(layer.double(), randn(*shape), form=form).ops]


def test_only_the_first_result_of_a_native_norm_is_read():
    graph = read(double(conv_bn()), randn(*IMAGE), form=decomposed)
    norm = next(op for op in graph.ops if op.kind == "batch_norm")
    read_slots = [slot for slot, tensor in graph.outputs(norm).items() if graph.readers(tensor)]
    assert read_slots == ["y"]


# ---- owners -----------------------------------------------------------------------------------------------


def test_owner_and_call_of_each_op():
    module = Through(lambda m, x: m.body(m.body(x)).relu(), body=nn.Sequential(nn.Conv2d(3, 3, 1)))
    graph = read(double(module), randn(*IMAGE))
    assert [(op.name, op.owner, op.call) for op in graph.ops] == [
        ("body.0", "body.0", 0),
        ("body.0@1", "body.0", 1),
        ("relu", "", 0),
    ]


def test_calls_under_several_names_are_counted_together():
    module = Through(lambda m, x: m.b(m.a(x)), a=nn.Conv2d(3, 3, 1))
    module.b = module.a
    graph = normtool.load(double(module), (randn(*IMAGE),)).graph
    assert [(op.owner, op.call) for op in graph.ops] == [("a", 0), ("a", 1)]


def test_index_select_has_not_the_name_of_its_module():
    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.picked, self.scale = nn.Buffer(torch.tensor([2, 0])), nn.Parameter(torch.ones(6))

        def forward(self, x):
            return F.layer_norm(x.index_select(1, self.picked), (6,), self.scale)

    graph = read(double(nn.Sequential(Picks())), randn(*IMAGE))
    assert [op.name for op in graph.ops] == ["0.index_select", "0"]


def test_names_are_unique():
    module = Through(lambda m, x: F.conv2d(m.a(x), m.a.weight), a=nn.Conv2d(3, 3, 1))
    graph = read(double(module), randn(*IMAGE))
    assert len({op.name for op in graph.ops}) == len(graph.ops)


# ---- written in place -------------------------------------------------------------------------------------

WRITES = {
    "in-place": lambda m, x: m.w.mul_(2.0) + x,
    "view": lambda m, x: m.w.view(-1)[0].mul_(2.0) + x,
    "index": lambda m, x: m.w[1:].add_(1.0).sum() + x,
    "expanded-transpose": lambda m, x: m.w.t().mul_(2.0).sum() + x,
    "assignment": lambda m, x: (m.w.copy_(m.w + 1.0), x)[1] + m.w,
    "slice-assignment": lambda m, x: (m.w.__setitem__(0, 1.0), x)[1] + m.w,
}


@pytest.mark.parametrize("form", [lambda p: p, decomposed], ids=["exported", "decomposed"])
@pytest.mark.parametrize("name", list(WRITES))
def test_written_buffer(name, form):
    module = Through(WRITES[name], w=nn.Buffer(torch.zeros(4, 4)), other=nn.Buffer(torch.zeros(4, 4)))
    graph = read(double(module), randn(4, 4), form=form)
    written = {tensor.name for tensor in graph.tensors if tensor.written and tensor.value is not None}
    assert written == {"w"}


def test_dropout_in_inference_hands_its_input_on():
    module = Through(lambda m, x: F.dropout(m.w, 0.5, False).mul_(2.0) + x, w=nn.Buffer(torch.zeros(4, 4)))
    graph = read(double(module), randn(4, 4))
    assert next(tensor for tensor in graph.tensors if tensor.name == "w").written


def test_statistics_of_a_norm_in_training_are_written():
    graph = read(nn.BatchNorm2d(3).double().train(), randn(*IMAGE))
    written = {tensor.name for tensor in graph.tensors if tensor.written}
    assert {"running_mean", "running_var", "num_batches_tracked"} <= written


def test_copy_that_is_written_leaves_the_original_constant():
    module = Through(lambda m, x: m.w.clone().mul_(2.0) + (m.w + 1.0).mul_(x), w=nn.Buffer(torch.zeros(4, 4)))
    graph = read(double(module), randn(4, 4))
    assert not next(tensor for tensor in graph.tensors if tensor.name == "w").written
