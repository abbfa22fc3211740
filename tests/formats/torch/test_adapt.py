"""ATen calls come out as ONNX's operators would: the same kind, slots and attributes, with any batch."""

import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from onnx import TensorProto, helper
from torch import fx, nn

import normtool
from normtool.formats.torch.adapt import _ADAPT, _ONLY_WHERE, LAST, adapt
from normtool.ops import ATEN, ROWS, UNKNOWN
from tests.formats.torch.checks import decomposed, export
from tests.formats.torch.test_fold_module import Through

#: Lengths that differ from each other, so that a wrong axis shows.
SHAPES = {
    "vector": (3, 8),
    "signal": (3, 4, 8),
    "image": (3, 4, 5, 6),
    "volume": (3, 4, 5, 6, 7),
    "thin": (3, 1, 5, 1),
}

OPSET = 21


def example(name):
    shape = SHAPES[name]
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def exported(function, *inputs, open_batch=False, **members):
    module = Through(lambda m, *x: function(m, *x), **members)
    batch = {0: torch.export.Dim("batch")}
    shapes = {"dynamic_shapes": (tuple(batch for _ in inputs),)} if open_batch else {}
    return export(module, *inputs, **shapes)


def last_op(program):
    graph = normtool.load(program).graph
    return graph, graph.ops[-1]


def is_open(graph):
    return any(isinstance(length, str) for tensor in graph.tensors for length in tensor.shape)


class Case:
    """`opened` is what is said otherwise where the batch is open."""

    def __init__(self, function, kind, attributes, on="image", opened=None, slots=("x",), in_onnx=True):
        self.function, self.kind, self.attributes = function, kind, attributes
        self.on, self.opened, self.slots = on, opened or {}, set(slots)
        self.in_onnx = in_onnx and any(spelling.domain != ATEN for spelling in ROWS[kind].spellings)


def window(kernel, strides, pads, **more):
    return {"kernel_shape": kernel, "strides": strides, "pads": pads, "ceil_mode": 0, **more}


def reshaped(*shape):
    return {"shape": list(shape), "allowzero": 1}


def cut(axis, start, end, step=1):
    return {"axes": [axis], "starts": [start], "ends": [end], "steps": [step]}


def resized(mode, coordinates, sizes, **more):
    return {"mode": mode, "coordinate_transformation_mode": coordinates, "sizes": sizes, **more}


def partly(*sizes, **more):
    """What a resize of an open batch says: nothing of the first two axes."""
    return {"axes": list(range(2, 2 + len(sizes))), "sizes": list(sizes), **more}


def nearest(sizes, **more):
    return resized("nearest", "asymmetric", sizes, nearest_mode="floor", **more)


OPEN_BATCH = {"shape": [-1, 4, 5, 6]}

