"""Published architectures in ONNX: which LayerNorms are swapped, with what help, and is it the same function?

Each is exported with the LayerNorms as operators and spelled out twice, and converted to opset 20 and 23.
Every number is compared in float64, where nothing can hide behind a rounding; in float32 the result may be
twice as far from the original in float64 as the original in float32 is.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import version_converter
from torch.utils._pytree import tree_leaves

import normtool
from normtool.planner import Site
from tests import swap_onnx, zoo
from tests.swap_faults import force
from tests.swap_models import MODELS, Expected, SwapModel, refuse_default_initialisation
from tests.swap_onnx import Feeds

pytestmark = pytest.mark.usefixtures("worker_in_this_process")

#: Agreement of two ways to compute one number in float64.
AGREES = 1e-12

#: What a wrong swap moves the output by, at the least.
DIFFERS = 1e-3


def exported(model: SwapModel, opset: int = 18) -> onnx.ModelProto:
    """By PyTorch's exporter, the outputs called as the model calls them."""
    module, inputs = model.make(), model.inputs()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = module(**inputs)
        named = hasattr(found, "items")
        names = [key for key, value in found.items() if isinstance(value, torch.Tensor)] if named else None
        program = torch.onnx.export(
            module,
            (),
            kwargs=inputs,
            dynamo=True,
            opset_version=opset,
            verbose=False,
            output_names=names,
        )
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    return proto


#: How many inputs a model is run on: the few roundings of one are no measure of another's.
INPUTS = 4


def feeds_of(model: SwapModel) -> list[Feeds]:
    """The model's own inputs, and others like them."""
    own = {name: tensor.numpy() for name, tensor in model.inputs().items()}
    rng = np.random.default_rng(0)

    def like(array: Any) -> Any:
        if np.issubdtype(array.dtype, np.floating):
            return rng.standard_normal(array.shape).astype(array.dtype)
        return rng.permutation(array.reshape(-1)).reshape(array.shape)

    return [own, *({name: like(array) for name, array in own.items()} for _ in range(INPUTS - 1))]


