"""Why an ONNX file stores other numbers than the module it was made from: difference by difference.

Every tensor of the program is looked for in the file, under its name, then by its content (transposed). What is
missing and what is new gets a cause; the causes add up to the difference, and a rest is said as such.
"""

import ast
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from normtool.detect import find_norms
from normtool.formats.onnx.model import OnnxModel
from normtool.formats.onnx.read import walk_nodes
from normtool.formats.torch.model import TorchModel
from normtool.formats.torch.state import Stored, by_storage
from normtool.formats.torch.tensors import DTYPES, to_numpy
from normtool.graph import Op, Role, Tensor
from normtool.parameters import Census, census, roles, stored_elements
from normtool.values import Array, to_array

#: cause → what it means
CAUSES: Mapping[str, str] = {
    "lifted": "torch.export stores tensors that the module keeps as plain attributes, or makes, as constants",
    "folded": "norms folded or swapped by normtool; what took them in may have got a bias",
    "folded_by_exporter": "BatchNorms folded by torch.onnx.export itself, without a proof",
    "num_batches_tracked": "the running count of a BatchNorm, which inference does not read",
    "unused": "never read by forward on the example inputs, so the exporter drops it",
    "shared_storage": "tensors that share their storage are stored apart",
    "merged": "tensors of the same content, which the exporter stores once",
    "tied_copy": "a tied weight that the file stores more than once",
    "computed_by_exporter": "replaced by a constant that the exporter computed from it",
    "constant_made": "constants that the exporter made (shapes, axes, scalars, folded expressions)",
    "dead_initializer": "stored in the file, though no node reads it",
    "role": "ONNX does not say what is frozen, or a buffer: by its use it counts otherwise",
}

_ROLES = ("learnable", "frozen", "buffers", "constants")

#: dtype, number of elements, hash of the bytes in order
Digest = tuple[str, int, bytes]


@dataclass
class Difference:
    """Elements that one cause adds (+) or takes away (−), by role."""

    cause: str
    by_role: Counter[str] = field(default_factory=Counter)
    tensors: list[str] = field(default_factory=list)

    def add(self, role: str, elements: int, name: str) -> None:
        self.by_role[role] += elements
        if name not in self.tensors:
            self.tensors.append(name)

    @property
    def message(self) -> str:
        return CAUSES[self.cause]

    def to_dict(self) -> dict[str, Any]:
        return {
            "code": self.cause,
            "message": self.message,
            **{role: self.by_role[role] for role in _ROLES},
            "tensors": self.tensors,
        }


@dataclass(frozen=True)
class Reconciliation:
    """Counts of the user's model, of the program that was exported, of the result, and what lies between them.

    `unexplained` is what the causes leave over, by role: zero everywhere unless there is a bug here.
    """

    source: Census
    program: Census
    made: Census
    differences: tuple[Difference, ...]

    @property
    def unexplained(self) -> dict[str, int]:
        explained = {role: sum(each.by_role[role] for each in self.differences) for role in _ROLES}
        return {r: getattr(self.made, r) - getattr(self.source, r) - explained[r] for r in _ROLES}

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source.to_dict(),
            "program": self.program.to_dict(),
            "made": self.made.to_dict(),
            "differences": [each.to_dict() for each in self.differences],
            "unexplained": self.unexplained,
        }


def reconcile(
    source: TorchModel, program: TorchModel, exported: TorchModel, made: OnnxModel | TorchModel
) -> Reconciliation:
    """`source` is the user's model, `program` what torch.export made of it, `exported` that after the fold."""
    differences = _Differences()
    _compare_states(source, program, "lifted", differences)
    if exported is not program:
        _compare_states(program, exported, "folded", differences)
    if isinstance(made, TorchModel):
        return Reconciliation(source.census, exported.census, made.census, differences.found())
    _InFile(exported, made, differences).settle()
    return Reconciliation(
        source.census, exported.census, census(made.graph, find_norms(made.graph)), differences.found()
    )


class _Differences:
    def __init__(self) -> None:
        self.by_cause: dict[str, Difference] = {}

    def note(self, cause: str, role: str, elements: int, name: str) -> None:
        self.by_cause.setdefault(cause, Difference(cause)).add(role, elements, name)

    def found(self) -> tuple[Difference, ...]:
        return tuple(each for each in self.by_cause.values() if any(each.by_role.values()))


