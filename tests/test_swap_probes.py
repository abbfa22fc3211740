"""Small graphs on which swapping by recipe goes wrong, and the right answer to each.

The first sixteen are what breaks the one generic tool that is shipped: there a scale passes a ReLU, so the
mean is taken to pass it too. Where an answer is "kept", the swap is forced all the same, and the result has to
differ: a refusal that nothing depends on would be one too many.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest

import normtool
from tests import swap_onnx, zoo
from tests.swap_faults import force
from tests.swap_nets import D, Transformer, feeds_of

Array = np.ndarray[Any, Any]

#: Agreement of two ways to compute one number in float64.
AGREES = 1e-12

#: What a wrong swap moves the output by, at the least.
DIFFERS = 1e-3


@dataclass(frozen=True)
class Probe:
    """`verdicts` in the order of the norms; `why`: (reason code, part of the message) of the first kept."""

    name: str
    build: Callable[[Transformer], onnx.ModelProto]
    verdicts: tuple[str, ...] = ("swapped",)
    why: tuple[str, str] = ("", "")
    centres: int = 0


# ---- the sixteen --------------------------------------------------------------------------------------


def _behind(op_type: str) -> Callable[[Transformer], onnx.ModelProto]:
    def build(net: Transformer) -> onnx.ModelProto:
        return net.result(net.linear(net.norm(net.node(op_type, net.linear(net.tokens())))))

    return build


def _max_pool(net: Transformer) -> onnx.ModelProto:
    y = net.conv(net.input([2, 3, 8, 8]), 3, D, 3, 3)
    y = net.node("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    return net.result(net.linear(net.norm(net.node("Transpose", y, perm=[0, 2, 3, 1]))))


def _gate(net: Transformer) -> onnx.ModelProto:
    x = net.tokens()
    gate = net.node("Sigmoid", net.linear(x))
    return net.result(net.linear(net.norm(net.node("Mul", net.linear(x), gate))))


def _product(net: Transformer) -> onnx.ModelProto:
    x = net.tokens()
    return net.result(net.linear(net.norm(net.node("Mul", net.linear(x), net.linear(x)))))


def _two_dims(net: Transformer) -> onnx.ModelProto:
    return net.result(net.linear(net.norm(net.linear(net.tokens()), 5, D)))


def _no_affine(net: Transformer) -> onnx.ModelProto:
    x = net.linear(net.tokens())
    axes = net.constant(np.array([-1]))
    d = net.node("Sub", x, net.node("ReduceMean", x, axes))
    moment = net.node("ReduceMean", net.node("Mul", d, d), axes)
    eps = np.float64(np.float32(1e-3))  # the attribute of RMSNormalization holds no other
    root = net.node("Sqrt", net.node("Add", moment, net.constant(np.array(eps))))
    return net.result(net.linear(net.node("Div", d, root)))


def _zero_gamma(net: Transformer) -> onnx.ModelProto:
    gamma = np.where(np.arange(D) % 2, 0, 1.5)
    return net.result(net.linear(net.norm(net.linear(net.tokens()), gamma=gamma)))


def _position(net: Transformer) -> onnx.ModelProto:
    position = net.constant(net.rng.normal(0.7, 1, (1, 5, D)))
    return net.result(net.linear(net.norm(net.node("Add", net.linear(net.tokens()), position))))


def _patches(net: Transformer) -> onnx.ModelProto:
    y = net.conv(net.input([2, 3, 8, 8]), 3, D, 4, 4, strides=[4, 4])
    y = net.node("Reshape", y, net.constant(np.array([2, D, 4])))
    return net.result(net.linear(net.norm(net.node("Transpose", y, perm=[0, 2, 1]))))


def _per_head(net: Transformer) -> onnx.ModelProto:
    y = net.linear(net.tokens(), D, 4 * D)
    y = net.node("Reshape", y, net.constant(np.array([2, 5, 4, D])))
    return net.result(net.linear(net.norm(net.node("Transpose", y, perm=[0, 2, 1, 3]))))


def _linear_observer(net: Transformer) -> onnx.ModelProto:
    x = net.linear(net.tokens())
    return net.result(net.linear(net.norm(x)), net.linear(x))


def _raw_output(net: Transformer) -> onnx.ModelProto:
    x = net.linear(net.tokens())
    return net.result(net.linear(net.norm(x)), x)


def _post_norm(net: Transformer) -> onnx.ModelProto:
    x = net.norm(net.linear(net.tokens()))
    return net.result(net.linear(net.norm(net.node("Add", x, net.node("Tanh", net.linear(x))))))


def _tied(net: Transformer, *wide: int) -> onnx.ModelProto:
    table = net.table()
    x = net.looked_up(table)
    for _ in range(3):
        x = net.block(x, *wide)
    head = net.node("Transpose", table, perm=[1, 0])
    return net.result(net.node("MatMul", net.norm(x), head))


def _pre_norm(net: Transformer) -> onnx.ModelProto:
    x = net.linear(net.tokens())
    for _ in range(2):
        x = net.block(x)
    return net.result(net.linear(net.norm(x)))


def _linear_norm(net: Transformer) -> onnx.ModelProto:
    return net.result(net.norm(net.linear(net.tokens())))


SIXTEEN = (
    Probe("relu", _behind("Relu"), ("kept",), ("not_centrable", "(Relu) writes it")),
    Probe("max-pool", _max_pool, ("kept",), ("not_centrable", "(MaxPool) writes it")),
    Probe("sigmoid-gate", _gate, ("kept",), ("not_centrable", "(Mul) multiplies by data")),
    Probe("linear-times-linear", _product, ("kept",), ("not_centrable", "(Mul) multiplies by data")),
    Probe("two-dims", _two_dims, ("kept",), ("axis_mismatch", "spread over a part of the block")),
    Probe("no-affine", _no_affine),
    Probe("gamma-of-zeros", _zero_gamma),
    Probe("position-parameter", _position),
    Probe("patch-embedding", _patches),
    Probe("per-head", _per_head),
    Probe("linear-observer", _linear_observer, ("kept",), ("observed_mean", "(MatMul) sees the mean")),
    Probe("raw-output", _raw_output, ("kept",), ("observed_mean", "is an output")),
    Probe("post-norm", _post_norm, ("swapped", "kept"), ("not_centrable", "scales every number")),
    Probe("tied-pre-norm", _tied, ("swapped",) * 4, centres=1),
    Probe("pre-norm", _pre_norm, ("swapped",) * 3),
    Probe("linear-norm", _linear_norm),
)

# ---- and some more ------------------------------------------------------------------------------------


def _two_dims_of_a_linear(net: Transformer) -> onnx.ModelProto:
    """Every number of the block comes out of one Linear."""
    y = net.linear(net.input([2, 4]), 4, 5 * D)
    return net.result(net.linear(net.norm(net.node("Reshape", y, net.constant(np.array([2, 5, D]))), 5, D)))


def _input(net: Transformer) -> onnx.ModelProto:
    return net.result(net.linear(net.norm(net.tokens())))


def _centre_behind_a_norm(net: Transformer) -> onnx.ModelProto:
    """A stream that begins with a norm: one Centre serves three."""
    x = net.norm(net.linear(net.tokens()))
    for _ in range(3):
        x = net.block(x)
    return net.result(net.linear(net.norm(x)))


def _shared_input(net: Transformer) -> onnx.ModelProto:
    """One Centre for one norm costs more than it gains."""
    x = net.node("Tanh", net.linear(net.tokens()))
    return net.result(net.linear(net.norm(x)))


def _depthwise(net: Transformer) -> onnx.ModelProto:
    y = net.conv(net.input([2, D, 8, 8]), D, D, 3, 3, groups=D)
    return net.result(net.linear(net.norm(net.node("Transpose", y, perm=[0, 2, 3, 1]))))


def _joined(net: Transformer) -> onnx.ModelProto:
    """Halves from two Linears, each of which would have to know of the other's mean."""
    x = net.tokens()
    y = net.node("Concat", net.linear(x, D, 2), net.linear(x, D, 4), axis=-1)
    return net.result(net.linear(net.norm(y)))


