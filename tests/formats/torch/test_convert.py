"""PyTorch → ONNX and .pt2: the same function, and every difference between the counts has its cause."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - everyone's name for it
from torch import Tensor, nn

from normtool import api
from normtool.comparison import DIFFERENT
from normtool.conversion import Conversion
from normtool.errors import OutputError, RuntimeRefused, UsageError
from normtool.formats.torch import convert as torch_convert
from normtool.formats.torch.norm_changes import UNEXPLAINED, NormChange
from tests.conftest import ROOT
from tests.formats.torch.architectures import ARCHITECTURES, perturb

BY_NAME = {each.name: each for each in ARCHITECTURES}


pytestmark = pytest.mark.usefixtures("worker_in_this_process", "translations_read_once")


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path_factory, monkeypatch) -> Iterator[None]:
    """Neither in the folder for temporary files nor in the current one."""
    temporary, current = (tmp_path_factory.mktemp(name) for name in ("temporary", "current"))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.chdir(current)
    yield
    gc.collect()
    left = [path for folder in (temporary, current) for path in folder.iterdir()]
    assert not [path for path in left if "torchinductor" not in path.name]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def convert(module: Any, *inputs: Any, validate: bool = False, **options: Any) -> Conversion:
    if isinstance(module, nn.Module):
        perturb(module, "convert")
    result = api.convert(module, inputs or None, validate=validate, **options)
    assert not any(result.reconciliation.unexplained.values()), result.reconciliation.to_dict()
    return result


def causes(result: Conversion) -> dict[str, dict[str, int]]:
    """cause → what it changes, without zeros."""
    return {
        each.cause: {role: n for role, n in each.by_role.items() if n}
        for each in result.reconciliation.differences
    }


def sites(result: Conversion) -> list[tuple[str, str, list[str]]]:
    return [(site.norm.name, site.verdict, [reason.code for reason in site.reasons]) for site in result.sites]


def run(result: Conversion, *inputs: Tensor) -> list[np.ndarray[Any, Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    content = result.model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return list(session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)}))


class ConvNorm(nn.Module):
    def __init__(self, bias: bool = True, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, bias=bias)
        self.bn = nn.BatchNorm2d(4, **options)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


IMAGE = normal(2, 3, 5, 5)


# ---- the file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [False, True])
def test_converts_and_validates(fold):
    result = convert(ConvNorm(), IMAGE, fold=fold, validate=True)
    assert result.validation is not None
    assert result.validation.verdict == "equal"
    onnx.checker.check_model(result.model)
    assert result.model.opset_import[0].version == 20


@pytest.mark.parametrize("opset", [18, 20, 21])
def test_opset(opset):
    result = convert(ConvNorm(), IMAGE, opset=opset)
    assert {each.domain: each.version for each in result.model.opset_import}[""] == opset


@pytest.mark.parametrize("opset", [-1, 0, 7, 99])
def test_refuses_an_opset_that_cannot_be_written(opset):
    with pytest.raises((UsageError, RuntimeRefused)) as refused:
        convert(ConvNorm(), IMAGE, opset=opset)
    assert "opset" in str(refused.value).lower()
    assert len(str(refused.value).splitlines()) <= 2


def test_the_batch_is_open_and_called_so():
    module = ConvNorm().eval()
    result = convert(module, IMAGE[:1])
    assert result.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert result.model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    x = normal(7, 3, 5, 5)
    with torch.no_grad():
        np.testing.assert_allclose(run(result, x)[0], module(x).numpy(), atol=1e-5)


def test_a_batch_that_cannot_vary_stays():
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, torch.ones(2, 6)], 1)

    result = convert(Fixed(), normal(2, 6))
    assert result.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


def test_inference_mode_and_the_module_stays_in_its_own():
    module = nn.Sequential(ConvNorm(), nn.Dropout(0.5)).train()
    module[0].bn.eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    result = convert(module, IMAGE, validate=True)
    assert result.validation is not None
    assert result.validation.verdict == "equal"
    assert [part.training for part in module.modules()] == [True, True, True, False, True]
    assert "Dropout" not in {node.op_type for node in result.model.graph.node}
    after = api.convert(module, (IMAGE,), validate=False).source.module.state_dict()
    assert set(after) == set(before)


def test_hooks_run():
    module = ConvNorm().eval()
    module.bn.register_forward_hook(lambda module, inputs, output: output + 1)
    result = convert(module, IMAGE)
    with torch.no_grad():
        np.testing.assert_allclose(run(result, IMAGE)[0], module(IMAGE).numpy(), atol=1e-5)


def test_to_pt2(tmp_path):
    module = ConvNorm().eval()
    result = convert(module, IMAGE, target="pt2", fold=True, validate=True)
    assert result.validation is not None
    assert result.validation.verdict == "equal"
    assert causes(result) == {"folded": {"learnable": -8, "buffers": -9}}
    result.save(tmp_path / "m.pt2")
    again = api.load(tmp_path / "m.pt2")
    assert again.census.learnable == 16
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = again.program.module()(normal(5, 3, 5, 5))
        torch.testing.assert_close(found, module(normal(5, 3, 5, 5)), atol=1e-5, rtol=1e-4)


def test_from_pt2_and_the_program_stays(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(ConvNorm().eval(), (IMAGE,), strict=False)
    before, code = {k: v.clone() for k, v in program.state_dict.items()}, str(program.graph)
    result = convert(program, fold=True, validate=True)
    assert result.folded == 1
    assert result.validation is not None
    assert result.validation.verdict == "equal"
    assert str(program.graph) == code
    assert all(torch.equal(value, program.state_dict[key]) for key, value in before.items())


def test_weights_above_the_limit_lie_beside_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_convert, "_EMBEDDED_BYTES", 16)
    module = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)).eval()
    result = convert(module, normal(2, 3, 5, 5), fold=True, validate=True)
    assert result.validation is not None
    assert result.validation.verdict == "equal"
    result.save(tmp_path / "large.onnx")
    assert api.scan(tmp_path / "large.onnx").parameters.learnable == 64 * 27 + 64
    onnx.checker.check_model(tmp_path / "large.onnx")


# ---- refused --------------------------------------------------------------------------------------------


def test_refuses_onnx(tmp_path):
    convert(ConvNorm(), IMAGE).save(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="is ONNX already"):
        api.convert(tmp_path / "m.onnx")


def test_refuses_an_unknown_target():
    with pytest.raises(UsageError, match="choose onnx or pt2"):
        api.convert(ConvNorm(), (IMAGE,), target="tflite")


def test_refuses_weights_alone(tmp_path):
    torch.save(ConvNorm().state_dict(), tmp_path / "w.pt")
    with pytest.raises(UsageError, match="give the model itself"):
        api.convert(tmp_path / "w.pt")


class Sorts(nn.Module):
    """Exports, and has no counterpart in ONNX."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x)


