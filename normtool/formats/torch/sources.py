"""Where a PyTorch model can come from: a Python factory, a Hugging Face folder, a .pt2 file, an object.

A factory is code that the user named, so it is run. Files are not: `pt2` refuses an archive that would make
torch run something before torch sees it.
"""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from normtool.errors import UnreadableModel, UsageError
from normtool.formats.torch import huggingface
from normtool.formats.torch.export import Example, first_line, undisturbed
from normtool.formats.torch.model import TorchModel, read_exported, read_module
from normtool.formats.torch.pt2 import check_pt2
from normtool.formats.torch.tensors import to_tensor
from normtool.formats.torch.weights import load_weights

_HASH_BLOCK = 1 << 22


def read_object(model: nn.Module | ExportedProgram, inputs: Any) -> TorchModel:
    """A live object of the caller's. `inputs`: see `to_example`."""
    if isinstance(model, ExportedProgram):
        read = read_exported(model)
        read.example = to_example(inputs) or read.example
        return read
    example = to_example(inputs)
    if example is not None:
        _check_names(model, example)
    return read_module(model, example or own_example(model))


def _check_names(module: nn.Module, example: Example) -> None:
    """Raises UsageError for an input that forward does not take."""
    accepted = _parameters(module)
    if any(each.kind is each.VAR_KEYWORD for each in accepted):
        return
    names = [each.name for each in accepted if each.kind is not each.VAR_POSITIONAL]
    for name in example.kwargs:
        if accepted and name not in names:
            raise UsageError(f"{type(module).__name__}.forward takes no {name!r}; it takes {', '.join(names)}")


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    """Of `forward`; none where that does not say."""
    try:
        return list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return []


def read_factory(text: str, arguments: Mapping[str, Any], weights: Path | None, inputs: Any) -> TorchModel:
    """Call `package.module:callable` and read what it makes, in inference mode.

    Raises UsageError where the name leads nowhere, UnreadableModel where the call fails or weights do not fit.
    """
    try:
        with _this_folder_importable():
            made = _call(text, arguments)
    except ImportError as error:  # what it needs only when it is called
        raise UnreadableModel(f"{text}: {first_line(error)}") from None
    if isinstance(made, ExportedProgram):
        if weights is not None:
            raise UsageError(
                f"{text}: makes an ExportedProgram, which has its weights already; leave --weights out"
            )
        return read_object(made, inputs)
    if not isinstance(made, nn.Module):
        raise UsageError(f"{text}: makes a {type(made).__name__}, not an nn.Module or an ExportedProgram")
    if weights is not None:
        load_weights(made, weights)  # checked first: no code in it runs
    return read_object(made.eval(), inputs)


@contextmanager
def _this_folder_importable() -> Iterator[None]:
    """As under `python -m`: the user's own module often lies where the user is."""
    added = "" not in sys.path
    if added:
        sys.path.insert(0, "")
    try:
        yield
    finally:
        if added and "" in sys.path:
            sys.path.remove("")


def _call(text: str, arguments: Mapping[str, Any]) -> Any:
    target = _find(text)
    if isinstance(target, nn.Module | ExportedProgram) and not arguments:
        return target
    if not callable(target):
        raise UsageError(f"{text}: is a {type(target).__name__}; name a function or class that makes the model")
    return _run(text, lambda: target(**arguments))


def _find(text: str) -> Any:
    name, _, attribute = text.partition(":")
    try:
        target = _run(text, lambda: importlib.import_module(name))
        for part in attribute.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{text}: {first_line(error)}; name it as package.module:callable") from None
    return target


def _run(text: str, code: Callable[[], Any]) -> Any:
    """The user's code: anything can come out of it, `sys.exit` too."""
    try:
        return code()
    except ImportError:
        raise
    except (Exception, SystemExit) as error:
        raise UnreadableModel(f"{text}: {type(error).__name__}: {first_line(error)}") from None


# ---- .pt2 -------------------------------------------------------------------------------------


