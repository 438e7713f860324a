"""Files and folders that appear whole or not at all, and where those made on first use are kept."""

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


def write_atomically(path: Path, contents: str | bytes) -> None:
    """The whole file or none of it, also when the machine stops: written beside `path`, synchronised, renamed."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("wb") as file:
        file.write(contents.encode() if isinstance(contents, str) else contents)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
