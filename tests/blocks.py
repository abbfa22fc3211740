"""Blocks of published architectures as they are trained, and how many BatchNorms must survive a fold.

Small widths, true structure, names as in the original code. The numbers were derived by hand from the algebra,
and from no implementation. An inference BatchNorm is y = s·x + t per channel. It can go

- backward, into what produces x, if nothing else reads a tensor on the way and every op passes or absorbs it;
- forward, into all that read y, if every one of them passes or absorbs it. A zero-padded convolution takes only
  s: conv(s·x + t) = conv_s(x + t/s). One Add stays, and that counts as a removed BatchNorm;
- sideways, into a parallel linear branch on the same tensor: conv(x) + s·x + t is one convolution whose kernel
  has s added at its centre; it costs no more than conv did.

A ReLU stops it both ways (γ has both signs here), and so does every other nonlinearity.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - everyone's name for it
from torch import Tensor, nn

BN, BN1d = nn.BatchNorm2d, nn.BatchNorm1d


# ---- pieces -----------------------------------------------------------------------------------


def conv(cin: int, cout: int, k: int = 1, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, k, stride, k // 2, groups=groups, bias=bias)


def conv_bn(
    cin: int, cout: int, k: int = 1, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=conv(cin, cout, k, stride, groups, bias), bn=BN(cout)))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """q, k, v: [batch, head, position, feature]."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias
    return scores.softmax(dim=-1) @ v


def distances(size: int, stride: int = 1) -> Tensor:
    """Which of size² biases belongs to a pair of positions, [queries, keys]."""
    keys = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    queries = torch.cartesian_prod(torch.arange(0, size, stride), torch.arange(0, size, stride))
    distance = (queries[:, None] - keys[None]).abs()
    return distance[..., 0] * size + distance[..., 1]


