"""The header of a .safetensors file: names, dtypes and shapes. No weight is read, and torch is not imported."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from normtool.errors import UnreadableModel
from normtool.formats.torch.stored import StoredTensor
from normtool.values import element_count, is_float

#: dtype as the header spells it → numpy dtype, bits stored per element
_DTYPES: dict[str, tuple[np.dtype[Any], int]] = {
    "F64": (np.dtype(np.float64), 64),
    "F32": (np.dtype(np.float32), 32),
    "F16": (np.dtype(np.float16), 16),
    "BF16": (np.dtype(ml_dtypes.bfloat16), 16),
    "F8_E4M3": (np.dtype(ml_dtypes.float8_e4m3fn), 8),
    "F8_E5M2": (np.dtype(ml_dtypes.float8_e5m2), 8),
    "F8_E4M3FNUZ": (np.dtype(ml_dtypes.float8_e4m3fnuz), 8),
    "F8_E5M2FNUZ": (np.dtype(ml_dtypes.float8_e5m2fnuz), 8),
    "F8_E8M0": (np.dtype(ml_dtypes.float8_e8m0fnu), 8),
    "F6_E2M3": (np.dtype(ml_dtypes.float6_e2m3fn), 6),
    "F6_E3M2": (np.dtype(ml_dtypes.float6_e3m2fn), 6),
    "F4": (np.dtype(ml_dtypes.float4_e2m1fn), 4),
    "C64": (np.dtype(np.complex64), 64),
    "I64": (np.dtype(np.int64), 64),
    "I32": (np.dtype(np.int32), 32),
    "I16": (np.dtype(np.int16), 16),
    "I8": (np.dtype(np.int8), 8),
    "U64": (np.dtype(np.uint64), 64),
    "U32": (np.dtype(np.uint32), 32),
    "U16": (np.dtype(np.uint16), 16),
    "U8": (np.dtype(np.uint8), 8),
    "BOOL": (np.dtype(np.bool_), 8),
}


def read_safetensors(path: Path) -> list[StoredTensor]:
    """Raises UnreadableModel for a header that is none, overlaps, or does not cover the file."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118 - no Mapping
            described = [(name, part.get_dtype(), part.get_shape()) for name, part in slices]
    except (SafetensorError, OSError, ValueError) as error:
        line = ascii(str(error).partition("\n")[0])[1:-1].removeprefix("Error while deserializing header: ")
        raise UnreadableModel(f"{path}: is no sound .safetensors file: {line[:200]}") from None
    tensors: list[StoredTensor] = []
    begin = 0
    for name, spelling, shape in described:
        tensor = _stored(name, spelling, tuple(int(n) for n in shape), begin, path)
        tensors.append(tensor)
        begin = tensor.end
    return tensors


def _stored(name: str, spelling: str, shape: tuple[int, ...], begin: int, path: Path) -> StoredTensor:
    """The library has checked that no two tensors overlap, so any addresses that do not will do."""
    if spelling not in _DTYPES:
        raise UnreadableModel(f"{path}: {name!r} has dtype {spelling}, which this version does not know")
    dtype, bits = _DTYPES[spelling]
    elements = element_count(shape)
    end = begin + (elements * bits + 7) // 8
    integer = not (is_float(dtype) or np.issubdtype(dtype, np.complexfloating))
    return StoredTensor(name, shape, dtype, bits, begin, end, elements, integer)
