"""A step's metrics: what one part of a step has to tell, and over all of its parts.

Parts are the micro-batches of an update (`learner.py`) and the ranks, because rank 0 writes down the run's.  What the
whole says is what one part that held everything would have said: counts add up, extremes stay extreme, a mean counts by
what it is a mean over, and a part that has none of that (no text, no rewarded trajectory) has no say.

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
SUMS |= {"refill/groups_discarded"}
SUMS |= {f"tokens/{name}" for name in MODALITY_NAMES}
LARGEST = {"step_time", "rollout/replay_logp_max_abs", "rollout/kv_mib", "updates_skipped"}
LARGEST |= {f"ratio_max/{name}" for name in MODALITY_NAMES}
LARGEST |= {"sampling/importance_sampling_ratio/max", "sampling/sampling_logp_difference/max"}
SMALLEST = {f"ratio_min/{name}" for name in MODALITY_NAMES} | {"sampling/importance_sampling_ratio/min"}
OF_TOKENS = {"kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
"""Means over the tokens of both modalities."""
LOGGED = "logged/"
"""Before the name of what rewards logged, as ranks tell each other, and where a metric of the run has that name."""
RESERVED = ("eval/", "seconds/", LOGGED)
"""Beginnings of names that mean something where metrics are read."""
COUNT = "count/"
"""Before the name of a mean: how many things it is over. Parts tell each other; no metric begins so."""


def merged(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`pooled`, without the `COUNT`s: for people."""
    return {name: value for name, value in pooled(parts).items() if not name.startswith(COUNT)}


