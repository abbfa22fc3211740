"""`fold --affine`: γ and β of norms that stay go into what reads them, in ONNX files, programs and modules.

Every result is compared with the original in float64, or by the validation, which must come out `equal`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import normtool
from normtool import api, norm_affine
from normtool.errors import UsageError
from normtool.formats.torch.export import Example, export
from normtool.options import FoldOptions
from normtool.planner import Planner
from normtool.proof import prove
from normtool.rules import conv
from tests.conftest import Run
from tests.formats.torch.architectures import ARCHITECTURES
from tests.rules.test_every_rule import AGREES, difference
from tests.zoo import Net, op_types

pytestmark = pytest.mark.usefixtures("worker_in_this_process")

BOTH, WEIGHT, BIAS = ["weight", "bias"], ["weight"], ["bias"]


def fold(model: Any, inputs: Any = None, **options: Any) -> normtool.Rewrite:
    return normtool.fold(model, inputs, validate=False, affine=True, **options)


def the_site(result: normtool.Rewrite) -> dict[str, Any]:
    (site,) = [site.to_dict() for site in result.sites if site.norm.kind != "batch_norm"]
    return site


def codes(site: dict[str, Any]) -> set[str]:
    return {reason["code"] for reason in site["reasons"]}


# ---- ONNX -------------------------------------------------------------------------------------------


def net(opset: int = 21) -> Net:
    return Net(opset=opset, dtype=np.float64)


def vector(net: Net, *shape: int) -> str:
    """γ or β: both signs, no zeros."""
    drawn = net.rng.standard_normal(shape)
    return net.constant((drawn + 0.3 * np.sign(drawn)).astype(net.dtype))


def norm(net: Net, x: str, kind: str = "Layer", shape: tuple[int, ...] = (8,), **attributes: Any) -> str:
    operands = [vector(net, *shape)] if kind == "RMS" else [vector(net, *shape), vector(net, *shape)]
    y: str = net.node(f"{kind}Normalization", x, *operands, name="norm", **attributes)
    return y


def linear(net: Net, x: str, cin: int, cout: int) -> str:
    y: str = net.node("Add", net.node("MatMul", x, net.weight(cin, cout)), net.weight(cout))
    return y


def into_attention(net: Net) -> str:
    x = net.input([2, 5, 8])
    h = norm(net, x)
    q, k, v = (linear(net, h, 8, 8) for _ in range(3))
    scores = net.node("Softmax", net.node("MatMul", q, net.node("Transpose", k, perm=[0, 2, 1])), axis=-1)
    y: str = net.node("Add", x, linear(net, net.node("MatMul", scores, v), 8, 8))
    return y


def into_an_mlp(net: Net) -> str:
    x = net.input([2, 5, 8])
    hidden = net.node("Tanh", linear(net, norm(net, x), 8, 16))
    y: str = net.node("Add", x, linear(net, hidden, 16, 8))
    return y


def into_gate_and_up(net: Net) -> str:
    h = norm(net, net.input([2, 5, 8]), "RMS")
    gate, up = (net.node("MatMul", h, net.weight(8, 9)) for _ in range(2))
    y: str = net.node("Mul", net.node("Sigmoid", gate), up)
    return y


def through_a_transpose(net: Net) -> str:
    turned = net.node("Transpose", norm(net, net.input([2, 5, 8])), perm=[0, 2, 1])
    y: str = net.node("Relu", net.node("Add", net.node("MatMul", net.weight(7, 8), turned), net.weight(7, 1)))
    return y


def over_two_axes(net: Net) -> str:
    flat = net.node("Flatten", norm(net, net.input([2, 3, 4]), shape=(3, 4), axis=1))
    y: str = net.node("Relu", net.node("Gemm", flat, net.weight(12, 5), net.weight(5)))
    return y


def group_norm(net: Net, k: int, pad: int = 0) -> str:
    size = 6 if net.opset >= 21 else 3
    h = norm(net, net.input([2, 6, 5, 4]), "Group", (size,), num_groups=3)
    y: str = net.node("Sigmoid", net.conv(h, 6, 4, k, k, pads=[pad] * 4))
    return y


def into_a_pointwise_conv(net: Net) -> str:
    return group_norm(net, 1)


def instance_norm_into_a_conv(net: Net) -> str:
    h = norm(net, net.input([2, 6, 5, 4]), "Instance", (6,))
    y: str = net.node("Sigmoid", net.conv(h, 6, 4, 3, 3))
    return y


MOVED: list[Any] = [
    pytest.param(make, opset, moved, id=f"{make.__name__}-{opset}")
    for make, opsets, moved in (
        (into_attention, (17, 21, 23), BOTH),
        (into_an_mlp, (17, 20, 23), BOTH),
        (into_gate_and_up, (23,), WEIGHT),
        (through_a_transpose, (17,), BOTH),
        (over_two_axes, (17,), BOTH),
        (into_a_pointwise_conv, (18, 20, 21, 23), BOTH),
        (instance_norm_into_a_conv, (17, 22), BOTH),
    )
    for opset in opsets
]


def built(make: Callable[[Net], str], opset: int = 21) -> onnx.ModelProto:
    made = net(opset)
    made.output(make(made))
    return made.model()


@pytest.mark.parametrize(("make", "opset", "moved"), MOVED)
def test_scale_and_shift_go_into_every_reader(make: Callable[[Net], str], opset: int, moved: list[str]) -> None:
    model = built(make, opset)
    result = fold(model)
    site = the_site(result)
    assert (site["verdict"], site["moved"], site["reasons"]) == ("folded", moved, [])
    assert site["into"]
    assert "norm" not in site["into"]
    assert op_types(result.model) == op_types(model)
    assert difference(model, result.model) < AGREES
    (node,) = [node for node in result.model.graph.node if node.name == "norm"]
    stored = {each.name: numpy_helper.to_array(each) for each in result.model.graph.initializer}
    old = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    assert np.all(stored[node.input[1]] == 1)
    assert stored[node.input[1]].shape == old[node.input[1]].shape
    if node.op_type == "LayerNormalization":
        assert len(node.input) == 2  # B is optional, and gone
        assert result.after.learnable == result.before.learnable - stored[node.input[1]].size
    else:
        assert all(np.all(stored[name] == 0) for name in node.input[2:])
        assert result.after.learnable == result.before.learnable
    assert not fold(result.model).changed


@pytest.mark.parametrize(
    "make", [into_attention, group_norm, instance_norm_into_a_conv], ids=lambda f: f.__name__
)
def test_without_the_option_nothing_changes(make: Any) -> None:
    model = built((lambda net: group_norm(net, 1)) if make is group_norm else make)
    result = normtool.fold(model, validate=False)
    assert not result.changed
    assert codes(the_site(result)) == {"data_dependent"}


def test_a_norm_that_is_spelled_out_loses_its_mul_and_its_add() -> None:
    made = net(17)
    x = made.input([2, 5, 8])
    centred = made.node("Sub", x, made.node("ReduceMean", x, axes=[-1]))
    variance = made.node("ReduceMean", made.node("Pow", centred, made.constant(np.float64(2))), axes=[-1])
    root = made.node("Sqrt", made.node("Add", variance, made.constant(np.float64(1e-5))))
    y = made.node("Mul", made.node("Div", centred, root), vector(made, 8), name="scale")
    y = made.node("Add", y, vector(made, 8), name="shift")
    made.output(made.node("Relu", linear(made, y, 8, 4)))
    model = made.model()
    result = fold(model)
    site = the_site(result)
    assert (site["verdict"], site["moved"]) == ("folded", BOTH)
    assert not {"scale", "shift"} & {node.name for node in result.model.graph.node}
    assert difference(model, result.model) < AGREES


def read_by_a_residual_too(net: Net) -> str:
    h = norm(net, net.input([2, 5, 8]))
    y: str = net.node("Add", net.node("Relu", linear(net, h, 8, 8)), h)
    return y


def in_front_of_a_nonlinearity(net: Net) -> str:
    y: str = net.node("Tanh", norm(net, net.input([2, 5, 8])))
    return y


def tied_head(net: Net) -> str:
    table = net.weight(11, 8, name="table")
    h = norm(net, net.node("Gather", table, net.input([2, 5], dtype=np.int64, name="ids")))
    y: str = net.node("Add", net.node("MatMul", h, net.node("Transpose", table, perm=[1, 0])), net.weight(11))
    return y


def computed_scale(net: Net) -> str:
    x = net.input([2, 5, 8])
    gamma = net.node("ReduceMean", x, net.constant(np.array([0, 1])), keepdims=0)
    h = net.node("LayerNormalization", x, gamma, vector(net, 8), name="norm")
    return linear(net, h, 8, 8)


def put_out_too(net: Net) -> str:
    h = norm(net, net.input([2, 5, 8]))
    net.output(net.node("Relu", linear(net, h, 8, 8)))
    return h


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (read_by_a_residual_too, {"nonlinear", "graph_output"}),
        (in_front_of_a_nonlinearity, {"nonlinear"}),
        (tied_head, {"shared_parameter"}),
        (computed_scale, {"dynamic_weight"}),
        (put_out_too, {"graph_output"}),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_stays_says_why(make: Callable[[Net], str], reasons: set[str]) -> None:
    model = built(make)
    result = fold(model)
    site = the_site(result)
    assert site["verdict"] == "kept"
    assert codes(site) == reasons
    assert not result.changed


def padded(net: Net) -> str:
    return group_norm(net, 3, pad=1)


def without_a_bias(net: Net) -> str:
    y: str = net.node("Relu", net.node("MatMul", norm(net, net.input([2, 5, 8])), net.weight(8, 9)))
    return y


@pytest.mark.parametrize(("make", "reason"), [(padded, "padded_shift"), (without_a_bias, "nonlinear")])
def test_where_a_shift_cannot_go_the_scale_goes_alone(make: Callable[[Net], str], reason: str) -> None:
    model = built(make)
    result = fold(model)
    site = the_site(result)
    assert (site["verdict"], site["moved"], codes(site)) == ("folded", WEIGHT, {reason})
    assert difference(model, result.model) < AGREES
    old, new = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (model, result.model))
    (node,) = [node for node in result.model.graph.node if node.name == "norm"]
    assert np.all(new[node.input[1]] == 1)
    np.testing.assert_allclose(new[node.input[2]], old[node.input[2]] / old[node.input[1]], rtol=1e-15)


def test_a_scale_of_zero_cannot_go_before_its_shift() -> None:
    made = net()
    h = made.node(
        "LayerNormalization",
        made.input([2, 5, 3]),
        made.constant(np.array([1.5, 0, 2])),
        vector(made, 3),
        name="norm",
    )
    made.output(made.node("Relu", made.node("MatMul", h, made.weight(3, 4))))
    site = the_site(fold(made.model()))
    assert site["verdict"] == "kept"
    assert codes(site) == {"nonlinear", "degenerate_stats"}


def test_a_shift_may_go_alone() -> None:
    """Three ways are open; a caller may want only those that leave no β (a swap does)."""
    model = built(into_an_mlp)
    opened = normtool.load(model)
    planner = Planner(opened.graph, FoldOptions(affine=True), {})
    (op,) = [op for op in opened.graph.ops if op.kind == "layer_norm"]
    made, reasons = planner.strip_affine(norm_affine.Tail.of(op), [("bias",)])
    assert made.moved == ("bias",)
    assert not reasons
    assert not prove(made.steps, made.edits).failures
    assert planner.graph.current(op) is not op  # without B


def test_two_norms_that_share_their_parameters() -> None:
    made = net()
    x, gamma, beta = made.input([2, 5, 8]), vector(made, 8), vector(made, 8)
    for name in ("one", "two"):
        x = made.node("Relu", linear(made, made.node("LayerNormalization", x, gamma, beta, name=name), 8, 8))
    made.output(x)
    model = made.model()
    result = fold(model)
    assert [site.verdict for site in result.sites] == ["folded", "folded"]
    assert difference(model, result.model) < AGREES
    assert {gamma, beta} == set(result.key_map)
    kept = {t.name for t in result.model.graph.initializer}
    assert all(set(keys) <= kept and len(keys) == 4 for keys in result.key_map.values())


def test_a_linear_of_two_norms_is_cloned() -> None:
    made = net()
    x, weight = made.input([2, 5, 8]), made.weight(8, 8)
    for name in ("one", "two"):
        h = made.node("LayerNormalization", x, vector(made, 8), vector(made, 8), name=name)
        x = made.node("Relu", made.node("Add", made.node("MatMul", h, weight), made.weight(8)))
    made.output(x)
    model = made.model()
    result = fold(model)
    assert [site.verdict for site in result.sites] == ["folded", "folded"]
    assert difference(model, result.model) < AGREES


def test_norms_are_chosen_by_name() -> None:
    made = net()
    x = made.input([2, 5, 8])
    for name in ("one", "two"):
        h = made.node("LayerNormalization", x, vector(made, 8), vector(made, 8), name=name)
        x = made.node("Relu", linear(made, h, 8, 8))
    made.output(x)
    sites = {site.norm.name: site.to_dict() for site in fold(made.model(), skip=("one",)).sites}
    assert sites["two"]["verdict"] == "folded"
    assert codes(sites["one"]) == {"not_selected"}
    with pytest.raises(UsageError, match="no norm is called"):
        fold(made.model(), only=("three",))


def test_the_command_line(normtool: Run, tmp_path: Path) -> None:
    path, out, report = (tmp_path / name for name in ("model.onnx", "out.onnx", "report.json"))
    onnx.save(built(into_an_mlp), path)
    ran = normtool("fold", path, "-o", out, "--affine", "--undo", "--report", report)
    assert ran.returncode == 0, ran.stderr
    (site,) = json.loads(report.read_text())["sites"]
    assert site["moved"] == BOTH
    back = tmp_path / "back.onnx"
    assert normtool("unfold", out, "--record", report, "-o", back).returncode == 0
    old, new = (list(onnx.load(each).graph.initializer) for each in (path, back))
    assert all(
        np.array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b))
        for a, b in zip(old, new, strict=True)
    )


# ---- PyTorch ----------------------------------------------------------------------------------------


class PreNorm(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v = (
            nn.Linear(width, width),
            nn.Linear(width, width, bias=False),
            nn.Linear(width, width),
        )
        self.gate, self.up = nn.Linear(width, 12, bias=False), nn.Linear(width, 12, bias=False)
        self.down = nn.Linear(12, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        x = x + torch.softmax(self.q(h) @ self.k(h).mT, -1) @ self.v(h)
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Convs(nn.Module):
    def __init__(self, pad: int = 0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, 6), nn.InstanceNorm2d(4, affine=True)
        self.conv1, self.conv2 = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 3, padding=pad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv2(self.norm2(torch.relu(self.conv1(self.norm1(x))))))


class ScaledByItself(nn.LayerNorm):
    """A subclass with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class HomeMade(nn.Module):
    """Spelled out: γ and β are a Mul and an Add."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = x - x.mean(-1, keepdim=True)
        return self.weight * (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-5)) + self.bias


class Behind(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(self.norm(x)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 11)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.table(ids)))


def perturbed(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in module.modules():
            if "Norm" in type(part).__name__ or isinstance(part, ScaledByItself | HomeMade):
                for tensor in part.parameters(recurse=False):
                    tensor += 0.4 * torch.randn(tensor.shape, generator=generator)
    return module.eval()


TOKENS, IMAGE = torch.randn(2, 5, 8), torch.randn(2, 6, 7, 7)

#: module, input, what moves from each norm
MODULES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, list[list[str]]]] = {
    "attention-and-gate": (PreNorm, TOKENS, [BOTH, WEIGHT]),
    "convs": (Convs, IMAGE, [BOTH, BOTH]),
    "padded": (lambda: Convs(1), IMAGE, [BOTH, WEIGHT]),
    "subclass": (lambda: Behind(ScaledByItself(8)), TOKENS, [BOTH]),
    "spelled-out": (lambda: Behind(HomeMade()), TOKENS, [BOTH]),
}


@pytest.mark.parametrize("which", MODULES)
@pytest.mark.parametrize("as_program", [False, True], ids=["module", "program"])
def test_modules_and_programs(which: str, as_program: bool) -> None:
    make, x, moved = MODULES[which]
    module = perturbed(make())
    source: Any = export(module, Example((x,))) if as_program else module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    result = normtool.fold(source, (x,), affine=True)
    assert [site.to_dict().get("moved") for site in result.sites] == moved
    assert result.folded == 0  # every norm is still there
    assert result.validation is not None
    assert result.validation.verdict == "equal", result.validation
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    after = result.model.state_dict if as_program else result.model.state_dict()
    if as_program and which == "spelled-out":  # there the Mul and the Add go
        assert set(result.key_map) == {"norm.weight", "norm.bias"}
    else:
        assert before.keys() <= after.keys()
    if not as_program:
        counted = sum(p.numel() for p in result.model.parameters())
        assert result.after.learnable == counted
        assert [type(part) for part in result.model.modules()] == [type(part) for part in module.modules()]
    for name, tensor in after.items():
        if name.startswith("norm") and name.endswith("weight"):
            assert torch.all(tensor == 1)
    back = normtool.unfold(result.model, api.with_undo(result).undo, (x,))
    restored = back.model.state_dict if as_program else back.model.state_dict()
    assert all(torch.equal(restored[name], before[name]) for name in before if name.startswith("norm"))
    assert set(back.kinds) == {site.norm.kind for site in result.sites}


def test_a_module_keeps_a_tied_table_as_it_is() -> None:
    ids = torch.randint(0, 11, (2, 5))
    module = perturbed(Tied())
    result = normtool.fold(module, (ids,), affine=True)
    assert codes(the_site(result)) == {"shared_parameter"}
    assert not result.changed


@pytest.mark.parametrize("name", ["gpt2", "vit", "llama"])
@pytest.mark.parametrize("form", ["module", pytest.param("program", marks=pytest.mark.long), "onnx"])
def test_architectures(name: str, form: str) -> None:
    (architecture,) = (each for each in ARCHITECTURES if each.name == name)
    module, inputs = architecture.make(), architecture.inputs()
    source: Any = module
    if form == "program":
        source = export(module, Example(kwargs=inputs))
    elif form == "onnx":
        source = normtool.convert(module, inputs, validate=False).model
    result = normtool.fold(source, None if form == "onnx" else inputs, affine=True)
    assert result.validation is not None
    assert result.validation.verdict == "equal", result.validation
    kept = [site for site in result.sites if site.verdict == "kept"]
    tied = 1 if name == "gpt2" and form != "onnx" else 0  # the exporter stores the head's table once more
    assert [{reason.code for reason in site.reasons} for site in kept] == [{"shared_parameter"}] * tied


# ---- planted mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", ["_by_input", "_sums"])
def test_the_proof_catches_a_wrong_absorber(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(conv, planted)
    monkeypatch.setattr(conv, planted, lambda *arguments: right(*arguments) * 1.01)
    site = the_site(fold(built(into_a_pointwise_conv)))
    assert "internal" in codes(site)
    assert site.get("moved") in (None, WEIGHT if planted == "_sums" else None)


def test_a_shift_in_a_padded_conv_is_caught_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rule's own refusal taken away, the equations still tell the border."""
    monkeypatch.setattr("normtool.rules.conv.pads", lambda constants, op: False)
    result = fold(built(padded))
    site = the_site(result)
    assert "internal" in codes(site)
    assert site.get("moved") in (None, WEIGHT)


def test_a_shift_in_a_padded_conv_is_caught_by_the_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normtool.rules.conv.pads", lambda constants, op: False)
    monkeypatch.setattr("normtool.proof._check_equations", lambda steps: (0.0, []))
    made = Net(opset=21)
    made.output(padded(made))
    result = normtool.fold(made.model(), affine=True)
    assert the_site(result)["moved"] == BOTH
    assert result.validation is not None
    assert result.validation.verdict == "different"


def test_a_scale_left_in_the_norm_is_caught_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """γ in the readers and in the norm still."""
    monkeypatch.setattr(norm_affine, "_in_one_op", lambda *arguments: [])
    site = the_site(fold(built(into_an_mlp)))
    assert site["verdict"] == "kept"
    assert "internal" in codes(site)
