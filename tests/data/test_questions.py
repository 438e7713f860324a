"""Options, letters, answers and instructions, as the released data write them and as they might."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncr1.engine.data.forms.lettered import options_in, with_options
from syncr1.engine.data.questions import THINK_THEN_ANSWER, answer_of, instructed, letter_of, text_of
from syncr1.engine.errors import DataError


@pytest.mark.parametrize(
    ("problem", "options"),
    [
        ("Which?\nA. one\nB. two", ("one", "two")),
        ("Which?\n\n  A) one \n (B) two. Not three\nC: 3.5", ("one", "two. Not three", "3.5")),
        ("A. Smith asks: which?\nA. one\nB. two\nC. three", ("one", "two", "three")),
        ("Which?\nA. one\nB. two\n\nThink first.\nA. note", ("one", "two")),
        ("Which?\nB. two\nC. three", ()),
        ("A. one", ()),
        ("Which? A. one B. two", ("one", "two")),
        ("Which?\nA.one\nB.two", ("one", "two")),
    ],
)
def test_options_in_a_problem(problem: str, options: tuple[str, ...]) -> None:
    assert options_in(problem) == options


WORDS = st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=1, max_size=6)


@given(st.lists(WORDS, min_size=2, max_size=26))
def test_options_that_were_added_are_found_again(texts: list[str]) -> None:
    assert options_in(with_options("Which?", texts)) == tuple(texts)
    assert all(letter_of(chr(ord("A") + i), texts) == chr(ord("A") + i) for i in range(len(texts)))


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. two", "B"),
        ("TWO", "B"),
        ("B. one", None),
        ("D", None),
        ("four", None),
        ("Both", None),
    ],
)
def test_letter_of_an_answer(answer: str, letter: str | None) -> None:
    assert letter_of(answer, ("one", "two", "three")) == letter


def test_a_letter_is_a_letter_before_it_is_a_text() -> None:
    assert letter_of("B", ("B", "A")) == "B"
    assert letter_of("same", ("same", "same")) is None, "which of the two is not said"
    assert letter_of("E", ()) == "E" and letter_of("cat", ()) is None


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ("<answer> B </answer>", "B"),
        ("<think><answer>A</answer></think><ANSWER>C</ANSWER>", "C"),
        (" two\n", "two"),
        (3, "3"),
        (3.0, "3"),
        (0.25, "0.25"),
        (["x"], "x"),
        ("48/2 = <<48/2=24>>24 clips.\n#### 1,072\n", "1,072"),
        (r"So $x=\frac{3}{2}$, which gives $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{3} is right: $\boxed{3}$", "3"),
        (r"Thus it is $\boxed 3$.", "3"),
        (r"<think>\boxed{1}</think><answer>\boxed{2}</answer>", "2"),
        (r"\boxed{never closed", r"\boxed{never closed"),
        ("It is #### of them", "It is #### of them"),
    ],
)
def test_answers(value: object, answer: str) -> None:
    assert answer_of(value, "solution") == answer


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, float("nan"), float("inf"), [], ["a", "b"], {"a": 1}, "", "<answer></answer>"),
        r"$\boxed{1}$ or $\boxed{2}$",
    ],
)
def test_no_answers(value: object) -> None:
    with pytest.raises(DataError, match="'solution'"):
        answer_of(value, "solution")


def test_messages_become_one_text() -> None:
    turns = [
        {"role": "<|User|>", "content": "Draw a cat."},
        {"role": "<|Assistant|>", "content": ""},
    ]
    assert text_of(turns, "prompt") == "Draw a cat."
    with pytest.raises(DataError, match="no answer"):
        text_of([turns[0], {"role": "assistant", "content": "no"}], "prompt")


def test_the_instruction_says_what_an_answer_looks_like() -> None:
    forms = {
        answer: instructed("Q?", kind, answer, "{form}")
        for kind, answer in (("MC", "B"), ("OE", "a red hat"), ("OE", "a red hat on the table"))
    }
    assert len(set(forms.values())) == 3 and "letter" in forms["B"] and "three words" in forms["a red hat"]
    text = instructed("{form} {question}?", "MC", "B", THINK_THEN_ANSWER)
    assert text.startswith("{form} {question}?\n") and "<think>" in text and "<answer>" in text
    assert instructed(text, "MC", "B", THINK_THEN_ANSWER) == text


def test_options_on_lines_may_be_signs_or_words_that_join() -> None:
    assert options_in("Which sign?\nA. +\nB. −\nC. ×") == ("+", "−", "×")
    assert options_in("Which word?\nA. and\nB. or") == ("and", "or")
