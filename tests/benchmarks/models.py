"""Models for the benchmarks, written to disk one tensor at a time.

    python tests/benchmarks/models.py resnet50 regnet --check

Each model is a published architecture with random weights and *perturbed*
BatchNorm statistics, so that every fold changes every number it should.
The same name always gives the same bytes: each tensor is drawn from a generator
seeded with its own name.

A model is described first (nodes, and weights as shapes with a distribution) and
drawn while it is written. Memory in use stays at tens of megabytes whatever the
size of the file, which leaves the measurements that follow undisturbed.
"""

from __future__ import annotations

import argparse
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

DEFAULT_DIRECTORY = Path(__file__).resolve().parents[2] / ".bench"

RECIPE = 1  # Part of every file name; raise it when the bytes of a model change.
SEED = 20
OPSET = 17
IR_VERSION = 8  # The one that came with opset 17.

CHUNK = 1 << 20  # Numbers drawn at once: 4 MiB of float32.
ALIGNMENT = 4096  # Bytes; external tensors start on a page so that they can be mapped.

# ---------------------------------------------------------------- distributions

Floats = npt.NDArray[np.float32]
Draw = Callable[[np.random.Generator, int], Floats]


def normal(std: float) -> Draw:
    """Return the distribution N(0, std²)."""
    return lambda rng, count: std * rng.standard_normal(count, dtype=np.float32)


def variance(rng: np.random.Generator, count: int) -> Floats:
    """Draw running variances, uniform in [0.5, 2)."""
    return 0.5 + np.float32(1.5) * rng.random(count, dtype=np.float32)


def gamma(rng: np.random.Generator, count: int) -> Floats:
    """Draw BatchNorm scales, uniform in [0.5, 1.5), one in ten of them negative."""
    magnitude = 0.5 + rng.random(count, dtype=np.float32)
    return np.where(rng.random(count) < 0.1, -magnitude, magnitude)


# -------------------------------------------------------------- the description


@dataclass(frozen=True)
class Weight:
    """A float32 initialiser that has not been drawn yet."""

    name: str
    shape: tuple[int, ...]
    draw: Draw

    @property
    def nbytes(self) -> int:
        """Return the size of the values in bytes."""
        return 4 * math.prod(self.shape)

    def chunks(self) -> Iterator[bytes]:
        """Yield the values as little-endian float32, at most 4 MiB at a time."""
        rng = np.random.default_rng([SEED, zlib.crc32(self.name.encode())])
        left = math.prod(self.shape)
        while left:
            count = min(left, CHUNK)
            yield self.draw(rng, count).astype("<f4").tobytes()
            left -= count

    def header(self) -> TensorProto:
        """Return the tensor without its values."""
        return TensorProto(name=self.name, dims=self.shape, data_type=TensorProto.FLOAT)


