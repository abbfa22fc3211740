"""Counts what a model stores: learnable parameters, buffers, and the constants that shape the graph.

ONNX does not say which initializer was learned; the operand's role does. Mean and variance of a BatchNorm
are buffers. Integers, and scalars outside a weight slot, shape the graph. Every other float is learnable.
Storage shared by several readers is counted once.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from normtool.graph import ModelGraph, Role, Tensor
from normtool.norms import Norm
from normtool.values import bits_per_element, element_count, is_float

#: Slots whose float operands are settings and not weights, however many elements they have.
_SETTINGS = frozenset(
    [
        *(("resize", slot) for slot in ("scales", "roi", "sizes")),
        *(("clip", slot) for slot in ("min", "max")),
        *(("pad", slot) for slot in ("pads", "value")),
        ("dropout", "ratio"),
        ("pow", "exponent"),
        ("one_hot", "values"),
        *((kind, "scale") for kind in ("quantize_linear", "dequantize_linear")),
        *((kind, "zero_point") for kind in ("quantize_linear", "dequantize_linear")),
    ]
)

#: Slots whose float operand is a weight even if it is a single number.
_WEIGHTS = frozenset(
    [
        *((kind, slot) for kind in ("conv", "conv_transpose") for slot in ("weight", "bias")),
        *(("linear", slot) for slot in ("a", "b", "c")),
        *(("matmul", slot) for slot in ("a", "b")),
        ("embedding", "table"),
        ("prelu", "slope"),
    ]
)

#: Slots whose integer operand is a weight: quantised ones.
_INTEGER_WEIGHTS = frozenset(
    [
        ("dequantize_linear", "x"),
        ("quantized_conv", "weight"),
        ("quantized_conv", "bias"),
        ("quantized_matmul", "a"),
        ("quantized_matmul", "b"),
    ]
)

#: Ops that give the same stored numbers another name, shape or dtype.
_CARRIERS = frozenset("identity cast cast_like transpose reshape squeeze unsqueeze expand".split())


@dataclass(frozen=True)
class Census:
    """Elements and bytes by role; storage that several names share is counted once.

    `frozen` is always 0 in ONNX, which has no such mark. `named` and `unique` are the two other totals of
    learnable and frozen parameters that people quote: every name counted, and every parameter object
    counted, whatever storage they share. `uninitialised` tensors have no size yet and are in no count.
    """

    learnable: int = 0
    frozen: int = 0
    buffers: int = 0
    constants: int = 0
    learnable_bytes: int = 0
    frozen_bytes: int = 0
    buffer_bytes: int = 0
    constant_bytes: int = 0
    named: int = 0
    unique: int = 0
    uninitialised: int = 0

    @property
    def parameters(self) -> int:
        """Learnable and frozen together."""
        return self.learnable + self.frozen

    def to_dict(self) -> dict[str, int]:
        return dict(vars(self))


def census(graph: ModelGraph, norms: Iterable[Norm]) -> Census:
    """Count every stored tensor of the model once."""
    return census_of(graph, roles(graph, norms))


def census_of(graph: ModelGraph, role_of: dict[Tensor, Role]) -> Census:
    elements = dict.fromkeys(Role, 0)
    size = dict.fromkeys(Role, 0)
    for tensor, role in role_of.items():
        elements[role] += stored_elements(tensor)
        size[role] += stored_bytes(tensor)
    return Census(
        named=elements[Role.PARAMETER],
        unique=elements[Role.PARAMETER],
        learnable=elements[Role.PARAMETER],
        buffers=elements[Role.BUFFER],
        constants=elements[Role.CONSTANT],
        learnable_bytes=size[Role.PARAMETER],
        buffer_bytes=size[Role.BUFFER],
        constant_bytes=size[Role.CONSTANT],
    )


def roles(graph: ModelGraph, norms: Iterable[Norm]) -> dict[Tensor, Role]:
    """The role of every stored tensor."""
    buffers: set[Tensor] = set()
    learnable: set[Tensor] = set()
    for norm in norms:
        buffers.update(root for t in norm.buffers if (root := stored_root(graph, t)) is not None)
        learnable.update(root for t in norm.learnable if (root := stored_root(graph, t)) is not None)
    role_of: dict[Tensor, Role] = {}
    for tensor in graph.tensors:
        if tensor.value is None:
            continue
        if tensor.role in (Role.PARAMETER, Role.BUFFER):  # the format says so itself
            role_of[tensor] = tensor.role
        elif tensor in buffers:
            role_of[tensor] = Role.BUFFER
        elif tensor in learnable:
            role_of[tensor] = Role.PARAMETER
        else:
            role_of[tensor] = _role(graph, tensor)
    return role_of


def _role(graph: ModelGraph, tensor: Tensor) -> Role:
    slots = {(read.op.kind, read.slot) for read in graph.readers(tensor)}
    if slots & _INTEGER_WEIGHTS:
        return Role.PARAMETER
    if tensor.value is None or not is_float(tensor.value.dtype):
        return Role.CONSTANT
    if slots & _WEIGHTS:
        return Role.PARAMETER
    if slots and slots <= _SETTINGS:
        return Role.CONSTANT
    return Role.PARAMETER if stored_elements(tensor) > 1 else Role.CONSTANT


def stored_elements(tensor: Tensor) -> int:
    """Elements the model stores for this tensor (a sparse one stores only its non-zeros)."""
    if tensor.stored_elements is not None:
        return tensor.stored_elements
    return 0 if tensor.value is None else element_count(tensor.value.shape)


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of those elements (the indices of a sparse tensor are not counted)."""
    if tensor.value is None:
        return 0
    return (stored_elements(tensor) * bits_per_element(tensor.value.dtype) + 7) // 8


def stored_root(graph: ModelGraph, tensor: Tensor) -> Tensor | None:
    """The stored tensor behind `tensor`, through ops that only rename or reshape; None if it is computed."""
    for _ in range(64):
        if tensor.value is not None:
            return tensor
        op = graph.producer(tensor)
        source = graph.input(op, "x") if op is not None and op.kind in _CARRIERS else None
        if source is None:
            return None
        tensor = source
    return None
