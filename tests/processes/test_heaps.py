"""heaps.py: threads that come and go share what they allocate from."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
from helpers import ROOT

THREADS = """
import re, sys, threading
from syncr1.engine.processes.heaps import bound_heaps
if sys.argv[1] == "bound":
    assert bound_heaps()
together = threading.Barrier(24)
def work():
    together.wait()
    bytes(100_000)
    together.wait()
threads = [threading.Thread(target=work) for _ in range(24)]
for thread in threads: thread.start()
for thread in threads: thread.join()
with open("/proc/self/maps") as maps:
    starts = [int(line.split("-")[0], 16) for line in maps if " rw-p 00000000 00:00 0" in line and "[" not in line]
print(sum(start % (64 << 20) == 0 for start in starts))
"""


def heaps(how: str, **more: str) -> int:
    """Of the threads of a process, beside the main one's."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", THREADS, how]
    env |= {"PYTHONPATH": str(ROOT), **more}
    return int(subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_threads_share_one_heap() -> None:
    assert heaps("bound") == 1 < heaps("not")
    assert heaps("not", MALLOC_ARENA_MAX="3") == 2


def test_the_user_s_own_number_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from syncr1.engine.processes.heaps import bound_heaps

    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    assert not bound_heaps()
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=3")
    assert not bound_heaps()
