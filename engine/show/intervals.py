"""95 % intervals of held-out scores: Wilson's for shares of whole items, the bootstrap over items for everything else.

A mean of several shares (yes- and no-recall, several tasks) takes the parts' Wilson intervals together by the squares
of their arms (MOVER: Zou and Donner 2008), so that eight wrong answers of eight are not sure to be all there is.

The bootstrap draws items with replacement, each stratum for itself, a fixed number of times and from a fixed seed; a
change is computed on the same draws for both models (paired). Percentiles are widened as Student's t is against the
normal distribution, for few items (Hesterberg 2015, "expanded percentile interval"). All scores of a table come from
one call, in which scores of the same items share their draws.

Dims: n items of a stratum, R draws, V columns of values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .measured import Measured

LEVEL = 0.95
NUM_DRAWS = 1000
MIN_ITEMS = 6
"""Fewer have no bootstrap interval: five that moved the same way by chance (2 of 32) would look sure."""
MAX_DRAWN = 4_000_000
"""Items that are drawn at once: 8 bytes each."""

Interval = tuple[float, float]


class Intervals(NamedTuple):
    """Of one row of a table; None where it cannot be told."""

    before: Interval | None = None
    after: Interval | None = None
    change: Interval | None = None


def wilson(num_right: int, num_items: int) -> Interval:
    """Of a share of whole items, such as drawings that are right in all attributes."""
    from scipy.stats import binomtest

    found = binomtest(num_right, num_items).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def intervals_of(pairs: Sequence[tuple[Sequence[Measured], Sequence[Measured]]]) -> list[Intervals]:
    """Of each row before and after, and of its change over the items that both have.

    Args:
        pairs: a row each: what its score before, and after, is the mean of; nothing where there is no score.
    """
    draws = _Draws()
    planned = []
    for before, after in pairs:
        sides = [_exact(side) or draws.add(side) for side in (before, after)]
        planned.append((*sides, _change(draws, before, after)))
    found = draws.intervals()

    def told(plan: Interval | int | None) -> Interval | None:
        return found[plan] if isinstance(plan, int) else plan

    return [Intervals(*(told(plan) for plan in row)) for row in planned]


def _exact(side: Sequence[Measured]) -> Interval | None:
    """Wilson's, where every item is right or wrong; None where it is not so."""
    groups = [(one, group, 1.0 / len(one.groups)) for one in side for group in one.groups]
    if not groups or any(not set(one.by_item.values()) <= {0.0, 1.0} for one in side):
        return None
    value = below = above = 0.0
    for one, group, weight in groups:
        right, weight = sum(int(one.by_item[name]) for name in group), weight / len(side)
        share, (low, high) = right / len(group), wilson(right, len(group))
        value += weight * share
        below += (weight * (share - low)) ** 2
        above += (weight * (high - share)) ** 2
    return max(0.0, value - math.sqrt(below)), min(1.0, value + math.sqrt(above))


def _change(draws: _Draws, before: Sequence[Measured], after: Sequence[Measured]) -> int | None:
    """Differences item by item; a row whose parts are not the same on both sides has none."""
    if not before or len(before) != len(after):
        return None
    differences = []
    for old, new in zip(before, after, strict=True):
        both = [name for name in new.by_item if name in old.by_item]
        values = {name: new.by_item[name] - old.by_item[name] for name in both}
        differences.append(Measured(values, {name: new.strata[name] for name in both if name in new.strata}))
    return draws.add(differences)


class _Draws:
    """Collects what is to be bootstrapped; a stratum's items are drawn once for all that is said of them."""

    def __init__(self) -> None:
        self._columns: dict[tuple[str, ...], list[NDArray[np.float64]]] = {}
        self._rows: list[list[tuple[tuple[str, ...], int, float]]] = []
        """Of each row: a stratum, one of its columns, and the weight of that column's mean."""

    def add(self, side: Sequence[Measured]) -> int | None:
        """The row's number; None where there are too few items to tell, in all or in a part."""
        if not side or any(len(one.by_item) < MIN_ITEMS or min(map(len, one.groups)) < 2 for one in side):
            return None
        terms = []
        for one in side:
            groups = one.groups
            for group in groups:
                items = tuple(group)
                columns = self._columns.setdefault(items, [])
                columns.append(np.array([one.by_item[name] for name in items]))
                terms.append((items, len(columns) - 1, 1.0 / (len(groups) * len(side))))
        self._rows.append(terms)
        return len(self._rows) - 1

    def intervals(self) -> list[Interval | None]:
        """Of every row, in the order of adding; None where every draw says 0, which is not to say that it is sure."""
        if not self._rows:
            return []
        from scipy.stats import bootstrap

        strata = list(self._columns)
        values = {items: np.stack(columns, axis=1) for items, columns in self._columns.items()}

        def scores(*indices: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
            """[rows, R], from the indices [R, n] of the items that were drawn."""
            means = {items: _means(index, values[items]) for items, index in zip(strata, indices, strict=True)}
            return np.stack([sum(w * means[items][column] for items, column, w in row) for row in self._rows])

        drawn: NDArray[np.float64] = bootstrap(
            [np.arange(len(items)) for items in strata],
            scores,
            n_resamples=NUM_DRAWS,
            batch=max(1, MAX_DRAWN // sum(map(len, strata))),
            vectorized=True,
            method="percentile",
            rng=np.random.default_rng(0),
        ).bootstrap_distribution
        found: list[Interval | None] = []
        for row, draws in zip(self._rows, drawn, strict=True):
            tail = _tail(min(len(items) for items, _, _ in row))
            low, high = np.quantile(draws, [tail, 1 - tail])
            found.append((float(low), float(high)) if low or high else None)
        return found


@cache
def _tail(num_items: int) -> float:
    """The share of draws beyond either end: .025 of many items, less of few."""
    from scipy.stats import norm, t

    n = num_items
    return float(norm.cdf(math.sqrt(n / (n - 1)) * t.ppf((1 - LEVEL) / 2, n - 1)))


def _means(index: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[V, R]: means of the columns [n, V] over the items that were drawn, [R, n] (or [n], all of them as they are)."""
    rows, (n, _) = np.atleast_2d(index), values.shape
    places = rows + n * np.arange(len(rows))[:, None]
    counts = np.bincount(places.ravel(), minlength=rows.size).reshape(rows.shape)
    return (counts.astype(np.float64) @ values).T / n
