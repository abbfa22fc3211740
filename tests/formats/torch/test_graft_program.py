"""`Graft` on exported programs: calls beside what is there, for some readers of a tensor or for all."""

import subprocess
import sys
import textwrap
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

import normtool
from normtool.draft import Draft
from normtool.edits import Edit, Graft, Part, Rebind, Splice
from normtool.errors import NormtoolError, UsageError
from normtool.formats.torch.export import Example
from normtool.formats.torch.model import TorchModel, read_exported, read_module
from normtool.formats.torch.module_apply import review
from normtool.formats.torch.program_apply import fold_program
from normtool.formats.torch.undo import undo_record
from normtool.graph import GRAPH_OUTPUT, Op, Read, Tensor
from normtool.planner import Fold, Plan
from normtool.values import Dense
from tests.formats.torch.checks import decomposed, double, export, randn, run, snapshot
from tests.formats.torch.test_fold_module import Through

EPSILON = 1e-3

forms = pytest.mark.parametrize("form", [lambda p: p, decomposed], ids=["exported", "decomposed"])


# ---- grafts to try -----------------------------------------------------------------------------------


def centre(tensor: Tensor, readers: Any = None) -> Graft:
    mean = Part("reduce_mean", {"x": tensor}, attributes={"axes": [-1], "keepdims": 1})
    return Graft(
        tensor, (mean, Part("sub", {"a": tensor, "b": 0})), None if readers is None else tuple(readers)
    )


def number(name: str, value: float) -> tuple[str, Dense]:
    return name, Dense(np.array(value, np.float64))


def spelled_out_rms(norm: Op, graph: Any, reciprocal: bool = False) -> Graft:
    x, gamma = graph.input(norm, "x"), graph.input(norm, "weight")
    root = [Part("sqrt", {"x": 2}), Part("div", {"a": x, "b": 3})]
    if reciprocal:
        root = [Part("rsqrt", {"x": 2}), Part("mul", {"a": x, "b": 3})]
    parts = (
        Part("pow", {"x": x}, {"exponent": number("two", 2.0)}),
        Part("reduce_mean", {"x": 0}, attributes={"axes": [-1], "keepdims": 1}),
        Part("add", {"a": 1}, {"b": number("epsilon", EPSILON)}),
        *root,
        Part("mul", {"a": 4, "b": gamma}),
    )
    return Graft(graph.output(norm), parts)


def one_rms(norm: Op, graph: Any) -> Graft:
    inputs = {"x": graph.input(norm, "x"), "weight": graph.input(norm, "weight")}
    part = Part(
        "rms_norm", inputs, attributes={"axis": -1, "epsilon": EPSILON}, op_type="rms_norm", domain="aten"
    )
    return Graft(graph.output(norm), (part,))


def rms(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + EPSILON).sqrt() * gamma


