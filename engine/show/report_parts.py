"""A run of several trainings (CoRL) on one page: each with its state, cost, curves, samples and a link to its own page.

`parts.json` says what was made from what:

    {"parts": [{"name": "unified", "title": "…", "from": ["base"], "state": "done"}, …],
     "models": {"base": {"title": "…", "table": [a ScoreRow as an object, …]}, …},
     "before": "base", "after": {"drawings": "t2i", "answers": "merged"}}

A folder of an older version has none; its trainings are then found by their files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .markup import cell, section, table, words
from .names import INTERVALS
from .outcome import Outcome, outcome_of
from .pulse import duration
from .report_cost import COST_COLUMNS, cost_line, total_seconds
from .report_curves import CURVES, line_of, reward_chart, rewards_said
from .report_heading import state
from .report_pictures import sheet, step_of
from .report_scores import models_table, rows_in, rows_of
from .report_story import warnings_in
from .run_files import Run, read_run, table_of, texts_of, trainings_in, values_of
from .scores import ScoreRow


class Part:
    """A training or a merge of a run."""

    def __init__(self, run: Run, entry: Mapping[str, Any]) -> None:
        self.name = str(entry.get("name"))
        self.title = str(entry.get("title") or self.name)
        self.sources = texts_of(entry.get("from"))
        self.state = str(entry.get("state") or "")
        self.is_merge = entry.get("kind") == "merge"
        folder = run.folder / self.name
        inside = "/" not in self.name and self.name not in ("", ".", "..") and "\0" not in self.name
        self.run = read_run(folder) if inside and folder.is_dir() and not self.is_merge else None


def parts_of(run: Run) -> list[Part]:
    """The parts of a run in the order of their making; [] for a run of one training."""
    listed = run.parts.get("parts")
    if isinstance(listed, list):
        return [
            Part(run, entry) for entry in listed if isinstance(entry, Mapping) and isinstance(entry.get("name"), str)
        ]
    if run.rows:
        return []
    return [Part(run, {"name": folder.name}) for folder in trainings_in(run.folder)]


def models_of(run: Run, parts: list[Part]) -> dict[str, tuple[str, list[ScoreRow]]]:
    """Name -> (title, scores: `after` of rows) of every model of the run."""
    listed = table_of(run.parts, "models")
    if listed:
        return {
            str(name): (str(model.get("title") or name), rows_in(model.get("table")))
            for name, model in listed.items()
            if isinstance(model, Mapping)
        }
    models = {"base": ("before", rows_of({}, table_of(run.scores, "before")))}
    for part in parts:
        if part.run is not None:
            models[part.name] = (part.title, rows_of({}, table_of(part.run.scores, "after")))
    return models


def what_was_trained(run: Run, parts: list[Part], model: str, data: str) -> str:
    """`… was trained by CoRL on …, in 4 trainings: …`"""
    trained = [part for part in parts if part.run is not None]
    said = [f"{part.title} ({len(part.run.rows)} steps)" for part in trained if part.run is not None]
    merged = [
        f"{' and '.join(map('“{}”'.format, part.sources))} were merged"
        for part in parts
        if part.is_merge and part.state == "done"
    ]
    verb = "is being trained" if outcome_of(run).kind == "running" else "was trained"
    count = "in one training" if len(trained) == 1 else f"in {len(trained)} trainings"
    tail = f"; {'; '.join(merged)}" if merged else ""
    return f"{model[:1].upper()}{model[1:]} {verb} by CoRL on {data}, {count}: {', '.join(said)}{tail}."


def compared(run: Run, parts: list[Part]) -> str:
    """Which two models "before" and "after" are."""
    titles = {name: title for name, (title, _) in models_of(run, parts).items()}
    before, after = run.parts.get("before"), table_of(run.parts, "after")
    if not after or not isinstance(before, str):
        return ""
    said = [f"of {what} from “{titles.get(name, name)}”" for what, name in after.items() if isinstance(name, str)]
    first = f"Before: “{titles.get(before, before)}”."
    return f"{first} After: scores {' and '.join(said)}; the table of all models has every one."


def models_section(run: Run, parts: list[Part]) -> str:
    lead = (
        "Held-out scores of every model that the run made, on the same items, which no training saw; a line's best is "
        f"marked. Shares are in per cent; {INTERVALS}."
    )
    return section("Every model of the run", models_table(models_of(run, parts)), "models", lead)


def warned_of(parts: list[Part]) -> list[str]:
    """What is to be warned of in each training, its name first."""
    return [f"{part.title}: {line}" for part in parts if part.run is not None for line in warnings_in(part.run)]


def parts_cost(parts: list[Part]) -> str:
    """What each training cost, and what dynamic group scaling left out of it, a line each."""
    lines = [(part.title, cost_line(part.run)) for part in parts if part.run is not None and part.run.rows]
    head = ("Training", *COST_COLUMNS)
    body = "".join(
        f"<tr>{cell(head[0], words(title), '', 'th')}"
        + "".join(cell(column, words(value)) for column, value in zip(COST_COLUMNS, line, strict=True))
        + "</tr>"
        for title, line in lines
    )
    return table(head, [f"<tbody>{body}</tbody>"], "lines") if lines else ""


def parts_section(parts: list[Part], running: bool = False) -> str:
    """A card for each; while the run goes on, with samples of the training under way alone."""
    body = "".join(_part(part, running) for part in parts)
    return section("The trainings, one after another", body, "trainings")


def state_of(part: Part) -> Outcome:
    """How a part stands; what is only planned has nothing yet."""
    if part.run is not None and (part.run.rows or part.state not in ("planned", "")):
        return outcome_of(part.run)
    if part.state == "done":
        return Outcome("done", "merged" if part.is_merge else "done")
    return Outcome("running", "under way") if part.state == "running" else Outcome("stopped", "not begun")


def _part(part: Part, running: bool) -> str:
    outcome = state_of(part)
    origin = f"made from {' and '.join(part.sources)}" if part.sources else ""
    seconds = total_seconds(part.run) or sum(values_of(part.run.rows, "step_time")) if part.run is not None else 0.0
    said = " · ".join(said for said in (outcome.words, origin, duration(seconds) if seconds else "") if said)
    head = f"<h3>{words(part.title)}</h3>{state(outcome._replace(words=said))}"
    if part.run is None:
        return f'<article class="part" id="part-{words(part.name)}">{head}</article>'
    link = quote(part.name)
    own = f'<p><a href="{link}/report.html">The whole page of this training</a></p>' if part.run.rows else ""
    rows = part.run.rows
    charts = reward_chart(part.run) + "".join(line_of(curve, rows) for curve in CURVES[:2])
    drawn = f'{rewards_said(part.run)}<div class="charts">{charts}</div>' if charts else ""
    samples = ""
    if part.run.sheets and (outcome.kind == "running" or not running):
        last: Path = part.run.sheets[-1]
        picture = sheet(part.run, last, shrink=not running)
        samples = (
            f"<details><summary>Samples of step {step_of(part.run, last)}</summary>{picture}</details>"
            if picture
            else ""
        )
    return f'<article class="part" id="part-{words(part.name)}">{head}{own}{drawn}{samples}</article>'
