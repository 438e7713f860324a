"""docs/answers.md is the table of rules: every row comes out as it says, for questions with and without options."""

from __future__ import annotations

import re

import pytest
from helpers import ROOT

from syncr1.engine.answers.letters import chosen_letter, true_letter
from syncr1.engine.answers.same import same_answer
from syncr1.engine.data.questions import letter_of
from syncr1.engine.rewards.builtin.accuracy import AccuracyReward

PAGE = (ROOT / "docs" / "answers.md").read_text()
SAME = re.findall(r"^\| [^|`]+ \| `([^|]+)` \| `([^|]+)` \| (yes|no) \|$", PAGE, re.MULTILINE)
CHOSEN = re.findall(r"^\| [^|`]+ \| `([^|]+)` \| ([A-D–]) \|$", PAGE, re.MULTILINE)
OPTIONS = ("a cat", "a dog", "two birds", "4")


def test_every_row_is_read() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) == len(SAME) + len(CHOSEN) > 170


@pytest.mark.parametrize(("said", "right", "same"), SAME)
def test_same_answers(said: str, right: str, same: str) -> None:
    assert same_answer(said, right) is (same == "yes")
    assert same_answer(right, said) is (same == "yes")


@pytest.mark.parametrize(("said", "right", "same"), SAME)
def test_multiple_choice_accepts_what_open_questions_accept(said: str, right: str, same: str) -> None:
    options = ("something else", right, "and another")
    assert (chosen_letter(said, options) == "B") is (same == "yes")


@pytest.mark.parametrize(("said", "letter"), CHOSEN)
def test_chosen_options(said: str, letter: str) -> None:
    expected = None if letter == "–" else letter
    assert chosen_letter(said, OPTIONS) == expected
    (value,) = AccuracyReward()(
        completions=[f"<think></think><answer>{said}</answer>"],
        answer=["B"],
        segments=[("text",)],
        options=[OPTIONS],
        qa_type=["MC"],
    )
    assert value == float(letter == "B")


@pytest.mark.parametrize(("said", "letter"), [row for row in CHOSEN if row[0] != "B: it barks"])
def test_truths_are_read_alike(said: str, letter: str) -> None:
    expected = None if letter == "–" else letter
    assert true_letter(said, OPTIONS) == letter_of(said, OPTIONS) == expected
