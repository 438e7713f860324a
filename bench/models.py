"""The measured model: a Janus of transformers' own classes with random weights, and prompts of exact lengths for it.

The tokenizer's words are `w0`, `w1`, …, one token each, so a prompt of n words has n tokens, and every id decodes.
Random weights end a text when chance has it; here no token ends one (`end_tokens` is empty and the end token is among
the forbidden ids), so that every side of a comparison produces exactly as many tokens.

Dims: L tokens of a prompt, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

if TYPE_CHECKING:
    from syncr1.engine.policies.janus import JanusPolicy
    from syncr1.engine.records import Prompt

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
IMAGE, BOI, EOI, ASSISTANT = "<image_placeholder>", "<begin_of_image>", "<end_of_image>", "<|assistant|>"
CONTROL = (PAD, BOS, EOS, UNKNOWN, IMAGE, BOI, EOI, ASSISTANT)
CHAT_TEMPLATE = (
    "{{ '" + BOS + "' }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of a Janus."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    vocabulary: int
    image_vocabulary: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    photo: int
    """Pixels of the side of an image that is shown."""
    patch: int
    side: int
    """Tokens along the side of an image that is drawn."""
    channels: int
    """VQ channels at full resolution, a multiple of 32 (GroupNorm)."""
    multipliers: tuple[int, ...]
    """Of the VQ model's channels; each after the first doubles the pixels per token."""
    residual_blocks: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def photo_tokens(self) -> int:
        """Embeddings of an image that is shown."""
        return (self.photo // self.patch) ** 2

    @property
    def image_tokens(self) -> int:
        """Tokens of an image that is drawn."""
        return self.side**2

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.layers} x {self.hidden}, {self.vocabulary}|{self.image_vocabulary} {kind}"


# Janus-Pro-1B's proportions (its MLP is 2.75 times as wide as the trunk).  The VQ model has few channels and 64 pixels:
# in Janus-Pro it takes under 1 % of the time of a drawn image, and at 256 pixels it would be most of it here.
CPU = Size(512, 8, 8, 1408, 16384, 16384, 256, 4, 4, 384, 16, 16, 32, (1, 1, 1), 1)
QUICK = Size(64, 2, 4, 176, 256, 96, 32, 1, 2, 32, 8, 4, 32, (1, 1), 1)
JANUS_PRO_1B = Size(
    2048, 24, 16, 5632, 102400, 16384, 1024, 24, 16, 384, 16, 24, 128, (1, 1, 2, 2, 4), 2, "cuda", torch.bfloat16
)


def size_of(device: str, quick: bool) -> Size:
    """The size that a run measures."""
    return QUICK if quick else {"cpu": CPU, "cuda": JANUS_PRO_1B}[device]


def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Control tokens, then `w0`, `w1`, …: exactly `vocabulary` ids."""
    words = [*CONTROL, *(f"w{i}" for i in range(vocabulary - len(CONTROL)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE, "boi_token": BOI, "eoi_token": EOI, "assistant_token": ASSISTANT},
    )


def _config(size: Size, tokenizer: PreTrainedTokenizerFast) -> JanusConfig:
    text = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    vision = JanusVisionConfig(
        image_size=size.photo,
        patch_size=size.patch,
        hidden_size=size.vision_hidden,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        projection_dim=size.hidden,
        num_image_tokens=size.photo_tokens,
    )
    vq = JanusVQVAEConfig(
        num_embeddings=size.image_vocabulary,
        latent_channels=size.channels * size.multipliers[-1],
        base_channels=size.channels,
        channel_multiplier=list(size.multipliers),
        num_res_blocks=size.residual_blocks,
        projection_dim=size.hidden,
        image_token_embed_dim=size.hidden,
    )
    config = JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=False,
    )
    config.vq_config.num_patches = size.side  # JanusConfig gives it the vision tower's
    return config


def build_model(size: Size, seed: int = 0) -> tuple[JanusForConditionalGeneration, JanusProcessor]:
    """Random weights, the same for a seed, on the size's device; and the processor that goes with them."""
    tokenizer = build_tokenizer(size.vocabulary)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.device(size.device):
        torch.manual_seed(seed)
        # Not `.to(dtype)`: that would round the rotary frequencies too.
        model = JanusForConditionalGeneration._from_config(_config(size, tokenizer), dtype=size.dtype).eval()
    generation = model.generation_config
    generation.generation_kwargs = {"boi_token_id": tokenizer.convert_tokens_to_ids(BOI)}
    generation.bos_token_id, generation.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    half = [0.5, 0.5, 0.5]
    pictures = JanusImageProcessor(
        size={"height": size.photo, "width": size.photo}, min_size=1, image_mean=half, image_std=half
    )
    processor = JanusProcessor(pictures, tokenizer, chat_template=CHAT_TEMPLATE, num_image_tokens=size.photo_tokens)
    return model, processor


