"""A small Emu3 of transformers' own classes, and the same weights through transformers alone.

Dims: T tokens of a sequence, V vocabulary, n images.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import torch
from helpers import make_prompt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    Emu3TextConfig,
    Emu3VQVAEConfig,
    GPT2TokenizerFast,
    PreTrainedTokenizerFast,
)

from syncr1.engine.policies.emu3 import Emu3Policy
from syncr1.engine.records import Prompt, Rollout

IMAGE_SIZE, NUM_CODES = 32, 24
FRAME = 4
"""Tokens of "4*4" and the wrapper, before the first row."""
PAD, BOS, EOS, EOL, EOF = "<|endoftext|>", "<|extra_203|>", "<|extra_204|>", "<|extra_200|>", "<|extra_201|>"
IMAGE, BOI, EOI, WRAPPER = "<image>", "<|image start|>", "<|image end|>", "<|image token|>"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
WORDS = ["what is the colour of the creature", "draw the creature at the beach", "USER: ASSISTANT: the colour is red"]


def tokenizer(*, scattered: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level, named tokens as published, codes at the end; `scattered`: codes in reverse, among other tokens."""
    bytes_of = Tokenizer(models.BPE())
    bytes_of.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_of.decoder = decoders.ByteLevel()
    codes = [f"<|visual token {code:06d}|>" for code in range(NUM_CODES)]
    controls = [PAD, EOL, EOF, "<|extra_202|>", BOS, EOS, WRAPPER, BOI, EOI, IMAGE]
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=[PAD], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bytes_of.train_from_iterator(WORDS, trainer)
    order = [*codes[:5:-1], *controls, *codes[:6]] if scattered else [*controls, *codes]
    bytes_of.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in order])
    return GPT2TokenizerFast(
        tokenizer_object=bytes_of,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=PAD,
        extra_special_tokens={
            "image_token": IMAGE,
            "boi_token": BOI,
            "eoi_token": EOI,
            "image_wrapper_token": WRAPPER,
            "eof_token": EOF,
        },
    )


def processor(*, scattered: bool = False) -> Emu3Processor:
    half = [0.5, 0.5, 0.5]
    pictures = Emu3ImageProcessor(
        min_pixels=IMAGE_SIZE**2, max_pixels=4 * IMAGE_SIZE**2, image_mean=half, image_std=half
    )
    return Emu3Processor(pictures, tokenizer(scattered=scattered), chat_template=TEMPLATE)


