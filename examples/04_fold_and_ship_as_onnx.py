"""04 · Fold the BatchNorms of your own PyTorch model, keep it a PyTorch model, and ship it as ONNX.

    python examples/04_fold_and_ship_as_onnx.py [OUTPUT.onnx]

Without a path it writes nothing.
"""

import sys

import torch
from torch import nn

import normtool


class Classifier(nn.Module):
    """Two convolutions, each with its BatchNorm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


# a few steps of training, so that the BatchNorms have statistics worth folding
torch.manual_seed(0)
model = Classifier()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(20):
    images = torch.randn(32, 3, 16, 16) * 2 + 1
    loss = nn.functional.cross_entropy(model(images), torch.randint(0, 10, (32,)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval()

# fold works on a copy, and gives back your own class
example = torch.randn(2, 3, 16, 16)
result = normtool.fold(model, example)
folded = result.model
print(type(folded).__name__, "with", result.folded, "BatchNorms folded:", result.validation.verdict)
print("bn1 is now", folded.bn1, "and conv1 has a bias:", folded.conv1.bias is not None)

# the same on the way to ONNX; the report explains every difference in the counts
shipped = normtool.convert(model, example, fold=True)
print("as ONNX:", shipped.validation.verdict)
for difference in shipped.reconciliation.differences:
    print(f"  {difference.cause}: {difference.message}")
print("unexplained:", sum(map(abs, shipped.reconciliation.unexplained.values())))

if len(sys.argv) > 1:
    shipped.save(sys.argv[1])
