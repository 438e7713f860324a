"""Scores of a drawing and its text by two towers: CLIP, PickScore and HPS (CLIP's class), and SigLIP.

    clip     cosine
    hps      cosine, as `hpsv2.score` and T2I-R1 have it
    pickscore exp(logit scale) · cosine / 26, as flow_grpo has it: about .8; times 26 is PickScore as published
    siglip   cosine; its sigmoid, nearly 0 for most pictures, would hide differences

Dims: n images, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoImageProcessor, SiglipModel

from ..builtin.batches import by_shape, check_images
from ..builtin.clip import ClipScorer
from ..builtin.pretrained import Preparation, Pretrained, frozen
from .drawing_asked import drawn_rows, filled, what_was_asked

PICKSCORE_SCALE = 26.0
"""flow_grpo's, which brings most pictures into [0, 1]."""


class PreferenceReward:
    """How well a drawing fits what was asked for, by one of these scorers; None without a drawing.

    Args:
        scorer: `pairs` gives the cosine of each image and its text.
        name: the column's.
        scale: times the cosine.
    """

    kind = "image"

    def __init__(self, scorer: ClipScorer | SiglipScorer, name: str, scale: float = 1.0) -> None:
        self.scorer, self.scale = scorer, scale
        self.__name__ = name

    def __call__(self, *, images: Sequence[Tensor | None], **columns: Any) -> list[float | None]:
        rows, drawn = drawn_rows(images)
        cosines = self.scorer.clip_t(drawn, what_was_asked(columns, rows))
        return filled(len(images), rows, [self.scale * cosine for cosine in cosines])


def pickscore(scorer: ClipScorer) -> PreferenceReward:
    """Of a PickScore checkpoint, whose own logit scale it takes."""
    return PreferenceReward(scorer, "pickscore", float(scorer.model.logit_scale.exp()) / PICKSCORE_SCALE)


class SiglipScorer(Pretrained):
    """Cosines of images and texts; texts above its positions are cut, and filled up to them, as it was trained."""

    model_class, processor_class = SiglipModel, AutoImageProcessor

    def __init__(self, model: SiglipModel, tokenizer: Any, preparation: Preparation, *, batch_size: int = 64) -> None:
        self.model, self.tokenizer, self.preparation = frozen(model), tokenizer, preparation
        self.batch_size = batch_size

    @torch.no_grad()
    def clip_t(self, images: Sequence[Tensor], texts: Sequence[str]) -> list[float]:
        """Cosine of each image [3, H, W] in [0, 1] and its text, in [-1, 1]."""
        check_images("siglip", images)
        if not images:
            return []
        device, dtype = self.model.device, self.model.dtype
        seen = torch.zeros(len(images), self.model.config.vision_config.hidden_size)
        for members in by_shape(images):
            for start in range(0, len(members), self.batch_size):
                part = members[start : start + self.batch_size]
                pixels = self.preparation(torch.stack([images[i] for i in part]).to(device).float())
                pooled = self.model.vision_model(pixel_values=pixels.to(dtype)).pooler_output
                seen[part] = F.normalize(pooled.float(), dim=-1).cpu()
        distinct = list(dict.fromkeys(texts))
        read: list[Tensor] = []
        for start in range(0, len(distinct), self.batch_size):
            ids = self.tokenizer(
                distinct[start : start + self.batch_size],
                padding="max_length",
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )["input_ids"]
            pooled = self.model.text_model(input_ids=ids.to(device)).pooler_output
            read += list(F.normalize(pooled.float(), dim=-1).cpu())
        places = {text: i for i, text in enumerate(distinct)}
        of_texts = torch.stack([read[places[text]] for text in texts])
        return (seen * of_texts).sum(-1).tolist()
