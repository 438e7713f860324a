"""Shared-prefix attention in plain PyTorch, group by group: the specification. Any device and float dtype, autograd's
own gradients.

Dims: `T` tokens, `Tp` of them in prefixes, `Tr` in responses, `N` tokens of a group or queries over `M` keys, `H` query
heads, `K` key-value heads, `E` head size.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..layout import segment_ids
from .varlen import Plan, offsets_of


def dense_attention(q: Tensor, k: Tensor, v: Tensor, seen_NM: Tensor, scale: float) -> Tensor:
    """softmax(q kᵀ · scale) v where `seen` is True: [N, H, E]; scores in float32, or float64 for float64."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_HNE, k_HME, v_HME = (x.to(wide).transpose(0, 1) for x in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k_HME, v_HME = k_HME.repeat_interleave(repeats, 0), v_HME.repeat_interleave(repeats, 0)
    scores_HNM = (q_HNE @ k_HME.transpose(1, 2) * scale).masked_fill(~seen_NM, -torch.inf)
    return (scores_HNM.softmax(-1) @ v_HME).transpose(0, 1).to(q.dtype)


def _seen(plan: Plan, group: int, device: torch.device) -> Tensor:
    """[N, N] bool: which tokens of the group, [prefix | responses], see which.

    Segment 0 is the prefix; a token sees its own segment and the prefix, up to its own place or, if that is further,
    to the end of what is whole in its segment.
    """
    members = range(*plan.groups[group : group + 2])
    lengths = [
        plan.prefixes[group + 1] - plan.prefixes[group],
        *(plan.sequences[s + 1] - plan.sequences[s] for s in members),
    ]
    offsets = offsets_of(lengths)
    segment = segment_ids(torch.tensor(offsets, device=device), offsets[-1])
    place = torch.arange(offsets[-1], device=device)
    last = place
    if plan.whole_prefixes or plan.whole_responses:
        whole = [plan.whole_prefixes[group], *(plan.whole_responses[s] for s in members)]
        ends = torch.tensor([start + size for start, size in zip(offsets[:-1], whole, strict=True)], device=device)
        last = torch.maximum(place, ends[segment] - 1)
    return ((segment[:, None] == segment) | (segment == 0)) & (place <= last[:, None])


def attend(plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [T, H, E], k and v [T, K, E] → [T, H, E]."""
    outs_prefix, outs_responses = [q[:0]], []
    first_response = plan.num_prefix_tokens
    for p, (start, end) in enumerate(pairwise(plan.prefixes)):
        a, b = (first_response + offset for offset in plan.spans[p : p + 2])
        q_NHE, k_NKE, v_NKE = (torch.cat([x[start:end], x[a:b]]) for x in (q, k, v))
        out = dense_attention(q_NHE, k_NKE, v_NKE, _seen(plan, p, q.device), scale)
        outs_prefix.append(out[: end - start])
        outs_responses.append(out[end - start :])
    return torch.cat(outs_prefix + outs_responses)


def attend_over_cache(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, prefix_keys: Tensor, prefix_values: Tensor, scale: float
) -> Tensor:
    """q [Tr, H, E], k and v [Tr, K, E], prefix keys and values [K, ≥ Tp, E] → [Tr, H, E]."""
    outs = [q[:0]]
    for p, (start, end) in enumerate(pairwise(plan.prefixes)):
        own = slice(*plan.spans[p : p + 2])
        keys, values = (
            torch.cat([cache[:, start:end].transpose(0, 1), x[own]])
            for cache, x in ((prefix_keys, k), (prefix_values, v))
        )
        outs.append(dense_attention(q[own], keys, values, _seen(plan, p, q.device)[end - start :], scale))
    return torch.cat(outs)
