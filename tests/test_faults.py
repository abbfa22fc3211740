"""Killed, interrupted, out of disk: the output path holds the old complete model or the new complete one."""

import contextlib
import hashlib
import inspect
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

import onnx
import psutil
import pytest
from onnx import numpy_helper

import normtool as api
from normtool import cli, destination
from normtool.errors import StalePlan
from normtool.formats.onnx import write
from tests import zoo
from tests.conftest import ROOT

#: Kills in each of the four tests, 100 in all.
KILLS = 25


def two_convs(channels: int, seed: int, last: int = 8) -> onnx.ModelProto:
    """36·channels² bytes that the fold rewrites, and 4·channels·last that it copies."""
    net = zoo.Net(seed=seed)
    y = net.batch_norm(net.conv(net.input([1, channels, 3, 3]), channels, channels, 3, 3), channels)
    net.output(net.conv(net.node("Relu", y), channels, last, 1, 1), [1, last, 1, 1])
    return net.model()


def save(model: onnx.ModelProto, path: Path, form: str) -> Path:
    if form == "embedded":
        path.write_bytes(model.SerializeToString())
    else:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")
    return path


def content(path: Path) -> str:
    """A hash of all that a model computes with. Raises where a byte of it is missing."""
    model = onnx.load(path)
    digest = hashlib.sha256(" ".join(zoo.op_types(model)).encode())
    for tensor in model.graph.initializer:
        digest.update(tensor.name.encode())
        digest.update(numpy_helper.to_array(tensor))
    return digest.hexdigest()


def data_of(path: Path) -> set[str]:
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    return {entry.value for t in tensors for entry in t.external_data if entry.key == "location"}


def snapshot(folder: Path) -> dict[str, str]:
    """Name → hash of every file."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def failed(done: "subprocess.CompletedProcess[str]", *words: str) -> None:
    assert done.returncode == 5, done.stderr
    assert 1 <= len(done.stderr.splitlines()) <= 2
    assert all(word in done.stderr for word in words), done.stderr


def start(*arguments: object, **options: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "normtool", *map(str, arguments)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **(pipes | options))  # type: ignore


# ---- kill -9 ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def large(tmp_path_factory) -> Iterator[Callable[[str], list[Path]]]:
    """Two models of 31 MB with the same graph and other weights, embedded or external."""
    folder = tmp_path_factory.mktemp("large")

    @cache
    def paths(form: str) -> list[Path]:
        return [save(two_convs(256, seed, 28_000), folder / f"{form}{seed}.onnx", form) for seed in (1, 2)]

    yield paths
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("round_", [0, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("form", ["embedded", "external"])
def test_killed_at_any_moment(large, form, round_):
    """Each run would replace one model by the other, and dies at a random moment.

    Every second moment is drawn from the command's whole duration; the others lie where it writes.
    """
    sources = large(form)
    folder = sources[0].with_name(f"{form}-{round_}")
    folder.mkdir()
    target = folder / "out.onnx"
    durations, contents = [], []
    for source in sources:
        begin = time.perf_counter()
        assert fold(source, target).wait() == 0
        durations.append(time.perf_counter() - begin)
        contents.append(content(target))
    assert len(set(contents)) == 2
    now, replaced, torn = 1, 0, 0
    rng = random.Random(f"{form}{round_}")
    for kill in range(KILLS):
        before = set(folder.iterdir())
        process = fold(sources[1 - now], target)
        if kill % 2:
            while process.poll() is None and set(folder.iterdir()) == before:
                time.sleep(0.001)
            time.sleep(rng.random() * min(durations) * 0.06)
        else:
            time.sleep((kill + rng.random()) / KILLS * min(durations) * 1.1)
        process.kill()
        process.wait()
        after = contents.index(content(target))  # ValueError: neither the old nor the new
        replaced, now = replaced + (after != now), after
        strays = {path.name for path in folder.iterdir()} - {"out.onnx"} - data_of(target)
        assert all(name.startswith((".out.onnx.", "out-")) for name in strays)
        torn += bool(strays)
        for name in strays:
            (folder / name).unlink()
    assert torn >= 1  # somebody died while writing, else this shows nothing
    assert replaced >= 1  # and somebody came through


def fold(source: Path, target: Path) -> "subprocess.Popen[str]":
    return start("fold", source, "-o", target, "--force", "--no-validate", "-q", stderr=subprocess.DEVNULL)


# ---- no room, no permission -------------------------------------------------------------------


@pytest.fixture(params=["embedded", "external"])
def source(request, tmp_path) -> Path:
    """A model of 2.4 MB in a folder of its own."""
    folder = tmp_path / "source"
    folder.mkdir()
    return save(two_convs(256, 1), folder / "m.onnx", request.param)


@pytest.fixture
def mounted(tmp_path) -> Iterator[Callable[..., Path]]:
    """Mount a tmpfs: a disk that can be full or read-only, even for root."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mount{len(folders)}"
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        folders.append(folder)
        return folder

    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


