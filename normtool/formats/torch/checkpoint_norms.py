"""Norms and roles in a state dict, which says neither: by running statistics, else by name and shape.

Running mean and variance of one size beside each other are a BatchNorm's and nothing else's. Any other norm is
a guess: a name that sounds like a norm over tensors shaped like γ and β. Names lie in both directions, so the
guess is marked (`evidence: name`).
"""

import re
from collections.abc import Iterator, Mapping

from normtool.formats.torch.stored import StoredTensor
from normtool.graph import NormModule, Tensor

#: Last part of a name → what the tensor is; γ and β are called gamma and beta in old BERT checkpoints.
_SCALE = ("weight", "gamma", "scale")
_SHIFT = ("bias", "beta")
_MEAN, _VAR = "running_mean", "running_var"
STATISTICS = (_MEAN, _VAR, "num_batches_tracked")

#: Running statistics of observations (reinforcement learning) count what they have seen; BatchNorm does not.
_NOT_A_BATCH_NORM = "count"

_WORD = re.compile("[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SHORT = frozenset(("ln", "gn", "bn", "rms"))
_NOT_A_NORM = frozenset(("prelu", "relu", "act", "activation"))

Group = Mapping[str, StoredTensor]


def buffer_names(tensors: list[StoredTensor]) -> frozenset[str]:
    """Statistics and integers. What else is a buffer, a state dict does not say."""
    return frozenset(t.name for t in tensors if t.integer or t.name.rpartition(".")[2] in STATISTICS)


def find_norms(tensors: list[StoredTensor], of: Mapping[str, Tensor]) -> Iterator[NormModule]:
    """In the order of the state dict; `of` gives the graph's tensor of each name."""
    groups: dict[str, dict[str, StoredTensor]] = {}
    for tensor in tensors:
        module, _, leaf = tensor.name.rpartition(".")
        groups.setdefault(module, {})[leaf] = tensor
    for module, group in groups.items():
        if found := _batch_norm(group) or _by_name(module, group):
            kind, evidence, learnable, buffers = found
            yield NormModule(
                module,
                kind,
                "state_dict",
                evidence,
                tuple(of[group[leaf].name] for leaf in learnable),
                tuple(of[group[leaf].name] for leaf in buffers),
            )


#: kind, evidence, names of the learnable tensors and of the buffers
_Found = tuple[str, str, list[str], list[str]]


def _batch_norm(group: Group) -> _Found | None:
    if _MEAN not in group or _VAR not in group or _NOT_A_BATCH_NORM in group:
        return None
    shape = group[_MEAN].shape
    if len(shape) != 1 or group[_VAR].shape != shape:
        return None
    learnable = [leaf for leaf in (*_SCALE, *_SHIFT) if leaf in group and group[leaf].shape == shape]
    return "batch_norm", "statistics", learnable, [leaf for leaf in STATISTICS if leaf in group]


def _by_name(module: str, group: Group) -> _Found | None:
    """γ alone of one axis, or γ and β of the same shape, and nothing else in the module."""
    scale = [leaf for leaf in group if leaf in _SCALE]
    shift = [leaf for leaf in group if leaf in _SHIFT]
    if len(scale) != 1 or len(shift) > 1 or len(scale) + len(shift) != len(group):
        return None
    gamma, *beta = (group[leaf] for leaf in (*scale, *shift))
    if gamma.integer or gamma.claimed < 2 or any(b.integer or b.shape != gamma.shape for b in beta):
        return None
    words = _norm_words(module)
    if not words or (len(gamma.shape) > 1 and not beta):
        return None
    return _kind(words, bool(beta)), "name", [*scale, *shift], []


def _norm_words(module: str) -> list[str]:
    """The words of the module's name if one of them says norm; of a numbered part, those of its parent.

    A parent has to be called nothing but norm: `ConvBatchNorm.1` may be anything, `norm.0` hardly is.
    """
    parent, _, last = module.rpartition(".")
    words = _words(last)
    if not words and last.isdigit():
        words = _words(parent.rpartition(".")[2])
        return words if words and all(_says_norm(word) for word in words[-1:]) and len(words) == 1 else []
    if _NOT_A_NORM.intersection(words):
        return []
    return words if any(map(_says_norm, words)) else []


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


def _says_norm(word: str) -> bool:
    return word in _SHORT or word.endswith("norm")


def _kind(words: list[str], shifted: bool) -> str:
    text = " ".join(words)
    for kind, sounds in _SOUNDS:
        if re.search(sounds, text):
            return kind
    return "layer_norm" if shifted else "rms_norm"


_SOUNDS = (
    ("rms_norm", "rms"),
    ("group_norm", r"group|\bgn\b"),
    ("instance_norm", r"\binst"),
    ("batch_norm", r"batch|\bbn\b"),
)
