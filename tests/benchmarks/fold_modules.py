"""BatchNorms left in real PyTorch architectures: normtool beside torch.fx's own fuse.

    python -m tests.benchmarks.fold_modules

For each architecture of tests/formats/torch/architectures.py that holds BatchNorms: how many are left, and how
far the outputs lie apart, relative to the largest. Where a tool raises, all of them are left.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.fx.experimental.optimization import fuse

import normtool
from normtool.formats.torch.export import first_line, leaves
from tests.formats.torch.architectures import ARCHITECTURES, is_batch_norm

Tool = Callable[[nn.Module, dict[str, Any]], nn.Module]


def main() -> None:
    warnings.simplefilter("ignore")
    console = Console()
    table = Table("architecture", "BatchNorms", "normtool", "error", "torch.fx fuse", "error")
    left: Counter[str] = Counter()
    complaints: Counter[str] = Counter()
    for architecture in ARCHITECTURES:
        if not architecture.batch_norms:
            continue
        row = [architecture.name, str(architecture.batch_norms)]
        for name, tool in TOOLS.items():
            module, inputs = architecture.make(), architecture.inputs()
            try:
                folded = tool(module, inputs)
                count = sum(map(is_batch_norm, folded.modules()))
                row += [str(count), f"{error(module, folded, inputs):.1e}"]
            except Exception as complaint:  # torch.fx raises anything on code that it cannot trace
                count = architecture.batch_norms
                complaints[f"{name}: {type(complaint).__name__}: {first_line(complaint)[:80]}"] += 1
                row += ["raises", ""]
            left[name] += count
        table.add_row(*row)
    console.print(table)
    for name, count in left.items():
        console.print(f"{name} leaves {count} of {sum(each.batch_norms for each in ARCHITECTURES)}")
    for complaint_text, count in complaints.most_common():
        console.print(f"{count} x {complaint_text}", markup=False)


def by_normtool(module: nn.Module, inputs: dict[str, Any]) -> nn.Module:
    folded: nn.Module = normtool.fold(module, inputs, validate=False).model
    return folded


def by_fx(module: nn.Module, inputs: dict[str, Any]) -> nn.Module:
    return fuse(copy.deepcopy(module))


TOOLS: dict[str, Tool] = {"normtool": by_normtool, "torch.fx": by_fx}


def error(module: nn.Module, folded: nn.Module, inputs: dict[str, Any]) -> float:
    pairs = zip(outputs(module, inputs), outputs(folded, inputs), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def outputs(module: nn.Module, inputs: dict[str, Any]) -> Iterator[torch.Tensor]:
    with torch.no_grad():
        found = module(**inputs)
    return (leaf for leaf in leaves(found) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())


if __name__ == "__main__":
    main()
