"""Which tensors have to be centred, which may be, and where a Centre op has to help out.

A *fact* is a place on a tensor. A LayerNorm may become an RMSNorm where what it reads is centred. That follows
from facts about the operands of whatever wrote it, and so on back to constants that take the Centre in
(`rows.behind`). Two things end this early: a writer that cannot be centred, and an *observer*, somebody who
would see that a tensor has lost its mean (`rows.ahead`). There a Centre op can stand between the tensor and
those who need it centred, while all others go on reading the tensor as it was.

Which norms to swap, and where to put Centres, is then one minimum cut. Facts are edges of capacity `CENTRE`,
flow enters where a fact fails, and leaves at each norm through an edge of capacity `NORM`: what the cut goes
through is either a Centre that is put in or a norm that is given up. (Picard, "Maximal closure of a graph",
1976: project selection.)
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import networkx as nx

from normtool.centring.places import Place, whole
from normtool.centring.rows import Blocked, ahead, behind, looks_at_numbers
from normtool.centring.values import is_uniform
from normtool.constants import Constants
from normtool.forms import NormForm
from normtool.graph import GRAPH_OUTPUT, ModelGraph, Op, Read, Tensor
from normtool.reasons import Reason
from normtool.values import byte_count

#: What is lost with a norm that is kept, and what a Centre costs. A LayerNorm takes about 35 µs where an
#: RMSNorm takes 20 and a Centre 16 (1×128×768, one core), so a Centre has to serve two norms. Ties: swap.
NORM, CENTRE = 100, 199

#: In mode `centre` a norm is worth any number of Centres, but none that cannot be put in.
AT_ANY_PRICE, NEVER = 10**9, 10**12

#: A second copy of a table costs as much as a Centre for every 5 % that it adds to the model.
COPY_SHARE = 0.05


@dataclass(frozen=True)
class Fact:
    """A place on a tensor."""

    tensor: Tensor
    place: Place


@dataclass(frozen=True, eq=False)
class Writer:
    """A constant that takes the Centre in. `place` None: it is uniform over the block, and becomes 0."""

    op: Op
    slot: str
    place: Place | None
    #: what a copy would add, where others read the same constant
    copied_bytes: int = 0

    def without_copy(self, alike: Collection[Read]) -> "Writer":
        """The same, where all who read the constant want it so."""
        return replace(self, copied_bytes=0) if Read(self.op, self.slot) in alike else self


@dataclass(frozen=True, eq=False)
class Source:
    """What is behind a fact: it holds if `writers` take the Centre in and all of `facts` hold."""

    writers: tuple[Writer, ...] = ()
    facts: tuple[tuple[Read, Fact], ...] = ()


@dataclass(frozen=True, eq=False)
class Centre:
    """A Centre op behind a tensor, for these readers."""

    fact: Fact
    readers: tuple[Read, ...]


@dataclass(frozen=True, eq=False)
class Centring:
    """How one norm's input comes to be centred."""

    fact: Fact
    writers: tuple[Writer, ...]
    centres: tuple[Fact, ...]
    #: facts on the way, the norm's own first
    path: tuple[Fact, ...]
    #: it does not: the mean is left out all the same, and the norm no longer computes what it did
    dropped: bool = False

    def without_copies(self, alike: Collection[Read]) -> "Centring":
        return replace(self, writers=tuple(writer.without_copy(alike) for writer in self.writers))


@dataclass(frozen=True, eq=False)
class Solution:
    """`swapped` and `kept` have all norms between them."""

    swapped: Mapping[NormForm, Centring]
    kept: Mapping[NormForm, tuple[Reason, ...]]
    centres: tuple[Centre, ...]
    writers: tuple[Writer, ...]
    #: facts that hold in the end without a Centre of their own
    centred: tuple[Fact, ...] = ()

    def renamed(self, names: Mapping[NormForm, NormForm]) -> "Solution":
        """The same of norms by other names."""
        swapped = {names[form]: how for form, how in self.swapped.items()}
        return replace(self, swapped=swapped, kept={names[form]: why for form, why in self.kept.items()})


