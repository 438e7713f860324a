"""Classifier-free-guided sampling of one token per row.

    z = u + w (c − u),   p = softmax(z / temperature),   token = first v with Σ_{j≤v} p_j > U · Σ_j p_j

U is one Philox uniform per row, keyed by (seed, offset): the draw of a row does not depend on the batch it is in.
Running sums are float64 over the vocabulary's order; an id of probability 0 is never returned. Inverse CDF rather than
Gumbel noise: one random number per row instead of V, and no logarithms.

Dims: `B` rows, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..outputs import CFGSample
from ..terms import SampleInputs
from .logp import LOGP_FLOOR, accumulator
from .philox import uniform

TOP_P_SLACK = 1e-6
"""Relative: a set that holds top_p but for the rounding of float32 holds it. Half of eight equal ids are four, whatever
the sums of a backend come to; below this no backend promises which of two sets is taken."""


def sample(inputs: SampleInputs) -> CFGSample:
    """See `syncr1.kernels.api.cfg_sample`."""
    cond, uncond, cfg_weight, temperature, top_k, top_p, seed, offset, forbidden, _ = inputs
    # Greedy is the limit temperature → 0; its log-probabilities are reported at temperature 1.
    divisor = temperature or 1.0
    logp_BV = _log_probabilities(cond, divisor, forbidden)
    probability_BV = logp_BV.exp()
    mixed_BV = logp_BV
    if uncond is not None and cfg_weight != 1.0:
        cond_BV, uncond_BV = cond.to(logp_BV.dtype), uncond.to(logp_BV.dtype)
        guided_BV = torch.add(uncond_BV, cond_BV - uncond_BV, alpha=cfg_weight)
        mixed_BV = _log_probabilities(guided_BV, divisor, forbidden)
    if temperature == 0:
        token_B = mixed_BV.argmax(dim=-1)
    else:
        truncated_BV = truncate(mixed_BV, top_k, top_p)
        drawn_BV = probability_BV if truncated_BV is logp_BV else truncated_BV.exp()
        token_B = _inverse_cdf(drawn_BV, uniform(seed, offset))
    entropy_B = -torch.linalg.vecdot(probability_BV, logp_BV.clamp_min(LOGP_FLOOR))
    index_B1 = token_B.unsqueeze(1)
    return CFGSample(token_B, logp_BV.gather(1, index_B1)[:, 0], mixed_BV.gather(1, index_B1)[:, 0], entropy_B)


def _log_probabilities(logits: Tensor, divisor: float, forbidden: Tensor | None) -> Tensor:
    logits_BV = logits.to(accumulator(logits.dtype))
    if divisor != 1.0:
        logits_BV = logits_BV / divisor
    if forbidden is not None:
        logits_BV = logits_BV.index_fill(1, forbidden, -torch.inf)
    return logits_BV.log_softmax(dim=-1)


def wanted_share(top_p: float) -> float:
    """The share of the mass from which on a set holds `top_p`; 1 leaves nothing out."""
    return top_p * (1 - TOP_P_SLACK) if top_p < 1 else 1.0


def truncate(logp_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf outside the `top_k` most likely ids, then outside the smallest set of the rest that holds `top_p`.

    Equal probabilities go to the lower id.
    """
    if 0 < top_k < logp_BV.shape[1]:
        threshold_B1 = logp_BV.topk(top_k, dim=-1).values[:, -1:]
        keep_BV = logp_BV >= threshold_B1
        if bool((keep_BV.sum(dim=-1) > top_k).any()):  # ties at the threshold, which are rare
            above_BV, equal_BV = logp_BV > threshold_B1, logp_BV == threshold_B1
            num_equal_B1 = top_k - above_BV.sum(dim=-1, keepdim=True)
            keep_BV = above_BV | (equal_BV & (equal_BV.cumsum(dim=-1) <= num_equal_B1))
        logp_BV = logp_BV.masked_fill(~keep_BV, -torch.inf)
    if top_p < 1.0:
        ordered_BV, order_BV = logp_BV.sort(dim=-1, descending=True, stable=True)
        cumulative_BV = ordered_BV.double().exp().cumsum(dim=-1)
        # An id stays while the ids before it hold less than top_p of what top_k left; the first always stays.
        before_BV = cumulative_BV - ordered_BV.double().exp()
        drop_BV = before_BV >= wanted_share(top_p) * cumulative_BV[:, -1:]
        drop_BV[:, 0] = False
        logp_BV = logp_BV.masked_fill(torch.zeros_like(drop_BV).scatter(1, order_BV, drop_BV), -torch.inf)
    return logp_BV


def _inverse_cdf(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """[B] int64: the first id whose running sum exceeds U times the total."""
    cumulative_BV = probability_BV.cumsum(dim=-1, dtype=torch.float64)
    threshold_B1 = uniform_B.unsqueeze(1) * cumulative_BV[:, -1:]
    # A row of NaN has no such id; its log-probabilities are NaN and the op says so.
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(1).clamp_max(cumulative_BV.shape[1] - 1)
