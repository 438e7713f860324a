"""One page about a run, from the files in its folder: `write_report(run_dir)` makes `report.html`.

The page stands alone: nothing is loaded from elsewhere, pictures are embedded, and its one script, which shows values
below a pointer and reloads the page of a run that goes on, is named by its hash in a Content-Security-Policy that
forbids everything else.  Without scripts the page is whole.  Whatever is missing (an interrupted run) is left out.
Text that comes from data is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import re
import string
import time
from functools import cache
from pathlib import Path
from typing import Any

from ..whole_files import write_atomically
from .markup import words
from .outcome import outcome_of
from .report_cost import cost
from .report_curves import curves
from .report_data import data_section
from .report_heading import data_of, heading, model_of
from .report_parts import compared, models_section, parts_cost, parts_of, parts_section, warned_of, what_was_trained
from .report_pictures import cards, sheets
from .report_scores import score_section
from .report_story import story
from .run_files import Run, read_run, table_of, values_of, whole_run

TEMPLATE = Path(__file__).with_name("report_template.html")
PAGE = "report.html"
RELOAD_SECONDS = 10
"""A page of a run that goes on reloads itself so often."""
PATIENCE = 120.0
"""Seconds without a new page that surprise nobody; or three of the run's longest steps, where those take longer."""


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir/report.html` from what the folder holds, and returns its path; any file may be missing."""
    run = read_run(Path(run_dir))
    path = run.folder / PAGE
    patience = max([PATIENCE, *(3 * seconds for seconds in values_of(run.rows, "step_time"))])
    running = outcome_of(run).kind == "running"
    text = page(f"{run.name}: report", body_of(run), running=running, patience=patience)
    write_atomically(path, text.encode("utf-8", "replace"))
    return path


def body_of(run: Run) -> str:
    """The page's parts in their order."""
    parts, running = parts_of(run), outcome_of(run).kind == "running"
    if parts:
        trained, pair = what_was_trained(run, parts, model_of(run), data_of(run)), compared(run, parts)
        middle = [models_section(run, parts), parts_section(parts, running)]
    else:
        trained, pair, middle = "", "", [curves(run), sheets(run, running)]
    blocks = [
        _part_of(run),
        heading(run),
        story(run, trained, pair, warned_of(parts)),
        cards(run),
        score_section(run),
        *middle,
        data_section(run),
        cost(run, parts_cost(parts)),
        _settings(run),
    ]
    return "\n".join(block for block in blocks if block)


def page(title: str, body: str, *, running: bool = False, patience: float = PATIENCE) -> str:
    """A whole page.

    Args:
        title: of the window.
        body: HTML.
        running: it is of a run that goes on: it says when it was written, and reloads itself.
        patience: seconds without a new page after which it says that the run may have been killed.
    """
    template, style, script = _template()
    live = _live(patience) if running else ""
    refresh = f'<noscript><meta http-equiv="refresh" content="{RELOAD_SECONDS}"></noscript>' if running else ""
    values = {
        "title": words(title),
        "body": live + body,
        "refresh": refresh,
        "script_hash": script,
        "style_hash": style,
    }
    return template.substitute(values)


@cache
def _template() -> tuple[string.Template, str, str]:
    """The template, and the hashes by which the page's policy knows its style and its script."""
    text = TEMPLATE.read_text(encoding="utf-8")
    hashes = []
    for tag in ("style", "script"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert content is not None
        digest = hashlib.sha256(content.group(1).encode()).digest()
        hashes.append(f"'sha256-{base64.b64encode(digest).decode('ascii')}'")
    return string.Template(text), hashes[0], hashes[1]


def _live(patience: float) -> str:
    """When the page was written, for people and for the script."""
    at = time.time()
    clock = time.strftime("%H:%M:%S", time.localtime(at))
    times = f'data-written="{at:.0f}" data-reload="{RELOAD_SECONDS}" data-patience="{patience:.0f}"'
    return (
        f'<p class="live" role="status" {times}>Written at {clock} while the run goes on; this page reloads itself. If '
        "that time is long past, the run was killed: <code>recipes/report.py</code> with its folder says so.</p>"
    )


def _part_of(run: Run) -> str:
    """A link to the page of the whole run, on that of one of its trainings."""
    return '<p class="back"><a href="../report.html">← the whole run</a></p>' if whole_run(run.folder) else ""


def _settings(run: Run) -> str:
    environment = {name: value for name, value in run.environment.items() if not isinstance(value, dict)}
    environment |= table_of(run.environment, "packages")
    blocks = []
    for title, table in (("Settings", run.settings), ("Environment", environment)):
        lines = "".join(
            f'<tr><th scope="row">{words(name)}</th><td>{words(shown(value))}</td></tr>'
            for name, value in table.items()
        )
        if lines:
            blocks.append(f'<details><summary>{title}</summary><table class="settings">{lines}</table></details>')
    return f'<section id="repeat"><h2>To repeat this run</h2>{_again(run)}{"".join(blocks)}</section>' if blocks else ""


def _again(run: Run) -> str:
    """The command that does the same, where the run's files tell it."""
    command, commit = run.environment.get("command"), run.environment.get("commit")
    if not isinstance(command, list) or not command or not run.settings:
        return ""
    at = f", of commit {str(commit)[:12]}" if commit else ""
    config = Path(str(run.settings.get("output_dir") or "")).parent / run.folder.name / "config.yaml"
    return f"<p><code>python recipes/{words(command[0])} --config {words(str(config))}</code>{words(at)}</p>"


def shown(value: Any) -> str:
    """A setting's value as people write it."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "–"
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
