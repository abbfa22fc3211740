"""63 real architectures of transformers, small but true in structure, with perturbed statistics.

Counted against PyTorch's own numbers, folded as modules, saved as .pt2, converted to ONNX; every result is run
against the original.
"""

from collections import Counter

import pytest
import torch

import normtool
from normtool.detect import find_norms
from normtool.errors import RuntimeRefused
from normtool.formats.torch.export import Example, export
from normtool.formats.torch.norm_changes import UNEXPLAINED
from normtool.scanning import Scan
from tests.formats.torch.architectures import ARCHITECTURES, Architecture, is_batch_norm

pytestmark = pytest.mark.usefixtures("worker_in_this_process", "translations_read_once")

#: BatchNorms that stay in the module, and why: everything else folds.
LEFT: dict[str, Counter[str]] = {
    # held by the model, never called by its forward
    "dpt": Counter({"not_called": 2}),
    # on the input features, scaled along another axis than the one the convolution mixes
    "clap_audio": Counter({"axis_mismatch, no_producer": 1}),
    # read by a residual beside them, mixed along the patches, in front of a GELU; those of the layers that mix
    # the features go into their linear
    "patchtsmixer": Counter({"axis_mismatch, multiple_readers": 3}),
}

#: Converted and compared in ONNX Runtime; the quick ones of every family.
CONVERTED = "resnet mobilenet_v1 levit convnext vit hubert_batch_norm bert gpt2 llama".split()

#: More of the same, and the largest: `make test-long`.
LONG = {
    "counted": ["d_fine", "rt_detr"],
    "converted": "regnet_y efficientnet textnet pp_lcnet bit swin wav2vec2 t5 mobilenet_v2 mobilevit "
    "mobilevitv2 segformer hgnet_v2 swiftformer cvt upernet_convnext detr convnextv2 poolformer focalnet "
    "dinov2 deit swinv2 whisper speecht5 gemma phi opt falcon roberta bart gpt_neox beit clap_audio patchtst "
    "vitpose dpt wav2vec2_conformer".split(),
    "folded": "d_fine rt_detr conditional_detr seamless_m4t_speech mobilevit_deeplab mobilenet_v2_deeplab "
    "beit_upernet cvt parakeet vitmatte speecht5".split(),
}


def named(names: list[str], long: list[str]) -> pytest.MarkDecorator:
    assert {*names, *long} <= {each.name for each in ARCHITECTURES}
    chosen = [
        pytest.param(each, id=each.name, marks=[pytest.mark.long] if each.name in long else [])
        for each in ARCHITECTURES
        if each.name in {*names, *long}
    ]
    return pytest.mark.parametrize("architecture", chosen)


def norms_of(scan: Scan) -> dict[str, tuple[object, ...]]:
    return {n.name: (n.norm.kind, n.learnable, n.frozen, n.buffers, n.calls) for n in scan.norms}


@named([each.name for each in ARCHITECTURES], LONG["counted"])
def test_the_counts_are_pytorchs_own_and_the_program_has_the_same(architecture: Architecture):
    module, inputs = architecture.make(), architecture.inputs()
    scan = normtool.scan(module, inputs)
    counted = scan.parameters
    assert counted.learnable == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert counted.frozen == sum(p.numel() for p in module.parameters() if not p.requires_grad)
    assert counted.unique == counted.parameters
    assert counted.buffers == sum(buffer.numel() for buffer in module.buffers())
    assert counted.buffer_bytes == sum(b.numel() * b.element_size() for b in module.buffers())
    assert sum(n.norm.kind == "batch_norm" for n in scan.norms) == architecture.batch_norms
    assert not [entry for entry in scan.diagnostics if entry[0] == "no_dataflow"]

    program = normtool.scan(export(module, Example(kwargs=inputs)))
    assert norms_of(program) == norms_of(scan)
    exported = program.parameters.to_dict()
    for name in ("constants", "constant_bytes"):  # export lifts plain tensors of the code into constants
        exported.pop(name)
        assert getattr(counted, name) == 0
    assert exported == {name: n for name, n in counted.to_dict().items() if name in exported}


@named([each.name for each in ARCHITECTURES if each.batch_norms], LONG["folded"])
def test_every_batch_norm_with_an_absorber_behind_it_folds(architecture: Architecture):
    module, inputs = architecture.make(), architecture.inputs()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    result = normtool.fold(module, inputs)
    kept = [site for site in result.sites if site.norm.kind == "batch_norm" and site.verdict != "folded"]
    left = Counter(", ".join(sorted({reason.code for reason in site.reasons})) for site in kept)
    assert left == LEFT.get(architecture.name, Counter())
    assert sum(map(is_batch_norm, result.model.modules())) == left.total()
    assert type(result.model) is type(module)
    if result.folded:
        assert result.validation is not None
        assert result.validation.verdict == "equal", result.validation
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


@named(CONVERTED, LONG["converted"])
def test_the_saved_program_and_the_onnx_file_compute_the_same(architecture: Architecture, tmp_path):
    module, inputs = architecture.make(), architecture.inputs()
    path = tmp_path / "folded.pt2"
    normtool.fold(module, inputs, validate=False).save(path)
    saved = normtool.validate(module, path, inputs)
    assert saved.verdict == "equal", saved
    converted = normtool.convert(module, inputs, fold=True)
    assert converted.validation is not None
    assert converted.validation.verdict == "equal", converted.validation
    assert not any(converted.reconciliation.unexplained.values())
    found = Counter(norm.kind for norm in find_norms(converted.made.graph))
    for change in converted.norms:
        assert change.made == found.pop(change.kind, 0)
        assert UNEXPLAINED not in change.message
    runs = Counter(site.norm.kind for site in converted.sites for _ in range(site.norm.calls or 0))
    assert found == Counter({kind: runs[kind] for kind in found})  # those that no change is stated of


@pytest.mark.long  # a small module that it cannot convert is among the tests of `convert`
def test_what_the_exporter_cannot_convert_is_refused_in_its_own_words():
    """d_fine calls aten._is_all_true."""
    (architecture,) = (each for each in ARCHITECTURES if each.name == "d_fine")
    with pytest.raises(RuntimeRefused, match=r"torch\.onnx\.export fails: .*_is_all_true"):
        normtool.convert(architecture.make(), architecture.inputs(), validate=False)