def _compare_states(before: TorchModel, after: TorchModel, cause: str, differences: _Differences) -> None:
    """What the totals say, and the names of what was stored before or is stored now."""
    held, holds = (
        {name: (_role(stored), stored.tensor.numel()) for name, stored in model.state.by_name().items()}
        for model in (before, after)
    )
    changed = [name for name in {**held, **holds} if held.get(name) != holds.get(name)]
    for role in _ROLES:
        delta = getattr(after.census, role) - getattr(before.census, role)
        for name in changed if delta else ():
            differences.note(cause, role, 0, name)
        differences.note(cause, role, delta, changed[0] if changed else "")


class _InFile:
    """From the program that was exported to the file."""

    def __init__(self, program: TorchModel, made: OnnxModel, differences: _Differences) -> None:
        self.program, self.made, self.note = program, made, differences.note
        self.role_in_file = roles(made.graph, find_norms(made.graph))
        self.in_file = {tensor.name: tensor for tensor in self.role_in_file}
        self.matched: set[str] = set()
        self.folded = folded_by_exporter(program, made)
        self.by_content: dict[Digest, list[Tensor]] = {}

    def settle(self) -> None:
        missing = [stored for stored in self.program.state.stored if not self._kept(stored)]
        self._index({stored.tensor.numel() for stored in missing})
        for stored in missing:
            if not self._kept_elsewhere(stored):
                self.note(self._why_missing(stored), _role(stored), -stored.tensor.numel(), stored.names[0])
        self._shared()
        new = [tensor for name, tensor in self.in_file.items() if name not in self.matched]
        contents = self._contents({stored_elements(tensor) for tensor in new})
        for tensor in new:
            cause = self._why_new(tensor, contents)
            self.note(cause, _role_of(self.role_in_file[tensor]), stored_elements(tensor), tensor.name)

    def _shared(self) -> None:
        """Views of one storage are counted once in PyTorch; one by one they count more."""
        stored = self.program.state.stored
        names = [each.names[0] for group in by_storage(stored) if len(group) > 1 for each in group]
        for role in _ROLES:
            apart = sum(each.tensor.numel() for each in stored if _role(each) == role)
            if extra := apart - getattr(self.program.census, role):
                self.note("shared_storage", role, extra, ", ".join(names))

    # ---- what the file still has ----------------------------------------------------------

    def _kept(self, stored: Stored) -> bool:
        """Under its own name, or one of its aliases; a second one is a copy."""
        names = [n for n in stored.names if n in self.in_file and n not in self.matched]
        names = [n for n in names if stored_elements(self.in_file[n]) == stored.tensor.numel()]
        for position, name in enumerate(names):
            self._match(stored, self.in_file[name], copy=position > 0)
        return bool(names)

    def _index(self, counts: set[int]) -> None:
        for tensor in self.in_file.values():
            if tensor.value is not None and stored_elements(tensor) in counts:
                self.by_content.setdefault(_digest(to_array(tensor.value)), []).append(tensor)

    def _kept_elsewhere(self, stored: Stored) -> bool:
        """A weight under another name, in another shape, or transposed (MatMul stands for Linear)."""
        for tensor in self._same(stored):
            if tensor.name not in self.matched:
                self._match(stored, tensor, copy=False)
                return True
        return False

    def _same(self, stored: Stored) -> Iterator[Tensor]:
        for digest in _digests(stored):
            for tensor in self.by_content.get(digest, ()):
                # a single number is soon found; its role must be the same too
                if stored.tensor.numel() > 1 or _role_of(self.role_in_file[tensor]) == _role(stored):
                    yield tensor

    def _match(self, stored: Stored, tensor: Tensor, copy: bool) -> None:
        self.matched.add(tensor.name)
        before, after = _role(stored), _role_of(self.role_in_file[tensor])
        elements = stored.tensor.numel()
        if copy:
            self.note("tied_copy", after, elements, tensor.name)
        elif before != after:
            self.note("role", before, -elements, tensor.name)
            self.note("role", after, elements, tensor.name)

    # ---- causes ---------------------------------------------------------------------------

    def _why_missing(self, stored: Stored) -> str:
        name = stored.names[0]
        if name.endswith("num_batches_tracked"):
            return "num_batches_tracked"
        graph = self.program.graph
        tensor = next((t for t in graph.tensors if t.name == name and t.value is not None), None)
        if tensor is not None:
            readers = [read.op for read in graph.readers(tensor)]
            if not readers:
                return "unused"
            if all(op in self.folded for op in readers):
                return "folded_by_exporter"
        return "merged" if any(self._same(stored)) else "computed_by_exporter"

    def _contents(self, counts: set[int]) -> set[Digest]:
        """Of every tensor of the program that has as many elements as one of the file's own."""
        stored = [each for each in self.program.state.stored if each.tensor.numel() in counts - {1}]
        return {digest for each in stored for digest in _digests(each)}

    def _why_new(self, tensor: Tensor, contents: set[Digest]) -> str:
        if not self.made.graph.readers(tensor):
            return "dead_initializer"
        if tensor.value is not None and contents and _digest(to_array(tensor.value)) in contents:
            return "tied_copy"
        reads = [(read.op.kind, read.slot) for read in self.made.graph.readers(tensor)]
        if self.folded and any(kind in _WITH_BIAS and slot == "bias" for kind, slot in reads):
            return "folded_by_exporter"
        return "constant_made"


