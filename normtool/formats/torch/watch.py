"""Runs PyTorch models with norms laid open, as `formats/onnx/watch.py` does ONNX models.

The exported program is interpreted, op by op, in the model's own precision and on copies of what it stores.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from normtool.drift import InputSums, PairSums, Tap, Watched
from normtool.errors import RuntimeRefused
from normtool.formats.torch.copies import full_precision
from normtool.formats.torch.export import first_line, undisturbed
from normtool.formats.torch.input_sets import find_source, wanted_inputs
from normtool.formats.torch.interface import aligned, named_outputs
from normtool.formats.torch.model import TorchModel
from normtool.formats.torch.sides import Feed
from normtool.formats.torch.tensors import to_numpy
from normtool.formats.torch.torch_side import TorchSide
from normtool.graph import Scope, Tensor
from normtool.samples import Data
from normtool.values import Array


@dataclass(frozen=True, eq=False)
class Watch:
    """All runs of one swap, on the same data."""

    data: Data

    def can_see(self, model: TorchModel, tensor: Tensor) -> bool:
        return tensor.scope == Scope() and tensor.value is None

    def inputs(self, model: TorchModel, norms: Sequence[Watched]) -> list[InputSums]:
        """What norms read, summed up in one pass over the data.

        Raises RuntimeRefused (the model raises), UsageError (samples that do not fit it).
        """
        sums = [InputSums.of(norm) for norm in norms]
        runner = _Runner(model, self.data.device, [norm.tensor for norm in norms])
        for feed in self._feeds(model):
            seen, _ = runner.run(feed)
            for norm, each in zip(norms, sums, strict=True):
                each.see(seen[norm.tensor])
        return sums

    def pair(self, before: TorchModel, after: TorchModel, taps: Sequence[Tap]) -> PairSums:
        """How far two models differ at norms and at outputs. Raises what `inputs` raises."""
        sums = PairSums.of(taps)
        first = _Runner(before, self.data.device, [tap.before for tap in taps])
        second = _Runner(after, self.data.device, [tap.after for tap in taps])
        for feed in self._feeds(before):
            (seen, outputs), (moved, others) = first.run(feed), second.run(feed)
            sums.see(taps, seen, moved)
            sums.see_outputs(outputs, list(others.values()))
        return sums

    def _feeds(self, model: TorchModel) -> Iterator[Feed]:
        data = self.data
        if data.samples is not None:
            yield from data.batches(wanted_inputs(model))
            return
        source = find_source((model,), data.inputs, data.shapes, data.inputs_file, data.seed)
        for alternatives in source.sets(source.bases[0], data.seed):
            yield alternatives[-1]  # the program may know the size of its example alone


class _Runner:
    """A model's program, of which some tensors are kept."""

    def __init__(self, model: TorchModel, device: str, names: Sequence[str]) -> None:
        assert model.exported is not None
        self.program: ExportedProgram = model.exported
        self.device = torch.device(device)
        self.names = frozenset(names)
        self.side = TorchSide(model, "the model", self.device)

    def run(self, feed: Feed) -> tuple[Mapping[str, Array], dict[str, Array]]:
        """(the tensors to be kept, by name, and the outputs)."""
        self.side.adopt(list(feed))
        example = self.side.call(feed)
        interpreter = _Interpreter(self.program.graph_module, self.names)
        try:
            with undisturbed(), full_precision(), torch.no_grad():
                results = interpreter.run(*self._arguments(aligned(self.program, example)))
        except Exception as error:  # the model's own code
            raise RuntimeRefused(f"the model does not run on this data: {first_line(error)}") from None
        specs = self.program.graph_signature.output_specs
        wanted = [r for r, s in zip(results, specs, strict=True) if s.kind is OutputKind.USER_OUTPUT]
        tensors, _ = named_outputs(pytree.tree_unflatten(wanted, self.program.call_spec.out_spec))
        return interpreter.kept, {name: to_numpy(tensor.detach()) for name, tensor in tensors.items()}

    def _arguments(self, flat: list[Any]) -> list[Any]:
        """What the graph takes, in its order: stored tensors are copies, as ops may write to them."""
        inputs, found = iter(flat), []
        for spec in self.program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                found.append(next(inputs))
            elif spec.target in self.program.state_dict:
                found.append(self._own(self.program.state_dict[spec.target]))
            elif spec.target in self.program.constants:
                found.append(self._own(self.program.constants[spec.target]))
            else:
                raise RuntimeRefused("the program orders side effects by tokens; it cannot be looked into")
        return found

    def _own(self, value: Any) -> Any:
        return value.detach().to(self.device, copy=True) if isinstance(value, torch.Tensor) else value


class _Interpreter(fx.Interpreter):
    """Keeps what nodes of some names put out; `NAME.1` is the second of several."""

    def __init__(self, module: fx.GraphModule, names: frozenset[str]) -> None:
        super().__init__(module)
        self.names = names
        self.kept: dict[str, Array] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            several = isinstance(result, list | tuple)
            named = {f"{n.name}.{i}": each for i, each in enumerate(result)} if several else {n.name: result}
            self.kept |= {name: _copy(named[name]) for name in self.names & named.keys()}
        return result


def _copy(tensor: torch.Tensor) -> Array:
    """Ops behind it may write to its memory."""
    return to_numpy(tensor.detach()).copy()
