"""The free tests: every row of the table is an equation, so both sides are computed and compared.

The referee is `onnx.reference` in float64, which shares no line with normtool. Its grouped ConvTranspose is
wrong (onnx 1.23 raises, or mixes the groups), so that one operator comes from PyTorch.
"""

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_batch_normalization import BatchNormalization_9
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

import normtool
from normtool.rules import all_rules
from normtool.travel import Rule
from tests.rules.cases import cases, violations
from tests.rules.table import DIRECTIONS, Array, Case, Model, Violation

CASES, VIOLATIONS = cases(), violations()

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


class BatchNormalization(BatchNormalization_9):
    """Of opsets 9 to 13: the referee takes their momentum, which has a default, for a sign of training."""

    def _run(self, *operands: Any, epsilon: float, **_: Any) -> tuple[Any]:
        return super()._run(*operands, epsilon=epsilon)


def evaluate(model: Model, seed: int = 0) -> list[Array]:
    """The outputs on standard normal input; zeros and ones where integers enter, and True for a truth value."""
    rng = np.random.default_rng(seed)
    if isinstance(model, ExportedProgram):
        given = [torch.from_numpy(rng.standard_normal(tuple(x.shape))) for x in model.example_inputs[0]]
        return [y.detach().numpy() for y in tree_leaves(model.module()(*given))]
    feeds = {}
    for info in model.graph.input:
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        drawn = {"i": rng.integers(0, 2, shape), "b": True}.get(dtype.kind, rng.standard_normal(shape))
        feeds[info.name] = np.asarray(drawn, dtype)
    own_ops = [ConvTranspose, *([BatchNormalization] if model.opset_import[0].version < 14 else [])]
    return [np.asarray(y) for y in ReferenceEvaluator(model, new_ops=own_ops).run(None, feeds)]


def difference(model: Model, other: Model) -> float:
    """max|Δ| / max|expected| over all outputs; max|Δ| for an output that is 0."""
    pairs = list(zip(evaluate(model), evaluate(other), strict=True))
    assert all(expected.shape == got.shape for expected, got in pairs)
    return max(float(np.abs(a - b).max() / (np.abs(a).max() or 1.0)) for a, b in pairs)


def op_types(model: Model) -> list[str]:
    """Sorted; of a program the names of ATen's functions."""
    if isinstance(model, onnx.ModelProto):
        return sorted(node.op_type for node in model.graph.node)
    calls = [node.target for node in model.graph.nodes if node.op == "call_function"]
    return sorted(call.overloadpacket.__name__ for call in calls if isinstance(call, torch._ops.OpOverload))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_sides_agree(case: Case) -> None:
    model = case.build()
    result = normtool.fold(model, validate=False, **case.options)
    verdicts = [site.verdict for site in result.sites]
    gone = "lowered" if "lower" in case.options else "folded"
    assert sorted(verdicts) == sorted([gone] * (len(verdicts) - case.kept) + ["kept"] * case.kept)
    assert op_types(result.model) == sorted(case.left)
    assert difference(model, result.model) < AGREES


@pytest.mark.parametrize("violation", VIOLATIONS, ids=lambda violation: violation.name)
def test_a_violated_condition_is_refused_and_would_have_mattered(violation: Violation) -> None:
    model = violation.build()
    result = normtool.fold(model, validate=False, **violation.options)
    kept = [site for site in result.sites if site.verdict == "kept"]
    if violation.left:
        assert not kept
        assert op_types(result.model) == sorted(violation.left)
    else:
        assert violation.reason in {reason.code for site in kept for reason in site.reasons}
    assert difference(model, result.model) < AGREES
    assert difference(model, violation.wrong()) > DIFFERS


IMPLEMENTED = [
    (kind, direction)
    for kind, rule in all_rules().items()
    for direction in DIRECTIONS
    if getattr(type(rule), direction) is not getattr(Rule, direction)
]


@pytest.mark.parametrize(("kind", "direction"), IMPLEMENTED)
def test_every_rule_has_cases_and_violations(kind: str, direction: str) -> None:
    assert any((case.kind, case.direction) == (kind, direction) for case in CASES)
    assert any((violation.kind, violation.direction) == (kind, direction) for violation in VIOLATIONS)


def test_every_row_has_a_name_of_its_own() -> None:
    names = Counter(row.name for row in (*CASES, *VIOLATIONS))
    assert [name for name, count in names.items() if count > 1] == []
