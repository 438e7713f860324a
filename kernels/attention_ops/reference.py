"""Shared-prefix attention in plain PyTorch, group by group: the specification. Any device and float dtype, autograd's
own gradients.

Dims: `T` tokens, `N` tokens of a group, `H` query heads, `K` key-value heads, `E` head size.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..layout import segment_ids
from .varlen import Plan, offsets_of


def dense_attention(q: Tensor, k: Tensor, v: Tensor, seen_NN: Tensor, scale: float) -> Tensor:
    """softmax(q kᵀ · scale) v where `seen` is True: [N, H, E]; scores in float32, or float64 for float64."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_HNE, k_HNE, v_HNE = (x.to(wide).transpose(0, 1) for x in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k_HNE, v_HNE = k_HNE.repeat_interleave(repeats, 0), v_HNE.repeat_interleave(repeats, 0)
    scores_HNN = (q_HNE @ k_HNE.transpose(1, 2) * scale).masked_fill(~seen_NN, -torch.inf)
    return (scores_HNN.softmax(-1) @ v_HNE).transpose(0, 1).to(q.dtype)


def attend(plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [T, H, E], k and v [T, K, E] → [T, H, E]."""
    outs_prefix, outs_responses = [q[:0]], []
    first_response = plan.num_prefix_tokens
    for p, (start, end) in enumerate(pairwise(plan.prefixes)):
        a, b = (first_response + offset for offset in plan.spans[p : p + 2])
        # Segment 0 is the prefix; a token sees its own segment and the prefix, up to its own place.
        lengths = [end - start, *(plan.sequences[s + 1] - plan.sequences[s] for s in range(*plan.groups[p : p + 2]))]
        total = sum(lengths)
        segment = segment_ids(torch.tensor(offsets_of(lengths), device=q.device), total)
        place = torch.arange(total, device=q.device)
        seen = ((segment[:, None] == segment) | (segment == 0)) & (place <= place[:, None])
        q_NHE, k_NKE, v_NKE = (torch.cat([x[start:end], x[a:b]]) for x in (q, k, v))
        out = dense_attention(q_NHE, k_NKE, v_NKE, seen, scale)
        outs_prefix.append(out[: end - start])
        outs_responses.append(out[end - start :])
    return torch.cat(outs_prefix + outs_responses)
