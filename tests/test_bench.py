"""`--bench`: ONNX Runtime's profile, and all the way from a model to its times. Nothing expects a speed."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest

import normtool
from normtool.api import load
from normtool.errors import BackendUnavailable, RuntimeRefused, UsageError
from normtool.formats.onnx.bench import bench_onnx
from normtool.formats.onnx.profile import NORM_OPS, norm_share, time_by_op
from normtool.timing import LEAST_LOADS, LOADS
from tests import zoo
from tests.zoo import Net

HAS_GPU = Path("/dev/nvidiactl").exists()
SECONDS = 0.2


def bn_conv() -> onnx.ModelProto:
    """x → BatchNormalization → Conv → y. Behind a Conv, ONNX Runtime would fold it itself."""
    net = Net()
    x = net.input([2, 3, 16, 16])
    net.output(net.conv(net.batch_norm(x, 3), 3, 4, 3, 3), [2, 4, 14, 14])
    return net.model()


def layer_norm() -> onnx.ModelProto:
    net = Net()
    y = net.node("LayerNormalization", net.input([4, 16]), net.weight(16), net.weight(16))
    net.output(y, [4, 16])
    return net.model()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go during the test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


# ---- profiles -----------------------------------------------------------------------------------


def kernel(op: str, ts: int, dur: int, tid: int = 7, name: str = "n") -> dict[str, Any]:
    """An event as ONNX Runtime 1.31 writes it, without the arguments that nobody reads."""
    arguments = {"op_name": op, "provider": "CPUExecutionProvider", "node_index": "3"}
    fields = {"cat": "Node", "pid": 1, "tid": tid, "dur": dur, "ts": ts, "ph": "X"}
    return {**fields, "name": f"{name}_kernel_time", "args": arguments}


def model_run(ts: int, dur: int) -> dict[str, Any]:
    fields = {"cat": "Session", "pid": 1, "tid": 7, "dur": dur, "ts": ts, "ph": "X"}
    return {**fields, "name": "model_run", "args": {}}


def test_the_first_run_is_left_out():
    first = [kernel("Conv", 0, 500), kernel("LayerNormalization", 500, 400), model_run(0, 1000)]
    second = [kernel("Conv", 1100, 60), kernel("LayerNormalization", 1160, 20), model_run(1090, 100)]
    assert time_by_op(first + second) == {"Conv": 60, "LayerNormalization": 20}
    assert time_by_op(first) == {"Conv": 500, "LayerNormalization": 400}


def test_a_loop_counts_for_what_it_does_itself():
    events = [
        kernel("Conv", 0, 10),
        kernel("LayerNormalization", 12, 20),
        kernel("If", 32, 28),
        kernel("Conv", 33, 20),  # in the body of the If, which is in that of the Loop
        kernel("Loop", 11, 60),
        kernel("Conv", 71, 0),
        kernel("Conv", 71, 9),
    ]
    times = time_by_op(events)
    assert times == {"Conv": 39, "LayerNormalization": 20, "If": 8, "Loop": 12}
    assert sum(times.values()) == 10 + 60 + 9


def test_ops_of_two_threads_do_not_hold_each_other():
    events = [kernel("Loop", 0, 100, tid=1), kernel("Conv", 10, 20, tid=2)]
    assert time_by_op(events) == {"Loop": 100, "Conv": 20}


def test_events_that_are_no_kernels_do_not_count():
    fence = {**kernel("Conv", 0, 10), "name": "n_fence_before"}
    loading = {**model_run(0, 99), "name": "model_loading_uri"}
    mark = {"cat": "Node", "ph": "M", "name": "process_name", "args": {}}
    assert time_by_op([fence, loading, mark]) == {}


@pytest.mark.parametrize(
    ("times", "share"),
    [
        ({"Conv": 60, "SkipLayerNormalization": 30, "LayerNormalization": 10}, 0.4),
        ({"Conv": 60, "Softmax": 30}, 0.0),
        ({"ReduceMean": 5, "Sub": 5, "Pow": 5, "Sqrt": 5}, 0.0),
        ({}, None),
    ],
    ids=["fused-and-native", "softmax-is-no-norm", "spelled-out-is-not-seen", "nothing-seen"],
)
def test_the_share_of_norm_ops(times, share):
    assert norm_share(times) == share


def test_norm_ops_are_those_of_the_table():
    expected = "BatchNormalization LayerNormalization RMSNormalization SimplifiedLayerNormalization GroupNorm"
    expected += " SkipSimplifiedLayerNormalization InstanceNormalization LpNormalization SkipLayerNormalization"
    assert set(expected.split()) < NORM_OPS
    assert not NORM_OPS & {"Softmax", "layer_norm", "batch_norm", "Conv"}


# ---- models -------------------------------------------------------------------------------------


def test_children_and_files_are_gone_and_the_norms_time_with_them(temporary):
    model = bn_conv()
    folded = normtool.fold(model, validate=False)
    assert folded.folded == 1
    found = normtool.bench(model, folded.model, seconds=SECONDS)
    assert psutil.Process().children(recursive=True) == []
    assert list(temporary.iterdir()) == []
    assert 0 < found.norm_share_before < 1
    assert found.norm_share_after == 0
    assert 0 < found.low <= found.ratio <= found.high
    assert min(found.reference_ms, found.candidate_ms) > 0
    assert LEAST_LOADS <= found.loads <= LOADS
    assert found.runs >= 20
    assert found.providers == {"requested": "cpu", "effective": ["CPUExecutionProvider"]}
    assert found.inputs == {"x": [2, 3, 16, 16]}
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_benchmark_that_takes_too_long_leaves_nothing_behind(temporary):
    opened = load(bn_conv())
    with pytest.raises(RuntimeRefused, match=r"did not finish on .* after 3 s"):
        bench_onnx(opened, opened, seconds=60, time_limit=3)
    assert psutil.Process().children(recursive=True) == []
    assert list(temporary.iterdir()) == []


@pytest.mark.usefixtures("worker_in_this_process")
def test_norms_that_the_runtime_folds_itself_are_none():
    model = zoo.conv_bn()
    found = normtool.bench(model, normtool.fold(model, validate=False).model, seconds=SECONDS)
    assert (found.norm_share_before, found.norm_share_after) == (0, 0)
    assert "no norm op even before" in found.notes[0]


@pytest.mark.usefixtures("worker_in_this_process")
def test_inputs_and_threads_of_the_caller_are_used():
    net = Net()
    net.output(net.node("Relu", net.input(["batch", 4])), ["batch", 4])
    model, x = net.model(), np.ones((5, 4), np.float32)
    found = normtool.bench(model, model, {"x": x}, seconds=SECONDS, threads=1)
    assert (found.inputs, found.threads) == ({"x": [5, 4]}, 1)
    assert normtool.bench(model, model, seconds=SECONDS).inputs == {"x": [2, 4]}
    with pytest.raises(UsageError, match="lacks the model's input 'x'"):
        normtool.bench(model, model, {"z": x}, seconds=SECONDS)


@pytest.mark.parametrize("options", [{"seconds": 0}, {"threads": 0}, {"device": "tpu"}], ids=str)
def test_what_is_no_benchmark_is_refused(options):
    model = zoo.conv_bn()
    with pytest.raises(UsageError):
        normtool.bench(model, model, **options)


@pytest.mark.parametrize("who", ["reference", "candidate"])
def test_a_model_that_does_not_run_is_named(who):
    broken = zoo.conv_bn()
    broken.graph.node[0].attribute.add(name="strides", type=onnx.AttributeProto.INTS, ints=[0, 0, 0])
    models = {"reference": bn_conv(), "candidate": bn_conv(), who: broken}
    with pytest.raises(RuntimeRefused, match="reference" if who == "reference" else "candidate"):
        normtool.bench(**models, seconds=SECONDS)


@pytest.mark.skipif(HAS_GPU, reason="a GPU is there")
def test_a_device_that_is_not_there_is_not_the_cpu_under_another_name():
    model = bn_conv()
    with pytest.raises(BackendUnavailable, match="cuda"):
        normtool.bench(model, model, device="cuda", seconds=SECONDS)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no GPU here")
def test_a_benchmark_on_a_device_does_not_guess_the_norms():
    model = bn_conv()
    found = normtool.bench(model, model, device="cuda", seconds=SECONDS)
    assert "CUDAExecutionProvider" in found.providers["effective"]
    assert found.norm_share_before is None


# ---- the command line ---------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(bn_conv(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


QUICK = ("--bench", "--bench-seconds", SECONDS, "--bench-threads", 1)


def test_fold_bench_writes_and_tells(normtool, path, tmp_path):
    """The destination is the model itself: the reference is timed before it is replaced."""
    done = normtool("fold", path, "-o", path, "--force", *QUICK, "--report", tmp_path / "run.json")
    assert done.returncode == 0, done.stderr
    assert ": ratio " in done.stdout
    found = json.loads((tmp_path / "run.json").read_text())["benchmark"]
    assert found["verdict"] in ("faster", "slower", "no_difference")
    assert found["norm_share_before"] > 0 == found["norm_share_after"]
    assert (found["threads"], found["confidence"]) == (1, 0.95)
    assert [node.op_type for node in onnx.load(path).graph.node] == ["Conv"]


def test_a_dry_run_times_what_it_would_write(normtool, path, tmp_path):
    done = normtool("fold", path, "--dry-run", *QUICK, "--format", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["benchmark"]["runs"] >= 20
    assert list(tmp_path.iterdir()) == [path]


def test_without_bench_there_is_none(normtool, path):
    done = normtool("fold", path, "--dry-run", "--format", "json")
    assert "benchmark" not in json.loads(done.stdout)


def test_a_model_that_stays_as_it_is_is_not_timed(normtool, tmp_path):
    onnx.save(layer_norm(), tmp_path / "model.onnx")
    done = normtool("fold", tmp_path / "model.onnx", "--dry-run", *QUICK, "--format", "json")
    assert done.returncode == 0, done.stderr
    assert "benchmark" not in json.loads(done.stdout)
    assert "nothing to time" in done.stderr


@pytest.mark.skipif(HAS_GPU, reason="a GPU is there")
def test_a_device_that_is_not_there_is_exit_4_and_nothing_is_written(normtool, path, tmp_path):
    done = normtool("fold", path, "-o", tmp_path / "out.onnx", "--no-validate", *QUICK, "--device", "cuda")
    assert done.returncode == 4
    assert done.stderr.startswith("normtool: device cuda")
    assert list(tmp_path.iterdir()) == [path]


def test_a_pytorch_model_is_refused_with_what_to_do(normtool, tmp_path):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(3)).eval()
    torch.export.save(torch.export.export(module, (torch.ones(2, 3),)), tmp_path / "model.pt2")
    done = normtool("fold", tmp_path / "model.pt2", "--dry-run", "--bench")
    assert done.returncode == 2
    assert "normtool convert" in done.stderr
