"""Wrong swaps, made on purpose: an analysis that lies, edits that are lost, a proof that is silent."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from normtool import swapping
from normtool.centring import targets
from normtool.centring.facts import Fact, Facts, Solution, Source
from normtool.centring.places import Place
from normtool.centring.rows import Blocked
from normtool.centring.values import Centred
from normtool.edits import Edit, Part, Rebind
from normtool.graph import Tensor
from normtool.reasons import Reason
from normtool.rules import conv
from normtool.values import Array, Value

Patch = pytest.MonkeyPatch


def silence_the_proof(patch: Patch) -> None:
    """Nothing is evaluated, neither of what is swapped nor of γ and β that move."""
    prove, prove_fold = swapping.prove, swapping.prove_fold
    patch.setattr(swapping, "prove", lambda steps, edits, errors: prove([], edits, errors))
    patch.setattr(swapping, "prove_fold", lambda steps, edits: prove_fold([], edits))
    patch.setattr("normtool.planner.prove", lambda steps, edits: prove_fold([], edits))
    patch.setattr(swapping._Swapper, "_unshown", lambda self, fold: ())


def listen(patch: Patch) -> list[Reason]:
    """What the proof objects to: such a plan is made again, without what was refused."""
    heard: list[Reason] = []
    note = swapping._Against.note

    def noted(self: Any, swapper: Any, refused: Mapping[Any, tuple[Reason, ...]]) -> bool:
        heard.extend(reason for reasons in refused.values() for reason in reasons)
        return note(self, swapper, refused)

    patch.setattr(swapping._Against, "note", noted)
    return heard


def force(patch: Patch) -> None:
    """Nobody observes, what cannot be centred is taken to be, and nothing is proved."""
    source = Facts.source

    def obliging(self: Facts, fact: Fact) -> Source | Blocked:
        found = source(self, fact)
        return Source() if isinstance(found, Blocked) else found

    patch.setattr(Facts, "source", obliging)
    patch.setattr(Facts, "observer", lambda self, fact: None)
    patch.setattr(Facts, "_reached_norm", lambda self, fact, form: [])
    silence_the_proof(patch)


def lose_centre(patch: Patch, number: int) -> None:
    """The plan forgets one of its Centres."""
    solve = Facts.solve

    def forgetful(self: Facts, *arguments: Any, **options: Any) -> Solution:
        found = solve(self, *arguments, **options)
        return replace(found, centres=(*found.centres[:number], *found.centres[number + 1 :]))

    patch.setattr(Facts, "solve", forgetful)


def centre_in_place(patch: Patch) -> None:
    """A constant that takes the Centre in changes for everybody who reads it."""
    carry_out: Callable[..., None] = swapping._Swapper._carry_out

    def in_place(self: Any, edits: list[Edit]) -> None:
        edits += [
            other for edit in edits for other in _for_the_others(self.draft, edit)
        ]  # the fold has them too
        carry_out(self, edits)

    patch.setattr(swapping._Swapper, "_carry_out", in_place)


def _for_the_others(draft: Any, edit: Edit) -> list[Edit]:
    if not isinstance(edit, Rebind):
        return []
    readers = draft.readers(draft.input(edit.op, edit.slot))
    return [replace(edit, op=read.op, slot=read.slot) for read in readers if read.op is not edit.op]


def lose_writer(patch: Patch) -> None:
    """The plan forgets the first of its writers."""
    solve = Facts.solve

    def forgetful(self: Facts, *arguments: Any, **options: Any) -> Solution:
        found = solve(self, *arguments, **options)
        return replace(found, writers=found.writers[1:])

    patch.setattr(Facts, "solve", forgetful)


def centre_halves(patch: Patch) -> None:
    """Each half of a block loses its own mean."""

    def halved(source: Value, place: Place) -> Centred:
        return Centred(source, replace(place, outer=2 * place.outer, block=place.block // 2))

    patch.setattr(swapping, "Centred", halved)


def centre_another_axis(patch: Patch) -> None:
    """A Centre op takes the mean of the axis in front."""
    centre = targets.centre
    patch.setattr(targets, "centre", lambda x, place: centre(x, place.moved(-1)))


def change_epsilon(patch: Patch) -> None:
    rms_norm = targets.rms_norm

    def other(x: Tensor, axes: Any, rank: int, eps: float, *rest: Any) -> list[Part]:
        return rms_norm(x, axes, rank, eps + 0.1, *rest)

    patch.setattr(targets, "rms_norm", other)


def leave_rows_their_mean(patch: Patch) -> None:
    """What goes into a table is the RMSNorm of its rows."""

    def rms(gamma: Array, beta: Array, eps: float) -> Callable[[Array], Array]:
        return lambda x: np.asarray(x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * gamma + beta)

    patch.setattr(swapping, "normalising", rms)


def ignore_padding(patch: Patch) -> None:
    """A shift passes into a Conv that pads with zeros."""
    patch.setattr(conv, "pads", lambda constants, op: False)
