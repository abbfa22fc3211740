"""GroupNorm: a norm between two reshapes, with γ and β per channel behind the second.

    N, C, H, W → N, G, (C/G)·H·W → normalise the last axes → N, C, H, W → · γ[C] + β[C]

Each group is a run of channels if the first axis stays and G divides C.
"""

from dataclasses import replace

from normtool.forms import NormForm
from normtool.graph import Op, Tensor
from normtool.reasons import Reason
from normtool.spelled.reading import Reading
from normtool.values import to_array


def of_instance_norm(reading: Reading, op: Op) -> NormForm | None:
    """Reshape → InstanceNormalization(1, 0) → Reshape → Mul → Add, as torch exports GroupNorm."""
    inputs, outputs = reading.graph.inputs(op), reading.graph.outputs(op)
    x, y = inputs.get("x"), outputs.get("y")
    if x is None or y is None or op.attributes.get("use_input_stats") is False:
        return None
    if not (_is_all(reading, inputs.get("weight"), 1.0) and _is_all(reading, inputs.get("bias"), 0.0)):
        return None
    rank = reading.rank(x)
    eps = reading.constants.attribute(op, "epsilon")
    if rank is None or not isinstance(eps, float):
        return None
    return grouped(reading, NormForm("instance_norm", x, y, tuple(range(2, rank)), eps, None, None, (op,)))


def grouped(reading: Reading, inner: NormForm) -> NormForm | None:
    """The GroupNorm around a norm without γ and β; None where the reshapes around it make none of it."""
    graph = reading.graph
    first = graph.producer(inner.x)
    x = graph.input(first, "x") if first is not None and first.kind == "reshape" else None
    rank, inner_rank = (reading.rank(t) if t is not None else None for t in (x, inner.x))
    if first is None or x is None or rank is None or rank < 3 or inner_rank is None:
        return None
    groups = _groups(reading, first, x, inner.x)
    if inner.axes != tuple(range(2, inner_rank)) or groups is None:
        return None
    followers = [read.op for read in graph.readers(inner.y) if read.op.scope == first.scope]
    last = next((op for op in followers if op.kind == "reshape"), None)
    y = graph.outputs(last).get("y") if last is not None else None
    if last is None or y is None or not _is_shaped_like(reading, last, y, x):
        return None
    count, channels = groups
    whole = replace(
        inner,
        kind="group_norm" if count != channels else "instance_norm",
        x=x,
        y=y,
        axes=tuple(range(1 if count != channels else 2, rank)),
        ops=(first, *inner.ops, last),
        groups=count if count != channels else None,
    )
    return _with_affine(reading, whole, rank)


def _is_all(reading: Reading, tensor: Tensor | None, number: float) -> bool:
    if tensor is None:
        return True
    if not reading.stored(tensor):
        return False
    value = reading.constants.value(tensor)
    return not isinstance(value, Reason) and len(value.shape) == 1 and bool((to_array(value) == number).all())


def _groups(reading: Reading, op: Op, x: Tensor, inner: Tensor) -> tuple[int, int] | None:
    """(G, C)."""
    if x.shape is None or len(x.shape) < 2 or not isinstance(x.shape[1], int):
        return None
    channels = x.shape[1]
    target = reading.constants.attribute(op, "shape")
    stated = list(target) if isinstance(target, list) else list(inner.shape or ())
    if len(stated) < 3 or not isinstance(stated[1], int) or stated[1] < 1 or channels % stated[1]:
        return None
    keeps = stated[0] == 0 and not reading.constants.attribute(op, "allowzero")
    known = inner.shape[0] if inner.shape else None
    if not keeps and (x.shape[0] is None or x.shape[0] not in (stated[0], known)):
        return None
    return stated[1], channels


def _is_shaped_like(reading: Reading, op: Op, y: Tensor, x: Tensor) -> bool:
    if x.shape is not None and None not in x.shape and x.shape == y.shape:
        return True
    shape = reading.graph.input(op, "shape")
    source = reading.graph.producer(shape) if shape is not None else None
    if source is None or source.kind != "shape" or source.attributes.get("end") is not None:
        return False
    return reading.graph.input(source, "x") is x and not source.attributes.get("start")


def _with_affine(reading: Reading, form: NormForm, rank: int) -> NormForm:
    """γ, then β, each for every channel, where only one of a kind follows."""
    for kind, role in (("mul", "weight"), ("add", "bias")):
        following = [
            (read.op, other)
            for read in reading.graph.readers(form.y)
            if read.op.kind == kind and read.op.scope == form.ops[-1].scope
            for other in reading.graph.inputs(read.op).values()
            if other is not form.y and reading.stored(other) and _is_per_channel(other, rank)
        ]
        if len(following) != 1:
            continue
        op, tensor = following[0]
        y = reading.graph.outputs(op).get("y")
        if y is not None:
            parts = {role: tensor}
            form = replace(form, y=y, ops=(*form.ops, op), **parts)  # type: ignore[arg-type]
    return form


def _is_per_channel(tensor: Tensor, rank: int) -> bool:
    shape = tensor.shape
    if shape is None or len(shape) > rank:
        return False
    return {rank - len(shape) + axis for axis, n in enumerate(shape) if n != 1} == {1}
