"""Copies of a PyTorch model to run: as it is, every number a rounding away, one weight wrong by 1 %.

The user's module is never run. Its code is, in a copy that owns all its tensors; and each input set gets a copy
of that copy with its own buffers, since `forward` may write to them and to any attribute.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from normtool.errors import RuntimeRefused
from normtool.formats.torch.export import first_line, leaves
from normtool.formats.torch.model import TorchModel
from normtool.formats.torch.tensors import DTYPES, to_numpy, to_tensor
from normtool.graph import Role, Tensor
from normtool.inputs import nudge
from normtool.suspects import linear_weights, one_percent_off
from normtool.values import is_float


def copied(model: TorchModel, device: torch.device) -> nn.Module:
    """A module with tensors of its own. Raises RuntimeRefused where the module cannot be copied."""
    source = model.module if model.module is not None else _program_module(model)
    try:
        return _moved(copy.deepcopy(source, _computed(source)), device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise RuntimeRefused(
            f"the model cannot be copied, and is not run itself: {first_line(error)}"
        ) from None


def _program_module(model: TorchModel) -> nn.Module:
    assert model.program is not None
    return model.program.module()


def _moved(module: nn.Module, device: torch.device) -> nn.Module:
    return module if device.type == "cpu" else module.to(device)


def _computed(module: nn.Module) -> dict[int, torch.Tensor]:
    """Tensors that some code computed and left as an attribute (weight_norm does): they refuse deepcopy."""
    found = (each for child in module.modules() for each in leaves(vars(child)))
    return {id(t): t.detach().clone() for t in found if isinstance(t, torch.Tensor) and not t.is_leaf}


def with_own_buffers(module: nn.Module) -> nn.Module:
    """A copy that shares the parameters."""
    memo: dict[int, torch.Tensor] = {id(parameter): parameter for parameter in module.parameters()}
    return copy.deepcopy(module, {**_computed(module), **memo})


def nudge_weights(module: nn.Module, seed: int) -> None:
    """Move every float parameter and buffer of `module` to a neighbouring number, in place."""
    stored = {id(t): t for t in (*module.parameters(), *module.buffers())}
    for number, tensor in enumerate(stored.values()):
        if tensor.layout is torch.strided and tensor.dtype in DTYPES and tensor.is_floating_point():
            moved = nudge(to_numpy(tensor), np.random.default_rng([seed, number]))
            _write(tensor, to_tensor(moved))


def spoil(module: nn.Module, name: str) -> None:
    """Make one weight of `module` wrong by ±1 %, row by row, in place."""
    stored = dict(module.named_parameters(remove_duplicate=False)) | dict(
        module.named_buffers(remove_duplicate=False)
    )
    tensor = stored[name]
    factor = torch.from_numpy(one_percent_off(tuple(tensor.shape))).to(tensor.device)
    _write(tensor, tensor.detach().double() * factor)


def _write(tensor: torch.Tensor, numbers: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(numbers)


def weights(model: TorchModel) -> list[Tensor]:
    """Weights of the linear ops; without dataflow, matrices; where there are none, any float parameter."""
    stored = [
        tensor
        for tensor in model.graph.tensors
        if tensor.role is Role.PARAMETER and tensor.value is not None and is_float(tensor.value.dtype)
    ]
    tables = _embeddings(model)
    matrices = [t for t in stored if t.shape is not None and len(t.shape) > 1 and t.name not in tables]
    linear = [tensor for tensor in linear_weights(model.graph) if tensor in set(stored)]
    return linear or matrices or stored


def _embeddings(model: TorchModel) -> set[str]:
    """Tables: an error in a row that no input asks for is no error."""
    modules = model.module.named_modules() if model.module is not None else ()
    return {f"{path}.weight".lstrip(".") for path, each in modules if isinstance(each, nn.Embedding)}


@contextmanager
def full_precision() -> Iterator[None]:
    """TF32 and bfloat16 products off: ten bits of mantissa are no yardstick for anything."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
