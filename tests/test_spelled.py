"""Norms that are spelled out: each spelling is run, and compared with what its form says that it computes.

ε is large, x has a mean, γ has both signs: a wrong axis, ε, correction, γ or β is off by far more than a
rounding. Look-alikes are in the second half, each with what it is taken for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import numpy as np
import onnx
import pytest

from normtool.constants import Constants
from normtool.formats.onnx.read import read_proto
from normtool.forms import NormForm, norm_forms
from normtool.graph import ModelGraph
from normtool.values import to_array
from tests import zoo

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
