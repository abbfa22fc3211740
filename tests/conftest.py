"""Fixtures: the corpus of real models, the command line as a user runs it."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# two workers on two cores, each with libraries that want both: they would wait for each other most of the time
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent

#: A folder of real model files with a manifest of what an independent reader found in them.
CORPUS = Path(os.environ.get("NORMTOOL_CORPUS", ROOT.parent / "shared" / "models"))


def _manifest() -> list[dict[str, Any]]:
    path = CORPUS / "manifest.json"
    return list(json.loads(path.read_text())) if path.exists() else []


def manifest() -> list[dict[str, Any]]:
    """The corpus entries that are ONNX files; empty where the corpus is absent."""
    return [entry for entry in _manifest() if entry["format"] == "onnx"]


def torch_manifest() -> list[dict[str, Any]]:
    """The PyTorch checkpoints and TorchScript archives of the corpus."""
    return [entry for entry in _manifest() if entry["format"] != "onnx"]


def corpus_cases(
    wanted: Callable[[dict[str, Any]], bool] = lambda entry: True,
    listed: Callable[[], list[dict[str, Any]]] = manifest,
) -> list[Any]:
    """pytest parameters, one per corpus file; a single visible skip where the corpus is absent."""
    entries = [entry for entry in listed() if wanted(entry)]
    if not entries:
        reason = f"no model corpus at {CORPUS}; set NORMTOOL_CORPUS"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="no-corpus")]
    return [pytest.param(entry, id=Path(entry["file"]).name) for entry in entries]


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def normtool() -> Run:
    """Run the command line in a process of its own, as a shell would."""

    def run(*arguments: Any, **options: Any) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "normtool", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, **options)

    return run


@functools.cache
def _translations() -> Callable[..., Any]:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    original: Callable[..., Any] = ONNXRegistry.from_torchlib
    return functools.cache(original)


@pytest.fixture(scope="module")
def translations_read_once() -> Iterator[None]:
    """The exporter reads its 500 translations again for every export, half of the work for a small model.

    In the processes that `test_cli_torch` and `test_docs` start it does as it does for a user.
    """
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(_translations()))
        yield


@pytest.fixture
def worker_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ONNX Runtime here: to start a process takes five times as long as the run itself.

    Whatever fails here goes on to a process of its own, as a user's run does (`test_cli` has those).
    """
    from normtool.formats.onnx import child, worker

    start = child.start

    def run_child(job_path: Path, time_limit: float) -> tuple[int, str]:
        try:
            worker.main(str(job_path))
        except (Exception, SystemExit):
            return start(job_path, time_limit)
        return 0, ""

    monkeypatch.setattr(child, "start", run_child)
