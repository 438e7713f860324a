"""`grpo_plan` says what `group_advantages`, `dgs_select` and the losses find; pruning by it first, before any model has
run, gives the bits of the loss that prunes on its way."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from backends import BACKENDS, DEVICE, NIGHTLY, ON_TRITON
from torch import Tensor

from syncr1.kernels.api import (
    GRPOOutput,
    TokenStream,
    dgs_select,
    group_advantages,
    grpo_loss,
    grpo_plan,
    linear_grpo_loss,
)
from syncr1.kernels.options import LOSS_TYPES, RULES, SCALES

BACKEND = pytest.mark.parametrize("backend", BACKENDS)
SIZES = [4, 1, 6, 3, 5]
"""Members of each group."""
WIDTH, TEXTS, IMAGES = 24, 40, 56


def offsets_of(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=DEVICE)


def rewards_of(seed: int = 0) -> Tensor:
    """[S]: a group that agrees, a reward that failed."""
    rewards = torch.rand(sum(SIZES), generator=torch.Generator().manual_seed(seed))
    rewards[5:11], rewards[2] = 0.25, math.nan
    return rewards.to(DEVICE)


@BACKEND
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", SCALES[:1] if ON_TRITON else SCALES)
def test_it_is_both_ops_in_one(backend: str, rule: Any, scale: Any) -> None:
    rewards, offsets = rewards_of(), offsets_of(SIZES)
    plan = grpo_plan(
        rewards, offsets, scale=scale, dgs=rule, dgs_mass=0.6, dgs_keep=2, dgs_min_keep=1, dgs_seed=5, backend=backend
    )
    given = {"mass": 0.6, "keep": 2, "min_keep": 1, "seed": 5}
    keep = dgs_select(rewards, offsets, rule=rule, scale=scale, backend=backend, **given)  # type: ignore[arg-type]
    assert torch.equal(plan.keep, keep) and (rule == "none") == bool(keep.all())
    assert isinstance(plan.advantages, Tensor)
    assert torch.equal(plan.advantages, group_advantages(rewards, offsets, scale=scale, backend=backend))
    assert float(plan.frac_reward_zero_std) == pytest.approx(2 / 5), "one agrees, one has a single member"


@BACKEND
@pytest.mark.parametrize("aggregate", ["sum_then_normalize", "normalize_then_sum"])
def test_several_rewards_and_rewards_of_each_modality(backend: str, aggregate: Any) -> None:
    offsets, weights = offsets_of(SIZES), torch.tensor([1.0, 0.5], device=DEVICE)
    parts = {"text": torch.stack([rewards_of(1), rewards_of(2)], 1), "image": torch.stack([rewards_of(3)] * 2, 1)}
    settings: dict[str, Any] = {"weights": weights, "aggregate": aggregate, "backend": backend}
    plan = grpo_plan(parts, offsets, dgs="variance_mass", **settings)
    assert isinstance(plan.advantages, dict) and list(plan.advantages) == ["text", "image"]
    for name, part in parts.items():
        assert torch.equal(plan.advantages[name], group_advantages(part, offsets, **settings))
    assert torch.equal(plan.keep, dgs_select(parts, offsets, **settings))


def test_dtypes() -> None:
    """float64 rewards give float64 advantages, as `group_advantages` has it; every other dtype float32."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        advantages = grpo_plan(rewards_of().to(dtype), offsets_of(SIZES)).advantages
        assert isinstance(advantages, Tensor)
        assert advantages.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# Pruned first, or on the way ------------------------------------------------------------------------------------------


class Packed:
    """Sequences of both modalities, ragged, some of their tokens given and not sampled."""

    def __init__(self, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(1, 6 if ON_TRITON else 30, (sum(SIZES),), generator=random).tolist()
        T = sum(self.lengths)
        self.sequence = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths)).to(DEVICE)
        self.modality = (torch.rand(T, generator=random) < 0.6).to(torch.uint8).to(DEVICE)
        self.mask = (torch.rand(T, generator=random) < 0.9).to(DEVICE)
        self.hidden = torch.randn(T, WIDTH, generator=random).to(DEVICE)
        self.targets = torch.randint(TEXTS, (T,), generator=random).to(DEVICE)
        self.heads = [torch.randn(v, WIDTH, generator=random).to(DEVICE) for v in (TEXTS, IMAGES)]
        self.old = (-3 - torch.rand(T, generator=random)).to(DEVICE)
        self.ref = (self.old + 0.2 * torch.randn(T, generator=random).to(DEVICE)).contiguous()

    def loss(
        self, tokens: Tensor, lengths: list[int], rewards: Any, **settings: Any
    ) -> tuple[GRPOOutput, Tensor, list[Tensor]]:
        """The loss on `tokens` [T'] alone: (output, d loss / d hidden [T', D], d loss / d heads)."""
        hidden = self.hidden[tokens].requires_grad_()
        heads = [head.clone().requires_grad_() for head in self.heads]
        modality, mask, targets = self.modality[tokens], self.mask[tokens], self.targets[tokens]
        streams = []
        for code, name in enumerate(("text", "image")):
            rows = (mask & (modality == code)).nonzero().squeeze(1)
            streams.append(TokenStream(hidden[rows], heads[code], targets[rows], rows, modality=name))  # type: ignore[arg-type]
        output = linear_grpo_loss(
            streams,
            rewards,
            offsets_of(lengths),
            offsets_of(SIZES),
            loss_mask=mask,
            modality=modality,
            old_logp=self.old[tokens],
            ref_logp=self.ref[tokens],
            **settings,
        )
        grads = torch.autograd.grad(output.loss, [hidden, *heads])
        return output, grads[0], list(grads[1:])


