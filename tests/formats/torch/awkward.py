"""Awkward modules, and what is true of each, counted by hand.

The arithmetic stands beside every number and none of it was made by the code under test. Learnable, frozen and
buffers are stored elements; `named` counts every name, `unique` every Parameter object. A BatchNorm's buffers
are 2C + 1: mean, variance and the running count.
"""

import random
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - everyone's name for it
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Norm:
    """`evidence` is "op" or "pattern" for norms in other modules' code, which only the dataflow shows."""

    kind: str
    learnable: int = 0
    frozen: int = 0
    buffers: int = 0
    calls: int = 1
    evidence: str = "module"
    uninitialised: int = 0


@dataclass(frozen=True)
class Awkward:
    """`named` and `unique` are `learnable + frozen` unless given.

    `refused` begins torch.export's own first line. `saved` and `saved_norms` say where the .pt2 of the module
    differs from it, comments beside them why; `unsaved` is what torch or normtool say when there can be none.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    learnable: int = 0
    frozen: int = 0
    buffers: int = 0
    norms: Mapping[str, Norm] = field(default_factory=dict)
    named: int | None = None
    unique: int | None = None
    uninitialised: int = 0
    bytes: tuple[int, int, int] | None = None
    refused: str = ""
    saved: Mapping[str, int] = field(default_factory=dict)
    saved_norms: Mapping[str, Norm] = field(default_factory=dict)
    unsaved: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def totals(self) -> dict[str, int]:
        whole = self.learnable + self.frozen
        return {
            "learnable": self.learnable,
            "frozen": self.frozen,
            "buffers": self.buffers,
            "named": whole if self.named is None else self.named,
            "unique": whole if self.unique is None else self.unique,
            "uninitialised": self.uninitialised,
        }


def _normal(*shape: int) -> Callable[[], Inputs]:
    return lambda: (torch.linspace(-1, 1, int(np.prod(shape))).reshape(shape),)


def _indices(*shape: int) -> Callable[[], Inputs]:
    return lambda: (torch.arange(int(np.prod(shape))).reshape(shape) % 5,)


def _quietly(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Old torch APIs say that they are old."""

    def made() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make()

    return made


# ---- weights under several names --------------------------------------------------------------


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(self.tower(x), self.tower(2 * x))


class TiedHead(nn.Module):
    """`head.weight = embed.weight`, the way language models tie."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.norm(self.embed(ids)))


class OneStorage(nn.Module):
    """Two Parameters and a transposed buffer on one storage, and a Parameter on half of it."""

    transposed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(4, 3))
        self.b = nn.Parameter(self.a.detach())
        self.top = nn.Parameter(self.a.detach()[:2])
        self.register_buffer("transposed", self.a.detach().t())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a) + F.linear(x, self.b) + x @ self.transposed


class BitsOfWeight(nn.Module):
    """A buffer that reads the bytes of a float32 weight: another dtype, the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))
        self.register_buffer("bits", self.weight.detach().view(torch.uint8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class TwoNames(nn.Module):
    """One Parameter under two names of one module, beside a parameter and a buffer that are None."""

    bias: None

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))
        self.kernel = self.weight
        self.register_parameter("bias", None)
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kernel, self.bias)


class Expanded(nn.Module):
    """Stride 0: twelve elements of one Parameter, three in memory. And one of every 4th column."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.ones(3).expand(4, 3))
        self.sparse_columns = nn.Parameter(torch.ones(3, 8)[:, ::4])
        self.both = nn.Parameter(torch.ones(12)[::4].unsqueeze(1).expand(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.wide) @ self.wide


class TwoHomes(nn.Module):
    """One BatchNorm in two Sequentials."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(4)
        self.left = nn.Sequential(nn.Linear(4, 4), norm)
        self.right = nn.Sequential(nn.Linear(4, 4), norm)

    def forward(self, x: Tensor) -> Any:
        return self.right(self.left(x))


