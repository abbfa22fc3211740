"""Every awkward module is counted as a person would count it: with dataflow, without, and from its .pt2."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import normtool
from normtool.errors import UnsafeModel
from tests.formats.torch.awkward import AWKWARD, Awkward, Norm

every_case = pytest.mark.parametrize("case", AWKWARD, ids=str)


def _scanned(model: Any, inputs: Any = None) -> dict[str, Any]:
    found = normtool.scan(model, inputs).to_dict()
    assert json.loads(json.dumps(found)) == found
    return found


def _totals(found: Mapping[str, Any], case: Awkward) -> dict[str, int]:
    return {name: found["parameters"][name] for name in case.totals}


def _bytes(found: Mapping[str, Any]) -> tuple[int, int, int]:
    parameters = found["parameters"]
    return parameters["learnable_bytes"], parameters["frozen_bytes"], parameters["buffer_bytes"]


def _norms(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    assert len({norm["name"] for norm in found["norms"]}) == len(found["norms"])
    fields = vars(Norm(""))
    return {norm["name"]: {name: norm[name] for name in fields} for norm in found["norms"]}


def _no_dataflow(found: Mapping[str, Any]) -> list[str]:
    return [each["message"] for each in found["diagnostics"] if each["code"] == "no_dataflow"]


def _without_dataflow(case: Awkward) -> dict[str, dict[str, Any]]:
    """Functional norms are missing, and nothing says how often the others run."""
    modules = {name: norm for name, norm in case.norms.items() if norm.evidence not in ("op", "pattern")}
    return {name: vars(norm) | {"calls": None} for name, norm in modules.items()}


# ---- the three ways in ------------------------------------------------------------------------


@every_case
def test_with_inputs(case: Awkward) -> None:
    found = _scanned(case.make(), case.inputs())
    assert _totals(found, case) == case.totals
    if case.refused:
        assert _norms(found) == _without_dataflow(case)
        (why,) = _no_dataflow(found)
        assert why.removeprefix("torch.export fails: ").startswith(case.refused)
    else:
        assert _norms(found) == {name: vars(norm) for name, norm in case.norms.items()}
        assert _no_dataflow(found) == []


@every_case
def test_without_inputs(case: Awkward) -> None:
    found = _scanned(case.make())
    assert _totals(found, case) == case.totals
    assert _norms(found) == _without_dataflow(case)
    assert _no_dataflow(found) == ["no example inputs were given"]


@every_case
def test_from_pt2(case: Awkward, tmp_path: Path) -> None:
    """The same totals and norms, but for what `saved` and `saved_norms` state.

    A norm that is no op of its own needs a telling class name, which a program has only where it calls it.
    """
    if case.refused:
        pytest.skip("torch.export refuses it, which test_with_inputs checks")
    path = tmp_path / "model.pt2"
    if case.unsaved:
        with pytest.raises((UnsafeModel, NotImplementedError), match=case.unsaved):
            _save_and_scan(case, path)
        return
    found = _save_and_scan(case, path)
    assert _totals(found, case) == {**case.totals, **case.saved}
    expected = {name: _elements(vars(norm)) for name, norm in (case.saved_norms or case.norms).items()}
    seen = {name: _elements(norm) for name, norm in _norms(found).items()}
    assert seen == {name: expected.get(name) for name in seen}
    missing = {name: norm for name, norm in (case.saved_norms or case.norms).items() if name not in seen}
    assert all(_may_be_missing(norm) for norm in missing.values()), missing


def _save_and_scan(case: Awkward, path: Path) -> dict[str, Any]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(case.make(), case.inputs(), strict=False), path)
    return _scanned(path)


def _elements(norm: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(norm[name] for name in ("kind", "learnable", "frozen", "buffers"))


def _may_be_missing(norm: Norm) -> bool:
    return norm.calls == 0 or norm.evidence == "probe"


# ---- against other ways to count --------------------------------------------------------------


@every_case
def test_bytes(case: Awkward) -> None:
    """Float32 but for running counts, unless stated."""
    found = _scanned(case.make())
    if case.bytes is not None:
        assert _bytes(found) == case.bytes
    elif not case.uninitialised:
        assert _bytes(found)[:2] == (4 * case.learnable, 4 * case.frozen)


@every_case
def test_named_and_unique_are_torchs_own_sums(case: Awkward) -> None:
    model = case.make()
    if any(type(child).__module__.startswith("torch.ao.nn.") for child in model.modules()):
        pytest.skip("torch does not count packed weights at all")
    named = [p for _, p in model.named_parameters(remove_duplicate=False) if not is_lazy(p)]
    unique = [p for p in model.parameters() if not is_lazy(p)]
    assert case.totals["named"] == sum(p.numel() for p in named)
    assert case.totals["unique"] == sum(p.numel() for p in unique)


def test_the_reason_is_the_exporters_own_first_line() -> None:
    case = next(case for case in AWKWARD if case.name == "two devices")
    with pytest.raises(Exception, match="device") as raised:
        torch.export.export(case.make(), case.inputs(), strict=False)
    (why,) = _no_dataflow(_scanned(case.make(), case.inputs()))
    assert (
        why == f"torch.export fails: {type(raised.value).__name__}: {str(raised.value).strip().splitlines()[0]}"
    )


def test_lazy_tensors_are_unknown_and_said_to_be() -> None:
    found = _scanned(nn.Sequential(nn.LazyLinear(2)))
    assert found["parameters"]["uninitialised"] == 2
    first, *_ = found["diagnostics"]
    assert (first["code"], first["where"]) == ("uninitialised", "0.weight")


def test_a_lazy_module_under_two_names_is_unknown_once() -> None:
    layer = nn.LazyLinear(2)
    assert _scanned(nn.Sequential(layer, layer))["parameters"]["uninitialised"] == 2


def test_norms_share_a_weight() -> None:
    first, second = nn.LayerNorm(4), nn.LayerNorm(4)
    second.weight = first.weight
    found = _scanned(nn.Sequential(first, second))
    assert [norm["learnable"] for norm in found["norms"]] == [8, 8]
    assert [norm["shared_with"] for norm in found["norms"]] == [["1"], ["0"]]
    assert found["summary"]["layer_norm"] == {"count": 2, "learnable": 12, "buffers": 0}  # 4 + 4 + 4
    assert found["parameters"]["learnable"] == 12


def test_many_parameters_on_one_storage() -> None:
    """A flat buffer, the way distributed optimisers keep weights; in an order that joins runs."""
    flat = torch.zeros(1000)
    model = nn.ParameterList(
        [nn.Parameter(flat[i : i + 15]) for i in [*range(0, 990, 20), *range(10, 990, 20)]]
    )
    parameters = _scanned(model)["parameters"]
    assert parameters["named"] == 99 * 15  # 50 from 0, 49 from 10
    assert parameters["learnable"] == 995  # places 0 to 980 + 15, without a gap


@pytest.mark.parametrize(
    "norm",
    [nn.LazyInstanceNorm2d(affine=True, track_running_stats=True), nn.LazyBatchNorm3d()],
    ids=lambda norm: type(norm).__name__,
)
def test_lazy_norms_are_known_by_class(norm: nn.Module) -> None:
    (found,) = _scanned(nn.Sequential(norm))["norms"]
    assert found["kind"] in type(norm).__name__.lower().replace("norm", "_norm")
    assert (found["evidence"], found["uninitialised"], found["buffers"]) == ("module", 4, 1)
