"""A process by a name that no other process ever has: its machine's boot, its pid there, and when it started.

A pid alone is used again, and means another process on another machine or in another container.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True)
class Lifetime:
    """One process, from its start to its end."""

    machine: str
    """This boot of this machine, and the container's table of processes; empty where the system does not tell."""
    pid: int
    started: int
    """Clock ticks after the boot."""

    @classmethod
    def own(cls) -> Self:
        """Of this process."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Self:
        """Of one of this machine that has not been waited for."""
        return cls(machine(), pid, (_state(pid) or ("", 0))[1])

    @classmethod
    def read(cls, text: str) -> Self | None:
        """What `text` wrote; None for anything else."""
        words = text.split()
        if len(words) != 3 or not (words[1].isdecimal() and words[2].isdecimal()):
            return None
        return cls(words[0].removeprefix("-"), int(words[1]), int(words[2]))

    def text(self) -> str:
        return f"{self.machine or '-'} {self.pid} {self.started}"

    @property
    def is_here(self) -> bool:
        """Whether this machine can tell if it lives."""
        return bool(self.machine) and self.machine == machine()

    @property
    def is_over(self) -> bool:
        """Whether it is known to have ended; False for a process of another machine, of which nothing is known."""
        if not self.is_here:
            return False
        state = _state(self.pid)
        return state is None or state[0] in "ZX" or state[1] != self.started


@cache
def machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _state(pid: int) -> tuple[str, int] | None:
    """Its letter of proc(5) and its start in ticks; None where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    words = text.rpartition(")")[2].split()  # a program's name may hold anything
    return words[0], int(words[19])
