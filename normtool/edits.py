"""What a plan may do to a model. Rules make edits; only format writers carry them out.

Edits are carried out in their order. An op that an earlier edit has replaced, or put in, is an op of the
`Draft`: it has the `source` of the old one, or the `Insert` or `Copy` itself, or (graft, number of the part).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from normtool.graph import Op, Read, Tensor
from normtool.values import Value


@dataclass(frozen=True, eq=False)
class Rebind:
    """Give `op` a new constant at `slot`; `name` is a wish for what it is called.

    Whoever else reads the old constant keeps it.
    """

    op: Op
    slot: str
    value: Value
    name: str


@dataclass(frozen=True, eq=False)
class Splice:
    """Take `op` out: whoever read its output now reads what entered at `slot`."""

    op: Op
    slot: str


@dataclass(frozen=True, eq=False)
class Replace:
    """Turn `op` into one of another kind, or of the same kind with other attributes.

    `keep` maps the new slots to the old ones whose tensors go on feeding them; `constants` fills the rest.
    """

    op: Op
    kind: str
    keep: Mapping[str, str]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Rebind] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Insert:
    """Put an op behind `tensor`: it reads it at `slot`, and whoever read it reads the op's output instead.

    `constants` fill its other slots; their `op` is one in whose scope they lie, the producer of `tensor` or the
    op whose numbers they are.
    """

    tensor: Tensor
    behind: Op
    kind: str
    slot: str
    constants: Mapping[str, Rebind]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Copy:
    """Compute what `op` does a second time, for `reader` alone, which reads the copy's output at `slot`."""

    op: Op
    reader: Op
    slot: str


@dataclass(frozen=True, eq=False)
class Part:
    """One op of a `Graft`.

    `inputs`: slot → a tensor that is there, or the number of an earlier part. `constants` fill other slots;
    their names are wishes. `op_type` and `domain` name the spelling, where that is not the first of the row.
    """

    kind: str
    inputs: Mapping[str, Tensor | int]
    constants: Mapping[str, tuple[str, Value]] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    op_type: str = ""
    domain: str = ""


@dataclass(frozen=True, eq=False)
class Graft:
    """Compute something beside what is there, and let readers of `tensor` read the last part's output instead.

    `readers` None: all of them, outputs of the graph too; what nobody reads any more goes.
    """

    tensor: Tensor
    parts: tuple[Part, ...]
    readers: tuple[Read, ...] | None = None


Edit = Rebind | Splice | Replace | Insert | Copy | Graft


def consolidated(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """The same edits without the constants that a later one replaces or takes out.

    Folds follow each other on one op: a Conv may take in the BatchNorm behind it and the one before it.
    """
    kept: list[Edit] = []
    done: set[tuple[Any, str]] = set()
    #: op that is taken out → where `kept` says so
    gone: dict[Any, int] = {}
    #: op → the only slots that outlive its replacement
    outlive: dict[Any, set[str]] = {}
    for edit in reversed(list(edits)):
        match edit:
            case Rebind(op=op, slot=slot):
                lost = op.source in outlive and slot not in outlive[op.source]
                if op.source in gone or lost or (op.source, slot) in done:
                    continue
                done.add((op.source, slot))
            case Splice(op=op):
                gone[op.source] = len(kept)
            case Replace(op=op, keep=keep):
                if op.source in gone:  # as what it was before
                    splice = kept[gone[op.source]]
                    assert isinstance(splice, Splice)
                    kept[gone[op.source]] = Splice(op, keep[splice.slot])
                    continue
                later = {new: (op.source, old) for new, old in keep.items() if (op.source, new) in done}
                done -= {(op.source, slot) for slot in later}
                done |= set(later.values())
                outlive[op.source] = set(keep.values())
            case Insert():
                if edit in gone:
                    continue
            case Copy() | Graft():
                pass
        kept.append(edit)
    return tuple(reversed(kept))