def test_says_what_the_exporter_says():
    with pytest.raises(RuntimeRefused, match=r"torch\.onnx\.export fails: .*eigvalsh|eigh") as refused:
        api.convert(Sorts(), (torch.eye(3),))
    assert len(str(refused.value).splitlines()) == 1


def test_refuses_meta_tensors():
    with torch.device("meta"):
        module, x = ConvNorm().eval(), torch.ones(2, 3, 5, 5)
    with pytest.raises((UsageError, RuntimeRefused)) as refused:
        api.convert(module, (x,))
    assert len(str(refused.value).splitlines()) <= 2


# ---- the account ----------------------------------------------------------------------------------------


def test_a_norm_the_exporter_folds_is_said():
    result = convert(ConvNorm(), IMAGE)
    assert sites(result) == [("bn", "folded", ["folded_by_exporter"])]
    assert causes(result) == {
        "folded_by_exporter": {"learnable": -8, "buffers": -8},
        "num_batches_tracked": {"buffers": -1},
    }
    assert (result.before.learnable, result.after.learnable) == (24, 16)


def test_a_conv_without_bias_gets_one():
    result = convert(ConvNorm(bias=False), IMAGE)
    assert causes(result) == {
        "folded_by_exporter": {"learnable": -8 + 4, "buffers": -8},
        "num_batches_tracked": {"buffers": -1},
    }


def test_a_norm_that_normtool_folds():
    result = convert(ConvNorm(), IMAGE, fold=True)
    assert [(name, verdict) for name, verdict, _ in sites(result)] == [("bn", "folded")]
    assert result.folded == 1
    assert causes(result) == {"folded": {"learnable": -8, "buffers": -9}}


def test_a_norm_that_stays():
    result = convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), IMAGE)
    assert sites(result) == [("0", "kept", ["not_asked"])]
    assert causes(result) == {"num_batches_tracked": {"buffers": -1}}


def test_norms_at_their_initial_values_are_merged_not_folded():
    """The exporter stores equal tensors once: γ = σ² = 1, β = μ = 0 leave two of eight."""
    module = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU()).eval()
    result = api.convert(module, (IMAGE,), validate=False)
    assert sites(result) == [("0", "kept", ["not_asked"]), ("2", "kept", ["not_asked"])]
    assert not any(result.reconciliation.unexplained.values())
    found = causes(result)
    assert found["merged"] == {"learnable": -6, "buffers": -12}
    assert found["num_batches_tracked"] == {"buffers": -2}
    assert "folded_by_exporter" not in found


