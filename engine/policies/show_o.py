"""Show-o: texts one token after another, images filled in, in one Phi with one table.

    drawing          t2i sot words eot | soi N places eoi                    the span sees itself whole, and the words
    understanding    mmu soi N codes eoi | sot USER: ... ASSISTANT: ...      up to eoi whole, then causal
    text alone       sot USER: ... ASSISTANT: ...

A drawing is a sequence of its own: its words are all that it knows. The released code pads them on the left to 129
positions and masks the padding; rotary positions are relative, so without it the numbers are the same, and longer
words are not cut. An image token is predicted at its own place.

What Sync-R1's released code asks without a picture it asks beside a black one; here such a prompt has none.

Source: Show-o (arXiv 2408.12528), its released `prompting_utils.py` and `modeling_showo.py`.

Dims: K codes, N image tokens, L tokens, D hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

from ..errors import DataError
from ..records import Prompt
from .attention_interface import ATTENTION_NAME
from .base import Head
from .chat_turns import render, user_turn
from .one_table import OneTablePolicy
from .probe import check_decoder, max_positions
from .show_o_model import MARKS, ShowOForUnifiedGeneration, ShowOProcessor


class ShowOPolicy(OneTablePolicy):
    """`ShowOForUnifiedGeneration` behind the `Policy` protocol.

    Args:
        model: the loaded checkpoint.
        processor: its `ShowOProcessor` (tokenizer, image processor).
    """

    model_class, processor_class = ShowOForUnifiedGeneration, ShowOProcessor
    decoding_order = "masked"
    image_marks = tuple(MARKS.values())

    def __init__(self, model: ShowOForUnifiedGeneration, processor: ShowOProcessor) -> None:
        super().__init__(model, processor)
        check_decoder("ShowOPolicy", self.decoder())
        model.showo.set_attn_implementation(ATTENTION_NAME)
        for module in model.showo.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "activation_fn", None), NewGELUActivation):
                # One pass and one activation kept, for eight passes and five: a fifth of a step of drawing on a CPU.
                module.activation_fn = nn.GELU(approximate="tanh")
        self.vqmodel.requires_grad_(False).eval()
        config = model.config
        config.take_tokens(self.tokenizer)
        self.max_positions = max_positions(model.showo, "ShowOPolicy")
        first, self.mask_token = config.text_rows, config.num_codes
        self._lay_out(range(first, first + config.num_codes), config.image_size)
        self.image_slot = config.mask_token_id
        rows = torch.cat([self._code_rows, self._code_rows.new_tensor([config.mask_token_id])])
        self.register_buffer("_code_rows", rows, persistent=False)

    @property
    def vqmodel(self) -> Any:
        return self.model.vqmodel

    def read_vqgan(self, name: str | Path, *, shapes_alone: bool = False) -> None:
        """It is among the model's own weights."""

    def _take_size(self, resolution: int) -> None:
        self.image_size, self.side = resolution, self.model.config.side
        self.num_image_tokens = self.side**2

    # Text -------------------------------------------------------------------------------------------------------------

    def _ids(self, *names: str) -> Tensor:
        """[n] int64: tokens of the configuration's names."""
        return torch.tensor([getattr(self.model.config, f"{name}_token_id") for name in names])

    def prompt_tokens(self, prompt: Prompt) -> Tensor:
        if prompt.segments[0] == "image":
            if prompt.images:
                raise DataError(
                    f"generate: prompt {prompt.id} shows a picture and asks for an image at once, expected words "
                    "alone: Show-o draws from words; leave the picture out, or let a text come first"
                )
            return self._asked(prompt.text)
        if len(prompt.images) > 1:
            raise DataError(
                f"generate: prompt {prompt.id} shows {len(prompt.images)} pictures, expected one: Show-o's questions "
                "are about one picture, which stands before them; leave the others out, or join them into one"
            )
        turn = user_turn(self.escape(prompt.words), shows_image=bool(prompt.images))
        words = self.encode(render(self.processor, [turn], self.template_kwargs))
        if not prompt.images:
            return torch.cat([self._ids("sot"), words])
        slots = torch.full((self.num_image_tokens,), self.image_slot)
        return torch.cat([self._ids("mmu", "soi"), slots, self._ids("eoi", "sot"), words])

    def _asked(self, words: str) -> Tensor:
        """[L] int64: what an image is drawn behind."""
        return torch.cat([self._ids("t2i", "sot"), self.encode(self.escape(words)), self._ids("eot")])

    def drawing_tokens(self, prompt: Prompt, text: str) -> Tensor:
        return self._asked(text)

    def unconditional_tokens(self, length: int | None = None) -> Tensor:
        """[L] int64: no words. Padding would not be seen, so a `length` changes nothing."""
        return self._ids("t2i", "sot", "eot")

    def image_frame(self) -> tuple[Tensor, Tensor]:
        return self._ids("soi"), self._ids("eoi")

    def whole_lead(self, tokens: Tensor) -> int:
        """Up to the end of the picture that is shown first."""
        start, end = self._ids("mmu", "eoi").tolist()
        return 1 + tokens.tolist().index(end) if int(tokens[0]) == start else 0

    def image_slots(self, tokens: Tensor) -> Tensor:
        return tokens == self.image_slot

    # Images -----------------------------------------------------------------------------------------------------------

    @property
    def cannot_draw(self) -> str:
        return ""

    def _encoded(self, images: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.vqmodel.latents(self.normalisation().pixels(images.float()))
        return self.vqmodel.quantize.codes(latents), latents.float().flatten(1)

    @torch.no_grad()
    def draw(self, tokens: Tensor) -> Tensor:
        return self.normalisation().images(self.vqmodel.decode(tokens, (self.side, self.side)))

    # The network ------------------------------------------------------------------------------------------------------

    def decoder(self) -> nn.Module:
        return self.model.showo.model

    def whole_head(self, hidden: Tensor) -> Head:
        head = self.model.get_output_embeddings()
        return Head(hidden, head.weight, head.bias, None)
