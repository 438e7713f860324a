"""Eager PyTorch of what the ops compute, on padded [S, L] batches: the baseline, and what `torch.compile` is given.

Dims: `S` sequences, `L` padded length, `N` rows, `V` vocabulary, `B` decode rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLIP = 0.2


def row_logp(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """(logp, entropy), both [N]; the entropy is for metrics and has no gradient."""
    logp_NV = logits_NV.float().log_softmax(-1)
    logp_N = logp_NV.gather(1, targets_N[:, None])[:, 0]
    with torch.no_grad():
        entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
    return logp_N, entropy_N


def padded_grpo_loss(
    logp_SL: Tensor,
    old_SL: Tensor,
    advantage_S: Tensor,
    mask_SL: Tensor,
    num_items: float,
    ref_SL: Tensor | None = None,
    entropy_SL: Tensor | None = None,
    beta: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The dapo loss and its metrics."""
    advantage_S1 = advantage_S[:, None]
    ratio_SL = (logp_SL - old_SL).exp()
    clipped_SL = ratio_SL.clamp(1 - CLIP, 1 + CLIP)
    loss_SL = -torch.minimum(ratio_SL * advantage_S1, clipped_SL * advantage_S1)
    metrics: dict[str, Tensor] = {}
    count = mask_SL.sum().clamp_min(1)
    if ref_SL is not None:
        difference_SL = ref_SL - logp_SL
        kl_SL = difference_SL.exp() - difference_SL - 1
        loss_SL = loss_SL + beta * kl_SL
        metrics["kl"] = (kl_SL.detach() * mask_SL).sum() / count
    with torch.no_grad():
        low_SL = (ratio_SL < 1 - CLIP) & (advantage_S1 < 0) & mask_SL
        high_SL = (ratio_SL > 1 + CLIP) & (advantage_S1 > 0) & mask_SL
        metrics |= {"clip_low": low_SL.sum() / count, "clip_high": high_SL.sum() / count}
        metrics["ratio_mean"] = (ratio_SL * mask_SL).sum() / count
        metrics["ratio_max"] = ratio_SL.masked_fill(~mask_SL, -torch.inf).max()
        metrics["ratio_min"] = ratio_SL.masked_fill(~mask_SL, torch.inf).min()
        if entropy_SL is not None:
            metrics["entropy"] = (entropy_SL * mask_SL).sum() / count
    return (loss_SL * mask_SL).sum() / num_items, metrics


def truncate(mixed_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Top-k, then top-p, as the warpers of transformers do it."""
    if top_k:
        least_B1 = mixed_BV.topk(top_k).values[:, -1:]
        mixed_BV = mixed_BV.masked_fill(mixed_BV < least_B1, -torch.inf)
    if top_p < 1:
        sorted_BV, order_BV = mixed_BV.sort(descending=False)
        dropped_BV = sorted_BV.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped_BV[:, -1] = False
        mixed_BV = mixed_BV.masked_fill(dropped_BV.scatter(1, order_BV, dropped_BV), -torch.inf)
    return mixed_BV


def draw_token(cond_BV: Tensor, uncond_BV: Tensor, cfg_weight: float, top_k: int, top_p: float) -> dict[str, Tensor]:
    """The sampling step alone: no log-probabilities."""
    mixed_BV = (uncond_BV + cfg_weight * (cond_BV - uncond_BV)).float()
    return {"token": torch.multinomial(truncate(mixed_BV, top_k, top_p).softmax(-1), 1)[:, 0]}


def draw_with_logp(
    cond_BV: Tensor, uncond_BV: Tensor, cfg_weight: float, top_k: int, top_p: float
) -> dict[str, Tensor]:
    """The sampling step with the outputs of `cfg_sample`."""
    mixed_BV = (uncond_BV + cfg_weight * (cond_BV - uncond_BV)).float()
    token_B1 = torch.multinomial(truncate(mixed_BV, top_k, top_p).softmax(-1), 1)
    logp_BV = cond_BV.float().log_softmax(-1)
    return {
        "token": token_B1[:, 0],
        "logp": logp_BV.gather(1, token_B1)[:, 0],
        "logp_mixed": mixed_BV.log_softmax(-1).gather(1, token_B1)[:, 0],
        "entropy": -(logp_BV.exp() * logp_BV).sum(-1),
    }