@dataclass
class Network:
    """Nodes and undrawn weights of a model from 'x' [N,3,224,224] to 'y' [N,1000].

    Every method adds one layer and returns the name of its output. Names follow
    torch: the layer `stem.bn` owns the weight `stem.bn.running_mean`.
    """

    name: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)

    def weight(self, name: str, shape: tuple[int, ...], draw: Draw) -> str:
        """Add an initialiser of the given shape."""
        self.weights.append(Weight(name, shape, draw))
        return name

    def node(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Add a node whose single output bears the node's name."""
        self.nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    def conv(
        self,
        x: str,
        name: str,
        channels: tuple[int, int],
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        gain: float = 1.0,
    ) -> str:
        """Add a Conv from channels[0] to channels[1], 'same' padded.

        Its weights have gain times the standard deviation of He et al. (2015),
        √(2 / fan-in), under which a ReLU network neither grows nor shrinks.
        """
        fan_in = channels[0] // groups * kernel**2
        shape = (channels[1], channels[0] // groups, kernel, kernel)
        he = normal(gain * math.sqrt(2 / fan_in))
        inputs = [x, self.weight(f"{name}.weight", shape, he)]
        if bias:
            inputs.append(self.weight(f"{name}.bias", shape[:1], normal(0.1)))
        return self.node(
            "Conv",
            inputs,
            name,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
            group=groups,
        )

    def batchnorm(self, x: str, name: str, channels: int) -> str:
        """Add a BatchNormalization with perturbed parameters and statistics."""
        parameters = [
            self.weight(f"{name}.weight", (channels,), gamma),
            self.weight(f"{name}.bias", (channels,), normal(0.2)),
            self.weight(f"{name}.running_mean", (channels,), normal(0.3)),
            self.weight(f"{name}.running_var", (channels,), variance),
        ]
        return self.node("BatchNormalization", [x, *parameters], name, epsilon=1e-5)

    def conv_bn(
        self,
        x: str,
        name: str,
        channels: tuple[int, int],
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        gain: float = 1.0,
    ) -> str:
        """Add a Conv without bias and its BatchNormalization."""
        x = self.conv(
            x,
            f"{name}.conv",
            channels,
            kernel=kernel,
            stride=stride,
            groups=groups,
            gain=gain,
        )
        return self.batchnorm(x, f"{name}.bn", channels[1])

    def relu(self, x: str) -> str:
        """Add a Relu."""
        return self.node("Relu", [x], f"{x}.relu")

    def residual(self, branch: str, shortcut: str, name: str) -> str:
        """Add the sum of a branch and its shortcut, and the Relu after it."""
        return self.relu(self.node("Add", [branch, shortcut], f"{name}.add"))

    def squeeze_excite(self, x: str, name: str, width: int, squeezed: int) -> str:
        """Add a gate on each channel of x, computed from the channels' means."""
        gate = self.node("GlobalAveragePool", [x], f"{name}.pool")
        gate = self.conv(gate, f"{name}.fc1", (width, squeezed), bias=True)
        gate = self.relu(gate)
        gate = self.conv(gate, f"{name}.fc2", (squeezed, width), bias=True)
        gate = self.node("Sigmoid", [gate], f"{name}.gate")
        return self.node("Mul", [x, gate], f"{name}.mul")

    def classifier(self, x: str, width: int) -> None:
        """Add global pooling and the linear layer that ends the model."""
        x = self.node("GlobalAveragePool", [x], "head.pool")
        x = self.node("Flatten", [x], "head.flatten", axis=1)
        weight = self.weight("head.fc.weight", (1000, width), normal(width**-0.5))
        bias = self.weight("head.fc.bias", (1000,), normal(0.1))
        self.node("Gemm", [x, weight, bias], "y", transB=1)


# ------------------------------------------------------------ the architectures

# Residual sums add up variances. With this gain on a branch's last Conv, a sum is
# some 10 % larger than its shortcut, and not twice as large.
BRANCH_GAIN = 0.3


def resnet50(name: str) -> Network:
    """Describe ResNet-50 v1.5 (He et al. 2016; stride in the 3×3 Conv)."""
    net = Network(name)
    x = net.relu(net.conv_bn("x", "stem", (3, 64), kernel=7, stride=2))
    x = net.node("MaxPool", [x], "stem.pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    channels = 64
    for stage, depth in enumerate([3, 4, 6, 3]):
        width = 64 << stage
        for block in range(depth):
            stride = 2 if stage and not block else 1
            x = bottleneck(net, x, f"s{stage}.b{block}", channels, width, stride)
            channels = 4 * width
    net.classifier(x, channels)
    return net


def bottleneck(net: Network, x: str, name: str, channels: int, width: int, stride: int) -> str:
    """Add a ResNet bottleneck that ends in 4 × width channels."""
    wide = 4 * width
    y = net.relu(net.conv_bn(x, f"{name}.1", (channels, width)))
    y = net.relu(net.conv_bn(y, f"{name}.2", (width, width), kernel=3, stride=stride))
    y = net.conv_bn(y, f"{name}.3", (width, wide), gain=BRANCH_GAIN)
    if channels != wide:
        x = net.conv_bn(x, f"{name}.shortcut", (channels, wide), stride=stride)
    return net.residual(y, x, name)


@dataclass(frozen=True)
class RegNetY:
    """Widths of the groups and stages of a RegNetY (Radosavovic et al. 2020)."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    group_width: int

    def __call__(self, name: str) -> Network:
        """Describe the model."""
        net = Network(name)
        x = net.relu(net.conv_bn("x", "stem", (3, 32), kernel=3, stride=2))
        channels = 32
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            for block in range(depth):
                x = self.block(net, x, f"s{stage}.b{block}", channels, width)
                channels = width
        net.classifier(x, channels)
        return net

    def block(self, net: Network, x: str, name: str, channels: int, width: int) -> str:
        """Add a block; the first of a stage halves the picture and has a shortcut."""
        stride = 1 if channels == width else 2
        groups = width // self.group_width
        y = net.relu(net.conv_bn(x, f"{name}.1", (channels, width)))
        y = net.conv_bn(y, f"{name}.2", (width, width), kernel=3, stride=stride, groups=groups)
        y = net.squeeze_excite(net.relu(y), f"{name}.se", width, round(channels / 4))
        y = net.conv_bn(y, f"{name}.3", (width, width), gain=BRANCH_GAIN)
        if channels != width:
            x = net.conv_bn(x, f"{name}.shortcut", (channels, width), stride=stride)
        return net.residual(y, x, name)


# ---------------------------------------------------------------------- writing


def signature(network: Network) -> onnx.GraphProto:
    """Return a graph that holds only the model's input and output."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 224, 224])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1000])
    return helper.make_graph([], network.name, [x], [y])


def graph_in_parts(network: Network) -> tuple[bytes, bytes]:
    """Return the serialised fields of a graph before and after its initialisers."""
    after = signature(network)
    after.ClearField("name")
    before = onnx.GraphProto(node=network.nodes, name=network.name)
    return before.SerializeToString(), after.SerializeToString()


def write_embedded(network: Network, path: Path) -> None:
    """Write a model that holds its own weights; at most 2 GiB, protobuf's limit.

    A message on disk is its fields one after another, and a nested message is a tag,
    a length and its fields. All lengths are known before any weight is drawn, so the
    file can be written from front to back, in the order protobuf itself would use.
    """
    before, after = graph_in_parts(network)
    tensors = [(weight, tensor_prefix(weight)) for weight in network.weights]
    size = len(before) + len(after)
    size += sum(len(prefix) + weight.nbytes for weight, prefix in tensors)
    head = onnx.ModelProto(ir_version=IR_VERSION, producer_name="benchmark")
    tail = onnx.ModelProto(opset_import=[helper.make_opsetid("", OPSET)])
    graph_field = onnx.ModelProto.GRAPH_FIELD_NUMBER
    with path.open("wb") as file:
        file.write(head.SerializeToString())
        file.write(length_delimited(graph_field, size))
        file.write(before)
        for weight, prefix in tensors:
            file.write(prefix)
            file.writelines(weight.chunks())
        file.write(after)
        file.write(tail.SerializeToString())


def tensor_prefix(weight: Weight) -> bytes:
    """Return all bytes of an initialiser that come before its values."""
    header: bytes = weight.header().SerializeToString()
    header += length_delimited(TensorProto.RAW_DATA_FIELD_NUMBER, weight.nbytes)
    size = len(header) + weight.nbytes
    initializer_field = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
    return length_delimited(initializer_field, size) + header


def length_delimited(field_number: int, size: int) -> bytes:
    """Return the tag and the length that introduce a protobuf field of size bytes."""
    length_delimited_wire_type = 2
    return varint(field_number << 3 | length_delimited_wire_type) + varint(size)


def varint(value: int) -> bytes:
    """Encode an integer ≥ 0 in protobuf's base 128, least significant digit first."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def write_external(network: Network, path: Path, data: Path) -> None:
    """Write a model to path and all its weights to data, a file beside it."""
    graph = signature(network)
    graph.node.extend(network.nodes)
    with data.open("wb") as file:
        for weight in network.weights:
            graph.initializer.append(append_external(weight, file, data.name))
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="benchmark",
    )
    path.write_bytes(model.SerializeToString())


def append_external(weight: Weight, file: BinaryIO, location: str) -> TensorProto:
    """Append the values to file, and return the tensor that points at them."""
    file.write(bytes(-file.tell() % ALIGNMENT))
    tensor = weight.header()
    tensor.data_location = TensorProto.EXTERNAL
    where = {"location": location, "offset": file.tell(), "length": weight.nbytes}
    for key, value in where.items():
        tensor.external_data.add(key=key, value=str(value))
    file.writelines(weight.chunks())
    return tensor


# ------------------------------------------------------------------ the catalogue


@dataclass(frozen=True)
class Model:
    """An architecture, and where its weights go."""

    describe: Callable[[str], Network]
    external: bool = False


MODELS = {
    "tiny": Model(RegNetY((16,), (1,), 8)),  # 0.1 MB
    "resnet50": Model(resnet50),  # 102 MB
    "regnet": Model(  # RegNetY-64GF, 1.1 GB
        RegNetY((328, 984, 1968, 4920), (2, 5, 12, 1), 328)
    ),
    "regnet-external": Model(  # RegNetY-128GF, 2.6 GB
        RegNetY((528, 1056, 2904, 7392), (2, 7, 17, 1), 264), external=True
    ),
}


def cached(name: str, directory: Path = DEFAULT_DIRECTORY) -> Path:
    """Return the path of the named model, writing it first if it is not there."""
    path = directory / f"{name}-{RECIPE}.onnx"
    if not path.exists():
        create(directory)
        # Renamed when complete, so that an interrupted run leaves nothing to trust.
        partial = path.with_suffix(".partial")
        model = MODELS[name]
        if model.external:
            data = path.with_suffix(".onnx.data")
            write_external(model.describe(name), partial, data)
        else:
            write_embedded(model.describe(name), partial)
        partial.rename(path)
    return path


def create(directory: Path) -> None:
    """Create a directory that git ignores, unless it exists."""
    if not directory.exists():
        directory.mkdir(parents=True)
        (directory / ".gitignore").write_text("*\n")


def check(path: Path) -> str:
    """Check a model and run it once; return what its outputs look like.

    Raises:
        onnx.checker.ValidationError: the file is not valid ONNX.
        ValueError: the outputs are not finite, or do not depend on the input.
    """
    import onnxruntime  # Only here: writing a model must not need it.

    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(SEED)
    x = rng.standard_normal((2, 3, 224, 224), dtype=np.float32)
    y = np.asarray(session.run(["y"], {"x": x})[0])
    if not np.isfinite(y).all() or np.allclose(y[0], y[1]):
        raise ValueError(f"{path}: outputs {y} are not finite and different")
    return f"valid, outputs within ±{np.abs(y).max():.1f}, std {y.std():.2f}"


def main() -> None:
    """Write the named models and print their paths, one to a line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    names = ", ".join(MODELS)
    parser.add_argument("names", nargs="+", choices=MODELS, metavar="NAME", help=names)
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIRECTORY)
    parser.add_argument("--check", action="store_true", help="check and run each model")
    arguments = parser.parse_args()
    for name in arguments.names:
        path = cached(name, arguments.dir)
        print(f"{path}\t{check(path)}" if arguments.check else path)


if __name__ == "__main__":
    main()
