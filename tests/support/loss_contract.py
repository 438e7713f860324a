"""Batches for a backend's `token_loss`, the reference's answer in float64, and how near to it a backend must be."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from backends import DEVICE, ON_TRITON
from torch import Tensor

from syncr1.kernels import dispatch
from syncr1.kernels.options import LossOptions, encode
from syncr1.kernels.plan import entropy_thresholds
from syncr1.kernels.reference.loss import grpo_loss
from syncr1.kernels.streams import MODALITIES
from syncr1.kernels.terms import METRICS, LossInputs, LossTerms, TokenLoss

LENGTHS = [3, 9, 0, 24, 1, 38, 5] if ON_TRITON else [3, 200, 0, 170, 1, 600, 300, 5, 330]
"""Three groups, one of them empty; an empty sequence, a single token; on Triton some that cross tiles."""
TENSORS = [field.name for field in fields(TokenLoss) if field.name != "finite"]
TOLERANCE = 2.0
"""Allowed error in units of the float32 reference's own."""
FLOOR = {"native": 3e-7, "triton": 1e-6}
"""And added to it, relative to the largest value: some 5 or 16 units in the last place."""


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])


def banded(values: Tensor) -> Tensor:
    """The same values between bands of NaN (or ones): reading past an end shows."""
    filler = torch.nan if values.is_floating_point() else 1
    buffer = torch.full((values.numel() + 64,), filler, dtype=values.dtype)
    buffer[32 : 32 + values.numel()] = values.reshape(-1)
    return buffer[32 : 32 + values.numel()].view(values.shape)


