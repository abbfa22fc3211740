"""Norms that are spelled out: each spelling is run, and compared with what its form says that it computes.

ε is large, x has a mean, γ has both signs: a wrong axis, ε, correction, γ or β is off by far more than a
rounding. Look-alikes are in the second half, each with what it is taken for.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import sqrt
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException
from torch import Tensor, nn

import normtool
from normtool.constants import Constants
from normtool.detect import find_norms
from normtool.formats.onnx.read import read_proto
from normtool.forms import NormForm, norm_forms
from normtool.graph import ModelGraph
from normtool.inputs import attempts, generate
from normtool.values import to_array
from tests import zoo
from tests.conftest import CORPUS, corpus_cases

Array = np.ndarray[Any, Any]
Build = Callable[["Spelling", str], str]

EPS = float(np.float32(0.3))
D = 6
SHAPE = (4, 5, D)
IMAGE = (3, D, 4, 5)


# ---- what a form says ---------------------------------------------------------------------------------


def defined(form: NormForm, x: Array, weight: Array | None, bias: Array | None) -> Array:
    """The form's own definition, in float64."""
    x, shape, axes = x.astype(np.float64), x.shape, form.axes
    if form.groups:
        x, axes = x.reshape(shape[0], form.groups, -1), (2,)
    count = np.prod([x.shape[axis] for axis in axes])
    centred = form.kind not in ("rms_norm", "lp_norm")
    z = x - x.mean(axes, keepdims=True) if centred else x
    total = (np.abs(z) ** form.p).sum(axes, keepdims=True)
    moment = total if form.kind == "lp_norm" else total / (count - form.unbiased)
    eps = form.eps or 0.0
    if form.eps_mode == "inside":
        root = (moment + eps) ** (1 / form.p)
    else:
        root = moment ** (1 / form.p)
        root = root + eps if form.eps_mode == "outside" else np.maximum(root, eps)
    y = form.gain * (z / root).reshape(shape)
    if weight is not None:
        y = y * (weight.astype(np.float64) + form.weight_offset)
    return y if bias is None else y + bias.astype(np.float64)


def facts(form: NormForm) -> dict[str, Any]:
    """What is not as in nearly every norm."""
    plain = {
        "eps_mode": "inside",
        "weight_offset": 0.0,
        "gain": 1.0,
        "unbiased": False,
        "compute_dtype": None,
        "cast_before_weight": None,
        "groups": None,
        "p": 2,
    }
    found = {name: getattr(form, name) for name in plain}
    return {name: value for name, value in found.items() if value != plain[name]}


# ---- ONNX ---------------------------------------------------------------------------------------------


class Spelling(zoo.Net):
    """A net with the words that norms are spelled in."""

    def value(self, number: float, shape: tuple[int, ...] = (), dtype: Any = None) -> str:
        return self.constant(np.full(shape, number, dtype or self.dtype))

    def reduce(self, op_type: str, x: str, *axes: int, keepdims: int = 1) -> str:
        since = 13 if op_type == "ReduceSum" else 18
        if self.opset >= since:
            return str(self.node(op_type, x, self.constant(np.array(axes, np.int64)), keepdims=keepdims))
        return str(self.node(op_type, x, axes=list(axes), keepdims=keepdims))

    def mean(self, x: str, *axes: int, keepdims: int = 1) -> str:
        return self.reduce("ReduceMean", x, *(axes or (-1,)), keepdims=keepdims)

    def square(self, x: str) -> str:
        return str(self.node("Pow", x, self.value(2)))

    def centred(self, x: str, *axes: int) -> str:
        return str(self.node("Sub", x, self.mean(x, *axes)))

    def plus_eps(self, x: str, eps: float = EPS) -> str:
        return str(self.node("Add", x, self.value(eps)))

    def root(self, x: str, *axes: int) -> str:
        """√(mean(x²) + ε)."""
        return str(self.node("Sqrt", self.plus_eps(self.mean(self.square(x), *axes))))

    def gamma(self, *shape: int) -> str:
        signs = np.where(self.rng.random(shape or (D,)) < 0.4, -1, 1)
        return self.constant((self.rng.uniform(0.5, 1.5, shape or (D,)) * signs).astype(self.dtype))

    def beta(self, *shape: int) -> str:
        return self.constant(self.rng.normal(size=shape or (D,)).astype(self.dtype))

    def affine(self, x: str, *shape: int) -> str:
        return str(self.node("Add", self.node("Mul", x, self.gamma(*shape)), self.beta(*shape)))

    def cast(self, x: str, dtype: Any) -> str:
        return str(self.node("Cast", x, to=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))))


def built(
    build: Build, shape: tuple[int, ...] = SHAPE, opset: int = 17, dtype: Any = np.float32
) -> onnx.ModelProto:
    """Relu(x) → the norm → Identity: neither x nor y is the graph's own."""
    net = Spelling(opset=opset, dtype=dtype)
    x = net.node("Add", net.input(shape, "input"), net.value(0))
    y = net.node("Identity", build(net, x), outputs=["output"])
    net.outputs.append(onnx.ValueInfoProto(name=y))
    return net.model()


def forms_of(model: onnx.ModelProto) -> tuple[list[NormForm], ModelGraph]:
    graph = read_proto(model).graph
    return norm_forms(graph), graph


def check(form: NormForm, graph: ModelGraph, model: onnx.ModelProto, tolerance: float = 2e-5) -> None:
    """ONNX Runtime puts out at y what the form says of x."""
    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    del seen.graph.output[:]
    seen.graph.output.extend(onnx.ValueInfoProto(name=t.name) for t in (form.x, form.y))
    x, y = zoo.run(seen, feeds(model))
    weights = [arrays(graph, tensor) for tensor in (form.weight, form.bias)]
    expected = defined(form, x, *weights)
    assert y.shape == x.shape
    error = np.abs(expected - y.astype(np.float64)).max() / np.abs(expected).max()
    assert error < tolerance, error


def arrays(graph: ModelGraph, tensor: Any) -> Array | None:
    return None if tensor is None else to_array(Constants(graph).value(tensor))


def feeds(model: onnx.ModelProto) -> dict[str, Array]:
    (entry,) = model.graph.input
    shape = [dim.dim_value or 2 for dim in entry.type.tensor_type.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)
    rng = np.random.default_rng(3)
    scale = rng.uniform(0.2, 0.8, [*shape[:-1], 1])
    return {entry.name: (rng.standard_normal(shape) * scale + 0.7).astype(dtype)}


@dataclass(frozen=True)
class Case:
    """`facts`: what is not as in nearly every norm. `affine`: does it have γ, β."""

    build: Build
    kind: str = "layer_norm"
    axes: tuple[int, ...] = (2,)
    eps: float = EPS
    affine: str = "γβ"
    shape: tuple[int, ...] = SHAPE
    opset: int = 17
    dtype: Any = np.float32
    facts: dict[str, Any] = field(default_factory=dict)
    observed: int = 0


def _pytorch(n: Spelling, x: str, **options: Any) -> str:
    z = n.centred(x)
    return n.affine(n.node("Div", z, n.root(z)))


