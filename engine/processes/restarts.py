"""How often a launcher starts all ranks again: so many times in a row without a new checkpoint in between.

A budget for a whole run is spent by the accidents of a long night, however well it went on after each.  What helps
nobody is to start again what dies at the same place every time: that makes no new checkpoint.
"""

from __future__ import annotations

import glob
from pathlib import Path

LATEST = "latest"
"""What every checkpoint renews, beside it; as in checkpoints/sharded.py, which needs torch."""


class Restarts:
    """Counts restarts since the last new checkpoint.

    Args:
        most: in a row.
        output_dir: of the run; None: every restart counts.
    """

    def __init__(self, most: int, output_dir: Path | None = None) -> None:
        self.most, self.output_dir = most, output_dir
        self.in_a_row = 0
        self._seen = self._checkpoints()

    def again(self) -> bool:
        """Whether to start again after a loss, which this counts."""
        now = self._checkpoints()
        self.in_a_row = self.in_a_row + 1 if now == self._seen else 1
        self._seen = now
        return self.in_a_row <= self.most

    def words(self) -> str:
        """For people, after `again` said yes."""
        return f"restart {self.in_a_row} of {self.most} without a new checkpoint"

    def _checkpoints(self) -> frozenset[tuple[str, int]]:
        """When each run that this one may write to saved last: `output_dir`, those numbered after it, and the trainings
        in their folders."""
        if self.output_dir is None:
            return frozenset()
        found, name = set(), glob.escape(self.output_dir.name)
        for runs in (f"{name}*", f"{name}*/*"):
            for path in self.output_dir.parent.glob(f"{runs}/checkpoints/{LATEST}"):
                try:
                    found.add((str(path), path.stat().st_mtime_ns))
                except OSError:  # replaced just now
                    found.add((str(path), -1))
        return frozenset(found)