# ---- parameters that belong to no layer -------------------------------------------------------


class Bare(nn.Module):
    """A root parameter, a ParameterList, a ParameterDict, an empty Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.steps = nn.ParameterList([torch.ones(4), torch.ones(2, 4)])
        self.named = nn.ParameterDict({"shift": torch.ones(4), "scale": torch.ones(1)})
        self.empty = nn.Parameter(torch.ones(0, 7))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.steps[0] + self.named["shift"]  # type: ignore[no-any-return]


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.unused = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.used(x))


def _half_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2), nn.LayerNorm(2))
    model[:2].requires_grad_(False)
    model[3].bias.requires_grad_(False)
    return model


class Buffers(nn.Module):
    """float16, bool, integers; persistent and not; a view of a parameter."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))
        self.register_buffer("float16", torch.ones(5, dtype=torch.float16))
        self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool), persistent=False)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("first_row", self.weight.detach()[0], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * self.mask[0]


class ManyDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.complex = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.brain = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
        self.eight = nn.Parameter(torch.ones(7).to(torch.float8_e4m3fn), requires_grad=False)
        self.wide = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.complex.real + self.eight.to(torch.float32).sum() + self.brain.float().sum()


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4).to_sparse())
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.linear(torch.sparse.mm(self.weight, x.t()).t())


class Labelled(Tensor):
    """A tensor subclass that adds nothing."""


class Subclassed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4).as_subclass(Labelled))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


# ---- batch norms ------------------------------------------------------------------------------


def _batch_norms() -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.BatchNorm2d(3, affine=False, track_running_stats=False),
        nn.SyncBatchNorm(3).eval(),
    )


class FrozenBatchNorm(nn.Module):
    """torchvision's, mmdetection's, DETR's: four buffers."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class Stem(nn.BatchNorm2d):
    """A BatchNorm under another name."""


class ConvBatchNorm(nn.Sequential):
    """A block called after a norm: not one itself."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))


class LayerNormCalledBn1(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Any:
        return self.bn1(x)


# ---- other norms ------------------------------------------------------------------------------


class T5LayerNorm(nn.Module):
    """An RMSNorm by another name (transformers)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))


class GemmaRMSNorm(nn.Module):
    """y · (1 + w) (transformers)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.eps = 1e-6
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class NoNorm(nn.Module):
    """MobileBERT's: an affine map, no norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class LN(nn.Module):
    """A hand-written LayerNorm over the channels of an image, under initials."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
        return (x - mean) * (var + 1e-5).rsqrt() * self.g + self.b


class HandInstanceNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=(2, 3), unbiased=False, keepdim=True)
        return (x - mean) / torch.sqrt(var + 1e-5)


class HandGroupNorm(nn.Module):
    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.view(n, self.groups, -1)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return y.view(n, c, h, w) * self.weight + self.bias


class L2Norm(nn.Module):
    """SSD's: divides by the length, not by the root mean square."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), 20.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[:, None, None] * x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)


class NormLinear(nn.Module):
    """A cosine classifier ignores the scale of its input as a norm does, and mixes channels as none does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class NormalNoise(nn.Module):
    """Sounds like a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.std = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.std


class Functional(nn.Module):
    """Norms that no module stands for, with operands of the model's own."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))
        self.scale = nn.Parameter(torch.ones(4))
        self.shift = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.mean, self.var, self.gain, None, training=False)
        x = F.layer_norm(x, (4,), self.scale, self.shift)
        return F.group_norm(F.rms_norm(x, (4,)), 1)


