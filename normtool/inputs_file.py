"""A user's own inputs: an .npz file with one array for each input name."""

import zipfile
from pathlib import Path

import numpy as np

from normtool.errors import UsageError
from normtool.graph import Tensor
from normtool.inputs import fits
from normtool.values import Array


def read_inputs(path: Path) -> dict[str, Array]:
    """Raises UsageError for a file that is none."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise UsageError(
                    f"{path}: holds one array without a name; save it with numpy.savez(path, NAME=…)"
                )
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        detail = (str(error).splitlines() or ["empty"])[0]
        raise UsageError(f"{path}: is not a readable .npz file ({detail})") from None


def check_given(path: Path, tensor: Tensor, array: Array | None) -> None:
    """Raises UsageError for an array that is not what the model's input `tensor` wants."""
    if array is None:
        raise UsageError(f"{path}: lacks the model's input {tensor.name!r}")
    if tensor.dtype is not None and array.dtype != tensor.dtype:
        raise UsageError(f"{path}: {tensor.name!r} is {array.dtype}, the model wants {tensor.dtype}")
    if not fits(array.shape, tensor.shape):
        raise UsageError(f"{path}: {tensor.name!r} has shape {array.shape}, the model wants {tensor.shape}")
