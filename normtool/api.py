"""The library: the same verbs as the command line, on paths and on objects."""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from normtool.comparison import EQUAL, Comparison
from normtool.destination import scratch_folder
from normtool.errors import UnreadableModel, UsageError
from normtool.key_map import key_map
from normtool.options import FoldOptions, SwapOptions
from normtool.parameters import Census
from normtool.planner import AFFINE, Plan, Progress, Site
from normtool.reasons import APPROXIMATED, FOLDED, LOWERED, RESTORED, SWAPPED
from normtool.results import SCHEMA, ModelResult, verbs_of
from normtool.scanning import Scan, scan_graph

if TYPE_CHECKING:
    from normtool.approximate import Approximation
    from normtool.conversion import Conversion
    from normtool.formats.onnx.model import OnnxModel
    from normtool.formats.torch.checkpoint import Checkpoint
    from normtool.formats.torch.model import TorchModel
    from normtool.timing import Benchmark

#: What `load` returns: a model whose weights stay where they are until somebody needs the numbers.
Opened: TypeAlias = "OnnxModel | TorchModel | Checkpoint"

#: What a caller may hand over: a path, a factory `package.module:callable`, an `onnx.ModelProto`, an
#: `nn.Module`, a `torch.export.ExportedProgram`, or what `load` returned.
Model = Any

#: Example inputs. ONNX: name → array. PyTorch: a tensor, a tuple by position, a dict by name; arrays will do.
Inputs = Any

#: Keys of a lint in the JSON, those of a diagnostic.
_LINT = ("code", "message", "where")

#: `package.module:callable`
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")

#: Suffixes that promise PyTorch; content that is nothing of the kind is then an error and not taken for ONNX.
_TORCH_SUFFIXES = frozenset([".pt", ".pth", ".pt2", ".bin", ".safetensors", ".th", ".ckpt", ".tar"])


@dataclass(frozen=True, eq=False)
class Rewrite(ModelResult):
    """What `fold` did. `.model` is the rewritten model, `.sites` the verdict of every norm."""

    plan: Plan
    source: "OnnxModel | TorchModel"
    rewritten: "OnnxModel | TorchModel"
    before: Census
    after: Census
    validation: Comparison | None = None
    outputs: tuple[dict[str, str], ...] = ()
    #: what `unfold` needs, where it was asked for
    undo: dict[str, Any] | None = None
    #: how long both models take, where it was asked for
    benchmark: "Benchmark | None" = None
    #: how far norms without their mean drift, in mode `approximate`
    approximation: "Approximation | None" = None
    #: key of the state dict (or initializer) that the result lacks → the keys of what it held, see `key_map`
    key_map: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.plan.sites

    @property
    def folded(self) -> int:
        """How many norms are gone. Constant Mul and Add chains are sites too, and no norms."""
        norms = [site for site in self.sites if site.norm.kind != AFFINE and site.verdict in (FOLDED, LOWERED)]
        return sum(site.fold is None or not site.fold.moved for site in norms)

    @property
    def swapped(self) -> int:
        """How many LayerNorms are RMSNorms now, or have gone into a table; those that drift do not count."""
        return sum(site.verdict in (SWAPPED, FOLDED) for site in self.sites if site.norm.kind == "layer_norm")

    @property
    def approximated(self) -> int:
        """How many LayerNorms have become RMSNorms that do not compute the same."""
        return sum(site.verdict == APPROXIMATED for site in self.sites)

    @property
    def exact(self) -> bool:
        return not self.approximated

    def measured(self, written: "OnnxModel | TorchModel | None" = None) -> "Rewrite":
        """The same with what each approximated norm, and the outputs, really drift by.

        `written` is the result as it was opened again. Raises RuntimeRefused where a model does not run.
        """
        if self.approximation is None or self.exact:
            return self
        made, known = self.approximation.measured(self.plan, self.rewritten, written or self.rewritten)
        return replace(self, plan=made, approximation=known)

    @property
    def changed(self) -> bool:
        return bool(self.plan.folds)

    @property
    def opened(self) -> "OnnxModel | TorchModel":
        return self.rewritten

    @cached_property
    def lints(self) -> tuple[tuple[str, str, str], ...]:
        """(code, message, where): what ONNX Runtime makes of the norms of a swapped ONNX model."""
        if self.plan.verb != "swap" or self.rewritten.format != "onnx":
            return ()
        from normtool.lints import lints

        return tuple(lints(self.rewritten.graph))

    def to_dict(self) -> dict[str, Any]:
        """The JSON of DESIGN §7."""
        return {
            "schema": SCHEMA,
            "sites": [site.to_dict() for site in self.sites],
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "key_map": dict(self.key_map),
            "validation": None if self.validation is None else self.validation.to_dict(),
            "outputs": list(self.outputs),
            **({"exact": self.exact} if self.plan.verb == "swap" else {}),
            **({} if self.exact or self.approximation is None else {"drift": self.approximation.to_dict()}),
            **({} if self.undo is None else {"undo": self.undo}),
            **({"lints": [dict(zip(_LINT, each, strict=True)) for each in self.lints]} if self.lints else {}),
            **({} if self.benchmark is None else {"benchmark": self.benchmark.to_dict()}),
        }


