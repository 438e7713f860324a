"""How much one text says the same as another: BERTScore, soft Jaccard, and their mean.

    p_i = max_j cos(x_i, y_j),  r_j = max_i cos(x_i, y_j),  F1 = 2 p r / (p + r)  of their means

over the tokens of a candidate x and a reference y, special tokens left out. As in the authors' and torchmetrics' code
no maximum is below 0 (there, masked tokens are zero vectors that take part in it). No idf weights, no baseline.
torchmetrics 1.9, which the released code calls with a whole group, sorts a batch by length and does not undo it: most
F1s then belong to another pair (59 of 60 sentences of 1 to 14 words). Here each stays with its own.
Source: Zhang et al., BERTScore (2020); ULM-R1 takes bert-base-uncased first, and later the mean of soft Jaccard and
BERTScore over all-mpnet-base-v2.

Dims: n texts or pairs, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, PreTrainedModel

from .accuracy import soft_jaccard
from .pretrained import Pretrained, frozen

TextSimilarity = Callable[[Sequence[str], Sequence[str]], list[float]]
"""n candidates and n references to likeness in [0, 1]; 0 for an empty text."""


class BertScore(Pretrained):
    """BERTScore F1; each different text of a call goes through the model once.

    Args:
        model: an encoder, put into eval mode.
        tokenizer: its own.
        layer: whose hidden states are compared; -1 is the last, 0 the embeddings.
        max_length: longer texts are cut; None: as many tokens as the model has positions, 512 at most.
        batch_size: texts in one pass, and pairs compared at once.

    Raises:
        ValueError: the model has no such layer.
    """

    model_class = AutoModel

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        layer: int = -1,
        max_length: int | None = None,
        batch_size: int = 64,
    ) -> None:
        self.model, self.tokenizer, self.layer = frozen(model), tokenizer, layer
        self.max_length = max_length or _num_positions(model, tokenizer)
        self.batch_size = batch_size
        layers = int(model.config.num_hidden_layers) + 1
        if not -layers <= layer < layers:
            raise ValueError(f"BERTScore: layer {layer} is not there; the model has 0 (embeddings) to {layers - 1}")

    @torch.no_grad()
    def __call__(self, candidates: Sequence[str], references: Sequence[str]) -> list[float]:
        """n candidates and n references -> F1 of each pair, in [0, 1]; 0 where one has no token."""
        if len(candidates) != len(references):
            raise ValueError(f"BERTScore: {len(candidates)} candidates, but {len(references)} references")
        embedded = self._embed(list(dict.fromkeys([*candidates, *references])))
        values: list[float] = []
        for start in range(0, len(candidates), self.batch_size):
            part = slice(start, start + self.batch_size)
            values += _f1([embedded[t] for t in candidates[part]], [embedded[t] for t in references[part]]).tolist()
        return values

    def _embed(self, texts: list[str]) -> dict[str, Tensor]:
        """[L, D] of length 1 of each text's own tokens, on the model's device."""
        texts = sorted(texts, key=len)  # so that a batch has little padding
        found: dict[str, Tensor] = {}
        for start in range(0, len(texts), self.batch_size):
            part = texts[start : start + self.batch_size]
            inputs = self.tokenizer(
                part,
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_special_tokens_mask=True,
                return_tensors="pt",
            )
            own = (inputs.pop("special_tokens_mask") == 0) & (inputs["attention_mask"] == 1)
            inputs = inputs.to(self.model.device)
            hidden = self.model(**inputs, output_hidden_states=True).hidden_states[self.layer]
            features = F.normalize(hidden.float(), dim=-1)
            for text, row, mask in zip(part, features, own.to(features.device), strict=True):
                found[text] = row[mask]
        return found


def _f1(candidates: list[Tensor], references: list[Tensor]) -> Tensor:
    """[n] float32 of n pairs [L, D]; padding is zero vectors, whose cosine of 0 is the least that counts."""
    first, second = pad_sequence(candidates, batch_first=True), pad_sequence(references, batch_first=True)
    if not first.shape[1] or not second.shape[1]:
        return torch.zeros(len(candidates))
    cosines = torch.einsum("bld,bmd->blm", first, second).clamp(min=0.0)
    num_first, num_second = (
        torch.tensor([len(row) for row in rows], device=first.device).clamp(min=1) for rows in (candidates, references)
    )
    precision = cosines.amax(2).sum(1) / num_first
    recall = cosines.amax(1).sum(1) / num_second
    total = precision + recall
    return torch.where(total > 0, 2 * precision * recall / total.clamp(min=1e-12), 0.0).clamp(max=1.0)


def _num_positions(model: PreTrainedModel, tokenizer: Any) -> int:
    """RoBERTa and MPNet begin to count behind the padding id, so that two of their positions are never used."""
    positions = int(getattr(model.config, "max_position_embeddings", 512))
    if model.config.model_type in ("roberta", "xlm-roberta", "mpnet", "camembert"):
        positions -= int(model.config.pad_token_id) + 1
    return min(512, positions, int(tokenizer.model_max_length))


class SoftJaccard:
    """Words in common over words in all, near-equal ones included; see `soft_jaccard`."""

    def __init__(self, threshold: float = 0.8) -> None:
        self.threshold = threshold

    def __call__(self, candidates: Sequence[str], references: Sequence[str]) -> list[float]:
        """n candidates and n references -> [0, 1] each."""
        return [soft_jaccard(a, b, self.threshold) for a, b in zip(candidates, references, strict=True)]
