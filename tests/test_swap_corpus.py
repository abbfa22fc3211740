"""LayerNorms of real files that nobody here made: every one found, the right verdict, and the same function."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

import normtool
from tests.conftest import CORPUS, corpus_cases

pytestmark = pytest.mark.usefixtures("worker_in_this_process")

Entry = dict[str, Any]


@dataclass(frozen=True)
class Verdicts:
    """`axes` of the norms; `why`: (code, part of the message) → how many of those kept it is said of."""

    norms: int
    axes: tuple[int, ...]
    swapped: int = 0
    centres: int = 0
    why: tuple[tuple[str, str, int], ...] = ()


_OBSERVED = "(MatMul) sees the mean"
_POST_NORM = "scales every number of the block by another γ"
_ALBERT = Verdicts(
    26,
    (2,),
    why=(
        # the table of the embeddings is the head's too, and half of the model
        ("shared_parameter", "albert.embeddings.word_embeddings.weight", 1),
        ("observed_mean", _OBSERVED, 1),
        ("not_centrable", _POST_NORM, 23),
        ("not_centrable", "multiplies by data within the block", 1),  # x · sigmoid(x)
    ),
)

REAL: dict[str, Verdicts] = {
    "rxnmapper-albert_op17_ln.onnx": _ALBERT,
    "rxnmapper-albert_op14_decomposed.onnx": _ALBERT,
    # trained int8: what the stream is the sum of comes out of DequantizeLinear
    "smart-turn-v3.2-cpu.onnx": Verdicts(10, (-1,), why=(("quantised", "DequantizeLinear", 9),)),
    "gpt2_past.onnx": Verdicts(25, (2,), 25),
    "bert_toy_optimized.onnx": Verdicts(
        12,
        (2,),
        why=(
            ("shared_parameter", "bert.embeddings.word_embeddings.weight", 1),
            ("observed_mean", _OBSERVED, 10),
            ("not_centrable", "multiplies by data within the block", 1),
        ),
    ),
    "dummy_transformer.onnx": Verdicts(4, (2,), why=(("observed_mean", _OBSERVED, 4),)),
    "random_encoder.onnx": Verdicts(2, (2,), why=(("observed_mean", _OBSERVED, 2),)),
    "ch_PP-OCRv4_rec_infer.onnx": Verdicts(5, (2,), 5, centres=1),
    # over two axes, of what a Linear puts out along one
    "gtcrn_simple.onnx": Verdicts(4, (2, 3), why=(("axis_mismatch", "spread over a part of the block", 4),)),
    # gates read what the norm reads
    "model_2.onnx": Verdicts(1, (2,), why=(("observed_mean", "(Mul) sees the mean", 1),)),
    # contrib operators, which add and look up as well
    "past.onnx": Verdicts(11, (), why=(("unsupported_op", "LayerNormalization computes is not known", 11),)),
}


def _named(entry: Entry) -> bool:
    return entry["file"].rpartition("/")[2] in REAL


def _has_layer_norms(entry: Entry) -> bool:
    native = any("LayerNormalization" in kind for kind in entry.get("norm") or ())
    return native or any(kind.startswith("LN") for kind in entry.get("decomposed_norm") or ())


def swap(entry: Entry, **options: Any) -> normtool.Rewrite:
    return normtool.swap(CORPUS / entry["file"], **options)


def layer_norms(result: normtool.Rewrite) -> list[normtool.Site]:
    return [site for site in result.sites if site.norm.kind == "layer_norm"]


def axes(site: normtool.Site) -> tuple[int, ...]:
    norm = site.norm
    if norm.form is not None:
        return tuple(norm.form.axes)
    return () if norm.op is None or norm.op.domain else (int(norm.op.attributes.get("axis", -1)),)


@pytest.mark.parametrize("entry", corpus_cases(_named))
def test_every_norm_is_found_and_judged(entry: Entry) -> None:
    expected = REAL[entry["file"].rpartition("/")[2]]
    result = swap(entry, validate=False)
    sites = layer_norms(result)
    assert len(sites) == expected.norms
    assert {axes(site) for site in sites} <= {expected.axes, (-1,)}
    assert Counter(site.verdict for site in sites)["swapped"] == expected.swapped
    kept = [site for site in sites if site.verdict == "kept"]
    assert len(kept) == expected.norms - expected.swapped
    for code, text, count in expected.why:
        said = [any(reason.code == code and text in reason.message for reason in site.reasons) for site in kept]
        assert sum(said) == count, (code, text)
    placed = {c for site in sites if site.fold for c in site.fold.about.get("centring", {}).get("centres", ())}
    assert len(placed) == expected.centres


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("entry", corpus_cases(lambda entry: _named(entry) and entry["ort_run"] == "ok"))
def test_what_is_swapped_computes_the_same(entry: Entry) -> None:
    result = swap(entry)
    if not REAL[entry["file"].rpartition("/")[2]].swapped:
        assert not result.changed
        return
    assert result.validation is not None
    assert result.validation.verdict == "equal"


#: Runs on no input, whatever is done to it; or puts out too little to judge by.
_NOT_JUDGED = {
    "tiny_gpt2_beamsearch_fp16_padded_vocab.onnx",
    "tiny_gpt2_greedysearch_with_init_decoder.onnx",
    "gpt2_attention_add_opt_no_skiplayernorm.onnx",
}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    "entry",
    corpus_cases(
        lambda entry: (
            _has_layer_norms(entry)
            and not _named(entry)
            and not any(entry["file"].endswith(name) for name in _NOT_JUDGED)
        )
    ),
)
def test_small_files_with_layer_norms_stay_the_same(entry: Entry) -> None:
    result = swap(entry)
    assert not result.changed or (result.validation is not None and result.validation.verdict == "equal")
