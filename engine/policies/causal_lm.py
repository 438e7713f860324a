"""Any decoder-only text model of transformers behind the `Policy` protocol: answers in text, draws nothing.

    policy = CausalLMPolicy.from_pretrained("Qwen/Qwen3-0.6B", dtype=torch.bfloat16)

Models that our layouts or heads would get wrong are refused when the policy is made (`probe.py`).

Dims: T tokens, L prompt tokens, D hidden size, V vocabulary, B rows, N rows of a head.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..errors import ConfigError, DataError
from ..records import Prompt, SegmentKind
from .attention_interface import ATTENTION_NAME
from .base import Head, Policy
from .cache import CacheShape
from .chat_turns import render
from .kinds import DRAWING
from .probe import check_decoder, max_positions, measure
from .tokens import never_sampled


class CausalLMPolicy(Policy):
    """A causal language model of transformers behind the `Policy` protocol.

    Dropout is switched off: log-probabilities of one update must come from one network.

    Args:
        model: the loaded checkpoint, a `...ForCausalLM`.
        tokenizer: its tokenizer; a chat template is used where it has one.

    Raises:
        ConfigError: the model does something that packed layouts or a linear head cannot express.
    """

    model_class, processor_class = AutoModelForCausalLM, AutoTokenizer
    _forbidden: Tensor

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        headless = () if model.get_output_embeddings() is not None else ("it has no linear head",)
        check_decoder("CausalLMPolicy", model, *headless)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.max_positions = max_positions(model)
        self._facts = measure(model, lambda ids, positions, layout: self.trunk(self._embed(ids), positions, layout))
        model.set_attn_implementation(ATTENTION_NAME)
        if not self.end_tokens:
            raise ConfigError(
                "CausalLMPolicy: neither the generation config nor the tokenizer names an end token; set eos_token_id"
            )
        vocabulary = model.get_output_embeddings().weight.shape[0]
        # Checkpoints pad their vocabulary: rows without a token would decode to nothing.
        forbidden = never_sampled(model, tokenizer, self.control.values(), self.end_tokens, vocabulary)
        ids = torch.tensor(sorted(forbidden), dtype=torch.long, device=self.device)
        self.register_buffer("_forbidden", ids, persistent=False)

    def prompt_tokens(self, prompt: Prompt) -> Tensor:
        """[L] int64: a user's turn through the chat template, and the opening of the answer; without a template the
        words as the tokenizer has them, with what it adds.

        Raises:
            DataError: the prompt shows or asks for an image.
        """
        if prompt.images or "image" in prompt.segments:
            wants = "shows an image" if prompt.images else f"asks for segments {prompt.segments}"
            raise DataError(
                f"prompt {prompt.id}: {wants}, but CausalLMPolicy reads and writes text only; "
                f"use {DRAWING}, or text prompts with segments=('text',)"
            )
        words, bos = self.escape(prompt.text), self.tokenizer.bos_token_id
        if self.tokenizer.chat_template is not None:
            turn = {"role": "user", "content": words}
            ids = self.encode(render(self.tokenizer, [turn], self.template_kwargs))
        else:
            ids = torch.tensor(self.tokenizer(words).input_ids, dtype=torch.long)
        if not ids.numel() and bos is not None:
            ids = torch.tensor([bos])
        if not ids.numel():
            raise DataError(f"prompt {prompt.id}: is empty, and the tokenizer has no BOS; expected at least one token")
        return ids

    @cached_property
    def _turn_end(self) -> int:
        """The end token that the chat template puts behind an answer, else the tokenizer's own."""
        own = self.tokenizer.eos_token_id
        if self.tokenizer.chat_template is not None:
            user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
            arguments = self.template_kwargs
            asked, told = (render(self.tokenizer, turns, arguments, opens=False) for turns in ([user], [user, answer]))
            if told.startswith(asked):
                ends = [i for i in self.encode(told[len(asked) :]).tolist() if i in self.end_tokens]
                own = ends[0] if ends else own
        return int(own) if own in self.end_tokens else min(self.end_tokens)

    def text_tokens(self, text: str) -> Tensor:
        ids = self.encode(text)
        return torch.cat([ids, ids.new_tensor([self._turn_end])])

    def embed(self, tokens: Tensor, kind: SegmentKind) -> Tensor:
        """[...] int64 -> [..., D]: what the model makes of `input_ids` (Gemma's embedding module scales them)."""
        if kind == "image":
            self.no_images("embed image tokens")
        return self._embed(tokens)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(tokens)

    def decoder(self) -> nn.Module:
        return self.model.get_decoder()

    def head(self, hidden: Tensor, kind: SegmentKind) -> Head:
        """[N, D] -> the text head; a factor on the logits (Granite, Cohere) goes into the hidden states."""
        if kind == "image":
            self.no_images("score image tokens")
        linear, scale = self.model.get_output_embeddings(), self._facts.logit_scale
        if scale == 1.0:
            return Head(hidden, linear.weight, linear.bias, self._forbidden)
        bias = None if linear.bias is None else linear.bias * scale
        return Head(hidden * scale, linear.weight, bias, self._forbidden)

    def cache_shape(self) -> CacheShape:
        weight, facts = self.model.get_output_embeddings().weight, self._facts
        return CacheShape(
            num_layers=facts.num_layers,
            num_heads=facts.num_heads,
            head_dim=facts.head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )
