"""The table at the end of a CoRL run: a column per model, a row per measure, its 95 % interval below each score."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from ..show.names import ANSWERS
from ..show.scores import ScoreRow, Scores, measures_in, score_rows, show_interval, show_score

NAMES = {
    "base": "before",
    "unified": "unified",
    "generation": "drawing alone",
    "understanding": "answers alone",
    "merged_first": "both merged",
    "t2i": "refined: t2i",
    "mcq": "refined: mcq",
    "oe": "refined: oe",
    "merged": "mcq + oe merged",
}
"""Models of a run in the words of the table."""
LEFT_OUT = tuple(f"form, {how}" for how in ANSWERS.values())
"""Nearly always kept; scores.json has them."""
WIDTH = 80


def rows_by_model(scores: Mapping[str, Scores]) -> dict[str, dict[str, ScoreRow]]:
    """Name of a score -> model -> its row, the summary left out; rows in the order of `score_rows`."""
    table: dict[str, dict[str, ScoreRow]] = {}
    for model, of in scores.items():
        for row in score_rows(None, of):
            if row.family != "summary" and row.measure not in LEFT_OUT:
                table.setdefault(row.name, {})[model] = row
    return table


def models_table(scores: Mapping[str, Scores]) -> Table:
    """Held-out scores of every model of a run; 80 characters wide up to six models, as a whole run has.

    Args:
        scores: model -> {task: {measure: score}}, shares in [0, 1], higher is better.
    """
    rows = rows_by_model(scores)
    shown = [row for found in rows.values() for row in found.values()]
    notes = [f"{name}: {words}" for name, words in measures_in(shown).items()]
    notes.append(
        "a column: a model of this run, in the order of their making; in brackets: held-out items, which no training "
        "saw; shares in per cent, below each its 95 % interval; bold: a row's best, which may be so by chance"
    )
    table = Table(
        title="Every model of the run",
        caption="\n".join(notes),
        caption_justify="left",
        title_style="bold",
        padding=(0, 0, 0, 1),
        width=WIDTH if len(scores) <= 6 else None,
        box=None,
    )
    table.add_column("task (items), measure", overflow="fold")
    for name in scores:
        table.add_column(NAMES.get(name, name), justify="right", width=8, overflow="fold")
    previous = None
    for found in rows.values():
        first = next(iter(found.values()))
        if first.task != previous:
            table.add_row(Text(f"{first.label} ({first.num_items})", "bold"))
        best = max((row.after for row in found.values() if row.after is not None), default=None)
        label = Text("  " + first.measure.replace(", ", ",\n  "))
        table.add_row(label, *(_cell(found.get(model), best) for model in scores))
        previous = first.task
    return table


def _cell(row: ScoreRow | None, best: float | None) -> Text:
    """The score, its interval and what is to be said of it, on a line each."""
    if row is None:
        return Text("–")
    value = Text(show_score(row.after, row.unit).removesuffix(" %"), "bold" if row.after == best else "")
    interval = re.sub(r"(?<!\d)0\.", ".", show_interval(row.after_interval, row.unit)).strip("[]").replace(", ", "–")
    return Text("\n").join([value, *(Text(line, "dim") for line in (interval, *row.marks) if line)])
