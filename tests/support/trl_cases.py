"""A tiny causal model, its tokenizer of letters and a reward, for the tests of the TRL patch."""

from __future__ import annotations

from typing import Any

import syncr1.engine.compat  # noqa: F401

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

LETTERS = {token: index for index, token in enumerate(["<pad>", "</s>", *"abcdefghijkl"])}
SIZES: dict[str, Any] = {
    "vocab_size": len(LETTERS),
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def tokenizer() -> PreTrainedTokenizerFast:
    text = Tokenizer(models.WordLevel(LETTERS, unk_token="<pad>"))
    text.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=text, pad_token="<pad>", eos_token="</s>")


def tiny_model(kind: str = "llama", **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    # A large initializer_range spreads the logits, so that ratios and entropies differ from token to token.
    config = AutoConfig.for_model(kind, **SIZES, initializer_range=0.4, **settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def reward_letter_a(completion_ids: list[list[int]], **_: object) -> list[float]:
    return [ids.count(LETTERS["a"]) / len(ids) + 0.01 * ids[0] for ids in completion_ids]
