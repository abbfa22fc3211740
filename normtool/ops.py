"""The one table of operators: each kind, its canonical slots, its spellings, its defaults.

A row maps the ONNX spellings of an operator (every opset, the contrib domains) and its ATen spellings to one
kind with one set of slot names. Where an opset moved something from an attribute to an input (`Squeeze.axes`
at 13), the slot and the attribute share a name and `constants.attribute` reads either. A new operator is a
new row.

Defaults are ONNX's own, in the precision it stores them (float32); an ATen op states every argument.
`tests/test_ops.py` holds every row against the schemas of the installed onnx and torch packages.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MICROSOFT = "com.microsoft"
ATEN = "aten"


@dataclass(frozen=True)
class Spelling:
    """`op_type` in `domain`, from opset `since` on, until a later spelling of the same name.

    `slots` name the inputs in order; a last one ending in `*` repeats (`inputs.0`, `inputs.1`, …).

    An ATen op has named arguments instead: `arguments` maps each to a slot or an attribute, "" where it changes
    nothing; `required` are values without which the op is another one. In-place ops (`relu_`) have the
    row of their namesake.
    """

    op_type: str
    slots: tuple[str, ...]
    domain: str = ""
    since: int = 1
    arguments: Mapping[str, str] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OpRow:
    kind: str
    spellings: tuple[Spelling, ...]
    outputs: tuple[str, ...] = ("y",)
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _onnx(op_type: str, slots: str, *, since: int = 1, domain: str = "") -> Spelling:
    return Spelling(op_type, tuple(slots.split()), domain, since)


def _aten(op_types: str, arguments: str, **required: Any) -> tuple[Spelling, ...]:
    """Spellings with the same arguments: `"input:x weight eps:epsilon momentum:"`."""
    pairs = (argument.partition(":") for argument in arguments.split())
    names = {name: canonical if colon else name for name, colon, canonical in pairs}
    return tuple(Spelling(op_type, (), ATEN, 1, names, required) for op_type in op_types.split())


def _row(
    kind: str, *spellings: Spelling, outputs: str = "y", defaults: Mapping[str, Any] | None = None
) -> OpRow:
    return OpRow(kind, spellings, tuple(outputs.split()), defaults or {})


def f32(number: float) -> float:
    """A float attribute as ONNX stores it: `f32(1e-5) == 9.999999747378752e-06`."""
    return float(np.float32(number))


_EPS5 = {"epsilon": f32(1e-5)}
_EPS12 = {"epsilon": f32(1e-12)}

#: Arguments of every `aten.upsample_*`: overloads differ in how they state the factors.
_UPSAMPLE = "input:x output_size:sizes scale_factors:scales"

#: Arguments of `aten.var` and its like; `unbiased` is an older word for a correction of 1.
_VARIANCE = "input:x dim:axes correction keepdim:keepdims"

TABLE: tuple[OpRow, ...] = (
    # ---- linear operators that hold weights
    _row(
        "conv",
        _onnx("Conv", "x weight bias"),
        *_aten(
            "conv1d conv2d conv3d",
            "input:x weight bias stride:strides padding:pads dilation:dilations groups:group",
        ),
        *_aten(
            "convolution",
            "input:x weight bias stride:strides padding:pads dilation:dilations output_padding: groups:group",
            transposed=False,
        ),
        defaults={"group": 1, "auto_pad": "NOTSET"},
    ),
    _row(
        "conv_transpose",
        _onnx("ConvTranspose", "x weight bias"),
        *_aten(
            "conv_transpose1d conv_transpose2d conv_transpose3d",
            "input:x weight bias stride:strides padding:pads output_padding groups:group dilation:dilations",
        ),
        *_aten(
            "convolution",
            "input:x weight bias stride:strides padding:pads dilation:dilations output_padding groups:group",
            transposed=True,
        ),
        defaults={"group": 1, "auto_pad": "NOTSET"},
    ),
    _row(
        "linear",
        _onnx("Gemm", "a b c"),
        *_aten("linear", "input:a weight:b bias:c"),
        *_aten("addmm", "input:c mat1:a mat2:b beta alpha"),
        defaults={"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0},
    ),
    _row(
        "matmul",
        _onnx("MatMul", "a b"),
        *_aten("matmul", "input:a other:b"),
        *_aten("mm bmm", "input:a mat2:b"),
    ),
    _row(
        "embedding",
        _onnx("Gather", "table indices"),
        *_aten("embedding", "weight:table indices padding_idx: scale_grad_by_freq: sparse:"),
        *_aten("index_select", "input:table dim:axis index:indices"),
        defaults={"axis": 0},
    ),
    # ---- normalisation, with statistics or without
    _row(
        "batch_norm",
        _onnx("BatchNormalization", "x weight bias mean var"),
        *_aten(
            "batch_norm",
            "input:x weight bias running_mean:mean running_var:var training:training_mode momentum eps:epsilon "
            "cudnn_enabled:",
        ),
        *_aten(
            "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional",
            "input:x weight bias running_mean:mean running_var:var training:training_mode momentum eps:epsilon",
        ),
        *_aten(
            "_native_batch_norm_legit_no_training",
            "input:x weight bias running_mean:mean running_var:var momentum eps:epsilon",
        ),
        outputs="y mean_out var_out saved_mean saved_var",
        defaults={**_EPS5, "training_mode": 0, "spatial": 1, "is_test": 0, "momentum": f32(0.9)},
    ),
    _row(
        "instance_norm",
        _onnx("InstanceNormalization", "x weight bias"),
        *_aten(
            "instance_norm",
            "input:x weight bias running_mean:mean running_var:var use_input_stats momentum eps:epsilon "
            "cudnn_enabled:",
        ),
        defaults=_EPS5,
    ),
    _row(
        "layer_norm",
        _onnx("LayerNormalization", "x weight bias"),
        *_aten("layer_norm", "input:x normalized_shape weight bias eps:epsilon cudnn_enable:"),
        *_aten("native_layer_norm", "input:x normalized_shape weight bias eps:epsilon"),
        outputs="y mean inv_std_dev",
        defaults={**_EPS5, "axis": -1},
    ),
    _row(
        "rms_norm",
        _onnx("RMSNormalization", "x weight"),
        _onnx("SimplifiedLayerNormalization", "x weight"),
        _onnx("SimplifiedLayerNormalization", "x weight", domain=MICROSOFT),
        *_aten("rms_norm _fused_rms_norm", "input:x normalized_shape weight eps:epsilon"),
        outputs="y inv_std_dev",
        defaults={**_EPS5, "axis": -1},
    ),
    _row(
        "skip_layer_norm",
        _onnx("SkipLayerNormalization", "x skip weight bias skip_bias", domain=MICROSOFT),
        _onnx("SkipLayerNormalization", "x skip weight bias skip_bias"),
        outputs="y mean inv_std_dev sum",
        defaults=_EPS12,
    ),
    _row(
        "skip_rms_norm",
        _onnx("SkipSimplifiedLayerNormalization", "x skip weight skip_bias", domain=MICROSOFT),
        _onnx("SkipSimplifiedLayerNormalization", "x skip weight skip_bias"),
        outputs="y mean inv_std_dev sum",
        defaults=_EPS12,
    ),
    _row(
        "embed_layer_norm",
        _onnx(
            "EmbedLayerNormalization",
            "input_ids segment_ids word_embedding position_embedding segment_embedding "
            "weight bias mask position_ids",
            domain=MICROSOFT,
        ),
        outputs="y mask_index embedding_sum",
        defaults=_EPS12,
    ),
    _row(
        "group_norm",
        _onnx("GroupNormalization", "x weight bias", since=18),
        *_aten("group_norm", "input:x num_groups weight bias eps:epsilon cudnn_enabled:"),
        *_aten("native_group_norm", "input:x weight bias N: C: HxW: group:num_groups eps:epsilon"),
        defaults=_EPS5,
    ),
    _row(
        "contrib_group_norm",
        _onnx("GroupNorm", "x weight bias", domain=MICROSOFT),
        defaults=_EPS5,
    ),
    _row(
        "skip_group_norm",
        _onnx("SkipGroupNorm", "x weight bias skip skip_bias", domain=MICROSOFT),
        outputs="y sum",
        defaults=_EPS5,
    ),
    _row(
        "mean_variance_norm",
        _onnx("MeanVarianceNormalization", "x"),
        defaults={"axes": [0, 2, 3]},
    ),
    _row("lp_norm", _onnx("LpNormalization", "x"), defaults={"axis": -1, "p": 2}),
    _row(
        "local_response_norm",
        _onnx("LRN", "x"),
        defaults={"alpha": f32(1e-4), "beta": 0.75, "bias": 1.0},
    ),
    # ---- elementwise
    _row("add", _onnx("Add", "a b"), *_aten("add", "input:a other:b", alpha=1)),
    _row(
        "sub",
        _onnx("Sub", "a b"),
        *_aten("sub", "input:a other:b", alpha=1),
        *_aten("rsub", "input:b other:a", alpha=1),
    ),
    _row("mul", _onnx("Mul", "a b"), *_aten("mul", "input:a other:b")),
    _row("div", _onnx("Div", "a b"), *_aten("div", "input:a other:b")),
    _row("sum", _onnx("Sum", "inputs*")),
    _row("neg", _onnx("Neg", "x"), *_aten("neg", "input:x")),
    _row("sqrt", _onnx("Sqrt", "x"), *_aten("sqrt", "input:x")),
    _row("rsqrt", *_aten("rsqrt", "input:x")),
    _row("reciprocal", _onnx("Reciprocal", "x"), *_aten("reciprocal", "input:x")),
    _row("pow", _onnx("Pow", "x exponent"), *_aten("pow", "input:x exponent"), *_aten("square", "input:x")),
    _row("abs", _onnx("Abs", "x"), *_aten("abs", "input:x")),
    _row("max", _onnx("Max", "inputs*")),
    _row("maximum", *_aten("maximum", "input:a other:b")),
    _row("where", _onnx("Where", "condition a b"), *_aten("where", "condition input:a other:b")),
    _row("relu", _onnx("Relu", "x"), *_aten("relu", "input:x")),
    _row(
        "leaky_relu",
        _onnx("LeakyRelu", "x"),
        *_aten("leaky_relu", "input:x negative_slope:alpha"),
        defaults={"alpha": f32(0.01)},
    ),
    _row("prelu", _onnx("PRelu", "x slope"), *_aten("prelu", "input:x weight:slope")),
    _row(
        "clip",
        _onnx("Clip", "x"),
        _onnx("Clip", "x min max", since=11),
        *_aten("clamp", "input:x min max"),
        *_aten("clamp_min", "input:x min"),
        *_aten("hardtanh", "input:x min_val:min max_val:max"),
        *_aten("relu6", "input:x"),
    ),
    _row("sigmoid", _onnx("Sigmoid", "x"), *_aten("sigmoid", "input:x")),
    _row("tanh", _onnx("Tanh", "x"), *_aten("tanh", "input:x")),
    _row(
        "gelu",
        _onnx("Gelu", "x"),
        _onnx("Gelu", "x", domain=MICROSOFT),
        *_aten("gelu", "input:x approximate"),
    ),
    _row("silu", _onnx("Swish", "x", since=24), *_aten("silu", "input:x")),
    _row("mish", _onnx("Mish", "x", since=18), *_aten("mish", "input:x")),
    _row("elu", _onnx("Elu", "x"), *_aten("elu", "input:x alpha scale input_scale")),
    _row("softplus", _onnx("Softplus", "x"), *_aten("softplus", "input:x beta threshold")),
    _row("hard_sigmoid", _onnx("HardSigmoid", "x"), *_aten("hardsigmoid", "input:x")),
    _row("hard_swish", _onnx("HardSwish", "x"), *_aten("hardswish", "input:x")),
    _row("erf", _onnx("Erf", "x"), *_aten("erf", "input:x")),
    _row("softmax", _onnx("Softmax", "x"), *_aten("softmax", "input:x dim:axis dtype:")),
    # ---- carriers: the same numbers under another shape, dtype or name
    _row(
        "identity",
        _onnx("Identity", "x"),
        *_aten("alias detach lift_fresh_copy", "input:x"),
        *_aten("contiguous clone", "input:x memory_format:"),
    ),
    _row(
        "dropout",
        _onnx("Dropout", "x"),
        _onnx("Dropout", "x ratio training_mode", since=12),
        *_aten("dropout feature_dropout alpha_dropout", "input:x p:ratio train:training_mode"),
        outputs="y mask",
    ),
    _row(
        "cast",
        _onnx("Cast", "x"),
        *_aten("to", "input:x dtype:to layout: device: pin_memory: non_blocking: copy: memory_format:"),
        *_aten("_to_copy", "input:x dtype:to layout: device: pin_memory: non_blocking: memory_format:"),
    ),
    _row("cast_like", _onnx("CastLike", "x like"), *_aten("type_as", "input:x other:like")),
    _row(
        "transpose",
        _onnx("Transpose", "x"),
        *_aten("permute", "input:x dims:perm"),
        *_aten("transpose swapdims", "input:x dim0 dim1"),
        *_aten("swapaxes", "input:x axis0:dim0 axis1:dim1"),
        *_aten("movedim moveaxis", "input:x source destination"),
        *_aten("t numpy_T mT mH matrix_H adjoint", "input:x"),
    ),
    _row(
        "reshape",
        _onnx("Reshape", "x shape"),
        *_aten("view _unsafe_view", "input:x size:shape"),
        *_aten("reshape", "input:x shape"),
        *_aten("flatten", "input:x start_dim: end_dim:"),
        *_aten("unflatten", "input:x dim: sizes:"),
        *_aten("view_as reshape_as", "input:x other:"),
        *_aten("ravel", "input:x"),
        defaults={"allowzero": 0},
    ),
    _row("flatten", _onnx("Flatten", "x"), defaults={"axis": 1}),
    _row(
        "squeeze",
        _onnx("Squeeze", "x"),
        _onnx("Squeeze", "x axes", since=13),
        *_aten("squeeze", "input:x dim:axes"),
    ),
    _row(
        "unsqueeze",
        _onnx("Unsqueeze", "x"),
        _onnx("Unsqueeze", "x axes", since=13),
        *_aten("unsqueeze", "input:x dim:axes"),
    ),
    _row(
        "expand",
        _onnx("Expand", "x shape"),
        *_aten("expand", "input:x size:shape implicit:"),
        *_aten("expand_as", "input:x other:"),
    ),
    # ---- structure
    _row("concat", _onnx("Concat", "inputs*"), *_aten("cat concat concatenate", "tensors:inputs dim:axis")),
    _row(
        "split",
        _onnx("Split", "x"),
        _onnx("Split", "x split", since=13),
        *_aten("split unsafe_split", "input:x split_size:split dim:axis"),
        *_aten("split_with_sizes unsafe_split_with_sizes", "input:x split_sizes:split dim:axis"),
        *_aten("chunk unsafe_chunk", "input:x chunks: dim:axis"),
        outputs="y*",
        defaults={"axis": 0},
    ),
    _row(
        "slice",
        _onnx("Slice", "x"),
        _onnx("Slice", "x starts ends axes steps", since=10),
        *_aten("slice", "input:x dim:axes start:starts end:ends step:steps"),
        *_aten("narrow", "input:x dim:axes start:starts length"),
    ),
    _row("select", *_aten("select", "input:x dim:axis index")),
    _row(
        "pad",
        _onnx("Pad", "x"),
        _onnx("Pad", "x pads value axes", since=11),
        *_aten("pad", "input:x pad:pads mode value"),
        *_aten("constant_pad_nd", "input:x pad:pads value"),
        *_aten("reflection_pad1d reflection_pad2d reflection_pad3d", "input:x padding:pads"),
        *_aten("replication_pad1d replication_pad2d replication_pad3d", "input:x padding:pads"),
        defaults={"mode": "constant"},
    ),
    _row(
        "resize",
        _onnx("Upsample", "x scales"),
        _onnx("Resize", "x scales", since=10),
        _onnx("Resize", "x roi scales sizes", since=11),
        *_aten("upsample_nearest1d _upsample_nearest_exact1d", f"{_UPSAMPLE} scales:scales_w"),
        *_aten("upsample_nearest2d _upsample_nearest_exact2d", f"{_UPSAMPLE} scales_h scales_w"),
        *_aten("upsample_nearest3d _upsample_nearest_exact3d", f"{_UPSAMPLE} scales_d scales_h scales_w"),
        *_aten("upsample_linear1d", f"{_UPSAMPLE} align_corners scales:scales_w"),
        *_aten("upsample_bilinear2d upsample_bicubic2d", f"{_UPSAMPLE} align_corners scales_h scales_w"),
        *_aten("upsample_trilinear3d", f"{_UPSAMPLE} align_corners scales_d scales_h scales_w"),
    ),
    _row(
        "average_pool",
        _onnx("AveragePool", "x"),
        *_aten(
            "avg_pool1d",
            "input:x kernel_size:kernel_shape stride:strides padding:pads ceil_mode count_include_pad",
        ),
        *_aten(
            "avg_pool2d avg_pool3d",
            "input:x kernel_size:kernel_shape stride:strides padding:pads ceil_mode count_include_pad "
            "divisor_override",
        ),
        defaults={"count_include_pad": 0, "ceil_mode": 0, "auto_pad": "NOTSET"},
    ),
    _row(
        "global_average_pool",
        _onnx("GlobalAveragePool", "x"),
        *_aten("adaptive_avg_pool1d", "input:x", output_size=[1]),
        *_aten("adaptive_avg_pool2d _adaptive_avg_pool2d", "input:x", output_size=[1, 1]),
        *_aten("adaptive_avg_pool3d _adaptive_avg_pool3d", "input:x", output_size=[1, 1, 1]),
    ),
    # behind global_average_pool, which takes the calls that leave one number of each axis
    _row(
        "adaptive_average_pool",
        *_aten(
            "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
            "_adaptive_avg_pool2d _adaptive_avg_pool3d",
            "input:x output_size",
        ),
    ),
    _row(
        "max_pool",
        _onnx("MaxPool", "x"),
        *_aten(
            "max_pool1d max_pool2d max_pool3d "
            "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices",
            "input:x kernel_size:kernel_shape stride:strides padding:pads dilation:dilations ceil_mode",
        ),
        outputs="y indices",
        defaults={"ceil_mode": 0, "auto_pad": "NOTSET"},
    ),
    _row(
        "reduce_mean",
        _onnx("ReduceMean", "x"),
        _onnx("ReduceMean", "x axes", since=18),
        *_aten("mean", "input:x dim:axes keepdim:keepdims dtype:"),
        defaults={"keepdims": 1, "noop_with_empty_axes": 0},
    ),
    _row(
        "reduce_sum",
        _onnx("ReduceSum", "x"),
        _onnx("ReduceSum", "x axes", since=13),
        *_aten("sum", "input:x dim:axes keepdim:keepdims dtype:"),
        defaults={"keepdims": 1, "noop_with_empty_axes": 0},
    ),
    _row(
        "reduce_prod",
        _onnx("ReduceProd", "x"),
        _onnx("ReduceProd", "x axes", since=18),
        defaults={"keepdims": 1, "noop_with_empty_axes": 0},
    ),
    _row(
        "reduce_sum_square",
        _onnx("ReduceSumSquare", "x"),
        _onnx("ReduceSumSquare", "x axes", since=18),
        defaults={"keepdims": 1, "noop_with_empty_axes": 0},
    ),
    _row(
        "reduce_l1",
        _onnx("ReduceL1", "x"),
        _onnx("ReduceL1", "x axes", since=18),
        *_aten("linalg_vector_norm", "input:x dim:axes keepdim:keepdims dtype:", ord=1),
        *_aten("norm", "input:x dim:axes keepdim:keepdims", p=1),
        defaults={"keepdims": 1, "noop_with_empty_axes": 0},
    ),
    _row(
        "reduce_l2",
        _onnx("ReduceL2", "x"),
        _onnx("ReduceL2", "x axes", since=18),
        *_aten("linalg_vector_norm", "input:x dim:axes keepdim:keepdims dtype:", ord=2),
        *_aten("norm", "input:x dim:axes keepdim:keepdims", p=2),
        *_aten("linalg_norm", "input:x dim:axes keepdim:keepdims dtype:"),
        defaults={"keepdims": 1, "noop_with_empty_axes": 0},
    ),
    _row("var", *_aten("var", f"{_VARIANCE} unbiased")),
    _row("std", *_aten("std", f"{_VARIANCE} unbiased")),
    _row("var_mean", *_aten("var_mean", f"{_VARIANCE} unbiased"), outputs="y mean"),
    _row("std_mean", *_aten("std_mean", f"{_VARIANCE} unbiased"), outputs="y mean"),
    # ONNX's Attention (opset 23) means something else: it may hold a cache and split the heads itself
    _row(
        "attention",
        *_aten(
            "scaled_dot_product_attention",
            "query:q key:k value:v attn_mask:mask dropout_p is_causal scale enable_gqa",
        ),
    ),
    _row("gather_nd", _onnx("GatherND", "x indices")),
    _row("index", *_aten("index", "input:x indices")),
    _row("roll", *_aten("roll", "input:x shifts dims:axes")),
    _row("tile", _onnx("Tile", "x repeats"), *_aten("repeat", "input:x repeats")),
    # ---- constants
    _row("constant", _onnx("Constant", "")),
    _row("constant_of_shape", _onnx("ConstantOfShape", "shape")),
    _row("shape", _onnx("Shape", "x"), defaults={"start": 0}),
    _row("size", _onnx("Size", "x")),
    _row("range", _onnx("Range", "start limit delta")),
    _row("one_hot", _onnx("OneHot", "indices depth values"), defaults={"axis": -1}),
    # ---- quantised
    _row("quantize_linear", _onnx("QuantizeLinear", "x scale zero_point"), defaults={"axis": 1}),
    _row("dequantize_linear", _onnx("DequantizeLinear", "x scale zero_point"), defaults={"axis": 1}),
    _row(
        "quantized_conv",
        _onnx(
            "QLinearConv",
            "x x_scale x_zero_point weight weight_scale weight_zero_point y_scale y_zero_point bias",
        ),
        _onnx("ConvInteger", "x weight x_zero_point weight_zero_point"),
    ),
    _row(
        "quantized_matmul",
        _onnx(
            "QLinearMatMul",
            "a a_scale a_zero_point b b_scale b_zero_point y_scale y_zero_point",
        ),
        _onnx("MatMulInteger", "a b a_zero_point b_zero_point"),
        _onnx("MatMulInteger", "a b a_zero_point b_zero_point", domain=MICROSOFT),
        _onnx("DynamicQuantizeMatMul", "a b b_scale b_zero_point bias", domain=MICROSOFT),
        _onnx("MatMulNBits", "a b scales zero_points g_idx bias", domain=MICROSOFT),
    ),
    # ---- bodies
    _row("if", _onnx("If", "condition"), outputs="outputs*"),
    _row("loop", _onnx("Loop", "trip_count condition carried*"), outputs="outputs*"),
    _row("scan", _onnx("Scan", "inputs*"), outputs="outputs*"),
)

#: Kind of every operator without a row.
UNKNOWN = "unknown"

#: Kind of a call of a function that the model itself defines.
CALL = "call"

#: (kind, slot) of reads that look at the shape of a tensor, or at its dtype, and at none of its numbers.
SHAPE_ONLY = frozenset(
    [("shape", "x"), ("size", "x"), ("cast_like", "like"), ("reshape", "other"), ("expand", "other")]
)

ROWS: Mapping[str, OpRow] = {row.kind: row for row in TABLE}

_SPELLINGS: dict[tuple[str, str], list[tuple[Spelling, OpRow]]] = {}
for _each in TABLE:
    for _spelling in _each.spellings:
        _SPELLINGS.setdefault((_spelling.domain, _spelling.op_type), []).append((_spelling, _each))


def find_spelling(domain: str, op_type: str, version: int) -> tuple[Spelling, OpRow] | None:
    """The row of an operator and the newest of its spellings not above opset `version`.

    A model older than the oldest spelling still gets that one: runtimes accept LayerNormalization at
    opset 12, though no standard defines it.
    """
    candidates = _SPELLINGS.get((domain, op_type))
    if not candidates:
        return None
    in_force = [entry for entry in candidates if entry[0].since <= version]
    return max(in_force or candidates[:1], key=lambda entry: entry[0].since)


def aten_spellings(op_type: str) -> list[tuple[Spelling, OpRow]]:
    """Every row that an ATen operator may be; its arguments decide (`convolution`, transposed or not)."""
    return _SPELLINGS.get((ATEN, op_type), [])


def slot_name(names: tuple[str, ...], position: int) -> str:
    """The slot at `position`: `("inputs*",)` gives `inputs.0`, `inputs.1`, …; past the end, `extra.N`."""
    if position < len(names) and not names[position].endswith("*"):
        return names[position]
    if names and names[-1].endswith("*"):
        return f"{names[-1][:-1]}.{position - len(names) + 1}"
    return f"extra.{position}"