CASES = {
    # ---- slice, split, select
    "slice": Case(lambda m, x: x[:, 1:3], "slice", cut(1, 1, 3)),
    "slice-from-the-back": Case(lambda m, x: x[:, -3:-1], "slice", cut(1, -3, -1)),
    "slice-to-the-end": Case(lambda m, x: x[..., 2:], "slice", cut(3, 2, LAST)),
    "slice-with-a-step": Case(lambda m, x: x[:, :, ::2], "slice", cut(2, 0, LAST, 2)),
    "slice-of-everything": Case(lambda m, x: torch.ops.aten.slice.Tensor(x), "slice", cut(0, 0, LAST)),
    "narrow": Case(lambda m, x: x.narrow(1, 1, 2), "slice", cut(1, 1, 3)),
    "narrow-from-the-back": Case(lambda m, x: x.narrow(-1, -3, 2), "slice", cut(-1, -3, -1)),
    "narrow-to-the-end": Case(lambda m, x: x.narrow(2, -3, 3), "slice", cut(2, -3, LAST)),
    "split": Case(lambda m, x: x.split(3, 1), "split", {"axis": 1, "split": [3, 1]}),
    "split-by-sizes": Case(lambda m, x: x.split([1, 3], -3), "split", {"axis": -3, "split": [1, 3]}),
    "split-unsafely": Case(lambda m, x: x.unsafe_split(2, 1), "split", {"axis": 1, "split": [2, 2]}),
    "chunk": Case(lambda m, x: x.chunk(3, 2), "split", {"axis": 2, "split": [2, 2, 1]}),
    "chunk-into-fewer": Case(lambda m, x: x.chunk(4, -1), "split", {"axis": -1, "split": [2, 2, 2]}),
    "select": Case(lambda m, x: x[:, -1], "select", {"axis": 1, "index": -1}),
    "select-behind-the-dots": Case(lambda m, x: x[..., 2], "select", {"axis": 3, "index": 2}),
    "index-select": Case(
        lambda m, x: x.index_select(1, m.picked), "embedding", {"axis": 1}, slots=("table", "indices")
    ),
    # ---- pad
    "pad": Case(
        lambda m, x: F.pad(x, (1, 2, 3, 0)),
        "pad",
        {"mode": "constant", "pads": [0, 0, 3, 1, 0, 0, 0, 2], "value": 0.0},
    ),
    "pad-with-a-number": Case(
        lambda m, x: F.pad(x, (1, 2), value=0.5),
        "pad",
        {"mode": "constant", "pads": [0, 0, 0, 1, 0, 0, 0, 2], "value": 0.5},
    ),
    "pad-channels": Case(
        lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 2)),
        "pad",
        {"mode": "constant", "pads": [0, 1, 0, 0, 0, 2, 0, 0], "value": 0.0},
    ),
    "pad-nd": Case(
        lambda m, x: torch.constant_pad_nd(x, (-1, 2), 3),
        "pad",
        {"mode": "constant", "pads": [0, 0, 0, -1, 0, 0, 0, 2], "value": 3},
    ),
    "reflect": Case(
        lambda m, x: F.pad(x, (1, 2, 3, 0), "reflect"),
        "pad",
        {"mode": "reflect", "pads": [0, 0, 3, 1, 0, 0, 0, 2]},
    ),
    "replicate": Case(
        lambda m, x: F.pad(x, (1, 2, 3, 0, 0, 1), "replicate"),
        "pad",
        {"mode": "edge", "pads": [0, 0, 0, 3, 1, 0, 0, 1, 0, 2]},
        on="volume",
    ),
    "circular": Case(
        lambda m, x: F.pad(x, (1, 2), "circular"),
        "pad",
        {"mode": "wrap", "pads": [0, 0, 1, 0, 0, 2]},
        on="signal",
    ),
    "reflection-pad": Case(
        lambda m, x: torch.ops.aten.reflection_pad1d(x, (1, 2)),
        "pad",
        {"mode": "reflect", "pads": [0, 0, 1, 0, 0, 2]},
        on="signal",
    ),
    "replication-pad": Case(
        lambda m, x: torch.ops.aten.replication_pad2d(x, (1, 2, 3, 0)),
        "pad",
        {"mode": "edge", "pads": [0, 0, 3, 1, 0, 0, 0, 2]},
    ),
    # ---- resize
    "nearest": Case(
        lambda m, x: F.interpolate(x, scale_factor=2),
        "resize",
        nearest([3, 4, 10, 12], scales=[1.0, 1.0, 2.0, 2.0]),
        opened=partly(10, 12, scales=[2.0, 2.0]),
    ),
    "nearest-by-size": Case(
        lambda m, x: F.interpolate(x, size=(7, 3)), "resize", nearest([3, 4, 7, 3]), opened=partly(7, 3)
    ),
    "nearest-1d": Case(
        lambda m, x: F.interpolate(x, scale_factor=1.75),
        "resize",
        nearest([3, 4, 14], scales=[1.0, 1.0, 1.75]),
        on="signal",
        opened=partly(14, scales=[1.75]),
    ),
    "nearest-3d": Case(
        lambda m, x: F.interpolate(x, scale_factor=1.6, recompute_scale_factor=True),
        "resize",
        nearest([3, 4, 8, 9, 11]),
        on="volume",
        opened=partly(8, 9, 11),
    ),
    "nearest-exact": Case(
        lambda m, x: F.interpolate(x, size=(8, 4), mode="nearest-exact"),
        "resize",
        resized("nearest", "half_pixel", [3, 4, 8, 4], nearest_mode="round_prefer_ceil"),
        opened=partly(8, 4),
    ),
    "linear": Case(
        lambda m, x: F.interpolate(x, scale_factor=1.7, mode="linear"),
        "resize",
        resized("linear", "half_pixel", [3, 4, 13], scales=[1.0, 1.0, 1.7]),
        on="signal",
        opened=partly(13, scales=[1.7]),
    ),
    "bilinear": Case(
        lambda m, x: F.interpolate(x, size=(8, 1), mode="bilinear"),
        "resize",
        resized("linear", "half_pixel", [3, 4, 8, 1]),
        opened=partly(8, 1),
    ),
    "bilinear-between-corners": Case(
        lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
        "resize",
        resized("linear", "align_corners", [3, 4, 10, 12]),
        opened=partly(10, 12),
    ),
    "bicubic": Case(
        lambda m, x: F.interpolate(x, scale_factor=(2, 1.5), mode="bicubic"),
        "resize",
        resized("cubic", "half_pixel", [3, 4, 10, 9], scales=[1.0, 1.0, 2.0, 1.5]),
        opened=partly(10, 9, scales=[2.0, 1.5]),
    ),
    "trilinear": Case(
        lambda m, x: F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=True),
        "resize",
        resized("linear", "align_corners", [3, 4, 10, 12, 14]),
        on="volume",
        opened=partly(10, 12, 14),
    ),
    "upsample-without-vec": Case(
        lambda m, x: torch.ops.aten.upsample_bilinear2d(x, (10, 9), False, 2.0, 1.5),
        "resize",
        resized("linear", "half_pixel", [3, 4, 10, 9], scales=[1.0, 1.0, 2.0, 1.5]),
        opened=partly(10, 9, scales=[2.0, 1.5]),
    ),
    "upsample-1d-without-vec": Case(
        lambda m, x: torch.ops.aten.upsample_nearest1d(x, (12,), 1.5),
        "resize",
        nearest([3, 4, 12], scales=[1.0, 1.0, 1.5]),
        on="signal",
        opened=partly(12, scales=[1.5]),
    ),
    # ---- pools and means
    "global-pool-1d": Case(lambda m, x: F.adaptive_avg_pool1d(x, 1), "global_average_pool", {}, on="signal"),
    "global-pool-2d": Case(lambda m, x: F.adaptive_avg_pool2d(x, 1), "global_average_pool", {}),
    "global-pool-3d": Case(lambda m, x: F.adaptive_avg_pool3d(x, 1), "global_average_pool", {}, on="volume"),
    "adaptive-pool": Case(
        lambda m, x: F.adaptive_avg_pool2d(x, (2, 1)), "adaptive_average_pool", {"output_size": [2, 1]}
    ),
    "adaptive-pool-of-one-axis": Case(
        lambda m, x: F.adaptive_avg_pool2d(x, (None, 1)), "adaptive_average_pool", {"output_size": [5, 1]}
    ),
    "area": Case(
        lambda m, x: F.interpolate(x, scale_factor=2, mode="area"),
        "adaptive_average_pool",
        {"output_size": [16]},
        on="signal",
    ),
    "average-pool": Case(
        lambda m, x: F.avg_pool2d(x, 2),
        "average_pool",
        window([2, 2], [2, 2], [0, 0, 0, 0], count_include_pad=1),
    ),
    "average-pool-1d": Case(
        lambda m, x: F.avg_pool1d(x, 3, 2, 1, count_include_pad=False),
        "average_pool",
        window([3], [2], [1, 1], count_include_pad=0),
        on="signal",
    ),
    "average-pool-3d": Case(
        lambda m, x: F.avg_pool3d(x, (1, 2, 3), padding=(0, 1, 1)),
        "average_pool",
        window([1, 2, 3], [1, 2, 3], [0, 1, 1, 0, 1, 1], count_include_pad=1),
        on="volume",
    ),
    "average-pool-with-a-divisor": Case(
        lambda m, x: F.avg_pool2d(x, (2, 3), 1, ceil_mode=True, divisor_override=5),
        "average_pool",
        window([2, 3], [1, 1], [0, 0, 0, 0], count_include_pad=1, divisor_override=5) | {"ceil_mode": 1},
        in_onnx=False,
    ),
    "max-pool": Case(
        lambda m, x: F.max_pool2d(x, 2), "max_pool", window([2, 2], [2, 2], [0, 0, 0, 0], dilations=[1, 1])
    ),
    "max-pool-1d": Case(
        lambda m, x: F.max_pool1d(x, 3, 2, 1, 2, ceil_mode=True),
        "max_pool",
        window([3], [2], [1, 1], dilations=[2]) | {"ceil_mode": 1},
        on="signal",
    ),
    "max-pool-3d": Case(
        lambda m, x: F.max_pool3d(x, (1, 2, 3), 1, (0, 1, 1)),
        "max_pool",
        window([1, 2, 3], [1, 1, 1], [0, 1, 1, 0, 1, 1], dilations=[1, 1, 1]),
        on="volume",
    ),
    "max-pool-and-indices": Case(
        lambda m, x: F.max_pool2d(x, 2, 1, return_indices=True)[0],
        "max_pool",
        window([2, 2], [1, 1], [0, 0, 0, 0], dilations=[1, 1]),
    ),
    "mean": Case(lambda m, x: x.mean(), "reduce_mean", {"axes": [0, 1, 2, 3], "keepdims": 0}),
    "mean-of-axes": Case(lambda m, x: x.mean((2, -1)), "reduce_mean", {"axes": [2, -1], "keepdims": 0}),
    "mean-of-the-first-axis": Case(lambda m, x: x.mean(0), "reduce_mean", {"axes": [0], "keepdims": 0}),
    "mean-that-keeps-axes": Case(
        lambda m, x: x.mean(-1, keepdim=True), "reduce_mean", {"axes": [-1], "keepdims": 1}
    ),
    "mean-of-no-axes": Case(
        lambda m, x: x.mean((), True), "reduce_mean", {"axes": [0, 1, 2, 3], "keepdims": 1}
    ),
    "sum": Case(lambda m, x: x.sum(), "reduce_sum", {"axes": [0, 1, 2, 3], "keepdims": 0}),
    "sum-of-axes": Case(lambda m, x: x.sum((2, -1)), "reduce_sum", {"axes": [2, -1], "keepdims": 0}),
    "length": Case(lambda m, x: torch.linalg.vector_norm(x, dim=1), "reduce_l2", {"axes": [1], "keepdims": 0}),
    "length-by-norm": Case(
        lambda m, x: torch.ops.aten.norm.ScalarOpt_dim(x, 2, [1], True),
        "reduce_l2",
        {"axes": [1], "keepdims": 1},
    ),
    "length-by-linalg-norm": Case(
        lambda m, x: torch.linalg.norm(x, dim=-1, keepdim=True), "reduce_l2", {"axes": [-1], "keepdims": 1}
    ),
    "sum-of-magnitudes": Case(
        lambda m, x: torch.linalg.vector_norm(x, 1, dim=1), "reduce_l1", {"axes": [1], "keepdims": 0}
    ),
    "variance": Case(lambda m, x: x.var(), "var", {"axes": [0, 1, 2, 3], "keepdims": 0, "correction": 1}),
    "variance-biased": Case(
        lambda m, x: x.var(-1, unbiased=False), "var", {"axes": [-1], "keepdims": 0, "correction": 0}
    ),
    "variance-corrected": Case(
        lambda m, x: x.var(1, correction=2, keepdim=True), "var", {"axes": [1], "keepdims": 1, "correction": 2}
    ),
    "deviation": Case(
        lambda m, x: x.std((1, 2), keepdim=True), "std", {"axes": [1, 2], "keepdims": 1, "correction": 1}
    ),
    "variance-and-mean": Case(
        lambda m, x: torch.var_mean(x, -1, unbiased=False)[0],
        "var_mean",
        {"axes": [-1], "keepdims": 0, "correction": 0},
    ),
    "deviation-and-mean": Case(
        lambda m, x: torch.std_mean(x, 1)[0], "std_mean", {"axes": [1], "keepdims": 0, "correction": 1}
    ),
    "square": Case(lambda m, x: x.square(), "pow", {"exponent": 2}, in_onnx=False),
    # ---- shapes
    "expand": Case(
        lambda m, x: x[:, :1].expand(-1, 4, 5, 6), "expand", {"shape": [-1, 4, 5, 6]}, in_onnx=False
    ),
    "flatten": Case(lambda m, x: x.flatten(1), "reshape", reshaped(3, 120), opened={"shape": [-1, 120]}),
    "flatten-two": Case(
        lambda m, x: x.flatten(-3, 2), "reshape", reshaped(3, 20, 6), opened={"shape": [-1, 20, 6]}
    ),
    "flatten-all": Case(lambda m, x: x.flatten(), "reshape", reshaped(360), opened={"shape": [-1]}),
    "ravel": Case(lambda m, x: x.ravel(), "reshape", reshaped(360), opened={"shape": [-1]}),
    "unflatten": Case(
        lambda m, x: x.unflatten(1, (2, -1)),
        "reshape",
        reshaped(3, 2, 2, 5, 6),
        opened={"shape": [-1, 2, 2, 5, 6]},
    ),
    "view": Case(lambda m, x: x.view(-1, 30), "reshape", reshaped(12, 30), opened={"shape": [-1, 30]}),
    "unsafe-view": Case(
        lambda m, x: torch.ops.aten._unsafe_view(x, (-1, 30)),
        "reshape",
        reshaped(12, 30),
        opened={"shape": [-1, 30]},
    ),
    "view-in-place-of-itself": Case(
        lambda m, x: x.view_as(x), "reshape", reshaped(3, 4, 5, 6), opened=OPEN_BATCH, slots=("x", "other")
    ),
    "reshape-like": Case(
        lambda m, x: x.reshape_as(x), "reshape", reshaped(3, 4, 5, 6), opened=OPEN_BATCH, slots=("x", "other")
    ),
    "squeeze": Case(lambda m, x: x.squeeze(1), "squeeze", {"axes": [1]}, on="thin"),
    "squeeze-from-the-back": Case(lambda m, x: x.squeeze(-1), "squeeze", {"axes": [-1]}, on="thin"),
    "squeeze-all": Case(lambda m, x: x.squeeze(), "squeeze", {"axes": [1, 3]}, on="thin"),
    "squeeze-several": Case(lambda m, x: x.squeeze((1, 2, -1)), "squeeze", {"axes": [1, -1]}, on="thin"),
    "squeeze-a-longer-axis": Case(lambda m, x: x.squeeze(2), "squeeze", {"axes": []}, on="thin", in_onnx=False),
    "unsqueeze": Case(lambda m, x: x.unsqueeze(-1), "unsqueeze", {"axes": [-1]}),
    "index-by-none": Case(lambda m, x: x[:, None], "unsqueeze", {"axes": [1]}),
    "squeeze-in-place": Case(lambda m, x: x.clone().squeeze_(1), "squeeze", {"axes": [1]}, on="thin"),
    "unsqueeze-in-place": Case(lambda m, x: x.clone().unsqueeze_(1), "unsqueeze", {"axes": [1]}),
    "transpose-in-place": Case(lambda m, x: x.clone().transpose_(1, 3), "transpose", {"perm": [0, 3, 2, 1]}),
    "permute": Case(lambda m, x: x.permute(0, -1, 1, 2), "transpose", {"perm": [0, 3, 1, 2]}),
    "transpose": Case(lambda m, x: x.transpose(-1, 1), "transpose", {"perm": [0, 3, 2, 1]}),
    "swapaxes": Case(lambda m, x: x.swapaxes(1, -2), "transpose", {"perm": [0, 2, 1, 3]}),
    "swapdims": Case(lambda m, x: x.swapdims(3, 1), "transpose", {"perm": [0, 3, 2, 1]}),
    "movedim": Case(lambda m, x: x.movedim(1, -1), "transpose", {"perm": [0, 2, 3, 1]}),
    "movedim-forward": Case(lambda m, x: x.movedim(-1, 1), "transpose", {"perm": [0, 3, 1, 2]}),
    "moveaxis": Case(lambda m, x: torch.moveaxis(x, (1, 2), (-1, 0)), "transpose", {"perm": [2, 0, 3, 1]}),
    "t": Case(lambda m, x: x.t(), "transpose", {"perm": [1, 0]}, on="vector"),
    "T": Case(lambda m, x: x.T, "transpose", {"perm": [1, 0]}, on="vector"),
    "mT": Case(lambda m, x: x.mT, "transpose", {"perm": [0, 1, 3, 2]}),
    "adjoint": Case(lambda m, x: x.adjoint(), "transpose", {"perm": [0, 1, 3, 2]}),
    "mH": Case(lambda m, x: x.mH, "transpose", {"perm": [0, 2, 1]}, on="signal"),
    "H": Case(lambda m, x: x.H, "transpose", {"perm": [1, 0]}, on="vector"),
    # ---- others
    "cat": Case(lambda m, x: torch.cat([x, x], -1), "concat", {"axis": -1}, slots=("inputs.0", "inputs.1")),
    "concat": Case(lambda m, x: torch.concat([x, x]), "concat", {"axis": 0}, slots=("inputs.0", "inputs.1")),
    "concatenate": Case(
        lambda m, x: torch.concatenate([x, x], 1), "concat", {"axis": 1}, slots=("inputs.0", "inputs.1")
    ),
    "embedding": Case(
        lambda m, x: F.embedding(m.picked, x), "embedding", {"axis": 0}, slots=("table", "indices"), on="vector"
    ),
    "relu6": Case(lambda m, x: F.relu6(x), "clip", {"min": 0.0, "max": 6.0}),
    "attention": Case(
        lambda m, x: F.scaled_dot_product_attention(x, x, x),
        "attention",
        {"is_causal": 0, "dropout_p": 0.0, "scale": 1 / math.sqrt(6), "enable_gqa": 0},
        slots=("q", "k", "v"),
        in_onnx=False,
    ),
    "attention-under-a-mask": Case(
        lambda m, x: F.scaled_dot_product_attention(x, x, x, m.mask, scale=0.5, enable_gqa=True),
        "attention",
        {"is_causal": 0, "dropout_p": 0.0, "scale": 0.5, "enable_gqa": 1},
        slots=("q", "k", "v", "mask"),
        in_onnx=False,
    ),
    "attention-to-the-past": Case(
        lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True, dropout_p=0.25),
        "attention",
        {"is_causal": 1, "dropout_p": 0.25, "scale": 1 / math.sqrt(8), "enable_gqa": 0},
        slots=("q", "k", "v"),
        on="signal",
        in_onnx=False,
    ),
}

