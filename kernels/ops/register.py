"""How an op gets its name `torch.ops.syncr1.<name>`.

`torch.library.custom_op` does the same and imports torch._dynamo on the way, which takes seconds at start, and wraps
every call; this is the plain interface below it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
LIBRARY = torch.library.Library("syncr1", "DEF")
registered: Any = torch.ops.syncr1
"""The ops by name: `registered.grpo_loss(…)`."""


def implements(name: str, schema: str, *, reads_back: bool = False) -> Callable[[F], F]:
    """Defines the op and makes the function its implementation on every device; it sees no autograd.

    `reads_back`: the host waits for a value on the way, so that `torch.compile` keeps the op out of CUDA graphs.
    """

    def decorate(function: F) -> F:
        LIBRARY.define(name + schema, tags=(torch.Tag.cudagraph_unsafe,) if reads_back else ())
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return function

    return decorate


def fakes(name: str) -> Callable[[F], F]:
    """The function gives shapes and dtypes of the outputs, for tracing."""

    def decorate(function: F) -> F:
        torch.library.register_fake(f"syncr1::{name}", function, lib=LIBRARY)
        return function

    return decorate


def differentiates(name: str, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Autograd of an op: `save` keeps what `backward` needs."""
    torch.library.register_autograd(f"syncr1::{name}", backward, setup_context=save, lib=LIBRARY)


def differentiates_no_further(name: str) -> None:
    """The op is another's backward: what it returns has no gradient, whatever its inputs require."""

    def mark(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(*(output if isinstance(output, (tuple, list)) else (output,)))

    # None of the outputs requires a gradient, so that the second function is never called.
    differentiates(name, mark, lambda ctx, *grads: None)


def constant_when_traced(function: F) -> F:
    """The result depends on plain Python values alone: `torch.compile` calls it once, while tracing.

    What `torch.compiler.assume_constant_result` does, without its import of torch._dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
