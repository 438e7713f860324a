"""What a run says on the terminal: its stages, one live bar while it trains, and the before/after table.

Where stdout is not a terminal (a log file, CI) the bar becomes a plain line every `logging_steps` steps. In between a
`Pulse` shows that the run lives.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from ..records import StepMetrics
from . import recent
from .in_words import clipping_words
from .intervals import Interval
from .names import INTERVALS, SUMMARY, UNTRAINED
from .pulse import Pulse, duration
from .scores import (
    ScoreRow,
    Scores,
    measures_in,
    score_rows,
    show_change,
    show_interval,
    show_score,
)
from .warnings import Watch, of_scores


class Display:
    """Speaks on rank 0 and is silent elsewhere.

    Args:
        max_steps: steps that the run will take.
        num_stages: how many stages will be announced; 0 leaves the numbers out.
        logging_steps: without a terminal, a line is printed every this many steps.
        quiet: says nothing at all (other ranks).
        console: where to; None: stdout.
    """

    def __init__(
        self,
        *,
        max_steps: int,
        num_stages: int = 0,
        logging_steps: int = 1,
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        self.console = console or Console(quiet=quiet, highlight=False)
        self.max_steps, self.num_stages, self.logging_steps = max_steps, num_stages, max(1, logging_steps)
        self._stage = self._done = self._before = 0
        self._first_step_at = math.nan
        self._live: Live | None = None
        self._pulse: Pulse | None = None
        self._entered = False
        self._progress = Progress(
            TextColumn("  training"),
            SpinnerColumn("line"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[eta]}"),
            console=self.console,
            expand=True,
        )
        self._task = self._progress.add_task("training", total=max_steps, eta="")
        self._started = time.monotonic()
        self._watch = Watch()
        self._norms: list[float] = []

    def __enter__(self) -> Self:
        """Inside, a stage that takes long shows that it lives."""
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show_pulse(None)
        self._entered = False

    def stage(self, title: str) -> None:
        """Announces what happens next: `2/4 training the tiny base`."""
        self._show_pulse(None)
        recent.begins(title)
        self._stage += 1
        number = f"{self._stage}/{self.num_stages} " if self.num_stages else ""
        self.console.print(Text.assemble((number, "bold cyan"), (title, "bold")), soft_wrap=True)
        self._show_pulse(title)

    def note(self, text: str) -> None:
        """A line of plain text; above the bar while it runs."""
        recent.said(text)
        self.console.print(Text(f"  {text}"), soft_wrap=True)  # a path that is wrapped cannot be copied

    @contextmanager
    def training(self, max_steps: int | None = None, done: int = 0) -> Iterator[Display]:
        """Shows the bar as long as the block runs; `step` moves it. A run of several stages gives each its steps, a
        resumed one those that are `done`."""
        self.max_steps = self.max_steps if max_steps is None else max_steps
        self._done = self._before = done
        self._watch, self._norms = Watch(), []
        self._progress.reset(self._task, total=self.max_steps, completed=done, eta="")
        self._started = time.monotonic()
        if not self.console.is_terminal or self.console.quiet:
            self._show_pulse("the first step, which also warms up")
            yield self
        else:
            self._show_pulse(None)
            with Live(self._progress, console=self.console, refresh_per_second=4, transient=False) as self._live:
                try:
                    yield self
                finally:
                    self._live = None
        self._show_pulse("saving and scoring")

    def step(self, metrics: StepMetrics) -> None:
        """One step is done: moves the bar, or prints a line when one is due; tells each warning when it first holds."""
        self._done += 1
        if math.isfinite(norm := metrics.values.get("grad_norm", math.nan)):
            self._norms.append(norm)
        if self._live is None:
            self._show_pulse(None)  # from here on there are the steps' lines
        for warned in [] if self.console.quiet else self._watch.see(metrics.values, self._done):
            self.console.print(Text(f"  warning: {warned.text}", "yellow"), soft_wrap=True)
        line = summary_line(metrics.values)
        if self._live is not None:
            self._progress.update(self._task, completed=self._done, eta=self._time_left())
            self._live.update(Group(self._progress, Text(f"  {line}", "dim", overflow="ellipsis", no_wrap=True)))
        elif self._done % self.logging_steps == 0 or self._done in (self._before + 1, self.max_steps):
            left = self._time_left()
            text = f"  step {self._done}/{self.max_steps}  {line}" + (f"  {left}" if left else "")
            self.console.print(Text(text), soft_wrap=True)

    def gradients(self, largest: float) -> None:
        """Says how long the gradients of this start's steps were, and how many were cut to `largest`."""
        if said := clipping_words(self._norms, largest):
            self.note(said)

    def before_after(self, before: Scores, after: Scores) -> None:
        """Prints the table that the run was for, and below it what fell and what is guessed."""
        self.console.print(before_after_table(before, after))
        for warned in of_scores(score_rows(before, after)):
            self.console.print(Text(f"  warning: {warned.text}", "yellow"), soft_wrap=True)

    def _show_pulse(self, words: str | None) -> None:
        """Shows `words` until the next call; None: nothing any more."""
        if self._pulse is not None:
            self._pulse.stop()
        self._pulse = Pulse(self.console, words) if words is not None and self._entered else None
        if self._pulse is not None:
            self._pulse.start()

    def _time_left(self) -> str:
        """From the pace after the first step, which also pays for compiling and warming up."""
        now = time.monotonic()
        done = self._done - self._before
        if done == 1:
            self._first_step_at = now
        steps, seconds = done - 1, now - self._first_step_at
        if steps <= 0 or math.isnan(seconds):
            steps, seconds = 1, now - self._started
        left = max(0, self.max_steps - self._done)
        return f"{duration(seconds / steps * left)} left" if left else f"took {duration(now - self._started)}"


