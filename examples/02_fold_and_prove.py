"""02 · Fold the BatchNorms away, and look at the evidence that nothing else changed.

    python examples/02_fold_and_prove.py [MODEL.onnx [FOLDED.onnx]]

Without paths it fetches a small trained model (see fetch_model.py) and writes nothing.
"""

import sys

from fetch_model import fetch

import normtool

path = sys.argv[1] if len(sys.argv) > 1 else fetch()

# a plan is a value: look at it before anything happens
plan = normtool.plan(path)
for site in plan.sites[:3]:
    print(site.norm.name, "→", site.verdict, site.fold.into if site.fold else site.reasons)

# fold = plan + apply + validate; the file at `path` is never touched
result = normtool.fold(path)
norms = [site for site in result.sites if site.norm.kind == "batch_norm"]
print(f"{result.folded} of {len(norms)} norms folded, and constant Mul and Add ops beside them")

# evidence, once per site: every stored coefficient rounded once, every op's equation right in float64 …
proofs = [site.fold.proof for site in result.sites if site.fold]
print(f"{sum(proof.coefficients for proof in proofs):,} coefficients checked")
print(
    f"worst: {max(p.worst_ulp for p in proofs)} ulp, equations off by less than 1e-12:",
    all(proof.region_error < 1e-12 for proof in proofs),
)

# … and once for the whole model, against the measured noise floor
comparison = result.validation
print("validation:", comparison.verdict)
print("a planted error of 1 % is found:", comparison.sensitivity.verdict == "different")

if len(sys.argv) > 2:
    result.save(sys.argv[2])
