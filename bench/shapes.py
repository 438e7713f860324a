"""Sizes of the cases: `full` are those of the goals, `quick` only show that everything runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

GROUP = 8
"""Trajectories per prompt."""


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Rows of hidden states against one vocabulary, or against two."""

    rows: int
    hidden: int
    vocabulary: int
    """Of the only head, or of text."""
    image_vocabulary: int = 0
    """0: there is one head."""
    image_share: float = 0.0
    """Share of the tokens of a sequence that are image tokens."""
    length: int = 256
    """Tokens per sequence."""
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __str__(self) -> str:
        vocabulary = f"{self.vocabulary}" + (f"|{self.image_vocabulary}" if self.image_vocabulary else "")
        return f"{self.rows} x {self.hidden} x {vocabulary} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, slots=True)
class TokenShape:
    """A padded batch of sequences, for the loss from log-probabilities."""

    sequences: int
    length: int
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.sequences} x {self.length} tokens"


@dataclass(frozen=True, slots=True)
class LogitShape:
    """Rows of logits."""

    rows: int
    vocabulary: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    top_k: int = 0
    top_p: float = 1.0

    def __str__(self) -> str:
        drawn = f", top-k {self.top_k}, top-p {self.top_p}" if self.top_k or self.top_p < 1 else ""
        return f"{self.rows} x {self.vocabulary} {str(self.dtype).removeprefix('torch.')}{drawn}"


Shape = HeadShape | TokenShape | LogitShape

CPU: dict[str, Shape] = {
    "linear_small": HeadShape(2048, 512, 16384),
    "linear_large": HeadShape(4096, 768, 32768),
    "on_policy": HeadShape(2048, 512, 16384),
    "memory_4k": HeadShape(4096, 512, 16384),
    "memory_16k": HeadShape(16384, 512, 16384),
    "mixed": HeadShape(4096, 512, 32768, 16384, 0.75),
    "pruned": HeadShape(4096, 512, 16384),
    "grpo_loss": TokenShape(128, 512),
    "selective_logp": LogitShape(4096, 32768),
    "cfg_sample": LogitShape(64, 16384),
    "cfg_sample_top_p": LogitShape(64, 16384, top_k=1000, top_p=0.9),
}
CUDA: dict[str, Shape] = {
    "linear_large": HeadShape(16384, 2048, 102400, length=512, dtype=torch.bfloat16, device="cuda"),
    "on_policy": HeadShape(4096, 2048, 102400, length=512, dtype=torch.bfloat16, device="cuda"),
    "mixed": HeadShape(16384, 2048, 102400, 16384, 0.75, length=512, dtype=torch.bfloat16, device="cuda"),
    "pruned": HeadShape(16384, 2048, 102400, length=512, dtype=torch.bfloat16, device="cuda"),
    "grpo_loss": TokenShape(128, 512, device="cuda"),
    "selective_logp": LogitShape(8192, 102400, torch.bfloat16, "cuda"),
    "cfg_sample": LogitShape(64, 16384, torch.bfloat16, "cuda"),
    "cfg_sample_top_p": LogitShape(64, 16384, torch.bfloat16, "cuda", top_k=1000, top_p=0.9),
}


def quick(shape: Shape) -> Shape:
    """The same case at a size that takes no time."""
    if isinstance(shape, HeadShape):
        image = 48 if shape.image_vocabulary else 0
        return replace(shape, rows=128, hidden=16, vocabulary=96, image_vocabulary=image, length=8)
    if isinstance(shape, TokenShape):
        return replace(shape, sequences=16, length=12)
    return replace(shape, rows=16, vocabulary=200, top_k=50 if shape.top_k else 0)
