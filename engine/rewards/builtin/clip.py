"""CLIP: how well a drawing fits a text (CLIP-T), and how much it looks like given pictures (CLIP-I).

Both are cosines between features of length 1.  Texts above CLIP's 77 tokens are cut, their end mark kept, and the first
one is told of: CLIP's own tokenizer raises there, which made Sync-R1's released score change its scale in silence.
Features of texts and of given pictures are kept.  Pictures are prepared on the model's device from tensors, as the
checkpoint's processor would.

Dims: n images, D features.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel

from ...pictures import ImageRef
from .batches import Kept, by_shape, check_images, picture_pixels
from .pretrained import Preparation, Pretrained, frozen

logger = logging.getLogger(__name__)
PREVIEW_WEIGHTS = (0.65, 0.35)
"""Of CLIP-I and CLIP-T in the released preview."""


class ClipScorer(Pretrained):
    """Features of length 1 of images and texts, and their cosines.

    Args:
        model: a CLIPModel, which is put into eval mode.
        tokenizer: its own.
        preparation: of its image processor.
        batch_size: images or texts in one pass.
        max_bytes: of features that are kept, on the CPU; of texts and of pictures each.
    """

    model_class, processor_class = CLIPModel, CLIPImageProcessor

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: Any,
        preparation: Preparation,
        *,
        batch_size: int = 64,
        max_bytes: int = 1 << 26,
    ) -> None:
        self.model, self.tokenizer, self.preparation = frozen(model), tokenizer, preparation
        self.batch_size = batch_size
        self.max_length = int(model.config.text_config.max_position_embeddings)
        self._cut_told = False
        self._texts: Kept[str, Tensor] = Kept(self._of_texts, _num_bytes, max_bytes)
        self._pictures: Kept[ImageRef, Tensor] = Kept(self._of_pictures, _num_bytes, max_bytes)

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Images [n, 3, H, W] float in [0, 1] -> [n, D] float32 of length 1, on the CPU; fits `IdentityReward`."""
        check_images("clip", list(images))
        batches = images.split(self.batch_size)
        return torch.cat([self._embed(self.preparation(batch.to(self.model.device).float())) for batch in batches])

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """n texts of any length -> [n, D] float32 of length 1, on the CPU."""
        if not texts:
            return torch.zeros(0, self.model.config.projection_dim)
        known = self._texts(texts)
        return torch.stack([known[text] for text in texts])

    def picture_features(self, pictures: Sequence[ImageRef]) -> dict[ImageRef, Tensor]:
        """[D] float32 of length 1 of each; PictureError where one cannot be read."""
        return self._pictures(pictures)

    def clip_t(self, images: Sequence[Tensor], texts: Sequence[str]) -> list[float]:
        """Cosine of each image [3, H, W] in [0, 1] and its text, in [-1, 1]."""
        if not images:
            return []
        return (self._of_images(images) * self.text_features(texts)).sum(-1).tolist()

    def clip_i(self, images: Sequence[Tensor], references: Sequence[Sequence[ImageRef]]) -> list[float | None]:
        """Mean cosine of each image and its references, in [-1, 1]; None where there are none."""
        rows = [i for i, refs in enumerate(references) if refs]
        values: list[float | None] = [None] * len(images)
        known = self.picture_features([ref for refs in references for ref in refs])
        for row, feature in zip(rows, self._of_images([images[i] for i in rows]), strict=True):
            values[row] = float((torch.stack([known[ref] for ref in references[row]]) @ feature).mean())
        return values

    @torch.no_grad()
    def features_of(self, images: Sequence[Tensor]) -> Tensor:
        """n images [3, H, W] in [0, 1], each of any size -> [n, D] float32 of length 1, on the CPU: prepared one by one
        and embedded together, for cuts of which hardly two have one shape."""
        check_images("clip", images)
        found = [torch.zeros(0, self.model.config.projection_dim)]
        for start in range(0, len(images), self.batch_size):
            part = [image[None].to(self.model.device).float() for image in images[start : start + self.batch_size]]
            found.append(self._embed(torch.cat([self.preparation(pixels) for pixels in part])))
        return torch.cat(found)

    def _of_images(self, images: Sequence[Tensor]) -> Tensor:
        features = torch.zeros(len(images), self.model.config.projection_dim)
        for members in by_shape(images):
            features[members] = self.image_features(torch.stack([images[i] for i in members]))
        return features

    def _embed(self, pixels: Tensor) -> Tensor:
        pooled = self.model.vision_model(pixel_values=pixels.to(self.model.dtype)).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1).cpu()

    @torch.no_grad()
    def _of_pictures(self, refs: list[ImageRef]) -> list[Tensor]:
        found: list[Tensor] = []
        for start in range(0, len(refs), self.batch_size):
            part = [picture_pixels(ref)[None].to(self.model.device) for ref in refs[start : start + self.batch_size]]
            features = self._embed(torch.cat([self.preparation(pixels) for pixels in part]))
            found += [feature.clone() for feature in features]
        return found

    @torch.no_grad()
    def _of_texts(self, texts: list[str]) -> list[Tensor]:
        found: list[Tensor] = []
        for start in range(0, len(texts), self.batch_size):
            part = texts[start : start + self.batch_size]
            self._tell_of_cut(part)
            inputs = self.tokenizer(
                part, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(self.model.device)
            pooled = self.model.text_model(inputs["input_ids"], inputs["attention_mask"]).pooler_output
            features = F.normalize(self.model.text_projection(pooled).float(), dim=-1).cpu()
            found += [feature.clone() for feature in features]
        return found

    def _tell_of_cut(self, texts: Sequence[str]) -> None:
        """Once in its life: the first text of which it reads only the beginning."""
        if self._cut_told or not texts:
            return
        lengths = [len(ids) for ids in self.tokenizer(list(texts), verbose=False)["input_ids"]]
        longest = max(range(len(texts)), key=lengths.__getitem__)
        if lengths[longest] > self.max_length:
            self._cut_told = True
            logger.warning(
                "CLIP reads %d tokens of a text; %r has %d, and what is behind is cut (told once)",
                self.max_length,
                texts[longest][:80],
                lengths[longest],
            )


def _num_bytes(feature: Tensor) -> int:
    return feature.numel() * feature.element_size()


class ClipTextReward:
    """`scale` times CLIP-T of the drawing and its `target`, or its prompt where it has none; None without an image.

    ULM-R1's released pilot takes scale 2 over ViT-H-14.
    """

    def __init__(self, scorer: ClipScorer, scale: float = 1.0) -> None:
        self.scorer, self.scale = scorer, scale
        self.__name__ = "clip_text"

    def __call__(
        self, *, images: Sequence[Tensor | None], prompts: Sequence[str], target: Sequence[str | None], **_: Any
    ) -> list[float | None]:
        rows = [i for i, image in enumerate(images) if image is not None]
        rewards: list[float | None] = [None] * len(images)
        cosines = self.scorer.clip_t([images[i] for i in rows], [target[i] or prompts[i] for i in rows])  # type: ignore[misc]
        for row, cosine in zip(rows, cosines, strict=True):
            rewards[row] = self.scale * cosine
        return rewards


class ClipImageReward:
    """CLIP-I: cosine of the features of drawing and real picture; None without either."""

    def __init__(self, scorer: ClipScorer) -> None:
        self.scorer = scorer
        self.__name__ = "clip_image"

    def __call__(
        self, *, images: Sequence[Tensor | None], real_image: Sequence[ImageRef | None], **_: Any
    ) -> list[float | None]:
        rows = [i for i, image in enumerate(images) if image is not None and real_image[i] is not None]
        rewards: list[float | None] = [None] * len(images)
        drawn = [image for i in rows if (image := images[i]) is not None]
        real = [[ref] for i in rows if (ref := real_image[i]) is not None]
        for row, value in zip(rows, self.scorer.clip_i(drawn, real), strict=True):
            rewards[row] = value
        return rewards


class ClipPreview:
    """.65 CLIP-I (mean over the concept's photos) + .35 CLIP-T of an image that is still being drawn; None without an
    image or without photos: CLIP-T alone, a third as large, would be on another scale than the threshold.

    The text is what the image is drawn from: the prompt, then the policy's own words, which CLIP's limit cuts first.
    Source: the released Sync-R1.
    """

    def __init__(self, scorer: ClipScorer) -> None:
        self.scorer = scorer
        self.__name__ = "preview"

    def __call__(
        self,
        *,
        images: Sequence[Tensor | None],
        references: Sequence[Sequence[ImageRef]],
        prompts: Sequence[str],
        completions: Sequence[str],
        **_: Any,
    ) -> list[float | None]:
        rows = [i for i, image in enumerate(images) if image is not None and references[i]]
        rewards: list[float | None] = [None] * len(images)
        drawn = [image for i in rows if (image := images[i]) is not None]
        likeness = self.scorer.clip_i(drawn, [references[i] for i in rows])
        fit = self.scorer.clip_t(drawn, [f"{prompts[i]} {completions[i]}".strip() for i in rows])
        for row, alike, fits in zip(rows, likeness, fit, strict=True):
            assert alike is not None  # it has photos
            rewards[row] = PREVIEW_WEIGHTS[0] * alike + PREVIEW_WEIGHTS[1] * fits
        return rewards