def forms_of(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The same model in every form, by name."""
    yield "opset 18", proto
    for spelling in swap_onnx.SPELLINGS:
        yield f"opset 18, spelled out ({spelling})", swap_onnx.spelled(proto, spelling)
    for opset in (20, 23):
        yield f"opset {opset}", version_converter.convert_version(proto, opset)


# ---- what is expected ---------------------------------------------------------------------------------


def layer_norms(result: normtool.Rewrite) -> list[Site]:
    return [site for site in result.sites if site.norm.kind == "layer_norm"]


def centres(result: normtool.Rewrite) -> set[str]:
    return {
        centre
        for site in result.sites
        if site.fold is not None
        for centre in site.fold.about.get("centring", {}).get("centres", ())
    }


def check_counts(result: normtool.Rewrite, expected: Expected) -> None:
    sites = layer_norms(result)
    counts = Counter(site.verdict for site in sites)
    reasons = [reason for site in sites if site.verdict == "kept" for reason in site.reasons]
    assert len(sites) == expected.norms
    assert counts["swapped"] + counts["folded"] == result.swapped == expected.swapped, reasons
    assert counts["folded"] == expected.folded
    assert len(centres(result)) == expected.centres
    for site in sites:
        if site.verdict == "kept":
            assert any(
                code == r.code and text in r.message for code, text in expected.kept for r in site.reasons
            )
    for code, text in expected.kept:
        assert any(code == reason.code and text in reason.message for reason in reasons), (code, text, reasons)


def check_numbers(
    proto: onnx.ModelProto, result: normtool.Rewrite, wide: normtool.Rewrite, inputs: list[Feeds]
) -> tuple[float, float]:
    """(relative error in float64, how many times the original's own error in float32)."""
    outputs = [each.name for each in result.model.graph.output]
    original = swap_onnx.with_outputs(proto, outputs)
    truth = swap_onnx.run_wide(swap_onnx.widened(original), inputs)
    error = zoo.relative_error(truth, swap_onnx.run_wide(wide.model, inputs))
    own = swap_onnx.error(truth, swap_onnx.run(original, inputs))
    return error, swap_onnx.error(truth, swap_onnx.run(result.model, inputs)) / own


def models(wanted: Callable[[SwapModel], bool] = lambda model: True) -> pytest.MarkDecorator:
    long = [pytest.mark.long, pytest.mark.slow]
    chosen = [
        pytest.param(each, id=each.name, marks=[] if each.quick else long) for each in MODELS if wanted(each)
    ]
    return pytest.mark.parametrize("model", chosen)


@models()
def test_it_is_swapped_in_every_form(model: SwapModel) -> None:
    proto, inputs = exported(model), feeds_of(model)
    for name, form in forms_of(proto):
        validated = name in ("opset 18", "opset 23")
        result = normtool.swap(form, validate=validated, **model.options)
        check_counts(result, model.expected)
        if result.changed and validated:
            assert result.validation is not None
            assert result.validation.verdict == "equal", name
        types = Counter(zoo.op_types(result.model))
        if name == "opset 23":
            assert types["RMSNormalization"] == model.expected.swapped - model.expected.folded
        wide = normtool.swap(swap_onnx.widened(form), validate=False, **model.options)
        check_counts(wide, model.expected)
        error, ratio = check_numbers(form, result, wide, inputs)
        print(f"{model.name}, {name}: {error:.1e} in float64, {ratio:.2f} × its own error in float32")
        assert error <= AGREES, name
        assert ratio <= 2, name


@models(lambda model: not model.options)
def test_a_program_is_swapped_alike(model: SwapModel) -> None:
    """What torch.export makes of the same model, in float64: an ATen op for every norm."""
    module, inputs = model.make().double(), model.inputs()
    wide = {name: each.double() if each.is_floating_point() else each for name, each in inputs.items()}
    with torch.no_grad():
        program = torch.export.export(module, (), wide)
        result = normtool.swap(program, validate=False)
        wanted = model.program or model.expected
        assert (len(layer_norms(result)), result.swapped) == (wanted.norms, wanted.swapped)
        assert len(centres(result)) == wanted.centres
        expected, got = (tree_leaves(each.module()(**wide)) for each in (program, result.model))
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(expected, got, strict=True) if isinstance(a, torch.Tensor)]
    error = zoo.relative_error([a for a, _ in pairs], [b for _, b in pairs])
    print(f"{model.name}, program: {error:.1e} in float64")
    assert error <= AGREES


@models(lambda model: bool(model.expected.kept))
def test_each_refused_norm_would_be_wrong(model: SwapModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, for two that are wrong may cancel."""
    proto = swap_onnx.widened(exported(model))
    inputs = feeds_of(model)[:1]
    kept = [
        site.norm.name for site in layer_norms(normtool.swap(proto, validate=False)) if site.verdict == "kept"
    ]
    expected = swap_onnx.run_wide(proto, inputs)
    force(monkeypatch)
    for name in kept:
        result = normtool.swap(proto, validate=False, only=(name,))
        assert [site.norm.name for site in result.sites if site.verdict == "swapped"] == [name]
        error = zoo.relative_error(expected, swap_onnx.run_wide(result.model, inputs))
        print(f"{model.name}, {name}: {error:.1e}")
        assert error >= DIFFERS, name


@pytest.mark.parametrize(("weight", "bias", "complaint"), [(1.0, 0.5, "γ = 1"), (1.5, 0.0, "its bias is 0")])
def test_a_norm_as_it_is_initialised_is_refused(weight: float, bias: float, complaint: str) -> None:
    norm = torch.nn.LayerNorm(8)
    torch.nn.init.constant_(norm.weight, weight)
    torch.nn.init.constant_(norm.bias, bias)
    with pytest.raises(ValueError, match=complaint):
        refuse_default_initialisation(torch.nn.Sequential(norm))


def test_an_embedding_without_a_mean_is_refused() -> None:
    table = torch.nn.Embedding(4, 8)
    with torch.no_grad():
        table.weight -= table.weight.mean(-1, keepdim=True)
    with pytest.raises(ValueError, match="without a mean"):
        refuse_default_initialisation(torch.nn.Sequential(table))
