"""Finds, counts, folds and proves normalisation layers in neural-network models.

    import normtool

    print(normtool.scan("model.onnx"))              # every norm, and what the model stores
    result = normtool.fold("model.onnx")            # BatchNorm folded away, proved and validated
    result.save("folded.onnx")

Results are plain values with `to_dict()` (the JSON of the command line) and print as tables.
Nothing here imports a framework before it is needed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normtool.api import (
        Restoration,
        Rewrite,
        apply,
        bench,
        convert,
        fold,
        load,
        plan,
        plan_swap,
        scan,
        swap,
        unfold,
        validate,
    )
    from normtool.comparison import Comparison
    from normtool.conversion import Conversion
    from normtool.errors import NormtoolError
    from normtool.planner import Plan, Site
    from normtool.reasons import Reason
    from normtool.scanning import Scan
    from normtool.timing import Benchmark

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("Restoration", "Rewrite", "apply", "bench", "convert", "fold", "load"), "normtool.api"),
    **dict.fromkeys(("plan", "plan_swap", "scan", "swap", "unfold", "validate"), "normtool.api"),
    "Benchmark": "normtool.timing",
    "Conversion": "normtool.conversion",
    "NormtoolError": "normtool.errors",
    "Plan": "normtool.planner",
    "Site": "normtool.planner",
    "Reason": "normtool.reasons",
    "Scan": "normtool.scanning",
    "Comparison": "normtool.comparison",
}

__all__ = [
    "Benchmark",
    "Comparison",
    "Conversion",
    "NormtoolError",
    "Plan",
    "Reason",
    "Restoration",
    "Rewrite",
    "Scan",
    "Site",
    "apply",
    "bench",
    "convert",
    "fold",
    "load",
    "plan",
    "plan_swap",
    "scan",
    "swap",
    "unfold",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'normtool' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
