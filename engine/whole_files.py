"""Files and folders that appear whole or not at all, and where those made on first use are kept.

Drafts are named at random, never by a process's number: in two containers that share a cache, both may be number 1.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ABANDONED = 600.0
"""Seconds after which a draft that nobody writes to is taken for what a kill left."""


def cache_dir() -> Path:
    """Where made things are kept: `SYNCR1_CACHE`, else `syncr1` in `XDG_CACHE_HOME`, which is ~/.cache where unset."""
    chosen, shared = os.environ.get("SYNCR1_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if chosen:
        return Path(chosen).expanduser()
    # XDG's specification: a relative path is to be ignored
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "syncr1"


def made_once(folder: Path, make: Callable[[Path], object], waiting: Callable[[], object] = lambda: None) -> Path:
    """The folder, made on first use: in full, or not at all, even when two runs make it at the same time.

    Args:
        folder: as it is to be named.
        make: makes it, under the name of a draft, which does not exist yet.
        waiting: called when another process is making it; this one then waits and takes what came.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock"), waiting):
        if folder.is_dir():  # the other has made it
            return folder
        try:
            with whole_folder(folder) as draft:
                make(draft)
        except OSError:
            if not folder.is_dir():  # no other run was faster, where files cannot be locked
                raise
    return folder


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A name, not taken yet, to make `folder` under: it becomes `folder` where the block ends well, else it is removed.

    Raises:
        OSError: `folder` has files by then.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    home = Path(tempfile.mkdtemp(prefix=_drafts_of(folder), dir=folder.parent))
    try:
        yield home / folder.name
        (home / folder.name).rename(folder)
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """One process at a time, by a file that is left where it is; the kernel unlocks it when its holder dies.

    Where the file system knows no locks all go on: what they do must then be right side by side, if not as cheap.
    """
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def write_atomically(path: Path, contents: str | bytes) -> None:
    """The whole file or none of it, also when the machine stops: written beside `path`, synchronised, renamed."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with draft.open("xb") as file:
            file.write(contents.encode() if isinstance(contents, str) else contents)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _drafts_of(folder: Path) -> str:
    return f".{folder.name}.draft-"


def _sweep(folder: Path) -> None:
    """Removes the drafts of `folder` that kills have left: nothing in them has changed for `ABANDONED` seconds."""
    for draft in folder.parent.glob(f"{glob.escape(_drafts_of(folder))}*"):
        with contextlib.suppress(OSError):  # another run sweeps as well
            newest = max(path.stat().st_mtime for path in (draft, *draft.rglob("*")))
            if time.time() - newest > ABANDONED:
                shutil.rmtree(draft)
