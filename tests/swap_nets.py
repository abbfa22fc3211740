"""Small transformers in ONNX for the tests of `swap`, and inputs for them."""

from typing import Any

import numpy as np
import onnx

from tests.zoo import Net

Array = np.ndarray[Any, Any]

D = 6


class Transformer(Net):
    """Layers with everything off its defaults, in float64 unless asked; γ has both signs."""

    def __init__(self, dtype: Any = np.float64) -> None:
        super().__init__(opset=18, dtype=dtype)

    def numbers(self, array: Array) -> str:
        return self.constant(array, dtype=self.dtype)

    def linear(self, x: str, d_in: int = D, d_out: int = D) -> str:
        """x·W + b; the mean of the columns of W is no zero."""
        weight = self.rng.normal(0.3, 1, (d_in, d_out)) / np.sqrt(d_in)
        bias = self.rng.normal(0.5, 0.5, d_out)
        return str(self.node("Add", self.node("MatMul", x, self.numbers(weight)), self.numbers(bias)))

    def norm(self, x: str, *shape: int, gamma: Array | None = None) -> str:
        own = shape or (D,)
        signs = np.where(self.rng.random(own) < 0.4, -1, 1)
        scale = self.rng.uniform(0.5, 1.5, own) * signs if gamma is None else gamma
        names = self.numbers(scale), self.numbers(self.rng.normal(0.2, 0.5, own))
        return str(self.node("LayerNormalization", x, *names, axis=-len(own), epsilon=1e-3))

    def block(self, x: str, wide: int = D) -> str:
        """x + W₂·tanh(W₁·LN(x) + b₁) + b₂."""
        inner = self.node("Tanh", self.linear(self.norm(x), D, wide))
        return str(self.node("Add", x, self.linear(inner, wide, D)))

    def table(self, rows: int = 12) -> str:
        return self.numbers(self.rng.normal(0.4, 1, (rows, D)))

    def looked_up(self, table: str, name: str = "ids") -> str:
        return str(self.node("Gather", table, self.input([2, 5], name, np.int64)))

    def tokens(self, d: int = D) -> str:
        return self.input([2, 5, d])

    def result(self, *names: str) -> onnx.ModelProto:
        for name in names:
            self.output(name)
        return onnx.shape_inference.infer_shapes(self.model(), strict_mode=True)


def feeds_of(model: onnx.ModelProto) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    feeds: dict[str, Array] = {}
    for info in model.graph.input:
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        whole = info.type.tensor_type.elem_type == onnx.TensorProto.INT64
        feeds[info.name] = (
            rng.integers(0, 12, shape)
            if whole
            else rng.normal(0.3, 1, shape).astype(
                onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
            )
        )
    return feeds