def _other_axis(net: Transformer) -> onnx.ModelProto:
    """Two norms of one tensor, over other axes: each sees the mean that the other would take out."""
    x = net.linear(net.tokens())
    return net.result(net.linear(net.norm(x)), net.norm(x, 5, D))


def _root_mean_square(net: Transformer) -> onnx.ModelProto:
    """A stream that an RMSNorm reads too: it does see the mean."""
    x = net.linear(net.tokens())
    moment = net.node("ReduceMean", net.node("Mul", x, x), net.constant(np.array([-1])))
    root = net.node("Sqrt", net.node("Add", moment, net.constant(np.array(1e-3))))
    return net.result(net.linear(net.norm(x)), net.linear(net.node("Div", x, root)))


def _layer_scale(net: Transformer) -> onnx.ModelProto:
    x = net.linear(net.tokens())
    scale = net.constant(net.rng.uniform(0.5, 1.5, D))
    for _ in range(2):
        branch = net.linear(net.node("Tanh", net.linear(net.norm(x))))
        x = net.node("Add", x, net.node("Mul", branch, scale))
    return net.result(net.linear(net.norm(x)))


def _table_norm(net: Transformer) -> onnx.ModelProto:
    x = net.norm(net.looked_up(net.table()))
    return net.result(net.linear(net.norm(net.block(x))))


