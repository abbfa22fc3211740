"""How long does the analysis of a swap take? Prints seconds for GPT-2s of 6 to 48 layers, in both spellings.

    python -m tests.benchmarks.swap_cost

Columns: layers, ops, LayerNorms, then seconds to read the graph, to find the norms, to decide which are swapped
and how (`Facts.solve`), to make the whole plan (the decision again, γ and β moved, everything proved), and to
apply it. The analysis of 24 layers, to find and to decide, is to take well under a second.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from normtool.centring.facts import Fact, Facts
from normtool.constants import Constants
from normtool.formats.onnx.apply import apply_plan
from normtool.formats.onnx.read import read_proto
from normtool.forms import norm_forms
from normtool.options import SwapOptions
from normtool.swapping import plan_swap
from tests import swap_onnx
from tests.swap_nets import Transformer

WIDTH, HEADS, LENGTH, TOKENS = 48, 4, 8, 64


def gpt2(layers: int) -> onnx.ModelProto:
    """Tied table, positions, fused q, k and v; every shape written out."""
    net = Transformer(np.float32)
    table = net.numbers(net.rng.normal(0.4, 1, (TOKENS, WIDTH)))
    x = net.node("Gather", table, net.input([2, LENGTH], "ids", np.int64))
    x = net.node("Add", x, net.numbers(net.rng.normal(0.5, 1, (LENGTH, WIDTH))))
    for _ in range(layers):
        x = net.node("Add", x, _attention(net, net.norm(x, WIDTH)))
        inner = net.node("Tanh", net.linear(net.norm(x, WIDTH), WIDTH, 4 * WIDTH))
        x = net.node("Add", x, net.linear(inner, 4 * WIDTH, WIDTH))
    return net.result(net.node("MatMul", net.norm(x, WIDTH), net.node("Transpose", table, perm=[1, 0])))


def _attention(net: Transformer, x: str) -> str:
    apart = net.constant(np.array([2, LENGTH, HEADS, WIDTH // HEADS]))
    fused = net.node("Split", net.linear(x, WIDTH, 3 * WIDTH), outputs=3, axis=-1, num_outputs=3)
    q, k, v = (net.node("Transpose", net.node("Reshape", each, apart), perm=[0, 2, 1, 3]) for each in fused)
    scores = net.node("MatMul", q, net.node("Transpose", k, perm=[0, 1, 3, 2]))
    mixed = net.node("MatMul", net.node("Softmax", scores, axis=-1), v)
    together = net.constant(np.array([2, LENGTH, WIDTH]))
    mixed = net.node("Reshape", net.node("Transpose", mixed, perm=[0, 2, 1, 3]), together)
    return net.linear(mixed, WIDTH, WIDTH)


def timed(what: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    found = what()
    return found, time.perf_counter() - start


def main() -> None:
    print("layers   ops norms   read   find  decide   plan  apply   (seconds)")
    for layers in (6, 12, 24, 48):
        native = gpt2(layers)
        for name, model in (("", native), (" spelled out", swap_onnx.spelled(native, "div"))):
            opened, reading = timed(lambda model=model: read_proto(model))
            forms, finding = timed(lambda opened=opened: norm_forms(opened.graph))
            solution, deciding = timed(lambda opened=opened, forms=forms: _decided(opened.graph, forms))
            assert len(solution.swapped) == len(forms) == 2 * layers + 1
            options = SwapOptions(target="primitive")
            plan, planning = timed(
                lambda opened=opened, options=options: plan_swap(opened.graph, opened.fingerprint, options)
            )
            _, applying = timed(lambda opened=opened, plan=plan: apply_plan(opened, plan))
            steps = "".join(f"{each:7.2f}" for each in (reading, finding, deciding, planning, applying))
            print(f"{layers:6}{len(model.graph.node):6}{len(forms):6}{steps}{name}", flush=True)


def _decided(graph: Any, forms: Any) -> Any:
    facts = Facts(Constants(graph), forms)
    wanted = {form: fact for form in forms if isinstance(fact := facts.wanted(form), Fact)}
    return facts.solve(wanted)


if __name__ == "__main__":
    main()
