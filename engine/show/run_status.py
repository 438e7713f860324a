"""`status.json`: whether a run goes on, since when, how long each of its parts took and how much memory it needed.

`outcome.py` reads it.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Literal

import torch

from ..whole_files import write_atomically
from .outcome import this_process
from .run_files import number_of, read_json, table_of

STATUS = "status.json"
State = Literal["running", "done", "interrupted", "preempted", "failed"]


class RunStatus:
    """Writes a run's status.json as the run goes, and clocks its parts.

    Args:
        folder: of the run.
        resumed: it goes on: what its parts took before counts on.
    """

    def __init__(self, folder: Path, resumed: bool) -> None:
        self._path = folder / STATUS
        before = read_json(self._path) if resumed else {}
        clocked = table_of(before, "seconds")
        self._seconds = {str(name): number_of(clocked, name) or 0.0 for name in clocked}
        self._started = str(before.get("started") or now())
        self._since = time.monotonic()
        self.write("running")

    def lap(self, part: str) -> None:
        """What has passed since the last call belongs to `part`."""
        at = time.monotonic()
        self._seconds[part] = self._seconds.get(part, 0.0) + at - self._since
        self._since = at

    def write(self, state: State, reason: str = "") -> None:
        """Puts the state on the disk, whole."""
        content = {
            "state": state,
            "reason": reason,
            "process": this_process(),
            "started": self._started,
            "updated": now(),
            "finished": None if state == "running" else now(),
            "seconds": {name: round(value, 3) for name, value in self._seconds.items()},
            "peak_bytes": peak_bytes(),
        }
        write_atomically(self._path, json.dumps(content, indent=2) + "\n")


def now() -> str:
    """`2026-01-31T23:59:59+0000`, this machine's time."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def peak_bytes() -> dict[str, int]:
    """The most memory that this process has taken so far: of the machine, and of its GPU where it has one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["gpu"] = int(torch.cuda.max_memory_allocated())
    return peak