MEMBERS = {"picked": nn.Buffer(torch.tensor([2, 0])), "mask": nn.Buffer(torch.zeros(5, 5))}

every_case = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
every_case_of_onnx = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in CASES.items() if case.in_onnx]
)


# ---- what comes out -----------------------------------------------------------------------------------


@every_case
def test_kind_slots_and_attributes(case):
    graph, op = last_op(exported(case.function, example(case.on), **MEMBERS))
    assert op.kind == case.kind
    assert set(graph.inputs(op)) == case.slots
    assert op.attributes == case.attributes


@every_case
def test_with_an_open_batch(case):
    """The same but for the lengths that are open, and these have a symbol in the shapes."""
    graph, op = last_op(exported(case.function, example(case.on), open_batch=True, **MEMBERS))
    assert is_open(graph)
    assert op.kind == case.kind
    assert set(graph.inputs(op)) == case.slots
    assert op.attributes == {**case.attributes, **case.opened}


@pytest.mark.parametrize("open_batch", [False, True])
@every_case_of_onnx
def test_onnx_operator_of_these_attributes_does_the_same(case, open_batch):
    """Written as an ONNX node, with what normtool read and nothing else, it computes what torch computes."""
    program = exported(case.function, example(case.on), open_batch=open_batch, **MEMBERS)
    graph, op = last_op(program)
    expected = _listed(case.function(Through(None, **MEMBERS), example(case.on)))
    found = onnx_results(op, graph, example(case.on).numpy(), len(expected))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)