def _two_differences(n: Spelling, x: str) -> str:
    return n.affine(n.node("Div", n.centred(x), n.root(n.centred(x))))


def _one_mean_two_differences(n: Spelling, x: str) -> str:
    mean = n.mean(x)
    return n.affine(n.node("Div", n.node("Sub", x, mean), n.root(n.node("Sub", x, mean))))


def _mul_by_itself(n: Spelling, x: str) -> str:
    z = n.centred(x)
    variance = n.mean(n.node("Mul", z, z))
    return n.affine(n.node("Div", z, n.node("Sqrt", n.plus_eps(variance))))


def _reciprocal(n: Spelling, x: str) -> str:
    z = n.centred(x)
    return n.affine(n.node("Mul", z, n.node("Reciprocal", n.root(z))))


def _one_over(n: Spelling, x: str) -> str:
    z = n.centred(x)
    return n.affine(n.node("Mul", n.node("Div", n.value(1), n.root(z)), z))


def _root_of_reciprocal(n: Spelling, x: str) -> str:
    z = n.centred(x)
    inverse = n.node("Reciprocal", n.plus_eps(n.mean(n.square(z))))
    return n.affine(n.node("Mul", z, n.node("Sqrt", inverse)))


def _power(exponent: float) -> Build:
    def build(n: Spelling, x: str) -> str:
        z = n.centred(x)
        root = n.node("Pow", n.plus_eps(n.mean(n.square(z))), n.value(exponent))
        return n.affine(n.node("Mul" if exponent < 0 else "Div", z, root))

    return build


def _commuted(n: Spelling, x: str) -> str:
    z = n.centred(x)
    root = n.node("Sqrt", n.node("Add", n.value(EPS), n.mean(n.square(z))))
    return str(n.node("Add", n.beta(), n.node("Mul", n.gamma(), n.node("Div", z, root))))


def _negated_mean(n: Spelling, x: str) -> str:
    z = n.node("Add", n.node("Neg", n.mean(x)), x)
    return n.affine(n.node("Div", z, n.root(z)))


def _mean_minus_x(n: Spelling, x: str) -> str:
    """The variance does not see the sign."""
    mean = n.mean(x)
    root = n.root(n.node("Sub", mean, x))
    return n.affine(n.node("Div", n.node("Sub", x, mean), root))


def _weight_first(n: Spelling, x: str) -> str:
    z = n.centred(x)
    return str(n.node("Add", n.node("Div", n.node("Mul", n.gamma(), z), n.root(z)), n.beta()))


def _flax(n: Spelling, x: str) -> str:
    """E[x²] − E[x]², not below 0; γ goes into 1/σ."""
    mean = n.mean(x)
    square = n.node("Sub", n.mean(n.node("Mul", x, x)), n.node("Mul", mean, mean))
    variance = n.node("Max", square, n.value(0))
    factor = n.node("Mul", n.node("Reciprocal", n.node("Sqrt", n.plus_eps(variance))), n.gamma())
    return str(n.node("Add", n.node("Mul", n.node("Sub", x, mean), factor), n.beta()))


def _tensorflow(n: Spelling, x: str) -> str:
    """tf.nn.batch_normalization over the last axis: x·(γ/σ) + (β − μ·(γ/σ))."""
    mean = n.mean(x)
    variance = n.mean(n.square(n.node("Sub", x, mean)))
    factor = n.node("Mul", n.node("Reciprocal", n.node("Sqrt", n.plus_eps(variance))), n.gamma())
    shift = n.node("Sub", n.beta(), n.node("Mul", mean, factor))
    return str(n.node("Add", n.node("Mul", x, factor), shift))


def _tensorflow_negated(n: Spelling, x: str) -> str:
    mean = n.mean(x)
    variance = n.mean(n.square(n.node("Sub", mean, x)))
    factor = n.node("Mul", n.gamma(), n.node("Div", n.value(1), n.node("Sqrt", n.plus_eps(variance))))
    shift = n.node("Add", n.node("Neg", n.node("Mul", factor, mean)), n.beta())
    return str(n.node("Add", shift, n.node("Mul", x, factor)))


def _sums(divide: str) -> Build:
    def build(n: Spelling, x: str) -> str:
        def mean(t: str) -> str:
            total = n.reduce("ReduceSum", t, -1)
            by = n.value(1 / D) if divide == "Mul" else n.value(D)
            return str(n.node(divide, total, by))

        z = n.node("Sub", x, mean(x))
        return n.affine(n.node("Div", z, n.node("Sqrt", n.plus_eps(mean(n.square(z))))))

    return build


def _lost_axes(n: Spelling, x: str) -> str:
    """Statistics without the axis, which comes back by an Unsqueeze."""
    axis = n.constant(np.array([2], np.int64))
    mean = n.mean(x, 2, keepdims=0)
    square = n.node("Sub", n.mean(n.square(x), 2, keepdims=0), n.square(mean))
    inverse = n.node("Reciprocal", n.node("Sqrt", n.plus_eps(square)))
    z = n.node("Sub", x, n.node("Unsqueeze", mean, axis))
    return n.affine(n.node("Mul", z, n.node("Unsqueeze", inverse, axis)))


def _without_affine(n: Spelling, x: str) -> str:
    z = n.centred(x)
    return str(n.node("Div", z, n.root(z)))


def _without_bias(n: Spelling, x: str) -> str:
    return str(n.node("Mul", _without_affine(n, x), n.gamma()))


def _without_weight(n: Spelling, x: str) -> str:
    return str(n.node("Add", _without_affine(n, x), n.beta()))


def _computed_weight(n: Spelling, x: str) -> str:
    """γ and β come out of other constants."""
    gamma = n.node("Squeeze", n.gamma(1, D), n.constant(np.array([0], np.int64)))
    return str(n.node("Mul", _without_affine(n, x), gamma))


def _eps_outside(n: Spelling, x: str) -> str:
    z = n.centred(x)
    return n.affine(n.node("Div", z, n.plus_eps(n.node("Sqrt", n.mean(n.square(z))))))


def _eps_clamps(n: Spelling, x: str) -> str:
    z = n.centred(x)
    return n.affine(n.node("Div", z, n.node("Max", n.node("Sqrt", n.mean(n.square(z))), n.value(EPS))))


def _eps_clamps_inside(n: Spelling, x: str) -> str:
    z = n.centred(x)
    return n.affine(n.node("Div", z, n.node("Sqrt", n.node("Max", n.mean(n.square(z)), n.value(EPS)))))


def _unbiased(n: Spelling, x: str) -> str:
    """As torch exports x.var(-1): the mean, times N, over N − 1."""
    z = n.centred(x)
    variance = n.node("Div", n.node("Mul", n.mean(n.square(z)), n.value(D)), n.value(D - 1))
    return n.affine(n.node("Div", z, n.node("Sqrt", n.plus_eps(variance))))


