"""Weights in several files: the index that Hugging Face writes beside them, and the folder they lie in."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from normtool.errors import UnreadableModel, UnsafeModel
from normtool.formats.torch.sniff import open_regular

_LARGEST_INDEX = 64 << 20

#: What a folder of weights is looked through for, best first.
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def find_weights(folder: Path) -> Path | None:
    """The file or index of weights in a folder; None if there is none."""
    return next((folder / name for name in _NAMES if (folder / name).is_file()), None)


@dataclass(frozen=True)
class Index:
    """`weight_map`: tensor → shard; `files`: shard → where it really lies."""

    weight_map: Mapping[str, str]
    files: Mapping[str, Path]


def read_index(path: Path) -> Index:
    """Raises UnreadableModel for what is none or a missing shard, UnsafeModel for a shard elsewhere."""
    with open_regular(path) as file:
        text = file.read(_LARGEST_INDEX + 1)
    if len(text) > _LARGEST_INDEX:
        raise UnsafeModel(f"{path}: is larger than {_LARGEST_INDEX:,} bytes; an index of weights is not")
    try:
        weight_map = json.loads(text)["weight_map"]
        shards = sorted(set(weight_map.values()))
        sound = all(isinstance(shard, str) for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound or not shards:
        raise UnreadableModel(f"{path}: is JSON, and no index of weights (no weight_map of names to files)")
    return Index(weight_map, {shard: _resolve(path, shard) for shard in shards})


def _resolve(index: Path, shard: str) -> Path:
    """The shard, if it lies in the index's folder or beside what the index is a link to.

    A Hugging Face cache is a tree of links: `snapshots/REV/` points into `blobs/`, index and shards alike.
    """
    if not shard or "\0" in shard or shard.startswith(("/", "\\")) or ".." in Path(shard).parts:
        raise UnsafeModel(f"{index}: wants to read {shard!r}, outside its own folder")
    try:
        real = (index.parent / shard).resolve(strict=True)
    except (OSError, RuntimeError):  # Python 3.11 and 3.12 raise RuntimeError for a loop of links
        raise UnreadableModel(f"{index}: {shard!r} is missing from {index.parent}; download it too") from None
    homes = (index.parent.resolve(), index.resolve().parent)
    if not any(real.is_relative_to(home) for home in homes):
        raise UnsafeModel(f"{index}: {shard!r} is a link out of the folder, to {real}")
    return real
