"""Inputs of the cases. All tensors that a provider reads are made here, once, outside the timed part.

Logits have a standard deviation of about 1.5 and old log-probabilities lie 0.15 around the current ones, so that about
a fifth of the ratios is clipped. Every sequence is full, so that the padded form of the peers holds no padding in the
cases with a head; in `TokenProblem` a tenth of the tokens is masked, in both forms alike.

Dims: `T` tokens, `S` sequences, `N` rows of a head, `V` vocabulary, `D` hidden, `B` decode rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from shapes import GROUP, HeadShape, LogitShape, TokenShape
from torch import Tensor

from syncr1.kernels.api import TokenStream, group_advantages

SPREAD = 1.5
DRIFT = 0.15
BETA = 0.04


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """One vocabulary and the rows that belong to it; hidden and weight are leaves with gradient."""

    name: Literal["text", "image"]
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    rows: Tensor

    def stream(self) -> TokenStream:
        """As our op takes it."""
        return TokenStream(self.hidden, self.weight, self.targets, self.rows, modality=self.name)


@dataclass(frozen=True, slots=True, eq=False)
class HeadProblem:
    """A batch for a loss from hidden states."""

    shape: HeadShape
    heads: list[Head]
    rewards: Tensor
    advantages: Tensor
    cu_seqlens: Tensor
    group_offsets: Tensor
    old_logp: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [leaf for head in self.heads for leaf in (head.hidden, head.weight)]

    @property
    def names(self) -> list[str]:
        """Names of `leaves`."""
        return [f"d{part}/{head.name}" for head in self.heads for part in ("hidden", "weight")]

    def padded(self, values_T: Tensor) -> Tensor:
        """[T, …] as [S, L, …]: all sequences are full."""
        return values_T.view(-1, self.shape.length, *values_T.shape[1:])


@dataclass(frozen=True, slots=True, eq=False)
class TokenProblem:
    """A batch for a loss from log-probabilities; the [S, L] form is a view of the packed one."""

    shape: TokenShape
    logp: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    entropy: Tensor
    loss_mask: Tensor
    rewards: Tensor
    advantages: Tensor
    cu_seqlens: Tensor
    group_offsets: Tensor

    def padded(self, values_T: Tensor) -> Tensor:
        """[T] as [S, L]."""
        return values_T.view(self.shape.sequences, self.shape.length)


@dataclass(frozen=True, slots=True, eq=False)
class LogitProblem:
    """Logits; `uncond`, seeds and offsets are for sampling."""

    shape: LogitShape
    logits: Tensor
    targets: Tensor
    uncond: Tensor
    seed: Tensor
    offset: Tensor


def _groups(num_sequences: int, length: int, generator: torch.Generator, device: str) -> tuple[Tensor, ...]:
    rewards = torch.rand(num_sequences, generator=generator).to(device)
    offsets = torch.arange(0, num_sequences + 1, GROUP, dtype=torch.int32, device=device)
    cu_seqlens = torch.arange(0, num_sequences * length + 1, length, dtype=torch.int32, device=device)
    return rewards, group_advantages(rewards, offsets, backend="reference"), cu_seqlens, offsets


def _old_logp(hidden: Tensor, weight: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
    """Within `DRIFT` of the current log-probability without a matrix product.

    Weights are Gaussian, so the log-sum-exp of a row is close to log V + |h|² var(w) / 2.
    """
    logit = torch.cat(
        [(h.float() * weight[t].float()).sum(-1) for h, t in zip(hidden.split(1024), targets.split(1024), strict=True)]
    )
    variance = SPREAD**2 / hidden.shape[1]
    lse = math.log(weight.shape[0]) + hidden.float().square().sum(-1) * variance / 2
    return logit - lse + DRIFT * noise


def _head(name: Literal["text", "image"], rows: Tensor, vocabulary: int, shape: HeadShape) -> Head:
    device, dtype = shape.device, shape.dtype
    hidden = torch.randn(rows.numel(), shape.hidden, device=device, dtype=dtype)
    weight = torch.randn(vocabulary, shape.hidden, device=device, dtype=dtype).mul_(SPREAD / math.sqrt(shape.hidden))
    targets = torch.randint(vocabulary, (rows.numel(),), device=device)
    return Head(name, hidden.requires_grad_(), weight.requires_grad_(), targets, rows)


@torch.no_grad()
def head_problem(shape: HeadShape) -> HeadProblem:
    """One head, or text followed by image tokens in every sequence."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    sequences = shape.rows // shape.length
    rewards, advantages, cu_seqlens, group_offsets = _groups(sequences, shape.length, generator, shape.device)
    position = torch.arange(shape.rows, device=shape.device)
    if shape.image_vocabulary:
        text = position % shape.length < shape.length - int(shape.length * shape.image_share)
        heads = [
            _head("text", position[text], shape.vocabulary, shape),
            _head("image", position[~text], shape.image_vocabulary, shape),
        ]
    else:
        heads = [_head("text", position, shape.vocabulary, shape)]
    noise = torch.randn(shape.rows, generator=generator).to(shape.device)
    old_logp = torch.empty(shape.rows, device=shape.device)
    for head in heads:
        old_logp[head.rows] = _old_logp(head.hidden, head.weight, head.targets, noise[head.rows])
    return HeadProblem(shape, heads, rewards, advantages, cu_seqlens, group_offsets, old_logp)