class Facts:
    """The analysis of one state of a graph. Nothing is computed before somebody asks, and nothing twice.

    `refused` and `no_centre`: why a constant cannot be changed, or a Centre not be put behind a tensor (a
    format says so). `dropped`: norms that will not take a mean away, so that what they put out has one.
    """

    def __init__(
        self,
        constants: Constants,
        forms: Iterable[NormForm],
        refused: Callable[[Op, str], Reason | None] = lambda op, slot: None,
        no_centre: Callable[[Tensor], Reason | None] = lambda tensor: None,
        model_bytes: int = 0,
        dropped: Collection[NormForm] = (),
    ) -> None:
        self.constants = constants
        self.graph: ModelGraph = constants.graph
        self.refused = refused
        self.no_centre = no_centre
        self.model_bytes = model_bytes
        self.dropped = frozenset(dropped)
        self._norm_at = {op: form for form in forms for op in form.ops}
        self._norm_of = {form.y: form for form in forms}
        self._observers: dict[Fact, Reason | None] = {}
        self._sources: dict[Fact, Source | Blocked] = {}
        #: facts that hold in the model as it is
        self.held: set[Fact] = set()

    def wanted(self, form: NormForm) -> Fact | Reason:
        """The fact a norm needs to become an RMSNorm."""
        place = whole(form.x, form.axes)
        if place is None:
            return Reason("axis_unknown", f"the normalised axes of {form.x.name!r} are unknown", form.x.name)
        return Fact(form.x, place)

    # ---- who sees the mean ----------------------------------------------------------------------------

    def observer(self, fact: Fact) -> Reason | None:
        """Somebody who would see a shift of this tensor, uniform over its blocks; None if nobody would."""
        stack = [fact]
        while stack:
            current = stack[-1]
            if current in self._observers:
                stack.pop()
                continue
            found, pending = self._look_ahead(current)
            if found is None and pending:
                stack += pending
                continue
            self._observers[current] = found
            stack.pop()
        return self._observers[fact]

    def reached(self, fact: Fact) -> list[Fact]:
        """What else is shifted where this is."""
        found = (self._reached(fact, read) for read in self.graph.readers(fact.tensor))
        return [each for facts in found if not isinstance(facts, Reason) for each in facts]

    def _look_ahead(self, fact: Fact) -> tuple[Reason | None, list[Fact]]:
        """An observer among the readers, or those facts that have to be looked at first."""
        pending = []
        for read in self.graph.readers(fact.tensor):
            reached = self._reached(fact, read)
            if isinstance(reached, Reason):
                return reached, []
            for each in reached:
                if each not in self._observers:
                    pending.append(each)
                elif (seen := self._observers[each]) is not None:
                    return seen, []
        return None, pending

    def _reached(self, fact: Fact, read: Read) -> list[Fact] | Reason:
        """What else is shifted through this reader."""
        op, name = read.op, fact.tensor.name
        if op.kind == GRAPH_OUTPUT:
            return Reason("observed_mean", f"{name!r} is an output", name)
        if op.scope != fact.tensor.scope:
            return Reason("captured", f"{name!r} is read from inside a body, at {op.name!r}", name)
        form = self._norm_at.get(op)
        if form is not None and form.x is fact.tensor and form.kind == "layer_norm":
            return self._reached_norm(fact, form)
        shifted, outputs = ahead(self.constants, op, read.slot, fact.place), self.graph.outputs(op)
        if isinstance(shifted, Blocked):
            return shifted.reason if self.is_looked_at(outputs.values()) else []
        return [Fact(outputs[slot], place) for slot, place in shifted.items() if place is not None]

    def is_looked_at(self, tensors: Iterable[Tensor]) -> bool:
        """Does anybody read their numbers, and not only their shape?"""
        return any(looks_at_numbers(read) for tensor in tensors for read in self.graph.readers(tensor))

    def _reached_norm(self, fact: Fact, form: NormForm) -> list[Fact] | Reason:
        """A LayerNorm over the same block does not see its mean, unless the mean itself is read."""
        if form.observed:
            name = form.observed[0].name
            return Reason("observed_mean", f"{name!r}, inside the norm {form.y.name!r}, is read", name)
        if self.wanted(form) == fact:
            return []
        message = f"the norm {form.y.name!r} is over other axes"
        return Reason("observed_mean", message, form.y.name)

    # ---- what can be centred --------------------------------------------------------------------------

    def source(self, fact: Fact) -> Source | Blocked:
        """What the fact follows from."""
        if fact not in self._sources:
            self._sources[fact] = self._look_behind(fact)
        return self._sources[fact]

    def _look_behind(self, fact: Fact) -> Source | Blocked:
        op = self.graph.producer(fact.tensor)
        if op is None:
            name = fact.tensor.name
            return Blocked(Reason("not_centrable", f"{name!r} is a model input", name))
        if fact.tensor in self._norm_of:
            return self._normalised(fact, self._norm_of[fact.tensor])
        slot = next(slot for slot, tensor in self.graph.outputs(op).items() if tensor is fact.tensor)
        places = behind(self.constants, op, slot, fact.place)
        return places if isinstance(places, Blocked) else self._from_operands(op, places)

    def _normalised(self, fact: Fact, form: NormForm) -> Source | Blocked:
        """What a LayerNorm puts out has the mean of β, if γ is one number all over."""
        if form in self.dropped:
            message = f"the norm {form.y.name!r} no longer takes the mean away"
            return Blocked(Reason("not_centrable", message, form.y.name))
        if form.kind == "layer_norm" and self.wanted(form) == Fact(form.x, fact.place):
            gamma = self.constants.value(form.weight) if form.weight is not None else None
            if gamma is None or (not isinstance(gamma, Reason) and is_uniform(gamma)):
                return self._bias_of(form)
        message = f"the norm {form.y.name!r} scales every number of the block by another γ"
        if form.kind != "layer_norm":
            message = f"what the norm {form.y.name!r} puts out is not centred"
        return Blocked(Reason("not_centrable", message, form.y.name))

    def _bias_of(self, form: NormForm) -> Source | Blocked:
        if form.bias is None:
            return Source()
        for op in form.ops:
            for slot, tensor in self.graph.inputs(op).items():
                if tensor is form.bias and tensor.shape is not None:
                    axes = range(-len(tensor.shape), 0)
                    return self._from_operands(op, {slot: whole(tensor, axes)})
        return Blocked(Reason("not_centrable", f"β of {form.y.name!r} is not found", form.y.name))

    def _from_operands(self, op: Op, places: Mapping[str, Place | None]) -> Source | Blocked:
        writers, facts = [], []
        for slot, place in sorted(places.items()):
            tensor = self.graph.input(op, slot)
            if tensor is None:
                continue
            value = self.constants.value(tensor)
            if not isinstance(value, Reason):
                if (refusal := self.refused(op, slot)) is not None:
                    return Blocked(refusal)
                writers.append(Writer(op, slot, place, self._copied(tensor, op, slot)))
            elif value.code in ("overridable", "quantised"):
                return Blocked(value)
            elif place is None:
                message = f"{tensor.name!r} adds one number to a whole block, and is computed"
                return Blocked(Reason("not_centrable", message, tensor.name))
            else:
                facts.append((Read(op, slot), Fact(tensor, place)))
        return Source(tuple(writers), tuple(facts))

    def _copied(self, tensor: Tensor, op: Op, slot: str) -> int:
        """Bytes that a changed copy adds, because somebody else reads the constant as it is."""
        alone = all(read.op is op and read.slot == slot for read in self.graph.readers(tensor))
        return 0 if alone or tensor.value is None else byte_count(tensor.value)

    # ---- the cut --------------------------------------------------------------------------------------

    def solve(self, norms: Mapping[NormForm, Fact], at_any_price: bool = False) -> Solution:
        """Which norms to swap, with which writers and Centres.

        `at_any_price`: all of them, with as many Centres as it takes.
        """
        if not norms:
            return Solution({}, {}, (), ())
        known = self._closure(norms.values())
        failing = self._failing(known)
        kept, cut = self._cut(norms, known, failing, at_any_price)
        swapped, used = {}, _Used()
        for form, fact in norms.items():
            if form not in kept:
                swapped[form] = self._follow(form, fact, cut, used)
        reasons = {form: self._against(norms[form], failing, cut) for form in kept}
        centres = tuple(Centre(fact, tuple(readers)) for fact, readers in used.centres.items())
        alike = self._alike(used.writers.values())
        swapped = {form: how.without_copies(alike) for form, how in swapped.items()}
        writers = tuple(writer.without_copy(alike) for writer in used.writers.values())
        return Solution(swapped, reasons, centres, writers, tuple(used.facts))

    def _closure(self, wanted: Iterable[Fact]) -> list[Fact]:
        """Every fact that the wanted ones follow from, each after those it follows from."""
        order: dict[Fact, None] = {}
        stack = [(fact, False) for fact in wanted]
        while stack:
            fact, expanded = stack.pop()
            if fact in order:
                continue
            source = self.source(fact)
            if expanded or isinstance(source, Blocked) or not source.facts:
                order[fact] = None
                continue
            stack.append((fact, True))
            stack += [(each, False) for _, each in source.facts]
        return list(order)

    def _failing(self, known: Sequence[Fact]) -> dict[Fact, Reason]:
        """Facts that do not follow from anything, with the reason. What holds as it is may well be observed."""
        failing: dict[Fact, Reason] = {}
        for fact in known:
            source = self.source(fact)
            if isinstance(source, Blocked):
                failing[fact] = source.reason
            elif not source.writers and all(each in self.held for _, each in source.facts):
                self.held.add(fact)
            elif (observer := self.observer(fact)) is not None:
                failing[fact] = observer
        return failing

    def _cut(
        self,
        norms: Mapping[NormForm, Fact],
        known: Sequence[Fact],
        failing: Mapping[Fact, Reason],
        at_any_price: bool,
    ) -> tuple[set[NormForm], set[Fact]]:
        """(norms that are given up, facts that get a Centre)."""
        sources = [self.source(fact) for fact in known if fact not in failing]
        alike = self._alike(w for source in sources if isinstance(source, Source) for w in source.writers)
        copies = {fact: price for fact in known if (price := self._price_of_copy(fact, alike))}
        if not failing and not copies:
            return set(), set()
        flow: nx.DiGraph[object] = nx.DiGraph()
        number = {fact: i for i, fact in enumerate(known)}
        for fact in known:
            i = number[fact]
            possible = fact.place.outer == fact.place.inner == 1 and self.no_centre(fact.tensor) is None
            flow.add_edge((i, "in"), (i, "out"), capacity=CENTRE if possible else NEVER)
            source = self.source(fact)
            if fact in failing:
                flow.add_edge("fails", (i, "in"))
                continue
            if fact in copies:
                flow.add_edge("fails", (i, "in"), capacity=copies[fact])
            for _, each in source.facts if isinstance(source, Source) else ():
                flow.add_edge((number[each], "out"), (i, "in"))
        for form, fact in norms.items():
            flow.add_edge((number[fact], "out"), form)
            flow.add_edge(form, "norms", capacity=AT_ANY_PRICE if at_any_price else NORM)
        _, (reached, _) = nx.minimum_cut(flow, "fails", "norms")
        kept = {form for form in norms if form in reached}
        return kept, {f for f, i in number.items() if (i, "in") in reached and (i, "out") not in reached}

    def scaled(self) -> list[Op]:
        """Constant scales within a block that stand between a wanted fact and its writers (LayerScale)."""
        found = (fact.tensor for fact, source in self._sources.items() if _is_scaled(source))
        return list(dict.fromkeys(op for tensor in found if (op := self.graph.producer(tensor)) is not None))

    def _alike(self, writers: Iterable[Writer]) -> frozenset[Read]:
        """Reads of constants that change for all who read them, and in the same way: no copy is needed."""
        taken: dict[tuple[Tensor, Place | None], set[Read]] = {}
        for writer in writers:
            tensor = self.graph.input(writer.op, writer.slot)
            assert tensor is not None
            taken.setdefault((tensor, writer.place), set()).add(Read(writer.op, writer.slot))
        whole = (reads for (tensor, _), reads in taken.items() if reads.issuperset(self.graph.readers(tensor)))
        return frozenset(read for reads in whole for read in reads)

    def _price_of_copy(self, fact: Fact, alike: frozenset[Read]) -> int:
        source = self.source(fact)
        writers = source.writers if isinstance(source, Source) else ()
        added = sum(writer.without_copy(alike).copied_bytes for writer in writers)
        return int(CENTRE * added / (COPY_SHARE * self.model_bytes)) if self.model_bytes else 0

    # ---- what was decided -----------------------------------------------------------------------------

    def _follow(self, form: NormForm, wanted: Fact, cut: set[Fact], used: "_Used") -> Centring:
        """Back from one norm to the writers and Centres that serve it."""
        reads = [read for read in self.graph.readers(form.x) if read.op in form.ops]
        stack = [(read, wanted) for read in reads]
        path: dict[Fact, None] = {}
        writers: dict[Writer, None] = {}
        centres: dict[Fact, None] = {}
        seen: set[tuple[Read, Fact]] = set()
        while stack:
            read, fact = stack.pop()
            if (read, fact) in seen:
                continue
            seen.add((read, fact))
            path[fact] = None
            if fact in cut:
                centres[fact] = None
                used.centres.setdefault(fact, {})[read] = None
                continue
            source = self.source(fact)
            assert isinstance(source, Source)
            used.facts[fact] = None
            for writer in source.writers:
                used.writers[writer.op, writer.slot, writer.place] = writer
                writers[writer] = None
            stack += source.facts
        return Centring(wanted, tuple(writers), tuple(centres), tuple(path))

    def _against(self, wanted: Fact, failing: Mapping[Fact, Reason], cut: set[Fact]) -> tuple[Reason, ...]:
        """What stands behind a norm that is kept."""
        stack, seen, found = [wanted], set(), []
        while stack:
            fact = stack.pop()
            if fact in seen or fact in cut:
                continue
            seen.add(fact)
            if fact in failing:
                found.append(failing[fact])
            if (refused := self.no_centre(fact.tensor)) is not None:
                found.append(refused)
            if fact in failing:
                continue
            source = self.source(fact)
            if isinstance(source, Source):
                found += self._copies(source)
                stack += [each for _, each in source.facts]
        message = "a Centre op would cost more than the swap gains"
        return (*dict.fromkeys(found), Reason("no_centre_gain", message, wanted.tensor.name))

    def _copies(self, source: Source) -> Iterator[Reason]:
        """Constants that would have to be stored twice."""
        for writer in source.writers:
            tensor, added = self.graph.input(writer.op, writer.slot), writer.copied_bytes
            if added and tensor is not None:
                message = f"{tensor.name!r} is read elsewhere too, and a copy would add {added:,} bytes"
                yield Reason("shared_parameter", message, tensor.name)


def _is_scaled(source: Source | Blocked) -> bool:
    return isinstance(source, Blocked) and source.reason.code == "scaled"


@dataclass
class _Used:
    """What all swapped norms need between them."""

    facts: dict[Fact, None] = field(default_factory=dict)
    writers: dict[tuple[Op, str, Place | None], Writer] = field(default_factory=dict)
    centres: dict[Fact, dict[Read, None]] = field(default_factory=dict)