class TestNoRoom:
    @pytest.mark.parametrize("limit", [0, 1 << 20], ids=["first-byte", "midway"])
    @pytest.mark.parametrize("old", [True, False], ids=["over-a-good-file", "new-file"])
    def test_file_size_limit(self, tmp_path, normtool, source, limit, old):
        folder = tmp_path / "out"
        folder.mkdir()
        if old:
            shutil.copy(save(two_convs(64, 2), tmp_path / "old.onnx", "embedded"), folder / "out.onnx")
        before = snapshot(folder), snapshot(source.parent)
        set_limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        done = normtool("fold", source, "-o", folder / "out.onnx", "--force", preexec_fn=set_limit)
        failed(done, str(folder / "out.onnx"), "File too large", "nothing there was changed")
        assert (snapshot(folder), snapshot(source.parent)) == before

    @pytest.mark.parametrize("room", ["none", "1m"])
    def test_full_disk(self, mounted, normtool, source, room):
        folder = mounted("size=2m")
        save(two_convs(64, 2), folder / "out.onnx", "embedded")
        if room == "none":
            fill(folder / "filling")
        before = snapshot(folder)
        done = normtool("fold", source, "-o", folder / "out.onnx", "--force")
        failed(done, str(folder / "out.onnx"), "No space left")
        assert snapshot(folder) == before

    def test_full_temporary_folder(self, tmp_path, mounted, normtool, source):
        """Validation needs room for variants of the model."""
        folder = mounted("size=1m")
        target = tmp_path / "out.onnx"
        done = normtool("fold", source, "-o", target, env={**os.environ, "TMPDIR": str(folder)})
        failed(done, "No space left")
        assert not target.exists()
        assert not list(folder.glob("normtool*"))

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
    def test_full_standard_output(self, source):
        with Path("/dev/full").open("w") as full:
            process = start("scan", source, stdout=full)
        _, complaint = process.communicate()
        assert process.returncode == 5
        assert complaint == "normtool: standard output: No space left on device\n"

    def test_full_report(self, mounted, normtool, source):
        folder = mounted("size=1m")
        fill(folder / "filling")
        before = snapshot(folder)
        failed(normtool("scan", source, "--report", folder / "r.json"), str(folder / "r.json"), "No space left")
        assert snapshot(folder) == before


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 14)):
                pass
        except OSError:
            return


class TestNoSuchPlace:
    @pytest.fixture
    def source(self, tmp_path) -> Path:
        (tmp_path / "source").mkdir()
        return save(zoo.conv_bn(), tmp_path / "source" / "m.onnx", "embedded")

    @pytest.mark.parametrize(
        ("output", "says"),
        [
            ("folder", "is a folder"),
            ("missing/out.onnx", "does not exist"),
            ("file/out.onnx", "does not exist"),
            ("x" * 300, "name too long"),
            ("fifo", "regular file"),
        ],
        ids=["folder", "no-parent", "parent-is-a-file", "name-too-long", "fifo"],
    )
    def test_refused(self, tmp_path, normtool, source, output, says):
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").touch()
        os.mkfifo(tmp_path / "fifo")  # or a device: nobody wants /dev/null replaced by a model
        done = normtool("fold", source, "-o", tmp_path / output, "--force", timeout=60)
        failed(done, str(tmp_path / output))
        assert says in done.stderr.lower()
        assert {path.name for path in tmp_path.iterdir()} == {"source", "folder", "file", "fifo"}
        assert (tmp_path / "fifo").is_fifo()

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
    def test_no_permission(self, tmp_path, normtool, source):
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o500)
        failed(normtool("fold", source, "-o", folder / "out.onnx"), "Permission denied")

    def test_read_only_disk(self, mounted, normtool, source):
        folder = mounted("size=1m,ro")
        failed(normtool("fold", source, "-o", folder / "out.onnx"), "Read-only file system")

    @pytest.mark.parametrize("report", ["folder", "missing/r.json", "fifo"])
    def test_report(self, tmp_path, normtool, source, report):
        (tmp_path / "folder").mkdir()
        os.mkfifo(tmp_path / "fifo")
        failed(normtool("scan", source, "--report", tmp_path / report, timeout=60), str(tmp_path / report))
        assert {path.name for path in tmp_path.iterdir()} == {"source", "folder", "fifo"}
        assert (tmp_path / "fifo").is_fifo()

    @pytest.mark.parametrize("over", ["m.onnx", "out.onnx"], ids=["over-the-input", "over-the-output"])
    def test_report_in_place_of_a_model(self, normtool, source, over):
        before = snapshot(source.parent)
        target = source.with_name("out.onnx")
        done = normtool("fold", source, "-o", target, "--no-validate", "--report", source.with_name(over))
        assert done.returncode in (2, 5)
        assert len(done.stderr.splitlines()) <= 2
        assert before.items() <= snapshot(source.parent).items()
        assert not target.exists() or onnx.load(target).graph.node


