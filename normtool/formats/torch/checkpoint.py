"""Weights alone: what a checkpoint stores and which norms show in it. No weight is read, no code is run.

A checkpoint has no graph, so nothing in it can be folded or swapped; names, shapes and running statistics
still say how much a model stores and where its BatchNorms are.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from normtool.errors import UnreadableModel, UnsafeModel
from normtool.formats.torch.checkpoint_norms import buffer_names, find_norms
from normtool.formats.torch.safetensors_file import read_safetensors
from normtool.formats.torch.shards import Index, find_weights, read_index
from normtool.formats.torch.sniff import Kind, kind_of, open_regular
from normtool.formats.torch.stored import Diagnostic, StoredTensor, Unread, count
from normtool.graph import ModelGraph, Role, Scope, Tensor
from normtool.parameters import Census

#: Larger files are not hashed: that would read every weight.
LARGEST_HASHED = 64 << 20

NO_DATAFLOW = "only weights were given"

_INTEGER_WEIGHTS = ("weight", "qweight")

_REFUSED: Mapping[Kind, str] = {
    Kind.TORCHSCRIPT: "is a TorchScript archive, which holds code; load it yourself and save its state_dict()",
    Kind.TAR: "is a tar archive; unpack it. If PyTorch before 0.1.10 wrote it, no reader of it is safe: "
    "load it yourself and save its state_dict()",
}

_NOT_A_CHECKPOINT: Mapping[Kind, str] = {
    Kind.EXPORTED_PROGRAM: "is an exported program (.pt2), not weights alone; give it under that suffix",
    Kind.OTHER_ZIP: "is a zip archive, and no PyTorch checkpoint (no data.pkl in it); unpack it first",
    Kind.COMPRESSED: "is a compressed file; unpack it first",
    Kind.GIT_LFS: "is a Git LFS pointer, not the weights themselves; run `git lfs pull`",
    Kind.UNKNOWN: "is no checkpoint that normtool knows (.safetensors, or a file written by torch.save)",
}


@dataclass(eq=False)
class Checkpoint:
    """`format` is "safetensors" or "torch". `graph` has tensors and norms, no ops and no weights.

    `entries` are all names, tied ones too; `state_path` says where in the pickled object they lay.
    `sha256` is of the file; None above 64 MiB and for shards, since hashing reads every weight. `fingerprint`
    changes when a name or shape does, or the file's size or time.
    """

    path: Path
    format: str
    graph: ModelGraph
    census: Census
    sha256: str | None
    fingerprint: str
    entries: tuple[StoredTensor, ...] = ()
    state_path: str = "/"
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Weights:
    """What the files hold, before anything is made of it."""

    format: str
    files: tuple[Path, ...]
    tensors: list[StoredTensor]
    state_path: str = "/"
    diagnostics: tuple[Diagnostic, ...] = ()


def read_checkpoint(path: Path) -> Checkpoint:
    """Count a .safetensors file, a torch.save file, an index of shards, or a folder of one without a config.

    Raises UnreadableModel (missing, torn, nothing to count) or UnsafeModel (code, bombs, links elsewhere).
    """
    file = _weights_in(path) if path.is_dir() else path
    weights = _read(file, kind_of(file))
    buffers = buffer_names(weights.tensors)
    graph = _graph(weights, buffers)
    graph.diagnostics = [*weights.diagnostics, *_guesses(weights, graph)]
    sha256 = _sha256(file) if len(weights.files) == 1 else None
    return Checkpoint(
        path=path,
        format=weights.format,
        graph=graph,
        census=count(weights.tensors, buffers),
        sha256=sha256,
        fingerprint=_fingerprint(weights, sha256),
        entries=tuple(weights.tensors),
        state_path=weights.state_path,
        files=weights.files,
    )


def _weights_in(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        raise UnreadableModel(
            f"{folder}: is a model folder (config.json), not weights alone; give a file in it"
        )
    found = find_weights(folder)
    if found is None:
        raise UnreadableModel(
            f"{folder}: holds no model.safetensors, no pytorch_model.bin and no index of them"
        )
    return found


def _read(path: Path, kind: Kind) -> _Weights:
    if kind in _REFUSED:
        raise UnsafeModel(f"{path}: {_REFUSED[kind]}")
    if kind in _NOT_A_CHECKPOINT:
        raise UnreadableModel(f"{path}: {_NOT_A_CHECKPOINT[kind]}")
    if kind is Kind.INDEX:
        return _read_shards(path)
    if kind is Kind.SAFETENSORS:
        return _Weights("safetensors", (path,), read_safetensors(path))
    from normtool.formats.torch.torch_file import read_torch  # imports torch, which takes a second

    state = read_torch(path, kind)
    return _Weights("torch", (path,), state.tensors, state.path, state.diagnostics)


def _read_shards(path: Path) -> _Weights:
    index = read_index(path)
    tensors: dict[str, StoredTensor] = {}
    diagnostics: list[Diagnostic] = []
    formats: set[str] = set()
    for number, (name, file) in enumerate(index.files.items()):
        kind = kind_of(file)
        if kind is Kind.INDEX:
            raise UnreadableModel(f"{path}: {name!r} is no weights but JSON; download it again")
        shard = _read(file, kind)
        formats.add(shard.format)
        diagnostics += shard.diagnostics
        held = {tensor.name: replace(tensor, file=number) for tensor in shard.tensors}
        _check_shard(index, name, held, path)
        unlisted = [tensor for tensor in held if tensor not in index.weight_map]
        if unlisted:
            message = f"{len(unlisted):,} tensors that the index does not list are counted"
            diagnostics.append(("not_in_index", message, name))
        tensors |= {key: tensor for key, tensor in held.items() if index.weight_map.get(key, name) == name}
    files = (path, *index.files.values())
    return _Weights(min(formats), files, list(tensors.values()), diagnostics=tuple(diagnostics))


def _check_shard(index: Index, shard: str, held: Mapping[str, StoredTensor], path: Path) -> None:
    for tensor, home in index.weight_map.items():
        if home == shard and tensor not in held:
            raise UnreadableModel(f"{path}: lists {tensor!r} in {shard!r}, which does not hold it")


# ---- graph, diagnostics, identity -----------------------------------------------------------


def _graph(weights: _Weights, buffers: frozenset[str]) -> ModelGraph:
    """One tensor per view: names that are tied share it."""
    graph = ModelGraph()
    graph.no_dataflow = NO_DATAFLOW
    by_view: dict[tuple[object, ...], Tensor] = {}
    by_name: dict[str, Tensor] = {}
    for stored in weights.tensors:
        role = Role.BUFFER if stored.name in buffers else Role.PARAMETER
        if stored.view not in by_view:
            by_view[stored.view] = graph.add_tensor(_tensor(stored, role))
        elif role is Role.PARAMETER:
            by_view[stored.view].role = role
        by_name[stored.name] = by_view[stored.view]
    graph.norm_modules = list(find_norms(weights.tensors, by_name))
    return graph


def _tensor(stored: StoredTensor, role: Role) -> Tensor:
    return Tensor(
        stored.name,
        Scope(),
        role,
        stored.dtype,
        stored.shape,
        Unread(stored.shape, stored.dtype),
        stored_elements=stored.held,
    )


def _guesses(weights: _Weights, graph: ModelGraph) -> Iterator[Diagnostic]:
    """What a state dict does not say and is concluded from names."""
    where = str(weights.files[0])
    message = (
        "a state dict does not say what is learnable; all but running statistics and integers counts as it"
    )
    packed = sum(t.held for t in weights.tensors if t.integer and t.name.rpartition(".")[2] in _INTEGER_WEIGHTS)
    if packed:
        message += f"; {packed:,} integers among the buffers look like quantised weights"
    yield "roles_by_name", message, where
    guessed = [norm.name for norm in graph.norm_modules if norm.evidence == "name"]
    if guessed:
        yield "norms_by_name", f"{len(guessed):,} norms are guessed from names and shapes", guessed[0]


def _sha256(file: Path) -> str | None:
    with open_regular(file) as content:
        if content.seek(0, 2) > LARGEST_HASHED:
            return None
        content.seek(0)
        return hashlib.file_digest(content, "sha256").hexdigest()


def _fingerprint(weights: _Weights, sha256: str | None) -> str:
    """Of the content where it is hashed, else of names, shapes, sizes and times."""
    if sha256 is not None:
        return sha256[:16]
    described = [(t.name, t.shape, t.dtype.name) for t in weights.tensors]
    files = [(status.st_size, status.st_mtime_ns) for status in map(Path.stat, weights.files)]
    return hashlib.sha256(repr((described, files)).encode("utf-8", "surrogatepass")).hexdigest()[:16]
