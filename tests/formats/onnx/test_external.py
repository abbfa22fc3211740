"""Weights beside the model: found where they may lie, refused elsewhere, written to a file of their own."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import normtool
from normtool.errors import OutputError, UnreadableModel, UnsafeModel
from normtool.formats.onnx import wire, write
from normtool.formats.onnx.read import read_path
from normtool.formats.onnx.write import staged, to_proto
from normtool.values import to_array
from tests import zoo

DATA = "weights.bin"

#: Bytes of the Conv weight in `zoo.conv_bn()`, (6, 3, 3, 3) in float32.
WEIGHT = 648


def external(model: onnx.ModelProto, path: Path, data: str = DATA) -> Path:
    """Save with every tensor, however small, in one data file; `model` stays as it is."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    (path.parent / data).unlink(missing_ok=True)  # onnx appends
    onnx.save(copy, path, save_as_external_data=True, location=data, size_threshold=0)
    return path


def two_convs(seed: int = 0) -> onnx.ModelProto:
    """One Conv is folded into, one has nothing behind it and keeps its weight."""
    net = zoo.Net(seed=seed)
    y = net.batch_norm(net.conv(net.input([2, 3, 8, 8]), 3, 64, 3, 3), 64)
    net.output(net.conv(net.node("Relu", y), 64, 6, 3, 3), [2, 6, 4, 4])
    return net.model()


FOLDED = ["Conv", "Relu", "Conv"]