def test_a_wrong_attribute_would_show():
    case = CASES["bilinear"]
    graph, op = last_op(exported(case.function, example(case.on), **MEMBERS))
    op.attributes = {**op.attributes, "coordinate_transformation_mode": "asymmetric"}
    (found,) = onnx_results(op, graph, example(case.on).numpy(), 1)
    assert np.abs(found - case.function(None, example(case.on)).numpy()).max() > 0.1


def onnx_results(op, graph, x, count):
    """The op as the one node of an ONNX model, run."""
    spelling = max((s for s in ROWS[op.kind].spellings if not s.domain), key=lambda s: s.since)
    given = {**op.attributes}
    if "scales" in given:
        del given["sizes"]  # Resize takes one of them
    inputs = graph.inputs(op)
    slots = [slot for slot in inputs if slot.startswith("inputs.")] or list(spelling.slots)
    constants = {slot: _array(slot, given.pop(slot)) for slot in slots if slot in given}
    if "indices" in inputs:
        constants["indices"] = MEMBERS["picked"].numpy()
    names = [slot if slot in constants else "entry" if slot in inputs else "" for slot in slots]
    while not names[-1]:
        names.pop()
    outputs = [f"y{i}" for i in range(count)]
    node = helper.make_node(spelling.op_type, names, outputs, **given)
    model = helper.make_model(
        helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info("entry", TensorProto.FLOAT, x.shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"entry": x})


