"""ONNX → `ModelGraph`."""

import os
import re
from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    ValueInfoProto,
)

from normtool.constants import MAX_COMPUTED_ELEMENTS
from normtool.errors import UnreadableModel
from normtool.formats.onnx import wire
from normtool.formats.onnx.model import OnnxModel
from normtool.formats.onnx.tensors import DataFile, ProtoValue, TensorReader, dtype_of
from normtool.graph import ModelGraph, Op, Role, Scope, Shape, Tensor
from normtool.norms import NORMS
from normtool.ops import CALL, UNKNOWN, find_spelling, slot_name
from normtool.shapes import fill_in
from normtool.values import Array, element_count

#: onnx infers shapes call by call, and nested functions multiply.
_MOST_CALLS = 100_000

#: "norm" in an op's name, but not as in RandomNormal.
_SOUNDS_LIKE_A_NORM = re.compile("norm(?!al(?!i[sz]))", re.IGNORECASE)

#: Domains whose operators ONNX Runtime knows, though the standard does not.
_RUNTIME_DOMAINS = frozenset(
    ["com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc", "org.pytorch.aten"]
)

_LARGEST_AXIS = 1 << 16

#: What onnx's own C++ raises about a model it does not like.
_ONNX_COMPLAINTS = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)

#: (domain, name, overload)
Function = tuple[str, str, str]

#: Who calls from the main graph.
_MAIN: Function = ("\0main", "", "")


def read_path(path: Path) -> OnnxModel:
    """Open an .onnx file; its weights stay where they are.

    Raises UnreadableModel (missing, truncated, not a model, inconsistent) or UnsafeModel.
    """
    try:
        file = DataFile(path)
        proto = parse(file)
    except OSError as error:
        raise UnreadableModel(f"{path}: {os.strerror(error.errno or 0)}") from None
    if not proto.HasField("graph"):
        raise UnreadableModel(f"{path}: is not an ONNX model (no graph in it)")
    return read_skeleton(proto, TensorReader(file, path), path, file)


def read_proto(proto: onnx.ModelProto) -> OnnxModel:
    """Wrap a model in memory; it is copied, the caller's object never changes."""
    if not proto.HasField("graph"):
        raise UnreadableModel("the ModelProto has no graph")
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return read_skeleton(copy, TensorReader(None, None), None, None)


def _check_sane(proto: onnx.ModelProto) -> None:
    """Refuse what would break the libraries behind this line.

    Names that are not UTF-8 come out of protobuf as bytes, and onnx's shape inference crashes on an axis
    beyond 32 bits. Raises UnreadableModel.
    """
    texts: list[Any] = []
    for container in all_containers(proto):
        texts.append(container.name)
        if isinstance(container, GraphProto):
            for group in (container.input, container.output, container.value_info, container.initializer):
                texts += [element.name for element in group]
        else:
            texts += [container.domain, container.overload, *container.input, *container.output]
        for node in container.node:
            texts += [node.name, node.op_type, node.domain, node.overload, *node.input, *node.output]
            texts += [text for a in node.attribute for text in (a.name, a.ref_attr_name)]
            wild = next((a for a in node.attribute if a.name == "axis" and abs(a.i) > _LARGEST_AXIS), None)
            if wild is not None:
                raise UnreadableModel(f"node {node.name!r} has axis {wild.i}, which no tensor has")
        texts += [text for t in tensors_of(container) for e in t.external_data for text in (e.key, e.value)]
    texts += [entry.domain for entry in proto.opset_import]
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise UnreadableModel(f"the name {wrong!r} is not UTF-8; the file is damaged")


def parse(file: DataFile) -> onnx.ModelProto:
    """The skeleton of a model file. Raises UnreadableModel where it is not one."""
    proto = onnx.ModelProto()
    try:
        buffer = file.map()
        proto.ParseFromString(wire.skeleton(buffer))
    except (DecodeError, ValueError) as error:
        detail = str(error).splitlines()[0] if str(error) else "malformed protobuf"
        raise UnreadableModel(f"{file.path}: is not an ONNX file, or is truncated ({detail})") from None
    return proto


def read_skeleton(
    proto: onnx.ModelProto, tensors: TensorReader, path: Path | None, file: DataFile | None
) -> OnnxModel:
    """Build the graph of a skeleton whose data `tensors` finds."""
    builder = _Builder(proto, tensors)
    try:
        _check_sane(proto)
        graph = builder.build()
    except UnreadableModel as error:
        raise type(error)(f"{path}: {error}" if path else str(error)) from None
    message = checker_message(proto)
    if message:
        graph.diagnostics.append(("checker", f"the ONNX checker rejects it: {message}", ""))
    external = any(is_external(tensor) and not is_lazy(tensor) for tensor in all_tensors(proto))
    return OnnxModel(proto, graph, tensors, path, file, external, not message, message, builder.versions)


