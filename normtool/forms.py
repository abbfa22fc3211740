"""Norms as the graph computes them: single operators and norms spelled out in primitive ones, said in one way.

A `NormForm` is y = γ · (x − mean)/√(var + ε) + β, or the same without the mean, with everything in which one
spelling may differ from the next as a fact of its own (ALGEBRA §7).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from normtool.constants import Constants
from normtool.graph import ModelGraph, Op, Tensor
from normtool.norms import axes_of, number

#: What `NormForm.spelling` says of a norm that is no operator.
SPELLED_OUT = "spelled out"


@dataclass(frozen=True, eq=False)
class NormForm:
    """y = gain · (γ + weight_offset) · (x − mean)/√(var + ε) + β over `axes`; rms_norm, lp_norm have no mean.

    Of x the statistics are taken: casts into the precision that they are computed in belong to the norm.

    kind            what it is: layer_norm, rms_norm, group_norm, instance_norm, lp_norm (x/√(Σx² + ε))
    axes            of x; not negative where the rank is known. A group_norm's are those of the ungrouped x
    weight, bias    γ and β as they are read, None where there is none; of an operator they may be data
    ops             every op that belongs to it, in dataflow order, without those that compute constants
    eps_mode        where ε stands: "inside" the root, "outside" (√var + ε), or it is the least that the root
                    may be ("max")
    unbiased        the variance divides by N − 1
    compute_dtype   dtype of the statistics where casts surround them, else None
    cast_before_weight  the cast back comes before γ (Llama), or after (Gemma); None where there is none
    observed        tensors between x and y that somebody else reads: mean, 1/σ, x − mean, what γ scales, …
    shares          those of `ops` that are another form's too (one pair of statistics, two pairs of γ, β)
    assumed         settings (ε, exponents) whose stored value is relied on, though the caller may pass another
    """

    kind: str
    x: Tensor
    y: Tensor
    axes: tuple[int, ...]
    eps: float | None
    weight: Tensor | None
    bias: Tensor | None
    ops: tuple[Op, ...]
    weight_offset: float = 0.0
    gain: float = 1.0
    eps_mode: Literal["inside", "outside", "max"] = "inside"
    unbiased: bool = False
    compute_dtype: np.dtype[Any] | None = None
    cast_before_weight: bool | None = None
    observed: tuple[Tensor, ...] = ()
    shares: tuple[Op, ...] = ()
    groups: int | None = None
    p: int = 2
    spelling: str = SPELLED_OUT
    assumed: tuple[Tensor, ...] = ()

    @property
    def eps_inside(self) -> bool:
        return self.eps_mode == "inside"

    def to_dict(self) -> dict[str, Any]:
        """The facts, in words."""
        order = {None: None, True: "before_weight", False: "after_weight"}
        return {
            "weight": self.weight is not None,
            "bias": self.bias is not None,
            "offset": self.weight_offset,
            "gain": self.gain,
            "eps_mode": self.eps_mode,
            "unbiased": self.unbiased,
            "compute_dtype": None if self.compute_dtype is None else self.compute_dtype.name,
            "cast_back": order[self.cast_before_weight],
            "groups": self.groups,
            "p": self.p,
            "ops": [op.name for op in self.ops],
        }

    @property
    def is_native(self) -> bool:
        """Is it a single operator?"""
        return self.spelling != SPELLED_OUT


def norm_forms(graph: ModelGraph, constants: Constants | None = None) -> list[NormForm]:
    """Every norm whose map is known in full, in the order of the graph; first all that are operators.

    An operator that a larger norm contains (the InstanceNormalization in a GroupNorm) is part of that.
    """
    constants = constants or Constants(graph)
    found = spelled_forms(graph, constants)
    claimed = {op for form in found for op in form.ops}
    return [*_native_forms(graph, constants, claimed), *found]


#: Kinds of which every norm that is spelled out has one; all but a few ops are of other kinds.
ROOTS = frozenset("sqrt rsqrt pow reduce_l2 reduce_l1 std std_mean".split())


def spelled_forms(graph: ModelGraph, constants: Constants) -> list[NormForm]:
    """Every norm that is no operator, in the order in which they end."""
    if not any(op.kind in ROOTS or op.kind == "instance_norm" for op in graph.ops):
        return []
    from normtool.spelled import spelled_out  # most graphs have no use for it

    return spelled_out(graph, constants)


# ---- operators ----------------------------------------------------------------------------------

#: Kinds whose op alone is the whole form.
_NATIVE = frozenset(["layer_norm", "rms_norm", "group_norm", "instance_norm", "lp_norm"])


def _native_forms(graph: ModelGraph, constants: Constants, claimed: set[Op]) -> Iterator[NormForm]:
    for op in graph.ops:
        if op.kind in _NATIVE and op not in claimed:
            form = _native_form(graph, constants, op)
            if form is not None:
                yield form


def _native_form(graph: ModelGraph, constants: Constants, op: Op) -> NormForm | None:
    """None where the op is malformed, or normalises with stored statistics."""
    inputs, outputs = graph.inputs(op), graph.outputs(op)
    if "x" not in inputs or "y" not in outputs or op.attributes.get("use_input_stats") is False:
        return None
    axes = axes_of(constants, op, graph.rank(inputs["x"]))
    if axes is None:
        return None
    return NormForm(
        kind=op.kind,
        x=inputs["x"],
        y=outputs["y"],
        axes=axes,
        eps=number(constants.attribute(op, "epsilon")),
        weight=inputs.get("weight"),
        bias=inputs.get("bias"),
        ops=(op,),
        observed=_read_statistics(graph, outputs),
        groups=constants.attribute(op, "num_groups") if op.kind == "group_norm" else None,
        p=int(constants.attribute(op, "p") or 2) if op.kind == "lp_norm" else 2,
        spelling=f"{op.domain}::{op.spelling}" if op.domain else op.spelling,
    )


def _read_statistics(graph: ModelGraph, outputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor for slot, tensor in outputs.items() if slot != "y" and graph.readers(tensor))
