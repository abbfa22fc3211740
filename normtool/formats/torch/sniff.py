"""What a file of weights is, by its content: suffixes lie (`.bin`, `.tar`, `.pt` are used for everything)."""

import io
import os
import stat
import struct
import zipfile
import zlib
from enum import StrEnum
from pathlib import Path

from normtool.errors import UnreadableModel


class Kind(StrEnum):
    SAFETENSORS = "safetensors"
    INDEX = "index"
    TORCH_ZIP = "torch zip"
    TORCH_LEGACY = "torch legacy"
    TORCHSCRIPT = "TorchScript"
    EXPORTED_PROGRAM = "exported program"
    OTHER_ZIP = "other zip"
    TAR = "tar"
    COMPRESSED = "compressed"
    GIT_LFS = "Git LFS pointer"
    UNKNOWN = "unknown"


#: What zipfile raises about an archive that is torn or lies about itself.
ZIP_COMPLAINTS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
_GIT_LFS = b"version https://git-lfs"


def open_regular(path: Path) -> io.BufferedReader:
    """Raises UnreadableModel for what is missing or no regular file (a pipe would be waited for for ever)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise UnreadableModel(f"{path}: {os.strerror(error.errno or 0)}") from None
    except ValueError as error:  # a null byte in the name
        raise UnreadableModel(f"{str(path)!r}: {error}") from None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise UnreadableModel(f"{path}: is no regular file")


def kind_of(path: Path) -> Kind:
    """Reads the first half kilobyte, of a zip archive its directory too. Raises UnreadableModel."""
    with open_regular(path) as file:
        start = file.read(512)
        if start.startswith(_ZIP):
            return _kind_of_zip(file)
    if start[8:9] == b"{" and _is_length(start[:8]):
        return Kind.SAFETENSORS
    if start.lstrip().startswith(b"{"):
        return Kind.INDEX
    if start.startswith(_PICKLE):
        return Kind.TORCH_LEGACY
    if start[257:262] == b"ustar":
        return Kind.TAR
    if start.startswith(_COMPRESSED):
        return Kind.COMPRESSED
    return Kind.GIT_LFS if start.startswith(_GIT_LFS) else Kind.UNKNOWN


def _is_length(word: bytes) -> bool:
    """The length of a safetensors header, plausible or absurd; neither JSON nor a pickle looks like one."""
    return word[4:] == bytes(4) or (b"\0" in word and not word.startswith(_PICKLE))


def _kind_of_zip(file: io.BufferedReader) -> Kind:
    try:
        with zipfile.ZipFile(file) as archive:
            names = {name for path in archive.namelist() for name in (path, path.partition("/")[2])}
    except ZIP_COMPLAINTS:
        return Kind.TORCH_ZIP  # torn, which its reader says
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return Kind.TORCHSCRIPT
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return Kind.EXPORTED_PROGRAM
    return Kind.TORCH_ZIP if "data.pkl" in names else Kind.OTHER_ZIP
