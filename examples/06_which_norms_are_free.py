"""06 · Which of my LayerNorms could be RMSNorms, what would it cost, and who stands against it?

    python examples/06_which_norms_are_free.py [MODEL.onnx]

Without a path it looks at a small post-norm encoder and writes nothing.
"""

import sys
from collections import Counter

import torch
from torch import nn

import normtool


def post_norm_encoder() -> object:
    """Like BERT: each block adds to what a LayerNorm has put out, so that its γ is part of the next sum."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.TransformerEncoder(layer, 3), nn.Linear(32, 8))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return normtool.convert(model.eval(), torch.randn(2, 10, 8)).model


model = sys.argv[1] if len(sys.argv) > 1 else post_norm_encoder()

# nothing is changed or written: a plan is a value
for mode in ("exact", "centre"):
    plan = normtool.plan_swap(model, mode=mode)
    norms = [site for site in plan.sites if site.norm.kind == "layer_norm"]
    print(f"--mode {mode}:", dict(Counter(site.verdict for site in norms)))
    for site in norms:
        if site.verdict == "kept":
            print(f"  {site.norm.name} stays:", "; ".join(reason.message for reason in site.reasons))
        else:
            how = site.to_dict().get("centring", {})
            price = "free" if how.get("free") else "a Centre behind " + ", ".join(how.get("centres", []))
            print(f"  {site.norm.name} can go: {price}" + (", and an Add of β" if how.get("added_ops") else ""))
