"""The checks are seen to fail: each planted mistake is caught by the site proof *and* by the free tests.

A proof that agrees with every fold, or a table whose cases cannot tell right from wrong, would go green here
first. So every mistake is made once with the proof watching, and once with the proof silenced.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import normtool
from normtool import affine, merging, planner
from normtool.constants import Constants
from normtool.edits import Rebind
from normtool.proof import Proof, prove
from normtool.rules import (
    _axes,
    _weights,
    batch_norm,
    conv,
    conv_transpose,
    elementwise,
    joining,
    linear,
    lowering,
    matmul,
    pooling,
    quantised,
    shapes,
)
from normtool.values import EXTENDED, Rounded
from normtool.walk import Walk
from tests.rules.table import Case, Model, Violation
from tests.rules.test_every_rule import AGREES, CASES, VIOLATIONS, difference

Patch = Callable[[pytest.MonkeyPatch], None]


def _epsilon_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = affine.batch_norm
    patch.setattr(batch_norm, "batch_norm", lambda g, b, m, v, eps: right(g, b, m, v, 0.0))


def _mean_sign_flipped(patch: pytest.MonkeyPatch) -> None:
    right = affine.batch_norm
    patch.setattr(batch_norm, "batch_norm", lambda g, b, m, v, eps: right(g, b, -m, v, eps))


def _sqrt_missing(patch: pytest.MonkeyPatch) -> None:
    def wrong(g: Any, b: Any, m: Any, v: Any, eps: float) -> affine.Affine:
        s = g / (v + EXTENDED(eps))
        return affine.Affine(1, s, b - m * s)

    patch.setattr(batch_norm, "batch_norm", wrong)


def _bias_not_scaled(patch: pytest.MonkeyPatch) -> None:
    right = _weights.rebound_bias

    def wrong(constants: Any, op: Any, map_: Any, bias: Any, dtype: Any) -> Any:
        rebind = right(constants, op, map_, None, dtype)
        shifted = map_.t if bias is None else bias + map_.t
        return type(rebind)(rebind.op, rebind.slot, Rounded(shifted, dtype), rebind.name)

    patch.setattr(conv, "rebound_bias", wrong)
    patch.setattr(conv_transpose, "rebound_bias", wrong)


def _groups_permuted(patch: pytest.MonkeyPatch) -> None:
    def wrong(s: Any, groups: int, shape: tuple[int, ...]) -> Any:
        by_group = s.reshape(shape[1], groups).T  # (Cout/g, g) read as (g, Cout/g)
        rows = by_group if groups == 1 else np.repeat(by_group, shape[0] // groups, axis=0)
        return rows.reshape(*rows.shape, *[1] * (len(shape) - 2))

    patch.setattr(conv_transpose, "_per_input_row", wrong)


def _composed_the_wrong_way_round(patch: pytest.MonkeyPatch) -> None:
    right = affine.Affine.after
    patch.setattr(affine.Affine, "after", lambda self, inner: right(inner, self))


# ---- forward ----------------------------------------------------------------------------------


def _inputs_of_groups_permuted(patch: pytest.MonkeyPatch) -> None:
    def wrong(s: Any, groups: int, shape: tuple[int, ...]) -> Any:
        by_group = s.reshape(shape[1], groups).T  # (Cin/g, g) read as (g, Cin/g)
        rows = np.repeat(by_group, shape[0] // groups, axis=0)
        return rows.reshape(*rows.shape, *[1] * (len(shape) - 2))

    patch.setattr(conv, "_by_input", wrong)


def _shift_forgotten(patch: pytest.MonkeyPatch) -> None:
    def wrong(constants: Any, op: Any, bias: Any, weight: Any, sums: Any, channels: int) -> Any:
        return Rebind(op, "bias", Rounded(np.zeros(channels) if bias is None else bias, weight.dtype), "bias")

    patch.setattr(conv, "raised_bias", wrong)


def _padding_overlooked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(conv, "pads", lambda constants, op: False)


def _groups_of_sums_permuted(patch: pytest.MonkeyPatch) -> None:
    right = conv_transpose._sums
    patch.setattr(
        conv_transpose, "_sums", lambda w, t, groups: right(w, t.reshape(groups, -1)[::-1].ravel(), groups)
    )


def _summed_over_the_other_axis(patch: pytest.MonkeyPatch) -> None:
    right = linear._sums
    patch.setattr(linear, "_sums", lambda weight, t, transposed: right(weight, t, not transposed))


def _summed_over_columns(patch: pytest.MonkeyPatch) -> None:
    right = matmul._sums
    patch.setattr(matmul, "_sums", lambda weight, t, axis: right(weight, t, -3 - axis))


def _anything_is_a_softmax(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(matmul, "is_softmax", lambda constants, tensor: True)


def _any_softmax_sums_to_one(patch: pytest.MonkeyPatch) -> None:
    right = Constants.attribute

    def wrong(self: Any, op: Any, name: str) -> Any:
        return -1 if (op.kind, name) == ("softmax", "axis") else right(self, op, name)

    patch.setattr(Constants, "attribute", wrong)


def _mean_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = batch_norm._parameters

    def wrong(constants: Any, op: Any) -> Any:
        gamma, beta, mean, var = right(constants, op)
        return gamma, beta, 0 * mean, var

    patch.setattr(batch_norm, "_parameters", wrong)


# ---- on the way -------------------------------------------------------------------------------


def _s_for_its_inverse(patch: pytest.MonkeyPatch) -> None:
    right = elementwise._passed

    def wrong(constants: Any, op: Any, slot: str, map_: Any) -> Any:
        passed = right(constants, op, slot, map_)
        return affine.Affine(passed.axis, 1 / passed.s, passed.t)

    patch.setattr(elementwise, "_passed", wrong)


def _sign_of_the_second_term_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(elementwise, "_SIGNS", {"add": {"a": 1, "b": 1}, "sub": {"a": 1, "b": 1}})


def _spreading_overlooked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(elementwise, "_length", lambda tensor, axis: None)


def _axis_off_by_one(patch: pytest.MonkeyPatch) -> None:
    right = _axes._in_block

    def wrong(map_: Any, start: Any, before: Any, after: Any) -> Any:
        return right(map_.at(map_.axis + 1), start, before, after)

    patch.setattr(_axes, "_in_block", wrong)


def _permutation_inverted(patch: pytest.MonkeyPatch) -> None:
    right = shapes.permuted
    patch.setattr(
        shapes, "permuted", lambda map_, order: right(map_, [order.index(a) for a in range(len(order))])
    )


def _slices_swapped(patch: pytest.MonkeyPatch) -> None:
    right = joining._parts
    patch.setattr(joining, "_parts", lambda *arguments: dict(reversed(right(*arguments).items())))


def _parts_swapped(patch: pytest.MonkeyPatch) -> None:
    right = joining._outputs
    patch.setattr(joining, "_outputs", lambda *arguments: dict(reversed(right(*arguments).items())))


def _cut_from_the_front(patch: pytest.MonkeyPatch) -> None:
    right = joining._cuts

    def wrong(constants: Any, op: Any) -> Any:
        cuts = right(constants, op).items()
        return {a: slice(0, cut.stop - cut.start) if a == 1 else cut for a, cut in cuts}

    patch.setattr(joining, "_cuts", wrong)


def _counted_padding_overlooked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pooling, "_refusal", lambda constants, op, map_: None)


def _smallest_for_largest(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pooling, "_max_refusal", lambda constants, op, map_: None)


def _not_refilled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pooling, "_refilled", lambda constants, op, filled, value: ())


def _other_channels_overlooked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(joining.Slice, "ignores", lambda *arguments: True)


def _other_readers_overlooked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Walk, "_unharmed", lambda self, read, map_: True)


def _border_turned_round(patch: pytest.MonkeyPatch) -> None:
    right = conv.evaluate
    patch.setattr(conv, "evaluate", lambda *arguments: {"y": right(*arguments)["y"][..., ::-1]})


def _integers_turned_round(patch: pytest.MonkeyPatch) -> None:
    right = quantised.Dense
    patch.setattr(quantised, "Dense", lambda content: right(-content))


def _negative_scale_passed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lowering, "_refusal", lambda op, map_: None)


# ---- branches ---------------------------------------------------------------------------------


def _embedded_elsewhere(patch: pytest.MonkeyPatch) -> None:
    right = merging._offset

    def wrong(own: Any, large: Any) -> Any:
        offset = right(own, large)
        return offset and offset[::-1]

    patch.setattr(merging, "_offset", wrong)


def _diagonal_beside_itself(patch: pytest.MonkeyPatch) -> None:
    right = merging._Part.add_to

    def wrong(self: Any, rows: Any, *where: int) -> None:
        mine = np.zeros_like(rows)
        right(self, mine, *where)
        rows += np.roll(mine, 1, axis=1) if self.weight is None else mine

    patch.setattr(merging._Part, "add_to", wrong)


def _inner_scale_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = merging.Merger._bias

    def wrong(self: Any, whole: Any, channels: int) -> Any:
        branches = tuple(replace(branch, s=np.ones_like(branch.s)) for branch in whole.branches)
        return right(self, replace(whole, branches=branches), channels)

    patch.setattr(merging.Merger, "_bias", wrong)


#: What is planted, and the row whose model shows it: a case, or a violation that is no longer refused.
MUTATIONS: dict[str, tuple[Patch, str]] = {
    "epsilon forgotten": (_epsilon_forgotten, "conv-2d-g1-bias-s1-p0-d1"),
    "mean sign flipped": (_mean_sign_flipped, "conv-2d-g1-bias-s1-p0-d1"),
    "sqrt missing": (_sqrt_missing, "conv-2d-g1-bias-s1-p0-d1"),
    "bias not scaled": (_bias_not_scaled, "conv-2d-g1-bias-s1-p0-d1"),
    "bias not scaled, transposed": (_bias_not_scaled, "conv_transpose-2d-g1-4to4-bias"),
    "grouped layout permuted": (_groups_permuted, "conv_transpose-2d-g2-6to6-bias"),
    "composed the wrong way round": (_composed_the_wrong_way_round, "bn-bn"),
    "composed the wrong way round, forward": (_composed_the_wrong_way_round, "bn-bn-forward"),
    "inputs of groups permuted": (_inputs_of_groups_permuted, "conv-forward-2d-g2-4to4-bias"),
    "shift forgotten": (_shift_forgotten, "conv-forward-2d-g1-4to6-bias"),
    "padding overlooked": (_padding_overlooked, "conv-forward-padded-shift"),
    "groups of sums permuted": (_groups_of_sums_permuted, "conv_transpose-forward-2d-g2-4to4-1x1"),
    "summed over the other axis": (_summed_over_the_other_axis, "linear-forward-00-alpha1.0-beta1.0-c5"),
    "summed over columns": (_summed_over_columns, "matmul-forward-rank2-right"),
    "anything is a softmax": (_anything_is_a_softmax, "matmul-no-softmax"),
    "any softmax sums to one": (_any_softmax_sums_to_one, "matmul-softmax-of-columns"),
    "mean forgotten where a norm stays": (_mean_forgotten, "bn-into-two-norms"),
    "s for its inverse": (_s_for_its_inverse, "Add-terms-forward"),
    "sign of the second term forgotten": (_sign_of_the_second_term_forgotten, "Sub-shift-to-the-second"),
    "spreading overlooked": (_spreading_overlooked, "Mul-spreads-the-data"),
    "axis off by one": (_axis_off_by_one, "Flatten-flat-square"),
    "permutation inverted": (_permutation_inverted, "transposed-the-other-way-forward"),
    "slices swapped": (_slices_swapped, "concat-equal-parts-backward"),
    "slices swapped, forward": (_slices_swapped, "concat-equal-parts-forward"),
    "parts swapped": (_parts_swapped, "split-halves-exchanged-backward"),
    "cut from the front": (_cut_from_the_front, "slice-channels"),
    "other channels overlooked": (_other_channels_overlooked, "slice-overlapping"),
    "other readers overlooked": (_other_readers_overlooked, "conv-read-twice"),
    "outputs of the model overlooked": (_other_readers_overlooked, "conv-put-out"),
    "counted padding overlooked": (_counted_padding_overlooked, "average-counted-backward"),
    "smallest for largest": (_smallest_for_largest, "max-negative-forward"),
    "not refilled": (_not_refilled, "pad-zeros-refilled"),
    "not refilled, forward": (_not_refilled, "pad-value-one-channel-forward"),
    "border turned round": (_border_turned_round, "conv-border-map-padded"),
    "integers turned round": (_integers_turned_round, "dequantised-per-channel"),
    "negative scale passed": (_negative_scale_passed, "relu-negative-forward"),
    "embedded elsewhere": (_embedded_elsewhere, "merging-offset-front"),
    "diagonal beside itself": (_diagonal_beside_itself, "merging-groups-2"),
    "inner scale forgotten": (_inner_scale_forgotten, "merging-norm-behind"),
}
PLANTED = pytest.mark.parametrize(("patch", "row"), MUTATIONS.values(), ids=MUTATIONS.keys())


def _row(name: str) -> Case | Violation:
    return next(each for each in (*CASES, *VIOLATIONS) if each.name == name)


def _is_seen(model: Model, folded: Model) -> bool:
    """Does the referee tell the two apart, if it can run the second at all?"""
    try:
        return difference(model, folded) > 1e3 * AGREES
    except ValueError as error:
        return "Shape inconsistencies" in str(error)


@PLANTED
def test_the_site_proof_catches(patch: Patch, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, options, failed = _row(row).build(), _row(row).options, set()

    def watched(*arguments: Any) -> Proof:
        proof = prove(*arguments)
        failed.update(reason.code for reason in proof.failures)
        return proof

    patch(monkeypatch)
    monkeypatch.setattr(planner, "prove", watched)
    result = normtool.fold(model, validate=False, **options)
    assert "internal" in failed
    assert difference(model, result.model) < AGREES  # what failed its proof was not made


@PLANTED
def test_the_free_tests_catch(patch: Patch, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = _row(row).build(), _row(row).options
    patch(monkeypatch)
    monkeypatch.setattr(planner, "prove", lambda *arguments: Proof(0, 0.0, 0.0))
    result = normtool.fold(model, validate=False, **options)
    assert {"folded", "lowered"} & {site.verdict for site in result.sites}
    assert _is_seen(model, result.model)
