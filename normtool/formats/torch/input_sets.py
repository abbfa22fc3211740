"""What to feed a validation that PyTorch takes part in.

The structure, shapes and dtypes are those of an example: the user's, the model's own, or what an ONNX graph
says. Its values are replaced by ones that would show a difference, where that cannot hurt: masks stay as they
are, integers stay inside the tables they index or between the example's smallest and largest.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from normtool.errors import UsageError
from normtool.formats.torch.export import Example, leaves
from normtool.formats.torch.interface import interface_of_example, interface_of_program
from normtool.formats.torch.model import TorchModel
from normtool.formats.torch.sources import generated, need_example, to_example
from normtool.formats.torch.tensors import DTYPES, to_numpy
from normtool.graph import ModelGraph, Role, Tensor
from normtool.inputs import DISTRIBUTIONS, InputSpec, Shapes, attempts, generate, model_inputs
from normtool.inputs_file import check_given, read_inputs
from normtool.values import Array, is_float

if TYPE_CHECKING:
    import torch

    from normtool.formats.onnx.model import OnnxModel

Model: TypeAlias = "TorchModel | OnnxModel"
Feed: TypeAlias = Mapping[str, Array]


@dataclass(frozen=True, eq=False)
class Source:
    """`bases` to try in turn; the first that runs sets the shapes."""

    bases: list[Feed]
    #: the values of the base are the user's own, and worth a set of their own
    given: bool = False
    #: and no others are wanted
    only: bool = False
    #: lengths of the tables that integer inputs index
    bounds: Mapping[str, int] = field(default_factory=dict)
    #: may the batch have another size?
    varies: bool = False

    def sets(self, base: Feed, seed: int) -> list[list[Feed]]:
        """Input sets, each as alternatives of which the first that runs is taken."""
        found: list[list[Feed]] = [[base]] if self.given else []
        for number, distribution in enumerate(() if self.only else DISTRIBUTIONS):
            shapes = [_with_larger_batch(base), base] if self.varies and number == 1 else [base]
            found.append([self._drawn(shape, distribution, seed + number) for shape in shapes])
        return found

    def _drawn(self, base: Feed, distribution: str, seed: int) -> Feed:
        return {
            name: _drawn(name, example, distribution, self.bounds.get(name), seed)
            for name, example in base.items()
        }


def find_source(
    pair: Sequence[Model], inputs: Any, shapes: Shapes, inputs_file: Path | None, seed: int
) -> Source:
    """Raises UsageError where nothing tells the inputs, or where they are not the model's."""
    if inputs_file is not None:
        return Source([_from_file(pair[0], inputs_file)], given=True, only=True)
    torch_side = next(model for model in pair if isinstance(model, TorchModel))
    example = to_example(inputs)
    if example is not None:
        bases = [_reshaped(_named(torch_side, example), shapes)]
    elif (
        side := next((m for m in pair if isinstance(m, TorchModel) and m.example is not None), None)
    ) is not None:
        assert side.example is not None
        bases = [_reshaped(_named(side, side.example), shapes)]
    elif (described := next((m for m in pair if _tells_shapes(m)), None)) is not None:
        tried = attempts(described.graph, seed, shapes)
        bases = [{spec.name: generate(spec) for spec in specs} for specs in tried]
    elif shapes:
        bases = [
            {name: to_numpy(generated(shape, _torch_dtype(dtype))) for name, (shape, dtype) in shapes.items()}
        ]
    else:
        need_example(torch_side)
        raise UsageError("nothing tells what to call the models with; give example inputs (--input NAME=SHAPE)")
    bounds = _bounds([model.graph for model in pair], list(bases[0]), seed)
    varies = all(_may_vary(model) for model in pair)
    return Source(list(bases), given=example is not None, bounds=bounds, varies=varies)


def _torch_dtype(name: str | None) -> "torch.dtype":
    return next(dtype for dtype, same in DTYPES.items() if same.name == (name or "float32"))


def _tells_shapes(model: Model) -> bool:
    """A program or an ONNX graph; a module has none before somebody calls it."""
    return bool(model_inputs(model.graph)) and getattr(model, "module", None) is None