def _annotated_transformer(n: Spelling, x: str) -> str:
    """γ·(x − μ)/(std + ε) + β, std with N − 1."""
    z = n.centred(x)
    variance = n.node("Div", n.reduce("ReduceSum", n.node("Mul", z, z), -1), n.value(D - 1))
    root = n.plus_eps(n.node("Sqrt", variance))
    return str(n.node("Add", n.node("Div", n.node("Mul", z, n.gamma()), root), n.beta()))


def _no_eps(n: Spelling, x: str) -> str:
    """Standardised per sample."""
    z = n.centred(x)
    return str(n.node("Div", z, n.node("Sqrt", n.mean(n.square(z)))))


def _in_single(weight_in_single: bool) -> Build:
    """float16 around statistics in float32."""

    def build(n: Spelling, x: str) -> str:
        wide = n.cast(x, np.float32)
        n.dtype = np.dtype(np.float32)
        z = n.centred(wide)
        y = n.node("Div", z, n.root(z))
        if weight_in_single:
            return n.cast(n.affine(y), np.float16)
        n.dtype = np.dtype(np.float16)
        return n.affine(n.cast(y, np.float16))

    return build


def _root_in_single(n: Spelling, x: str) -> str:
    """Only what is under the root is wide (ONNX Runtime's own mixed precision)."""
    z = n.centred(x)
    n.dtype = np.dtype(np.float32)
    wide = n.cast(z, np.float32)
    y = n.cast(n.node("Div", wide, n.root(wide)), np.float16)
    n.dtype = np.dtype(np.float16)
    return n.affine(y)


def _useless_casts(n: Spelling, x: str) -> str:
    wide = n.cast(x, np.float32)
    return n.affine(n.cast(_without_affine(n, wide), np.float32))


def _rms(n: Spelling, x: str) -> str:
    return str(n.node("Mul", n.node("Div", x, n.root(x)), n.gamma()))


def _llama(n: Spelling, x: str) -> str:
    wide = n.cast(x, np.float32)
    n.dtype = np.dtype(np.float32)
    narrow = n.cast(n.node("Mul", wide, n.node("Reciprocal", n.root(wide))), np.float16)
    n.dtype = np.dtype(np.float16)
    return str(n.node("Mul", n.gamma(), narrow))


def _gemma(n: Spelling, x: str) -> str:
    wide = n.cast(x, np.float32)
    n.dtype = np.dtype(np.float32)
    y = n.node("Mul", wide, n.node("Reciprocal", n.root(wide)))
    return n.cast(n.node("Mul", y, n.node("Add", n.gamma(), n.value(1))), np.float16)


def _rms_of_sum(n: Spelling, x: str) -> str:
    total = n.reduce("ReduceSumSquare", x, -1)
    root = n.node("Sqrt", n.plus_eps(n.node("Div", total, n.value(D))))
    return str(n.node("Mul", n.gamma(), n.node("Div", x, root)))


def _rms_with_bias(n: Spelling, x: str) -> str:
    return n.affine(n.node("Div", x, n.root(x)))


def _scale_norm(n: Spelling, x: str) -> str:
    """lucidrains' RMSNorm: F.normalize(x) · √d · γ."""
    length = n.node("Clip", n.reduce("ReduceL2", x, -1), n.value(EPS))
    unit = n.node("Div", x, n.node("Expand", length, n.node("Shape", x)))
    return str(n.node("Mul", n.node("Mul", unit, n.value(sqrt(D))), n.gamma()))


def _normalize(n: Spelling, x: str) -> str:
    """F.normalize."""
    length = n.node("Clip", n.reduce("ReduceL2", x, -1), n.value(EPS))
    return str(n.node("Div", x, n.node("Expand", length, n.node("Shape", x))))


def _normalize_1(n: Spelling, x: str) -> str:
    length = n.node("Max", n.reduce("ReduceL1", x, -1), n.value(EPS))
    return str(n.node("Div", x, length))


def _l2_tensorflow(n: Spelling, x: str) -> str:
    total = n.node("Max", n.reduce("ReduceSum", n.node("Mul", x, x), -1), n.value(EPS))
    return str(n.node("Mul", x, n.node("Reciprocal", n.node("Sqrt", total))))


def _l2(n: Spelling, x: str) -> str:
    return str(n.node("Div", x, n.node("Sqrt", n.plus_eps(n.reduce("ReduceSum", n.square(x), -1)))))


def _over(*axes: int, weight: tuple[int, ...] | None = None) -> Build:
    def build(n: Spelling, x: str) -> str:
        z = n.centred(x, *axes)
        y = n.node("Div", z, n.root(z, *axes))
        return n.affine(y, *weight) if weight is not None else str(y)

    return build


def _pooled(n: Spelling, x: str) -> str:
    """GlobalAveragePool is a mean over the spatial axes."""
    z = n.node("Sub", x, n.node("GlobalAveragePool", x))
    variance = n.node("GlobalAveragePool", n.node("Mul", z, z))
    return n.affine(n.node("Div", z, n.node("Sqrt", n.plus_eps(variance))), D, 1, 1)


def _group_norm_of_torch(groups: int, affine: bool = True) -> Build:
    def build(n: Spelling, x: str) -> str:
        shape = n.constant(np.array([0, groups, -1], np.int64))
        ones, zeros = n.value(1, (groups,)), n.value(0, (groups,))
        inner = n.node("InstanceNormalization", n.node("Reshape", x, shape), ones, zeros, epsilon=EPS)
        y = n.node("Reshape", inner, n.node("Shape", x))
        return n.affine(y, D, 1, 1) if affine else str(y)

    return build


def _group_norm_by_hand(n: Spelling, x: str) -> str:
    shape = n.constant(np.array([IMAGE[0], 2, -1], np.int64))
    inner = n.node("Reshape", x, shape)
    y = _without_affine(n, inner)
    back = n.node("Reshape", y, n.constant(np.array(IMAGE, np.int64)))
    return n.affine(back, 1, D, 1, 1)


