"""Shapes that the format's own inference gave up on, filled in where they are certain.

Older exporters compute the shape of a Reshape when the model runs (Shape → Gather → Mul → Concat), and from
there on onnx knows not even how many axes anything has. One pass in dataflow order deduces lengths (`lengths`)
op by op (`shape_rules`), and what small integer tensors hold (`shape_values`) with them; a second one follows
where the first has learnt from a product or a reshape how long what lies behind it must be. Nothing is guessed:
what does not follow gets a symbol that occurs nowhere else, and ops whose operands do not fit put out anything.
Lengths hold for every run in which no axis is empty.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set

from normtool.constants import COMPUTABLE, Constants
from normtool.elements import listed
from normtool.graph import GRAPH_OUTPUT, ModelGraph, Op, Role, Scope, Shape, Tensor
from normtool.lengths import (
    ONNX_UNNAMED,
    Length,
    Lengths,
    crossed_out,
    is_unnamed,
    product,
    read,
    settled,
    solved,
    unnamed,
    written,
)
from normtool.ops import CALL
from normtool.shape_rules import RULES, NotKnown, Site, name_of
from normtool.shape_values import VALUED, evaluate, static, stored
from normtool.values import Array

#: What operands that do not fit raise.
_MISFIT = (NotKnown, ValueError, TypeError, IndexError, KeyError, ArithmeticError)

#: What the first pass has found out about what lies behind, the second takes along.
_PASSES = 2

#: Calls nested deeper than this are not followed from the call.
_DEEPEST = 50

#: These put out lengths, whatever they read.
_BEGIN = frozenset(["shape", "size"])


def fill_in(graph: ModelGraph, ops: Sequence[Op]) -> None:
    """Give every tensor the shape that follows from what is known. `ops` are in dataflow order."""
    for _ in range(_PASSES):
        unknown = {tensor for tensor in graph.tensors if _is_open(tensor)}
        if not unknown or not _Pass(graph, ops, unknown).run():
            return


def _is_open(tensor: Tensor) -> bool:
    if tensor.shape is None:
        return True
    for n in tensor.shape:  # plain, for it is asked of every tensor
        if n is None or (n.__class__ is str and n.startswith(ONNX_UNNAMED)):
            return tensor.value is None
    return False


def _is_input(tensor: Tensor) -> bool:
    return tensor.role is Role.INPUT and tensor.scope == ModelGraph.MAIN


class _Function:
    """A function of the model: its ops, and what its calls have told so far."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.ops: list[Op] = []
        self.inputs: list[Tensor] = []
        self.outputs: dict[int, Tensor] = {}
        #: the shapes of the operands, call by call
        self.given: list[list[Lengths | None]] = []
        #: it names lengths itself, and they are others than those of the same name outside
        self.has_names = False


