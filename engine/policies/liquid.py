"""Liquid: a plain language model whose table goes on behind its words with the codes of Chameleon's VQGAN.

    drawn or shown:  <boi>  1024 codes, row by row  <eoi>
    a drawing:       words " Generate an image based on this description."
    an answer:       <start_of_turn>user ... <end_of_turn> <start_of_turn>model

The row of a code is the number of the tokenizer's tokens plus the code; nothing else says which rows are codes. The
published checkpoint is the language model alone, a Gemma: the VQGAN lies beside it as a file (vqgan_files.py), and is
saved among the checkpoint's own weights.

Source: Liquid (arXiv 2412.04332) and its released inference and training code.

Dims: K codes, N image tokens, H codes of an image's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, PreTrainedModel

from ..errors import ConfigError
from ..pictures import Fit, to_tensor
from ..records import Prompt, SegmentKind
from .base import Head
from .causal_lm import CausalLMPolicy
from .chat_turns import follow_up_of, later_turn, pieces_of, render
from .kinds import LIQUID_TOKENS
from .one_table import OneTablePolicy
from .picture_fit import Normalisation, fit_of
from .vqgan_decoder import VQGANDecoder, geometry_of
from .vqgan_files import fill, own_tensors, published_tensors

ASKING = " Generate an image based on this description."
"""What Liquid's captions end with."""
TURN = "<start_of_turn>user\n{words}<end_of_turn>\n<start_of_turn>model\n"
"""Gemma's, which its base's tokenizer has as tokens and not as a template."""
BACKGROUND = (122, 116, 104)
"""Beside a photo that is no square, when it is shown."""
NUM_CODES, RESOLUTION = 8192, 512
"""Of the published VQGAN."""
PREFIX = "vqmodel."


