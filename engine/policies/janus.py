"""Janus and Janus-Pro through transformers' own classes; any size, tiny or 7B, by the same code.

transformers' `generate` is not used: it prefills once per sample, and it returns no usable log-probabilities of image
tokens.  Images are understood through the vision tower (`see`) and drawn through the VQ codebook (`draw`).

Source: Janus-Pro (arXiv 2501.17811); module names of `transformers.models.janus`.
"""

from __future__ import annotations

from functools import cached_property

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoProcessor, JanusForConditionalGeneration
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

from ..pictures import MemoryImage
from ..records import Prompt, SegmentKind
from .attention_interface import ATTENTION_NAME
from .base import Head, Policy
from .chat_turns import follow_up_of, later_turn, opening_turn, render, text_part, user_turn
from .probe import check_decoder
from .tokens import ids_of, never_sampled

FEWEST_DRAWN = 32
"""Pictures that the VQ decoder is given at least, where there are so many: with fewer than about 16 its convolutions
round in another way, and the last bit of a picture would follow from how many of a batch are alike."""
UNCONDITIONAL_PADS = 4
"""Padding tokens between BOS and the image start in the classifier-free branch. Janus-Pro replaces a dropped caption by
as many pads as it had tokens, so any number is in distribution; a fixed one lets the whole batch share one prefill."""