WAYS: list[dict[str, Any]] = [
    *({"loss_type": name, "max_length": 40} for name in LOSS_TYPES),
    {"loss_type": "dapo", "num_items": {"text": 200.0, "image": 300.0}},
    {"loss_type": "grpo", "ratio": "sequence"},
    {"loss_type": "cispo", "ratio": "product", "clip_high": 5.0},
    {"loss_type": "dapo", "top_entropy_quantile": 0.5},
    {"loss_type": "dapo", "beta": 0.1},
    {"loss_type": "grpo", "beta": {"text": 0.0, "image": 0.2}, "scale": "loo"},
    {"loss_type": "dapo", "scale": "batch"},
]


PRUNING = ("variance_mass", "top_k", "max_variance", "random")
CASES = [
    (way, rule, per_modality)
    for i, way in enumerate(WAYS)
    for j, (rule, per_modality) in enumerate(itertools.product(PRUNING, (False, True)))
    if NIGHTLY or ((i + j) % 8 in (0, 5) and not (ON_TRITON and (i % 4 or j % 2)))
]
"""Every way with two of the rules, every rule with and without rewards of each modality."""


@BACKEND
@pytest.mark.parametrize(
    ("way", "rule", "per_modality"),
    CASES,
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else str(v),
)
def test_pruning_first_gives_the_same_bits(backend: str, way: dict[str, Any], rule: str, per_modality: bool) -> None:
    """Loss, log-probabilities, metrics and every gradient: the plan made before the forward is the loss's."""
    packed, offsets = Packed(), offsets_of(SIZES)
    rewards: Any = {"text": rewards_of(1), "image": rewards_of(2)} if per_modality else rewards_of()
    selection = {"dgs": rule, "dgs_mass": 0.7, "dgs_seed": 3}
    settings = {name: value for name, value in way.items() if name != "scale"}
    everything = torch.arange(len(packed.sequence), device=DEVICE)
    whole, hidden, heads = packed.loss(everything, packed.lengths, rewards, **way, **selection, backend=backend)
    plan = grpo_plan(rewards, offsets, scale=way.get("scale", "group"), backend=backend, **selection)
    kept = plan.keep[packed.sequence].nonzero().squeeze(1)
    lengths = [n if k else 0 for n, k in zip(packed.lengths, plan.keep.tolist(), strict=True)]
    few, few_hidden, few_heads = packed.loss(
        kept, lengths, None, advantages=plan.advantages, **settings, backend=backend
    )
    assert 0 < len(kept) < len(everything) and torch.equal(whole.keep, plan.keep)
    assert torch.equal(few.loss, whole.loss) and bool(whole.loss != 0)
    assert torch.equal(few.logp, whole.logp[kept])
    assert torch.equal(few_hidden, hidden[kept]) and bool(few_hidden.any())
    for mine, theirs in zip(few_heads, heads, strict=True):
        assert torch.equal(mine, theirs)
    for name in set(whole.metrics) - {"frac_kept", "frac_reward_zero_std"}:
        assert torch.equal(few.metrics[name], whole.metrics[name]), name
    assert float(plan.frac_reward_zero_std) == float(whole.metrics["frac_reward_zero_std"])


@BACKEND
def test_grpo_loss_takes_a_plan_too(backend: str) -> None:
    packed, offsets = Packed(), offsets_of(SIZES)
    logp = packed.old + 0.1
    plan = grpo_plan(rewards_of(), offsets, dgs="variance_mass", backend=backend)
    shared = {"loss_mask": packed.mask, "modality": packed.modality, "backend": backend}
    cu_seqlens = offsets_of(packed.lengths)
    on_the_way = grpo_loss(logp, packed.old, rewards_of(), cu_seqlens, offsets, dgs="variance_mass", **shared)
    kept = plan.keep[packed.sequence]
    shared["loss_mask"] = packed.mask & kept
    first = grpo_loss(logp, packed.old, None, cu_seqlens, offsets, advantages=plan.advantages, **shared)
    assert torch.equal(first.loss, on_the_way.loss) and not bool(kept.all())


def test_mistakes_are_named() -> None:
    rewards, offsets = torch.rand(4), torch.tensor([0, 2, 4])
    with pytest.raises(ValueError, match="grpo_plan: dgs must be one of"):
        grpo_plan(rewards, offsets, dgs="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grpo_plan: dgs_mass must be"):
        grpo_plan(rewards, offsets, dgs_mass=0.0)
    with pytest.raises(ValueError, match="grpo_plan: rewards"):
        grpo_plan(torch.tensor([1.0, math.inf, 0.0, 0.0]), offsets)
    with pytest.raises(ValueError, match="grpo_plan: group_offsets"):
        grpo_plan(rewards, torch.tensor([0, 2, 3]))
    with pytest.raises(ValueError, match="grpo_plan: rewards"):
        grpo_plan({"text": rewards}, offsets)
