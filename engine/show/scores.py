"""Scores of an evaluation as flat names (`task/measure`) and as rows of a before/after table, in words for a newcomer.

A row says what was measured, in what unit, of how many items, and how sure it is; whole drawings come before their
attributes, a classifier that no reward uses before the checker that also gave rewards.  Imports nothing heavy: the
terminal's table, the run's log, the card and the report share it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .intervals import Interval, Intervals, intervals_of
from .measured import PER_ITEM, Measured, measured_in
from .names import (
    ANSWERS,
    AT_CHANCE,
    BELOW_CHANCE,
    FELL,
    GENERAL,
    INDEPENDENT,
    MARKS,
    MEAN_UNIT,
    MEASURES,
    OF_DRAWINGS,
    PER_CENT,
    READERS,
    RECOGNITION,
    SUMMARY,
    TASKS,
    UNITS,
    UNTRAINED,
    read_words,
)

Scores = Mapping[str, Any]
"""`task/measure` -> score, or nested: {task: {measure: score}}; beside them `per_item` (measured.py), without which
rows have no intervals. Higher is better; shares lie in [0, 1]."""


class ScoreRow(NamedTuple):
    """A line of the table; None where there is no score, or where it cannot be told."""

    task: str
    measure: str
    """Short, in words: `drawings right, classifier`; MEASURES explains its parts."""
    before: float | None
    after: float | None
    num_items: int = 0
    """Held-out items behind it."""
    unit: str = ""
    """Of the value; what begins with `%` is a share in [0, 1] and shown in per cent. Empty: not known."""
    before_interval: Interval | None = None
    """95 %."""
    after_interval: Interval | None = None
    change_interval: Interval | None = None
    """95 % of after - before, over the items that both have (paired)."""
    marks: tuple[str, ...] = ()
    """Of MARKS."""
    family: str = "answers"
    """answers, recognition, drawings, or summary."""
    name: str = ""
    """As scores.json calls it: `pure_gen/all_right/cnn`."""
    chance: float | None = None
    """What guessing scores, where that is known."""

    @property
    def label(self) -> str:
        return TASKS.get(self.task, self.task.replace("_", " "))

    @property
    def change(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before


def flatten_scores(scores: Scores | None, prefix: str = "") -> dict[str, float | None]:
    """{task: {measure: score}} as {`task/measure`: score}; NaN as None, without what is said of single items.

    >>> flatten_scores({"gen": {"checker": 0.5}, "summary": 0.7})
    {'gen/checker': 0.5, 'summary': 0.7}
    """
    flat: dict[str, float | None] = {}
    for name, value in (scores or {}).items():
        if isinstance(value, Mapping):
            flat |= flatten_scores(value, f"{prefix}{name}/") if prefix or name != PER_ITEM else {}
        else:
            flat[f"{prefix}{name}"] = _finite(value)
    return flat


def _finite(value: Any) -> float | None:
    try:
        number = math.nan if value is None else float(value)
    except (TypeError, ValueError, OverflowError):  # a file that was changed by hand
        return None
    return number if math.isfinite(number) else None


class Shown(NamedTuple):
    """How a score is shown: its place among its task's rows, its name there, and its unit."""

    place: int
    measure: str
    unit: str
    family: str


