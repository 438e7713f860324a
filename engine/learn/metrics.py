"""A step's metrics over all ranks: what rank 0 writes down is the run's, not its own share's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..records import MODALITY_NAMES

SUMS = frozenset({
    *("num_tokens", "tokens_per_second", "reward_failures", "pack/tokens", "rollout/prefill_tokens"),
    *(f"tokens/{name}" for name in MODALITY_NAMES),
})  # fmt: skip
LARGEST = frozenset({
    *("step_time", "rollout/replay_logp_max_abs", "rollout/kv_mib", "updates_skipped"),
    *(f"ratio_max/{name}" for name in MODALITY_NAMES),
})  # fmt: skip
SMALLEST = frozenset(f"ratio_min/{name}" for name in MODALITY_NAMES)
OF_TOKENS = frozenset({"kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"})
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