class ManyCalls(nn.Module):
    """One LayerNorm three times, one hand-written norm twice, one BatchNorm never."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LayerNorm(6)
        self.rms = T5LayerNorm(6)
        self.batch = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return self.rms(torch.tanh(self.rms(x)))  # type: ignore[no-any-return]


# ---- parametrisations -------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


def _nested() -> nn.Module:
    """A parametrised norm, and one parametrisation on top of another."""
    norm = nn.LayerNorm(4)
    parametrize.register_parametrization(norm, "weight", Doubled())
    linear = nn.Linear(4, 3)
    parametrize.register_parametrization(linear, "weight", Doubled())
    parametrize.register_parametrization(linear, "weight", Doubled())
    return nn.Sequential(norm, linear)


# ---- what forward does to itself --------------------------------------------------------------


class Caches(nn.Module):
    """Keeps what it computed, in an attribute and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.cache: Tensor | None = None
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.cache = self.norm(x)
        self.seen.append(self.cache)
        return self.cache


def _with_history() -> nn.Module:
    """It has been called: the cache holds a tensor that requires grad, which deepcopy refuses."""
    model = Caches()
    model(torch.linspace(-1, 1, 8).reshape(2, 4))
    return model


class Random(nn.Module):
    """Every generator at once, torch's own and one that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.drop = nn.Dropout(0.5)
        self.generator = torch.Generator().manual_seed(1)
        self.rng = np.random.RandomState(1)

    def forward(self, x: Tensor) -> Tensor:
        noise = (
            torch.rand_like(x)
            + torch.rand(4, generator=self.generator)
            + random.random()
            + float(np.random.rand())
            + float(self.rng.rand())
        )
        return self.drop(self.norm(x)) + noise  # type: ignore[no-any-return]


class MutatesBuffer(nn.Module):
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))
        self.plain = torch.zeros(1)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.plain.add_(1)
        return self.norm(x) + self.steps  # type: ignore[no-any-return]


class HoldsLock(nn.Module):
    """Cannot be deep-copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Any:
        with self.lock:
            return self.norm(x)


