"""The one table of operators: each kind, its canonical slots, its spellings, its defaults.

A row maps the ONNX spellings of an operator (every opset, the contrib domains) to one kind with one
set of slot names. Where an opset moved something from an attribute to an input (`Squeeze.axes` at 13),
the slot and the attribute share a name and `constants.attribute` reads either. A new operator is a new row.

Defaults are the operator's own, in the precision ONNX stores them (float32).
`tests/test_ops.py` holds every row against the schemas of the installed onnx package.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Spelling:
    """`op_type` in `domain`, from opset `since` on, until a later spelling of the same name.

    `slots` name the inputs in order; a last one ending in `*` repeats (`inputs.0`, `inputs.1`, …).
    """

    op_type: str
    slots: tuple[str, ...]
    domain: str = ""
    since: int = 1


@dataclass(frozen=True)
class OpRow:
    kind: str
    spellings: tuple[Spelling, ...]
    outputs: tuple[str, ...] = ("y",)
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _onnx(op_type: str, slots: str, *, since: int = 1, domain: str = "") -> Spelling:
    return Spelling(op_type, tuple(slots.split()), domain, since)


def _row(
    kind: str, *spellings: Spelling, outputs: str = "y", defaults: Mapping[str, Any] | None = None
) -> OpRow:
    return OpRow(kind, spellings, tuple(outputs.split()), defaults or {})


def f32(number: float) -> float:
    """A float attribute as ONNX stores it: `f32(1e-5) == 9.999999747378752e-06`."""
    return float(np.float32(number))


_EPS5 = {"epsilon": f32(1e-5)}
_EPS12 = {"epsilon": f32(1e-12)}

TABLE: tuple[OpRow, ...] = (
    # ---- linear operators that hold weights
    _row("conv", _onnx("Conv", "x weight bias"), defaults={"group": 1, "auto_pad": "NOTSET"}),
    _row(
        "conv_transpose",
        _onnx("ConvTranspose", "x weight bias"),
        defaults={"group": 1, "auto_pad": "NOTSET"},
    ),
    _row(
        "linear",
        _onnx("Gemm", "a b c"),
        defaults={"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0},
    ),
    _row("matmul", _onnx("MatMul", "a b")),
    _row("embedding", _onnx("Gather", "table indices"), defaults={"axis": 0}),
    # ---- normalisation, with statistics or without
    _row(
        "batch_norm",
        _onnx("BatchNormalization", "x weight bias mean var"),
        outputs="y mean_out var_out saved_mean saved_var",
        defaults={**_EPS5, "training_mode": 0, "spatial": 1, "is_test": 0, "momentum": f32(0.9)},
    ),
    _row(
        "instance_norm",
        _onnx("InstanceNormalization", "x weight bias"),
        defaults=_EPS5,
    ),
    _row(
        "layer_norm",
        _onnx("LayerNormalization", "x weight bias"),
        outputs="y mean inv_std_dev",
        defaults={**_EPS5, "axis": -1},
    ),
    _row(
        "rms_norm",
        _onnx("RMSNormalization", "x weight"),
        _onnx("SimplifiedLayerNormalization", "x weight"),
        _onnx("SimplifiedLayerNormalization", "x weight", domain=MICROSOFT),
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
    _row("group_norm", _onnx("GroupNormalization", "x weight bias", since=18), defaults=_EPS5),
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
    _row("add", _onnx("Add", "a b")),
    _row("sub", _onnx("Sub", "a b")),
    _row("mul", _onnx("Mul", "a b")),
    _row("div", _onnx("Div", "a b")),
    _row("sum", _onnx("Sum", "inputs*")),
    _row("neg", _onnx("Neg", "x")),
    _row("sqrt", _onnx("Sqrt", "x")),
    _row("reciprocal", _onnx("Reciprocal", "x")),
    _row("pow", _onnx("Pow", "x exponent")),
    _row("where", _onnx("Where", "condition a b")),
    _row("relu", _onnx("Relu", "x")),
    _row("leaky_relu", _onnx("LeakyRelu", "x"), defaults={"alpha": f32(0.01)}),
    _row("prelu", _onnx("PRelu", "x slope")),
    _row("clip", _onnx("Clip", "x"), _onnx("Clip", "x min max", since=11)),
    _row("sigmoid", _onnx("Sigmoid", "x")),
    _row("tanh", _onnx("Tanh", "x")),
    _row("gelu", _onnx("Gelu", "x"), _onnx("Gelu", "x", domain=MICROSOFT)),
    _row("hard_sigmoid", _onnx("HardSigmoid", "x")),
    _row("hard_swish", _onnx("HardSwish", "x")),
    _row("erf", _onnx("Erf", "x")),
    _row("softmax", _onnx("Softmax", "x")),
    # ---- carriers: the same numbers under another shape, dtype or name
    _row("identity", _onnx("Identity", "x")),
    _row(
        "dropout",
        _onnx("Dropout", "x"),
        _onnx("Dropout", "x ratio training_mode", since=12),
        outputs="y mask",
    ),
    _row("cast", _onnx("Cast", "x")),
    _row("cast_like", _onnx("CastLike", "x like")),
    _row("transpose", _onnx("Transpose", "x")),
    _row("reshape", _onnx("Reshape", "x shape"), defaults={"allowzero": 0}),
    _row("flatten", _onnx("Flatten", "x"), defaults={"axis": 1}),
    _row("squeeze", _onnx("Squeeze", "x"), _onnx("Squeeze", "x axes", since=13)),
    _row("unsqueeze", _onnx("Unsqueeze", "x"), _onnx("Unsqueeze", "x axes", since=13)),
    _row("expand", _onnx("Expand", "x shape")),
    # ---- structure
    _row("concat", _onnx("Concat", "inputs*")),
    _row("split", _onnx("Split", "x"), _onnx("Split", "x split", since=13), outputs="y*"),
    _row("slice", _onnx("Slice", "x"), _onnx("Slice", "x starts ends axes steps", since=10)),
    _row("pad", _onnx("Pad", "x"), _onnx("Pad", "x pads value axes", since=11)),
    _row(
        "resize",
        _onnx("Upsample", "x scales"),
        _onnx("Resize", "x scales", since=10),
        _onnx("Resize", "x roi scales sizes", since=11),
    ),
    _row("average_pool", _onnx("AveragePool", "x"), defaults={"count_include_pad": 0}),
    _row("global_average_pool", _onnx("GlobalAveragePool", "x")),
    _row("max_pool", _onnx("MaxPool", "x"), outputs="y indices"),
    _row("reduce_mean", _onnx("ReduceMean", "x"), _onnx("ReduceMean", "x axes", since=18)),
    # ---- constants
    _row("constant", _onnx("Constant", "")),
    _row("constant_of_shape", _onnx("ConstantOfShape", "shape")),
    _row("shape", _onnx("Shape", "x"), defaults={"start": 0}),
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


def slot_name(names: tuple[str, ...], position: int) -> str:
    """The slot at `position`: `("inputs*",)` gives `inputs.0`, `inputs.1`, …; past the end, `extra.N`."""
    if position < len(names) and not names[position].endswith("*"):
        return names[position]
    if names and names[-1].endswith("*"):
        return f"{names[-1][:-1]}.{position - len(names) + 1}"
    return f"extra.{position}"