def read_pt2(path: Path, inputs: Any = None) -> TorchModel:
    """A file of torch.export.save.

    Raises UnreadableModel, UnsafeModel, BackendUnavailable (it returns classes of transformers).
    """
    huggingface.register_outputs(check_pt2(path))
    try:
        with undisturbed():
            program = _load(path)
    except Exception as error:
        raise UnreadableModel(f"{path}: is not a readable .pt2 file ({first_line(error)})") from None
    read = read_exported(program, path, hash_file(path))
    read.example = to_example(inputs) or read.example
    return read


def _load(path: Path) -> ExportedProgram:
    """Not by torch.export.load if it can be helped: where that fails, it goes on with laxer readers."""
    try:
        from torch.export.pt2_archive._package import load_pt2
    except ImportError:  # no public name leads there
        return torch.export.load(path)
    return load_pt2(str(path)).exported_programs["model"]


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


# ---- Hugging Face -----------------------------------------------------------------------------


def read_folder(folder: Path, inputs: Any, weights: bool) -> TorchModel:
    """A folder with config.json. Without `weights` the model has none, which is enough to count and to plan."""
    module = huggingface.build(folder, weights)
    return read_object(module, inputs)


# ---- example inputs ---------------------------------------------------------------------------


def own_example(module: nn.Module) -> Example | None:
    """Inputs that the module itself tells: a transformers model by its configuration, a Lightning module."""
    told = getattr(module, "example_input_array", None)
    if told is not None:
        return to_example(told)
    return huggingface.example(module)


def to_example(inputs: Any) -> Example | None:
    """A tensor, a tuple of positional ones, or a dict by name; arrays are converted.

    A dict's values may be shapes with an optional dtype, `{"x": ((1, 3, 224, 224), "float32")}`.
    """
    if inputs is None or (isinstance(inputs, dict) and not inputs):
        return None
    if isinstance(inputs, Example):
        return inputs
    if isinstance(inputs, Mapping):
        return Example(kwargs={name: _to_input(value) for name, value in inputs.items()})
    if isinstance(inputs, tuple | list):
        return Example(tuple(_to_input(value) for value in inputs))
    return Example((_to_input(inputs),))


def _to_input(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return to_tensor(value)
    if _is_shape(value):
        shape, dtype = value
        return generated(shape, getattr(torch, dtype or "float32"))
    return value


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and isinstance(value[0], tuple)
        and (value[1] is None or isinstance(value[1], str))
        and all(isinstance(n, int) for n in value[0])
    )


def generated(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Standard normal numbers; ones where the dtype is integral (a valid index almost everywhere)."""
    if not dtype.is_floating_point:
        return torch.ones(shape, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


class InputsNeeded(UsageError):
    """Nothing tells what to call the model with."""


def need_example(model: TorchModel) -> None:
    """Raises InputsNeeded with the flag to type."""
    if model.example is None and model.module is not None:
        raise InputsNeeded(f"nothing says what to call the model with: give {flag_for(model.module)}")


def flag_for(module: nn.Module) -> str:
    """`--input x=1x3x224x224`, guessed from forward's arguments and the first layer."""
    named = [each for each in _parameters(module) if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    first = named[0].name if named else "x"
    others = [each.name for each in named[1:] if each.default is each.empty]
    flags = [f"--input {first}={_first_shape(module)}", *(f"--input {name}=SHAPE" for name in others)]
    return f"{' '.join(flags)} (in Python: inputs={{{first!r}: tensor{', …' if others else ''}}})"


def _first_shape(module: nn.Module) -> str:
    for layer in module.modules():
        for kind, shape in _FIRST_LAYERS:
            if isinstance(layer, kind):
                return str(shape(layer))
    return "1x3x224x224"


_FIRST_LAYERS: tuple[tuple[type[nn.Module], Any], ...] = (
    (nn.Conv2d, lambda layer: f"1x{layer.in_channels or 3}x224x224"),
    (nn.Conv1d, lambda layer: f"1x{layer.in_channels}x256"),
    (nn.Conv3d, lambda layer: f"1x{layer.in_channels}x16x64x64"),
    (nn.Embedding, lambda layer: "1x16:int64"),
    (nn.RNNBase, lambda layer: f"1x16x{layer.input_size}"),
    (nn.Linear, lambda layer: f"1x{layer.in_features or 16}"),
)
