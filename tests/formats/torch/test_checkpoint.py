"""Weights alone: counted by name and storage, never read, and never at the price of running what is in them."""

import io
import json
import math
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normtool.errors import UnreadableModel, UnsafeModel
from normtool.formats.torch.checkpoint import Checkpoint, read_checkpoint
from normtool.formats.torch.sniff import Kind, kind_of
from normtool.reasons import EXPLANATIONS
from normtool.scanning import scan_graph
from tests.conftest import CORPUS, ROOT, corpus_cases, torch_manifest

GIB = 1 << 30

#: What `read_checkpoint` tries to count.
CHECKPOINTS = (Kind.SAFETENSORS, Kind.INDEX, Kind.TORCH_ZIP, Kind.TORCH_LEGACY)

ZIP_AND_LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])

needs_links = pytest.mark.skipif(not hasattr(os, "symlink"), reason="no symbolic links here")


# ---- making files -----------------------------------------------------------------------------


def save(path: Path, content: Any, legacy: bool = False, protocol: int = 2) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    return path


def safetensors(path: Path, tensors: dict[str, tuple[str, list[int], int]], **replaced: Any) -> Path:
    """Written by hand, sparse: name → dtype, shape, bytes. `header` and `length` replace what is right."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = replaced.get("header", json.dumps(header).encode())
    with path.open("wb") as file:
        file.write(struct.pack("<Q", replaced.get("length", len(text))) + text)
        file.truncate(file.tell() + replaced.get("size", end))
    return path


def rezip(source: Path, target: Path, compression: int = zipfile.ZIP_DEFLATED, **extra: bytes) -> Path:
    """The same records in another archive, with more of them or other content."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        root = old.namelist()[0].partition("/")[0]
        content = {name: old.read(name) for name in old.namelist()}
        content |= {f"{root}/{name}": value for name, value in extra.items()}
        for name, value in content.items():
            new.writestr(name, value)
    return target


def index(folder: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> Path:
    path = folder / name
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return path


def codes(checkpoint: Checkpoint) -> list[str]:
    found = [code for code, _, _ in checkpoint.graph.diagnostics]
    assert set(found) <= set(EXPLANATIONS)
    return found


def diagnostic(checkpoint: Checkpoint, wanted: str) -> tuple[str, str]:
    return next((message, where) for code, message, where in checkpoint.graph.diagnostics if code == wanted)


def norms(checkpoint: Checkpoint) -> dict[str, tuple[str, str]]:
    return {norm.name: (norm.kind, norm.evidence) for norm in checkpoint.graph.norm_modules}


def refused(path: Path, *words: str, unsafe: bool | None = None) -> None:
    """In one or two lines that name the file, with the exit code of a model that cannot be read."""
    with pytest.raises(UnreadableModel) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert len(message.splitlines()) == 1
    assert "\x1b" not in message
    assert all(word in message for word in (str(path), *words)), message
    if unsafe is not None:
        assert isinstance(caught.value, UnsafeModel) is unsafe, message


def conv_bn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2))


#: Conv 216 + 8, BatchNorm 16, Linear 16 + 2
LEARNABLE, BUFFERS = 258, 17


# ---- the corpus: what an independent reader found ---------------------------------------------


@pytest.mark.parametrize(
    "entry", corpus_cases(lambda entry: entry.get("weights_only") == "ok", listed=torch_manifest)
)
def test_corpus_counts(entry: dict[str, Any]) -> None:
    checkpoint = read_checkpoint(CORPUS / entry["file"])
    found = checkpoint.graph.norm_modules
    batch = [norm for norm in found if norm.evidence == "statistics"]
    by_name = [norm for norm in found if norm.evidence == "name"]
    learnable = sum(t.stored_elements or 0 for norm in batch for t in norm.learnable)
    buffers = sum(t.stored_elements or 0 for norm in batch for t in norm.buffers)

    assert checkpoint.sha256 == entry["sha256"]
    assert checkpoint.state_path == entry["state_path"]
    assert len(checkpoint.entries) == entry["n_tensors"]
    assert sum(tensor.claimed for tensor in checkpoint.entries) == entry["elements"]
    assert checkpoint.census.named + checkpoint.census.buffers == entry["elements"]
    assert {norm.kind for norm in batch} <= {"batch_norm"}
    assert len(batch) == entry["n_bn"]
    assert sum(len(norm.buffers) == 3 for norm in batch) == entry["n_bn_tracked"]
    assert {"learnable": learnable, "buffer": buffers} == entry.get(
        "bn_state_dict_params", {"learnable": 0, "buffer": 0}
    )
    assert sum(len(norm.learnable[0].shape or ()) == 1 for norm in by_name) == entry["other_1d_with_bias"]
    assert ("norms_by_name" in codes(checkpoint)) == bool(by_name)


@pytest.mark.parametrize("entry", corpus_cases(lambda entry: "torch_ground_truth" in entry, torch_manifest))
def test_corpus_norms_are_those_of_the_module(entry: dict[str, Any]) -> None:
    """Ground truth is the instantiated module; its container classes called …BatchNorm hold nothing."""
    truth: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    for name, held in entry["torch_ground_truth"]["norm_modules"].items():
        if held["learnable"]:
            kind = "batch_norm" if name.startswith("BatchNorm") else "layer_norm"
            truth[kind] += held["modules"]
            elements[kind] += held["learnable"]
    checkpoint = read_checkpoint(CORPUS / entry["file"])
    scan = scan_graph(checkpoint.graph, {}, checkpoint.census)
    assert {kind: count.count for kind, count in scan.summary.items()} == truth
    assert {kind: count.learnable for kind, count in scan.summary.items()} == elements


@pytest.mark.parametrize(
    "entry", corpus_cases(lambda entry: entry.get("weights_only") != "ok", listed=torch_manifest)
)
def test_corpus_refusals(entry: dict[str, Any]) -> None:
    word = "TorchScript" if entry["format"] == "torchscript" else "`santorini.SantoriniNNet.SantoriniNNet`"
    refused(CORPUS / entry["file"], word, "state_dict()", unsafe=True)


