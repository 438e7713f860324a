"""Tiny random text models of transformers' families, a tokenizer and a chat template, all made on the fly."""

from __future__ import annotations

import inspect
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)

from syncr1.engine.policies.causal_lm import CausalLMPolicy

PAD, BOS, EOS, USER, ANSWER, END = "<pad>", "<bos>", "<eos>", "<|user|>", "<|answer|>", "<|end|>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|answer|>' }}{{ m['content'] }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|answer|>{% endif %}"
)
VOCABULARY = 300
"""Rows of the embedding: more than the tokenizer has tokens, as in Qwen's checkpoints."""


def tokenizer(*, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level, so every text has an encoding; the turn markers are special without being named."""
    bytes_of = Tokenizer(models.BPE())
    bytes_of.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_of.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=[PAD, BOS, EOS], show_progress=False, initial_alphabet=alphabet
    )
    bytes_of.train_from_iterator(["what is the colour of the creature", "the colour is red"], trainer)
    bytes_of.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (USER, ANSWER, END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_of, pad_token=PAD, bos_token=BOS, eos_token=EOS, chat_template=template
    )


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def config(family: str, **more: Any) -> PreTrainedConfig:
    """One of FAMILIES, tiny; `more` overrides."""
    kind, own = FAMILIES[family]
    return kind(**SIZES | own | more)


FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "llama_tied_mha": (LlamaConfig, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama_mqa_biased": (LlamaConfig, {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "gemma": (GemmaConfig, {"head_dim": 8}),
    "granite": (
        GraniteConfig,
        {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
    "cohere": (CohereConfig, {"logit_scale": 0.0625}),
    "mistral": (MistralConfig, {"sliding_window": 64}),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}


def model(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> Any:
    """Random weights; norms and biases too, so that leaving one out shows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(config(family, **more), dtype=dtype)
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.2)
    made.generation_config.eos_token_id = [2, tokenizer().convert_tokens_to_ids(END)]
    return made.eval()


def policy(family: str = "llama", *, template: str | None = TEMPLATE, **more: Any) -> CausalLMPolicy:
    return CausalLMPolicy(model(family, **more), tokenizer(template=template))


def own_cache(model: Any, length: int) -> dict[str, Any]:
    """For `generate`: in transformers 5.13 to 5.17 Janus fails to make its own; 5.24 renames the argument."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: StaticCache(model.config.text_config, max_cache_len=length)}
