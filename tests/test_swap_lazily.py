"""No weight is read before it is decided what becomes of the norms."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest

from normtool import swapping
from normtool.centring.facts import Fact, Facts
from normtool.constants import Constants
from normtool.formats.onnx.read import read_proto
from normtool.forms import norm_forms
from normtool.graph import ModelGraph
from normtool.options import SwapOptions
from normtool.proof import Proof
from tests.swap_faults import silence_the_proof
from tests.swap_nets import D, Transformer

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Unread:
    """A weight of which the shape is known, and nothing else."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def rows(self, start: int, stop: int) -> Array:
        raise AssertionError(f"rows {start} to {stop} of a weight of shape {self.shape} are read")


def _pre_norm(net: Transformer) -> onnx.ModelProto:
    x = net.node("Add", net.looked_up(net.table()), net.numbers(net.rng.normal(0.5, 1, (5, D))))
    for _ in range(2):
        x = net.block(x, 40)
    return net.result(net.linear(net.norm(x), D, 12))


def _behind_a_norm(net: Transformer) -> onnx.ModelProto:
    """With a Centre, and one that is kept."""
    x = net.norm(net.linear(net.tokens()))
    for _ in range(3):
        x = net.block(x)
    return net.result(net.linear(net.norm(x)), net.norm(net.node("Tanh", net.linear(net.norm(x)))))


def without_weights(model: onnx.ModelProto) -> ModelGraph:
    """The graph; matrices and tables cannot be read, γ, β and settings can."""
    graph = read_proto(model).graph
    hidden = [t for t in graph.tensors if t.value is not None and len(t.value.shape) > 1]
    assert len(hidden) > 4
    for tensor in hidden:
        assert tensor.value is not None
        tensor.value = Unread(tensor.value.shape, tensor.value.dtype)
    return graph


@pytest.mark.parametrize("build", [_pre_norm, _behind_a_norm])
def test_the_analysis_reads_no_weight(build: Any) -> None:
    graph = without_weights(build(Transformer()))
    forms = norm_forms(graph)
    facts = Facts(Constants(graph), forms)
    wanted = {form: fact for form in forms if isinstance(fact := facts.wanted(form), Fact)}
    solution = facts.solve(wanted)
    assert len(wanted) == len(forms)
    assert len(solution.swapped) >= len(forms) - 1


@pytest.mark.parametrize("build", [_pre_norm, _behind_a_norm])
def test_the_whole_plan_is_made_before_a_weight_is_read(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof is what reads them, and β on its way into a bias, b + W·β; without those, whoever writes."""
    silence_the_proof(monkeypatch)
    monkeypatch.setattr(swapping, "prove", lambda steps, edits, errors: Proof(0, 0.0, 0.0))
    plan = swapping.plan_swap(without_weights(build(Transformer())), options=SwapOptions(keep_affine=True))
    assert [site.verdict for site in plan.sites].count("swapped") >= len(plan.sites) - 1
