"""display.py: a bar on a terminal, plain lines elsewhere, and a table that a newcomer can read."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console
from run_records import SCORES_AFTER, SCORES_BEFORE, make_metrics

from syncr1.engine.show.display import Display, before_after_table, duration, summary_line
from syncr1.engine.show.scores import ScoreRow, flatten_scores, score_rows, show_change, show_score


def make_display(*, terminal: bool, quiet: bool = False, **settings: int) -> tuple[Display, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, quiet=quiet, color_system=None)
    return Display(max_steps=5, num_stages=4, console=console, **settings), stream


def run(display: Display) -> None:
    display.stage("making the world")
    display.note("20 concepts [not markup]")
    display.stage("training")
    with display.training():
        for step in range(5):
            display.step(make_metrics(step))
    display.before_after(SCORES_BEFORE, SCORES_AFTER)


def test_plain_lines_without_a_terminal() -> None:
    display, stream = make_display(terminal=False, logging_steps=2)
    run(display)
    lines = stream.getvalue().splitlines()
    assert lines[:3] == ["1/4 making the world", "  20 concepts [not markup]", "2/4 training"]
    steps = [line.split()[1] for line in lines if line.startswith("  step")]
    assert steps == ["1/5", "2/5", "4/5", "5/5"]
    assert "reward 0.50 (identity 0.40 · text n/a)  1,234 tokens/s" in lines[3]
    assert "\x1b" not in stream.getvalue()


def test_one_live_bar_on_a_terminal() -> None:
    display, stream = make_display(terminal=True)
    run(display)
    assert "5/5" in stream.getvalue()
    assert "reward 0.54" in stream.getvalue()
    assert "  step 1/5" not in stream.getvalue()


def test_the_bar_ends_when_training_breaks() -> None:
    display, stream = make_display(terminal=True)
    with pytest.raises(KeyboardInterrupt), display.training():
        display.step(make_metrics(0))
        raise KeyboardInterrupt
    display.note("after")
    assert stream.getvalue().rstrip().endswith("after")
    assert stream.getvalue().count("\x1b[?25h") == 1  # the cursor is back


def test_quiet_says_nothing() -> None:
    display, stream = make_display(terminal=False, quiet=True)
    run(display)
    assert stream.getvalue() == ""


def test_summary_line_with_little_and_with_failures() -> None:
    assert summary_line({}) == ""
    assert summary_line({"reward": math.nan}) == "reward n/a"
    assert summary_line({"reward": 0.5, "reward_failures": 3.0}).endswith("3 failed rewards")
    assert summary_line({"reward": 0.5, "reward_failures": 1.0}).endswith("1 failed reward")


def test_table_shows_tasks_in_words_and_the_summary_last() -> None:
    stream = io.StringIO()
    before = {"summary": 0.6, **SCORES_BEFORE}
    Console(file=stream, width=100).print(before_after_table(before, SCORES_AFTER))
    text = stream.getvalue()
    assert text.index("Questions about the concept") < text.index("Infer what is meant") < text.index("All tasks")
    assert "80.0 %" in text
    assert "+33.0" in text
    assert "-2.0" in text
    assert "greedy: the single most likely answer" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_table_of_an_interrupted_run() -> None:
    rows = score_rows(SCORES_BEFORE, None)
    assert all(row.after is None and row.change is None for row in rows)
    assert show_change(rows[0]) == "–"
    assert before_after_table(SCORES_BEFORE, {}).row_count == len(rows)
    assert before_after_table({}, {}).row_count == 0


def test_headlines_are_the_main_scores_only() -> None:
    flat = {
        "num_items": 3.0,
        "score/greedy": 0.5,
        "score/sampled": 0.4,
        "bleu/greedy": 0.9,
        "accuracy/sampled": 0.1,
    }
    drawn = {
        "attributes/checker": 0.7,
        "attributes/cnn": 0.6,
        "all_right/cnn": 0.2,
        "score/sampled": 0.7,
        "identity": 0.3,
    }
    rows = score_rows({"qa": flat, "rea_gen": drawn, "summary": {"image/cnn": 0.6}}, None)
    assert [(row.task, row.measure, row.before) for row in rows] == [
        ("qa", "greedy", 0.5),
        ("qa", "sampled", 0.4),
        ("rea_gen", "checker", 0.7),
        ("rea_gen", "cnn", 0.6),
        ("summary", "image/cnn", 0.6),
    ]
    photographs = score_rows({"pure_gen": {"identity": 0.3, "score/sampled": 0.3, "num_items": 2.0}}, None)
    assert [(row.task, row.measure) for row in photographs] == [("pure_gen", "sampled")]


def test_score_rows_join_flat_and_nested_names() -> None:
    rows = score_rows({"b/greedy": 0.5, "summary": 0.1, "a": 1}, {"a": 2.0, "b": {"greedy": 0.75, "cnn": math.nan}})
    assert rows == [
        ScoreRow("b", "greedy", 0.5, 0.75),
        ScoreRow("b", "cnn", None, None),
        ScoreRow("a", "", 1.0, 2.0),
        ScoreRow("summary", "", 0.1, None),
    ]
    assert flatten_scores(None) == {}


def test_numbers_in_words() -> None:
    assert [duration(seconds) for seconds in (4.4, 200, 7500)] == ["4 s", "3 min 20 s", "2 h 5 min"]
    assert [show_score(value) for value in (0.625, 31.25, None)] == ["62.5 %", "31.2", "–"]
    assert show_change(ScoreRow("t", "m", 30.0, 31.5)) == "+1.5"