class LiquidPolicy(OneTablePolicy, CausalLMPolicy):
    """A Liquid checkpoint behind the `Policy` protocol.

    Args:
        model: the language model; with a `vqmodel` in it, it sees, and draws with that one's `decoder`.
        tokenizer: its tokenizer, with `<boi>`, `<eoi>` and `<unconditional>`.

    Raises:
        ConfigError: as `CausalLMPolicy`, or a table without rows for all codes.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self.image_marks = LIQUID_TOKENS
        self.image_start, self.image_end, self.no_words = map(int, tokenizer.convert_tokens_to_ids([*LIQUID_TOKENS]))
        end_of_turn = tokenizer.get_vocab().get("<end_of_turn>")
        if end_of_turn is not None:  # trained on before <eos>: an answer is over with the first of the two
            self.end_tokens |= {int(end_of_turn)}
        self._lay_out_codes()

    def _lay_out_codes(self) -> None:
        """Rows of the codes, of which the VQGAN tells the number; without one there are as many as published."""
        tokens, rows = len(self.tokenizer), self.model.get_output_embeddings().weight.shape[0]
        config = None if self.vqmodel is None else self.vqmodel.config
        count = NUM_CODES if config is None else int(config.num_embeddings)
        if config is not None and tokens + count > rows:
            raise ConfigError(
                f"LiquidPolicy: expected {tokens + count} rows in the table, {tokens} tokens and {count} codes, got "
                f"{rows}; take the checkpoint and the VQGAN that belong together"
            )
        resolution = RESOLUTION if config is None else int(config.resolution)
        self._lay_out(range(tokens, min(tokens + count, rows)), resolution)
        self.image_slot = tokens

    @property
    def vqmodel(self) -> Any:
        return getattr(self.model, "vqmodel", None)

    def read_vqgan(self, name: str | Path, *, shapes_alone: bool = False) -> None:
        where: str | Path = name
        tensors = own_tensors(name, PREFIX, shapes_alone=shapes_alone)
        if tensors is not None and not tensors:
            found = published_tensors(name, shapes_alone=shapes_alone)
            if found is None:
                return
            tensors, where = found
        told = getattr(self.model.config, "vq_config", None)
        if told:
            config = ChameleonVQVAEConfig(**told)
        elif tensors is None:  # weights that are elsewhere; only shapes were asked for
            config = ChameleonVQVAEConfig()
        else:
            try:
                config = geometry_of({key: tensor.shape for key, tensor in tensors.items()}, RESOLUTION)
            except (KeyError, ValueError) as error:
                raise ConfigError(
                    f"model: {where}: expected Chameleon's VQGAN, encoder and decoder, got a file without "
                    f"{error}; take the released vqgan.ckpt"
                ) from error
        self.attach(config, tensors, where)

    def attach(self, config: ChameleonVQVAEConfig, tensors: dict[str, Tensor] | None, where: str | Path = "") -> None:
        """Gives the model its VQGAN, frozen, in the model's dtype.

        Args:
            config: of it.
            tensors: of both halves; None: it stays as it was made.
            where: they are from, for errors.
        """
        weight = self.model.get_output_embeddings().weight
        with torch.device(weight.device):
            vqmodel: Any = ChameleonVQVAE(config)
            vqmodel.decoder = VQGANDecoder(config)
        vqmodel.to(weight.dtype)
        if tensors is not None:
            fill(vqmodel, tensors, where)
        self.model.vqmodel = vqmodel.requires_grad_(False).eval()
        self.model.config.vq_config = config.to_dict()
        self._lay_out_codes()

    def whole_head(self, hidden: Tensor) -> Head:
        return CausalLMPolicy.head(self, hidden, "text")

    # Text -------------------------------------------------------------------------------------------------------------

    def prompt_tokens(self, prompt: Prompt) -> Tensor:
        """[L] int64: what is drawn from words alone is asked for bare, as Liquid learnt it; all else is a turn.

        Raises:
            ConfigError: the prompt shows an image, and the VQGAN is not there.
        """
        if prompt.images and self.vqmodel is None:
            self.no_images(f"see images (prompt {prompt.id})")
        if not prompt.images and prompt.segments[0] == "image":
            return self._behind_bos(self._asking(prompt.text))
        return self._behind_bos(self._answering(pieces_of(prompt)))

    def _asking(self, words: str) -> Tensor:
        return self.encode(self.escape(words) + ASKING)

    def _answering(self, pieces: Sequence[str | None], *, later: bool = False) -> Tensor:
        """[L] int64: a user's turn, and the opening of the answer; `later` it stands behind an answer.

        `pieces` as of `pieces_of`. A picture before all words has a line to itself, as Liquid's own code shows one.
        """
        start, end, _ = LIQUID_TOKENS
        said = ""
        leading = True
        for piece in pieces:
            leading = leading and piece is None
            said += self.escape(piece) if piece is not None else f"{start}{end}\n" if leading else f"{start}{end}"
        ids = self.without_bos(self.encode(self._turn(said, later=later)))
        if None not in pieces:
            return ids
        slots = ids.new_full((self.num_image_tokens,), self.image_slot)
        parts = ids.tensor_split(((ids == self.image_start).nonzero()[:, 0] + 1).tolist())
        return torch.cat([parts[0], *(part for rest in parts[1:] for part in (slots, rest))])

    def _turn(self, words: str, *, later: bool) -> str:
        if self.tokenizer.chat_template is None:
            return TURN.format(words=words)
        turn, arguments = {"role": "user", "content": words}, self.template_kwargs
        if not later:
            return render(self.tokenizer, [turn], arguments)
        ends = self.tokenizer.convert_ids_to_tokens(sorted(self.end_tokens))
        return later_turn(self.tokenizer, str, turn, arguments, ends)

    def drawing_tokens(self, prompt: Prompt, text: str) -> Tensor:
        """[L] int64: bare, as Liquid learnt to be asked for images."""
        ids = self.without_bos(self._asking(text))
        return torch.cat([ids, ids.new_tensor([self.image_start])])

    def follow_up_tokens(self, prompt: Prompt) -> Tensor:
        """The drawn image is closed and not shown again: Liquid understands the very tokens that it drew."""
        ids = self._answering([follow_up_of(prompt)], later=True)
        return torch.cat([ids.new_tensor([self.image_end, self.tokenizer.eos_token_id]), ids])

    def image_slots(self, tokens: Tensor) -> Tensor:
        """A row behind all tokens' stands for a shown image: no text has it."""
        return tokens == self.image_slot

    def unconditional_tokens(self, length: int | None = None) -> Tensor:
        """[L] int64: `<unconditional>` in the place of all words, as Liquid learnt on a share of its captions; with a
        `length` it stands in the place of each, which Liquid has not seen."""
        count = 1 if length is None else length - 2
        return torch.tensor([int(self.tokenizer.bos_token_id), *[self.no_words] * count, self.image_start])

    def fit(self) -> Fit:
        return fit_of(self.picture_fit, None, on_a_border)

    def normalisation(self) -> Normalisation:
        """Liquid has no image processor; its own code gives pixels in [-1, 1]."""
        return Normalisation(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    def embed(self, tokens: Tensor, kind: SegmentKind) -> Tensor:
        return OneTablePolicy.embed(self, tokens, kind)


def on_a_border(picture: Image.Image, size: int) -> Tensor:
    """[3, size, size] in [0, 1]: made square by a border and then scaled, as Liquid's own code shows photos."""
    side = max(picture.size)
    square = ImageOps.pad(picture, (side, side), color=BACKGROUND) if min(picture.size) < side else picture
    return to_tensor(square.resize((size, size), Image.Resampling.LANCZOS), size)
