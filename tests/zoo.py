"""Tiny ONNX models, built as data, with every γ, β, bias, mean and variance perturbed.

Default initialisation (γ = 1, β = 0, μ = 0, σ² = 1) hides nearly every folding bug, so `Net` offers no way
to get it: parameters come from a seeded generator, γ with both signs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]


class Net:
    """Builds one graph. Methods add an op and return the name of its output."""

    def __init__(
        self, opset: int = 17, ir: int = 10, seed: int = 0, dtype: Any = np.float32, prefix: str = ""
    ) -> None:
        """`prefix` begins every generated name: a body may not reuse the names around it."""
        self.opset, self.ir, self.dtype, self.prefix = opset, ir, np.dtype(dtype), prefix
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.sparse: list[onnx.SparseTensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.value_info: list[onnx.ValueInfoProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.domains: dict[str, int] = {}
        self._number = 0

    # ---- plumbing -------------------------------------------------------------------------

    def fresh(self, stem: str) -> str:
        self._number += 1
        return f"{self.prefix}{stem}{self._number}"

    def input(self, shape: Sequence[int | str | None] | None, name: str = "x", dtype: Any = None) -> str:
        data_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype or self.dtype))
        self.inputs.append(helper.make_tensor_value_info(name, data_type, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str | None] | None = None, dtype: Any = None) -> str:
        data_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype or self.dtype))
        self.outputs.append(helper.make_tensor_value_info(name, data_type, shape))
        return name

    def constant(self, array: Any, name: str | None = None, *, dtype: Any = None) -> str:
        """An initializer with exactly these numbers."""
        name = name or self.fresh("c")
        content = np.asarray(array).astype(dtype or np.asarray(array).dtype)
        self.initializers.append(numpy_helper.from_array(content, name))
        return name

    def weight(self, *shape: int, name: str | None = None) -> str:
        """An initializer of He-like size."""
        scale = 1 / np.sqrt(max(1, np.prod(shape[1:])))
        return self.constant(
            (self.rng.standard_normal(shape) * scale).astype(self.dtype), name or self.fresh("w")
        )

    def node(self, op_type: str, *inputs: str, outputs: int | Sequence[str] = 1, **attributes: Any) -> Any:
        """Any op; returns the output's name, or a list of them."""
        names = [self.fresh("t") for _ in range(outputs)] if isinstance(outputs, int) else list(outputs)
        name = attributes.pop("name", None) or self.fresh(op_type)
        self.nodes.append(helper.make_node(op_type, inputs, names, name=name, **attributes))
        return names[0] if len(names) == 1 else names

    def graph(self) -> onnx.GraphProto:
        """The graph alone: the body of an If, Loop or Scan."""
        return self.model().graph

    def define(self, name: str, inner: "Net") -> None:
        """Make `inner` the function `local::NAME`; its initializers become Constant nodes."""
        constants = [helper.make_node("Constant", [], [t.name], value=t) for t in inner.initializers]
        inputs, outputs = ([info.name for info in infos] for infos in (inner.inputs, inner.outputs))
        imports = [helper.make_opsetid("", inner.opset)]
        imports += [helper.make_opsetid(domain, version) for domain, version in inner.domains.items()]
        nodes = [*constants, *inner.nodes]
        self.functions.append(helper.make_function("local", name, inputs, outputs, nodes, imports))
        self.domains["local"] = 1

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "zoo", self.inputs, self.outputs, self.initializers, value_info=self.value_info
        )
        graph.sparse_initializer.extend(self.sparse)
        imports = [helper.make_opsetid("", self.opset)]
        imports += [helper.make_opsetid(domain, version) for domain, version in self.domains.items()]
        return helper.make_model(
            graph, opset_imports=imports, ir_version=self.ir, functions=self.functions, producer_name="zoo"
        )

    # ---- layers ---------------------------------------------------------------------------

    def conv(
        self, x: str, cin: int, cout: int, *kernel: int, groups: int = 1, bias: bool = True, **attributes: Any
    ) -> str:
        parameters = [self.weight(cout, cin // groups, *kernel)]
        parameters += [self.weight(cout)] if bias else []
        return self.node("Conv", x, *parameters, group=groups, **attributes)

    def conv_transpose(
        self, x: str, cin: int, cout: int, *kernel: int, groups: int = 1, bias: bool = True, **attributes: Any
    ) -> str:
        parameters = [self.weight(cin, cout // groups, *kernel)]
        parameters += [self.weight(cout)] if bias else []
        return self.node("ConvTranspose", x, *parameters, group=groups, **attributes)

    def batch_norm(
        self, x: str, channels: int, *, epsilon: float = 1e-3, statistics: Any = None, **attributes: Any
    ) -> str:
        """BatchNormalization with γ of both signs; `statistics` overrides (γ, β, μ, σ²) as arrays."""
        return self.node(
            "BatchNormalization", x, *(statistics or self.statistics(channels)), epsilon=epsilon, **attributes
        )

    def statistics(self, channels: int) -> list[str]:
        """Names of perturbed γ, β, μ, σ²."""
        rng = self.rng
        gamma = rng.uniform(0.5, 1.5, channels) * np.where(rng.random(channels) < 0.3, -1, 1)
        arrays = [gamma, rng.normal(size=channels), rng.normal(size=channels), rng.uniform(0.3, 2, channels)]
        return [self.constant(a.astype(self.dtype), self.fresh(s)) for a, s in zip(arrays, "gbmv", strict=True)]


def conv_bn(channels: int = 6, **options: Any) -> onnx.ModelProto:
    """x → Conv 3×3 → BatchNormalization → Relu → y, the textbook pattern."""
    net = Net(**options)
    x = net.input([2, 3, 8, 8])
    y = net.node("Relu", net.batch_norm(net.conv(x, 3, channels, 3, 3), channels), outputs=["y"])
    net.output(y, [2, channels, 6, 6])
    return net.model()


def run(model: onnx.ModelProto | Path, feeds: dict[str, Array] | None = None, seed: int = 0) -> list[Array]:
    """Outputs from ONNX Runtime with every optimisation disabled; random inputs unless given."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    if feeds is None:
        rng = np.random.default_rng(seed)
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
        feeds = {
            entry.name: (rng.standard_normal([n if isinstance(n, int) else 2 for n in entry.shape]) * 3).astype(
                types[entry.type]
            )
            for entry in session.get_inputs()
        }
    return session.run(None, feeds)  # type: ignore[no-any-return]


def relative_error(expected: Sequence[Array], got: Sequence[Array]) -> float:
    """max|Δ| / max|expected| over all outputs, in float64."""
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        wide = a.astype(np.float64)
        worst = max(worst, float(np.abs(b.astype(np.float64) - wide).max() / np.abs(wide).max()))
    return worst


def op_types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def initializer(model: onnx.ModelProto, name: str) -> Array:
    return np.asarray(
        next(numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == name)
    )


FLOAT = TensorProto.FLOAT
