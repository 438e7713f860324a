"""Captioners: what does a drawing show?  One half of a cycle, from text to image and back to text.

Dims: n images.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from torch import Tensor
from transformers import BlipForConditionalGeneration, BlipImageProcessor

from ...pictures import MemoryImage
from ...policies.base import Policy
from ...records import Prompt
from ...rollout.sampler import generate
from ...rollout.sampling import Sampling
from .batches import check_images
from .pretrained import Preparation, Pretrained, frozen

Captioner = Callable[[Tensor], list[str]]
"""Images [n, 3, H, W] float in [0, 1] to n texts; an empty one where there is nothing to say."""

_ONE_AT_A_TIME = threading.Lock()
"""A rollout swaps modules of its policy's decoder for faster ones; captioners may share a policy."""

QUESTION = "Describe the image in one sentence."


class BlipCaptioner(Pretrained):
    """BLIP's captions, greedy: ULM-R1's first released captioner is `Salesforce/blip-image-captioning-base`.

    Args:
        model: put into eval mode.
        tokenizer: its own.
        preparation: of its image processor; images are prepared from tensors, on the model's device.
        max_new_tokens: of a caption.
        batch_size: images in one pass.
    """

    model_class, processor_class = BlipForConditionalGeneration, BlipImageProcessor

    def __init__(
        self,
        model: BlipForConditionalGeneration,
        tokenizer: Any,
        preparation: Preparation,
        *,
        max_new_tokens: int = 50,
        batch_size: int = 32,
    ) -> None:
        self.model, self.tokenizer, self.preparation = frozen(model), tokenizer, preparation
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[str]:
        """Images [n, 3, H, W] float in [0, 1] -> n captions.

        Raises:
            ValueError: see `check_images`.
        """
        check_images("blip", list(images))
        captions: list[str] = []
        for part in images.split(self.batch_size) if len(images) else ():
            pixels = self.preparation(part.to(self.model.device).float()).to(self.model.dtype)
            tokens = self.model.generate(
                pixel_values=pixels, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1
            )
            captions += self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [caption.strip() for caption in captions]


class PolicyCaptioner:
    """The policy's own captions: ULM-R1's later captioner, at temperature 1 and with at most 256 tokens.

    A policy that captions its own drawings while it learns can teach itself to say what it was asked for: give a frozen
    copy (`Policy.frozen_copy`). The policy in training works too, outside of its training step.

    Args:
        policy: a model that sees images.
        question: what it is asked about each.
        max_tokens: of a caption.
        temperature: 0 is greedy.
        seed: of a sampled caption; the same images, in the same order, then get the same captions.
        batch_size: images in one pass.
    """

    def __init__(
        self,
        policy: Policy,
        question: str = QUESTION,
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        self.policy, self.question, self.batch_size = policy, question, batch_size
        self.sampling = Sampling(
            num_generations=1, temperature=temperature, max_text_tokens=max_tokens, cfg_weight=1.0, seed=seed
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[str]:
        """Images [n, 3, H, W] float in [0, 1] -> n captions.

        Raises:
            ValueError: see `check_images`; or the question and its answer exceed the model's positions.
        """
        check_images("policy captioner", list(images))
        prompts = [
            Prompt(
                id=f"caption/{i}",
                task="caption",
                text=self.question,
                images=(MemoryImage(f"drawing {i}", image.clamp(0.0, 1.0)),),
                segments=("text",),
            )
            for i, image in enumerate(images)
        ]
        captions: list[str] = []
        with _ONE_AT_A_TIME:
            training = [module for module in self.policy.modules() if module.training]
            self.policy.eval()
            try:
                for start in range(0, len(prompts), self.batch_size):
                    rollouts = generate(self.policy, prompts[start : start + self.batch_size], self.sampling)
                    captions += [rollout.text.strip() for rollout in rollouts]
            finally:
                for module in training:
                    module.training = True
        return captions