def build_policy(size: Size, seed: int = 0) -> JanusPolicy:
    """The model as the engine sees it: trained is what ULM-R1 trains, texts end at their limit."""
    from syncr1.engine.policies.janus import JanusPolicy

    model, processor = build_model(size, seed)
    for part in (model.model.generation_embeddings, model.model.generation_aligner, model.model.generation_head):
        part.requires_grad_(False)
    policy = JanusPolicy(model, processor)
    policy.end_tokens = frozenset()
    policy.register_buffer("_forbidden_text", forbidden_ids(processor).to(size.device), persistent=False)
    return policy


def forbidden_ids(processor: Any) -> Tensor:
    """[F] int64: control tokens, which no side may sample."""
    return torch.tensor(sorted(processor.tokenizer.convert_tokens_to_ids(list(CONTROL))))


def words(count: int, seed: int, vocabulary: int) -> str:
    """A text of `count` tokens."""
    picked = np.random.default_rng(seed).integers(0, vocabulary - len(CONTROL), count)
    return " ".join(f"w{i}" for i in picked)


def photo(folder: Path, index: int, size: Size) -> Path:
    """A smooth random picture on disk, at the size that the model sees."""
    path = folder / f"{index}.png"
    if not path.exists():
        coarse = np.random.default_rng(index).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size.photo, size.photo), Image.Resampling.BICUBIC).save(path)
    return path


def question(index: int, num_tokens: int, folder: Path, size: Size) -> Prompt:
    """About a photo: `num_tokens` text tokens (4 of them control tokens) beside the photo's embeddings."""
    from syncr1.engine.records import Prompt

    text = words(num_tokens - 4, index, size.vocabulary)
    return Prompt(
        id=f"question/{index}", task="vqa", text=text, images=(photo(folder, index, size),), segments=("text",)
    )


def drawing(index: int, num_tokens: int, size: Size) -> Prompt:
    """A request to draw: `num_tokens` text tokens, the image's start included."""
    from syncr1.engine.records import Prompt

    text = words(num_tokens - 3, 1000 + index, size.vocabulary)
    return Prompt(id=f"drawing/{index}", task="gen", text=text, segments=("image",))


def peer_ids(policy: JanusPolicy, prompts: Sequence[Prompt]) -> Tensor:
    """[P, L] int64: the same prompts as a peer takes them, all of one length; a drawing's image start included."""
    rows = [policy.prompt_tokens(prompt) for prompt in prompts]
    start = torch.tensor([policy.image_start])
    rows = [torch.cat([row, start]) if "image" in p.segments else row for p, row in zip(prompts, rows, strict=True)]
    return torch.stack(rows).to(policy.device)


def peer_pixels(policy: JanusPolicy, prompts: Sequence[Prompt]) -> Tensor:
    """[P, 3, H, W]: the photos, normalised as the vision tower takes them."""
    images = policy.load_images([prompt.images[0] for prompt in prompts if prompt.images])
    return ((images - 0.5) / 0.5).to(policy.model.lm_head.weight.dtype)
