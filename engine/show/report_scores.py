"""Tables of held-out scores: before and after, two runs, every model of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .intervals import Interval
from .markup import cell, section, table, words
from .names import INTERVALS, SUMMARY
from .run_files import Run, is_number, table_of, texts_of
from .scores import ScoreRow, measures_in, score_rows, show_change, show_interval, show_score

HOW_TO_READ = (
    "A line is one measure of the task above it, over so many held-out items, which training never saw. Shares are in "
    f"per cent, changes in points; {INTERVALS}. Below the table stands what the words mean."
)


def rows_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[ScoreRow]:
    """The rows of two models' scores, from files that may be damaged."""
    return score_rows(clean(before), clean(after))


def clean(scores: Any) -> dict[str, Any]:
    """What can be a score; what is said of single items is left as it is."""
    if not isinstance(scores, Mapping):
        return {}
    return {
        name: value if name == "per_item" else clean(value) if isinstance(value, Mapping) else float(value)
        for name, value in scores.items()
        if isinstance(name, str) and (is_number(value) or isinstance(value, Mapping))
    }


def rows_of_run(run: Run) -> list[ScoreRow]:
    """As they were computed when the scores were written, else anew."""
    written = rows_in(run.scores.get("table"))
    return written or rows_of(table_of(run.scores, "before"), table_of(run.scores, "after"))


def rows_in(written: Any) -> list[ScoreRow]:
    """Rows from a file; what is none is left out."""
    rows = [_row_in(entry) for entry in written if isinstance(entry, Mapping)] if isinstance(written, list) else []
    return [row for row in rows if row is not None]


def _row_in(entry: Mapping[str, Any]) -> ScoreRow | None:
    known = {name: entry[name] for name in ScoreRow._fields if name in entry}
    for name, value in known.items():
        if name.endswith("_interval"):
            pair = isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value))
            known[name] = tuple(value) if pair else None
        elif name == "marks":
            known[name] = tuple(texts_of(value))
        elif name in ("before", "after", "chance"):
            known[name] = float(value) if is_number(value) else None
        elif name == "num_items":
            known[name] = int(value) if is_number(value) else 0
        elif not isinstance(value, str):
            return None
    return ScoreRow(**known) if {"task", "measure", "before", "after"} <= known.keys() else None


def score_table(rows: Sequence[ScoreRow], before: str = "Before", after: str = "After") -> str:
    """A group of rows per task, the summary last.

    Args:
        rows: of `score_rows`.
        before, after: heads of the two columns, such as the names of two models.
    """
    if not rows:
        return ""
    head = ("Measured by", "Items", before, after, "Change")
    bodies = []
    for task in dict.fromkeys(row.task for row in rows):
        group = [row for row in rows if row.task == task]
        kind = ' class="summary"' if task == SUMMARY else ""
        name = f'<th colspan="{len(head)}" scope="rowgroup">{words(group[0].label)}</th>'
        lines = "".join(_line(row, head) for row in group)
        bodies.append(f'<tbody{kind}><tr class="group">{name}</tr>{lines}</tbody>')
    return table(head, bodies, "scores") + legend(rows)


def legend(rows: Sequence[ScoreRow]) -> str:
    """What the measures, units and marks of a table mean, a line each."""
    lines = "".join(f"<li><b>{words(name)}</b>: {words(said)}</li>" for name, said in measures_in(list(rows)).items())
    return f'<ul class="note">{lines}</ul>' if lines else ""


def _unit(row: ScoreRow) -> str:
    """Behind the measure of an answer, whose name does not say what is counted."""
    return f' <span class="interval">{words(row.unit)}</span>' if row.unit and row.family != "drawings" else ""


def _line(row: ScoreRow, head: Sequence[str]) -> str:
    way = {"better": "up", "worse": "down", "unclear": ""}[direction(row)]
    marks = "".join(f' <span class="mark">{words(mark)}</span>' for mark in row.marks)
    cells = [
        cell(head[0], f"{words(row.measure)}{_unit(row)}{marks}", "", "th"),
        cell(head[1], str(row.num_items) if row.num_items else "–"),
        cell(head[2], shown(row, "before")),
        cell(head[3], shown(row, "after")),
        cell(head[4], f"{words(show_change(row))}{_interval(row, 'change')}", f"number {way}"),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def direction(row: ScoreRow) -> str:
    """better or worse where the interval of the change leaves 0 out (or there is none), else unclear."""
    low, high = row.change_interval or (row.change or 0.0, row.change or 0.0)
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def shown(row: ScoreRow, when: str) -> str:
    """A score with its interval, as HTML."""
    value = row.before if when == "before" else row.after
    return f"{words(show_score(value, row.unit))}{_interval(row, when)}"


def interval_of(row: ScoreRow, when: str) -> Interval | None:
    """Of `before`, `after` or `change`."""
    return {"before": row.before_interval, "after": row.after_interval, "change": row.change_interval}[when]


def _interval(row: ScoreRow, when: str) -> str:
    said = show_interval(interval_of(row, when), row.unit, signed=when == "change")
    return f' <span class="interval">{words(said)}</span>' if said else ""


def models_table(models: Mapping[str, tuple[str, Sequence[ScoreRow]]]) -> str:
    """Every model of a run, a group per task, a line per measure, a column per model; the best of a line is marked.

    Args:
        models: name -> (its name in words, its scores: `after` of rows).
    """
    rows = {name: {(row.task, row.measure): row for row in found} for name, (_, found) in models.items()}
    rows = {name: found for name, found in rows.items() if found}
    if len(rows) < 2:
        return ""
    head = ("Measured by", *(models[name][0] for name in rows))
    bodies: dict[str, str] = {}
    for (task, measure), known in {key: row for found in rows.values() for key, row in found.items()}.items():
        line = [found.get((task, measure)) for found in rows.values()]
        values = [row.after for row in line if row is not None and row.after is not None]
        best = max(values) if len(set(values)) > 1 else None
        cells = cell(head[0], f"{words(measure)}{_unit(known)}", "", "th")
        for column, row in zip(head[1:], line, strict=True):
            top = row is not None and row.after is not None and row.after == best
            said = "–" if row is None else shown(row, "after") + ('<span class="best"> best</span>' if top else "")
            cells += cell(column, said, "number top" if top else "number")
        bodies[task] = bodies.get(task, _group(known, len(head))) + f"<tr>{cells}</tr>"
    every = [row for found in rows.values() for row in found.values()]
    return table(head, [f"<tbody>{lines}</tbody>" for lines in bodies.values()], "scores models") + legend(every)


def _group(row: ScoreRow, columns: int) -> str:
    return f'<tr class="group"><th colspan="{columns}" scope="rowgroup">{words(row.label)}</th></tr>'


def score_section(run: Run, before: str = "Before", after: str = "After") -> str:
    body = score_table(rows_of_run(run), before, after)
    return section("Scores before and after training", body, "scores", HOW_TO_READ if body else "")