def centred(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(-1, keepdim=True)


# ---- carrying them out ---------------------------------------------------------------------------------


def plan_of(model: TorchModel, *edits: Edit) -> Plan:
    return Plan((), (Fold((), (), edits, ()),), model.fingerprint)


def grafted(model: TorchModel, *edits: Edit, draft: Draft | None = None) -> ExportedProgram:
    """The program with the edits, which draft and writer have both carried out; the original stays itself."""
    assert model.program is not None
    before = snapshot(model.program)
    draft = draft or Draft(model.graph)
    for edit in edits:
        if edit not in draft.grafted:
            draft.carry_out(edit)
    result = fold_program(model, plan_of(model, *edits))
    assert sorted(op.kind for op in draft.living()) == sorted(op.kind for op in result.graph.ops)
    assert snapshot(model.program) == before
    made = result.program
    assert made is not None
    nodes = {node.name for node in made.graph.nodes}
    assert {spec.arg.name for spec in made.graph_signature.output_specs} <= nodes
    assert all(node.meta["val"] is not None for node in made.graph.nodes if node.op == "call_function")
    return made


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return got.shape == expected.shape and bool(
        (got - expected).abs().max() < 1e-12 * (1 + expected.abs().max())
    )


def read(module: nn.Module, *inputs: torch.Tensor, form: Any = lambda p: p, **options: Any) -> TorchModel:
    return read_exported(form(export(double(module), *inputs, **options)))


def output_of(model: TorchModel, spelling: str) -> Tensor:
    return model.graph.output(next(op for op in model.graph.ops if op.spelling == spelling))


def reads_of(model: TorchModel, tensor: Tensor, *spellings: str) -> list[Read]:
    return [read for read in model.graph.readers(tensor) if read.op.spelling in spellings]


X = randn(3, 5) + 3


def two_readers() -> TorchModel:
    return read(Through(lambda m, x: ((h := x.neg()).exp(), h.tanh(), h), nothing=nn.Identity()), X)


# ---- where a Centre may stand ----------------------------------------------------------------------------


def test_in_front_of_one_of_three_readers() -> None:
    model = two_readers()
    h = output_of(model, "neg")
    exp, tanh, raw = run(grafted(model, centre(h, reads_of(model, h, "tanh"))))(X)
    assert close(exp, (-X).exp())
    assert close(tanh, centred(-X).tanh())
    assert close(raw, -X)


def test_in_front_of_all_readers_the_output_changes_too() -> None:
    model = two_readers()
    exp, tanh, raw = run(grafted(model, centre(output_of(model, "neg"))))(X)
    assert close(exp, centred(-X).exp())
    assert close(tanh, centred(-X).tanh())
    assert close(raw, centred(-X))


def test_for_the_output_alone() -> None:
    model = two_readers()
    h = output_of(model, "neg")
    readers = [read for read in model.graph.readers(h) if read.op.kind == GRAPH_OUTPUT]
    exp, tanh, raw = run(grafted(model, centre(h, readers)))(X)
    assert close(exp, (-X).exp())
    assert close(tanh, (-X).tanh())
    assert close(raw, centred(-X))


@pytest.mark.parametrize("everyone", [False, True])
def test_on_an_input_of_the_program(everyone: bool) -> None:
    model = read(Through(lambda m, x: (x.exp() + x.tanh(), x * 1), nothing=nn.Identity()), X)
    x = next(tensor for tensor in model.graph.tensors if tensor.role == "input")
    got, other = run(grafted(model, centre(x, None if everyone else reads_of(model, x, "tanh"))))(X)
    assert close(got, (centred(X) if everyone else X).exp() + centred(X).tanh())
    assert close(other, centred(X) if everyone else X)


@pytest.mark.parametrize("slot", ["a", "b"])
def test_for_one_of_two_slots_of_one_op(slot: str) -> None:
    model = read(Through(lambda m, x: (h := x.neg()) - h, nothing=nn.Identity()), X)
    h = output_of(model, "neg")
    readers = [read for read in model.graph.readers(h) if read.slot == slot]
    got = run(grafted(model, centre(h, readers)))(X)
    assert close(got, centred(-X) + X if slot == "a" else -X - centred(-X))


def test_for_one_element_of_a_list() -> None:
    model = read(Through(lambda m, x: torch.cat([h := x.neg(), x, h]), nothing=nn.Identity()), X)
    h = output_of(model, "neg")
    readers = [read for read in model.graph.readers(h) if read.slot == "inputs.2"]
    assert close(run(grafted(model, centre(h, readers)))(X), torch.cat([-X, X, centred(-X)]))


def test_the_batch_stays_free() -> None:
    module = Through(lambda m, x: m.norm(x.neg()).exp(), norm=nn.LayerNorm(5, EPSILON))
    model = read(module, X, dynamic_shapes=(({0: Dim("batch", min=2, max=64)},),))
    norm = next(op for op in model.graph.ops if op.kind == "layer_norm")
    made = grafted(model, one_rms(norm, model.graph), centre(output_of(model, "neg")))
    for batch in (2, 7):
        x = randn(batch, 5)
        assert close(run(made)(x), rms(centred(-x), module.norm.weight).exp())


# ---- another norm in the place of a norm --------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.LayerNorm(8, EPSILON), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)))


def normed(form: Any = lambda p: p) -> tuple[TorchModel, Op, Normed]:
    module = Normed()
    model = read(module, X, form=form)
    return model, next(op for op in model.graph.ops if op.kind == "layer_norm"), module


def targets(program: ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@forms
@pytest.mark.parametrize("spelling", ["one", "div", "rsqrt"])
def test_layer_norm_gives_way_to_rms_norm(form: Any, spelling: str) -> None:
    model, norm, module = normed(form)
    graph = model.graph
    made = grafted(
        model, one_rms(norm, graph) if spelling == "one" else spelled_out_rms(norm, graph, spelling == "rsqrt")
    )
    assert close(run(made)(X), module.last(rms(module.first(X), module.norm.weight)).detach())
    assert not any("layer_norm" in target for target in targets(made))
    assert set(made.state_dict) == {"first.weight", "first.bias", "norm.weight", "last.weight", "last.bias"}
    kinds = {spec.kind for spec in made.graph_signature.input_specs}
    assert kinds == {InputKind.PARAMETER, InputKind.USER_INPUT}
    owners = {op.owner for op in read_exported(made).graph.ops}
    assert owners == {"first", "norm", "last"}


def test_saved_and_loaded_without_normtool(tmp_path: Any) -> None:
    expected = []
    for form in (lambda p: p, decomposed):
        for one in (True, False):
            model, norm, module = normed(form)
            graft = one_rms(norm, model.graph) if one else spelled_out_rms(norm, model.graph)
            made = grafted(model, graft, centre(model.graph.input(norm, "x")))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.export.save(made, tmp_path / f"{len(expected)}.pt2")
            expected.append(module.last(rms(centred(module.first(X)), module.norm.weight)).detach())
    torch.save(X, tmp_path / "x.pt")
    script = """
        import sys, torch
        programs = [torch.export.load(f"{i}.pt2").module() for i in range(4)]
        torch.save([program(torch.load("x.pt")).detach() for program in programs], "y.pt")
        assert "normtool" not in sys.modules
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    assert all(map(close, torch.load(tmp_path / "y.pt"), expected))
    (count,) = normtool.scan(tmp_path / "0.pt2").norms
    assert count.norm.kind == "rms_norm"


# ---- edits on what a graft has made ------------------------------------------------------------------


def test_the_scale_of_a_graft_is_bound_again_or_taken_out() -> None:
    wider = np.linspace(1, 3, 8)
    for change in ("bind", "splice"):
        model, norm, module = normed()
        graft, draft = spelled_out_rms(norm, model.graph), Draft(model.graph)
        draft.carry_out(graft)
        mul = draft.put_in[graft]
        edit = Rebind(mul, "b", Dense(wider), "gamma.new") if change == "bind" else Splice(mul, "a")
        made = grafted(model, graft, edit, draft=draft)
        gamma = torch.tensor(wider) if change == "bind" else torch.ones(8)
        assert close(run(made)(X), module.last(rms(module.first(X), gamma)).detach())
        assert "norm.weight" not in made.state_dict
        assert ("gamma.new" in made.state_dict) == (change == "bind")


def test_a_graft_on_what_a_graft_has_made() -> None:
    model, norm, module = normed()
    graft, draft = one_rms(norm, model.graph), Draft(model.graph)
    draft.carry_out(graft)
    made = grafted(model, graft, centre(draft.output(draft.put_in[graft])), draft=draft)
    assert close(run(made)(X), module.last(centred(rms(module.first(X), module.norm.weight))).detach())


def test_places_say_where_the_constants_of_a_graft_are() -> None:
    model, norm, _ = normed()
    y = model.graph.output(norm)
    graft = Graft(y, (Part("mul", {"a": y}, {"b": ("scale", Dense(np.arange(8.0)))}),))
    result = fold_program(model, plan_of(model, graft))
    assert result.places == {((graft, 0), "b"): "scale"}
    assert torch.equal(result.program.state_dict["scale"], torch.arange(8.0, dtype=torch.float64))


def test_a_weight_that_an_earlier_edit_has_bound() -> None:
    model, norm, module = normed()
    draft = Draft(model.graph)
    rebind = Rebind(norm, "weight", Dense(np.linspace(1, 3, 8)), "gamma.new")
    draft.carry_out(rebind)
    graft = one_rms(draft.current(norm), draft)
    made = fold_program(model, plan_of(model, rebind, graft)).program
    assert close(
        run(made)(X), module.last(rms(module.first(X), torch.linspace(1, 3, 8, dtype=X.dtype))).detach()
    )


# ---- where there is no graft ---------------------------------------------------------------------------


def test_a_part_that_aten_does_not_have_is_refused() -> None:
    model = two_readers()
    h = output_of(model, "neg")
    with pytest.raises(NormtoolError, match="no call of ATen is known for 'lp_norm'"):
        grafted(model, Graft(h, (Part("lp_norm", {"x": h}),)))


def test_a_module_has_no_place_for_a_graft() -> None:
    model = read_module(double(Normed()), Example((X,), {}))
    norm = next(op for op in model.graph.ops if op.kind == "layer_norm")
    fold = Fold((norm,), (), (one_rms(norm, model.graph),), ())
    ((reason,),) = review(model, [fold]).values()
    assert reason.code == "no_module"


def test_there_is_no_undo_record_of_a_graft() -> None:
    model, norm, _ = normed()
    plan = plan_of(model, one_rms(norm, model.graph))
    with pytest.raises(UsageError, match="cannot be undone"):
        undo_record(model, fold_program(model, plan), plan)
