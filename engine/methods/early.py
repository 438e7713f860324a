"""What a recipe does before it imports anything that takes seconds: it speaks, and it ends as Unix programs end.

SIGTERM, SIGUSR1, SIGHUP    exit code 75, as later (interrupts.py); what `nohup` ignores stays ignored
Ctrl-C while libraries load exit code 130, in a line
`| head`                    nobody reads any more: it ends quietly, with 141
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from ..errors import EXIT_INTERRUPTED, EXIT_NO_READER, EXIT_PREEMPTED
from ..processes.interrupts import PREEMPTING
from ..show.pulse import pulse


@contextmanager
def unix_habits() -> Iterator[None]:
    """Around all that a recipe does."""
    try:
        with _ends_at_once(dict.fromkeys(PREEMPTING, EXIT_PREEMPTED)):
            try:
                yield
            finally:
                sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_gone(sys.stdout.fileno()):
            raise  # some other pipe
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # the interpreter flushes once more as it ends
        raise SystemExit(EXIT_NO_READER) from None


@contextmanager
def loading(what: str = "torch and transformers") -> Iterator[None]:
    """Around the imports that take seconds: nothing is begun, so that Ctrl-C can end the process at once."""
    words = f"loading {what}"
    with _ends_at_once({signal.SIGINT: EXIT_INTERRUPTED}), _no_collections():
        print(f"syncr1: {words} ...", flush=True)
        with pulse(words):
            yield


@contextmanager
def _no_collections() -> Iterator[None]:
    """What is imported stays: a third of the seconds went into looking through it for garbage, as it grew and when a
    run then began."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


@contextmanager
def _ends_at_once(codes: dict[signal.Signals, int]) -> Iterator[None]:
    """While the block runs, each of these signals ends the process with its code; those that are ignored stay so.

    An exception would not do: among the thousands of lines that an import runs, some catch all there are."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        os.write(2, f"syncr1: {signal.Signals(number).name}: stopped outside of training\n".encode())
        os._exit(codes[signal.Signals(number)])

    if threading.current_thread() is not threading.main_thread():  # nobody else may set a handler
        yield
        return
    before = {n: signal.signal(n, end) for n in codes if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reader_gone(descriptor: int) -> bool:
    """Whether this is a pipe that nobody reads from any more."""
    asked = select.poll()
    asked.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in asked.poll(0))
