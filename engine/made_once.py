"""Things that are made on first use and kept: where they lie, how they are named, and that they are whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def cache_dir() -> Path:
    """Where made things are kept: `SYNCR1_CACHE`, or `~/.cache/syncr1`."""
    return Path(os.environ.get("SYNCR1_CACHE") or Path.home() / ".cache" / "syncr1")


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, made on first use: in full, or not at all, even when two runs make it at the same time."""
    if not folder.is_dir():
        draft = folder.with_name(f"{folder.name}.{os.getpid()}")
        draft.parent.mkdir(parents=True, exist_ok=True)
        make(draft)
        try:
            draft.rename(folder)
        except OSError:  # another run was faster
            shutil.rmtree(draft)
    return folder