def pooled(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each metric over the parts that have it; a part may be one of these again.

    Means count by their `COUNT`, by the tokens of their modality where they are named after one, else alike.  NaN is
    "nothing to measure" and is left out; where no part has anything it stays NaN."""
    if len(parts) == 1:
        return dict(parts[0])
    names = list(dict.fromkeys(name for values in parts for name in values))
    return {name: _spread(name, parts) if name.endswith("/std") else _merge(name, parts) for name in names}


def _merge(name: str, parts: Sequence[Mapping[str, float]]) -> float:
    known = [(values[name], _weight(name, values)) for values in parts if not math.isnan(values.get(name, math.nan))]
    if not known:
        return math.nan
    known = [(value, weight) for value, weight in known if weight] or known[:1]
    values = [value for value, _ in known]
    if name in SUMS or name.startswith(COUNT):
        return math.fsum(values)
    if name in LARGEST:
        return max(values)
    if name in SMALLEST:
        return min(values)
    if len(set(values)) == 1:
        return values[0]
    return math.fsum(value * weight for value, weight in known) / math.fsum(weight for _, weight in known)


def _spread(name: str, parts: Sequence[Mapping[str, float]]) -> float:
    """The standard deviation over all parts, from each one's own and its mean."""
    mean = f"{name.removesuffix('/std')}/mean"
    known = [values for values in parts if not math.isnan(values.get(name, math.nan))]
    if not known:
        return math.nan
    centre = _merge(mean, known)
    squares = [(v[name] ** 2 + (v[mean] - centre) ** 2) * _weight(mean, v) for v in known]
    return math.sqrt(math.fsum(squares) / math.fsum(_weight(mean, v) for v in known))


def _weight(name: str, values: Mapping[str, float]) -> float:
    """What stands behind a mean or an extreme in one part: of 0 it says nothing. 1 where nobody counts."""
    if name in SUMS or name.startswith(COUNT):
        return 1.0
    modality = name.rpartition("/")[2]
    if modality in MODALITY_NAMES:
        return values.get(f"{COUNT}{name}", values.get(f"tokens/{modality}", 0.0))
    if name in OF_TOKENS:
        return math.fsum(values.get(f"tokens/{m}", 0.0) for m in MODALITY_NAMES)
    return values.get(f"{COUNT}{name}", 1.0)


def counted(means: Mapping[str, float], count: float) -> dict[str, float]:
    """Means over `count` things, with that said for `merged`."""
    return {**means, **{f"{COUNT}{name}": float(count) for name in means}}


def of_rewards(table: RewardTable, total_S: Tensor, num_generations: int) -> dict[str, float]:
    """Means, spread within groups and failures."""
    has = {name: int((~column.isnan()).sum()) for name, column in zip(table.names, table.values.unbind(1), strict=True)}
    return {
        **counted({"reward": _mean(total_S)}, int((~total_S.isnan()).sum())),
        **_group_spread(total_S, num_generations),
        **table.means(),
        **_spreads(table),
        **{f"{COUNT}rewards/{name}/mean": float(count) for name, count in has.items() if count},
        "reward_failures": float(sum(table.failures.values())),
    }


def of_logged(table: RewardTable) -> dict[str, float]:
    """What rewards logged on this rank, for `taken_logged`: sums, and of how many numbers."""
    told: dict[str, float] = {}
    for name, values in table.metrics.items():
        told |= {f"{LOGGED}sum/{name}": math.fsum(values), f"{LOGGED}num/{name}": float(len(values))}
    return told


def taken_logged(ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    """Takes what rewards logged out of what ranks told: by name, the mean over all calls."""
    sums: dict[str, list[float]] = {}
    for values in ranks:
        for key in [key for key in values if key.startswith(f"{LOGGED}sum/")]:
            name = key.removeprefix(f"{LOGGED}sum/")
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += values.pop(key)
            total[1] += values.pop(f"{LOGGED}num/{name}")
    return {name: total / count for name, (total, count) in sums.items()}


def with_logged(values: Mapping[str, float], logged: Mapping[str, float]) -> dict[str, float]:
    """A step's metrics and what rewards logged, under its own name; where that is one of the run's, behind `LOGGED`."""
    own = {*values, "step"}
    free = {name: name not in own and not name.startswith(RESERVED) for name in logged}
    return {**values, **{name if free[name] else f"{LOGGED}{name}": value for name, value in logged.items()}}


def _spreads(table: RewardTable) -> dict[str, float]:
    """`rewards/<name>/std` over the trajectories that have it; 0 of a single one."""
    columns = {name: column[~column.isnan()] for name, column in zip(table.names, table.values.unbind(1), strict=True)}
    return {f"rewards/{name}/std": float(c.double().std(correction=0)) for name, c in columns.items() if c.numel()}


def of_guidance(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """How far guidance moves the log-probabilities of the image tokens that were drawn with it, nats; none without."""
    images = [segment for rollout in rollouts for segment in rollout.segments if segment.kind == "image"]
    if not images:
        return {}
    settled = [slice(None) if segment.order is None else segment.order >= 0 for segment in images]
    gaps = (segment.logp_mixed - segment.logp for segment in images)
    gap = torch.cat([gap[rows] for gap, rows in zip(gaps, settled, strict=True)])
    return counted({"rollout/guidance_logp_mean_abs": float(gap.abs().mean())}, gap.numel())


def of_rollouts(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Lengths of texts, tries and what the preview gave up."""
    texts = [segment for rollout in rollouts for segment in rollout.segments if segment.kind == "text"]
    columns: dict[str, Sequence[float]] = {
        "completions/mean_length": [text.tokens.numel() for text in texts],
        "completions/clipped_ratio": [text.truncated for text in texts],
        "rollout/attempts_mean": [rollout.attempts for rollout in rollouts],
        "rollout/dropped_fraction": [rollout.dropped for rollout in rollouts],
    }
    told: dict[str, float] = {}
    for name, values in columns.items():
        told |= counted({name: _mean(torch.tensor(values, dtype=torch.float32))}, len(values))
    return told


def of_savings(
    batches: Sequence[PackedBatch], stats: RolloutStats, num_sampled: int, num_kept: int | None = None
) -> dict[str, float]:
    """What pruning, previews and sharing left undone.

    Args:
        batches: of the step.
        stats: of its rollout.
        num_sampled: tokens of all trajectories.
        num_kept: of those that pruning left, where images are filled in, of which training may see a token several
            times or not at all; None: what has a loss.
    """
    trained = sum(int(batch.loss_mask.sum()) for batch in batches) if num_kept is None else num_kept
    computed = sum(batch.num_tokens for batch in batches)
    drawn = stats.image_tokens + stats.image_tokens_saved
    unshared = sum(batch.num_unshared_tokens for batch in batches)
    return {
        **counted({"dgs/tokens_saved_fraction": 1.0 - trained / max(1, num_sampled)}, num_sampled),
        **counted({"dgs/decode_steps_saved_fraction": stats.image_tokens_saved / max(1, drawn)}, drawn),
        "pack/tokens": float(computed),
        **counted({"pack/sharing_ratio": unshared / max(1, computed)}, computed),
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
    spreads = {"reward_std": float(groups.std(1).mean()), "frac_reward_zero_std": float(equal.float().mean())}
    return counted(spreads, groups.shape[0])


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
