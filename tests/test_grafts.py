"""`Graft` on ONNX graphs: nodes beside what is there, for some readers of a tensor or for all.

Results are those of ONNX Runtime, against the numbers that the definition gives.
"""

from collections.abc import Sequence

import numpy as np
import onnx
import pytest

from normtool.draft import Draft
from normtool.edits import Edit, Graft, Part, Rebind, Splice
from normtool.errors import NormtoolError
from normtool.formats.onnx.apply import apply_plan
from normtool.formats.onnx.model import OnnxModel
from normtool.formats.onnx.read import read_proto
from normtool.formats.onnx.write import to_proto
from normtool.graph import Op, Read, Tensor
from normtool.planner import Fold, Plan
from normtool.values import Dense
from tests.zoo import Array, Net, op_types, run

OPSETS = (13, 17, 18, 21, 23)

EPSILON = 1e-3

opsets = pytest.mark.parametrize("opset", OPSETS)


# ---- grafts to try -------------------------------------------------------------------------------


def centre(tensor: Tensor, readers: Sequence[Read] | None = None) -> Graft:
    """x − mean(x) over the last axis."""
    mean = Part("reduce_mean", {"x": tensor}, attributes={"axes": [-1], "keepdims": 1})
    return Graft(
        tensor, (mean, Part("sub", {"a": tensor, "b": 0})), None if readers is None else tuple(readers)
    )


def scalar(name: str, number: float) -> tuple[str, Dense]:
    return name, Dense(np.array(number, np.float32))


def spelled_out_rms(y: Tensor, x: Tensor, gamma: Tensor) -> Graft:
    """γ·x/√(mean(x²) + ε), as ONNX Runtime fuses it."""
    parts = (
        Part("pow", {"x": x}, {"exponent": scalar("two", 2.0)}),
        Part("reduce_mean", {"x": 0}, attributes={"axes": [-1], "keepdims": 1}),
        Part("add", {"a": 1}, {"b": scalar("epsilon", EPSILON)}),
        Part("sqrt", {"x": 2}),
        Part("div", {"a": x, "b": 3}),
        Part("mul", {"a": 4, "b": gamma}),
    )
    return Graft(y, parts)


def one_rms(y: Tensor, x: Tensor, gamma: Tensor, op_type: str) -> Graft:
    attributes = {"axis": -1, "epsilon": EPSILON}
    return Graft(y, (Part("rms_norm", {"x": x, "weight": gamma}, attributes=attributes, op_type=op_type),))


def rms(x: Array, gamma: Array) -> Array:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPSILON) * gamma


def centred(x: Array) -> Array:
    return x - x.mean(-1, keepdims=True, dtype=np.float64)


# ---- carrying them out ------------------------------------------------------------------------------


def op_of(model: OnnxModel, spelling: str) -> Op:
    return next(op for op in model.graph.ops if op.spelling == spelling)


def tensor(model: OnnxModel, name: str) -> Tensor:
    return next(each for each in model.graph.tensors if each.name == name)


def reads_of(model: OnnxModel, name: str, *spellings: str) -> list[Read]:
    """What reads a tensor: nodes of these types, or "" for the list of graph outputs."""
    return [read for read in model.graph.readers(tensor(model, name)) if read.op.spelling in spellings]


def grafted(model: OnnxModel, *edits: Edit, draft: Draft | None = None) -> onnx.ModelProto:
    """The model with the edits, which draft and writer have both carried out, accepted by the checker.

    A `draft` has carried out the first of them before.
    """
    draft = draft or Draft(model.graph)
    for edit in edits:
        if edit not in draft.grafted:
            draft.carry_out(edit)
    result = apply_plan(model, Plan((), (Fold((), (), edits, ()),), model.fingerprint))
    living = sorted(op.spelling for op in draft.living() if op.kind != "constant")
    assert living == sorted(op.spelling for op in result.graph.ops if op.kind != "constant")
    made = to_proto(result)
    if "SimplifiedLayerNormalization" not in op_types(made):  # ONNX Runtime's own, in the standard's domain
        onnx.checker.check_model(made, full_check=True)
    return made


def close(got: Array, expected: Array) -> bool:
    assert got.shape == expected.shape
    return bool(np.abs(got - expected).max() <= 2e-6 * max(1.0, np.abs(expected).max()))


def feed(*shape: int) -> dict[str, Array]:
    """Numbers with a mean that is far from 0."""
    return {"x": (np.random.default_rng(1).standard_normal(shape) + 3).astype(np.float32)}


