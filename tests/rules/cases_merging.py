"""Parallel branches that become one Conv (`normtool.merging`): sums over one tensor, as in RepVGG."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from tests.rules.table import Array, Case, Map, Violation, draw, float64_net
from tests.zoo import Net

#: All of these are about `merging`, which is no rule of one operator.
KIND, SIDEWAYS = "merging", "sideways"


@dataclass(frozen=True)
class Branch:
    """A Conv, an average over windows, or nothing but the tensor itself; then a BatchNorm."""

    op: str = "Conv"
    kernel: tuple[int, ...] = (3, 3)
    groups: int = 1
    bias: bool = False
    norm: bool = True
    #: of the op
    attributes: tuple[tuple[str, Any], ...] = ()
    #: what comes behind the op
    behind: str = ""

    def given(self, **attributes: Any) -> "Branch":
        return replace(self, attributes=tuple(attributes.items()))


LARGE = Branch().given(pads=[1, 1, 1, 1])
SMALL = Branch(kernel=(1, 1), bias=True)
ITSELF = Branch("", (1, 1))
AVERAGE = Branch("AveragePool").given(pads=[1, 1, 1, 1], count_include_pad=1)


@dataclass(frozen=True)
class Drawn:
    """The numbers of one branch."""

    weight: Array
    bias: Array
    map_: Map


def _draw(net: Net, branch: Branch, channels: int) -> Drawn:
    shape = (channels, channels // branch.groups, *branch.kernel)
    weight, bias = net.rng.normal(size=shape), net.rng.normal(size=channels) * branch.bias
    return Drawn(weight, bias, draw(net, channels))


def _put(net: Net, x: str, branch: Branch, drawn: Drawn) -> str:
    attributes = dict(branch.attributes)
    y = x
    if branch.op == "Conv":
        constants = [drawn.weight] + [drawn.bias] * branch.bias
        y = net.node("Conv", x, *map(net.constant, constants), group=branch.groups, **attributes)
    elif branch.op:
        y = net.node(branch.op, x, kernel_shape=branch.kernel, **attributes)
    if branch.behind == "Dropout":
        told = [net.constant(np.float64(0.5)), net.constant(np.bool_(True))]
        y = net.node("Dropout", y, *told, seed=2)
    elif branch.behind:
        y = net.node(branch.behind, y)
    return drawn.map_.norm(net, y) if branch.norm else str(y)


def _sum(
    *branches: Branch,
    channels: int = 4,
    size: tuple[int, ...] = (6, 6),
    add: str = "Add",
    norm: bool = False,
    read: int | None = None,
    sources: int = 1,
) -> onnx.ModelProto:
    """x → branches → sum → BatchNorm, if there is one → Relu. `read`: this branch is put out, too."""
    net = float64_net()
    drawn = [_draw(net, branch, channels) for branch in branches]
    last = draw(net, channels)
    inputs = [net.input([2, channels, *size], f"x{i}") for i in range(sources)]
    terms = [_put(net, inputs[i % sources], *pair) for i, pair in enumerate(zip(branches, drawn, strict=True))]
    if read is not None:
        net.output(terms[read])
    y, *others = terms
    if add == "Sum":
        y = net.node("Sum", *terms)
    else:
        for each in others:
            y = net.node(add, y, each)
    net.output(net.node("Relu", last.norm(net, y) if norm else y))
    return net.model()


def _careless(
    *branches: Branch,
    channels: int = 4,
    size: tuple[int, ...] = (6, 6),
    read: int | None = None,
    sources: int = 1,
) -> onnx.ModelProto:
    """All kernels in the middle of the first, whatever their strides, dilations, padding and readers."""
    net = float64_net()
    drawn = [_draw(net, branch, channels) for branch in branches]
    draw(net, channels)
    inputs = [net.input([2, channels, *size], f"x{i}") for i in range(sources)]
    weight, bias = np.zeros((channels, channels, *branches[0].kernel)), np.zeros(channels)
    for branch, each in zip(branches, drawn, strict=True):
        middle = tuple(
            slice((large - small) // 2, (large - small) // 2 + small)
            for large, small in zip(branches[0].kernel, branch.kernel, strict=True)
        )
        s = each.map_.s.reshape(-1, *[1] * (weight.ndim - 1))
        weight[(slice(None), slice(None), *middle)] += s * _dense(branch, each.weight, channels)
        bias += each.map_.s * each.bias + each.map_.t
    attributes = dict(branches[0].attributes)
    y = net.node("Conv", inputs[0], net.constant(weight), net.constant(bias), **attributes)
    if read is not None:
        net.output(net.node("Identity", y))
    net.output(net.node("Relu", y))
    return net.model()


def _dense(branch: Branch, weight: Array, channels: int) -> Array:
    """The kernel of a branch, without groups."""
    dense = np.zeros((channels, channels, *branch.kernel))
    width = channels // branch.groups
    for o in range(channels):
        first = o // width * width
        if branch.op == "Conv":
            dense[o, first : first + width] = weight[o]
        else:
            dense[o, o] = 1 / np.prod(branch.kernel)
    return dense


def _case(name: str, *branches: Branch, left: tuple[str, ...] = ("Conv", "Relu"), **options: Any) -> Case:
    return Case(f"merging-{name}", KIND, lambda: _sum(*branches, **options), left, SIDEWAYS)


def cases() -> Iterator[Case]:
    yield _case("repvgg", LARGE, SMALL, ITSELF)
    yield _case("repvgg-sum", ITSELF, SMALL, LARGE, add="Sum")
    yield _case("without-itself", SMALL, LARGE)
    yield _case("difference", SMALL, LARGE, ITSELF, add="Sub")
    strided = {"strides": [2, 1]}
    yield _case("strided", LARGE.given(pads=[1, 1, 1, 1], **strided), SMALL.given(**strided))
    for groups in (2, 4):
        parts = (replace(LARGE, groups=groups), replace(SMALL, groups=groups), ITSELF)
        yield _case(f"groups-{groups}", *parts)
        yield _case(f"groups-{groups}-in-one", LARGE, *parts)
        yield _case(f"groups-{groups}-of-8", *parts, channels=8)
    yield _case("groups-of-groups", replace(LARGE, groups=2), replace(LARGE, groups=4), ITSELF, channels=8)
    yield _case("average", LARGE, AVERAGE, ITSELF)
    yield _case("average-depthwise", replace(LARGE, groups=4), AVERAGE)
    thin = Branch("AveragePool", (1, 3)).given(pads=[0, 1, 0, 1], count_include_pad=1)
    yield _case("average-of-rows", LARGE, thin)
    yield _case("average-of-nothing-padded", Branch(), Branch("AveragePool").given(count_include_pad=0))
    column, row = Branch(kernel=(3, 1)).given(pads=[1, 0, 1, 0]), Branch(kernel=(1, 3)).given(pads=[0, 1, 0, 1])
    yield _case("asymmetric-kernels", LARGE, column, row)
    yield _case("dilated", Branch().given(pads=[2, 2, 2, 2], dilations=[2, 2]), SMALL, ITSELF)
    # the small kernel lies where the paddings say, not in the middle
    yield _case("offset-front", Branch().given(pads=[0, 2, 2, 0]), SMALL, ITSELF)
    yield _case("offset-even", Branch(kernel=(2, 2)).given(pads=[1, 0, 0, 1]), SMALL, ITSELF)
    yield _case("valid", Branch(kernel=(1, 1)).given(auto_pad="VALID"), SMALL)
    for rank in (1, 3):
        large = Branch(kernel=(3,) * rank).given(pads=[1] * 2 * rank)
        parts = (large, Branch(kernel=(1,) * rank), Branch("", (1,) * rank))
        yield _case(f"{rank}d", *parts, size=(5,) * rank)
    plain = (replace(LARGE, norm=False), replace(SMALL, norm=False), replace(ITSELF, norm=False))
    yield _case("norm-behind", *plain, norm=True)
    yield _case("norms-everywhere", LARGE, SMALL, ITSELF, norm=True)
    yield _case("carried", replace(LARGE, behind="Identity"), ITSELF)
    yield _case("no-norm-in-it", *plain, left=("Conv", "Conv", "Add", "Add", "Relu"))
    # one Conv would multiply more often than both of these do
    yield _case("more-work", replace(LARGE, groups=4), SMALL, left=("Conv", "Conv", "Add", "Relu"))


def violations() -> Iterator[Violation]:
    two = ("Add", "Conv", "Conv", "Relu")
    front = Branch().given(pads=[2, 2, 0, 0])
    wide = Branch().given(pads=[2, 2, 2, 2], dilations=[2, 2])
    between = Branch().given(pads=[3, 3, 1, 1], dilations=[2, 2])
    uncounted = AVERAGE.given(pads=[1, 1, 1, 1], count_include_pad=0)
    bent, dropped = replace(SMALL, behind="Sigmoid"), replace(SMALL, behind="Dropout")
    rows: tuple[tuple[str, str, tuple[Branch, ...], tuple[str, ...], dict[str, Any]], ...] = (
        ("in-the-middle", "", (front, SMALL, ITSELF), ("Conv", "Relu"), {}),
        ("dilations", "", (LARGE, wide), two, {}),
        ("strides", "", (Branch(), SMALL.given(strides=[3, 3])), two, {"size": (3, 3)}),
        ("between-taps", "", (between, SMALL), two, {}),
        ("average-uncounted", "no_producer", (LARGE, uncounted), (), {}),
        ("nonlinear", "nonlinear", (LARGE, bent), (), {}),
        ("dropout-in-training", "training_mode", (LARGE, dropped), (), {}),
        ("read-elsewhere", "", (LARGE, SMALL), two, {"read": 0}),
        ("other-tensors", "", (LARGE, SMALL), two, {"sources": 2}),
    )
    for name, reason, branches, left, options in rows:
        yield Violation(
            f"merging-{name}",
            KIND,
            reason,
            lambda b=branches, o=options: _sum(*b, **o),
            lambda b=branches, o=options: _careless(*b, **o),
            SIDEWAYS,
            left,
        )
