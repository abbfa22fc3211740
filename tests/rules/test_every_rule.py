"""The free tests: every row of the table is an equation, so both sides are computed and compared.

The referee is `onnx.reference` in float64, which shares no line with normtool. Its grouped ConvTranspose is
wrong (onnx 1.23 raises, or mixes the groups), so that one operator comes from PyTorch.
"""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import normtool
from normtool.rules import backward_rules
from tests.rules.cases import Case, Violation, cases, violations

CASES, VIOLATIONS = list(cases()), list(violations())

#: Agreement of two ways to compute one number in float64.
AGREES = 1e-12

#: What a wrong fold moves the output by, at the least.
DIFFERS = 1e-3


class ConvTranspose(OpRun):
    """Transposed convolution by PyTorch, symmetric padding only."""

    def _run(self, x: Any, w: Any, b: Any = None, **attributes: Any) -> tuple[Any]:
        rank = x.ndim - 2
        function = getattr(torch.nn.functional, f"conv_transpose{rank}d")
        bias = None if b is None else torch.tensor(b)
        y = function(
            torch.tensor(x),
            torch.tensor(w),
            bias,
            stride=attributes["strides"] or 1,
            padding=(attributes["pads"] or [0] * rank)[:rank],
            groups=attributes["group"],
        )
        return (y.numpy(),)


def evaluate(model: onnx.ModelProto, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """The outputs in float64 on standard normal input."""
    rng = np.random.default_rng(seed)
    feeds = {
        info.name: rng.standard_normal([dim.dim_value for dim in info.type.tensor_type.shape.dim])
        for info in model.graph.input
    }
    return [np.asarray(y) for y in ReferenceEvaluator(model, new_ops=[ConvTranspose]).run(None, feeds)]


def difference(model: onnx.ModelProto, other: onnx.ModelProto) -> float:
    """max|Δ| / max|expected| over all outputs; max|Δ| for an output that is 0."""
    pairs = list(zip(evaluate(model), evaluate(other), strict=True))
    assert all(expected.shape == got.shape for expected, got in pairs)
    return max(float(np.abs(a - b).max() / (np.abs(a).max() or 1.0)) for a, b in pairs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_sides_agree(case: Case) -> None:
    model = case.build()
    result = normtool.fold(model, validate=False)
    assert [site.verdict for site in result.sites] == ["folded"] * len(result.sites)
    assert sorted(node.op_type for node in result.model.graph.node) == sorted(case.left)
    assert difference(model, result.model) < AGREES


@pytest.mark.parametrize("violation", VIOLATIONS, ids=lambda violation: violation.name)
def test_a_violated_condition_is_refused_and_would_have_mattered(violation: Violation) -> None:
    model = violation.build()
    result = normtool.fold(model, validate=False)
    kept = [site for site in result.sites if site.verdict == "kept"]
    assert violation.reason in {reason.code for site in kept for reason in site.reasons}
    assert difference(model, result.model) < AGREES
    assert difference(model, violation.wrong()) > DIFFERS


@pytest.mark.parametrize("kind", backward_rules())
def test_every_rule_has_cases_and_violations(kind: str) -> None:
    assert any(case.kind == kind for case in CASES)
    assert any(violation.kind == kind for violation in VIOLATIONS)