def two_readers(opset: int) -> OnnxModel:
    """x → Neg → h; h → Exp, h → Abs; both and h itself are put out."""
    net = Net(opset=opset, ir=8)
    h = net.node("Neg", net.input([2, 5]), outputs=["h"])
    for op_type in ("Exp", "Abs"):
        net.output(net.node(op_type, h, outputs=[op_type]), [2, 5])
    net.output(h, [2, 5])
    return read_proto(net.model())


# ---- where a Centre may stand -----------------------------------------------------------------------


@opsets
def test_in_front_of_one_of_three_readers(opset: int) -> None:
    model = two_readers(opset)
    made = grafted(model, centre(tensor(model, "h"), reads_of(model, "h", "Abs")))
    x = feed(2, 5)
    exp, magnitude, h = run(made, x)
    assert close(exp, np.exp(-x["x"]))
    assert close(magnitude, np.abs(centred(x["x"])))
    assert close(h, -x["x"])


@opsets
def test_in_front_of_all_readers_the_output_changes_too(opset: int) -> None:
    model = two_readers(opset)
    made = grafted(model, centre(tensor(model, "h")))
    x = feed(2, 5)
    exp, magnitude, h = run(made, x)
    assert close(exp, np.exp(-centred(x["x"])))
    assert close(magnitude, np.abs(centred(x["x"])))
    assert close(h, -centred(x["x"]))
    assert [info.name for info in made.graph.output] == ["Exp", "Abs", "h"]


@opsets
def test_for_the_output_alone(opset: int) -> None:
    model = two_readers(opset)
    made = grafted(model, centre(tensor(model, "h"), reads_of(model, "h", "")))
    x = feed(2, 5)
    exp, magnitude, h = run(made, x)
    assert close(exp, np.exp(-x["x"]))
    assert close(magnitude, np.abs(x["x"]))
    assert close(h, -centred(x["x"]))


@pytest.mark.parametrize("everyone", [False, True])
def test_axes_are_where_the_opset_wants_them(everyone: bool) -> None:
    for opset in OPSETS:
        model = two_readers(opset)
        made = grafted(
            model, centre(tensor(model, "h"), None if everyone else reads_of(model, "h", "Exp", "Abs"))
        )
        (mean,) = (node for node in made.graph.node if node.op_type == "ReduceMean")
        assert len(mean.input) == (2 if opset >= 18 else 1)
        assert len(made.graph.initializer) == (1 if opset >= 18 else 0)
        assert ("axes" in {attribute.name for attribute in mean.attribute}) == (opset < 18)


@opsets
@pytest.mark.parametrize("everyone", [False, True])
def test_on_a_graph_input(opset: int, everyone: bool) -> None:
    net = Net(opset=opset, ir=8)
    x = net.input([2, 5])
    net.output(net.node("Add", net.node("Exp", x), net.node("Abs", x)), [2, 5])
    model = read_proto(net.model())
    readers = None if everyone else reads_of(model, "x", "Abs")
    (got,) = run(grafted(model, centre(tensor(model, "x"), readers)), feed(2, 5))
    x_ = feed(2, 5)["x"]
    assert close(got, np.exp(centred(x_) if everyone else x_) + np.abs(centred(x_)))


def test_an_input_that_is_put_out_as_it_is_cannot_become_another() -> None:
    net = Net(ir=8)
    x = net.input([2, 5])
    net.output(net.node("Exp", x), [2, 5])
    net.output(x, [2, 5])
    model = read_proto(net.model())
    with pytest.raises(NormtoolError, match="'x' is an input"):
        grafted(model, centre(tensor(model, "x")))


def test_nothing_is_put_ahead_of_what_it_reads() -> None:
    """The graft reads a second tensor, which is made later than the first."""
    net = Net(ir=8)
    x = net.input([2, 5])
    h = net.node("Neg", x, outputs=["h"])
    k = net.node("Exp", x, outputs=["k"])
    net.output(net.node("Sub", h, k), [2, 5])
    model = read_proto(net.model())
    total = Part("add", {"a": tensor(model, "h"), "b": tensor(model, "k")})
    (got,) = run(grafted(model, Graft(tensor(model, "h"), (total,))), feed(2, 5))
    assert close(got, -feed(2, 5)["x"])


