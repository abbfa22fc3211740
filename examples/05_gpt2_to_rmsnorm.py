"""05 · A GPT-2-like model without LayerNorm: the same function with RMSNorms, in PyTorch and in ONNX.

    python examples/05_gpt2_to_rmsnorm.py [OUTPUT.onnx]

Without a path it writes nothing.
"""

import sys

import torch
from torch import nn

import normtool


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(LN(x)), then x + mlp(LN(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """Tokens and positions, four blocks, a last norm, and a head of its own."""

    def __init__(self, vocabulary: int = 200, width: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(4)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions)))


# random weights will do, but not γ = 1 and β = 0: they would hide mistakes
torch.manual_seed(0)
model = Decoder().eval()
for module in model.modules():
    if isinstance(module, nn.LayerNorm):
        nn.init.normal_(module.weight, 1, 0.2)
        nn.init.normal_(module.bias, 0, 0.2)

tokens = torch.randint(0, 200, (2, 16))
result = normtool.swap(model, tokens)
norms = [site for site in result.sites if site.norm.kind == "layer_norm"]
print(f"{result.swapped} of {len(norms)} LayerNorms swapped:", result.validation.verdict)
print("norm1 of the first block is now", result.model.blocks[0].norm1)

# who writes the stream without its mean from now on
about = norms[-1].to_dict()
print("the last norm is free:", about["centring"]["free"], "· γ and β went on, its input is written by")
print(" ", ", ".join(about["centring"]["writers"]))

# the same on the way to ONNX, at the opset that has an operator for it
shipped = normtool.convert(model, tokens, swap="exact", opset=23)
kinds = [node.op_type for node in shipped.model.graph.node]
print({kind: kinds.count(kind) for kind in ("RMSNormalization", "LayerNormalization")})
print("as ONNX:", shipped.validation.verdict)

if len(sys.argv) > 1:
    shipped.save(sys.argv[1])
