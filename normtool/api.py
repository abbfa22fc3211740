"""The library: the same verbs as the command line, on paths and on objects."""

import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from normtool.comparison import EQUAL, Comparison
from normtool.errors import UsageError
from normtool.parameters import Census
from normtool.planner import Plan, Progress, Site
from normtool.reasons import FOLDED
from normtool.scanning import Scan, scan_graph

if TYPE_CHECKING:
    from normtool.conversion import Conversion
    from normtool.formats.onnx.model import OnnxModel
    from normtool.formats.torch.checkpoint import Checkpoint
    from normtool.formats.torch.model import TorchModel

#: What `load` returns: a model whose weights stay where they are until somebody needs the numbers.
Opened: TypeAlias = "OnnxModel | TorchModel | Checkpoint"

#: What a caller may hand over: a path, a factory `package.module:callable`, an `onnx.ModelProto`, an
#: `nn.Module`, a `torch.export.ExportedProgram`, or what `load` returned.
Model = Any

#: Example inputs. ONNX: name → array. PyTorch: a tensor, a tuple by position, a dict by name; arrays will do.
Inputs = Any

SCHEMA = "normtool.rewrite/1"

#: `package.module:callable`
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")

#: Suffixes that promise PyTorch; content that is nothing of the kind is then an error and not taken for ONNX.
_TORCH_SUFFIXES = frozenset([".pt", ".pth", ".pt2", ".bin", ".safetensors", ".th", ".ckpt", ".tar"])


@dataclass(frozen=True, eq=False)
class Rewrite:
    """What `fold` did. `.model` is the rewritten model, `.sites` the verdict of every norm."""

    plan: Plan
    source: "OnnxModel | TorchModel"
    rewritten: "OnnxModel | TorchModel"
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
    def model(self) -> Any:
        """The rewritten model, of the kind that was given: a ModelProto, the module's own class, a program.

        A path gives a ModelProto or an ExportedProgram. Raises OutputError for ONNX above protobuf's 2 GB: use
        `save`.
        """
        return _verbs(self.rewritten).to_object(self.rewritten)

    def stage(self, path: Path, force: bool = False) -> AbstractContextManager[Any]:
        """The model written beside `path`; `commit()` puts it in place, else it goes with the block."""
        staged: AbstractContextManager[Any] = _verbs(self.rewritten).stage(self.rewritten, path, force)
        return staged

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write the model to a file (.onnx, or .pt2), atomically.

        Raises OutputError if the path exists and not `force`.
        """
        with self.stage(Path(path), force) as stage:
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


# ---- opening ----------------------------------------------------------------------------------


def load(
    model: Model,
    inputs: Inputs = None,
    arguments: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    numbers: bool = True,
) -> Opened:
    """Open a model: a path, a factory, or an object.

    `inputs` are example inputs of a PyTorch model that does not tell its own. `arguments` and `weights` (a
    checkpoint) are for a factory `package.module:callable`. Without `numbers` a Hugging Face folder is read for
    its configuration alone.

    Raises UnreadableModel, UnsafeModel, UsageError, BackendUnavailable (transformers is not installed).
    """
    if hasattr(model, "graph") and hasattr(model, "fingerprint"):
        opened: Opened = model
        return opened
    if isinstance(model, str | Path):
        return _load_path(str(model), inputs, arguments or {}, weights, numbers)
    if hasattr(model, "SerializeToString") and hasattr(model, "opset_import"):
        from normtool.formats.onnx.read import read_proto

        return read_proto(model)
    torch = sys.modules.get("torch")  # whoever has a module has imported it
    if torch is not None and isinstance(model, torch.nn.Module | torch.export.ExportedProgram):
        from normtool.formats.torch.sources import read_object

        return read_object(model, inputs)
    wanted = "a path, an onnx.ModelProto, an nn.Module or an ExportedProgram"
    raise UsageError(f"cannot read a {type(model).__name__}; give {wanted}")


def _load_path(
    text: str, inputs: Inputs, arguments: Mapping[str, Any], weights: str | Path | None, numbers: bool
) -> Opened:
    path = Path(text)
    if FACTORY.fullmatch(text) and not _exists(path):
        from normtool.formats.torch.sources import read_factory

        return read_factory(text, arguments, Path(weights) if weights else None, inputs)
    if arguments or weights:
        raise UsageError(f"--arg and --weights are for a factory (package.module:callable), not for {text}")
    if _exists(path / "config.json"):
        from normtool.formats.torch.sources import read_folder

        return read_folder(path, inputs, numbers)
    if path.suffix != ".onnx" and _exists(path) and (opened := _load_torch_file(path, inputs)) is not None:
        return opened
    from normtool.formats.onnx.read import read_path

    return read_path(path)


def _exists(path: Path) -> bool:
    """False for names that no file can have; whoever opens them says why."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _load_torch_file(path: Path, inputs: Inputs) -> "Opened | None":
    """A file of PyTorch's, judged by its content; None for what may still be ONNX."""
    from normtool.formats.torch.sniff import Kind, kind_of

    kind = Kind.UNKNOWN if path.is_dir() else kind_of(path)
    if kind is Kind.EXPORTED_PROGRAM:
        from normtool.formats.torch.sources import read_pt2

        return read_pt2(path, inputs)
    if kind is Kind.UNKNOWN and path.suffix not in _TORCH_SUFFIXES and not path.is_dir():
        return None
    from normtool.formats.torch.checkpoint import read_checkpoint

    return read_checkpoint(path)