def checker_message(proto: onnx.ModelProto) -> str:
    """The first line of the standard checker's complaint, "" where it has none.

    It judges structure only, so data that lies outside the message is stood in for by a scalar.
    """
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(proto)
    for tensor in all_tensors(skeleton):
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            del tensor.dims[:]
            tensor.raw_data = bytes(16)
    try:
        onnx.checker.check_model(skeleton)
    except (EncodeError, ValueError, RuntimeError, *_ONNX_COMPLAINTS) as error:
        return (str(error).strip().splitlines() or ["no details"])[0]
    return ""


def walk_nodes(proto: onnx.ModelProto) -> Iterator[tuple[GraphProto | FunctionProto, NodeProto]]:
    """Every node with the graph or function it lies in; a node comes before its bodies."""
    yield from _walk(proto.graph)
    for function in proto.functions:
        yield from _walk(function)


def _walk(container: GraphProto | FunctionProto) -> Iterator[tuple[GraphProto | FunctionProto, NodeProto]]:
    for node in container.node:
        yield container, node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _walk(attribute.g)


def all_containers(proto: onnx.ModelProto) -> Iterator[GraphProto | FunctionProto]:
    """The main graph, every body at any depth, every function."""
    return containers_below(proto.graph, *proto.functions)


def containers_below(*roots: GraphProto | FunctionProto) -> Iterator[GraphProto | FunctionProto]:
    """The graphs or functions given and the bodies in them."""
    pending = list(roots)
    while pending:
        container = pending.pop()
        yield container
        for node in container.node:
            for attribute in node.attribute:
                pending += [attribute.g] if attribute.HasField("g") else []
                pending += attribute.graphs


def all_tensors(proto: onnx.ModelProto) -> list[TensorProto]:
    """Every TensorProto of the model: initializers and attributes, in bodies and functions too."""
    return [tensor for container in all_containers(proto) for tensor in tensors_of(container)]


def is_external(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def is_lazy(tensor: TensorProto) -> bool:
    """Is the data in the model file, or still to be computed for it?"""
    return any(e.key == "location" and e.value.startswith(wire.LAZY) for e in tensor.external_data)


def tensors_of(container: GraphProto | FunctionProto) -> Iterator[TensorProto]:
    """The TensorProtos of one graph or function, its bodies aside."""
    if isinstance(container, GraphProto):
        yield from container.initializer
        for sparse in container.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in container.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("sparse_tensor"):
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)


