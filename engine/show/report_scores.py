"""Tables of held-out scores: before and after, two runs, every model of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import scores as of_scores
from .markup import cell, section, table, words
from .run_files import Run, is_number, table_of, texts_of
from .scores import SUMMARY, ScoreRow, measures_in, score_rows, show_change, show_score

HELD_OUT = "On held-out items that training never saw; changes in percentage points."
WITH_INTERVALS = " In brackets: 95 % intervals."


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
    intervals = any(interval_of(row, when) for row in rows for when in ("before", "after", "change"))
    explained = "; ".join(f"{name}: {said}" for name, said in measures_in(list(rows)).items())
    note = f"{HELD_OUT}{WITH_INTERVALS if intervals else ''} {explained[:1].upper()}{explained[1:]}".strip()
    return f'{table(head, bodies, "scores")}<p class="note">{words(note)}</p>'


def _line(row: ScoreRow, head: Sequence[str]) -> str:
    way = {"better": "up", "worse": "down", "unclear": ""}[direction(row)]
    marks = "".join(f' <span class="mark">{words(mark)}</span>' for mark in marks_of(row))
    items = getattr(row, "num_items", 0)
    cells = [
        cell(head[0], f"{words(row.measure)}{marks}", "", "th"),
        cell(head[1], str(items) if items else "–"),
        cell(head[2], shown(row, "before")),
        cell(head[3], shown(row, "after")),
        cell(head[4], f"{words(show_change(row))}{_interval(row, 'change')}", f"number {way}"),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def direction(row: ScoreRow) -> str:
    """better or worse where the interval of the change leaves 0 out (or there is none), else unclear."""
    low, high = interval_of(row, "change") or (row.change or 0.0, row.change or 0.0)
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def shown(row: ScoreRow, when: str) -> str:
    """A score with its interval, as HTML."""
    value = row.before if when == "before" else row.after
    return f"{words(show_score(value, row.unit))}{_interval(row, when)}"


def interval_of(row: ScoreRow, when: str) -> tuple[float, float] | None:
    found = getattr(row, f"{when}_interval", None)
    return found if isinstance(found, tuple) else None


def interval_words(row: ScoreRow, when: str) -> str:
    """`[37, 60]`, or nothing."""
    found = interval_of(row, when)
    show = getattr(of_scores, "show_interval", None)
    return str(show(found, getattr(row, "unit", "%"), signed=when == "change")) if found and show else ""


def _interval(row: ScoreRow, when: str) -> str:
    said = interval_words(row, when)
    return f' <span class="interval">{words(said)}</span>' if said else ""


def marks_of(row: ScoreRow) -> tuple[str, ...]:
    return tuple(getattr(row, "marks", ()))


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
        cells = cell(head[0], words(measure), "", "th")
        for column, row in zip(head[1:], line, strict=True):
            top = row is not None and row.after is not None and row.after == best
            said = "–" if row is None else shown(row, "after") + ('<span class="best"> best</span>' if top else "")
            cells += cell(column, said, "number top" if top else "number")
        bodies[task] = bodies.get(task, _group(known, len(head))) + f"<tr>{cells}</tr>"
    return table(head, [f"<tbody>{lines}</tbody>" for lines in bodies.values()], "scores models")


def _group(row: ScoreRow, columns: int) -> str:
    return f'<tr class="group"><th colspan="{columns}" scope="rowgroup">{words(row.label)}</th></tr>'


def score_section(run: Run, before: str = "Before", after: str = "After") -> str:
    return section("Scores before and after training", score_table(rows_of_run(run), before, after), "scores")
