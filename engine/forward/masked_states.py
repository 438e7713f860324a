"""What of a filled-in image is trained: states that it went through, and which of their tokens count.

    committed      each token in the state of the step that settled it: N tokens an image, over T states
    random_mask    the finished image with places masked anew, a share drawn from (0, 1]; what is masked counts

With `masked_steps` k < T only the states of k steps, drawn for each image, are computed; the loss of what they settled
counts T / k times and is divided by the tokens of whole images: its expectation is the full sum's.

The probability of *which* places a step settles is left out, as it is by every released code: the likelihood is exact
only where the order does not depend on the model.

Sources: committed as in Mask-GRPO, of the distribution that was sampled from as in Sync-R1's released code; random_mask
as in MMaDA's UniGRPO.

Dims: N tokens of an image, T steps.
"""

from __future__ import annotations

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
    """[N] bool: masked places whose token counts."""


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
        chance = torch.Generator().manual_seed((key ^ self.salt) & (2**63 - 1))
        order = segment.order
        if self.masked_logp == "random_mask":
            return [_masked_anew(order, chance) for _ in range(self.masked_steps or 1)]
        num_steps = num_steps_of(segment)
        steps = torch.arange(num_steps)
        if self.masked_steps is not None and self.masked_steps < num_steps:
            steps = torch.randperm(num_steps, generator=chance)[: self.masked_steps].sort().values
        states = [State(order < step, order == step) for step in steps.tolist()]
        return [state for state in states if bool(state.scored.any())]

    def scale(self, segment: Segment) -> float:
        """What the loss of an image's states is multiplied by."""
        if self.masked_logp == "random_mask" or self.masked_steps is None:
            return 1.0
        return max(1.0, num_steps_of(segment) / self.masked_steps)


def num_sampled(segment: Segment) -> int:
    """Tokens that the sampler settled."""
    assert segment.order is not None
    return int((segment.order >= 0).sum())


def num_steps_of(segment: Segment) -> int:
    """T: the last step always settles something."""
    assert segment.order is not None
    return int(segment.order.max()) + 1


def _masked_anew(order: Tensor, chance: torch.Generator) -> State:
    """A share of the sampled places masked, at least one."""
    share = 1.0 - torch.rand(1, generator=chance)
    lots = torch.rand(order.shape, generator=chance)
    sampled = order >= 0
    masked = sampled & (lots < share)
    if not bool(masked.any()):
        masked = sampled & (lots == lots[sampled].min())
    return State(~masked, masked)
