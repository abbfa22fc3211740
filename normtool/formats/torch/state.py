"""What a PyTorch model stores: every parameter and buffer, and which of them are the same numbers.

A name is not a parameter and a parameter is not a storage: `lm_head.weight` and `embed.weight` may be one
object, two Parameters may be views of one buffer of memory. So there are three totals: every name, every
object, every stored element (the one in which nothing is counted twice).
"""

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.export.graph_signature import InputKind
from torch.nn.parameter import is_lazy

from normtool.formats.torch.tensors import DTYPES, TorchValue
from normtool.graph import ModelGraph, Role, Tensor
from normtool.parameters import Census
from normtool.values import bits_per_element


@dataclass(eq=False)
class Stored:
    """One tensor object under all its names.

    `packed`: a quantised layer unpacked it from what it really holds. `alone`: its storage says nothing.
    """

    tensor: torch.Tensor
    role: Role
    names: list[str]
    packed: bool = False
    alone: bool = False

    @property
    def frozen(self) -> bool:
        """No gradient reaches a packed weight, whatever its unpacked copy says."""
        return self.role is Role.PARAMETER and (self.packed or not self.tensor.requires_grad)


@dataclass(eq=False)
class State:
    """`uninitialised` are lazy parameters and buffers, by their first names: they have no size yet."""

    stored: list[Stored] = field(default_factory=list)
    uninitialised: list[str] = field(default_factory=list)

    def by_name(self) -> dict[str, Stored]:
        return {name: stored for stored in self.stored for name in stored.names}


@dataclass(frozen=True)
class _Found:
    """One name and the tensor it leads to."""

    name: str
    tensor: torch.Tensor
    role: Role
    packed: bool = False
    alone: bool = False


def state_of_module(module: nn.Module) -> State:
    """Everything below `module`, packed weights of quantised layers included.

    Neither `forward` nor `state_dict` is called: the hooks of either are the user's code.
    """
    return _gathered(_of_module(module))


def _of_module(module: nn.Module) -> Iterator[_Found]:
    """Every name of every tensor: a module that is registered twice has its tensors twice."""
    modules = [(path and f"{path}.", child) for path, child in module.named_modules(remove_duplicate=False)]
    for path, child in modules:
        for name, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
            yield _Found(path + name, parameter, Role.PARAMETER)
    for path, child in modules:
        for name, buffer in child.named_buffers(recurse=False, remove_duplicate=False):
            yield _Found(path + name, buffer, Role.BUFFER)
    unpacked: dict[int, dict[str, torch.Tensor]] = {}  # every unpacking makes new tensors: once per module
    for path, child in modules:
        if id(child) not in unpacked:
            unpacked[id(child)] = dict(_packed(child))
        for name, tensor in unpacked[id(child)].items():
            yield _Found(path + name, tensor, Role.PARAMETER, packed=True)


