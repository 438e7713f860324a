"""The page of a run while it goes on: rewritten every few steps, as far as that costs the run next to nothing."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from .report import RELOAD_SECONDS, write_report
from .run_files import whole_run
from .run_status import RunStatus, State

MOST_OF_TIME = 0.01
"""Share of the run's time that rewriting may take: after a page that took .3 s the next one waits for 30 s."""


class LivePage:
    """Rewrites `report.html` of a run, and that of the run that it is a part of.

    Args:
        folder: of the run.
        status: is written with every page.
        every: steps between pages, at the least; 0: none before the end.
    """

    def __init__(self, folder: Path, status: RunStatus, every: int) -> None:
        self._folder, self._status, self._every = folder, status, every
        self._steps, self._not_before = 0, 0.0

    def step(self) -> None:
        """A step is done: a new page where one is due, never sooner than a reader's browser asks for it."""
        self._steps += 1
        if self._every and self._steps % self._every == 0 and time.monotonic() >= self._not_before:
            self.write()

    def write(self) -> None:
        """A new page, now. A page that cannot be written ends no run: it is said, and none is tried any more."""
        if not self._every:
            return
        began = time.monotonic()
        try:
            self._status.write("running")
            self._write_all()
        except Exception as error:  # whatever it is, training is worth more than its page
            print(f"syncr1: report.html cannot be written while the run goes on: {error}", file=sys.stderr)
            self._every = 0
        ended = time.monotonic()
        self._not_before = ended + max(RELOAD_SECONDS, (ended - began) / MOST_OF_TIME)

    def close(self, state: State, reason: str) -> None:
        """The last page."""
        self._status.write(state, reason)
        self._write_all()

    def _write_all(self) -> None:
        write_report(self._folder)
        whole = whole_run(self._folder)
        if whole is not None:
            write_report(whole)
