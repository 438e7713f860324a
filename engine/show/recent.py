"""Where this process's run writes, and what it said last: what the report of a crash begins with."""

from __future__ import annotations

from collections import deque
from pathlib import Path

_folders: list[Path] = []
_lines: deque[str] = deque(maxlen=40)
_stages: deque[str] = deque(maxlen=1)


def writes_to(folder: Path) -> None:
    """A run writes into this folder from now on; the first one counts, those of its trainings lie below it."""
    _folders.append(folder)


def said(line: str) -> None:
    """The run told its user this."""
    _lines.append(line)


def begins(stage: str) -> None:
    """The run is at this now."""
    _stages.append(stage)
    said(stage)


def forget() -> None:
    """Another run begins in this process."""
    for kept in (_folders, _lines, _stages):
        kept.clear()


def run_folder() -> Path | None:
    """The run's folder; None where it has none yet."""
    return _folders[0] if _folders else None


def last_lines() -> list[str]:
    """The oldest first."""
    return list(_lines)


def stage() -> str:
    """What the run is at; empty before it began with anything."""
    return _stages[0] if _stages else ""