def shown_as(name: str, flat: Mapping[str, float | None]) -> Shown | None:
    """What a table says for a score of `flat`; None for details, and for scores that repeat another.

    >>> shown_as("gen/all_right/cnn", {}).measure, shown_as("gen/hat/cnn", {}), shown_as("qa/score/greedy", {}).measure
    ('drawings right, classifier', None, 'most likely answer')
    """
    task, _, measure = name.partition("/")
    head, _, how = measure.partition("/")
    if task == SUMMARY:
        return _summary_shown(measure, flat)
    family = "recognition" if task == RECOGNITION else "answers"
    read = any(other.startswith(f"{task}/attributes/") for other in flat)
    drawn = read or f"{task}/identity" in flat or f"{task}/clip_i" in flat
    if head in ("all_right", "attributes"):
        unit = "drawings" if head == "all_right" else "attributes"
        place = 2 * (head == "attributes") + (how != INDEPENDENT)
        return Shown(place, read_words(head, how), PER_CENT + unit, "drawings")
    if measure in OF_DRAWINGS:
        return None if read and measure == "identity" else Shown(4, *OF_DRAWINGS[measure], "drawings")
    if head == "reward":
        return Shown(6, how, "reward", "drawings")
    if head == "score" and how in ANSWERS:
        return None if drawn else Shown(how == "sampled", ANSWERS[how], _unit_of(task, how, flat), family)
    if head == "format" and how:
        return Shown(8 + (how == "sampled"), f"form, {ANSWERS.get(how, how)}", PER_CENT + "answers", family)
    if how or measure in ("num_items", "judge", "clauses"):
        return None
    return Shown(7, ANSWERS.get(measure, measure), "", family)


def _unit_of(task: str, how: str, flat: Mapping[str, float | None]) -> str:
    """Of a task's main score: the unit of the measure that it is (evaluate/tasks.py)."""
    main = flat.get(f"{task}/score/{how}")
    units = (unit for name, unit in UNITS.items() if main is not None and flat.get(f"{task}/{name}/{how}") == main)
    return next(units, PER_CENT + "answers")


def _summary_shown(measure: str, flat: Mapping[str, float | None]) -> Shown | None:
    """Means over tasks; those over a single task, which has its own rows, are left out."""
    family, _, how = measure.partition("/")
    read = any(name.startswith(f"{SUMMARY}/image/all_right/") for name in flat)
    if family in GENERAL or (read and measure == "image/identity"):
        return None
    if family == "image" and how.startswith("all_right/"):
        reader = how.partition("/")[2]
        return Shown(2 + (reader != INDEPENDENT), read_words("all_right", reader), PER_CENT + "drawings", SUMMARY)
    if family == "image" and how in READERS:
        return Shown(4 + (how != INDEPENDENT), read_words("attributes", how), PER_CENT + "attributes", SUMMARY)
    if family == "image":
        word, unit = OF_DRAWINGS.get(how, (how, "reward"))
        return Shown(6, f"drawings: {word}", unit, SUMMARY)
    if family == "understanding":
        return Shown(how == "sampled", ANSWERS.get(how, how), MEAN_UNIT, SUMMARY)
    if family == "format" and how:
        return Shown(7, f"form, {ANSWERS.get(how, how)}", PER_CENT + "answers", SUMMARY)
    return Shown(7, measure, PER_CENT + "answers" if measure else "", SUMMARY)


def score_rows(before: Scores | None, after: Scores | None) -> list[ScoreRow]:
    """What a table shows of both: tasks in the order of TASKS, then those of other names, then what is not trained on,
    the summary last.

    Args:
        before, after: of two models on the same items, as an evaluation gives them or as scores.json keeps them; None
            where there is none. Two runs are compared by giving the `after` of each.
    """
    old, new = flatten_scores(before), flatten_scores(after)
    flat = {**old, **new}
    found = [(name, shown) for name in flat if (shown := shown_as(name, flat)) is not None]
    tasks = {name.partition("/")[0]: None for name, _ in found}
    known = {task: place for place, task in enumerate(TASKS)}
    order = {
        task: (task == SUMMARY, task in GENERAL, known.get(task, len(known)), place) for place, task in enumerate(tasks)
    }
    found.sort(key=lambda entry: (*order[entry[0].partition("/")[0]], entry[1].place))
    items = [measured_in(scores or {}) for scores in (before, after)]
    pairs = [(items[0].get(name, []), items[1].get(name, [])) for name, _ in found]
    return [
        _row(name, shown, old.get(name), new.get(name), pair, intervals)
        for (name, shown), pair, intervals in zip(found, pairs, intervals_of(pairs), strict=True)
    ]


