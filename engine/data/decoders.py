"""Many pictures decoded side by side: few in threads of this process, many in processes of their own.

Pillow lets go of Python's lock while it decodes, but not between; beyond a few cores threads wait for each other.
Processes are started afresh and never forked: this one has threads, and libraries that do not survive it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..pictures import ImageRef
from .decode_worker import problem_of

MANY = 1000
"""Pictures from which on processes are started, each of which takes a core about half a second."""
MOST_THREADS = 8
BATCH = 16
"""Pictures that are decoded by one thread or process at a time, and of whose bytes one copy is held."""


@dataclass(frozen=True, slots=True)
class Task:
    """A picture to be decoded."""

    ref: ImageRef
    contents: bytes | None = None
    """Encoded, where it is not a file of its own."""
    problem: str = ""
    """What is wrong with it already."""


Decode = Callable[[Sequence[Task]], list[str]]
"""What is wrong with each, "" for nothing."""
Found = Callable[[Sequence[Task], Sequence[str]], None]


def num_cores() -> int:
    """That this process may run on."""
    with suppress(AttributeError):  # not everywhere
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def decode_all(tasks: Iterator[Task], count: int, found: Found) -> None:
    """Decodes every picture.

    Args:
        tasks: made one after the other, as they are needed.
        count: how many there are.
        found: told of each batch, in any order, by one thread at a time.
    """
    making, telling, over = threading.Lock(), threading.Lock(), threading.Event()

    def work(decode: Decode) -> None:
        while not over.is_set():
            with making:
                batch = list(islice(tasks, BATCH))
            if not batch:
                return
            problems = decode(batch)
            with telling:
                found(batch, problems)

    with _decoders(count) as decoders, ThreadPoolExecutor(len(decoders), thread_name_prefix="pictures") as pool:
        try:
            for future in [pool.submit(work, decode) for decode in decoders]:
                future.result()
        finally:
            over.set()


@contextmanager
def _decoders(count: int) -> Iterator[list[Decode]]:
    """What works side by side."""
    cores = num_cores()
    if count < MANY:
        yield [_here] * max(1, min(cores, MOST_THREADS, -(-count // BATCH)))
        return
    processes = [_Process() for _ in range(cores)]
    try:
        yield [process.decode for process in processes]
    finally:
        for process in processes:
            process.end()


def _here(tasks: Sequence[Task]) -> list[str]:
    return [task.problem or problem_of(task.ref, task.contents) for task in tasks]


def _can_be_sent(task: Task) -> bool:
    return not task.problem and (task.contents is not None or isinstance(task.ref, Path))


class _Process:
    """One decode_worker.py; where it is lost (memory), its pictures are decoded here from then on."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", "-m", f"{__package__}.decode_worker"]
        self._process: subprocess.Popen[bytes] | None = None
        with suppress(OSError):
            # A terminal's Ctrl-C is for the first process.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment(), process_group=0
            )

    def decode(self, tasks: Sequence[Task]) -> list[str]:
        asked = [task for task in tasks if _can_be_sent(task)]
        answer: list[str] = []
        with suppress(OSError, ValueError):
            answer = self._ask(asked)
        if len(answer) != len(asked):
            return _here(tasks)
        left = iter(answer)
        return [next(left) if _can_be_sent(task) else _here([task])[0] for task in tasks]

    def _ask(self, tasks: Sequence[Task]) -> list[str]:
        if self._process is None or self._process.stdin is None or self._process.stdout is None:
            return []
        names = [str(task.ref if isinstance(task.ref, Path) else task.ref.name) for task in tasks]
        sizes = [-1 if task.contents is None else len(task.contents) for task in tasks]
        self._process.stdin.write(json.dumps([*zip(names, sizes, strict=True)]).encode() + b"\n")
        self._process.stdin.writelines(task.contents for task in tasks if task.contents is not None)
        self._process.stdin.flush()
        answer: list[str] = json.loads(self._process.stdout.readline())
        return answer

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def _environment() -> dict[str, str]:
    """What can be imported here can be there, too."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
