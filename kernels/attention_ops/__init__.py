"""Shared-prefix attention: the plan of its two calls, their merging, and who computes them (CPU, CUDA, reference)."""
