"""Which digit does a picture show?  By two readers that share nothing: one gives rewards, the other scores alone.

`NearestDigit` compares with training pictures as the policy's image tokenizer gives them back; `DigitCNN` is a network
that learns from training pictures, moved, dimmed and noisy, and from round trips.

Dims: n pictures, float [n, 3, 32, 32] in [0, 1]; R known pictures; D pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .handwriting import NAMES, Split, alone, rows_of

VALUES: Final = {"digit": NAMES}
"""What a picture may be asked to show."""
KNOWN: Final = 40
"""Pictures of each digit that the nearest is looked for among."""
STEPS, BATCH = 400, 64


def table_of(split: Split, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Pictures [R, 3, 32, 32] of a split and their digits [R] int64, at most `most` of each."""
    rows = [(row, digit) for digit, own in rows_of(split).items() for row in own[:most]]
    pictures = np.stack([alone(row) for row, _ in rows])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, torch.tensor([digit for _, digit in rows])


class NearestDigit:
    """Reads by the mean squared difference from known pictures, channels averaged.

    Args:
        decoded: float [10 * KNOWN, 3, 32, 32] in [0, 1]: `table_of("train", KNOWN)` after the tokenizer's round trip.
    """

    def __init__(self, decoded: Tensor) -> None:
        self._rows_RD = decoded.detach().float().mean(1).flatten(1)
        self._digits_R = table_of("train", KNOWN)[1].to(decoded.device)

    @classmethod
    def from_round_trip(cls, round_trip: Callable[[Tensor], Tensor]) -> NearestDigit:
        return cls(round_trip(table_of("train", KNOWN)[0]))

    def mse(self, images: Tensor) -> Tensor:
        """Least mean squared difference from a picture of each digit, [n, 10]."""
        images_nD = images.to(self._rows_RD).mean(1).flatten(1)
        apart_nR = torch.cdist(images_nD, self._rows_RD).square() / images_nD.shape[1]
        index = self._digits_R.expand(len(images), -1)
        return apart_nR.new_full((len(images), 10), torch.inf).scatter_reduce(1, index, apart_nR, "amin")

    def read_indices(self, images: Tensor) -> Tensor:
        """The digit of the nearest picture, int64 [n, 1]."""
        return self.mse(images).argmin(1, keepdim=True)

    def posterior(self, images: Tensor, *, temperature: float = 0.004) -> dict[str, Tensor]:
        """Softmax of −MSE / temperature over digits, [n, 10]."""
        return {"digit": torch.softmax(-self.mse(images) / temperature, dim=1)}


class DigitCNN(nn.Module):
    """Three strided convolutions and a linear layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(4 * width * 16, len(NAMES))

    def forward(self, images: Tensor) -> Tensor:
        """[n, 10] logits."""
        return self.head(self.trunk(images.mean(1, keepdim=True) * 2.0 - 1.0).flatten(1))

    @torch.no_grad()
    def read_indices(self, images: Tensor) -> Tensor:
        """The likeliest digit, int64 [n, 1]."""
        return self(images).argmax(1, keepdim=True)


def train_digit_cnn(round_trip: Callable[[Tensor], Tensor], seed: int = 0, steps: int = STEPS) -> DigitCNN:
    """Trains the independent reader in seconds; leaves torch's global generator alone.

    Args:
        round_trip: of the image tokenizer, [R, 3, 32, 32] in [0, 1] to the same.
        seed: of weights and batches.
        steps: of AdamW.
    """
    pictures, digits = table_of("train")
    images, labels = torch.cat([pictures, round_trip(pictures)]), torch.cat([digits, digits])
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitCNN().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(steps):
        pick = torch.randint(len(images), (BATCH,), generator=generator)
        x = images[pick]
        dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
        x = torch.roll(x, (dy, dx), (2, 3)) * (0.7 + 0.3 * torch.rand(BATCH, 1, 1, 1, generator=generator))
        x = x + 0.1 * torch.rand(BATCH, 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
        loss = F.cross_entropy(model(x.clamp(0.0, 1.0)), labels[pick])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False).eval()
