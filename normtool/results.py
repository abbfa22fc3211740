"""What every result with a model in it can do: hand it over, write it, print itself."""

from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normtool.formats.onnx.model import OnnxModel
    from normtool.formats.torch.model import TorchModel

#: The schema of `fold`, `swap`, `convert` and `unfold` (DESIGN §7).
SCHEMA = "normtool.rewrite/1"


def verbs_of(opened: Any) -> ModuleType:
    """The format's own hands: `formats/onnx/verbs.py` or `formats/torch/verbs.py`."""
    if opened.format == "onnx":
        from normtool.formats.onnx import verbs as onnx_verbs

        return onnx_verbs
    from normtool.formats.torch import verbs as torch_verbs

    return torch_verbs


class ModelResult:
    """A result whose model is `opened`."""

    @property
    def exact(self) -> bool:
        """Is it meant to compute the same as the original?"""
        return True

    @property
    def opened(self) -> "OnnxModel | TorchModel":
        raise NotImplementedError

    @cached_property
    def model(self) -> Any:
        """The model, of the kind that was given: a ModelProto, the module's own class, a program.

        A path gives a ModelProto or an ExportedProgram. Raises OutputError for ONNX above protobuf's 2 GB: use
        `save`.
        """
        return verbs_of(self.opened).to_object(self.opened)

    def stage(self, path: Path, force: bool = False) -> AbstractContextManager[Any]:
        """The model written beside `path`; `commit()` puts it in place, else it goes with the block."""
        staged: AbstractContextManager[Any] = verbs_of(self.opened).stage(self.opened, path, force)
        return staged

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write the model to a file (.onnx, or .pt2), atomically.

        Raises OutputError if the path exists and not `force`.
        """
        with self.stage(Path(path), force) as stage:
            stage.commit()

    def __str__(self) -> str:
        from normtool.report.table import to_text

        return to_text(self)
