"""Emu3 through transformers' own classes: images are tokens of the text vocabulary, drawn and understood alike.

In the sequence, an image that is drawn or shown is

    BOI  "H*W"  wrapper  (W codes, EOL) x H  EOF  EOI

BOI is `image_start`; the size, the wrapper and the ends of rows are the same in every image and are not sampled: they
are `forced_image_tokens`.  EOF and EOI come with the turn that follows.  Images are squares of `image_size` pixels.

Emu3's processor gives a photo a grid of its own shape and size; here every image has one number of places, so a photo
is brought to the square: a square one as the processor would scale it, any other whole, on the processor's mean colour.

The image vocabulary is the codebook's ids 0 ... K-1, then K for EOL and one id for each token of the size and wrapper.

Source: Emu3 (arXiv 2409.18869); layout of `transformers.models.emu3` and its processor.

Dims: K codes, H = W side of an image in codes, N image tokens, D hidden, V rows of the embedding.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Self

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from torch import Tensor, nn
from transformers import Emu3ForConditionalGeneration, Emu3Processor

from ..errors import ConfigError
from ..pictures import Fit
from ..records import Prompt, SegmentKind
from .attention_interface import ATTENTION_NAME
from .base import Head, Policy
from .chat_turns import follow_up_of, later_turn, opening_turn, render, text_part, user_turn
from .halves import half_of, remarks_on_half
from .picture_fit import Whole, background_of, fit_of
from .probe import check_decoder
from .tokens import never_sampled

PIXELS_AT_ONCE = 1 << 20
"""Of images given to the VQ model at a time: it works on four frames of each, up to 256 channels at full size."""
PUBLISHED_IMAGE_AREA = 720 * 720
"""Pixels of an image where neither the configuration nor the processor gives them."""

HALVES: dict[str, SegmentKind] = {"gen": "image", "chat": "text"}
"""What a checkpoint's name says of it."""
CHECKPOINTS: dict[SegmentKind, str] = {"image": "BAAI/Emu3-Gen-hf", "text": "BAAI/Emu3-Chat-hf"}


