"""Pictures of the embedded worlds that image tokenizers are trained on, and what is left of them after a round trip.

Training shows neighbours: two pictures that differ in one attribute, or in one digit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..attributes import ATTRIBUTES, HELD_OUT_LOOKS, LOOKS, TRAIN_LOOKS, VALUES, Look
from ..checker import AttributeChecker
from ..digits import handwriting
from ..render import render
from ..vq import to_pixels


class Tokenizer(Protocol):
    """Pictures [n, 3, 32, 32] in [0, 1] to codes and back."""

    def round_trip(self, pictures: Tensor) -> Tensor:
        """What is left of them."""

    def codes(self, pictures: Tensor) -> Tensor:
        """[n, 16] int64."""


class Rendered:
    """The creatures of the rendered world."""

    def pairs(self, batch: int, canonical_share: float, rng: np.random.Generator) -> Tensor:
        """Pixels `[batch, 3, 32, 32]` in [-1, 1]; rows 2k and 2k+1 are neighbours under the same variation."""
        pictures = []
        for _ in range(batch // 2):
            look = TRAIN_LOOKS[int(rng.integers(len(TRAIN_LOOKS)))]
            canonical, seed = rng.random() < canonical_share, int(rng.integers(2**31))
            for shown in (look, neighbour(look, rng)):
                pictures.append(render(shown, variation=None if canonical else np.random.default_rng(seed)))
        return to_pixels(np.stack(pictures))

    def weight(self, batch: int) -> Tensor:
        """Of pixels, for `pairs`."""
        return pixel_weight(AttributeChecker.raw_table())

    def measure(self, vq: Tokenizer) -> list[str]:
        """Canonical renders after the round trip: PSNR, and how often the nearest *raw* render has each attribute
        right."""
        table = AttributeChecker.raw_table()
        decoded = vq.round_trip(table)
        hits = AttributeChecker(table).score(decoded, LOOKS)
        held = torch.tensor([look in HELD_OUT_LOOKS for look in LOOKS])
        lines = []
        for name, keep in (("trained looks", ~held), ("held-out looks", held)):
            shares = "  ".join(f"{a} {v:.3f}" for a, v in zip(ATTRIBUTES, hits[keep].mean(0).tolist(), strict=True))
            lines.append(f"  {name}: PSNR {psnr(decoded[keep], table[keep]):.2f} dB  {shares}")
        return [*lines, codes_in_use(vq.codes(table))]


def neighbour(look: Look, rng: np.random.Generator) -> Look:
    """Another training look that differs in exactly one attribute."""
    while True:
        name = ATTRIBUTES[int(rng.integers(len(ATTRIBUTES)))]
        other = replace(look, **{name: VALUES[name][int(rng.integers(len(VALUES[name])))]})
        if other != look and other not in HELD_OUT_LOOKS:
            return other


class Digits:
    """Handwritten digits: one alone, or a sheet of four."""

    def pairs(self, batch: int, canonical_share: float, rng: np.random.Generator) -> Tensor:
        """As `Rendered.pairs`: neighbours are sheets that have three digits in common, or the same digit twice."""
        rows = handwriting.rows_of("train")
        pictures = []
        for _ in range(batch // 2):
            four = [self._any(rows, rng) for _ in range(4)]
            other = list(four)
            other[int(rng.integers(4))] = self._any(rows, rng)
            if rng.random() < 0.5:
                pictures += [handwriting.alone(four[0]), handwriting.alone(other[0])]
            else:
                pictures += [handwriting.sheet(four), handwriting.sheet(other)]
        return to_pixels(np.stack(pictures))

    def _any(self, rows: dict[int, tuple[int, ...]], rng: np.random.Generator) -> int:
        own = rows[int(rng.integers(10))]
        return own[int(rng.integers(len(own)))]

    def weight(self, batch: int) -> Tensor:
        return pixel_weight(self.table())

    def table(self, split: handwriting.Split = "train") -> Tensor:
        rows = handwriting.rows_of(split)
        pictures = np.stack([handwriting.alone(row) for own in rows.values() for row in own[:30]])
        return to_pixels(pictures) / 2.0 + 0.5

    def measure(self, vq: Tokenizer) -> list[str]:
        """Digits after the round trip: PSNR, and how often the nearest training picture is of the same digit."""
        lines = []
        known = self.table()
        labels = torch.arange(10).repeat_interleave(30)
        for split in ("train", "test"):
            table = self.table(split)
            decoded = vq.round_trip(table)
            near = torch.cdist(decoded.flatten(1), known.flatten(1)).argmin(1)
            raw = torch.cdist(table.flatten(1), known.flatten(1)).argmin(1)
            right, before = ((labels[found] == labels).float().mean().item() for found in (near, raw))
            lines.append(
                f"  {split}: PSNR {psnr(decoded, table):.2f} dB  nearest of the same digit {right:.3f} "
                f"({before:.3f} before)"
            )
        return [*lines, codes_in_use(vq.codes(known))]


class Both:
    """Five renders for three digits, pairs kept together."""

    def __init__(self) -> None:
        self.rendered, self.digits = Rendered(), Digits()

    def _shares(self, batch: int) -> tuple[int, int]:
        renders = 2 * round(batch * 5 / 16)
        return renders, batch - renders

    def pairs(self, batch: int, canonical_share: float, rng: np.random.Generator) -> Tensor:
        renders, digits = self._shares(batch)
        return torch.cat([self.rendered.pairs(renders, canonical_share, rng), self.digits.pairs(digits, 0.0, rng)])

    def weight(self, batch: int) -> Tensor:
        renders, digits = self._shares(batch)
        parts = self.rendered.weight(renders).expand(renders, -1, -1), self.digits.weight(digits).expand(digits, -1, -1)
        return torch.cat(parts)[:, None]

    def measure(self, vq: Tokenizer) -> list[str]:
        return [*self.rendered.measure(vq), *self.digits.measure(vq)]


def pixel_weight(table: Tensor) -> Tensor:
    """`[1, 32, 32]`, mean 1: half flat, half the variance over pictures, so that hats and edges outweigh empty
    ground."""
    variance = table.var(0).mean(0, keepdim=True)
    return 0.5 + 0.5 * variance / variance.mean()


def psnr(decoded: Tensor, truth: Tensor) -> float:
    """dB, of pictures in [0, 1]."""
    return -10.0 * torch.log10((decoded - truth).square().mean()).item()


def codes_in_use(ids: Tensor) -> str:
    """Of codes [n, 16]."""
    per_position = sum(column.unique().numel() for column in ids.T) / ids.shape[1]
    return f"  codes: {ids.unique().numel()} in use, {per_position:.1f} per position"
