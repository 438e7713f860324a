"""Remakes the page of a run from its folder, or compares two runs. Needs no GPU, no model and no network.

python recipes/report.py RUN                     RUN/report.html again, also of a run that was killed
python recipes/report.py RUN RUN2                RUN/compare_RUN2.html: settings, scores, pictures and curves of both
python recipes/report.py RUN RUN2 --output PAGE  the same page elsewhere
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from syncr1.engine.errors import EXIT_BAD_INPUT
from syncr1.engine.methods.early import unix_habits
from syncr1.engine.show.report import write_report
from syncr1.engine.show.report_compare import write_comparison
from syncr1.engine.show.run_files import is_run

MOST_RUNS = 2


def refuse(words: str) -> NoReturn:
    print(f"report.py: {words}", file=sys.stderr)
    raise SystemExit(EXIT_BAD_INPUT)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        refuse(f"{message}; report.py --help")


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="report.py", description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, such as runs/sync_r1")
    parser.add_argument("--output", type=Path, help="where the comparison goes")
    asked = parser.parse_args()
    folders = [folder.expanduser() for folder in asked.runs]
    if len(folders) > MOST_RUNS:
        refuse(f"expected one folder, or two to compare, got {len(folders)}; name two")
    if asked.output is not None and len(folders) == 1:
        refuse(f"--output: is for the comparison of two runs, got one run; its page is {folders[0] / 'report.html'}")
    for folder in folders:
        if not folder.is_dir():
            refuse(
                f"expected the folder of a run, got {folder}, which is {'a file' if folder.exists() else 'not there'}"
            )
        if not is_run(folder):
            below = sorted(path.name for path in folder.iterdir() if path.is_dir() and is_run(path))[:5]
            inside = (
                f"it holds runs: {', '.join(below)}" if below else "a run's folder has config.yaml or metrics.jsonl"
            )
            refuse(f"expected the folder of a run, got {folder}, which is none; {inside}")
    try:
        if len(folders) == 1:
            page = write_report(folders[0])
        else:
            page = write_comparison(folders[0], folders[1], asked.output and asked.output.expanduser())
    except OSError as error:
        refuse(f"the page cannot be written: {error}; --output takes another place")
    print(page)


if __name__ == "__main__":
    with unix_habits():
        main()