def _array(slot, value):
    return np.array(value, np.float32 if slot in ("scales", "value", "min", "max") else np.int64)


def _listed(value):
    return list(value) if isinstance(value, list | tuple) else [value]


# ---- what is no op of its name ------------------------------------------------------------------------

OTHERS = {
    "pool-without-a-batch": (lambda m, x: F.avg_pool2d(x, 2), "signal", "avg_pool2d"),
    "max-pool-without-a-batch": (lambda m, x: F.max_pool2d(x, 2), "signal", "max_pool2d"),
    "global-pool-without-a-batch": (lambda m, x: F.adaptive_avg_pool2d(x, 1), "signal", "adaptive_avg_pool2d"),
    "adaptive-pool-without-a-batch": (
        lambda m, x: F.adaptive_avg_pool2d(x, 2),
        "signal",
        "adaptive_avg_pool2d",
    ),
    "one-index": (lambda m, x: x.index_select(1, m.picked[0]), "signal", "index_select"),
    "adjoint-of-complex-numbers": (lambda m, x: torch.complex(x, x).adjoint().real, "signal", "adjoint"),
    "bits-of-another-dtype": (lambda m, x: x.view(torch.int32), "signal", "view"),
    "empty-list-beside-an-image": (lambda m, x: torch.cat([x, m.empty], 1), "image", "cat"),
    "smoothed-resize": (
        lambda m, x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True),
        "image",
        "_upsample_bilinear2d_aa",
    ),
    "factor-of-one-axis": (
        lambda m, x: torch.ops.aten.upsample_bilinear2d(x, (10, 9), False, 2.0, None),
        "image",
        "upsample_bilinear2d",
    ),
    "stack": (lambda m, x: torch.stack([x, x]), "image", "stack"),
    "unbind": (lambda m, x: x.unbind(1), "image", "unbind"),
    "sections-that-overlap": (lambda m, x: x.tensor_split([3, 1], 1), "image", "tensor_split"),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_call_that_means_something_else_is_unknown(name):
    function, on, spelling = OTHERS[name]
    graph, _ = last_op(exported(function, example(on), empty=nn.Buffer(torch.zeros(0)), **MEMBERS))
    assert [op.kind for op in graph.ops if op.spelling == spelling] == [UNKNOWN]


