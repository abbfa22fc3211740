"""What has to be shown of a swap: every op beside a tensor that changes, before and after."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from normtool.centring.facts import Fact, Facts, Solution
from normtool.centring.proof import OpStep, Relation
from normtool.constants import Constants
from normtool.draft import Draft
from normtool.forms import NormForm
from normtool.graph import GRAPH_OUTPUT, Op, Tensor
from normtool.probes import Shapes
from normtool.proof import Form, form_of

Relations = dict[Tensor, dict[Relation, None]]


@dataclass(frozen=True, eq=False)
class Before:
    """The ops that a swap touches, as they are before its edits are carried out."""

    forms: Mapping[Op, Form]
    outputs: Mapping[Op, Mapping[str, Tensor]]
    relations: Relations

    @classmethod
    def of(
        cls, draft: Draft, constants: Constants, facts: Facts, solution: Solution, norms: Iterable[NormForm]
    ) -> "Before":
        relations = _relations(draft, facts, solution)
        inside = {op for form in norms for op in form.ops}
        changed = [tensor for tensor, found in relations.items() if any(each.kind != "held" for each in found)]
        ops = dict.fromkeys(op for tensor in changed for op in draft.beside(tensor))
        ops |= dict.fromkeys(read.op for centre in solution.centres for read in centre.readers)
        shown = [op for op in ops if op not in inside and op.kind not in (GRAPH_OUTPUT, "shape", "size")]
        ops = {op: None for op in shown if facts.is_looked_at(draft.outputs(op).values())}
        forms = {op: form_of(draft, constants, op) for op in ops}
        return cls(forms, {op: draft.outputs(op) for op in ops}, relations)

    def after(self, draft: Draft, constants: Constants, centres: Mapping[Tensor, Fact]) -> dict[Op, OpStep]:
        """A step for each op, once the draft has seen the edits. `centres`: what the Centre ops put out."""
        steps = {}
        for op, before in self.forms.items():
            current = draft.current(op)
            if current is None:
                continue
            now = draft.inputs(current)
            entering = {
                slot: self.entering(tensor, centres.get(now[slot])) for slot, tensor in before.data.items()
            }
            leaving = {slot: self.leaving(tensor) for slot, tensor in self.outputs[op].items()}
            shapes = Shapes.of(draft.base, {*before.data.values(), *self.outputs[op].values()})
            after = form_of(draft, constants, current)
            steps[op] = OpStep(op, before, after, self.outputs[op], entering, leaving, shapes)
        return steps

    def leaving(self, tensor: Tensor) -> tuple[Relation, ...]:
        return tuple(self.relations.get(tensor, ()))

    def entering(self, tensor: Tensor, centre: Fact | None) -> tuple[Relation, ...]:
        """The relation of what is read where `tensor` was read, or of that behind a Centre op."""
        own = self.leaving(tensor)
        return own if centre is None else (*own, Relation(centre.place, "centred"))


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
