"""Saving beside the training: one job at a time, in a thread of this rank.

The thread has a process group of its own.  Two threads' collectives over one group would meet in other orders on every
rank.  The other ranks' threads answer it whatever their trainings do, so a save that has begun is finished even
while a training fails.
"""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from ..processes.group import place
from .sharded import Group

GRACE_SECONDS = 60.0
"""How long a process that ends waits for a save; one that is given up leaves a draft, as a kill would."""


class Saver:
    """Runs jobs in a thread; all ranks make one at the same place and give it the same jobs in the same order.

    An error is raised by `wait` (and so by the next `start`) alone, which all ranks call at the same place: where each
    looked by itself, they would see the thread's end at different steps and part. `failed` says that there is one.

    Args:
        timeout: seconds that a collective of a job may wait for another rank.
    """

    def __init__(self, timeout: float = 1800.0) -> None:
        several = place()[1] > 1
        self.group: Group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if several else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the job under way, or the last one, has come to an error so far on this rank."""
        return self._error is not None

    def start(self, job: Callable[[], object]) -> None:
        """Begins a job, once the one before has ended; raises that one's error."""
        self.wait()
        # A daemon: for other threads the interpreter waits without a limit, `_at_exit` has one.
        self._thread = threading.Thread(target=self._run, args=(job,), name="saver", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)

    def wait(self) -> None:
        """Returns when no job is under way; raises the error of the last one, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            atexit.unregister(self._at_exit)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error

    def _at_exit(self) -> None:
        if self._thread is not None:
            self._thread.join(GRACE_SECONDS)
        if self._error is not None:
            print(f"the last save failed: {self._error}", file=sys.stderr)
