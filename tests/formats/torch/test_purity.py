"""Scanning and planning leave a module as they found it, bit by bit (promise 4)."""

import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_modules
from torch.nn.parameter import is_lazy

import normtool
from normtool.errors import NormtoolError
from tests.formats.torch.awkward import AWKWARD, Awkward

Verb = Callable[[nn.Module, Any], object]


def _plan(module: nn.Module, inputs: Any) -> object:
    """Modules that cannot be exported cannot be planned either; they must survive that too."""
    try:
        return normtool.plan(module, inputs)
    except NormtoolError as error:
        return error


VERBS: dict[str, Verb] = {
    "scan with inputs": normtool.scan,
    "scan": lambda module, inputs: normtool.scan(module),
    "plan": _plan,
}

every_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())


# ---- a snapshot that shares no code with what it watches ----------------------------------------


def snapshot(root: nn.Module) -> dict[str, Any]:
    """Whatever an inspection could leave behind: what the module leads to, and the process's own state."""
    seen = {path or "the module": _of_module(child) for path, child in root.named_modules()}
    return seen | {"process": _process()}


def _of_module(module: nn.Module) -> dict[str, Any]:
    return {name: _of_value(value) for name, value in vars(module).items()} | {"class": type(module)}


def _of_value(value: Any) -> Any:
    """Identity all the way down the containers, and content where there is any."""
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, dict):
        return id(value), [(key, _of_value(each)) for key, each in value.items()]
    if isinstance(value, list | tuple):
        return id(value), [_of_value(each) for each in value]
    if isinstance(value, torch.Generator):
        return id(value), bytes(value.get_state().numpy())
    if isinstance(value, np.random.RandomState):
        return id(value), repr(value.get_state())
    if isinstance(value, set):
        return id(value), sorted(map(repr, value))
    return id(value), value if isinstance(value, bool | int | float | str) else type(value)


def _of_tensor(tensor: Tensor) -> Any:
    assert not isinstance(tensor, FakeTensor)
    known = id(tensor), type(tensor), tensor.dtype, tensor.requires_grad, id(tensor._backward_hooks)
    if is_lazy(tensor):
        return known
    hooks = [id(hook) for hook in (tensor._backward_hooks or {}).values()]
    gradient = None if not tensor.is_leaf or tensor.grad is None else _of_tensor(tensor.grad)
    return (*known, tensor._version, tuple(tensor.shape), id(tensor.grad_fn), hooks, gradient, _content(tensor))


def _content(tensor: Tensor) -> bytes:
    if tensor.is_meta:
        return b""
    plain = tensor.detach()
    if plain.layout is torch.sparse_coo:
        return _content(plain._values()) + _content(plain._indices())
    if plain.is_quantized:
        plain = plain.int_repr()
    return bytes(plain.as_subclass(Tensor).contiguous().reshape(-1).view(torch.uint8).numpy())


def _process() -> dict[str, Any]:
    return {
        "torch generator": bytes(torch.get_rng_state().numpy()),
        "numpy generator": repr(np.random.get_state()),
        "python generator": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic, warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "global hooks": list(map(id, torch_modules._global_forward_hooks.values())),
        "global pre-hooks": list(map(id, torch_modules._global_forward_pre_hooks.values())),
        "streams": (id(sys.stdout), id(sys.stderr)),
    }


def _in_training(model: nn.Module) -> nn.Module:
    """Every part in training mode but the first norm (or else the root), and a gradient here and there."""
    model.train()
    parts = list(model.modules())
    norms = [part for part in parts if "Norm" in type(part).__name__]
    (norms or parts)[0].training = False
    for parameter in list(model.parameters())[::2]:
        if parameter.requires_grad and not is_lazy(parameter) and parameter.layout is torch.strided:
            parameter.grad = torch.ones_like(parameter, memory_format=torch.contiguous_format)
    return model


@every_verb
@pytest.mark.parametrize("case", AWKWARD, ids=str)
def test_nothing_changes(case: Awkward, verb: Verb) -> None:
    model = _in_training(case.make())
    inputs = case.inputs()
    before, fed = snapshot(model), _of_value(inputs)
    verb(model, inputs)
    assert snapshot(model) == before
    assert _of_value(inputs) == fed


# ---- the snapshot sees what it should -----------------------------------------------------------


def _changes() -> Iterator[tuple[str, Callable[[Any], object]]]:
    yield "a weight", lambda m: m[0].weight.data.add_(1)
    yield "a weight and back", lambda m: m[0].weight.detach().add_(0)
    yield "a statistic", lambda m: m[1].running_mean.add_(1)
    yield "a flag", lambda m: m[1].eval()
    yield "requires_grad", lambda m: m[0].weight.requires_grad_(False)
    yield "another parameter", lambda m: setattr(m[0], "bias", nn.Parameter(m[0].bias.detach().clone()))
    yield "a hook", lambda m: m[0].register_forward_hook(print)
    yield "an attribute", lambda m: setattr(m[0], "cache", None)
    yield "torch's generator", lambda m: torch.rand(1)
    yield "numpy's generator", lambda m: np.random.rand()
    yield "python's generator", lambda m: random.random()


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in _changes()])
def test_the_snapshot_sees(change: Callable[[Any], object]) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    before = snapshot(model)
    change(model)
    assert snapshot(model) != before


