"""One score, item by item: what a mean, a count, an interval and a comparison of two models are made from.

Values are kept per item, so that two models can be compared on the same items (intervals.py), also later, from
scores.json alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

PER_ITEM = "per_item"
"""Where a model's flat scores keep the values of single items, in memory as in scores.json: `task/measure` -> what
`Measured.to_json` gives. No score is called so: their names have a task and a slash."""
LARGEST = 1e9
"""Of a value that a file may hold: of larger ones squares and sums overflow."""
DIGITS = 6
"""Of a value of one item that is kept."""
_LIST = re.compile(r"\[\n[^\[\]{}]*\n\s*\]")
"""Of JSON with an indent, in which a line's end is never part of a text."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One measure of one task, of every item that it applies to."""

    by_item: Mapping[str, float]
    """Item's id -> value, higher is better; the mean over its members where it was drawn several times."""
    strata: Mapping[str, str] = field(default_factory=dict)
    """Item's id -> kind, where the score is the mean of the kinds' means (weighted recall: yes and no); else empty."""
    chance: float | None = None
    """What guessing scores; None where there is nothing to choose from."""

    @classmethod
    def of(
        cls,
        ids: Sequence[str],
        values: Sequence[float | None],
        strata: Sequence[str | None] | None = None,
        chance: float | None = None,
    ) -> Self:
        """From one value per trajectory; None where it has none, and a stratum of None where it does not count."""
        found: dict[str, list[float]] = {}
        kinds: dict[str, str] = {}
        for index, (name, value) in enumerate(zip(ids, values, strict=True)):
            kind = None if strata is None else strata[index]
            if value is None or math.isnan(value) or (strata is not None and kind is None):
                continue
            found.setdefault(name, []).append(float(value))
            if kind is not None:
                kinds[name] = kind
        return cls({name: math.fsum(some) / len(some) for name, some in found.items()}, kinds, chance)

    @property
    def groups(self) -> list[list[str]]:
        """The items of each stratum; all of them where there is one."""
        if not self.strata:
            return [list(self.by_item)] if self.by_item else []
        found: dict[str, list[str]] = {}
        for name in self.by_item:
            found.setdefault(self.strata.get(name, ""), []).append(name)
        return list(found.values())

    @property
    def value(self) -> float:
        """Mean over items, or over the strata's means; NaN of nothing."""
        means = [math.fsum(self.by_item[name] for name in group) / len(group) for group in self.groups]
        return math.fsum(means) / len(means) if means else math.nan

    def of_items(self, wanted: Iterable[str]) -> Measured:
        """The same of fewer items."""
        kept = set(wanted)
        by_item = {name: value for name, value in self.by_item.items() if name in kept}
        return Measured(by_item, {name: self.strata[name] for name in by_item if name in self.strata}, self.chance)

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"items": list(self.by_item), "values": [_short(v) for v in self.by_item.values()]}
        if self.strata:
            row["strata"] = [self.strata.get(name, "") for name in self.by_item]
        return row | ({} if self.chance is None else {"chance": self.chance})

    @classmethod
    def from_json(cls, row: Any) -> Measured | None:
        """None where `row` is something else: a file that was changed by hand loses intervals, and nothing more."""
        try:
            items, values, strata = row["items"], row["values"], row.get("strata")
            chance = row.get("chance")
            numbers = all(_is_number(value) for value in (*values, *([] if chance is None else [chance])))
            if not numbers or not all(isinstance(name, str) for name in (*items, *(strata or ()))):
                return None
            kinds = dict(zip(items, strata, strict=True)) if strata else {}
            return cls(dict(zip(items, map(float, values), strict=True)), kinds, chance)
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
            return None


def _short(value: float) -> float:
    short = round(value, DIGITS)
    return int(short) if short == int(short) else short


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST  # nor NaN


def measured_in(scores: Mapping[str, Any]) -> dict[str, list[Measured]]:
    """`task/measure` -> what its score is the mean of: itself, or (`mean_of`) those of several tasks."""
    rows = scores.get(PER_ITEM)
    if not isinstance(rows, Mapping):
        return {}
    single = {name: found for name, row in rows.items() if (found := Measured.from_json(row)) is not None}
    several: dict[str, list[Measured]] = {name: [one] for name, one in single.items()}
    for name, row in rows.items():
        parts = row.get("mean_of") if isinstance(row, Mapping) else None
        if isinstance(parts, list) and parts and all(isinstance(part, str) and part in single for part in parts):
            several[name] = [single[part] for part in parts]
    return several


def dumps(content: Any) -> str:
    """JSON to read and to search in: an entry a line, but a list of numbers or names on one line."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    return _LIST.sub(lambda found: "[" + re.sub(r"\s*\n\s*", " ", found.group()[1:-1]).strip() + "]", text) + "\n"
