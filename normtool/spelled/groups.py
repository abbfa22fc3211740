"""GroupNorm: a norm between two reshapes, with γ and β per channel behind the second."""

from normtool.forms import NormForm
from normtool.graph import Op
from normtool.spelled.reading import Reading


def regrouped(reading: Reading, op: Op) -> NormForm | None:
    """Reshape → InstanceNormalization → Reshape → Mul → Add, as torch exports GroupNorm."""
    return None