# ---- which state dict, which names ------------------------------------------------------------


@ZIP_AND_LEGACY
@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.bin", "m.th", "m.ckpt", "m.tar", "m.safetensors", "m"])
def test_content_decides_not_the_suffix(tmp_path: Path, name: str, legacy: bool) -> None:
    path = save(tmp_path / name, conv_bn().state_dict(), legacy)
    checkpoint = read_checkpoint(path)
    assert kind_of(path) in CHECKPOINTS
    assert (checkpoint.format, checkpoint.census.learnable, checkpoint.census.buffers) == (
        "torch",
        LEARNABLE,
        BUFFERS,
    )
    assert checkpoint.graph.no_dataflow
    assert codes(checkpoint) == ["roles_by_name"]


def _nested() -> dict[str, Callable[[dict[str, Any]], tuple[Any, str]]]:
    small = {"w": torch.zeros(3)}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(9999)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    circle: list[Any] = []
    circle.append(circle)
    return {
        "plain": lambda state: (state, "/"),
        "lightning": lambda state: ({"state_dict": state, "optimizer_states": [optimizer]}, "/state_dict"),
        "any key": lambda state: ({"epoch": 3, "net_g": state, "aux": small}, "/net_g"),
        "two levels": lambda state: ({"a": {"b": state}}, "/a/b"),
        "in a tuple": lambda state: ((state, optimizer), "/0"),
        "larger average beside it": lambda state: (
            {"model_ema": state | {"more": torch.zeros(5000)}, "model": state},
            "/model",
        ),
        "nothing but the average": lambda state: ({"ema": state, "epoch": 1}, "/ema"),
        "optimizer by its keys": lambda state: ({"o": optimizer, "m": state}, "/m"),
        "optimizer by its name": lambda state: ({"optim": {"m": torch.zeros(9999)}, "m": state}, "/m"),
        "a circle beside it": lambda state: ({"m": state, "circle": circle}, "/m"),
        "names that are numbers": lambda state: ({0: state, 1: None, (2,): 1.5}, "/0"),
    }


@ZIP_AND_LEGACY
@pytest.mark.parametrize("case", _nested())
def test_finds_the_state_dict(tmp_path: Path, case: str, legacy: bool) -> None:
    content, where = _nested()[case](dict(conv_bn().state_dict()))
    checkpoint = read_checkpoint(save(tmp_path / "m.pt", content, legacy))
    assert checkpoint.state_path == where
    assert (checkpoint.census.learnable, checkpoint.census.buffers) == (LEARNABLE, BUFFERS)


def test_says_what_is_not_counted(tmp_path: Path) -> None:
    model = conv_bn()
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    checkpoint = read_checkpoint(save(tmp_path / "m.pt", content))
    assert checkpoint.census.learnable == LEARNABLE
    said = {where: message for code, message, where in checkpoint.graph.diagnostics if code == "not_counted"}
    steps, moments = 6, 2 * LEARNABLE
    assert f"18 other tensors, {steps + moments} elements" in said["/optimizer"]
    assert f"1 other tensors, {torch.get_rng_state().numel():,} elements" in said["/"]


@pytest.mark.parametrize(
    ("prefixes", "stripped"),
    [
        pytest.param(["module.", "module."], True, id="DataParallel"),
        pytest.param(["module.module.", "module.module."], True, id="twice"),
        pytest.param(["module.", ""], False, id="a module that is called module"),
    ],
)
def test_module_prefix(tmp_path: Path, prefixes: list[str], stripped: bool) -> None:
    state = {f"{prefix}{i}.weight": torch.zeros(2, 2) for i, prefix in enumerate(prefixes)}
    checkpoint = read_checkpoint(save(tmp_path / "m.pt", state))
    names = [tensor.name for tensor in checkpoint.entries]
    assert names == (["0.weight", "1.weight"] if stripped else list(state))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        pytest.param({"epoch": 3}, "no dict of tensors", id="no tensor"),
        pytest.param({}, "no dict of tensors", id="empty"),
        pytest.param(torch.zeros(3), "no dict of tensors", id="a tensor has no name"),
        pytest.param([torch.zeros(3)], "no dict of tensors", id="a list of tensors neither"),
        pytest.param(7, "no dict of tensors", id="a number"),
        pytest.param(
            {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}, "optimizer", id="optimizer alone"
        ),
        pytest.param({"w" * 5000: torch.zeros(1)}, "5,000 characters", id="absurd name"),
    ],
)
def test_nothing_to_count_is_said(tmp_path: Path, content: Any, word: str) -> None:
    refused(save(tmp_path / "m.pt", content), word)


# ---- storage ------------------------------------------------------------------------------------


@ZIP_AND_LEGACY
def test_tied_names_count_once(tmp_path: Path, legacy: bool) -> None:
    shared = torch.zeros(10, 4)
    state = {
        "embed.weight": shared,
        "head.weight": shared,
        "transposed.weight": shared.t(),
        "norm1.weight": shared[0],
        "own.weight": torch.zeros(6),
    }
    checkpoint = read_checkpoint(save(tmp_path / "m.pt", state, legacy))
    census = checkpoint.census
    assert (census.learnable, census.named, census.unique) == (46, 130, 90)
    assert census.learnable_bytes == 46 * 4
    assert len(checkpoint.graph.tensors) == 4  # head.weight is embed.weight
    assert len(checkpoint.entries) == 5


@ZIP_AND_LEGACY
def test_parts_of_one_storage(tmp_path: Path, legacy: bool) -> None:
    """Flattened parameters: neighbours, not copies; the rest of the storage is nobody's."""
    flat = torch.zeros(100)
    state = {"a": flat[:10], "b": flat[10:30].view(4, 5), "even": flat[50:60:2], "odd": flat[51:60:2]}
    census = read_checkpoint(save(tmp_path / "m.pt", state, legacy)).census
    assert (census.learnable, census.named, census.learnable_bytes) == (39 + 1, 40, 160)


