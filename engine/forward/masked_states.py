"""What of a filled-in image is trained: states that it went through, and which of their tokens count.

    committed      each token in the state of the step that settled it: N tokens an image, over T states
    step           the same, one importance ratio for all tokens of a step
    all            in every state all places: what is known, and what the step drew of the others: T N tokens
    random_mask    the finished image with places masked anew, a share drawn from (0, 1]; what is masked counts

With `masked_steps` k < T only the states of k steps, drawn for each image, are computed; the loss of what they settled
counts T / k times and is divided by the tokens of whole images: its expectation is the full sum's.

The probability of *which* places a step settles is left out, as it is by every released code: the likelihood is exact
only where the order does not depend on the model.

Sources: step as in Mask-GRPO; all as in Sync-R1's released code; random_mask as in MMaDA's UniGRPO.

Dims: N tokens of an image, T steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..records import Segment
from ..settings.train_config import MaskedLogp


class State(NamedTuple):
    """One pass over an image."""

    known: Tensor
    """[N] bool: places that show their token; the others are masked."""
    scored: Tensor
    """[N] bool: places whose token counts."""
    tokens: Tensor
    """[N] int64: the tokens that count."""
    logp: Tensor
    logp_mixed: Tensor
    """[N] float32 nats each: what the sampler recorded of them; NaN where it did not."""


@dataclass(frozen=True, slots=True)
class MaskedPlan:
    """Which states are trained, as the flags of the same names have it."""

    masked_logp: MaskedLogp = "committed"
    masked_steps: int | None = None
    """k; None: all. With random_mask: how many maskings of an image, None: one."""
    salt: int = 0
    """Of the random numbers, beside the trajectory's key."""

    def states(self, segment: Segment, key: int) -> list[State]:
        """Of one image; `key` is its trajectory's."""
        assert segment.order is not None
        digest = hashlib.blake2b(f"{key}/{self.salt}".encode(), digest_size=8).digest()
        chance = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        order, nothing = segment.order, torch.full_like(segment.logp, float("nan"))
        if self.masked_logp == "random_mask":
            masked = [_masked_anew(order, chance) for _ in range(self.masked_steps or 1)]
            return [State(~mask, mask, segment.tokens, nothing, nothing) for mask in masked]
        num_steps = num_steps_of(segment)
        steps = torch.arange(num_steps)
        if self.masked_steps is not None and self.masked_steps < num_steps:
            steps = torch.randperm(num_steps, generator=chance)[: self.masked_steps].sort().values
        if self.masked_logp == "all":
            return [_proposed(segment, step) for step in steps.tolist()]
        whole = (segment.tokens, segment.logp, segment.logp_mixed)
        return [State(order < step, order == step, *whole) for step in steps.tolist() if bool((order == step).any())]

    def num_items(self, segment: Segment, states: Sequence[State]) -> int:
        """Tokens that the loss of an image is divided by, those of steps that were not chosen among them."""
        assert segment.order is not None
        if self.masked_logp == "random_mask":
            return sum(int(state.scored.sum()) for state in states)
        return num_steps_of(segment) * segment.order.numel() if self.masked_logp == "all" else segment.num_sampled

    def scale(self, segment: Segment) -> float:
        """What the loss of an image's states is multiplied by."""
        if self.masked_logp in ("random_mask", "step") or self.masked_steps is None:
            return 1.0  # of step, the loss is a mean over those that there are
        return max(1.0, num_steps_of(segment) / self.masked_steps)


def num_steps_of(segment: Segment) -> int:
    """T: the last step always settles something."""
    assert segment.order is not None
    return int(segment.order.max()) + 1


def _proposed(segment: Segment, step: int) -> State:
    """All places in the state of a step: what is known there, and what the step drew of the others.

    Raises:
        ValueError: the sampler did not keep that.
    """
    if segment.order is None or segment.proposals is None or segment.proposal_logp is None:
        raise ValueError(
            "pack: expected images with what every step drew, as masked_logp all trains it, got without; draw with "
            "Sampling(keep_proposals=True)"
        )
    logp, mixed = segment.proposal_logp[step].unbind(0)
    return State(segment.order < step, segment.order >= 0, segment.proposals[step], logp, mixed)


def _masked_anew(order: Tensor, chance: torch.Generator) -> Tensor:
    """[N] bool: a share of the sampled places, at least one."""
    share = 1.0 - torch.rand(1, generator=chance)
    lots = torch.rand(order.shape, generator=chance)
    sampled = order >= 0
    masked = sampled & (lots < share)
    if not bool(masked.any()):
        masked = sampled & (lots == lots[sampled].min())
    return masked
