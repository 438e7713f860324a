"""A tiny Show-o for the embedded worlds: the classes and files of the large one, only the sizes differ.

Its tokenizer is a byte-level BPE trained on the world's texts, as tiny_janus.py's: their words are single tokens, and
any other text still has an encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PhiConfig, PreTrainedTokenizerFast

from ...policies.show_o import ShowOPolicy
from ...policies.show_o_model import ShowOConfig, ShowOForUnifiedGeneration, ShowOProcessor
from ..tiny_janus import HEADS, HIDDEN, IMAGE_SIZE, INITIALIZER_RANGE, LAYERS, MLP
from .sign_vq import load_sign_vq, sign_vq_config

EOS = "<|endoftext|>"
"""BOS, too, as of the Phi that Show-o is made of."""
VOCABULARY = 1024
TEXT_SLOTS = 65
FRAME = ("USER: ASSISTANT:", "A photo of it.")
"""What stands in every conversation, and in the requests that drawings of a concept are asked for by."""


def build_tokenizer(words: Sequence[str], concepts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `words`, of which each becomes a token, behind a space and behind a line break, where the
    question about a picture begins; each `<concept>` is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(concepts),
        special_tokens=[EOS],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [" ".join([*FRAME, *words]), *(f"\n{word}" for word in words)]
    tokenizer.train_from_iterator(texts * 20, trainer)
    tokenizer.add_tokens([AddedToken(f"<{concept}>", lstrip=True, normalized=False) for concept in concepts])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, padding_side="left")


def build_show_o(words: Sequence[str], concepts: Sequence[str], *, seed: int) -> ShowOPolicy:
    """An untrained tiny Show-o around the shipped image tokenizer, about 1 M parameters; a seed gives the same weights.

    Args:
        words, concepts: of the tokenizer.
        seed: of the weights.
    """
    processor = ShowOProcessor.made_of(build_tokenizer(words, concepts), IMAGE_SIZE)
    vq_config = sign_vq_config()
    text = PhiConfig(
        vocab_size=len(processor.tokenizer) + vq_config.num_codes + 1,
        hidden_size=HIDDEN,
        intermediate_size=MLP * 3 // 2,  # two matrices here, three there
        hidden_act="gelu_pytorch_tanh",  # what gelu_new is, in one pass
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=512,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
    )
    config = ShowOConfig(text_config=text, vq_config=asdict(vq_config), image_size=IMAGE_SIZE, text_slots=TEXT_SLOTS)
    config.take_tokens(processor.tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ShowOForUnifiedGeneration(config)
    model.vqmodel.load_state_dict(load_sign_vq().state_dict())
    return ShowOPolicy(model, processor)
