"""What a benchmark's scoring comes to: its own numbers in its own unit, each with its items and a 95 % interval.

Intervals are those of `show.intervals` (Wilson's for shares of right items, else a bootstrap over items); what is no
mean of items (F1) has a bootstrap of its own here, and weighted means take their parts' together by the squares of
their arms, as there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...show.intervals import LEVEL, MIN_ITEMS, NUM_DRAWS, Interval, intervals_of
from ...show.measured import Measured

PER_CENT = 100.0
"""Scale of the numbers of benchmarks that are published in per cent."""
MAX_AT_ONCE = 4_000_000
"""Answers that are drawn at once for an F1's interval: 8 bytes each."""


class Part(NamedTuple):
    """One number of a benchmark's table."""

    name: str
    """As the benchmark calls it: `overall`, `counting`, `F1`."""
    num_items: int
    """Prompts or questions behind it."""
    value: float
    """In the published unit: a share in [0, 1], or per cent."""
    interval: Interval | None
    """95 %, in the same unit; None where there are too few items to tell."""
    percent: bool = False
    """Whether that unit is per cent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A benchmark's scores of one folder."""

    benchmark: str
    """Its title, as published numbers are found by: `GenEval`."""
    parts: tuple[Part, ...] = ()
    """The published headline number first; none where nothing here scores it."""
    how: str
    """Where the numbers come from, or how to get them."""
    remarks: tuple[str, ...] = ()
    """What was counted otherwise than by the benchmark's own program."""

    @property
    def headline(self) -> Part | None:
        return self.parts[0] if self.parts else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What a benchmark's rules found in one folder."""

    outcome: Outcome
    measures: Mapping[str, Measured] = field(default_factory=dict)
    """Metrics for scores.json, item by item, in [0, 1]."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Metric -> why it is not there, or not whole."""


def mean_part(name: str, parts: Sequence[Measured], scale: float = 1.0) -> Part | None:
    """The mean of the parts' means, each of the same weight; None where there is no item."""
    return weighted_part(name, [(one, 1.0) for one in parts], scale)


def weighted_part(name: str, parts: Sequence[tuple[Measured, float]], scale: float = 1.0) -> Part | None:
    """The weighted mean of the parts' means, over the parts that have items: weights need not sum to 1.

    Args:
        name: of the number.
        parts: each with its weight.
        scale: `PER_CENT`, or 1 for a share.
    """
    parts = [(one, weight) for one, weight in parts if one.by_item]
    total = sum(weight for _, weight in parts)
    if not parts or total <= 0:
        return None
    count, value = sum(len(one.by_item) for one, _ in parts), sum(w * one.value for one, w in parts) / total
    if len({weight for _, weight in parts}) == 1:  # one bootstrap, or Wilson's, over all of them
        (found,) = intervals_of([([], [one for one, _ in parts])])
        interval = found.after
    else:
        interval = _taken_together(parts, total, value)
    scaled = None if interval is None else (scale * interval[0], scale * interval[1])
    return Part(name, count, scale * value, scaled, scale == PER_CENT)


def _taken_together(parts: Sequence[tuple[Measured, float]], total: float, value: float) -> Interval | None:
    """MOVER over parts of unequal weight; None where one part's cannot be told."""
    below = above = 0.0
    for found, (one, weight) in zip(intervals_of([([], [one]) for one, _ in parts]), parts, strict=True):
        if found.after is None:
            return None
        low, high = found.after
        below += (weight / total * (one.value - low)) ** 2
        above += (weight / total * (high - one.value)) ** 2
    return value - math.sqrt(below), value + math.sqrt(above)


class YesNo(NamedTuple):
    """Precision, recall and F1 of saying yes; 0 where they are 0 / 0, as VLMEvalKit has it."""

    precision: float
    recall: float
    f1: float


def yes_no(said: Sequence[bool], right: Sequence[bool]) -> YesNo:
    """Of the class yes.

    Args:
        said: whether the answer was yes, n.
        right: whether it should have been, n.
    """
    hits = sum(a and b for a, b in zip(said, right, strict=True))
    precision = hits / sum(said) if any(said) else 0.0
    recall = hits / sum(right) if any(right) else 0.0
    return YesNo(precision, recall, 2 * hits / (sum(said) + sum(right)) if any(said) or any(right) else 0.0)


def f1_part(name: str, said: Sequence[bool], right: Sequence[bool], scale: float = 1.0) -> Part | None:
    """F1 of saying yes, with the percentile bootstrap's interval over the answers; None where there is none."""
    if not said:
        return None
    value, interval = yes_no(said, right).f1, None
    if len(said) >= MIN_ITEMS:
        drawn = _f1_draws(np.asarray(said), np.asarray(right))
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        interval = (scale * float(low), scale * float(high))
    return Part(name, len(said), scale * value, interval, scale == PER_CENT)


def _f1_draws(said: NDArray[np.bool_], right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[NUM_DRAWS] values of F1 on answers drawn with replacement: 2 hits / (said yes + should have)."""
    hits, either = (said & right).astype(float) * 2, said.astype(float) + right
    rng, count = np.random.default_rng(0), len(said)
    found, step = [], max(1, MAX_AT_ONCE // count)
    for start in range(0, NUM_DRAWS, step):
        index = rng.integers(count, size=(min(step, NUM_DRAWS - start), count))
        total = either[index].sum(1)
        found.append(np.divide(hits[index].sum(1), total, out=np.zeros_like(total), where=total > 0))
    return np.concatenate(found)
