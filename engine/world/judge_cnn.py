"""An independent reader of the five attributes, for evaluation alone: a small CNN with one head per attribute.

Rewards read pictures with `checker.AttributeChecker`; a policy that only fooled that reader would not fool this one,
which shares nothing with it: it learns from renders with variation and from tokenizer round trips with noise. `n`
pictures are float `[n, 3, 32, 32]` in [0, 1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attributes import ATTRIBUTES, LOOKS, VALUES
from .checker import AttributeChecker
from .render import render

if TYPE_CHECKING:
    from transformers.models.janus.modeling_janus import JanusVQVAE

STEPS: Final = 240
BATCH: Final = 64
_SIZES: Final = tuple(len(VALUES[name]) for name in ATTRIBUTES)


class JudgeCNN(nn.Module):
    """Three strided convolutions, then one linear layer whose output is split over the attributes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
        )
        self.heads = nn.Linear(4 * width * 16, sum(_SIZES))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images `[n, 3, 32, 32]` to one `[n, values]` of logits per attribute."""
        features = self.trunk(images * 2.0 - 1.0).flatten(1)
        return list(self.heads(features).split(_SIZES, dim=1))

    @torch.no_grad()
    def read_indices(self, images: Tensor) -> Tensor:
        """The likeliest value of each attribute, int64 `[n, 5]`."""
        return torch.stack([logits.argmax(1) for logits in self(images)], dim=1)


def judge_samples(vq: JanusVQVAE, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Training pictures `[N, 3, 32, 32]` and labels `[N, 5]`: renders and round trips, canonical and varied."""
    from .vq import round_trip, to_pixels

    labels = torch.tensor([look.indices() for look in LOOKS])
    canonical = AttributeChecker.raw_table()
    varied = [to_pixels(np.stack([render(look, variation=rng) for look in LOOKS])) / 2.0 + 0.5 for _ in range(4)]
    pictures = [canonical, round_trip(vq, canonical), *varied, round_trip(vq, varied[0])]
    return torch.cat(pictures), labels.repeat(len(pictures), 1)


def train_judge(vq: JanusVQVAE, seed: int = 0) -> JudgeCNN:
    """Train a judge in a few seconds; `vq` and `seed` fix it, and torch's global generator is left alone."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = judge_samples(vq, rng)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = JudgeCNN().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=STEPS)
    for _ in range(STEPS):
        pick = torch.randint(images.shape[0], (BATCH,), generator=generator)
        noise = torch.randn(BATCH, *images.shape[1:], generator=generator)
        amount = 0.08 * torch.rand(BATCH, 1, 1, 1, generator=generator)
        logits = model((images[pick] + amount * noise).clamp(0.0, 1.0))
        loss = torch.stack([F.cross_entropy(x, labels[pick, i]) for i, x in enumerate(logits)]).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.requires_grad_(False).eval()
