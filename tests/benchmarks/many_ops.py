"""Does the time of a fold grow in step with the graph? Prints seconds for 2,500 to 20,000 small ops.

    python tests/benchmarks/many_ops.py

Columns: ops, folds, then seconds to read, to plan (with every proof) and to apply. Each row doubles the one
before; so should the seconds.
"""

import sys
import time
from itertools import pairwise
from pathlib import Path

import onnx

sys.path.insert(0, str(Path(__file__).parents[2]))

from normtool.formats.onnx.apply import apply_plan
from normtool.formats.onnx.read import read_proto
from normtool.planner import plan_fold
from tests.zoo import Net


def chain(blocks: int) -> onnx.ModelProto:
    """x + relu(bn(conv(x))), again and again, with every shape written out."""
    net = Net()
    x = net.input([1, 4, 8, 8])
    for _ in range(blocks):
        x = net.node("Add", x, net.node("Relu", net.batch_norm(net.conv(x, 4, 4, 1, 1), 4)))
    net.output(x, [1, 4, 8, 8])
    return onnx.shape_inference.infer_shapes(net.model())


def main() -> None:
    print("   ops  folds   read   plan  apply   (seconds)")
    for blocks in (625, 1250, 2500, 5000):
        model = chain(blocks)
        times = [time.perf_counter()]
        opened = read_proto(model)
        times.append(time.perf_counter())
        plan = plan_fold(opened.graph, opened.fingerprint)
        times.append(time.perf_counter())
        apply_plan(opened, plan)
        times.append(time.perf_counter())
        steps = "".join(f"{b - a:7.2f}" for a, b in pairwise(times))
        print(f"{4 * blocks:6}{len(plan.folds):7}{steps}", flush=True)


if __name__ == "__main__":
    main()
