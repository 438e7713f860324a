"""Every public op as one small call: what tests of all ops at once run through.

Dims: `T` packed tokens, `S` sequences, `N` rows, `V` vocabulary, `D` hidden, `R` decode rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from syncr1.kernels.api import (
    SharedPrefixLayout,
    TokenStream,
    cached_prefix_attention,
    cfg_sample,
    dgs_select,
    group_advantages,
    grpo_loss,
    grpo_plan,
    linear_grpo_loss,
    linear_logp,
    prefix_decode_attention,
    selective_logp,
    shared_prefix_attention,
)

Leaves = dict[str, Tensor]


@dataclass(frozen=True)
class OpCall:
    """One op with inputs that fit together."""

    leaves: Callable[[int], Leaves]
    """A number of units (sequences, rows) -> fresh tensors by name."""
    call: Callable[..., Any]
    """(tensors, backend=…, **options) -> what the op returns."""
    trained: tuple[str, ...] = ()
    """Which of the tensors have a gradient."""

    def inputs(self, units: int = 6, *, grad: bool = False) -> Leaves:
        """Fresh tensors; those that the op differentiates require a gradient where `grad`."""
        made = self.leaves(units)
        for name in self.trained if grad else ():
            made[name].requires_grad_()
        return made

    def values(self, inputs: Leaves, backend: str | None = None, **options: Any) -> list[Tensor]:
        """All float, bool and int tensors that the op returns, in a fixed order."""
        return tensors_of(self.call(inputs, backend=backend, **options))


def tensors_of(returned: Any) -> list[Tensor]:
    """The tensors in what an op returned."""
    if isinstance(returned, Tensor):
        return [returned]
    if isinstance(returned, dict):
        return [part for key in sorted(returned) for part in tensors_of(returned[key])]
    if isinstance(returned, (tuple, list)):
        return [part for entry in returned for part in tensors_of(entry)]
    if hasattr(returned, "__dataclass_fields__"):
        return [part for name in returned.__dataclass_fields__ for part in tensors_of(getattr(returned, name))]
    return []


def _offsets(units: int, length: int = 1) -> Tensor:
    return torch.arange(units + 1, dtype=torch.int32) * length


def _rewards(units: int) -> Leaves:
    rewards = torch.arange(units, dtype=torch.float32).remainder(3)
    return {"rewards": rewards, "groups": torch.tensor([0, units // 2, units], dtype=torch.int32)}


def _loss(units: int) -> Leaves:
    tokens = 3 * units
    logp = -torch.linspace(0.1, 3.0, tokens)
    return _rewards(units) | {
        "logp": logp,
        "old_logp": logp + 0.3 * torch.linspace(-1, 1, tokens).sin(),
        "ref_logp": logp - 0.1,
        "cu_seqlens": _offsets(units, 3),
        "mask": torch.arange(tokens) % 4 != 0,
    }


def _head(rows: int, vocabulary: int = 9, width: int = 4) -> Leaves:
    random = torch.Generator().manual_seed(rows)
    return {
        "hidden": torch.randn(rows, width, generator=random),
        "weight": torch.randn(vocabulary, width, generator=random),
        "bias": torch.randn(vocabulary, generator=random),
        "targets": torch.randint(vocabulary, (rows,), generator=random),
    }


def _logits(rows: int) -> Leaves:
    random = torch.Generator().manual_seed(rows)
    return {"logits": 3 * torch.randn(rows, 9, generator=random), "targets": _head(rows)["targets"]}


def _linear_loss(x: Leaves, **options: Any) -> Any:
    rows = torch.arange(x["hidden"].shape[0], device=x["hidden"].device)
    stream = TokenStream(x["hidden"], x["weight"], x["targets"], rows, x["bias"])
    return linear_grpo_loss(
        [stream],
        x["rewards"],
        x["cu_seqlens"],
        x["groups"],
        old_logp=x["old_logp"],
        ref_logp=x["ref_logp"],
        loss_mask=x["mask"],
        **({"beta": 0.1} | options),
    )


LAYOUT = SharedPrefixLayout(torch.tensor([0, 3, 5]), torch.tensor([0, 2, 4, 7, 10]), torch.tensor([0, 2, 4]))


def _heads(units: int) -> Leaves:
    """`units` is the head size."""
    random = torch.Generator().manual_seed(units)
    return {name: torch.randn(15, h, units, generator=random) for name, h in (("q", 4), ("k", 2), ("v", 2))}


def _attend(x: Leaves, *, backend: str | None = None, **options: Any) -> Tensor:
    served = "flash" if backend == "native" else backend
    return shared_prefix_attention(x["q"], x["k"], x["v"], LAYOUT, backend=served, **options)


def _cached(units: int) -> Leaves:
    """`units` is the head size."""
    made = {name: x[5:] for name, x in _heads(units).items()}
    random = torch.Generator().manual_seed(units)
    return made | {f"prefix_{name}": torch.randn(2, 7, units, generator=random) for name in ("keys", "values")}


def _attend_cached(x: Leaves, *, backend: str | None = None, **options: Any) -> Tensor:
    served = "flash" if backend == "native" else backend
    return cached_prefix_attention(**x, layout=LAYOUT, backend=served, **options)


def _decode(units: int) -> Leaves:
    random = torch.Generator().manual_seed(units)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    row = torch.arange(units)
    spans = torch.stack([torch.zeros_like(row), torch.full_like(row, 3), 4 * row, row % 3], 1)
    shared = {"prefix_keys": some(2, 3, 8), "prefix_values": some(2, 3, 8)}
    own = {"own_keys": some(2, 4 * units, 8), "own_values": some(2, 4 * units, 8)}
    return {
        "query": some(units, 4, 8),
        "key": some(units, 2, 8),
        "value": some(units, 2, 8),
        **shared,
        **own,
        "spans": spans,
    }


OPS: dict[str, OpCall] = {
    "group_advantages": OpCall(_rewards, lambda x, **o: group_advantages(x["rewards"], x["groups"], **o)),
    "dgs_select": OpCall(_rewards, lambda x, **o: dgs_select(x["rewards"], x["groups"], **o)),
    "grpo_plan": OpCall(_rewards, lambda x, **o: grpo_plan(x["rewards"], x["groups"], **({"dgs": "top_k"} | o))),
    "grpo_loss": OpCall(
        _loss,
        lambda x, **o: grpo_loss(
            x["logp"],
            x["old_logp"],
            x["rewards"],
            x["cu_seqlens"],
            x["groups"],
            loss_mask=x["mask"],
            ref_logp=x["ref_logp"],
            **({"beta": 0.1} | o),
        ),
        ("logp",),
    ),
    "linear_grpo_loss": OpCall(
        lambda units: _loss(units) | _head(3 * units), _linear_loss, ("hidden", "weight", "bias")
    ),
    "linear_logp": OpCall(
        _head,
        lambda x, **o: linear_logp(x["hidden"], x["weight"], x["targets"], bias=x["bias"], **o),
        ("hidden", "weight", "bias"),
    ),
    "selective_logp": OpCall(_logits, lambda x, **o: selective_logp(x["logits"], x["targets"], **o), ("logits",)),
    "cfg_sample": OpCall(
        lambda rows: {"cond": _logits(rows)["logits"], "uncond": _logits(rows)["logits"].flip(1)},
        lambda x, **o: cfg_sample(x["cond"], x["uncond"], **({"cfg_weight": 2.0, "seed": 1, "offset": 2} | o)),
    ),
    "shared_prefix_attention": OpCall(_heads, _attend, ("q", "k", "v")),
    "cached_prefix_attention": OpCall(_cached, _attend_cached),
    "prefix_decode_attention": OpCall(_decode, lambda x, **o: prefix_decode_attention(**x, **o)),
}
"""All public ops by name."""
DIFFERENTIABLE = [name for name, op in OPS.items() if op.trained]


def trained_outputs(name: str, inputs: Leaves, backend: str | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """(everything the op returns, gradients of the float sums of what has one)."""
    op = OPS[name]
    values = op.values(inputs, backend)
    total = torch.stack([value.sum() for value in values if value.requires_grad]).sum()
    return [value.detach() for value in values], list(torch.autograd.grad(total, [inputs[n] for n in op.trained]))