# ---- lengths that the model computes ------------------------------------------------------------------


def of_two(function):
    """The last op of a function of x (batch, 4, 6) and y (batch, 4, 6), the batches open."""
    inputs = (torch.randn(5, 4, 6), torch.randn(5, 4, 6))
    return last_op(exported(function, *inputs, open_batch=True))


@pytest.mark.parametrize(
    ("function", "kind", "slots", "attributes"),
    [
        pytest.param(
            lambda m, x, y: torch.cat([x, y])[: y.shape[0]],
            "slice",
            {"x", "ends"},
            {"axes": [0], "starts": [0], "steps": [1]},
            id="end",
        ),
        pytest.param(
            lambda m, x, y: x[y.shape[0] - 1 :],
            "slice",
            {"x", "starts"},
            {"axes": [0], "ends": [LAST], "steps": [1]},
            id="start",
        ),
        pytest.param(
            lambda m, x, y: torch.cat([x, y]).narrow(0, 1, y.shape[0]),
            "slice",
            {"x", "length"},
            {"axes": [0], "starts": [1], "steps": [1]},
            id="length",
        ),
        pytest.param(
            lambda m, x, y: x.reshape(x.shape[0], 2, 2, 6),
            "reshape",
            {"x", "shape.0"},
            {"shape": [-1, 2, 2, 6], "allowzero": 1},
            id="one-length",
        ),
        pytest.param(
            lambda m, x, y: (x @ y.mT).reshape(x.shape[0] * 2, 2, 4),
            "reshape",
            {"x", "shape.0"},
            {"shape": [-1, 2, 4], "allowzero": 1},
            id="product",
        ),
        pytest.param(
            lambda m, x, y: F.pad(x, (0, y.shape[0])),
            "pad",
            {"x", "pads.1"},
            {"mode": "constant", "value": 0.0},
            id="padding",
        ),
        pytest.param(
            lambda m, x, y: torch.cat([x, y]).split([x.shape[0], y.shape[0]]),
            "split",
            {"x", "split.0", "split.1"},
            {"axis": 0},
            id="parts",
        ),
    ],
)
def test_computed_length_is_an_input(function, kind, slots, attributes):
    graph, op = of_two(function)
    assert op.kind == kind
    assert set(graph.inputs(op)) == slots
    assert op.attributes == attributes


