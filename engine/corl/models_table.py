"""The table at the end of a CoRL run: a row per model, a column per measure."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from ..show.scores import MEASURES, SUMMARY, TASKS, Scores, flatten_scores, headline, show_score

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
LEFT_OUT = "form greedy"
"""Nearly always kept; scores.json has it."""


def models_table(scores: Mapping[str, Scores]) -> Table:
    """Held-out scores of every model of a run; about 100 characters wide with the built-in rewards.

    Args:
        scores: model -> {task: {measure: score}}, shares in [0, 1], higher is better.
    """
    flat = {name: headline(flatten_scores(table)) for name, table in scores.items()}
    found = dict.fromkeys(column for table in flat.values() for column in table)
    columns = [column for column in found if not column.startswith(SUMMARY) and not column.endswith(LEFT_OUT)]
    measures = list(dict.fromkeys(column.partition("/")[2] for column in columns))
    notes = [f"{task}: {TASKS[task]}" for task in dict.fromkeys(c.partition("/")[0] for c in columns) if task in TASKS]
    notes += [f"{measure}: {MEASURES[measure]}" for measure in measures if measure in MEASURES]
    notes.append("in per cent, on held-out items that no training saw; the best of a column is bold")
    table = Table(
        title="Every model of the run",
        caption="\n".join(notes),
        caption_justify="left",
        title_style="bold",
        padding=(0, 0),
    )
    table.add_column("model", no_wrap=True)
    for column in columns:
        task, _, measure = column.partition("/")
        table.add_column("\n".join([task, *measure.split()]), justify="right", no_wrap=True)
    best = {c: max((v for t in flat.values() if (v := t.get(c)) is not None), default=None) for c in columns}
    for name, row in flat.items():
        cells = [
            Text(show_score(row.get(c)).removesuffix(" %"), "bold" if row.get(c) == best[c] else "") for c in columns
        ]
        table.add_row(NAMES.get(name, name), *cells)
    return table
