"""How an op gets its name `torch.ops.syncr1.<name>`: schema, fake kernel, implementation and gradient from one record.

The record is a NamedTuple whose fields are the op's arguments in order; a field that is such a record itself stands for
its fields. torch sees the flat list, everything here sees the record.

`torch.library.custom_op` does the same and imports torch._dynamo on the way, which takes seconds at start, and wraps
every call; this is the plain interface below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
LIBRARY = torch.library.Library("syncr1", "DEF")
registered: Any = torch.ops.syncr1
"""The ops by name: `registered.grpo_loss(…)`."""
SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Tensor]: "Tensor[]",
    Sequence[float]: "float[]",
    Sequence[int]: "int[]",
    Sequence[bool]: "bool[]",
    float: "float",
    int: "int",
    int | None: "int?",
    bool: "bool",
    str: "str",
}
"""What torch calls a field's type; `Annotated[Tensor, "Tensor(a!)"]` says it itself."""


def _arguments(record: Any) -> Iterator[tuple[str, str]]:
    """(name, type in torch's words) of each argument of the op."""
    for name, kind in get_type_hints(record, include_extras=True).items():
        if hasattr(kind, "_fields"):
            yield from _arguments(kind)
        else:
            yield name, kind.__metadata__[0] if hasattr(kind, "__metadata__") else SCHEMA_TYPES[kind]


def flatten(record: tuple[Any, ...]) -> tuple[Any, ...]:
    """The op's arguments in the order of its schema."""
    flat: list[Any] = []
    for value in record:
        flat += flatten(value) if isinstance(value, tuple) else (value,)
    return tuple(flat)


@cache
def gatherer(record: Any) -> Callable[[Sequence[Any]], Any]:
    """The inverse of `flatten`."""
    parts: list[tuple[slice | int, Callable[[Any], Any]]] = []
    end = 0
    for kind in get_type_hints(record).values():
        start, end = end, end + (len(list(_arguments(kind))) if hasattr(kind, "_fields") else 1)
        parts.append((slice(start, end), gatherer(kind)) if hasattr(kind, "_fields") else (start, lambda value: value))
    if end == len(parts):
        return record._make  # no record inside
    return lambda flat: record._make([make(flat[at]) for at, make in parts])


def implements(name: str, record: Any, returns: str, *, reads_back: bool = False) -> Callable[[F], F]:
    """Defines the op and makes the function of its record the implementation on every device; it sees no autograd.

    `returns`: in torch's words. `reads_back`: the host waits for a value on the way, so that `torch.compile` keeps the
    op out of CUDA graphs.
    """

    def decorate(function: F) -> F:
        schema = ", ".join(f"{kind} {argument}" for argument, kind in _arguments(record))
        LIBRARY.define(f"{name}({schema}) -> {returns}", tags=(torch.Tag.cudagraph_unsafe,) if reads_back else ())
        gather = gatherer(record)
        LIBRARY.impl(name, lambda *flat: function(gather(flat)), "CompositeExplicitAutograd")
        return function

    return decorate


def fakes(name: str, record: Any) -> Callable[[F], F]:
    """The function of the op's record gives shapes and dtypes of the outputs, for tracing."""

    def decorate(function: F) -> F:
        gather = gatherer(record)
        torch.library.register_fake(f"syncr1::{name}", lambda *flat: function(gather(flat)), lib=LIBRARY)
        return function

    return decorate


def differentiates(name: str, record: Any, save: Callable[..., None], backward: Callable[..., dict[str, Any]]) -> None:
    """Autograd of an op.

    `save(ctx, inputs, output)` keeps what `backward(ctx, *grads)` needs. That returns gradients by argument, a list for
    a list of tensors; arguments that it leaves out have none.
    """
    gather, arguments = gatherer(record), list(_arguments(record))
    lists = [index for index, (_, kind) in enumerate(arguments) if kind == "Tensor[]"]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # torch wants a None for each tensor of a list that has no gradient.
        ctx.none = {arguments[index][0]: [None] * len(inputs[index]) for index in lists}
        save(ctx, gather(inputs), output)

    def differentiate(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        by_name = ctx.none | backward(ctx, *grads)
        return tuple([by_name.get(argument) for argument, _ in arguments])

    torch.library.register_autograd(f"syncr1::{name}", differentiate, setup_context=setup, lib=LIBRARY)


def differentiates_no_further(name: str) -> None:
    """The op is another's backward: what it returns has no gradient, whatever its inputs require."""

    def mark(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(*(output if isinstance(output, (tuple, list)) else (output,)))

    # None of the outputs requires a gradient, so that the second function is never called.
    torch.library.register_autograd(f"syncr1::{name}", lambda ctx, *grads: None, setup_context=mark, lib=LIBRARY)


def constant_when_traced(function: F) -> F:
    """The result depends on plain Python values alone: `torch.compile` calls it once, while tracing.

    What `torch.compiler.assume_constant_result` does, without its import of torch._dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
