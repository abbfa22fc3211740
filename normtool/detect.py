"""Finds every normalisation layer of a graph, bodies and functions included.

Native operators are found by kind (`evidence: op`), PyTorch's by the module they belong to. Norms spelled out
in primitive ops are found by what these compute (`evidence: pattern`, see `forms`), unless a module is known to
be that norm already.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from normtool.constants import Constants
from normtool.forms import NormForm, spelled_forms
from normtool.graph import ModelGraph, NormModule, Op, Read, Scope, Tensor
from normtool.norms import NORMS, Norm, axes_of, number


def find_norms(graph: ModelGraph, constants: Constants | None = None) -> list[Norm]:
    """Every norm: ops in the order the model lists them, then what is spelled out, then the other modules."""
    constants = constants or Constants(graph)
    forms = spelled_forms(graph, constants)
    inner = {op for form in forms for op in form.ops}
    modules = {module.path: module for module in graph.norm_modules}
    known_modules = set(graph.norm_modules)
    holders = {t: module for module in graph.norm_modules for t in (*module.learnable, *module.buffers)}
    found, covered = [], set()
    for op in graph.ops:
        if op.kind in NORMS and op not in inner:
            module = modules.get(op.owner) or _holder(graph, op, holders)
            found.append(_of_op(constants, op, module))
            covered.add(module)
    spelled = _by_module(graph, forms, modules)
    for known, own in spelled.items():
        if known is None:
            found += [_of_form(graph, form) for form in own]
        elif known not in known_modules:
            found += _of_calls(known, own)
    for module in graph.norm_modules:
        if module not in covered:
            found += _of_module(graph, module, spelled.get(module, []))
    return found


# ---- spelled out --------------------------------------------------------------------------------


def _by_module(
    graph: ModelGraph, forms: list[NormForm], modules: Mapping[str, NormModule]
) -> dict[NormModule | None, list[NormForm]]:
    """Module → the norms in its calls; a module whose code is a norm and nothing else is a norm module too.

    What stands in the code of a larger module belongs to none.
    """
    found: dict[NormModule | None, list[NormForm]] = {}
    whole: dict[str, list[NormForm]] = {}
    for form in forms:
        owners = {op.owner for op in form.ops if op not in form.shares} or {form.ops[-1].owner}
        known = next((m for owner in owners for m in _around(owner, modules)), None)
        if known is not None:
            found.setdefault(known, []).append(form)
        elif len(owners) == 1 and "" not in owners:
            whole.setdefault(owners.pop(), []).append(form)
        else:
            found.setdefault(None, []).append(form)
    own = _ops_of(graph, whole) if whole else {}
    for path, several in whole.items():
        if _is_all(graph, own[path], several):
            found[_module_of(graph, path, several)] = several
        else:
            found.setdefault(None, []).extend(several)
    return found


def _around(owner: str, modules: Mapping[str, NormModule]) -> Iterator[NormModule]:
    """The norm modules that a path lies in, itself first; within one with running statistics may be others."""
    if owner in modules:
        yield modules[owner]
    while owner:
        owner = owner.rpartition(".")[0]
        if owner in modules and modules[owner].kind != "batch_norm":
            yield modules[owner]


def _ops_of(graph: ModelGraph, paths: Iterable[str]) -> dict[str, list[Op]]:
    own: dict[str, list[Op]] = {path: [] for path in paths}
    for op in graph.ops:
        if op.owner in own:
            own[op.owner].append(op)
    return own


def _is_all(graph: ModelGraph, ops: list[Op], forms: list[NormForm]) -> bool:
    """Does each call consist of one of these norms, and of what only gives numbers another shape or dtype?"""
    calls = {op.call for op in ops}
    inside = {op for form in forms for op in form.ops}
    inside |= {read.op for form in forms if form.weight_offset for read in _readers(graph, form.weight)}
    rest = [op for op in ops if op not in inside and op.kind not in _BESIDE]
    return not rest and len(forms) == len(calls) == len({form.ops[-1].call for form in forms})


def _readers(graph: ModelGraph, tensor: Tensor | None) -> list[Read]:
    return graph.readers(tensor) if tensor is not None else []


#: Ops that a norm module may have beside the norm.
_BESIDE = frozenset(
    "identity cast cast_like dropout reshape flatten squeeze unsqueeze expand transpose shape constant".split()
)


def _module_of(graph: ModelGraph, path: str, forms: list[NormForm]) -> NormModule:
    form = forms[0]
    return NormModule(
        name=path,
        kind=form.kind,
        spelling=graph.owner_classes.get(path, form.spelling),
        evidence="pattern",
        learnable=_weights(form),
        axes=form.axes,
        eps=form.eps,
        calls=len(forms),
        owner=path,
    )


def _weights(form: NormForm) -> tuple[Tensor, ...]:
    return tuple(dict.fromkeys(tensor for tensor in (form.weight, form.bias) if tensor is not None))


def _of_form(graph: ModelGraph, form: NormForm) -> Norm:
    """A norm in the code of something larger; it goes by the name of its last op."""
    last = form.ops[-1]
    return Norm(
        name=last.name,
        kind=form.kind,
        spelling=form.spelling,
        evidence="pattern",
        axes=form.axes,
        eps=form.eps,
        learnable=_weights(form),
        buffers=(),
        calls=graph.calls.get(_function_of(last.scope), 1),
        form=form,
    )


def _of_calls(module: NormModule, forms: list[NormForm]) -> Iterator[Norm]:
    """One norm for each call of a module that is spelled out."""
    for form in forms:
        call = form.ops[-1].call
        norm = _plain(module, f"{module.name}@{call}" if call else module.name)
        yield replace(norm, axes=form.axes, eps=form.eps, calls=1, form=form)


# ---- operators and modules ----------------------------------------------------------------------


def _holder(graph: ModelGraph, op: Op, holders: Mapping[Tensor, NormModule]) -> NormModule | None:
    """The module with whose tensors somebody else's code normalises: F.batch_norm(x, self.bn.running_mean)."""
    return next((holders[tensor] for tensor in graph.inputs(op).values() if tensor in holders), None)


