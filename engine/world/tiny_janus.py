"""A tiny Janus for the rendered world: transformers' own classes and files, only the sizes differ from Janus-Pro.

Its tokenizer is a byte-level BPE trained on the world's texts: their words are single tokens, and any other text still
has an encoding, so a user's own folder can be trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    JanusVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from ..policies.janus import JanusPolicy
from .vq import FOLDER, load_vq_into, vq_config

HIDDEN, LAYERS, HEADS, MLP = 128, 4, 4, 256
VISION_HIDDEN, VISION_LAYERS, VISION_PATCH = 64, 2, 8
IMAGE_SIZE = 32
INITIALIZER_RANGE = 0.06
"""0.02 leaves so small a model slow to start (loss 1.7 instead of 1.1 after 200 steps)."""
VOCABULARY = 640

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
IMAGE, BOI, EOI = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
ASSISTANT = "<|assistant|>"

CHAT_TEMPLATE = (
    "{{ '" + BOS + "' }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def build_tokenizer(texts: Sequence[str], concepts: Sequence[str], tags: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`; each `<concept>` is a token of its own, as in UniCTokens.

    `tags` (such as `<think>`) are tokens of their own, too, and no special ones: decoding keeps them.
    """
    special = [PAD, BOS, EOS, IMAGE, BOI, EOI, ASSISTANT]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(concepts) - len(tags),
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    added = [*(f"<{concept}>" for concept in concepts), *tags]
    tokenizer.add_tokens([AddedToken(text, lstrip=True, normalized=False) for text in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE, "boi_token": BOI, "eoi_token": EOI, "assistant_token": ASSISTANT},
    )


def build_policy(
    texts: Sequence[str],
    concepts: Sequence[str],
    *,
    seed: int,
    freeze_vision: bool = False,
    tags: Sequence[str] = (),
    image_tokenizer: Path = FOLDER,
) -> JanusPolicy:
    """An untrained tiny Janus around a shipped VQ model, about 1 M parameters; a seed gives the same weights.

    Args:
        texts, concepts, tags: of the tokenizer.
        seed: of the weights.
        freeze_vision: the vision tower has no gradient.
        image_tokenizer: folder of the VQ model.
    """
    tokenizer = build_tokenizer(texts, concepts, tags)
    num_slots = (IMAGE_SIZE // VISION_PATCH) ** 2
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    vision = JanusVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=VISION_PATCH,
        hidden_size=VISION_HIDDEN,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=4,
        mlp_ratio=2.0,
        projection_dim=HIDDEN,
        num_image_tokens=num_slots,
        depth=2,
        initializer_range=INITIALIZER_RANGE,
    )
    config = JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq_config(image_tokenizer, initializer_range=INITIALIZER_RANGE),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = JanusForConditionalGeneration(config)
    load_vq_into(model.model.vqmodel, image_tokenizer)
    generation = model.generation_config
    generation._from_model_config = False  # else transformers drops generation_kwargs on loading
    generation.generation_kwargs = {"boi_token_id": tokenizer.convert_tokens_to_ids(BOI)}
    generation.bos_token_id, generation.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    half = [0.5, 0.5, 0.5]
    pictures = JanusImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, min_size=1, image_mean=half, image_std=half
    )
    processor = JanusProcessor(pictures, tokenizer, chat_template=CHAT_TEMPLATE, num_image_tokens=num_slots)
    return JanusPolicy(model, processor, freeze_vision=freeze_vision)
