"""Signs of life: what is being done, for how long, and, where that is known, how much of it is left.

On a terminal a line at the bottom that moves; elsewhere (a log file, CI) a plain line now and then, which comes less
often after a minute. Nothing heavy is imported: the first line is there before torch is.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

BEAT = 3.0
"""Seconds between the lines of a thing's first minute, where stdout is no terminal."""
SLOW_BEAT = 60.0
"""Between those that follow."""

PACED, PACED_A_SECOND, LEAST_PACED = 120, 4, 3
"""Moves by which what is left is told: the newest 120, at most four a second, once there are more than three."""

Moved = Callable[[int, str], None]
"""Told how much is done, and a word on it."""

_running: list[Pulse] = []
"""The outermost first; where stdout is no terminal the innermost alone speaks."""


class Pulse:
    """Shows `words` from `start` to `stop`, either of which may be called again.

    Args:
        console: where to; a quiet one is left quiet.
        words: what is being done.
        total: of what `move` counts; None: it is not known.
        done: what was done before, which says nothing about this one's pace.
    """

    def __init__(self, console: Console, words: str, total: int | None = None, done: int = 0) -> None:
        self.console, self.words, self.total, self.done, self.note = console, words, total, done, ""
        self._began = time.monotonic()
        self._paced: deque[tuple[float, int]] = deque(maxlen=PACED)
        """When so much was done, of the newest moves."""
        self._over = threading.Event()
        self._live: Progress | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self in _running:
            return
        self._began = time.monotonic()
        _running.append(self)  # a quiet one, too: what is shown within it is as quiet
        if self.console.quiet:
            return
        if self.console.is_terminal:
            self._live = _progress(self.console, self)
            self._live.start()
            self.console.show_cursor(True)  # a process that is killed leaves no terminal without one
        else:
            self._over.clear()
            self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        if self not in _running:
            return
        _running.remove(self)
        self._over.set()
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._thread is not None:
            self._thread.join(1.0)

    def move(self, done: int, note: str = "") -> None:
        """So much of `total` is done."""
        self.done, self.note = done, note
        now = time.monotonic()
        if not self._paced or now - self._paced[-1][0] >= 1 / PACED_A_SECOND:
            self._paced.append((now, done))
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=done)

    def line(self) -> str:
        """`making the tiny base: 250 of 1000, 1 min 40 s left, loss 2.10`, or `loading torch: 8 s`."""
        parts = [f"{self.done} of {self.total}"] if self.total is not None else [self.elapsed()]
        return f"{self.words}: {', '.join(part for part in (*parts, self.left(), self.note) if part)}"

    def elapsed(self) -> str:
        return duration(time.monotonic() - self._began)

    def left(self) -> str:
        """By the pace of the newest moves; nothing before there is one.

        What came before the first of them (loading, drawing pictures, the first step, which warms up) says nothing of
        the pace, nor does a minute in which the machine was busy, once it is over."""
        if self.total is None or len(self._paced) <= LEAST_PACED:
            return ""
        (began, first), (now, done) = self._paced[0], self._paced[-1]
        if done <= first:
            return ""
        return f"{duration((now - began) / (done - first) * (self.total - self.done))} left"

    def _beat(self) -> None:
        while not self._over.wait(BEAT if time.monotonic() - self._began < 60 else SLOW_BEAT):
            if _running and _running[-1] is self:
                self.console.print(Text(f"  {self.line()}"), soft_wrap=True)


@contextmanager
def pulse(words: str, total: int | None = None, done: int = 0, console: Console | None = None) -> Iterator[Moved]:
    """Shows `words` while the block runs, below what is shown already; the block may tell how far it is.

    Args:
        words: what is being done, as "reading the index".
        total, done: see `Pulse`.
        console: None: that of the pulse that runs, else stdout's.
    """
    outer = _running[-1].console if _running else Console(highlight=False)
    shown = Pulse(console or outer, words, total, done)
    shown.start()
    try:
        yield shown.move
    finally:
        shown.stop()


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class _State(ProgressColumn):
    """Elapsed seconds, what is left and the note, as they are when the line is drawn."""

    max_refresh = 0.2

    def __init__(self, shown: Pulse) -> None:
        super().__init__()
        self._shown = shown

    def render(self, task: Task) -> Text:
        parts = (self._shown.elapsed(), self._shown.left(), self._shown.note)
        return Text("  ".join(part for part in parts if part), "dim")


def _progress(console: Console, shown: Pulse) -> Progress:
    columns: list[ProgressColumn] = [SpinnerColumn("line"), TextColumn("{task.description}", markup=False)]
    if shown.total is not None:
        columns += [BarColumn(bar_width=None), MofNCompleteColumn()]
    progress = Progress(*columns, _State(shown), console=console, transient=True, expand=shown.total is not None)
    progress.add_task(shown.words, total=shown.total, completed=shown.done)
    return progress
