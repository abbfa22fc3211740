"""Property: whatever the graph, folding it does not change what it computes.

Hypothesis draws small networks in which everything that can go wrong sits side by side: sizes that coincide,
groups, shared weights, residuals, second readers, outputs in the middle, constants along the wrong axis,
reshapes that keep the channels and reshapes that mix them, padding. Both models are evaluated in float64 by
`onnx.reference`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import normtool
from normtool import planner, walk
from normtool.proof import Proof
from tests.rules.test_every_rule import difference
from tests.zoo import Net, op_types

#: Channels, height and width alike, so that no size tells an axis.
C = 4

Layer = Callable[[Net, list[str], st.DataObject], str]


def _earlier(names: list[str], data: st.DataObject) -> str:
    """Most often the newest tensor, sometimes one that has a reader already."""
    return data.draw(st.sampled_from([names[-1], names[-1], names[-1], *names]))


def _conv(net: Net, names: list[str], data: st.DataObject) -> str:
    """Its padding is its own, or comes out of a Pad in front: of zeros, of another number, or mirrored."""
    kernel, groups = data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from([1, 2, 4]))
    bias, x, pad = data.draw(st.booleans()), _earlier(names, data), kernel // 2
    before = data.draw(st.sampled_from([None, None, "constant", "reflect"])) if pad else None
    if before is not None:
        value = net.constant(np.float64(data.draw(st.sampled_from([0, 0.5]))))
        sizes = net.constant(np.array([0, 0, 1, 1] * 2))
        x, pad = net.node("Pad", x, sizes, *([value] if before == "constant" else []), mode=before), 0
    return net.conv(x, C, C, kernel, kernel, groups=groups, bias=bias, pads=[pad] * 4)


def _shared_conv(net: Net, names: list[str], data: st.DataObject) -> str:
    """One weight for every conv of this kind."""
    if not any(tensor.name == "shared" for tensor in net.initializers):
        net.weight(C, C, 1, 1, name="shared")
    return str(net.node("Conv", _earlier(names, data), "shared"))


def _conv_transpose(net: Net, names: list[str], data: st.DataObject) -> str:
    groups = data.draw(st.sampled_from([1, 2]))
    return net.conv_transpose(_earlier(names, data), C, C, 3, 3, groups=groups, pads=[1] * 4)


def _matmul(net: Net, names: list[str], data: st.DataObject) -> str:
    """Along the width on the right, along the height on the left: never along the channels."""
    x, w = _earlier(names, data), net.weight(C, C)
    return str(net.node("MatMul", *((x, w) if data.draw(st.booleans()) else (w, x))))


def _batch_norm(net: Net, names: list[str], data: st.DataObject) -> str:
    """Now and then of no negative scale, with a channel that is dead, or a twin of the last one."""
    x, kind = _earlier(names, data), data.draw(st.sampled_from(["any", "any", "positive", "dead", "twin"]))
    statistics = net.statistics(C)
    if kind == "twin":
        norms = [node for node in net.nodes if node.op_type == "BatchNormalization"]
        statistics = list(norms[-1].input[1:]) if norms else statistics
    elif kind != "any":
        gamma = net.rng.uniform(0.5, 1.5, C) * (np.arange(C) != 1 if kind == "dead" else 1)
        statistics[0] = net.constant(gamma)
    return net.batch_norm(x, C, statistics=statistics)


def _constant(net: Net, names: list[str], data: st.DataObject) -> str:
    """A constant per channel, along the width, for all, or of full size; on either side."""
    shape = data.draw(st.sampled_from([(C, 1, 1), (1, C, 1, 1), (C,), (C, 1), (), (1, 1, 1), (C, C, C)]))
    constant = net.constant(net.rng.uniform(0.5, 2, shape) * data.draw(st.sampled_from([-1, 1])))
    operands = [_earlier(names, data), constant]
    op = data.draw(st.sampled_from(["Add", "Sub", "Mul", "Div"]))
    # a constant divided by data may be anything; and so may data divided by data
    turned = op != "Div" and data.draw(st.booleans())
    return str(net.node(op, *(reversed(operands) if turned else operands)))


def _residual(net: Net, names: list[str], data: st.DataObject) -> str:
    return str(
        net.node(data.draw(st.sampled_from(["Add", "Sub"])), names[-1], data.draw(st.sampled_from(names)))
    )


def _carrier(net: Net, names: list[str], data: st.DataObject) -> str:
    op, attributes = data.draw(
        st.sampled_from(
            [
                ("Relu", {}),
                ("Tanh", {}),
                ("Identity", {}),
                ("Neg", {}),
                ("Transpose", {"perm": [0, 2, 1, 3]}),
                ("MaxPool", {"kernel_shape": [3, 3], "pads": [1] * 4}),
                ("AveragePool", {"kernel_shape": [3, 3], "pads": [1] * 4}),
                ("AveragePool", {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1}),
            ]
        )
    )
    return str(net.node(op, _earlier(names, data), **attributes))


def _there_and_back(net: Net, names: list[str], data: st.DataObject) -> str:
    """Through another shape, in which a constant or a factor may wait: channels split, joined, or mixed up."""
    shape = data.draw(st.sampled_from([(1, 2, 2, C, C), (1, C, C * C), (1, C * C * C), (2, C, 2, C)]))
    y = net.node("Reshape", _earlier(names, data), net.constant(np.array(shape)))
    if data.draw(st.booleans()):
        per = data.draw(st.sampled_from(range(1, len(shape))))
        constant = net.constant(net.rng.uniform(0.5, 2, [n if i == per else 1 for i, n in enumerate(shape)]))
        y = net.node(data.draw(st.sampled_from(["Add", "Mul"])), y, constant)
    if len(shape) > 2 and shape[1] == shape[2] and data.draw(st.booleans()):
        y = net.node("Transpose", y, perm=[0, 2, 1, *range(3, len(shape))])  # a channel shuffle
    return str(net.node("Reshape", y, net.constant(np.array([1, C, C, C]))))


def _shuffled(net: Net, names: list[str], data: st.DataObject) -> str:
    """Two halves of the channels (or of the rows) of one or two tensors, put together again."""
    axis = data.draw(st.sampled_from([1, 1, 2]))
    half = net.constant(np.array([C // 2, C // 2]))
    first = net.node("Split", _earlier(names, data), half, axis=axis, outputs=2)
    if data.draw(st.booleans()):
        return str(net.node("Concat", first[1], first[0], axis=axis))
    bounds = [net.constant(np.array([n])) for n in (1, 3, axis)]
    return str(net.node("Concat", first[0], net.node("Slice", _earlier(names, data), *bounds), axis=axis))


def _gathered(net: Net, names: list[str], data: st.DataObject) -> str:
    axis = data.draw(st.sampled_from([1, 2]))
    return str(net.node("Gather", _earlier(names, data), net.constant(np.array([2, 0, 1, 3])), axis=axis))


def _squeezed(net: Net, names: list[str], data: st.DataObject) -> str:
    """A mean over all positions, spread over them again."""
    axes = net.constant(np.array([2, 3]))
    pooled = data.draw(st.sampled_from(["GlobalAveragePool", "ReduceMean"]))
    x = _earlier(names, data)
    mean = net.node(pooled, x) if pooled != "ReduceMean" else net.node(pooled, x, axes=[2, 3], keepdims=1)
    if data.draw(st.booleans()):
        mean = net.conv(mean, C, C, 1, 1)
    if data.draw(st.booleans()):
        flat = net.node("Squeeze", mean, axes)
        flat = net.node(
            "Gemm", flat, net.weight(C, C), net.weight(C), transB=data.draw(st.sampled_from([0, 1]))
        )
        mean = net.node("Unsqueeze", flat, axes)
    return str(net.node("Add", _earlier(names, data), mean))


def _product(net: Net, names: list[str], data: st.DataObject) -> str:
    """A gate, or an average with weights of its own for each row."""
    gate = data.draw(st.sampled_from(["Sigmoid", "Softmax"]))
    if gate == "Softmax":
        return str(
            net.node("MatMul", net.node("Softmax", _earlier(names, data), axis=-1), _earlier(names, data))
        )
    return str(net.node("Mul", net.node("Sigmoid", _earlier(names, data)), _earlier(names, data)))


LAYERS: list[Layer] = [
    _conv,
    _conv,
    _shared_conv,
    _conv_transpose,
    _matmul,
    _constant,
    _residual,
    _carrier,
    _there_and_back,
    _shuffled,
    _gathered,
    _squeezed,
    _product,
]


def _network(data: st.DataObject) -> onnx.ModelProto:
    net = Net(opset=17, seed=data.draw(st.integers(0, 99)), dtype=np.float64)
    names = [net.input([1, C, C, C])]
    for _ in range(data.draw(st.integers(2, 8))):
        # half of all layers are norms: they are what this is about
        layer = data.draw(st.sampled_from([_batch_norm] * len(LAYERS) + LAYERS))
        names.append(layer(net, names, data))
    outputs = {names[-1]} | data.draw(st.sets(st.sampled_from(names[1:]), max_size=1))
    for name in sorted(outputs):
        net.output(name, [1, C, C, C])
    return net.model()


def _check(data: st.DataObject) -> None:
    model = _network(data)
    result = normtool.fold(model, validate=False)
    onnx.checker.check_model(result.model)
    assert difference(model, result.model) < 1e-9
    left = [site for site in result.sites if site.verdict == "kept"]
    assert op_types(result.model).count("BatchNormalization") == len(left)
    assert all(site.reasons for site in left)
    assert not {r.code for site in left for r in site.reasons} & {"internal", "malformed"}
    assert normtool.fold(result.model, validate=False).folded == 0


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_folding_changes_no_function(data: st.DataObject) -> None:
    _check(data)


def _backward(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(walk.Walk, "_unharmed", lambda *arguments: True)


def _forward(patch: pytest.MonkeyPatch) -> None:
    right = walk.Walk._enqueue

    def wrong(self: walk.Walk, op: Any, ahead: bool) -> None:
        if not (ahead and self._forward):
            right(self, op, ahead)

    patch.setattr(walk.Walk, "_enqueue", wrong)


@pytest.mark.parametrize("direction", [_backward, _forward])
@pytest.mark.parametrize("proved", [True, False], ids=["by-the-proof", "by-the-numbers"])
def test_a_folder_that_forgets_other_readers_is_found_out(
    direction: Callable[[pytest.MonkeyPatch], None], proved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    direction(monkeypatch)
    if not proved:
        monkeypatch.setattr(planner, "prove", lambda *arguments: Proof(0, 0.0, 0.0))
    search = settings(max_examples=300, deadline=None, database=None, phases=[Phase.generate])
    with pytest.raises(AssertionError):
        search(given(st.data())(_check))()