class Emu3Policy(Policy):
    """transformers' `Emu3ForConditionalGeneration` behind the `Policy` protocol.

    Dropout is switched off (the published configuration has 0.1): log-probabilities of one update must come from one
    network.  The VQ model is frozen and stays in eval mode, because its batch norms would learn from what they see.

    Args:
        model: the loaded checkpoint.
        processor: its `Emu3Processor` (tokenizer, image processor, chat template).
        image_size: pixels of an image's side; None: the configuration's `image_area`, else the processor's,
            else the published 720 x 720.

    Raises:
        ValueError: a size that is no multiple of the VQ model's factor, or a vocabulary without all codes.
    """

    model_class, processor_class = Emu3ForConditionalGeneration, Emu3Processor
    _image_ids: Tensor
    _forbidden_text: Tensor

    def __init__(
        self, model: Emu3ForConditionalGeneration, processor: Emu3Processor, *, image_size: int | None = None
    ) -> None:
        super().__init__(model, processor)
        decoder = model.model.text_model
        check_decoder("Emu3Policy", decoder)
        decoder.set_attn_implementation(ATTENTION_NAME)
        for module in decoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.model.vqmodel.requires_grad_(False).eval()
        self.max_positions = int(model.config.text_config.max_position_embeddings)
        self.image_size, self.side = self._sizes(image_size)
        tokenizer = self.tokenizer
        self.image_start, self.image_slot = int(tokenizer.boi_token_id), int(tokenizer.image_token_id)
        control = {*self._lay_out_images(), *self.control.values()}
        vocabulary = model.lm_head.weight.shape[0]
        self._forbid_in_text(never_sampled(model, tokenizer, control, self.end_tokens, vocabulary))
        self.trained_for = half_of(model, HALVES)

    def _sizes(self, image_size: int | None) -> tuple[int, int]:
        """(pixels, codes) of an image's side; the size is noted in the configuration, so that `save` keeps it."""
        factor = int(self.model.model.vqmodel.spatial_scale_factor)
        if image_size is None:
            # The processor's attribute came with transformers 5.23.
            said = getattr(self.model.config, "image_area", None) or getattr(self.processor, "image_area", None)
            image_size = factor * round(float(said or PUBLISHED_IMAGE_AREA) ** 0.5 / factor)
        if image_size <= 0 or image_size % factor:
            raise ValueError(
                f"Emu3Policy: expected an image_size that is a positive multiple of {factor} pixels, got {image_size}"
            )
        self.model.config.image_area = image_size**2
        return image_size, image_size // factor

    def _lay_out_images(self) -> list[int]:
        """The image vocabulary's text ids, and which of an image's places are not sampled.

        Returns:
            Text ids of codes and of the end of a row; the digits of the size are words like others.
        """
        mapping = self.model.model.vocabulary_mapping
        size = self.model.config.vq_config.codebook_size
        missing = [code for code in range(size) if code not in mapping.img2bpe]
        if missing or mapping.eol_token_id is None:
            raise ConfigError(
                f"Emu3Policy: expected a vocabulary_map with {size} visual tokens and an end of row (<|extra_200|>), "
                f"got {size - len(missing)} of them and end of row {mapping.eol_token_id}; use a converted checkpoint "
                "(…-hf), whose configuration names its vocabulary"
            )
        codes, end_of_row = [int(mapping.img2bpe[code]) for code in range(size)], int(mapping.eol_token_id)
        head = self.encode(f"{self.side}*{self.side}{self.tokenizer.image_wrapper_token}").tolist()
        ids = torch.tensor([*codes, end_of_row, *head], device=self.device)
        self.register_buffer("_image_ids", ids, persistent=False)
        self._first_code = codes[0] if codes == list(range(codes[0], codes[0] + size)) else None
        self.num_codes = size
        row = [-1] * self.side + [size]
        # On the CPU whatever moves: packing wants it there, and sampling copies it once per phase.
        self._forced = torch.tensor([*range(size + 1, size + 1 + len(head)), *row * self.side])
        self.num_image_tokens = self._forced.numel()
        return [*codes, end_of_row]

    def _forbid_in_text(self, forbidden: set[int]) -> None:
        """Ids that a text never has; those at the vocabulary's end (the codes, as published) leave the head."""
        self._num_text = self.model.lm_head.weight.shape[0]
        while self._num_text - 1 in forbidden:
            self._num_text -= 1
        kept = sorted(i for i in forbidden if i < self._num_text)
        ids = torch.tensor(kept, dtype=torch.long, device=self.device)
        self.register_buffer("_forbidden_text", ids, persistent=False)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.model.model.vqmodel.eval()
        return self

    def remarks(self, plans: Collection[tuple[SegmentKind, ...]]) -> list[str]:
        return remarks_on_half("Emu3", self.trained_for, plans, CHECKPOINTS)

    # Text ------------------------------------------------------------------------------------------------------------

    def prompt_tokens(self, prompt: Prompt) -> Tensor:
        """[L] int64: what is drawn from words alone is asked for bare, as Emu3 learnt it; all else is a user's turn."""
        bare = not prompt.images and prompt.segments[0] == "image"
        turn = opening_turn(prompt, self.escape)
        text = self.escape(prompt.text) if bare else render(self.processor, [turn], self.template_kwargs)
        bos = self.tokenizer.bos_token  # what the processor puts before a text that has none
        return self._encoded(text if text.startswith(bos) else f"{bos}{text}")

    def _encoded(self, text: str) -> Tensor:
        """[L] int64, each image's placeholder framed and repeated for each of its places."""
        tokenizer = self.tokenizer
        framed = (
            f"{tokenizer.boi_token}{self.side}*{self.side}{tokenizer.image_wrapper_token}{tokenizer.image_token}"
            f"{tokenizer.eof_token}{tokenizer.eoi_token}"
        )
        ids = self.encode(text.replace(tokenizer.image_token, framed))
        return ids.repeat_interleave(torch.where(ids == self.image_slot, self.side * (self.side + 1), 1))

    def drawing_tokens(self, prompt: Prompt, text: str) -> Tensor:
        """[L] int64: bare, as Emu3 learnt to be asked for images; see `prompt_tokens`."""
        ids = self.without_bos(self.encode(self.escape(text)))
        return torch.cat([ids, ids.new_tensor([self.image_start])])

    def follow_up_tokens(self, prompt: Prompt) -> Tensor:
        """The drawn image is closed and not shown again: Emu3 understands the very tokens that it drew."""
        tokenizer, turn = self.tokenizer, user_turn(self.escape(follow_up_of(prompt)), shows_image=False)
        ends = tokenizer.convert_ids_to_tokens(sorted(self.end_tokens))
        ids = self.without_bos(self._encoded(later_turn(self.processor, text_part, turn, self.template_kwargs, ends)))
        closing = [tokenizer.eof_token_id, tokenizer.eoi_token_id, *self.text_tokens("").tolist()]
        return torch.cat([ids.new_tensor(closing), ids])

    def image_slots(self, tokens: Tensor) -> Tensor:
        return tokens == self.image_slot

    def unconditional_tokens(self, length: int | None = None) -> Tensor:
        """[L] int64: no words; Emu3 was trained so on a share of its captions.

        With a `length` padding stands for them, which it has not seen in training. What its authors draw beside is
        neither: a fixed list of faults, "lowres, bad anatomy, …".
        """
        tokenizer = self.tokenizer
        num_pads = 0 if length is None else length - 2
        pads = [int(tokenizer.pad_token_id)] * num_pads
        return torch.tensor([int(tokenizer.bos_token_id), *pads, self.image_start])

    # Images ----------------------------------------------------------------------------------------------------------

    def forced_image_tokens(self) -> Tensor:
        return self._forced

    @torch.no_grad()
    def _encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[n, 3, S, S] in [0, 1] -> ([n, H, W] int64 codes, [n, C] float32 what the codes were chosen by)."""
        vqmodel = self.model.model.vqmodel
        weight = vqmodel.quantize.embedding.weight
        normalisation = self.normalisation()
        sizes = [images.shape[-2:]]
        codes, latents = [], []
        for part in images.split(self._images_at_once()):
            pixels = normalisation.pixels(part.to(device=weight.device)).to(weight.dtype)
            out = vqmodel.encode(pixels, sizes * len(part), return_dict=True)
            codes.append(torch.stack(list(out.image_tokens)).long())
            latents.append(out.last_hidden_state.float().flatten(1))
        return torch.cat(codes), torch.cat(latents)

    def _images_at_once(self) -> int:
        return max(1, PIXELS_AT_ONCE // self.image_size**2)

    def fit(self) -> Fit:
        """The processor's filter and background, on our square; see the module."""
        processor = self.processor.image_processor
        own = Whole(background_of(processor), int(processor.resample)) if processor.do_resize else None
        return fit_of(self.picture_fit, processor, own)

    def see(self, images: Tensor) -> Tensor:
        """[n, 3, H, W] in [0, 1] -> [n, H (W + 1), D] embeddings of the images' tokens, ends of rows included.

        They are the policy's own embeddings as they are now; training takes them as given, as it does a tower's.
        """
        tokens = self.image_tokens(images)[:, -self.side * (self.side + 1) :]
        return self.embed(tokens.to(self.device), "image").detach()

    def vision_features(self, images: Tensor) -> Tensor:
        """[n, 3, H, W] in [0, 1] -> [n, C] float32 the VQ encoder's output place by place, near to pixels: Emu3 has no
        other eye."""
        return self._encode_images(images)[1]

    @torch.no_grad()
    def image_tokens(self, images: Tensor) -> Tensor:
        """[n, 3, H, W] in [0, 1] -> [n, N] int64: the codes of given images, and what is not sampled between them."""
        codes = self._encode_images(images)[0]
        tokens = self._forced.to(codes.device).repeat(codes.shape[0], 1)
        tokens[:, (self._forced < 0).to(codes.device)] = codes.flatten(1)
        return tokens

    @torch.no_grad()
    def draw(self, tokens: Tensor) -> Tensor:
        """[n, N] int64 image ids -> [n, 3, H, W] float32 in [0, 1]; what is not sampled is left out."""
        free = (self._forced < 0).nonzero().squeeze(1).to(tokens.device)  # places, which need no number on `meta`
        codes = tokens[:, free].view(-1, self.side, self.side)
        decode = self.model.model.vqmodel.decode
        pixels = torch.cat([decode(part).float() for part in codes.split(self._images_at_once())])
        return self.normalisation().images(pixels)

    # The network -----------------------------------------------------------------------------------------------------

    def embed(self, tokens: Tensor, kind: SegmentKind) -> Tensor:
        ids = self._image_ids[tokens] if kind == "image" else tokens
        return self.model.model.text_model.embed_tokens(ids)

    def decoder(self) -> nn.Module:
        return self.model.model.text_model

    def head(self, hidden: Tensor, kind: SegmentKind) -> Head:
        """One matrix, two vocabularies: the codes' rows, and the rows before them."""
        weight = self.model.lm_head.weight
        if kind == "text":
            return Head(hidden, weight[: self._num_text], None, self._forbidden_text)
        if self._first_code is None:
            return Head(hidden, weight[self._image_ids[: self.num_codes]], None, None)
        return Head(hidden, weight[self._first_code : self._first_code + self.num_codes], None, None)