# ---- Ctrl-C -----------------------------------------------------------------------------------


def is_writing(process: psutil.Process, folder: Path) -> bool:
    return any(path.name.endswith(".tmp") for path in folder.iterdir())


def is_validating(process: psutil.Process, folder: Path) -> bool:
    return any("normtool.formats.onnx.worker" in child.cmdline() for child in process.children())


class TestInterrupted:
    @pytest.mark.parametrize("to_all", [False, True], ids=["to-the-process", "as-a-terminal-does"])
    @pytest.mark.parametrize("moment", [is_writing, is_validating])
    def test_leaves_nothing(self, tmp_path, source, moment, to_all):
        folder, temporary = tmp_path / "out", tmp_path / "tmp"
        folder.mkdir()
        temporary.mkdir()
        save(two_convs(64, 2), folder / "out.onnx", "embedded")
        before = snapshot(folder)
        environment = {**os.environ, "TMPDIR": str(temporary)}
        process = start("fold", source, "-o", folder / "out.onnx", "--force", env=environment)
        watched = psutil.Process(process.pid)
        deadline = time.monotonic() + 60
        while not moment(watched, folder):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        children = watched.children(recursive=True)
        (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
        _, complaint = process.communicate(timeout=60)
        assert process.returncode == 130
        assert len(complaint.splitlines()) <= 2
        assert snapshot(folder) == before
        assert not list(temporary.glob("normtool*"))
        assert not psutil.wait_procs(children, timeout=10)[1]


#: Where Ctrl-C is pressed below: in the lines that write and clean up, and in those that surround a `with`.
_PRESSED_IN = {module.__file__ for module in (write, destination, cli, contextlib)}


def interrupted(work: Callable[[], None], moment: int) -> bool:
    """Press Ctrl-C at the `moment`-th line, or end of a call, in `work`. False where it ends before that.

    Not where a generator is left or entered again: there Python itself does not look for signals.
    """
    left = moment

    def press(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in _PRESSED_IN:
            return None
        ends = event == "return" and not frame.f_code.co_flags & inspect.CO_GENERATOR
        left -= event == "line" or ends
        if left == 0:
            left = -1
            signal.raise_signal(signal.SIGINT)
        return press

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.settrace(press)
    try:
        work()
    except (KeyboardInterrupt, Unwanted):
        pass
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGINT, before)
    return left < 0


class Unwanted(Exception):
    """What was written is not to be kept."""


# what Ctrl-C keeps from being closed is closed by the garbage collector, and pytest hears of it
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestInterruptedAtEveryLine:
    @pytest.fixture(params=["embedded", "external"])
    def folded(self, request, tmp_path) -> list[Any]:
        """The same network twice, with other weights."""
        (tmp_path / "sources").mkdir()
        paths = [save(two_convs(16, s, 300), tmp_path / "sources" / f"{s}.onnx", request.param) for s in (1, 2)]
        return [api.fold(path, validate=False) for path in paths]

    @pytest.fixture
    def target(self, tmp_path) -> Path:
        (tmp_path / "out").mkdir()
        return tmp_path / "out" / "out.onnx"

    def test_one_model_or_the_other(self, folded, target):
        contents = []
        for result in folded:
            result.save(target, force=True)
            contents.append(content(target))
        now, seen, moment = 1, set(), 1
        while interrupted(partial(folded[1 - now].save, target, force=True), moment):
            now = contents.index(content(target))  # ValueError: neither the old nor the new
            assert {path.name for path in target.parent.iterdir()} == {target.name} | data_of(target), moment
            seen.add(now)
            moment += 1
            if not now:
                folded[1].save(target, force=True)
                now = 1
        assert seen == {0, 1}
        assert moment > 200  # so many lines it has, else nothing was interrupted

    def test_what_is_unwanted(self, folded, target):
        folded[0].save(target)
        before, moment = snapshot(target.parent), 1

        def validate() -> None:
            with folded[1].stage(target, force=True):
                raise Unwanted

        while interrupted(validate, moment):
            assert snapshot(target.parent) == before, moment
            moment += 1
        assert moment > 200

    @pytest.mark.parametrize("wanted", [True, False])
    def test_a_file_that_a_library_writes(self, target, wanted):
        def save() -> None:
            with destination.staged_file(target, True, lambda path: path.touch(), str) as stage:
                if not wanted:
                    raise Unwanted
                stage.commit()

        moment = 1
        while interrupted(save, moment):
            assert {path.name for path in target.parent.iterdir()} <= {target.name}, moment
            moment += 1
        assert moment > 20
        assert target.exists() == wanted

    def test_a_temporary_folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

        def work() -> None:
            with destination.scratch_folder() as folder:
                (folder / "inner").mkdir()
                (folder / "inner" / "file").touch()

        moment = 1
        while interrupted(work, moment):
            assert not list(tmp_path.iterdir()), moment
            moment += 1
        assert moment > 20

    def test_a_report(self, tmp_path):
        report, moment = tmp_path / "report.json", 1
        while interrupted(partial(cli._write_report, report, "{}"), moment):
            assert {path.name for path in tmp_path.iterdir()} <= {"report.json"}, moment
            moment += 1
        assert report.read_text() == "{}"


# ---- a plan for another model -----------------------------------------------------------------


class TestStalePlan:
    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model.graph.node[0].attribute.add(name="pads", type=7, ints=[1, 1, 1, 1]),
            lambda model: model.graph.output.add(name=model.graph.node[0].output[0]),
            lambda model: setattr(model.graph.node[2], "op_type", "Tanh"),
            lambda model: setattr(model.graph.initializer[3], "raw_data", bytes(24)),
        ],
        ids=["attribute", "new-reader", "other-op", "other-weights"],
    )
    def test_changed_model(self, change):
        model = zoo.conv_bn()
        made = api.plan(model)
        change(model)
        with pytest.raises(StalePlan, match="make it again"):
            api.apply(model, made)

    @pytest.mark.parametrize("form", ["embedded", "external"])
    def test_same_graph_with_other_weights(self, tmp_path, form):
        """Two checkpoints of one network: a plan holds weights, so it fits only one of them."""
        paths = []
        for seed in (1, 2):
            folder = tmp_path / str(seed)
            folder.mkdir()
            model = two_convs(64, seed)
            for tensor in model.graph.initializer[1:]:  # only the large Conv weight differs
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 0 + 1, tensor.name))
            paths.append(save(model, folder / "m.onnx", form))
        with pytest.raises(StalePlan):
            api.apply(paths[1], api.plan(paths[0]))

    def test_overwritten_file(self, tmp_path):
        path = save(two_convs(64, 1), tmp_path / "m.onnx", "embedded")
        made = api.plan(path)
        save(two_convs(64, 2), path, "embedded")
        with pytest.raises(StalePlan):
            api.apply(path, made)

    @pytest.mark.parametrize("form", ["embedded", "external"])
    def test_unchanged_model(self, tmp_path, form):
        path = save(two_convs(64, 1), tmp_path / "m.onnx", form)
        assert "BatchNormalization" not in zoo.op_types(api.apply(path, api.plan(path)))

    def test_equal_object(self):
        model, twin = zoo.conv_bn(), onnx.ModelProto()
        twin.CopyFrom(model)
        assert zoo.op_types(api.apply(twin, api.plan(model))) == ["Conv", "Relu"]
        assert twin == model
