"""What a token's policy loss is multiplied by, from a scoring pass before the first update: [T] `PackedBatch.is_ratio`.

**The sampler's policy.** What was sampled had probability mu under the sampler (its cached, batched decoding in the
sampler's dtype), and has pi under the trainer, by the same weights.  The policy gradient is unbiased when each token's
loss is multiplied by

    token       w_t = pi(t) / mu(t)                        sequence    w = prod_t pi(t) / mu(t)
    truncate    min(w, cap)                                mask        w where w <= cap, else 0

The sequence's is the product over all tokens that the trajectory sampled, of both modalities, as TRL has it: it is the
exact weight of a trajectory, and of hundreds of image tokens it is seldom near 1.  (`importance_sampling_level`, the
ratio between updates, is another one: there `sequence` is the geometric mean.)  A token whose probability the sampler
did not record has w 1.

**High entropy.** `top_entropy_quantile` leaves the other tokens' policy loss out, their KL term stays.  The threshold
is of all of an update's rewarded tokens, each modality apart, over micro-batches and ranks, under the policy before the
first update; it holds for all of `num_iterations`.

Sources: TRL 1.16, `vllm_importance_sampling_mode` (token_truncate, token_mask, sequence_truncate, sequence_mask; its
clip_max is `importance_cap`) and its names of metrics; truncation: Yao et al. 2025, "Your efficient RL framework
secretly brings you off-policy RL training"; entropy: Wang et al. 2025, arXiv 2506.01939.

Dims: T tokens of a micro-batch, S its sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..forward.objective import Objective
from ..records import MODALITY_NAMES, PackedBatch
from .metrics import counted

RATIO, DIFFERENCE = "sampling/importance_sampling_ratio", "sampling/sampling_logp_difference"


def sampler_ratio(batch: PackedBatch, logp: Tensor, objective: Objective) -> tuple[Tensor, dict[str, float]]:
    """[T] float32 w after truncation or masking, 1 where nothing was sampled; and what there is to tell of it.

    Args:
        batch: whose `sampled_logp` is the sampler's.
        logp: [T] float32 nats, the trainer's own before the first update.
        objective: `importance_correction`, which is not `none`, its level and its cap.
    """
    cap, known = objective.importance_cap, batch.loss_mask & batch.sampled_logp.isfinite()
    gap = torch.where(known, logp.double() - batch.sampled_logp, 0.0)
    if objective.importance_level == "sequence":
        lengths = batch.cu_seqlens.diff().long()
        owner = torch.arange(lengths.numel(), device=gap.device).repeat_interleave(lengths)
        ratio = torch.zeros(lengths.numel(), dtype=torch.float64, device=gap.device).index_add_(0, owner, gap).exp()
        of_what = torch.zeros(lengths.numel(), dtype=torch.bool, device=gap.device)
        of_what[owner[batch.loss_mask]] = True
    else:
        owner, ratio, of_what = None, gap.exp(), batch.loss_mask
    if objective.importance_correction == "mask":
        ratio = torch.where(ratio > cap, 0.0, ratio)
    ratio = ratio.clamp(max=cap)
    told = _told(ratio[of_what].cpu(), gap[known].abs().cpu())
    ratio_T = ratio if owner is None else ratio[owner]
    return torch.where(batch.loss_mask, ratio_T, 1.0).float(), told


def _told(ratio: Tensor, gap: Tensor) -> dict[str, float]:
    """Over what one micro-batch has; NaN where it has nothing."""
    some, none = ratio.numel() > 0, gap.numel() == 0
    return {
        **counted({f"{RATIO}/mean": float(ratio.mean()) if some else math.nan}, ratio.numel()),
        f"{RATIO}/min": float(ratio.min()) if some else math.nan,
        f"{RATIO}/max": float(ratio.max()) if some else math.nan,
        **counted({f"{DIFFERENCE}/mean": math.nan if none else float(gap.mean())}, gap.numel()),
        f"{DIFFERENCE}/max": math.nan if none else float(gap.max()),
    }


def of_high_entropy(
    batches: Sequence[PackedBatch],
    entropies: Sequence[Tensor],
    quantile: float,
    of_all_ranks: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """[T] bool for each micro-batch: False for tokens below the update's threshold. Collective.

    Args:
        batches: of this rank; anchors have no policy loss and no part in the threshold.
        entropies: [T] float32 nats each.
        quantile: the share of tokens that stay, in (0, 1].
        of_all_ranks: a vector of each rank to all of them, one behind the other.
    """
    high = [torch.ones_like(batch.loss_mask) for batch in batches]
    for code in range(len(MODALITY_NAMES)):
        rows = [batch.loss_mask & (batch.modality == code) & (not batch.anchor) for batch in batches]
        own = torch.cat([entropy[row] for entropy, row in zip(entropies, rows, strict=True)])
        values = of_all_ranks(own)
        if not values.numel():
            continue
        threshold = values.sort().values[int((1 - quantile) * values.numel())]  # as `entropy_thresholds` of the kernels
        for mask, entropy, row in zip(high, entropies, rows, strict=True):
            mask &= ~row | (entropy >= threshold.to(entropy.device))
    return high
