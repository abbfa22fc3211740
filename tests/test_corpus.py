"""Two hundred real files that nobody here wrote: scanned against an independent count, folded, validated."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest

import normtool
from normtool.errors import UnreadableModel
from tests.conftest import CORPUS, corpus_cases

Entry = dict[str, Any]

#: Broken files; tests/test_malformed.py says of each what is wrong with it.
UNREADABLE = (
    "bad_graph_with_dup_value_info.onnx",
    "ext_weights.onnx",
    "weightless.matmul.fp16.onnx",
    "weightless.qdq_conv.onnx",
    "weightless.sparse.conv.onnx",
    "weightless.transpose_matmul.onnx",
    "icm-31000000518082.onnx",
    "test_evil_weights.onnx",
    "name_collision_models_foobar.onnx",
)

#: Backward-foldable by the reference, but not ours to fold unasked: a caller may override the parameters.
OVERRIDABLE = "ultraface-slim320"


def _readable(entry: Entry) -> bool:
    return not entry["file"].endswith(UNREADABLE)


def _path(entry: Entry) -> Path:
    return CORPUS / str(entry["file"])


@pytest.mark.parametrize("entry", corpus_cases(_readable))
def test_scan_counts_what_the_manifest_counts(entry: Entry) -> None:
    scan = normtool.scan(_path(entry))
    native = [norm for norm in scan.norms if norm.norm.evidence == "op"]
    assert Counter(norm.norm.op.spelling for norm in native) == entry["norm"]
    for spelling, expected in entry["norm_params"].items():
        own = [norm for norm in native if norm.norm.op.spelling == spelling]
        counted = {
            "count": len(own),
            "learnable": sum(norm.learnable for norm in own),
            "buffer": sum(norm.buffers for norm in own),
            "nonconst_params": sum(norm.computed for norm in own),
        }
        assert counted == {key: expected[key] for key in counted}


@pytest.mark.parametrize(
    "entry", corpus_cases(lambda entry: _readable(entry) and len(entry["norm_params"]) == 1)
)
def test_scan_counts_shared_storage_once(entry: Entry) -> None:
    scan = normtool.scan(_path(entry))
    (expected,) = entry["norm_params"].values()
    kind = next(norm.norm.kind for norm in scan.norms if norm.norm.evidence == "op")
    assert Counter(norm.norm.kind for norm in scan.norms if norm.norm.evidence == "op").keys() == {kind}
    if any(norm.norm.evidence == "pattern" and norm.norm.kind == kind for norm in scan.norms):
        pytest.skip("norms of the same kind are spelled out as well, which the manifest counts no elements of")
    count = scan.summary[kind]
    assert (count.learnable, count.buffers) == (expected["unique_learnable"], expected["unique_buffer"])


#: Spelled out, it seems, and no norm: it subtracts from X the mean of X + Y.
NO_NORM = ("testdata_transform_fusion_skip_layer_norm.onnx",)


@pytest.mark.parametrize("entry", corpus_cases(_readable))
def test_scan_finds_what_is_spelled_out(entry: Entry) -> None:
    """As many, of the kind and over the axes that the manifest says; one as large as possible."""
    found = [norm.norm for norm in normtool.scan(_path(entry)).norms if norm.norm.evidence == "pattern"]
    if entry["file"].endswith(NO_NORM):
        assert not found
        return
    expected = {_as_said(label): count for label, count in entry["decomposed_norm"].items()}
    assert Counter(norm.kind for norm in found) == Counter({kind: n for (kind, _), n in expected.items()})
    stated = {axes for _, axes in expected if axes is not None}
    assert not stated or {_from_the_end(norm) for norm in found} <= {*stated, None}


def _as_said(label: str) -> tuple[str, tuple[int, ...] | None]:
    """`LN@axes[-2, -1]`."""
    kind = {"LN": "layer_norm", "RMS": "rms_norm"}[label.partition("@")[0]]
    return kind, tuple(map(int, re.findall(r"-?\d+", label))) or None


def _from_the_end(norm: Any) -> tuple[int, ...] | None:
    """None where onnx could infer no shape."""
    if norm.axes[0] < 0:
        return tuple(norm.axes)
    return tuple(axis - len(norm.form.x.shape) for axis in norm.axes) if norm.form.x.shape else None


#: Elements of γ and β, storage that several norms share counted once; and of one norm.
SPELLED_OUT = {
    "ch_PP-OCRv4_rec_infer.onnx": (1200, 240),
    "gtcrn_simple.onnx": (4224, 1056),  # over 33 frequencies and 16 channels
    "model_2.onnx": (512, 512),
    "dummy_transformer.onnx": (128, 32),
    "random_encoder.onnx": (16, 16),  # two norms on one γ and one β
    "gpt2_past.onnx": (200, 8),
    "bert_toy_optimized.onnx": (768, 64),
    # of 26 norms, 24 are twelve calls of two
    "rxnmapper-albert_op14_decomposed.onnx": (1536, 256, 512),
    "rxnmapper-albert_op17_ln.onnx": (1536, 256, 512),
}


@pytest.mark.parametrize("entry", corpus_cases(lambda entry: _path(entry).name in SPELLED_OUT))
def test_elements_of_norms_that_are_spelled_out(entry: Entry) -> None:
    scan = normtool.scan(_path(entry))
    each = sorted({norm.learnable for norm in scan.norms if norm.norm.kind == "layer_norm"})
    assert (scan.summary["layer_norm"].learnable, *each) == SPELLED_OUT[_path(entry).name]


#: Where the manifest counts otherwise. It leaves out Constant nodes that give `value_ints` or `value_float`
#: and no tensor (124 numbers), and counts twice 48 scalars whose Constant nodes are there twice.
NOT_IN_MANIFEST = {"mobilenetv2-reid_op18_bn_external.onnx": 124, "gpt2_past.onnx": -48}


@pytest.mark.parametrize("entry", corpus_cases(_readable))
def test_every_stored_element_has_one_role(entry: Entry) -> None:
    census = normtool.scan(_path(entry)).parameters
    extra = NOT_IN_MANIFEST.get(_path(entry).name, 0)
    assert census.learnable + census.buffers + census.constants == entry["elements"] + extra


@pytest.mark.parametrize("entry", corpus_cases(lambda entry: entry["file"].endswith(UNREADABLE)))
def test_what_cannot_be_read_is_refused_in_one_line(entry: Entry) -> None:
    with pytest.raises(UnreadableModel) as caught:
        normtool.scan(_path(entry))
    assert str(caught.value).count("\n") == 0
    assert _path(entry).name in str(caught.value)


# ---- folding ----------------------------------------------------------------------------------


def _foldable(entry: Entry) -> int:
    return sum(n for why, n in (entry.get("bn_fold_reference") or {}).items() if why.startswith("yes"))


#: BatchNorms that stay, and all that speaks against each; every other one folds.
LEFT: dict[str, Counter[str]] = {
    # behind a concatenation whose parts later ones read too, and in front of a ReLU (ALGEBRA §4): the first
    # norm of each layer, the transitions, the last of all, 58 + 3 + 1. Those behind a conv fold
    "light_light_densenet121.onnx": Counter({"multiple_readers, nonlinear": 62}),
    # behind the last ReLU; between its channels and the classifier a reshape of lengths that nobody knows
    # weights out of Brevitas' own Quant, parameters listed among the graph inputs
    "quant_model.onnx": Counter({"dynamic_weight, overridable": 3}),
    # five parameters for an axis of length 1
    "testdata_transform_fusion_fuse-matmul-bn-only-reshape.onnx": Counter({"graph_output, malformed": 1}),
    # a BatchNorm and nothing else; its parameters are model inputs, it is in training, or its opset is before 7
    "node_test_batchnorm_epsilon_model.onnx": Counter({"dynamic_weight, no_producer": 1}),
    "node_test_batchnorm_epsilon_training_mode_model.onnx": Counter(
        {"dynamic_weight, no_producer, training_mode": 1}
    ),
    "node_test_batchnorm_example_model.onnx": Counter({"dynamic_weight, no_producer": 1}),
    "node_test_batchnorm_example_training_mode_model.onnx": Counter(
        {"dynamic_weight, no_producer, training_mode": 1}
    ),
    "test_models_onnx_batchnorm_default.onnx": Counter({"dynamic_weight, no_producer": 1}),
    "pytorch-converted_test_BatchNorm1d_3d_input_eval_model.onnx": Counter({"unsupported_op": 1}),
    "pytorch-converted_test_BatchNorm2d_eval_model.onnx": Counter({"unsupported_op": 1}),
    "pytorch-converted_test_BatchNorm2d_momentum_eval_model.onnx": Counter({"unsupported_op": 1}),
    "pytorch-converted_test_BatchNorm3d_eval_model.onnx": Counter({"unsupported_op": 1}),
    "pytorch-converted_test_BatchNorm3d_momentum_eval_model.onnx": Counter({"unsupported_op": 1}),
    "onnx-ir_tests_fixtures_opset_compliance_opset_01.onnx": Counter({"unsupported_op": 1}),
    "onnx-ir_tests_fixtures_opset_compliance_opset_07.onnx": Counter({"no_producer, training_mode": 1}),
    "onnx-ir_tests_fixtures_opset_compliance_opset_09.onnx": Counter({"graph_output, no_producer": 1}),
    "onnx-ir_tests_fixtures_opset_compliance_opset_15.onnx": Counter({"graph_output, no_producer": 1}),
    "resources_onnx_layer-zoo_batchnorm.onnx": Counter({"graph_output, no_producer": 1}),
    # two of them, of which one takes the other along
    "onnx-tests_tests_batch_norm_batch_norm.onnx": Counter({"graph_output, no_producer": 1}),
}


@pytest.mark.parametrize("entry", corpus_cases(lambda entry: "BatchNormalization" in entry["norm"]))
def test_every_batch_norm_that_can_leave_does(entry: Entry) -> None:
    freeze = entry["id"] == OVERRIDABLE
    result = normtool.fold(_path(entry), validate=False, freeze=freeze)
    kept = [s for s in result.sites if s.norm.kind == "batch_norm" and s.verdict == "kept"]
    left = Counter(", ".join(sorted({reason.code for reason in site.reasons})) for site in kept)
    assert left == LEFT.get(_path(entry).name, Counter())
    assert left.total() <= entry["norm"]["BatchNormalization"] - _foldable(entry)


@pytest.mark.parametrize("entry", corpus_cases(lambda entry: entry["id"] == OVERRIDABLE))
def test_parameters_a_caller_may_override_are_not_folded_unasked(entry: Entry) -> None:
    result = normtool.fold(_path(entry), validate=False)
    assert result.folded == 0
    assert {reason.code for site in result.sites for reason in site.reasons} == {"overridable"}


def _runs_and_folds(entry: Entry) -> bool:
    return "BatchNormalization" in entry["norm"] and entry.get("ort_run") == "ok"


#: Every weight of these is one repeated constant, made by ConstantOfShape: the output is a softmax of equal
#: logits whatever goes in, and inside, sums of thousands of equal terms round systematically, by more than the
#: floor that independent roundings set. Outputs agree to the last bit; more is not shown.
NOTHING_TO_SHOW = ("light_inception_v2.onnx", "light_resnet50.onnx")


@pytest.mark.usefixtures("worker_in_this_process")
@pytest.mark.parametrize("entry", corpus_cases(lambda entry: entry["file"].endswith(NOTHING_TO_SHOW)))
def test_what_cannot_be_shown_is_not_called_equal(entry: Entry) -> None:
    comparison = normtool.fold(_path(entry)).validation
    assert comparison is not None
    assert comparison.verdict == "inconclusive"
    assert [difference.max_abs for difference in comparison.outputs] == [0.0]


def _shows(entry: Entry) -> bool:
    return _runs_and_folds(entry) and not entry["file"].endswith(NOTHING_TO_SHOW)


@pytest.mark.slow
@pytest.mark.usefixtures("worker_in_this_process")
@pytest.mark.parametrize("entry", corpus_cases(_shows))
def test_what_is_folded_validates_equal(entry: Entry) -> None:
    result = normtool.fold(_path(entry), freeze=entry["id"] == OVERRIDABLE)
    if not result.folded:
        assert result.validation is None
        return
    assert result.validation is not None
    assert result.validation.verdict == "equal"
    assert result.validation.sensitivity is not None
    assert result.validation.sensitivity.verdict == "different"


@pytest.mark.parametrize("entry", corpus_cases(lambda entry: _foldable(entry) > 0))
def test_folding_twice_changes_nothing(entry: Entry) -> None:
    once = normtool.fold(_path(entry), validate=False)
    twice = normtool.fold(once.model, validate=False)
    assert twice.folded == 0
    assert twice.model.SerializeToString(deterministic=True) == once.model.SerializeToString(deterministic=True)


@pytest.mark.parametrize("entry", corpus_cases(lambda entry: entry.get("checker") == "ok" and _foldable(entry)))
def test_the_checker_accepts_what_it_accepted(entry: Entry) -> None:
    onnx.checker.check_model(normtool.fold(_path(entry), validate=False).model)


# ---- the standard's own node tests ------------------------------------------------------------


def _node_test(entry: Entry) -> bool:
    return entry["id"] == "g-onnx-node-dev" and bool(entry["norm"])


#: op type → (kind, operands that a caller feeds in these tests)
NODE_TESTS = {
    "BatchNormalization": ("batch_norm", 4),
    "InstanceNormalization": ("instance_norm", 2),
    "GroupNormalization": ("group_norm", 2),
    "LayerNormalization": ("layer_norm", 2),
    "RMSNormalization": ("rms_norm", 1),
    "MeanVarianceNormalization": ("mean_variance_norm", 0),
    "LRN": ("local_response_norm", 0),
}


@pytest.mark.parametrize("entry", corpus_cases(_node_test))
def test_node_tests_of_the_standard(entry: Entry) -> None:
    """The expected axes are worked out from the file's own name, the ε from its own attribute."""
    path = _path(entry)
    (norm,) = normtool.scan(path).norms
    (node,) = [node for node in onnx.load(path).graph.node if node.op_type in NODE_TESTS]
    kind, operands = NODE_TESTS[node.op_type]
    rank = len(onnx.load(path).graph.input[0].type.tensor_type.shape.dim)
    assert norm.norm.kind == kind
    assert (norm.learnable, norm.buffers, norm.computed) == (0, 0, operands)
    assert norm.norm.axes == _expected_axes(path.name, node.op_type, rank)
    stated = next((a.f for a in node.attribute if a.name == "epsilon"), 9.999999747378752e-06)
    if kind not in ("mean_variance_norm", "local_response_norm"):
        assert norm.norm.eps == stated


def _expected_axes(name: str, op_type: str, rank: int) -> tuple[int, ...]:
    if op_type == "BatchNormalization":
        return (0, *range(2, rank))
    if op_type == "InstanceNormalization":
        return tuple(range(2, rank))
    if op_type == "GroupNormalization":
        return tuple(range(1, rank))
    if op_type == "MeanVarianceNormalization":
        return (0, 2, 3)
    if op_type == "LRN":
        return (1,)
    found = re.search(r"axis_?(negative_)?(\d)", name)
    if found is None:
        return (rank - 1,)
    axis = int(found[2])
    return tuple(range(rank - axis if found[1] else axis, rank))
