"""The data on which drift is predicted and measured: generated, a user's inputs, or samples to calibrate on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from normtool.errors import UsageError
from normtool.graph import Tensor
from normtool.inputs import Shapes, fits
from normtool.inputs_file import read_inputs
from normtool.values import Array

#: Samples that run together, where the model leaves the size of a batch open.
BATCH = 8


@dataclass(frozen=True, eq=False)
class Data:
    """`samples` are arrays by input name with the samples along axis 0; without, inputs are generated, or those
    of `inputs_file` or `inputs`."""

    samples: Mapping[str, Array] | None = None
    #: what a message calls the samples
    source: str = "generated inputs"
    inputs: Any = None
    inputs_file: Path | None = None
    shapes: Shapes = field(default_factory=dict)
    device: str = "cpu"
    seed: int = 0

    @classmethod
    def of(cls, calibrate: Any, **running: Any) -> "Data":
        """`calibrate`: a path, arrays by name, or None. Raises UsageError for what is none of these."""
        given = {name: value for name, value in running.items() if value is not None}
        if calibrate is None:
            stated = "the inputs given" if given.get("inputs") is not None else cls.source
            return cls(None, str(given.get("inputs_file", stated)), **given)
        if isinstance(calibrate, Mapping):
            arrays = {str(name): np.asarray(array) for name, array in calibrate.items()}
            return cls(arrays, "the samples to calibrate on", **given)
        if not isinstance(calibrate, str | Path):
            raise UsageError(
                f"calibrate takes a path of an .npz file or arrays by name, not a {type(calibrate).__name__}"
            )
        return cls(read_inputs(Path(calibrate)), str(calibrate), **given)

    def batches(self, inputs: Sequence[Tensor]) -> list[dict[str, Array]]:
        """The samples, as many at a time as the model takes.

        An input whose axis 0 is fixed sets the size of the batch; where none is, `BATCH` samples run together.
        An array that is just what a fixed input wants is fed to every batch. Raises UsageError, in one line,
        for arrays that are missing, of another dtype or shape, or not of one number of samples.
        """
        assert self.samples is not None
        arrays = {tensor.name: self._checked(tensor) for tensor in inputs} or dict(self.samples)
        fixed = {tensor.name: _batch(tensor) for tensor in inputs}
        parts = {
            name: len(array) // size
            for name, array in arrays.items()
            if (size := fixed.get(name)) and len(array) > size
        }
        open_ended = [name for name, array in arrays.items() if array.ndim and fixed.get(name) is None]
        counts = {name: parts.get(name, len(arrays[name])) for name in (*parts, *open_ended)}
        if parts:
            count = next(iter(parts.values()))
            self._agree({name: n for name, n in counts.items() if name in parts})
        else:
            self._agree(counts)
            samples = next(iter(counts.values()), 1)
            count = -(-samples // BATCH)
        if parts and any(len(arrays[name]) % count for name in open_ended):
            self._agree(counts)
        return [
            {
                name: np.array_split(array, count)[number] if name in counts else array
                for name, array in arrays.items()
            }
            for number in range(count)
        ]

    def _checked(self, tensor: Tensor) -> Array:
        assert self.samples is not None
        name, array = tensor.name, self.samples.get(tensor.name)
        if array is None:
            raise UsageError(f"{self.source}: lacks the model's input {name!r}")
        if tensor.dtype is not None and array.dtype != tensor.dtype:
            raise UsageError(f"{self.source}: {name!r} is {array.dtype}, the model wants {tensor.dtype}")
        size = _batch(tensor)
        shape = array.shape if size is None or not array.ndim else (size, *array.shape[1:])
        if not fits(shape, tensor.shape) or (array.ndim and not len(array)):
            raise UsageError(
                f"{self.source}: {name!r} has shape {array.shape}, the model wants {tensor.shape}, "
                "samples along axis 0"
            )
        if size and len(array) % size:
            raise UsageError(
                f"{self.source}: {name!r} has {len(array)} samples, the model takes {size} at a time"
            )
        return array

    def _agree(self, counts: Mapping[str, int]) -> None:
        if len(set(counts.values())) > 1:
            stated = ", ".join(f"{name!r} {n}" for name, n in counts.items())
            raise UsageError(f"{self.source}: the arrays do not have the same number of samples ({stated})")


def _batch(tensor: Tensor) -> int | None:
    """The length of axis 0 where the model fixes it."""
    length = tensor.shape[0] if tensor.shape else None
    return length if isinstance(length, int) and length > 0 else None
