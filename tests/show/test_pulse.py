"""pulse.py: something moves, or is said, while a thing takes long; nothing where nobody is spoken to."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable

import pytest
from rich.console import Console
from run_records import make_metrics

from syncr1.engine.show import pulse as pulses
from syncr1.engine.show.display import Display
from syncr1.engine.show.pulse import Pulse, pulse


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulses, "BEAT", 0.02)


def console(*, terminal: bool = False, quiet: bool = False) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=100, quiet=quiet, color_system=None), stream


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_lines_without_a_terminal_and_the_innermost_speaks() -> None:
    to, stream = console()
    with pulse("loading something", console=to):
        until(lambda: stream.getvalue().count("\n") >= 2)
        assert set(stream.getvalue().splitlines()) == {"  loading something: 0 s"}
        with pulse("training", 40, 10) as moved:
            moved(20, "loss 2.10")
            until(lambda: "training: 20 of 40, loss 2.10" in stream.getvalue())
            before = stream.getvalue().count("loading")
            until(lambda: stream.getvalue().count("training") >= 4)
            assert stream.getvalue().count("loading") <= before + 1
    said = stream.getvalue()
    time.sleep(0.1)
    assert stream.getvalue() == said and "\x1b" not in said
    assert not [thread for thread in threading.enumerate() if thread.name == "pulse"]


def test_a_terminal_shows_both_and_keeps_its_cursor() -> None:
    to, stream = console(terminal=True)
    with pulse("loading something", console=to), pulse("training", 40) as moved:
        for done in range(20):
            moved(done + 1, "loss 1.00")
        until(lambda: "20/40" in stream.getvalue() and "loading something" in stream.getvalue())
        # Hidden for as long as a bar is being put up alone: a process that is killed has left the cursor where it was.
        assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")
    assert "loss 1.00" in stream.getvalue()


def test_where_nobody_is_spoken_to_nothing_within_speaks() -> None:
    """On other ranks the display is quiet; what is made there is made in silence."""
    to, stream = console(quiet=True)
    with pulse("a stage", console=to), pulse("training", 10):
        time.sleep(0.1)
    assert stream.getvalue() == "" and pulses._running == []


def test_what_is_left_follows_from_this_start_s_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that goes on after 900 steps has not made those in this second; what came before its first step, and
    that step, which warms up, say nothing either; nor does a minute in which the machine was busy."""
    now = [100.0]
    monkeypatch.setattr(pulses.time, "monotonic", lambda: now[0])
    shown = Pulse(console()[0], "training", total=1000, done=900)
    assert shown.line() == "training: 900 of 1000"
    now[0] += 60  # pictures are drawn, and the first step warms up
    for done in range(901, 904):
        shown.move(done, "loss 0.50")
        assert "left" not in shown.line()
        now[0] += 1
    shown.move(904, "loss 0.50")
    assert shown.line() == "training: 904 of 1000, 1 min 36 s left, loss 0.50"
    now[0] += 300
    for done in range(905, 955):
        for _ in range(4):  # more often than is kept
            now[0] += 0.25
            shown.move(done)
    assert shown.left() in ("46 s left", "47 s left")


def test_it_ends_when_the_block_breaks() -> None:
    with pytest.raises(KeyboardInterrupt), pulse("a stage", console=console()[0]):
        raise KeyboardInterrupt
    assert pulses._running == []


def test_a_display_lives_between_its_lines() -> None:
    to, stream = console()
    with Display(max_steps=2, console=to) as display:
        display.stage("scores before training")
        until(lambda: "  scores before training: 0 s" in stream.getvalue())
        with display.training():
            until(lambda: "the first step, which also warms up: 0 s" in stream.getvalue())
            display.step(make_metrics(0))
            said = stream.getvalue()
            time.sleep(0.1)
            assert stream.getvalue() == said, "the steps' own lines are enough"
        until(lambda: "saving and scoring: 0 s" in stream.getvalue())
    assert pulses._running == []


def test_a_display_that_nobody_entered_says_its_lines_alone() -> None:
    to, stream = console()
    Display(max_steps=2, console=to).stage("scores before training")
    time.sleep(0.1)
    assert stream.getvalue() == "scores before training\n"
