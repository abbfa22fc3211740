"""The command line. Data goes to stdout, everything else to stderr; errors are a line or two and an exit code.

Imports of models and frameworks happen inside the commands: `normtool --help` needs click alone.
"""

import ast
import functools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import click

from normtool.errors import NormtoolError, OutputError, RuntimeRefused, UsageError

INTERRUPTED = 130
INTERNAL = 70

#: Seconds in which Ctrl-C, pressed again, is the same one.
IMPATIENCE = 1.0

_EPILOG = (
    "Exit codes: 0 done (validate: equal) · 1 negative result · 2 usage · 3 model unreadable or refused · "
    "4 backend or device unavailable · 5 cannot write · 70 internal · 130 interrupted."
)


class _ReaderLeft(Exception):
    """Whoever read our stdout closed it. (click answers BrokenPipeError itself, with exit code 1.)"""


def main() -> None:
    """Entry point: run the command and leave with its exit code."""
    # the products of a proof are small: numpy's BLAS threads would spend more on waiting than on them
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _interrupt_once()
    out = _claim_stdout()
    verbose = _count_v(sys.argv[1:])
    try:
        code = cli.main(standalone_mode=False, obj=out) or 0
    except click.exceptions.Abort:  # click's word for KeyboardInterrupt
        print("normtool: interrupted", file=sys.stderr)
        code = INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        code = error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "normtool"
        print(f"normtool: {error.format_message()}\nsee {command} --help", file=sys.stderr)
        code = error.exit_code
    except NormtoolError as error:
        print(f"normtool: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("normtool: interrupted", file=sys.stderr)
        code = INTERRUPTED
    except _ReaderLeft:  # `normtool … | head` is no failure
        code = 0
    except Exception as error:  # the last line of defence: a bug of ours
        if verbose >= 2:
            traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        print(f"normtool: internal error: {type(error).__name__}: {first}", file=sys.stderr)
        print("please report it; -vv shows where it happened", file=sys.stderr)
        code = INTERNAL
    _leave(out, code)


def _interrupt_once() -> None:
    """Whoever presses Ctrl-C twice means it once; the second must not cut off what the first has removed."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # a shell can have it ignored
        return
    last = -IMPATIENCE

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > IMPATIENCE:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


def _claim_stdout() -> TextIO:
    """Keep stdout for data: libraries that print (the ONNX checker does, from C++) reach stderr instead."""
    sys.stdout.flush()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    os.dup2(2, 1)
    return out


def _leave(out: TextIO, code: int) -> None:
    try:
        out.close()
    except BrokenPipeError:
        pass
    except OSError as error:
        if not code:
            print(f"normtool: {_stdout_error(error)}", file=sys.stderr)
            code = OutputError.exit_code
    sys.stderr.flush()
    sys.exit(code)


def _stdout_error(error: OSError) -> str:
    return f"standard output: {os.strerror(error.errno or 0)}"


def _count_v(arguments: list[str]) -> int:
    short = (word for word in arguments if word.startswith("-") and not word.startswith("--"))
    return sum(word.count("v") for word in short if set(word[1:]) <= {"v", "q"}) + arguments.count("--verbose")


Command = Callable[..., Any]


@dataclass(frozen=True)
class Common:
    """Options that every command on models has."""

    style: str
    report: Path | None
    quiet: bool
    verbose: int


@dataclass(frozen=True)
class Running:
    """Options of commands that run models."""

    device: str
    inputs_file: Path | None
    seed: int

    def to_validation(self, opening: "Opening") -> dict[str, Any]:
        """The same as arguments of `api.compare_models`. Raises UsageError for a shape that is none."""
        shapes = opening.shapes()
        return {"device": self.device, "seed": self.seed, "shapes": shapes, "inputs_file": self.inputs_file}


@dataclass(frozen=True)
class Writing:
    """Options of commands that write a model."""

    output: Path | None
    force: bool
    no_validate: bool

    def check(self) -> None:
        """Raises OutputError for a destination that would be refused after all the work."""
        from normtool.destination import check_destination

        if self.output is not None:
            check_destination(self.output, self.force)

    def options(self, running: Running, opening: "Opening") -> dict[str, Any] | None:
        """How to validate; None where that is not wanted."""
        return None if self.no_validate else running.to_validation(opening)


@dataclass(frozen=True)
class Timing:
    """Options of commands that can time what they have made."""

    bench: bool
    bench_seconds: float
    bench_threads: int | None

    def check(self, opened: Any) -> None:
        """Raises UsageError, before the work, for a model that cannot be timed."""
        from normtool import api

        if self.bench:
            api.need_onnx(opened)

    def timed(
        self, result: Any, running: Running, opening: "Opening", common: Common, step: Callable[[str], None]
    ) -> Any:
        """A result with its `benchmark`, where that was asked for and something has changed."""
        from normtool import api

        if not self.bench:
            return result
        if not result.changed:
            if not common.quiet:
                print("normtool: nothing was changed, so there is nothing to time", file=sys.stderr)
            return result
        options = {"seconds": self.bench_seconds, "threads": self.bench_threads, "progress": step}
        try:
            benchmark = api.bench_models(
                result.source, result.opened, **running.to_validation(opening), **options
            )
        except RuntimeRefused as error:
            raise RuntimeRefused(f"{error}\nwithout --bench nothing is timed") from None
        return replace(result, benchmark=benchmark)


@dataclass(frozen=True)
class Choosing:
    """What to fold, and what may be done for it: the fields of `options.FoldOptions`."""

    freeze: bool
    only: tuple[str, ...]
    skip: tuple[str, ...]
    lower: str | None
    duplicate: bool
    border_maps: bool
    requantise: bool
    affine: bool


@dataclass(frozen=True)
class Swapping:
    """What to swap, and how: the fields of `options.SwapOptions`."""

    mode: str
    outputs: tuple[str, ...]
    keep_affine: bool
    target: str | None
    only: tuple[str, ...]
    skip: tuple[str, ...]
    freeze: bool
    calibrate: Path | None

    def to_options(self) -> Any:
        from normtool.options import SwapOptions

        return SwapOptions(**{**vars(self), "outputs": self.outputs or None})


@dataclass(frozen=True)
class Opening:
    """How to open a model that is made by a factory, or does not say what to call it with."""

    arguments: tuple[str, ...]
    weights: Path | None
    input_shapes: tuple[str, ...]

    def load(self, model: str, numbers: bool = True, inputs_file: Path | None = None) -> Any:
        """Raises UsageError, UnreadableModel, UnsafeModel, BackendUnavailable."""
        from normtool import api
        from normtool.inputs_file import read_inputs

        made = bool(api.FACTORY.fullmatch(model)) and not Path(model).exists()
        inputs: Any = self.shapes() or None
        if inputs is None and inputs_file is not None and not model.endswith(".onnx"):
            inputs = read_inputs(inputs_file)  # a module is exported on them too
        return api.load(
            model,
            inputs=inputs,
            arguments=_arguments(self.arguments) if made else None,
            weights=self.weights if made else None,
            numbers=numbers,
        )

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str | None]]:
        return _shapes(self.input_shapes)


def _bundled(
    name: str, into: type[Any], *options: Callable[[Command], Command]
) -> Callable[[Command], Command]:
    """Add click options to a command, which gets them as one value of the dataclass `into`."""
    names = [field.name for field in fields(into)]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def bundled(*arguments: Any, **values: Any) -> Any:
            bundle = into(**{each: values.pop(each) for each in names})
            return command(*arguments, **values, **{name: bundle})

        decorated: Command = bundled
        for option in options:
            decorated = option(decorated)
        return decorated

    return decorate


_common = _bundled(
    "common",
    Common,
    click.option("-v", "--verbose", count=True, help="Say more; -vv shows tracebacks of internal errors."),
    click.option("-q", "--quiet", is_flag=True, help="No progress, no notes."),
    click.option("--report", type=click.Path(path_type=Path), help="Write the JSON of the run here too."),
    click.option(
        "--format",
        "style",
        type=click.Choice(["table", "json", "csv", "markdown"]),
        default="table",
        show_default=True,
        help="What goes to stdout.",
    ),
)

_running = _bundled(
    "running",
    Running,
    click.option("--seed", default=0, show_default=True, help="Seed of the generated inputs."),
    click.option(
        "--inputs", "inputs_file", type=click.Path(path_type=Path), help="Run on these arrays (.npz)."
    ),
    click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True),
)

_opening = _bundled(
    "opening",
    Opening,
    click.option("--weights", type=click.Path(path_type=Path), help="A checkpoint for what the factory makes."),
    click.option(
        "--arg", "arguments", multiple=True, metavar="KEY=VALUE", help="An argument of the factory (a literal)."
    ),
    click.option(
        "--input",
        "input_shapes",
        multiple=True,
        metavar="NAME=1x3x224x224[:dtype]",
        help="Shape of a generated input.",
    ),
)


_swapping = _bundled(
    "swapping",
    Swapping,
    click.option("--freeze", is_flag=True, help="Treat initializers that are also graph inputs as constants."),
    click.option("--except", "skip", multiple=True, metavar="PATTERN", help="Leave norms of this name alone."),
    click.option("--only", multiple=True, metavar="PATTERN", help="Swap norms of this name (a shell pattern)."),
    click.option(
        "--target",
        type=click.Choice(["onnx", "primitive", "ort"]),
        help="RMSNormalization (opset 23, to which the model is raised), primitive ops that ONNX Runtime "
        "fuses, or its own SimplifiedLayerNormalization. Default: onnx from opset 23 on, else primitive.",
    ),
    click.option("--keep-affine", is_flag=True, help="Leave γ and β where they are; each β stays as an Add."),
    click.option(
        "--calibrate",
        type=click.Path(path_type=Path),
        help="With --mode approximate: fit γ and β to these samples (.npz, by input name, along axis 0).",
    ),
    click.option(
        "--outputs", multiple=True, metavar="NAME", help="Keep this output; those that are not named go."
    ),
    click.option(
        "--mode",
        type=click.Choice(["exact", "centre", "approximate"]),
        default="exact",
        show_default=True,
        help="exact: where it pays. centre: all that can be, with as many Centre ops as it takes. approximate: "
        "the rest too, without their mean: no longer the same function, and written all the same, with the "
        "drift of every norm, predicted and measured.",
    ),
)


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="normtool", prog_name="normtool")
def cli() -> None:
    """Find, count, fold and prove normalisation layers in PyTorch and ONNX models.

    MODEL is an .onnx or .pt2 file, a Hugging Face folder, a Python factory package.module:callable, or, for
    scan, a file of weights (.safetensors, .pt, .pth, .bin).
    """


@cli.command()
@click.argument("model")
@click.option(
    "--optimizer",
    type=click.Choice(["sgd", "momentum", "adam", "adamw"]),
    help="Add the memory that training takes: weights, gradients, optimizer state, buffers.",
)
@_opening
@_common
@click.pass_obj
def scan(out: TextIO, model: str, optimizer: str | None, opening: Opening, common: Common) -> int:
    """Every norm layer of MODEL and what it stores."""
    from normtool import api
    from normtool.training import training_memory

    _check_report(common.report, Path(model))
    with _progress(common.quiet) as progress:
        progress.step(f"reading {Path(model).name}")
        result = api.scan(opening.load(model, numbers=False))
    document = result.to_dict()
    extra = []
    if optimizer:
        memory = training_memory(result.parameters, optimizer)
        document["training_memory"] = memory.to_dict()
        extra.append(memory)
    _show(out, [result, *extra], document, common)
    return 0


_writing = _bundled(
    "writing",
    Writing,
    click.option("--no-validate", is_flag=True, help="Write without running the models."),
    click.option(
        "--force", is_flag=True, help="Replace OUTPUT if it exists (safely: old or new, never neither)."
    ),
    click.option("-o", "--output", type=click.Path(path_type=Path), help="Where the result goes."),
)


_timing = _bundled(
    "timing",
    Timing,
    click.option(
        "--bench-threads",
        type=click.IntRange(min=1),
        help="Threads of one op in the benchmark; ONNX Runtime's own choice if not given.",
    ),
    click.option(
        "--bench-seconds",
        type=click.FloatRange(min=0, min_open=True),
        default=10.0,
        show_default=True,
        help="How long the benchmark takes, about.",
    ),
    click.option(
        "--bench",
        is_flag=True,
        help="Time model and result in ONNX Runtime (ONNX only): their ratio, its spread, the norms' share.",
    ),
)


_choosing = _bundled(
    "choosing",
    Choosing,
    click.option("--only", multiple=True, metavar="PATTERN", help="Fold only norms whose name matches."),
    click.option("--except", "skip", multiple=True, metavar="PATTERN", help="Leave norms whose name matches."),
    click.option(
        "--lower",
        type=click.Choice(["mul-add", "conv", "relu"]),
        help="What cannot be folded becomes Mul and Add, a depthwise Conv, or an Add behind a ReLU.",
    ),
    click.option("--duplicate", is_flag=True, help="Copy an op whose output others read too (more work)."),
    click.option(
        "--border-maps",
        is_flag=True,
        help="Let padded Convs take a shift as a constant of their output's size.",
    ),
    click.option(
        "--requantise",
        is_flag=True,
        help="Round a shift into a quantised bias; the report states the error.",
    ),
    click.option(
        "--affine",
        is_flag=True,
        help="Move γ, β of Layer-, RMS-, Group- and InstanceNorms into the layers that read them, too.",
    ),
    click.option("--freeze", is_flag=True, help="Treat initializers that are also graph inputs as constants."),
)


@cli.command()
@click.argument("model")
@click.option("--dry-run", is_flag=True, help="Print the plan, proved, and write nothing.")
@click.option("--undo", is_flag=True, help="Put what `unfold` needs into the report (with --report).")
@_choosing
@_timing
@_writing
@_opening
@_running
@_common
@click.pass_obj
def fold(
    out: TextIO,
    model: str,
    dry_run: bool,
    undo: bool,
    choosing: Choosing,
    timing: Timing,
    writing: Writing,
    opening: Opening,
    running: Running,
    common: Common,
) -> int:
    """Fold the BatchNorms of MODEL into the ops before and behind them.

    An ONNX model is written as ONNX, a PyTorch model as an exported program (.pt2).
    """
    from normtool import api

    if undo and common.report is None:
        raise UsageError("--undo puts its record into the report; name one with --report FILE.json")

    def make(opened: Any, progress: Any) -> Any:
        result = api.rewrite(opened, api.plan(opened, progress=progress.count, **vars(choosing)))
        return api.with_undo(result) if undo else result

    words = ("fold", "folded")
    return _rewrite(out, model, make, words, dry_run, timing, writing, opening, running, common)


@cli.command()
@click.argument("model")
@click.option("--dry-run", is_flag=True, help="Print the plan, proved, and write nothing.")
@_swapping
@_timing
@_writing
@_opening
@_running
@_common
@click.pass_obj
def swap(
    out: TextIO,
    model: str,
    dry_run: bool,
    swapping: Swapping,
    timing: Timing,
    writing: Writing,
    opening: Opening,
    running: Running,
    common: Common,
) -> int:
    """Turn the LayerNorms of MODEL into RMSNorms that compute the same.

    What writes their input takes the mean out, exactly and once; γ and β go into what reads them. The plan
    says of every LayerNorm whether that is free, needs a Centre op, or who observes the mean.

    With --mode approximate those LayerNorms lose their mean too, and compute something else. The result is
    written whatever the comparison finds, and exit code 0 means no more than that it was.
    """
    from normtool import api

    settled = swapping.to_options()

    def make(opened: Any, progress: Any) -> Any:
        return api.make_swap(opened, settled, progress.count, **running.to_validation(opening))

    words = ("swap", "swapped")
    return _rewrite(out, model, make, words, dry_run, timing, writing, opening, running, common)


def _rewrite(
    out: TextIO,
    model: str,
    make: Callable[[Any, Any], Any],
    words: tuple[str, str],
    dry_run: bool,
    timing: Timing,
    writing: Writing,
    opening: Opening,
    running: Running,
    common: Common,
) -> int:
    """What `fold` and `swap` have in common: `make` plans and carries out, from a model and a progress bar."""
    verb, done = words
    if writing.output is None and not dry_run:
        raise UsageError(f"{verb} needs -o OUTPUT, or --dry-run to only see the plan")
    if not dry_run:
        writing.check()
    _check_report(common.report, Path(model), writing.output)
    options = writing.options(running, opening)
    with _progress(common.quiet) as progress:
        progress.step(f"reading {Path(model).name}")
        opened = opening.load(model, inputs_file=running.inputs_file)
        timing.check(opened)
        progress.step("planning and proving")
        result = make(opened, progress)
        timed = functools.partial(
            timing.timed, running=running, opening=opening, common=common, step=progress.step
        )
        if dry_run:
            result, verdict = timed(result), "equal"
        else:
            result, verdict = _write(result, result.changed, writing, options, progress.step, timed)
    _show(out, [result], result.to_dict(), common)
    _say_failed_proofs(result.sites)
    if not result.exact:
        print(f"normtool: {result.approximation.summary(result.plan)}", file=sys.stderr)
    if verdict == "equal":
        if not (result.changed or dry_run or common.quiet):
            print(f"normtool: nothing to {verb}; the output is the model as it was", file=sys.stderr)
        return 0
    return _refuse_output(done, verdict, writing)


@cli.command()
@click.argument("model")
@click.option("--record", required=True, type=click.Path(path_type=Path), help="The report of `fold --undo`.")
@_writing
@_opening
@_running
@_common
@click.pass_obj
def unfold(
    out: TextIO,
    model: str,
    record: Path,
    writing: Writing,
    opening: Opening,
    running: Running,
    common: Common,
) -> int:
    """Put the BatchNorms back that `fold --undo` has taken out of MODEL, with their statistics bit for bit."""
    from normtool import api

    if writing.output is None:
        raise UsageError("unfold needs -o OUTPUT")
    writing.check()
    _check_report(common.report, Path(model), record, writing.output)
    options = writing.options(running, opening)
    with _progress(common.quiet) as progress:
        progress.step(f"reading {Path(model).name}")
        opened = opening.load(model, inputs_file=running.inputs_file)
        progress.step("putting norms back")
        result = api.make_restoration(opened, record)
        result, verdict = _write(result, True, writing, options, progress.step)
    _show(out, [result], result.to_dict(), common)
    return 0 if verdict == "equal" else _refuse_output("restored", verdict, writing)


@cli.command()
@click.argument("model")
@click.option("--fold", "folding", is_flag=True, help="Fold BatchNorms, proved, before the export.")
@click.option(
    "--swap", "mode", type=click.Choice(["exact", "centre"]), help="Swap LayerNorms for RMSNorms, proved, too."
)
@click.option("--opset", type=int, help="Opset of the ONNX file (the exporter's default: 20).")
@_writing
@_opening
@_running
@_common
@click.pass_obj
def convert(
    out: TextIO,
    model: str,
    folding: bool,
    mode: str | None,
    opset: int | None,
    writing: Writing,
    opening: Opening,
    running: Running,
    common: Common,
) -> int:
    """Convert a PyTorch MODEL to ONNX, or to an exported program (OUTPUT ends in .onnx or .pt2).

    The model is taken in inference mode, its batch axis is left open where it can be, and the report explains
    every difference between the counts of the model and of the file.
    """
    from normtool import api

    if writing.output is None:
        raise UsageError("convert needs -o OUTPUT.onnx (or OUTPUT.pt2)")
    target = writing.output.suffix.removeprefix(".")
    writing.check()
    _check_report(common.report, Path(model), writing.output)
    options = writing.options(running, opening)
    with _progress(common.quiet) as progress:
        progress.step(f"reading {Path(model).name}")
        opened = opening.load(model, inputs_file=running.inputs_file)
        progress.step("exporting")
        result = api.make_conversion(opened, target, folding, opset, progress.count, mode)
        result, verdict = _write(result, True, writing, options, progress.step)
    _show(out, [result], result.to_dict(), common)
    _say_failed_proofs(result.sites)
    return 0 if verdict == "equal" else _refuse_output("converted", verdict, writing)


def _refuse_output(what: str, verdict: str, writing: Writing) -> int:
    print(
        f"normtool: the {what} model is not shown to be equal ({verdict}); {writing.output} was not written "
        "(--no-validate writes it anyway)",
        file=sys.stderr,
    )
    return 1


def _say_failed_proofs(sites: Iterable[Any]) -> None:
    """A fold that failed its own proof was not made; it is still a bug of ours, and said whatever is quiet."""
    failed = [site.norm.name for site in sites if any(r.code == "internal" for r in site.reasons)]
    if failed:
        names = ", ".join(failed[:3]) + (", …" if len(failed) > 3 else "")
        print(
            f"normtool: {len(failed)} folds failed their own proof and were not made: {names}", file=sys.stderr
        )
        print("this is a bug of normtool (internal); please report it", file=sys.stderr)


def _write(
    result: Any,
    changed: bool,
    writing: Writing,
    options: Mapping[str, Any] | None,
    step: Callable[[str], None],
    timed: Callable[[Any], Any] = lambda result: result,
) -> tuple[Any, str]:
    """Write beside the destination, validate what was written, and only then put it in place.

    `timed` comes before that: the destination may be the model that was read. A result that is not meant to be
    equal is measured, and put in place whatever the comparison says.
    """
    from normtool import api

    assert writing.output is not None
    step("writing")
    with result.stage(writing.output, writing.force) as stage:
        if options is not None and changed:
            try:
                written = api.reopen(result, stage.model_path)
                comparison = api.compare_models(result.source, written, **options, progress=step)
            except RuntimeRefused as error:
                raise RuntimeRefused(
                    f"{error}\n--no-validate writes on the strength of the proofs alone"
                ) from None
            result = replace(result, validation=comparison)
            if comparison.verdict != "equal" and result.exact:
                return result, comparison.verdict
            if not result.exact:
                step("measuring drift")
                result = result.measured(written)
        result = timed(result)
        return replace(result, outputs=tuple(stage.commit())), "equal"


@cli.command()
@click.argument("reference")
@click.argument("candidate")
@_opening
@_running
@_common
@click.pass_obj
def validate(
    out: TextIO,
    reference: str,
    candidate: str,
    opening: Opening,
    running: Running,
    common: Common,
) -> int:
    """Do REFERENCE and CANDIDATE compute the same function? Any pair of PyTorch and ONNX models will do.

    Exit code 0: equal. 1: different, or inconclusive.
    """
    from normtool import api

    _check_report(common.report, Path(reference), Path(candidate))
    options = running.to_validation(opening)
    with _progress(common.quiet) as progress:
        progress.step("reading")
        models = [opening.load(model, inputs_file=running.inputs_file) for model in (reference, candidate)]
        result = api.compare_models(*models, **options, progress=progress.step)
    _show(out, [result], result.to_dict(), common)
    return 0 if result.verdict == "equal" else 1


@cli.command()
@click.argument("code", required=False)
@click.pass_obj
def explain(out: TextIO, code: str | None) -> int:
    """What CODE means: a verdict, a reason code, or a norm such as batch_norm. Without CODE: the list."""
    from normtool.explain import explain as text_of
    from normtool.explain import known_codes

    out.write(text_of(code) if code else "\n".join(known_codes()) + "\n")
    return 0


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    from normtool.report.progress import Progress

    visible = sys.stderr.isatty() and not quiet and not os.environ.get("CI")
    with Progress(visible).running() as progress:
        yield progress


def _arguments(texts: tuple[str, ...]) -> dict[str, Any]:
    """`num_classes=10` → {"num_classes": 10}; what is no Python literal is a string."""
    arguments: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--arg {text!r}: write it as KEY=VALUE")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    return arguments


def _shapes(texts: tuple[str, ...]) -> dict[str, tuple[tuple[int, ...], str | None]]:
    """`NAME=1x3x224x224:float16` → {"NAME": ((1, 3, 224, 224), "float16")}; `NAME=` alone is a scalar."""
    shapes: dict[str, tuple[tuple[int, ...], str | None]] = {}
    for text in texts:
        name, _, rest = text.rpartition("=")
        lengths, _, dtype = rest.partition(":")
        known = not dtype or dtype in _DTYPES
        if not name or not known or not all(n.isdecimal() for n in lengths.split("x") if lengths):
            example = "NAME=1x3x224x224 or NAME=1x3x224x224:float16"
            raise UsageError(f"--input {text!r}: write it as {example}; dtypes are {', '.join(_DTYPES)}")
        shapes[name] = (tuple(int(n) for n in lengths.split("x") if lengths), dtype or None)
    return shapes


_DTYPES = "float16 float32 float64 bfloat16 bool int8 int16 int32 int64 uint8 uint16 uint32 uint64".split()


def _show(out: TextIO, results: list[Any], document: dict[str, Any], common: Common) -> None:
    """The result on stdout in the style asked for, and its JSON in the report file."""
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    if common.report is not None:
        _write_report(common.report, text)
    try:
        _print(out, results, text, common)
        out.flush()
    except BrokenPipeError:
        raise _ReaderLeft from None
    except OSError as error:
        raise OutputError(_stdout_error(error)) from None


def _print(out: TextIO, results: list[Any], text: str, common: Common) -> None:
    if common.style == "json":
        out.write(text)
        return
    from normtool.report.sections import sections
    from normtool.report.table import plain_text, print_tables, to_csv, to_markdown

    parts = [part for result in results for part in sections(result, bool(common.verbose))]
    if common.style == "csv":
        out.write(to_csv(parts))
    elif common.style == "markdown":
        out.write(to_markdown(parts))
    elif out.isatty():
        from rich.console import Console

        print_tables(Console(file=out, highlight=False), parts)
    else:  # rich would answer a closed pipe itself
        out.write(plain_text(parts))


def _check_report(path: Path | None, *models: Path | None) -> None:
    """Refuse before the work what could not be written after it, or would write over a model.

    A report replaces an earlier one, which is why it is called .json.
    """
    from normtool.destination import check_destination

    if path is None:
        return
    if any(model is not None and path.resolve() == model.resolve() for model in models):
        raise UsageError(f"--report {path}: is a model of this very command; name another file")
    if path.is_file() and path.suffix != ".json":
        raise OutputError(f"{path}: exists, and is not called .json; a report replaces only reports")
    check_destination(path, force=True)


def _write_report(path: Path, text: str) -> None:
    """Atomically, as everything else is written."""
    from normtool.destination import afterwards, as_output_error, remove

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with as_output_error(path), afterwards(remove, temporary):
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