def make_terms(
    lengths: list[int] = LENGTHS,
    groups: list[int] | None = None,
    *,
    seed: int = 0,
    sampler: str | None = None,
    two_rewards: bool = False,
    mixed: bool = True,
    density: float = 0.8,
    leave_out: tuple[str, ...] = (),
    **options: Any,
) -> LossTerms:
    """Ratios on both sides of every bound, both modalities; NaN and infinity at every masked token."""
    random = torch.Generator().manual_seed(seed)
    total, num_sequences = sum(lengths), len(lengths)
    mask_T = torch.rand(total, generator=random) < density
    logp_T = -3 * torch.rand(total, generator=random)
    noise = [torch.randn(total, generator=random) for _ in range(3)]
    tokens = {
        "logp": logp_T,
        "old_logp": logp_T + 0.3 * noise[0],
        "ref_logp": logp_T + 0.3 * noise[1],
        "entropy": 3 * torch.rand(total, generator=random),
    }
    if sampler == "token":
        tokens["is_ratio"] = (0.3 * noise[2]).exp()
    for index, values_T in enumerate(tokens.values()):
        values_T[~mask_T] = (math.nan, math.inf, -math.inf)[index % 3]
    modality_T = (torch.rand(total, generator=random) > 0.4).to(torch.uint8)
    given: dict[str, Any] = {
        "settings": LossOptions(**{"max_length": 9, **options}),
        "cu_seqlens": offsets_of(lengths),
        "group_offsets": offsets_of(groups or [num_sequences // 2, 0, num_sequences - num_sequences // 2]),
        "loss_mask": mask_T,
        "modality": modality_T if mixed else None,
        "is_ratio": torch.randn(num_sequences, generator=random).exp() if sampler == "sequence" else None,
        "rewards": torch.randn(2 if two_rewards else 1, num_sequences, generator=random, dtype=torch.float64),
        **tokens,
    }
    values = {name: banded(v) if isinstance(v, Tensor) else v for name, v in given.items() if name not in leave_out}
    return LossTerms(**values, is_per_sequence=sampler == "sequence")


def with_thresholds(terms: LossTerms, keep: Tensor) -> LossTerms:
    """The quantile of the loss tokens, as `syncr1.kernels.ops.loss` hands it over."""
    assert terms.loss_mask is not None and terms.modality is not None and terms.entropy is not None
    mask_T = terms.loss_mask & torch.repeat_interleave(keep, terms.cu_seqlens.diff())
    thresholds = entropy_thresholds(terms.settings, terms.entropy, mask_T, terms.modality.bool())
    return replace(terms, entropy_thresholds=thresholds)


def moved(terms: LossTerms, *, copied: bool = False) -> LossTerms:
    """On the backend's device; `copied`: elsewhere in memory, without the bands."""
    values = {field.name: getattr(terms, field.name) for field in fields(LossTerms)}
    return LossTerms(
        **{name: (v.clone() if copied else v).to(DEVICE) if isinstance(v, Tensor) else v for name, v in values.items()}
    )


def run(terms: LossTerms, backend: str, tile: int = 64) -> TokenLoss:
    """`tile` tokens per program of Triton."""
    out: TokenLoss
    module = importlib.import_module(dispatch.MODULES[backend])
    if backend == "triton":
        out = module.token_loss(moved(terms), tile=tile)
        return replace(out, **{name: getattr(out, name).cpu() for name in TENSORS})
    out = module.token_loss(terms)
    return out


def reference(terms: LossTerms, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradient by autograd, advantages and keep; metrics."""

    def cast(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().to(dtype)

    logp = terms.logp.to(dtype).requires_grad_()
    assert terms.rewards is not None
    is_ratio = cast(terms.is_ratio)
    inputs = LossInputs(
        old_logp=cast(terms.old_logp),
        rewards=list(terms.rewards),
        advantages=[],
        cu_seqlens=terms.cu_seqlens,
        group_offsets=terms.group_offsets,
        loss_mask=terms.loss_mask,
        modality=terms.modality,
        ref_logp=cast(terms.ref_logp),
        is_ratio=is_ratio[:, None] if is_ratio is not None and terms.is_per_sequence else is_ratio,
        entropy=cast(terms.entropy),
        weights=None,
        num_items=terms.num_items,
        settings=encode("grpo_loss", asdict(terms.settings)),
        backend="reference",
    )
    out = grpo_loss(logp, inputs)
    (grad,) = torch.autograd.grad(out.loss, logp)
    advantages = out.advantages
    rows = torch.stack([advantages[m] for m in MODALITIES]) if isinstance(advantages, Mapping) else advantages[None]
    return {"loss": out.loss.detach(), "grad_logp": grad, "advantages": rows, "keep": out.keep}, out.metrics


def given_scores(terms: LossTerms) -> LossTerms:
    """Advantages and decisions ready, as a backend gets those that need the whole batch."""
    exact, metrics = reference(terms)
    scores = {"advantages": exact["advantages"].float(), "keep": exact["keep"]}
    return replace(terms, rewards=None, frac_reward_zero_std=metrics["frac_reward_zero_std"].float(), **scores)


def assert_close_to_reference(terms: LossTerms, mine: TokenLoss, backend: str) -> None:
    """Every output within twice the error of the float32 reference."""
    exact, exact_metrics = reference(terms)
    single, single_metrics = reference(terms, torch.float32)
    assert mine.keep.equal(exact["keep"])
    named = {name: (getattr(mine, name), single[name], exact[name]) for name in ("loss", "grad_logp", "advantages")}
    for name, value in exact_metrics.items():
        named[name] = (mine.metrics[METRICS.index(name)], single_metrics[name], value)
    assert torch.isfinite(mine.metrics).all()
    for name, (got, theirs, truth) in named.items():
        assert got.dtype == torch.float32 and got.shape == truth.shape, name
        if truth.numel():
            error, allowed = (got - truth).abs().max(), (theirs - truth).abs().max()
            # The terms of a loss may cancel; their sizes are about those of their gradients.
            scale = truth.abs() + exact["grad_logp"].abs().sum() if name == "loss" else truth.abs().max()
            assert error <= TOLERANCE * allowed + FLOOR[backend] * scale, (name, error, allowed, scale)
    if terms.loss_mask is not None:
        used_T = terms.loss_mask & torch.repeat_interleave(mine.keep, terms.cu_seqlens.diff())
        assert (mine.grad_logp[~used_T] == 0).all()


def assert_same(left: TokenLoss, right: TokenLoss) -> None:
    """Bitwise."""
    for field in fields(TokenLoss):
        a, b = getattr(left, field.name), getattr(right, field.name)
        assert a.equal(b) if isinstance(a, Tensor) else a == b, field.name
