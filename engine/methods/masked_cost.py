"""What filling images in takes, in tokens and in pairs of tokens that see each other: for cost.py and memory.py.

    drawing     T passes over N places and their frame, a side behind its turn and one behind the free prompt
    training    of each image the states that are trained, each a span of as many

Dims: N tokens of an image, T steps, L = N and its frame.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..forward.masked_states import MaskedPlan
from ..policies.base import Policy
from ..rollout.mask_schedule import MaskSchedule


@dataclass(frozen=True, slots=True)
class Filling:
    """Of a model that fills images in."""

    schedule: MaskSchedule
    span: int
    """L."""

    @classmethod
    def of(cls, policy: Policy, image_steps: int) -> Filling | None:
        """None: it draws one token after another, or nothing."""
        if policy.decoding_order != "masked" or not policy.num_image_tokens:
            return None
        frame = sum(ids.numel() for ids in policy.image_frame())
        return cls(MaskSchedule(policy.num_image_tokens, image_steps), policy.num_image_tokens + frame)

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.schedule.num_tokens

    @property
    def num_steps(self) -> int:
        """T."""
        return self.schedule.num_steps

    def preview_step(self, tokens: int) -> int:
        """Steps before a preview that shows `tokens` of an image; 0: there is none."""
        return self.schedule.preview_step(tokens / self.num_tokens) if tokens else 0

    def pairs(self, behind: float) -> float:
        """Of a span that sees `behind` tokens before it, and itself whole."""
        return self.span * (behind + self.span)

    def rows(self, steps: int) -> int:
        """Places whose logits the first `steps` compute: those that were unknown."""
        return sum((self.num_tokens, *self.schedule.left)[:steps])

    def states(self, plan: MaskedPlan) -> int:
        """Of an image in training."""
        if plan.masked_logp == "random_mask":
            return plan.masked_steps or 1
        return min(plan.masked_steps or self.num_steps, self.num_steps)

    def scored(self, plan: MaskedPlan) -> float:
        """Tokens of an image whose logits training computes, on average."""
        states = self.states(plan)
        if plan.masked_logp == "all":
            return float(states * self.num_tokens)
        return self.num_tokens * states * (0.5 if plan.masked_logp == "random_mask" else 1 / self.num_steps)


@dataclass(frozen=True, slots=True)
class Turns:
    """What the images of a group stand behind in training."""

    length: float
    """Of each, in tokens."""
    copies: float

    @classmethod
    def of(cls, prefix: float, lead: float, members: float, states: int, share_prefix: bool) -> Turns:
        """A drawing turn is its member's own; an image that comes first stands behind the prompt, the group's.

        Args:
            prefix: tokens of the prompt.
            lead: of the drawing turn; 0: the image comes first.
            members: that are trained.
            states: of each image.
            share_prefix: as in the setting.
        """
        shared = members if lead else 1.0
        return cls(lead or prefix, shared if share_prefix else members * states)

    @property
    def tokens(self) -> float:
        return self.length * self.copies

    @property
    def pairs(self) -> float:
        return self.copies * self.length * (self.length + 1) / 2