def _packed(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights that a quantised layer keeps inside an opaque object: `weight()` unpacks them."""
    if not type(module).__module__.startswith("torch.ao.nn."):
        return
    for name in ("weight", "bias"):
        unpack = getattr(module, name, None)
        tensor = unpack() if callable(unpack) else None
        if isinstance(tensor, torch.Tensor):
            yield name, tensor
    for unpack_all in (getattr(module, "get_weight", None), getattr(module, "get_bias", None)):
        yield from (unpack_all() if callable(unpack_all) else {}).items()


def state_of_program(program: torch.export.ExportedProgram) -> State:
    """What an exported program carries, by the names its signature gives.

    torch.export.save takes all that is on the meta device for one storage, so there a storage says nothing.
    """
    found: list[_Found] = []
    for spec in program.graph_signature.input_specs:
        if spec.target is None or spec.kind not in _ROLES:
            continue
        tensor = program.state_dict.get(spec.target, program.constants.get(spec.target))
        if isinstance(tensor, torch.Tensor):
            found.append(_Found(spec.target, tensor, _ROLES[spec.kind], alone=tensor.is_meta))
    return _gathered(found)


_ROLES: Mapping[InputKind, Role] = {
    InputKind.PARAMETER: Role.PARAMETER,
    InputKind.BUFFER: Role.BUFFER,
    InputKind.CONSTANT_TENSOR: Role.CONSTANT,
}


def _gathered(found: Iterable[_Found]) -> State:
    state, seen = State(), dict[int, Stored]()
    for each in found:
        known = seen.get(id(each.tensor))
        if known is not None:
            known.names.append(each.name)
            continue
        stored = seen[id(each.tensor)] = Stored(each.tensor, each.role, [each.name], each.packed, each.alone)
        if is_lazy(each.tensor):
            state.uninitialised.append(each.name)
        else:
            state.stored.append(stored)
    return state


def add_to_graph(graph: ModelGraph, state: State) -> dict[str, Tensor]:
    """A graph tensor for each stored one, under its first name; every name leads to it."""
    by_name: dict[str, Tensor] = {}
    for stored in state.stored:
        known = stored.tensor.dtype in DTYPES and not stored.tensor.is_sparse
        value = TorchValue(stored.tensor) if known else None
        shape = tuple(int(n) for n in stored.tensor.shape)
        dtype = value.dtype if value is not None else None
        tensor = Tensor(stored.names[0], _MAIN, stored.role, dtype, shape, value)
        tensor.frozen = stored.frozen
        graph.add_tensor(tensor)
        by_name.update(dict.fromkeys(stored.names, tensor))
    return by_name


_MAIN = ModelGraph.MAIN


# ---- counting ---------------------------------------------------------------------------------

_ORDER = ("learnable", "frozen", "buffer", "constant")


def census(state: State) -> Census:
    """Elements and bytes by role; what several roles share belongs to the first of them in `_ORDER`."""
    parameters = [stored for stored in state.stored if stored.role is Role.PARAMETER]
    elements, size = _distinct_by_role(state.stored)
    return Census(
        learnable=elements["learnable"],
        frozen=elements["frozen"],
        buffers=elements["buffer"],
        constants=elements["constant"],
        learnable_bytes=size["learnable"],
        frozen_bytes=size["frozen"],
        buffer_bytes=size["buffer"],
        constant_bytes=size["constant"],
        named=sum(stored.tensor.numel() * len(stored.names) for stored in parameters),
        unique=sum(stored.tensor.numel() for stored in parameters),
        uninitialised=len(state.uninitialised),
    )


def _kind(stored: Stored) -> str:
    if stored.role is Role.PARAMETER:
        return "frozen" if stored.frozen else "learnable"
    return str(stored.role)


def _distinct_by_role(entries: Sequence[Stored]) -> tuple[dict[str, int], dict[str, int]]:
    """(elements, bytes) of each kind, every stored element once."""
    elements, size = dict.fromkeys(_ORDER, 0), dict.fromkeys(_ORDER, 0)
    for group in by_storage(entries):
        group.sort(key=lambda stored: _ORDER.index(_kind(stored)))
        for stored, new in zip(group, _new_elements([each.tensor for each in group]), strict=True):
            elements[_kind(stored)] += new
            size[_kind(stored)] += (new * _bits(stored.tensor) + 7) // 8
    return elements, size


def _bits(tensor: torch.Tensor) -> int:
    dtype = DTYPES.get(tensor.dtype)
    return bits_per_element(dtype) if dtype is not None else tensor.element_size() * 8


def by_storage(entries: Iterable[Stored]) -> list[list[Stored]]:
    """Entries that look at the same memory, together."""
    groups: defaultdict[object, list[Stored]] = defaultdict(list)
    for stored in entries:
        groups[id(stored) if stored.alone else storage_key(stored.tensor)].append(stored)
    return list(groups.values())


def storage_key(tensor: torch.Tensor) -> object:
    """The same for two tensors on one storage."""
    try:
        storage = tensor.untyped_storage()
    except RuntimeError:  # sparse tensors and some subclasses have none of their own
        return id(tensor)
    try:
        address = storage.data_ptr()
    except RuntimeError:  # fake tensors do not let anyone look
        address = 0
    # without memory (meta tensors) it is still one storage object, or it is not
    return (str(tensor.device), address) if address else ("no memory", storage._cdata)


# ---- one storage ------------------------------------------------------------------------------


def _new_elements(tensors: Sequence[torch.Tensor]) -> list[int]:
    """How many elements of each tensor no earlier one holds. All of them lie on one storage.

    Offsets are counted in the largest unit that divides every element: views may be of another dtype.
    """
    if tensors[0].layout is not torch.strided:
        return [_without_zeros(tensor) for tensor in tensors]
    unit = math.gcd(*(tensor.element_size() for tensor in tensors))
    count = _new_in_runs if all(map(_is_dense, tensors)) else _new_in_mask
    sizes = [tensor.element_size() // unit for tensor in tensors]
    return [new // size for new, size in zip(count(tensors, sizes), sizes, strict=True)]


def _without_zeros(tensor: torch.Tensor) -> int:
    """A sparse tensor stores the elements that are not zero (and their places, which are no parameters)."""
    if tensor.layout is torch.sparse_coo:
        return tensor._values().numel()
    if tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        return tensor.values().numel()
    return tensor.numel()


def _new_in_runs(tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> Iterator[int]:
    runs: list[tuple[int, int]] = []  # what has been counted: sorted, no two touch
    for tensor, size in zip(tensors, sizes, strict=True):
        start = int(tensor.storage_offset()) * size
        stop = start + tensor.numel() * size
        first = bisect_left(runs, start, key=lambda run: run[1])
        last = bisect_right(runs, stop, key=lambda run: run[0])
        met = runs[first:last]
        yield stop - start - sum(min(stop, end) - max(start, begin) for begin, end in met)
        runs[first:last] = [(min([start, *(run[0] for run in met)]), max([stop, *(run[1] for run in met)]))]


def _new_in_mask(tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> Iterator[int]:
    extents = [(t.storage_offset() + _extent(t)) * size for t, size in zip(tensors, sizes, strict=True)]
    counted = np.zeros(max(extents), bool)
    total = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        if tensor.numel():
            shape = (*tensor.shape, size)
            strides = (*(stride * size for stride in tensor.stride()), 1)
            own = counted[tensor.storage_offset() * size :]
            np.lib.stride_tricks.as_strided(own, shape, strides)[...] = True
        before, total = total, int(np.count_nonzero(counted))
        yield total - before


def _is_dense(tensor: torch.Tensor) -> bool:
    """Do its elements fill one run of memory, each place once? (Transposed ones do, expanded ones do not.)"""
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1:
            if stride != expected:
                return False
            expected *= length
    return True


def _extent(tensor: torch.Tensor) -> int:
    """Distance from the first element to behind the last, in elements."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
