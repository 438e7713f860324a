"""The rest of a picture that is drawn in part, cheaply: what a preview shows.

`fill` repeats the last drawn row, which costs nothing.  `most_likely` goes on from there: one pass of the trunk over
the repeated rows, in the cache, behind what was drawn; every undrawn token becomes the most likely one, as in a masked
model's one-shot fill.  `bench/preview.py` measures what either is worth.

Dims: n sequences, k tokens drawn, N tokens of an image, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..policies.base import Policy
from ..policies.cache import Extend, Rows, Store

TOKENS_AT_ONCE = 1 << 14
"""In one pass of the trunk."""
LOGITS_AT_ONCE = 1 << 11
"""Tokens whose logits exist at a time."""


def fill(tokens: Tensor, num_tokens: int, forced: Tensor | None = None) -> Tensor:
    """[n, k] -> [n, N]: the rest of the picture repeats its last drawn row (cheap, and it stays a picture)."""
    if forced is not None:
        free = (forced < 0).to(tokens.device)
        whole = forced.to(tokens.device).repeat(tokens.shape[0], 1)
        whole[:, free] = fill(tokens[:, free[: tokens.shape[1]]], int(free.sum()))
        return whole
    side = round(num_tokens**0.5)
    columns = torch.arange(num_tokens, device=tokens.device)
    drawn = tokens.shape[1]
    last_row = max(0, (drawn // side - 1) * side)
    source = torch.where(columns < drawn, columns, (last_row + columns % side).clamp(max=drawn - 1))
    return tokens[:, source]


@torch.no_grad()
def most_likely(
    policy: Policy,
    filled: Tensor,
    drawn: int,
    sides: Sequence[Rows],
    prompts: Store,
    own: Store,
    *,
    cfg_weight: float = 1.0,
) -> Tensor:
    """[n, N]: pictures `filled` [n, N] whose tokens from `drawn` on are the most likely ones, each given all before it.

    Args:
        sides: [n] conditional rows behind their last drawn token, and their classifier-free twins where there is
            guidance; they stay where they are, but what lies behind them in `own` is written over, up to the place
            before the image's last token.
        prompts, own: the caches.
        cfg_weight: w of the logits u + w (c - u).
    """
    size = max(1, TOKENS_AT_ONCE // max(1, filled.shape[1] - 1 - drawn))
    each = torch.arange(len(filled), device=filled.device).split(size)
    modes = []
    for part in each:
        hidden = [_behind(policy, filled[part, drawn:-1], rows.take(part), prompts, own) for rows in sides]
        modes.append(_modes(policy, hidden, cfg_weight).view(len(part), -1))
    likely = torch.cat(modes)
    forced = policy.forced_image_tokens()
    if forced is not None:
        rest = forced[drawn:].to(filled.device)
        likely = torch.where(rest >= 0, rest, likely)
    return torch.cat([filled[:, :drawn], likely], 1)


def _behind(policy: Policy, given: Tensor, rows: Rows, prompts: Store, own: Store) -> Tensor:
    """[n (L + 1), D] hidden states that predict the next place, and what is behind each of `given` [n, L]."""
    n, length = given.shape
    hidden = rows.hidden[:, None]
    if length:
        embeddings = policy.embed(given.flatten(), "image").view(n, length, -1)
        positions = rows.position[:, None] + torch.arange(length, device=given.device)
        behind = policy.trunk(embeddings, positions, Extend(prompts, own, rows.spans, [length] * n))
        hidden = torch.cat([hidden.to(behind.dtype), behind], 1)
    return hidden.flatten(0, 1)


def _modes(policy: Policy, sides: Sequence[Tensor], cfg_weight: float) -> Tensor:
    """[M] most likely image tokens by the hidden states [M, D] of one side, or of two and guidance."""
    found = []
    for parts in zip(*(side.split(LOGITS_AT_ONCE) for side in sides), strict=True):
        heads = [policy.head(part, "image") for part in parts]
        conditional, free = heads[0], heads[-1]
        hidden = free.hidden.float().lerp(conditional.hidden.float(), cfg_weight).to(conditional.hidden.dtype)
        logits = torch.nn.functional.linear(hidden, conditional.weight, conditional.bias)
        if conditional.forbidden is not None:
            logits[:, conditional.forbidden] = -torch.inf
        found.append(logits.argmax(-1))
    return torch.cat(found)
