"""What a run says on the terminal: its stages, one live bar while it trains, and the before/after table.

Where stdout is not a terminal (a log file, CI) the bar becomes a plain line every `logging_steps` steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from ..records import StepMetrics
from . import recent
from .scores import SUMMARY, ScoreRow, Scores, measures_in, score_rows, show_change, show_score


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
        self._progress = Progress(
            TextColumn("  training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[eta]}"),
            console=self.console,
            expand=True,
        )
        self._task = self._progress.add_task("training", total=max_steps, eta="")
        self._started = time.monotonic()

    def stage(self, title: str) -> None:
        """Announces what happens next: `2/4 training the tiny base`."""
        recent.begins(title)
        self._stage += 1
        number = f"{self._stage}/{self.num_stages} " if self.num_stages else ""
        self.console.print(Text.assemble((number, "bold cyan"), (title, "bold")))

    def note(self, text: str) -> None:
        """A line of plain text; above the bar while it runs."""
        recent.said(text)
        self.console.print(Text(f"  {text}"))

    @contextmanager
    def training(self, max_steps: int | None = None, done: int = 0) -> Iterator[Display]:
        """Shows the bar as long as the block runs; `step` moves it. A run of several stages gives each its steps, a
        resumed one those that are `done`."""
        self.max_steps = self.max_steps if max_steps is None else max_steps
        self._done = self._before = done
        self._progress.reset(self._task, total=self.max_steps, completed=done, eta="")
        self._started = time.monotonic()
        if not self.console.is_terminal or self.console.quiet:
            yield self
            return
        with Live(self._progress, console=self.console, refresh_per_second=4, transient=False) as self._live:
            try:
                yield self
            finally:
                self._live = None

    def step(self, metrics: StepMetrics) -> None:
        """One step is done: moves the bar, or prints a line when one is due."""
        self._done += 1
        line = summary_line(metrics.values)
        if self._live is not None:
            self._progress.update(self._task, completed=self._done, eta=self._time_left())
            self._live.update(Group(self._progress, Text(f"  {line}", "dim", overflow="ellipsis", no_wrap=True)))
        elif self._done % self.logging_steps == 0 or self._done in (self._before + 1, self.max_steps):
            left = self._time_left()
            text = f"  step {self._done}/{self.max_steps}  {line}" + (f"  {left}" if left else "")
            self.console.print(Text(text), soft_wrap=True)

    def before_after(self, before: Scores, after: Scores) -> None:
        """Prints the table that the run was for."""
        self.console.print(before_after_table(before, after))

    def wide(self, table: Table, width: int) -> None:
        """Prints a table that needs more than the 80 characters that a log file is taken to have."""
        room = self.console.width if self.console.is_terminal else max(width, self.console.width)
        before, self.console.width = self.console.width, room
        self.console.print(table)
        self.console.width = before

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


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def before_after_table(before: Scores, after: Scores) -> Table:
    """What the model could do before and after training: a row per task and measure, the summary last.

    Args:
        before, after: {`task/measure`: score} or {task: {measure: score}}; shares in [0, 1], higher is better.
    """
    rows = score_rows(before, after)
    notes = [f"{name}: {words}" for name, words in measures_in(rows).items()]
    notes.append("on held-out items that training never saw; change in percentage points")
    table = Table(
        title="Before and after training", caption="\n".join(notes), caption_justify="left", title_style="bold"
    )
    table.add_column("what the model is asked to do", overflow="fold")
    table.add_column("measured by")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        if previous is not None and row.task != previous and row.task == SUMMARY:
            table.add_section()
        style = "bold" if row.task == SUMMARY else ""
        label = row.label if row.task != previous else ""
        table.add_row(
            Text(label), Text(row.measure), show_score(row.before), show_score(row.after), _coloured(row), style=style
        )
        previous = row.task
    return table


def _coloured(row: ScoreRow) -> Text:
    """The sign says which way as well as the colour."""
    change = row.change or 0.0
    return Text(show_change(row), "green" if change > 0 else "red" if change < 0 else "")
