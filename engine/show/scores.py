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
    "dense_rea": "Infer what a long request means",
    "gen": "Draw the concept",
    "pure_gen": "Draw the concept",
    "dense_gen": "Draw the concept, long requests",
    "rea_gen": "Infer what is meant, then draw it",
    "dense_rea_gen": "Infer it from a long request, draw it",
    "general_vqa": "Questions about photos of nobody in particular (not trained on)",
    "general_image": "Draw a caption without a concept (not trained on)",
    "t2i": "Draw a caption",
    "mcq": "Multiple choice",
    "oe": "Open questions",
    "geneval": "GenEval's prompts",
    "dpg": "DPG-Bench's prompts",
    SUMMARY: "All tasks",
}
"""Tasks of UnifyBench++ and of CoRL in words; another name is shown as it is."""

MEASURES = {
    "greedy": "the single most likely answer is right",
    "sampled": "an answer drawn at random, as in training, is right",
    "checker": "the picture shows what was asked, by the checker that also gave rewards",
    "cnn": "the same by a network that training never saw",
    "cycle": "like the real picture, and captioned back to the prompt",
    "tim": "words and patches match in the starting model's own features",
    "clip_text": "CLIP: picture and prompt",
    "clip_image": "CLIP: picture and real picture",
    "form greedy": "the answer keeps the form <think>…</think><answer>…</answer>",
    "form sampled": "the same, drawn at random",
}
"""What the columns' scores mean; shown under the table for those that occur."""


SHOWN = ("score", "attributes", "reward", "format")
"""Families of measures that the table shows, by the name behind the slash."""
DETAILS = ("num_items", "identity")
"""Measures that scores.json has and the table leaves out."""


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


def headline(flat: Mapping[str, float | None]) -> dict[str, float | None]:
    """What a table shows of an evaluation: each task's main scores by their short names, without the details.

    `task/score/greedy` becomes `task/greedy` and `task/attributes/cnn` becomes `task/cnn`; where a task has readings of
    attributes, its `score/sampled` repeats one of them and is left out. Other names pass, except known details.

    >>> headline({"qa/score/greedy": 0.5, "qa/bleu/greedy": 0.6, "qa/num_items": 9.0, "summary/image/cnn": 0.7})
    {'qa/greedy': 0.5, 'summary/image/cnn': 0.7}
    """
    readable = {name.partition("/")[0] for name in flat if "/attributes/" in name}
    shown: dict[str, float | None] = {}
    for name, value in flat.items():
        task, _, measure = name.partition("/")
        head, _, how = measure.partition("/")
        if task == SUMMARY or not (how or measure in DETAILS):
            shown[name] = value
        elif head in SHOWN and not (head == "score" and how == "sampled" and task in readable):
            shown[f"{task}/{f'form {how}' if head == 'format' else how}"] = value
    return shown


def score_rows(before: Scores | None, after: Scores | None) -> list[ScoreRow]:
    """The headlines of both, in order of appearance, tasks together and the summary last."""
    old, new = headline(flatten_scores(before)), headline(flatten_scores(after))
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