def embedded(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def fold(source: Path, target: Path, force: bool = True) -> onnx.ModelProto:
    """Fold without running; what was written, with its data, after onnx itself has checked it."""
    normtool.fold(source, validate=False).save(target, force=force)
    onnx.checker.check_model(str(target), full_check=True)
    return onnx.load(target)


def locations(path: Path) -> set[str]:
    """Data files that a model refers to."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    return {e.value for t in tensors for e in t.external_data if e.key == "location"}


def own_data(path: Path) -> Path:
    (name,) = locations(path)
    return path.with_name(name)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def referring(path: Path, **entries: str) -> Path:
    """A conv-bn model whose Conv weight is external with exactly these entries."""
    model = zoo.conv_bn()
    model.doc_string = "." * WEIGHT  # so that the model file too could hold the weight
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        weight.external_data.add(key=key, value=value)
    return embedded(model, path)


class TestReading:
    def test_folds_like_the_embedded_twin(self, tmp_path):
        model = two_convs()
        got = fold(external(model, tmp_path / "m.onnx"), tmp_path / "out.onnx")
        expected = fold(embedded(model, tmp_path / "e.onnx"), tmp_path / "eout.onnx")
        for a, b in zip(expected.graph.initializer, got.graph.initializer, strict=True):
            assert a.name == b.name
            assert np.array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b))
        assert zoo.relative_error(zoo.run(model), zoo.run(tmp_path / "out.onnx")) < 1e-5

    @pytest.mark.parametrize(
        ("padding", "entries"),
        [
            (0, {}),
            (0, {"length": str(WEIGHT)}),
            (100, {"offset": "100"}),
            (100, {"offset": "100", "length": str(WEIGHT)}),
            (0, {"offset": "0", "length": str(WEIGHT), "checksum": "feedface"}),
        ],
        ids=["whole-file", "length-only", "offset-only", "both", "checksum-is-ignored"],
    )
    def test_offset_and_length(self, tmp_path, padding, entries):
        content = np.arange(WEIGHT // 4, dtype=np.float32)
        tail = b"" if "length" not in entries else b"more"
        (tmp_path / DATA).write_bytes(bytes(padding) + content.tobytes() + tail)
        model = read_path(referring(tmp_path / "m.onnx", location=DATA, **entries))
        value = next(t.value for t in model.graph.tensors if t.name == "w1")
        assert np.array_equal(to_array(value).reshape(-1), content)

    def test_data_in_a_subfolder(self, tmp_path):
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / DATA).write_bytes(bytes(WEIGHT))
        read_path(referring(tmp_path / "m.onnx", location=f"sub/{DATA}"))

    @pytest.mark.parametrize("form", ["external", "embedded"])
    def test_is_lazy(self, tmp_path, form):
        """8 GB of zeros that take no disk: opening and scanning them may take no memory either."""
        path = giant(tmp_path, 1 << 33) if form == "embedded" else giant_external(tmp_path, 1 << 33)
        program = (
            "import resource, sys\n"
            "import normtool.formats.onnx.run\n"
            "from pathlib import Path\n"
            "from normtool.formats.onnx.read import read_path\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "model = read_path(Path(sys.argv[1]))\n"
            "assert any(t.shape == (1 << 31,) for t in model.graph.tensors)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        )
        done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
        assert int(done.stdout) < 50_000  # KiB


def giant(folder: Path, size: int, name: str = "giant.onnx") -> Path:
    """A conv-bn model with `size` more bytes of zeros, as a file with a hole: it takes no disk."""
    model = zoo.conv_bn().SerializeToString()
    head = TensorProto(name="giant", data_type=TensorProto.FLOAT, dims=[size // 4]).SerializeToString()
    head += wire.delimited_header(9, size)
    stored = wire.delimited_header(5, len(head) + size) + head
    graph = wire.delimited_header(7, len(stored) + size) + stored  # a second piece of the graph; they merge
    path = folder / name
    path.write_bytes(model + graph)
    os.truncate(path, len(model) + len(graph) + size)
    return path


def giant_external(folder: Path, size: int) -> Path:
    model = zoo.conv_bn()
    tensor = model.graph.initializer.add(name="giant", data_type=TensorProto.FLOAT, dims=[size // 4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=DATA)
    (folder / DATA).touch()
    os.truncate(folder / DATA, size)
    return embedded(model, folder / "giant.onnx")


class TestRefused:
    """In one line that names the tensor; a file that lies outside is not even opened."""

    @pytest.mark.parametrize(
        ("size", "entries", "says"),
        [
            (None, {}, "missing"),
            (0, {}, "needs 648 bytes but holds 0"),
            (100, {}, "needs 648 bytes but holds 100"),
            (100, {"length": "648"}, "which has 100"),
            (648, {"offset": "8", "length": "648"}, "which has 648"),
            (9999, {}, "needs 648 bytes but holds 9999"),
            (9999, {"length": "640"}, "needs 648 bytes but holds 640"),
            (9999, {"length": "-1"}, "holds -1"),
            (9999, {"offset": "-8", "length": "648"}, "-8"),
            (9999, {"offset": "20000"}, "needs 648 bytes"),
            (9999, {"offset": "eight"}, "no number"),
            (9999, {"offset": str(2**70), "length": "648"}, "which has 9999"),
        ],
        ids=(
            "missing empty too-short ends-early offset-past-end too-long wrong-length "
            "negative-length negative-offset offset-behind-end no-number huge-offset"
        ).split(),
    )
    def test_wrong_extent(self, tmp_path, size, entries, says):
        if size is not None:
            (tmp_path / DATA).write_bytes(bytes(size))
        unreadable(referring(tmp_path / "m.onnx", location=DATA, **entries), "'w1'", says)

    @pytest.mark.parametrize(
        "location",
        ["../secret.bin", "sub/../../secret.bin", "{outside}/secret.bin", "/etc/hostname", "", "\\\\host\\x"],
        ids="parent parent-in-the-middle absolute absolute-system empty unc".split(),
    )
    def test_outside(self, tmp_path, opened, location):
        folder, outside = two_folders(tmp_path)
        path = referring(folder / "m.onnx", location=location.format(outside=outside))
        with pytest.raises(UnsafeModel, match=r"'w1' wants to read .* outside the model's folder"):
            read_path(path)
        assert opened <= {path}

    @pytest.mark.parametrize("link", ["file", "folder", "chain"])
    def test_link_out_of_the_folder(self, tmp_path, opened, link):
        folder, outside = two_folders(tmp_path)
        if link == "file":
            (folder / DATA).symlink_to(outside / "secret.bin")
        elif link == "chain":
            (folder / "step").symlink_to("../secret.bin")
            (folder / DATA).symlink_to("step")
        else:
            (folder / "sub2").symlink_to(outside)
        location = "sub2/secret.bin" if link == "folder" else DATA
        path = referring(folder / "m.onnx", location=location)
        with pytest.raises(UnsafeModel, match=r"'w1': .* is a link out of the model's folder"):
            read_path(path)
        assert opened <= {path}

    @pytest.mark.parametrize(
        ("location", "says"),
        [("nowhere", "missing"), ("../secret.bin", "outside"), ("link", "a link out of")],
        ids=["missing", "outside", "link"],
    )
    def test_on_the_command_line(self, tmp_path, normtool, location, says):
        folder, outside = two_folders(tmp_path)
        (folder / "link").symlink_to(outside / "secret.bin")
        done = normtool("scan", referring(folder / "m.onnx", location=location))
        assert (done.returncode, done.stdout) == (3, "")
        assert len(done.stderr.splitlines()) == 1
        assert says in done.stderr

    @pytest.mark.parametrize("kind", ["folder", "fifo", "dangling", "loop"])
    def test_no_regular_file(self, tmp_path, kind):
        data = tmp_path / DATA
        match kind:
            case "folder":
                data.mkdir()
            case "fifo":
                os.mkfifo(data)
            case "dangling":
                data.symlink_to("nowhere")
            case "loop":
                data.symlink_to(DATA)
        unreadable(referring(tmp_path / "m.onnx", location=DATA), "'w1'", DATA)

    @pytest.mark.parametrize(
        "location",
        ["\0normtool:embedded", "\0normtool:pending:0", f"{DATA}\0.txt"],
        ids=["embedded", "pending", "nul"],
    )
    def test_names_like_our_own(self, tmp_path, location):
        unreadable(referring(tmp_path / "m.onnx", location=location, offset="0", length=str(WEIGHT)), "'w1'")

    def test_in_memory(self):
        model = zoo.conv_bn()
        weight = model.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=DATA)
        with pytest.raises(UnreadableModel, match="give the model's path"):
            normtool.scan(model)


def two_folders(tmp_path: Path) -> tuple[Path, Path]:
    """The model's folder, and its parent, where a file of the right size lies."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.bin").write_bytes(bytes(WEIGHT))
    return folder, tmp_path


def unreadable(path: Path, *words: str) -> None:
    with pytest.raises(UnreadableModel) as caught:
        read_path(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert all(word in message for word in (str(path), *words)), message


@pytest.fixture
def opened(monkeypatch) -> set[Path]:
    """Every path that is opened in this process."""
    paths: set[Path] = set()
    real = os.open

    def recording(path, *arguments, **options):
        paths.add(Path(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", recording)
    return paths


class TestHuggingFaceCache:
    """snapshots/REV/… are links into blobs/, where files are named by their hash."""

    @pytest.fixture
    def model(self, tmp_path) -> Path:
        root = tmp_path / "models--x"
        snapshot = root / "snapshots" / "0a1b2c" / "onnx"
        snapshot.mkdir(parents=True)
        (root / "blobs").mkdir()
        external(zoo.conv_bn(), tmp_path / "model.onnx", "model.onnx_data")
        for name in ("model.onnx", "model.onnx_data"):
            blob = root / "blobs" / digest(tmp_path / name)
            (tmp_path / name).rename(blob)
            (snapshot / name).symlink_to(Path("../../../blobs") / blob.name)
        return snapshot / "model.onnx"

    def test_folds(self, tmp_path, normtool, model):
        blobs = {path: digest(path) for path in (tmp_path / "models--x" / "blobs").iterdir()}
        target = tmp_path / "out.onnx"
        done = normtool("fold", model, "-o", target)
        assert done.returncode == 0, done.stderr
        assert zoo.relative_error(zoo.run(zoo.conv_bn()), zoo.run(target)) < 1e-5
        assert {path: digest(path) for path in blobs} == blobs

    def test_link_out_of_the_cache(self, tmp_path, model):
        data = model.with_name("model.onnx_data")
        stolen = tmp_path / "stolen"
        data.resolve().rename(stolen)
        data.unlink()
        data.symlink_to(stolen)
        with pytest.raises(UnsafeModel):
            read_path(model)


class TestWriting:
    def test_a_file_of_its_own(self, tmp_path):
        source = external(two_convs(), tmp_path / "m.onnx")
        before = digest(tmp_path / DATA), digest(source)
        fold(source, tmp_path / "out.onnx")
        data = own_data(tmp_path / "out.onnx")
        assert data.name.startswith("out-")
        assert names_in(tmp_path) == {"m.onnx", DATA, "out.onnx", data.name}
        assert (digest(tmp_path / DATA), digest(source)) == before

    def test_stays_external_when_every_weight_is_folded_into(self, tmp_path):
        net = zoo.Net()
        y = net.batch_norm(net.conv(net.input([1, 64, 4, 4]), 64, 64, 3, 3), 64)
        net.output(y, [1, 64, 2, 2])
        fold(external(net.model(), tmp_path / "m.onnx"), tmp_path / "out.onnx")
        assert own_data(tmp_path / "out.onnx").stat().st_size >= 64 * 64 * 9 * 4

    def test_embedded_stays_embedded(self, tmp_path):
        fold(embedded(two_convs(), tmp_path / "m.onnx"), tmp_path / "out.onnx")
        assert not locations(tmp_path / "out.onnx")
        assert names_in(tmp_path) == {"m.onnx", "out.onnx"}

    def test_saving_again_never_appends(self, tmp_path):
        source, target = external(two_convs(), tmp_path / "m.onnx"), tmp_path / "out.onnx"
        sizes = []
        for _ in range(3):
            fold(source, target)
            sizes.append((target.stat().st_size, own_data(target).stat().st_size))
            assert names_in(tmp_path) == {"m.onnx", DATA, "out.onnx", own_data(target).name}
        assert len(set(sizes)) == 1

    def test_a_users_data_file_is_kept(self, tmp_path):
        target = external(two_convs(seed=1), tmp_path / "out.onnx", "out.onnx.data")
        before = digest(tmp_path / "out.onnx.data")
        fold(external(two_convs(), tmp_path / "m.onnx"), target)
        assert digest(tmp_path / "out.onnx.data") == before

    def test_a_shared_data_file_is_kept(self, tmp_path):
        """A copy of the .onnx file reads the same data file: folding the copy must not delete its weights."""
        target, copy = tmp_path / "out.onnx", tmp_path / "copy.onnx"
        fold(external(two_convs(), tmp_path / "m.onnx"), target)
        copy.write_bytes(target.read_bytes())
        before = digest(own_data(copy))
        fold(copy, target)
        assert digest(own_data(copy)) == before

    def test_without_force(self, tmp_path):
        source = external(zoo.conv_bn(), tmp_path / "m.onnx")
        before = {path: digest(path) for path in tmp_path.iterdir()}
        with pytest.raises(OutputError, match="exists"):
            fold(source, source, force=False)
        assert {path: digest(path) for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("form", [embedded, external])
    def test_in_place(self, tmp_path, normtool, form):
        model = two_convs()
        path = form(model, tmp_path / "m.onnx")
        expected = zoo.run(model)
        assert normtool("fold", path, "-o", path).returncode == 5
        done = normtool("fold", path, "-o", path, "--force")
        assert done.returncode == 0, done.stderr
        assert zoo.op_types(onnx.load(path)) == FOLDED
        assert 0 < zoo.relative_error(expected, zoo.run(path)) < 1e-5

    def test_in_place_over_our_own_data(self, tmp_path):
        """The weights being read and the weights being replaced are one file."""
        path = tmp_path / "m.onnx"
        unfolded = read_path(external(two_convs(), tmp_path / "first.onnx"))
        with staged(unfolded, path) as stage:
            stage.commit()
        assert own_data(path).name.startswith("m-")
        expected = zoo.run(path)
        fold(path, path)
        assert 0 < zoo.relative_error(expected, zoo.run(path)) < 1e-5
        assert names_in(tmp_path) == {"first.onnx", DATA, "m.onnx", own_data(path).name}

    def test_what_is_not_committed_is_removed(self, tmp_path):
        model = read_path(external(two_convs(), tmp_path / "m.onnx"))
        with staged(model, tmp_path / "out.onnx"):
            assert len(names_in(tmp_path)) == 4
        assert names_in(tmp_path) == {"m.onnx", DATA}


class TestTwoGigabytes:
    def test_too_large_for_one_object(self, tmp_path):
        with pytest.raises(OutputError, match="write to a file"):
            to_proto(read_path(giant(tmp_path, 1 << 31)))

    def test_outgrown_model_becomes_external(self, tmp_path, monkeypatch):
        monkeypatch.setattr(write, "MAX_PROTO_BYTES", 1 << 20)
        for size, outgrown in ((900_000, False), (1 << 20, True)):
            target = tmp_path / f"{size}.onnx"
            written = fold(giant(tmp_path, size), target)
            assert zoo.op_types(written) == ["Conv", "Relu"]
            assert bool(locations(target)) == outgrown

    @pytest.mark.slow
    def test_above_the_real_limit(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing of it need reach the disk
        size = (1 << 31) + (1 << 20)
        rewritten = normtool.fold(giant(tmp_path, size), validate=False).rewritten
        with staged(rewritten, tmp_path / "out.onnx") as stage:  # and then discarded
            written = onnx.load(stage.model_path, load_external_data=False)
            assert zoo.op_types(written) == ["Conv", "Relu"]
            (big,) = (t for t in written.graph.initializer if t.name == "giant")
            assert int({entry.key: entry.value for entry in big.external_data}["length"]) == size
            assert own_data(stage.model_path).stat().st_size >= size
            read_path(stage.model_path)  # every extent fits its file


DTYPES = (
    "int4 uint4 int2 uint2 float4_e2m1fn bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"
).split()


class TestUntouched:
    """What the fold is not about comes out as it went in."""

    @pytest.mark.parametrize("form", [embedded, external])
    @pytest.mark.parametrize("count", [7, 9001], ids=["small", "large"])
    @pytest.mark.parametrize("name", DTYPES)
    def test_dtype(self, tmp_path, name, count, form):
        model = zoo.conv_bn(ir=13)
        dtype = np.dtype(getattr(ml_dtypes, name))
        codes = np.arange(count) % (4 if name.endswith("int2") else 16)
        array = codes.astype(f"u{dtype.itemsize}").view(dtype)
        model.graph.initializer.append(numpy_helper.from_array(array, "extra"))
        source, target = form(model, tmp_path / "m.onnx"), tmp_path / "out.onnx"
        written = fold(source, target)
        in_memory = normtool.fold(source, validate=False).model
        for got in (written, in_memory):
            (extra,) = (t for t in got.graph.initializer if t.name == "extra")
            assert extra.raw_data == model.graph.initializer[-1].raw_data
            assert (extra.data_type, list(extra.dims)) == (model.graph.initializer[-1].data_type, [count])
        read_path(target)

    @pytest.mark.parametrize("form", [embedded, external])
    def test_packed_weights_that_run(self, tmp_path, normtool, form):
        """Validation writes models too; int4 has to survive there as well."""
        net = zoo.Net(opset=21)
        codes = np.arange(64 * 128).reshape(64, 128).astype(ml_dtypes.int4)
        net.initializers.append(numpy_helper.from_array(codes, "q"))
        quantised = net.node("DequantizeLinear", "q", net.constant(np.float32(0.01)))
        y = net.node("MatMul", net.node("MatMul", net.input([3, 64]), quantised), net.weight(128, 32))
        net.output(net.batch_norm(y, 32), [3, 32])
        model, target = net.model(), tmp_path / "out.onnx"
        done = normtool("fold", form(model, tmp_path / "m.onnx"), "-o", target)
        assert done.returncode == 0, done.stderr
        assert "BatchNormalization" not in zoo.op_types(onnx.load(target))
        assert zoo.relative_error(zoo.run(model), zoo.run(target)) < 1e-5

    @pytest.mark.parametrize("form", [embedded, external])
    def test_everything_else(self, tmp_path, form):
        model = zoo.conv_bn()
        describe(model)
        written = fold(form(model, tmp_path / "m.onnx"), tmp_path / "out.onnx")
        for got, kept in ((written, model), (written.graph, model.graph)):
            left, right = type(kept)(), type(kept)()
            left.CopyFrom(got)
            right.CopyFrom(kept)
            for message in (left, right):  # what a fold is about
                for changed in {"graph", "node", "initializer", "value_info"} & set(
                    message.DESCRIPTOR.fields_by_name
                ):
                    message.ClearField(changed)
            assert left == right
        conv, relu = written.graph.node
        assert conv.doc_string == "of the Conv"
        assert relu == model.graph.node[-1]
        infos = {info.name: info for info in written.graph.value_info}
        bn_output = model.graph.node[1].output[0]
        assert infos[bn_output].doc_string == "after the norm"
        assert infos[bn_output].metadata_props[0].value == "kept"
        assert written.graph.quantization_annotation == model.graph.quantization_annotation

    def test_nothing_to_fold(self, tmp_path):
        net = zoo.Net()
        net.output(net.node("Relu", net.conv(net.input([1, 3, 8, 8]), 3, 64, 3, 3)), [1, 64, 6, 6])
        model = net.model()
        describe(model)
        source = embedded(model, tmp_path / "m.onnx")
        fold(source, tmp_path / "out.onnx")
        assert digest(tmp_path / "out.onnx") == digest(source)


def describe(model: onnx.ModelProto) -> None:
    """Fill every descriptive field that a model, its graph, a node and a value have."""
    model.producer_name, model.producer_version = "somebody", "1.2+local"
    model.domain, model.model_version, model.doc_string = "org.example", 2**40, "a model\nof two lines"
    model.graph.doc_string = "a graph"
    node, output = model.graph.node[0], model.graph.node[1].output[0]
    node.doc_string = "of the Conv"
    info = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", None, 6, 6], "after the norm")
    info.metadata_props.add(key="a", value="kept")
    model.graph.value_info.append(info)
    annotation = model.graph.quantization_annotation.add(tensor_name=output)
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w1")
    for message in (model, model.graph, node):
        message.metadata_props.add(key="pkg.torch.onnx.name", value="γ / β")
