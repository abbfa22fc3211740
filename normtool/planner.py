"""The plan: one site per norm, each with a verdict, its reasons, and the fold it takes part in.

Planning is backward dataflow. From the last affine op of a chain (BatchNorm, constant Mul, Add, …) the
composed map walks toward its producer; every tensor on the way must have this one reader, and every op must
pass or absorb the map. A fold is committed only when the walk ends in an absorber *and* its proof holds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from normtool.affine import Affine
from normtool.constants import Constants
from normtool.detect import find_norms
from normtool.edits import Edit, Rebind, Replace, Splice
from normtool.graph import GRAPH_OUTPUT, ModelGraph, Op, Tensor
from normtool.norms import Norm
from normtool.proof import Proof, prove
from normtool.reasons import FOLDED, KEPT, Reason
from normtool.rules import backward_rules
from normtool.rules.batch_norm import inference_affine
from normtool.rules.elementwise import constant_map
from normtool.travel import Absorb, Pass, Stop
from normtool.values import EXTENDED, Array, Rounded

#: Below this the operators themselves meant something else (broadcast attributes, training by default).
OLDEST_OPSET = 7

#: Ops that are affine maps themselves when one operand is constant.
ELEMENTWISE = frozenset(["add", "sub", "mul", "div"])

#: Ops an affine map cannot pass backward, told apart from ops that merely lack a rule.
NONLINEAR = frozenset(
    [
        "relu",
        "leaky_relu",
        "prelu",
        "clip",
        "sigmoid",
        "tanh",
        "gelu",
        "hard_sigmoid",
        "hard_swish",
        "silu",
        "mish",
        "elu",
        "softplus",
        "erf",
        "softmax",
        "max_pool",
        "pow",
        "sqrt",
        "layer_norm",
        "rms_norm",
        "instance_norm",
        "group_norm",
        "local_response_norm",
        "lp_norm",
        "mean_variance_norm",
    ]
)


@dataclass(frozen=True, eq=False)
class Fold:
    """`path` in dataflow order: the absorber, then the affine ops whose map it takes in."""

    path: tuple[Op, ...]
    edits: tuple[Edit, ...]
    proof: Proof

    @property
    def absorber(self) -> Op:
        return self.path[0]

    @property
    def into(self) -> tuple[str, ...]:
        replaced = [edit.op.name for edit in self.edits if not isinstance(edit, Splice)]
        return tuple(dict.fromkeys(replaced))


@dataclass(frozen=True, eq=False)
class Site:
    """What becomes of one norm, and why."""

    norm: Norm
    verdict: str
    reasons: tuple[Reason, ...] = ()
    fold: Fold | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.norm.name,
            "kind": self.norm.kind,
            "verdict": self.verdict,
            "into": list(self.fold.into) if self.fold else [],
            "reasons": [reason.to_dict() for reason in self.reasons],
            "proof": self.fold.proof.to_dict() if self.fold else None,
        }


@dataclass(frozen=True, eq=False)
class Plan:
    """A value: printable, serialisable. `fingerprint` names the model state it was made for."""

    sites: tuple[Site, ...]
    folds: tuple[Fold, ...]
    fingerprint: str
    freeze: bool = False

    @property
    def edits(self) -> tuple[Edit, ...]:
        return tuple(edit for fold in self.folds for edit in fold.edits)

    def to_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "sites": [site.to_dict() for site in self.sites]}

    def __str__(self) -> str:
        from normtool.report.table import to_text

        return to_text(self)


#: Called with (chains done, chains in all) while planning goes on.
Progress = Callable[[int, int], None]

#: The ops of a fold, absorber first.
Path = tuple[Op, ...]

#: Looks at all folds together and objects to those that a format cannot carry out: path → reasons.
Review = Callable[[Sequence[Fold]], Mapping[Path, tuple[Reason, ...]]]


def plan_fold(
    graph: ModelGraph,
    fingerprint: str = "",
    freeze: bool = False,
    progress: Progress = lambda done, total: None,
    review: Review = lambda folds: {},
) -> Plan:
    """Decide for every norm of `graph` whether it is folded, and prove each fold.

    A model file takes any edit. A PyTorch module does not: its code calls what it calls. `review` says which
    folds cannot be carried out there; they are taken back, which may cost others their reason to be, so
    it is asked again until it has nothing against the plan.
    """
    planner = _Planner(Constants(graph, freeze))
    while True:
        made = planner.plan(fingerprint, freeze, progress)
        objections = {path: why for path, why in review(made.folds).items() if path not in planner.forbidden}
        if not objections:
            return made
        planner.forbidden.update(objections)


#: The map that changes nothing.
_UNIT = Affine(1, np.ones(1, EXTENDED), np.zeros(1, EXTENDED))


@dataclass(eq=False)
class _Walk:
    """A chain being followed backward. `path` grows toward the absorber."""

    affine: Affine | None
    path: list[Op] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)


class _Planner:
    def __init__(self, constants: Constants) -> None:
        self.constants = constants
        self.graph = constants.graph
        self.rules = backward_rules()
        self.folds: list[Fold] = []
        self.folded: dict[Op, Fold] = {}
        self.forbidden: dict[Path, tuple[Reason, ...]] = {}
        #: folds proved so far, and those that failed; planning again proves nothing twice
        self.proved: dict[Path, Fold | tuple[Reason, ...]] = {}

    def plan(self, fingerprint: str, freeze: bool, progress: Progress) -> Plan:
        self.folds, self.folded = [], {}
        norms = find_norms(self.graph, self.constants)
        order = {op: i for i, op in enumerate(self.graph.sorted_ops())}
        sites: dict[Norm, Site] = {}
        # last first: of BatchNorm → BatchNorm the second takes the first along
        for done, norm in enumerate(sorted(norms, key=lambda n: -order[n.op] if n.op else 0)):
            sites[norm] = self._site(norm)
            progress(done + 1, len(norms))
        return Plan(tuple(sites[norm] for norm in norms), tuple(self.folds), fingerprint, freeze)

    def _site(self, norm: Norm) -> Site:
        if norm.op in self.folded:
            return Site(norm, FOLDED, fold=self.folded[norm.op])
        if norm.op is None or norm.kind != "batch_norm":
            return Site(norm, KEPT, (self._unfoldable(norm),))
        if "y" not in self.graph.outputs(norm.op):
            return Site(norm, KEPT, (Reason("malformed", "it has no output", norm.name),))
        reasons: tuple[Reason, ...] = ()
        for last in self._chain_ends(norm.op):
            outcome = self._fold(last)
            if isinstance(outcome, Fold):
                self.folds.append(outcome)
                self.folded.update(dict.fromkeys(outcome.path[1:], outcome))
                return Site(norm, FOLDED, fold=outcome)
            reasons = outcome
        return Site(norm, KEPT, reasons)

    def _unfoldable(self, norm: Norm) -> Reason:
        """Why a norm that is no BatchNorm op cannot even be looked at."""
        if norm.op is not None and norm.op.attributes.get("use_input_stats") is False:
            message = "an InstanceNorm with stored statistics is affine, but no rule folds it yet"
            return Reason("unsupported_op", message, norm.name)
        if norm.kind != "batch_norm":
            message = "its statistics are computed from the input at run time"
            return Reason("data_dependent", message, norm.name)
        if self.graph.no_dataflow:
            return Reason("no_dataflow", self.graph.no_dataflow, norm.name)
        if norm.calls == 0:
            return Reason("not_called", "the model never calls it", norm.name)
        return Reason("unsupported_op", f"{norm.spelling} is spelled out in primitive ops", norm.name)

    def _chain_ends(self, op: Op) -> Iterator[Op]:
        """The last of the constant Mul/Add ops that follow, then the norm itself."""
        last = op
        while (follower := self._constant_follower(last)) is not None:
            last = follower
        if last is not op:
            yield last
        yield op

    def _constant_follower(self, op: Op) -> Op | None:
        """The only reader of `op`, if it is a constant affine op on the channel axis."""
        readers = self.graph.readers(self.graph.output(op))
        if len(readers) != 1:
            return None
        follower = readers[0].op
        if follower.kind not in ELEMENTWISE or follower.scope != op.scope:
            return None
        answer = constant_map(self.constants, follower, axis=1)
        return follower if isinstance(answer, Pass) and answer.slot == readers[0].slot else None

    def _fold(self, last: Op) -> Fold | tuple[Reason, ...]:
        """The fold of the chain that ends in `last`, or every reason why there is none."""
        try:
            return self._follow(last)
        except (ArithmeticError, LookupError, TypeError, ValueError, MemoryError) as error:
            # attributes and operands that contradict each other; what cannot be evaluated is not proved
            message = f"it cannot be evaluated: {(str(error).splitlines() or [''])[0]}"
            return (Reason("malformed", message, last.name),)

    def _follow(self, last: Op) -> Fold | tuple[Reason, ...]:
        """Walk backward from `last` to an absorber."""
        if last.domain == "" and last.version < OLDEST_OPSET:
            message = f"opset {last.version} is older than {OLDEST_OPSET}"
            return (Reason("unsupported_op", message, last.name),)
        walk = _Walk(None)
        op = last
        while True:
            answer = self._meet(op, walk.affine)
            if isinstance(answer, Stop):
                return (*answer.reasons, *self._reasons_behind(op, walk))
            walk.path.append(op)
            if isinstance(answer, Absorb):
                return self._commit(walk, answer)
            walk.affine = walk.affine.after(answer.inner) if walk.affine else answer.inner
            walk.edits.append(Splice(op, answer.slot))
            step = self._step_back(op, answer.slot, walk.affine)
            if isinstance(step, Stop):
                return step.reasons
            op = step

    def _meet(self, op: Op, affine: Affine | None) -> Absorb | Pass | Stop:
        """What `op` does with the map; None at the start of a chain, whose op is its own first map."""
        unknown = [name for name, value in op.attributes.items() if value is None]
        if unknown:
            message = f"attribute {unknown[0]!r} is set by the caller of its function"
            return Stop((Reason("dynamic_weight", message, op.name),))
        if affine is None and op.kind == "batch_norm":
            first = inference_affine(self.constants, op)
            return first if isinstance(first, Stop) else Pass(first, "x")
        if affine is None and op.kind in ELEMENTWISE:
            return constant_map(self.constants, op, axis=1)
        if affine is None:
            message = f"{op.spelling} is no affine map that is known here"
            return Stop((Reason("unsupported_op", message, op.name),))
        rule = self.rules.get(op.kind)
        if rule is None:
            code = "nonlinear" if op.kind in NONLINEAR else "unsupported_op"
            message = f"{op.spelling} stands in front of it"
            return Stop((Reason(code, message, op.name),))
        return rule.meet(self.constants, op, affine)

    def _step_back(self, op: Op, slot: str, affine: Affine) -> Op | Stop:
        """The producer of what enters `op` at `slot`, if nobody else sees that tensor."""
        tensor = self.graph.input(op, slot)
        producer = self.graph.producer(tensor) if tensor is not None else None
        if tensor is None or producer is None:
            message = f"{op.name!r} reads a model input or a constant"
            return Stop((Reason("no_producer", message, op.name),))
        observers = _observers(self.graph, tensor, op, slot)
        if not observers:
            return producer
        # a user who removes the other reader would meet the producer's reasons next
        answer = self._meet(producer, affine)
        return Stop((*observers, *(answer.reasons if isinstance(answer, Stop) else ())))

    def _reasons_behind(self, op: Op, walk: _Walk) -> tuple[Reason, ...]:
        """If a norm is itself no affine map: what would stop it one step further on, were it one."""
        if walk.path or op.kind != "batch_norm":
            return ()
        step = self._step_back(op, "x", _UNIT)
        answer = step if isinstance(step, Stop) else self._meet(step, _UNIT)
        return answer.reasons if isinstance(answer, Stop) else ()

    def _commit(self, walk: _Walk, answer: Absorb) -> Fold | tuple[Reason, ...]:
        edits = [*answer.edits, *walk.edits]
        if answer.leftover is not None:
            edits = _place_shift(self.constants, walk, edits, answer.leftover)
        path = tuple(reversed(walk.path))
        if path in self.forbidden:
            return self.forbidden[path]
        if path not in self.proved:
            proof = prove(self.constants, path, tuple(edits))
            self.proved[path] = proof.failures or Fold(path, tuple(edits), proof)
        return self.proved[path]


def _observers(graph: ModelGraph, tensor: Tensor, op: Op, slot: str) -> list[Reason]:
    """Everyone but `op` at `slot` who would see the tensor change."""
    reasons = []
    producer = graph.producer(tensor)
    if producer is not None and producer.scope != op.scope:
        message = f"{tensor.name!r} is captured from outside the body of {op.name!r}"
        reasons.append(Reason("captured", message, tensor.name))
    for read in graph.readers(tensor):
        if read.op is op and read.slot == slot:
            continue
        if read.op.kind == GRAPH_OUTPUT or ("." in read.slot and read.op.scope != tensor.scope):
            code, message = "graph_output", f"{tensor.name!r} is a graph output"
        elif read.op.scope != tensor.scope:
            code, message = "captured", f"{tensor.name!r} is captured by {read.op.name!r}"
        else:
            code, message = "multiple_readers", f"{tensor.name!r} is also read by {read.op.name!r}"
        reasons.append(Reason(code, message, tensor.name))
    return reasons


def _place_shift(constants: Constants, walk: _Walk, edits: list[Edit], shift: Array) -> list[Edit]:
    """Let one op of the chain add the shift that the absorber has no place for.

    An Add that is there anyway gets a new constant; else the last op of the chain becomes one.
    """
    absorber = walk.path[-1]
    weight = next(edit for edit in edits if isinstance(edit, Rebind))
    rank = constants.graph.rank(constants.graph.output(absorber)) or 2
    trailing = rank - 1 - (walk.affine.axis if walk.affine else rank - 1)
    constant = Rounded(shift.reshape(-1, *[1] * trailing), weight.value.dtype)
    adder = next((op for op in reversed(walk.path[:-1]) if op.kind == "add"), walk.path[0])
    slot = next(edit.slot for edit in edits if isinstance(edit, Splice) and edit.op is adder)
    rebind = Rebind(adder, "b" if slot in ("x", "a") else "a", constant, f"{absorber.name}.bias")
    kept = [edit for edit in edits if not (isinstance(edit, Splice) and edit.op is adder)]
    if adder.kind == "add":
        return [*kept, rebind]
    return [*kept, Replace(adder, "add", {"a": slot}, constants={"b": rebind})]
