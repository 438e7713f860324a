"""Text in drawings: TrOCR reads them, and what it reads is compared with what was to be written.

TrOCR reads one line. A drawing is therefore read whole and in horizontal bands that overlap by half, and the reading
that comes nearest counts.  The score is flow_grpo's: 1 less the edit distance over the length, without spaces and case;
a text that holds all of it has 1.

Dims: n images.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import chain
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from torch import Tensor
from transformers import TrOCRProcessor, VisionEncoderDecoderModel

from ..builtin.batches import check_images
from .drawing_asked import drawn_rows, filled, wanted_text
from .loading import Loaded, as_bytes, load

BANDS = 3
"""A drawing is read whole, and in strips of a half and a third of its height."""


class TrOcrReader:
    """The lines that TrOCR reads in a drawing's strips."""

    def __init__(self, loaded: Loaded, *, batch_size: int = 32, max_new_tokens: int = 64, bands: int = BANDS) -> None:
        self.model, self.processor = loaded
        self.batch_size, self.max_new_tokens, self.bands = batch_size, max_new_tokens, bands

    @classmethod
    def from_pretrained(cls, name: str, *, device: torch.device | str = "cpu") -> TrOcrReader:
        """A TrOCR checkpoint; ConfigError where it cannot be had."""
        return cls(load("ocr", VisionEncoderDecoderModel, name, processor_class=TrOCRProcessor, device=device))

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor]) -> list[list[str]]:
        """For each image [3, H, W] in [0, 1]: what is read in each of its strips, and in those of one height that lie
        one below the other."""
        check_images("ocr", images)
        cuts = [
            (i, n, strip) for i, image in enumerate(images) for n in heights(self.bands) for strip in strips(image, n)
        ]
        lines: list[dict[int, list[str]]] = [{n: [] for n in heights(self.bands)} for _ in images]
        for start in range(0, len(cuts), self.batch_size):
            part = cuts[start : start + self.batch_size]
            pixels = self.processor.image_processor(
                images=[as_bytes(strip) for _, _, strip in part], return_tensors="pt"
            )
            tokens = self.model.generate(
                pixels["pixel_values"].to(self.model.device, self.model.dtype),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
            )
            texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for (index, n, _), text in zip(part, texts, strict=True):
                lines[index][n].append(text.strip())
        return [
            [*chain.from_iterable(found.values()), *(" ".join(each[::2]) for each in found.values())] for found in lines
        ]


def heights(bands: int) -> range:
    """Of strips: a whole, a half, …, a `bands`-th of the drawing's."""
    return range(1, bands + 1)


def strips(image: Tensor, number: int) -> list[Tensor]:
    """[3, H, W] -> strips of a `number`-th of its height, each beginning in the middle of the one before."""
    tall = max(image.shape[1] // number, 1)
    return [image[:, top : top + tall] for top in range(0, image.shape[1] - tall + 1, max(tall // 2, 1))]


def text_score(read: str, wanted: str) -> float:
    """1 where the text was read, less by each letter that is off, down to 0; spaces and case do not count."""
    said, right = plain(read), plain(wanted)
    if not right:
        return 0.0
    if right in said:
        return 1.0
    return 1.0 - min(edit_distance(said, right), len(right)) / len(right)


def plain(text: str) -> str:
    """Without spaces and case, full-width letters as others."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def edit_distance(a: str, b: str) -> int:
    """Letters to change, add or leave out."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


class OcrReward:
    """How much of the wanted text the drawing shows, in [0, 1]; None without a drawing or a text."""

    kind = "image"

    def __init__(self, reader: TrOcrReader) -> None:
        self.reader = reader
        self.__name__ = "ocr"

    def __call__(self, *, images: Sequence[Tensor | None], **columns: Any) -> list[float | None]:
        rows, _ = drawn_rows(images)
        wanted = {row: text for row in rows if plain(text := wanted_text(columns, row))}
        drawn = [image for row in wanted if (image := images[row]) is not None]
        scores = [
            max(text_score(line, text) for line in lines)
            for lines, text in zip(self.reader(drawn) if drawn else [], wanted.values(), strict=True)
        ]
        return filled(len(images), list(wanted), scores)
