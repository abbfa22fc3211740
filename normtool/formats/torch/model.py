"""A PyTorch model as normtool holds it: the user's module or program, its graph, what it stores."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from normtool.formats.torch.export import Example, ExportFailed, export
from normtool.formats.torch.modules import norm_modules
from normtool.formats.torch.program_norms import norms_of_program
from normtool.formats.torch.read import read_program
from normtool.formats.torch.state import State, add_to_graph, census, state_of_module, state_of_program
from normtool.formats.torch.tensors import to_numpy
from normtool.graph import ModelGraph
from normtool.parameters import Census

#: Elements of each tensor that go into the fingerprint.
_SAMPLE = 64


@dataclass(eq=False)
class TorchModel:
    """`module` or `program` is the user's own object; `exported` is the program that `graph` was read from."""

    graph: ModelGraph
    state: State
    module: nn.Module | None = None
    program: ExportedProgram | None = None
    exported: ExportedProgram | None = None
    example: Example | None = None
    path: Path | None = None
    sha256: str | None = None
    #: of a rewritten model: (op of the original or edit that made it, slot) → the parameter that is there now
    places: dict[tuple[Any, str], str] = field(default_factory=dict)
    #: of a rewritten module: name of a tensor in the original → its name now, where that is another
    renamed: dict[str, str] = field(default_factory=dict)

    @property
    def format(self) -> str:
        return "module" if self.module is not None else "pt2"

    @cached_property
    def census(self) -> Census:
        return census(self.state)

    @property
    def fingerprint(self) -> str:
        """Changes when a tensor does, as far as samples of it show, and when the dataflow does."""
        digest = hashlib.sha256()
        for stored in self.state.stored:
            digest.update(repr((stored.names, tuple(stored.tensor.shape), stored.tensor.dtype)).encode())
            digest.update(_sample(stored.tensor))
        for op in self.graph.ops:
            digest.update(f"{op.name}:{op.spelling};".encode())
        return digest.hexdigest()[:16]


def _sample(tensor: torch.Tensor) -> bytes:
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
        return b""
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    ends = torch.cat([flat[:_SAMPLE], flat[-_SAMPLE:]])
    return to_numpy(ends).tobytes()


def read_module(module: nn.Module, example: Example | None, why_not: str = "") -> TorchModel:
    """A live module. Nothing in it changes.

    Without `example`, or where export fails, the norms and counts are those of the modules, and
    `graph.no_dataflow` says why there is no more.
    """
    state = state_of_module(module)
    program: ExportedProgram | None = None
    if example is not None:
        try:
            program = export(module, example, hooks=False)
        except ExportFailed as error:
            why_not = f"torch.export fails: {error}"
    graph = ModelGraph()
    graph.called_by_code = True
    tensors = add_to_graph(graph, state)
    _note_state(graph, state)
    if program is None:
        graph.no_dataflow = why_not or "no example inputs were given"
        graph.diagnostics.append(("no_dataflow", graph.no_dataflow, ""))
        graph.norm_modules = list(norm_modules(module, tensors, None))
    else:
        read_program(program, graph, tensors, first_paths(module))
        calls = _calls(graph)
        graph.norm_modules = list(norm_modules(module, tensors, lambda path: calls[path]))
    return TorchModel(graph, state, module=module, exported=program, example=example)


def first_paths(module: nn.Module) -> dict[str, str]:
    """Every path of a module → its first."""
    first: dict[int, str] = {}
    every: dict[str, str] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        every[path] = first.setdefault(id(child), path)
    return every


def _calls(graph: ModelGraph) -> Counter[str]:
    """How often each module's own code runs ops."""
    return Counter(path for path, _ in {(op.owner, op.call) for op in graph.ops})


def _note_state(graph: ModelGraph, state: State) -> None:
    if state.uninitialised:
        count = len(state.uninitialised)
        message = (
            f"{count} lazy parameters and buffers have no size until the first forward; they are in no count"
        )
        graph.diagnostics.append(("uninitialised", message, state.uninitialised[0]))


def read_exported(program: ExportedProgram, path: Path | None = None, sha256: str | None = None) -> TorchModel:
    """An exported program, from memory or from a .pt2 file."""
    state = state_of_program(program)
    graph = ModelGraph()
    tensors = add_to_graph(graph, state)
    read_program(program, graph, tensors, {})
    graph.norm_modules = list(norms_of_program(graph, tensors))
    example = Example(*program.example_inputs) if program.example_inputs is not None else None
    return TorchModel(
        graph, state, program=program, exported=program, example=example, path=path, sha256=sha256
    )
