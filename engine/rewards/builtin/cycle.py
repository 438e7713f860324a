"""Cycle consistency: does a drawing look like the photo that its prompt describes, and does it say the prompt back?

    image: likeness(drawn, real)          text: likeness(caption(drawn), prompt)

CoRL's paper sums both; its released code takes 1 - LPIPS and BERTScore of BLIP's caption, later 1 - RMSE and a caption
of the policy's own.  Any captioner and any likeness of images or texts fits here.

Source: CoRL (2505.17534) §3.2, ULM-R1's `t2i_bidirectional_cycle_reward`; rewritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...pictures import ImageRef
from .batches import by_shape
from .captioner import Captioner
from .perceptual import ImageSimilarity
from .text_similarity import TextSimilarity


class CycleReward:
    """The sum, or the mean, of both directions; either may be left out.

    A prompt without a real picture gets the text's direction alone, unless `real_image_needed`: all members of a group
    share the prompt, so their rewards stay comparable, and a data set may have photos for some of its prompts only.

    Args:
        image_similarity: such as `LpipsSimilarity`; None leaves the image's direction out.
        captioner, text_similarity: such as `BlipCaptioner` and `BertScore`; both or neither.
        normalise: the mean of the directions that there are, each held to [0, 1]; False: their sum, as released.
        real_image_needed: None for a prompt without one.

    Raises:
        ValueError: nothing is left to compare, or a captioner without a text similarity.
    """

    def __init__(
        self,
        image_similarity: ImageSimilarity | None,
        captioner: Captioner | None = None,
        text_similarity: TextSimilarity | None = None,
        *,
        normalise: bool = True,
        real_image_needed: bool = False,
    ) -> None:
        if (captioner is None) != (text_similarity is None):
            raise ValueError("CycleReward: expected a captioner and a text similarity, or neither")
        if image_similarity is None and captioner is None:
            raise ValueError("CycleReward: expected an image similarity, or a captioner and a text similarity")
        if real_image_needed and image_similarity is None:
            raise ValueError("CycleReward: a real image is needed, but there is no image similarity to use it")
        self.image_similarity, self.captioner, self.text_similarity = image_similarity, captioner, text_similarity
        self.normalise, self.real_image_needed = normalise, real_image_needed
        self.range = (0.0, 1.0) if normalise else None
        self.__name__ = "cycle"

    def __call__(
        self,
        *,
        images: Sequence[Tensor | None],
        prompts: Sequence[str],
        target: Sequence[str | None],
        real_image: Sequence[ImageRef | None],
        **_: Any,
    ) -> list[float | None]:
        """One value per trajectory; None without a drawing, or with nothing to compare it with.

        Args:
            images: drawings [3, H, W] float in [0, 1].
            prompts, target: the text that was to be drawn is `target`, or the prompt where that is None.
            real_image: the photo that belongs to the prompt.

        Raises:
            ValueError: an image is out of range; see `batches.check_images`.
            PictureError: a real image cannot be read.
        """
        drawn = {row: image for row, image in enumerate(images) if image is not None}
        if self.real_image_needed:
            drawn = {row: image for row, image in drawn.items() if real_image[row] is not None}
        parts: dict[int, list[float]] = {row: [] for row in drawn}
        if self.image_similarity is not None:
            real = {row: ref for row in drawn if (ref := real_image[row]) is not None}
            likeness = self.image_similarity([drawn[row] for row in real], list(real.values())) if real else []
            for row, value in zip(real, likeness, strict=True):
                parts[row].append(value)
        if self.captioner is not None and self.text_similarity is not None and drawn:
            captions = self.captions(list(drawn.values()))
            texts = [target[row] or prompts[row] for row in drawn]
            for row, value in zip(drawn, self.text_similarity(captions, texts), strict=True):
                parts[row].append(value)
        return [self._reward(parts.get(row, [])) for row in range(len(images))]

    def captions(self, images: Sequence[Tensor]) -> list[str]:
        """What the captioner says of drawings [3, H, W] of any sizes."""
        found = [""] * len(images)
        for members in by_shape(images):
            said = self.captioner(torch.stack([images[i] for i in members])) if self.captioner else []
            for index, caption in zip(members, said, strict=True):
                found[index] = caption
        return found

    def _reward(self, parts: Sequence[float]) -> float | None:
        if not parts:
            return None
        if not self.normalise:
            return float(sum(parts))
        return sum(min(1.0, max(0.0, part)) for part in parts) / len(parts)
