"""`--resume_from_checkpoint latest` with an output_dir that looks like a slip of another run's name.

A launcher passes `latest` at every start, so a folder without a run begins a new one.  Where one letter away a run with
checkpoints lies, that is more likely a slip, and a new run would leave it behind unsaid.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CLOSE = 2
"""Letters that are added, left out, changed or swapped in a slip, at most; a sixth of a shorter name's."""
MOST = 1000
"""Folders that are looked at."""


def mistyped_run(config: Any) -> list[str]:
    """What to say of such a name; says on the terminal that a run is new where there is no run yet."""
    if getattr(config, "resume_from_checkpoint", None) != "latest":
        return []
    wanted: Path = config.output_dir
    if wanted.exists() or any(_is_run(path) for path in _numbered(wanted)):
        return []
    near = [path for path in _runs_near(wanted) if _is_slip(str(wanted), str(path))]
    if near:
        return [
            f"output_dir: expected the run that resume_from_checkpoint latest goes on with, got {wanted}, which is not "
            f"there; did you mean {near[0]}? For a new run of that name leave resume_from_checkpoint out, or make the "
            "folder first"
        ]
    others = [str(path) for path in _runs_near(wanted)]
    beside = f"; runs nearby: {', '.join(others[:5])}" if others else ""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"syncr1: resume_from_checkpoint latest: no run at {wanted} yet, a new one begins{beside}", flush=True)
    return []


def _numbered(wanted: Path) -> Iterator[Path]:
    """`-2`, `-3`, …, which a run's folder is called when its name was taken."""
    return wanted.parent.glob(f"{_escaped(wanted.name)}-[0-9]*") if wanted.parent.is_dir() else iter(())


def _escaped(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _runs_near(wanted: Path) -> Iterator[Path]:
    """Runs beside `wanted`, and, where its own folder is not there, beside that."""
    parents = [wanted.parent]
    if not wanted.parent.is_dir() and wanted.parent.parent.is_dir():
        parents = [path for path in sorted(wanted.parent.parent.iterdir())[:MOST] if path.is_dir()]
    for parent in parents:
        children = sorted(parent.iterdir())[:MOST] if parent.is_dir() else []
        yield from (child for child in children if child.is_dir() and _is_run(child))


def _is_run(folder: Path) -> bool:
    """With something to go on from: a checkpoint, of itself or of a training below it."""
    return any((place / "latest").exists() for place in (folder / "checkpoints", *folder.glob("*/checkpoints")))


def _is_slip(got: str, meant: str) -> bool:
    """One or two letters apart; numbers and single last letters do not count: `seed_1`, `run-b` are names in a row."""
    pattern = r"\d+|(?<=[_.-])[A-Za-z](?=$|/)"
    if re.sub(pattern, "#", got) == re.sub(pattern, "#", meant):
        return False
    parts = [pair for pair in zip(Path(got).parts, Path(meant).parts, strict=False) if pair[0] != pair[1]]
    if len(Path(got).parts) != len(Path(meant).parts) or len(parts) != 1:
        return False
    (a, b) = parts[0]
    return distance(a, b) <= min(CLOSE, max(1, min(len(a), len(b)) // 6))


def distance(a: str, b: str) -> int:
    """Letters to add, leave out, change, or swap with their neighbour (Damerau and Levenshtein)."""
    before, last = [0] * (len(b) + 1), list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                row[-1] = min(row[-1], before[j - 2] + 1)
        before, last = last, row
    return last[-1]
