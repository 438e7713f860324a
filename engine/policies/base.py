"""What the engine asks of a unified multimodal model.

A policy is one causal decoder with two vocabularies: text tokens through the text head, image tokens through the image
head.  Everything else (sampling, packing, losses) is written against this protocol and knows no model by name.
A policy without an image vocabulary has `num_image_tokens` 0 and raises ValueError where images are asked of it.

Dims: T tokens, D hidden size, N image tokens, B rows, V vocabulary.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from ..pictures import ImageRef
from ..records import Prompt, SegmentKind
from .attention_interface import AttentionLayout
from .cache import CacheShape


@dataclass(frozen=True, slots=True)
class Head:
    """The last linear map of a vocabulary: `logits = hidden @ weight.T + bias`."""

    hidden: Tensor
    """[N, D'] what enters the last linear map (Janus's image head has a layer before it)."""
    weight: Tensor
    """[V, D']"""
    bias: Tensor | None
    """[V] or None."""
    forbidden: Tensor | None
    """[F] int64 ids that are never sampled: placeholders and control tokens. Not in log-probabilities either."""


class Policy(nn.Module, ABC):
    """A unified model as the engine sees it; an `nn.Module`, so that DeepSpeed can wrap it."""

    num_image_tokens: int
    """Tokens of one drawn image, `forced_image_tokens` among them."""
    image_size: int
    """Pixels of a drawn image's side."""
    end_tokens: frozenset[int]
    """Text ids that end a text segment."""
    image_start: int
    """Text id that hands over to image tokens; the first image token is predicted from it."""
    max_positions: int
    """Longest sequence that the position ids reach."""

    @abstractmethod
    def prompt_tokens(self, prompt: Prompt) -> Tensor:
        """[L] int64: the prompt through the model's chat template, image placeholders expanded."""

    @abstractmethod
    def image_slots(self, tokens: Tensor) -> Tensor:
        """[...] bool: where a row of `see` replaces the token's embedding."""

    @abstractmethod
    def unconditional_tokens(self) -> Tensor:
        """[L] int64: the prompt of the classifier-free branch, `image_start` included."""

    @abstractmethod
    def follow_up_tokens(self, prompt: Prompt) -> Tensor:
        """[L] int64: the turn that asks `prompt.follow_up` about the image just drawn, image placeholders expanded."""

    @abstractmethod
    def text_tokens(self, text: str) -> Tensor:
        """[L] int64: a text as the policy would have sampled it, its end token included."""

    @abstractmethod
    def decode_text(self, tokens: Tensor) -> str:
        """[L] int64 -> the text, special tokens removed."""

    @abstractmethod
    def see(self, images: Tensor) -> Tensor:
        """[n, 3, H, W] in [0, 1] -> [n, tokens, D] embeddings of the understanding path."""

    @abstractmethod
    def vision_features(self, images: Tensor) -> Tensor:
        """[n, 3, H, W] in [0, 1] -> [n, C] float32 for judging likeness."""

    @abstractmethod
    def image_tokens(self, images: Tensor) -> Tensor:
        """[n, 3, H, W] in [0, 1] -> [n, N] int64: the image vocabulary's codes of given images; `draw` inverts it."""

    def forced_image_tokens(self) -> Tensor | None:
        """[N] int64 on the CPU: tokens that stand in every image and are not sampled (ends of rows), -1 elsewhere.

        Ids that `embed` takes and `head` need not score. None: every token of an image is sampled.
        """
        return None

    @abstractmethod
    def embed(self, tokens: Tensor, kind: SegmentKind) -> Tensor:
        """[...] int64 -> [..., D]."""

    @abstractmethod
    def trunk(self, embeddings: Tensor, position_ids: Tensor, layout: AttentionLayout) -> Tensor:
        """[B, T, D], [B, T] -> [B, T, D] final hidden states."""

    @abstractmethod
    def head(self, hidden: Tensor, kind: SegmentKind) -> Head:
        """[N, D] -> the head of a vocabulary, ready for a fused op."""

    @abstractmethod
    def cache_shape(self) -> CacheShape:
        """What the decoder keeps of one token."""

    @abstractmethod
    def draw(self, tokens: Tensor) -> Tensor:
        """[n, N] int64 image ids -> [n, 3, H, W] float32 in [0, 1]."""

    @abstractmethod
    def load_images(self, paths: Sequence[ImageRef]) -> Tensor:
        """Pictures -> [n, 3, H, W] float32 in [0, 1], at the model's input size."""

    @abstractmethod
    def decoder(self) -> nn.Module:
        """transformers' decoder inside; `trunk` runs it."""

    def checkpoint_activations(self) -> None:
        """From now on training keeps one activation per layer and computes the others again in backward."""
        decoder: Any = self.decoder()
        # transformers renames it in version 6.
        name = "activation_checkpointing_enable" if hasattr(decoder, "activation_checkpointing_enable") else None
        getattr(decoder, name or "gradient_checkpointing_enable")({"use_reentrant": False})

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes weights (safetensors), config and processor in transformers' format."""

    def frozen_copy(self) -> Self:
        """The policy as it is now, for references and judges; it does not follow the training."""
        return copy.deepcopy(self).requires_grad_(False).eval()
