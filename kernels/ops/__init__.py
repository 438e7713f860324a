"""The ops as torch knows them: `torch.ops.syncr1.*`, with fake kernels for tracing and gradients for autograd.

Everything that depends on values (checks, pruning, the choice of rows) happens inside an op, so that `torch.compile`
sees one opaque call. `syncr1.kernels.api` holds the public functions on top.
"""
