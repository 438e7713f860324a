"""Rows 10 to 12 of the fault table: steps cut into micro-batches and ranks, groups without variance.

Dims: `T` packed tokens, `S` sequences, `V` vocabulary, `D` hidden.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import BACKENDS
from kernel_cases import offsets_of, sequence_of_token
from torch import Tensor

from syncr1.kernels.api import (
    TokenStream,
    dgs_select,
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
)
from syncr1.kernels.options import AGGREGATES, LOSS_TYPES, SCALES

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BACKEND = pytest.mark.parametrize("backend", BACKENDS)
LENGTHS = [3, 5, 0, 4, 1, 6]
T = sum(LENGTHS)
LAYOUT: dict[str, Any] = {"cu_seqlens": offsets_of(LENGTHS), "group_offsets": offsets_of([4, 2])}
CUTS = [
    (loss_type, apart) for loss_type in LOSS_TYPES for apart in (False, True) if (loss_type, apart) != ("bnpo", True)
]
"""bnpo per modality divides by the tokens of each modality in each call, which no weight of a whole call undoes."""


@BACKEND
@pytest.mark.parametrize("loss_type, per_modality", CUTS)
def test_10_cut_into_micro_batches_and_ranks(loss_type: str, per_modality: bool, backend: str) -> None:
    """With the step's num_items and num_sequences, any cut gives the gradient of the whole: relative error 1e-6.

    bnpo divides by the tokens of each call by definition: there the losses are weighted by their share of tokens.
    """
    lengths = [1 + (7 * s * s) % 13 for s in range(24)]
    total, sequence_T = sum(lengths), sequence_of_token(lengths)
    hidden, targets = torch.randn(total, 6).double(), torch.randint(11, (total,))
    weights, modality = [torch.randn(11, 6).double() for _ in range(2)], torch.arange(total) % 3 == 0
    old, rewards = -2 - torch.rand(total).double(), torch.randint(0, 9, (24,)) / 8
    counts = {"text": int((~modality).sum()), "image": int(modality.sum())}

    def gradients(num_parts: int, num_ranks: int, dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [w.to(dtype).clone().requires_grad_() for w in weights]
        size = 24 // num_parts
        for part in range(num_parts):
            tokens = (sequence_T // size == part).nonzero()[:, 0]
            rows = [(modality[tokens] == image).nonzero()[:, 0] for image in (False, True)]
            streams = [
                TokenStream(hidden[tokens[at]].to(dtype), leaf, targets[tokens[at]], at, modality=name)  # type: ignore[arg-type]
                for at, leaf, name in zip(rows, leaves, counts, strict=True)
            ]
            items: Any = {name: n / num_ranks for name, n in counts.items()} if per_modality else total / num_ranks
            mine = slice(part * size, (part + 1) * size)
            out = linear_grpo_loss(
                streams,
                rewards[mine],
                offsets_of(lengths[mine]),
                offsets_of([3] * (size // 3)),
                old_logp=old[tokens].to(dtype),
                loss_type=loss_type,
                max_length=13,
                num_items=items,
                num_sequences=24 / num_ranks,
                clip_high=5.0 if loss_type == "cispo" else 0.3,
                backend=backend,
            )
            share = num_ranks * len(tokens) / total if loss_type == "bnpo" else 1.0
            (out.loss * share / num_ranks).backward()  # ranks are averaged
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    exact, whole = gradients(1, 1, torch.float64, "reference"), gradients(1, 1, torch.float32, backend)
    for num_parts, num_ranks in ((4, 1), (8, 1), (4, 2), (8, 4)):
        found = gradients(num_parts, num_ranks, torch.float32, backend)
        for grad, uncut, truth in zip(found, whole, exact, strict=True):
            size = truth.norm()
            assert float((grad - uncut).norm() / size) <= 1e-6, (num_parts, num_ranks)
            assert float((grad - truth).norm() / size) <= 3e-6, (num_parts, num_ranks)


@BACKEND
@pytest.mark.parametrize("scale", SCALES)
def test_11_all_rewards_equal(scale: Any, backend: str) -> None:
    """Advantages exactly 0, no gradient, and the metric says so: also where the mean of equal rewards would round."""
    rewards, logp = torch.tensor([0.1, 0.1, 0.1, torch.nan, 7.3, 7.3]), (-torch.rand(T)).requires_grad_()
    advantages = group_advantages(rewards, LAYOUT["group_offsets"], scale=scale, backend=backend)
    out = grpo_loss(logp, -torch.rand(T), rewards, scale=scale, backend=backend, **LAYOUT)
    assert not bool(advantages.any()) and isinstance(out.advantages, Tensor) and not bool(out.advantages.any())
    assert out.metrics["frac_reward_zero_std"] == 1 and out.loss == 0
    assert not bool(torch.autograd.grad(out.loss, logp)[0].any())
    assert not bool(dgs_select(rewards, LAYOUT["group_offsets"], scale=scale, backend=backend).any())


@BACKEND
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("scale", SCALES)
def test_12_rewards_that_differ_by_rounding_alone(scale: Any, aggregate: Any, backend: str) -> None:
    """A spread of a few units in the last place is none, whatever holds the rewards, however large they and their group
    are, and though eps=0 would blow it up; ten times as much is a signal that eps keeps small."""
    for size, magnitude in ((2, 1.0), (5, 1e-6), (70, 3e7), (5, -0.3)):
        offsets, noisy = offsets_of([size]), torch.arange(size) % 3 == 0
        layout = {"cu_seqlens": offsets_of([1] * size), "group_offsets": offsets}
        for dtype, ulps in ((torch.float32, 1), (torch.float32, 2), (torch.float64, 1), (torch.float64, 1 << 29)):
            plain = torch.full((size,), 0.3 * magnitude, dtype=dtype)
            apart = 2.0 ** -(23 if dtype == torch.float32 else 52) * ulps * plain.abs()
            rewards = torch.where(noisy, plain + apart, plain)
            assert bool((rewards != plain).any())
            for given in (rewards, torch.stack([rewards, plain], 1), torch.stack([rewards, rewards], 1)):
                settings = {"scale": scale, "aggregate": aggregate, "eps": 0.0}
                out = grpo_loss(-torch.rand(size), -torch.rand(size), given, backend=backend, **settings, **layout)
                assert isinstance(out.advantages, Tensor) and not bool(out.advantages.any())
                assert out.metrics["frac_reward_zero_std"] == 1 and out.loss == 0
                chosen = backend if dtype == torch.float32 else "reference"
                assert not bool(group_advantages(given, offsets, backend=chosen, **settings).any())
                assert not bool(dgs_select(given, offsets, backend=chosen, **settings).any())
        signal = torch.where(noisy, plain.float() * (1 + 1e-5), plain.float())
        assert bool(group_advantages(signal, offsets, backend=backend, scale=scale, aggregate=aggregate).any())
        assert bool(dgs_select(signal, offsets, backend=backend, scale=scale, aggregate=aggregate).any())


def test_rewards_that_cancel_each_other_leave_no_advantage() -> None:
    """Each has an advantage of its own; their weighted sum is 0 but for rounding."""
    first = torch.tensor([0.1, 0.7, 0.3, 0.9])
    for second, weights in ((1 - first, None), (0.3 - 2 * first, None), (first, torch.tensor([1.0, -1.0]))):
        both = torch.stack([first, second], 1)
        found = group_advantages(both, offsets_of([4]), weights=weights, aggregate="normalize_then_sum", eps=0.0)
        assert not bool(found.any())