SPELLINGS = {
    "pytorch": Case(_pytorch),
    "pytorch-axes-as-input": Case(_pytorch, opset=18),
    "pytorch-float64": Case(_pytorch, dtype=np.float64),
    "two-means": Case(_two_differences),
    "two-differences": Case(_one_mean_two_differences),
    "mul-by-itself": Case(_mul_by_itself),
    "reciprocal": Case(_reciprocal),
    "one-over-root": Case(_one_over),
    "root-of-reciprocal": Case(_root_of_reciprocal),
    "power-of-half": Case(_power(0.5)),
    "power-of-minus-half": Case(_power(-0.5)),
    "operands-commuted": Case(_commuted),
    "negated-mean-added": Case(_negated_mean),
    "mean-minus-x-squared": Case(_mean_minus_x),
    "weight-before-division": Case(_weight_first),
    "flax": Case(_flax),
    "tensorflow": Case(_tensorflow),
    "tensorflow-negated": Case(_tensorflow_negated),
    "sum-times-1/N": Case(_sums("Mul")),
    "sum-over-N": Case(_sums("Div")),
    "sum-over-N-attribute": Case(_sums("Div"), opset=12),
    "axes-lost-and-put-back": Case(_lost_axes),
    "no-affine": Case(_without_affine, affine=""),
    "no-bias": Case(_without_bias, affine="γ"),
    "no-weight": Case(_without_weight, affine="β"),
    "computed-weight": Case(_computed_weight, affine="γ"),
    "eps-outside": Case(_eps_outside, facts={"eps_mode": "outside"}),
    "eps-clamps": Case(_eps_clamps, facts={"eps_mode": "max"}),
    "eps-clamps-inside": Case(_eps_clamps_inside, eps=sqrt(EPS), facts={"eps_mode": "max"}),
    "unbiased": Case(_unbiased, facts={"unbiased": True}),
    "unbiased-eps-outside": Case(_annotated_transformer, facts={"unbiased": True, "eps_mode": "outside"}),
    "no-eps": Case(_no_eps, eps=0.0, affine=""),
    "cast-back-after-weight": Case(
        _in_single(True),
        dtype=np.float16,
        facts={"compute_dtype": np.float32, "cast_before_weight": False},
    ),
    "cast-back-before-weight": Case(
        _in_single(False),
        dtype=np.float16,
        facts={"compute_dtype": np.float32, "cast_before_weight": True},
    ),
    "root-in-single": Case(
        _root_in_single,
        dtype=np.float16,
        facts={"compute_dtype": np.float32, "cast_before_weight": True},
    ),
    "casts-of-no-effect": Case(_useless_casts),
    "channels-first": Case(_over(1, weight=(D, 1, 1)), axes=(1,), shape=IMAGE),
    "trailing-axes": Case(_over(2, 3, weight=(4, 5)), axes=(2, 3), shape=IMAGE),
    "all-but-the-batch": Case(_over(1, 2, 3, weight=IMAGE[1:]), axes=(1, 2, 3), shape=IMAGE),
    "rms": Case(_rms, "rms_norm", affine="γ"),
    "rms-with-bias": Case(_rms_with_bias, "rms_norm"),
    "rms-of-a-sum": Case(_rms_of_sum, "rms_norm", affine="γ"),
    "llama": Case(
        _llama,
        "rms_norm",
        affine="γ",
        dtype=np.float16,
        facts={"compute_dtype": np.float32, "cast_before_weight": True},
    ),
    "gemma": Case(
        _gemma,
        "rms_norm",
        affine="γ",
        dtype=np.float16,
        facts={"compute_dtype": np.float32, "cast_before_weight": False, "weight_offset": 1.0},
    ),
    "scale-norm": Case(_scale_norm, "rms_norm", eps=EPS / sqrt(D), affine="γ", facts={"eps_mode": "max"}),
    "F.normalize": Case(_normalize, "lp_norm", affine="", facts={"eps_mode": "max"}),
    "F.normalize-p-1": Case(_normalize_1, "lp_norm", affine="", facts={"eps_mode": "max", "p": 1}),
    "l2-tensorflow": Case(_l2_tensorflow, "lp_norm", eps=sqrt(EPS), affine="", facts={"eps_mode": "max"}),
    "l2-eps-inside": Case(_l2, "lp_norm", affine=""),
    "instance-norm": Case(_over(2, 3, weight=(D, 1, 1)), "instance_norm", (2, 3), shape=IMAGE),
    "instance-norm-no-affine": Case(_over(2, 3), "instance_norm", (2, 3), affine="", shape=IMAGE),
    "instance-norm-1d": Case(_over(2, weight=(5, 1)), "instance_norm", (2,)),
    "instance-norm-channels-last": Case(_over(1, 2, weight=(5,)), "instance_norm", (1, 2), shape=IMAGE),
    "instance-norm-pooled": Case(_pooled, "instance_norm", (2, 3), shape=IMAGE),
    "group-norm-of-torch": Case(
        _group_norm_of_torch(3), "group_norm", (1, 2, 3), shape=IMAGE, facts={"groups": 3}
    ),
    "group-norm-no-affine": Case(
        _group_norm_of_torch(2, False), "group_norm", (1, 2, 3), affine="", shape=IMAGE, facts={"groups": 2}
    ),
    "group-norm-of-one-channel-each": Case(_group_norm_of_torch(D), "instance_norm", (2, 3), shape=IMAGE),
    "group-norm-by-hand": Case(_group_norm_by_hand, "group_norm", (1, 2, 3), shape=IMAGE, facts={"groups": 2}),
    "group-norm-of-one-group": Case(_over(1, 2, 3, weight=(D, 1, 1)), "group_norm", (1, 2, 3), shape=IMAGE),
}


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in SPELLINGS.items()])
def test_spelling(case: Case) -> None:
    model = built(case.build, case.shape, case.opset, case.dtype)
    (form,), graph = forms_of(model)
    assert (form.kind, form.axes) == (case.kind, case.axes)
    assert form.eps == pytest.approx(case.eps, rel=1e-3 if case.dtype == np.float16 else 1e-6)
    assert ("γ" if form.weight else "") + ("β" if form.bias else "") == case.affine
    assert facts(form) == case.facts
    assert not form.observed
    assert not form.shares
    assert form.y.name == model.graph.node[-1].input[0]
    assert form.x.name == model.graph.node[0].output[0]
    check(form, graph, model, 5e-3 if case.dtype == np.float16 else 2e-5)


# ---- a form that says something else is found out -------------------------------------------------------

WRONG = {
    "eps": {"eps": 1e-5},
    "eps-mode": {"eps_mode": "outside"},
    "axes": {"axes": (1,)},
    "unbiased": {"unbiased": True},
    "kind": {"kind": "rms_norm"},
    "offset": {"weight_offset": 1.0},
    "gain": {"gain": 1.01},
    "no-weight": {"weight": None},
    "no-bias": {"bias": None},
}


@pytest.mark.parametrize("changes", [pytest.param(changes, id=name) for name, changes in WRONG.items()])
def test_a_wrong_form_is_found_out(changes: dict[str, Any]) -> None:
    model = built(_pytorch)
    (form,), graph = forms_of(model)
    check(form, graph, model)
    with pytest.raises(AssertionError):
        check(replace(form, **changes), graph, model, tolerance=1e-3)


# ---- what merely looks like a norm ----------------------------------------------------------------------


def _std_alone(n: Spelling, x: str) -> str:
    """x/std: the mean stays."""
    return str(n.node("Div", x, n.root(n.centred(x))))


def _mean_alone(n: Spelling, x: str) -> str:
    """(x − μ)/rms(x): the second moment is not that of x − μ."""
    return str(n.node("Div", n.centred(x), n.root(x)))


def _mean_added(n: Spelling, x: str) -> str:
    return str(n.node("Div", n.node("Add", x, n.mean(x)), n.root(n.centred(x))))


def _other_means(n: Spelling, x: str) -> str:
    """It subtracts the mean over one axis and divides by the std over another."""
    return str(n.node("Div", n.centred(x, 1), n.root(n.centred(x, 2), 2)))


def _other_x(n: Spelling, x: str) -> str:
    """The mean is that of another tensor."""
    return str(n.node("Div", n.node("Sub", x, n.mean(n.node("Abs", x))), n.root(n.centred(x))))


