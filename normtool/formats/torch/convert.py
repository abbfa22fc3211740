"""PyTorch → ONNX, by torch's own exporter, with an account of every number that changed hands.

The exporter drops what nobody reads, transposes weights, folds constants and, at its default, simple Conv +
BatchNorm pairs: the counts of the module and of the file differ, each time for a reason. `reconcile` finds it.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from torch.export import ExportedProgram

from normtool.errors import RuntimeRefused, UsageError
from normtool.formats.onnx.model import OnnxModel
from normtool.formats.onnx.read import read_path
from normtool.formats.torch.export import BATCH, ExportFailed, export, first_line, structural_copy, undisturbed
from normtool.formats.torch.model import TorchModel
from normtool.formats.torch.sources import need_example

#: The file that the exporter writes, in a folder that its caller removes.
NAME = "model.onnx"

#: Above this the exporter writes weights beside the model: protobuf stops at 2 GB.
_EMBEDDED_BYTES = 1 << 30


def in_inference_mode(opened: TorchModel) -> TorchModel:
    """The model as it is converted, and compared with; the user's own stays in the modes it is in.

    Raises UsageError where nothing says what to call it with, RuntimeRefused where it cannot be copied.
    """
    need_example(opened)
    if opened.module is None or not any(part.training for part in opened.module.modules()):
        return opened
    try:
        return replace(opened, module=structural_copy(opened.module).eval(), exported=None)
    except ExportFailed as error:
        raise RuntimeRefused(f"torch.export fails: {error}") from None


def program_of(model: TorchModel) -> ExportedProgram:
    """The model as a program, its batch axis open where that is possible. Raises RuntimeRefused."""
    if model.program is not None:
        return model.program
    assert model.module is not None
    assert model.example is not None
    try:
        return export(model.module, model.example, dynamic_batch=True)
    except ExportFailed as error:
        raise RuntimeRefused(f"torch.export fails: {error}") from None


def to_onnx(program: ExportedProgram, folder: Path, opset: int | None = None) -> OnnxModel:
    """The program as an ONNX model, in `folder`.

    Raises RuntimeRefused with the exporter's own first line, UsageError for an opset that it does not write.
    """
    path = folder / NAME
    held = [*program.state_dict.values(), *program.constants.values()]
    size = sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor))
    try:
        with undisturbed(), _quiet():
            made = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
            assert made is not None
            made.save(path, external_data=size > _EMBEDDED_BYTES)
    except Exception as error:  # anything can come out of a converter of arbitrary operators
        raise RuntimeRefused(f"torch.onnx.export fails: {_cause(error)}") from None
    _name_axes(path, program)
    model = read_path(path)
    if opset is not None and model.versions.get("") != opset:
        raise UsageError(f"--opset {opset}: the exporter wrote opset {model.versions.get('')} instead")
    return model


def _cause(error: BaseException) -> str:
    """The innermost complaint: the exporter wraps it in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs what it misses (torchvision) whether or not the model needs it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _name_axes(path: Path, program: ExportedProgram) -> None:
    """Call the open axis 0 of the inputs `batch` (the exporter calls it s77); a fixed length is a number.

    An axis that export tried to leave open and could not is still a symbol, by the name of "2".
    """
    symbol = _batch_symbol(program)
    word = re.compile(rf"\b{re.escape(symbol)}\b") if symbol else None
    proto = onnx.load(path, load_external_data=False)
    for info in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param.isdecimal():
                dim.dim_value = int(dim.dim_param)
            elif dim.dim_param and word is not None:
                dim.dim_param = word.sub(BATCH, dim.dim_param)
    onnx.save(proto, path)


def _batch_symbol(program: ExportedProgram) -> str | None:
    """The one symbol that is axis 0 of inputs."""
    user = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in user]
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.ndim]
    symbols = {str(value.shape[0]) for value in tensors}
    open_ones = [symbol for symbol in symbols if not symbol.isdecimal()]
    return open_ones[0] if len(open_ones) == 1 else None
