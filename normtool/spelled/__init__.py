"""Norms that are spelled out in primitive ops, in whatever order and words.

Every norm divides by a root, and roots are rare. From each, `moments` goes back to the x whose mean of squares
is under it; `spread` goes forward from x, its mean and the root through every op that makes something of
them, and keeps what that is as a formula. Where the formula is a norm's, the largest one is taken: γ, β
and the cast back are part of it. Nothing depends on the order of operands or on where γ comes in.
"""

from normtool.constants import Constants
from normtool.forms import NormForm
from normtool.graph import ModelGraph
from normtool.spelled.search import Search

__all__ = ["spelled_out"]


def spelled_out(graph: ModelGraph, constants: Constants) -> list[NormForm]:
    """Every norm of a graph that is no operator, in the order in which they end."""
    return Search(graph, constants).forms()