def test_memory_of_a_buffer_and_a_parameter_is_the_parameters(tmp_path: Path) -> None:
    shared = torch.zeros(8)
    checkpoint = read_checkpoint(save(tmp_path / "m.pt", {"bn.running_mean": shared, "w": shared}))
    assert (checkpoint.census.learnable, checkpoint.census.buffers) == (8, 0)
    assert [tensor.role for tensor in checkpoint.graph.tensors] == ["parameter"]


@pytest.mark.parametrize(
    ("tensor", "held"),
    [
        pytest.param(torch.zeros(1, 8).expand(1000, 8), 8, id="stride 0"),
        pytest.param(torch.zeros(1).expand(50), 1, id="a single number"),
        pytest.param(torch.arange(10.0).unfold(0, 4, 1), 10, id="windows that overlap"),
    ],
)
@ZIP_AND_LEGACY
def test_expanded_views_count_what_is_stored(
    tmp_path: Path, tensor: torch.Tensor, held: int, legacy: bool
) -> None:
    checkpoint = read_checkpoint(save(tmp_path / "m.pt", {"w": tensor, "b": torch.zeros(3)}, legacy))
    assert checkpoint.census.learnable == held + 3
    message, where = diagnostic(checkpoint, "expanded_view")
    assert f"{tensor.numel():,}" in message
    assert where == "w"


def test_transposed_and_empty_are_no_expanded_views(tmp_path: Path) -> None:
    state = {"t": torch.zeros(3, 4).t(), "none": torch.zeros(0, 5), "scalar": torch.zeros(())}
    checkpoint = read_checkpoint(save(tmp_path / "m.pt", state))
    assert codes(checkpoint) == ["roles_by_name"]
    assert checkpoint.census.learnable == 13


def test_meta_tensors_store_nothing(tmp_path: Path) -> None:
    state = {"w": torch.zeros(1000, 1000, device="meta"), "b": torch.zeros(3)}
    checkpoint = read_checkpoint(save(tmp_path / "m.pt", state))
    assert checkpoint.census.learnable == 3
    assert diagnostic(checkpoint, "no_data")[1] == "w"


@pytest.mark.parametrize(
    ("dtype", "size", "buffer"),
    [
        (torch.float64, 8, False),
        (torch.bfloat16, 2, False),
        (torch.complex64, 8, False),
        (torch.int8, 1, True),
        (torch.bool, 1, True),
    ],
    ids=str,
)
@ZIP_AND_LEGACY
def test_bytes_and_roles_by_dtype(
    tmp_path: Path, dtype: torch.dtype, size: int, buffer: bool, legacy: bool
) -> None:
    census = read_checkpoint(save(tmp_path / "m.pt", {"w": torch.zeros(6, 5).to(dtype)}, legacy)).census
    counted = (census.learnable, census.learnable_bytes, census.buffers, census.buffer_bytes)
    assert counted == ((0, 0, 30, 30 * size) if buffer else (30, 30 * size, 0, 0))


def test_float8_is_counted_by_the_byte(tmp_path: Path) -> None:
    """In zip archives; PyTorch itself cannot load what it writes in the legacy format."""
    path = save(tmp_path / "m.pt", {"w": torch.zeros(6, 5).to(torch.float8_e4m3fn)})
    census = read_checkpoint(path).census
    assert (census.learnable, census.learnable_bytes, census.buffers) == (30, 30, 0)


