"""The smallest unified model that is one: what a new file of `engine/policies` needs, in the order of its writing.

A Llama whose vocabulary goes on behind its words with the codes of pictures. Its pictures are 4 x 4 blocks, each of one
of eight colours, so the codebook is a palette; real models have a VQ model there, and often a vision tower to see by.

Dims: T tokens, D hidden, N = 16 image tokens, K = 8 codes, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from syncr1.engine.policies.attention_interface import ATTENTION_NAME
from syncr1.engine.policies.base import Head, Policy
from syncr1.engine.policies.chat_turns import pieces_of
from syncr1.engine.policies.probe import check_decoder, max_positions
from syncr1.engine.policies.tokens import never_sampled
from syncr1.engine.records import Prompt, SegmentKind

SIDE, BLOCK = 4, 8
"""Blocks of a picture's side, pixels of a block's."""
PALETTE = [[r, g, b] for r in (0.0, 1.0) for g in (0.0, 1.0) for b in (0.0, 1.0)]
START, SLOT = "<image_start>", "<image>"


# transformers' part: of a published model it is there already --------------------------------------------------------


class BlocksConfig(LlamaConfig):
    model_type = "blocks"


class BlocksForConditionalGeneration(LlamaForCausalLM):
    config_class = BlocksConfig


AutoConfig.register("blocks", BlocksConfig)


# A file of its own -------------------------------------------------------------------------------------------


class BlocksPolicy(Policy):
    """`BlocksForConditionalGeneration` behind the `Policy` protocol."""

    model_class, processor_class = BlocksForConditionalGeneration, AutoTokenizer
    num_image_tokens, image_size = SIDE * SIDE, SIDE * BLOCK
    palette: Tensor
    forbidden: Tensor

    def __init__(self, model: BlocksForConditionalGeneration, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        check_decoder("BlocksPolicy", self.decoder())  # refuses sliding windows, soft caps, …, by name
        model.set_attn_implementation(ATTENTION_NAME)
        self.max_positions, self.num_words = max_positions(model, "BlocksPolicy"), len(tokenizer)
        self.image_start, self.image_slot = tokenizer.convert_tokens_to_ids([START, SLOT])
        never = never_sampled(model, tokenizer, self.control.values(), self.end_tokens, self.num_words)
        self.register_buffer("forbidden", torch.tensor(sorted(never)), persistent=False)
        self.register_buffer("palette", torch.tensor(PALETTE), persistent=False)

    # The four that every model has.

    def decoder(self) -> nn.Module:
        return self.model.model

    def prompt_tokens(self, prompt: Prompt) -> Tensor:
        return self._turn(pieces_of(prompt))

    def embed(self, tokens: Tensor, kind: SegmentKind) -> Tensor:
        return self.model.get_input_embeddings()(tokens + self.num_words * (kind == "image"))

    def head(self, hidden: Tensor, kind: SegmentKind) -> Head:
        weight = self.model.lm_head.weight
        if kind == "image":
            return Head(hidden, weight[self.num_words :], None, None)
        return Head(hidden, weight[: self.num_words], None, self.forbidden)

    def _turn(self, pieces: Sequence[str | None]) -> Tensor:
        said = (SLOT * self.num_image_tokens if piece is None else self.escape(piece) for piece in pieces)
        return self.encode(f"{self.tokenizer.bos_token}{''.join(said)}\n")

    # What a model that sees adds; a drawn picture needs no second look, its tokens are in the sequence.

    def image_slots(self, tokens: Tensor) -> Tensor:
        return tokens == self.image_slot

    def see(self, images: Tensor) -> Tensor:
        return self.embed(self.image_tokens(images), "image").detach()

    def vision_features(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images.float(), BLOCK).flatten(1)

    def follow_up_tokens(self, prompt: Prompt) -> Tensor:
        return self._turn([prompt.follow_up or ""])[1:]

    # What a model that draws adds.

    def unconditional_tokens(self, length: int | None = None) -> Tensor:
        words = [self.tokenizer.pad_token_id] * (0 if length is None else length - 2)
        return torch.tensor([self.tokenizer.bos_token_id, *words, self.image_start])

    def drawing_tokens(self, prompt: Prompt, text: str) -> Tensor:
        return torch.cat([self._turn([text])[1:], torch.tensor([self.image_start])])

    def image_tokens(self, images: Tensor) -> Tensor:
        colours = F.avg_pool2d(images.to(self.device).float(), BLOCK).flatten(2).mT
        return torch.cdist(colours, self.palette.float()).argmin(-1)

    def draw(self, tokens: Tensor) -> Tensor:
        blocks = self.palette.float()[tokens].mT.unflatten(2, (SIDE, SIDE))
        return blocks.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