@dataclass(frozen=True, eq=False)
class Restoration(ModelResult):
    """What `unfold` gave back. `.model` is the model as it was before the fold."""

    source: "OnnxModel | TorchModel"
    restored: "OnnxModel | TorchModel"
    before: Census
    after: Census
    norms: tuple[str, ...]
    #: of each norm
    kinds: tuple[str, ...]
    validation: Comparison | None = None
    outputs: tuple[dict[str, str], ...] = ()

    @property
    def opened(self) -> "OnnxModel | TorchModel":
        return self.restored

    def to_dict(self) -> dict[str, Any]:
        """The JSON of DESIGN §7: every norm that is back is a site with the verdict `restored`."""
        return {
            "schema": SCHEMA,
            "sites": [
                {
                    "name": name,
                    "kind": kind,
                    "verdict": RESTORED,
                    "into": [],
                    "reasons": [],
                    "proof": None,
                }
                for name, kind in zip(self.norms, self.kinds, strict=True)
            ],
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "validation": None if self.validation is None else self.validation.to_dict(),
            "outputs": list(self.outputs),
        }


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
    progress: Progress = lambda done, total: None,
    **options: Any,
) -> Plan:
    """What `fold` would do with these `options`, proved site by site; nothing is changed or written."""
    opened = _with_dataflow(load(model, inputs))
    made: Plan = verbs_of(opened).make_plan(opened, FoldOptions(**options), progress)
    return made


def apply(model: Model, plan: Plan, inputs: Inputs = None) -> Any:
    """Carry out a plan on (a copy of) the model it was made for. Raises StalePlan for another one."""
    opened = load(model, inputs)
    verbs = verbs_of(opened)
    return verbs.to_object(verbs.apply(opened, plan))


def rewrite(opened: Opened, made: Plan, **options: Any) -> Rewrite:
    """A plan carried out, with the parameters counted before and after."""
    source = _with_dataflow(opened)
    verbs = verbs_of(source)
    before, keys = verbs.census_of(source), verbs.keys_of(source)
    rewritten = verbs.apply(source, made, **options)
    renamed = {} if rewritten.format == "onnx" else rewritten.renamed
    moved = key_map(source.graph, made, keys, verbs.keys_of(rewritten), rewritten.places, renamed)
    return Rewrite(made, source, rewritten, before, verbs.census_of(rewritten), key_map=moved)


def with_undo(result: Rewrite) -> Rewrite:
    """The result with a record of what was folded, from which `unfold` puts it back.

    Raises UsageError for what cannot be put back into a module (merged branches, norms of the user's own
    class).
    """
    record = verbs_of(result.source).undo_record(result.source, result.rewritten, result.plan)
    return replace(result, undo=record)


