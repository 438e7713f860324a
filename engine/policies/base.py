"""What the engine asks of a unified multimodal model.

A policy is one causal decoder with two vocabularies: text tokens through the text head, image tokens through the image
head.  Everything else (sampling, packing, losses) is written against this protocol and knows no model by name.

A new model says four things, `decoder`, `prompt_tokens`, `embed` and `head`, and where it draws the image methods as
well; until then those raise ConfigError, and `num_image_tokens` is 0. `CONTRIBUTING.md` goes through it in order.

Dims: T tokens, D hidden size, N image tokens, B rows, V vocabulary.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig

from ..errors import ConfigError
from ..pictures import Fit, ImageRef, load_pictures
from ..reasons import reading
from ..records import DecodingOrder, Prompt, SegmentKind
from ..settings.train_config import PictureFit
from .attention_interface import AttentionLayout
from .cache import CacheShape
from .kinds import DRAWING
from .lora import merged
from .picture_fit import Normalisation, fit_of
from .tokens import control_tokens, end_tokens, escape_control_tokens


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
    """A unified model as the engine sees it; an `nn.Module`, so that DeepSpeed can wrap it.

    Args:
        model: of transformers, loaded.
        processor: its processor, or its tokenizer where it has no other.
    """

    model_class: ClassVar[Any]
    """transformers' class of the checkpoint."""
    processor_class: ClassVar[Any]
    """transformers' class of what stands beside it: processor or tokenizer."""

    num_image_tokens: int = 0
    """Tokens of one drawn image, `forced_image_tokens` among them; 0: it draws none."""
    image_size: int = 0
    """Pixels of a drawn image's side."""
    decoding_order: DecodingOrder = "raster"
    """`masked`: an image is filled in, in a sequence of its own: a turn that asks for it (`drawing_tokens`, or a prompt
    that begins with the image), and behind it a span that sees itself whole, `image_frame` around the tokens."""
    mask_token: int = -1
    """Image id of a place that is not filled in yet."""
    image_start: int = -1
    """Text id that hands over to image tokens; the first image token is predicted from it."""
    end_tokens: frozenset[int]
    """Text ids that end a text segment: all that the generation configuration lists, and the tokenizer's."""
    control: dict[str, int]
    """Text -> id of the tokenizer's structural tokens (tokens.py)."""
    max_positions: int
    """Longest sequence that the position ids reach."""
    picture_fit: PictureFit = "processor"
    """How `load_images` brings a picture to the model's size; as in the setting."""
    template_kwargs: Mapping[str, Any]
    """Arguments of the chat template beside the conversation."""

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.tokenizer: Any = getattr(processor, "tokenizer", processor)
        self.control = control_tokens(self.tokenizer, getattr(processor, "chat_template", None))
        self._structural = frozenset(self.control.values())
        self.end_tokens = end_tokens(model, self.tokenizer)
        self.template_kwargs = {}

    # What only the model knows ----------------------------------------------------------------------------------------

    @abstractmethod
    def decoder(self) -> nn.Module:
        """transformers' decoder inside; `trunk` runs it."""

    @abstractmethod
    def prompt_tokens(self, prompt: Prompt) -> Tensor:
        """[L] int64: the prompt through the model's chat template, image placeholders expanded."""

    @abstractmethod
    def embed(self, tokens: Tensor, kind: SegmentKind) -> Tensor:
        """[...] int64 -> [..., D]."""

    @abstractmethod
    def head(self, hidden: Tensor, kind: SegmentKind) -> Head:
        """[N, D] -> the head of a vocabulary, ready for a fused op."""

    # The network ------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.cache_shape().device

    def trunk(self, embeddings: Tensor, position_ids: Tensor, layout: AttentionLayout) -> Tensor:
        """[B, T, D], [B, T] -> [B, T, D] final hidden states."""
        decoder = self.decoder()
        return decoder(
            inputs_embeds=embeddings, position_ids=position_ids, layout=layout, use_cache=False
        ).last_hidden_state

    def cache_shape(self) -> CacheShape:
        """What the decoder keeps of one token."""
        config: Any = self.decoder().config
        weight = self.model.get_output_embeddings().weight
        return CacheShape(
            num_layers=config.num_hidden_layers,
            num_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=weight.dtype,
            device=weight.device,
        )

    def checkpoint_activations(self) -> None:
        """From now on training keeps one activation per layer and computes the others again in backward."""
        decoder: Any = self.decoder()
        # transformers renames it in version 6.
        name = "activation_checkpointing_enable" if hasattr(decoder, "activation_checkpointing_enable") else None
        getattr(decoder, name or "gradient_checkpointing_enable")({"use_reentrant": False})

    # Text -------------------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> Tensor:
        """[L] int64: a text's ids, nothing added."""
        return torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)

    def text_tokens(self, text: str) -> Tensor:
        """[L] int64: a text as the policy would have sampled it, its end token included."""
        ids = self.encode(text)
        return torch.cat([ids, ids.new_tensor([self.tokenizer.eos_token_id])])

    def decode_text(self, tokens: Tensor) -> str:
        """[L] int64 -> the text, structural tokens removed; tags that are special tokens (`<think>`) stay."""
        kept = [index for index in tokens.tolist() if index not in self._structural]
        return str(self.tokenizer.decode(kept, skip_special_tokens=False)).strip()

    def escape(self, words: str) -> str:
        """A user's words without structural tokens, as every prompt holds them."""
        return escape_control_tokens(words, self.tokenizer, self.control)

    def without_bos(self, ids: Tensor) -> Tensor:
        """[L] int64 ids of a turn that others stand before: BOS is theirs."""
        return ids[1:] if ids.numel() and int(ids[0]) == self.tokenizer.bos_token_id else ids

    # What may be asked of it ------------------------------------------------------------------------------------------

    @property
    def cannot_draw(self) -> str:
        """Why nobody may ask it for an image, and the remedy; empty where it draws."""
        if self.num_image_tokens:
            return ""
        return (
            f"{type(self).__name__} draws none; use {DRAWING}, or ask for text: "
            "segments ('text',), or a question with its answer"
        )

    def remarks(self, plans: Collection[tuple[SegmentKind, ...]]) -> list[str]:
        """What is worth knowing of this checkpoint before it follows such plans, a line each; most have nothing.

        Args:
            plans: `segments` of the prompts that it is about to get.
        """
        return []

    # Images, of a model that draws or sees ---------------------------------------------------------------------------

    def image_frame(self) -> tuple[Tensor, Tensor]:
        """([a], [b]) int64 text ids before and behind the tokens of an image that is filled in."""
        self.no_images("fill in an image")

    def whole_lead(self, tokens: Tensor) -> int:
        """How many of a prompt's first tokens [L] see each other whole; those behind them see what lies before."""
        return 0

    def image_slots(self, tokens: Tensor) -> Tensor:
        """[...] bool: where a row of `see` replaces the token's embedding."""
        return torch.zeros_like(tokens, dtype=torch.bool)

    def unconditional_tokens(self, length: int | None = None) -> Tensor:
        """[L] int64: the prompt of the classifier-free branch, `image_start` included.

        Args:
            length: tokens that it is to have, at least 2, in place of a prompt of as many: then the image stands at the
                same positions in both branches. None: the model's own, the same beside every prompt.
        """
        self.no_images("guide the drawing of images")

    def drawing_tokens(self, prompt: Prompt, text: str) -> Tensor:
        """[L] int64: the turn, behind the policy's answer to `prompt`, in which its image is drawn.

        Args:
            prompt: what the trajectory began with.
            text: what the turn asks for, the policy's own words among it (rollout/drawing_turn.py): escaped like any
                user's text.

        Returns:
            No second BOS; `image_start` is the last. What ends the answer is not in it. In masked order: a whole
            sequence, up to the image's frame.
        """
        self.no_images(f"open a turn to draw in (prompt {prompt.id})")

    def follow_up_tokens(self, prompt: Prompt) -> Tensor:
        """[L] int64: the turn that asks `prompt.follow_up` about the image just drawn, image placeholders expanded."""
        self.no_images(f"ask about a drawn image (prompt {prompt.id})")

    def see(self, images: Tensor) -> Tensor:
        """[n, 3, H, W] in [0, 1] -> [n, tokens, D] embeddings of the understanding path."""
        self.no_images("see images")

    def vision_features(self, images: Tensor) -> Tensor:
        """[n, 3, H, W] in [0, 1] -> [n, C] float32 for judging likeness."""
        self.no_images("judge the likeness of images")

    def image_tokens(self, images: Tensor) -> Tensor:
        """[n, 3, H, W] in [0, 1] -> [n, N] int64: the image vocabulary's codes of given images; `draw` inverts it."""
        self.no_images("turn images into tokens")

    def forced_image_tokens(self) -> Tensor | None:
        """[N] int64 on the CPU: tokens that stand in every image and are not sampled (ends of rows), -1 elsewhere.

        Ids that `embed` takes and `head` need not score. None: every token of an image is sampled.
        """
        return None

    def draw(self, tokens: Tensor) -> Tensor:
        """[n, N] int64 image ids -> [n, 3, H, W] float32 in [0, 1]."""
        self.no_images("draw")

    def load_images(self, paths: Sequence[ImageRef]) -> Tensor:
        """Pictures -> [n, 3, H, W] float32 in [0, 1], at the model's input size, fitted as `picture_fit` says."""
        if not self.image_size:
            self.no_images("load images")
        return load_pictures(paths, self.image_size, self.fit()).to(self.device)

    def fit(self) -> Fit:
        """What brings a picture to the model's size."""
        return fit_of(self.picture_fit, getattr(self.processor, "image_processor", None))

    def normalisation(self) -> Normalisation:
        """From pixels in [0, 1] to what the network is given, and back, as the checkpoint's image processor has it."""
        return Normalisation.of(self.processor.image_processor)

    def no_images(self, what: str) -> NoReturn:
        """Raises ConfigError: this model cannot do `what`."""
        raise ConfigError(
            f"{type(self).__name__} cannot {what}: {type(self.model).__name__} has no image vocabulary; use {DRAWING}"
        )

    # Files and copies -------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name: str | Path, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Self:
        """Loads a checkpoint folder or hub name in transformers' format; safetensors only, no remote code.

        `settings` are the class's own keywords.
        """
        with reading("model", name):
            model = cls.model_class.from_pretrained(
                str(name), dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
        return cls(model, cls._processor(name), **settings)

    @classmethod
    def without_weights(cls, name: str | Path) -> Self:
        """The policy of a checkpoint on the device `meta`: shapes, tokenizer and sizes, and no numbers."""
        with reading("model", name):
            config = AutoConfig.from_pretrained(str(name), trust_remote_code=False)
        make = getattr(cls.model_class, "from_config", cls.model_class)
        with torch.device("meta"):
            model = make(config)
        with suppress(OSError):  # as `from_pretrained` does; not every checkpoint has one
            model.generation_config = GenerationConfig.from_pretrained(str(name))
        return cls(model, cls._processor(name)).to("meta")

    @classmethod
    def _processor(cls, name: str | Path) -> Any:
        with reading("model", name):
            return cls.processor_class.from_pretrained(str(name), trust_remote_code=False)

    def save(self, folder: Path) -> None:
        """Writes weights (safetensors), config and processor in transformers' format."""
        with merged(self):
            self.model.save_pretrained(folder, safe_serialization=True)
        self.processor.save_pretrained(folder)

    def frozen_copy(self) -> Self:
        """The policy as it is now, for references and judges; it does not follow the training."""
        return copy.deepcopy(self).requires_grad_(False).eval()
