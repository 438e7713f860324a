"""How many places of an image are settled by each step of masked drawing, and by how much chance.

    left(s)  = max(1, min(unknown - 1, floor(N cos(pi/2 (s + 1) / T)))),  0 after the last step
    noise(s) = noise(s - 1) (1 - (s + 1) / T)

A step draws every unknown place, keeps those of highest confidence, log p + noise x Gumbel, and masks `left` of them
again. Noise compounds, as in the released code; the last step keeps all: what it drew is the image.

Source: MaskGIT (arXiv 2202.04200); Show-o's `t2i_generate`.

Dims: N tokens of an image, T steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class MaskSchedule:
    """Of one image size and number of steps."""

    num_tokens: int
    """N."""
    num_steps: int
    """T."""
    first_noise: float = 1.0
    """What the noise of confidence begins with; Show-o has 1, Sync-R1 1.8 under previews."""

    @cached_property
    def left(self) -> tuple[int, ...]:
        """[T] places that are unknown after each step."""
        counts, unknown = [], self.num_tokens
        for step in range(self.num_steps - 1):
            # In float32, as released: where N cos(…) is a whole number, other roundings would give another count.
            share = torch.cos(torch.tensor(1.0 * (step + 1) / self.num_steps) * math.pi * 0.5)
            unknown = max(1, min(unknown - 1, int((self.num_tokens * share).floor())))
            counts.append(unknown)
        return (*counts, 0)

    @cached_property
    def noise(self) -> tuple[float, ...]:
        """[T] factor of the Gumbel noise in each step's confidence."""
        noises, noise = [], self.first_noise
        for step in range(self.num_steps):
            noise *= 1.0 - (step + 1) / self.num_steps
            noises.append(noise)
        return tuple(noises)

    def preview_step(self, fraction: float) -> int:
        """Steps before a preview that shows `fraction` of the drawing; 0: there is none."""
        steps = max(1, round(fraction * self.num_steps))
        return steps if steps < self.num_steps else 0
