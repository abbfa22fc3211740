"""Is a swapped model faster? GPT-2-like and ViT-like models of 12 layers in ONNX Runtime on CPU, one thread.

    python -m tests.benchmarks.swap_speed [--seconds 20]

Each is exported at opset 20 and 23 and timed against its swap, at its default target. A target that only ONNX
Runtime knows (`ort`) is timed too. The ratio is candidate/reference; below 1 is faster.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers as hf
from torch import nn

import normtool
from normtool.api import bench_models, load, make_swap
from normtool.options import SwapOptions


def gpt2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """GPT-2's layers (12 of width 768), a vocabulary of 1,000, 128 tokens."""
    config = hf.GPT2Config(n_layer=12, n_embd=768, n_head=12, vocab_size=1000, use_cache=False)
    return hf.GPT2Model(config), {"input_ids": torch.arange(128).reshape(1, 128)}


def vit() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """ViT-Ti/16: 12 layers of width 192, 197 tokens."""
    config = hf.ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768)
    return hf.ViTForImageClassification(config), {"pixel_values": torch.randn(1, 3, 224, 224)}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]]] = {"gpt2": gpt2, "vit": vit}


def perturbed(model: nn.Module) -> nn.Module:
    """Biases too: those that are 0 the exporter leaves out, and then a Gemm without one is compared with one
    that has taken β."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, 0, 0.1)
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            nn.init.normal_(part.weight, 1, 0.2)
            nn.init.normal_(part.bias, 0, 0.2)
    return model.eval()


def measured(seconds: float) -> Iterator[str]:
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model, inputs = make()
        perturbed(model)
        for opset, targets in ((20, ("primitive", "ort")), (23, ("onnx",))):
            shipped: Any = load(normtool.convert(model, inputs, opset=opset, validate=False).model)
            for target in targets:
                result = make_swap(shipped, SwapOptions(target=target))
                norms = sum(site.norm.kind == "layer_norm" for site in result.sites)
                found = bench_models(shipped, result.rewritten, seconds=seconds, threads=1)
                shares = [
                    "?" if s is None else f"{s:.1%}" for s in (found.norm_share_before, found.norm_share_after)
                ]
                yield (
                    f"{name:5} opset {opset} {target:9} {result.swapped}/{norms} swapped  {found.summary}  "
                    f"norm ops {shares[0]} → {shares[1]}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=20.0)
    for line in measured(parser.parse_args().seconds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
