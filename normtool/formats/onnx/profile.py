"""What ONNX Runtime's profile says: how long the ops of each type took.

A profile is a list of trace events. `Node` events named `…_kernel_time` are runs of one op; that of an If, a
Loop or a Scan spans those of its body, which are events of their own. `model_run` spans one run of the model.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from normtool.norms import NORMS
from normtool.ops import ATEN, TABLE

Event = Mapping[str, Any]

#: Names of norm ops in any domain, as files or ONNX Runtime's fusions spell them.
NORM_OPS = frozenset(
    spelling.op_type
    for row in TABLE
    if row.kind in NORMS
    for spelling in row.spellings
    if spelling.domain != ATEN
)


def time_by_op(events: Iterable[Event]) -> dict[str, int]:
    """Op type → microseconds in its kernels, without those of ops in its bodies; the first run left out.

    The first run also allocates, and would count where there is no other.
    """
    events = [event for event in events if event.get("ph", "X") == "X"]
    ends = sorted(e["ts"] + e["dur"] for e in events if e.get("cat") == "Session" and e["name"] == "model_run")
    start = ends[0] if len(ends) > 1 else 0
    times: dict[str, int] = defaultdict(int)
    open_ops: dict[Any, list[Event]] = defaultdict(list)  # of each thread, outermost first
    for event in sorted(filter(_is_kernel, events), key=lambda event: (event["ts"], -event["dur"])):
        if event["ts"] < start:
            continue
        around = open_ops[event.get("tid")]
        while around and around[-1]["ts"] + around[-1]["dur"] < event["ts"] + event["dur"]:
            around.pop()
        if around:
            times[around[-1]["args"]["op_name"]] -= event["dur"]
        times[event["args"]["op_name"]] += event["dur"]
        around.append(event)
    return dict(times)


def _is_kernel(event: Event) -> bool:
    named = str(event["name"]).endswith("_kernel_time")
    return event.get("cat") == "Node" and named and "op_name" in event.get("args", {})


def norm_share(times: Mapping[str, int]) -> float | None:
    """The part of the time in ops that norm ops take; None where no time was seen at all."""
    total = sum(times.values())
    return sum(times.get(name, 0) for name in NORM_OPS) / total if total else None
