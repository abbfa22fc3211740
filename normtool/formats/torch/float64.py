"""An exported program run in float64: what the model would compute if it did not round.

Upcasting a module with `.double()` is not enough: many norms write `.float()`, many masks
`dtype=torch.float32`. So the program's ops are interpreted one by one: every float tensor enters as float64
(weights, buffers, constants, inputs), every dtype among the arguments is widened, and whatever still comes out
narrower is widened too. The tensors worked on are copies; ops may write into them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from normtool.errors import NormtoolError
from normtool.formats.torch.export import Example, first_line
from normtool.formats.torch.interface import aligned

WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}

_ATEN = torch.ops.aten

#: Ops whose last argument says "compute in float32": decompositions for half precision.
_TO_FLOAT = (_ATEN._softmax.default, _ATEN._log_softmax.default)


class NotInFloat64(NormtoolError):
    """The program cannot be run in float64; the message says why."""


class Float64Program:
    """A program with its weights widened once; each run starts from its stored buffers."""

    def __init__(self, program: ExportedProgram, device: torch.device) -> None:
        self._program = program
        self._device = device
        specs = program.graph_signature.input_specs
        self._parameters = {
            spec.target: self._wide_copy(program.state_dict[spec.target])
            for spec in specs
            if spec.kind is InputKind.PARAMETER and spec.target is not None
        }

    def run(self, example: Example) -> Any:
        """What the program returns. Raises NotInFloat64."""
        program = self._program
        try:
            with _float64_by_default():
                arguments = self._arguments(aligned(program, example))
                results = _Interpreter(program.graph_module).run(*arguments)
        except NotInFloat64:
            raise
        except Exception as error:  # whatever an op says to a dtype that it has no kernel for
            raise NotInFloat64(first_line(error)) from None
        specs = program.graph_signature.output_specs
        wanted = [r for r, s in zip(results, specs, strict=True) if s.kind is OutputKind.USER_OUTPUT]
        return pytree.tree_unflatten(wanted, program.call_spec.out_spec)

    def _arguments(self, flat: list[Any]) -> list[Any]:
        inputs, found = iter(flat), []
        for spec in self._program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                value = next(inputs)
                found.append(self._wide_copy(value) if isinstance(value, torch.Tensor) else value)
            elif spec.target in self._parameters:
                found.append(self._parameters[spec.target])
            else:
                found.append(self._stored(spec.target))
        return found

    def _stored(self, name: str | None) -> Any:
        program = self._program
        if name is None:
            raise NotInFloat64("the program orders side effects by tokens")
        value = program.state_dict[name] if name in program.state_dict else program.constants[name]
        return self._wide_copy(value) if isinstance(value, torch.Tensor) else value

    def _wide_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        dtype = WIDE.get(tensor.dtype, tensor.dtype)
        return tensor.detach().to(self._device, dtype, copy=True)


@contextmanager
def _float64_by_default() -> Iterator[None]:
    """`1 / 3` of two integer tensors has the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Interpreter(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "call_function":
            return _widened_constant(result) if n.op == "get_attr" else result
        source = n.args[0] if n.args else None
        if isinstance(source, fx.Node) and _converts(source, n) and _shares_memory(result, self.env[source]):
            return (
                result.clone()
            )  # the original has a new tensor here: writing to one must not change the other
        return pytree.tree_map_only(torch.Tensor, _widened, result)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._call_with_body(target, args)
        if not isinstance(target, torch._ops.OpOverload):
            return super().call_function(target, args, kwargs)
        if target is _ATEN._assert_tensor_metadata.default:
            return None  # it would complain about the dtypes
        if target is _ATEN.view.dtype:
            raise NotInFloat64("it looks at the bits of a float")
        args = tuple(_wide_dtype(each) for each in args)
        kwargs = {name: _wide_dtype(each) for name, each in kwargs.items()}
        if target in _TO_FLOAT:
            args = (*args[:2], False)
        return super().call_function(target, args, kwargs)

    def _call_with_body(self, target: Any, args: tuple[Any, ...]) -> Any:
        """Regions that torch.export keeps apart: no_grad, autocast (which float64 has no use for), cond."""
        name = target.name() if callable(getattr(target, "name", None)) else str(target)
        if name == "cond":
            chosen, operands = args[1] if args[0] else args[2], args[3]
        elif name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            position = next(i for i, each in enumerate(args) if isinstance(each, fx.GraphModule))
            chosen, operands = args[position], args[position + 1 :]
        else:
            raise NotInFloat64(f"it uses {name}")
        return _Interpreter(chosen).run(*operands)


def _converts(source: fx.Node, node: fx.Node) -> bool:
    """Did this op of the original make a tensor of another dtype?"""
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return before.dtype != after.dtype


def _shares_memory(tensor: Any, other: Any) -> bool:
    if not isinstance(tensor, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    return tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _wide_dtype(value: Any) -> Any:
    return WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(WIDE[tensor.dtype]) if tensor.dtype in WIDE else tensor


def _widened_constant(value: Any) -> Any:
    return _widened(value.detach()).clone() if isinstance(value, torch.Tensor) else value
