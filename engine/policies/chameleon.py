"""Chameleon and Anole through transformers' own class: images are rows of the text vocabulary, found by their names.

    drawn or shown:  <racm3:break>  1024 codes, row by row  <eoss>
    a turn:          words  <reserved08706>

transformers' forward gives the codes' logits the lowest value there is, so that its `generate` only writes; heads here
take the rows of `lm_head` themselves. The VQGAN's decoder is ours (vqgan_decoder.py), since transformers has none.

Source: Chameleon (arXiv 2405.09818), Anole (arXiv 2407.06135); layout of `transformers.models.chameleon` and of the
released inference code: a drawing is asked for like an answer, and guided beside BOS and the image's start alone.

Dims: K codes, N image tokens, H codes of an image's side.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from torch import Tensor, nn
from transformers import ChameleonForConditionalGeneration, ChameleonProcessor

from ..errors import ConfigError
from ..records import Prompt, SegmentKind
from .attention_interface import ATTENTION_NAME
from .chat_turns import follow_up_of, later_turn, opening_turn, render, text_part, user_turn
from .kinds import called
from .one_table import OneTablePolicy
from .probe import check_decoder
from .vqgan_decoder import VQGANDecoder
from .vqgan_files import fill, own_tensors, published_tensors

CODE_PART = "IMG"
"""What the names of codes begin with, twice; a user's words cannot have one."""
DECODER = "decoder."


