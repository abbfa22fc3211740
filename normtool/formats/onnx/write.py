"""Puts a model into a file so that at every instant the path holds the old one, whole, or the new one.

Data is written first, under a name no file has yet; then the model, under a temporary name in the same
folder; both are fsynced; a rename puts the model in place last. What is killed on the way leaves a stray
file at worst. Weights are copied by the kernel, or computed a block at a time: a model of any size needs
a few megabytes.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from normtool.destination import as_output_error, check_destination, sync_folder
from normtool.errors import OutputError, UnreadableModel
from normtool.formats.onnx import wire
from normtool.formats.onnx.model import OnnxModel
from normtool.formats.onnx.read import all_tensors, containers_below, is_external, parse, tensors_of
from normtool.formats.onnx.tensors import DataFile, FileValue
from normtool.values import Array, byte_count, row_blocks, to_array

#: Protobuf stops here; more goes into external data.
MAX_PROTO_BYTES = 2**31 - 1

#: External tensors start on a page, so that runtimes can map them.
ALIGNMENT = 4096

_CHUNK = 1 << 24


@dataclass(eq=False)
class Staged:
    """A model written beside its destination and not yet in place. `model_path` can be opened and run."""

    destination: Path
    model_path: Path
    sha256: Callable[[], str]
    data_path: Path | None = None
    data_sha256: Callable[[], str] = field(default=lambda: "")
    replaced_data: tuple[Path, ...] = ()

    def commit(self) -> list[dict[str, str]]:
        """Rename into place; the paths and hashes of what was written."""
        with as_output_error(self.destination):
            self.model_path.replace(self.destination)
            sync_folder(self.destination.parent)
        outputs = [{"path": str(self.destination), "sha256": self.sha256()}]
        if self.data_path is not None:
            outputs.append({"path": str(self.data_path), "sha256": self.data_sha256()})
        for path in self.replaced_data:
            path.unlink(missing_ok=True)
        return outputs

    def discard(self) -> None:
        self.sha256()  # lets the hashing threads end and close their files
        self.data_sha256()
        _remove(self.model_path, self.data_path)


@contextlib.contextmanager
def staged(
    model: OnnxModel, destination: Path, force: bool = False, *, temporary: bool = False
) -> Iterator[Staged]:
    """Write `model` beside `destination`; what is not committed inside the block is removed.

    A `temporary` file, which will not outlive this process, is spared the fsync, and keeps its data outside
    the model: ONNX Runtime maps external data, and copies embedded data twice.

    Raises OutputError: the path exists (without `force`), the disk is full, a permission is missing.
    """
    check_destination(destination, force)
    stage = _write(model, destination, temporary)
    try:
        yield stage
    finally:
        if stage.model_path.exists():
            stage.discard()


def to_proto(model: OnnxModel) -> onnx.ModelProto:
    """The model as one object with all its data inside.

    Raises OutputError above 2 GB, protobuf's limit.
    """
    size = sum(_lazy_bytes(tensor, model) for tensor in all_tensors(model.proto))
    if size >= MAX_PROTO_BYTES:
        raise OutputError(f"{size} bytes of weights do not fit one ModelProto; write to a file instead")
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in filter(is_external, all_tensors(proto)):
        content = to_array(model.tensors.content(tensor)).tobytes()
        _clear_external(tensor)
        tensor.raw_data = content
    return proto


# ---- one model, one or two files ---------------------------------------------------------------


def _write(model: OnnxModel, destination: Path, temporary: bool) -> Staged:
    token = secrets.token_hex(4)
    model_path = destination.with_name(f".{destination.name}.{token}.tmp")
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    data_path, data_hash = None, None
    try:
        with as_output_error(destination):
            if temporary or _needs_external_data(model):
                data_path = destination.with_name(f"{destination.stem}-{token}.data")
                data_hash = _write_data(model, proto, data_path, not temporary)
            pieces = wire.inflate(proto.SerializeToString(), model.tensors.content_of)
            model_hash = _write_pieces(model_path, pieces, not temporary)
    except BaseException:
        _remove(model_path, data_path)
        raise
    stage = Staged(destination, model_path, model_hash, data_path)
    if data_path is not None and data_hash is not None:
        stage.data_sha256 = data_hash
    stage.replaced_data = _own_data_of(destination)
    return stage


def _remove(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and path.exists():
            path.unlink()


def _needs_external_data(model: OnnxModel) -> bool:
    """A model keeps the form it came in, unless it has outgrown one protobuf message."""
    lazy = sum(_lazy_bytes(tensor, model) for tensor in all_tensors(model.proto))
    return model.external or bool(model.proto.ByteSize() + lazy >= MAX_PROTO_BYTES)


def _write_data(model: OnnxModel, proto: onnx.ModelProto, path: Path, durable: bool) -> Callable[[], str]:
    """Write every tensor that is not inline to `path` and let `proto` refer to it there.

    Those of functions stay in the model: ONNX Runtime does not look for the data of an inlined function.
    """
    pieces: list[wire.Piece] = []
    position = 0
    outside = [
        t for container in containers_below(proto.graph) for t in tensors_of(container) if is_external(t)
    ]
    for tensor in outside:
        value = model.tensors.content(tensor)
        padding = -position % ALIGNMENT
        pieces += [bytes(padding), value]
        position += padding
        _clear_external(tensor)
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in (("location", path.name), ("offset", position), ("length", byte_count(value))):
            tensor.external_data.add(key=key, value=str(text))
        position += byte_count(value)
    return _write_pieces(path, pieces, durable)


def _own_data_of(destination: Path) -> tuple[Path, ...]:
    """Data files that the model now at `destination` reads and that carry the names we give them.

    They have no reader left once it is replaced; anything else beside it is none of our business.
    """
    if not destination.is_file():
        return ()
    own = {name for name in _data_names_of_file(destination) if _is_own_name(name, destination.stem)}
    for sibling in destination.parent.glob("*.onnx") if own else ():
        if sibling.name != destination.name:  # a copy of the model may read the same data
            own -= _data_names_of_file(sibling)
    return tuple(destination.with_name(name) for name in own)


def _data_names(proto: onnx.ModelProto) -> set[str]:
    return {entry.value for t in all_tensors(proto) for entry in t.external_data if entry.key == "location"}


def _data_names_of_file(path: Path) -> set[str]:
    """The data files a model reads; none where it is no model."""
    try:
        return _data_names(parse(DataFile(path)))
    except (UnreadableModel, OSError):
        return set()


def _is_own_name(name: str, stem: str) -> bool:
    token = name.removeprefix(f"{stem}-").removesuffix(".data")
    return name == f"{stem}-{token}.data" and len(token) == 8 and set(token) <= set("0123456789abcdef")


def _lazy_bytes(tensor: TensorProto, model: OnnxModel) -> int:
    return byte_count(model.tensors.content(tensor)) if is_external(tensor) else 0


def _clear_external(tensor: TensorProto) -> None:
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


# ---- bytes ------------------------------------------------------------------------------------


def _write_pieces(path: Path, pieces: list[wire.Piece], durable: bool) -> Callable[[], str]:
    """Write and fsync a new file. The hash is taken behind the writer's back, by a second thread."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    hasher = _Hasher(descriptor)
    try:
        for piece in pieces:
            if isinstance(piece, bytes):
                _write_all(descriptor, piece)
            elif isinstance(piece, FileValue):
                _copy(piece, descriptor)
            else:
                for start, stop in row_blocks(piece):
                    _write_all(descriptor, np.ascontiguousarray(piece.rows(start, stop)))
            hasher.advance(os.lseek(descriptor, 0, os.SEEK_CUR))
        if durable:
            os.fsync(descriptor)
    except BaseException:
        hasher.stop()
        raise
    return hasher.finish


