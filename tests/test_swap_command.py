"""`normtool swap` from the command line and its options: files in, files out, targets, outputs, lints."""

import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import normtool
from normtool.cli import cli
from normtool.errors import UsageError

WIDTH = 16


def two_outputs(opset: int = 17, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """x → MatMul (an output too) → LayerNorm → MatMul → Add → y, everything perturbed."""
    rng = np.random.default_rng(0)
    numpy_dtype = helper.tensor_dtype_to_np_dtype(dtype)

    def stored(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(numpy_dtype), name)

    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["hidden"]),
        helper.make_node("LayerNormalization", ["hidden", "gamma", "beta"], ["normed"], epsilon=1e-3),
        helper.make_node("MatMul", ["normed", "w2"], ["product"]),
        helper.make_node("Add", ["product", "b2"], ["y"]),
    ]
    weights = [stored("w1", 8, WIDTH), stored("gamma", WIDTH), stored("beta", WIDTH)]
    weights += [stored("w2", WIDTH, 4), stored("b2", 4)]
    outputs = [("y", 4), ("hidden", WIDTH)]
    graph = helper.make_graph(
        nodes,
        "two_outputs",
        [helper.make_tensor_value_info("x", dtype, ["batch", 8])],
        [helper.make_tensor_value_info(name, dtype, ["batch", n]) for name, n in outputs],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def swapped(*arguments: object) -> dict[str, object]:
    """The JSON of a `swap` that exits with 0."""
    out = io.StringIO()
    call = ["swap", *map(str, arguments), "--format", "json"]
    assert not cli.main(call, standalone_mode=False, obj=out)
    return json.loads(out.getvalue())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(two_outputs(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def spellings(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_an_output_that_is_not_wanted_observes_nothing(path: Path, tmp_path: Path):
    document = swapped(path, "-o", tmp_path / "out.onnx", "--outputs", "y")
    (site,) = document["sites"]
    assert site["verdict"] == "swapped"
    assert (site["centring"]["free"], site["centring"]["added_ops"]) == (True, 0)
    assert document["validation"]["verdict"] == "equal"
    assert [output.name for output in onnx.load(tmp_path / "out.onnx").graph.output] == ["y"]


def test_an_output_that_is_wanted_observes_the_mean(path: Path, tmp_path: Path, capsys):
    (site,) = swapped(path, "-o", tmp_path / "out.onnx")["sites"]
    assert site["verdict"] == "kept"
    assert [reason["code"] for reason in site["reasons"]] == ["observed_mean", "no_centre_gain"]
    assert "'hidden' is an output" in site["reasons"][0]["message"]
    assert "nothing to swap" in capsys.readouterr().err
    assert "LayerNormalization" in spellings(tmp_path / "out.onnx")


def test_a_centre_helps_at_any_price(path: Path, tmp_path: Path):
    (site,) = swapped(path, "-o", tmp_path / "out.onnx", "--mode", "centre")["sites"]
    assert (site["verdict"], site["centring"]["centres"]) == ("swapped", ["hidden"])
    assert [output.name for output in onnx.load(tmp_path / "out.onnx").graph.output] == ["y", "hidden"]


def test_a_name_that_is_no_output(path: Path):
    with pytest.raises(UsageError, match="no output is called 'z'; the model has y, hidden"):
        swapped(path, "--dry-run", "--outputs", "z")


@pytest.mark.parametrize(
    ("target", "spelling", "opset"),
    [
        ("onnx", "RMSNormalization", 23),
        ("primitive", "Sqrt", 17),
        ("ort", "SimplifiedLayerNormalization", 17),
        (None, "Sqrt", 17),
    ],
)
def test_targets(path: Path, target: str | None, spelling: str, opset: int):
    result = normtool.swap(path, outputs=("y",), target=target)
    assert result.validation is not None
    assert (result.swapped, result.validation.verdict) == (1, "equal")
    kinds = [node.op_type for node in result.model.graph.node]
    assert spelling in kinds
    assert not {"LayerNormalization", "Reciprocal"} & set(kinds)
    assert {each.version for each in result.model.opset_import if each.domain == ""} == {opset}


def test_the_default_target_at_opset_23(tmp_path: Path):
    result = normtool.swap(two_outputs(23), outputs=("y",))
    assert "RMSNormalization" in [node.op_type for node in result.model.graph.node]


def test_affine_stays_where_it_is_on_request(path: Path):
    result = normtool.swap(path, outputs=("y",), keep_affine=True)
    (site,) = result.sites
    assert site.to_dict()["centring"]["added_ops"] == 1
    stored = {tensor.name for tensor in result.model.graph.initializer}
    assert {"w2", "b2"} <= stored
    w2 = next(t for t in two_outputs().graph.initializer if t.name == "w2")
    kept = next(t for t in result.model.graph.initializer if t.name == "w2")
    assert np.array_equal(numpy_helper.to_array(kept), numpy_helper.to_array(w2))


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_other_precisions(dtype: int):
    result = normtool.swap(two_outputs(dtype=dtype), outputs=("y",))
    assert result.validation is not None
    assert (result.swapped, result.validation.verdict) == (1, "equal")


@pytest.mark.parametrize("options", [{"mode": "quick"}, {"target": "tensorrt"}])
def test_options_that_do_not_exist(options: dict[str, str]):
    with pytest.raises(UsageError, match="choose one of"):
        normtool.swap(two_outputs(), **options)


def test_a_residual_sum_in_front_is_worth_knowing(path: Path):
    model = two_outputs()
    model.graph.node[0].output[0] = "raw"
    model.graph.node.insert(1, helper.make_node("Add", ["raw", "raw"], ["hidden"]))
    result = normtool.swap(model, outputs=("y",))
    assert [code for code, _, _ in result.lints] == ["skip_layer_norm"]
    assert result.to_dict()["lints"][0]["code"] == "skip_layer_norm"


def test_nothing_is_written_without_a_destination(path: Path):
    with pytest.raises(UsageError, match="-o OUTPUT"):
        swapped(path)