def test_grafts_follow_each_other_on_one_tensor() -> None:
    model = two_readers(17)
    h = tensor(model, "h")
    exp, out = reads_of(model, "h", "Exp", "")
    first = Graft(h, (Part("mul", {"a": h}, {"b": scalar("half", 0.5)}),), (exp, out))
    got = run(grafted(model, first, centre(h, reads_of(model, "h", "Abs"))), feed(2, 5))
    x = feed(2, 5)["x"]
    assert close(got[0], np.exp(-x / 2))
    assert close(got[1], np.abs(centred(x)))
    assert close(got[2], -x / 2)


# ---- bodies and functions ------------------------------------------------------------------------------


def captured(opset: int) -> OnnxModel:
    """h is read in the main graph, and in both bodies of an If; one puts out what it does with it, one h."""
    net = Net(opset=opset, ir=8)
    h = net.node("Neg", net.input([2, 5]), outputs=["h"])
    chosen = net.input([], "chosen", dtype=np.bool_)
    bodies = {}
    for branch, op_type in (("then", "Exp"), ("else", "Identity")):
        inner = Net(opset=opset, prefix=f"{branch}_")
        inner.output(inner.node(op_type, h), [2, 5])
        bodies[f"{branch}_branch"] = inner.graph()
    net.output(net.node("If", chosen, **bodies), [2, 5])
    net.output(net.node("Abs", h), [2, 5])
    return read_proto(net.model())


@opsets
@pytest.mark.parametrize("everyone", [False, True])
def test_captured_by_bodies(opset: int, everyone: bool) -> None:
    model = captured(opset)
    readers = (
        None if everyone else [read for read in model.graph.readers(tensor(model, "h")) if read.op.scope.path]
    )
    made = grafted(model, centre(tensor(model, "h"), readers))
    x = feed(2, 5)["x"]
    for chosen in (True, False):
        inside, outside = run(made, {"x": x, "chosen": np.array(chosen)})
        assert close(inside, np.exp(-centred(x)) if chosen else -centred(x))
        assert close(outside, np.abs(centred(x) if everyone else x))


@opsets
def test_for_one_body_alone(opset: int) -> None:
    model = captured(opset)
    readers = [read for read in model.graph.readers(tensor(model, "h")) if "then" in str(read.op.scope)]
    made = grafted(model, centre(tensor(model, "h"), readers))
    x = feed(2, 5)["x"]
    assert close(run(made, {"x": x, "chosen": np.array(True)})[0], np.exp(-centred(x)))
    assert close(run(made, {"x": x, "chosen": np.array(False)})[0], -x)


@opsets
@pytest.mark.parametrize("everyone", [False, True])
def test_what_a_body_puts_out(opset: int, everyone: bool) -> None:
    net = Net(opset=opset, ir=8)
    x = net.input([2, 5])
    bodies = {}
    for branch in ("then", "else"):
        inner = Net(opset=opset, prefix=f"{branch}_")
        inner.output(inner.node("Neg", x, outputs=[branch]), [2, 5])
        bodies[f"{branch}_branch"] = inner.graph()
    net.output(net.node("If", net.input([], "chosen", dtype=np.bool_), **bodies), [2, 5])
    model = read_proto(net.model())
    readers = None if everyone else model.graph.readers(tensor(model, "then"))
    made = grafted(model, centre(tensor(model, "then"), readers))
    data = feed(2, 5)
    assert close(run(made, {**data, "chosen": np.array(True)})[0], -centred(data["x"]))
    assert close(run(made, {**data, "chosen": np.array(False)})[0], -data["x"])


@opsets
@pytest.mark.parametrize("where", ["h", "y", "a"], ids=["inside", "its output", "its input"])
def test_in_a_function(opset: int, where: str) -> None:
    inner = Net(opset=opset, prefix="f_")
    h = inner.node("Neg", inner.input([2, 5], "a"), outputs=["h"])
    inner.output(inner.node("Abs", h, outputs=["y"]))
    net = Net(opset=opset, ir=8)
    net.define("twice", inner)
    net.output(net.node("twice", net.node("twice", net.input([2, 5]), domain="local"), domain="local"), [2, 5])
    model = read_proto(net.model())
    (got,) = run(grafted(model, centre(tensor(model, where))), feed(2, 5))

    def once(x: Array) -> Array:
        return centred(np.abs(x)) if where == "y" else np.abs(centred(x))

    assert close(got, once(once(feed(2, 5)["x"])))


# ---- another norm in the place of a norm ---------------------------------------------------------------


