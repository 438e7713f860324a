"""What became of a run, in words: it goes on, is done, was stopped, failed, or was killed without a word.

A killed process writes nothing any more, so status.json names the process; who reads it later sees that it is gone.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .run_files import Run, is_number, table_of, trainings_in

Kind = Literal["running", "done", "stopped", "failed"]


class Outcome(NamedTuple):
    """How a run stands."""

    kind: Kind
    words: str

    @property
    def sign(self) -> str:
        """Beside the colour."""
        return {"running": "▶", "done": "✓", "stopped": "■", "failed": "✗"}[self.kind]


def outcome_of(run: Run) -> Outcome:
    """From its status and its steps; folders of older versions have no status."""
    steps, reason = steps_in_words(run), str(run.status.get("reason") or "")
    match run.status.get("state"):
        case "running" if lives(table_of(run.status, "process")) is not False:
            return Outcome("running", f"running, {steps} so far")
        case "running":
            return Outcome("failed", f"killed after {steps}, without a word of its own; {_remedy(run)}")
        case "failed":
            return Outcome("failed", f"failed after {steps}: {reason or 'what it printed says why'}; {_remedy(run)}")
        case "preempted":
            return Outcome("stopped", f"stopped from outside after {steps}; {_remedy(run)}")
        case "interrupted":
            return Outcome("stopped", f"interrupted after {steps}; {_remedy(run)}")
    if run.parts:
        return Outcome("done", steps) if steps.startswith("all") else Outcome("stopped", f"stopped after {steps}")
    if not run.rows and trainings_in(run.folder):
        return Outcome("done", steps)
    if run.planned is not None and len(run.rows) < run.planned:
        return Outcome("stopped", f"stopped after {steps}")
    return Outcome("done", f"all {steps} done" if run.planned is not None else steps)


def steps_in_words(run: Run) -> str:
    """`80 steps`, `12 of 80 steps`; of a run of several trainings how many of its parts are made."""
    parts = run.parts.get("parts")
    known = [part for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []
    if known:
        done = sum(1 for part in known if part.get("state") == "done")
        return f"all {done} parts done" if done == len(known) else f"{done} of {len(known)} parts"
    below = trainings_in(run.folder) if not run.rows else []
    if below:  # of an older version, which did not say what it would make
        return f"{len(below)} training{'' if len(below) == 1 else 's'}"
    count, planned = len(run.rows), run.planned
    if planned is None or count >= planned:
        return f"{count} step{'' if count == 1 else 's'}"
    return f"{count} of {planned} steps"


def _remedy(run: Run) -> str:
    saved = any(run.folder.glob("checkpoints/step_*")) or any(run.folder.glob("*/checkpoints/step_*"))
    if saved:
        return "the same command with --resume_from_checkpoint latest goes on from its last checkpoint"
    return "no checkpoint was saved, so the same command begins again"


def this_process() -> dict[str, Any]:
    """What tells this process from a later one of the same number."""
    return {"pid": os.getpid(), "machine": platform.node(), "began": _began(os.getpid())}


def lives(process: Mapping[str, Any]) -> bool | None:
    """Whether the process that wrote a status still runs; None where that cannot be seen from here."""
    pid, began = process.get("pid"), process.get("began")
    if process.get("machine") != platform.node() or not is_number(pid) or not isinstance(began, str):
        return None
    if not began:
        return None
    return _began(pid) == began


def _began(pid: Any) -> str:
    """The kernel's start time of a process; "" where there is none, or the kernel does not say."""
    try:
        # The name, in brackets, may hold spaces; the start is field 22, counted from 1. Z is dead and not yet buried.
        fields = Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except (OSError, IndexError, ValueError):
        return ""
