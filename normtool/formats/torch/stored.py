"""What a checkpoint stores under each name, counted by memory: names may share, overlap or exceed it.

A reader of a format makes one `StoredTensor` per name; the counting here knows no format.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from normtool.errors import UnreadableModel
from normtool.parameters import Census
from normtool.values import Array, element_count

#: code, message, where
Diagnostic = tuple[str, str, str]


@dataclass(frozen=True, eq=False)
class Unread:
    """A tensor of which only the shape and the dtype were read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def rows(self, start: int, stop: int) -> Array:
        raise UnreadableModel("of a checkpoint only names and shapes are read; give the model itself")


@dataclass(frozen=True)
class StoredTensor:
    """One name and the bytes it spans, `begin` to `end`, in the address space of one file.

    `held` is the number of its elements that have bytes of their own: less than the shape claims where a
    stride is 0 or steps overlap. `bits` are those of an element as stored. `integer` is False for integers
    that stand for real numbers (PyTorch's quantised tensors). `file` counts the shards from 0.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    bits: int
    begin: int
    end: int
    held: int
    integer: bool
    stride: tuple[int, ...] = ()
    file: int = 0

    @property
    def claimed(self) -> int:
        """Elements by its shape."""
        return element_count(self.shape)

    @property
    def view(self) -> tuple[Any, ...]:
        """Equal for two names of the same numbers in the same shape."""
        if self.held == 0:
            return (self.file, self.name)
        return (self.file, self.begin, self.end, self.shape, self.stride, self.dtype)


@dataclass(frozen=True)
class Region:
    """Tensors whose spans overlap, with the elements and bytes that they hold together."""

    tensors: tuple[StoredTensor, ...]
    elements: int
    bytes: int


def distinct(tensors: Iterable[StoredTensor]) -> list[StoredTensor]:
    """The first name of every view."""
    return list({tensor.view: tensor for tensor in reversed(list(tensors))}.values())[::-1]


def regions(tensors: Iterable[StoredTensor]) -> Iterator[Region]:
    """Every stored byte in one region, so that shared memory is counted once."""
    overlapping: list[StoredTensor] = []
    end = 0
    stored = (tensor for tensor in distinct(tensors) if tensor.held)
    for tensor in sorted(stored, key=lambda t: (t.file, t.begin)):
        if overlapping and (tensor.file != overlapping[0].file or tensor.begin >= end):
            yield _region(overlapping, end)
            overlapping = []
        end = max(end, tensor.end) if overlapping else tensor.end
        overlapping.append(tensor)
    if overlapping:
        yield _region(overlapping, end)


def _region(tensors: list[StoredTensor], end: int) -> Region:
    span = end - tensors[0].begin
    narrowest = min(tensor.bits for tensor in tensors)
    return Region(
        tuple(tensors),
        min(sum(tensor.held for tensor in tensors), span * 8 // narrowest),
        min(sum((tensor.held * tensor.bits + 7) // 8 for tensor in tensors), span),
    )


def elements_held(tensors: Iterable[StoredTensor]) -> int:
    return sum(region.elements for region in regions(tensors))


def count(tensors: list[StoredTensor], buffers: frozenset[str]) -> Census:
    """`buffers` are names; memory that a buffer shares with a parameter counts as the parameter's."""
    learnable = [tensor for tensor in tensors if tensor.name not in buffers]
    elements, size = {True: 0, False: 0}, {True: 0, False: 0}
    parameters = {tensor.view for tensor in learnable}
    for region in regions(tensors):
        learned = any(tensor.view in parameters for tensor in region.tensors)
        elements[learned] += region.elements
        size[learned] += region.bytes
    return Census(
        learnable=elements[True],
        buffers=elements[False],
        learnable_bytes=size[True],
        buffer_bytes=size[False],
        named=sum(tensor.held for tensor in learnable),
        unique=sum(tensor.held for tensor in distinct(learnable)),
    )
