"""03 · What does a Hugging Face model learn, and what would training it take? No weights are needed to know.

    python examples/03_audit_a_hugging_face_model.py [FOLDER]

FOLDER holds a config.json, as every model on the hub does. Without one it makes a folder for a small BERT.
Needs transformers (pip install transformers).
"""

import sys
import tempfile
from pathlib import Path

import normtool
from normtool.training import training_memory


def small_bert(folder: Path) -> Path:
    """A configuration is all: the architecture is built on PyTorch's meta device, which holds no numbers."""
    from transformers import BertConfig

    BertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=1000,
        architectures=["BertForMaskedLM"],
    ).save_pretrained(folder)
    return folder


with tempfile.TemporaryDirectory() as temporary:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else small_bert(Path(temporary))
    scan = normtool.scan(folder)

print(scan)

# one number is not enough: a tied weight has two names and is stored once
census = scan.parameters
print(f"{census.named:,} by name, {census.unique:,} parameters, {census.parameters:,} stored elements")
print(f"{census.learnable:,} learnable, {census.frozen:,} frozen, {census.buffers:,} in buffers")

for norm in scan.norms[:3]:
    print(f"{norm.name}: {norm.norm.kind}, {norm.learnable} learnable, {norm.calls} calls")

memory = training_memory(census, "adamw")
print(f"training with AdamW: {memory.total / 2**20:.1f} MiB beside the activations")
