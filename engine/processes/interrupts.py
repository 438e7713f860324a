"""What people and schedulers ask of a run while it trains; the step under way is finished first.

    Ctrl-C                  stop after this step, score what there is; a second one interrupts at once
    SIGTERM, SIGUSR1        stop after this step, save a checkpoint and end (schedulers send them before they kill)
    SIGHUP                  the same: the terminal is gone; `nohup` makes it ignored, and it stays so
    a file SAVE in the run's folder     save a checkpoint and the model after this step, and go on

An exception raised wherever Python happens to be may land in a callback or a destructor, where it is printed and
forgotten, and with several processes it hits each at a different place.  A flag that the loop reads between steps is
neither lost nor early, and the ranks can agree on it.  Outside of training `preemptible` does raise: what is no
`Exception`, and again where it was forgotten.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from ..errors import Preempted

PREEMPTING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
AGAIN = 0.01
"""Seconds after which an error that a destructor swallowed is raised again."""


def heeded() -> tuple[signal.Signals, ...]:
    """Those of `PREEMPTING` that whoever started this process did not have ignored, as `nohup` does."""
    return tuple(number for number in PREEMPTING if signal.getsignal(number) is not signal.SIG_IGN)


def leave_terminal() -> None:
    """What is printed from now on goes nowhere, where a terminal was: one that is gone fails every write to it."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # one that is gone no longer says that it is a terminal
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


class Interrupts:
    """While the block runs, signals only set flags; the second Ctrl-C interrupts at once, as usual.

    Args:
        say: takes a line for the user when one comes.
        on_preempt: called when SIGTERM, SIGUSR1 or SIGHUP comes first.
    """

    def __init__(
        self, say: Callable[[str], None] = lambda _: None, on_preempt: Callable[[], None] = lambda: None
    ) -> None:
        self.stop = False
        """Ctrl-C was pressed."""
        self.preempt = False
        """SIGTERM, SIGUSR1 or SIGHUP came."""
        self._say, self._when_preempted = say, on_preempt
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # nobody else may set a handler
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_stop)
            for number in heeded():
                self._before[number] = signal.signal(number, self._on_preempt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in list(self._before):
            self._restore(number)
        if error is not None:
            _ignore()

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop = True
        self._restore(number)
        self._say("stopping after this step; Ctrl-C again stops at once")

    def _on_preempt(self, number: int, frame: FrameType | None) -> None:
        if not self.preempt:
            self.preempt = True
            self._when_preempted()
            if number == signal.SIGHUP:
                leave_terminal()
            self._say(f"{signal.Signals(number).name}: saving and ending after this step")

    def _restore(self, number: int) -> None:
        if number in self._before:
            signal.signal(number, self._before.pop(number))


@contextmanager
def ending_once() -> Iterator[None]:
    """Within `preemptible`: an error that ends the block is the one that ends the process.

    Launchers send SIGTERM to the ranks that a lost one has left, which know better why they end."""
    try:
        yield
    except BaseException:
        _ignore()
        raise


def _ignore() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in PREEMPTING:
            if signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN):
                signal.signal(number, lambda *_: None)


@contextmanager
def preemptible(words: str) -> Iterator[None]:
    """Outside of training nothing has to be finished: SIGTERM, SIGUSR1 and SIGHUP raise `Preempted(words)` at once.

    One that struck in a destructor or a callback, where Python prints and forgets errors, is raised again right after
    it; one that was swallowed otherwise, at the end of the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[Preempted] = []

    def end(number: int, frame: FrameType | None) -> NoReturn:
        if number == signal.SIGHUP:
            leave_terminal()
        asked[:] = [Preempted(f"{signal.Signals(number).name}: {words}", together=False)]
        raise asked[0]

    def forgotten(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Preempted):
            unraisable_before(unraisable)
        elif signal.getsignal(PREEMPTING[0]) is not signal.SIG_DFL:
            # In a moment: one that is raised here would be forgotten as well.
            main = threading.main_thread().ident or 0
            threading.Timer(AGAIN, signal.pthread_kill, (main, PREEMPTING[0])).start()

    unraisable_before = sys.unraisablehook
    before = {number: signal.signal(number, end) for number in heeded()}
    sys.unraisablehook = forgotten
    try:
        yield
        if asked:
            raise asked[0]
    finally:
        sys.unraisablehook = unraisable_before
        for number, handler in before.items():
            signal.signal(number, handler)