def test_quantised_weights_are_weights(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, on its quantised tensors
        weight = torch.quantize_per_channel(torch.rand(4, 3), torch.ones(4), torch.zeros(4), 0, torch.qint8)
        state = {"fc._packed_params": (weight, torch.zeros(4)), "fc._packed_params.dtype": torch.qint8}
        path = save(tmp_path / "m.pt", state)
    census = read_checkpoint(path).census
    assert (census.learnable, census.learnable_bytes, census.buffers) == (16, 12 + 16, 0)


def test_integers_that_look_like_weights_are_mentioned(tmp_path: Path) -> None:
    state = {"fc.qweight": torch.zeros(8, 8, dtype=torch.int32), "fc.scales": torch.zeros(8)}
    checkpoint = read_checkpoint(save(tmp_path / "m.pt", state))
    assert (checkpoint.census.learnable, checkpoint.census.buffers) == (8, 64)
    assert "64 integers" in diagnostic(checkpoint, "roles_by_name")[0]


def test_parameters_sparse_tensors_and_metadata(tmp_path: Path) -> None:
    state = OrderedDict(p=nn.Parameter(torch.zeros(5)), s=torch.eye(100).to_sparse(), note="text", n=None)
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    census = read_checkpoint(save(tmp_path / "m.pt", state)).census
    assert census.learnable == 105


# ---- norms ------------------------------------------------------------------------------------


def test_batch_norms_are_certain(tmp_path: Path) -> None:
    plain = nn.BatchNorm1d(4, affine=False)
    model = nn.ModuleDict({"a": nn.BatchNorm2d(8), "layernorm": nn.BatchNorm1d(4), "plain": plain})
    state = model.state_dict()
    del state["a.num_batches_tracked"]  # as before PyTorch 0.4.1
    checkpoint = read_checkpoint(save(tmp_path / "m.pt", state))
    assert norms(checkpoint) == dict.fromkeys(model, ("batch_norm", "statistics"))
    assert "norms_by_name" not in codes(checkpoint)
    scan = scan_graph(checkpoint.graph, {}, checkpoint.census)
    assert {n.name: (n.learnable, n.buffers) for n in scan.norms} == {
        "a": (16, 16),
        "layernorm": (8, 9),
        "plain": (0, 9),
    }
    assert {n["spelling"] for n in scan.to_dict()["norms"]} == {"state_dict"}
    assert scan.norms[0].calls is None


#: Module name → kind, for γ and β of one shape
WITH_SHIFT = {
    "encoder.layer.0.attention.output.LayerNorm": "layer_norm",
    "h.0.ln_1": "layer_norm",
    "ln_f": "layer_norm",
    "blocks.3.norm1": "layer_norm",
    "final_layernorm": "layer_norm",
    "full_layer_layer_norm": "layer_norm",
    "norm.0": "layer_norm",
    "gn1": "group_norm",
    "GroupNorm": "group_norm",
    "group_norm": "group_norm",
    "InstanceNorm": "instance_norm",
    "bn1": "batch_norm",
}


@pytest.mark.parametrize("name", WITH_SHIFT)
@pytest.mark.parametrize("leaves", [("weight", "bias"), ("gamma", "beta")], ids="/".join)
def test_norms_by_name(tmp_path: Path, name: str, leaves: tuple[str, str]) -> None:
    state = {f"{name}.{leaf}": torch.ones(8) for leaf in leaves} | {"fc.weight": torch.zeros(8, 8)}
    checkpoint = read_checkpoint(save(tmp_path / "m.pt", state))
    assert norms(checkpoint) == {name: (WITH_SHIFT[name], "name")}
    assert diagnostic(checkpoint, "norms_by_name")[1] == name


@pytest.mark.parametrize("name", ["model.norm", "input_layernorm", "q_norm", "attention_RMSNorm", "ln_1"])
def test_scale_alone_is_an_rms_norm(tmp_path: Path, name: str) -> None:
    assert norms(read_checkpoint(save(tmp_path / "m.pt", {f"{name}.weight": torch.ones(8)}))) == {
        name: ("rms_norm", "name")
    }


def test_layer_norm_over_two_axes(tmp_path: Path) -> None:
    state = {"intra_ln.weight": torch.ones(33, 16), "intra_ln.bias": torch.zeros(33, 16)}
    assert norms(read_checkpoint(save(tmp_path / "m.pt", state))) == {"intra_ln": ("layer_norm", "name")}


NO_NORM: dict[str, dict[str, list[int]]] = {
    "PReLU has a scale and no norm's name": {"act.weight": [8]},
    "PReLU behind a norm's name": {"norm_act.weight": [8], "norm_prelu.weight": [8]},
    "weight norm": {
        "conv.weight_g": [8, 1],
        "conv.weight_v": [8, 4],
        "norm.weight_g": [8],
        "norm.weight_v": [8],
    },
    "one number is no γ": {"norm.weight": [1]},
    "Linear in a container called BatchNorm": {"UNetBatchNorm.fc.weight": [8, 4], "UNetBatchNorm.fc.bias": [8]},
    "PReLU in a container called BatchNorm": {"ConvBatchNorm.1.weight": [8]},
    "conv called norm": {"norm.weight": [8, 4, 3, 3], "norm.bias": [8]},
    "matrix called norm": {"norm.weight": [8, 8]},
    "sizes differ": {"norm.weight": [8], "norm.bias": [9]},
    "more than a norm has": {"norm.weight": [8], "norm.bias": [8], "norm.gate": [8]},
    "normal, normalize": {"normal.weight": [8], "normalize.weight": [8]},
    "a parameter called norm": {"norm": [8]},
    "statistics of observations": {"obs.running_mean": [8], "obs.running_var": [8], "obs.count": [1]},
    "statistics that do not fit each other": {"bn.running_mean": [8], "bn.running_var": [9]},
    "half the statistics": {"bn.running_mean": [8], "bn.weight": [8]},
}


@pytest.mark.parametrize("case", NO_NORM)
def test_no_norm(tmp_path: Path, case: str) -> None:
    state = {name: torch.ones(shape) for name, shape in NO_NORM[case].items()}
    assert norms(read_checkpoint(save(tmp_path / "m.pt", state))) == {}


def test_integers_called_norm_are_none(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pt", {"norm.weight": torch.ones(8, dtype=torch.int64)})
    assert norms(read_checkpoint(path)) == {}


def test_a_shared_norm_is_counted_once(tmp_path: Path) -> None:
    norm = nn.LayerNorm(8)
    state = nn.ModuleDict({"norm1": norm, "norm2": norm}).state_dict()
    checkpoint = read_checkpoint(save(tmp_path / "m.pt", state))
    scan = scan_graph(checkpoint.graph, {}, checkpoint.census)
    assert [(n.learnable, n.shared_with) for n in scan.norms] == [(16, ("norm2",)), (16, ("norm1",))]
    assert scan.summary["layer_norm"].learnable == scan.parameters.learnable == 16


# ---- safetensors --------------------------------------------------------------------------------

#: dtype → bytes of 16 elements, is it a buffer?
SIXTEEN = {
    "F64": (128, False),
    "F32": (64, False),
    "F16": (32, False),
    "BF16": (32, False),
    "F8_E4M3": (16, False),
    "F8_E5M2": (16, False),
    "F8_E8M0": (16, False),
    "F6_E3M2": (12, False),
    "F4": (8, False),
    "C64": (128, False),
    "I64": (128, True),
    "U8": (16, True),
    "BOOL": (16, True),
}


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_safetensors_dtypes(tmp_path: Path, dtype: str) -> None:
    size, buffer = SIXTEEN[dtype]
    checkpoint = read_checkpoint(safetensors(tmp_path / "m.bin", {"w": (dtype, [2, 8], size)}))
    census = checkpoint.census
    counted = (census.learnable, census.learnable_bytes, census.buffers, census.buffer_bytes)
    assert checkpoint.format == "safetensors"
    assert counted == ((0, 0, 16, size) if buffer else (16, size, 0, 0))


def test_safetensors_of_the_library(tmp_path: Path) -> None:
    import safetensors.torch

    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(conv_bn().state_dict(), path, metadata={"format": "pt"})
    checkpoint = read_checkpoint(path)
    assert (checkpoint.census.learnable, checkpoint.census.buffers) == (LEARNABLE, BUFFERS)
    assert norms(checkpoint) == {"1": ("batch_norm", "statistics")}
    assert checkpoint.sha256
    assert checkpoint.fingerprint == checkpoint.sha256[:16]


ONE = {"w": ("F32", [4], 16)}


@pytest.mark.parametrize(
    ("tensors", "replaced"),
    [
        pytest.param(ONE, {"header": b"{garbage!}"}, id="header is no JSON"),
        pytest.param(ONE, {"header": b'{"w": 3}'}, id="header of something else"),
        pytest.param(ONE, {"length": 2**63}, id="header length of 2^63"),
        pytest.param(ONE, {"length": 2**64 - 1}, id="header length of 2^64-1"),
        pytest.param(ONE, {"length": 10_000}, id="header longer than the file"),
        pytest.param(ONE, {"length": 12}, id="header cut short"),
        pytest.param(ONE, {"size": 15}, id="file too short"),
        pytest.param(ONE, {"size": 4000}, id="file too long"),
        pytest.param({"w": ("F32", [5], 16)}, {}, id="shape larger than the bytes"),
        pytest.param({"w": ("F32", [2**40, 2**40], 16)}, {}, id="shape that overflows"),
        pytest.param({"w": ("F32", [-4], 16)}, {}, id="negative length"),
        pytest.param({"w": ("\x1b[1mX", [4], 16)}, {}, id="dtype with escape codes"),
        pytest.param(
            ONE,
            {
                "header": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
                b'"b":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
            },
            id="tensors that overlap",
        ),
    ],
)
def test_bad_safetensors(tmp_path: Path, tensors: Any, replaced: dict[str, Any]) -> None:
    refused(safetensors(tmp_path / "m.safetensors", tensors, **replaced), "safetensors")


#: Lines of a child process; ru_maxrss would be the parent's if that was larger before exec.
PEAK = """
from pathlib import Path
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
"""

MEASURED = f"""{PEAK}
import json, resource, sys
from normtool.formats.torch.checkpoint import read_checkpoint
checkpoint = read_checkpoint(Path(sys.argv[1]))
user = resource.getrusage(resource.RUSAGE_SELF).ru_utime
io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
print(json.dumps(dict(user=user, peak=peak(), torch="torch" in sys.modules, read=int(io["rchar"]),
    learnable=checkpoint.census.learnable, bytes=checkpoint.census.learnable_bytes, sha256=checkpoint.sha256)))
"""

needs_proc = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="memory and reads are in /proc")


@needs_proc
@pytest.mark.parametrize("shards", [1, 5])
def test_five_gigabytes_in_a_second(tmp_path: Path, shards: int) -> None:
    """User time of a whole process, the start of Python included; the weights stay unread."""
    weight = ("BF16", [GIB // 8192, 4096], GIB)
    names = {f"layers.{i}.weight": f"model-{i * shards // 5 + 1:05}.safetensors" for i in range(5)}
    for shard in set(names.values()):
        safetensors(tmp_path / shard, {name: weight for name, home in names.items() if home == shard})
    path = index(tmp_path, names) if shards > 1 else tmp_path / "model-00001.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, path], capture_output=True, text=True, cwd=ROOT, check=True
    )
    found = json.loads(done.stdout)
    assert (found["learnable"], found["bytes"]) == (5 * GIB // 2, 5 * GIB)
    assert found["sha256"] is None
    assert not found["torch"]
    assert found["user"] < 1
    assert found["peak"] < 200 << 20
    assert found["read"] < 50 << 20


WEIGHTS_STAY_UNREAD = f"""{PEAK}
import sys, torch
from normtool.formats.torch.checkpoint import read_checkpoint
read_checkpoint(Path(sys.argv[1]))
before = peak()
assert read_checkpoint(Path(sys.argv[2])).census.learnable == 48 << 20
ours = peak()
torch.load(sys.argv[2], weights_only=True)
print(ours - before, peak() - ours)
"""


@needs_proc
@ZIP_AND_LEGACY
def test_torch_weights_stay_unread(tmp_path: Path, legacy: bool) -> None:
    small = save(tmp_path / "small.pt", {"w": torch.zeros(4)}, legacy)
    large = save(tmp_path / "large.pt", {f"{i}": torch.ones(16 << 20) for i in range(3)}, legacy)
    done = subprocess.run(
        [sys.executable, "-c", WEIGHTS_STAY_UNREAD, small, large], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = map(int, done.stdout.split())
    assert ours < 16 << 20
    assert theirs > 150 << 20  # of 192 MB of weights: the measure does see what is read


# ---- shards ---------------------------------------------------------------------------------------


def sharded(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    safetensors(folder / "a.safetensors", {"x.weight": ("F32", [4, 4], 64), "norm.weight": ("F32", [4], 16)})
    safetensors(folder / "b.safetensors", {"y.weight": ("BF16", [4, 4], 32), "norm.bias": ("F32", [4], 16)})
    homes = {"x.weight": "a", "norm.weight": "a", "y.weight": "b", "norm.bias": "b"}
    return index(folder, {name: f"{home}.safetensors" for name, home in homes.items()})


def test_all_shards_are_counted(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(sharded(tmp_path))
    assert (checkpoint.format, checkpoint.census.learnable) == ("safetensors", 40)
    assert checkpoint.census.learnable_bytes == 64 + 16 + 32 + 16
    assert norms(checkpoint) == {"norm": ("layer_norm", "name")}  # γ in one shard, β in the other
    assert checkpoint.sha256 is None
    assert checkpoint.fingerprint


def test_shards_of_torch_save(tmp_path: Path) -> None:
    tied = torch.zeros(10)
    save(tmp_path / "1.bin", {"a": tied, "b": tied})
    save(tmp_path / "2.bin", {"c": torch.zeros(5)}, legacy=True)
    path = index(tmp_path, {"a": "1.bin", "b": "1.bin", "c": "2.bin"}, "pytorch_model.bin.index.json")
    census = read_checkpoint(path).census
    assert (census.learnable, census.named) == (15, 25)


def test_tensors_beside_the_index_are_counted_and_said(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    listed = json.loads(path.read_text())["weight_map"]
    del listed["y.weight"]
    checkpoint = read_checkpoint(index(tmp_path, listed))
    assert checkpoint.census.learnable == 40
    assert diagnostic(checkpoint, "not_in_index")[1] == "b.safetensors"


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_folder_of_weights(tmp_path: Path, name: str) -> None:
    if name.endswith(".json"):
        sharded(tmp_path)
    elif name.endswith(".bin"):
        save(tmp_path / name, {"w": torch.zeros(40)})
    else:
        safetensors(tmp_path / name, {"w": ("F32", [40], 160)})
    assert read_checkpoint(tmp_path).census.learnable == 40


@needs_links
def test_hugging_face_cache(tmp_path: Path) -> None:
    """snapshots/REV/file → ../../blobs/HASH, index and shards alike."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "rev"
    sharded(blobs)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(list(blobs.iterdir())):
        hashed = file.rename(blobs / f"{number:064}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", hashed.name))
    assert read_checkpoint(snapshot / "model.safetensors.index.json").census.learnable == 40
    assert read_checkpoint(snapshot).census.learnable == 40


@pytest.mark.parametrize(
    "shard",
    ["/etc/hostname", "../secret.safetensors", "sub/../../secret.safetensors", "\\\\server\\x", "a\0b", ""],
    ids=ascii,
)
def test_shard_names_stay_in_the_folder(tmp_path: Path, shard: str) -> None:
    safetensors(tmp_path / "secret.safetensors", ONE)
    (tmp_path / "model" / "sub").mkdir(parents=True)
    refused(index(tmp_path / "model", {"w": shard}), "outside its own folder", unsafe=True)


@needs_links
def test_shards_that_are_links_out_of_the_folder(tmp_path: Path) -> None:
    safetensors(tmp_path / "secret.safetensors", ONE)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "s.safetensors").symlink_to(tmp_path / "secret.safetensors")
    refused(index(tmp_path / "model", {"w": "s.safetensors"}), "a link out of the folder", unsafe=True)


@needs_links
def test_shards_that_are_a_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    refused(index(tmp_path, {"w": "a"}), "'a'", "missing")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    refused(path, "'b.safetensors'", "missing", unsafe=False)


def test_tensor_missing_from_its_shard_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    listed = json.loads(path.read_text())["weight_map"] | {"lost.weight": "a.safetensors"}
    refused(index(tmp_path, listed), "'lost.weight'", "'a.safetensors'", unsafe=False)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"w": 3}}',
        '{"weight_map": {"w": ["a"]}}',
        '{"weight_map": 3}',
        '{"a":' * 100_000,
    ],
    ids=lambda text: text[:24],
)
def test_json_that_is_no_index(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.index.json"
    path.write_text(text)
    refused(path, "no index")


def test_an_index_is_no_shard(tmp_path: Path) -> None:
    refused(index(tmp_path, {"w": "model.safetensors.index.json"}), "JSON")


def test_folder_with_a_config_is_a_model(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "config.json")


def test_folder_without_weights(tmp_path: Path) -> None:
    refused(tmp_path, "no model.safetensors")


# ---- code in files is not run -------------------------------------------------------------------


class Canary:
    """Unpickled anywhere but under weights_only, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def _canaries() -> dict[str, Callable[[Path, Canary], object]]:
    def torchscript(path: Path, canary: Canary) -> None:
        save(path, {"w": torch.zeros(2)})
        with zipfile.ZipFile(path, "a") as archive:
            for name in ("constants.pkl", "code/__torch__.py"):
                archive.writestr(f"{path.stem}/{name}", pickle.dumps(canary, 2))

    def early_tar(path: Path, canary: Canary) -> None:
        with tarfile.open(path, "w") as tar:
            for name in ("storages", "tensors", "pickle"):
                content = pickle.dumps(canary, 2)
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    def in_the_keys(path: Path, canary: Canary) -> None:
        """A legacy file whose last pickle, behind the object, is hostile."""
        save(path, {"w": torch.zeros(2)}, legacy=True)
        content = path.read_bytes()
        keys = content.rindex(b"\x80\x02]")
        path.write_bytes(content[:keys] + pickle.dumps(canary, 2) + content[keys:])

    def record(path: Path, canary: Canary) -> None:
        save(path, {"w": torch.zeros(2)})
        rezip(path, path.with_suffix(".zip"), zipfile.ZIP_STORED, **{"data.pkl": pickle.dumps(canary, 2)})
        path.with_suffix(".zip").replace(path)

    def shard(path: Path, canary: Canary) -> None:
        save(path.parent / "shard.bin", {"w": canary})
        index(path.parent, {"w": "shard.bin"}, path.name)

    def safetensors_name(path: Path, canary: Canary) -> None:
        path.write_bytes(b"\x80\x02" + bytes(6) + b"{" + pickle.dumps(canary, 2))

    return {
        "zip": lambda path, canary: save(path, canary),
        "zip, nested": lambda path, canary: (save(path, {"a": [{"b": (canary,)}], "w": torch.ones(2)}), None)[
            1
        ],
        "zip, protocol 3": lambda path, canary: save(path, {"a": canary}, protocol=3),
        "zip, protocol 4": lambda path, canary: save(path, {"a": canary}, protocol=4),
        "zip, protocol 0": lambda path, canary: save(path, {"a": canary}, protocol=0),
        "legacy": lambda path, canary: save(path, {"a": canary}, legacy=True),
        "legacy, protocol 5": lambda path, canary: save(path, {"a": canary}, True, 5),
        "legacy, behind the object": in_the_keys,
        "plain pickle": lambda path, canary: path.write_bytes(pickle.dumps(canary, 2)),
        "plain pickle, protocol 0": lambda path, canary: path.write_bytes(pickle.dumps(canary, 0)),
        "pickle that looks like safetensors": safetensors_name,
        "TorchScript": torchscript,
        "tar": early_tar,
        "a record of the archive": record,
        "a shard": shard,
    }


@pytest.mark.parametrize("forced", [False, True], ids=["", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("case", _canaries())
def test_no_code_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, forced: bool) -> None:
    created, path = tmp_path / "created", tmp_path / "m.pt"
    _canaries()[case](path, Canary(created))
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UnreadableModel) as caught:
        read_checkpoint(path)
    assert caught.value.exit_code == 3
    assert len(str(caught.value).splitlines()) == 1
    assert not created.exists()


def test_the_canary_sings(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    path = save(tmp_path / "m.pt", {"a": Canary(tmp_path / "created")})
    torch.load(path, weights_only=False)["a"].close()
    assert (tmp_path / "created").exists()


def test_forbidden_global_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pt", {"w": torch.zeros(2), "a": Canary(tmp_path / "created")})
    refused(path, "`io.open`", "runs no code", ".safetensors", unsafe=True)


def test_whole_modules_are_refused_by_their_class(tmp_path: Path) -> None:
    refused(save(tmp_path / "m.pt", conv_bn()), "`torch.nn.modules.container.Sequential`", unsafe=True)


def test_hostile_names_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pt", {"w": torch.zeros(2)})
    evil = b"\x80\x02c\x1b[31mmodule\nname\x07\n."
    refused(rezip(path, tmp_path / "evil.pt", zipfile.ZIP_STORED, **{"data.pkl": evil}))


# ---- bombs ------------------------------------------------------------------------------------------


def test_compressed_bomb(tmp_path: Path) -> None:
    """200 MB of zeros in 195 KB."""
    path = save(tmp_path / "m.pt", {"w": torch.zeros(2)})
    bomb = rezip(path, tmp_path / "bomb.pt", **{"data/0": bytes(200_000_000)})
    assert bomb.stat().st_size < 200_000
    refused(bomb, "200,000", "'m/data/0'", unsafe=True)


def test_compressed_within_bounds_is_counted_and_said(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pt", {"w": torch.zeros(1_000_000)})
    checkpoint = read_checkpoint(rezip(path, tmp_path / "small.pt"))
    assert checkpoint.census.learnable == 1_000_000
    assert "4,000," in diagnostic(checkpoint, "compressed_records")[0]


@ZIP_AND_LEGACY
def test_stride_bomb(tmp_path: Path, legacy: bool) -> None:
    """1.1e12 elements by a stride of 0, in less than two kilobytes."""
    path = save(tmp_path / "m.pt", {"w": torch.zeros(1).expand(1 << 20, 1 << 20)}, legacy)
    assert path.stat().st_size < 2000
    refused(path, "'w'", f"{1 << 40:,} elements", "storage of 4 bytes", unsafe=True)


def repickled(path: Path, change: Callable[[bytes], bytes], legacy: bool) -> Path:
    """The pickle of the object, changed."""
    if legacy:
        changed = path.with_name("changed.pt")
        changed.write_bytes(change(path.read_bytes()))
        return changed
    with zipfile.ZipFile(path) as archive:
        content = archive.read(f"{path.stem}/data.pkl")
    return rezip(path, path.with_name("changed.pt"), zipfile.ZIP_STORED, **{"data.pkl": change(content)})


@pytest.mark.parametrize("claimed", [1 << 20, (1 << 31) - 1, 1 << 40, 1 << 63, 1 << 100], ids="{:.0e}".format)
@ZIP_AND_LEGACY
def test_storage_that_the_file_does_not_hold(tmp_path: Path, claimed: int, legacy: bool) -> None:
    """One number in the pickle: the storage's length."""
    path = save(tmp_path / "m.pt", {"w": torch.zeros(77)}, legacy)
    number = pickle.dumps(claimed, 2)[2:-1]
    changed = repickled(path, lambda content: content.replace(b"K\x4d", number), legacy)
    assert changed.stat().st_size < 3000
    refused(changed)


def test_storage_of_no_record(tmp_path: Path) -> None:
    """The archive has room enough, in a record that is not this storage's."""
    path = save(tmp_path / "m.pt", {"w": torch.zeros(77)})
    padded = rezip(path, tmp_path / "padded.pt", zipfile.ZIP_STORED, **{"data/9": bytes(5000)})
    assert read_checkpoint(padded).census.learnable == 77
    with zipfile.ZipFile(path) as archive:
        content = archive.read("m/data.pkl").replace(b"K\x4d", b"M\xe8\x03")  # 77 → 1000
    lying = rezip(padded, tmp_path / "lying.pt", zipfile.ZIP_STORED, **{"data.pkl": content})
    refused(lying, "'w'", "4,000 bytes", unsafe=False)


@pytest.mark.parametrize("rows", [1 << 12, 1 << 28, 1 << 45], ids="{:.0e}".format)
@ZIP_AND_LEGACY
def test_shape_beyond_its_storage(tmp_path: Path, rows: int, legacy: bool) -> None:
    """PyTorch makes the storage larger if the shape asks for it."""
    path = save(tmp_path / "m.pt", {"w": torch.zeros(7, 11)}, legacy)
    number = pickle.dumps(rows, 2)[2:-1]
    refused(repickled(path, lambda content: content.replace(b"K\x07K\x0b\x86", number + b"K\x0b\x86"), legacy))


def _pickle_bombs() -> dict[str, bytes]:
    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    hexed = b"c_codecs\nencode\n" * 40 + text("0123456789") + (text("hex") + b"\x86R") * 40
    million = pickle.dumps(1 << 38, 2)[2:-1]
    doubled = b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60))
    return {
        "bytearray of a size of its choosing": b"c__builtin__\nbytearray\n" + million + b"\x85R",
        "bytes that double thirty times": hexed,
        "bytes copied a thousand times": b"c_codecs\nencode\nq\x00X"
        + struct.pack("<I", 1 << 20)
        + b"a" * (1 << 20)
        + b"q\x01X\x06\x00\x00\x00latin1q\x02"
        + b"h\x00h\x01h\x02\x86R" * 1000,
        "containers that refer to each other twice": doubled,
        "containers nested a million times": b"]" * 1_000_000 + b"a" * 999_999,
        "six million instructions": b"N" * 6_000_000,
    }


@pytest.mark.parametrize("case", _pickle_bombs())
def test_pickle_bombs(tmp_path: Path, case: str) -> None:
    path = save(tmp_path / "m.pt", {"w": torch.zeros(2)})
    content = b"\x80\x02" + _pickle_bombs()[case] + b"."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(rezip(path, tmp_path / "bomb.pt", zipfile.ZIP_STORED, **{"data.pkl": content}))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10  # KB


def test_pickle_larger_than_any_state_dict(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pt", {"w": torch.zeros(2)})
    refused(rezip(path, tmp_path / "bomb.pt", **{"data.pkl": bytes(65 << 20)}), "'m/data.pkl'", unsafe=True)


def test_bytes_in_a_checkpoint_are_no_bomb(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pt", {"model": {"w": torch.zeros(2)}, "config": b"\x00lr: 0.1\xff"})
    assert read_checkpoint(path).census.learnable == 2


def test_record_listed_twice(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pt", {"w": torch.zeros(2)})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
    refused(path, "data.pkl")


def directory(path: Path, offset: int, value: int, record: str = "m/data/0") -> Path:
    """Change a 32-bit field of the central directory."""
    content = bytearray(path.read_bytes())
    entry = content.rindex(record.encode()) - 46
    assert content[entry : entry + 4] == b"PK\x01\x02"
    struct.pack_into("<I", content, entry + offset, value)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        pytest.param(20, 1 << 30, id="more bytes than the file has"),
        pytest.param(24, 1 << 30, id="unpacks to more than it stores"),
        pytest.param(42, 1 << 30, id="begins behind the end"),
        pytest.param(8, 1, id="encrypted"),
    ],
)
def test_directory_that_lies(tmp_path: Path, offset: int, value: int) -> None:
    refused(directory(save(tmp_path / "m.pt", {"w": torch.zeros(200)}), offset, value))


# ---- torn and foreign files ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "index"])
def test_truncated_anywhere(tmp_path: Path, kind: str) -> None:
    if kind == "index":
        path = sharded(tmp_path)
    elif kind == "safetensors":
        path = safetensors(tmp_path / "m", {"w": ("F32", [50], 200), "norm.weight": ("F32", [50], 200)})
    else:
        path = save(tmp_path / "m", conv_bn().state_dict(), legacy=kind == "legacy")
    whole = path.read_bytes()
    for cut in {*range(0, len(whole), max(1, len(whole) // 150)), *range(24), len(whole) - 1}:
        path.write_bytes(whole[:cut])
        with pytest.raises(UnreadableModel):
            read_checkpoint(path)
    path.write_bytes(whole)
    assert read_checkpoint(path).census.learnable


@ZIP_AND_LEGACY
def test_flipped_bytes(tmp_path: Path, legacy: bool) -> None:
    """Whatever a byte becomes: counted, or refused in one line."""
    path = save(tmp_path / "m.pt", conv_bn().state_dict(), legacy)
    whole, dice = path.read_bytes(), random.Random(0)
    refusals: list[str] = []
    for _ in range(400):
        content = bytearray(whole)
        content[dice.randrange(len(content))] = dice.randrange(256)
        path.write_bytes(content)
        try:
            assert read_checkpoint(path).census
        except UnreadableModel as error:
            refusals.append(str(error))
    assert refusals
    assert {len(refusal.splitlines()) for refusal in refusals} == {1}


FOREIGN = {
    "empty": (b"", "no checkpoint"),
    "text": (b"hello\n", "no checkpoint"),
    "HTML": (b"<!doctype html><html>", "no checkpoint"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), "compressed"),
    "zeros": (bytes(4096), "no checkpoint"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_files(tmp_path: Path, case: str) -> None:
    content, words = FOREIGN[case]
    path = tmp_path / "m.pt"
    path.write_bytes(content)
    assert kind_of(path) not in CHECKPOINTS
    refused(path, words, unsafe=False)


def test_zip_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("word/document.xml", "<x/>")
    refused(tmp_path / "m.pt", "no data.pkl")


def test_exported_program_under_another_name(tmp_path: Path) -> None:
    program = torch.export.export(nn.ReLU(), (torch.zeros(2),))
    torch.export.save(program, tmp_path / "m.pt2")
    path = (tmp_path / "m.pt2").rename(tmp_path / "m.pt")
    assert kind_of(path) is Kind.EXPORTED_PROGRAM
    assert kind_of(save(tmp_path / "n.pt2", {"w": torch.zeros(2)})) is not Kind.EXPORTED_PROGRAM
    refused(path, "exported program", ".pt2")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_with_the_reason(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.BatchNorm1d(4)), tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "TorchScript", "holds code", "state_dict()", unsafe=True)


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.pt", "No such file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    refused(tmp_path / "pipe.pt", "no regular file")


# ---- reading changes nothing ----------------------------------------------------------------------------


def test_reading_changes_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pt", conv_bn().state_dict())
    content, random_state = path.read_bytes(), torch.get_rng_state()
    read_checkpoint(path)
    assert path.read_bytes() == content
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.load(path, weights_only=True)["0.weight"].abs().sum() > 0  # skip_data is off again


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = save(tmp_path / "m.pt", {"w": torch.zeros(3)})
    first, again = read_checkpoint(path), read_checkpoint(path)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != read_checkpoint(save(path, {"w": torch.ones(3)})).fingerprint
    assert math.log2(16 ** len(first.fingerprint)) == 64
