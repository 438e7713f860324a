"""Chooses the backend of an op: one rule, one override.

1. `backend="…"` in the call is strict: that backend serves the op, or BackendError says why it cannot.
2. Else `SYNCR1_BACKEND` is a preference: a backend that is absent altogether raises; an op, device or dtype that it
   does not cover is served by `reference`.
3. Else the device decides: `native` (C++) for CPU tensors where it has the op and the dtype, `reference` otherwise.

A backend is a module with `OPS` (name → function), `unavailable_reason()` and `unsupported_reason(op, tensors)`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

ENVIRONMENT_VARIABLE = "SYNCR1_BACKEND"
MODULES = {
    "reference": "syncr1.kernels.reference",
    "native": "syncr1.kernels.native",
    "triton": "syncr1.kernels.triton_ops",
}


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve the op."""


def load(backend: str) -> tuple[ModuleType | None, str | None]:
    """The backend's module, or the reason why it is absent."""
    if backend not in MODULES:
        return None, f"there is no such backend; known: {', '.join(MODULES)}"
    if importlib.util.find_spec(MODULES[backend]) is None:
        return None, "this version of syncr1 does not include it"
    module = importlib.import_module(MODULES[backend])
    reason: str | None = module.unavailable_reason()
    return (None, reason) if reason else (module, None)


def available() -> dict[str, str]:
    """Every known backend with "ok" or the reason for its absence."""
    return {name: load(name)[1] or "ok" for name in MODULES}


def select(op: str, backend: str | None, *tensors: Tensor | None) -> Callable[..., Any]:
    """The function that serves `op` for these tensors, by the rule above."""
    present = [t for t in tensors if t is not None]
    wanted = backend or os.environ.get(ENVIRONMENT_VARIABLE)
    name = wanted or ("native" if all(t.device.type == "cpu" for t in present) else "reference")
    module, reason = load(name)
    if module is not None:
        reason = f"it does not implement {op}" if op not in module.OPS else module.unsupported_reason(op, present)
        if reason is None:
            function: Callable[..., Any] = module.OPS[op]
            return function
    if backend or (wanted and module is None):
        source = "backend=" if backend else f"{ENVIRONMENT_VARIABLE}="
        raise BackendError(
            f"{op}: {source}{name!r} cannot serve this call: {reason}; use 'reference', or leave it unset"
        )
    reference, _ = load("reference")
    assert reference is not None
    fallback: Callable[..., Any] = reference.OPS[op]
    return fallback
