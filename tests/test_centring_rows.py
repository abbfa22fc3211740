"""Every row of `centring.rows` is an equation, so both of its sides are computed, in float64, and compared.

Behind: with the operands of the answer centred, the output is centred. Ahead: with the operand shifted, each of
the outputs of the answer is shifted, and every other is what it was. Where an answer is refused, that of
somebody who did not look is tried, and has to be wrong.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import normtool
from normtool.centring import rows
from normtool.centring.places import Place
from normtool.centring.rows import Blocked
from normtool.constants import Constants
from normtool.formats.onnx.read import read_proto
from normtool.graph import GRAPH_OUTPUT, ModelGraph, Op
from normtool.proof import Form, form_of
from normtool.semantics import evaluate
from normtool.values import is_float, to_array
from tests import zoo
from tests.centring_cases import AHEAD, BEHIND, ROWS, Row, axis, op
from tests.zoo import Net

Array = np.ndarray[Any, Any]

#: Agreement of two ways to compute one number in float64.
AGREES = 1e-12

#: What a wrong answer moves the output by, at the least.
DIFFERS = 1e-3


def built(row: Row) -> tuple[ModelGraph, Op]:
    graph = _exported(row) if isinstance(row.build, nn.Module) else _in_onnx(row)
    (op,) = (op for op in graph.ops if op.kind not in (GRAPH_OUTPUT, "constant"))
    assert op.kind == row.kind
    return graph, op


def _in_onnx(row: Row) -> ModelGraph:
    net = Net(opset=row.opset, dtype=np.float64)
    assert not isinstance(row.build, nn.Module)
    names = row.build(net)
    for name in [names] if isinstance(names, str) else names:
        net.outputs.append(onnx.ValueInfoProto(name=name))
    model = net.model()
    return read_proto(onnx.shape_inference.infer_shapes(model, data_prop=True)).graph


def _exported(row: Row) -> ModelGraph:
    assert isinstance(row.build, nn.Module)
    inputs = tuple(torch.randn(shape, dtype=torch.float64) for shape in row.shapes)
    graph: ModelGraph = normtool.load(torch.export.export(row.build, inputs)).graph
    return graph


def content_of(form: Form, rng: np.random.Generator) -> dict[str, Array]:
    """Random numbers where data enters (0 and 1 where it is no float), and the constants."""
    content = {slot: to_array(value) for slot, value in form.constants.items()}
    for slot, tensor in form.data.items():
        assert tensor.shape is not None
        shape = tuple(int(n or 0) for n in tensor.shape)
        whole = tensor.dtype is not None and not is_float(tensor.dtype)
        content[slot] = rng.integers(0, 2, shape).astype(float) if whole else rng.normal(0.5, 1, shape)
    return content


def outputs(form: Form, content: Mapping[str, Array]) -> dict[str, Array]:
    return evaluate(form.kind, form.attributes, content)


def error_behind(row: Row, form: Form, answer: Mapping[str, Place | None]) -> float:
    """How far the output is from being centred, with what the answer says centred."""
    old = content_of(form, np.random.default_rng(0))
    new = dict(old)
    for slot, place in answer.items():
        new[slot] = np.zeros_like(old[slot]) if place is None else place.centred(old[slot])
    expected = row.place.centred(outputs(form, old)[row.slot])
    return difference(outputs(form, new)[row.slot], expected)


def error_ahead(row: Row, form: Form, answer: Mapping[str, Place | None]) -> float:
    """How far the outputs are from being shifted as the answer says, or from being what they were."""
    rng = np.random.default_rng(0)
    old = content_of(form, rng)
    apart = old[row.slot].reshape(row.place.apart(old[row.slot].shape))
    shift = rng.normal(2, 1, row.place.mean(old[row.slot]).shape)
    before, after = (
        outputs(form, old),
        outputs(form, {**old, row.slot: (apart + shift).reshape(old[row.slot].shape)}),
    )
    worst = 0.0
    for slot, expected in before.items():
        place, got = answer.get(slot), after[slot]
        if place is not None:
            expected, got = place.centred(expected), place.centred(got)
        worst = max(worst, difference(got, expected))
    return worst


def difference(got: Array, expected: Array) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def asked(row: Row) -> tuple[Form, Any]:
    graph, op = built(row)
    constants = Constants(graph)
    ask = rows.behind if row.direction == BEHIND else rows.ahead
    return form_of(graph, constants, op), ask(constants, op, row.slot, row.place)


def error_of(row: Row, form: Form, answer: Mapping[str, Place | None]) -> float:
    return (error_behind if row.direction == BEHIND else error_ahead)(row, form, answer)


@pytest.mark.parametrize("row", [row for row in ROWS if row.answer is not None], ids=str)
def test_the_equation_holds(row: Row) -> None:
    form, answer = asked(row)
    assert not isinstance(answer, Blocked), answer.reason
    assert dict(answer) == row.answer
    assert error_of(row, form, answer) <= AGREES


@pytest.mark.parametrize("row", [row for row in ROWS if row.answer is None], ids=str)
def test_without_its_condition_it_is_refused_and_would_not_hold(row: Row) -> None:
    form, answer = asked(row)
    assert isinstance(answer, Blocked)
    assert answer.reason.code == (row.code or ("observed_mean" if row.direction == AHEAD else "not_centrable"))
    assert row.naive is not None
    assert error_of(row, form, row.naive) >= DIFFERS


@pytest.mark.parametrize("direction", [BEHIND, AHEAD])
def test_every_row_has_a_case(direction: str) -> None:
    table = rows._BEHIND if direction == BEHIND else rows._AHEAD
    tried = {row.kind for row in ROWS if row.direction == direction and row.answer is not None}
    assert set(table) | rows.CARRIERS <= tried


def test_before_opset_13_a_softmax_is_over_all_axes_behind() -> None:
    """So a shift for each block of the first of them is no shift of them all."""
    row = Row("old", "softmax", AHEAD, op("Softmax", axis=1), "x", axis(1, 5), naive={}, opset=11)
    _, answer = asked(row)
    assert isinstance(answer, Blocked)
    x = np.random.default_rng(0).standard_normal((2, 5, 6))
    net = Net(opset=11, dtype=np.float64)
    net.output(op("Softmax", axis=1)(net), [2, 5, 6])  # type: ignore[arg-type]
    y, shifted = (zoo.run(net.model(), {"x0": each})[0] for each in (x, x + np.arange(6)))
    assert np.abs(y - shifted).max() > DIFFERS