class _Builder:
    """Fills a ModelGraph from one ModelProto."""

    def __init__(self, proto: onnx.ModelProto, tensors: TensorReader) -> None:
        self.proto = proto
        self.tensors = tensors
        self.graph = ModelGraph()
        self.versions = _opset_versions(proto.opset_import)
        self.functions: dict[Function, FunctionProto] = {_function_key(f): f for f in proto.functions}
        self.unrecognised: dict[tuple[str, str], str] = {}
        #: nodes seen so far; an op's `source` is its number in the order of `walk_nodes`
        self.visited = 0

    def build(self) -> ModelGraph:
        counts = _call_counts(self.proto)
        self.graph.calls = {_function_scope(key): count for key, count in counts.items()}
        inferred = self._infer_shapes(sum(counts.values()))
        self._add_graph(inferred, self.proto.graph, Scope(), {}, self.versions)
        for key, function in self.functions.items():
            self._add_function(key, function)
        try:
            ops = self.graph.sorted_ops()
        except nx.NetworkXUnfeasible:
            raise UnreadableModel("the graph has a cycle") from None
        fill_in(self.graph, ops)
        self._say_unrecognised()
        return self.graph

    def _infer_shapes(self, calls: int) -> GraphProto:
        """The graph with the shapes onnx can infer, or as it stands where it cannot."""
        try:
            if calls > _MOST_CALLS:
                raise ValueError(f"{calls} function calls; onnx would follow each")
            return onnx.shape_inference.infer_shapes(self.proto).graph
        except (RuntimeError, ValueError, *_ONNX_COMPLAINTS) as error:
            line = (str(error).strip().splitlines() or ["no details"])[0]
            self.graph.diagnostics.append(("shape_inference", f"shapes could not be inferred: {line}", ""))
            return self.proto.graph

    # ---- graphs, bodies, functions --------------------------------------------------------

    def _add_graph(
        self,
        shaped: GraphProto,
        source: GraphProto,
        scope: Scope,
        outer: MutableMapping[str, Tensor],
        versions: Mapping[str, int],
    ) -> list[Tensor]:
        """Add one graph and return its outputs. `shaped` is `source` with inferred shapes."""
        known = {info.name: info for info in (*shaped.value_info, *shaped.output)}
        env = self._stored(source, scope)
        for info in source.input:
            stored = env.get(info.name)
            if stored is None:
                env[info.name] = self._tensor(info.name, scope, info, Role.INPUT)
            else:
                stored.overridable = self.proto.ir_version >= 4
        if len({info.name for info in source.input}) != len(source.input):
            raise UnreadableModel(f"graph {source.name!r} lists an input twice")
        self._add_nodes(source, shaped, scope, outer, env, known, versions)
        outputs = [self._resolve(info.name, env, outer, "the list of graph outputs") for info in source.output]
        if not scope.path:
            self.graph.add_outputs(scope, outputs)
        return outputs

    def _add_function(self, key: Function, function: FunctionProto) -> None:
        scope = _function_scope(key)
        known = {info.name: info for info in function.value_info}
        env = {name: self._tensor(name, scope, known.get(name), Role.INPUT) for name in function.input}
        versions = _opset_versions(function.opset_import)
        self._add_nodes(function, function, scope, {}, env, known, versions)
        outputs = [self._resolve(name, env, {}, f"function {key[1]!r}") for name in function.output]
        self.graph.add_outputs(scope, outputs)

    def _stored(self, source: GraphProto, scope: Scope) -> dict[str, Tensor]:
        env: dict[str, Tensor] = {}
        for proto in source.initializer:
            if proto.name in env:
                raise UnreadableModel(f"two initializers are called {proto.name!r}")
            env[proto.name] = self._stored_tensor(proto.name, scope, proto)
        for sparse in source.sparse_initializer:
            name = sparse.values.name
            if name in env:
                raise UnreadableModel(f"two initializers are called {name!r}")
            env[name] = self.graph.add_tensor(Tensor(name, scope, Role.CONSTANT))
            self._hold_sparse(env[name], sparse)
        return env

    def _add_nodes(
        self,
        source: GraphProto | FunctionProto,
        shaped: GraphProto | FunctionProto,
        scope: Scope,
        outer: MutableMapping[str, Tensor],
        env: dict[str, Tensor],
        known: Mapping[str, ValueInfoProto],
        versions: Mapping[str, int],
    ) -> None:
        already = set(env)
        for node in source.node:
            for name in filter(None, node.output):
                if name not in env:
                    env[name] = self._tensor(name, scope, known.get(name), Role.ACTIVATION)
                elif node.op_type == "Constant":  # ONNX Runtime lets a constant be said twice
                    self.graph.diagnostics.append(("defined_twice", f"{name!r} is defined twice", name))
                else:
                    raise UnreadableModel(f"{name!r} is defined twice")
        in_order = True
        for node, shaped_node in zip(source.node, shaped.node, strict=True):
            in_order &= all(not name or name not in env or name in already for name in node.input)
            self._add_node(node, shaped_node, scope, env, outer, versions)
            already.update(node.output)
        if not in_order:
            message = "the nodes are not in topological order (ONNX Runtime sorts them itself)"
            self.graph.diagnostics.append(("not_sorted", message, str(scope)))

    def _add_node(
        self,
        node: NodeProto,
        shaped: NodeProto,
        scope: Scope,
        env: MutableMapping[str, Tensor],
        outer: MutableMapping[str, Tensor],
        versions: Mapping[str, int],
    ) -> None:
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = versions.get(domain, 1)
        found = find_spelling(domain, node.op_type, version)
        called = (node.domain, node.op_type, node.overload)
        kind = UNKNOWN
        slots: tuple[str, ...] = ("in*",)
        results: tuple[str, ...] = ("y", "extra*")
        if called in self.functions:
            kind = CALL
        elif found is not None:
            spelling, row = found
            kind, slots, results = row.kind, spelling.slots, row.outputs
        else:
            self.unrecognised.setdefault((domain, node.op_type), node.name or node.op_type)
        name = node.name or next((output for output in node.output if output), node.op_type)
        inputs = {
            slot_name(slots, i): self._resolve(tensor, env, outer, f"node {name!r}")
            for i, tensor in enumerate(node.input)
            if tensor
        }
        outputs = {slot_name(results, i): env[tensor] for i, tensor in enumerate(node.output) if tensor}
        attributes, stored = self._attributes(node, kind, env, scope)
        if stored is not None:
            stored.role = Role.CONSTANT
        op = Op(name, kind, scope, node.op_type, domain, version, attributes, self.visited)
        self.visited += 1
        inputs |= self._bodies(node, shaped, name, scope, ChainMap(env, outer), versions)
        self.graph.add_op(op, inputs, outputs)

    def _bodies(
        self,
        node: NodeProto,
        shaped: NodeProto,
        name: str,
        scope: Scope,
        visible: MutableMapping[str, Tensor],
        versions: Mapping[str, int],
    ) -> dict[str, Tensor]:
        """Enter the node's graph attributes. It reads their outputs, at `then_branch.0` and so on."""
        reads: dict[str, Tensor] = {}
        shapes = {attribute.name: attribute for attribute in shaped.attribute}
        for attribute in node.attribute:
            if not attribute.HasField("g"):
                continue
            inner = Scope((*scope.path, f"{name}.{attribute.name}"), scope.function)
            shaped_body = shapes[attribute.name].g if attribute.name in shapes else attribute.g
            outputs = self._add_graph(shaped_body, attribute.g, inner, visible, versions)
            reads |= {f"{attribute.name}.{i}": tensor for i, tensor in enumerate(outputs)}
        return reads

    # ---- tensors and attributes -----------------------------------------------------------

    def _tensor(self, name: str, scope: Scope, info: ValueInfoProto | None, role: Role) -> Tensor:
        dtype, shape = _type_of(info) if info is not None else (None, None)
        return self.graph.add_tensor(Tensor(name, scope, role, dtype, shape))

    def _hold_sparse(self, tensor: Tensor, sparse: SparseTensorProto) -> None:
        """Let `tensor` stand for a sparse one: dense to whoever reads it, its non-zeros to whoever counts."""
        values = self.tensors.value(sparse.values)
        shape = tuple(int(n) for n in sparse.dims)
        if any(n < 0 for n in shape):
            raise UnreadableModel(f"tensor {tensor.name!r} has a negative dimension: {list(shape)}")
        tensor.value = ProtoValue(lambda: _dense(sparse, shape), shape, values.dtype)
        tensor.dtype, tensor.shape = values.dtype, shape
        tensor.stored_elements = element_count(values.shape)

    def _stored_tensor(self, name: str, scope: Scope, proto: TensorProto) -> Tensor:
        value = self.tensors.value(proto)
        tensor = Tensor(name, scope, Role.CONSTANT, value.dtype, value.shape, value)
        return self.graph.add_tensor(tensor)

    def _attributes(
        self, node: NodeProto, kind: str, env: Mapping[str, Tensor], scope: Scope
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Plain values. A Constant node gives its output tensor the value it stores."""
        attributes: dict[str, Any] = {}
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                attributes[attribute.name] = None  # set by the caller of the function
            elif attribute.type not in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
                attributes[attribute.name] = self._attribute(attribute)
        if kind == "cast" and attributes.get("to") is not None:
            attributes["to"] = dtype_of(attributes["to"], node.name)
        if kind != "constant" or not node.output or not attributes:
            return attributes, None
        return {}, self._store_constant(node, attributes, env[node.output[0]])

    def _store_constant(self, node: NodeProto, attributes: dict[str, Any], tensor: Tensor) -> Tensor | None:
        content = next(iter(attributes.values()))
        if content is None or isinstance(content, str):
            return None
        if isinstance(content, SparseTensorProto):
            self._hold_sparse(tensor, content)
            return tensor
        if not hasattr(content, "rows"):
            is_float = node.attribute[0].type in (AttributeProto.FLOAT, AttributeProto.FLOATS)
            array = np.asarray(content, np.float32 if is_float else np.int64)
            content = ProtoValue(lambda: array, array.shape, array.dtype)
        tensor.value, tensor.dtype, tensor.shape = content, content.dtype, content.shape
        return tensor

    def _attribute(self, attribute: AttributeProto) -> Any:
        match attribute.type:
            case AttributeProto.TENSOR:
                return self.tensors.value(attribute.t)
            case AttributeProto.SPARSE_TENSOR:
                return attribute.sparse_tensor
            case AttributeProto.STRING:
                return attribute.s.decode(errors="replace")
            case AttributeProto.STRINGS:
                return [text.decode(errors="replace") for text in attribute.strings]
            case AttributeProto.FLOAT | AttributeProto.INT:
                return attribute.f if attribute.type == AttributeProto.FLOAT else attribute.i
            case AttributeProto.FLOATS | AttributeProto.INTS:
                return list(attribute.floats or attribute.ints)
        return None

    def _resolve(
        self, name: str, env: Mapping[str, Tensor], outer: MutableMapping[str, Tensor], reader: str
    ) -> Tensor:
        tensor = env.get(name) or outer.get(name)
        if tensor is None:
            raise UnreadableModel(f"{reader} reads {name!r}, which nothing defines")
        return tensor

    # ---- closing --------------------------------------------------------------------------

    def _say_unrecognised(self) -> None:
        with_norms = {op.scope.path[0] for op in self.graph.ops if op.kind in NORMS and op.scope.function}
        for domain, name, _ in self.functions:
            if (
                _SOUNDS_LIKE_A_NORM.search(name)
                and _function_scope((domain, name, "")).path[0] not in with_norms
            ):
                message = f"function {domain}::{name} sounds like a norm and has no norm operator in it"
                self.graph.diagnostics.append(("unrecognised_norm", message, name))
        newest = onnx.defs.onnx_opset_version()
        if self.versions.get("", 0) > newest:
            message = f"opset {self.versions['']} is newer than {newest}, the newest that onnx knows here"
            self.graph.diagnostics.append(("newer_opset", message, ""))
        for (domain, op_type), where in self.unrecognised.items():
            label = f"{domain}::{op_type}" if domain else op_type
            if _SOUNDS_LIKE_A_NORM.search(op_type):
                message = f"{label} is unknown; by its name it may be a norm, and it is not counted"
                self.graph.diagnostics.append(("unrecognised_norm", message, where))
            elif domain not in _RUNTIME_DOMAINS and not onnx.defs.has(op_type, domain):
                self.graph.diagnostics.append(("unknown_op", f"{label} is unknown to ONNX", where))


def _opset_versions(imports: Any) -> dict[str, int]:
    return {("" if entry.domain == "ai.onnx" else entry.domain): entry.version for entry in imports}


def _function_scope(key: Function) -> Scope:
    return Scope((":".join(part for part in key if part),), function=True)


def _call_counts(proto: onnx.ModelProto) -> dict[Function, int]:
    """How often each function runs when the main graph runs once, through nested calls too.

    Raises UnreadableModel when a function calls itself.
    """
    callers = {_MAIN: proto.graph, **{_function_key(function): function for function in proto.functions}}
    calls: nx.MultiDiGraph[Function] = nx.MultiDiGraph()
    calls.add_nodes_from(callers)
    for caller, root in callers.items():
        for container in containers_below(root):
            for node in container.node:
                called = (node.domain, node.op_type, node.overload)
                if called in callers:
                    calls.add_edge(caller, called)
    try:
        order = list(nx.topological_sort(calls))
    except nx.NetworkXUnfeasible:
        raise UnreadableModel("a function calls itself; ONNX functions may not be recursive") from None
    counts = {_MAIN: 1}
    for called in order:
        counts.setdefault(called, sum(counts[caller] for caller, _ in calls.in_edges(called)))
    return {key: counts[key] for key in callers if key != _MAIN}


def _function_key(function: FunctionProto) -> Function:
    return (function.domain, function.name, function.overload)


def _type_of(info: ValueInfoProto) -> tuple[np.dtype[Any] | None, Shape | None]:
    """(dtype, shape); None for what is not said, a symbol for a named dimension."""
    tensor_type = info.type.tensor_type
    if not tensor_type.elem_type:
        return None, None
    dtype = dtype_of(tensor_type.elem_type, info.name)
    if not tensor_type.HasField("shape"):
        return dtype, None
    return dtype, tuple(_dimension(dim) for dim in tensor_type.shape.dim)


def _dimension(dim: Any) -> int | str | None:
    """A length, a symbol, or None. Old exporters write −1 or 0 for "any"."""
    if dim.HasField("dim_value"):
        return int(dim.dim_value) if dim.dim_value > 0 else None
    return dim.dim_param if dim.dim_param and isinstance(dim.dim_param, str) else None


def _dense(sparse: SparseTensorProto, shape: tuple[int, ...]) -> Array:
    """A SparseTensorProto written out. Indices are linear (NNZ) or per axis (NNZ, rank).

    Raises MemoryError beyond the bound on computed constants: a few bytes can claim any size.
    """
    if element_count(shape) > MAX_COMPUTED_ELEMENTS:
        raise MemoryError(f"{element_count(shape)} elements")
    dense = np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(sparse.values.data_type))
    values = onnx.numpy_helper.to_array(sparse.values)
    indices = onnx.numpy_helper.to_array(sparse.indices)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return dense