def test_one_norm_after_two_convs():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.a(x)) + self.bn(torch.relu(self.b(x)))

    result = convert(Shared(), IMAGE)
    # the second call stays, so the numbers do
    assert [verdict for _, verdict, _ in sites(result)] == ["folded", "kept"]
    assert "folded_by_exporter" not in causes(result)


def test_affine_false():
    result = convert(nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.ReLU()), IMAGE)
    assert [verdict for _, verdict, _ in sites(result)] == ["kept"]
    found = causes(result)
    assert found.pop("num_batches_tracked") == {"buffers": -1}
    assert result.after.buffers == 6
    # γ = 1 and β = 0 have to be written
    assert found == {"constant_made": {"learnable": 6}}


def test_an_unused_module():
    class Unused(ConvNorm):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, 7)

    found = causes(convert(Unused(), IMAGE, fold=True))
    assert found["unused"] == {"learnable": -42}


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    result = convert(Tied(), torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert result.before.learnable == 66
    # the head's MatMul wants it transposed, so it is stored twice
    assert causes(result) == {"tied_copy": {"learnable": 66}}


def test_transposed_linear_weights_are_the_same_weights():
    result = convert(nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 7)), normal(2, 3, 5))
    assert causes(result) == {}
    assert result.after.learnable == 35 + 56


def test_frozen_parameters_count_as_learnable_in_the_file():
    module = ConvNorm().requires_grad_(False)
    found = causes(convert(module, IMAGE))
    assert found["role"] == {"frozen": -16, "learnable": 16}
    assert found["folded_by_exporter"] == {"frozen": -8, "buffers": -8}


def test_buffers():
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", normal(4, 3))
            self.register_buffer("never", normal(9))
            self.linear = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) @ self.table

    result = convert(Buffers(), normal(2, 3))
    assert (result.before.buffers, result.after.buffers) == (21, 0)
    found = causes(result)
    assert found["unused"] == {"buffers": -9}
    # a constant operand of MatMul is a weight, to whoever reads the file
    assert found["role"] == {"buffers": -12, "learnable": 12}


def test_plain_attributes_become_constants():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = normal(5)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    result = convert(Plain(), normal(2, 5))
    assert causes(result)["lifted"] == {"constants": 5}


def test_constants_that_the_exporter_makes():
    class Shapes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(x.reshape(x.shape[0], 3, -1), (1, 1))

    result = convert(Shapes(), normal(2, 6))
    found = causes(result)
    assert set(found) == {"constant_made"}
    assert found["constant_made"]["constants"] == result.after.constants > 0


def test_views_of_one_storage():
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = normal(6, 4)
            self.a, self.b = nn.Parameter(whole[:4]), nn.Parameter(whole[2:])

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.a.T + x @ self.b.T

    result = api.convert(Views(), (normal(2, 4),), validate=False)
    assert not any(result.reconciliation.unexplained.values())
    assert result.before.learnable == 24
    assert causes(result)["shared_storage"] == {"learnable": 8}


def test_bfloat16():
    module = nn.Sequential(nn.Linear(4, 6, bias=False), nn.LayerNorm(6)).to(torch.bfloat16)
    result = api.convert(module, (normal(2, 4).to(torch.bfloat16),), validate=False)
    assert not any(result.reconciliation.unexplained.values())
    assert result.before.learnable == 24 + 12
    found = causes(result)
    assert "computed_by_exporter" not in found or found["computed_by_exporter"] == {"learnable": -12}


def test_no_causes_for_a_program():
    assert causes(convert(nn.Sequential(nn.ReLU()), normal(2, 2), target="pt2")) == {}


RECONCILED = "resnet uvdoc poolformer bert patchtst".split()

#: converted in `test_architectures` too, or like one of those above
LONG = "mobilenet_v1 regnet_x convnext hubert_batch_norm whisper gpt2 llama vit".split()