def _wrong_count(n: Spelling, x: str) -> str:
    """The sum of squares over what is neither N nor N − 1."""
    total = n.reduce("ReduceSum", n.square(x), -1)
    return str(n.node("Div", x, n.node("Sqrt", n.plus_eps(n.node("Div", total, n.value(D - 2))))))


def _wrong_mean(n: Spelling, x: str) -> str:
    mean = n.node("Div", n.reduce("ReduceSum", x, -1), n.value(D - 1))
    z = n.node("Sub", x, mean)
    return str(n.node("Div", n.node("Sub", x, mean), n.node("Add", n.root(z), n.value(1))))


def _maximum(n: Spelling, x: str) -> str:
    """Divided by the root of the largest square."""
    return str(n.node("Div", x, n.node("Sqrt", n.plus_eps(n.reduce("ReduceMax", n.square(x), -1)))))


def _fourth_power(n: Spelling, x: str) -> str:
    root = n.node("Sqrt", n.plus_eps(n.mean(n.node("Pow", x, n.value(4)))))
    return str(n.node("Div", x, root))


def _cube_root(n: Spelling, x: str) -> str:
    root = n.node("Pow", n.plus_eps(n.mean(n.square(x))), n.value(1 / 3))
    return str(n.node("Div", x, root))


def _softmax(n: Spelling, x: str) -> str:
    powers = n.node("Exp", n.node("Sub", x, n.reduce("ReduceMax", x, -1)))
    return str(n.node("Div", powers, n.reduce("ReduceSum", powers, -1)))


def _multiplied(n: Spelling, x: str) -> str:
    """x times the root."""
    return str(n.node("Mul", x, n.root(x)))


def _over_the_variance(n: Spelling, x: str) -> str:
    z = n.centred(x)
    return str(n.node("Div", z, n.plus_eps(n.mean(n.square(z)))))


def _two_eps(n: Spelling, x: str) -> str:
    """Under the root and behind it: no ε says that."""
    z = n.centred(x)
    return str(n.node("Div", z, n.plus_eps(n.root(z))))


def _eps_and_bound(n: Spelling, x: str) -> str:
    z = n.centred(x)
    return str(n.node("Div", z, n.node("Sqrt", n.plus_eps(n.node("Max", n.mean(n.square(z)), n.value(0.1))))))


def _eps_of_data(n: Spelling, x: str) -> str:
    z = n.centred(x)
    eps = n.mean(n.node("Abs", x))
    return str(n.node("Div", z, n.node("Sqrt", n.node("Add", n.mean(n.square(z)), eps))))


def _mismatched_axes(n: Spelling, x: str) -> str:
    """The statistics lie along another axis: the lost axis was not put back where it was. (A square x.)"""
    root = n.node("Sqrt", n.plus_eps(n.mean(n.square(x), 2, keepdims=0)))
    return str(n.node("Div", x, n.node("Unsqueeze", root, n.constant(np.array([1], np.int64)))))


def _over_the_batch(n: Spelling, x: str) -> str:
    """A BatchNorm in training."""
    return _over(0, 2, 3, weight=(D, 1, 1))(n, x)


def _stored(n: Spelling, x: str) -> str:
    """Weight standardisation: it normalises a weight."""
    weight = n.weight(D, D)
    return str(n.node("MatMul", x, _without_affine(n, weight)))


def _cosine(n: Spelling, x: str) -> str:
    """A product of two vectors over the product of their lengths."""
    other = n.node("Tanh", x)
    lengths = n.node("Mul", n.reduce("ReduceL2", x, -1), n.reduce("ReduceL2", other, -1))
    return str(n.node("Mul", n.node("Div", n.node("Mul", x, other), lengths), n.value(1, SHAPE)))


def _pooled_statistics(n: Spelling, x: str) -> str:
    """Mean and std as features (speaker embedding)."""
    std = n.root(n.centred(x, 1), 1)
    return str(n.node("Mul", n.node("Concat", n.mean(x, 1), std, axis=1), n.value(1, (1, 1, D))))


def _negative(n: Spelling, x: str) -> str:
    """(μ − x)/σ: a norm of the other sign."""
    return str(n.node("Div", n.node("Sub", n.mean(x), x), n.root(n.centred(x))))


NO_NORMS = {
    "std-without-mean": _std_alone,
    "mean-without-its-variance": _mean_alone,
    "mean-added": _mean_added,
    "mean-and-variance-over-different-axes": _other_means,
    "mean-of-another-tensor": _other_x,
    "sum-over-another-count": _wrong_count,
    "mean-over-another-count": _wrong_mean,
    "largest-square": _maximum,
    "fourth-power": _fourth_power,
    "cube-root": _cube_root,
    "softmax": _softmax,
    "times-the-root": _multiplied,
    "over-the-variance": _over_the_variance,
    "two-epsilons": _two_eps,
    "epsilon-and-bound": _eps_and_bound,
    "epsilon-of-data": _eps_of_data,
    "stored-tensor": _stored,
    "cosine": _cosine,
    "pooled-statistics": _pooled_statistics,
    "other-sign": _negative,
}


@pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in NO_NORMS.items()])
def test_what_is_no_norm(build: Build) -> None:
    found, _ = forms_of(built(build))
    assert [form.kind for form in found] == []


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        pytest.param(_mismatched_axes, (5, 5, 5), id="axis-not-put-back"),
        pytest.param(_over_the_batch, IMAGE, id="batch-statistics"),
    ],
)
def test_what_is_no_norm_of_another_shape(build: Build, shape: tuple[int, ...]) -> None:
    assert forms_of(built(build, shape))[0] == []


# ---- a norm, and something else behind it ---------------------------------------------------------------


def _data_behind(n: Spelling, x: str) -> str:
    """adaLN: γ and β are computed from data."""
    y, scale = _without_affine(n, x), n.node("Tanh", x)
    return str(n.node("Add", n.node("Mul", y, scale), n.node("Abs", x)))


def _scalar_behind(n: Spelling, x: str) -> str:
    """Attention's 1/√d belongs to the attention."""
    return str(n.node("Mul", _without_affine(n, x), n.value(0.5)))


def _positions_behind(n: Spelling, x: str) -> str:
    """A position embedding varies along an axis that is not normalised."""
    return str(n.node("Add", _without_affine(n, x), n.beta(5, D)))


def _mask_behind(n: Spelling, x: str) -> str:
    """One number for each sample."""
    return str(n.node("Mul", _without_affine(n, x), n.gamma(4, 1, 1)))


def _relu_behind(n: Spelling, x: str) -> str:
    return str(n.node("Relu", _without_affine(n, x)))


def _broadcast_behind(n: Spelling, x: str) -> str:
    """A constant with more axes than x makes another shape of it."""
    return str(n.node("Mul", _without_affine(n, x), n.gamma(2, 1, 1, D)))


