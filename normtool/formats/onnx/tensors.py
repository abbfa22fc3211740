"""TensorProto → `Value`: dtype, shape and size are checked at once, numbers are read on demand."""

import mmap
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from normtool.errors import UnreadableModel, UnsafeModel
from normtool.formats.onnx.wire import EMBEDDED
from normtool.values import Array, Value, bits_per_element, element_count


class DataFile:
    """A file that weights are read from, held open: replacing the path does not change what is read.

    Raises OSError, or UnreadableModel for what is no regular file (a pipe would be waited for without end).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        status = os.fstat(self.descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableModel(f"{path}: is a folder; give the .onnx file in it")
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableModel(f"{path}: is no regular file")
        self.size = status.st_size

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. Raises UnreadableModel if the file has become shorter."""
        parts = []
        while length > 0:
            part = os.pread(self.descriptor, length, offset)
            if not part:
                raise UnreadableModel(f"{self.path}: ends at byte {offset}, {length} bytes early")
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def map(self) -> memoryview:
        """The whole file, mapped read-only."""
        if self.size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ))

    def __del__(self) -> None:
        descriptor = getattr(self, "descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


@dataclass(frozen=True, eq=False)
class FileValue:
    """Little-endian numbers of a whole-byte dtype at an offset of a file."""

    file: DataFile
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return element_count(self.shape) * self.dtype.itemsize

    def samples(self) -> Iterator[bytes]:
        """A few bytes from the beginning, the middle and the end."""
        length = min(64, self.nbytes)
        for start in (0, (self.nbytes - length) // 2, self.nbytes - length):
            yield self.file.read(self.offset + start, length)

    def rows(self, start: int, stop: int) -> Array:
        if not self.shape:
            return np.frombuffer(self.file.read(self.offset, self.nbytes), self.dtype).reshape(())
        stride = element_count(self.shape[1:]) * self.dtype.itemsize
        content = self.file.read(self.offset + start * stride, (stop - start) * stride)
        return np.frombuffer(content, self.dtype).reshape(stop - start, *self.shape[1:])


#: Tensors up to this size stay decoded.
_KEPT_ELEMENTS = 1 << 12


@dataclass(frozen=True, eq=False)
class ProtoValue:
    """Numbers decoded by onnx itself: typed fields, packed 4-bit data, sparse tensors, small raw data."""

    decode: Callable[[], Array]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def rows(self, start: int, stop: int) -> Array:
        array = self._kept if element_count(self.shape) <= _KEPT_ELEMENTS else self.decode()
        return array[start:stop] if self.shape else array

    @cached_property
    def _kept(self) -> Array:
        """Decoded once: a plan asks for the parameters of a norm again and again."""
        return self.decode()


#: TensorProto.DataType → the typed field that holds it
_TYPED_FIELDS: Mapping[int, str] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.COMPLEX64: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.COMPLEX128: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.UINT64: "uint64_data",
    TensorProto.STRING: "string_data",
}


def dtype_of(data_type: int, name: str) -> np.dtype[Any]:
    """The numpy dtype of a TensorProto.DataType. Raises UnreadableModel for a number that is none."""
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(data_type))
    except (KeyError, TypeError, ValueError):
        raise UnreadableModel(f"tensor {name!r} has an unknown data type, {data_type}") from None


