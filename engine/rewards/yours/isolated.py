"""A reward function in a process of its own: one that never returns is killed, one that crashes takes nothing with it.

A thread cannot be killed, and one that keeps Python's lock (a huge power, a regular expression that backtracks for
ever) stops every other: `isolated@file.py:function` is for functions that read what a policy wrote by such means, or
that call libraries which may crash.  Each rank has one worker for each such function; a new one is started where the
last was lost, and its loading is done by the next step.

This is the run's side, worker.py the other one, wire.py what goes between them.

Math-Verify and verl time out by signals, which work in the main thread alone, or by pools, which lose their workers.

Dims: S trajectories.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from ...errors import IsolatedError, RewardError
from ..hooks import TrainerState
from ..reward import RewardValues
from .wire import STATE, packed, receive, send

STARTUP = 300.0
"""Seconds that a worker has to load its function."""


class IsolatedReward:
    """The reward function that `spec` names, called in another process. `cancel` ends a call that takes too long.

    Args:
        spec: as `load_reward` takes it.

    Raises:
        IsolatedError: the function cannot be loaded; the message is that of `load_reward`.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._lock = threading.Lock()
        self._worker, self._is_loaded, self._is_given_up = _start(spec), False, False
        about = self._load()
        self.__name__, self.defined = str(about["name"]), str(about["defined"])
        if about["kind"] is not None:
            self.kind = str(about["kind"])

    def __call__(
        self,
        *,
        trainer_state: TrainerState | None = None,
        log_metric: Callable[[str, float], None] = lambda name, value: None,
        log_extra: Callable[[str, list[Any]], None] = lambda column, values: None,
        **columns: Any,
    ) -> RewardValues:
        """Values of the S trajectories. What the function logs there is logged here, once it has returned.

        Raises:
            RewardError: what the function returned is no list of S numbers or None, or it raised this itself.
            IsolatedError: it raised anything else, or its process ended.
        """
        with self._lock:
            self._is_given_up = False
            if self._worker.poll() is not None:  # between two calls
                self._restart()
            try:
                if not self._is_loaded:
                    self._load()
                if self._is_given_up:
                    raise TimeoutError("loading took too long")
                reply = self._ask(columns | {STATE: asdict(trainer_state or TrainerState())})
            except IsolatedError:
                self._restart()
                raise
        if "values" in reply:
            for name, logged in reply["metrics"].items():
                for value in logged:
                    log_metric(name, value)
            for column, entries in reply["extras"].items():
                log_extra(column, entries)
            return list(reply["values"])
        if reply["is_contract"]:
            raise RewardError(self.__name__, reply["index"], reply["error"])
        raise IsolatedError(reply["error"])

    def cancel(self) -> None:
        """Kills the worker, whatever it is doing; the call then fails, and starts another. One that still loads
        goes on, for the next call: where a machine is slow, a new one would not be faster."""
        self._is_given_up = True
        if self._is_loaded:
            self._worker.kill()

    def close(self) -> None:
        """Ends the worker."""
        self._worker.kill()
        self._worker.wait()
        for pipe in (self._worker.stdin, self._worker.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what it did not read any more
                pipe.close()

    def _restart(self) -> None:
        self.close()
        self._worker, self._is_loaded = _start(self.spec), False

    def _load(self) -> dict[str, Any]:
        """The worker's first word, once it has its function: what that is. IsolatedError where there is none."""
        late = threading.Timer(STARTUP, self._worker.kill)
        late.daemon = True
        late.start()
        try:
            about = _reply(self._worker)
        finally:
            late.cancel()
            late.join()
        if "error" in about:
            raise IsolatedError(about["error"])
        self._is_loaded = True
        return about

    def _ask(self, columns: dict[str, Any]) -> dict[str, Any]:
        worker = self._worker
        assert worker.stdin is not None
        try:
            send(worker.stdin, *packed(columns))
        except BrokenPipeError:
            raise _ended(worker) from None
        return _reply(worker)


def _start(spec: str) -> subprocess.Popen[bytes]:
    # What can be imported here can be there, too. Not by PYTHONPATH, which goes before the standard library, nor by the
    # working directory (-P): a stray `random.py` beside a recipe would shadow Python's own.
    command = [sys.executable, "-P", "-m", "syncr1.engine.rewards.yours.worker", spec, json.dumps(sys.path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _reply(worker: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert worker.stdout is not None
    received = receive(worker.stdout)
    if received is None:
        raise _ended(worker)
    reply: dict[str, Any] = json.loads(received[0])
    return reply


def _ended(worker: subprocess.Popen[bytes]) -> IsolatedError:
    code = worker.wait()
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return IsolatedError(f"its process {how}")
