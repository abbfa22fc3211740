"""Which BatchNorms remain, and why: over the real models of the corpus, real architectures and the tests'
blocks.

    python -m tests.benchmarks.what_remains [corpus|architectures|blocks …]

For each group: BatchNorm sites, how many are folded, and the rest by reason. A site is listed once, under all
its reasons: what stops its map backward, and what stops it forward. Models with norms left are named.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import normtool
from normtool.errors import NormtoolError
from normtool.reasons import FOLDED
from tests.blocks import BLOCKS
from tests.conftest import CORPUS, manifest
from tests.formats.torch.architectures import ARCHITECTURES

#: Name of a model, and how to plan it.
Plans = Iterator[tuple[str, Callable[[], normtool.Plan]]]


def corpus() -> Plans:
    """The ONNX files; most of the trained ones were exported with their BatchNorms folded already."""
    for entry in manifest():
        yield entry["file"], partial(normtool.plan, CORPUS / entry["file"])


def architectures() -> Plans:
    """Programs, as torch.export sees the transformers models."""
    for each in ARCHITECTURES:
        if each.batch_norms:
            module, inputs = each.make(), each.inputs()
            yield each.name, partial(_plan, module, (), inputs)


def blocks() -> Plans:
    torch.manual_seed(0)
    for each in BLOCKS:
        module = each.make().eval()
        inputs = tuple(torch.rand(shape) for shape in each.shapes)
        yield each.name, partial(_plan, module, inputs, {})


def _plan(module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> normtool.Plan:
    return normtool.plan(torch.export.export(module, arguments, named, strict=False))


GROUPS: dict[str, Callable[[], Plans]] = {"corpus": corpus, "architectures": architectures, "blocks": blocks}


def count(name: str, group: Callable[[], Plans]) -> None:
    total, folded = 0, 0
    reasons: Counter[str] = Counter()
    left: list[str] = []
    for model, plan in group():
        try:
            sites = plan().sites
        except NormtoolError as error:
            print(f"  refused: {str(error).splitlines()[0]}")
            continue
        norms = [site for site in sites if site.norm.kind == "batch_norm"]
        kept = [site for site in norms if site.verdict != FOLDED]
        total, folded = total + len(norms), folded + len(norms) - len(kept)
        for site in kept:
            reasons[", ".join(dict.fromkeys(reason.code for reason in site.reasons))] += 1
        left += [f"{model} {len(kept)}/{len(norms)}"] if kept else []
    print(f"{name}: {total} BatchNorm sites, {folded} folded, {total - folded} left")
    for codes, times in reasons.most_common():
        print(f"  {times:5} {codes}")
    print(f"  left in: {', '.join(left)}", flush=True)


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    for name in names or GROUPS:
        count(name, GROUPS[name])


if __name__ == "__main__":
    main(sys.argv[1:])
