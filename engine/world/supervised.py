"""Supervised training of a tiny policy on given trajectories; what the bases of the embedded recipes share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..forward.objective import Objective, PolicyForward
from ..forward.packing import pack
from ..policies.base import Policy
from ..records import PackedBatch, Rollout, Segment, SegmentKind
from .attributes import ATTRIBUTES, VALUES, Look
from .kept import Kept


def given(kind: SegmentKind, tokens: Tensor) -> Segment:
    """A segment that nobody sampled: `tokens` [L] int64, log-probabilities of zero."""
    nothing = torch.zeros(tokens.numel())
    return Segment(kind=kind, tokens=tokens, logp=nothing, logp_mixed=nothing, entropy=nothing)


def slipped(rng: np.random.Generator, look: Look, rate: float) -> Look:
    """`look` with each attribute replaced by a random value with probability `rate` (which may be the same one)."""
    words = look.to_dict()
    for name in ATTRIBUTES:
        if rng.random() < rate:
            words[name] = VALUES[name][int(rng.integers(len(VALUES[name])))]
    return Look.from_dict(words)


def with_photos(policy: Policy, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The trajectories with their photos seen by the vision tower, gradients attached."""
    shown = [i for i, rollout in enumerate(rollouts) if rollout.image is not None]
    if not shown:
        return list(rollouts)
    seen = policy.see(torch.stack([image for i in shown if (image := rollouts[i].image) is not None]))
    places = {i: row for row, i in enumerate(shown)}
    return [replace(r, prompt_image=seen[places[i]]) if i in places else r for i, r in enumerate(rollouts)]


def supervised_loss(forward: PolicyForward, rollouts: Sequence[Rollout]) -> Tensor:
    """Mean negative log-likelihood per text token plus that per image token."""
    policy = forward.policy
    n = len(rollouts)
    ready = with_photos(policy, rollouts)
    batch = pack(
        policy, ready, torch.zeros(n, 2), torch.ones(n, dtype=torch.bool), num_generations=1, max_tokens=1 << 30
    )[0]
    logp = forward(batch)["logp"]
    return sum((_mean_nll(logp, batch, code) for code in range(2)), start=logp.new_zeros(()))


def _mean_nll(logp: Tensor, batch: PackedBatch, code: int) -> Tensor:
    rows = batch.loss_mask & (batch.modality == code)
    return -(logp * rows).sum() / rows.sum().clamp(min=1)


@contextmanager
def one_thread() -> Iterator[None]:
    """A model this small is slower on two threads than on one (.19 s a step against .13 s), and one is reproducible."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fit(
    policy: Policy,
    next_batch: Callable[[], Sequence[Rollout]],
    *,
    steps: int,
    learning_rate: float,
    report: Callable[[int, float], None] | None = None,
    kept: Kept | None = None,
) -> None:
    """AdamW with a short warm-up and a linear decay to almost zero; leaves the policy in eval mode.

    Args:
        policy: what requires gradients is trained.
        next_batch: the next supervised trajectories.
        steps: updates.
        learning_rate: at the peak.
        report: called with (step, loss) after every step.
        kept: takes up what an earlier one left, and leaves its own.
    """
    forward = PolicyForward(policy, Objective())
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    policy.train()
    first = 0 if kept is None else kept.restore(trained, optimizer)
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 20, 1.02 - step / steps)
        loss = supervised_loss(forward, next_batch())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if kept is not None:
            kept.save(step + 1, trained, optimizer)
        if report is not None:
            report(step, loss.item())
    policy.eval()
