"""Finds the model's state dict in what a checkpoint holds, beside optimizers, averages and epochs.

Containers come from a pickle, so they may be shared, circular, and nested without end: each is visited once.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from normtool.errors import UnreadableModel, UnsafeModel
from normtool.formats.torch.stored import Diagnostic, StoredTensor, distinct, elements_held
from normtool.formats.torch.tensors import DTYPES
from normtool.values import element_count

#: A tensor may claim so many elements, or so many times what its storage holds.
MOST_CLAIMED = 1_000_000_000
MOST_EXPANDED = 1_000

#: No path within a checkpoint and no name in it is longer.
MOST_LEVELS = 64
LONGEST_NAME = 4096

#: Copies of the weights, in the words that training code uses.
_COPY = re.compile(r"(?:^|[^a-z])(?:ema|swa|averaged?|teacher|shadow)(?:[^a-z]|$)")

#: Packed several to a byte
_BITS = {torch.quint4x2: 4, torch.quint2x4: 2}

Keys = tuple[str, ...]


@dataclass(frozen=True)
class StateDict:
    """`path` says where in the pickled object it lay ("/" is the object itself).

    `storages`: address → (bytes, a tensor in it), of every tensor anywhere in the object.
    """

    tensors: list[StoredTensor]
    path: str
    diagnostics: tuple[Diagnostic, ...]
    storages: dict[int, tuple[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Dict:
    """Its own tensors, those in lists and tuples of it included."""

    keys: Keys
    optimizer: bool
    tensors: dict[str, torch.Tensor]


def find_state_dict(top: Any, path: Path) -> StateDict:
    """The dict with most real numbers; averages only if there is nothing else, optimizers never.

    Raises UnreadableModel if there is none, UnsafeModel for tensors that claim far more than they store.
    """
    dicts = [found for found in _dicts(top, path) if found.tensors]
    stored = {found.keys: [_stored(*item, path) for item in found.tensors.items()] for found in dicts}
    models = [found.keys for found in dicts if not found.optimizer]
    if not models:
        what = "only the state of an optimizer" if dicts else "no dict of tensors"
        raise UnreadableModel(f"{path}: holds {what}; save model.state_dict()")
    chosen = max(models, key=lambda keys: (not _is_copy(keys), *_size(stored[keys])))
    rest = {keys: tensors for keys, tensors in stored.items() if keys != chosen}
    return StateDict(
        _without_prefix(stored[chosen]),
        "/" + "/".join(chosen),
        (*_claims(stored[chosen]), *_not_counted(stored[chosen], rest)),
        _storages(dicts),
    )


def _dicts(top: Any, path: Path) -> list[_Dict]:
    """Every dict, from the outside in."""
    found: list[_Dict] = []
    queue: deque[tuple[Any, Keys, _Dict | None]] = deque([(top, (), None)])
    seen: set[int] = set()
    while queue:
        node, keys, home = queue.popleft()
        if id(node) in seen or not isinstance(node, dict | list | tuple):
            continue
        seen.add(id(node))
        if len(keys) > MOST_LEVELS:
            raise UnsafeModel(f"{path}: its containers are nested more than {MOST_LEVELS} deep")
        if isinstance(node, dict):
            home = _Dict(keys, _is_optimizer(node, keys, home), {})
            found.append(home)
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(child, torch.Tensor) and home is not None:
                home.tensors[".".join((*keys[len(home.keys) :], _text(key, path)))] = child
            elif isinstance(child, dict | list | tuple):
                queue.append((child, (*keys, _text(key, path)), home))
    return found


def _is_optimizer(node: dict[Any, Any], keys: Keys, home: _Dict | None) -> bool:
    """By the two keys of every torch.optim state, or by name; and everything inside one."""
    named = bool(keys) and "optim" in keys[-1].lower()
    return named or {"state", "param_groups"} <= node.keys() or (home is not None and home.optimizer)


def _is_copy(keys: Keys) -> bool:
    return any(_COPY.search(key.lower()) for key in keys)


def _size(tensors: list[StoredTensor]) -> tuple[int, int]:
    """Real numbers first: the state of a random generator is larger than many a model."""
    real = sum(tensor.held for tensor in tensors if not tensor.integer)
    return real, sum(tensor.held for tensor in tensors)


def _text(key: Any, path: Path) -> str:
    text = str(key) if isinstance(key, str | int) else type(key).__name__
    if len(text) > LONGEST_NAME:
        raise UnsafeModel(f"{path}: {text[:40]!r}… is a name of {len(text):,} characters")
    return text


def _without_prefix(tensors: list[StoredTensor]) -> list[StoredTensor]:
    """Without the `module.` that DataParallel puts before every name."""
    while all(tensor.name.startswith("module.") for tensor in tensors):
        tensors = [replace(tensor, name=tensor.name.removeprefix("module.")) for tensor in tensors]
    return tensors


# ---- one tensor -----------------------------------------------------------------------------


def _stored(name: str, tensor: torch.Tensor, path: Path) -> StoredTensor:
    numbers = _numbers(tensor)
    shape = tuple(int(n) for n in numbers.shape)
    stride = tuple(int(n) for n in numbers.stride())
    bits = _BITS.get(numbers.dtype, 8 * numbers.element_size())
    span = 0 if numbers.is_meta else _span(shape, stride)
    begin = int(numbers.data_ptr()) if span else 0
    stored = StoredTensor(
        name=name,
        shape=shape,
        dtype=DTYPES.get(numbers.dtype, np.dtype(f"V{numbers.element_size()}")),
        bits=bits,
        begin=begin,
        end=begin + (span * bits + 7) // 8,
        held=min(span, element_count(tuple(n for n, step in zip(shape, stride, strict=True) if step))),
        integer=not (numbers.is_floating_point() or numbers.is_complex() or numbers.is_quantized),
        stride=stride,
    )
    if stored.claimed > MOST_CLAIMED and stored.claimed > MOST_EXPANDED * stored.held and not numbers.is_meta:
        raise UnsafeModel(
            f"{path}: {name!r} claims {stored.claimed:,} elements of a storage of "
            f"{numbers.untyped_storage().nbytes():,} bytes; beyond {MOST_CLAIMED:,} and "
            f"{MOST_EXPANDED:,} times what is stored, normtool takes this for a bomb"
        )
    return stored


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """What is stored of it: of a sparse tensor, the values."""
    tensor = tensor.detach()
    if tensor.layout is torch.strided:
        return tensor
    return tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """From the first element to the last."""
    if 0 in shape:
        return 0
    return 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))


def _storages(dicts: Iterable[_Dict]) -> dict[int, tuple[int, str]]:
    found: dict[int, tuple[int, str]] = {}
    for each in dicts:
        for name, tensor in each.tensors.items():
            numbers = _numbers(tensor)
            storage = numbers.untyped_storage()
            if storage.nbytes() and not numbers.is_meta:
                found.setdefault(int(storage.data_ptr()), (int(storage.nbytes()), name))
    return found


# ---- what is said of it ---------------------------------------------------------------------


def _claims(tensors: list[StoredTensor]) -> Iterator[Diagnostic]:
    for tensor in tensors:
        if tensor.claimed > tensor.held == 0:
            message = f"the file gives its shape, {list(tensor.shape)}, and none of its numbers"
            yield "no_data", message, tensor.name
        elif tensor.claimed > tensor.held:
            message = f"claims {tensor.claimed:,} elements and stores {tensor.held:,}, which are counted"
            yield "expanded_view", message, tensor.name


def _not_counted(counted: list[StoredTensor], rest: dict[Keys, list[StoredTensor]]) -> Iterator[Diagnostic]:
    """One line for all else of size, by the first key (`optimizer`, `model_ema`)."""
    views = {tensor.view for tensor in counted}
    by_key: dict[str, list[StoredTensor]] = {}
    for keys, tensors in rest.items():
        new = [tensor for tensor in tensors if tensor.view not in views]
        by_key.setdefault(keys[0] if keys else "", []).extend(new)
    for key, tensors in by_key.items():
        if tensors:
            number, elements = len(distinct(tensors)), elements_held(tensors)
            yield "not_counted", f"{number:,} other tensors, {elements:,} elements, are not counted", f"/{key}"
