"""The page's part about the data: how many prompts of each task, what is left out and why, three examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .markup import embed, section, words
from .names import task_words
from .run_files import DATA_SHEET, Run, table_of

MOST_LISTED = 50
LEAD = "Counted before the first step, when every row was read, every picture opened and every prompt's length counted."


def data_section(run: Run) -> str:
    """Of data.json; "" for a run without one."""
    uses = {use: table_of(table_of(run.data, "tasks"), use) for use in table_of(run.data, "tasks")}
    lines = "".join(
        f'<tr><th scope="row">{words(use)}</th><td>{words(_counts(counts))}</td></tr>' for use, counts in uses.items()
    )
    skipped = _entries(run.data, "skipped")
    left_out = [f"{row.get('why')}" for row in skipped if isinstance(row, Mapping)]
    unused = [str(line) for line in _entries(run.data, "unused")]
    body = f'<table class="settings">{lines}</table>' if lines else ""
    body += _listed("rows left out because they cannot be used", left_out)
    body += _listed("things in the data that are not used", unused)
    if body:
        body += embed(run.folder, run.folder / DATA_SHEET, "three examples of the data")
    return section("The data", body, "data", LEAD)


def _entries(table: Mapping[str, Any], name: str) -> list[Any]:
    found = table.get(name)
    return found if isinstance(found, list) else []


def _counts(counts: Mapping[str, Any]) -> str:
    return " · ".join(f"{task_words(str(task))} ({task}) {count}" for task, count in counts.items()) or "nothing"


def _listed(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{words(line)}</li>" for line in lines[:MOST_LISTED])
    more = f"<li>and {len(lines) - MOST_LISTED} more, in data.json</li>" if len(lines) > MOST_LISTED else ""
    return f"<details><summary>{len(lines)} {words(title)}</summary><ul>{items}{more}</ul></details>"
