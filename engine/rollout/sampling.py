"""How trajectories are drawn, what keys their random numbers, and what drawing them cost."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from ..records import Prompt
from ..settings.train_config import Unconditional


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How trajectories are drawn."""

    num_generations: int = 8
    temperature: float = 1.0
    """0 is greedy."""
    max_text_tokens: int = 16
    """Of each text segment."""
    cfg_weight: float = 1.0
    """Classifier-free guidance of image tokens, u + w (c - u); 1 leaves the branch out."""
    unconditional: Unconditional = "fixed"
    """The prompt behind which u is computed: the policy's own, or padding in the place of each prompt's tokens."""
    seed: int = 0
    step: int = 0
    """Salts the random numbers, so that each step draws afresh."""


@dataclass(slots=True, kw_only=True)
class RolloutStats:
    """What one call of `generate` cost."""

    kv_bytes: int = 0
    """Keys and values held at once, at most."""
    prefill_tokens: int = 0
    """Prompt tokens that went through the trunk; a prompt counts once."""
    text_tokens: int = 0
    image_tokens: int = 0
    """Drawn, those of rejected tries included."""
    image_tokens_saved: int = 0
    """What the previews saved: tokens that rejected tries and dropped members would have needed to their end."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage: see, prefill, text, image, draw, follow_up."""


def trajectory_key(sampling: Sampling, prompt: Prompt, member: int, attempt: int = 1) -> int:
    """63-bit key of a trajectory's random numbers."""
    text = f"{sampling.seed}/{sampling.step}/{prompt.id}/{member}/{attempt}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
