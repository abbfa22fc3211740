"""One small graph for each row of `centring.rows` and direction, with the answer; and graphs where a condition
does not hold, with the answer of somebody who did not look.

A graph has the op of the row alone. Inputs are data, initializers constants.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from normtool.centring.places import Place
from tests.zoo import Net

Build = Callable[[Net], str | list[str]]
Places = Mapping[str, Place | None]

BEHIND, AHEAD = "behind", "ahead"


@dataclass(frozen=True)
class Row:
    """Asked from `slot` at `place`. `answer`: slot → place; `naive` instead: it is refused, and wrong."""

    name: str
    kind: str
    direction: str
    build: Build | nn.Module
    slot: str
    place: Place
    answer: Places | None = None
    naive: Places | None = None
    code: str = ""
    #: shapes of the arguments of a module
    shapes: tuple[tuple[int, ...], ...] = ()
    opset: int = 18

    def __str__(self) -> str:
        return f"{self.kind}-{self.direction}-{self.name}"


def axis(number: int, length: int) -> Place:
    """One axis as a whole."""
    return Place(number, number + 1, 1, length, 1)


def parts(number: int, outer: int, block: int, inner: int = 1) -> Place:
    """An axis of outer · block · inner numbers."""
    return Place(number, number + 1, outer, block, inner)


def span(start: int, stop: int, block: int) -> Place:
    """Several axes as one block."""
    return Place(start, stop, 1, block, 1)


# ---- pieces -------------------------------------------------------------------------------------------


def op(op_type: str, *operands: Any, shapes: Any = ((2, 5, 6),), **attributes: Any) -> Build:
    """Inputs of these shapes (a number for a dtype in front: ints), then initializers, as operands."""

    def build(net: Net) -> str | list[str]:
        names = [_input(net, i, shape) for i, shape in enumerate(shapes)]
        names += ["" if each is None else _constant(net, each) for each in operands]
        return net.node(op_type, *names, **attributes)  # type: ignore[no-any-return]

    return build


def _input(net: Net, number: int, shape: Any) -> str:
    dtype = None
    if isinstance(shape[0], type):
        dtype, *shape = shape
    return net.input(shape, f"x{number}", dtype)


def _constant(net: Net, each: Any) -> str:
    if isinstance(each, tuple):  # random, of that shape, with a mean
        return net.constant(net.rng.normal(0.5, 1, each))
    return net.constant(np.asarray(each, np.int64) if isinstance(each, list) else np.asarray(each))


def flipped(op_type: str, shapes: Any, constant: Any, **attributes: Any) -> Build:
    """The constant first, then the data."""

    def build(net: Net) -> str:
        return str(net.node(op_type, _constant(net, constant), _input(net, 0, shapes), **attributes))

    return build


def both(
    name: str, kind: str, build: Build | nn.Module, before: tuple[str, Place], after: Places, **more: Any
) -> list[Row]:
    """A place on the one operand that is a place on the one output, whichever way one looks."""
    slot, place = before
    ((out, there),) = after.items()
    assert there is not None
    return [
        Row(name, kind, BEHIND, build, out, there, {slot: place}, **more),
        Row(name, kind, AHEAD, build, slot, place, after, **more),
    ]


class Call(nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


class Picked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.tensor([2, 0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.rows]


ATTENTION = Call(nn.functional.scaled_dot_product_attention)
QKV = ((2, 3, 5, 4),) * 3

D = 6
LAST, FIRST, MIDDLE = axis(2, D), axis(0, 2), axis(1, 5)
HEADS = parts(2, 3, 2)  # (…, 3·2): three heads of two
INTERLEAVED = parts(2, 1, 3, 2)  # (…, 3·2): two blocks, every other number
TOKENS = ((2, 5, D),)
IMAGE = ((2, D, 4, 4),)
CHANNELS = axis(1, D)

# ---- products -----------------------------------------------------------------------------------------

PRODUCTS: tuple[Row, ...] = (
    Row("plain", "linear", BEHIND, op("Gemm", (4, D), shapes=((2, 4),)), "y", axis(1, D), {"b": axis(1, D)}),
    Row(
        "transposed",
        "linear",
        BEHIND,
        op("Gemm", (D, 4), (D,), shapes=((2, 4),), transB=1),
        "y",
        axis(1, D),
        {"b": axis(0, D), "c": axis(0, D)},
    ),
    Row(
        "one-bias-for-all",
        "linear",
        BEHIND,
        op("Gemm", (4, D), (1,), shapes=((2, 4),), alpha=0.5, beta=2.0),
        "y",
        axis(1, D),
        {"b": axis(1, D), "c": None},
    ),
    Row(
        "per-head",
        "linear",
        BEHIND,
        op("Gemm", (4, D), (D,), shapes=((2, 4),)),
        "y",
        parts(1, 3, 2),
        {"b": parts(1, 3, 2), "c": parts(0, 3, 2)},
    ),
    Row(
        "along-the-batch",
        "linear",
        BEHIND,
        op("Gemm", (4, D), shapes=((2, 4),)),
        "y",
        FIRST,
        naive={"b": axis(0, 4)},
        code="axis_mismatch",
    ),
    Row("sees-it", "linear", AHEAD, op("Gemm", (4, D), shapes=((2, 4),)), "a", axis(1, 4), naive={}),
    Row(
        "filters",
        "conv",
        BEHIND,
        op("Conv", (D, 3, 3, 3), (D,), shapes=((2, 3, 5, 5),)),
        "y",
        CHANNELS,
        {"weight": axis(0, D), "bias": axis(0, D)},
    ),
    Row(
        "padded",
        "conv",
        BEHIND,
        op("Conv", (D, 3, 3, 3), shapes=((2, 3, 5, 5),), pads=[1, 1, 1, 1]),
        "y",
        CHANNELS,
        {"weight": axis(0, D)},
    ),
    Row(
        "blocks-within-groups",
        "conv",
        BEHIND,
        op("Conv", (8, 2, 3, 3), (8,), shapes=((2, 4, 5, 5),), group=2),
        "y",
        parts(1, 4, 2),
        {"weight": parts(0, 4, 2), "bias": parts(0, 4, 2)},
    ),
    Row(
        "groups",
        "conv",
        BEHIND,
        op("Conv", (D, 1, 3, 3), shapes=((2, D, 5, 5),), group=D),
        "y",
        CHANNELS,
        naive={"x": CHANNELS},
        code="not_centrable",
    ),
    Row(
        "blocks-across-groups",
        "conv",
        BEHIND,
        op("Conv", (8, 1, 3, 3), shapes=((2, 2, 5, 5),), group=2),
        "y",
        parts(1, 1, 4, 2),
        naive={"x": axis(1, 2)},
        code="not_centrable",
    ),
    Row(
        "along-the-width",
        "conv",
        BEHIND,
        op("Conv", (D, 3, 1, 1), shapes=((2, 3, 5, 5),)),
        "y",
        axis(3, 5),
        naive={"weight": axis(0, D)},
        code="axis_mismatch",
    ),
    Row("sees-it", "conv", AHEAD, op("Conv", (3, D, 1, 1), shapes=IMAGE), "x", CHANNELS, naive={}),
    Row(
        "filters",
        "conv_transpose",
        BEHIND,
        op("ConvTranspose", (3, D, 3, 3), (D,), shapes=((2, 3, 4, 4),), strides=[2, 2]),
        "y",
        CHANNELS,
        {"weight": CHANNELS, "bias": axis(0, D)},
    ),
    Row(
        "groups",
        "conv_transpose",
        BEHIND,
        op("ConvTranspose", (4, 3, 3, 3), shapes=((2, 4, 4, 4),), group=2),
        "y",
        CHANNELS,
        naive={"weight": axis(1, 3)},
        code="not_centrable",
    ),
    Row("weights", "matmul", BEHIND, op("MatMul", (4, D), shapes=((2, 5, 4),)), "y", LAST, {"b": axis(1, D)}),
    Row("rows", "matmul", BEHIND, op("MatMul", (4, D), shapes=((2, 5, 4),)), "y", MIDDLE, {"a": MIDDLE}),
    Row(
        "of-data",
        "matmul",
        BEHIND,
        op("MatMul", shapes=((2, 3, 5, 5), (2, 3, 5, 4))),
        "y",
        axis(3, 4),
        {"b": axis(3, 4)},
    ),
    Row(
        "along-the-batch",
        "matmul",
        BEHIND,
        op("MatMul", (4, D), shapes=((2, 5, 4),)),
        "y",
        FIRST,
        naive={"b": axis(0, 4)},
        code="axis_mismatch",
    ),
    Row(
        "rows", "matmul", AHEAD, op("MatMul", shapes=((3, 4, 5), (3, 5, 2))), "b", axis(2, 2), {"y": axis(2, 2)}
    ),
    Row(
        "rows-of-a",
        "matmul",
        AHEAD,
        op("MatMul", shapes=((3, 4, 5), (3, 5, 2))),
        "a",
        axis(1, 4),
        {"y": axis(1, 4)},
    ),
    Row(
        "fewer-axes",
        "matmul",
        AHEAD,
        op("MatMul", shapes=((3, 4, 5), (5, 2))),
        "b",
        axis(1, 2),
        {"y": axis(2, 2)},
    ),
    Row("contracted", "matmul", AHEAD, op("MatMul", (D, 4), shapes=TOKENS), "a", LAST, naive={}),
    Row(
        "contracted-b", "matmul", AHEAD, op("MatMul", shapes=((3, 4, 5), (3, 5, 2))), "b", axis(1, 5), naive={}
    ),
    Row(
        "along-the-batch",
        "matmul",
        AHEAD,
        op("MatMul", shapes=((3, 4, 5), (3, 5, 2))),
        "a",
        axis(0, 3),
        naive={"y": axis(1, 4)},
    ),
    *both("of-v", "attention", ATTENTION, ("v", axis(3, 4)), {"y": axis(3, 4)}, shapes=QKV),
    Row("of-q", "attention", AHEAD, ATTENTION, "q", axis(3, 4), naive={}, shapes=QKV),
    Row(
        "along-positions",
        "attention",
        BEHIND,
        ATTENTION,
        "y",
        axis(2, 5),
        naive={"v": axis(2, 5)},
        code="axis_mismatch",
        shapes=QKV,
    ),
)

# ---- elementwise --------------------------------------------------------------------------------------

ELEMENTWISE: tuple[Row, ...] = (
    Row("data", "add", BEHIND, op("Add", shapes=((2, 5, D), (5, D))), "y", LAST, {"a": LAST, "b": axis(1, D)}),
    Row("bias", "add", BEHIND, op("Add", (D,)), "y", LAST, {"a": LAST, "b": axis(0, D)}),
    Row("scalar", "add", BEHIND, op("Add", ()), "y", LAST, {"a": LAST, "b": None}),
    Row("uniform", "add", BEHIND, op("Add", (5, 1)), "y", LAST, {"a": LAST, "b": None}),
    Row("per-head", "add", BEHIND, op("Add", (D,)), "y", HEADS, {"a": HEADS, "b": parts(0, 3, 2)}),
    Row(
        "a-part-of-the-block",
        "add",
        BEHIND,
        op("Add", (D,)),
        "y",
        span(1, 3, 5 * D),
        naive={"a": span(1, 3, 5 * D)},
        code="axis_mismatch",
    ),
    Row("data", "add", AHEAD, op("Add", shapes=((5, D), (2, 5, D))), "a", axis(1, D), {"y": LAST}),
    Row(
        "difference",
        "sub",
        BEHIND,
        op("Sub", shapes=((2, 5, D), (D,))),
        "y",
        LAST,
        {"a": LAST, "b": axis(0, D)},
    ),
    Row("difference", "sub", AHEAD, op("Sub", shapes=((2, 5, D), (D,))), "b", axis(0, D), {"y": LAST}),
    Row(
        "three",
        "sum",
        BEHIND,
        op("Sum", (D,), shapes=((2, 5, D), (5, D))),
        "y",
        LAST,
        {"inputs.0": LAST, "inputs.1": axis(1, D), "inputs.2": axis(0, D)},
    ),
    Row(
        "three", "sum", AHEAD, op("Sum", (D,), shapes=((2, 5, D), (5, D))), "inputs.1", axis(1, D), {"y": LAST}
    ),
    Row(
        "chosen-for-the-block",
        "where",
        BEHIND,
        op("Where", shapes=((np.bool_, 5, 1), (2, 5, D), (D,))),
        "y",
        LAST,
        {"a": LAST, "b": axis(0, D)},
    ),
    Row(
        "chosen-for-the-block",
        "where",
        AHEAD,
        op("Where", shapes=((np.bool_, 5, 1), (2, 5, D), (D,))),
        "a",
        LAST,
        {"y": LAST},
    ),
    Row(
        "chosen-within",
        "where",
        BEHIND,
        op("Where", shapes=((np.bool_, 5, D), (2, 5, D), (2, 5, D))),
        "y",
        LAST,
        naive={"a": LAST, "b": LAST},
        code="not_centrable",
    ),
    Row(
        "chosen-within",
        "where",
        AHEAD,
        op("Where", shapes=((np.bool_, 5, D), (2, 5, D), (2, 5, D))),
        "a",
        LAST,
        naive={"y": LAST},
    ),
    Row("scalar", "mul", BEHIND, op("Mul", ()), "y", LAST, {"a": LAST}),
    Row("scalar-first", "mul", BEHIND, flipped("Mul", (2, 5, D), ()), "y", LAST, {"b": LAST}),
    Row("uniform-data", "mul", BEHIND, op("Mul", shapes=((2, 5, D), (2, 5, 1))), "y", LAST, {"a": LAST}),
    Row("uniform-data", "mul", AHEAD, op("Mul", shapes=((2, 5, D), (2, 5, 1))), "a", LAST, {"y": LAST}),
    Row(
        "per-head-scale",
        "mul",
        BEHIND,
        op("Mul", (3, 1), shapes=((2, 3, 4),)),
        "y",
        axis(2, 4),
        {"a": axis(2, 4)},
    ),
    Row("layer-scale", "mul", BEHIND, op("Mul", (D,)), "y", LAST, naive={"a": LAST}, code="scaled"),
    Row("layer-scale", "mul", AHEAD, op("Mul", (D,)), "a", LAST, naive={"y": LAST}),
    Row(
        "gate",
        "mul",
        BEHIND,
        op("Mul", shapes=((2, 5, D), (2, 5, D))),
        "y",
        LAST,
        naive={"a": LAST},
        code="not_centrable",
    ),
    Row("gate", "mul", AHEAD, op("Mul", shapes=((2, 5, D), (2, 5, D))), "b", LAST, naive={"y": LAST}),
    Row("scalar", "div", BEHIND, op("Div", ()), "y", LAST, {"a": LAST}),
    Row("uniform-data", "div", AHEAD, op("Div", shapes=((2, 5, D), (2, 5, 1))), "a", LAST, {"y": LAST}),
    Row(
        "by-it",
        "div",
        BEHIND,
        flipped("Div", (2, 5, D), ()),
        "y",
        LAST,
        naive={"b": LAST},
        code="not_centrable",
    ),
    Row("by-it", "div", AHEAD, flipped("Div", (2, 5, D), ()), "b", LAST, naive={"y": LAST}),
    *both("sign", "neg", op("Neg"), ("x", LAST), {"y": LAST}),
    Row("over-it", "softmax", AHEAD, op("Softmax", axis=-1), "x", LAST, {}),
    Row("over-others", "softmax", AHEAD, op("Softmax", axis=1), "x", LAST, naive={}),
    Row("over-several-heads", "softmax", AHEAD, op("Softmax", axis=-1), "x", HEADS, naive={}),
)

# ---- along other axes ---------------------------------------------------------------------------------

JOINING: tuple[Row, ...] = (
    Row(
        "elsewhere",
        "concat",
        BEHIND,
        op("Concat", shapes=((2, 1, D), (2, 5, D)), axis=1),
        "y",
        LAST,
        {"inputs.0": LAST, "inputs.1": LAST},
    ),
    Row(
        "elsewhere",
        "concat",
        AHEAD,
        op("Concat", shapes=((2, 1, D), (2, 5, D)), axis=1),
        "inputs.0",
        LAST,
        {"y": LAST},
    ),
    Row(
        "along",
        "concat",
        BEHIND,
        op("Concat", shapes=((2, 5, D), (2, 5, D)), axis=2),
        "y",
        axis(2, 2 * D),
        naive={"inputs.0": LAST, "inputs.1": LAST},
        code="axis_mismatch",
    ),
    Row(
        "along",
        "concat",
        AHEAD,
        op("Concat", shapes=((2, 5, D), (2, 5, D)), axis=2),
        "inputs.0",
        LAST,
        naive={"y": axis(2, 2 * D)},
    ),
    Row(
        "elsewhere",
        "split",
        BEHIND,
        op("Split", shapes=((2, 4, D),), axis=1, outputs=2, num_outputs=2),
        "y.1",
        LAST,
        {"x": LAST},
    ),
    Row(
        "elsewhere",
        "split",
        AHEAD,
        op("Split", shapes=((2, 4, D),), axis=1, outputs=2, num_outputs=2),
        "x",
        LAST,
        {"y.0": LAST, "y.1": LAST},
    ),
    Row(
        "along",
        "split",
        BEHIND,
        op("Split", shapes=((2, 4, D),), axis=2, outputs=2, num_outputs=2),
        "y.0",
        axis(2, 3),
        naive={"x": LAST},
        code="axis_mismatch",
    ),
    Row("elsewhere", "slice", BEHIND, op("Slice", [1], [4], [1]), "y", LAST, {"x": LAST}),
    Row("elsewhere", "slice", AHEAD, op("Slice", [1], [4], [1]), "x", LAST, {"y": LAST}),
    Row(
        "along",
        "slice",
        BEHIND,
        op("Slice", [1], [4], [2]),
        "y",
        axis(2, 3),
        naive={"x": LAST},
        code="axis_mismatch",
    ),
    Row("kept", "reduce_mean", BEHIND, op("ReduceMean", [1], keepdims=1), "y", LAST, {"x": LAST}),
    Row("gone", "reduce_mean", BEHIND, op("ReduceMean", [1], keepdims=0), "y", axis(1, D), {"x": LAST}),
    Row("gone", "reduce_mean", AHEAD, op("ReduceMean", [1], keepdims=0), "x", LAST, {"y": axis(1, D)}),
    Row("kept", "reduce_mean", AHEAD, op("ReduceMean", [1], keepdims=1), "x", LAST, {"y": LAST}),
    Row("over-it", "reduce_mean", AHEAD, op("ReduceMean", [2], keepdims=1), "x", LAST, naive={}),
    Row(
        "between",
        "reduce_mean",
        BEHIND,
        op("ReduceMean", [1], keepdims=0),
        "y",
        span(0, 2, 2 * D),
        naive={"x": LAST},
        code="axis_mismatch",
    ),
    Row("gone", "reduce_sum", BEHIND, op("ReduceSum", [0], keepdims=0), "y", axis(1, D), {"x": LAST}),
    Row("gone", "reduce_sum", AHEAD, op("ReduceSum", [0], keepdims=0), "x", LAST, {"y": axis(1, D)}),
    Row("over-it", "reduce_sum", AHEAD, op("ReduceSum", [2], keepdims=0), "x", LAST, naive={}),
    *both(
        "window",
        "average_pool",
        op("AveragePool", shapes=IMAGE, kernel_shape=[2, 2]),
        ("x", CHANNELS),
        {"y": CHANNELS},
    ),
    Row(
        "padded",
        "average_pool",
        BEHIND,
        op("AveragePool", shapes=IMAGE, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
        "y",
        CHANNELS,
        {"x": CHANNELS},
    ),
    Row(
        "over-it",
        "average_pool",
        AHEAD,
        op("AveragePool", shapes=IMAGE, kernel_shape=[2, 2]),
        "x",
        axis(3, 4),
        naive={},
    ),
    *both(
        "window", "global_average_pool", op("GlobalAveragePool", shapes=IMAGE), ("x", CHANNELS), {"y": CHANNELS}
    ),
    *both(
        "window",
        "adaptive_average_pool",
        Call(lambda x: nn.functional.adaptive_avg_pool2d(x, (3, 2))),
        ("x", CHANNELS),
        {"y": CHANNELS},
        shapes=IMAGE,
    ),
    *both(
        "elsewhere",
        "resize",
        op("Resize", None, np.array([1, 1, 2, 2], np.float32), shapes=IMAGE, mode="nearest"),
        ("x", CHANNELS),
        {"y": CHANNELS},
    ),
    *both(
        "linear",
        "resize",
        op("Resize", None, np.array([1, 1, 1.5, 2], np.float32), shapes=IMAGE, mode="linear"),
        ("x", CHANNELS),
        {"y": CHANNELS},
    ),
    Row(
        "unevenly",
        "resize",
        BEHIND,
        op("Resize", None, np.array([1, 1, 1, 1.5], np.float32), shapes=IMAGE, mode="nearest"),
        "y",
        axis(3, 6),
        naive={"x": axis(3, 4)},
        code="axis_mismatch",
    ),
    *both("zeros-elsewhere", "pad", op("Pad", [0, 1, 0, 0, 2, 0]), ("x", LAST), {"y": LAST}),
    *both("copies", "pad", op("Pad", [0, 1, 0, 0, 2, 0], mode="edge"), ("x", LAST), {"y": LAST}),
    Row("ones", "pad", BEHIND, op("Pad", [0, 1, 0, 0, 2, 0], np.float64(1)), "y", LAST, naive={"x": LAST}),
    Row("ones", "pad", AHEAD, op("Pad", [0, 1, 0, 0, 2, 0], np.float64(1)), "x", LAST, {"y": LAST}),
    Row(
        "along",
        "pad",
        BEHIND,
        op("Pad", [0, 0, 1, 0, 0, 2]),
        "y",
        axis(2, D + 3),
        naive={"x": LAST},
        code="not_centrable",
    ),
    Row("along", "pad", AHEAD, op("Pad", [0, 0, 1, 0, 0, 2]), "x", LAST, naive={"y": axis(2, D + 3)}),
    *both("elsewhere", "roll", Call(lambda x: torch.roll(x, 2, 1)), ("x", LAST), {"y": LAST}, shapes=TOKENS),
    Row(
        "per-head",
        "roll",
        BEHIND,
        Call(lambda x: torch.roll(x, 1, 2)),
        "y",
        HEADS,
        code="axis_mismatch",
        naive={"x": HEADS},
        shapes=TOKENS,
    ),
)

# ---- what only moves numbers --------------------------------------------------------------------------

CARRIERS: tuple[Row, ...] = (
    *both("plain", "identity", op("Identity"), ("x", LAST), {"y": LAST}),
    *both("idle", "dropout", op("Dropout"), ("x", HEADS), {"y": HEADS}),
    *both("wider", "cast", op("Cast", shapes=TOKENS, to=onnx.TensorProto.DOUBLE), ("x", LAST), {"y": LAST}),
    *both("wider", "cast_like", op("CastLike", np.float64(1), shapes=TOKENS), ("x", LAST), {"y": LAST}),
    *both("moved", "transpose", op("Transpose", perm=[2, 0, 1]), ("x", LAST), {"y": axis(0, D)}),
    *both("parts", "transpose", op("Transpose", perm=[2, 0, 1]), ("x", HEADS), {"y": parts(0, 3, 2)}),
    *both("heads-apart", "reshape", op("Reshape", [2, 5, 3, 2]), ("x", HEADS), {"y": axis(3, 2)}),
    *both(
        "heads-together",
        "reshape",
        op("Reshape", [2, 5, 8], shapes=((2, 5, 2, 4),)),
        ("x", axis(3, 4)),
        {"y": parts(2, 2, 4)},
    ),
    *both("interleaved", "reshape", op("Reshape", [2, 5, 3, 2]), ("x", INTERLEAVED), {"y": axis(2, 3)}),
    *both("two-in-one", "reshape", op("Reshape", [2, 5 * D]), ("x", span(1, 3, 5 * D)), {"y": axis(1, 5 * D)}),
    *both("others", "reshape", op("Reshape", [10, D]), ("x", LAST), {"y": axis(1, D)}),
    Row(
        "rows-of-two-axes",
        "reshape",
        BEHIND,
        op("Reshape", [2, 6, 5]),
        "y",
        axis(2, 5),
        {"x": Place(1, 3, 6, 5, 1)},
    ),
    *both("flat", "flatten", op("Flatten", axis=1), ("x", LAST), {"y": parts(1, 5, D)}),
    *both("squeezed", "squeeze", op("Squeeze", [1], shapes=((2, 1, D),)), ("x", LAST), {"y": axis(1, D)}),
    *both("unsqueezed", "unsqueeze", op("Unsqueeze", [1]), ("x", LAST), {"y": axis(3, D)}),
    *both("elsewhere", "expand", op("Expand", [2, 5, D], shapes=((1, D),)), ("x", axis(1, D)), {"y": LAST}),
    *both(
        "one-of-many", "select", Call(lambda x: x.select(1, 2)), ("x", LAST), {"y": axis(1, D)}, shapes=TOKENS
    ),
    *both("repeated", "tile", op("Tile", [1, 3, 1]), ("x", LAST), {"y": LAST}),
    Row(
        "rows",
        "embedding",
        BEHIND,
        op("Gather", [1, 0, 3], shapes=((5, D),)),
        "y",
        axis(1, D),
        {"table": axis(1, D)},
    ),
    Row(
        "rows",
        "embedding",
        AHEAD,
        op("Gather", [1, 0, 3], shapes=((5, D),)),
        "table",
        axis(1, D),
        {"y": axis(1, D)},
    ),
    Row("in-front", "embedding", BEHIND, op("Gather", [1, 0, 3], axis=1), "y", FIRST, {"table": FIRST}),
    Row(
        "two-indices",
        "embedding",
        BEHIND,
        op("Gather", np.array([[1, 0, 3]] * 2), shapes=((5, D),)),
        "y",
        LAST,
        {"table": axis(1, D)},
    ),
    Row(
        "along",
        "embedding",
        BEHIND,
        op("Gather", [1, 0, 3], axis=2),
        "y",
        axis(2, 3),
        naive={"table": LAST},
        code="axis_mismatch",
    ),
    *both("rows", "gather_nd", op("GatherND", np.array([[0, 1], [1, 3]])), ("x", LAST), {"y": axis(1, D)}),
    *both("rows", "index", Picked(), ("x", LAST), {"y": LAST}, shapes=TOKENS),
)

ROWS = (*PRODUCTS, *ELEMENTWISE, *JOINING, *CARRIERS)