class TensorReader:
    """Makes values for the tensors of one model, whose external data lies beside `path`.

    `pending` holds what a rewrite has yet to compute.
    """

    def __init__(
        self,
        model_file: DataFile | None,
        path: Path | None,
        pending: Mapping[str, Value] | None = None,
    ) -> None:
        self._model_file = model_file
        self._path = path
        self._files: dict[str, DataFile] = {}
        self.pending: dict[str, Value] = dict(pending or {})

    def with_pending(self, pending: Mapping[str, Value]) -> "TensorReader":
        """A reader of the same files that knows these values too."""
        reader = TensorReader(self._model_file, self._path, self.pending | dict(pending))
        reader._files = self._files
        return reader

    def value(self, tensor: TensorProto) -> Value:
        """Raises UnreadableModel where the bytes do not add up, UnsafeModel for data outside the folder."""
        dtype = dtype_of(tensor.data_type, tensor.name)
        shape = tuple(int(n) for n in tensor.dims)
        if any(n < 0 for n in shape):
            raise UnreadableModel(f"tensor {tensor.name!r} has a negative dimension: {list(shape)}")
        if tensor.data_location == TensorProto.EXTERNAL:
            return self._external(tensor, shape, dtype)
        _check_inline_size(tensor, shape, dtype)
        return ProtoValue(lambda: _decode(tensor), shape, dtype)

    def content(self, tensor: TensorProto) -> Value:
        """What is written for a tensor that lies outside its proto: the stored bytes, or what is pending."""
        return self.content_of({entry.key: entry.value for entry in tensor.external_data})

    def content_of(self, entries: Mapping[str, str]) -> Value:
        """The same, for the external-data entries of a tensor."""
        location = entries.get("location", "")
        if location in self.pending:
            return self.pending[location]
        file = self._data_file("", location)
        offset = int(entries.get("offset") or 0)
        length = int(entries.get("length") or file.size - offset)
        return FileValue(file, offset, (length,), np.dtype(np.uint8))

    def _external(self, tensor: TensorProto, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Value:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if location in self.pending:
            return self.pending[location]
        file = self._data_file(tensor.name, location)
        try:
            offset = int(entries.get("offset") or 0)
            length = int(entries.get("length") or file.size - offset)
        except ValueError:
            raise UnreadableModel(f"tensor {tensor.name!r}: offset or length is no number") from None
        _check_size(tensor.name, shape, dtype, length)
        if offset < 0 or offset + length > file.size:
            raise UnreadableModel(
                f"tensor {tensor.name!r} wants bytes {offset} to {offset + length} "
                f"of {file.path.name}, which has {file.size}"
            )
        if bits_per_element(dtype) % 8 == 0:
            return FileValue(file, offset, shape, dtype)
        return ProtoValue(lambda: _decode_packed(tensor, file.read(offset, length)), shape, dtype)

    def _data_file(self, name: str, location: str) -> DataFile:
        if location == EMBEDDED and self._model_file is not None:
            return self._model_file
        if location not in self._files:
            self._files[location] = DataFile(self._resolve(name, location))
        return self._files[location]

    def _resolve(self, name: str, location: str) -> Path:
        """The data file, if it lies in the model's own folder or beside what the model is a link to.

        A Hugging Face cache is a tree of links: `snapshots/REV/model.onnx` and its data both point into
        `blobs/`. So data may also lie where the model file itself really lies.
        """
        if self._path is None:
            raise UnreadableModel(f"tensor {name!r} is external; give the model's path, not the object")
        if not location or "\0" in location or location.startswith(("/", "\\")) or ".." in Path(location).parts:
            raise UnsafeModel(f"tensor {name!r} wants to read {location!r}, outside the model's folder")
        folder = self._path.parent
        target = folder / location
        try:
            real = target.resolve(strict=True)
        except (OSError, RuntimeError):  # Python 3.11 and 3.12 raise RuntimeError for a loop of links
            raise UnreadableModel(
                f"tensor {name!r} is stored in {location!r}, which is missing from {folder}"
            ) from None
        homes = (folder.resolve(), self._path.resolve().parent)
        if not any(real.is_relative_to(home) for home in homes):
            raise UnsafeModel(f"tensor {name!r}: {location!r} is a link out of the model's folder, to {real}")
        if not real.is_file():
            raise UnreadableModel(f"tensor {name!r}: {location!r} is not a regular file")
        return real


def _check_size(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], length: int) -> None:
    expected = (element_count(shape) * bits_per_element(dtype) + 7) // 8
    if length != expected:
        raise UnreadableModel(
            f"tensor {name!r} of shape {list(shape)} and type {dtype} needs {expected} bytes but holds {length}"
        )


def _check_inline_size(tensor: TensorProto, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if tensor.HasField("raw_data"):
        _check_size(tensor.name, shape, dtype, len(tensor.raw_data))
        return
    field = _TYPED_FIELDS.get(tensor.data_type, "int32_data")
    held = len(getattr(tensor, field))
    expected = element_count(shape) * (2 if np.issubdtype(dtype, np.complexfloating) else 1)
    if bits_per_element(dtype) < 8:
        expected = -(-expected * bits_per_element(dtype) // 8)
    if held != expected:
        raise UnreadableModel(
            f"tensor {tensor.name!r} of shape {list(shape)} needs {expected} numbers but holds {held}"
        )


def _decode(tensor: TensorProto) -> Array:
    return np.asarray(numpy_helper.to_array(tensor))


def _decode_packed(tensor: TensorProto, content: bytes) -> Array:
    inline = TensorProto(dims=tensor.dims, data_type=tensor.data_type, raw_data=content)
    return _decode(inline)
