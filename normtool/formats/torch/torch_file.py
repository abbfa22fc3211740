"""PyTorch checkpoints, zip and legacy: names, shapes and strides. No weight is read.

`torch.load(weights_only=True)` under `skip_data` is handed the pickle alone, taken out of the file here, so
it makes storages of the claimed sizes (address space that nothing touches) and never sees the file. The sizes
are compared with what the file holds afterwards. There is no second way to unpickle: what the allow-list
refuses is refused.
"""

import io
import mmap
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import torch

from normtool.errors import UnreadableModel, UnsafeModel
from normtool.formats.torch.pickles import LARGEST_PICKLE, check_pickle
from normtool.formats.torch.sniff import Kind, open_regular
from normtool.formats.torch.state_dict import StateDict, find_state_dict
from normtool.formats.torch.stored import Diagnostic
from normtool.formats.torch.torch_zip import read_archive

#: A legacy file begins with these pickles: magic number, version, system, the object, the storage keys.
_LEGACY_PICKLES = 5

#: What torch.save writes first of all, behind the mark of the pickle protocol.
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"

#: Each storage of a legacy file follows its length.
_LEGACY_LENGTH = 8

_FORBIDDEN = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")
_UNKNOWN_INSTRUCTION = re.compile(r"Unsupported operand (\d+)")
_NO_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc")

_SAVE_AGAIN = "save model.state_dict() alone, or as .safetensors"


@dataclass(frozen=True)
class _Source:
    """What torch.load is given, and what the file has room for: storages by size, or bytes in all."""

    stream: io.BytesIO
    storages: Counter[int] | None
    room: int
    diagnostics: tuple[Diagnostic, ...] = ()


def read_torch(path: Path, kind: Kind) -> StateDict:
    """The tensors of a checkpoint's state dict.

    Raises UnreadableModel (torn, no state dict in it) or UnsafeModel (forbidden globals, bombs).
    """
    source = _from_zip(path) if kind is Kind.TORCH_ZIP else _from_legacy(path)
    try:
        with warnings.catch_warnings(), torch.serialization.skip_data():
            warnings.simplefilter("ignore")
            top = torch.load(source.stream, map_location="cpu", weights_only=True)
            found = find_state_dict(top, path)
    except UnreadableModel:
        raise
    except pickle.UnpicklingError as error:
        raise _refusal(path, str(error)) from None
    except Exception as error:  # instructions in a senseless order make torch raise anything
        raise _complaint(path, error) from None
    _check_room(source, found.storages, path)
    return StateDict(found.tensors, found.path, (*source.diagnostics, *found.diagnostics), found.storages)


def _from_zip(path: Path) -> _Source:
    """The pickle in an archive of its own: nothing else of the given one is ever parsed by PyTorch."""
    archive = read_archive(path)
    check_pickle(io.BytesIO(archive.pickle), path)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as bare:
        bare.writestr("checkpoint/data.pkl", archive.pickle)
        bare.writestr("checkpoint/version", "3\n")
        bare.writestr("checkpoint/byteorder", "little")
    stream.seek(0)
    diagnostics: tuple[Diagnostic, ...] = ()
    if archive.compressed:
        message = f"{len(archive.compressed)} records are compressed and unpack to {archive.unpacked:,} bytes"
        diagnostics = (("compressed_records", message, archive.compressed[0]),)
    return _Source(stream, archive.storages, sum(archive.storages.elements()), diagnostics)


def _from_legacy(path: Path) -> _Source:
    """The pickles at the beginning of the file; the storages follow them."""
    with open_regular(path) as file:
        size = file.seek(0, 2)
        with mmap.mmap(file.fileno(), min(size, 2 * LARGEST_PICKLE), access=mmap.ACCESS_READ) as mapped:
            stream = cast(IO[bytes], mapped)
            keys = check_pickle(stream, path)
            if _LEGACY_MAGIC not in mapped[: mapped.tell()]:
                raise UnsafeModel(f"{path}: is a pickle that torch.save did not write; {_SAVE_AGAIN}")
            for _ in range(_LEGACY_PICKLES - 1):
                keys = check_pickle(stream, path)
            end = mapped.tell()
            head = mapped[:end]
    return _Source(io.BytesIO(head), None, size - end - keys * _LEGACY_LENGTH)


def _check_room(source: _Source, storages: dict[int, tuple[int, str]], path: Path) -> None:
    """Storages are as large as the pickle says; the file must agree."""
    claimed = 0
    reach = 0
    for begin, (size, _) in sorted(storages.items()):
        claimed += max(0, begin + size - max(begin, reach))  # a legacy storage may be a part of another
        reach = max(reach, begin + size)
    if claimed > source.room:
        raise UnreadableModel(
            f"{path}: its storages need {claimed:,} bytes and the file has {max(0, source.room):,} for them; "
            "it is torn, or lies about itself"
        )
    if source.storages is None:
        return
    left = Counter(source.storages)
    for size, name in storages.values():
        if left[size] == 0:
            raise UnreadableModel(
                f"{path}: {name!r} claims a storage of {size:,} bytes, and no record of the archive is one"
            )
        left[size] -= 1


def _refusal(path: Path, message: str) -> UnsafeModel:
    """One line of what weights_only says in ten, some of them in bold."""
    if forbidden := _FORBIDDEN.search(message):
        name = ascii(forbidden[1])[1:-1][:200]
        return UnsafeModel(
            f"{path}: its pickle asks for `{name}`; normtool runs no code from a file: {_SAVE_AGAIN}"
        )
    if unknown := _UNKNOWN_INSTRUCTION.search(message):
        code = chr(int(unknown[1]))
        name = next((known.name for known in pickletools.opcodes if known.code == code), unknown[1])
        return UnsafeModel(
            f"{path}: its pickle uses the instruction {name}, which weights_only loading refuses; "
            "save it again with the defaults of torch.save, or as .safetensors"
        )
    reason = (
        message.replace("WeightsUnpickler error: ", "").partition("\n\nCheck the doc")[0].rpartition("\n")[2]
    )
    return UnsafeModel(f"{path}: weights_only loading refuses it ({ascii(reason)[1:-1][:200]}); {_SAVE_AGAIN}")


def _complaint(path: Path, error: Exception) -> UnreadableModel:
    message = str(error)
    if isinstance(error, MemoryError) or any(words in message for words in _NO_MEMORY):
        return UnsafeModel(f"{path}: its pickle claims more memory than there is; {_SAVE_AGAIN}")
    line = ascii(message.partition("\n")[0])[1:-1][:200]
    return UnreadableModel(f"{path}: its pickle makes no sense to PyTorch ({type(error).__name__}: {line})")
