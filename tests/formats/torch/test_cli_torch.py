"""The command line on PyTorch models: exit codes, short errors, parseable output, nothing lost."""

import csv
import io
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from normtool import api, cli
from normtool.errors import NormtoolError
from tests import zoo
from tests.conftest import ROOT
from tests.formats.torch.architectures import ARCHITECTURES

NUMBERS = count()

FACTORY = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width=4, gain=1.0):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, width, 3)
            self.bn = nn.BatchNorm2d(width)
            with torch.no_grad():
                self.conv.weight.normal_(std=0.2)
                self.conv.weight[0] *= gain
                self.bn.weight.copy_(torch.linspace(-1.5, 1.0, width))
                self.bn.bias.copy_(torch.linspace(0.5, -0.4, width))
                self.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, width))
                self.bn.running_var.copy_(torch.linspace(0.5, 1.5, width))

        def forward(self, image):
            return torch.relu(self.bn(self.conv(image)))

    class Chatty(Net):
        def __init__(self):
            print("building the model")
            super().__init__()

    class Depends(Net):
        def forward(self, image):
            return super().forward(image) if image.sum() > 0 else image
"""

IMAGE = ("--input", "image=1x3x8x8")


pytestmark = pytest.mark.usefixtures("worker_in_this_process")


@pytest.fixture
def net(tmp_path, monkeypatch) -> str:
    """The name of a module in the current folder, another one in each test."""
    name = f"nets_{os.getpid()}_{next(NUMBERS)}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(FACTORY))
    monkeypatch.chdir(tmp_path)
    return name


Result = tuple[int, str, str]


def run(*arguments: Any) -> Result:
    """(exit code, stdout, stderr) of a command in this process: to start one and load torch takes seconds."""
    out, errors = io.StringIO(), io.StringIO()
    standard, sys.stderr = sys.stderr, errors
    try:
        code = cli.cli.main([str(each) for each in arguments], standalone_mode=False, obj=out) or 0
    except NormtoolError as error:
        code = error.exit_code
        errors.write(f"{error}\n")
    except click.ClickException as error:
        code = error.exit_code
        errors.write(f"{error.format_message()}\n")
    finally:
        sys.stderr = standard
    return code, out.getvalue(), errors.getvalue()


def shell(*arguments: Any, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """In a process of its own, in `cwd`."""
    return subprocess.run(
        [sys.executable, "-m", "normtool", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def document(result: Result) -> dict[str, Any]:
    assert result[0] in (0, 1), result
    parsed: dict[str, Any] = json.loads(result[1])
    return parsed


# ---- as a user calls it ---------------------------------------------------------------------------------


def test_a_factory_of_the_current_folder_that_prints(net, tmp_path):
    done = shell("fold", f"{net}:Chatty", *IMAGE, "-o", "out.pt2", "--format", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sites"][0]["verdict"] == "folded"
    assert "building the model" in done.stderr
    assert (tmp_path / "out.pt2").exists()
    assert not [path.name for path in tmp_path.iterdir() if ".tmp" in path.name]


def imported(code: str, tmp_path: Path) -> set[str]:
    """Names of the large libraries that `code` imports."""
    report = (
        "import sys; print([n for n in ('torch', 'transformers', 'onnxruntime', 'onnx') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    return set(json.loads(done.stdout.splitlines()[-1].replace("'", '"')))


COMMAND = "import sys, io\nfrom normtool.cli import cli\ncli.main({}, standalone_mode=False, obj=io.StringIO())"


def test_the_library_and_help_import_no_framework(tmp_path):
    assert imported("import normtool", tmp_path) == set()
    assert imported(COMMAND.format(["--help"]), tmp_path) == set()
    assert imported(COMMAND.format(["convert", "--help"]), tmp_path) == set()


def test_onnx_and_safetensors_import_no_torch(tmp_path):
    onnx.save(zoo.conv_bn(), tmp_path / "m.onnx")
    save_file({"bn.weight": torch.ones(3), "bn.running_mean": torch.ones(3)}, tmp_path / "w.safetensors")
    for command in (["scan", "m.onnx"], ["fold", "m.onnx", "--dry-run"], ["scan", "w.safetensors"]):
        assert "torch" not in imported(COMMAND.format(command), tmp_path), command


def test_without_transformers(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "transformers.py").write_text("raise ImportError('blocked')")
    done = shell("scan", ".", cwd=tmp_path, PYTHONPATH=f"{tmp_path / 'blocked'}{os.pathsep}{ROOT}")
    assert done.returncode == 4
    assert done.stderr == "normtool: Hugging Face models need transformers: pip install transformers\n"


# ---- errors ---------------------------------------------------------------------------------------------

ERRORS = [
    pytest.param("fold NET:Net -o o.pt2", 2, "--input image=1x3x224x224", id="fold-without-inputs"),
    pytest.param("fold NET:Net --dry-run", 2, "--input image=1x3x224x224", id="plan-without-inputs"),
    pytest.param("convert NET:Net -o o.onnx", 2, "--input image=1x3x224x224", id="convert-without-inputs"),
    pytest.param("validate NET:Net NET:Net", 2, "--input image=1x3x224x224", id="validate-without-inputs"),
    pytest.param("scan NET:Nothing", 2, "has no attribute", id="no-such-attribute"),
    pytest.param("scan no.such.module:make", 2, "No module named", id="no-such-module"),
    pytest.param("scan NET:Net --arg width", 2, "write it as KEY=VALUE", id="argument-without-value"),
    pytest.param("scan NET:Net --arg depth=3", 3, "unexpected keyword", id="unknown-argument"),
    pytest.param("scan NET:Net --arg width=wide", 3, "TypeError", id="argument-of-another-type"),
    pytest.param("scan NET:Net --input image=axb", 2, "write it as NAME=1x3x224x224", id="shape-is-no-shape"),
    pytest.param(
        "scan NET:Net --input x=1x3x8x8", 2, "takes no 'x'; it takes image", id="input-of-another-name"
    ),
    pytest.param("scan NET:Net --weights none.pt", 3, "No such file", id="missing-weights"),
    pytest.param("scan NET:Net --weights other.pt", 3, "does not fit the model", id="weights-of-another-model"),
    pytest.param("fold NET:Net IMAGE -o o.onnx", 2, "normtool convert", id="fold-to-onnx"),
    pytest.param("fold NET:Net IMAGE -o there.pt2", 5, "--force replaces it", id="fold-onto-a-file"),
    pytest.param("convert NET:Net IMAGE -o there.pt2", 5, "--force replaces it", id="convert-onto-a-file"),
    pytest.param("convert NET:Net IMAGE -o o.tflite", 2, "choose onnx or pt2", id="another-suffix"),
    pytest.param("convert NET:Net IMAGE -o o", 2, "choose onnx or pt2", id="no-suffix"),
    pytest.param("convert NET:Net IMAGE", 2, "-o OUTPUT.onnx", id="convert-without-output"),
    pytest.param("convert NET:Net IMAGE -o no/o.onnx", 5, "does not exist", id="missing-folder"),
    pytest.param("convert m.onnx -o o.onnx", 2, "ONNX already", id="convert-onnx"),
    pytest.param("convert other.pt -o o.onnx", 2, "give the model itself", id="convert-weights-alone"),
    pytest.param("fold other.pt -o o.pt2", 2, "give the model itself", id="fold-weights-alone"),
    pytest.param("convert NET:Depends IMAGE -o o.onnx", 3, "torch.export fails", id="export-fails"),
    pytest.param("convert NET:Net IMAGE -o o.onnx --opset 99", 2, "opset", id="opset-of-the-future"),
    pytest.param(
        "fold NET:Net --inputs none.npz -o o.pt2", 2, "is not a readable .npz", id="missing-inputs-file"
    ),
    pytest.param("scan other.pt --weights other.pt", 0, "", id="weights-beside-a-file-are-not-its"),
]


@pytest.mark.parametrize(("line", "expected", "words"), ERRORS)
def test_errors(net, tmp_path, line, expected, words):
    (tmp_path / "there.pt2").write_text("mine")
    onnx.save(zoo.conv_bn(), tmp_path / "m.onnx")
    torch.save({"w": torch.ones(2)}, tmp_path / "other.pt")
    before = sorted(path.name for path in tmp_path.iterdir())
    words_of_line = line.replace("NET", net).replace("IMAGE", " ".join(IMAGE)).split()
    code, out, errors = run(*words_of_line)
    assert code == expected, errors
    if expected:
        assert words in errors
        assert out == ""
        assert len(errors.splitlines()) <= 2
    assert (tmp_path / "there.pt2").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
@pytest.mark.parametrize(
    "command", ["validate NET:Net NET:Net", "fold NET:Net -o o.pt2", "convert NET:Net -o o.onnx"]
)
def test_no_gpu(net, tmp_path, command):
    code, _, errors = run(*command.replace("NET", net).split(), *IMAGE, "--device", "cuda")
    assert code == 4, errors
    assert not list(tmp_path.glob("o.*"))


# ---- scan -----------------------------------------------------------------------------------------------

SECTIONS = {"schema", "model", "parameters", "summary", "norms", "diagnostics"}
TOTALS = {"learnable", "frozen", "buffers", "constants", "learnable_bytes", "buffer_bytes"}


def sources(net: str, tmp_path: Path) -> dict[str, tuple[Any, ...]]:
    torch.save(api.load(f"{net}:Net").module.state_dict(), tmp_path / "w.pt")
    run("fold", f"{net}:Net", *IMAGE, "-o", tmp_path / "m.pt2", "--no-validate")
    return {
        "module": (f"{net}:Net", *IMAGE),
        "module without inputs": (f"{net}:Net",),
        "pt2": (tmp_path / "m.pt2",),
        "torch": (tmp_path / "w.pt",),
    }


def test_scan_documents(net, tmp_path):
    for name, command in sources(net, tmp_path).items():
        found = document(run("scan", *command, "--format", "json", "--optimizer", "adam"))
        assert found.keys() >= SECTIONS, name
        assert found["parameters"].keys() >= TOTALS
        assert found["schema"] == "normtool.scan/1"
        assert found["model"]["format"] == name.split()[0]
        for norm in found["norms"]:
            assert norm.keys() >= {
                "name",
                "kind",
                "spelling",
                "evidence",
                "axes",
                "eps",
                "learnable",
                "buffers",
            }
        for each in found["diagnostics"]:
            assert each.keys() == {"code", "message", "where"}
    assert run("scan", f"{net}:Net")[0] == 0


def test_scan_counts(net):
    found = document(run("scan", f"{net}:Net", "--arg", "width=5", "--format", "json"))
    assert found["parameters"]["learnable"] == 5 * 27 + 5 + 10
    assert found["parameters"]["buffers"] == 11
    assert found["summary"]["batch_norm"] == {"count": 1, "learnable": 10, "buffers": 11}
    assert [each["code"] for each in found["diagnostics"]] == ["no_dataflow"]


@pytest.mark.parametrize(
    "command", ["scan NET:Net", "fold NET:Net IMAGE --dry-run", "convert NET:Net IMAGE -o o.onnx"]
)
def test_tables(net, tmp_path, command):
    words = command.replace("NET", net).replace("IMAGE", " ".join(IMAGE)).split()
    for style in ("table", "csv", "markdown"):
        code, out, errors = run(*words, "--format", style, *(["--force"] if "-o" in words else []))
        assert code == 0, errors
        assert "batch_norm" in out
        if style == "csv":
            assert all(row for row in csv.reader(io.StringIO(out)))


def test_weights_of_a_factory(net, tmp_path):
    state = api.load(f"{net}:Net").module.state_dict()
    save_file({**state, "conv.bias": torch.full((4,), 3.0)}, tmp_path / "w.safetensors")
    code, _, errors = run("convert", f"{net}:Net", *IMAGE, "--weights", "w.safetensors", "-o", "o.onnx")
    assert code == 0, errors
    code, out, _ = run("validate", f"{net}:Net", "o.onnx", *IMAGE, "--format", "json")
    assert (code, json.loads(out)["verdict"]) == (1, "different")


# ---- fold, convert, validate ----------------------------------------------------------------------------

REWRITE = {"schema", "sites", "before", "after", "validation", "outputs"}


def test_fold(net, tmp_path):
    found = document(run("fold", f"{net}:Net", *IMAGE, "-o", "o.pt2", "--format", "json"))
    assert found.keys() >= REWRITE | {"key_map"}
    assert found["schema"] == "normtool.rewrite/1"
    assert [site["verdict"] for site in found["sites"]] == ["folded"]
    assert found["validation"]["verdict"] == "equal"
    assert found["outputs"][0]["path"] == "o.pt2"
    assert (found["before"]["learnable"], found["after"]["learnable"]) == (120, 112)
    (gone,) = (key for key, now in found["key_map"].items() if not now)
    assert gone.endswith("num_batches_tracked")
    again = document(run("fold", "o.pt2", "-o", "again.pt2", "--format", "json"))
    assert again["sites"] == []


def test_inputs_of_a_file(net, tmp_path):
    np.savez(tmp_path / "x.npz", image=np.ones((2, 3, 8, 8), np.float32))
    found = document(run("fold", f"{net}:Net", "--inputs", "x.npz", "-o", "o.pt2", "--format", "json"))
    assert found["validation"]["verdict"] == "equal"


def test_where_export_fails_every_norm_is_kept(net):
    found = document(run("fold", f"{net}:Depends", *IMAGE, "--dry-run", "--format", "json"))
    ((reason,),) = [site["reasons"] for site in found["sites"]]
    assert reason["code"] == "no_dataflow"
    assert "torch.export fails: " in reason["message"]


@pytest.mark.parametrize("options", [[], ["--fold"], ["--opset", "18"]])
def test_convert(net, tmp_path, options):
    found = document(run("convert", f"{net}:Net", *IMAGE, "-o", "o.onnx", "--format", "json", *options))
    assert found.keys() >= REWRITE | {"reconciliation"}
    assert not any(found["reconciliation"]["unexplained"].values())
    assert found["validation"]["verdict"] == "equal"
    assert found["outputs"] == [{"path": "o.onnx", "sha256": api.scan("o.onnx").to_dict()["model"]["sha256"]}]
    (site,) = found["sites"]
    assert site["verdict"] == "folded"
    assert ("folded_by_exporter" in [reason["code"] for reason in site["reasons"]]) == ("--fold" not in options)


def test_convert_without_validation(net, tmp_path):
    found = document(run("convert", f"{net}:Net", *IMAGE, "-o", "o.pt2", "--no-validate", "--format", "json"))
    assert found["validation"] is None
    assert found["outputs"]


def test_a_report_beside_the_model(net, tmp_path):
    code, _, errors = run("convert", f"{net}:Net", *IMAGE, "-o", "o.onnx", "--report", "o.json", "--quiet")
    assert code == 0, errors
    assert json.loads((tmp_path / "o.json").read_text())["schema"] == "normtool.rewrite/1"


@pytest.mark.parametrize("command", ["fold", "convert"])
def test_a_failed_validation_leaves_the_old_file(net, tmp_path, monkeypatch, command):
    path = tmp_path / ("o.pt2" if command == "fold" else "o.onnx")
    path.write_text("mine")
    compare: Callable[..., Any] = api.compare_models

    def against_another(reference: Any, candidate: Any, *arguments: Any, **options: Any) -> Any:
        other = api.load(f"{net}:Net", {"image": ((1, 3, 8, 8), None)}, {"gain": 1.5})
        return compare(other, candidate, *arguments, **options)

    monkeypatch.setattr(api, "compare_models", against_another)
    code, out, errors = run(command, f"{net}:Net", *IMAGE, "-o", path, "--force", "--format", "json")
    assert code == 1
    assert "is not shown to be equal (different)" in errors
    found = json.loads(out)
    assert found["validation"]["verdict"] == "different"
    assert found["outputs"] == []
    assert path.read_text() == "mine"
    assert not [each.name for each in tmp_path.iterdir() if ".tmp" in each.name]


def test_validate_any_pair(net, tmp_path):
    assert run("convert", f"{net}:Net", *IMAGE, "-o", "o.onnx", "--no-validate")[0] == 0
    assert run("convert", f"{net}:Net", *IMAGE, "-o", "o.pt2", "--no-validate", "--fold")[0] == 0
    factory = f"{net}:Net"
    for reference, candidate in (
        (factory, "o.onnx"),
        (factory, "o.pt2"),
        ("o.pt2", "o.onnx"),
        ("o.onnx", "o.pt2"),
    ):
        inputs = IMAGE if factory in (reference, candidate) else ()
        found = document(run("validate", reference, candidate, *inputs, "--format", "json", "--seed", "3"))
        assert found["schema"] == "normtool.validation/1"
        assert found["verdict"] == "equal", (reference, candidate)
        assert found["seed"] == 3
        for output in found["outputs"]:
            assert output.keys() >= {"name", "max_abs", "max_rel", "noise_floor", "ratio"}


def test_validate_says_different(net):
    assert run("convert", f"{net}:Net", *IMAGE, "--arg", "gain=1.5", "-o", "o.onnx", "--no-validate")[0] == 0
    code, out, _ = run("validate", f"{net}:Net", "o.onnx", *IMAGE, "--format", "json")
    assert code == 1
    assert json.loads(out)["verdict"] == "different"


def test_a_hugging_face_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    architecture = next(each for each in ARCHITECTURES if each.name == "resnet")
    architecture.make().save_pretrained(tmp_path / "resnet")
    found = document(run("scan", "resnet", "--format", "json"))
    assert found["summary"]["batch_norm"]["count"] == architecture.batch_norms
    found = document(run("convert", "resnet", "--fold", "-o", "r.onnx", "--format", "json"))
    assert found["validation"]["verdict"] == "equal"
    assert [site["verdict"] for site in found["sites"]] == ["folded"] * architecture.batch_norms
    assert run("convert", "resnet", "-o", "r.pt2", "--no-validate")[0] == 0
    # in a process that has not imported transformers yet: the file returns one of its classes
    done = shell("scan", "r.pt2", "--format", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["summary"]["batch_norm"]["count"] == architecture.batch_norms