@pytest.mark.parametrize(
    ("kind", "function", "given", "name"),
    [
        ("attention", torch.ops.aten.scaled_dot_product_attention.default, 3, "scale"),
        ("slice", torch.ops.aten.slice.Tensor, 1, "step"),
    ],
)
def test_computed_number_that_no_exporter_leaves_open_has_no_default(kind, function, given, name):
    graph = fx.Graph()
    entry, number = graph.placeholder("entry"), graph.placeholder("number")
    entry.meta["val"] = example("signal")
    attributes = {"axes": 0}
    adapt(kind, graph.call_function(function, (entry,) * given, {name: number}), attributes)
    assert not {"scale", "steps"} & set(attributes)


def test_padding_with_a_computed_number_is_unknown():
    _, op = of_two(lambda m, x, y: torch.constant_pad_nd(x, (1, 2), y.shape[0]))
    assert op.kind == UNKNOWN


def test_resize_to_an_open_length_states_none():
    """The shape is (1, 6, 8 · batch); the factor is known."""
    _, op = of_two(lambda m, x, y: F.interpolate(x.flatten(0, 1).mT[None], scale_factor=2.0))
    assert op.attributes == {
        "mode": "nearest",
        "nearest_mode": "floor",
        "coordinate_transformation_mode": "asymmetric",
        "scales": [1.0, 1.0, 2.0],
    }


