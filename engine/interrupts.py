"""Ctrl-C while a run trains: the step under way is finished, so that no update is left half done.

A KeyboardInterrupt raised wherever Python happens to be may land in a callback or a destructor, where it is printed and
forgotten, and under several processes it strikes each at another place.  A flag that the loop reads between steps is
neither lost nor early.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupts:
    """While the block runs, the first Ctrl-C sets `asked`; the next one interrupts at once, as ever.

    Args:
        say: takes a line for the user when the first one comes.
    """

    def __init__(self, say: Callable[[str], None] = lambda _: None) -> None:
        self.asked = False
        self._say = say
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # nobody else may set a handler
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()
        self._say("stopping after this step; Ctrl-C again stops at once")

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
