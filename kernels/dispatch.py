"""Chooses the backend of an op: one rule, one override.

1. `backend="…"` in the call is strict: that backend serves the op, or BackendError says why it cannot.
2. Else `SYNCR1_BACKEND` is a preference: a backend that is absent altogether raises; a device or dtype that it does
   not cover is served by `reference`.
3. Else the device decides: `native` (C++) for CPU tensors, `triton` for CUDA tensors, where they are there and cover
   the dtype; `reference` otherwise.

A backend is a module with the functions of `syncr1.kernels.terms.Backend`; `reference` has plain differentiable
functions in place of the row kernels.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .register import constant_when_traced
from .streams import TokenStream

ENVIRONMENT_VARIABLE = "SYNCR1_BACKEND"
MODULES = {
    "reference": "syncr1.kernels.reference.backend",
    "native": "syncr1.kernels.native",
    "triton": "syncr1.kernels.triton_ops",
}
PREFERRED = {"cpu": "native", "cuda": "triton"}
TRANSFORMABLE = {
    "selective_logp": ("vmap", "grad", "jvp"),
    "shared_prefix_attention": ("vmap", "grad", "jvp"),
    "grpo_loss": ("grad", "jvp"),
}
"""What `reference` does right under transforms; everything else would fail somewhere below, or give tangents of 0."""


_innermost = torch._C._functorch.peek_interpreter_stack
_TRANSFORMS = {getattr(torch._C._functorch.TransformType, name.capitalize()): name for name in ("vmap", "grad", "jvp")}
STREAM_FIELDS = tuple(field.name for field in fields(TokenStream))


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve the op."""


class Kind(NamedTuple):
    """What the choice depends on in a tensor."""

    device: torch.device
    dtype: torch.dtype


@cache
def load(backend: str) -> tuple[ModuleType | None, str | None]:
    """The backend's module, or the reason why it is absent."""
    if backend not in MODULES:
        return None, f"there is no such backend; known: {', '.join(MODULES)}"
    module = importlib.import_module(MODULES[backend])
    reason: str | None = module.unavailable_reason()
    return (None, reason) if reason else (module, None)


def module_of(backend: str) -> Any:
    """The module of a backend that `choose` named."""
    return load(backend)[0]


def available() -> dict[str, str]:
    """Every known backend with "ok" or the reason for its absence."""
    return {name: load(name)[1] or "ok" for name in MODULES}


def same_device(op: str, **named: object) -> None:
    """Raises ValueError where a tensor is not on the device of the first; nothing is moved, which would be slow unseen.

    Args:
        op: for the message.
        **named: an op's arguments: a tensor, or a dict, a sequence or a TokenStream of them; anything else is passed
            over (the ops' own checks judge it).
    """
    home: torch.device | None = None
    first = ""
    for name, value in named.items():
        if value is None:
            continue
        for part, tensor in ((name, value),) if isinstance(value, Tensor) else _tensors(name, value):
            if home is None:
                home, first = tensor.device, part
            elif tensor.device != home:
                remedy = f"move it with .to({str(home)!r})"
                raise ValueError(f"{op}: {part} must be on {home} as {first} is, got {tensor.device}; {remedy}")


def _tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """The tensors inside an argument, each with what a caller would write to get at it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, TokenStream):
        for field in STREAM_FIELDS:
            yield from _tensors(f"{name}.{field}", getattr(value, field))
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(f"{name}[{key!r}]", part)
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _tensors(f"{name}[{index}]", part)


def choose(op: str, backend: str | None, *tensors: Tensor | None) -> str:
    """The name of the backend that serves `op`, by the rule above, for its float operands, which are on one device.

    Raises:
        BackendError: the backend that was asked for cannot serve the call.
        NotImplementedError: a transform of torch.func, or forward-mode AD, that the backend cannot follow.
    """
    chosen = _choose(op, backend, tuple([Kind(t.device, t.dtype) for t in tensors if t is not None]))
    refuse_transforms(op, chosen)
    return chosen


def refuse_transforms(op: str, backend: str | None = None) -> None:
    """Registered ops are opaque: torch's fallbacks would batch them badly, or call their tangents 0 in silence."""
    if torch.compiler.is_compiling() or (_innermost() is None and torch.autograd.forward_ad._current_level < 0):
        return
    levels = torch._C._functorch.get_interpreter_stack() or ()
    active = {_TRANSFORMS[level.key()] for level in levels if level.key() in _TRANSFORMS}
    if torch.autograd.forward_ad._current_level >= 0:
        active.add("jvp")
    served = TRANSFORMABLE.get(op, ()) if backend == "reference" else ()
    refused = sorted(active.difference(served))
    if refused:
        able = TRANSFORMABLE.get(op)
        remedy = f"backend='reference' follows {', '.join(able)}" if able else "take gradients with torch.autograd"
        raise NotImplementedError(
            f"{op}: must be called outside of torch.func's transforms and forward-mode AD, got a call inside "
            f"{', '.join(refused)}; {remedy}"
        )


@constant_when_traced
def _choose(op: str, backend: str | None, kinds: tuple[Kind, ...]) -> str:
    return _choose_once(op, backend, os.environ.get(ENVIRONMENT_VARIABLE), kinds)


@cache
def _choose_once(op: str, backend: str | None, preferred: str | None, kinds: tuple[Kind, ...]) -> str:
    wanted = backend or preferred
    name = wanted or PREFERRED.get(kinds[0].device.type if kinds else "cpu", "reference")
    module, reason = load(name)
    if module is not None:
        reason = module.unsupported_reason(op, kinds)
        if reason is None:
            return name
    if backend or (wanted and module is None):
        source = "backend=" if backend else f"{ENVIRONMENT_VARIABLE}="
        raise BackendError(
            f"{op}: {source}{name!r} cannot serve this call: {reason}; use 'reference', or leave it unset"
        )
    return "reference"
