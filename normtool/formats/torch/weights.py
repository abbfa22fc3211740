"""A checkpoint's numbers, for a module that a factory made. Nothing is loaded that was not checked first."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from normtool.errors import UnreadableModel
from normtool.formats.torch.checkpoint import Checkpoint, read_checkpoint
from normtool.formats.torch.export import first_line
from normtool.formats.torch.sniff import Kind, kind_of


def load_weights(module: nn.Module, path: Path) -> None:
    """Put a checkpoint's numbers into a module. Raises UnreadableModel where names or shapes do not fit."""
    tensors = load_tensors(path)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UnreadableModel(f"{path}: does not fit the model: {' '.join(lines[1:2])[:300]}") from None


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor that `read_checkpoint` counts, by the name it counts it under.

    Raises UnreadableModel, UnsafeModel.
    """
    checkpoint = read_checkpoint(path)
    try:
        loaded = _load(checkpoint)
    except (OSError, RuntimeError, ValueError) as error:
        raise UnreadableModel(f"{path}: {first_line(error)}") from None
    names = [entry.name for entry in checkpoint.entries]
    return {name: loaded[name if name in loaded else f"module.{name}"] for name in names}


def _load(checkpoint: Checkpoint) -> dict[str, Any]:
    loaded: dict[str, Any] = {}
    for file in checkpoint.files:
        kind = kind_of(file)
        if kind is Kind.SAFETENSORS:
            from safetensors.torch import load_file

            loaded |= load_file(file)
        else:
            loaded |= _unpickled(file, checkpoint.state_path, mapped=kind is Kind.TORCH_ZIP)
    return loaded


def _unpickled(file: Path, state_path: str, mapped: bool) -> dict[str, Any]:
    """The dict of tensors at `state_path`; weights stay in the file where its format can be mapped."""
    found: Any = torch.load(file, weights_only=True, map_location="cpu", mmap=mapped)
    for key in filter(None, state_path.split("/")):
        found = found[key]
    return {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
