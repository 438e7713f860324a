"""Digits that 13 people wrote by hand: 1,797 pictures of 8x8, and what they become for the model.

A picture is 32x32, light ink on black: one digit, or a sheet of four. The split is by picture and fixed: what is held
out is seen by no tokenizer, no base and no reward.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
(CC BY 4.0): its test part, the file that scikit-learn has as `load_digits`, kept beside this one.

Dims: N pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Split = Literal["train", "test"]
Picture = NDArray[np.uint8]

SIZE: Final = 32
NAMES: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""A digit's word, at its value."""
FILE: Final = Path(__file__).with_name("digits.safetensors")
DEEPEST: Final = 16.0
"""The value of full ink."""
HELD_OUT: Final = 0.25
"""Share of the pictures of each digit."""
MARGIN: Final = 1
"""Pixels of black around each digit of a sheet; twice as many around one alone."""


@cache
def handwriting() -> tuple[Tensor, Tensor]:
    """[N, 8, 8] float32 ink in [0, 1], and [N] int64 digits."""
    from safetensors.torch import load_file

    stored = load_file(FILE)
    return stored["images"].float() / DEEPEST, stored["labels"].long()


@cache
def rows_of(split: Split) -> dict[int, tuple[int, ...]]:
    """Digit -> rows of the pictures of a split; the same for all time, since a hash would change no less."""
    _, labels = handwriting()
    rng = np.random.default_rng(1998)
    found = {}
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(labels.numpy() == digit))
        cut = round(HELD_OUT * len(rows))
        chosen = rows[:cut] if split == "test" else rows[cut:]
        found[digit] = tuple(sorted(int(row) for row in chosen))
    return found


def enlarged(ink: Tensor, size: int, margin: int) -> Tensor:
    """[N, 8, 8] to [N, size, size] with a margin of black, in [0, 1]."""
    inner = (size - 2 * margin, size - 2 * margin)
    large = F.interpolate(ink[:, None], size=inner, mode="bicubic", align_corners=False)[:, 0]
    return F.pad(large.clamp(0.0, 1.0), (margin,) * 4)


def alone(row: int) -> Picture:
    """One digit, uint8 [32, 32, 3]."""
    ink, _ = handwriting()
    return _picture(enlarged(ink[row : row + 1], SIZE, 2 * MARGIN)[0])


def sheet(rows: Sequence[int]) -> Picture:
    """Four digits, two above two, uint8 [32, 32, 3]."""
    ink, _ = handwriting()
    small = enlarged(ink[list(rows)], SIZE // 2, MARGIN)
    top, bottom = torch.cat([small[0], small[1]], dim=1), torch.cat([small[2], small[3]], dim=1)
    return _picture(torch.cat([top, bottom]))


def _picture(ink: Tensor) -> Picture:
    grey = (ink * 255.0).round().byte().numpy()
    return np.ascontiguousarray(np.repeat(grey[..., None], 3, axis=2))