@pytest.mark.parametrize("name", [*RECONCILED, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_every_difference_of_real_architectures_is_explained(name):
    architecture = BY_NAME[name]
    module = architecture.make()
    inputs = architecture.inputs()
    result = api.convert(module, inputs, validate=False, fold=architecture.batch_norms > 20)
    assert not any(result.reconciliation.unexplained.values())
    found = causes(result)
    tracked = sum(name.endswith("num_batches_tracked") for name, _ in module.named_buffers())
    gone = -found.get("num_batches_tracked", {}).get("buffers", 0)
    assert gone == tracked - (result.folded if "folded" in found else 0)
    unused = [name for name, p in module.named_parameters() if name == "masked_spec_embed" or "pooler" in name]
    if "unused" in found and unused:
        assert set(found["unused"]) <= {"learnable", "buffers"}


def test_the_account_is_part_of_the_report():
    document = convert(ConvNorm(), IMAGE).to_dict()
    assert document["schema"] == "normtool.rewrite/1"
    account = document["reconciliation"]
    assert set(account["unexplained"]) == {"learnable", "frozen", "buffers", "constants"}
    for each in account["differences"]:
        assert each["tensors"]
        assert each["message"]


# ---- writing --------------------------------------------------------------------------------------------


def test_writes_nothing_over_an_existing_file(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_text("mine")
    result = convert(ConvNorm(), IMAGE)
    with pytest.raises(OutputError, match="exists; --force replaces it"):
        result.save(path)
    assert path.read_text() == "mine"
    result.save(path, force=True)
    assert api.scan(path).parameters.learnable == 16


@pytest.mark.parametrize("name", ["m.onnx", "m.pt2"])
def test_a_stage_that_is_left_leaves_nothing(tmp_path, name):
    path = tmp_path / name
    path.write_text("mine")
    result = convert(ConvNorm(), IMAGE, target=name[2:])
    with pytest.raises(KeyboardInterrupt), result.stage(path, force=True):
        raise KeyboardInterrupt
    assert [each.name for each in tmp_path.iterdir()] == [name]
    assert path.read_text() == "mine"


def test_a_wrong_result_is_different(monkeypatch):
    """The validation can fail: an exporter that is off by 1 % in one weight."""
    original: Callable[..., Any] = torch_convert.to_onnx

    def wrong(program: Any, folder: Path, opset: int | None = None) -> Any:
        program.state_dict["conv.weight"] = nn.Parameter(program.state_dict["conv.weight"] * 1.01)
        return original(program, folder, opset)

    monkeypatch.setattr("normtool.conversion.to_onnx", wrong)
    result = convert(ConvNorm(), IMAGE, validate=True)
    assert result.validation is not None
    assert result.validation.verdict == DIFFERENT


def test_an_interrupt_leaves_the_old_file(tmp_path):
    (tmp_path / "net.py").write_text(
        textwrap.dedent(
            """
            import os, time
            from torch import nn

            class Net(nn.Sequential):
                def __init__(self):
                    super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

                def forward(self, x):
                    open("started", "w").close()
                    time.sleep(float(os.environ["NAP"]))
                    return super().forward(x)
            """
        )
    )
    (tmp_path / "m.onnx").write_text("mine")
    command = [sys.executable, "-m", "normtool", "convert", "net:Net", "--input", "x=1x3x8x8", "--force"]
    environment = {**os.environ, "NAP": "30", "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(
        [*command, "-o", "m.onnx"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "started").exists():
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert running.returncode == 130
    assert (tmp_path / "m.onnx").read_text() == "mine"
    assert not [path.name for path in tmp_path.iterdir() if "tmp" in path.name or "normtool-" in path.name]


# ---- norms, kind by kind --------------------------------------------------------------------------------


class EveryKind(nn.Module):
    """Conv, two BatchNorms (one behind a ReLU), GroupNorm, RMSNorm, LayerNorm, and a LayerNorm for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.late = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.group, self.rms = nn.GroupNorm(2, 4), nn.RMSNorm(8)
        self.layer, self.idle = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, image: Tensor) -> Tensor:
        y = self.late(torch.relu(self.bn(self.conv(image))))
        y = self.rms(self.layer(self.group(y)))
        self.idle(y)
        return y


def test_every_change_in_the_norms_has_its_numbers():
    result = convert(EveryKind().eval(), normal(2, 3, 8, 8), fold=True, opset=20)
    changes = {c.kind: (c.source, c.folded, c.unused, c.made) for c in result.norms}
    assert changes == {
        "batch_norm": (2, 1, 0, 1),
        "layer_norm": (2, 0, 1, 1),
        # GroupNorm and RMSNorm are spelled out at this opset, and found all the same
    }


def test_a_change_that_nothing_explains_is_said_to_be_one():
    assert UNEXPLAINED in NormChange("layer_norm", source=3, folded=0, unused=1, made=1).message
    assert UNEXPLAINED not in NormChange("layer_norm", source=3, folded=0, unused=1, made=2).message
