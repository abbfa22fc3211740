"""An ONNX model as normtool holds it: the skeleton, where its weights lie, and its graph."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from normtool.formats.onnx.tensors import DataFile, FileValue, TensorReader
from normtool.formats.onnx.wire import LAZY
from normtool.graph import ModelGraph

_HASH_BLOCK = 1 << 22


@dataclass(eq=False)
class OnnxModel:
    """`proto` lacks what lies in `file` or in external data; `graph` describes all of it."""

    proto: onnx.ModelProto
    graph: ModelGraph
    tensors: TensorReader
    path: Path | None = None
    file: DataFile | None = None
    #: did it come with its weights in a file of their own?
    external: bool = False
    #: did the standard's checker accept it as read?
    checked: bool = True
    checker_message: str = ""
    versions: dict[str, int] = field(default_factory=dict)
    #: of a rewritten model: (op of the original or edit that made it, slot) → the constant that is there now
    places: dict[tuple[Any, str], str] = field(default_factory=dict)

    @property
    def format(self) -> str:
        return "onnx"

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the graph changes or a weight does, as far as samples of it show; cheap at any size."""
        content = self.proto.SerializeToString(deterministic=True).replace(LAZY.encode(), b"")
        digest = hashlib.sha256(content)
        for tensor in self.graph.tensors:
            if isinstance(tensor.value, FileValue):
                for part in tensor.value.samples():
                    digest.update(part)
        return digest.hexdigest()[:16]

    @cached_property
    def sha256(self) -> str:
        """Of the .onnx file; of the serialised object where there is no file."""
        if self.file is None:
            return hashlib.sha256(self.proto.SerializeToString(deterministic=True)).hexdigest()
        return hash_file(self.file)


def hash_file(file: DataFile) -> str:
    digest = hashlib.sha256()
    for offset in range(0, file.size, _HASH_BLOCK):
        digest.update(file.read(offset, min(_HASH_BLOCK, file.size - offset)))
    return digest.hexdigest()
