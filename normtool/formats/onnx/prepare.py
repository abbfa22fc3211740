"""What an ONNX model has to become before it can be swapped: of a newer opset, or with fewer outputs."""

from collections.abc import Sequence

import onnx
from onnx import version_converter

from normtool.errors import RuntimeRefused, UsageError
from normtool.formats.onnx.model import OnnxModel
from normtool.formats.onnx.read import read_skeleton


def default_opset(model: OnnxModel) -> int:
    """The opset of the standard operators, 0 where the model imports none."""
    return model.versions.get("", 0)


def with_opset(model: OnnxModel, opset: int) -> OnnxModel:
    """The model at a newer opset, by the standard's own converter; the weights stay where they are.

    The converter is a C++ program that reads a whole model. It sees initializers as inputs, so that it cannot
    touch them. Raises RuntimeRefused with its complaint where it cannot convert.
    """
    if default_opset(model) >= opset:
        return model
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(model.proto)
    large = [
        tensor for tensor in skeleton.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    held = {tensor.name: tensor for tensor in large}
    listed = {value.name for value in skeleton.graph.input}
    for name, tensor in held.items():
        if name not in listed:
            info = onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
            skeleton.graph.input.append(info)
    small = [tensor for tensor in model.proto.graph.initializer if tensor.name not in held]
    del skeleton.graph.initializer[:]
    skeleton.graph.initializer.extend(small)
    try:
        converted = version_converter.convert_version(skeleton, opset)
    except Exception as error:  # it raises whatever its C++ does
        first = (str(error).strip().splitlines() or ["no details"])[0]
        raise RuntimeRefused(
            f"the model cannot be converted from opset {default_opset(model)} to {opset}: {first}"
        ) from None
    inputs = [value for value in converted.graph.input if value.name in listed]
    del converted.graph.input[:]
    converted.graph.input.extend(inputs)
    converted.graph.initializer.extend(
        tensor for tensor in model.proto.graph.initializer if tensor.name in held
    )
    return _read_again(model, converted)


def with_outputs(model: OnnxModel, names: Sequence[str]) -> OnnxModel:
    """The model with these outputs only, in their order in the model. Raises UsageError for a name it has
    not."""
    known = [value.name for value in model.proto.graph.output]
    for name in names:
        if name not in known:
            raise UsageError(f"no output is called {name!r}; the model has {', '.join(known)}")
    pruned = onnx.ModelProto()
    pruned.CopyFrom(model.proto)
    kept = [value for value in model.proto.graph.output if value.name in names]
    del pruned.graph.output[:]
    pruned.graph.output.extend(kept)
    return _read_again(model, pruned)


def _read_again(model: OnnxModel, proto: onnx.ModelProto) -> OnnxModel:
    """Another model with the same weights; no file holds it, so it has no path."""
    again = read_skeleton(proto, model.tensors, path=None, file=model.file)
    again.external = model.external
    return again