class _Pass:
    def __init__(self, graph: ModelGraph, ops: Sequence[Op], unknown: Set[Tensor]) -> None:
        """`unknown`: tensors of whose shape something is not known."""
        self.graph = graph
        self.unknown = unknown
        self.constants = Constants(graph)
        #: what unnamed lengths have turned out to be
        self.found: dict[str, int] = {}
        self._shapes: dict[Tensor, Lengths] = {}
        #: elements of tensors that are made of lengths
        self._live: dict[Tensor, Array] = {}
        self._stored: dict[Tensor, Array] = {}
        self.functions: dict[Scope, _Function] = {}
        self.main: list[Op] = []
        for op in ops:
            self._function(op.scope).ops.append(op) if op.scope.function else self.main.append(op)
        if self.functions:
            self._note_functions()
        self.calls = Counter(self._called(op) for op in ops if op.kind == CALL)
        #: functions of which all calls have been seen
        self.waiting = [function for function in self.functions.values() if not self.calls[function]]
        self._depth = 0

    def run(self) -> bool:
        """Has anything been found out that the ops before might have used?"""
        for op in self.main:
            self._visit(op)
        for function in self.waiting:  # which grows meanwhile
            self._enter(function)
        name, stated = _Names(self.unknown).name, dict[int, Shape]()
        for tensor, shape in self._shapes.items():  # in the order of the ops
            if tensor not in self.unknown:
                continue
            if _is_input(tensor):
                self._state_input(tensor)
                continue
            if id(shape) not in stated:
                stated[id(shape)] = tuple(written(settled(length, self.found), name) for length in shape)
            tensor.shape = stated[id(shape)]
        return bool(self.found)

    # ---- what is known ------------------------------------------------------------------------

    def shape(self, tensor: Tensor) -> Lengths | None:
        shape = self._shapes.get(tensor)
        if shape is None:
            if tensor.shape is None:
                return None
            shape = tuple(n if isinstance(n, int) else read(n) for n in tensor.shape)
            self._shapes[tensor] = shape
        if self.found:
            shape = self._shapes[tensor] = tuple(settled(length, self.found) for length in shape)
        return shape

    def elements(self, tensor: Tensor) -> Array | None:
        if tensor in self._live:
            return self._live[tensor]
        if tensor not in self._stored:
            shape = static(self.shape(tensor))
            if shape is None:
                return None
            found = stored(self.constants, tensor) if self._may_be_constant(tensor) else None
            self._stored[tensor] = listed([None] * math.prod(shape), shape) if found is None else found
        return self._stored[tensor]

    def _may_be_constant(self, tensor: Tensor) -> bool:
        producer = self.graph.producer(tensor)
        return tensor.value is not None or (producer is not None and producer.kind in COMPUTABLE)

    def _learn(self, tensor: Tensor, shape: Lengths) -> None:
        """Take in what follows; what the file says already stays."""
        if tensor not in self.unknown:
            return
        known = self._shapes.get(tensor) or tensor.shape
        if known is None:
            self._shapes[tensor] = shape
        elif len(known) == len(shape):
            better = tuple(map(_better, known, shape))
            self._shapes[tensor] = shape if better == shape else better  # shapes of a chain are one object

    def _state_input(self, tensor: Tensor) -> None:
        """What is said of the model's inputs goes to users, and is left as it is but for numbers."""
        shape = self.shape(tensor) or ()
        pairs = zip(shape, tensor.shape or (None,) * len(shape), strict=True)
        tensor.shape = tuple(new if isinstance(new, int) else old for new, old in pairs)

    # ---- op by op -----------------------------------------------------------------------------

    def _visit(self, op: Op) -> None:
        if op.kind == CALL:
            self._call(op)
            return
        outputs, name = self.graph.outputs(op), name_of(op)
        is_open = not self.unknown.isdisjoint(outputs.values())
        if not is_open and name not in VALUED and op.kind not in _CONTRACTIONS:
            return
        site = Site(op, self.graph.inputs(op), outputs, self)
        if is_open:
            self._deduce(site, name)
        if name in VALUED and (name in _BEGIN or not self._live.keys().isdisjoint(site.inputs.values())):
            self._evaluate(site, name)
        try:
            if op.kind in _CONTRACTIONS:
                self._pin_contraction(site)
            elif op.kind == "reshape" and op.scope == ModelGraph.MAIN:
                self._pin_total(site)
        except _MISFIT:
            return

    def _deduce(self, site: Site, name: str) -> None:
        rule = RULES.get(name)
        try:
            shapes = _joined(site) if name == "if" else rule(site) if rule is not None else {}
        except _MISFIT:
            return
        for slot, shape in (shapes if isinstance(shapes, Mapping) else {"y": shapes}).items():
            if slot in site.outputs:
                self._learn(site.outputs[slot], shape)

    def _evaluate(self, site: Site, name: str) -> None:
        try:
            results = evaluate(site, name)
        except _MISFIT:
            return
        for slot, elements in results.items():
            if any(element is not None for element in elements.reshape(-1)):
                self._live[site.outputs[slot]] = elements

    def _pin_contraction(self, site: Site) -> None:
        """Both axes that a product sums over have the same length."""
        a, b = site.inputs["a"], site.inputs["b"]
        at_a, at_b = -1, -2
        if site.op.kind == "linear":
            at_a, at_b = (0 if site.attribute("transA") else 1), (1 if site.attribute("transB") else 0)
            for tensor in (a, b):
                if self.shape(tensor) is None:
                    self._learn(tensor, (unnamed(), unnamed()))
        of_a, of_b = self.shape(a), self.shape(b)
        if not of_a or not of_b:
            return
        at_b = max(at_b, -len(of_b))  # a vector is summed over its only axis
        self._pin(site.op, a, at_a, of_b[at_b])
        self._pin(site.op, b, at_b, of_a[at_a])

    def _pin_total(self, site: Site) -> None:
        """A reshape leaves as many numbers as there were, so what both products share can be crossed out."""
        before, after = self.shape(site.inputs["x"]), self.shape(site.outputs["y"])
        if before is None or after is None:
            return
        one, other = crossed_out(product(before), product(after))
        for length, number in ((one, other), (other, one)):
            if isinstance(number, int) and (pair := solved(length, number)) is not None:
                self.found[pair[0]] = pair[1]

    def _pin(self, op: Op, tensor: Tensor, axis: int, number: Length) -> None:
        """Let an unnamed length be this number.

        What happens in a body says nothing about the model outside: it need not run.
        """
        shape = self.shape(tensor)
        if shape is None or not isinstance(number, int) or not is_unnamed(shape[axis]):
            return
        pair = solved(shape[axis], number)
        if pair is None:
            return
        if op.scope == ModelGraph.MAIN:
            self.found[pair[0]] = pair[1]
        elif op.scope == tensor.scope:
            at = axis % len(shape)
            self._shapes[tensor] = (*shape[:at], number, *shape[at + 1 :])

    # ---- functions ----------------------------------------------------------------------------

    def _function(self, scope: Scope) -> _Function:
        root = Scope(scope.path[:1], function=True)
        return self.functions.setdefault(root, _Function(root))

    def _note_functions(self) -> None:
        for tensor in self.graph.tensors:
            if tensor.scope.function:
                function = self._function(tensor.scope)
                if tensor.role is Role.INPUT and tensor.scope == function.scope:
                    function.inputs.append(tensor)
                function.has_names |= any(isinstance(length, str) for length in tensor.shape or ())
        for node in self.graph.nodes:
            if isinstance(node, Op) and node.kind == GRAPH_OUTPUT and node.scope.function:
                results = self.graph.inputs(node).items()
                function = self._function(node.scope)
                function.outputs = {int(slot.rpartition(".")[2]): tensor for slot, tensor in results}
        #: by name, with the overload and without
        self._by_name: dict[str, list[_Function]] = {}
        for function in self.functions.values():
            path = function.scope.path[0]
            for name in (path, path.rpartition(":")[0]):
                self._by_name.setdefault(name, []).append(function)

    def _called(self, op: Op) -> _Function | None:
        """None where functions of one name are told apart by something that the graph does not keep."""
        named = self._by_name.get(f"{op.domain}:{op.spelling}" if op.domain else op.spelling, [])
        return named[0] if len(named) == 1 else None

    def _call(self, op: Op) -> None:
        """A function called from one place is followed from there; others wait for all their calls."""
        function = self._called(op)
        if function is None:
            return
        operands, results = self.graph.inputs(op), self.graph.outputs(op)
        given = [operands.get(f"in.{i}") for i in range(len(function.inputs))]
        shapes = [None if tensor is None else self.shape(tensor) for tensor in given]
        function.given.append([_numbers(each) if function.has_names else each for each in shapes])
        if len(function.given) < self.calls[function]:
            return
        if self.calls[function] > 1 or self._depth > _DEEPEST:
            self.waiting.append(function)
            return
        for tensor, operand in zip(function.inputs, given, strict=True):
            if operand is not None and (elements := self.elements(operand)) is not None:
                self._live[tensor] = elements
        self._enter(function)
        for slot, tensor in results.items():
            inner = function.outputs.get(0 if slot == "y" else int(slot.rpartition(".")[2]) + 1)
            if inner is not None and (shape := self.shape(inner)) is not None:
                self._learn(tensor, (_numbers(shape) if function.has_names else shape) or ())
                if inner in self._live and not function.has_names:
                    self._live[tensor] = self._live[inner]

    def _enter(self, function: _Function) -> None:
        for i, tensor in enumerate(function.inputs):
            shape = _common([given[i] for given in function.given])
            if shape is not None:
                self._learn(tensor, shape)
        self._depth += 1
        for op in function.ops:
            self._visit(op)
        self._depth -= 1


