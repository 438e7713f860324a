"""Scores of an evaluation as flat names (`task/measure`) and as rows of a before/after table, in words for a newcomer.

Imports nothing heavy: the terminal's table, the run's log and the report share it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

Scores = Mapping[str, Any]
"""`task/measure` -> score, or nested: {task: {measure: score}}.  Higher is better; shares lie in [0, 1]."""

SUMMARY = "summary"
"""Task whose rows come last and stand out."""

TASKS = {
    "rec": "Is the concept in the photo?",
    "vqa": "Questions about a photo of the concept",
    "qa": "Questions about the concept, no photo",
    "rea": "Infer what an indirect request means",
    "dense_rea": "The same, long requests",
    "gen": "Draw the concept",
    "pure_gen": "Draw the concept",
    "dense_gen": "Draw the concept, long requests",
    "rea_gen": "Infer what is meant, then draw it",
    "dense_rea_gen": "The same, long requests",
    "general": "What is not about any concept",
    SUMMARY: "All tasks",
}
"""UnifyBench++ tasks in words; another name is shown as it is."""

MEASURES = {
    "greedy": "the single most likely answer is right",
    "sampled": "an answer drawn at random, as in training, is right",
    "checker": "the picture shows what was asked, by the checker that also gave rewards",
    "cnn": "the same by a network that training never saw",
}
"""What the columns' scores mean; shown under the table for those that occur."""


class ScoreRow(NamedTuple):
    """A line of the table; None where there is no score."""

    task: str
    measure: str
    before: float | None
    after: float | None

    @property
    def label(self) -> str:
        return TASKS.get(self.task, self.task.replace("_", " "))

    @property
    def change(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before


def flatten_scores(scores: Scores | None, prefix: str = "") -> dict[str, float | None]:
    """{task: {measure: score}} as {`task/measure`: score}; NaN as None.

    >>> flatten_scores({"gen": {"checker": 0.5}, "summary": 0.7})
    {'gen/checker': 0.5, 'summary': 0.7}
    """
    flat: dict[str, float | None] = {}
    for name, value in (scores or {}).items():
        if isinstance(value, Mapping):
            flat |= flatten_scores(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = float(value) if value is not None and math.isfinite(value) else None
    return flat


def score_rows(before: Scores | None, after: Scores | None) -> list[ScoreRow]:
    """The union of both, in order of appearance, tasks together and the summary last."""
    old, new = flatten_scores(before), flatten_scores(after)
    names = [name.partition("/") for name in {**old, **new}]
    tasks = list(dict.fromkeys(task for task, _, _ in names))
    tasks.sort(key=lambda task: task == SUMMARY)
    return [
        ScoreRow(task, measure, old.get(task + slash + measure), new.get(task + slash + measure))
        for wanted in tasks
        for task, slash, measure in names
        if task == wanted
    ]


def measures_in(rows: list[ScoreRow]) -> dict[str, str]:
    """Explanations of the measures that `rows` have."""
    return {name: words for name, words in MEASURES.items() if any(row.measure == name for row in rows)}


def show_score(value: float | None) -> str:
    """`62.5 %` for a share, three digits for another number, a dash for none."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if 0 <= value <= 1 else f"{value:.3g}"


def show_change(row: ScoreRow) -> str:
    """The change with its sign, in percentage points for shares."""
    if row.change is None:
        return "–"
    if all(value is not None and 0 <= value <= 1 for value in (row.before, row.after)):
        return f"{100 * row.change:+.1f}"
    return f"{row.change:+.3g}"
