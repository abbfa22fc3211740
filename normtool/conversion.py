"""`convert`: a PyTorch model as ONNX, or as a saved program, with every difference in the counts explained."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from normtool.comparison import Comparison
from normtool.destination import remove, scratch_path
from normtool.detect import find_norms
from normtool.errors import UsageError
from normtool.formats.onnx.model import OnnxModel
from normtool.formats.torch.convert import in_inference_mode, program_of, to_onnx
from normtool.formats.torch.model import TorchModel, read_exported
from normtool.formats.torch.norm_changes import NormChange, norm_changes
from normtool.formats.torch.program_apply import fold_program
from normtool.formats.torch.reconcile import Reconciliation, folded_by_exporter, reconcile
from normtool.options import SwapOptions
from normtool.parameters import Census
from normtool.planner import Plan, Progress, Site, plan_fold
from normtool.reasons import FOLDED, KEPT, Reason
from normtool.results import SCHEMA, ModelResult

TARGETS = ("onnx", "pt2")


class Folder:
    """A temporary folder that is removed with the last reference to this object."""

    def __init__(self) -> None:
        self.path = scratch_path()
        weakref.finalize(self, remove, self.path)
        self.path.mkdir(mode=0o700)


@dataclass(frozen=True, eq=False)
class Conversion(ModelResult):
    """What `convert` made. `.model` is a ModelProto or an ExportedProgram, `.sites` what became of each norm.

    `source` is the model that was converted: the user's own, or a copy of it in inference mode. `norms` are
    the kinds of which the file has more or fewer than the model, and why.
    """

    source: TorchModel
    made: OnnxModel | TorchModel
    sites: tuple[Site, ...]
    norms: tuple[NormChange, ...]
    before: Census
    after: Census
    reconciliation: Reconciliation
    #: where the exporter wrote; it goes when the last result that reads weights from it goes
    folder: Folder
    validation: Comparison | None = None
    outputs: tuple[dict[str, str], ...] = ()

    @property
    def folded(self) -> int:
        return sum(site.fold is not None and site.verdict != KEPT for site in self.sites)

    @property
    def opened(self) -> OnnxModel | TorchModel:
        return self.made

    def to_dict(self) -> dict[str, Any]:
        """The JSON of DESIGN §7, and `reconciliation`."""
        return {
            "schema": SCHEMA,
            "sites": [site.to_dict() for site in self.sites],
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "reconciliation": {
                **self.reconciliation.to_dict(),
                "norms": [change.to_dict() for change in self.norms],
            },
            "validation": None if self.validation is None else self.validation.to_dict(),
            "outputs": list(self.outputs),
        }


def convert_model(
    opened: TorchModel,
    target: str = "onnx",
    fold: bool = False,
    opset: int | None = None,
    progress: Progress = lambda done, total: None,
    swap: str | None = None,
) -> Conversion:
    """Export, fold and swap if asked to, and account for what changed. Nothing is written where a user would
    see it.

    Raises UsageError (no example inputs, an unknown target), RuntimeRefused (an exporter fails).
    """
    if target not in TARGETS:
        raise UsageError(f"convert to {target!r}: choose {' or '.join(TARGETS)}")
    source = in_inference_mode(opened)
    program = read_exported(program_of(source))
    exported, plans = program, list[Plan]()
    if fold:
        plans.append(plan_fold(program.graph, program.fingerprint, progress=progress))
        exported = _carried_out(exported, plans[-1])
    if swap is not None:
        plans.append(_swap_plan(exported, swap, progress))
        exported = _carried_out(exported, plans[-1])
    folder = Folder()
    made: OnnxModel | TorchModel = exported
    if target == "onnx":
        assert exported.program is not None
        made = to_onnx(exported.program, folder.path, opset)
    account = reconcile(source, program, exported, made)
    sites = _sites(program, plans, exported, made)
    norms = norm_changes(program.graph, sites, made) if isinstance(made, OnnxModel) else ()
    return Conversion(source, made, sites, norms, account.source, account.made, account, folder)


def _swap_plan(program: TorchModel, mode: str, progress: Progress) -> Plan:
    """The plan of a swap. Raises UsageError for an approximate one: a conversion keeps the function."""
    from normtool.swapping import plan_swap

    if mode == "approximate":
        raise UsageError("convert keeps the function; swap the converted model with --mode approximate")
    options = SwapOptions(mode=mode, target="onnx")
    return plan_swap(program.graph, program.fingerprint, options, progress)


def _carried_out(program: TorchModel, plan: Plan) -> TorchModel:
    return fold_program(program, plan) if plan.folds else program


def _sites(
    program: TorchModel, plans: Sequence[Plan], exported: TorchModel, made: OnnxModel | TorchModel
) -> tuple[Site, ...]:
    """What became of each norm; the exporter may have folded some of its own accord.

    Of two plans, the one that did something says so.
    """
    asked = _nothing_asked(program) if not plans else plans[0].sites
    if len(plans) == 2:
        later = {site.norm.name: site for site in plans[1].sites}
        asked = tuple(later.get(s.norm.name, s) if s.norm.kind == "layer_norm" else s for s in asked)
    if not isinstance(made, OnnxModel):
        return asked
    gone = {op.name for op in folded_by_exporter(exported, made)}
    return tuple(_as_exported(site, gone) for site in asked)


def _nothing_asked(program: TorchModel) -> tuple[Site, ...]:
    """Every norm kept, because nobody asked for anything else."""
    return tuple(
        Site(norm, KEPT, (Reason("not_asked", "converted as it is", norm.name),))
        for norm in find_norms(program.graph)
    )


def _as_exported(site: Site, gone: set[str]) -> Site:
    if site.fold is not None or site.norm.op is None or site.norm.op.name not in gone:
        return site
    reason = Reason("folded_by_exporter", "torch.onnx.export folded it, without a proof", site.norm.name)
    return replace(site, verdict=FOLDED, reasons=(reason,))
