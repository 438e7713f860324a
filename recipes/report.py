"""Remakes the page of a run from its folder, or compares two runs. Needs no GPU, no model and no network.

python recipes/report.py RUN                     RUN/report.html again, also of a run that was killed
python recipes/report.py RUN RUN2                RUN/compare_RUN2.html: settings, scores, pictures and curves of both
python recipes/report.py RUN RUN2 --output PAGE  the same page elsewhere
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from syncr1.engine.errors import DataError, kind_of
from syncr1.engine.methods.early import unix_habits
from syncr1.engine.methods.exit import run_to_exit
from syncr1.engine.methods.preflight import output_problems
from syncr1.engine.settings.flags import parse
from syncr1.engine.settings.schema import Rule, Settings
from syncr1.engine.show.report import write_report
from syncr1.engine.show.report_compare import write_comparison
from syncr1.engine.show.run_files import is_run, unreadable

MOST_RUNS = 2


def _problems(config: Any) -> list[str]:
    if not 1 <= len(config.runs) <= MOST_RUNS:
        return [f"runs: expected a run's folder, or two to compare, got {len(config.runs)}; name one or two"]
    problems = [problem for run in config.runs if (problem := _no_run(run))]
    if problems or config.output is None:
        return problems or _unwritable("runs", config.runs[0])
    if len(config.runs) == 1:
        page = config.runs[0] / "report.html"
        return [f"output: expected two runs, whose comparison it is for, got one; leave it out, the page is {page}"]
    if config.output.is_dir():
        return [f"output: expected a file for the page, got {config.output}, a folder; name a file in it"]
    return _unwritable("output", config.output.absolute().parent)


def _no_run(folder: Path) -> str:
    if not folder.is_dir():
        return f"runs: expected the folder of a run, got {folder}, {kind_of(folder)}; correct the path"
    try:
        if is_run(folder):
            return ""
        below = sorted(path.name for path in folder.iterdir() if path.is_dir() and is_run(path))[:5]
    except OSError as error:
        return f"runs: expected a folder that can be read, got {folder} ({error.strerror}); change its permissions"
    inside = f"it holds runs: {', '.join(below)}" if below else "a run's folder has config.yaml or metrics.jsonl"
    return f"runs: expected the folder of a run, got {folder}, which is none; {inside}"


def _unwritable(setting: str, folder: Path) -> list[str]:
    """The folder has to be there for a page."""
    if not folder.is_dir():
        return [f"{setting}: expected a folder for the page, got {folder}, {kind_of(folder)}; make it first"]
    return output_problems(setting, folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig(Settings):
    """Settings of `recipes/report.py`; the runs may stand without a flag."""

    # --- what is shown ---
    runs: tuple[Path, ...] = ()
    """Folder of a run, such as runs/sync_r1; of two they are compared."""
    output: Path | None = None
    """File for the comparison of two. None: compare_<second>.html in the first one's folder."""

    RULES: ClassVar[tuple[Rule, ...]] = (_problems,)


def main() -> None:
    run_to_exit(report, parse(ReportConfig, description=__doc__, positional="runs"))


def report(config: ReportConfig) -> None:
    for folder in config.runs:
        damaged, is_empty = unreadable(folder)
        if is_empty:
            raise DataError(
                f"{folder}: expected what a run writes, got {', '.join(damaged)} without a line of it; name another "
                "folder, or train again"
            )
        for name in damaged:
            print(f"report.py: {folder / name} holds nothing that a run writes, and is left out", file=sys.stderr)
    first, *others = config.runs
    print(write_comparison(first, others[0], config.output) if others else write_report(first))


if __name__ == "__main__":
    with unix_habits():
        main()
