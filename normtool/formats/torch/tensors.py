"""`torch.Tensor` → `Value`: numbers are read on demand, a block of rows at a time."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import torch

from normtool.errors import UsageError
from normtool.values import Array, Value, to_array

#: torch dtype → numpy dtype of the same bits; quantised ones count as the integers they store
DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float64: np.dtype(np.float64),
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.float8_e4m3fn: np.dtype(ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: np.dtype(ml_dtypes.float8_e5m2),
    torch.float8_e4m3fnuz: np.dtype(ml_dtypes.float8_e4m3fnuz),
    torch.float8_e5m2fnuz: np.dtype(ml_dtypes.float8_e5m2fnuz),
    torch.complex64: np.dtype(np.complex64),
    torch.complex128: np.dtype(np.complex128),
    torch.bool: np.dtype(np.bool_),
    torch.uint8: np.dtype(np.uint8),
    torch.uint16: np.dtype(np.uint16),
    torch.uint32: np.dtype(np.uint32),
    torch.uint64: np.dtype(np.uint64),
    torch.int8: np.dtype(np.int8),
    torch.int16: np.dtype(np.int16),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
    torch.qint8: np.dtype(np.int8),
    torch.quint8: np.dtype(np.uint8),
    torch.qint32: np.dtype(np.int32),
}

#: numpy knows these from ml_dtypes only, and torch cannot hand them over; the bits travel as integers
_BITS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.int16)}


def dtype_of(dtype: torch.dtype) -> np.dtype[Any]:
    """Raises UsageError for a dtype that numpy has no counterpart of."""
    if dtype not in DTYPES:
        raise UsageError(f"tensors of dtype {dtype} are not supported")
    return DTYPES[dtype]


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return next(known for known, same in DTYPES.items() if same == dtype)


@dataclass(frozen=True, eq=False)
class TorchValue:
    """The content of a tensor on any device. Raises UsageError for numbers that were never loaded."""

    tensor: torch.Tensor

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.tensor.shape)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        return dtype_of(self.tensor.dtype)

    def rows(self, start: int, stop: int) -> Array:
        if self.tensor.is_meta:
            raise UsageError("the weights are not loaded (meta device); load them first")
        return to_numpy(self.tensor[start:stop] if self.tensor.ndim else self.tensor)


def to_numpy(tensor: torch.Tensor) -> Array:
    """The same numbers; a copy unless the tensor lies contiguous in main memory."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if plain.is_quantized:
        plain = plain.int_repr()
    dtype = dtype_of(plain.dtype)
    if dtype.isbuiltin == 1:
        return np.asarray(plain.numpy())
    carrier, same = _BITS[dtype.itemsize]
    return np.asarray(plain.view(carrier).numpy()).astype(same, copy=False).view(dtype)


def to_tensor(value: Value | Array) -> torch.Tensor:
    """A new tensor in main memory."""
    array = np.array(value if isinstance(value, np.ndarray) else to_array(value), order="C")
    if array.dtype.isbuiltin == 1:
        return torch.from_numpy(array)
    carrier, same = _BITS[array.dtype.itemsize]
    return torch.from_numpy(array.view(same)).to(carrier).view(torch_dtype(array.dtype))