def _verbs(opened: Opened) -> ModuleType:
    """The format's own hands: `formats/onnx/verbs.py` or `formats/torch/verbs.py`."""
    from normtool.formats.onnx.model import OnnxModel

    if isinstance(opened, OnnxModel):
        from normtool.formats.onnx import verbs as onnx_verbs

        return onnx_verbs
    from normtool.formats.torch import verbs as torch_verbs

    return torch_verbs


def _with_dataflow(opened: Opened) -> "OnnxModel | TorchModel":
    """Raises UsageError for what cannot be rewritten: weights alone, a module without example inputs."""
    if opened.format == "module":
        from normtool.formats.torch.sources import need_example

        need_example(opened)  # type: ignore[arg-type]
    return _runnable(opened)


def _runnable(opened: Opened) -> "OnnxModel | TorchModel":
    """Raises UsageError for weights alone. What a module is called with may be the other side's to tell."""
    if opened.format in ("onnx", "module", "pt2"):
        return opened  # type: ignore[return-value]
    raise UsageError(
        f"{opened.path}: {opened.graph.no_dataflow}; give the model itself (ONNX, .pt2, a factory)"
    )


# ---- verbs ------------------------------------------------------------------------------------


def scan(model: Model, inputs: Inputs = None) -> Scan:
    """Every norm of the model and what it stores.

    ONNX needs no `inputs`. A PyTorch module is exported on them for what only the dataflow shows: functional
    norms, and how often each module is called.
    """
    opened = load(model, inputs, numbers=False)
    described = {
        "path": str(opened.path) if opened.path else None,
        "format": opened.format,
        "sha256": opened.sha256,
    }
    return scan_graph(opened.graph, described, getattr(opened, "census", None))


def plan(
    model: Model,
    inputs: Inputs = None,
    freeze: bool = False,
    progress: Progress = lambda done, total: None,
) -> Plan:
    """What `fold` would do, proved site by site; nothing is changed or written."""
    opened = _with_dataflow(load(model, inputs))
    made: Plan = _verbs(opened).make_plan(opened, freeze, progress)
    return made


def apply(model: Model, plan: Plan, inputs: Inputs = None) -> Any:
    """Carry out a plan on (a copy of) the model it was made for. Raises StalePlan for another one."""
    opened = load(model, inputs)
    verbs = _verbs(opened)
    return verbs.to_object(verbs.apply(opened, plan))


def rewrite(opened: Opened, made: Plan, **options: Any) -> Rewrite:
    """A plan carried out, with the parameters counted before and after."""
    source = _with_dataflow(opened)
    verbs = _verbs(source)
    before = verbs.census_of(source)
    rewritten = verbs.apply(source, made, **options)
    return Rewrite(made, source, rewritten, before, verbs.census_of(rewritten))