def _row(
    name: str,
    shown: Shown,
    before: float | None,
    after: float | None,
    pair: tuple[Sequence[Measured], Sequence[Measured]],
    intervals: Intervals,
) -> ScoreRow:
    task = name.partition("/")[0]
    newest = pair[1] or pair[0]
    chance = newest[0].chance if len(newest) == 1 else None
    return ScoreRow(
        task=task,
        measure=shown.measure,
        before=before,
        after=after,
        num_items=sum(len(one.by_item) for one in newest),
        unit=shown.unit,
        before_interval=intervals.before if before is not None else None,
        after_interval=intervals.after if after is not None else None,
        change_interval=intervals.change if before is not None and after is not None else None,
        marks=_marks(task, chance, intervals),
        family=shown.family,
        name=name,
        chance=chance,
    )


def _marks(task: str, chance: float | None, intervals: Intervals) -> tuple[str, ...]:
    marks = [UNTRAINED] if task in GENERAL else []
    marks += [mark] if (mark := chance_mark(chance, intervals.after or intervals.before)) else []
    if intervals.change is not None and intervals.change[1] < 0:
        marks.append(FELL)
    return tuple(marks)


def chance_mark(chance: float | None, interval: Interval | None) -> str | None:
    """Of MARKS, for a score that guessing reaches; None where it does not, or where either is not known."""
    if chance is None or interval is None or interval[0] > chance:
        return None
    return AT_CHANCE if chance <= interval[1] else BELOW_CHANCE


def measures_in(rows: Sequence[ScoreRow]) -> dict[str, str]:
    """Explanations of the measures and units that `rows` have, and of their marks."""
    names = {part for row in rows for part in (row.measure, row.unit, *re.split(", |: ", row.measure))}
    marks = {mark for row in rows for mark in row.marks}
    return {name: words for name, words in (MEASURES | MARKS).items() if name in names | marks}


# Numbers in words -----------------------------------------------------------------------------------------------------


def show_score(value: float | None, unit: str = "") -> str:
    """`62.5 %` for a share, three digits for another number, a dash for none; without a unit, what lies in [0, 1] is
    taken for a share."""
    if value is None:
        return "–"
    is_share = unit.startswith("%") if unit else 0 <= value <= 1
    return f"{100 * value:.1f} %" if is_share else f"{value:.3g}"


def show_interval(interval: Interval | None, unit: str = "%", *, signed: bool = False) -> str:
    """`[37, 60]` in per cent, or in the unit's own numbers; nothing for none.

    >>> show_interval((-0.004, 0.25), signed=True), show_interval((0.0, 0.14)), show_interval((-0.004, 0.2), "cosine")
    ('[-0.4, +25]', '[0, 14]', '[-0.004, 0.20]')
    """
    if interval is None:
        return ""
    share = unit.startswith("%")
    ends = [100 * end for end in interval] if share else list(interval)
    large = not share and max(map(abs, ends)) >= 100
    form = "+.3g" if signed else ".3g"
    return f"[{', '.join(f'{end:{form}}' if large else _end(end, 0 if share else 2, signed) for end in ends)}]"


def _end(value: float, digits: int, signed: bool) -> str:
    """An interval's end: which side of 0 it lies on is what it is read for, so that it is not rounded to 0 where a
    digit or two more tell; never `-0`."""
    finer = next((more for more in range(digits, digits + 3) if round(value, more)), None)
    if finer is None:
        return f"{0:.{digits}f}"
    return f"{value:{'+' if signed else ''}.{finer}f}"


def show_change(row: ScoreRow) -> str:
    """The change with its sign, in percentage points for shares."""
    if row.change is None:
        return "–"
    in_range = all(value is not None and 0 <= value <= 1 for value in (row.before, row.after))
    if row.unit.startswith("%") if row.unit else in_range:
        return f"{100 * row.change:+.1f}" if round(100 * row.change, 1) else "0.0"
    return f"{row.change:+.3g}" if row.change else "0"
