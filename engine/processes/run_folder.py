"""A run's folder: its name among those of other runs, and the one process that writes to it at a time.

    RUN/.lock     which process, on which host, since when; locked (flock) for as long as it lives

The kernel lets go of the lock when its process ends, however it ends, so nothing that a kill leaves blocks anybody.
Some network file systems lock for one machine alone, or not at all: there the record counts, whose time of change its
process renews, and one that stands still is of a process that is gone.  Nothing heavy is imported.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ..errors import ConfigError
from .lifetimes import Lifetime

LOCK = ".lock"
BEAT = 5.0
"""Seconds between two signs of life for other machines."""
SILENCE = 4 * BEAT
"""Seconds without one after which a process of another machine is gone."""
PATIENCE, LONG_PATIENCE = 5.0, 60.0
"""Seconds that a run waits for one which is just ending; the long one where a launcher has started it again."""
_TAKEN = 10_000

_open: set[int] = set()
"""Files that are locked here. A process that this one forks would keep them locked after its death."""


def unused_folder(wanted: Path) -> Path:
    """`wanted`, or the first of `wanted-2`, `-3`, … without a run in it, as runlog.py would choose it."""
    for number in range(1, _TAKEN):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        if not any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl", "report.html", "checkpoints")):
            return folder
    raise ConfigError(f"output_dir: expected a free name near {wanted}, got {_TAKEN} runs; choose another one")


def numbered(output_dir: Path, is_run: Callable[[Path], bool]) -> list[Path]:
    """The runs that were made for `output_dir`: itself and `-2`, `-3`, … beside it, the last first."""
    runs = {1: output_dir} if is_run(output_dir) else {}
    for folder in output_dir.parent.glob("*") if output_dir.parent.is_dir() else ():
        number = folder.name.removeprefix(f"{output_dir.name}-")
        if number != folder.name and number.isdecimal() and is_run(folder):
            runs[int(number)] = folder
    return [runs[number] for number in sorted(runs, reverse=True)]


@dataclass(frozen=True, slots=True)
class Holder:
    """Who writes to a folder."""

    life: Lifetime
    host: str
    since: str
    command: str

    @classmethod
    def own(cls) -> Self:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
        return cls(Lifetime.own(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S %z"), command)

    @classmethod
    def read(cls, text: bytes) -> Self | None:
        """What `text` wrote; None for anything else."""
        try:
            told: Any = json.loads(text)
            life = Lifetime.read(told["life"])
            return None if life is None else cls(life, *(str(told[name]) for name in ("host", "since", "command")))
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def text(self) -> bytes:
        told = {"life": self.life.text(), "host": self.host, "since": self.since, "command": self.command}
        return json.dumps(told).encode() + b"\n"


class FolderLock:
    """This process alone writes to a run's folder, until `close`.

    Args:
        folder: which is there.
        patience: seconds to wait for another one that is just ending.

    Raises:
        ConfigError: another process writes to it; the message says which.
    """

    def __init__(self, folder: Path, patience: float = PATIENCE) -> None:
        self.folder, self._path = folder, folder / LOCK
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _open.add(self._file)
        try:
            self._take(time.monotonic() + patience)
        except BaseException:
            self._shut()
            raise
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-folder", daemon=True)
        self._thread.start()

    def _take(self, deadline: float) -> None:
        while True:
            locked, holder = _locked(self._file), Holder.read(os.pread(self._file, 1 << 16, 0))
            if locked is not False and (holder is None or not self._lives(holder, locked)):
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, Holder.own().text(), 0)
                return
            if time.monotonic() >= deadline or locked:  # `_lives` has waited already
                raise ConfigError(taken(self.folder, holder))
            time.sleep(0.1)

    def _lives(self, holder: Holder, locked: bool | None) -> bool:
        """Whether the writer of a record lives though its lock stopped nobody: one of another machine may."""
        if holder.life.is_here:
            return locked is None and not holder.life.is_over and holder.life != Lifetime.own()
        before, deadline = os.fstat(self._file).st_mtime_ns, time.monotonic() + SILENCE
        while time.monotonic() < deadline:
            time.sleep(min(0.2, BEAT))
            # By its name: a network file system asks its server again when a file is opened.
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_mtime_ns != before:
                    return True
        return False

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with suppress(OSError):  # a full disk, say, which the run tells itself
                os.utime(self._file)

    def close(self) -> None:
        """Lets others write; a second call does nothing."""
        if self._file in _open:
            self._over.set()
            self._thread.join()
            with suppress(OSError):
                os.ftruncate(self._file, 0)
            self._shut()

    def _shut(self) -> None:
        _open.discard(self._file)
        with suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_UN)  # a child that has just been forked may still have it open
        os.close(self._file)


def check_free(folder: Path, patience: float = PATIENCE) -> None:
    """Raises ConfigError where a process of this machine writes to `folder`; takes nothing, and needs no torch."""
    deadline = time.monotonic() + patience
    while True:
        try:
            file = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            holder = Holder.read(os.pread(file, 1 << 16, 0))
            if _locked(file) is not False or holder is None:
                return
        finally:
            os.close(file)
        if time.monotonic() >= deadline:
            raise ConfigError(taken(folder, holder))
        time.sleep(0.1)


def _locked(file: int) -> bool | None:
    """Whether the lock was had; None where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def taken(folder: Path, holder: Holder | None) -> str:
    """The message of a refusal."""
    if holder is None:
        who = "another process"
    else:
        who = f"process {holder.life.pid} on {holder.host}, since {holder.since} ({holder.command})"
    stop = "stop it" if holder is None or not holder.life.is_here else f"stop it (kill {holder.life.pid})"
    return (
        f"output_dir: expected a run that nobody writes to, got {folder}, to which {who} writes; wait for its end, or "
        f"{stop} and resume then, or start a new run without --resume_from_checkpoint"
    )


def _close_in_child() -> None:
    for file in _open:
        with suppress(OSError):
            os.close(file)
    _open.clear()


os.register_at_fork(after_in_child=_close_in_child)
