"""Memory that training takes beside the activations: weights, gradients, optimizer state.

Per learnable element: SGD holds 2 numbers (weight, gradient), momentum 3, Adam and AdamW 4 (two moments:
Kingma and Ba, 2015, algorithm 1). A frozen element and a buffer hold 1.
"""

from dataclasses import dataclass

from normtool.parameters import Census

#: optimizer → numbers of state per learnable element
STATE = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes, in the dtype the model stores each parameter in."""

    optimizer: str
    weights: int
    gradients: int
    optimizer_state: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer_state + self.buffers

    def rows(self) -> list[tuple[str, int]]:
        return [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer state", self.optimizer_state),
            ("buffers", self.buffers),
            ("total", self.total),
        ]

    def to_dict(self) -> dict[str, int | str]:
        return {**vars(self), "total": self.total}


def training_memory(census: Census, optimizer: str) -> TrainingMemory:
    """Raises KeyError for an optimizer that is not in `STATE`."""
    learnable = census.learnable_bytes
    return TrainingMemory(
        optimizer,
        weights=learnable + census.frozen_bytes,
        gradients=learnable,
        optimizer_state=STATE[optimizer] * learnable,
        buffers=census.buffer_bytes,
    )
