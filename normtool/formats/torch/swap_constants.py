"""Which stored tensor has to hold what, for an op of a user's module to read the constant that a plan gives it.

The op may read a parameter as it is. Or it reads what the module's code makes of one: a slice of a table of
positions, a class token that is expanded to the batch, a weight transposed. Then the stored tensor has to
change so that the code goes on making the right thing of it, for other lengths too: the Centre goes back to it
by the rules that take it back through any op (`centring.rows`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from normtool.centring.places import Place
from normtool.centring.rows import Blocked, behind
from normtool.centring.values import Centred, zeros_like
from normtool.constants import Constants
from normtool.edits import Rebind
from normtool.formats.torch.model import TorchModel
from normtool.graph import Op, Read, Tensor
from normtool.reasons import Reason
from normtool.values import Array, Computed, Value, exact_array

#: Ops that put every number of a tensor in one place, and leave none out.
_REARRANGING = frozenset(["identity", "transpose", "reshape", "flatten", "squeeze", "unsqueeze"])


@dataclass(frozen=True, eq=False)
class Content:
    """What a stored tensor is to hold, for one of its readers."""

    tensor: Tensor
    value: Value
    read: Read


class Resolver:
    def __init__(self, model: TorchModel) -> None:
        self.graph = model.graph
        self.constants = Constants(model.graph)
        self.stored = model.state.by_name()

    def contents(self, op: Op, edit: Rebind, alone: bool) -> list[Content] | Reason:
        """What has to be stored for `op` to read `edit.value`; `alone`: no other edit has a part in that."""
        tensor = self.graph.input(op, edit.slot)
        assert tensor is not None
        if tensor.name in self.stored:
            return [Content(tensor, edit.value, Read(op, edit.slot))]
        if alone and isinstance(edit.value, Centred):
            return self._centred(op, {edit.slot: edit.value.place})
        return self._rearranged(tensor, edit)

    # ---- a Centre -----------------------------------------------------------------------

    def _centred(self, op: Op, places: Mapping[str, Place | None]) -> list[Content] | Reason:
        found: list[Content] = []
        for slot, place in places.items():
            tensor = self.graph.input(op, slot)
            if tensor is None:
                continue
            more = self._centred_operand(tensor, place, Read(op, slot))
            if isinstance(more, Reason):
                return more
            found += more
        return found

    def _centred_operand(self, tensor: Tensor, place: Place | None, read: Read) -> list[Content] | Reason:
        if tensor.name in self.stored and tensor.value is not None:
            value = zeros_like(tensor.value) if place is None else Centred(tensor.value, place)
            return [Content(tensor, value, read)]
        maker = self.graph.producer(tensor)
        if maker is None or place is None:
            return _not_stored(tensor, read.op)
        if others := [each.op.name for each in self.graph.readers(tensor) if each != read]:
            return Reason("shared_parameter", f"{tensor.name!r} is also read by {others[0]!r}", tensor.name)
        slot = next(slot for slot, each in self.graph.outputs(maker).items() if each is tensor)
        places = behind(self.constants, maker, slot, place)
        if isinstance(places, Blocked):
            return Reason("no_module", places.reason.message, read.op.name)
        return self._centred(maker, places)

    # ---- anything -----------------------------------------------------------------------

    def _rearranged(self, tensor: Tensor, edit: Rebind) -> list[Content] | Reason:
        """A weight that is read transposed holds the new one transposed."""
        first, read = tensor, Read(edit.op, edit.slot)
        sources: dict[fx.Node, int] = {}
        while first.name not in self.stored:
            maker = self.graph.producer(first)
            if maker is None or maker.kind not in _REARRANGING or len(self.graph.readers(first)) > 1:
                return _not_stored(tensor, edit.op)
            read = Read(maker, "x")
            sources[maker.source] = len(sources)
            first = self.graph.inputs(maker)["x"]
        if first.shape is None or tensor.shape is None:
            return _not_stored(tensor, edit.op)
        shape = tuple(int(n) for n in first.shape)  # type: ignore[arg-type]
        order = _positions(list(reversed(sources)), shape)

        def compute() -> Array:
            flat = np.empty(order.size, exact_array(edit.value).dtype)
            flat[order.reshape(-1)] = exact_array(edit.value).reshape(-1)
            return flat.reshape(shape)

        if order.shape != edit.value.shape:
            return _not_stored(tensor, edit.op)
        return [Content(first, Computed(shape, edit.value.dtype, compute), read)]


def _positions(calls: list[fx.Node], shape: tuple[int, ...]) -> Array:
    """Where each number of a stored tensor comes to lie behind these calls."""
    made: dict[fx.Node, torch.Tensor] = {}
    numbers = torch.arange(int(np.prod(shape))).reshape(shape)
    for node in calls:
        arguments = fx.map_arg((node.args, node.kwargs), lambda each: made.get(each, numbers))
        args, kwargs = arguments
        made[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return np.asarray(made[calls[-1]].numpy())


def _not_stored(tensor: Tensor, op: Op) -> Reason:
    return Reason("no_module", f"{tensor.name!r} is computed, not stored as a parameter", op.name)
