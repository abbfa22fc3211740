"""01 · What does this model learn, what does it only remember, and where do its norms sit?

    python examples/01_count_the_parameters.py [MODEL.onnx]

Without a path it fetches a small trained model (see fetch_model.py).
"""

import sys

from fetch_model import fetch

import normtool

path = sys.argv[1] if len(sys.argv) > 1 else fetch()
scan = normtool.scan(path)

# every result prints as a table …
print(scan)

# … and is plain values underneath
for kind, count in scan.summary.items():
    print(f"{count.count} × {kind}: {count.learnable:,} learnable, {count.buffers:,} remembered")

census = scan.parameters
norms = sum(count.learnable for count in scan.summary.values())
print(f"{norms / census.learnable:.1%} of the {census.learnable:,} learnable parameters belong to norms")
