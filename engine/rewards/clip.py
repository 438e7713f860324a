"""CLIP: how well a drawing fits a text (CLIP-T), and how much it looks like given pictures (CLIP-I).

Both are cosines between features of length 1.  Texts above CLIP's 77 tokens are cut, their end mark kept: CLIP's own
tokenizer raises there, which made Sync-R1's released score change its scale in silence.  Features of texts and of given
pictures are kept.  Pictures are prepared on the model's device from tensors, as the checkpoint's processor would.

Dims: n images, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from syncr1.engine.pictures import ImageRef
from syncr1.engine.rewards.perceptual import Kept, by_shape, check_images, picture_pixels

_MODES = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the ways to resample, which processors' files hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What a transformers image processor does to a picture, for tensors in [0, 1]."""

    size: tuple[int, int] | int
    """Height and width, or the shorter side alone, which keeps the aspect."""
    crop: tuple[int, int] | None
    """Height and width of the middle that stays."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str

    @classmethod
    def of(cls, processor: Any) -> Self:
        """From a `CLIPImageProcessor`, a `BlipImageProcessor`, or another that only resizes, crops and normalises.

        Raises:
            ValueError: it has settings that this cannot follow; the message has them.
        """
        settings = processor.to_dict()
        size, crop = settings["size"], settings.get("crop_size")
        mode = _MODES.get(int(settings.get("resample", 3)))
        whole = "shortest_edge" in size or {"height", "width"} <= set(size)
        if not (whole and mode and settings.get("do_normalize", True) and settings.get("do_resize", True)):
            raise ValueError(f"image processor: expected one that resizes and normalises, got {settings}")
        edge = size.get("shortest_edge")
        target = int(edge) if edge else (int(size["height"]), int(size["width"]))
        cut = (int(crop["height"]), int(crop["width"])) if crop and settings.get("do_center_crop") else None
        smallest = (target, target) if isinstance(target, int) else target
        if cut is not None and (cut[0] > smallest[0] or cut[1] > smallest[1]):
            raise ValueError(f"image processor: crop {cut} is larger than size {size}; padding is not supported")
        return cls(
            size=target,
            crop=cut,
            mean=tuple(settings["image_mean"]),
            std=tuple(settings["image_std"]),
            mode=mode,
        )

    def __call__(self, images: Tensor) -> Tensor:
        """[n, 3, H, W] float32 in [0, 1] -> [n, 3, *size or *crop] float32, normalised."""
        height, width = images.shape[2:]
        if isinstance(self.size, int):
            short, long = sorted((height, width))
            longer = int(self.size * long / short)
            size = (self.size, longer) if height <= width else (longer, self.size)
        else:
            size = self.size
        if size != (height, width):
            images = F.interpolate(images, size, mode=self.mode, antialias=True).clamp(0.0, 1.0)
        if self.crop is not None:
            top, left = (round((side - cut) / 2) for side, cut in zip(size, self.crop, strict=True))
            images = images[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std


class ClipScorer:
    """Features of length 1 of images and texts, and their cosines.

    Args:
        model: a CLIPModel, which is put into eval mode.
        tokenizer: its own.
        preparation: of its image processor.
        batch_size: images or texts in one pass.
        max_bytes: of features that are kept, on the CPU; of texts and of pictures each.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: Any,
        preparation: Preparation,
        *,
        batch_size: int = 64,
        max_bytes: int = 1 << 26,
    ) -> None:
        self.model, self.tokenizer, self.preparation = model.eval().requires_grad_(False), tokenizer, preparation
        self.batch_size = batch_size
        self.max_length = int(model.config.text_config.max_position_embeddings)
        self._texts: Kept[str, Tensor] = Kept(self._of_texts, _num_bytes, max_bytes)
        self._pictures: Kept[ImageRef, Tensor] = Kept(self._of_pictures, _num_bytes, max_bytes)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        **more: Any,
    ) -> Self:
        """A checkpoint in safetensors, by name or from a folder; `more` goes to the constructor.

        Raises:
            OSError: nothing there, or no safetensors.
        """
        where = {"revision": revision or "main", "trust_remote_code": False}
        model = CLIPModel.from_pretrained(name_or_folder, dtype=dtype, use_safetensors=True, **where).to(device)
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder, **where)
        preparation = Preparation.of(CLIPImageProcessor.from_pretrained(name_or_folder, **where))
        return cls(model, tokenizer, preparation, **more)

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
            inputs = self.tokenizer(
                part, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            ).to(self.model.device)
            pooled = self.model.text_model(inputs["input_ids"], inputs["attention_mask"]).pooler_output
            features = F.normalize(self.model.text_projection(pooled).float(), dim=-1).cpu()
            found += [feature.clone() for feature in features]
        return found


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
