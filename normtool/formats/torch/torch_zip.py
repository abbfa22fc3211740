"""The directory of a PyTorch zip archive, judged before anything is unpacked.

Only `data.pkl` is ever read. The other records are known by the sizes that the directory states, after it is
sure that the file can hold them.
"""

import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from normtool.errors import UnreadableModel, UnsafeModel
from normtool.formats.torch.pickles import LARGEST_PICKLE
from normtool.formats.torch.sniff import ZIP_COMPLAINTS, open_regular

#: Compressed records (PyTorch writes none) may unpack to this, or to so many times the size of the file.
MOST_UNPACKED = 64 << 20
MOST_RATIO = 20

_ENCRYPTED = 1


@dataclass(frozen=True)
class TorchArchive:
    """`storages` counts the storage records by size in bytes; `unpacked` is the sum of compressed ones."""

    pickle: bytes
    storages: Counter[int]
    unpacked: int
    compressed: tuple[str, ...]


def read_archive(path: Path) -> TorchArchive:
    """Raises UnreadableModel for a torn archive, UnsafeModel for one that unpacks beyond the bounds above."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            size = file.seek(0, 2)
            records = archive.infolist()
            root = _root(records, path)
            _check_directory(records, size, path)
            compressed = [record for record in records if record.compress_type != zipfile.ZIP_STORED]
            unpacked = sum(record.file_size for record in compressed)
            _check_unpacked(compressed, unpacked, size, path)
            content = archive.read(f"{root}/data.pkl")
    except ZIP_COMPLAINTS as error:
        raise UnreadableModel(
            f"{path}: is a torn or damaged zip archive ({_one_line(error)}); copy or download it again"
        ) from None
    data = [record.file_size for record in records if record.filename.startswith(f"{root}/data/")]
    return TorchArchive(content, Counter(data), unpacked, tuple(record.filename for record in compressed))


def _root(records: list[zipfile.ZipInfo], path: Path) -> str:
    """The one folder that everything in the archive lies in."""
    roots = [r.filename.partition("/")[0] for r in records if r.filename.partition("/")[2] == "data.pkl"]
    if len(roots) != 1:
        raise UnreadableModel(f"{path}: is a zip archive with {len(roots)} data.pkl; a checkpoint has one")
    return roots[0]


def _check_directory(records: list[zipfile.ZipInfo], size: int, path: Path) -> None:
    """No record twice, none beyond the end, none over another, none that claims more than it stores."""
    twice = next((n for n, times in Counter(r.filename for r in records).items() if times > 1), None)
    if twice is not None:
        raise UnsafeModel(f"{path}: the archive lists {twice!r} twice, so what is in it depends on the reader")
    if sum(record.compress_size for record in records) > size:
        raise UnsafeModel(f"{path}: the records of the archive claim more bytes than the file has, {size:,}")
    for record in records:
        if record.flag_bits & _ENCRYPTED:
            raise UnreadableModel(f"{path}: {record.filename!r} is encrypted; unpack and save it without")
        if record.header_offset + record.compress_size > size:
            raise UnreadableModel(f"{path}: {record.filename!r} ends beyond the end of the file")
        if record.compress_type == zipfile.ZIP_STORED and record.file_size != record.compress_size:
            raise UnsafeModel(
                f"{path}: {record.filename!r} claims {record.file_size:,} bytes "
                f"and stores {record.compress_size:,}"
            )
        if record.filename.endswith("/data.pkl") and record.file_size > LARGEST_PICKLE:
            raise UnsafeModel(
                f"{path}: {record.filename!r} unpacks to {record.file_size:,} bytes; "
                f"a state dict describes itself in less than {LARGEST_PICKLE:,}"
            )


def _check_unpacked(compressed: list[zipfile.ZipInfo], unpacked: int, size: int, path: Path) -> None:
    if unpacked > MOST_UNPACKED and unpacked > MOST_RATIO * size:
        largest = max(compressed, key=lambda record: record.file_size)
        raise UnsafeModel(
            f"{path}: {size:,} bytes that unpack to {unpacked:,}, most of them in {largest.filename!r}; "
            f"beyond {MOST_RATIO} times and {MOST_UNPACKED:,} bytes normtool takes this for a bomb"
        )


def _one_line(error: BaseException) -> str:
    return ascii(str(error).partition("\n")[0])[1:-1][:120] or type(error).__name__
