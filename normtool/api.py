"""The library: the same verbs as the command line, on paths and on objects."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from normtool.comparison import EQUAL, Comparison
from normtool.constants import Constants
from normtool.detect import find_norms
from normtool.errors import UsageError
from normtool.formats.onnx.apply import apply_plan
from normtool.formats.onnx.model import OnnxModel
from normtool.formats.onnx.read import read_path, read_proto
from normtool.formats.onnx.write import staged, to_proto
from normtool.parameters import Census, census
from normtool.planner import Plan, Site, plan_fold
from normtool.reasons import FOLDED
from normtool.scanning import Scan, scan_graph

if TYPE_CHECKING:
    import onnx

#: What a caller may hand over: a path, an `onnx.ModelProto`, or what `load` returned.
Model = Any

#: Example inputs: name → array. A shape to generate an array of is given with `shapes=`.
Inputs = Mapping[str, Any]

SCHEMA = "normtool.rewrite/1"


@dataclass(frozen=True, eq=False)
class Rewrite:
    """What `fold` did. `.model` is the rewritten model, `.sites` the verdict of every norm."""

    plan: Plan
    source: OnnxModel
    rewritten: OnnxModel
    before: Census
    after: Census
    validation: Comparison | None = None
    outputs: tuple[dict[str, str], ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.plan.sites

    @property
    def folded(self) -> int:
        return sum(site.verdict == FOLDED for site in self.sites)

    @cached_property
    def model(self) -> "onnx.ModelProto":
        """The rewritten model with all its data. Raises OutputError above protobuf's 2 GB: use `save`."""
        return to_proto(self.rewritten)

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write the model to a file, atomically. Raises OutputError if the path exists and not `force`."""
        with staged(self.rewritten, Path(path), force) as stage:
            stage.commit()

    def to_dict(self) -> dict[str, Any]:
        """The JSON of DESIGN §7."""
        return {
            "schema": SCHEMA,
            "sites": [site.to_dict() for site in self.sites],
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "validation": None if self.validation is None else self.validation.to_dict(),
            "outputs": list(self.outputs),
        }

    def __str__(self) -> str:
        from normtool.report.table import to_text

        return to_text(self)


def load(model: Model) -> OnnxModel:
    """Open a model without reading its weights.

    Raises UnreadableModel, UnsafeModel, or UsageError for what this version does not read.
    """
    if isinstance(model, OnnxModel):
        return model
    if isinstance(model, str | Path):
        return _load_path(Path(model))
    if hasattr(model, "SerializeToString") and hasattr(model, "opset_import"):
        return read_proto(model)
    raise UsageError(f"cannot read a {type(model).__name__}; give an .onnx path or an onnx.ModelProto")


def _load_path(path: Path) -> OnnxModel:
    if path.suffix in (".pt2", ".pt", ".pth", ".bin", ".safetensors", ".th", ".ckpt", ".tar"):
        raise UsageError(f"{path}: is a PyTorch file; this version of normtool reads ONNX only")
    return read_path(path)


def scan(model: Model, inputs: Inputs | None = None) -> Scan:
    """Every norm of the model and what it stores. `inputs` are not needed for ONNX."""
    opened = load(model)
    described = {
        "path": str(opened.path) if opened.path else None,
        "format": "onnx",
        "sha256": opened.sha256,
    }
    return scan_graph(opened.graph, described)


def plan(model: Model, freeze: bool = False) -> Plan:
    """What `fold` would do, proved site by site; nothing is changed or written."""
    opened = load(model)
    return plan_fold(opened.graph, opened.fingerprint, freeze)


def apply(model: Model, plan: Plan) -> "onnx.ModelProto":
    """Carry out a plan on (a copy of) the model it was made for. Raises StalePlan for another one."""
    return to_proto(apply_plan(load(model), plan))


def rewrite(opened: OnnxModel, made: Plan) -> Rewrite:
    """A plan carried out, with the parameters counted before and after."""
    rewritten = apply_plan(opened, made)
    return Rewrite(made, opened, rewritten, count(opened), count(rewritten))


def count(opened: OnnxModel) -> Census:
    return census(opened.graph, find_norms(opened.graph, Constants(opened.graph)))


def fold(
    model: Model,
    inputs: Inputs | None = None,
    validate: bool = True,
    freeze: bool = False,
    inplace: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Rewrite:
    """Fold every BatchNorm that can be folded exactly.

    `freeze` treats initializers that are also graph inputs as constants. With `validate`, both models are run
    in ONNX Runtime and compared (`.validation`); where nothing was folded there is nothing to compare.
    `inplace` puts the result into the ModelProto that was given, unless validation did not find it equal.

    Raises UnreadableModel, RuntimeRefused (ONNX Runtime cannot run the model), BackendUnavailable,
    UsageError (`inplace` on anything but a ModelProto; inputs that do not fit).
    """
    if inplace and not hasattr(model, "CopyFrom"):
        raise UsageError("inplace needs an onnx.ModelProto; a file is replaced with save(path, force=True)")
    opened = load(model)
    result = rewrite(opened, plan(opened, freeze))
    if validate and result.folded:
        comparison = compare_models(opened, result.rewritten, inputs=inputs, seed=seed, device=device)
        result = replace(result, validation=comparison)
    if inplace and (result.validation is None or result.validation.verdict == EQUAL):
        model.CopyFrom(result.model)
    return result


def validate(
    reference: Model,
    candidate: Model,
    inputs: Inputs | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Comparison:
    """Do two models compute the same function? `normtool.comparison` says how that is judged.

    Raises RuntimeRefused when ONNX Runtime cannot run the reference, BackendUnavailable without the device.
    """
    return compare_models(load(reference), load(candidate), inputs=inputs, device=device, seed=seed)


def compare_models(
    reference: OnnxModel, candidate: OnnxModel, *, inputs: Inputs | None = None, **options: Any
) -> Comparison:
    from normtool.formats.onnx.run import validate_onnx

    with _as_file(inputs) as inputs_file:
        return validate_onnx(reference, candidate, inputs_file=inputs_file, **options)


@contextmanager
def _as_file(inputs: Inputs | None) -> Iterator[Path | None]:
    if inputs is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="normtool-") as folder:
        path = Path(folder) / "inputs.npz"
        np.savez(path, **{name: np.asarray(array) for name, array in inputs.items()})  # type: ignore
        yield path