# ---- hooks ------------------------------------------------------------------------------------


class Hooked(nn.Module):
    """Every sort of hook, each of which writes down what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.linear(x))


def _note(seen: list[Any]) -> Callable[..., None]:
    def hook(*values: Any, **more: Any) -> None:
        seen.append(values)

    return hook


@every_verb
def test_no_hook_of_the_user_is_run(verb: Verb) -> None:
    model, seen = Hooked(), list[Any]()
    for part in model.modules():
        part.register_forward_pre_hook(_note(seen))
        part.register_forward_pre_hook(_note(seen), with_kwargs=True)
        part.register_forward_hook(_note(seen))
        part.register_full_backward_hook(_note(seen))
        part._register_state_dict_hook(_note(seen))  # type: ignore[no-untyped-call]
        part.register_state_dict_pre_hook(_note(seen))  # type: ignore[no-untyped-call]
    model.linear.weight.register_hook(_note(seen))  # type: ignore[no-untyped-call]
    before = snapshot(model)
    verb(model, torch.ones(2, 4))
    assert seen == []
    assert snapshot(model) == before


@every_verb
def test_no_global_hook_is_run(verb: Verb) -> None:
    seen: list[Any] = []
    handles = [
        torch_modules.register_module_forward_hook(_note(seen)),
        torch_modules.register_module_forward_pre_hook(_note(seen)),
    ]
    try:
        verb(Hooked(), torch.ones(2, 4))
        assert seen == []
        Hooked()(torch.ones(2, 4))
        assert len(seen) == 6  # three modules, twice
    finally:
        for handle in handles:
            handle.remove()


class SecretRMSNorm(nn.Module):
    """A norm that only a probe can tell, which writes down what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        x = x + 0 * (random.random() + float(np.random.rand()) + torch.rand(()))
        return x * x.pow(2).mean(-1, keepdim=True).rsqrt() * self.weight


@every_verb
def test_a_probed_module_is_not_run(verb: Verb) -> None:
    model, seen = nn.Sequential(SecretRMSNorm()), list[Any]()
    model[0].register_forward_hook(_note(seen))
    model[0].register_forward_pre_hook(_note(seen))
    before = snapshot(model)
    assert normtool.scan(model).norms[0].norm.evidence == "probe"
    verb(model, torch.ones(2, 4))
    assert seen == []
    assert snapshot(model) == before


@every_verb
@pytest.mark.parametrize("name", ["weight norm, old style", "spectral norm, old style"])
def test_old_style_norms_of_weights_still_work(name: str, verb: Verb) -> None:
    """They compute their weight in a pre-hook, which has to be theirs and not the copy's."""
    case = next(case for case in AWKWARD if case.name == name)
    model = case.make().eval()
    twin = case.make().eval()
    twin.load_state_dict(model.state_dict())
    verb(model, case.inputs())
    for parameter, same in zip(model.parameters(), twin.parameters(), strict=True):
        parameter.data.mul_(1.5)
        same.data.mul_(1.5)
    torch.testing.assert_close(model(*case.inputs()), twin(*case.inputs()), rtol=0, atol=0)


def test_a_hook_on_the_weights_stops_the_fold() -> None:
    """The graph was made without it, so nothing is known of what it does."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    assert normtool.fold(model, torch.ones(2, 4), validate=False).folded == 1
    model[0].register_forward_pre_hook(lambda part, values: part.weight.data.clamp_(-0.1, 0.1))
    result = normtool.fold(model, torch.ones(2, 4), validate=False)
    assert (result.folded, result.sites[0].reasons[0].code) == (0, "hook")


# ---- modes --------------------------------------------------------------------------------------


@every_verb
def test_under_other_defaults(verb: Verb) -> None:
    """float64 by default, no gradients, determinism: all as the caller set them."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.no_grad():
            before = snapshot(model)
            verb(model, torch.ones(2, 4, dtype=torch.float32))
            assert snapshot(model) == before
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(False)


def test_scanning_twice_says_the_same() -> None:
    for case in AWKWARD[::5]:
        model = case.make()
        first = normtool.scan(model, case.inputs()).to_dict()
        assert normtool.scan(model, case.inputs()).to_dict() == first


@every_verb
def test_no_hook_is_run_where_export_fails(verb: Verb) -> None:
    """Nor in a second attempt."""
    case = next(case for case in AWKWARD if case.name == "data-dependent branch")
    model, seen = case.make(), list[Any]()
    for part in model.modules():
        part.register_forward_pre_hook(_note(seen))
        part.register_forward_hook(_note(seen))
    verb(model, case.inputs())
    assert seen == []