def _named(model: TorchModel, example: Example) -> Feed:
    """The tensors of an example under the names of the model's inputs."""
    if model.module is not None:
        interface, tensors = interface_of_example(model.module, example)
        return {name: to_numpy(tensor) for name, tensor in zip(interface.tensors, tensors, strict=True)}
    assert model.program is not None
    names = interface_of_program(model.program).tensors
    arrays = [
        to_numpy(leaf) for leaf in leaves((example.args, dict(example.kwargs))) if hasattr(leaf, "detach")
    ]
    if not example.args and set(example.kwargs) == set(names):
        return dict(zip(example.kwargs, arrays, strict=True))
    if len(arrays) != len(names):
        raise UsageError(f"{len(arrays)} inputs were given; the program takes {len(names)}: {', '.join(names)}")
    return dict(zip(names, arrays, strict=True))


def _reshaped(base: Feed, shapes: Shapes) -> Feed:
    strangers = set(shapes) - set(base)
    if strangers:
        raise UsageError(f"the model has no input {strangers.pop()!r}; it has {', '.join(base)}")
    found = dict(base)
    for name, (shape, dtype) in shapes.items():
        found[name] = np.resize(base[name], shape).astype(dtype or base[name].dtype)
    return found


def _from_file(model: Model, path: Path) -> Feed:
    arrays = read_inputs(path)
    wanted = wanted_inputs(model)
    for tensor in wanted:
        check_given(path, tensor, arrays.get(tensor.name))
    return {tensor.name: arrays[tensor.name] for tensor in wanted} or arrays


def wanted_inputs(model: Model) -> list[Tensor]:
    """The model's inputs; those of a module have the example's dtypes and any shape."""
    if not isinstance(model, TorchModel) or model.module is None:
        return model_inputs(model.graph)
    base = _named(model, model.example) if model.example is not None else {}
    return [Tensor(name, ModelGraph.MAIN, Role.INPUT, array.dtype, None) for name, array in base.items()]


def _bounds(graphs: Sequence[ModelGraph], names: Sequence[str], seed: int) -> dict[str, int]:
    """Lengths of the tables that the inputs index; two rows are what `attempts` says when it knows of none."""
    found: dict[str, int] = {}
    for graph in graphs:
        if not (inputs := model_inputs(graph)):
            continue
        by_name = {tensor.name for tensor in inputs} == set(names)
        for position, spec in enumerate(attempts(graph, seed)[0]):
            name = spec.name if by_name else names[position] if position < len(names) else ""
            if spec.high > 2:
                found[name] = min(spec.high, found.get(name, spec.high))
    return found


def _may_vary(model: Model) -> bool:
    """Does nothing fix the size of the batch? A module fixes it in its code at most."""
    if isinstance(model, TorchModel) and model.module is not None:
        return True
    # a program has no dtype for the plain numbers that were baked into it
    shapes = [tensor.shape for tensor in model_inputs(model.graph) if tensor.dtype is not None]
    return any(shape is None or (shape and not isinstance(shape[0], int)) for shape in shapes)


def _with_larger_batch(base: Feed) -> Feed:
    """One more along axis 0 of every array that is as long there as the first."""
    batch = next((array.shape[0] for array in base.values() if array.ndim), 0)
    return {
        name: array.take(np.arange(batch + 1) % batch, axis=0)
        if batch and array.ndim and array.shape[0] == batch
        else array
        for name, array in base.items()
    }


def _drawn(name: str, example: Array, distribution: str, bound: int | None, seed: int) -> Array:
    if _stays(name, example, bound):
        return example
    spec = InputSpec(name, example.dtype.name, example.shape, distribution, high=bound or 2, seed=seed)
    if is_float(example.dtype) or bound is not None:
        return generate(spec)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    low, high = int(example.min()), int(example.max())
    return np.asarray(rng.integers(low, high, example.shape, endpoint=True)).astype(example.dtype)


def _stays(name: str, example: Array, bound: int | None) -> bool:
    """Masks, and what nobody can draw at random."""
    if example.size == 0 or example.dtype.kind in "bc" or "mask" in name.lower():
        return True
    if bound is not None:
        return False
    values = set(np.unique(example.astype(np.float64)).tolist()) if example.size < _LARGE else set()
    return values == {0.0, 1.0} or (not is_float(example.dtype) and bool(values) and values <= {0.0, 1.0})


#: Elements above which nobody looks whether they are all 0 and 1.
_LARGE = 1 << 24
