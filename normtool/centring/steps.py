"""What has to be shown of a swap: every op beside a tensor that changes, before and after."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from normtool.centring.facts import Fact, Facts, Solution
from normtool.centring.proof import OpStep, Relation
from normtool.constants import Constants
from normtool.draft import Draft
from normtool.forms import NormForm
from normtool.graph import GRAPH_OUTPUT, Op, Read, Tensor
from normtool.probes import Shapes
from normtool.proof import Form, form_of

Relations = dict[Tensor, dict[Relation, None]]


@dataclass(frozen=True, eq=False)
class Before:
    """The ops that a swap touches, as they are before its edits are carried out."""

    forms: Mapping[Op, Form]
    outputs: Mapping[Op, Mapping[str, Tensor]]
    relations: Relations
    #: readers that a Centre op will stand in front of
    centred_reads: Mapping[Read, Fact] = field(default_factory=dict)

    @classmethod
    def of(
        cls, draft: Draft, constants: Constants, facts: Facts, solution: Solution, norms: Iterable[NormForm]
    ) -> "Before":
        relations = _relations(draft, facts, solution)
        reads = {read: centre.fact for centre in solution.centres for read in centre.readers}
        inside = {op for form in norms for op in form.ops}
        changed = [tensor for tensor, found in relations.items() if any(each.kind != "held" for each in found)]
        ops = dict.fromkeys(op for tensor in changed for op in _beside(draft, tensor))
        ops |= dict.fromkeys(read.op for read in reads)
        ops = {op: None for op in ops if op not in inside and op.kind not in (GRAPH_OUTPUT, "shape", "size")}
        forms = {op: form_of(draft, constants, op) for op in ops}
        return cls(forms, {op: draft.outputs(op) for op in ops}, relations, reads)

    def after(self, draft: Draft, constants: Constants) -> dict[Op, OpStep]:
        """A step for each op, once the draft has seen the edits."""
        steps = {}
        for op, before in self.forms.items():
            current = draft.current(op)
            if current is None:
                continue
            entering = {slot: self._entering(op, slot, tensor) for slot, tensor in before.data.items()}
            leaving = {slot: self.leaving(tensor) for slot, tensor in self.outputs[op].items()}
            shapes = Shapes.of(draft.base, {*before.data.values(), *self.outputs[op].values()})
            after = form_of(draft, constants, current)
            steps[op] = OpStep(op, before, after, self.outputs[op], entering, leaving, shapes)
        return steps

    def leaving(self, tensor: Tensor) -> tuple[Relation, ...]:
        return tuple(self.relations.get(tensor, ()))

    def _entering(self, op: Op, slot: str, tensor: Tensor) -> tuple[Relation, ...]:
        fact = self.centred_reads.get(Read(op, slot))
        own = tuple(self.relations.get(tensor, ()))
        return own if fact is None else (*own, Relation(fact.place, "centred"))


def _beside(draft: Draft, tensor: Tensor) -> list[Op]:
    producer = draft.producer(tensor)
    return [*([] if producer is None else [producer]), *(read.op for read in draft.readers(tensor))]


def _relations(draft: Draft, facts: Facts, solution: Solution) -> Relations:
    """What becomes of every tensor: centred where that is needed, shifted where no more can be said."""
    relations: Relations = {}
    for fact in solution.centred:
        kind = "held" if fact in facts.held else "centred"
        relations.setdefault(fact.tensor, {})[Relation(fact.place, kind)] = None  # type: ignore[arg-type]
    pending = [fact for fact in solution.centred if fact not in facts.held]
    seen = set(solution.centred)
    while pending:
        for fact in facts.reached(pending.pop()):
            if fact not in seen:
                seen.add(fact)
                pending.append(fact)
                relations.setdefault(fact.tensor, {})[Relation(fact.place, "shifted")] = None
    return relations