class Branches(nn.Module):
    """Cannot be exported: what it does depends on the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Any:
        return self.norm(x) if x.sum() > 0 else self.norm(-x)


# ---- wrappers ---------------------------------------------------------------------------------


def _small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def _traced_by_fx() -> nn.Module:
    return torch.fx.symbolic_trace(_small())


def _scripted() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, track_running_stats=True), nn.BatchNorm2d(4))
    scripted: nn.Module = torch.jit.script(model)
    return scripted


def _quantise_dynamically(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    quantise: Callable[..., nn.Module] = torch.ao.quantization.quantize_dynamic
    return quantise(model, {kind}, dtype=torch.qint8)


def _quantised() -> nn.Module:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)).eval()
    return _quantise_dynamically(model, nn.Linear)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.lstm(x)[0]


def _quantised_lstm() -> nn.Module:
    return _quantise_dynamically(Recurrent().eval(), nn.LSTM)


def _two_devices() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, device="meta"))


def _tied_on_meta() -> nn.Module:
    with torch.device("meta"):
        model = TiedHead()
        model.register_parameter("view", nn.Parameter(model.embed.weight.detach()[:2]))
    return model


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.RMSNorm(8, eps=None)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.attention(x, x, x, need_weights=False)[0])


_BN3 = Norm("batch_norm", 6, 0, 7)  # γ, β of 3 · mean, var, count
_BN4 = Norm("batch_norm", 8, 0, 9)

_DATA_DEPENDENT = "GuardOnDataDependentSymNode: Could not guard on data-dependent expression"

AWKWARD: tuple[Awkward, ...] = (
    # ---- several names --------------------------------------------------------------------
    Awkward(
        "siamese",
        Siamese,
        _normal(2, 4),
        learnable=21,  # 4·3 + 3, and 2·3
        buffers=7,  # 2·3 + 1
        norms={"tower.1": Norm("batch_norm", 6, 0, 7, calls=2)},
        bytes=(84, 0, 32),  # 21·4; 6·4 + 8
    ),
    Awkward(
        "tied head",
        TiedHead,
        _indices(2, 3),
        learnable=28,  # 5·4 once, 2·4
        named=48,  # 5·4 twice, 2·4
        saved={"unique": 48},  # the file knows one storage, but not that it was one object
        norms={"norm": Norm("layer_norm", 8)},
    ),
    Awkward(
        "one storage",
        OneStorage,
        _normal(2, 3),
        learnable=12,  # 4·3
        named=30,  # 12 + 12 + 6
        unique=30,
        buffers=0,  # the buffer is the same memory
        bytes=(48, 0, 0),
    ),
    Awkward(
        "bits of a weight",
        BitsOfWeight,
        _normal(2, 4),
        learnable=12,  # 3·4
        saved={"buffers": 48},  # buffers that are not persistent are written beside the weights
        buffers=0,  # its 48 bytes are those of the weight
        bytes=(48, 0, 0),
    ),
    Awkward(
        "two names in one module", TwoNames, _normal(2, 4), learnable=12, named=24, saved={"unique": 24}
    ),  # 3·4, twice
    Awkward(
        "expanded and strided",
        Expanded,
        _normal(2, 3),
        learnable=12,  # 3; 3·2; 3
        named=27,  # 4·3 + 3·2 + 3·3
        unique=27,
    ),
    Awkward(
        "one norm in two sequentials",
        TwoHomes,
        _normal(2, 4),
        learnable=48,  # twice 4·4 + 4, once 2·4
        named=56,  # 20 + 8, twice
        buffers=9,  # 2·4 + 1
        norms={"left.1": Norm("batch_norm", 8, 0, 9, calls=2)},
        saved={"unique": 56},
        saved_norms={"left.1": _BN4, "right.1": _BN4},  # the file knows paths, not modules
    ),
    # ---- no layer -------------------------------------------------------------------------
    Awkward("bare parameters", Bare, _normal(2, 4), learnable=21),  # 4 + (4 + 2·4) + (4 + 1) + 0·7
    Awkward(
        "unused modules",
        Unused,
        _normal(2, 4),
        learnable=33,  # 4·3 + 3, 2·3, 3·2 + 2, 2·2
        buffers=7,
        norms={"norm": _BN3, "unused.1": Norm("layer_norm", 4, calls=0)},
    ),
    Awkward(
        "frozen half",
        _half_frozen,
        _normal(2, 4),
        learnable=10,  # 3·2 + 2, and γ of 2
        frozen=23,  # 4·3 + 3, 2·3, and β of 2
        buffers=7,
        norms={"1": Norm("batch_norm", 0, 6, 7), "3": Norm("layer_norm", 2, 2)},
        bytes=(40, 92, 32),
    ),
    Awkward(
        "buffers of every sort",
        Buffers,
        _normal(2, 4),
        learnable=12,  # 3·4
        buffers=15,  # 5 + 3·3 + 1; the view of the weight is the weight
        bytes=(48, 0, 27),  # 5·2 + 9·1 + 8
        saved={"buffers": 19},  # 4 of the view, written beside the weights
    ),
    Awkward(
        "many dtypes",
        ManyDtypes,
        _normal(2, 3),
        learnable=10,  # 3 + 5 + 2
        frozen=7,
        bytes=(50, 7, 0),  # 3·8 + 5·2 + 2·8; 7·1
    ),
    Awkward(
        "sparse parameter",
        Sparse,
        _normal(2, 4),
        learnable=14,  # 4 non-zeros, 4·2 + 2
        named=26,  # 4·4, 4·2 + 2
        unique=26,
        bytes=(56, 0, 0),
        unsaved="Cannot access storage of SparseTensorImpl",
    ),
    Awkward(
        "tensor subclass", Subclassed, _normal(2, 4), learnable=12, unsaved="asks for more than tensors"
    ),  # 3·4
    # ---- batch norms ----------------------------------------------------------------------
    Awkward(
        "batch norms with and without",
        _batch_norms,
        _normal(2, 3, 4, 4),
        learnable=18,  # 6 + 0 + 6 + 0 + 6
        buffers=21,  # 7 + 7 + 0 + 0 + 7
        norms={
            "0": _BN3,
            "1": Norm("batch_norm", 0, 0, 7),
            "2": Norm("batch_norm", 6, 0, 0),
            "3": Norm("batch_norm"),
            "4": _BN3,
        },
    ),
    Awkward(
        "batch norm without bias",
        lambda: nn.Sequential(nn.BatchNorm2d(3, bias=False)),
        _normal(2, 3, 4, 4),
        learnable=3,  # γ
        buffers=7,
        norms={"0": Norm("batch_norm", 3, 0, 7)},
    ),
    Awkward(
        "batch norm at the root",
        lambda: nn.BatchNorm1d(3),
        _normal(2, 3),
        learnable=6,
        buffers=7,
        norms={"BatchNorm1d": _BN3},
    ),
    Awkward(
        "frozen batch norm",
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm(4)),
        _normal(1, 3, 2, 2),
        learnable=16,  # 3·4 + 4
        buffers=16,  # 4·4
        norms={"1": Norm("batch_norm", 0, 0, 16, evidence="statistics")},
    ),
    Awkward(
        "batch norm under another name",
        lambda: nn.Sequential(Stem(4)),
        _normal(2, 4, 2, 2),
        learnable=8,
        buffers=9,
        norms={"0": _BN4},
    ),
    Awkward(
        "block called BatchNorm",
        lambda: nn.Sequential(ConvBatchNorm()),
        _normal(2, 3, 2, 2),
        learnable=20,  # 3·4, 2·4
        buffers=9,
        norms={"0.1": _BN4},
    ),
    # ---- other norms ----------------------------------------------------------------------
    Awkward(
        "layer norm called bn1",
        LayerNormCalledBn1,
        _normal(2, 6),
        learnable=12,
        norms={"bn1": Norm("layer_norm", 12)},
    ),
    Awkward(
        "layer norm over three axes",
        lambda: nn.Sequential(nn.LayerNorm((3, 4, 5)), nn.LayerNorm((4, 5), elementwise_affine=False)),
        _normal(2, 3, 4, 5),
        learnable=120,  # 2·3·4·5
        norms={"0": Norm("layer_norm", 120), "1": Norm("layer_norm")},
    ),
    Awkward(
        "group and instance norms",
        lambda: nn.Sequential(
            nn.GroupNorm(2, 4),
            nn.GroupNorm(2, 4, affine=False),
            nn.InstanceNorm2d(4),
            nn.InstanceNorm2d(4, affine=True),
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        ),
        _normal(2, 4, 3, 3),
        learnable=24,  # 8 + 0 + 0 + 8 + 8
        buffers=9,
        norms={
            "0": Norm("group_norm", 8),
            "1": Norm("group_norm"),
            "2": Norm("instance_norm"),
            "3": Norm("instance_norm", 8),
            "4": Norm("instance_norm", 8, 0, 9),
        },
    ),
    Awkward(
        "local response norm",
        lambda: nn.Sequential(nn.LocalResponseNorm(3), nn.Conv2d(4, 2, 1)),
        _normal(1, 4, 3, 3),
        learnable=10,  # 4·2 + 2
        norms={"0": Norm("local_response_norm")},
    ),
    Awkward(
        "T5 and Gemma",
        lambda: nn.Sequential(T5LayerNorm(8), GemmaRMSNorm(8)),
        _normal(2, 8),
        learnable=16,
        norms={"0": Norm("rms_norm", 8, evidence="probe"), "1": Norm("rms_norm", 8, evidence="probe")},
    ),
    Awkward(
        "norms written by hand",
        lambda: nn.Sequential(LN(6), HandInstanceNorm(), HandGroupNorm(2, 6), L2Norm(6)),
        _normal(2, 6, 3, 3),
        learnable=30,  # 2·6, 0, 2·6, 6
        norms={
            "0": Norm("layer_norm", 12, evidence="probe"),
            "1": Norm("instance_norm", evidence="probe"),
            "2": Norm("group_norm", 12, evidence="probe"),
            "3": Norm("lp_norm", 6, evidence="probe"),
        },
    ),
    Awkward(
        "only called norm",
        lambda: nn.Sequential(NoNorm(4), NormalNoise(), NormLinear(4)),
        _normal(2, 4),
        learnable=28,  # 2·4, 4, 4·4
        norms={"2.div": Norm("lp_norm", evidence="pattern")},  # of the input, in front of the classifier
    ),
    Awkward(
        "attention and RMSNorm without epsilon",
        Attention,
        _normal(3, 2, 8),
        learnable=296,  # 3·8·8 + 3·8, 8·8 + 8, and 8
        norms={"norm": Norm("rms_norm", 8)},
    ),
    Awkward(
        "functional norms",
        Functional,
        _normal(2, 3, 4),
        learnable=7,  # 3 + 4
        frozen=4,
        buffers=6,  # 3 + 3
        norms={
            "batch_norm": Norm("batch_norm", 3, 0, 6, evidence="op"),
            "layer_norm": Norm("layer_norm", 4, 4, evidence="op"),
            "rms_norm": Norm("rms_norm", evidence="op"),
            "group_norm": Norm("group_norm", evidence="op"),
        },
    ),
    Awkward(
        "many calls",
        ManyCalls,
        _normal(2, 6),
        learnable=30,  # 2·6, 6, 2·6
        buffers=13,
        norms={
            "layer": Norm("layer_norm", 12, calls=3),
            "rms": Norm("rms_norm", 6, calls=2, evidence="probe"),
            "batch": Norm("batch_norm", 12, 0, 13, calls=0),
        },
    ),
    # ---- parametrisations -----------------------------------------------------------------
    Awkward(
        "weight norm",
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.BatchNorm1d(3)),
        _normal(2, 4),
        learnable=24,  # 3 magnitudes, 4·3 directions, 3; 2·3
        buffers=7,
        norms={"1": _BN3},
    ),
    Awkward(
        "weight norm, old style",
        _quietly(lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)), nn.BatchNorm1d(3))),
        _normal(2, 4),
        learnable=24,
        buffers=7,
        norms={"1": _BN3},
    ),
    Awkward(
        "spectral norm",
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.LayerNorm(4)),
        _normal(2, 4),
        learnable=28,  # 4·4 + 4, 2·4
        buffers=8,  # u, v
        norms={"1": Norm("layer_norm", 8)},
    ),
    Awkward(
        "spectral norm, old style",
        _quietly(lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.LayerNorm(4))),
        _normal(2, 4),
        learnable=28,
        buffers=8,
        norms={"1": Norm("layer_norm", 8)},
    ),
    Awkward(
        "nested parametrisations",
        _nested,
        _normal(2, 4),
        learnable=23,  # 2·4, 4·3 + 3
        norms={"0": Norm("layer_norm", 8)},
    ),
    # ---- no size, no numbers, no copy, no export ------------------------------------------
    Awkward(
        "lazy",
        lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2)),
        _normal(2, 3, 5, 5),
        buffers=1,  # num_batches_tracked
        uninitialised=8,  # weight, bias; weight, bias, mean, var; weight, bias
        norms={"1": Norm("batch_norm", 0, 0, 1, uninitialised=4)},
        refused="ValueError: Attempted to use an uninitialized parameter",
    ),
    Awkward(
        "meta device",
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), T5LayerNorm(3)).to("meta"),
        lambda: (torch.ones(2, 4, device="meta"),),
        learnable=24,  # 15 + 6 + 3
        buffers=7,
        norms={"1": _BN3, "2": Norm("rms_norm", 3, evidence="probe")},
        bytes=(96, 0, 32),
    ),
    Awkward(
        "tied on meta",
        _tied_on_meta,
        lambda: (torch.zeros(2, 3, dtype=torch.int64, device="meta"),),
        learnable=28,  # 5·4 once, 2·4
        named=56,  # 20 + 20 + 8 + 8
        unique=36,  # 20 + 8 + 8
        saved={"learnable": 56, "unique": 56},  # a file of meta tensors does not tell which are one
        norms={"norm": Norm("layer_norm", 8)},
    ),
    Awkward(
        "two devices",
        _two_devices,
        _normal(2, 4),
        learnable=21,
        buffers=7,
        norms={"1": _BN3},
        refused="FakeTensorDeviceMismatchError: Expected all tensors to be on the same device",
    ),
    Awkward(
        "holds a lock",
        HoldsLock,
        _normal(2, 4),
        learnable=8,
        buffers=9,
        norms={"norm": _BN4},
        refused="the module cannot be copied: cannot pickle '_thread.lock' object",
    ),
    Awkward(
        "data-dependent branch",
        Branches,
        _normal(2, 4),
        learnable=8,
        buffers=9,
        norms={"norm": _BN4},
        refused=_DATA_DEPENDENT,
    ),
    Awkward("caches", Caches, _normal(2, 4), learnable=8, buffers=9, norms={"norm": _BN4}),
    Awkward(
        "caches, and was called", _with_history, _normal(2, 4), learnable=8, buffers=9, norms={"norm": _BN4}
    ),
    Awkward(
        "random",
        Random,
        _normal(2, 4),
        learnable=8,
        norms={"norm": Norm("layer_norm", 8)},
        unsaved="holds a pickled object",  # the generator
    ),
    Awkward(
        "mutates a buffer",
        MutatesBuffer,
        _normal(2, 4),
        learnable=8,
        buffers=10,  # 1, 9
        norms={"norm": _BN4},
    ),
    Awkward(
        "cumulative average",
        lambda: nn.BatchNorm1d(4, momentum=None),
        _normal(2, 4),
        learnable=8,
        buffers=9,
        norms={"BatchNorm1d": _BN4},
        refused="GuardOnDataDependentSymNode: Could not extract specialized integer",  # 1 / count, in training
    ),
    # ---- wrappers -------------------------------------------------------------------------
    Awkward(
        "dynamically quantised linear",
        _quietly(_quantised),
        _normal(2, 4),
        learnable=8,
        frozen=15,  # 4·3 + 3
        norms={"0": Norm("layer_norm", 8)},
        refused="AttributeError: __torch__.torch.classes.quantized.LinearPackedParamsBase",
        bytes=(32, 24, 0),  # 8·4; 12·1 + 3·4
    ),
    Awkward(
        "dynamically quantised LSTM",
        _quietly(_quantised_lstm),
        _normal(2, 1, 4),
        refused="AttributeError: __torch__.torch.classes.rnn.CellParamsBase",
        frozen=108,  # 4·3·(4 + 3) weights, 2·4·3 biases
        bytes=(0, 180, 0),  # 84·1 + 24·4
    ),
    Awkward(
        "data parallel",
        lambda: nn.DataParallel(_small()),
        _normal(2, 4),
        learnable=21,
        buffers=7,
        norms={"module.1": _BN3},
    ),
    Awkward(
        "compiled",
        _quietly(lambda: torch.compile(_small())),  # type: ignore[arg-type, return-value]
        _normal(2, 4),
        learnable=21,
        buffers=7,
        norms={"_orig_mod.1": _BN3},
    ),
    Awkward("traced by fx", _traced_by_fx, _normal(2, 4), learnable=21, buffers=7, norms={"1": _BN3}),
    Awkward(
        "scripted",
        _quietly(_scripted),
        _normal(2, 3, 2, 2),
        learnable=24,  # 3·4 + 4, and 2·4
        buffers=18,  # 9 + 9
        norms={
            "1": Norm("instance_norm", 0, 0, 9, evidence="name"),
            "2": Norm("batch_norm", 8, 0, 9, evidence="name"),
        },
        refused="ValueError: Exporting a ScriptModule is not supported",
    ),
)
