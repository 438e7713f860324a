"""Options, truths and chats in the dress that data sets give them; what is not clear is asked about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from data_sources import encoded, write_lines

from syncr1.engine.data.faults import Faults
from syncr1.engine.data.forms.choices import Choices, by_number, letters_in, list_in
from syncr1.engine.data.forms.dialogue import read_chat
from syncr1.engine.data.forms.lettered import options_in
from syncr1.engine.data.loaded import load_chains, load_pairs
from syncr1.engine.data.samples import load_prompts, load_samples
from syncr1.engine.errors import DataError
from syncr1.engine.records import Prompt
from syncr1.engine.rewards.builtin.accuracy import AccuracyReward

Q = {"question": "Which colour?"}
RGB = {**Q, "choices": ["red", "green", "blue"]}


def read(folder: Path, *rows: Mapping[str, Any]) -> list[Prompt]:
    return [p for sample in load_samples(write_lines(folder / "train.jsonl", rows), instruction=None) for p in sample]


@pytest.mark.parametrize(
    ("row", "answer", "options"),
    [
        ({**Q, "choices": ["red", "blue"], "answer": 1}, "B", ("red", "blue")),
        ({**Q, "choices": ["red", "blue"], "answer": 1.0}, "B", ("red", "blue")),
        ({**Q, "choices": ["0", "1"], "answer": 1}, "B", ("0", "1")),
        ({**Q, "choices": [10, 20, 30], "answer": 20}, "B", ("10", "20", "30")),
        ({**Q, "choices": [1.5, 2.0], "answer": 2.0}, "B", ("1.5", "2")),
        ({**Q, "choices": ["3", "2", "1"], "answer": "1"}, "C", ("3", "2", "1")),
        ({**Q, "choices": ["3", "2", "1"], "answer_index": 1}, "B", ("3", "2", "1")),
        ({**Q, "choices": "['red' 'blue']", "answer": "blue"}, "B", ("red", "blue")),
        ({**Q, "choices": '["red", "it\'s"]', "answer": "B"}, "B", ("red", "it's")),
        ({**Q, "choices": "A. red\nB. blue", "answer": "B"}, "B", ("red", "blue")),
        ({**Q, "options": {"A": "red", "B": "blue", "C": None}, "answer": "B"}, "B", ("red", "blue")),
        ({**Q, "options": {"0": "red", "1": "blue"}, "answer": 1}, "B", ("red", "blue")),
        ({**Q, "options": {"b": "red", "a": "blue"}, "answer": "a"}, "B", ("red", "blue")),
        ({**Q, "option_a": "red", "option_b": "blue", "answer": "blue"}, "B", ("red", "blue")),
        ({**Q, "A": "red", "B": "blue", "C": "nan", "answer": "B"}, "B", ("red", "blue")),
        ({**RGB, "answer": [2]}, "C", ("red", "green", "blue")),
        ({**RGB, "answer": ["A", "C"]}, "A, C", ("red", "green", "blue")),
        ({**RGB, "answer": [0, 2]}, "A, C", ("red", "green", "blue")),
        ({**RGB, "answer": ["blue", "red"]}, "A, C", ("red", "green", "blue")),
        ({**RGB, "answer": "AC"}, "A, C", ("red", "green", "blue")),
        ({**RGB, "answer": "A and C"}, "A, C", ("red", "green", "blue")),
        ({**Q, "option": "A. red; B. blue;", "answer": "B"}, "B", ("red", "blue")),
        ({**Q, "choices": ["red", "blue"], "label": 1}, "B", ("red", "blue")),
        ({"question": "Which?\nA.红\nB.蓝", "answer": "蓝"}, "B", ("红", "蓝")),
        ({"question": "Which? A) red; B) blue", "answer": "B"}, "B", ("red", "blue")),
        ({"question": "哪种？A、红 B、蓝", "answer": "A"}, "A", ("红", "蓝")),
        ({"question": "How many? A. 2 B. 3 C. 4", "answer": 3}, "B", ("2", "3", "4")),
        ({"question": "Which?\n- **A)** red\n- **B)** blue", "answer": "B"}, "B", ("red", "blue")),
        ({"question": "Which?\nＡ．red\nＢ．blue", "answer": "B"}, "B", ("red", "blue")),
    ],
)
def test_multiple_choice(tmp_path: Path, row: dict[str, Any], answer: str, options: tuple[str, ...]) -> None:
    (prompt,) = read(tmp_path, row)
    assert (prompt.qa_type, prompt.answer, prompt.options) == ("MC", answer, options)
    assert all(option in prompt.text for option in options)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "Which panel, (A) or (B)?", "answer": "B"}, "B"),
        ({"question": "In panels (A) and (B), how many?", "answer": 5}, "5"),
        ({"question": "Who is A. Smith?", "answer": "a painter"}, "a painter"),
        ({**RGB, "answer": "yellow", "qa_type": "OE"}, "yellow"),
        ({"question": "q", "choices": [], "answer": "1.2"}, "1.2"),
        ({"question": "q", "answer": "5", "solution": "2 + 3 = 5, so it is 5."}, "5"),
        ({"question": "q", "answer": None, "solution": "5"}, "5"),
        ({"question": "q", "answer": float("nan"), "ground_truth": "5"}, "5"),
        ({"question": "q", "reward_model": {"ground_truth": {"target": ["5", "five"]}}}, "5"),
        ({"question": "q", "answers": {"text": ["in May"], "answer_start": [3]}}, "in May"),
        ({"question": "q", "answers": [{"answer": "no"}, {"answer": "yes"}, {"answer": "yes"}]}, "yes"),
        ({"question": "q", "answer": "[1, 2]"}, "[1, 2]"),
        ({"query": "q", "label": ["0.57"]}, "0.57"),
    ],
)
def test_open_ended(tmp_path: Path, row: dict[str, Any], answer: str) -> None:
    (prompt,) = read(tmp_path, row)
    assert (prompt.qa_type, prompt.answer, prompt.options) == ("OE", answer, ())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**Q, "choices": ["3", "2", "1"], "answer": 1}, r"1 is the text of option C and the index \(from 0\) of B"),
        ({**Q, "choices": ["1", "1.0"], "answer": 1}, "column 'answer': 1 is the text"),
        ({**RGB, "answer": 3}, "3 is the index of none of the 3 options of column 'choices'; indices count from 0"),
        ({**RGB, "answer": -1}, "-1 is the index of none"),
        ({**RGB, "answer": "3"}, r"the answer '3' is not among the options \['red', 'green', 'blue'\]"),
        ({**Q, "choices": ["red", "Red.", "blue"], "answer": "red!"}, "'red!' is the text of the options A and B"),
        ({**RGB, "answer": "yellow"}, "'yellow' is not among .* or say qa_type OE"),
        ({**RGB, "answer": ["red", "yellow"]}, "is not among the options"),
        ({**Q, "A": "red", "B": None, "C": "blue", "answer": "C"}, "column 'B' is empty and options follow it"),
        ({**Q, "choices": {"text": ["a"], "label": ["A", "B"]}, "answer": "A"}, "1 texts and 2 labels"),
        ({**Q, "choices": [["a"], "b"], "answer": "A"}, "column 'choices' must hold texts"),
        ({**Q, "choices": ["\ud800", "b"], "answer": "B"}, "column 'choices' holds half of a surrogate pair"),
        ({**Q, "choices": "red or blue", "answer": "A"}, "column 'choices' must be a list"),
        ({"question": "Which? A. red B. blue", "answer": "C"}, "'C' is not among the options"),
        ({"question": "Which? A. red B. blue", "answer": 1}, "1 may be the index of an option in the question"),
        ({"messages": [{"role": "user", "content": "Hi?"}], "answer": None, "question": None}, "missing or None"),
    ],
)
def test_what_is_not_clear_is_asked_about(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, row)
    assert "line 1: " in str(caught.value)


@pytest.mark.parametrize(
    ("question", "added"),
    [
        ("Which?\nA. red\nB. green\nC. blue", False),
        ("Which? (A) Red (B) green (C) blue Choose one.", False),
        ("Which?\nA. red\nB. green", True),
        ("Which of the panels A. left and B. right is meant?", True),
    ],
)
def test_a_question_that_lists_other_options_is_given_its_own(tmp_path: Path, question: str, added: bool) -> None:
    (prompt,) = read(tmp_path, {**RGB, "question": question, "answer": 2})
    assert (prompt.text == question, prompt.answer) == (not added, "C")
    assert prompt.text.endswith("\nA. red\nB. green\nC. blue") or not added


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {**RGB, "question": "Which?\nA. blue\nB. green\nC. red"},
            "'blue' as option C, and the question lists it as A",
        ),
        ({**RGB, "question": "Which?\nA. green\nB. blue"}, "'green' as option B, and the question lists it as A"),
        ({**Q, "choices": ["B. red", "A. blue"]}, "letters its options B, A; write"),
    ],
)
def test_a_letter_that_means_two_things_is_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, {**row, "answer": "A"})


def test_an_answer_in_an_object_of_unknown_names_is_not_called_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'answer' must be one answer, text or a number, got \{'value': 'x'"):
        read(tmp_path, {**Q, "answer": {"value": "x", "aliases": ["y"]}})
    with pytest.raises(DataError, match="'answer' is missing or None"):
        read(tmp_path, {**Q, "answer": {"value": None}}, {**Q, "answer": "x"})


def test_rows_that_leave_one_meaning_tell_what_numbers_are(tmp_path: Path) -> None:
    unclear = {**Q, "choices": ["3", "2", "1"], "answer": 1}
    assert [p.answer for p in read(tmp_path, {**RGB, "answer": 0}, unclear)] == ["A", "B"], "indices"
    texts = {**Q, "choices": [10, 20], "answer": 20}
    assert [p.answer for p in read(tmp_path, texts, unclear)] == ["B", "C"], "texts"
    with pytest.raises(DataError, match=r"line 3.*1 is the text of option C"):
        read(tmp_path, {**RGB, "answer": 0}, texts, unclear)


def test_digits_that_can_be_indices_alone_are(tmp_path: Path) -> None:
    """AI2D writes indices as texts."""
    rows = [{**Q, "options": ["face", "hand"], "answer": "1"}, {**Q, "options": ["1", "2"], "answer": "0"}]
    assert [p.answer for p in read(tmp_path, *rows)] == ["B", "A"]
    with pytest.raises(DataError, match="'1' is not among the options"):
        read(tmp_path, *rows, {**Q, "options": ["face", "hand"], "answer": "hand"})


def test_several_right_answers_earn_by_any_text_and_by_all_letters(tmp_path: Path) -> None:
    word, letters = read(tmp_path, {**Q, "answer": ["red", "rouge"]}, {**RGB, "answer": ["A", "C"]})

    def earned(prompt: Prompt, *said: str) -> list[float | None]:
        columns = {name: [getattr(prompt, name)] for name in ("answer", "options", "qa_type", "right_answers")}
        reward = AccuracyReward()
        return [reward(completions=[f"<answer>{s}</answer>"], segments=[("text",)], **columns)[0] for s in said]

    assert earned(word, "red", "Rouge.", "blue", "red, rouge", "") == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert earned(letters, "A, C", "C and A", "AC", "red, blue", "A\nC") == [1.0] * 5
    assert earned(letters, "A", "A, B, C", "A, B", "ABC", "red", "", "A, A") == [0.0] * 7


def test_a_lone_letter_without_options_is_said(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [{"question": "Which?", "answer": "B"}, {**RGB, "answer": "B"}])
    (said,) = load_pairs(source, "train", faults=Faults()).unused
    assert "none were found of 1 questions whose answer is a letter, e.g. 'B' of rows/train/0/mm2t" in said
    source = write_lines(tmp_path / "chains.jsonl", [{"prompt": "Which?", "answer": "B", "segments": "text"}])
    assert any("e.g. 'B'" in line for line in load_chains(source, scored=False, faults=Faults()).unused)


# Chats ----------------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "What?"}
SAID = {"role": "assistant", "content": "a cup"}


@pytest.mark.parametrize(
    ("row", "text", "answer"),
    [
        ({"messages": [USER, SAID]}, "What?", "a cup"),
        ({"messages": [{"role": "developer", "content": "Be brief."}, USER, SAID]}, "Be brief.\n\nWhat?", "a cup"),
        ({"messages": [USER, SAID], "solution": "coffee"}, "What?", "coffee"),
        ({"conversations": [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "so"}]}, "Hm?", "so"),
        ({"messages": json.dumps([USER, SAID])}, "What?", "a cup"),
        ({"prompt": [USER], "completion": [SAID]}, "What?", "a cup"),
        ({"prompt": "What?", "completion": " a cup"}, "What?", "a cup"),
        ({"query": "What?", "response": "a cup"}, "What?", "a cup"),
        ({"messages": [USER]}, "What?", None),
    ],
)
def test_chats(tmp_path: Path, row: dict[str, Any], text: str, answer: str | None) -> None:
    (prompt,) = read(tmp_path, row)
    assert (prompt.text, prompt.answer) == (text, answer)
    assert prompt.segments == (("image",) if answer is None else ("text",))


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([USER, SAID, USER, SAID], "2 turns and 2 answers; .* a row of its own"),
        ([SAID, USER], "at most one answer behind it"),
        ([SAID], "0 turns"),
        ([{"role": "tool", "content": "x"}, USER], "role 'tool'"),
        ([{"content": "x"}], "role 'None'"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "expected type 'text' or 'image'"),
        ([{"role": "user", "content": 3}], "whose content is 3"),
    ],
)
def test_chats_that_are_none(turns: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_chat(turns, "messages")


def test_a_round_too_many_names_its_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: column 'messages' must hold one turn"):
        read(tmp_path, {"messages": [USER, SAID]}, {"messages": [USER, SAID, USER, SAID]})
    with pytest.raises(DataError, match="line 2: column 'messages' ends without an answer"):
        read(tmp_path, {"messages": [USER, SAID]}, {"messages": [USER]})


def test_pictures_in_the_parts_of_a_chat(tmp_path: Path) -> None:
    (tmp_path / "cup.jpg").write_bytes(encoded("coffee.jpg"))
    for part in (
        {"type": "image", "image": "cup.jpg"},
        {"type": "image", "image": f"file://{tmp_path}/cup.jpg"},
        {"type": "image_url", "image_url": {"url": "cup.jpg"}},
    ):
        (prompt,) = read(
            tmp_path, {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}, SAID]}
        )
        assert prompt.images[0] == (tmp_path / "cup.jpg").resolve() and prompt.text == "?"


# Chains ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["B", "dog", 1, "(b)"])
def test_a_chain_is_told_its_options_and_which_text_is_right(tmp_path: Path, answer: object) -> None:
    row = {"prompt": "Which?", "choices": ["cat", "dog"], "answer": answer, "segments": "text"}
    (prompt,) = load_prompts(write_lines(tmp_path / "train.jsonl", [row]))
    assert (prompt.text, prompt.answer, prompt.options) == ("Which?\nA. cat\nB. dog", "dog", ("cat", "dog"))


@pytest.mark.parametrize(
    ("prompt", "added"), [("cat or dog?", False), ("In the catalogue of dogs, which?", True), ("Which?\nA. cat", True)]
)
def test_a_chain_that_does_not_name_its_options_is_given_them(tmp_path: Path, prompt: str, added: bool) -> None:
    row = {"prompt": prompt, "choices": ["cat", "dog"], "answer": "dog", "segments": "text"}
    (read_prompt,) = load_prompts(write_lines(tmp_path / "train.jsonl", [row]))
    assert read_prompt.text == prompt + "\nA. cat\nB. dog" * added


@pytest.mark.parametrize("answer", ["cow", ["A", "B"], 2])
def test_a_chain_whose_answer_is_none_of_its_options(tmp_path: Path, answer: object) -> None:
    row = {"prompt": "Which?", "choices": ["cat", "dog"], "answer": answer, "segments": "text"}
    with pytest.raises(DataError, match="line 1: column 'answer'"):
        load_prompts(write_lines(tmp_path / "train.jsonl", [row]))


# Parts ----------------------------------------------------------------------------------------------------------------


def test_lists_that_are_written_as_text() -> None:
    assert (
        list_in("['a' 'b']") == list_in("['a', 'b']") == list_in('["a", "b"]') == list_in("['a'\n 'b']") == ["a", "b"]
    )
    assert list_in("[1, 2]") == [1, 2] and list_in("{'A': 'x'}") == {"A": "x"} and list_in("[]") == []
    for text in ("a", "[a]", "[", "__import__('os')", "[__import__('os')]", "[" * 9000 + "]" * 9000, "(1, 2)"):
        assert list_in(text) is None


def test_letters_of_several() -> None:
    assert letters_in("ACD", 4) == ("A", "C", "D") and letters_in("A; C", 3) == ("A", "C")
    for text in ("CA", "AA", "AE", "A", "and", "ABLE", "A, dog"):
        assert letters_in(text, 4) == (), text


def test_a_label_is_a_label_before_it_is_an_index() -> None:
    choices = Choices(("red", "blue"), ("1", "2"), "options")
    assert by_number(1, choices, "answer") == "A" and by_number(2, choices, "answer") == "B"


def test_long_texts_take_no_time() -> None:
    for text in ("(A) " * 20_000, "A. " + " " * 60_000 + "x", "A" * 60_000, "（A）" * 20_000 + "x"):
        options_in(text)
        letters_in(text, 26)
