"""Any decoder-only text model of transformers behind the `Policy` protocol: answers in text, draws nothing.

    policy = CausalLMPolicy.from_pretrained("Qwen/Qwen3-0.6B", dtype=torch.bfloat16)

Models that our layouts or heads would get wrong are refused when the policy is made (`probe.py`).

Dims: T tokens, L prompt tokens, D hidden size, V vocabulary, B rows, N rows of a head.
"""

from __future__ import annotations

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
from .probe import check_decoder, max_positions, measure
from .tokens import control_tokens, escape_control_tokens


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
        self.end_tokens = _end_tokens(model, tokenizer)
        self._turn_end = self._end_of_turn()
        vocabulary = model.get_output_embeddings().weight.shape[0]
        # Checkpoints pad their vocabulary: rows without a token would decode to nothing.
        unused = set(range(vocabulary)) - set(tokenizer.get_vocab().values())
        forbidden = {*control_tokens(tokenizer).values(), *unused} - self.end_tokens
        forbidden = {index for index in forbidden if index < vocabulary}
        ids = torch.tensor(sorted(forbidden), dtype=torch.long, device=self.device)
        self.register_buffer("_forbidden", ids, persistent=False)

    def prompt_tokens(self, prompt: Prompt) -> Tensor:
        """[L] int64: a user's turn through the chat template, and the opening of the answer.

        Raises:
            DataError: the prompt shows or asks for an image.
        """
        if prompt.image is not None or "image" in prompt.segments:
            wants = "shows an image" if prompt.image is not None else f"asks for segments {prompt.segments}"
            raise DataError(
                f"prompt {prompt.id}: {wants}, but CausalLMPolicy reads and writes text only; "
                "use a Janus or Emu3 checkpoint, or text prompts with segments=('text',)"
            )
        ids = self.encode(self._turn(escape_control_tokens(prompt.text, self.tokenizer)))
        bos = self.tokenizer.bos_token_id
        if bos is not None and (ids.numel() == 0 or int(ids[0]) != bos):
            ids = torch.cat([ids.new_tensor([bos]), ids])
        if not ids.numel():
            raise DataError(f"prompt {prompt.id}: is empty, and the tokenizer has no BOS; expected at least one token")
        return ids

    def _turn(self, words: str) -> str:
        if self.tokenizer.chat_template is None:
            return words
        turns = [{"role": "user", "content": words}]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def _end_of_turn(self) -> int:
        """The end token that the chat template puts behind an answer, else the tokenizer's own."""
        own = self.tokenizer.eos_token_id
        if self.tokenizer.chat_template is not None:
            user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
            asked, told = (
                str(self.tokenizer.apply_chat_template(turns, tokenize=False)) for turns in ([user], [user, answer])
            )
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


def _end_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """All ids that end an answer: a chat model's generation config lists several."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    listed = [listed] if isinstance(listed, int) else list(listed or [])
    ends = frozenset(int(i) for i in (*listed, tokenizer.eos_token_id) if i is not None)
    if not ends:
        raise ConfigError(
            "CausalLMPolicy: neither the generation config nor the tokenizer names an end token; set eos_token_id"
        )
    return ends
