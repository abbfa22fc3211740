"""Every block of `blocks.py` as a module, a program and an ONNX file: what a fold leaves; the same function.

Counted in the result itself: BatchNorm calls that a run of the module makes, nodes of the program, nodes of the
ONNX graph. Modules and programs are compared in float64. ONNX Runtime has no float64 convolution: there the
original's own distance from float64 is the measure of how far the folded model may be off.
"""

import copy
import functools
import re
import warnings
import zlib
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._python_dispatch import TorchDispatchMode

import normtool
from normtool.planner import Site
from normtool.reasons import KEPT
from tests.blocks import BLOCKS, Block
from tests.formats.torch import checks

#: Largest difference of two outputs in float64, relative to the largest value of the output.
LIMIT = 1e-10

#: In float32: how many times the original's own error the folded model may be off.
NOISE = 32

#: A tenth more of any γ or β changes the output by this at least.
VISIBLE = 2e-4

pytestmark = pytest.mark.usefixtures("translations_read_once")

Inputs = tuple[Tensor, ...]
Outputs = list[Tensor]


# ---- models -----------------------------------------------------------------------------------


def perturb(module: nn.Module, seed: int) -> nn.Module:
    """No tensor at its initial value, all exact in float32; γ of both signs, some variances far below ε."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, shape: torch.Size) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    def signed(low: float, high: float, shape: torch.Size) -> Tensor:
        """Of both signs, the first two elements in any case."""
        sign = 1 - 2 * (torch.rand(shape, generator=generator) < 0.4).float()
        sign.view(-1)[:2] = torch.tensor([1.0, -1.0])[: sign.numel()]
        return sign * uniform(low, high, shape)

    with torch.no_grad():
        for part in module.modules():
            tensors = dict([*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)])
            if "running_var" in tensors:
                tiny = torch.arange(len(tensors["running_var"])) % 3 == 1
                var = torch.where(tiny, 1e-8, uniform(0.5, 2, tiny.shape))
                gamma = signed(0.5, 1.5, tiny.shape) * torch.where(tiny, 3e-3, 1)
                tensors["running_var"].copy_(var.float())
                tensors["weight"].copy_(gamma.float())
                tensors["running_mean"].copy_(uniform(-0.5, 0.5, tiny.shape))
                tensors["bias"].copy_(uniform(-1, 1, tiny.shape))
                continue
            for name, tensor in tensors.items():
                if not tensor.is_floating_point():
                    continue
                if name == "weight":
                    fan_in = tensor[0].numel()
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * (1.5 / fan_in) ** 0.5)
                else:
                    tensor.copy_(signed(0.2, 1, tensor.shape))
    return module.eval()


def batch_norm_nodes(nodes: Iterable[onnx.NodeProto]) -> int:
    return sum(node.op_type == "BatchNormalization" for node in nodes)


class Calls(TorchDispatchMode):
    """Counts the BatchNorms that are run, whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "batch_norm" in str(function)
        return function(*args, **(kwargs or {}))


def run(model: Callable[..., Any], inputs: Inputs) -> Outputs:
    with torch.no_grad():
        return checks.flat(model(*map(torch.clone, inputs)))


def run_onnx(model: onnx.ModelProto, inputs: Inputs) -> Outputs:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    given = {name: x.float().numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(np.asarray(y)).double() for y in session.run(None, given)]


def calls(module: nn.Module, inputs: Inputs) -> int:
    with Calls() as counted:
        run(module, inputs)
    return counted.count


