"""One graph for every format: ops and tensors are both nodes, every edge carries the slot it fills.

The questions that folding tools get wrong are then degree questions. Is this output read elsewhere?
`readers(tensor)`; a graph output and an If body that captures the tensor are readers like any other.
Is this weight shared? Again `readers`. Nothing here knows a framework or a file.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import networkx as nx
import numpy as np

from normtool.values import Value

Shape = tuple[int | str | None, ...]


class Role(StrEnum):
    INPUT = "input"
    ACTIVATION = "activation"
    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"


@dataclass(frozen=True)
class Scope:
    """The main graph (`path == ()`), the body of an If, Loop or Scan, or a function."""

    path: tuple[str, ...] = ()
    function: bool = False

    def __str__(self) -> str:
        return "/".join(self.path)


@dataclass(eq=False)
class Tensor:
    """One named tensor. `shape` is None where not even the rank is known.

    `value` is what the file stores; a tensor *computed* from constants has none (see `constants`).
    `overridable`: the caller may pass another value at run time, so the stored one proves nothing.
    `written`: an op changes it in place, so neither does the stored one.
    `frozen`: a parameter that does not ask for a gradient (PyTorch says so, ONNX cannot).
    `source` is what puts out a tensor that no reader has made: the edit, or (graft, number of the part).
    """

    name: str
    scope: Scope
    role: Role = Role.ACTIVATION
    dtype: np.dtype[Any] | None = None
    shape: Shape | None = None
    value: Value | None = None
    overridable: bool = False
    stored_elements: int | None = None
    written: bool = False
    frozen: bool = False
    source: Any = None

    def __repr__(self) -> str:
        return f"Tensor({self.name!r})"


@dataclass(eq=False)
class Op:
    """One operator with its canonical kind and attributes.

    `source` is what the format reader made it from; only that format's writer looks at it.
    `owner` is the path of the module whose own code calls it, and `call` counts that module's calls from 0
    (PyTorch; ONNX has no modules).
    """

    name: str
    kind: str
    scope: Scope
    spelling: str
    domain: str = ""
    version: int = 0
    attributes: Mapping[str, Any] = field(default_factory=dict)
    source: Any = None
    owner: str = ""
    call: int = 0

    def __repr__(self) -> str:
        return f"Op({self.kind} {self.name!r})"


@dataclass(frozen=True, eq=False)
class NormModule:
    """A norm that the reader knows as a whole, whatever ops it consists of.

    A PyTorch module, or the tensors of a checkpoint. `name` is the module path, `spelling` its class;
    `evidence` says how it came to be called a norm: by its class (`module`), by what it does to numbers
    (`probe`), by its running statistics (`statistics`) or by its name alone (`name`).
    `unknown` counts operands that exist and have no size yet (lazy modules); `calls` is None where no
    dataflow says how often it runs.
    """

    name: str
    kind: str
    spelling: str
    evidence: str
    learnable: tuple["Tensor", ...] = ()
    buffers: tuple["Tensor", ...] = ()
    axes: tuple[int, ...] | None = None
    eps: float | None = None
    unknown: int = 0
    calls: int | None = None
    owner: str | None = None

    @property
    def path(self) -> str:
        """What `Op.owner` says of its ops; "" for a model that is itself a norm."""
        return self.name if self.owner is None else self.owner


@dataclass(frozen=True)
class Read:
    """One use of a tensor: `op` reads it at `slot`."""

    op: Op
    slot: str


#: Kind of the pseudo-op that reads the outputs of a graph or function.
GRAPH_OUTPUT = "graph_output"


class ModelGraph:
    """A bipartite `networkx.MultiDiGraph` of `Op` and `Tensor` nodes.

    Edges run tensor → op for inputs and op → tensor for outputs; the edge key is the slot
    (`weight`, `a`, `inputs.2`, `then_branch.0`).
    """

    #: The scope of everything that lies in no body and no function.
    MAIN = Scope()

    def __init__(self) -> None:
        self.nodes: nx.MultiDiGraph[Any] = nx.MultiDiGraph()
        # networkx's own dictionaries: its views cost as much as all else that planning does
        self._pred: dict[Any, dict[Any, Any]] = self.nodes._pred
        self._succ: dict[Any, dict[Any, Any]] = self.nodes._succ
        self.ops: list[Op] = []
        self.tensors: list[Tensor] = []
        self.calls: dict[Scope, int] = {}
        #: norms known as modules, beside those that are ops
        self.norm_modules: list[NormModule] = []
        #: a user's module makes the calls: an op takes other numbers, and only a whole norm can be taken out
        self.called_by_code = False
        #: path of an op's owner → its class, where there are modules
        self.owner_classes: dict[str, str] = {}
        #: why nothing is known of what reads what ("" where it is); then no rewrite is possible
        self.no_dataflow = ""
        #: (code, message, where) of everything the reader noticed and could live with
        self.diagnostics: list[tuple[str, str, str]] = []

    # ---- building -------------------------------------------------------------------------

    def add_tensor(self, tensor: Tensor) -> Tensor:
        self.nodes.add_node(tensor)
        self.tensors.append(tensor)
        return tensor

    def add_op(self, op: Op, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Op:
        self.nodes.add_node(op)
        self.ops.append(op)
        for slot, tensor in inputs.items():
            self.nodes.add_edge(tensor, op, key=slot)
        for slot, tensor in outputs.items():
            self.nodes.add_edge(op, tensor, key=slot)
        return op

    def add_outputs(self, scope: Scope, tensors: Sequence[Tensor]) -> None:
        """Let a pseudo-op read the outputs of a graph or function (it is not among `ops`)."""
        op = Op("outputs", GRAPH_OUTPUT, scope, "")
        self.nodes.add_node(op)
        for position, tensor in enumerate(tensors):
            self.nodes.add_edge(tensor, op, key=f"output.{position}")

    # ---- asking ---------------------------------------------------------------------------

    def inputs(self, op: Op) -> dict[str, Tensor]:
        """Slot → tensor, in no particular order; absent optional inputs are absent keys."""
        return {slot: tensor for tensor, slots in self._pred[op].items() for slot in slots}

    def outputs(self, op: Op) -> dict[str, Tensor]:
        return {slot: tensor for tensor, slots in self._succ[op].items() for slot in slots}

    def input(self, op: Op, slot: str) -> Tensor | None:
        for tensor, slots in self._pred[op].items():
            if slot in slots:
                return tensor  # type: ignore[no-any-return]
        return None

    def __contains__(self, node: Op | Tensor) -> bool:
        return node in self._pred

    def output(self, op: Op, slot: str = "y") -> Tensor:
        """Raises KeyError when the op does not produce `slot`."""
        return self.outputs(op)[slot]

    def producer(self, tensor: Tensor) -> Op | None:
        return next(iter(self._pred[tensor]), None)

    def readers(self, tensor: Tensor) -> list[Read]:
        return [Read(op, slot) for op, slots in self._succ[tensor].items() for slot in slots]

    def beside(self, tensor: Tensor) -> list[Op]:
        """The op that makes a tensor, and those that read it."""
        producer = self.producer(tensor)
        return [*([] if producer is None else [producer]), *(read.op for read in self.readers(tensor))]

    def rank(self, tensor: Tensor) -> int | None:
        """Number of axes, from the recorded shape or from what an op must produce."""
        for _ in range(64):  # a chain of elementwise ops; longer ones are simply unknown
            if tensor.shape is not None:
                return len(tensor.shape)
            op = self.producer(tensor)
            if op is None:
                return None
            if op.kind == "linear":
                return 2
            slot = {"conv": "weight", "conv_transpose": "weight", "batch_norm": "x"}.get(op.kind)
            source = self.input(op, slot) if slot else None
            if source is None:
                return None
            tensor = source
        return None

    def scopes(self) -> Iterator[Scope]:
        yield from dict.fromkeys(op.scope for op in self.ops)

    def sorted_ops(self) -> list[Op]:
        """Ops in dataflow order. Raises `networkx.NetworkXUnfeasible` on a cycle."""
        waiting = {node: sum(map(len, makers.values())) for node, makers in self._pred.items()}
        ready = [node for node, count in waiting.items() if not count]
        for node in ready:  # which grows meanwhile
            for reader, slots in self._succ[node].items():
                waiting[reader] -= len(slots)
                if not waiting[reader]:
                    ready.append(reader)
        if len(ready) < len(waiting):
            raise nx.NetworkXUnfeasible("the graph has a cycle")
        return [node for node in ready if isinstance(node, Op)]