def layer_norm(opset: int, output: bool = False) -> OnnxModel:
    net = Net(opset=opset, ir=8, seed=3)
    x = net.node("Neg", net.input([2, 3, 8]), outputs=["h"])
    gamma, beta = net.constant(np.linspace(-1, 2, 8, dtype=np.float32), "gamma"), net.weight(8, name="beta")
    y = net.node("LayerNormalization", x, gamma, beta, outputs=["y"], epsilon=EPSILON, name="norm")
    net.output(y if output else net.node("Exp", y), [2, 3, 8])
    return read_proto(net.model())


@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize(
    ("opset", "op_type"),
    [
        *((opset, "") for opset in OPSETS if opset >= 17),
        (17, "SimplifiedLayerNormalization"),
        (21, "SimplifiedLayerNormalization"),
        (23, "RMSNormalization"),
    ],
)
def test_layer_norm_gives_way_to_rms_norm(opset: int, op_type: str, output: bool) -> None:
    model = layer_norm(opset, output)
    y, h, gamma = (tensor(model, name) for name in ("y", "h", "gamma"))
    made = grafted(model, one_rms(y, h, gamma, op_type) if op_type else spelled_out_rms(y, h, gamma))
    new = [op_type] if op_type else ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]
    assert op_types(made) == ["Neg", *new, *([] if output else ["Exp"])]
    assert "beta" not in {stored.name for stored in made.graph.initializer}
    assert "gamma" in {stored.name for stored in made.graph.initializer}
    expected = rms(-feed(2, 3, 8)["x"], np.linspace(-1, 2, 8))
    (got,) = run(made, feed(2, 3, 8))
    assert close(got, expected if output else np.exp(expected))


@pytest.mark.parametrize("everyone", [False, True])
def test_an_op_of_another_domain_is_imported(everyone: bool) -> None:
    net = Net(opset=17, ir=8)
    h = net.node("Neg", net.input([2, 3, 8]), outputs=["h"])
    skip = net.weight(8, name="gamma")
    net.output(net.node("Mul", h, skip), [2, 3, 8])
    model = read_proto(net.model())
    h_, gamma = tensor(model, "h"), tensor(model, "gamma")
    inputs = {"x": h_, "skip": h_, "weight": gamma}
    op_type = "SkipSimplifiedLayerNormalization"
    part = Part(
        "skip_rms_norm", inputs, attributes={"epsilon": EPSILON}, op_type=op_type, domain="com.microsoft"
    )
    made = grafted(model, Graft(h_, (part,), None if everyone else tuple(model.graph.readers(h_))))
    assert {entry.domain for entry in made.opset_import} == {"", "com.microsoft"}
    weight = model.graph.input(op_of(model, "Mul"), "b")
    assert weight is gamma
    stored = next(onnx.numpy_helper.to_array(each) for each in made.graph.initializer)
    assert close(run(made, feed(2, 3, 8))[0], rms(-2 * feed(2, 3, 8)["x"], stored) * stored)


# ---- edits on what a graft has made -----------------------------------------------------------------------


def rms_op(model: OnnxModel, opset: int) -> tuple[Graft, Op, Draft]:
    y, h, gamma = (tensor(model, name) for name in ("y", "h", "gamma"))
    graft = spelled_out_rms(y, h, gamma)
    draft = Draft(model.graph)
    draft.carry_out(graft)
    assert {op.version for op in draft.grafted[graft]} == {opset}
    return graft, draft.put_in[graft], draft


@pytest.mark.parametrize("opset", [17, 21])
def test_the_scale_of_a_graft_is_bound_again_or_taken_out(opset: int) -> None:
    model = layer_norm(opset)
    x = -feed(2, 3, 8)["x"]
    wider = np.linspace(1, 3, 8, dtype=np.float32)
    graft, mul, draft = rms_op(model, opset)
    bound = grafted(model, graft, Rebind(mul, "b", Dense(wider), "gamma.new"), draft=draft)
    assert close(run(bound, feed(2, 3, 8))[0], np.exp(rms(x, wider)))
    graft, mul, draft = rms_op(model, opset)
    gone = grafted(model, graft, Splice(mul, "a"), draft=draft)
    assert "Mul" not in op_types(gone)
    assert close(run(gone, feed(2, 3, 8))[0], np.exp(rms(x, np.ones(8))))
    for made in (bound, gone):
        assert "gamma" not in {stored.name for stored in made.graph.initializer}


