"""Classifier-free-guided sampling of one token per row.

    z = u + w (c − u),   p = softmax(z / temperature),   token = first v with Σ_{j≤v} p_j > U · Σ_j p_j

over what top_k, then top_p, then min_p leave: transformers' order. vLLM has min_p first, which makes top_p a share of
less; the two are one unless both are on.

U is one Philox uniform per row, keyed by (seed, offset): the draw of a row does not depend on the batch it is in.
Running sums are float64 over the vocabulary's order; an id of probability 0 is never returned. Inverse CDF rather than
Gumbel noise: one random number per row instead of V, and no logarithms.

Dims: `B` rows, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..outputs import CFGSample
from ..support import pack
from ..terms import SampleInputs
from .logp import LOGP_FLOOR, accumulator
from .philox import uniform

TOP_P_SLACK = 1e-6
"""Relative: a set that holds top_p but for the rounding of float32 holds it, and an id that has min_p but for it stays.
Half of eight equal ids are four, whatever the sums of a backend come to; below this no backend promises which of two
sets is taken."""


def sample(inputs: SampleInputs) -> CFGSample:
    """See `syncr1.kernels.api.cfg_sample`."""
    cond, uncond, cfg_weight, temperature, top_k, top_p, min_p, seed, offset, forbidden, with_support, _ = inputs
    # Greedy is the limit temperature → 0; its log-probabilities are reported at temperature 1.
    divisor = temperature or 1.0
    cond_BV = guided_BV = _logits(cond, divisor, forbidden)
    if uncond is not None and cfg_weight != 1.0:
        raw_BV, free_BV = cond.to(cond_BV.dtype), uncond.to(cond_BV.dtype)
        guided_BV = _logits(torch.add(free_BV, raw_BV - free_BV, alpha=cfg_weight), divisor, forbidden)
    logp_BV = cond_BV.log_softmax(dim=-1)
    mixed_BV = logp_BV if guided_BV is cond_BV else guided_BV.log_softmax(dim=-1)
    if temperature == 0:
        token_B, kept_BV = mixed_BV.argmax(dim=-1), mixed_BV > -torch.inf
    else:
        drawn_BV = truncate(mixed_BV, top_k, top_p, min_p).exp()
        token_B, kept_BV = _inverse_cdf(drawn_BV, uniform(seed, offset)), drawn_BV > 0
    if with_support:
        logp_BV, mixed_BV = (z.masked_fill(~kept_BV, -torch.inf).log_softmax(dim=-1) for z in (cond_BV, guided_BV))
    entropy_B = -torch.linalg.vecdot(logp_BV.exp(), logp_BV.clamp_min(LOGP_FLOOR))
    index_B1 = token_B.unsqueeze(1)
    logp_B, mixed_B = (scores_BV.gather(1, index_B1)[:, 0] for scores_BV in (logp_BV, mixed_BV))
    return CFGSample(token_B, logp_B, mixed_B, entropy_B, pack(kept_BV) if with_support else None)


def _logits(logits: Tensor, divisor: float, forbidden: Tensor | None) -> Tensor:
    logits_BV = logits.to(accumulator(logits.dtype))
    if divisor != 1.0:
        logits_BV = logits_BV / divisor
    if forbidden is not None:
        logits_BV = logits_BV.index_fill(1, forbidden, -torch.inf)
    return logits_BV


def wanted_share(top_p: float) -> float:
    """The share of the mass from which on a set holds `top_p`; 1 leaves nothing out."""
    return top_p * (1 - TOP_P_SLACK) if top_p < 1 else 1.0


def least_share(min_p: float) -> float:
    """The share of the greatest probability from which on an id stays; 0 leaves nothing out."""
    return min_p * (1 - TOP_P_SLACK)


def truncate(logp_BV: Tensor, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """-inf outside the `top_k` most likely ids, then outside the smallest set of the rest that holds `top_p`, then
    where the probability is less than `min_p` of the greatest, which neither of the two has changed.

    Equal probabilities go to the lower id; min_p keeps all of them or none.
    """
    highest_B1 = logp_BV.amax(dim=-1, keepdim=True) if min_p > 0 else None
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
    if highest_B1 is not None:
        logp_BV = logp_BV.masked_fill((logp_BV - highest_B1).exp() < least_share(min_p), -torch.inf)
    return logp_BV


def _inverse_cdf(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """[B] int64: the first id whose running sum exceeds U times the total."""
    cumulative_BV = probability_BV.cumsum(dim=-1, dtype=torch.float64)
    threshold_B1 = uniform_B.unsqueeze(1) * cumulative_BV[:, -1:]
    # A row of NaN has no such id; its log-probabilities are NaN and the op says so.
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(1).clamp_max(cumulative_BV.shape[1] - 1)
