"""How trajectories are drawn, what keys their random numbers, and what drawing them cost."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

from ..records import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How trajectories are drawn."""

    num_generations: int = 8
    temperature: float = 1.0
    """0 is greedy."""
    image_temperature: float | None = None
    """Of image tokens; None: as `temperature`."""
    max_text_tokens: int = 16
    """Of each text segment."""
    cfg_weight: float = 1.0
    """Classifier-free guidance of image tokens, u + w (c - u); 1 leaves the branch out."""
    drawing_turn: str = "none"
    """Behind a text: none draws in the same answer, else a new turn asks for the image (drawing_turn.py)."""
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
    """By stage: see, prefill, text, turn (where there is one), image, draw, follow_up."""


def added(first: RolloutStats, second: RolloutStats) -> RolloutStats:
    """What both calls cost together, one after the other."""
    sums = ("prefill_tokens", "text_tokens", "image_tokens", "image_tokens_saved")
    seconds = {name: first.seconds.get(name, 0.0) + value for name, value in second.seconds.items()}
    return replace(
        first,
        kv_bytes=max(first.kv_bytes, second.kv_bytes),
        seconds={**first.seconds, **seconds},
        **{name: getattr(first, name) + getattr(second, name) for name in sums},
    )


def trajectory_key(sampling: Sampling, prompt: Prompt, member: int, attempt: int = 1) -> int:
    """63-bit key of a trajectory's random numbers."""
    text = f"{sampling.seed}/{sampling.step}/{prompt.id}/{member}/{attempt}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
