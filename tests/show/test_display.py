"""display.py: a bar on a terminal, plain lines elsewhere, and a table that a newcomer can read."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from run_records import SCORES_AFTER, SCORES_BEFORE, make_metrics
from score_cases import model

from syncr1.engine.show.display import Display, before_after_table, duration, summary_line
from syncr1.engine.show.measured import PER_ITEM, Measured
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


def printed(before: Any, after: Any, width: int = 80, terminal: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, color_system=None)
    console.print(before_after_table(before, after))
    return stream.getvalue()


def test_table_shows_tasks_in_words_and_the_summary_last() -> None:
    text = printed(SCORES_BEFORE, SCORES_AFTER)
    assert text.index("Questions about the concept") < text.index("Infer what is meant") < text.index("All tasks")
    assert re.search(r"most likely answer +80.0 +78.0 +-2.0$", text, re.MULTILINE)
    assert re.search(r"sampled answer +55.0 +88.0 +\+33.0$", text, re.MULTILINE)
    assert "most likely answer: the answer made of each time the likeliest word" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_the_table_of_a_real_run_fits_80_characters(terminal: bool) -> None:
    """Each number on its line with its interval, nothing cut off; what fell and what is guessed is said there."""
    text = printed(model(0, 0.6, general=0.9), model(1, 0.85, general=0.7), terminal=terminal)
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 80 and "…" not in text.replace("<think>…</think><answer>…</answer>", "")
    rows = [line for line in lines if re.search(r"\d \[.*\d \[.*[+-]\d.* \[", line)]
    assert len(rows) == 4 * 2 + 3 * 4 + 6
    task = lines.index("Draw a caption without a concept (192 items), not trained on")
    assert re.match(r"  drawings right, classifier +\d+\.\d \[\d+, \d+\] ", lines[task + 1]), lines[task + 1]
    assert lines[task + 2] == "  ! fell"
    task = lines.index("Recognition: is the concept in the photo? (120 items, % balanced accuracy)")
    assert all("! at chance" in "".join(lines[task + i : task + i + 2]) for i in (1, 2))


def test_the_whole_width_of_numbers_fits() -> None:
    """From nothing to everything, the widest that a share's line can be."""
    ids = [str(i) for i in range(300)]
    measured = [Measured.of(ids, [value] * 300).to_json() for value in (0.0, 1.0)]
    none, all_ = ({"qa/score/greedy": i, PER_ITEM: {"qa/score/greedy": one}} for i, one in enumerate(measured))
    for before, after in ((none, all_), (all_, none)):
        lines = printed(before, after).splitlines()
        row = next(i for i, line in enumerate(lines) if "most likely" in line)
        assert "100.0 [99, 100]" in lines[row] and re.fullmatch(r" +\[[+-]100, [+-]100\]", lines[row + 1])
        assert max(map(len, lines)) <= 80


def test_numbers_that_are_no_shares_fit() -> None:
    """A likeness, and a reward on a scale of its own, whose interval gets a line: nothing is cut."""
    ids = [str(i) for i in range(40)]

    def side(shift: float) -> dict[str, Any]:
        values = {
            "pure_gen/identity": [0.4 + shift / 100 + i / 200 for i in range(40)],
            "t2i/reward/mine": [-3.2e7 + i * shift for i in range(40)],
        }
        kept = {name: Measured.of(ids, some) for name, some in values.items()}
        flat = {name: one.value for name, one in kept.items()}
        return {**flat, PER_ITEM: {name: one.to_json() for name, one in kept.items()}}

    lines = [line.rstrip() for line in printed(side(1.0), side(2.0)).splitlines()]
    likeness = next(line for line in lines if "likeness, by own tower" in line)
    assert re.search(r"tower +\.\d+ \[\.\d\d, \.\d\d\] +\.\d+ \[\.\d\d, \.\d\d\] +\+", likeness), likeness
    mine = next(i for i, line in enumerate(lines) if line.startswith("  mine"))
    assert lines[mine].split() == ["mine", "-3.2e+07", "-3.2e+07", "+19.5"]
    assert "".join(lines[mine + 1 : mine + 3]).split() == [
        *("[-3.2e+07,", "[-3.2e+07,", "[+15.61,", "+23.09]", "-3.2e+07]", "-3.2e+07]"),
    ]
    assert max(map(len, lines)) <= 80


def test_table_of_an_interrupted_run() -> None:
    rows = score_rows(SCORES_BEFORE, None)
    assert all(row.after is None and row.change is None for row in rows)
    assert show_change(rows[0]) == "–"
    assert printed(SCORES_BEFORE, {}).count("–") == 2 * len(rows)
    assert "items" in printed({}, {})


def test_paths_are_not_wrapped(tmp_path: Path) -> None:
    """In a log file a path of 120 characters is on one line, and on a terminal the terminal wraps it."""
    path = str(tmp_path / ("long name " * 12).strip())
    for terminal in (False, True):
        stream = io.StringIO()
        console = Console(file=stream, width=80, force_terminal=terminal, color_system=None)
        display = Display(max_steps=1, console=console)
        display.stage(f"scores of {path}")
        display.note(f"model {path}")
        assert f"  model {path}\n" in stream.getvalue() and f"scores of {path}\n" in stream.getvalue()


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
        "hat/cnn": 0.9,
        "score/sampled": 0.7,
        "identity": 0.3,
    }
    rows = score_rows({"qa": flat, "rea_gen": drawn, "summary": {"image/cnn": 0.6, "general_vqa/greedy": 0.1}}, None)
    assert [(row.task, row.measure, row.before) for row in rows] == [
        ("qa", "most likely answer", 0.5),
        ("qa", "sampled answer", 0.4),
        ("rea_gen", "drawings right, classifier", 0.2),
        ("rea_gen", "attributes right, classifier", 0.6),
        ("rea_gen", "attributes right, checker", 0.7),
        ("summary", "attributes right, classifier", 0.6),
    ]


def test_score_rows_join_flat_and_nested_names() -> None:
    rows = score_rows({"b/greedy": 0.5, "summary": 0.1, "a": 1}, {"a": 2.0, "b": {"greedy": 0.75, "cnn": math.nan}})
    assert [row[:4] for row in rows] == [
        ("b", "most likely answer", 0.5, 0.75),
        ("b", "cnn", None, None),
        ("a", "", 1.0, 2.0),
        ("summary", "", 0.1, None),
    ]
    assert flatten_scores(None) == {}


def test_numbers_in_words() -> None:
    assert [duration(seconds) for seconds in (4.4, 200, 7500)] == ["4 s", "3 min 20 s", "2 h 5 min"]
    assert [show_score(value) for value in (0.625, 31.25, None)] == ["62.5 %", "31.2", "–"]
    assert show_change(ScoreRow("t", "m", 30.0, 31.5)) == "+1.5"
