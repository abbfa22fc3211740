"""Hugging Face folders: the architecture from config.json, the inputs from what the configuration says.

Counting needs no weights, so none are loaded: the model is built on the meta device. Code that a folder brings
along (`auto_map`) is not run.
"""

import importlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normtool.errors import BackendUnavailable, NormtoolError, UnreadableModel, UnsafeModel
from normtool.formats.torch.export import Example, first_line, undisturbed

#: A class of transformers, `transformers.modeling_outputs.ImageClassifierOutput`.
_OUTPUT = re.compile(r"transformers(\.[A-Za-z]\w*)+")

#: Files that hold weights.
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def build(folder: Path, weights: bool) -> nn.Module:
    """The folder's model in inference mode; without `weights` on the meta device, which holds no numbers.

    Raises BackendUnavailable without transformers, UnsafeModel for a folder with code, UnreadableModel.
    """
    settings = _configuration(folder)
    transformers = _transformers()
    try:
        with undisturbed():
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            config.use_cache = False
            kind = _architecture(folder, settings, config, transformers)
            module = _loaded(folder, kind, config) if weights else _empty(kind, config)
    except NormtoolError:
        raise
    except Exception as error:
        raise UnreadableModel(f"{folder}: {type(error).__name__}: {first_line(error)}") from None
    assert isinstance(module, nn.Module)
    return module.eval()


def _architecture(folder: Path, settings: Mapping[str, Any], config: Any, transformers: Any) -> Any:
    """The class that the folder names; the bare model of its type where it names none."""
    names = settings.get("architectures") or []
    for name in names if isinstance(names, list) else [names]:
        kind = getattr(transformers, str(name), None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    if names:  # the bare model would have no head, and other counts
        raise UnreadableModel(f"{folder}: transformers {transformers.__version__} has no model {names[0]}")
    return transformers.AutoModel


def _empty(kind: Any, config: Any) -> Any:
    make = getattr(kind, "_from_config", None) or kind.from_config  # unlike kind(config) in the right dtype
    with torch.device("meta"):
        return make(config)


def _loaded(folder: Path, kind: Any, config: Any) -> Any:
    """With its weights, all of them: transformers would make up the missing ones."""
    if not has_weights(folder):
        raise UnreadableModel(f"{folder}: holds no weights (model.safetensors); without them only scan works")
    module, report = kind.from_pretrained(
        folder, config=config, local_files_only=True, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise UnreadableModel(
            f"{folder}: its weights lack {len(missing)} tensors of the model, such as {missing[0]}"
        )
    return module


def has_weights(folder: Path) -> bool:
    return any(True for pattern in _WEIGHTS for _ in folder.glob(pattern))


def register_outputs(types: Iterable[str]) -> None:
    """Let torch know the output classes of transformers that a program returns; importing them does.

    Raises BackendUnavailable without transformers.
    """
    for name in types:
        if _OUTPUT.fullmatch(name):
            _transformers()
            with (
                suppress(ImportError),
                undisturbed(),
            ):  # another version of it: torch says which class it misses
                importlib.import_module(name.rpartition(".")[0])


def _configuration(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableModel(f"{path}: {first_line(error)}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise UnreadableModel(f"{path}: is no configuration of a transformers model (it has no model_type)")
    _refuse_code(folder, config)
    return config


def _refuse_code(folder: Path, settings: Any) -> None:
    """`auto_map` names classes in the folder; an attention called `owner/name` is code of the Hub."""
    if isinstance(settings, list):
        for each in settings:
            _refuse_code(folder, each)
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if key == "auto_map" and value:
            raise UnsafeModel(
                f"{folder}: its model is code in the folder (auto_map), which normtool does not run"
            )
        if key.endswith("_implementation") and "/" in str(value):
            raise UnsafeModel(f"{folder}: its {key} is code of the Hub ({value}), which normtool does not run")
        _refuse_code(folder, value)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise BackendUnavailable("Hugging Face models need transformers: pip install transformers") from None
    return transformers


# ---- example inputs ---------------------------------------------------------------------------


def example(module: nn.Module) -> Example | None:
    """Inputs for a transformers model, from its main input's name and its configuration; None for any other."""
    config, main = getattr(module, "config", None), getattr(module, "main_input_name", None)
    if config is None or not isinstance(main, str) or not hasattr(config, "model_type"):
        return None
    device = next(module.parameters(), torch.empty(0)).device
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    inputs = _main_input(main, config, dtype)
    if inputs is None:
        return None
    inputs |= _decoder_inputs(set(inspect.signature(module.forward).parameters), config, dtype)
    return Example(kwargs={name: tensor.to(device) for name, tensor in inputs.items()})


def _main_input(main: str, config: Any, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    if main == "input_ids":
        return {main: _tokens(config)}
    if main == "pixel_values":
        return {main: _normal(dtype, _setting(config, "num_channels", 3), *_image_size(config))}
    if main == "input_features":
        return {main: _normal(dtype, *_features(config))}
    if main == "input_values":
        return {main: _normal(dtype, 4000)}
    if main == "past_values":
        return {
            main: _normal(
                dtype, _setting(config, "context_length", 32), _setting(config, "num_input_channels", 1)
            )
        }
    return None


def _features(config: Any) -> tuple[int, ...]:
    """Of a spectrogram: bins before frames (Whisper) or behind them, or an image of it."""
    bins = _setting(config, "num_mel_bins", 80)
    if (side := _setting(config, "spec_size", None)) is not None:
        return 1, side * max(1, side // bins), bins
    for name in ("feature_projection_input_dim", "input_feat_per_channel"):
        if (width := _setting(config, name, None)) is not None:
            return 64, width
    if config.model_type.startswith("parakeet"):
        return 64, bins
    return bins, 2 * _setting(config, "max_source_positions", 64)


def _decoder_inputs(accepted: set[str], config: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if not getattr(config, "is_encoder_decoder", False):
        return {}
    if "decoder_input_values" not in accepted:
        return {"decoder_input_ids": _tokens(config)}
    inputs = {"decoder_input_values": _normal(dtype, 6, _setting(config, "num_mel_bins", 80))}
    if "speaker_embeddings" in accepted:
        inputs["speaker_embeddings"] = _normal(dtype, _setting(config, "speaker_embedding_dim", 512))
    return inputs


def _normal(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A batch of two."""
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _tokens(config: Any) -> torch.Tensor:
    size = _setting(config, "vocab_size", 100)
    return torch.randint(3, max(4, size), (2, 8), generator=torch.Generator().manual_seed(0))


def _image_size(config: Any) -> tuple[int, int]:
    size = _setting(config, "image_size", 224)
    return (size[0], size[1]) if isinstance(size, list | tuple) else (size, size)


def _setting(config: Any, name: str, default: Any) -> Any:
    """A setting of the model, or of the part of it that has one (vision, text, encoder, backbone)."""
    parts = [config, *(getattr(config, f"{part}_config", None) for part in _PARTS)]
    found = (getattr(part, name, None) for part in parts if part is not None)
    return next((value for value in found if value is not None), default)


_PARTS = ("vision", "text", "encoder", "backbone")
