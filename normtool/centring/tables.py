"""A LayerNorm of nothing but rows of a table (BLOOM's embedding norm): the table may hold them normalised."""

from collections.abc import Callable

import numpy as np

from normtool.constants import Constants
from normtool.forms import NormForm
from normtool.graph import Op
from normtool.rules.carriers import refusal
from normtool.values import Array


def looked_up(constants: Constants, form: NormForm) -> Op | None:
    """The embedding whose rows are all that a norm reads, and that nobody else reads."""
    graph = constants.graph
    inside: set[Op] = set(form.ops)
    tensor = form.x
    while True:
        op = graph.producer(tensor)
        if op is None or any(read.op not in inside for read in graph.readers(tensor)):
            return None
        if op.kind == "embedding":
            break
        if op.kind not in ("identity", "dropout", "cast") or refusal(constants, op) is not None:
            return None
        inside, tensor = {op}, graph.inputs(op)["x"]
    rank, table = graph.rank(tensor), graph.inputs(op)["table"]
    rows = rank is not None and form.axes in ((-1,), (rank - 1,)) and graph.rank(table) == 2
    return op if rows and not constants.attribute(op, "axis") else None


def normalising(gamma: Array, beta: Array, eps: float) -> Callable[[Array], Array]:
    """LN_{γ,β,ε} along the last axis, in the precision of what it is given."""

    def normalise(x: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        return np.asarray(centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * gamma + beta)

    return normalise