def model(words: PreTrainedTokenizerFast, seed: int) -> Emu3ForConditionalGeneration:
    """Random weights; batch norms have seen something, as those of a trained VQ model have."""
    text = Emu3TextConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    vq = Emu3VQVAEConfig(
        codebook_size=NUM_CODES,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 1],
        hidden_size=32,
        num_res_blocks=1,
        temporal_downsample_factor=2,
    )
    config = Emu3Config(text_config=text, vq_config=vq, vocabulary_map=words.get_vocab(), image_area=IMAGE_SIZE**2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = Emu3ForConditionalGeneration(config)
        for module in made.model.vqmodel.modules():
            if isinstance(module, torch.nn.BatchNorm3d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = words.eos_token_id, words.pad_token_id
    return made


@cache
def _sharp_emu3(seed: int, scattered: bool) -> Emu3Policy:
    made = processor(scattered=scattered)
    policy = Emu3Policy(model(made.tokenizer, seed), made).eval()
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(2)
        plain = PlainEmu3(policy)
        ids = policy.prompt_tokens(Prompt(id="x", task="rea", text="draw the creature"))
        hidden = plain.model.model.text_model(input_ids=ids[None]).last_hidden_state[0].mean(0)
        policy.model.lm_head.weight[policy.tokenizer.eos_token_id] += hidden * 11 / hidden.square().sum()
        # An untrained encoder gives all places nearly one latent; a codebook around it makes codes differ.
        encoder = policy.model.model.vqmodel
        pixels = torch.rand(4, 1, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).repeat(1, 2, 1, 1, 1)
        latents = encoder.quant_conv(encoder.encoder(pixels * 2 - 1).permute(0, 2, 1, 3, 4))
        encoder.quantize.embedding.weight.copy_(latents.permute(0, 2, 3, 4, 1).reshape(-1, 4)[:NUM_CODES])
    return policy


def sharp_emu3(seed: int = 0, *, scattered: bool = False) -> Emu3Policy:
    """An untrained small Emu3 whose distributions are far from uniform and whose texts end at different lengths."""
    return copy.deepcopy(_sharp_emu3(seed, scattered))


def all_plans(photo: Path) -> list[Prompt]:
    """Every plan, from words and from a photo, of different lengths."""
    return [
        make_prompt("what is the colour?", ("text",), photo),
        make_prompt("draw it", ("image",)),
        make_prompt("draw the creature at the beach.", ("text", "image")),
        make_prompt("who?", ("text", "image"), photo),
        make_prompt("name a colour", ("text",)),
        make_prompt("draw it again", ("image",), photo),
        make_prompt("draw the blue one.", ("text", "image", "text"), follow_up="what is its colour?"),
        make_prompt("again", ("image", "text"), photo, follow_up="where?"),
    ]


class PlainEmu3:
    """The same weights through transformers alone: text ids in, logits out, its own attention, no cache."""

    def __init__(self, policy: Emu3Policy) -> None:
        self.policy, self.model = policy, copy.deepcopy(policy.model).eval()
        self.model.model.text_model.set_attn_implementation("sdpa")
        vocabulary = policy.tokenizer.get_vocab()
        self.code_ids = torch.tensor([vocabulary[f"<|visual token {code:06d}|>"] for code in range(NUM_CODES)])
        self.eol = vocabulary[EOL]
        never = {i for text, i in vocabulary.items() if text.startswith(("<|", "<image>")) and i != vocabulary[EOS]}
        self.never_in_text = torch.tensor(sorted(never))

    def frame(self, side: int) -> Tensor:
        """What stands between BOI and the first code."""
        ids = self.policy.tokenizer(f"{side}*{side}{WRAPPER}", add_special_tokens=False).input_ids
        return torch.tensor(ids)

    def image(self, codes: Tensor, side: int) -> Tensor:
        """[side * side] codes -> text ids of size, wrapper, and rows each ended by EOL."""
        rows = [torch.cat([self.code_ids[row], torch.tensor([self.eol])]) for row in codes.view(side, side)]
        return torch.cat([self.frame(side), *rows])

    def shown(self, tokens: Tensor, pixels: Tensor | None) -> Tensor:
        """A prompt's text ids, the codes of processed `pixels` [1, 3, H, W] in the image's place."""
        if pixels is None:
            return tokens
        sizes = torch.tensor([pixels.shape[-2:]])
        tokens = tokens.clone()
        tokens[tokens == self.policy.tokenizer.image_token_id] = self.model.model.get_image_tokens(pixels, sizes).long()
        return tokens

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """[T] -> [T, V]."""
        return self.model(input_ids=ids[None], use_cache=False).logits[0]

    def replay(self, rollout: Rollout, pixels: Tensor | None, *, temperature: float, cfg_weight: float) -> list[Any]:
        """(conditional, mixed) log-probabilities of each segment's tokens, 0 where nothing was sampled."""
        policy, out = self.policy, []
        ids = self.shown(rollout.prompt_tokens, pixels)
        for segment in rollout.segments:
            tokens, side = segment.tokens, policy.side
            if segment.kind == "image":
                free = torch.zeros(side, side + 1, dtype=torch.bool)
                free[:, :side] = True
                free = torch.cat([torch.zeros(len(tokens) - free.numel(), dtype=torch.bool), free.flatten()])
                given = self.image(tokens[free], side)
            else:
                free, given = torch.ones_like(tokens, dtype=torch.bool), tokens
            ids = torch.cat([ids, segment.lead, given])
            logits = self.logits(ids)[-1 - len(given) : -1]
            mixed = logits
            if segment.kind == "image":
                empty = torch.tensor([policy.tokenizer.bos_token_id, policy.tokenizer.boi_token_id])
                empty = empty if segment.free_prompt is None else segment.free_prompt
                other = self.logits(torch.cat([empty, given]))[-1 - len(given) : -1]
                mixed = other + cfg_weight * (logits - other)
                logits, mixed = logits[:, self.code_ids], mixed[:, self.code_ids]
            else:
                logits = logits.index_fill(1, self.never_in_text, -torch.inf)
                mixed = logits
            targets = tokens.where(free, 0)
            pair = (x.div(temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0] for x in (logits, mixed))
            out.append(tuple(torch.where(free, x, 0.0) for x in pair))
        return out
