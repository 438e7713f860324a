"""A run under its own launcher, seen from outside: its ranks, the steps that it has done, what they hold."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from warm import ROOT, environment

KEPT_TIMES = ("seconds", "time", "per_second")
"""Parts of the names of metrics that tell how long something took."""


class Launched:
    """A recipe as a user starts it.

    Args:
        run: the run's folder.
        log: where its output goes.
        recipe: script and flags.
    """

    def __init__(self, run: Path, log: Path, recipe: list[str]) -> None:
        self.run = run
        self._log = log.open("ab")
        # Not a file: the campaigns forbid ranks to write into files.
        command = [sys.executable, *recipe, "--output_dir", str(run)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment() | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)

    def poll(self) -> int | None:
        """The launcher's exit code once it has ended; what was said so far is in the log then."""
        assert self.process.stdout is not None
        while text := self.process.stdout.read():
            self._log.write(text)
        self._log.flush()
        return self.process.poll()

    def ranks(self) -> list[int]:
        """Process numbers of the ranks that live, in order."""
        found = {}
        for pid in _children(self.process.pid):
            with suppress(OSError, KeyError, ValueError):
                pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                told = dict(pair.decode(errors="replace").split("=", 1) for pair in pairs if b"=" in pair)
                found[int(told["RANK"])] = pid
        return [found[rank] for rank in sorted(found)]

    def steps(self) -> tuple[int, int]:
        """Of the metrics: which file they are in (it is another one after each start), and how many steps it has."""
        path = metrics_file(self.run)
        try:
            with path.open("rb") as file:
                return os.fstat(file.fileno()).st_ino, file.read().count(b"\n")
        except OSError:
            return 0, 0

    def end(self) -> None:
        """Whatever it takes."""
        for pid in (self.process.pid, *_children(self.process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()


def _children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def memory(pid: int) -> tuple[int, int] | None:
    """KiB that a process has touched, and its open files; None once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        (size,) = [int(line.split()[1]) for line in lines if line.startswith("VmRSS")]
        return size, len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, ValueError):
        return None


def forbid_writing(pid: int) -> None:
    """Files of a process cannot grow any more, as on a full disk; no other process is disturbed."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))


def cpu_seconds(pid: int) -> float:
    """Of a core, that a process has used; 0 once it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def metrics_file(run: Path) -> Path:
    """Sync-R1's, or that of CoRL's first training."""
    inside = run / "unified" / "metrics.jsonl"
    return inside if inside.exists() else run / "metrics.jsonl"


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Each step's, without what says how long things took."""
    rows = [json.loads(line) for line in metrics_file(run).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not any(word in k for word in KEPT_TIMES)} for row in rows]


def slope(points: list[tuple[int, int]]) -> float:
    """Of the least-squares line through (step, value)."""
    if len(points) < 2:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
