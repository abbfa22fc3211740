"""`make demo`: scan, fold and validate a trained model, with the commands a user would type."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from fetch_model import TARGET, fetch
from onnx import helper, numpy_helper

FOLDED = TARGET.with_name("folded.onnx")


def main() -> None:
    try:
        model = fetch()
    except RuntimeError as error:
        print(f"{error}\nGoing on with a small model made here.\n")
        model = build()
    run("scan", model)
    run("fold", model, "-o", FOLDED, "--force")
    run("validate", model, FOLDED)


def run(*arguments: object) -> None:
    words = [str(word) for word in arguments]
    shown = [str(Path(word).relative_to(Path.cwd())) if Path(word).is_absolute() else word for word in words]
    print(f"$ normtool {' '.join(shown)}\n", flush=True)
    subprocess.run([sys.executable, "-m", "normtool", *words], check=True)


def build() -> Path:
    """Conv → BatchNormalization → Relu, three times, with parameters that are not the default ones."""
    rng, nodes, weights, x = np.random.default_rng(0), [], [], "x"
    for i, (cin, cout) in enumerate([(3, 8), (8, 16), (16, 16)]):
        arrays = {
            f"w{i}": rng.normal(size=(cout, cin, 3, 3)) / np.sqrt(9 * cin),
            f"gamma{i}": rng.uniform(0.5, 1.5, cout),
            f"beta{i}": rng.normal(size=cout),
            f"mean{i}": rng.normal(size=cout),
            f"var{i}": rng.uniform(0.5, 2, cout),
        }
        weights += [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()]
        nodes.append(helper.make_node("Conv", [x, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("BatchNormalization", [f"c{i}", *list(arrays)[1:]], [f"n{i}"]))
        nodes.append(helper.make_node("Relu", [f"n{i}"], [f"r{i}"]))
        x = f"r{i}"
    inputs = [helper.make_tensor_value_info("x", 1, ["batch", 3, 32, 32])]
    outputs = [helper.make_tensor_value_info(x, 1, ["batch", 16, 32, 32])]
    graph = helper.make_graph(nodes, "demo", inputs, outputs, weights)
    TARGET.parent.mkdir(exist_ok=True)
    path = TARGET.with_name("made_here.onnx")
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


if __name__ == "__main__":
    main()
