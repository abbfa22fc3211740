"""Property: whatever the graph, folding it does not change what it computes.

Hypothesis draws small networks in which everything that can go wrong sits side by side: sizes that coincide,
groups, shared weights, residuals, second readers, outputs in the middle, constants along the wrong axis. Both
models are evaluated in float64 by `onnx.reference`.
"""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import normtool
from normtool import planner
from tests.rules.test_every_rule import difference
from tests.zoo import Net, op_types

#: Channels, height and width alike, so that no size tells an axis.
C = 4

Layer = Callable[[Net, list[str], st.DataObject], str]


def _earlier(names: list[str], data: st.DataObject) -> str:
    """Most often the newest tensor, sometimes one that has a reader already."""
    return data.draw(st.sampled_from([names[-1], names[-1], names[-1], *names]))


def _conv(net: Net, names: list[str], data: st.DataObject) -> str:
    kernel, groups = data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from([1, 2, 4]))
    bias, x = data.draw(st.booleans()), _earlier(names, data)
    pad = kernel // 2
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
    return net.batch_norm(_earlier(names, data), C)


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
        st.sampled_from([("Relu", {}), ("Identity", {}), ("Transpose", {"perm": [0, 2, 1, 3]}), ("Tanh", {})])
    )
    return str(net.node(op, _earlier(names, data), **attributes))


LAYERS: list[Layer] = [_conv, _shared_conv, _conv_transpose, _matmul, _constant, _residual, _carrier]


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


def test_a_folder_that_forgets_other_readers_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_observers", lambda *arguments: [])
    search = settings(max_examples=300, deadline=None, database=None, phases=[Phase.generate])
    with pytest.raises(Exception):  # noqa: B017 - a wrong answer, or a model that is none any more
        search(given(st.data())(_check))()
