"""What the tests of folding PyTorch models share: perturbed modules, and what right and refused mean."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

import normtool

#: Largest relative difference of a fold in float64.
LIMIT = 1e-10

Inputs = tuple[torch.Tensor, ...]


def perturbed(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random numbers everywhere (default initialisation hides nearly every wrong fold), in inference mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                noise = noise.abs() + 0.3
            tensor.copy_(noise)
    return module.eval()


def double(module: nn.Module, seed: int = 0) -> nn.Module:
    return perturbed(module.double(), seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def snapshot(model: Any) -> list[Any]:
    """All that a fold must leave alone in the original: tensors bit by bit, names, flags, hooks, graph."""
    if isinstance(model, ExportedProgram):
        tensors = {**model.state_dict, **model.constants}
        return [
            [(name, id(t), _bits(t), t.requires_grad) for name, t in tensors.items()],
            str(model.graph),
            str(model.graph_signature),
            str(model.range_constraints),
        ]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    modules = list(model.named_modules(remove_duplicate=False))
    return [
        [(name, id(t), t._version, _bits(t), t.requires_grad, t.stride()) for name, t in tensors],
        [(path, id(m), type(m), m.training, list(m._modules), list(vars(m))) for path, m in modules],
        [(list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for _, m in modules],
        torch.get_rng_state().tolist(),
    ]


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def fold(model: Any, inputs: Any = None, **options: Any) -> normtool.Rewrite:
    """Fold, and see that the original is untouched."""
    before = snapshot(model)
    result = normtool.fold(model, inputs, validate=False, **options)
    assert snapshot(model) == before
    return result


def codes(result: normtool.Rewrite) -> set[str]:
    return {reason.code for site in result.sites for reason in site.reasons}


def verdicts(result: normtool.Rewrite) -> list[str]:
    return [site.verdict for site in result.sites]


def assert_same(original: Callable[..., Any], folded: Callable[..., Any], *examples: Inputs) -> None:
    """Both give the same on every example and on noise of the same shapes; a wrong scale would show."""
    with torch.no_grad():
        for example in examples:
            for seed in range(3):
                noise = [torch.randn(x.shape, generator=_generator(seed), dtype=x.dtype) for x in example]
                given = example if seed == 0 else tuple(noise)
                expected, found = original(*map(torch.clone, given)), folded(*map(torch.clone, given))
                for one, other in zip(flat(expected), flat(found), strict=True):
                    assert one.shape == other.shape
                    assert one.dtype == other.dtype
                    error = ((one - other).abs().max() / one.abs().max()).item()
                    assert error < LIMIT, error
                assert max(one.std().item() for one in flat(expected)) > 1e-3


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + seed)


def flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for each in value for tensor in flat(each)]


def norm_calls(program: ExportedProgram) -> int:
    return sum("batch_norm" in str(node.target) for node in program.graph.nodes)


def batch_norms(module: nn.Module) -> list[str]:
    return [
        name for name, child in module.named_modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)
    ]


def assert_folds(module: nn.Module, *inputs: torch.Tensor, left: int = 0) -> nn.Module:
    """Every norm but `left` of them folds; same function, right keys; a second fold finds nothing to do."""
    result = fold(module, inputs)
    assert verdicts(result).count("kept") == left, codes(result)
    assert result.folded > 0
    folded = result.model
    assert type(folded) is type(module)
    assert_same(module, folded, inputs)
    again = fold(folded, inputs)
    assert again.folded == 0
    assert [(n, _bits(t)) for n, t in again.model.state_dict().items()] == [
        (n, _bits(t)) for n, t in folded.state_dict().items()
    ]
    return folded


def assert_keeps(module: nn.Module, *inputs: torch.Tensor, reason: str) -> normtool.Rewrite:
    """Nothing is folded, this is why, and the result still does what the module did."""
    result = fold(module, inputs)
    assert result.folded == 0
    assert reason in codes(result), codes(result)
    assert_same(module, result.model, inputs)
    assert set(result.model.state_dict()) == set(module.state_dict())
    return result


def export(module: nn.Module, *inputs: torch.Tensor, **options: Any) -> ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        return torch.export.export(module, inputs, strict=False, **options)


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """In core ATen: convolution, addmm, the native forms of BatchNorm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return program.run_decompositions()


def run(program: ExportedProgram) -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return program.module()


def assert_program_folds(program: ExportedProgram, *inputs: torch.Tensor, left: int = 0) -> ExportedProgram:
    result = fold(program)
    called = [site for site in result.sites if site.norm.op is not None]
    assert sum(site.verdict == "kept" for site in called) == left, codes(result)
    assert result.folded > 0
    folded = result.model
    assert norm_calls(folded) == left
    assert_same(run(program), run(folded), inputs)
    again = fold(folded)
    assert again.folded == 0
    assert str(again.model.graph) == str(folded.graph)
    return folded


def assert_program_keeps(program: ExportedProgram, *inputs: torch.Tensor, reason: str) -> normtool.Rewrite:
    result = fold(program)
    assert result.folded == 0
    assert reason in codes(result), codes(result)
    assert str(result.model.graph) == str(program.graph)
    assert_same(run(program), run(result.model), inputs)
    return result
