"""Where a PyTorch model comes from: factories, their weights and inputs; Hugging Face folders."""

import importlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from normtool import api
from normtool.errors import BackendUnavailable, UnreadableModel, UnsafeModel, UsageError
from normtool.formats.torch import huggingface
from normtool.formats.torch.model import TorchModel
from tests.formats.torch.architectures import ARCHITECTURES

NUMBERS = count()

FACTORY = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, channels=3, width=6, name="net"):
            super().__init__()
            self.conv = nn.Conv2d(channels, width, 3)
            self.bn = nn.BatchNorm2d(width)
            self.name = name

        def forward(self, image, scale=1.0):
            return self.bn(self.conv(image)) * scale

        @classmethod
        def build(cls, **options):
            return cls(**options)

    class Outer:
        class Inner:
            make = Net

    class TwoInputs(Net):
        def forward(self, image, mask):
            return super().forward(image) * mask

    class Depends(Net):
        def forward(self, image):
            if image.sum() > 0:
                return super().forward(image)
            return image

    class Knows(Net):
        example_input_array = torch.ones(2, 3, 8, 8)

    def program():
        return torch.export.export(Net().eval(), (torch.ones(2, 3, 8, 8),), strict=False)

    def number():
        return 3

    def fails(**options):
        raise RuntimeError("no such variant\\nsecond line")

    def leaves():
        raise SystemExit("bye")

    def needs():
        import a_module_that_is_not_there

    def chatty():
        print("building", flush=True)
        return Net()

    ready = Net()
    VALUE = 7
