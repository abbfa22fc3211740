"""LayerNorm → RMSNorm without changing the function: LN(x) = γ·RMS(P·x) + β, and P goes into what writes x.

`places` says where a mean is taken, `rows` what a Centre meets on its way, `facts` which tensors can be
centred and where a Centre op has to help out, `targets` how the result is spelled, `proof` shows that it is
right. `swapping` makes the plan.
"""
