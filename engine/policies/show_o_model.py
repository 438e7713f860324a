"""Show-o as transformers would have it: a Phi whose table goes on with image codes, and MAGVIT-v2's tokenizer.

Rows of the one table, and of the one head, which has a bias:

    text and its control tokens: text_rows     codes: K = 2^bits     mask: 1, the last

Where the codes begin follows from the table's length and from the tokenizer's bits, so that a vocabulary that was
enlarged (UniCTokens: a token for each concept, behind the control tokens) has its place. transformers has no Show-o:
these classes are registered with its `AutoConfig` and `AutoProcessor`, and their folders are those of
`save_pretrained`. Released checkpoints normalise queries and keys (`qk_layernorm`), which Phi-1.5 does not.

Source: Show-o (arXiv 2408.12528) and its released inference code, by which the prompts are.

Dims: B rows, T tokens, D hidden, V rows of the table, N image tokens.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

from transformers import (
    AutoConfig,
    AutoProcessor,
    CLIPImageProcessor,
    GenerationMixin,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from ..errors import ConfigError
from .magvit import Magvit, MagvitConfig

PAD = "[PAD]"
CONTROLS = ("<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>")
"""Behind `PAD` in the tokenizer, in this order. A text begins and ends with the language model's own BOS and EOS."""
MARKS = {"soi": "<|soi|>", "eoi": "<|eoi|>", "t2i": "<|t2i|>", "mmu": "<|mmu|>"}
"""Those that prompts here have: begin and end of an image, tasks drawing and understanding."""
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- 'USER: ' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- 'ASSISTANT: ' -}}{%- endif -%}"
    "{%- for part in message['content'] -%}"
    "{{- '\\n' if part['type'] == 'image' else part['text'] if part['type'] == 'text' else '' -}}"
    "{%- endfor -%}"
    "{{- eos_token if message['role'] == 'assistant' else ' ' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
"""Words of a conversation: `USER: \\nWhat is this? ASSISTANT:`, the line break where a picture is shown, whose tokens
stand before all words."""


class ShowOConfig(PreTrainedConfig):
    """Everything that a Show-o is made of; the ids are the tokenizer's (`take_tokens`)."""

    model_type = "show_o"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": PhiConfig}

    text_config: dict[str, Any] | PhiConfig | None = None
    """Of the language model, its `vocab_size` V with all rows."""
    vq_config: dict[str, Any] | None = None
    """Fields of `MagvitConfig`."""
    image_size: int = 256
    """Pixels of an image's side."""
    text_slots: int = 129
    """Positions before an image that is drawn, the task's token among them: it is always behind as many."""
    soi_token_id: int | None = None
    eoi_token_id: int | None = None
    t2i_token_id: int | None = None
    mmu_token_id: int | None = None
    sot_token_id: int | None = None
    """What a text begins with: the language model's BOS."""
    eot_token_id: int | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, PhiConfig):
            told = {key: value for key, value in (self.text_config or {}).items() if key != "model_type"}
            self.text_config = PhiConfig(**told)
        self.vq_config = asdict(MagvitConfig(**(self.vq_config or {})))
        super().__post_init__(**kwargs)

    @property
    def magvit(self) -> MagvitConfig:
        return MagvitConfig(**(self.vq_config or {}))

    @property
    def num_codes(self) -> int:
        """K."""
        return self.magvit.num_codes

    @property
    def text_rows(self) -> int:
        """Rows before the codes: the row of the first code."""
        assert isinstance(self.text_config, PhiConfig)
        return int(self.text_config.vocab_size) - self.num_codes - 1

    @property
    def mask_token_id(self) -> int:
        assert isinstance(self.text_config, PhiConfig)
        return int(self.text_config.vocab_size) - 1

    @property
    def side(self) -> int:
        """Codes of an image's side."""
        return self.image_size // self.magvit.factor

    @property
    def num_image_tokens(self) -> int:
        """N."""
        return self.side**2

    def take_tokens(self, tokenizer: Any) -> None:
        """Takes the ids of the control tokens.

        Raises:
            ConfigError: one is missing, or stands behind the text's rows.
        """
        ids = {name: tokenizer.get_vocab().get(text) for name, text in MARKS.items()}
        ids |= {"sot": tokenizer.bos_token_id, "eot": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
        absent = [name for name, index in ids.items() if index is None]
        if absent or len(tokenizer) > self.text_rows:
            raise ConfigError(
                f"Show-o: expected a tokenizer of at most {self.text_rows} tokens with soi, eoi, t2i, mmu, BOS, EOS "
                f"and {PAD}, got {len(tokenizer)} tokens{' without ' + ', '.join(absent) if absent else ''}; take the "
                "tokenizer of this very model (Phi-1.5's, enlarged)"
            )
        for name, index in ids.items():
            setattr(self, f"{name}_token_id", int(index))

    def check(self) -> None:
        """Raises ConfigError where its numbers do not fit together."""
        if self.text_rows < 1:
            raise ConfigError(
                f"Show-o: expected a table with rows for text, {self.num_codes} codes and a mask, got "
                f"{self.mask_token_id + 1} rows; take the image tokenizer of this very model"
            )
        factor = self.magvit.factor
        if self.image_size < factor or self.image_size % factor:
            raise ConfigError(
                f"Show-o: expected an image_size in a positive multiple of {factor} pixels, got {self.image_size}"
            )


class ShowOForUnifiedGeneration(PreTrainedModel, GenerationMixin):  # a mixin that a generation configuration comes with
    """`showo`, the language model with all rows, and `vqmodel`, the image tokenizer, under their published names."""

    config_class = ShowOConfig
    config: ShowOConfig
    base_model_prefix = "showo"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True
    _no_split_modules: ClassVar[list[str]] = ["PhiDecoderLayer"]

    def __init__(self, config: ShowOConfig) -> None:
        super().__init__(config)
        config.check()
        self.showo = PhiForCausalLM(config.text_config)
        self.vqmodel = Magvit(config.magvit)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.showo.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        self.showo.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.showo.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.showo.set_output_embeddings(new_embeddings)

    def forward(self, **inputs: Any) -> Any:
        """The language model's own: [B, T] ids or [B, T, D] embeddings -> logits [B, T, V]. Attention is what the mask
        says; transformers makes it causal where there is none, which is right for text alone."""
        return self.showo(**inputs)


class ShowOProcessor(ProcessorMixin):
    """Tokenizer and image processor under one roof, with the format of conversations."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template or TEMPLATE)

    @classmethod
    def made_of(cls, tokenizer: Any, image_size: int) -> ShowOProcessor:
        """A language model's tokenizer gets the control tokens that it lacks, behind its own.

        Args:
            tokenizer: of transformers, changed in place.
            image_size: pixels: pictures are scaled by their shorter side and cut to the middle, then [-1, 1].
        """
        if tokenizer.pad_token != PAD:
            tokenizer.add_special_tokens({"pad_token": PAD})
        tokenizer.add_tokens(list(CONTROLS), special_tokens=True)
        half = [0.5, 0.5, 0.5]
        pictures = CLIPImageProcessor(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_mean=half,
            image_std=half,
        )
        return cls(pictures, tokenizer)


AutoConfig.register(ShowOConfig.model_type, ShowOConfig)
AutoProcessor.register(ShowOConfig, ShowOProcessor)