class _Names:
    """Names for unnamed lengths, as onnx would go on numbering them."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        own = {n for tensor in tensors for n in tensor.shape or () if isinstance(n, str)}
        taken = [int(found[1]) for n in own for found in re.finditer(rf"{ONNX_UNNAMED}(\d{{1,9}})", n)]
        self._next = max(taken, default=-1) + 1
        self._names: dict[str, str] = {}

    def name(self, symbol: str) -> str:
        if symbol not in self._names:
            self._names[symbol] = f"{ONNX_UNNAMED}{self._next + len(self._names)}"
        return self._names[symbol]


#: Kinds that sum over an axis of both operands.
_CONTRACTIONS = frozenset(["matmul", "linear"])


def _better(known: Length | str | None, new: Length) -> Length:
    """Of what is known of an axis or said of it, and what follows, that which says more."""
    if isinstance(known, int):
        return known
    if known is None or isinstance(new, int):
        return new
    if isinstance(known, str):
        if known.startswith(ONNX_UNNAMED):
            return new
        known = read(known)
    return new if is_unnamed(known) else known


def _numbers(shape: Lengths | None) -> Lengths | None:
    """The shape without the names of its lengths."""
    return None if shape is None else tuple(n if isinstance(n, int) else unnamed() for n in shape)


def _common(shapes: Sequence[Lengths | None]) -> Lengths | None:
    """What holds for every one of these shapes."""
    known = [shape for shape in shapes if shape is not None]
    if not known or len(known) < len(shapes) or len({len(shape) for shape in known}) > 1:
        return None
    return tuple(lengths[0] if len(set(lengths)) == 1 else unnamed() for lengths in zip(*known, strict=True))


def _joined(site: Site) -> dict[str, Lengths]:
    """What holds in both branches of an If."""
    shapes = {}
    for slot in site.outputs:
        number = slot.rpartition(".")[2]
        branches = [site.inputs.get(f"{branch}_branch.{number}") for branch in ("then", "else")]
        shapes[slot] = _common([None if each is None else site.state.shape(each) for each in branches])
    return {slot: shape for slot, shape in shapes.items() if shape is not None}