def test_reshape_to_two_open_lengths_states_none():
    graph, op = of_two(lambda m, x, y: torch.outer(x.flatten(), y.flatten()).reshape(x.shape[0], 24, -1))
    assert op.kind == "reshape"
    assert "shape" not in op.attributes
    assert [type(length) for length in graph.output(op).shape] == [str, int, str]


def test_expand_as_says_the_shape_it_takes():
    graph, op = last_op(exported(lambda m, x: x[:, :1].expand_as(x), example("image")))
    assert (op.kind, op.attributes, set(graph.inputs(op))) == (
        "expand",
        {"shape": [3, 4, 5, 6]},
        {"x", "other"},
    )
    _, op = last_op(exported(lambda m, x: x[:, :1].expand_as(x), example("image"), open_batch=True))
    assert (op.kind, op.attributes) == ("expand", {})


class AsksForTheShape(nn.Module):
    """`how` reads the norm's output for its shape or dtype alone."""

    def __init__(self, how):
        super().__init__()
        self.before, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.beside, self.behind = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)
        self.how = how

    def forward(self, x):
        normed = self.norm(torch.relu(self.before(x)))
        return self.behind(normed), self.how(self.beside(x), normed)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(lambda x, like: x.type_as(like), id="type_as"),
        pytest.param(lambda x, like: x.mean((2, 3), keepdim=True).expand_as(like), id="expand_as"),
        pytest.param(lambda x, like: x.view_as(like), id="view_as"),
    ],
)
def test_who_asks_for_shape_or_dtype_sees_no_fold(how):
    model = AsksForTheShape(how).eval()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-1, 1)
        model.norm.bias.uniform_(-1, 1)
    (site,) = normtool.plan(model, (torch.randn(2, 3, 4, 5),)).sites
    assert site.verdict == "folded"


# ---- every tensor has a shape -------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.linear = nn.Linear(30, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x, _ = F.max_pool2d(self.norm(self.conv(x)), 2, 1, return_indices=True)
        x = F.interpolate(x, size=(5, 6)).view(x.shape[0], 6, -1)
        first, second = self.linear(x).chunk(2, 1)
        attended, _ = self.attention(first, second, second, need_weights=False)
        return torch.cat([attended, first], 1) * x.shape[0]


@pytest.mark.parametrize("form", [lambda program: program, decomposed], ids=["exported", "decomposed"])
@pytest.mark.parametrize("open_batch", [False, True])
def test_every_tensor_has_a_shape(form, open_batch):
    shapes = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)} if open_batch else {}
    program = form(export(Mixed().eval(), example("image"), **shapes))
    graph = normtool.load(program).graph
    assert all(tensor.shape is not None and tensor.dtype is not None for tensor in graph.tensors)
    symbols = {length for tensor in graph.tensors for length in tensor.shape if isinstance(length, str)}
    assert bool(symbols) == open_batch


def test_computed_number_is_an_integer_without_axes():
    graph, op = of_two(lambda m, x, y: x * y.shape[0])
    number = graph.inputs(op)["b"]
    assert (number.shape, number.dtype) == ((), np.int64)


# ---- the tables ---------------------------------------------------------------------------------------


def test_tables_name_kinds_that_aten_has():
    in_aten = {kind for kind, row in ROWS.items() if any(s.domain == ATEN for s in row.spellings)}
    assert set(_ADAPT) | set(_ONLY_WHERE) <= in_aten


def test_every_adapted_kind_is_shown_here_or_in_test_read():
    shown = {case.kind for case in CASES.values()}
    assert set(_ADAPT) - shown == {"cast", "conv", "conv_transpose", "layer_norm", "linear", "rms_norm"}
