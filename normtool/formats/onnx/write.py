"""Puts a model into a file so that at every instant the path holds the old one, whole, or the new one.

Data is written first, under a name no file has yet; then the model, under a temporary name in the same
folder; both are fsynced; a rename puts the model in place last. What is killed on the way leaves a stray
file at worst; what is interrupted leaves nothing. Weights are copied by the kernel, or computed a block at a
time: a model of any size needs a few megabytes.
"""

import _thread
import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from normtool.destination import afterwards, as_output_error, check_destination, remove, sync_folder
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
    #: there only where the model does not hold all its data itself
    data_path: Path
    #: data that nobody reads once the model is in place
    replaced_data: tuple[Path, ...] = ()
    hashers: dict[Path, "_Hasher"] = field(default_factory=dict)
    _renamed: bool = False

    def commit(self) -> list[dict[str, str]]:
        """Rename into place; the paths and hashes of what was written."""
        with as_output_error(self.destination):
            self._renamed = True
            try:
                self.model_path.replace(self.destination)
            except OSError:
                self._renamed = False
                raise
            sync_folder(self.destination.parent)
        places = {self.model_path: self.destination, self.data_path: self.data_path}
        return [
            {"path": str(place), "sha256": self.hashers[path].finish()}
            for path, place in places.items()
            if path in self.hashers
        ]

    def clean_up(self) -> None:
        """Remove what the model in place does not read: the new files, or the data of the replaced one."""
        for hasher in self.hashers.values():
            hasher.stop()
        if self._renamed and not self.model_path.exists():
            remove(*self.replaced_data)
        else:
            self._renamed = False  # once the file is gone, nothing else tells that it was never in place
            remove(self.data_path, self.model_path)


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
    token = secrets.token_hex(4)
    stage = Staged(
        destination,
        model_path=destination.with_name(f".{destination.name}.{token}.tmp"),
        data_path=destination.with_name(f"{destination.stem}-{token}.data"),
    )
    with afterwards(stage.clean_up):
        with as_output_error(destination):
            _write(model, stage, temporary)
        yield stage


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


def _write(model: OnnxModel, stage: Staged, temporary: bool) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    if temporary or _needs_external_data(model):
        _write_pieces(stage, stage.data_path, _moved_outside(model, proto, stage.data_path.name), not temporary)
    pieces = wire.inflate(proto.SerializeToString(), model.tensors.content_of)
    _write_pieces(stage, stage.model_path, pieces, not temporary)
    stage.replaced_data = _own_data_of(stage.destination)


def _needs_external_data(model: OnnxModel) -> bool:
    """A model keeps the form it came in, unless it has outgrown one protobuf message."""
    lazy = sum(_lazy_bytes(tensor, model) for tensor in all_tensors(model.proto))
    return model.external or bool(model.proto.ByteSize() + lazy >= MAX_PROTO_BYTES)


def _moved_outside(model: OnnxModel, proto: onnx.ModelProto, name: str) -> list[wire.Piece]:
    """Every tensor that is not inline, as the content of a file `name`, where `proto` will look for it.

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
        for key, text in (("location", name), ("offset", position), ("length", byte_count(value))):
            tensor.external_data.add(key=key, value=str(text))
        position += byte_count(value)
    return pieces


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


def _write_pieces(stage: Staged, path: Path, pieces: list[wire.Piece], durable: bool) -> None:
    """Write and fsync a new file. The hash is taken behind the writer's back, by a second thread."""
    file = FileIO(path, "x+")
    descriptor = file.fileno()
    hasher = stage.hashers[path] = _Hasher(file)
    hasher.start()
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
    hasher.advance(None)


class _Hasher:
    """SHA-256 of a file while it grows, in its own thread (hashlib lets other threads run).

    Thread, queue and lock are those written in C: where Ctrl-C strikes in the Python of a `threading.Thread` or
    `Condition`, a lock stays taken for ever, or an error about locks comes out in place of KeyboardInterrupt.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file  # closed by the thread
        self._digest = hashlib.sha256()
        self._lengths: SimpleQueue[int | None] = SimpleQueue()
        self._stopped = False
        self._running = _thread.allocate_lock()
        self._running.acquire()

    def start(self) -> None:
        _thread.start_new_thread(self._follow, ())

    def advance(self, written: int | None) -> None:
        """So many bytes are there; None when the file is complete."""
        self._lengths.put(written)

    def finish(self) -> str:
        """Wait for the last byte; may be asked more than once."""
        with self._running:
            return self._digest.hexdigest()

    def stop(self) -> None:
        """Give up, wherever it is; nothing where it has finished, or never started."""
        self._stopped = True
        self.advance(None)

    def _follow(self) -> None:
        try:
            with self._file:
                self._hash()
        finally:
            self._running.release()

    def _hash(self) -> None:
        hashed = 0
        while (written := self._lengths.get()) is not None:
            while hashed < written and not self._stopped:
                part = os.pread(self._file.fileno(), min(_CHUNK, written - hashed), hashed)
                self._digest.update(part)
                hashed += len(part)


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
