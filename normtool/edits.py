"""What a plan may do to a model. Rules make edits; only format writers carry them out.

`Insert` (an op that was not there) is the fourth edit of DESIGN §3 and comes with the first rule that needs it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from normtool.graph import Op
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


Edit = Rebind | Splice | Replace