class ChameleonPolicy(OneTablePolicy):
    """transformers' `ChameleonForConditionalGeneration` behind the `Policy` protocol.

    Args:
        model: the loaded checkpoint; with a `decoder` in its VQGAN it draws.
        processor: its `ChameleonProcessor` (tokenizer, image processor).

    Raises:
        ConfigError: a vocabulary without all codes, or a processor that counts another number of tokens per image.
    """

    model_class, processor_class = ChameleonForConditionalGeneration, ChameleonProcessor

    def __init__(self, model: ChameleonForConditionalGeneration, processor: ChameleonProcessor) -> None:
        super().__init__(model, processor)
        check_decoder("ChameleonPolicy", model.model)
        model.set_attn_implementation(ATTENTION_NAME)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.vqmodel.requires_grad_(False).eval()
        self.max_positions = int(model.config.max_position_embeddings)
        self.image_marks = (processor.image_start_token, processor.image_end_token, processor.image_token)
        marks = self.tokenizer.convert_tokens_to_ids(list(self.image_marks))
        self.image_start, self.image_end, self.image_slot = map(int, marks)
        self._lay_out(self._codes(), int(model.config.vq_config.resolution))
        if self.num_image_tokens != processor.image_seq_length:
            raise ConfigError(
                f"ChameleonPolicy: expected image_seq_length {self.num_image_tokens}, as the VQGAN has {self.side} x "
                f"{self.side} codes, got {processor.image_seq_length}; correct processor_config.json"
            )

    @property
    def vqmodel(self) -> Any:
        return self.model.model.vqmodel

    def _codes(self) -> list[int]:
        """[K] row of each code."""
        mapping, size = self.model.model.vocabulary_mapping, self.vqmodel.config.num_embeddings
        missing = [code for code in range(size) if code not in mapping.img2bpe]
        if missing:
            raise ConfigError(
                f"ChameleonPolicy: expected a vocabulary_map with {size} codes ({2 * CODE_PART}…), got "
                f"{size - len(missing)} of them; use a converted checkpoint (facebook/chameleon-7b, "
                "leloy/Anole-7b-v0.1-hf)"
            )
        return [int(mapping.img2bpe[code]) for code in range(size)]

    def read_vqgan(self, name: str | Path, *, shapes_alone: bool = False) -> None:
        """The decoder alone: its other half is among the model's own weights, and must be of the same VQGAN."""
        where: str | Path = name
        tensors = own_tensors(name, f"model.vqmodel.{DECODER}", shapes_alone=shapes_alone)
        if tensors is not None and not tensors:
            found = published_tensors(name, shapes_alone=shapes_alone)
            if found is None:
                return
            whole, where = found
            self._check_codebook(whole, where)
            tensors = {key.removeprefix(DECODER): x for key, x in whole.items() if key.startswith(DECODER)}
        weight = self.vqmodel.quantize.embedding.weight
        decoder = VQGANDecoder(self.vqmodel.config).to(device=weight.device, dtype=weight.dtype)
        if tensors is not None:  # else the weights are elsewhere, and only shapes were asked for
            fill(decoder, tensors, where)
        self.vqmodel.decoder = decoder.requires_grad_(False).eval()

    def _check_codebook(self, whole: dict[str, Tensor], where: str | Path) -> None:
        own, other = self.vqmodel.quantize.embedding.weight, whole.get("quantize.embedding.weight")
        if other is None or own.is_meta or other.is_meta:
            return
        if own.shape != other.shape or not torch.equal(own, other.to(own.dtype)):
            raise ConfigError(
                f"model: {where}: expected the VQGAN of this checkpoint, got one with another codebook; take the file "
                "of the release that it was converted from"
            )

    def remarks(self, plans: Collection[tuple[SegmentKind, ...]]) -> list[str]:
        if self.cannot_draw:
            return [f"Chameleon: {self.cannot_draw}"] * any("image" in plan for plan in plans)
        name = called(getattr(self.model, "name_or_path", None) or "")
        if "chameleon" not in name or "anole" in name or not any("image" in plan for plan in plans):
            return []
        return [
            "Chameleon was released so that it does not draw, and Anole is it, taught to again; nothing but its name "
            "tells which one a checkpoint is: look at the first drawings of this one"
        ]

    # Text -------------------------------------------------------------------------------------------------------------

    def escape(self, words: str) -> str:
        return re.sub(f"{CODE_PART}(?={CODE_PART})", f"{CODE_PART} ", super().escape(words))

    def prompt_tokens(self, prompt: Prompt) -> Tensor:
        turn = opening_turn(prompt, self.escape)
        if self.processor.chat_template is None:
            return self._behind_bos(self._expanded(self._bare(turn)))
        return self._behind_bos(self._expanded(render(self.processor, [turn], self.template_kwargs)))

    def _bare(self, turn: dict[str, Any]) -> str:
        """A turn as the processor has it: images and words, and what separates turns."""
        parts = [part.get("text", self.processor.image_token) for part in turn["content"]]
        return f"{''.join(parts)}{self.tokenizer.sep_token or ''}"

    def _expanded(self, text: str) -> Tensor:
        """[L] int64, each image's placeholder framed and repeated for each of its places."""
        processor, image = self.processor, self.processor.image_token
        slots = f"{processor.image_start_token}{image * self.num_image_tokens}{processor.image_end_token}"
        return self.encode(text.replace(image, slots))

    def _later(self, words: str) -> Tensor:
        """[L] int64: a turn behind an answer."""
        turn = user_turn(self.escape(words), shows_image=False)
        if self.processor.chat_template is None:
            return self.without_bos(self._expanded(self._bare(turn)))
        ends = self.tokenizer.convert_ids_to_tokens(sorted(self.end_tokens))
        text = later_turn(self.processor, text_part, turn, self.template_kwargs, ends)
        return self.without_bos(self._expanded(text))

    def drawing_tokens(self, prompt: Prompt, text: str) -> Tensor:
        ids = self._later(text)
        return torch.cat([ids, ids.new_tensor([self.image_start])])

    def follow_up_tokens(self, prompt: Prompt) -> Tensor:
        """The drawn image is closed and not shown again: Chameleon understands the very tokens that it drew."""
        ids = self._later(follow_up_of(prompt))
        return torch.cat([ids.new_tensor([self.image_end, *self.text_tokens("").tolist()]), ids])

    def image_slots(self, tokens: Tensor) -> Tensor:
        return tokens == self.image_slot

    def unconditional_tokens(self, length: int | None = None) -> Tensor:
        """[L] int64: BOS and the image's start, as the released code draws beside; with a `length` padding stands
        between them, which Chameleon has not seen there in training."""
        tokenizer = self.tokenizer
        pads = [int(tokenizer.pad_token_id)] * (0 if length is None else length - 2)
        return torch.tensor([int(tokenizer.bos_token_id), *pads, self.image_start])

    # The network ------------------------------------------------------------------------------------------------------

    def decoder(self) -> nn.Module:
        return self.model.model