def fold(
    model: Model,
    inputs: Inputs = None,
    validate: bool = True,
    freeze: bool = False,
    inplace: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Rewrite:
    """Fold every BatchNorm that can be folded exactly.

    `freeze` treats ONNX initializers that are also graph inputs as constants. With `validate`, both models are
    run and compared (`.validation`); where nothing was folded there is nothing to compare. `inplace` puts the
    result into the ModelProto or nn.Module that was given, unless validation did not find it equal.

    Raises UnreadableModel, RuntimeRefused (the runtime cannot run the model), BackendUnavailable, UsageError
    (`inplace` on a path or a program; inputs that are missing, or do not fit).
    """
    if inplace and not (hasattr(model, "CopyFrom") or hasattr(model, "named_modules")):
        raise UsageError(
            "inplace needs an onnx.ModelProto or an nn.Module; save(path, force=True) replaces a file"
        )
    opened = _with_dataflow(load(model, inputs))
    made = plan(opened, freeze=freeze)
    result = rewrite(opened, made)
    if validate and result.folded:
        result = replace(result, validation=compare_models(opened, result.rewritten, inputs, device, seed))
    if inplace and (result.validation is None or result.validation.verdict == EQUAL):
        if hasattr(model, "CopyFrom"):
            model.CopyFrom(result.model)
        else:
            result = replace(rewrite(opened, made, inplace=True), validation=result.validation)
    return result


def validate(
    reference: Model,
    candidate: Model,
    inputs: Inputs = None,
    device: str = "cpu",
    seed: int = 0,
) -> Comparison:
    """Do two models compute the same function? `normtool.comparison` says how that is judged.

    Any pair will do: two ONNX models, two PyTorch models, one of each.

    Raises RuntimeRefused when the reference cannot be run, BackendUnavailable without the device.
    """
    return compare_models(load(reference, inputs), load(candidate, inputs), inputs, device, seed)


def convert(
    model: Model,
    inputs: Inputs = None,
    target: str = "onnx",
    fold: bool = False,
    opset: int | None = None,
    validate: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> "Conversion":
    """A PyTorch model as ONNX (`target="onnx"`, through torch.onnx.export) or as a program (`"pt2"`).

    The model is taken in inference mode, axis 0 of its inputs is left open where it can be. With `fold`,
    BatchNorms are folded, proved, before the export. `.reconciliation` explains every difference in the counts.

    Raises UsageError (no example inputs, not a PyTorch model), RuntimeRefused (an exporter fails).
    """
    result = make_conversion(load(model, inputs), target, fold, opset)
    if validate:
        comparison = compare_models(result.source, result.made, inputs, device, seed)
        result = replace(result, validation=comparison)
    return result


def make_conversion(
    opened: Opened,
    target: str,
    fold: bool,
    opset: int | None,
    progress: Progress = lambda done, total: None,
) -> "Conversion":
    """`convert` without the comparison."""
    source = _with_dataflow(opened)
    if source.format == "onnx":
        raise UsageError("convert takes a PyTorch model; this one is ONNX already (fold and validate take it)")
    from normtool.conversion import convert_model

    return convert_model(source, target, fold, opset, progress)  # type: ignore[arg-type]


def reopen(result: "Rewrite | Conversion", path: Path) -> Opened:
    """The model as it was just written to `path`, whatever the file is called."""
    made = result.rewritten if isinstance(result, Rewrite) else result.made
    if made.format == "onnx":
        from normtool.formats.onnx.read import read_path

        return read_path(path)
    from normtool.formats.torch.sources import read_pt2

    return read_pt2(path)


def compare_models(
    reference: Opened,
    candidate: Opened,
    inputs: Inputs = None,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> Comparison:
    pair = _runnable(reference), _runnable(candidate)
    if all(opened.format == "onnx" for opened in pair):
        from normtool.formats.onnx.run import validate_onnx

        with _as_file(inputs) as inputs_file:
            options = {"inputs_file": inputs_file, **options}
            return validate_onnx(*pair, device=device, seed=seed, **options)  # type: ignore[arg-type]
    from normtool.formats.torch.run import validate_torch

    return validate_torch(*pair, inputs=inputs, device=device, seed=seed, **options)


@contextmanager
def _as_file(inputs: Inputs) -> Iterator[Path | None]:
    if inputs is None:
        yield None
        return
    if not isinstance(inputs, Mapping):
        raise UsageError("inputs of ONNX models are given by name: {name: array}")
    with tempfile.TemporaryDirectory(prefix="normtool-") as folder:
        path = Path(folder) / "inputs.npz"
        np.savez(path, **{name: np.asarray(array) for name, array in inputs.items()})  # type: ignore
        yield path
