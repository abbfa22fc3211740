"""A swap that is wrong is caught twice: by the proof of its sites, and, where that is silent, by validation."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
import pytest

import normtool
from tests import swap_onnx
from tests.swap_faults import (
    centre_another_axis,
    centre_halves,
    centre_in_place,
    change_epsilon,
    ignore_padding,
    leave_rows_their_mean,
    listen,
    lose_centre,
    lose_writer,
    silence_the_proof,
)
from tests.swap_nets import D, Transformer, feeds_of

pytestmark = pytest.mark.usefixtures("worker_in_this_process")


def _two_streams(net: Transformer) -> onnx.ModelProto:
    """Each begins with a norm, and so takes a Centre that serves three others."""
    streams = []
    for name in ("a", "b"):
        x = net.norm(net.linear(net.input([2, 5, D], name)))
        for _ in range(2):
            x = net.block(x)
        streams.append(net.linear(net.norm(x)))
    return net.result(*streams)


def _tied(net: Transformer) -> onnx.ModelProto:
    table = net.table()
    x = net.looked_up(table)
    for _ in range(3):
        x = net.block(x, 100)
    return net.result(net.node("MatMul", net.norm(x), net.node("Transpose", table, perm=[1, 0])))


def _embedded(net: Transformer) -> onnx.ModelProto:
    """A norm of nothing but a table's rows."""
    x = net.block(net.norm(net.looked_up(net.table())))
    return net.result(net.linear(net.norm(x)))


def _padded(net: Transformer) -> onnx.ModelProto:
    """Channels last, then a convolution that pads with zeros: β cannot go into it, γ can."""
    y = net.norm(net.linear(net.input([2, 6, 6, D])))
    y = net.node("Transpose", y, perm=[0, 3, 1, 2])
    return net.result(net.conv(y, D, 4, 3, 3, pads=[1, 1, 1, 1]))


@dataclass(frozen=True)
class Fault:
    name: str
    build: Callable[[Transformer], onnx.ModelProto]
    commit: Callable[[pytest.MonkeyPatch], None]
    #: without the fault
    verdicts: frozenset[str] = frozenset(["swapped"])


FAULTS = (
    Fault("first-centre-lost", _two_streams, partial(lose_centre, number=0)),
    Fault("second-centre-lost", _two_streams, partial(lose_centre, number=1)),
    Fault("tied-table-centred-in-place", _tied, centre_in_place),
    Fault("beta-into-a-padded-conv", _padded, ignore_padding),
    Fault("writer-lost", _tied, lose_writer),
    Fault("halves-centred", _padded, centre_halves),
    Fault("another-axis-centred", _two_streams, centre_another_axis),
    Fault("another-epsilon", _padded, change_epsilon),
    Fault("rows-keep-their-mean", _embedded, leave_rows_their_mean, frozenset(["swapped", "folded"])),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_without_the_fault_all_is_well(fault: Fault) -> None:
    result = normtool.swap(fault.build(Transformer(np.float32)))
    assert {site.verdict for site in result.sites} == fault.verdicts
    assert result.validation is not None
    assert result.validation.verdict == "equal"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_proof_sees_it(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so, and the plan is made again without what it cannot prove."""
    fault.commit(monkeypatch)
    heard = listen(monkeypatch)
    model = fault.build(Transformer())
    result = normtool.swap(model, validate=False)
    assert {reason.code for reason in heard} == {"internal"}
    assert swap_onnx.wide_error(model, result.model, feeds_of(model)) <= 1e-12


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_validation_sees_it(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    fault.commit(monkeypatch)
    silence_the_proof(monkeypatch)
    result = normtool.swap(fault.build(Transformer(np.float32)))
    assert result.validation is not None
    assert result.validation.verdict == "different"