class _Hasher:
    """SHA-256 of a file while it grows, in its own thread (hashlib lets other threads run)."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._digest = hashlib.sha256()
        self._written = self._hashed = 0
        self._complete = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def advance(self, written: int) -> None:
        with self._changed:
            self._written = written
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._complete = True
            self._changed.notify()
        self._thread.join()
        os.close(self._descriptor)

    def finish(self) -> str:
        """Wait for the last byte; may be asked more than once."""
        if not self._complete:
            self.stop()
        return self._digest.hexdigest()

    def _follow(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._written > self._hashed or self._complete)
                written = self._written
            if written == self._hashed:
                return
            while self._hashed < written:
                part = os.pread(self._descriptor, min(_CHUNK, written - self._hashed), self._hashed)
                self._digest.update(part)
                self._hashed += len(part)


def _write_all(descriptor: int, content: bytes | Array) -> None:
    # the detour over uint8 is for dtypes that the buffer protocol does not know (bfloat16)
    raw: Any = content if isinstance(content, bytes) else content.reshape(-1).view(np.uint8)
    view = memoryview(raw)
    while view:
        view = view[os.write(descriptor, view) :]


def _copy(value: FileValue, descriptor: int) -> None:
    """Copy inside the kernel where it can, else through a buffer."""
    offset, left = value.offset, value.nbytes
    while left:
        count = _copy_some(value, descriptor, offset, left)
        offset, left = offset + count, left - count


def _copy_some(value: FileValue, descriptor: int, offset: int, length: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            copied = os.copy_file_range(value.file.descriptor, descriptor, length, offset)
            if copied:
                return copied
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
    part = value.file.read(offset, min(_CHUNK, length))
    _write_all(descriptor, part)
    return len(part)
