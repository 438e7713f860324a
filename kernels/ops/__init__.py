"""The ops, a file each: public function, checks, and `torch.ops.syncr1.*` with fake kernel for tracing and gradient.

Everything that depends on values (checks, pruning, the choice of rows) happens inside a registered op, so that
`torch.compile` sees one opaque call.
"""
