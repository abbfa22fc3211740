"""What a user may ask of a fold beyond what is always done."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from normtool.errors import UsageError

#: Ways to do without BatchNorm where it cannot be folded.
LOWERINGS = ("mul-add", "conv", "relu")


@dataclass(frozen=True)
class Choice:
    """`only`, `skip`: shell patterns of norm names."""

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def chooses(self, name: str) -> bool:
        wanted = not self.only or any(fnmatchcase(name, pattern) for pattern in self.only)
        return wanted and not any(fnmatchcase(name, pattern) for pattern in self.skip)

    def check(self, names: Iterable[str]) -> None:
        """Raises UsageError for a pattern that no norm matches: most likely it is mistyped."""
        known = list(names)
        for pattern in (*self.only, *self.skip):
            if not any(fnmatchcase(name, pattern) for name in known):
                raise UsageError(f"no norm is called {pattern!r}; `normtool scan -v` lists their names")


@dataclass(frozen=True)
class FoldOptions(Choice):
    """`freeze`: treat ONNX initializers that are also graph inputs as constants.

    `lower`: what becomes of BatchNorms that cannot be folded (one of LOWERINGS). `duplicate`: copy an op whose
    output others read too. `border_maps`: let a padded Conv take a shift as a constant of the size of its
    output. `requantise`: let a quantised bias take a shift rounded to its grid, with the error stated in the
    proof: the one fold that is not exact. `affine`: move γ and β of LayerNorm, RMSNorm, GroupNorm and
    InstanceNorm into what reads them.
    """

    freeze: bool = False
    lower: str | None = None
    duplicate: bool = False
    border_maps: bool = False
    requantise: bool = False
    affine: bool = False

    def __post_init__(self) -> None:
        if self.lower is not None and self.lower not in LOWERINGS:
            raise UsageError(f"lower={self.lower!r}: choose one of {', '.join(LOWERINGS)}")


#: What `swap` does with LayerNorms that an exact swap has to leave.
MODES = ("exact", "centre", "approximate")

#: Spellings of an RMSNorm in ONNX.
TARGETS = ("onnx", "primitive", "ort")


@dataclass(frozen=True)
class SwapOptions(Choice):
    """How to swap, and what.

    `mode`: "exact" swaps where that pays, "centre" all that can be, "approximate" the rest too (without mean).
    `outputs`: names of the outputs that are wanted (None: all); the others go. `keep_affine`: leave γ and β
    where they are. `target`: how an RMSNorm is spelled in ONNX (one of TARGETS; None: as the model's opset
    allows). `freeze`: treat ONNX initializers that are also graph inputs as constants. `calibrate`: a path of
    an .npz file, or arrays by input name, samples along axis 0; approximated norms get γ and β fitted to them.
    """

    mode: str = "exact"
    outputs: tuple[str, ...] | None = None
    keep_affine: bool = False
    target: str | None = None
    freeze: bool = False
    calibrate: Any = None

    def __post_init__(self) -> None:
        if self.calibrate is not None and self.mode != "approximate":
            raise UsageError("--calibrate fits γ and β of norms that are approximated; add --mode approximate")
        if self.mode not in MODES:
            raise UsageError(f"mode={self.mode!r}: choose one of {', '.join(MODES)}")
        if self.target is not None and self.target not in TARGETS:
            raise UsageError(f"target={self.target!r}: choose one of {', '.join(TARGETS)}")