def unfold(
    model: Model,
    record: Mapping[str, Any] | str | Path,
    inputs: Inputs = None,
    validate: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> Restoration:
    """Put the BatchNorms back that a fold has taken out: their names, and their statistics bit for bit.

    γ and β that a fold has moved (`affine`) come back too.

    `record` is `Rewrite.undo`, a report that holds it (`normtool fold --undo --report`), or the path of one.

    Raises StalePlan when the weights have changed since the fold, UnreadableModel for a record that is none.
    """
    result = make_restoration(_with_dataflow(load(model, inputs)), record)
    if validate:
        comparison = compare_models(result.source, result.restored, inputs, device, seed)
        result = replace(result, validation=comparison)
    return result


def make_restoration(opened: Opened, record: Mapping[str, Any] | str | Path) -> Restoration:
    """`unfold` without the comparison."""
    source = _with_dataflow(opened)
    document: Any = record
    if isinstance(record, str | Path):
        document = _read_report(Path(record))
    document = document.get("undo", document) if isinstance(document, Mapping) else document
    verbs = verbs_of(source)
    restored = verbs.undo_fold(source, document)
    names = tuple(str(norm["name"]) for norm in document["norms"])
    kinds = tuple(str(norm.get("kind", "batch_norm")) for norm in document["norms"])
    return Restoration(source, restored, verbs.census_of(source), verbs.census_of(restored), names, kinds)


def _read_report(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnreadableModel(f"{path}: {error.strerror}") from None
    except ValueError:
        raise UnreadableModel(f"{path}: is no JSON report") from None


def _check_inplace(model: Model, inplace: bool) -> None:
    """Raises UsageError for what cannot be changed in place."""
    if inplace and not (hasattr(model, "CopyFrom") or hasattr(model, "named_modules")):
        raise UsageError(
            "inplace needs an onnx.ModelProto or an nn.Module; save(path, force=True) replaces a file"
        )


def fold(
    model: Model,
    inputs: Inputs = None,
    validate: bool = True,
    inplace: bool = False,
    undo: bool = False,
    seed: int = 0,
    device: str = "cpu",
    **options: Any,
) -> Rewrite:
    """Fold every BatchNorm that can be folded exactly.

    `options` are the fields of `FoldOptions`: freeze, only, skip, lower, duplicate, border_maps, requantise,
    affine (γ and β of LayerNorm, RMSNorm, GroupNorm and InstanceNorm go into what reads those).
    With `validate`, both models are run and compared (`.validation`); where nothing was folded there is
    nothing to compare. `inplace` puts the result into the ModelProto or nn.Module that was given, unless
    validation did not find it equal.

    Raises UnreadableModel, RuntimeRefused (the runtime cannot run the model), BackendUnavailable, UsageError
    (`inplace` on a path or a program; inputs that are missing, or do not fit).
    """
    _check_inplace(model, inplace)
    opened = _with_dataflow(load(model, inputs))
    made = plan(opened, **options)
    result = rewrite(opened, made)
    if undo:
        result = with_undo(result)
    if validate and result.changed:
        result = replace(result, validation=compare_models(opened, result.rewritten, inputs, device, seed))
    if inplace and (result.validation is None or result.validation.verdict == EQUAL):
        if hasattr(model, "CopyFrom"):
            model.CopyFrom(result.model)
        else:
            changed = rewrite(opened, made, inplace=True)
            result = replace(changed, validation=result.validation, undo=result.undo)
    return result


def plan_swap(
    model: Model,
    inputs: Inputs = None,
    progress: Progress = lambda done, total: None,
    **options: Any,
) -> Plan:
    """What `swap` would do with these `options`, proved site by site; nothing is changed or written.

    (With a target or outputs that change the model first, the plan is for the model as it is then.) Mode
    `approximate` runs the model, to predict how far each norm will drift.
    """
    opened, data = _with_dataflow(load(model, inputs)), {"inputs": inputs}
    return _planned_swap(opened, SwapOptions(**options), progress, data)[2]


def _planned_swap(
    opened: "OnnxModel | TorchModel", options: SwapOptions, progress: Progress, running: Mapping[str, Any]
) -> "tuple[Any, Any, Plan, Approximation | None]":
    """(what to compare with, what to swap, the plan, how far norms without their mean drift)."""
    verbs = verbs_of(opened)
    reference, prepared, settled = verbs.prepared(opened, options)
    if options.mode != "approximate":
        return reference, prepared, verbs.make_swap_plan(prepared, settled, progress), None
    from normtool.approximate import plan_approximate
    from normtool.samples import Data

    data = Data.of(options.calibrate, **running)
    return reference, prepared, *plan_approximate(prepared, settled, data, progress)


def make_swap(
    opened: Opened,
    options: SwapOptions,
    progress: Progress = lambda done, total: None,
    inplace: bool = False,
    **running: Any,
) -> Rewrite:
    """`swap` without the comparison. `running`: inputs, inputs_file, shapes, device and seed of the runs that
    mode `approximate` predicts drift from."""
    reference, prepared, made, approximation = _planned_swap(_with_dataflow(opened), options, progress, running)
    result = rewrite(prepared, made, **({"inplace": True} if inplace else {}))
    before = verbs_of(reference).census_of(reference)
    return replace(result, source=reference, before=before, approximation=approximation)


def swap(
    model: Model,
    inputs: Inputs = None,
    validate: bool = True,
    inplace: bool = False,
    seed: int = 0,
    device: str = "cpu",
    **options: Any,
) -> Rewrite:
    """Turn LayerNorms into RMSNorms without changing the function, wherever that can be proved.

    `options` are the fields of `SwapOptions`: mode, outputs, keep_affine, target, only, skip, freeze,
    calibrate. With `validate`, both models are run and compared. `inplace` as for `fold`.

    Mode "approximate" swaps the rest too, which then computes something else: `.exact` is False, every such
    site has its `drift`, predicted and (with `validate`) measured.

    Raises what `fold` raises; RuntimeRefused also when ONNX cannot convert the model to the opset of the
    target.
    """
    _check_inplace(model, inplace)
    opened, settled = _with_dataflow(load(model, inputs)), SwapOptions(**options)
    result = make_swap(opened, settled, inputs=inputs, device=device, seed=seed)
    if validate and result.changed:
        comparison = compare_models(result.source, result.rewritten, inputs, device, seed)
        result = replace(result, validation=comparison).measured()
    if inplace and (result.validation is None or result.validation.verdict == EQUAL or not result.exact):
        if hasattr(model, "CopyFrom"):
            model.CopyFrom(result.model)
        else:
            changed = rewrite(opened, result.plan, inplace=True)
            result = replace(changed, validation=result.validation, approximation=result.approximation)
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


def bench(
    reference: Model,
    candidate: Model,
    inputs: Inputs = None,
    device: str = "cpu",
    seconds: float = 10.0,
    threads: int | None = None,
    seed: int = 0,
) -> "Benchmark":
    """How much faster or slower is `candidate` in ONNX Runtime? `normtool.timing` says how that is measured.

    Both are ONNX models, and run as users run them: with every optimisation, and `threads` threads (None: as
    many as ONNX Runtime chooses). They are timed for about `seconds`, on generated inputs unless given.

    Raises UsageError for PyTorch models, RuntimeRefused when ONNX Runtime refuses a model, BackendUnavailable
    without the device.
    """
    options: dict[str, Any] = {"device": device, "seconds": seconds, "threads": threads, "seed": seed}
    return bench_models(load(reference, inputs), load(candidate, inputs), inputs, **options)


def bench_models(reference: Opened, candidate: Opened, inputs: Inputs = None, **options: Any) -> "Benchmark":
    """`bench` of models that are open."""
    for opened in (reference, candidate):
        need_onnx(opened)
    from normtool.formats.onnx.bench import bench_onnx

    with _as_file(inputs) as inputs_file:
        options = {"inputs_file": inputs_file, **options}
        return bench_onnx(reference, candidate, **options)  # type: ignore[arg-type]


def need_onnx(opened: Opened) -> None:
    """Raises UsageError for what ONNX Runtime cannot time."""
    if opened.format != "onnx":
        raise UsageError(
            "a benchmark is of ONNX models, in ONNX Runtime; `normtool convert MODEL -o model.onnx` makes one"
        )


def convert(
    model: Model,
    inputs: Inputs = None,
    target: str = "onnx",
    fold: bool = False,
    opset: int | None = None,
    validate: bool = True,
    seed: int = 0,
    device: str = "cpu",
    swap: str | None = None,
) -> "Conversion":
    """A PyTorch model as ONNX (`target="onnx"`, through torch.onnx.export) or as a program (`"pt2"`).

    The model is taken in inference mode, axis 0 of its inputs is left open where it can be. With `fold`,
    BatchNorms are folded, proved, before the export, with `swap` ("exact" or "centre") LayerNorms swapped.
    `.reconciliation` explains every difference in the counts.

    Raises UsageError (no example inputs, not a PyTorch model), RuntimeRefused (an exporter fails).
    """
    result = make_conversion(load(model, inputs), target, fold, opset, swap=swap)
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
    swap: str | None = None,
) -> "Conversion":
    """`convert` without the comparison."""
    source = _with_dataflow(opened)
    if source.format == "onnx":
        raise UsageError("convert takes a PyTorch model; this one is ONNX already (fold and validate take it)")
    from normtool.conversion import convert_model

    return convert_model(source, target, fold, opset, progress, swap)  # type: ignore[arg-type]


def reopen(result: ModelResult, path: Path) -> Opened:
    """The model as it was just written to `path`, whatever the file is called."""
    if result.opened.format == "onnx":
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
    with scratch_folder() as folder:
        path = folder / "inputs.npz"
        np.savez(path, **{name: np.asarray(array) for name, array in inputs.items()})  # type: ignore
        yield path