def test_a_weight_that_a_graft_reads_is_not_changed_under_it() -> None:
    net = Net(opset=17, ir=8)
    x = net.input([2, 8])
    y = net.node("Mul", x, net.constant(np.full(8, 2, np.float32), "w"), outputs=["y"])
    net.output(net.node("Exp", y), [2, 8])
    net.output(y, [2, 8])
    model = read_proto(net.model())
    y_, w = tensor(model, "y"), tensor(model, "w")
    graft = Graft(y_, (Part("add", {"a": y_, "b": w}),), tuple(reads_of(model, "y", "Exp")))
    rebind = Rebind(op_of(model, "Mul"), "b", Dense(np.full(8, 3, np.float32)), "w.new")
    made = grafted(model, graft, rebind)
    got = run(made, feed(2, 8))
    assert close(got[1], 3 * feed(2, 8)["x"])
    assert close(np.log(got[0]), 3 * feed(2, 8)["x"] + 2)


def test_a_graft_on_what_a_graft_has_made() -> None:
    model = layer_norm(17)
    graft, mul, draft = rms_op(model, 17)
    made = grafted(model, graft, centre(draft.output(mul)), draft=draft)
    expected = centred(rms(-feed(2, 3, 8)["x"], np.linspace(-1, 2, 8)))
    assert close(run(made, feed(2, 3, 8))[0], np.exp(expected))


def test_a_weight_bound_before_its_op_is_gone_is_not_stored() -> None:
    model = layer_norm(17)
    y, h, gamma = (tensor(model, name) for name in ("y", "h", "gamma"))
    rebind = Rebind(op_of(model, "LayerNormalization"), "bias", Dense(np.zeros(8, np.float32)), "bias.new")
    made = grafted(model, rebind, one_rms(y, h, gamma, "SimplifiedLayerNormalization"))
    assert {stored.name for stored in made.graph.initializer} == {"gamma"}


def test_places_say_where_the_constants_of_a_graft_are() -> None:
    model = layer_norm(17)
    graft, mul, _ = rms_op(model, 17)
    rebind = Rebind(mul, "b", Dense(np.ones(8, np.float32)), "gamma.new")
    result = apply_plan(model, Plan((), (Fold((), (), (graft, rebind), ()),), model.fingerprint))
    assert result.places == {
        ((graft, 0), "exponent"): "two",
        ((graft, 2), "b"): "epsilon",
        ((graft, 5), "b"): "gamma.new",
    }


# ---- the draft ------------------------------------------------------------------------------------------


def test_what_the_draft_says_of_a_graft() -> None:
    model = layer_norm(17)
    graft, mul, draft = rms_op(model, 17)
    ops = draft.grafted[graft]
    assert [op.spelling for op in ops] == ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]
    assert [draft.output(op).shape for op in ops] == [(2, 3, 8), *[(2, 3, 1)] * 3, (2, 3, 8), (2, 3, 8)]
    assert {draft.output(op).dtype for op in ops} == {np.dtype(np.float32)}
    assert len({draft.output(op).name for op in ops}) == len(ops)
    norm = op_of(model, "LayerNormalization")
    assert draft.current(norm) is None
    assert {draft.origin(op) for op in ops} == {norm}
    assert [read.op.spelling for read in draft.readers(draft.output(mul))] == ["Exp"]


def test_a_model_older_than_its_list_of_inputs_lists_new_constants_too() -> None:
    net = Net(opset=7, ir=3)
    net.output(net.node("Exp", net.node("Neg", net.input([2, 5]), outputs=["h"])), [2, 5])
    model = read_proto(net.model())
    h = tensor(model, "h")
    made = grafted(model, Graft(h, (Part("mul", {"a": h}, {"b": scalar("half", 0.5)}),)))
    assert {info.name for info in made.graph.input} == {"x", "half"}
    assert close(run(made, feed(2, 5))[0], np.exp(-feed(2, 5)["x"] / 2))


def test_an_op_that_onnx_does_not_have_is_refused() -> None:
    model = two_readers(17)
    h = tensor(model, "h")
    with pytest.raises(NormtoolError, match="no operator for 'rsqrt'"):
        grafted(model, Graft(h, (Part("rsqrt", {"x": h}),)))


def test_an_op_that_the_opset_does_not_have_is_noticed() -> None:
    model = layer_norm(17)
    y, h, gamma = (tensor(model, name) for name in ("y", "h", "gamma"))
    with pytest.raises(NormtoolError, match="fails the ONNX checker"):
        grafted(model, one_rms(y, h, gamma, "RMSNormalization"))
