"""The checks are seen to fail: each planted mistake is caught by the site proof *and* by the free tests.

A proof that agrees with every fold, or a table whose cases cannot tell right from wrong, would go green here
first. So every mistake is made once with the proof watching, and once with the proof silenced.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import normtool
from normtool import affine, planner
from normtool.proof import Proof
from normtool.rules import _bias, batch_norm, conv, conv_transpose
from normtool.values import EXTENDED, Rounded
from tests.rules.test_every_rule import AGREES, CASES, difference

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
    right = _bias.rebound_bias

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


MUTATIONS: dict[str, tuple[Patch, str]] = {
    "epsilon forgotten": (_epsilon_forgotten, "conv-2d-g1-bias-s1-p0-d1"),
    "mean sign flipped": (_mean_sign_flipped, "conv-2d-g1-bias-s1-p0-d1"),
    "sqrt missing": (_sqrt_missing, "conv-2d-g1-bias-s1-p0-d1"),
    "bias not scaled": (_bias_not_scaled, "conv-2d-g1-bias-s1-p0-d1"),
    "bias not scaled, transposed": (_bias_not_scaled, "conv_transpose-2d-g1-4to4-bias"),
    "grouped layout permuted": (_groups_permuted, "conv_transpose-2d-g2-6to6-bias"),
    "composed the wrong way round": (_composed_the_wrong_way_round, "bn-bn"),
}
PLANTED = pytest.mark.parametrize(("patch", "case"), MUTATIONS.values(), ids=MUTATIONS.keys())


@PLANTED
def test_the_site_proof_catches(patch: Patch, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = next(c for c in CASES if c.name == case).build()
    patch(monkeypatch)
    result = normtool.fold(model, validate=False)
    assert {reason.code for site in result.sites for reason in site.reasons} == {"internal"}
    assert difference(model, result.model) < AGREES  # what failed its proof was not made


@PLANTED
def test_the_free_tests_catch(patch: Patch, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = next(c for c in CASES if c.name == case).build()
    patch(monkeypatch)
    monkeypatch.setattr(planner, "prove", lambda *arguments: Proof(0, 0.0, 0.0))
    result = normtool.fold(model, validate=False)
    assert [site.verdict for site in result.sites] == ["folded"] * len(result.sites)
    assert difference(model, result.model) > 1e3 * AGREES