@pytest.mark.parametrize(
    "build",
    [_data_behind, _scalar_behind, _positions_behind, _mask_behind, _relu_behind, _broadcast_behind],
)
def test_what_is_behind_a_norm_is_not_taken_for_its_weights(build: Build) -> None:
    model = built(build)
    (form,), graph = forms_of(model)
    assert (form.kind, form.weight, form.bias, form.gain) == ("layer_norm", None, None, 1.0)
    assert form.ops[-1].kind == "div"
    check(form, graph, model)


def _two_weights(n: Spelling, x: str) -> str:
    """Behind γ and β, LayerScale: the second factor is another op's."""
    return str(n.node("Mul", _pytorch(n, x), n.gamma()))


def test_only_one_weight_is_taken() -> None:
    model = built(_two_weights)
    (form,), graph = forms_of(model)
    assert form.y.name == model.graph.node[-2].input[0]
    check(form, graph, model)


def _rms_of_centred(n: Spelling, x: str) -> str:
    """The mean is over one axis, the rest an RMSNorm over another: that it is, of x − mean(x)."""
    z = n.centred(x, 1)
    return str(n.node("Mul", n.node("Div", z, n.root(z, 2)), n.gamma()))


def test_means_over_another_axis_are_in_front_of_an_rms_norm() -> None:
    model = built(_rms_of_centred)
    (form,), graph = forms_of(model)
    assert (form.kind, form.axes) == ("rms_norm", (2,))
    assert form.ops[0].kind == "pow"
    check(form, graph, model)


def test_channel_weights_behind_spatial_statistics_without_mean_are_left() -> None:
    """Filter response normalisation: γ is not along what is normalised."""

    def build(n: Spelling, x: str) -> str:
        return n.affine(n.node("Div", x, n.root(x, 2, 3)), D, 1, 1)

    (form,), _ = forms_of(built(build, IMAGE))
    assert (form.kind, form.weight, form.bias) == ("rms_norm", None, None)


# ---- readers inside -------------------------------------------------------------------------------------


def _observed(name: str) -> Build:
    """Somebody else reads a tensor between x and y."""

    def build(n: Spelling, x: str) -> str:
        mean = n.mean(x)
        z = n.node("Sub", x, mean)
        root = n.root(z)
        normed = n.node("Div", z, root)
        scaled = n.node("Mul", normed, n.gamma())
        inner = {"mean": mean, "z": z, "root": root, "normed": normed, "scaled": scaled}[name]
        n.outputs.append(onnx.ValueInfoProto(name=n.node("Tanh", inner)))
        return str(n.node("Add", scaled, n.beta()))

    return build


@pytest.mark.parametrize("name", ["mean", "z", "root", "normed", "scaled"])
def test_readers_inside_are_named(name: str) -> None:
    model = built(_observed(name))
    (form,), graph = forms_of(model)
    (reader,) = [node.input[0] for node in model.graph.node if node.op_type == "Tanh"]
    assert [tensor.name for tensor in form.observed] == [reader]
    assert form.weight is not None
    assert form.bias is not None
    check(form, graph, model)


def test_an_inner_tensor_that_is_a_graph_output_is_observed() -> None:
    model = built(_pytorch)
    name = next(node.output[0] for node in model.graph.node if node.op_type == "Sub")
    model.graph.output.append(onnx.ValueInfoProto(name=name))
    (form,), _ = forms_of(model)
    assert [tensor.name for tensor in form.observed] == [name]


def _twins(n: Spelling, x: str) -> str:
    """Two LayerNorms of one x, whose statistics were found to be the same."""
    normed = _without_affine(n, x)
    return str(n.node("Mul", n.affine(normed), n.node("Tanh", n.affine(normed))))


def test_two_norms_may_share_their_statistics() -> None:
    model = built(_twins)
    (first, second), graph = forms_of(model)
    assert first.x is second.x
    assert first.weight is not second.weight
    assert [op.kind for op in first.shares] == [
        "reduce_mean",
        "sub",
        "pow",
        "reduce_mean",
        "add",
        "sqrt",
        "div",
    ]
    assert first.shares == second.shares
    assert first.observed == second.observed == ()
    check(first, graph, model)
    check(second, graph, model)


def test_x_that_others_read_in_the_wide_type_is_the_wide_one() -> None:
    """The cast is not the norm's."""

    def build(n: Spelling, x: str) -> str:
        wide = n.cast(x, np.float32)
        n.dtype = np.dtype(np.float32)
        n.outputs.append(onnx.ValueInfoProto(name=n.node("Tanh", wide)))
        return n.cast(_pytorch(n, wide), np.float16)

    model = built(build, dtype=np.float16)
    (form,), _ = forms_of(model)
    assert form.x.dtype == np.float32
    assert form.observed == ()


def test_settings_that_a_caller_may_replace_are_named() -> None:
    model = built(_pytorch)
    for tensor in model.graph.initializer:
        shape = list(tensor.dims)
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, shape))
    (form,), _ = forms_of(model)
    assert len(form.assumed) == 2  # the exponent and ε; γ and β are named as such
    assert form.weight is not None
    assert form.weight.overridable


def test_a_norm_in_a_body_reads_from_outside() -> None:
    inner = Spelling(prefix="then_", seed=1)
    inner.output(inner.node("Identity", _pytorch(inner, "x")), None)
    other = Spelling(prefix="else_")
    other.output(other.node("Neg", "x"), None)
    net = Spelling()
    net.input(SHAPE, "x")
    condition = net.input([], "condition", np.bool_)
    y = net.node("If", condition, then_branch=inner.graph(), else_branch=other.graph())
    net.outputs.append(onnx.ValueInfoProto(name=y))
    (form,), _ = forms_of(net.model())
    assert form.x.name == "x"
    assert form.ops[-1].scope.path


# ---- PyTorch ------------------------------------------------------------------------------------------


class Homemade(nn.Module):
    """A norm under a name that says nothing."""

    def __init__(self, function: Callable[..., Tensor], shape: tuple[int, ...] = (D,)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator) + 0.3)
        self.bias = nn.Parameter(torch.randn(shape, generator=generator))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.foo = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.foo(x * 1.0)) + 1


def _torch_variance(m: Homemade, x: Tensor) -> Tensor:
    z = x - x.mean(-1, keepdim=True)
    return z / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS) * m.weight + m.bias


def _torch_moments(m: Homemade, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(variance + EPS) * m.weight + m.bias


def _torch_std(m: Homemade, x: Tensor) -> Tensor:
    return m.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + EPS) + m.bias


def _torch_std_mean(m: Homemade, x: Tensor) -> Tensor:
    std, mean = torch.std_mean(x, -1, keepdim=True)
    return (x - mean) / (std + EPS)


def _torch_square(m: Homemade, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * m.weight


def _torch_sum(m: Homemade, x: Tensor) -> Tensor:
    return x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + EPS) ** 0.5 * m.weight


def _torch_gemma(m: Homemade, x: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (1.0 + m.weight.float())).type_as(x)


