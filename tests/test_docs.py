"""Docs that run: every command, example and number that is shown is executed here."""

import doctest
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig

import normtool
from normtool.explain import explain, norm_pages
from normtool.norms import NORMS
from normtool.reasons import EXPLANATIONS
from normtool.rules import all_rules
from tests.conftest import ROOT
from tests.formats.torch.checks import perturbed

NORM_PAGES = sorted((ROOT / "docs" / "norms").glob("*.md"))


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def trained_model() -> Path:
    """The README's model; skipped, visibly, where PyPI cannot be reached."""
    try:
        return Path(_load(ROOT / "examples" / "fetch_model.py").fetch())
    except RuntimeError as error:
        pytest.skip(str(error))


# ---- the README -------------------------------------------------------------------------------


def _sessions(text: str) -> list[tuple[str, str]]:
    """(command, expected output) of every `$` line in the console blocks."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            found.append((command, expected))
    return found


def _normalised(text: str) -> str:
    """Measured numbers and column widths differ between machines; words and counts do not."""
    text = text.replace(f"{ROOT}/", "")
    text = re.sub(r"\b[0-9a-f]{64}\b", "HASH", text)
    text = re.sub(r"\d+(\.\d+)?e[+-]?\d+|\d+\.\d+", "MEASURED", text)
    return re.sub(r"\s+", " ", text).strip()


def test_the_readme_shows_what_the_commands_print(trained_model: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    sessions = _sessions((ROOT / "README.md").read_text())
    assert len(sessions) >= 4
    for command, expected in sessions:
        done = subprocess.run(
            command,
            shell=True,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert _normalised(done.stdout) == _normalised(expected), command


def test_the_readme_library_example_runs(
    trained_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx_code, torch_code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "model.onnx").write_bytes(trained_model.read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(compile(onnx_code, "README.md", "exec"), {})
    assert normtool.scan("folded.onnx").summary == {}
    (tmp_path / "model.onnx").unlink()
    made = {"normtool": normtool, "model": _small_module(), "example": torch.randn(2, 3, 16, 16)}
    exec(compile(torch_code, "README.md", "exec"), made)
    assert made["result"].folded == 1
    assert normtool.scan("model.onnx").summary == {}


ZOO = """
from torch import nn, randn

def build(width=8):
    return Net(width)

class Net(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 3))
        self.example_input_array = randn(2, 3, 32, 32)

    def forward(self, x):
        return super().forward(x)
"""


def _small_module() -> nn.Module:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    return perturbed(module)


def test_the_readme_commands_for_pytorch_run(tmp_path: Path) -> None:
    (tmp_path / "mynet").mkdir()
    (tmp_path / "mynet" / "zoo.py").write_text(ZOO)
    torch.save(_small_module().state_dict(), tmp_path / "net.pt")
    save_file(_small_module().state_dict(), tmp_path / "model.safetensors")
    BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path / "bert-base"
    )
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    lines = re.findall(r"^(normtool [^#\n]*)", (ROOT / "README.md").read_text(), re.MULTILINE)
    commands = [line for line in lines if "mynet" in line or "safetensors" in line or "bert-base" in line]
    assert len(commands) == 6
    for command in commands:
        done = subprocess.run(command.split(), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_every_command_of_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text()
    commands = set(re.findall(r"^\$? ?normtool (\w+)", text, re.MULTILINE))
    assert commands == {"scan", "fold", "swap", "unfold", "convert", "validate", "explain"}


# ---- pages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", NORM_PAGES, ids=lambda page: page.stem)
def test_the_numbers_on_a_norm_page(page: Path) -> None:
    failed, attempted = doctest.testfile(str(page), module_relative=False)
    assert failed == 0
    assert attempted > 0 or page.stem == "index"


@pytest.mark.parametrize("kind", sorted({row.kind for row in NORMS.values()}))
def test_every_norm_kind_is_explained(kind: str) -> None:
    assert explain(kind) == norm_pages()[kind].read_text()


@pytest.mark.parametrize("code", EXPLANATIONS)
def test_every_code_is_explained(code: str) -> None:
    assert explain(code).startswith(code)


def test_the_rules_page_is_the_rules() -> None:
    generator = _load(ROOT / "docs" / "make_rules_page.py")
    assert generator.PAGE.read_text() == generator.page(), "run `make docs`"
    listed = [kind for line in generator.page().splitlines() for kind in _kinds(line)]
    assert sorted(listed) == sorted(all_rules())


def _kinds(line: str) -> list[str]:
    """The op kinds that a line of the rules page lists."""
    return re.findall(r"`(\w+)`", line) if re.fullmatch(r"\*`.*`\*", line) else []


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("docs/**/*.md")), ROOT / "README.md"], ids=lambda p: p.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_rule_shown_is_the_rule() -> None:
    (block,) = re.findall(
        r"```python\n(.*?)   ```", (ROOT / "docs" / "adding-a-rule.md").read_text(), re.DOTALL
    )
    shown = textwrap.dedent(block).strip()
    assert shown in (ROOT / "normtool" / "rules" / "pooling.py").read_text()


def test_files_named_in_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`(?:normtool/)?([\w/]+\.py)`", text)
    assert len(named) > 10
    missing = [name for name in named if not (ROOT / "normtool" / name).exists() and not (ROOT / name).exists()]
    assert missing == []


# ---- examples ---------------------------------------------------------------------------------


#: example → what it must have found out
SAYS = {
    "01": "35 × batch_norm",
    "02": "35 of 35 norms folded",
    "03": "234,256 by name, 169,256 parameters, 169,256 stored elements",
    "04": "Classifier with 2 BatchNorms folded: equal",
    "05": "9 of 9 LayerNorms swapped: equal",
    "06": "--mode exact: {'swapped': 1, 'kept': 6}",
}


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("0*.py")), ids=lambda path: path.stem)
def test_examples_run(example: Path, trained_model: Path) -> None:
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert SAYS[example.stem[:2]] in done.stdout


def test_the_demo_makes_its_own_model_where_the_download_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    demo = _load(ROOT / "examples" / "demo.py")
    target = tmp_path / "text_direction.onnx"
    monkeypatch.setattr(demo, "TARGET", target)
    monkeypatch.setattr(demo, "FOLDED", target.with_name("folded.onnx"))

    def unreachable() -> Path:
        raise RuntimeError("the wheel could not be downloaded")

    monkeypatch.setattr(demo, "fetch", unreachable)
    demo.main()
    said = capfd.readouterr().out
    assert "could not be downloaded" in said
    assert "Validation: equal" in said