class JanusPolicy(Policy):
    """transformers' `JanusForConditionalGeneration` behind the `Policy` protocol.

    Args:
        model: the loaded checkpoint.
        processor: its `JanusProcessor` (tokenizer, image processor, chat template).
        freeze_vision: no gradients for the vision tower, its aligner and the VQ model.

    Raises:
        ValueError: the language model does something that packed layouts cannot express (a sliding window, …).
    """

    model_class, processor_class = JanusForConditionalGeneration, AutoProcessor
    _forbidden_text: Tensor
    _forbidden_image: Tensor | None

    def __init__(
        self, model: JanusForConditionalGeneration, processor: AutoProcessor, *, freeze_vision: bool = True
    ) -> None:
        super().__init__(model, processor)
        decoder = model.model.language_model
        check_decoder("JanusPolicy", decoder)
        decoder.set_attn_implementation(ATTENTION_NAME)
        if freeze_vision:
            for part in (model.model.vision_model, model.model.aligner):
                part.requires_grad_(False)
        model.model.vqmodel.requires_grad_(False)
        self.num_image_tokens = model.model.vqmodel.quantize.quant_state_dims[0] ** 2
        self.image_size = int(model.config.vision_config.image_size)
        # Of the model, not of the processor, which counts 576 whatever the model before transformers 5.14.
        self.num_image_slots = (self.image_size // int(model.config.vision_config.patch_size)) ** 2
        self.max_positions = int(model.config.text_config.max_position_embeddings)
        tokenizer = self.tokenizer
        self.image_start = int(tokenizer.convert_tokens_to_ids(tokenizer.boi_token))
        self.image_slot = int(model.config.image_token_id)
        self._end_of_image = int(tokenizer.convert_tokens_to_ids(tokenizer.eoi_token))
        control = {self.image_slot, self.image_start, self._end_of_image, *self.control.values()}
        vocabulary = model.lm_head.weight.shape[0]
        never = never_sampled(model, tokenizer, control, self.end_tokens, vocabulary)
        self.register_buffer("_forbidden_text", torch.tensor(sorted(never), dtype=torch.long), persistent=False)
        # Rows without a code would draw nothing; transformers makes none.
        rows = model.model.generation_head.vision_head.out_features
        codes = model.model.vqmodel.quantize.embedding.num_embeddings
        beyond = torch.arange(codes, rows) if rows > codes else None
        self.register_buffer("_forbidden_image", beyond, persistent=False)

    # Prompts ----------------------------------------------------------------------------------------------------------

    def prompt_tokens(self, prompt: Prompt) -> Tensor:
        """[L] int64: what `JanusProcessor` makes of it.

        Where the answer is a text it begins with the default system prompt, if the checkpoint has that; where an image
        is drawn at once (`generation_mode="image"`) it does not, and `image_start`, which follows, is not in it.
        """
        turn = opening_turn(prompt, self.escape)
        text = self._expanded(render(self.processor, [turn], self.template_kwargs))
        bos = self.tokenizer.bos_token
        # As transformers' own: a template that writes BOS has it once, wherever the system prompt puts it.
        adds = bos is None or not text.startswith(bos)
        if prompt.segments[0] == "image":
            ids = self._encoded(f"{text}{self.tokenizer.boi_token}", adds)
            return ids[:-1]
        system = DEFAULT_SYSTEM_PROMPT if getattr(self.processor, "use_default_system_prompt", False) else ""
        return self._encoded(f"{system}{text}", adds)

    def drawing_tokens(self, prompt: Prompt, text: str) -> Tensor:
        ids = self._later(text, shows_image=False)
        return torch.cat([ids, ids.new_tensor([self.image_start])])

    def follow_up_tokens(self, prompt: Prompt) -> Tensor:
        """The drawn image is closed and shown again: Janus understands through its vision tower, not its VQ codes."""
        ids = self._later(follow_up_of(prompt), shows_image=True)
        return torch.cat([ids.new_tensor([self._end_of_image, *self.text_tokens("").tolist()]), ids])

    def _later(self, words: str, *, shows_image: bool) -> Tensor:
        """[L] int64: a turn behind an answer: no second BOS, and no second system prompt."""
        ends = self.tokenizer.convert_ids_to_tokens(sorted(self.end_tokens))
        turn = user_turn(self.escape(words), shows_image=shows_image)
        text = later_turn(self.processor, text_part, turn, self.template_kwargs, ends)
        return self.without_bos(self.encode(self._expanded(text)))

    def _expanded(self, text: str) -> str:
        """One placeholder for each of every image's places, between the tokens that begin and end it."""
        tokenizer = self.tokenizer
        slots = tokenizer.image_token * self.num_image_slots
        return text.replace(tokenizer.image_token, f"{tokenizer.boi_token}{slots}{tokenizer.eoi_token}")

    def _encoded(self, text: str, add_special_tokens: bool) -> Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids, dtype=torch.long)

    def image_slots(self, tokens: Tensor) -> Tensor:
        return tokens == self.image_slot

    def unconditional_tokens(self, length: int | None = None) -> Tensor:
        """Padding in the place of every token between BOS and the image start, as Janus draws."""
        num_pads = UNCONDITIONAL_PADS if length is None else length - 2
        (bos, *_), (pad, *_) = self._special("bos_token_id"), self._special("pad_token_id")
        first = bos if length is None or self._begins_with == bos else pad
        return torch.tensor([first, *[pad] * num_pads, self.image_start])

    @cached_property
    def _begins_with(self) -> int:
        """The first token of a prompt that draws: BOS, but for a checkpoint whose tokenizer and template have none."""
        return int(self.prompt_tokens(Prompt(id="", task="", text="a", segments=("image",)))[0])

    def _special(self, name: str) -> list[int]:
        """Ids under a name as transformers' `generate` finds them, else an end of text as it takes for padding."""
        configured = ids_of(getattr(self.model.generation_config, name, None))
        return configured or ids_of(getattr(self.tokenizer, name)) or sorted(self.end_tokens)

    # Images -----------------------------------------------------------------------------------------------------------

    def see(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self.image_size, self.image_size):  # drawn by a VQ model of another size
            images = self.load_images([MemoryImage("a drawn image", image) for image in images])
        parameter = self.model.lm_head.weight
        pixels = self.normalisation().pixels(images).to(device=parameter.device, dtype=parameter.dtype)
        return self.model.model.get_image_features(pixels, return_dict=True).pooler_output

    def vision_features(self, images: Tensor) -> Tensor:
        """[n, 3, H, W] in [0, 1] -> [n, C] what the language model sees of an image, patch by patch, for likeness.

        Pooling over patches would be blind to arrangement: within groups of the rendered world it correlates .45 with
        the attributes that are right, patch by patch .68 (measured).
        """
        return self.see(images).float().flatten(1)

    def embed(self, tokens: Tensor, kind: SegmentKind) -> Tensor:
        if kind == "image":
            return self.model.prepare_embeddings_for_image_generation(tokens)
        return self.model.model.language_model.embed_tokens(tokens)

    def decoder(self) -> nn.Module:
        return self.model.model.language_model

    def head(self, hidden: Tensor, kind: SegmentKind) -> Head:
        if kind == "text":
            return Head(hidden, self.model.lm_head.weight, self.model.lm_head.bias, self._forbidden_text)
        image_head = self.model.model.generation_head
        hidden = image_head.activation_fn(image_head.proj_out(hidden))
        return Head(hidden, image_head.vision_head.weight, image_head.vision_head.bias, self._forbidden_image)

    @torch.no_grad()
    def draw(self, tokens: Tensor) -> Tensor:
        if len(tokens) < FEWEST_DRAWN or tokens.device.type == "meta":  # which has no numbers that could be alike
            return self._decoded(tokens)
        # A group's previews are alike: of 120 pictures of the tiny world 15 differ.
        different, places = tokens.unique(dim=0, return_inverse=True)
        padding = tokens[: max(0, FEWEST_DRAWN - len(different))]
        return self._decoded(torch.cat([different, padding]))[places]

    def _decoded(self, tokens: Tensor) -> Tensor:
        pixels = self.model.model.vqmodel.decode(tokens)
        return self.normalisation().images(pixels.float())

    @torch.no_grad()
    def image_tokens(self, images: Tensor) -> Tensor:
        """[n, 3, H, W] in [0, 1] -> [n, N] int64: the VQ codes of given images, targets of supervised training.

        The nearest code by direction, as the codebook was trained and as `decode` reads it: transformers' `encode`
        compares lengths as well, which gives other codes wherever the codebook's rows are not of length 1.
        """
        vq = self.model.model.vqmodel
        codes = normalize(vq.quantize.embedding.weight, dim=-1)
        pixels = self.normalisation().pixels(images).to(device=codes.device, dtype=codes.dtype)
        found = normalize(vq.quant_conv(vq.encoder(pixels)).permute(0, 2, 3, 1).flatten(0, 2), dim=-1)
        distances = found.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * found @ codes.T
        return distances.argmin(1).view(images.shape[0], -1)
