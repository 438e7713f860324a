"""A small Liquid: a Gemma of transformers' class whose table goes on with the codes of a VQGAN; and it alone.

Dims: T tokens of a sequence, V vocabulary, K codes.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import torch
from plain_one_table import PlainOneTable
from small_chameleon import NUM_CODES, spread_codebook, vq_config
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from syncr1.engine.policies.liquid import LiquidPolicy
from syncr1.engine.records import Prompt

PAD, EOS, BOS, UNK = "<pad>", "<eos>", "<bos>", "<unk>"
BOI, EOI, FREE, START, END = "<boi>", "<eoi>", "<unconditional>", "<start_of_turn>", "<end_of_turn>"
CONTROLS = (PAD, EOS, BOS, UNK, BOI, EOI, FREE, START, END)
PADDED = 3
"""Rows behind the codes."""


def tokenizer(*, template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level; control tokens first, as in Gemma's, and no template, as in its base's."""
    bytes_of = Tokenizer(models.BPE())
    bytes_of.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_of.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=285,
        special_tokens=list(CONTROLS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bytes_of.train_from_iterator(["what is the colour of the creature", "user model", "Generate an image"], trainer)
    bytes_of.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROLS])
    bytes_of.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bytes_of.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_of, pad_token=PAD, eos_token=EOS, bos_token=BOS, unk_token=UNK, chat_template=template
    )


def language_model(words: PreTrainedTokenizerFast, seed: int, *, tied: bool = True, family: str = "gemma") -> Any:
    """The language model alone, as it is published."""
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "gemma": (GemmaForCausalLM, GemmaConfig, {"head_dim": 16}),
        "llama": (LlamaForCausalLM, LlamaConfig, {}),
    }
    kind, settings, own = kinds[family]
    config = settings(
        vocab_size=len(words) + NUM_CODES + PADDED,
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
        tie_word_embeddings=tied,
        **own,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = kind(config)
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 0.0 if family == "gemma" else 1.0, 0.2)
                assert "norm" in name
    made.generation_config.eos_token_id = words.eos_token_id
    return made.eval()


@cache
def _sharp(seed: int, tied: bool, family: str) -> LiquidPolicy:
    words = tokenizer()
    policy = LiquidPolicy(language_model(words, seed, tied=tied, family=family), words).eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy.attach(vq_config(), None)
    spread_codebook(policy.vqmodel, seed)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(1.5)
        ids = policy.prompt_tokens(Prompt(id="x", task="rea", text="draw the creature"))
        hidden = PlainLiquid(policy).hidden(ids).mean(0)
        policy.model.get_output_embeddings().weight[words.eos_token_id] += hidden * 3.5 / hidden.square().sum()
    return policy


def sharp_liquid(seed: int = 0, *, tied: bool = True, family: str = "gemma") -> LiquidPolicy:
    """An untrained small Liquid with distributions far from uniform, whose texts end at different lengths."""
    return copy.deepcopy(_sharp(seed, tied, family))


class PlainLiquid(PlainOneTable):
    """The language model alone."""

    def __init__(self, policy: LiquidPolicy) -> None:
        super().__init__(policy)
        self.code_ids = len(policy.tokenizer) + torch.arange(NUM_CODES)
        vocabulary = policy.tokenizer.get_vocab()
        controls = [vocabulary[text] for text in CONTROLS if text not in (EOS, END)]
        rows = self.model.get_output_embeddings().weight.shape[0]
        self.never_in_text = torch.tensor([*controls, *range(len(policy.tokenizer), rows)])

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """[T] -> [T, V]."""
        return self.model(input_ids=ids[None], use_cache=False).logits[0]