def summary_line(values: Mapping[str, float]) -> str:
    """`reward 0.61 (identity 0.52 · judge 0.70 · text 0.80)  1,234 tokens/s`, of what there is."""
    parts = []
    if "reward" in values:
        parts.append(f"reward {number(values['reward'])}")
    components = {
        name.split("/")[1]: value
        for name, value in values.items()
        if name.startswith("rewards/") and name.endswith("/mean")
    }
    if components:
        parts.append("(" + " · ".join(f"{name} {number(value)}" for name, value in components.items()) + ")")
    line = " ".join(parts)
    speed = values.get("tokens_per_second", math.nan)
    if math.isfinite(speed):
        line += f"  {speed:,.0f} tokens/s"
    failures = values.get("reward_failures", 0)
    if failures and math.isfinite(failures):
        line += f"  {failures:.0f} failed reward{'s' if failures > 1 else ''}"
    return line.strip()


def number(value: float) -> str:
    """Two decimals, or `n/a` where no trajectory had a value."""
    return f"{value:.2f}" if math.isfinite(value) else "n/a"


WIDTHS = (30, 15, 15, 17)
"""Of the table's columns: with the gaps between them, 80 characters."""


def before_after_table(before: Scores, after: Scores) -> Group:
    """What the model could do before and after training: the measures of each task below its name, the summary last.

    80 characters wide; what was found to be worse, or no better than guessing, is marked.

    Args:
        before, after: {`task/measure`: score} or {task: {measure: score}}; shares in [0, 1], higher is better.
    """
    rows = score_rows(before, after)
    under = _lines()
    under.add_row(*(Text(name, "dim") for name in ("measure", "before", "after", "change")))
    lines: list[Text | Table] = [Text("Before and after training", "bold"), under]
    previous = None
    for row in rows:
        if row.task != previous:
            under = _lines()
            lines += [Text(_heading(row), "bold"), under]
        under.add_row(
            _measure(row),
            _score(row.before, row.before_interval, row.unit),
            _score(row.after, row.after_interval, row.unit),
            _coloured(row),
        )
        previous = row.task
    notes = [f"{name}: {words}" for name, words in measures_in(rows).items() if name != UNTRAINED]
    notes.append(f"on held-out items, which training never saw; shares in per cent, changes in points; {INTERVALS}")
    return Group(*lines, *(Text(note, "dim") for note in notes))


def _heading(row: ScoreRow) -> str:
    """A task with its items and, of answers, what they are counted by: `… (24 items, % of words)`; what is counted of
    drawings stands in each line."""
    if row.task == SUMMARY:
        return row.label
    said = [f"{row.num_items} items"] if row.num_items else []
    said += [row.unit] if row.unit and row.family != "drawings" else []
    untrained = f", {UNTRAINED}" if UNTRAINED in row.marks else ""
    return row.label + (f" ({', '.join(said)})" if said else "") + untrained


def _lines() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0), width=sum(WIDTHS) + 3)
    for place, width in enumerate(WIDTHS):
        table.add_column(justify="right" if place else "left", width=width, no_wrap=bool(place), overflow="fold")
    return table


def _measure(row: ScoreRow) -> Text:
    marks = "".join(f" ! {mark}" for mark in row.marks if mark != UNTRAINED)
    apart = "" if len(row.measure) + len(marks) + 2 <= WIDTHS[0] else "\n "
    return Text.assemble(f"  {row.measure}", apart, (marks, "bold red"))


def _score(value: float | None, interval: Interval | None, unit: str) -> str:
    return _fitting(f"{show_score(value, unit).removesuffix(' %')} {show_interval(interval, unit)}", WIDTHS[1])


def _coloured(row: ScoreRow) -> Text:
    """The sign says which way as well as the colour, which only a change that is sure gets."""
    sure = row.change_interval is None or not row.change_interval[0] <= 0 <= row.change_interval[1]
    change = (row.change or 0.0) if sure else 0.0
    shown = f"{show_change(row)} {show_interval(row.change_interval, row.unit, signed=True)}"
    return Text(_fitting(shown, WIDTHS[3]), "green" if change > 0 else "red" if change < 0 else "")


def _fitting(text: str, width: int) -> str:
    """A score and its interval: `.473 [.45, .49]`, the interval on lines of its own where both are too long."""
    text = text.strip()
    if len(text) > width:
        text = re.sub(r"(?<!\d)0\.", ".", text)
    if len(text) > width:
        text = text.replace(" [", "\n[")
    return text if max(map(len, text.split("\n"))) <= width else text.replace(", ", ",\n")
