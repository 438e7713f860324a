"""A small Chameleon of transformers' own classes with a VQGAN that draws, and the same weights through transformers.

Dims: T tokens of a sequence, V vocabulary, K codes.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import torch
from plain_one_table import PlainOneTable
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonImageProcessor,
    ChameleonProcessor,
    ChameleonVQVAEConfig,
    PreTrainedTokenizerFast,
)

from syncr1.engine.policies.chameleon import ChameleonPolicy
from syncr1.engine.policies.vqgan_decoder import VQGANDecoder, encoded
from syncr1.engine.records import Prompt

IMAGE_SIZE, NUM_CODES = 32, 24
BOS, PAD, EOS, UNK = "<s>", "<pad>", "</s>", "<unk>"
BOI, EOI, SEP, IMAGE = "<racm3:break>", "<eoss>", "<reserved08706>", "<image>"
WORDS = ["what is the colour of the creature", "draw the creature at the beach", "the colour is red"]
PADDED = 5
"""Rows of the table without a token."""


def code_name(code: int) -> str:
    """As the published vocabulary has it: decimal digits as letters."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def tokenizer(*, scattered: bool = False) -> PreTrainedTokenizerFast:
    """Codes right behind the first four tokens as published; `scattered`: in reverse, among the other tokens."""
    codes = [code_name(code) for code in range(NUM_CODES)]
    first = [BOS, PAD, EOS, UNK, *([] if scattered else codes), EOI, BOI]
    bytes_of = Tokenizer(models.BPE())
    bytes_of.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_of.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280 + len(first), special_tokens=first, show_progress=False, initial_alphabet=alphabet
    )
    bytes_of.train_from_iterator(WORDS, trainer)
    rest = [*codes[:5:-1], SEP, *codes[:6]] if scattered else [SEP]
    bytes_of.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (*first, *rest, IMAGE)])
    bytes_of.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bytes_of.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_of, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK, sep_token=SEP
    )


def processor(*, scattered: bool = False) -> ChameleonProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    pictures = ChameleonImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    return ChameleonProcessor(pictures, tokenizer(scattered=scattered), image_seq_length=16)


def vq_config() -> ChameleonVQVAEConfig:
    """Attention at the lowest resolution, as the published one has not, so that both are tried."""
    return ChameleonVQVAEConfig(
        embed_dim=8,
        num_embeddings=NUM_CODES,
        latent_channels=16,
        resolution=IMAGE_SIZE,
        base_channels=32,
        channel_multiplier=[1, 1, 2, 2],
        num_res_blocks=1,
        attn_resolutions=[IMAGE_SIZE // 8],
    )


def spread_codebook(vqmodel: Any, seed: int) -> None:
    """An untrained encoder gives all places nearly one latent; a codebook around it makes codes differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        pixels = torch.rand(4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) * 2 - 1
        latents = vqmodel.quant_conv(vqmodel.encoder(pixels)).permute(0, 2, 3, 1).flatten(0, 2)
        vqmodel.quantize.embedding.weight.copy_(latents[:NUM_CODES])
        assert len(encoded(vqmodel, pixels)[0].unique()) > NUM_CODES // 2


def with_decoder(vqmodel: Any) -> Any:
    """A VQGAN that draws as well; its pictures are well inside of the range."""
    vqmodel.decoder = VQGANDecoder(vqmodel.config)
    return vqmodel


def model(words: PreTrainedTokenizerFast, seed: int, **more: Any) -> ChameleonForConditionalGeneration:
    """Random weights; norms and their biases count, too."""
    config = ChameleonConfig(
        vocab_size=len(words) + PADDED,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=640,
        initializer_range=0.15,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        vq_config=vq_config(),
        vocabulary_map=words.get_vocab(),
        **more,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = ChameleonForConditionalGeneration(config)
        with_decoder(made.model.vqmodel)
        for name, parameter in made.model.layers.named_parameters():
            if parameter.dim() == 1 or "_norm." in name:
                torch.nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.2)
        spread_codebook(made.model.vqmodel, seed)
    made.generation_config.eos_token_id = words.eos_token_id
    return made.eval()


@cache
def _sharp(seed: int, scattered: bool, swin_norm: bool) -> ChameleonPolicy:
    made = processor(scattered=scattered)
    policy = ChameleonPolicy(model(made.tokenizer, seed, swin_norm=swin_norm), made).eval()
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(2)
        ids = policy.prompt_tokens(Prompt(id="x", task="rea", text="draw the creature"))
        hidden = PlainChameleon(policy).hidden(ids).mean(0)
        policy.model.lm_head.weight[policy.tokenizer.eos_token_id] += hidden * 11 / hidden.square().sum()
    return policy


def sharp_chameleon(seed: int = 0, *, scattered: bool = False, swin_norm: bool = False) -> ChameleonPolicy:
    """An untrained small Chameleon with distributions far from uniform, whose texts end at different lengths."""
    return copy.deepcopy(_sharp(seed, scattered, swin_norm))


class PlainChameleon(PlainOneTable):
    """Chameleon's head as it would be without transformers' mask over the codes."""

    def __init__(self, policy: ChameleonPolicy) -> None:
        super().__init__(policy)
        vocabulary = policy.tokenizer.get_vocab()
        self.code_ids = torch.tensor([vocabulary[code_name(code)] for code in range(NUM_CODES)])
        samplable = {i for text, i in vocabulary.items() if not text.startswith("IMGIMG")}
        samplable -= {vocabulary[text] for text in (BOS, PAD, UNK, EOI, BOI, SEP, IMAGE)}
        rows = self.model.lm_head.weight.shape[0]
        self.never_in_text = torch.tensor(sorted(set(range(rows)) - samplable))

    def logits(self, ids: Tensor) -> Tensor:
        """[T] -> [T, V], codes among them."""
        return self.model.lm_head(self.hidden(ids)).detach()