def _of_op(constants: Constants, op: Op, module: NormModule | None) -> Norm:
    """An op, with what its module knows of it: a running count that no op reads, a parametrised weight."""
    graph, row = constants.graph, NORMS[op.kind]
    data = graph.input(op, row.data)
    return Norm(
        name=op.name,
        kind=row.kind,
        spelling=f"{op.domain}::{op.spelling}" if op.domain else op.spelling,
        evidence=module.evidence if module else "op",
        axes=axes_of(constants, op, graph.rank(data) if data is not None else None),
        eps=number(constants.attribute(op, "epsilon")),
        learnable=module.learnable if module else _operands(graph, op, row.learnable),
        buffers=module.buffers if module else _operands(graph, op, row.buffers),
        calls=graph.calls.get(_function_of(op.scope), 1),
        op=op,
        module=module,
    )


def _of_module(graph: ModelGraph, module: NormModule, forms: list[NormForm]) -> Iterator[Norm]:
    """A norm that is no single op: once for each call where the calls are understood, else once in all."""
    if forms and len(forms) == module.calls and all(form.kind == module.kind for form in forms):
        yield from _of_calls(module, forms)
        return
    norm = _plain(module, module.name)
    lasts = _last_ops(graph, module) if module.kind == "batch_norm" else {}
    for call, op in lasts.items():
        yield replace(norm, name=f"{module.name}@{call}" if call else module.name, calls=1, op=op)
    if not lasts:
        yield norm


def _plain(module: NormModule, name: str) -> Norm:
    return Norm(
        name,
        module.kind,
        module.spelling,
        module.evidence,
        module.axes,
        module.eps,
        module.learnable,
        module.buffers,
        module.calls,
        module=module,
    )


def _last_ops(graph: ModelGraph, module: NormModule) -> dict[int, Op]:
    """The op that each call of a module ends with. (A frozen BatchNorm ends with the Add of its shift.)"""
    return {op.call: op for op in graph.ops if op.owner == module.path}


def _operands(graph: ModelGraph, op: Op, slots: tuple[str, ...]) -> tuple[Tensor, ...]:
    tensors = (graph.input(op, slot) for slot in slots)
    return tuple(tensor for tensor in tensors if tensor is not None)


def _function_of(scope: Scope) -> Scope:
    """The function a scope lies in (its calls are the norm's calls), or the scope itself."""
    return Scope(scope.path[:1], True) if scope.function else scope
