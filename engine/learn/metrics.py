"""A step's metrics: what one rank has to tell, and over all ranks, because rank 0 writes down the run's.

Dims: S trajectories, G members of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from syncr1.kernels.reference.advantage import SPREAD

from ..records import MODALITY_NAMES, PackedBatch, Rollout
from ..rewards.scoring import RewardTable
from ..rollout.sampling import RolloutStats

SUMS = {"num_tokens", "tokens_per_second", "reward_failures", "pack/tokens", "rollout/prefill_tokens"}
SUMS |= {f"tokens/{name}" for name in MODALITY_NAMES}
LARGEST = {"step_time", "rollout/replay_logp_max_abs", "rollout/kv_mib", "updates_skipped"}
LARGEST |= {f"ratio_max/{name}" for name in MODALITY_NAMES}
SMALLEST = {f"ratio_min/{name}" for name in MODALITY_NAMES}
OF_TOKENS = {"kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
"""Means over the tokens of both modalities."""


def merged(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each metric over the ranks that have it: counts added up, extremes kept, everything else averaged.

    Ranks have as many trajectories each, so that they count alike; means over tokens count by their tokens.  NaN is
    "nothing to measure" and is left out; where no rank has anything it stays NaN."""
    if len(ranks) == 1:
        return dict(ranks[0])
    names = list(dict.fromkeys(name for values in ranks for name in values))
    return {name: _merge(name, ranks) for name in names}


def _merge(name: str, ranks: Sequence[Mapping[str, float]]) -> float:
    known = [(values[name], _weight(name, values)) for values in ranks if not math.isnan(values.get(name, math.nan))]
    if not known:
        return math.nan
    values = [value for value, _ in known]
    if name in SUMS:
        return math.fsum(values)
    if name in LARGEST:
        return max(values)
    if name in SMALLEST:
        return min(values)
    total = math.fsum(weight for _, weight in known)
    if total == 0 or len(set(values)) == 1:
        return values[0] if len(set(values)) == 1 else math.fsum(values) / len(values)
    return math.fsum(value * weight for value, weight in known) / total


def _weight(name: str, values: Mapping[str, float]) -> float:
    """Tokens behind a mean over tokens; 1 for every other mean."""
    modality = name.rpartition("/")[2]
    if modality in MODALITY_NAMES:
        return values.get(f"tokens/{modality}", 0.0)
    return math.fsum(values.get(f"tokens/{m}", 0.0) for m in MODALITY_NAMES) if name in OF_TOKENS else 1.0


def of_rewards(table: RewardTable, total_S: Tensor, num_generations: int) -> dict[str, float]:
    """Means, spread within groups and failures."""
    return {
        "reward": _mean(total_S),
        **_group_spread(total_S, num_generations),
        **table.means(),
        **_spreads(table),
        "reward_failures": float(sum(table.failures.values())),
    }


def _spreads(table: RewardTable) -> dict[str, float]:
    """`rewards/<name>/std` over the trajectories that have it (over ranks: the mean of theirs); 0 of a single one."""
    columns = {name: column[~column.isnan()] for name, column in zip(table.names, table.values.unbind(1), strict=True)}
    return {f"rewards/{name}/std": float(c.double().std(correction=0)) for name, c in columns.items() if c.numel()}


def of_guidance(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """How far guidance moves the log-probabilities of the image tokens that were drawn with it, nats; none without."""
    images = [segment for rollout in rollouts for segment in rollout.segments if segment.kind == "image"]
    if not images:
        return {}
    gap = torch.cat([segment.logp_mixed - segment.logp for segment in images])
    return {"rollout/guidance_logp_mean_abs": float(gap.abs().mean())}


def of_rollouts(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Lengths of texts, tries and what the preview gave up."""
    texts = [segment for rollout in rollouts for segment in rollout.segments if segment.kind == "text"]
    columns = {
        "completions/mean_length": [text.tokens.numel() for text in texts],
        "completions/clipped_ratio": [text.truncated for text in texts],
        "rollout/attempts_mean": [rollout.attempts for rollout in rollouts],
        "rollout/dropped_fraction": [rollout.dropped for rollout in rollouts],
    }
    return {name: _mean(torch.tensor(values, dtype=torch.float32)) for name, values in columns.items()}


def of_savings(batches: Sequence[PackedBatch], stats: RolloutStats, num_sampled: int) -> dict[str, float]:
    """What pruning, previews and sharing left undone."""
    trained = sum(int(batch.loss_mask.sum()) for batch in batches)
    computed = sum(batch.num_tokens for batch in batches)
    drawn = stats.image_tokens + stats.image_tokens_saved
    return {
        "dgs/tokens_saved_fraction": 1.0 - trained / max(1, num_sampled),
        "dgs/decode_steps_saved_fraction": stats.image_tokens_saved / max(1, drawn),
        "pack/tokens": float(computed),
        "pack/sharing_ratio": sum(batch.num_unshared_tokens for batch in batches) / max(1, computed),
        "rollout/prefill_tokens": float(stats.prefill_tokens),
        "rollout/kv_mib": stats.kv_bytes / 2**20,
    }


def _group_spread(total_S: Tensor, num_generations: int) -> dict[str, float]:
    """`reward_std`, the mean spread within groups, and the share of groups without any; anchors are left out."""
    groups = total_S.view(-1, num_generations)
    groups = groups[~groups.isnan().any(1)]
    if groups.numel() == 0:
        return {"reward_std": math.nan, "frac_reward_zero_std": math.nan}
    equal = groups.amax(1) - groups.amin(1) <= SPREAD * groups.abs().amax(1)
    return {"reward_std": float(groups.std(1).mean()), "frac_reward_zero_std": float(equal.float().mean())}


def _mean(values: Tensor) -> float:
    return float(values.nanmean()) if values.numel() else math.nan


def trl_names(learned: Mapping[str, float]) -> dict[str, float]:
    """The loss's per-modality metrics, with TRL's totals over both: `kl`, `entropy`, `clip_ratio/…`."""
    tokens = {name: learned.get(f"tokens/{name}", 0.0) for name in MODALITY_NAMES}
    count = max(1.0, sum(tokens.values()))

    def total(metric: str) -> float:
        known = {name: learned.get(f"{metric}/{name}", 0.0) for name in tokens}
        return sum(tokens[name] * value for name, value in known.items() if value == value) / count

    low, high = total("clip_low"), total("clip_high")
    totals = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
    return {**learned, "kl": total("kl"), "entropy": total("entropy"), **totals}