"""


@pytest.fixture
def factory(tmp_path, monkeypatch) -> Callable[[str], str]:
    """`factory("Net")` is `module:Net` of a module in the current folder, its own in each test."""
    name = f"factories_{os.getpid()}_{next(NUMBERS)}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(FACTORY))
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    return lambda attribute: f"{name}:{attribute}"


def opened(model: Any, *arguments: Any, **options: Any) -> TorchModel:
    found = api.load(model, *arguments, **options)
    assert isinstance(found, TorchModel)
    return found


SHAPE = {"image": ((1, 3, 8, 8), None)}


# ---- factories ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Net", "Net.build", "Outer.Inner.make", "chatty", "ready", "Knows"])
def test_factory(factory, name):
    model = opened(factory(name))
    assert model.format == "module"
    assert model.census.learnable == 3 * 6 * 9 + 6 + 12
    assert not model.module.training


def test_factory_of_a_program(factory):
    model = opened(factory("program"))
    assert model.format == "pt2"
    assert api.fold(factory("program"), validate=False).folded == 1


def test_arguments(factory):
    model = opened(factory("Net"), arguments={"channels": 1, "width": 2, "name": "x"})
    assert model.census.learnable == 1 * 2 * 9 + 2 + 4


def test_shapes_and_arrays_are_inputs(factory):
    for inputs in (SHAPE, {"image": torch.ones(1, 3, 8, 8).numpy()}, torch.ones(1, 3, 8, 8)):
        assert opened(factory("Net"), inputs).exported is not None


def test_example_input_array(factory):
    assert api.fold(factory("Knows"), validate=False).folded == 1


FAILURES = [
    pytest.param("Nothing", {}, UsageError, "has no attribute 'Nothing'", id="no-such-attribute"),
    pytest.param("Net.Nothing", {}, UsageError, "has no attribute 'Nothing'", id="no-such-nested-attribute"),
    pytest.param("VALUE", {}, UsageError, "is a int; name a function or class", id="not-callable"),
    pytest.param("number", {}, UsageError, "makes a int, not an nn.Module", id="makes-something-else"),
    pytest.param("fails", {}, UnreadableModel, "RuntimeError: no such variant$", id="raises"),
    pytest.param("leaves", {}, UnreadableModel, "SystemExit: bye", id="exits"),
    pytest.param("needs", {}, UnreadableModel, "No module named 'a_module_that", id="lacks-a-library"),
    pytest.param(
        "Net", {"depth": 3}, UnreadableModel, "unexpected keyword argument 'depth'", id="wrong-argument"
    ),
]


@pytest.mark.parametrize(("name", "arguments", "kind", "words"), FAILURES)
def test_refuses_factories(factory, name, arguments, kind, words):
    with pytest.raises(kind, match=words) as refused:
        api.load(factory(name), arguments=arguments)
    assert type(refused.value) is kind
    assert len(str(refused.value).splitlines()) == 1


def test_refuses_a_missing_module():
    with pytest.raises(UsageError, match=r"No module named 'not_there'; name it as package\.module:callable"):
        api.load("not_there.at_all:make")


@pytest.mark.parametrize(
    "text", ["raise RuntimeError('at import')", "this is no Python", "import sys; sys.exit(0)"]
)
def test_refuses_a_module_that_cannot_be_imported(tmp_path, monkeypatch, text):
    name = f"broken_{os.getpid()}_{next(NUMBERS)}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(UnreadableModel):
        api.load(f"{name}:make")


@pytest.mark.parametrize("option", [{"arguments": {"a": 1}}, {"weights": "w.pt"}])
def test_refuses_options_of_factories_elsewhere(tmp_path, option):
    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(1)}, path)
    with pytest.raises(UsageError, match="are for a factory"):
        api.load(path, **option)


# ---- inputs ---------------------------------------------------------------------------------------------

WANTED = [
    pytest.param("Net", "--input image=1x3x224x224 (in Python", id="image"),
    pytest.param("TwoInputs", "--input image=1x3x224x224 --input mask=SHAPE (in Python", id="two-inputs"),
]


@pytest.mark.parametrize(("name", "flag"), WANTED)
def test_asks_for_inputs_with_the_flag_to_type(factory, name, flag):
    for verb in (api.plan, api.fold, api.convert):
        with pytest.raises(UsageError) as asked:
            verb(factory(name))
        assert flag in str(asked.value)
        assert len(str(asked.value).splitlines()) == 1


FIRST_LAYERS = [
    pytest.param(nn.Conv1d(5, 2, 1), "input=1x5x256", id="conv1d"),
    pytest.param(nn.Conv3d(2, 2, 1), "input=1x2x16x64x64", id="conv3d"),
    pytest.param(nn.Sequential(nn.ReLU(), nn.Linear(7, 2)), "input=1x7", id="linear"),
    pytest.param(nn.Embedding(5, 2), "input=1x16:int64", id="tokens"),
    pytest.param(nn.LSTM(9, 2), "input=1x16x9", id="lstm"),
    pytest.param(nn.LazyConv2d(4, 1), "input=1x3x224x224", id="lazy"),
    pytest.param(nn.ReLU(), "input=1x3x224x224", id="nothing-to-go-by"),
]


@pytest.mark.parametrize(("module", "flag"), FIRST_LAYERS)
def test_guesses_the_first_layer(module, flag):
    with pytest.raises(UsageError, match=flag):
        api.plan(module)


def test_scans_without_inputs(factory):
    scan = api.scan(factory("Net")).to_dict()
    assert [(norm["name"], norm["kind"], norm["evidence"]) for norm in scan["norms"]] == [
        ("bn", "batch_norm", "module")
    ]
    assert [each["code"] for each in scan["diagnostics"]] == ["no_dataflow"]


def test_where_export_fails_counts_stay_and_folds_do_not(factory):
    inputs = {"image": ((1, 3, 8, 8), None)}
    scan = api.scan(factory("Depends"), inputs).to_dict()
    assert scan["parameters"]["learnable"] == 180
    plan = api.plan(factory("Depends"), inputs)
    (site,) = plan.sites
    assert site.verdict == "kept"
    (reason,) = site.reasons
    assert reason.code == "no_dataflow"
    assert "torch.export fails: " in reason.message
    assert "\n" not in reason.message
    with pytest.raises(UnreadableModel, match=r"torch\.export fails: "):
        api.convert(factory("Depends"), inputs)


def test_refuses_inputs_that_forward_does_not_take(factory):
    with pytest.raises(UsageError, match=r"Net\.forward takes no 'x'; it takes image, scale"):
        api.load(factory("Net"), {"x": ((1, 3, 8, 8), None)})


# ---- weights of a factory -------------------------------------------------------------------------------


def weights_of(width: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(width, 3, 3, 3, generator=generator),
        "conv.bias": torch.randn(width, generator=generator),
        "bn.weight": torch.rand(width, generator=generator),
        "bn.bias": torch.randn(width, generator=generator),
        "bn.running_mean": torch.randn(width, generator=generator),
        "bn.running_var": torch.rand(width, generator=generator),
        "bn.num_batches_tracked": torch.tensor(5),
    }


SAVED = [
    pytest.param(lambda tensors, path: torch.save(tensors, path), id="zip"),
    pytest.param(
        lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False), id="legacy"
    ),
    pytest.param(save_file, id="safetensors"),
    pytest.param(lambda tensors, path: torch.save({"epoch": 1, "state_dict": tensors}, path), id="nested"),
    pytest.param(
        lambda tensors, path: torch.save({f"module.{k}": v for k, v in tensors.items()}, path),
        id="data-parallel",
    ),
]


@pytest.mark.parametrize("save", SAVED)
def test_weights(factory, tmp_path, save):
    expected = weights_of()
    save(expected, tmp_path / "weights.bin")
    model = opened(factory("Net"), weights=tmp_path / "weights.bin")
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


UNFIT = [
    pytest.param({"extra.weight": torch.ones(1)}, None, 'Unexpected key.*"extra.weight"', id="unexpected"),
    pytest.param({}, "bn.weight", 'Missing key.*"bn.weight"', id="missing"),
    pytest.param({"conv.bias": torch.ones(9)}, None, "size mismatch for conv.bias", id="other-shape"),
]


@pytest.mark.parametrize(("added", "dropped", "words"), UNFIT)
def test_refuses_weights_that_do_not_fit(factory, tmp_path, added, dropped, words):
    tensors = {name: tensor for name, tensor in {**weights_of(), **added}.items() if name != dropped}
    torch.save(tensors, tmp_path / "weights.pt")
    with pytest.raises(UnreadableModel, match=f"does not fit the model: .*{words}") as refused:
        api.load(factory("Net"), weights=tmp_path / "weights.pt")
    assert len(str(refused.value).splitlines()) == 1


class Touch:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_refuses_pickles_that_run_code(factory, tmp_path, legacy):
    canary, path = tmp_path / "CANARY", tmp_path / "weights.pt"
    torch.save({**weights_of(), "x": Touch(canary)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsafeModel):
        api.load(factory("Net"), weights=path)
    assert not canary.exists()
    torch.load(path, weights_only=False)  # or the test would show nothing
    assert canary.exists()


def test_refuses_missing_weights(factory, tmp_path):
    with pytest.raises(UnreadableModel, match="No such file"):
        api.load(factory("Net"), weights=tmp_path / "nothing.pt")


def test_refuses_weights_for_a_program(factory, tmp_path):
    torch.save(weights_of(), tmp_path / "weights.pt")
    with pytest.raises(UsageError, match="leave --weights out"):
        api.load(factory("program"), weights=tmp_path / "weights.pt")


# ---- Hugging Face: counting -----------------------------------------------------------------------------

BY_NAME = {each.name: each for each in ARCHITECTURES}
COUNTED = "resnet convnext levit wav2vec2 whisper bert gpt2 llama t5 vit patchtst".split()


def folder_of(name: str, path: Path, weights: bool = False) -> tuple[Path, nn.Module]:
    module = BY_NAME[name].make()
    if weights:
        module.save_pretrained(path)
    else:
        module.config.architectures = [type(module).__name__]
        module.config.save_pretrained(path)
    return path, module


@pytest.mark.parametrize("name", [name for name in COUNTED if name in BY_NAME])
def test_config_alone_is_enough_to_count(tmp_path, name):
    folder, module = folder_of(name, tmp_path)
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    scan = api.scan(folder).to_dict()
    assert scan["parameters"]["learnable"] + scan["parameters"]["frozen"] == sum(
        parameter.numel() for parameter in module.parameters()
    )
    assert scan["parameters"]["buffers"] == sum(buffer.numel() for buffer in module.buffers())
    expected = api.scan(module, BY_NAME[name].inputs()).to_dict()
    assert scan["summary"] == expected["summary"]


def test_llama_norms_are_found_on_the_meta_device(tmp_path):
    folder, module = folder_of("llama", tmp_path)
    scan = api.scan(folder).to_dict()
    count = sum("RMSNorm" in type(part).__name__ for part in module.modules())
    assert scan["summary"]["rms_norm"]["count"] == count > 0


def test_counts_in_the_dtype_of_the_configuration(tmp_path):
    folder, _ = folder_of("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    census = opened(folder, numbers=False).census
    assert census.learnable_bytes == 2 * census.learnable


def test_counts_a_large_model_in_little_memory(tmp_path):
    """Seven billion parameters, in a process of its own: less than one of them in a hundred would fit."""
    import transformers

    transformers.LlamaConfig(architectures=["LlamaForCausalLM"], num_hidden_layers=32).save_pretrained(tmp_path)
    code = (
        "import resource, sys; from normtool import api; s = api.scan(sys.argv[1]).to_dict()\n"
        "print(s['parameters']['learnable'], s['summary']['rms_norm']['count'],"
        " resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    learnable, norms, peak = map(int, done.stdout.split())
    assert (learnable, norms) == (6_738_415_616, 65)
    assert peak < 2 << 20  # KiB


# ---- Hugging Face: with weights -------------------------------------------------------------------------


def test_folds_a_folder(tmp_path):
    folder, module = folder_of("resnet", tmp_path, weights=True)
    model = opened(folder)
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name
    assert api.fold(folder, validate=False).folded == BY_NAME["resnet"].batch_norms


@pytest.mark.parametrize("name", ["resnet"])
def test_sharded_weights(tmp_path, name):
    module = BY_NAME[name].make()
    module.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = opened(tmp_path).module.state_dict()
    assert all(torch.equal(tensor, found[key]) for key, tensor in module.state_dict().items())


def test_refuses_to_fold_without_weights(tmp_path):
    folder, _ = folder_of("resnet", tmp_path)
    for verb in (api.fold, api.convert):
        with pytest.raises(UnreadableModel, match=r"holds no weights .* only scan works"):
            verb(folder)


def test_refuses_weights_that_lack_a_part(tmp_path):
    folder, module = folder_of("resnet", tmp_path, weights=True)
    tensors = {key: value for key, value in module.state_dict().items() if "classifier" not in key}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnreadableModel, match="lack 2 tensors of the model, such as classifier"):
        api.load(folder)


def test_refuses_broken_weights(tmp_path):
    folder, _ = folder_of("resnet", tmp_path, weights=True)
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(UnreadableModel) as refused:
        api.load(folder)
    assert len(str(refused.value).splitlines()) == 1


def test_refuses_pickled_weights_that_run_code(tmp_path):
    folder, module = folder_of("resnet", tmp_path)
    canary = tmp_path / "CANARY"
    torch.save({**module.state_dict(), "x": Touch(canary)}, folder / "pytorch_model.bin")
    with pytest.raises(UnreadableModel):
        api.load(folder)
    assert not canary.exists()


# ---- Hugging Face: refused ------------------------------------------------------------------------------


def test_refuses_code_in_the_folder(tmp_path):
    canary = tmp_path / "CANARY"
    code = f"open({str(canary)!r}, 'w').close()\nclass C: pass\nclass M: pass\n"
    for name in ("configuration_x.py", "modeling_x.py"):
        (tmp_path / name).write_text(code)
    auto = {"AutoConfig": "configuration_x.C", "AutoModel": "modeling_x.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": auto}))
    for verb in (api.scan, api.fold):
        with pytest.raises(UnsafeModel, match="auto_map"):
            verb(tmp_path)
    assert not canary.exists()


REFUSED = [
    pytest.param("{", UnreadableModel, "config.json", id="torn"),
    pytest.param("[]", UnreadableModel, "no model_type", id="list"),
    pytest.param('{"hidden_size": 3}', UnreadableModel, "no model_type", id="no-transformers-model"),
    pytest.param('{"model_type": "not_one"}', UnreadableModel, "not_one", id="unknown-type"),
    pytest.param(
        '{"model_type": "bert", "architectures": ["BertForTelepathy"]}',
        UnreadableModel,
        "has no model BertForTelepathy",
        id="unknown-class-would-be-counted-without-its-head",
    ),
    pytest.param(
        '{"model_type": "bert", "architectures": ["pipeline"]}',
        UnreadableModel,
        "has no model",
        id="no-model-class",
    ),
    pytest.param(
        '{"model_type": "bert", "attn_implementation": "someone/kernel"}',
        UnsafeModel,
        "Hub",
        id="kernel-of-the-hub",
    ),
    pytest.param(
        '{"model_type": "clip", "text_config": {"auto_map": {"AutoModel": "x.M"}}}',
        UnsafeModel,
        "auto_map",
        id="code-for-a-part",
    ),
    pytest.param(
        '{"model_type": "bert", "hidden_size": "wide"}', UnreadableModel, "hidden_size", id="text-for-a-number"
    ),
]


@pytest.mark.parametrize(("text", "kind", "words"), REFUSED)
def test_refuses_configurations(tmp_path, text, kind, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(kind, match=words) as refused:
        api.load(tmp_path, numbers=False)
    assert type(refused.value) is kind
    assert len(str(refused.value).splitlines()) == 1


def test_without_architectures_it_is_the_bare_model(tmp_path):
    folder, _ = folder_of("bert", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": None}))
    assert type(opened(folder, numbers=False).module).__name__ == "BertModel"


def test_without_transformers(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackendUnavailable, match="pip install transformers"):
        api.scan(tmp_path)


# ---- Hugging Face: inputs -------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_finds_inputs(architecture):
    """One forward on what the configuration tells; exporting all of them would take minutes."""
    module = architecture.make()
    example = huggingface.example(module)
    assert example is not None
    with torch.no_grad():
        module(*example.args, **example.kwargs)


def test_other_modules_tell_no_inputs():
    assert huggingface.example(nn.Linear(2, 2)) is None
