"""BatchNorms left in real PyTorch architectures: normtool beside torch.fx's own fuse.

    python -m tests.benchmarks.fold_modules

For each architecture of tests/formats/torch/architectures.py that holds BatchNorms: how many are left, how many
times longer than fuse a fold with its proofs takes, and how far the outputs lie apart, relative to the largest.
"""

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.fx.experimental.optimization import fuse

import normtool
from normtool.formats.torch.export import leaves
from tests.formats.torch.architectures import ARCHITECTURES, Architecture, is_batch_norm


def main() -> None:
    warnings.simplefilter("ignore")
    table = Table(
        "architecture", "BatchNorms", "left: normtool", "left: fx.fuse", "error", "error", "time ratio"
    )
    totals = [0, 0, 0]
    refused = 0
    for architecture in ARCHITECTURES:
        if not architecture.batch_norms:
            continue
        ours, theirs = measured(architecture, by_normtool), measured(architecture, by_fx)
        refused += theirs[0] is None
        totals[0] += architecture.batch_norms
        totals[1] += ours[0] or 0
        totals[2] += architecture.batch_norms if theirs[0] is None else theirs[0]
        table.add_row(architecture.name, str(architecture.batch_norms), *cells(ours, theirs))
    table.add_row("all", *map(str, totals))
    console = Console()
    console.print(table)
    console.print(f"torch.fx cannot trace {refused} of them (all their BatchNorms are left)")


#: (BatchNorms left, relative error, seconds); None where the tool raises
Measured = tuple[int | None, float, float]


def measured(architecture: Architecture, tool: Callable[[nn.Module, dict[str, Any]], nn.Module]) -> Measured:
    module, inputs = architecture.make(), architecture.inputs()
    start = time.perf_counter()
    try:
        folded = tool(module, inputs)
    except Exception:  # torch.fx raises anything on code that it cannot trace
        return None, 0.0, 0.0
    seconds = time.perf_counter() - start
    try:
        return sum(map(is_batch_norm, folded.modules())), error(module, folded, inputs), seconds
    except Exception:
        return None, 0.0, seconds


def by_normtool(module: nn.Module, inputs: dict[str, Any]) -> nn.Module:
    folded: nn.Module = normtool.fold(module, inputs, validate=False).model
    return folded


def by_fx(module: nn.Module, inputs: dict[str, Any]) -> nn.Module:
    return fuse(copy.deepcopy(module))


def error(module: nn.Module, folded: nn.Module, inputs: dict[str, Any]) -> float:
    pairs = zip(outputs(module, inputs), outputs(folded, inputs), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def outputs(module: nn.Module, inputs: dict[str, Any]) -> Iterator[torch.Tensor]:
    with torch.no_grad():
        found = module(**inputs)
    return (leaf for leaf in leaves(found) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())


def cells(ours: Measured, theirs: Measured) -> Iterator[str]:
    for left, _, _ in (ours, theirs):
        yield "raises" if left is None else str(left)
    for left, apart, _ in (ours, theirs):
        yield "" if left is None else f"{apart:.1e}"
    yield f"{ours[2] / theirs[2]:.1f}" if theirs[0] is not None else ""


if __name__ == "__main__":
    main()