_WITH_BIAS = frozenset(["conv", "conv_transpose"])


def folded_by_exporter(program: TorchModel, made: OnnxModel) -> set[Op]:
    """The BatchNorms of the program that are none any more in the file.

    Their names do not tell: the exporter stores tensors of the same content once, under one of the names. What
    it made of each call is noted beside the nodes: a Conv that swallowed a BatchNorm says so.
    """
    calls: defaultdict[str, dict[str, bool]] = defaultdict(dict)  # module → its calls → is it still there?
    for _, node in walk_nodes(made.proto):
        path, call = _origin(node)
        if call.startswith("_native_batch_norm"):
            calls[path][call] = calls[path].get(call, False) or node.op_type == "BatchNormalization"
    gone: set[Op] = set()
    for path, ops in _batch_norms(program).items():
        kept = [there for _, there in sorted(calls[path].items(), key=lambda call: _number(call[0]))]
        if len(kept) == len(ops):
            gone |= {op for op, there in zip(ops, kept, strict=True) if not there}
        elif not any(kept):
            gone |= set(ops)
    return gone


def _batch_norms(program: TorchModel) -> dict[str, list[Op]]:
    ops: dict[str, list[Op]] = {}
    for op in program.graph.ops:
        if op.kind == "batch_norm":
            ops.setdefault(op.owner, []).append(op)
    return ops


def _origin(node: Any) -> tuple[str, str]:
    """(module path, name of the call in the exporter's program), from the metadata of a node."""
    notes = {each.key: each.value for each in node.metadata_props}
    try:
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
        return str(scopes[-2]), str(scopes[-1])
    except (ValueError, SyntaxError, IndexError, TypeError):
        return "", ""


def _number(call: str) -> int:
    last = call.rpartition("_")[2]
    return int(last) if last.isdecimal() else 0


def _role(stored: Stored) -> str:
    if stored.role is Role.PARAMETER:
        return "frozen" if stored.frozen else "learnable"
    return "buffers" if stored.role is Role.BUFFER else "constants"


def _role_of(role: Role) -> str:
    return {Role.PARAMETER: "learnable", Role.BUFFER: "buffers"}.get(role, "constants")


# ---- content ------------------------------------------------------------------------------------


def _digest(array: Array) -> Digest:
    content = np.ascontiguousarray(array)
    return str(content.dtype), content.size, hashlib.sha256(content.tobytes()).digest()


def _digests(stored: Stored) -> Iterator[Digest]:
    """Of the tensor as it is, and transposed."""
    tensor = stored.tensor
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.dtype not in DTYPES or not tensor.numel():
        return
    array = to_numpy(tensor.detach())
    yield _digest(array)
    if array.ndim > 1:
        yield _digest(array.T)