class Case:
    """One block in all its forms, made once. The weights of all are the same numbers."""

    def __init__(self, block: Block) -> None:
        seed = zlib.crc32(block.name.encode())
        self.module = perturb(block.make().double(), seed)
        # two sets of inputs: the second could not have been seen by whoever was given the first
        self.inputs, self.others = (
            tuple(
                checks.randn(*shape, seed=seed + 2 * i + k).float().double()
                for i, shape in enumerate(block.shapes)
            )
            for k in range(2)
        )
        self.expected = [run(self.module, inputs) for inputs in (self.inputs, self.others)]

    @cached_property
    def program(self) -> ExportedProgram:
        return checks.export(self.module, *self.inputs)

    @cached_property
    def onnx(self) -> onnx.ModelProto:
        module, inputs = copy.deepcopy(self.module).float(), tuple(x.float() for x in self.inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own
            exported = torch.onnx.export(module, inputs, dynamo=True, optimize=False, verbose=False)
        model: onnx.ModelProto = exported.model_proto
        return model


@functools.cache
def case(block: Block) -> Case:
    return Case(block)


# ---- what is right ----------------------------------------------------------------------------


def errors(found: Outputs, expected: Outputs) -> list[float]:
    """Of each output, relative to its largest value."""
    assert [y.shape for y in found] == [y.shape for y in expected]
    return [((y - z).abs().max() / z.abs().max()).item() for y, z in zip(found, expected, strict=True)]


def assert_equal(model: Callable[..., Any], of: Case) -> None:
    for inputs, expected in zip((of.inputs, of.others), of.expected, strict=True):
        found = run(model, inputs)
        assert [y.dtype for y in found] == [z.dtype for z in expected]
        assert max(errors(found, expected)) < LIMIT


def assert_equal_onnx(model: onnx.ModelProto, of: Case) -> None:
    for inputs, expected in zip((of.inputs, of.others), of.expected, strict=True):
        noise = max(1e-7, *errors(run_onnx(of.onnx, inputs), expected))
        assert NOISE * noise < VISIBLE / 4
        assert max(errors(run_onnx(model, inputs), expected)) < NOISE * noise


def path_of(site: Site) -> str:
    """Of the norm in the module: the names of its parameters keep it in every format."""
    return (*site.norm.learnable, *site.norm.buffers)[0].name.rpartition(".")[0]


def assert_sites(result: normtool.Rewrite, block: Block, remaining: int, left: int | None) -> None:
    """`remaining` norms were counted in the result, `left` there should be."""
    # a norm that the module spells out itself is a site of normtool's, and none of those counted here
    named = [site for site in result.sites if site.norm.learnable or site.norm.buffers]
    sites = [site for site in named if path_of(site) in checks.batch_norms(case(block).module)]
    kept = [site for site in sites if site.verdict == KEPT]
    reasons = {path_of(site): [reason.code for reason in site.reasons] for site in kept}
    assert len(sites) == block.norms
    assert all(site.norm.kind == "batch_norm" for site in sites)
    assert len(kept) == remaining, reasons
    assert all(site.reasons for site in kept), reasons
    assert all(reason.message for site in kept for reason in site.reasons)
    if left is None:
        return
    assert remaining == left, (block.how, reasons)
    if left != block.left:
        assert any("no_module" in codes for codes in reasons.values()), reasons
    else:
        for expected in block.kept:
            matching = [name for name in reasons if re.fullmatch(expected.pattern, name)]
            assert len(matching) == expected.sites, (expected, reasons)


# ---- the tests --------------------------------------------------------------------------------

every_block = pytest.mark.parametrize("block", BLOCKS, ids=str)


@every_block
def test_the_table_is_consistent_and_every_norm_shows_in_the_output(block: Block):
    assert block.norms == calls(case(block).module, case(block).inputs)
    assert block.left is None or block.left == sum(kept.sites for kept in block.kept)
    assert len({each.name for each in BLOCKS}) == len(BLOCKS)
    module = copy.deepcopy(case(block).module)
    for name in checks.batch_norms(module):
        norm = module.get_submodule(name)
        for tensor in (norm.weight, norm.bias):
            with torch.no_grad():
                before = tensor.clone()
                tensor.mul_(1.1)
                change = max(errors(run(module, case(block).inputs), case(block).expected[0]))
                tensor.copy_(before)
            # what all keys have in common does not change a softmax over the keys
            unseen = tensor is norm.bias and name == "k.bn"
            assert change > VISIBLE or unseen, (name, change)


@every_block
def test_module(block: Block):
    of = case(block)
    result = checks.fold(of.module, of.inputs)
    assert_equal(result.model, of)
    assert_sites(result, block, calls(result.model, of.inputs), block.left_in_module)
    assert checks.fold(result.model, of.inputs).folded == 0


@pytest.mark.long  # the same plans as for the modules, and the same edits as in ONNX
@every_block
def test_program(block: Block):
    of = case(block)
    assert checks.norm_calls(of.program) == block.norms
    result = checks.fold(of.program)
    assert_equal(checks.run(result.model), of)
    assert_sites(result, block, checks.norm_calls(result.model), block.left)
    assert checks.fold(result.model).folded == 0


@every_block
def test_onnx(block: Block):
    of = case(block)
    before = of.onnx.SerializeToString()
    assert not of.onnx.functions
    assert batch_norm_nodes(of.onnx.graph.node) == block.norms
    result = normtool.fold(of.onnx, validate=False)
    onnx.checker.check_model(result.model)
    assert_equal_onnx(result.model, of)
    assert_sites(result, block, batch_norm_nodes(result.model.graph.node), block.left)
    assert normtool.fold(result.model, validate=False).folded == 0
    assert of.onnx.SerializeToString() == before