@torch.no_grad()
def concatenated(problem: HeadProblem) -> HeadProblem:
    """The same tokens under one vocabulary: text ids, then image ids."""
    text, image = problem.heads
    shape = problem.shape
    hidden = torch.empty(shape.rows, shape.hidden, dtype=shape.dtype, device=shape.device)
    targets = torch.empty(shape.rows, dtype=torch.int64, device=shape.device)
    weight = torch.cat([text.weight, image.weight])
    for head, first in ((text, 0), (image, shape.vocabulary)):
        hidden[head.rows] = head.hidden
        targets[head.rows] = head.targets + first
    noise = torch.randn(shape.rows, generator=torch.Generator().manual_seed(0)).to(shape.device)
    rows = torch.arange(shape.rows, device=shape.device)
    old_logp = _old_logp(hidden, weight, targets, noise)
    head = Head("text", hidden.requires_grad_(), weight.requires_grad_(), targets, rows)
    return replace(problem, heads=[head], old_logp=old_logp)


@torch.no_grad()
def token_problem(shape: TokenShape) -> TokenProblem:
    """Log-probabilities of about -3 nats, drifted from the old and the reference policy."""
    generator = torch.Generator().manual_seed(0)
    rewards, advantages, cu_seqlens, group_offsets = _groups(shape.sequences, shape.length, generator, shape.device)
    total = shape.sequences * shape.length

    def draw() -> Tensor:
        return torch.randn(total, generator=generator).to(shape.device)

    logp = -3 + draw()
    mask = torch.rand(total, generator=generator).to(shape.device) < 0.9
    return TokenProblem(
        shape,
        logp.clone().requires_grad_(),
        logp + DRIFT * draw(),
        logp + DRIFT * draw(),
        3 + 0.1 * draw(),
        mask,
        rewards,
        advantages,
        cu_seqlens,
        group_offsets,
    )


@torch.no_grad()
def logit_problem(shape: LogitShape) -> LogitProblem:
    """Two sets of Gaussian logits; a row's seed and offset are its own."""
    torch.manual_seed(0)
    rows, vocabulary, device = shape.rows, shape.vocabulary, shape.device
    logits = torch.randn(rows, vocabulary, device=device, dtype=shape.dtype).mul_(SPREAD)
    uncond = torch.empty(0, device=device)
    if rows <= 1024:  # only sampling uses it
        uncond = logits + 0.3 * torch.randn(rows, vocabulary, device=device, dtype=shape.dtype)
    targets = torch.randint(vocabulary, (rows,), device=device)
    seed = torch.full((rows,), 7, dtype=torch.int64, device=device)
    return LogitProblem(shape, logits, targets, uncond, seed, torch.arange(rows, device=device))