def _softmax_reader(net: Transformer) -> onnx.ModelProto:
    """Softmax over the axis puts out the same."""
    x = net.linear(net.tokens())
    return net.result(net.linear(net.norm(x)), net.node("Softmax", x, axis=-1))


def _softmax_elsewhere(net: Transformer) -> onnx.ModelProto:
    x = net.linear(net.tokens())
    return net.result(net.linear(net.norm(x)), net.node("Softmax", x, axis=1))


def _statistics(net: Transformer) -> onnx.ModelProto:
    """Somebody reads the mean that a LayerNormalization puts out."""
    x = net.linear(net.tokens())
    gamma, beta = net.constant(net.rng.normal(1, 0.3, D)), net.constant(net.rng.normal(size=D))
    y, mean = net.node("LayerNormalization", x, gamma, beta, outputs=2, axis=-1, epsilon=1e-3)
    seen = net.node("Cast", mean, to=onnx.TensorProto.DOUBLE)  # the standard has it in float32, always
    return net.result(net.linear(y), net.node("Tanh", seen))


MORE = (
    Probe("tied-table-of-2-percent", lambda net: _tied(net, 100), ("swapped",) * 4),
    Probe("two-dims-of-a-linear", _two_dims_of_a_linear),
    Probe("model-input", _input, ("kept",), ("not_centrable", "is a model input")),
    Probe("behind-a-norm", _centre_behind_a_norm, ("swapped",) * 5, centres=1),
    Probe("centre-for-one", _shared_input, ("kept",), ("not_centrable", "(Tanh) writes it")),
    Probe("depthwise", _depthwise, ("kept",), ("not_centrable", "groups of channels")),
    Probe("joined-along-the-axis", _joined, ("kept",), ("axis_mismatch", "joins parts along that axis")),
    Probe("norms-over-other-axes", _other_axis, ("kept", "kept"), ("observed_mean", "is over other axes")),
    Probe("an-rms-norm-reads-it", _root_mean_square, ("kept",), ("observed_mean", "sees the mean")),
    Probe("layer-scale", _layer_scale, ("swapped",) * 3),
    Probe("norm-of-a-table", _table_norm, ("folded", "swapped", "swapped")),
    Probe("softmax-over-the-axis", _softmax_reader),
    Probe("softmax-elsewhere", _softmax_elsewhere, ("kept",), ("observed_mean", "(Softmax) sees the mean")),
    Probe("its-own-mean-is-read", _statistics, ("kept",), ("observed_mean", "inside the norm")),
)

PROBES = (*SIXTEEN, *MORE)
#: An RMSNorm has no mean to put out: that refusal cannot even be forced.
REFUSED = [p for p in PROBES if "kept" in p.verdicts and p.name != "its-own-mean-is-read"]


def swap(model: onnx.ModelProto, **options: Any) -> normtool.Rewrite:
    return normtool.swap(model, validate=False, **options)


def layer_norms(result: normtool.Rewrite) -> list[normtool.Site]:
    return [site for site in result.sites if site.norm.kind == "layer_norm"]


@pytest.mark.parametrize("target", ["primitive", "onnx"])
@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_the_answer_is_right(probe: Probe, target: str) -> None:
    model = probe.build(Transformer())
    result = swap(model, target=target)
    sites = layer_norms(result)
    assert tuple(site.verdict for site in sites) == probe.verdicts, [site.reasons for site in sites]
    kept = [site for site in sites if site.verdict == "kept"]
    code, text = probe.why
    if kept:
        assert any(reason.code == code and text in reason.message for reason in kept[0].reasons)
    written = result.model
    onnx.checker.check_model(written, full_check=True)
    assert zoo.op_types(written).count("RMSNormalization") == (
        probe.verdicts.count("swapped") if target == "onnx" else 0
    )
    placed = {c for site in sites if site.fold for c in site.fold.about.get("centring", {}).get("centres", [])}
    assert len(placed) == probe.centres
    assert swap_onnx.wide_error(model, written, feeds_of(model)) <= AGREES


# ---- refusals that are forced -------------------------------------------------------------------------


@pytest.mark.parametrize("probe", REFUSED, ids=lambda probe: probe.name)
def test_a_refused_swap_would_be_wrong(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch)
    model = probe.build(Transformer())
    refused = [i for i, verdict in enumerate(probe.verdicts) if verdict == "kept"]
    names = [norm.norm.name for norm in normtool.scan(model).norms if norm.norm.kind == "layer_norm"]
    for index in refused:
        result = swap(model, only=(names[index],))
        assert layer_norms(result)[index].verdict == "swapped"
        assert swap_onnx.wide_error(model, result.model, feeds_of(model)) >= DIFFERS