def _torch_llama(m: Homemade, x: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    return m.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _torch_t5(m: Homemade, x: Tensor) -> Tensor:
    """x itself is not cast; the product is wide."""
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return m.weight * (x * torch.rsqrt(variance + EPS)).to(m.weight.dtype)


def _torch_normalize(m: Homemade, x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=EPS)


def _torch_scale(m: Homemade, x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=EPS) * sqrt(D) * m.weight


def _torch_group(m: Homemade, x: Tensor) -> Tensor:
    """The GroupNorm of the paper, whose variance is that of tf.nn.moments; torch's own default is another."""
    n, c, h, w = x.shape
    x = x.view(n, 3, c // 3 * h * w)
    mean, variance = x.mean(2, keepdim=True), x.var(2, keepdim=True)
    x = (x - mean) / (variance + EPS).sqrt()
    return x.view(n, c, h, w) * m.weight + m.bias


def _torch_channels_first(m: Homemade, x: Tensor) -> Tensor:
    """ConvNeXt's LayerNorm2d."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    x = (x - mean) / torch.sqrt(variance + EPS)
    return m.weight[:, None, None] * x + m.bias[:, None, None]


def _torch_in_place(m: Homemade, x: Tensor) -> Tensor:
    """Only what was made here is changed in place."""
    y = x - x.mean(-1, keepdim=True)
    y = y / (y.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return y.mul_(m.weight).add_(m.bias)


WIDE = {"compute_dtype": np.float32}

TORCH = {
    "var": (_torch_variance, "layer_norm", (2,), "γβ", {}),
    "var-mean": (_torch_moments, "layer_norm", (2,), "γβ", {}),
    "std": (_torch_std, "layer_norm", (2,), "γβ", {"unbiased": True, "eps_mode": "outside"}),
    "std-mean": (_torch_std_mean, "layer_norm", (2,), "", {"unbiased": True, "eps_mode": "outside"}),
    "square": (_torch_square, "rms_norm", (2,), "γ", {}),
    "sum": (_torch_sum, "rms_norm", (2,), "γ", {}),
    "gemma": (_torch_gemma, "rms_norm", (2,), "γ", {"weight_offset": 1.0}),
    "gemma-half": (
        _torch_gemma,
        "rms_norm",
        (2,),
        "γ",
        {"weight_offset": 1.0, "cast_before_weight": False, **WIDE},
    ),
    "llama-half": (_torch_llama, "rms_norm", (2,), "γ", {"cast_before_weight": True, **WIDE}),
    "t5-half": (_torch_t5, "rms_norm", (2,), "γ", {"cast_before_weight": True, **WIDE}),
    "normalize": (_torch_normalize, "lp_norm", (2,), "", {"eps_mode": "max"}),
    "scale": (_torch_scale, "rms_norm", (2,), "γ", {"eps_mode": "max"}),
    "group": (_torch_group, "group_norm", (1, 2, 3), "γβ", {"groups": 3, "unbiased": True}),
    "channels-first": (_torch_channels_first, "layer_norm", (1,), "γβ", {}),
    "in-place": (_torch_in_place, "layer_norm", (2,), "γβ", {}),
}


def scanned(model: nn.Module, x: Tensor) -> tuple[Any, ...]:
    return normtool.scan(model, (x,)).norms


@pytest.mark.parametrize("name", TORCH)
def test_module_of_any_name(name: str) -> None:
    function, kind, axes, affine, expected = TORCH[name]
    shape = IMAGE if name in ("group", "channels-first") else SHAPE
    inner = Homemade(function, (1, D, 1, 1) if name == "group" else (D,))
    dtype = torch.float16 if name.endswith("half") else torch.float32
    model = Around(inner).to(dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) * 0.5 + 0.7
    graph = normtool.load(model, (x,)).graph
    (found,) = find_norms(graph)
    assert (found.name, found.kind, found.evidence, found.axes) == ("foo", kind, "pattern", axes)
    (counted,) = scanned(model, x)
    assert (counted.spelling, counted.learnable) == ("Homemade", D * len(affine))
    form = found.form
    assert form is not None
    assert facts(form) == expected
    with torch.no_grad():
        y = inner(x * 1.0).numpy()
    weights = [arrays(graph, tensor) for tensor in (form.weight, form.bias)]
    error = np.abs(defined(form, x.numpy(), *weights) - y).max() / np.abs(y).max()
    assert error < (5e-3 if dtype is torch.float16 else 1e-5)


@pytest.mark.parametrize("name", ["var", "square", "normalize"])
def test_without_dataflow_it_is_probed(name: str) -> None:
    function, kind, *_ = TORCH[name]
    model = Around(Homemade(function))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    (norm,) = normtool.scan(model).norms
    assert (norm.name, norm.norm.kind, norm.norm.evidence) == ("foo", kind, "probe")
    assert (norm.calls, norm.learnable) == (None, 2 * D)  # whatever of it the code uses
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_without_dataflow_a_gate_is_no_norm() -> None:
    assert not normtool.scan(Around(Homemade(lambda m, x: torch.tanh(x * m.weight) + m.bias))).norms


def test_one_module_called_twice_is_one_norm() -> None:
    class Twice(Around):
        def forward(self, x: Tensor) -> Tensor:
            return self.foo(torch.relu(self.foo(x)))  # type: ignore[no-any-return]

    (norm,) = scanned(Twice(Homemade(_torch_variance)), torch.randn(SHAPE))
    assert (norm.name, norm.calls, norm.learnable, norm.norm.evidence) == ("foo", 2, 2 * D, "pattern")
    plan = normtool.plan(Twice(Homemade(_torch_variance)), (torch.randn(SHAPE),))
    assert [site.norm.name for site in plan.sites] == ["foo", "foo@1"]
    assert {reason.code for site in plan.sites for reason in site.reasons} == {"data_dependent"}


def test_a_norm_in_the_code_of_a_larger_module_goes_by_its_last_op() -> None:
    (norm,) = scanned(Around(Homemade(lambda m, x: torch.tanh(_torch_variance(m, x)))), torch.randn(SHAPE))
    assert (norm.name, norm.norm.evidence, norm.learnable) == ("foo.add_1", "pattern", 2 * D)


def test_a_class_that_says_so_is_counted_once() -> None:
    class MyRMSNorm(Homemade):
        pass

    (norm,) = scanned(Around(MyRMSNorm(_torch_square)), torch.randn(SHAPE))
    assert (norm.name, norm.norm.kind, norm.norm.evidence) == ("foo", "rms_norm", "probe")
    assert norm.norm.form is not None


def test_x_changed_in_place_meanwhile_is_no_norm() -> None:
    def function(m: Homemade, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        x.add_(1)
        z = x - mean
        return z / torch.sqrt(z.pow(2).mean(-1, keepdim=True) + EPS)

    assert all(
        norm.norm.kind != "layer_norm" for norm in scanned(Around(Homemade(function)), torch.randn(SHAPE))
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_epsilon_that_rms_norm_is_not_given(dtype: torch.dtype) -> None:
    """Of an x this small the output shows it."""
    x = torch.full((1, 4), 1e-3, dtype=dtype)
    (norm,) = scanned(nn.RMSNorm(4, dtype=dtype), x)
    y, square = float(torch.rms_norm(x, [4])[0, 0]), float(x[0, 0]) ** 2
    assert square / (square + norm.norm.eps) == pytest.approx(y * y, rel=1e-2)


# ---- as torch exports them ------------------------------------------------------------------------------


class GroupNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(3, D, eps=EPS)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)  # type: ignore[no-any-return]


def exported(model: nn.Module, x: Tensor, dynamo: bool) -> onnx.ModelProto:
    """With an open batch, so that no shape is folded away."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            batch = ({0: torch.export.Dim("n", min=2)},)
            program = torch.onnx.export(
                model, (x,), dynamo=True, opset_version=18, dynamic_shapes=batch, verbose=False
            )
            assert program is not None
            return program.model_proto
        file = io.BytesIO()
        torch.onnx.export(
            model,
            (x,),
            file,  # type: ignore[arg-type]
            dynamo=False,
            opset_version=17,
            input_names=["x"],
            dynamic_axes={"x": {0: "n"}},
        )
        return onnx.load_from_string(file.getvalue())


EXPORTED = ["var", "var-mean", "std", "std-mean", "sum", "gemma", "normalize", "group", "GroupNorm"]


def _exports() -> Iterator[Any]:
    for name in EXPORTED:
        yield pytest.param(name, False, id=f"{name}-torchscript")
        marks = [] if name == "var-mean" else [pytest.mark.long]
        yield pytest.param(name, True, id=f"{name}-dynamo", marks=marks)


@pytest.mark.parametrize(("name", "dynamo"), list(_exports()))
def test_as_exported(name: str, dynamo: bool) -> None:
    if name == "GroupNorm":
        inner: nn.Module = GroupNorm()
        kind, axes, affine, expected = "group_norm", (1, 2, 3), "γβ", {"groups": 3}
    else:
        function, kind, axes, affine, expected = TORCH[name]
        inner = Homemade(function, (1, D, 1, 1) if name == "group" else (D,))
    x = torch.randn(IMAGE if name.lower().startswith("group") else SHAPE)
    model = exported(Around(inner).eval(), x, dynamo)
    (form,), graph = forms_of(model)
    assert (form.kind, form.axes) == (kind, axes)
    assert ("γ" if form.weight else "") + ("β" if form.bias else "") == affine
    assert facts(form) == {key: value for key, value in expected.items() if key != "weight_offset"}
    check(form, graph, model)


# ---- scan ---------------------------------------------------------------------------------------------


def test_scan_says_what_it_has_found() -> None:
    (norm,) = normtool.scan(built(_gemma, dtype=np.float16)).to_dict()["norms"]
    assert (norm["kind"], norm["evidence"], norm["axes"]) == ("rms_norm", "pattern", [2])
    assert norm["eps"] == EPS
    assert norm["spelling"] == "spelled out"
    assert norm["form"].pop("ops")[-1] == norm["name"]
    assert norm["form"] == {
        "weight": True,
        "bias": False,
        "offset": 1.0,
        "gain": 1.0,
        "eps_mode": "inside",
        "unbiased": False,
        "compute_dtype": "float32",
        "cast_back": "after_weight",
        "groups": None,
        "p": 2,
    }


def test_an_operator_has_no_form() -> None:
    (norm,) = normtool.scan(built(lambda n, x: n.node("LayerNormalization", x, n.gamma()))).to_dict()["norms"]
    assert (norm["evidence"], norm["form"]) == ("op", None)


def test_an_instance_norm_inside_a_group_norm_is_not_counted_again() -> None:
    scan = normtool.scan(built(_group_norm_of_torch(3), IMAGE))
    assert [(norm.norm.kind, norm.learnable) for norm in scan.norms] == [("group_norm", 2 * D)]


def test_fold_keeps_what_is_spelled_out() -> None:
    (site,) = normtool.plan(built(_pytorch)).sites
    assert (site.verdict, [reason.code for reason in site.reasons]) == ("kept", ["data_dependent"])


# ---- operators ------------------------------------------------------------------------------------------


def test_operators_have_forms_too() -> None:
    def build(n: Spelling, x: str) -> str:
        y, mean = n.node("LayerNormalization", x, n.gamma(), n.beta(), outputs=["a", "b"], epsilon=EPS)
        n.outputs.append(onnx.ValueInfoProto(name=n.node("Tanh", mean)))
        return str(y)

    model = built(build)
    (form,), graph = forms_of(model)
    assert (form.kind, form.axes, form.eps, form.is_native) == ("layer_norm", (2,), EPS, True)
    assert [tensor.name for tensor in form.observed] == ["b"]
    check(form, graph, model)


def test_a_graph_without_norms_is_searched_in_no_time() -> None:
    net = Spelling()
    x = net.input(SHAPE)
    one = net.value(1)
    for i in range(5000):
        x = net.node(("Add", "Mul", "Sub", "Relu")[i % 4], *((x, one) if i % 4 < 3 else (x,)))
    net.output(x)
    graph = read_proto(net.model()).graph
    start = perf_counter()
    assert norm_forms(graph) == []
    assert perf_counter() - start < 0.1


# ---- real models ----------------------------------------------------------------------------------------


def _spelled_out_and_runs(entry: dict[str, Any]) -> bool:
    no_norm = entry["file"].endswith("fusion_skip_layer_norm.onnx")  # see test_corpus
    return bool(entry.get("decomposed_norm")) and entry.get("ort_run") == "ok" and not no_norm


#: Norms of one model that are run.
FEW = 4


@pytest.mark.parametrize("entry", corpus_cases(_spelled_out_and_runs))
def test_norms_of_real_models_compute_what_their_forms_say(entry: dict[str, Any]) -> None:
    """On what really flows through the model; a few of many, the first and the last among them."""
    model = onnx.load(CORPUS / entry["file"])
    found, graph = forms_of(model)
    found = [form for form in found if not form.is_native]
    few = found[:: max(1, len(found) // FEW)] + found[-1:]
    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    names = dict.fromkeys(tensor.name for form in few for tensor in (form.x, form.y))
    given = {info.name for info in model.graph.input}
    del seen.graph.output[:]
    seen.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in given)
    values = _first_run(seen, graph)
    for form in few:
        weights = [arrays(graph, tensor) for tensor in (form.weight, form.bias)]
        expected, y = defined(form, values[form.x.name], *weights), values[form.y.name]
        tolerance = 2e-3 if y.dtype == np.float16 else 1e-4
        assert np.abs(expected - y).max() < tolerance * np.abs(expected).max()


def _first_run(model: onnx.ModelProto, graph: ModelGraph) -> dict[str, Array]:
    """Inputs and outputs by name, with the first sizes that the model takes."""
    for specs in attempts(graph, 0):
        inputs = {spec.name: generate(spec) for spec in specs}
        try:
            outputs = zoo.run(model, inputs)
        except (Fail, InvalidArgument, RuntimeException):
            continue
        return {**inputs, **dict(zip((o.name for o in model.graph.output), outputs, strict=True))}
    raise AssertionError("no sizes run")