def part(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A part of something, as in any network: only such a module can give way to another."""
    return lambda: nn.Sequential(make())


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, reduced: int = 4, gate: type[nn.Module] = nn.Sigmoid) -> None:
        super().__init__()
        self.fc1, self.fc2 = conv(channels, reduced, bias=True), conv(reduced, channels, bias=True)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class ConvMlp(nn.Module):
    def __init__(self, dim: int, hidden: int, act: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = conv(dim, hidden, bias=True), act(), conv(hidden, dim, bias=True)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act(self.fc1(x))))


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(x)


# ---- LeViT ------------------------------------------------------------------------------------


class LinearNorm(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(cin, cout, bias=False), nn.BatchNorm1d(cout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class LevitAttention(nn.Module):
    """As many positions as channels: an axis mistaken for another would go unnoticed."""

    def __init__(self, dim: int = 16, heads: int = 2, key: int = 4, value: int = 8, size: int = 4) -> None:
        super().__init__()
        self.heads, self.split = heads, [key, key, value]
        self.qkv = LinearNorm(dim, heads * sum(self.split))
        self.proj = nn.Sequential(OrderedDict(act=nn.Hardswish(), ln=LinearNorm(heads * value, dim)))
        self.attention_biases = nn.Parameter(torch.zeros(heads, size * size))
        self.register_buffer("idxs", distances(size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        q, k, v = self.qkv(x).view(batch, count, self.heads, -1).split(self.split, dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
        y = attend(q, k, v, self.attention_biases[:, self.idxs])
        return self.proj(y.transpose(1, 2).reshape(batch, count, -1))


class LevitConvAttention(nn.Module):
    """The variant on images, with convolutions for Linears."""

    def __init__(self, dim: int = 12, heads: int = 2, key: int = 4, value: int = 8, size: int = 4) -> None:
        super().__init__()
        self.heads, self.split = heads, [key, key, value]
        self.qkv = conv_bn(dim, heads * sum(self.split))
        self.proj = nn.Sequential(OrderedDict(act=nn.Hardswish(), ln=conv_bn(heads * value, dim)))
        self.attention_biases = nn.Parameter(torch.zeros(heads, size * size))
        self.register_buffer("idxs", distances(size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        q, k, v = self.qkv(x).view(batch, self.heads, -1, height * width).split(self.split, dim=2)
        scores = (q.transpose(-2, -1) @ k) * self.split[0] ** -0.5 + self.attention_biases[:, self.idxs]
        y = (v @ scores.softmax(dim=-1).transpose(-2, -1)).view(batch, -1, height, width)
        return self.proj(y)


class LevitMlp(nn.Module):
    def __init__(self, dim: int = 12, hidden: int = 24) -> None:
        super().__init__()
        self.ln1, self.act, self.ln2 = LinearNorm(dim, hidden), nn.Hardswish(), LinearNorm(hidden, dim)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln2(self.drop(self.act(self.ln1(x))))


class Subsample(nn.Module):
    def __init__(self, stride: int, size: int) -> None:
        super().__init__()
        self.stride, self.size = stride, size

    def forward(self, x: Tensor) -> Tensor:
        batch, _, channels = x.shape
        x = x.view(batch, self.size, self.size, channels)[:, :: self.stride, :: self.stride]
        return x.reshape(batch, -1, channels)


class LevitDownsample(nn.Module):
    def __init__(self, dim: int = 8, out: int = 12, heads: int = 2, key: int = 4, size: int = 4) -> None:
        super().__init__()
        self.heads, self.split = heads, [key, 2 * key]
        self.kv = LinearNorm(dim, heads * sum(self.split))
        self.q = nn.Sequential(OrderedDict(down=Subsample(2, size), ln=LinearNorm(dim, heads * key)))
        self.proj = nn.Sequential(OrderedDict(act=nn.Hardswish(), ln=LinearNorm(heads * 2 * key, out)))
        self.attention_biases = nn.Parameter(torch.zeros(heads, size * size))
        self.register_buffer("idxs", distances(size, 2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        k, v = self.kv(x).view(batch, count, self.heads, -1).split(self.split, dim=3)
        q = self.q(x).view(batch, -1, self.heads, self.split[0]).permute(0, 2, 1, 3)
        y = attend(q, k.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3), self.attention_biases[:, self.idxs])
        return self.proj(y.transpose(1, 2).reshape(batch, -1, self.heads * self.split[1]))


class NormLinear(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.bn, self.drop, self.linear = nn.BatchNorm1d(cin), nn.Dropout(0.1), nn.Linear(cin, cout)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.drop(self.bn(x)))


class LevitHead(nn.Module):
    """With distillation: two heads on the mean of the tokens, averaged."""

    def __init__(self, dim: int = 12, classes: int = 5) -> None:
        super().__init__()
        self.head, self.head_dist = NormLinear(dim, classes), NormLinear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(1)
        return (self.head(x) + self.head_dist(x)) / 2


# ---- NextViT ----------------------------------------------------------------------------------


class EfficientAttention(nn.Module):
    """E_MHSA. Keys and values are read from pooled positions."""

    def __init__(self, dim: int = 16, heads: int = 2, sr_ratio: int = 2) -> None:
        super().__init__()
        self.heads, self.sr_ratio = heads, sr_ratio
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        if sr_ratio > 1:
            self.sr = nn.AvgPool1d(sr_ratio**2, sr_ratio**2)
            self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, dim = x.shape
        q = self.q(x).reshape(batch, count, self.heads, -1).permute(0, 2, 1, 3)
        if self.sr_ratio > 1:
            x = self.norm(self.sr(x.transpose(1, 2))).transpose(1, 2)
        k = self.k(x).reshape(batch, -1, self.heads, dim // self.heads).transpose(1, 2)
        v = self.v(x).reshape(batch, -1, self.heads, dim // self.heads).transpose(1, 2)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(batch, count, dim))


class PatchEmbed(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        pool = nn.AvgPool2d(2, stride=2, ceil_mode=True, count_include_pad=False)
        same = stride == 1 and cin == cout
        self.pool = pool if stride == 2 else nn.Identity()
        self.conv, self.norm = (nn.Identity(), nn.Identity()) if same else (conv(cin, cout), BN(cout))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.pool(x)))


class ConvAttention(nn.Module):
    """MHCA."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.group_conv3x3, self.norm = conv(dim, dim, 3, groups=heads), BN(dim)
        self.projection = conv(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(F.relu(self.norm(self.group_conv3x3(x))))


class NextConvBlock(nn.Module):
    """NCB."""

    def __init__(self, cin: int = 8, dim: int = 12, stride: int = 1) -> None:
        super().__init__()
        self.patch_embed, self.mhca = PatchEmbed(cin, dim, stride), ConvAttention(dim)
        self.norm, self.mlp = BN(dim), ConvMlp(dim, 2 * dim, nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = x + self.mhca(x)
        return x + self.mlp(self.norm(x))


class NextTransformerBlock(nn.Module):
    """NTB."""

    def __init__(self, cin: int = 8, mhsa: int = 16, mhca: int = 8, sr_ratio: int = 2) -> None:
        super().__init__()
        self.patch_embed, self.norm1 = PatchEmbed(cin, mhsa), BN(mhsa)
        self.e_mhsa = EfficientAttention(mhsa, sr_ratio=sr_ratio)
        self.projection, self.mhca = PatchEmbed(mhsa, mhca), ConvAttention(mhca)
        self.norm2, self.mlp = BN(mhsa + mhca), ConvMlp(mhsa + mhca, 32, nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        tokens = self.norm1(x).reshape(*x.shape[:2], -1).transpose(-1, -2)
        x = x + self.e_mhsa(tokens).transpose(-1, -2).reshape(x.shape)
        y = self.projection(x)
        x = torch.cat([x, y + self.mhca(y)], dim=1)
        return x + self.mlp(self.norm2(x))


# ---- CoAtNet ----------------------------------------------------------------------------------


class CoAtNetMBConv(nn.Module):
    """`pool` puts the stride into a pooling behind the first norm, else it is the depthwise convolution's."""

    def __init__(self, cin: int = 8, cout: int = 8, stride: int = 1, pool: bool = False) -> None:
        super().__init__()
        mid = 2 * cout
        same = stride == 1 and cin == cout
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.AvgPool2d(2), conv(cin, cout, bias=True))
        self.pre_norm, self.down = BN(cin), nn.AvgPool2d(2) if pool else nn.Identity()
        self.conv1_1x1, self.norm1 = conv(cin, mid), BN(mid)
        self.conv2_kxk, self.norm2 = conv(mid, mid, 3, 1 if pool else stride, groups=mid), BN(mid)
        self.se, self.conv3_1x1 = SqueezeExcite(mid), conv(mid, cout, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.pre_norm(x))
        y = F.silu(self.norm1(self.conv1_1x1(y)))
        y = F.silu(self.norm2(self.conv2_kxk(y)))
        return self.conv3_1x1(self.se(y)) + self.shortcut(x)


# ---- re-parameterised networks ----------------------------------------------------------------


class RepVGG(nn.Module):
    def __init__(self, cin: int = 8, cout: int = 8, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.rbr_identity = BN(cin) if cin == cout and stride == 1 else None
        self.rbr_dense = conv_bn(cin, cout, 3, stride, groups)
        self.rbr_1x1 = conv_bn(cin, cout, 1, stride, groups)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        return F.relu(y if self.rbr_identity is None else y + self.rbr_identity(x))


class MobileOne(nn.Module):
    """The sums begin with the number 0, as in the original code."""

    def __init__(
        self,
        cin: int,
        cout: int,
        k: int,
        stride: int = 1,
        groups: int = 1,
        branches: int = 1,
        scale: bool = True,
        act: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.rbr_skip = BN(cin) if cin == cout and stride == 1 else None
        self.rbr_conv = nn.ModuleList(conv_bn(cin, cout, k, stride, groups) for _ in range(branches))
        self.rbr_scale = conv_bn(cin, cout, 1, stride, groups) if k > 1 and scale else None
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        identity = 0 if self.rbr_skip is None else self.rbr_skip(x)
        y = (0 if self.rbr_scale is None else self.rbr_scale(x)) + identity
        for branch in self.rbr_conv:
            y = y + branch(x)
        return self.act(y)


class FastVitMixer(nn.Module):
    """RepMixer: what the mixer adds to a norm of its own, scaled."""

    def __init__(self, dim: int = 8, layer_scale: bool = True) -> None:
        super().__init__()
        self.norm = MobileOne(dim, dim, 3, groups=dim, branches=0, scale=False, act=nn.Identity)
        self.mixer = MobileOne(dim, dim, 3, groups=dim, act=nn.Identity)
        self.layer_scale = nn.Parameter(torch.ones(dim, 1, 1)) if layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        if self.layer_scale is None:
            return x + self.mixer(x) - self.norm(x)
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))


class FastVitFfn(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.conv, self.mlp = conv_bn(dim, dim, 7, groups=dim), ConvMlp(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.conv(x))


class FastVitBlock(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.token_mixer, self.convffn = FastVitMixer(dim), FastVitFfn(dim)
        self.layer_scale = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        return x + self.layer_scale * self.convffn(x)


class FastVitAttention(nn.Module):
    def __init__(self, dim: int = 12, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm = heads, BN(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.layer_scale_1 = nn.Parameter(torch.ones(dim, 1, 1))
        self.convffn, self.layer_scale_2 = FastVitFfn(dim), nn.Parameter(torch.ones(dim, 1, 1))

    def mix(self, x: Tensor) -> Tensor:
        tokens = torch.flatten(x, start_dim=2).transpose(-2, -1)
        batch, count, dim = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = attend(*qkv.unbind(0)).transpose(1, 2).reshape(batch, count, dim)
        return self.proj(y).transpose(-2, -1).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale_1 * self.mix(self.norm(x))
        return x + self.layer_scale_2 * self.convffn(x)


class LargeKernel(nn.Module):
    """ReparamLargeKernelConv of RepLKNet and FastViT."""

    def __init__(self, cin: int, cout: int, k: int, small: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.lkb_origin = conv_bn(cin, cout, k, stride, groups)
        self.small_conv = conv_bn(cin, cout, small, stride, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.lkb_origin(x) + self.small_conv(x)


class FastVitDownsample(nn.Module):
    def __init__(self, cin: int = 8, cout: int = 16) -> None:
        super().__init__()
        self.large = LargeKernel(cin, cout, 7, 3, stride=2, groups=cin)
        self.point = MobileOne(cout, cout, 1, act=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        return self.point(self.large(x))


class RepGhost(nn.Module):
    """`early` puts the ReLU before the sum, as GhostNet does and RepGhost says not to."""

    def __init__(self, cin: int, cout: int, relu: bool = True, early: bool = False) -> None:
        super().__init__()
        act = nn.ReLU if relu else nn.Identity
        self.primary_conv = nn.Sequential(conv(cin, cout), BN(cout), act())
        self.fusion_bn = BN(cout)
        self.cheap_operation = nn.Sequential(conv(cout, cout, 3, groups=cout), BN(cout))
        self.before, self.after = (act(), nn.Identity()) if early else (nn.Identity(), act())

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        return self.after(self.before(self.cheap_operation(x1)) + self.fusion_bn(x1))


class RepGhostBottleneck(nn.Module):
    def __init__(self, cin: int = 8, mid: int = 12, cout: int = 16, stride: int = 2) -> None:
        super().__init__()
        self.ghost1, self.ghost2 = RepGhost(cin, mid), RepGhost(mid, cout, relu=False)
        self.conv_dw, self.bn_dw = conv(mid, mid, 3, stride, groups=mid), BN(mid)
        self.se = SqueezeExcite(mid, gate=nn.Hardsigmoid)
        self.shortcut = nn.Sequential(conv(cin, cin, 3, stride, groups=cin), BN(cin), conv(cin, cout), BN(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.bn_dw(self.conv_dw(self.ghost1(x))))
        return self.ghost2(y) + self.shortcut(x)


class RepVggDw(nn.Module):
    """RepViT's: the last norm reads a sum, one summand of which is x itself."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = conv_bn(dim, dim, 3, groups=dim)
        self.conv1 = conv(dim, dim, groups=dim, bias=True)
        self.bn = BN(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x) + self.conv1(x) + x)


class RepViT(nn.Module):
    def __init__(self, dim: int = 8, se: bool = True) -> None:
        super().__init__()
        self.token_mixer = nn.Sequential(RepVggDw(dim), SqueezeExcite(dim) if se else nn.Identity())
        mixer = nn.Sequential(conv_bn(dim, 2 * dim), nn.GELU(), conv_bn(2 * dim, dim))
        self.channel_mixer = Residual(mixer)

    def forward(self, x: Tensor) -> Tensor:
        return self.channel_mixer(self.token_mixer(x))


class RepLKBlock(nn.Module):
    def __init__(self, dim: int = 8, wide: int = 12, k: int = 9) -> None:
        super().__init__()
        self.prelkb_bn, self.pw1, self.pw2 = BN(dim), conv_bn(dim, wide), conv_bn(wide, dim)
        self.large_kernel = LargeKernel(wide, wide, k, 5, groups=wide)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.pw1(self.prelkb_bn(x)))
        return x + self.pw2(F.relu(self.large_kernel(y)))


class RepLKFfn(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.preffn_bn, self.pw1, self.pw2 = BN(dim), conv_bn(dim, 2 * dim), conv_bn(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pw2(F.gelu(self.pw1(self.preffn_bn(x))))


class Branches(nn.Module):
    """Whatever is given, side by side on x, summed."""

    def __init__(self, *branches: nn.Module, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.branches, self.act = nn.ModuleList(branches), act()

    def forward(self, x: Tensor) -> Tensor:
        y = self.branches[0](x)
        for branch in self.branches[1:]:
            y = y + branch(x)
        return self.act(y)


# ---- pre-activation ---------------------------------------------------------------------------


class DenseLayer(nn.Module):
    def __init__(self, cin: int, growth: int = 4) -> None:
        super().__init__()
        self.norm1, self.conv1 = BN(cin), conv(cin, 8)
        self.norm2, self.conv2 = BN(8), conv(8, growth, 3)

    def forward(self, features: list[Tensor]) -> Tensor:
        y = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(y)))


class DenseBlock(nn.Module):
    def __init__(self, cin: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(cin + 4 * i) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.norm0, self.pool0 = conv(3, 8, 3, 2), BN(8), nn.MaxPool2d(3, 2, 1)
        self.block1 = DenseBlock(8, 2)
        self.transition = nn.Sequential(
            OrderedDict(norm=BN(16), relu=nn.ReLU(), conv=conv(16, 8), pool=nn.AvgPool2d(2))
        )
        self.block2 = DenseBlock(8, 1)
        self.norm5, self.classifier = BN(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool0(F.relu(self.norm0(self.conv0(x))))
        x = self.block2(self.transition(self.block1(x)))
        return self.classifier(F.adaptive_avg_pool2d(F.relu(self.norm5(x)), 1).flatten(1))


class PreActBlock(nn.Module):
    def __init__(self, cin: int = 8, cout: int = 12, stride: int = 2) -> None:
        super().__init__()
        self.bn1, self.conv1 = BN(cin), conv(cin, cout, 3, stride)
        self.bn2, self.conv2 = BN(cout), conv(cout, cout, 3)
        self.downsample = conv(cin, cout, 1, stride) if cin != cout or stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + shortcut


class BnActConv(nn.Module):
    def __init__(self, cin: int, cout: int, k: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.bn, self.conv = BN(cin, eps=1e-3), conv(cin, cout, k, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(x)))


class DualPath(nn.Module):
    """DPN: the first channels of a block's output are added, the others appended."""

    def __init__(self, cin: int, mid: int = 8, out: int = 8, inc: int = 4, proj: bool = False) -> None:
        super().__init__()
        self.out = out
        self.c1x1_w = BnActConv(cin, out + 2 * inc) if proj else None
        self.c1x1_a, self.c3x3_b = BnActConv(cin, mid), BnActConv(mid, mid, 3, groups=2)
        self.c1x1_c = BnActConv(mid, out + inc)

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        joined = torch.cat(x, 1) if isinstance(x, tuple) else x
        if self.c1x1_w is not None:
            shortcut = self.c1x1_w(joined)
            x = shortcut[:, : self.out], shortcut[:, self.out :]
        y = self.c1x1_c(self.c3x3_b(self.c1x1_a(joined)))
        return x[0] + y[:, : self.out], torch.cat([x[1], y[:, self.out :]], 1)


class DualPathNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.normal, self.bn = DualPath(8, proj=True), DualPath(20), BN(24, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.bn(torch.cat(self.normal(self.proj(x)), 1)))


class Separable(nn.Module):
    """`inner` norms: behind the depthwise convolution too (aligned), `pre`: one in front, with a ReLU."""

    def __init__(self, cin: int, cout: int, stride: int = 1, kind: str = "classic") -> None:
        super().__init__()
        self.norm = BN(cin) if kind == "pre" else None
        self.conv_dw, self.bn_dw = conv(cin, cin, 3, stride, groups=cin), BN(cin) if kind == "aligned" else None
        self.conv_pw, self.bn_pw = conv(cin, cout), BN(cout) if kind in ("classic", "aligned") else None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.norm is None else F.relu(self.norm(x))
        x = self.conv_dw(x)
        x = self.conv_pw(x if self.bn_dw is None else self.bn_dw(x))
        return x if self.bn_pw is None else self.bn_pw(x)


class Xception(nn.Module):
    """ReLU → separable convolution → norm, three times (`classic`, and `aligned` with norms inside)."""

    def __init__(self, cin: int = 8, cout: int = 12, kind: str = "classic") -> None:
        super().__init__()
        self.sep1, self.sep2 = Separable(cin, cout, 1, kind), Separable(cout, cout, 1, kind)
        self.sep3, self.skip = Separable(cout, cout, 2, kind), conv_bn(cin, cout, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.sep3(F.relu(self.sep2(F.relu(self.sep1(F.relu(x))))))
        return y + self.skip(x)


class PreXception(nn.Module):
    """Norm → ReLU → separable convolution, three times; the shortcut starts behind the first ReLU."""

    def __init__(self, cin: int = 8, cout: int = 12) -> None:
        super().__init__()
        self.norm, self.sep1 = BN(cin), Separable(cin, cout, 1, "bare")
        self.sep2, self.sep3 = Separable(cout, cout, 1, "pre"), Separable(cout, cout, 2, "pre")
        self.shortcut = conv(cin, cout, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(x))
        return self.sep3(self.sep2(self.sep1(x))) + self.shortcut(x)


# ---- mixers and hybrids -----------------------------------------------------------------------


class ConvMixer(nn.Module):
    def __init__(self, dim: int = 8, depth: int = 2, k: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, dim, 2, 2), nn.GELU(), BN(dim))
        depthwise = (nn.Conv2d(dim, dim, k, groups=dim, padding="same") for _ in range(depth))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    Residual(nn.Sequential(mix, nn.GELU(), BN(dim))), nn.Conv2d(dim, dim, 1), nn.GELU(), BN(dim)
                )
                for mix in depthwise
            )
        )
        self.pool, self.flat, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(self.pool(self.blocks(self.stem(x)))))


class InceptionNeXt(nn.Module):
    def __init__(self, dim: int = 16, part: int = 3) -> None:
        super().__init__()
        self.split = (dim - 3 * part, part, part, part)
        self.dwconv_hw = conv(part, part, 3, groups=part, bias=True)
        self.dwconv_w = nn.Conv2d(part, part, (1, 7), padding=(0, 3), groups=part)
        self.dwconv_h = nn.Conv2d(part, part, (7, 1), padding=(3, 0), groups=part)
        self.norm, self.mlp = BN(dim), ConvMlp(dim, 2 * dim)
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        same, hw, w, h = torch.split(x, self.split, dim=1)
        y = torch.cat((same, self.dwconv_hw(hw), self.dwconv_w(w), self.dwconv_h(h)), dim=1)
        return self.mlp(self.norm(y)).mul(self.gamma.reshape(1, -1, 1, 1)) + x


class Visformer(nn.Module):
    def __init__(self, dim: int = 12, heads: int = 2, groups: int = 4) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, BN(dim), BN(dim)
        self.qkv, self.proj = conv(dim, 3 * dim), conv(dim, dim)
        self.conv1, self.conv2 = conv(dim, 2 * dim), conv(2 * dim, 2 * dim, 3, groups=groups)
        self.conv3 = conv(2 * dim, dim)

    def attention(self, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        qkv = self.qkv(x).reshape(batch, 3, self.heads, dim // self.heads, -1).permute(1, 0, 2, 4, 3)
        y = attend(*qkv.unbind(0)).permute(0, 1, 3, 2)
        return self.proj(y.reshape(batch, -1, height, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = F.gelu(self.conv1(self.norm2(x)))
        return x + self.conv3(F.gelu(self.conv2(y)))


class VisformerStem(nn.Module):
    """The norm of the patches, then a position embedding that is not constant over the image."""

    def __init__(self, dim: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 7, 2, 3, bias=False), BN(6), nn.ReLU())
        self.proj, self.norm = nn.Conv2d(6, dim, 2, 2), BN(dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, dim, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(self.stem(x))) + self.pos_embed


class SwiftFormerEncoder(nn.Module):
    """ConvEncoder; the local representation is the same with `hidden` equal to `dim`."""

    def __init__(self, dim: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.depth_wise_conv, self.norm = conv(dim, dim, 3, groups=dim, bias=True), BN(dim)
        self.point_wise = ConvMlp(dim, hidden)
        self.layer_scale = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * self.point_wise(self.norm(self.depth_wise_conv(x)))


class AdditiveAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_query, self.to_key, self.proj, self.final = (nn.Linear(dim, dim) for _ in range(4))
        self.w_g = nn.Parameter(torch.ones(dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        query, key = F.normalize(self.to_query(x), dim=-1), F.normalize(self.to_key(x), dim=-1)
        weight = (query @ self.w_g * query.shape[-1] ** -0.5).softmax(dim=-1)
        pooled = torch.sum(weight * query, dim=1).unsqueeze(1).repeat(1, key.shape[1], 1)
        return self.final(self.proj(pooled * key) + query)


class SwiftFormerBlock(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.local_representation, self.attn = SwiftFormerEncoder(dim, dim), AdditiveAttention(dim)
        self.norm1, self.linear = BN(dim), ConvMlp(dim, 2 * dim)
        self.layer_scale_1, self.layer_scale_2 = (nn.Parameter(torch.ones(dim, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.local_representation(x)
        batch, dim, height, width = x.shape
        mixed = self.attn(x.permute(0, 2, 3, 1).reshape(batch, height * width, dim))
        x = x + self.layer_scale_1 * mixed.reshape(batch, height, width, dim).permute(0, 3, 1, 2)
        return x + self.layer_scale_2 * self.linear(self.norm1(x))


class TalkingAttention(nn.Module):
    """EfficientFormer-V2's attention: convolutions over the heads before and behind the softmax."""

    def __init__(self, dim: int = 12, heads: int = 4, key: int = 3, size: int = 4, stride: int = 1) -> None:
        super().__init__()
        self.heads, self.key, self.wide, self.size = heads, key, 2 * key * heads, size // stride
        down = nn.Identity() if stride == 1 else conv_bn(dim, dim, 3, stride, groups=dim, bias=True)
        self.stride_conv = down
        self.upsample = nn.Identity() if stride == 1 else nn.Upsample(scale_factor=stride, mode="bilinear")
        self.q, self.k = (conv_bn(dim, key * heads, bias=True) for _ in range(2))
        self.v = conv_bn(dim, self.wide, bias=True)
        self.v_local = conv_bn(self.wide, self.wide, 3, groups=self.wide, bias=True)
        self.talking_head1, self.talking_head2 = (conv(heads, heads, bias=True) for _ in range(2))
        self.proj = conv_bn(self.wide, dim, bias=True)
        self.attention_biases = nn.Parameter(torch.zeros(heads, self.size**2))
        self.register_buffer("idxs", distances(self.size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stride_conv(x)
        v = self.v(x)
        q, k, values = (y.flatten(2).unflatten(1, (self.heads, -1)) for y in (self.q(x), self.k(x), v))
        scores = q.transpose(2, 3) @ k * self.key**-0.5 + self.attention_biases[:, self.idxs]
        scores = self.talking_head2(self.talking_head1(scores).softmax(dim=-1))
        y = (scores @ values.transpose(2, 3)).transpose(2, 3)
        y = y.reshape(-1, self.wide, self.size, self.size) + self.v_local(v)
        return self.proj(F.gelu(self.upsample(y)))


class LocalGlobalQuery(nn.Module):
    """EfficientFormer-V2: a local path and a pooled one, added."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.pool, self.local = nn.AvgPool2d(1, 2, 0), conv(cin, cin, 3, 2, groups=cin, bias=True)
        self.proj = conv_bn(cin, cout, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.local(x) + self.pool(x))


class DownsampleAttention(nn.Module):
    def __init__(self, dim: int = 8, out: int = 12, heads: int = 4, key: int = 3, size: int = 4) -> None:
        super().__init__()
        self.heads, self.key, self.wide, self.size = heads, key, 2 * key * heads, size
        self.q, self.k = LocalGlobalQuery(dim, key * heads), conv_bn(dim, key * heads, bias=True)
        self.v = conv_bn(dim, self.wide, bias=True)
        self.v_local = conv_bn(self.wide, self.wide, 3, 2, groups=self.wide, bias=True)
        self.proj, self.conv = conv_bn(self.wide, out, bias=True), conv_bn(dim, out, 3, 2, bias=True)
        self.attention_biases = nn.Parameter(torch.zeros(heads, size**2))
        self.register_buffer("idxs", distances(size, 2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x)
        q, k, values = (y.flatten(2).unflatten(1, (self.heads, -1)) for y in (self.q(x), self.k(x), v))
        scores = q.transpose(2, 3) @ k * self.key**-0.5 + self.attention_biases[:, self.idxs]
        y = (scores.softmax(dim=-1) @ values.transpose(2, 3)).transpose(2, 3)
        y = y.reshape(-1, self.wide, self.size // 2, self.size // 2) + self.v_local(v)
        return self.proj(F.gelu(y)) + self.conv(x)


class ConvMlpWithNorm(nn.Module):
    def __init__(self, dim: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.fc1, self.fc2 = conv_bn(dim, hidden, bias=True), conv_bn(hidden, dim, bias=True)
        self.mid = conv_bn(hidden, hidden, 3, groups=hidden, bias=True)
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(F.gelu(self.mid(F.gelu(self.fc1(x)))))
        return x + y * self.gamma.view(1, -1, 1, 1)


# ---- mobile networks --------------------------------------------------------------------------


class Ghost(nn.Module):
    def __init__(self, cin: int = 8, cout: int = 12, relu: bool = True) -> None:
        super().__init__()
        half, act = cout // 2, nn.ReLU if relu else nn.Identity
        self.cout = cout
        self.primary_conv = nn.Sequential(conv(cin, half), BN(half), act())
        self.cheap_operation = nn.Sequential(conv(half, half, 3, groups=half), BN(half), act())

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        return torch.cat([x1, self.cheap_operation(x1)], dim=1)[:, : self.cout]


class GhostBottleneck(nn.Module):
    def __init__(self, cin: int = 8, mid: int = 12, cout: int = 16) -> None:
        super().__init__()
        self.ghost1, self.ghost2 = Ghost(cin, mid), Ghost(mid, cout, relu=False)
        self.conv_dw, self.bn_dw = conv(mid, mid, 3, 2, groups=mid), BN(mid)
        self.se = SqueezeExcite(mid, gate=nn.Hardsigmoid)
        self.shortcut = nn.Sequential(conv(cin, cin, 3, 2, groups=cin), BN(cin), conv(cin, cout), BN(cout))

    def forward(self, x: Tensor) -> Tensor:
        return self.ghost2(self.se(self.bn_dw(self.conv_dw(self.ghost1(x))))) + self.shortcut(x)


class ShuffleUnit(nn.Module):
    """ShuffleNet v2: half of the channels pass, then all are shuffled."""

    def __init__(self, cin: int = 12, half: int = 6, stride: int = 1) -> None:
        super().__init__()
        self.stride, inner = stride, half if stride == 1 else cin
        self.branch1 = nn.Sequential(
            conv(cin, cin, 3, stride, groups=cin), BN(cin), conv(cin, half), BN(half), nn.ReLU()
        )
        self.branch1 = self.branch1 if stride > 1 else nn.Identity()
        first = [conv(inner, half), BN(half), nn.ReLU()]
        second = [conv(half, half, 3, stride, groups=half), BN(half), conv(half, half), BN(half), nn.ReLU()]
        self.branch2 = nn.Sequential(*first, *second)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1) if self.stride == 1 else (x, x)
        y = torch.cat((self.branch1(x1), self.branch2(x2)), dim=1)
        batch, channels, height, width = y.shape
        y = y.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return y.view(batch, channels, height, width)


class SEBottleneck(nn.Module):
    def __init__(self, cin: int = 8, mid: int = 4, cout: int = 12) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(cin, mid), BN(mid)
        self.conv2, self.bn2 = conv(mid, mid, 3), BN(mid)
        self.conv3, self.bn3, self.se_module = conv(mid, cout), BN(cout), SqueezeExcite(cout)
        self.downsample = nn.Sequential(conv(cin, cout), BN(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.se_module(self.bn3(self.conv3(y))) + self.downsample(x))


# ---- dense prediction -------------------------------------------------------------------------


def double_conv(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(conv(cin, cout, 3), BN(cout), nn.ReLU(), conv(cout, cout, 3), BN(cout), nn.ReLU())


class UNet(nn.Module):
    def __init__(self, up_norm: bool = False) -> None:
        super().__init__()
        self.inc, self.down, self.pool = double_conv(3, 4), double_conv(4, 8), nn.MaxPool2d(2)
        self.up, self.up_norm = nn.ConvTranspose2d(8, 4, 2, 2), BN(4) if up_norm else nn.Identity()
        self.conv, self.out = double_conv(8, 4), conv(4, 2, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.inc(x)
        up = self.up_norm(self.up(self.down(self.pool(skip))))
        return self.out(self.conv(torch.cat([skip, up], dim=1)))


class CReLU(nn.Module):
    """FaceBoxes: a norm read by itself and by its negation."""

    def __init__(self, cin: int = 3, cout: int = 6) -> None:
        super().__init__()
        self.conv, self.bn, self.after = conv(cin, cout, 5, 2), BN(cout, eps=1e-5), conv_bn(2 * cout, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return F.relu(self.after(F.relu(torch.cat([y, -y], 1))))


# ---- points and particles ---------------------------------------------------------------------


class PointNet(nn.Module):
    """A shared MLP on points, their maximum, a classifier. `norm_input` puts a norm in front of all."""

    def __init__(self, norm_input: bool = False) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm1d(3) if norm_input else nn.Identity()
        self.conv1, self.bn1 = nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8)
        self.conv2, self.bn2 = nn.Conv1d(8, 12, 1), nn.BatchNorm1d(12)
        self.fc1, self.bn3, self.fc2 = nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(self.bn0(x))))
        x = torch.max(self.bn2(self.conv2(x)), 2, keepdim=True)[0].view(-1, 12)
        return self.fc2(F.relu(self.bn3(self.dropout(self.fc1(x)))))


class EdgeConv(nn.Module):
    """ParticleNet's: each particle beside its difference to each of its k nearest neighbours."""

    def __init__(self, cin: int, cout: int, k: int) -> None:
        super().__init__()
        self.k, self.conv, self.bn = k, nn.Conv2d(2 * cin, cout, 1, bias=False), BN(cout)
        self.sc, self.sc_bn = nn.Conv1d(cin, cout, 1, bias=False), nn.BatchNorm1d(cout)

    def neighbours(self, points: Tensor) -> Tensor:
        """[batch, particle, k] → the row of each in a table of all particles of the batch."""
        square = torch.sum(points**2, dim=1, keepdim=True)
        distance = square + square.transpose(2, 1) - 2 * torch.matmul(points.transpose(2, 1), points)
        nearest = (-distance).topk(k=self.k + 1, dim=-1)[1][:, :, 1:]
        return (nearest + torch.arange(len(points)).view(-1, 1, 1) * points.shape[2]).flatten()

    def forward(self, points: Tensor, x: Tensor) -> Tensor:
        batch, dim, count = x.shape
        table = x.transpose(2, 1).reshape(-1, dim)
        near = table[self.neighbours(points), :].view(batch, count, self.k, dim).permute(0, 3, 1, 2)
        here = x.view(batch, dim, count, 1).repeat(1, 1, 1, self.k)
        y = F.relu(self.bn(self.conv(torch.cat((here, near - here), dim=1)))).mean(dim=-1)
        return F.relu(self.sc_bn(self.sc(x)) + y)


class ParticleNet(nn.Module):
    """`masked` multiplies the norm's output by which particles there are, as the real network does."""

    def __init__(self, cin: int = 5, cout: int = 8, masked: bool = False) -> None:
        super().__init__()
        self.bn_fts, self.edge_conv, self.masked = nn.BatchNorm1d(cin), EdgeConv(cin, cout, 3), masked

    def forward(self, points: Tensor, features: Tensor) -> Tensor:
        x = self.bn_fts(features)
        if self.masked:
            x = x * (features[:, :1] > -0.5).to(x.dtype)
        return self.edge_conv(points, x)


class FixedEdges(nn.Module):
    """Edge features on neighbours that are known beforehand: a Gather with a constant index."""

    def __init__(self, cin: int = 5, cout: int = 8, count: int = 7, k: int = 3) -> None:
        super().__init__()
        self.k, self.bn, self.conv = k, nn.BatchNorm1d(cin), nn.Conv2d(2 * cin, cout, 1)
        self.register_buffer(
            "near", ((torch.arange(count)[:, None] + torch.arange(1, k + 1)) % count).flatten()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        here = x.unsqueeze(-1).expand(-1, -1, -1, self.k)
        near = x.index_select(2, self.near).unflatten(2, (-1, self.k))
        return F.relu(self.conv(torch.cat((here, near - here), dim=1)))


# ---- small classics ---------------------------------------------------------------------------


class MeanHead(nn.Module):
    def __init__(self, dim: int = 8, relu: bool = False) -> None:
        super().__init__()
        self.norm, self.act, self.head = BN(dim), nn.ReLU() if relu else nn.Identity(), nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.norm(x)).mean((2, 3)))


class ChannelsLastHead(nn.Module):
    """Flattened in the order H, W, C: s and t repeat as a whole, not element by element."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = BN(4), nn.Linear(4 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).permute(0, 2, 3, 1).flatten(1))


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(1, -1, 1, 1)


class FrozenNorm(nn.Module):
    """torchvision's FrozenBatchNorm2d: a Mul and an Add that are computed from buffers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            tensor.reshape(1, -1, 1, 1)
            for tensor in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class ReadTwice(nn.Module):
    """A norm read by a convolution with a ReLU behind it, and by a residual sum."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.norm, self.conv = BN(8), conv(8, 8, k)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return F.relu(self.conv(y)) + y


class TwoReaders(nn.Module):
    """A norm read by two convolutions."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.norm, self.one, self.other = BN(8), conv(8, 12), conv(8, 12, k, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return F.relu(self.one(y)) * F.gelu(self.other(y))


class TwoNorms(nn.Module):
    """Two norms read one convolution; a ReLU or another convolution reads each."""

    def __init__(self, after: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv, self.norms = conv(8, 8, 3), nn.ModuleList([BN(8), BN(8)])
        self.after = nn.ModuleList([after(), after()])

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.cat([after(norm(y)) for norm, after in zip(self.norms, self.after, strict=True)], 1)


class Joined(nn.Module):
    """A norm of a concatenation, of x itself or of three convolutions."""

    def __init__(self, raw: bool, after: nn.Module) -> None:
        super().__init__()
        self.a, self.b = conv(8, 6, 3), nn.ConvTranspose2d(8, 5, 3, padding=1)
        self.c, self.norm, self.after = nn.Identity() if raw else conv(8, 8), BN(19), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.norm(torch.cat([self.a(x), self.b(x), self.c(x)], 1)))


class NormOfSum(nn.Module):
    """Both summands are convolutions, or one is behind a ReLU."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.a, self.b, self.norm = conv(8, 8, 3), conv(8, 8, bias=True), BN(8)
        self.act = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.a(x) + self.act(self.b(x))))


class PostNorm(nn.Module):
    """The norm of a residual stream, on tokens, before the next residual (PatchTST)."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm1d(dim), nn.BatchNorm1d(dim)
        self.fc1, self.fc2 = nn.Linear(dim, 12), nn.Linear(12, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.fc2(F.gelu(self.fc1(x)))
        return self.norm2(x.transpose(1, 2)).transpose(1, 2)


class AttentionNorm(nn.Module):
    """A norm of attention over tokens. `gate`: weights that do not sum to 1. 0 heads: v is used as it is."""

    def __init__(self, dim: int = 8, heads: int = 0, gate: bool = False) -> None:
        super().__init__()
        self.heads, self.gate, self.norm = heads, gate, nn.BatchNorm1d(dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.heads:
            q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        scores = q @ k.transpose(-2, -1) * 0.3
        y = (scores.sigmoid() if self.gate else scores.softmax(-1)) @ v
        if self.heads:
            y = y.transpose(1, 2).flatten(2)
        return F.relu(self.norm(y.transpose(1, 2)))


class SharedReader(nn.Module):
    """The convolution that reads the norm also reads x: its weight cannot be edited in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = BN(8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(self.norm(x))) + F.gelu(self.conv(x))


class RawToo(nn.Module):
    """What the norm reads is an output of the model as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(8, 8, 3), BN(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return y, F.relu(self.norm(y))


class NormToo(nn.Module):
    """What the norm writes is an output of the model as well."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        return y, self.head(y)


class BranchReadTwice(nn.Module):
    """A RepVGG sum, one branch of which is an output too: the convolution, or the norm."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.give_norm = conv(8, 8, 3), BN(8), norm

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, identity = self.conv(x), self.norm(x)
        return F.relu(y + identity), identity if self.give_norm else y


class TokenNorm(nn.Module):
    """BatchNorm1d on [batch, token, feature] normalises the tokens; Linear writes the features. L = C."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(dim, dim), nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.linear(x)))


# ---- the table --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """The norms whose name `pattern` matches as a whole, how many, and why none of them can go."""

    pattern: str
    why: str
    sites: int = 1


SAME: Any = object()


@dataclass(frozen=True)
class Block:
    """`left` of `norms` BatchNorm calls must survive, and `how` says where the others go.

    `left` is None where the rules allow more than one answer; the result has to be right all the same.
    `left_in_module` is what is left in an `nn.Module`, where its own code has no place for what the fold makes.
    """

    name: str
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    norms: int
    left: int | None
    how: str
    kept: tuple[Kept, ...] = ()
    left_in_module: int | None = SAME

    def __post_init__(self) -> None:
        if self.left_in_module is SAME:
            object.__setattr__(self, "left_in_module", self.left)

    def __str__(self) -> str:
        return self.name


IMAGE = ((2, 8, 6, 6),)
PICTURE = ((2, 3, 12, 12),)

BACKWARD = "each goes back into the convolution or Linear before it"
FORWARD = "forward into every reader: Linears and unpadded convolutions"
SIDEWAYS = "identity norms become the centre of a parallel kernel; the others go backward"
RELU = "a ReLU or ELU reads it, γ has both signs"

# fmt: off
LEVIT = [
    Block(
        "levit-attention", lambda: Residual(LevitAttention()), ((2, 16, 16),), 2, 0,
        "backward through flatten(0, 1): the channel axis stays whole",
    ),
    Block("levit-conv-attention", lambda: Residual(LevitConvAttention()), ((2, 12, 4, 4),), 2, 0, BACKWARD),
    Block("levit-mlp", lambda: Residual(LevitMlp()), ((2, 9, 12),), 2, 0, "backward through flatten(0, 1)"),
    Block("levit-downsample", LevitDownsample, ((2, 16, 8),), 3, 0, "backward through flatten(0, 1)"),
    Block(
        "levit-head", LevitHead, ((2, 9, 12),), 2, 0, "two norms of one tensor, each forward into its Linear",
    ),
]

NEXTVIT = [
    Block(
        "nextvit-e-mhsa", EfficientAttention, ((2, 16, 16),), 1, 0,
        "forward through a transpose into both readers, k and v",
    ),
    Block(
        "nextvit-ncb", NextConvBlock, IMAGE, 3, 0,
        "patch_embed and mhca backward; norm forward into the MLP, though the residual reads what it reads",
    ),
    Block("nextvit-ncb-stride", lambda: NextConvBlock(stride=2), ((2, 8, 5, 5),), 3, 0, "as nextvit-ncb"),
    Block(
        "nextvit-ntb", NextTransformerBlock, ((2, 8, 4, 4),), 6, 0,
        "norm1 forward into q, and through AvgPool1d, with e_mhsa.norm, into k and v; norm2 forward into fc1",
    ),
    Block(
        "nextvit-ntb-unpooled", lambda: NextTransformerBlock(sr_ratio=1), ((2, 8, 4, 4),), 5, 0,
        "norm1 forward into q, k and v",
    ),
]

COATNET = [
    Block(
        "coatnet-mbconv", CoAtNetMBConv, IMAGE, 3, 0, "pre_norm forward into the 1×1 convolution, others back",
    ),
    Block(
        "coatnet-mbconv-stride", lambda: CoAtNetMBConv(8, 12, 2), IMAGE, 3, 0,
        "as coatnet-mbconv; the shortcut reads x, not the norm",
    ),
    Block(
        "coatnet-mbconv-pool", lambda: CoAtNetMBConv(8, 12, 2, pool=True), IMAGE, 3, 0,
        "pre_norm forward through an unpadded AvgPool into the 1×1 convolution",
    ),
]

REPARAMETERISED = [
    Block("repvgg", part(RepVGG), IMAGE, 3, 0, SIDEWAYS),
    Block("repvgg-groups", part(lambda: RepVGG(groups=2)), IMAGE, 3, 0, SIDEWAYS),
    Block("repvgg-wider", lambda: RepVGG(8, 12), IMAGE, 2, 0, BACKWARD),
    Block("repvgg-stride", lambda: RepVGG(stride=2), IMAGE, 2, 0, BACKWARD),
    Block(
        "repvgg-dilated",
        part(lambda: Branches(BN(8), nn.Conv2d(8, 8, 3, padding=2, dilation=2), conv_bn(8, 8, 3))),
        IMAGE, 2, 0, "the identity fits the centre of either kernel, which need not fit each other",
        left_in_module=1,  # two of three branches merge: the sum of the block's own code stays
    ),
    Block(
        "repvgg-1d",
        part(lambda: Branches(BN1d(8), nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), BN1d(8)))),
        ((2, 8, 8),), 2, 0, SIDEWAYS,
    ),
    Block(
        "rep-average-pool",
        part(lambda: Branches(nn.Sequential(nn.AvgPool2d(3, 1, 1), BN(8)), conv_bn(8, 8, 3))),
        IMAGE, 2, 0, "AvgPool (zeros counted) is a depthwise kernel of 1/9: norm and pool join the 3×3 kernel",
    ),
    Block(
        "rep-identity-behind-relu",
        lambda: Branches(BN(8), nn.Sequential(conv_bn(8, 8, 3), nn.ReLU()), act=nn.Identity), IMAGE, 2, 1,
        "the other norm goes backward",
        (Kept(r"branches\.0", "reads the model's input; the branch beside it ends in a ReLU"),),
    ),
    Block(
        "rep-conv-read-twice", lambda: BranchReadTwice(norm=False), IMAGE, 1, 1, "",
        (Kept("norm", "its parallel convolution is an output by itself: a merged one would be a second one"),),
    ),
    Block(
        "rep-norm-read-twice", lambda: BranchReadTwice(norm=True), IMAGE, 1, 1, "",
        (Kept("norm", "reads the model's input and is an output by itself, whatever the sum becomes"),),
    ),
    Block(
        "mobileone-depthwise", part(lambda: MobileOne(8, 8, 3, groups=8, branches=3)), IMAGE, 5, 0, SIDEWAYS,
    ),
    Block(
        "mobileone-depthwise-stride", lambda: MobileOne(8, 8, 3, 2, groups=8, branches=2), IMAGE, 3, 0,
        BACKWARD,
    ),
    Block(
        "mobileone-pointwise", part(lambda: MobileOne(8, 8, 1, branches=2)), IMAGE, 3, 0, SIDEWAYS,
    ),
    Block("mobileone-pointwise-wider", lambda: MobileOne(8, 12, 1, branches=3), IMAGE, 3, 0, BACKWARD),
    Block(
        "fastvit-repmixer", part(FastVitMixer), IMAGE, 4, 0,
        "both identity norms, one of them subtracted, join the mixer's depthwise kernel",
    ),
    Block(
        "fastvit-repmixer-unscaled", part(lambda: FastVitMixer(layer_scale=False)), IMAGE, 4, 0,
        "x + mixer(x) − norm(x) is one sum of linear branches",
    ),
    Block("fastvit-ffn", FastVitFfn, IMAGE, 1, 0, BACKWARD),
    Block(
        "fastvit-block", FastVitBlock, IMAGE, 5, 0, "as fastvit-repmixer, then fastvit-ffn",
    ),
    Block(
        "fastvit-attention", FastVitAttention, ((2, 12, 4, 3),), 2, 0,
        "norm forward through flatten and transpose into qkv",
    ),
    Block("fastvit-downsample", FastVitDownsample, IMAGE, 4, 0, SIDEWAYS),
    Block(
        "repghost", part(lambda: RepGhost(8, 12)), IMAGE, 3, 0,
        "fusion_bn joins the cheap depthwise kernel: both read x1, the ReLU comes after the sum",
    ),
    Block(
        "repghost-linear", part(lambda: RepGhost(8, 12, relu=False)), IMAGE, 3, 0, "as repghost",
    ),
    Block(
        "repghost-early-relu", lambda: RepGhost(8, 12, early=True), IMAGE, 3, 1, BACKWARD,
        (Kept("fusion_bn", "reads a ReLU; is added to another ReLU, and the model's output is the sum"),),
    ),
    Block("repghost-bottleneck", RepGhostBottleneck, IMAGE, 9, 0, "as repghost, twice"),
    Block(
        "repvit", RepViT, IMAGE, 4, 0,
        "conv3×3 + conv1×1 + x is one depthwise convolution, which takes the norm of the sum",
    ),
    Block("repvit-no-se", lambda: RepViT(se=False), IMAGE, 4, 0, "as repvit"),
    Block(
        "replknet", RepLKBlock, IMAGE, 5, 0, "prelkb_bn forward into the 1×1 convolution, the others backward",
    ),
    Block(
        "replknet-ffn", RepLKFfn, IMAGE, 3, 0,
        "preffn_bn forward into the 1×1 convolution, the others backward",
    ),
]

_INPUT = "reads the model's input; " + RELU
_APPENDED = "what it reads is read by later layers too, and " + RELU

PRE_ACTIVATION = [
    Block(
        "densenet-block", DenseBlock, IMAGE, 4, 2, "norm2 goes back into conv1",
        (Kept(r"layers\.\d\.norm1", _APPENDED, 2),),
    ),
    Block(
        "densenet", DenseNet, ((2, 3, 16, 16),), 9, 5, "norm0 goes back into conv0, each norm2 into its conv1",
        (
            Kept(r"block\d\.layers\.\d\.norm1", _APPENDED, 3),
            # its slice for the last layer's conv2 could go back into that; a smaller norm would stay
            Kept(r"transition\.norm|norm5", "reads a concatenation of what is read elsewhere too; " + RELU, 2),
        ),
    ),
    # unsure: a norm that stays could undo what its input takes. The norm of the last sum could so go back into
    # all that is summed, and 1.bn1 undo it (in dpn: normal.c1x1_a.bn for bn; in densenet: the last norm1 for
    # norm5). By the letter of the algebra another reader stops it, unless all readers are the same affine map
    Block(
        "preact-resnet", lambda: nn.Sequential(PreActBlock(), PreActBlock(12, 12, 1), BN(12), nn.ReLU()),
        IMAGE, 5, 3, "bn2 goes back into conv1",
        (
            Kept(r"0\.bn1", _INPUT),
            Kept(r"1\.bn1", "reads the residual stream, as the next sum does; " + RELU),
            Kept("2", "reads a sum, one summand of which is the stream that 1.bn1 reads too; " + RELU),
        ),
    ),
    Block(
        "preact-resnet-projected", lambda: nn.Sequential(PreActBlock(), BN(12), nn.ReLU()), IMAGE, 3, 1,
        "bn2 goes back into conv1; the last one through the sum into conv2 and downsample",
        (Kept(r"0\.bn1", _INPUT),),
    ),
    Block(
        "dpn", DualPathNet, ((2, 8, 5, 5),), 8, 4, "c3x3_b.bn goes back into c1x1_a, c1x1_c.bn into c3x3_b",
        (
            Kept(r"proj\.c1x1_[wa]\.bn", _INPUT, 2),
            Kept(r"normal\.c1x1_a\.bn", "reads both paths, as the block's sum and concatenation do; " + RELU),
            Kept("bn", "reads both paths, older parts of which normal.c1x1_a reads too; " + RELU),
        ),
    ),
    # BatchNorm → ReLU → convolution is not how Xception goes: each norm follows a convolution without bias
    Block("xception", Xception, IMAGE, 4, 0, BACKWARD),
    Block("xception-aligned", lambda: Xception(kind="aligned"), IMAGE, 7, 0, BACKWARD),
    Block(
        "xception-preact", PreXception, IMAGE, 3, 1,
        "sep2.norm and sep3.norm go back into conv_pw before them",
        (Kept("norm", _INPUT),),
    ),
]

MIXERS = [
    # Each norm but the last is read by a padded convolution and a residual sum, or is that sum's other summand.
    # One of the two that meet there can go all the same. Let y = s·g + t be the stream and z = s'·g' + t' what
    # is added: y + z = s·(y/s + z/s). The 1×1 convolution, which alone reads the sum, takes s, and so does the
    # depthwise one on y/s = g + t/s. Or z goes, with s'. Not both: g and g' are GELUs of different scale
    # unsure: a planner that carries no scale through a residual sum leaves both, which makes 4
    Block(
        "convmixer", ConvMixer, PICTURE, 5, 2,
        "one of each two that meet in a residual sum; the last forward through the global pool into the head",
        (
            Kept(r"stem\.2|blocks\.0\.0\.fn\.2", "both read GELUs and are summed: their scales differ"),
            Kept(r"blocks\.0\.3|blocks\.1\.0\.fn\.2", "both read GELUs and are summed: their scales differ"),
        ),
    ),
    Block(
        "inceptionnext", InceptionNeXt, ((2, 16, 6, 6),), 1, 0,
        "forward into fc1; not backward, where the concatenation has a raw part of x",
    ),
    Block(
        "inceptionnext-downsample", lambda: nn.Sequential(BN(8), nn.Conv2d(8, 12, 2, 2)), IMAGE, 1, 0,
        "forward into a convolution with stride and without padding",
    ),
    Block("visformer", Visformer, ((2, 12, 4, 4),), 2, 0, "norm1 forward into qkv, norm2 into conv1"),
    Block("visformer-stem", VisformerStem, PICTURE, 2, 0, BACKWARD),
    Block("swiftformer-encoder", SwiftFormerEncoder, IMAGE, 1, 0, BACKWARD),
    Block(
        "swiftformer-block", SwiftFormerBlock, ((2, 8, 4, 4),), 2, 0,
        "the local norm backward into the depthwise convolution, norm1 forward into fc1",
    ),
    Block("efficientformer-attention", TalkingAttention, ((2, 12, 4, 4),), 5, 0, BACKWARD),
    Block(
        "efficientformer-attention-stride", lambda: TalkingAttention(stride=2), ((2, 12, 4, 4),), 6, 0,
        BACKWARD,
    ),
    Block("efficientformer-downsample", DownsampleAttention, ((2, 8, 4, 4),), 6, 0, BACKWARD),
    Block("efficientformer-mlp", ConvMlpWithNorm, IMAGE, 3, 0, BACKWARD),
]

MOBILE = [
    Block("ghost", Ghost, IMAGE, 2, 0, BACKWARD),
    Block("ghost-bottleneck", GhostBottleneck, IMAGE, 7, 0, BACKWARD),
    Block("shufflenet", ShuffleUnit, ((2, 12, 6, 6),), 3, 0, BACKWARD),
    Block("shufflenet-stride", lambda: ShuffleUnit(12, 8, 2), ((2, 12, 6, 6),), 5, 0, BACKWARD),
    Block("se-resnet", SEBottleneck, IMAGE, 4, 0, BACKWARD),
]

DENSE_PREDICTION = [
    Block("unet", UNet, ((2, 3, 8, 8),), 6, 0, BACKWARD),
    Block("unet-up-norm", lambda: UNet(up_norm=True), ((2, 3, 8, 8),), 7, 0, BACKWARD),
    Block(
        "conv-transpose",
        lambda: nn.Sequential(
            nn.ConvTranspose2d(8, 8, 4, 2, 1, bias=False), BN(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 8, 2, 2, groups=2), BN(8), nn.Tanh(),
        ),
        ((2, 8, 3, 3),), 2, 0, "backward, on the output axis of a ConvTranspose, with groups too",
    ),
    Block("faceboxes-crelu", CReLU, PICTURE, 2, 0, "backward: nothing but the norm reads the convolution"),
]

POINTS = [
    Block("pointnet", PointNet, ((3, 3, 10),), 3, 0, BACKWARD),
    Block(
        "pointnet-input", lambda: PointNet(norm_input=True), ((3, 3, 10),), 4, 0,
        "the first forward into conv1",
    ),
    Block(
        "particlenet-input",
        lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Conv1d(5, 8, 1, bias=False), nn.BatchNorm1d(8), nn.ReLU()),
        ((2, 5, 7),), 2, 0, "the first forward into the Conv1d, the second backward into it",
    ),
    # unsure: the tables name neither Gather along another axis nor Expand; both commute with a map per channel
    Block(
        "particlenet-fixed-edges", FixedEdges, ((2, 5, 7),), 1, 0,
        "forward: x passes (s, t), near − x passes (s, 0), their concatenation goes into the 1×1 convolution",
    ),
    # unsure: as particlenet-fixed-edges, and the index is computed (from the points, not from the features)
    Block(
        "particlenet", ParticleNet, ((2, 2, 7), (2, 5, 7)), 3, 0,
        "as particlenet-fixed-edges, and into the shortcut's Conv1d",
    ),
    Block(
        "particlenet-masked", lambda: ParticleNet(masked=True), ((2, 2, 7), (2, 5, 7)), 3, 0,
        "(s·x + t)·mask = s·((x + t/s)·mask): s goes on, and one Add stays, as before a padded conv",
    ),
]

HEADS = [
    Block("head-linear", lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 5)), ((3, 8),), 1, 0, FORWARD),
    Block(
        "head-dropout-linear",
        lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 5, bias=False)), ((3, 8),), 1, 0,
        FORWARD,
    ),
    Block("head-mean-linear", MeanHead, IMAGE, 1, 0, "forward through the mean over positions"),
    Block(
        "head-pool-linear",
        lambda: nn.Sequential(BN(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 5)),
        IMAGE, 1, 0, "forward through the global pool",
    ),
    Block(
        "head-pool-conv", lambda: nn.Sequential(BN(8), nn.AdaptiveAvgPool2d(1), conv(8, 5), nn.Flatten()),
        IMAGE, 1, 0, "forward through the global pool",
    ),
    Block(
        "head-flatten-linear", lambda: nn.Sequential(BN(4), nn.Flatten(), nn.Linear(4 * 4 * 4, 5)),
        ((2, 4, 4, 4),), 1, 0, "forward: s and t repeated by the 16 positions of each channel",
    ),
    Block(
        "head-channels-last", ChannelsLastHead, ((2, 4, 4, 4),), 1, None,
        "the table asks for the order C, H, W; the other order is as exact, with another repetition",
    ),
    Block(
        "head-arcface",
        lambda: nn.Sequential(
            conv(3, 4, 3), BN(4), nn.Dropout(), nn.Flatten(), nn.Linear(4 * 4 * 4, 8), nn.BatchNorm1d(8)
        ),
        ((2, 3, 4, 4),), 2, 0, BACKWARD,
    ),
    Block(
        "head-relu-pool-linear", lambda: MeanHead(relu=True), IMAGE, 1, 1, "",
        (Kept("norm", _INPUT),),
    ),
]

CLASSICS = [
    Block(
        "scale-then-norm", lambda: nn.Sequential(conv(8, 8, 3), LayerScale(8), BN(8), nn.ReLU()), IMAGE, 1, 0,
        "backward through a constant Mul", left_in_module=1,
    ),
    Block(
        "frozen-norm", lambda: nn.Sequential(conv(8, 8, 3), FrozenNorm(8), nn.ReLU()), IMAGE, 0, 0,
        "spelled as Mul and Add: no BatchNorm is called",
    ),
    Block(
        "frozen-then-norm", lambda: nn.Sequential(conv(8, 8, 3), FrozenNorm(8), BN(8), nn.ReLU()), IMAGE, 1, 0,
        "backward through a constant Mul and Add",
    ),
    Block(
        "norm-then-frozen", lambda: nn.Sequential(BN(8), FrozenNorm(8), conv(8, 12), nn.ReLU()), IMAGE, 1, 0,
        "forward through a constant Mul and Add into the 1×1 convolution",
    ),
    Block(
        "norm-scale-residual",
        lambda: nn.Sequential(Residual(nn.Sequential(conv(8, 8, 3), BN(8), LayerScale(8))), nn.ReLU()), IMAGE,
        1, 0, BACKWARD,
    ),
    Block("norm-norm-behind-conv", lambda: nn.Sequential(conv(8, 8, 3), BN(8), BN(8)), IMAGE, 2, 0, BACKWARD),
    Block("norm-norm-before-conv", lambda: nn.Sequential(BN(8), BN(8), conv(8, 12)), IMAGE, 2, 0, FORWARD),
    # unsure: which of the two takes the other
    Block(
        "norm-norm-between-relus", lambda: nn.Sequential(nn.ReLU(), BN(8), BN(8), nn.ReLU()), IMAGE, 2, 1,
        "one takes the other: a composition of affine maps is one",
        (Kept("1|2", "reads a ReLU, and " + RELU),),
    ),
    Block(
        "norm-grouped-conv", lambda: nn.Sequential(BN(8), nn.Conv2d(8, 12, 3, groups=4)), IMAGE, 1, 0, FORWARD,
    ),
    Block(
        "norm-padded-conv", lambda: nn.Sequential(BN(8), conv(8, 12, 3)), IMAGE, 1, 0,
        "s forward, x + t/s stays",
    ),
    Block(
        "norm-padded-depthwise", lambda: nn.Sequential(BN(8), conv(8, 8, 3, groups=8, bias=True)), IMAGE, 1, 0,
        "s forward, x + t/s stays",
    ),
    Block(
        "norm-reflected-conv",
        lambda: nn.Sequential(BN(8), nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect")), IMAGE, 1, 0,
        "forward: what is padded has the shift too",
    ),
    Block(
        "norm-1x1-and-padded", lambda: TwoReaders(3), IMAGE, 1, 0, "s forward into both, x + t/s stays",
    ),
    Block("norm-two-readers", lambda: TwoReaders(1), IMAGE, 1, 0, FORWARD),
    Block(
        "norm-padded-and-residual", lambda: ReadTwice(3), IMAGE, 1, 1, "",
        (Kept("norm", "reads the model's input; a sum reads it too, and its other summand is a ReLU"),),
    ),
    Block(
        "norm-1x1-and-residual", lambda: ReadTwice(1), IMAGE, 1, 1, "",
        (Kept("norm", "reads the model's input; a sum reads it too, and its other summand is a ReLU"),),
    ),
    Block(
        "norm-between-nonlinear", lambda: nn.Sequential(nn.ReLU(), BN(8), nn.GELU()), IMAGE, 1, 1, "",
        (Kept("1", "a nonlinear op on either side"),),
    ),
    Block(
        "norm-alone", lambda: nn.Sequential(BN(8)), IMAGE, 1, 1, "",
        (Kept("0", "reads the model's input and writes its output"),),
    ),
    Block(
        "norm-last", lambda: nn.Sequential(conv(8, 8, 3), nn.ReLU(), BN(8)), IMAGE, 1, 1, "",
        (Kept("2", "reads a ReLU and writes the model's output"),),
    ),
    Block(
        "norm-before-transposed-1x1", lambda: nn.Sequential(BN(8), nn.ConvTranspose2d(8, 12, 1, groups=2)),
        IMAGE, 1, 0, "forward: k = 1 and stride 1 leave no position out",
    ),
    # unsure: the table lets s in; that t may stay as an Add is said of padded convolutions only
    Block(
        "norm-before-transposed-2x2", lambda: nn.Sequential(BN(8), nn.ConvTranspose2d(8, 12, 2, 2)), IMAGE, 1,
        0, "s forward on the input axis, x + t/s stays",
    ),
    Block(
        "max-pool-norm-relu", lambda: nn.Sequential(conv(8, 8, 3), nn.MaxPool2d(2), BN(8), nn.ReLU()), IMAGE,
        1, 1, "", (Kept("2", "reads a MaxPool, γ has both signs; a ReLU reads it"),),
    ),
    Block(
        "max-pool-norm-conv", lambda: nn.Sequential(conv(8, 8, 3), nn.MaxPool2d(2), BN(8), conv(8, 12)), IMAGE,
        1, 0, "forward into the 1×1 convolution",
    ),
    Block(
        "norm-max-pool-conv", lambda: nn.Sequential(BN(8), nn.MaxPool2d(2), conv(8, 12)), IMAGE, 1, 1, "",
        (Kept("0", "reads the model's input; a MaxPool reads it, γ has both signs"),),
    ),
    Block(
        "average-pool-norm-relu", lambda: nn.Sequential(conv(8, 8, 3), nn.AvgPool2d(2), BN(8), nn.ReLU()),
        IMAGE, 1, 0, "backward through an unpadded AvgPool",
    ),
    Block(
        "norm-average-pool-conv",
        lambda: nn.Sequential(BN(8), nn.AvgPool2d(3, 1, 1, count_include_pad=False), conv(8, 12)), IMAGE, 1, 0,
        "forward through an AvgPool that does not count the padding",
    ),
    Block(
        "norm-padded-average-pool-conv", lambda: nn.Sequential(BN(8), nn.AvgPool2d(3, 1, 1), conv(8, 12)),
        IMAGE, 1, None, "only s passes an AvgPool that counts zeros: kept, or one Add stays",
    ),
    Block(
        "average-pool-padded-norm-relu",
        lambda: nn.Sequential(conv(8, 8, 3), nn.AvgPool2d(3, 1, 1), BN(8), nn.ReLU()), IMAGE, 1, None,
        "only s passes an AvgPool that counts zeros: kept, or one Add stays",
    ),
    Block("concat-norm-relu", lambda: Joined(False, nn.ReLU()), IMAGE, 1, 0, "backward, a slice for each part"),
    Block("concat-raw-norm-conv", lambda: Joined(True, conv(19, 12)), IMAGE, 1, 0, FORWARD),
    # the slices of the convolutions could go, a smaller norm of x would stay
    Block(
        "concat-raw-norm-relu", lambda: Joined(True, nn.ReLU()), IMAGE, 1, 1, "",
        (Kept("norm", "reads a concatenation with the model's input in it; " + RELU),),
    ),
    Block(
        "sum-norm-relu", lambda: NormOfSum(False), IMAGE, 1, 0,
        "backward through the sum: both summands take s",
    ),
    Block(
        "sum-with-relu-norm-relu", lambda: NormOfSum(True), IMAGE, 1, 1, "",
        (Kept("norm", "reads a sum, one summand of which is a ReLU; " + RELU),),
    ),
    # unsure: one could go into the convolution and the other undo it; the algebra says that two readers stop it
    Block(
        "two-norms-of-one-conv", lambda: TwoNorms(nn.ReLU), IMAGE, 2, 2, "",
        (Kept(r"norms\.[01]", "two norms that differ read the convolution; " + RELU, 2),),
    ),
    Block("two-norms-before-convs", lambda: TwoNorms(lambda: conv(8, 6)), IMAGE, 2, 0, FORWARD),
    Block(
        "post-norm", PostNorm, ((2, 6, 8),), 2, 1,
        "as convmixer: fc1 takes norm1, fc2 its inverse, norm2 takes norm1 again; or norm1 takes norm2",
        (Kept("norm[12]", "norm1 reads the model's input, norm2 writes its output; they are one at the end"),),
    ),
    Block(
        "softmax-v-norm", AttentionNorm, ((2, 6, 8),), 1, 0,
        "backward into v: the rows of a softmax sum to 1",
    ),
    # as above, but t is multiplied by sums of the weights, which are data
    Block(
        "sigmoid-v-norm", lambda: AttentionNorm(gate=True), ((2, 6, 8),), 1, None,
        "only s passes: kept, or one Add stays",
    ),
    # unsure: head and feature are two axes of v, and the table asks for the whole channel axis to be v's last
    Block(
        "softmax-v-norm-heads", lambda: AttentionNorm(heads=2), ((2, 6, 8),), 1, None,
        "exact, though not by the letter of the table",
    ),
    Block(
        "norm-shared-reader", SharedReader, IMAGE, 1, None, "into a copy of the weight, or not at all",
    ),
    Block(
        "conv-is-output", RawToo, IMAGE, 1, 1, "",
        (Kept("norm", "what it reads is an output of the model; " + RELU),),
    ),
    Block(
        "norm-is-output", NormToo, ((3, 8),), 1, 1, "",
        (Kept("norm", "reads the model's input and is an output of the model"),),
    ),
    Block(
        "norm-over-tokens", TokenNorm, ((2, 8, 8),), 1, 1, "",
        (Kept("norm", "scales the tokens; the Linear writes the features, another axis; " + RELU),),
    ),
]

# fmt: on

BLOCKS: tuple[Block, ...] = tuple(
    itertools.chain(
        LEVIT,
        NEXTVIT,
        COATNET,
        REPARAMETERISED,
        PRE_ACTIVATION,
        MIXERS,
        MOBILE,
        DENSE_PREDICTION,
        POINTS,
        HEADS,
        CLASSICS,
    )
)
