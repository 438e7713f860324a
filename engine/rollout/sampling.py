"""How trajectories are drawn, what keys their random numbers, and what drawing them cost."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields, replace
from typing import Any

from syncr1.kernels.ranges import SAMPLING, Range

from ..records import Prompt, SegmentKind
from ..settings.modality import value_of
from ..settings.train_config import Unconditional


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """Which ids may be drawn: top_k, then top_p of what it left, then min_p, of what is sampled from."""

    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    """1 keeps all."""
    min_p: float = 0.0
    """0 keeps all."""

    @property
    def acts(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


EVERYTHING = Truncation()
OF_MASKED = {
    "image_steps": Range("an int ≥ 1", lambda v: v >= 1, "16 is usual", whole=True),
    "image_noise": Range("a finite number ≥ 0", lambda v: v >= 0, "1 is usual; 0 leaves chance out of what is kept"),
}
"""Numbers of masked drawing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How trajectories are drawn."""

    num_generations: int = 8
    temperature: float = 1.0
    """0 is greedy."""
    image_temperature: float | None = None
    """Of image tokens; None: as `temperature`."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    """See `Truncation`; what is kept is recorded with every token (`Segment.support`)."""
    image_top_k: int | None = None
    image_top_p: float | None = None
    image_min_p: float | None = None
    """Of image tokens; None: as top_k, top_p, min_p."""
    max_text_tokens: int = 16
    """Of each text segment."""
    cfg_weight: float = 1.0
    """Classifier-free guidance of image tokens, u + w (c - u); 1 leaves the branch out."""
    unconditional: Unconditional = "fixed"
    """The prompt behind which u is computed: the policy's own, or padding in the place of each prompt's tokens."""
    drawing_turn: str = "none"
    """Behind a text: none draws in the same answer, else a new turn asks for the image (drawing_turn.py)."""
    image_steps: int = 16
    """Steps in which a model that draws in masked order fills in an image; others ignore it."""
    image_noise: float = 1.0
    """How much chance decides what such a step keeps, at first (mask_schedule.py)."""
    keep_proposals: bool = False
    """Keep what every such step drew (`Segment.proposals`)."""
    seed: int = 0
    step: int = 0
    """Salts the random numbers, so that each step draws afresh."""

    def __post_init__(self) -> None:
        for name, value in truncation_of(self).items():
            if value is not None or not name.startswith("image_"):
                SAMPLING[name.removeprefix("image_")].check("generate", name, value)
        for name, numbers in OF_MASKED.items():
            numbers.check("generate", name, getattr(self, name))

    def truncation(self, kind: SegmentKind) -> Truncation:
        """Of one modality's tokens; greedy ones have none."""
        if value_of(self, "temperature", kind) == 0:
            return EVERYTHING
        return Truncation(**{field.name: value_of(self, field.name, kind) for field in fields(Truncation)})


def truncation_of(config: Any) -> dict[str, Any]:
    """The flags that leave ids out, as fields of `Sampling`."""
    names = [field.name for field in fields(Truncation)]
    return {name: getattr(config, name) for name in (*names, *(f"image_{name}" for name in names))}


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
