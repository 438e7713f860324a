"""Two runs on one page: settings that differ, scores beside each other, curves over each other, the same requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..whole_files import write_atomically
from .markup import cell, section, table, words
from .names import SUMMARY
from .outcome import outcome_of
from .report import page, shown
from .report_curves import overlaid
from .report_heading import facts_of
from .report_parts import parts_of
from .report_pictures import MAX_CARDS, READ_BY, card
from .report_scores import HOW_TO_READ, rows_of, score_table
from .report_story import changes
from .run_files import Run, read_run, table_of

NOT_COMPARED = frozenset({"output_dir", "resume_from_checkpoint"})
"""Settings that differ between any two runs."""


def write_comparison(first: Path, second: Path, output: Path | None = None) -> Path:
    """Writes the page that compares two runs, and returns its path.

    Args:
        first, second: their folders; the second is the newer or the changed one.
        output: the page; None: `compare_<second>.html` in the first one's folder.
    """
    runs = read_run(first), read_run(second)
    names = distinct_names(first, second)
    path = output or first / f"compare_{second.resolve().name}.html"
    text = page(f"{names[0]} against {names[1]}", comparison(runs, names))
    write_atomically(path, text.encode("utf-8", "replace"))
    return path


def distinct_names(first: Path, second: Path) -> tuple[str, str]:
    """The folders' names, with as many of those above as it takes to tell them apart."""
    parts = first.resolve().parts, second.resolve().parts
    for count in range(1, max(map(len, parts)) + 1):
        names = "/".join(parts[0][-count:]), "/".join(parts[1][-count:])
        if names[0] != names[1]:
            return names
    return f"{parts[0][-1]} (A)", f"{parts[1][-1]} (B)"


def comparison(runs: tuple[Run, Run], names: tuple[str, str]) -> str:
    """The page's parts in their order."""
    after = [table_of(run.scores, "after") for run in runs]
    rows = rows_of(after[0], after[1]) if all(after) else []
    unscored = [name for name, scores in zip(names, after, strict=True) if not scores]
    missing = f"{' and '.join(unscored)}: no scores after training yet." if unscored else ""
    firsts = [row for row in rows if row.task != SUMMARY]
    heads = (f"Better in {names[1]}", f"Worse in {names[1]}")
    said = f"After training, from {names[0]} to {names[1]}."
    story = changes(firsts, said, heads) if firsts else ""
    return "\n".join(
        block
        for block in (
            f"<h1>{words(names[0])} against {words(names[1])}</h1>",
            section("In short", story + (f"<p>{words(missing)}</p>" if missing else ""), "story"),
            _settings(runs, names),
            section("Scores after training", score_table(rows, names[0], names[1]), "scores", HOW_TO_READ),
            _requests(runs, names),
            *_curves(runs, names),
            _facts(runs, names),
        )
        if block
    )


def _settings(runs: tuple[Run, Run], names: tuple[str, str]) -> str:
    """A line per setting that differs."""
    first, second = (run.settings for run in runs)
    differing = [
        name
        for name in {**first, **second}
        if name not in NOT_COMPARED and shown(first.get(name)) != shown(second.get(name))
    ]
    if not (first and second):
        return section("Settings", "<p>One of the runs has no config.yaml.</p>", "settings")
    if not differing:
        return section("Settings", "<p>The same in both.</p>", "settings")
    lines = [
        (name, [shown(run.settings[name]) if name in run.settings else "not there" for run in runs])
        for name in differing
    ]
    return section("Settings that differ", _two_columns(lines, "Setting", names), "settings")


def _facts(runs: tuple[Run, Run], names: tuple[str, str]) -> str:
    """Both headers beside each other."""
    both = [dict([("State", outcome_of(run).words), *facts_of(run)]) for run in runs]
    lines = [(name, [facts.get(name) or "–" for facts in both]) for name in both[0]]
    return section("Both runs", _two_columns(lines, "", names), "runs")


def _two_columns(lines: Sequence[tuple[str, list[str]]], head: str, names: tuple[str, str]) -> str:
    heads = (head, *names)
    body = "".join(
        f"<tr>{cell(head, words(name), '', 'th')}"
        + "".join(cell(heads[1 + i], words(value), "") for i, value in enumerate(values))
        + "</tr>"
        for name, values in lines
    )
    return table(heads, [f"<tbody>{body}</tbody>"], "sides-by-side")


def _requests(runs: tuple[Run, Run], names: tuple[str, str]) -> str:
    """Cards of the requests that both runs have examples of; before training once, where both made the same of it."""
    known = {_key(row): row for row in runs[1].examples}
    cards: list[str] = []
    for row in runs[0].examples:
        other = known.get(_key(row))
        if other is None or len(cards) == MAX_CARDS:
            continue
        (first, second), folders = (row, other), [run.folder for run in runs]
        sides = [("before", folders[0], first)]
        if not _began_alike(folders, first, second):
            sides = [(f"{names[0]} before", folders[0], first), (f"{names[1]} before", folders[1], second)]
        sides += [(f"{names[0]} after", folders[0], first), (f"{names[1]} after", folders[1], second)]
        cards.append(card(folders[0], row, sides))
    lead = "Held-out requests that both runs were scored on; none was picked by its result." + READ_BY
    return section("The same requests", f'<div class="pairs">{"".join(cards)}</div>' if cards else "", "pictures", lead)


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells a request from others; older folders have no ids."""
    return (str(row.get("task")), str(row.get("id") or row.get("prompt")))


def _began_alike(folders: Sequence[Path], first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether both models made the same of a request before training, byte by byte."""
    if first.get("before_text") != second.get("before_text"):
        return False
    contents = []
    for folder, row in zip(folders, (first, second), strict=True):
        name = row.get("before_image")
        try:
            inside = isinstance(name, str) and (folder / name).resolve().is_relative_to(folder.resolve())
            contents.append((folder / str(name)).read_bytes() if inside else None)
        except (OSError, ValueError):
            contents.append(None)
    return contents[0] == contents[1]


def _curves(runs: tuple[Run, Run], names: tuple[str, str]) -> list[str]:
    """Of both runs, or of each training that both have."""
    trainings = [{part.name: part for part in parts_of(run)} for run in runs]
    if not any(trainings):
        return [overlaid(list(zip(names, runs, strict=True)))]
    found = []
    for name, part in trainings[0].items():
        other = trainings[1].get(name)
        if part.run is not None and other is not None and other.run is not None:
            pair = [(names[0], part.run), (names[1], other.run)]
            found.append(overlaid(pair, title=f"Curves of both: {part.title}", anchor=f"curves-{name}"))
    return found
