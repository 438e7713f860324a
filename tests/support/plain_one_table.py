"""Policies whose images are rows of the text vocabulary, through transformers alone: whole forwards over text ids.

Dims: T tokens of a sequence, V rows of the table, K codes, N tokens of an image.
"""

from __future__ import annotations

import copy
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import torch
from torch import Tensor

from syncr1.engine.policies.one_table import OneTablePolicy
from syncr1.engine.records import Rollout


class PlainOneTable:
    """The same weights with transformers' own attention, and no cache."""

    code_ids: Tensor
    """[K] row of each code."""
    never_in_text: Tensor

    def __init__(self, policy: OneTablePolicy) -> None:
        self.policy: Any = policy
        self.model = copy.deepcopy(policy.model).eval()
        self.model.set_attn_implementation("sdpa")

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """[T] -> [T, D]."""
        return self.model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]

    def logits(self, ids: Tensor) -> Tensor:
        """[T] -> [T, V], codes among them."""
        raise NotImplementedError

    def shown(self, tokens: Tensor, codes: Tensor | None) -> Tensor:
        """A prompt's text ids, the rows of `codes` [N] in the image's place."""
        tokens = tokens.clone()
        if codes is not None:
            tokens[tokens == self.policy.image_slot] = self.code_ids[codes]
        return tokens

    def replay(
        self, rollout: Rollout, codes: Tensor | None, *, temperature: float, cfg_weight: float
    ) -> list[tuple[Tensor, Tensor]]:
        """(conditional, mixed) log-probabilities of each segment's tokens; `codes` [N] are those of a shown image."""
        out = []
        ids = self.shown(rollout.prompt_tokens, codes)
        for segment in rollout.segments:
            image = segment.kind == "image"
            given = self.code_ids[segment.tokens] if image else segment.tokens
            ids = torch.cat([ids, segment.lead, given])
            logits = self.logits(ids)[-1 - len(given) : -1]
            if image:
                empty = self.policy.unconditional_tokens() if segment.free_prompt is None else segment.free_prompt
                other = self.logits(torch.cat([empty, given]))[-1 - len(given) : -1]
                mixed = (other + cfg_weight * (logits - other))[:, self.code_ids]
                logits = logits[:, self.code_ids]
            else:
                mixed = logits = logits.index_fill(1, self.never_in_text, -torch.inf)
            out.append((scored(logits / temperature, segment.tokens), scored(mixed / temperature, segment.tokens)))
        return out


def scored(logits: Tensor, tokens: Tensor) -> Tensor:
    """[N, V], [N] -> [N] log-probabilities."""
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
