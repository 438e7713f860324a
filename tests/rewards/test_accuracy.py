"""The accuracy reward: the paper's rules, the released code's as they are, and errors that name the row."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncr1.engine.errors import RewardError
from syncr1.engine.rewards.builtin.accuracy import AccuracyReward, soft_jaccard

OPTIONS = ("cat", "dog", "bird")


def tagged(answer: str) -> str:
    return f"<think>hm</think><answer>{answer}</answer>"


def one(text: str, answer: str | None, variant: Any = "paper", **row: Any) -> float | None:
    columns = {"segments": ("text",), "options": (), "qa_type": "OE", **row}
    reward = AccuracyReward(variant)
    return reward(completions=[text], answer=[answer], **{name: [value] for name, value in columns.items()})[0]


@pytest.mark.parametrize(
    ("said", "right", "expected"),
    [
        ("dog", "dog", 1.0),
        ("Dog", "dog", 1.0),
        ("two dogs", "2 dogs.", 1.0),
        ("", "dog", 0.0),
        ("o", "dog", 0.0),
        ("dog cat", "dog", 0.0),
        ("None", "dog", 0.0),
    ],
)
def test_open_ended(said: str, right: str, expected: float) -> None:
    assert one(tagged(said), right) == expected
    assert one(tagged(said), f"<answer>{right}</answer>") == expected
    assert one(tagged(said), right, qa_type=None) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [("B", 1.0), ("(b)", 1.0), ("B. dog", 1.0), ("dog", 1.0), ("A", 0.0), ("D", 0.0), ("", 0.0), ("A. dog", 0.0)],
)
def test_multiple_choice(said: str, expected: float) -> None:
    row = {"qa_type": "MC", "options": OPTIONS}
    assert one(tagged(said), "B", **row) == one(tagged(said), "dog", **row) == expected


def test_paper_reads_tags_only() -> None:
    assert one("dog", "dog") == one("<answer>dog", "dog") == one("", "dog") == 0.0
    assert one("<answer>dog</answer>", "dog") == 1.0, "the format is another reward's business"
    assert one("<answer>dog</answer><answer>cat</answer>", "dog") == 0.0, "the last block is the verdict"


def test_kinds_differ_from_row_to_row() -> None:
    rewards = AccuracyReward()(
        completions=[tagged("B"), tagged("B"), tagged("b"), "", ""],
        answer=["B", "bee", "b", None, None],
        options=[OPTIONS, (), (), (), ()],
        qa_type=["MC", "OE", None, None, None],
        segments=[("text",)] * 3 + [("image",), ("text", "image")],
    )
    assert rewards == [1.0, 0.0, 1.0, None, None]


def test_without_columns_of_questions_answers_are_texts() -> None:
    assert AccuracyReward()(completions=[tagged("2")], answer=["two"], segments=[("text",)]) == [1.0]


@pytest.mark.parametrize(
    ("answer", "row", "problem"),
    [
        (None, {}, "ground truth is None"),
        ("", {}, "ground truth is ''"),
        ("<answer> </answer>", {}, "ground truth"),
        ("E", {"qa_type": "MC", "options": OPTIONS}, "'E' is none of 3 options"),
        ("fish", {"qa_type": "MC", "options": OPTIONS}, "'fish' is none of 3 options"),
        ("B", {"qa_type": ["MC"]}, r"got \['MC'\]"),
        ("B", {"qa_type": "mc"}, "got 'mc'"),
    ],
)
def test_bad_data_is_an_error_that_names_the_row(answer: str | None, row: dict[str, Any], problem: str) -> None:
    good = {"completions": tagged("dog"), "answer": "dog", "segments": ("text",), "options": (), "qa_type": "OE"}
    bad = {**good, "answer": answer, **row}
    columns: Any = {name: [good[name], bad[name]] for name in good}
    with pytest.raises(RewardError, match=problem) as caught:
        AccuracyReward()(**columns, id=["train/0", "train/1"])
    assert caught.value.index == 1 and "train/1" in str(caught.value)


def test_unknown_variant() -> None:
    with pytest.raises(ValueError, match="'paper' or 'released'"):
        AccuracyReward("best")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "right", "expected"),
    [
        (tagged("Dog."), "dog", 1.0),
        (tagged("two"), "2", 1.0),
        (tagged("2"), "Two", 1.0),
        (tagged("twenty one"), "21", 0.0),
        ("dog", "dog", 1.0),
        ("<think>x</think>Answer: dog", "dog", 1.0),
        ("<answer>dog\n</answer>", "dog", 1.0),
        ("<answer>cat</answer><answer>dog</answer>", "dog", 0.0),
        (tagged("the dog"), "dog", 0.5),
        (tagged("a brown dog!"), "brown dog", 2 / 3),
        (tagged("B."), "B", 1.0),
        (tagged("B. dog"), "B", 0.0),
        (tagged("B or C"), "B", 1 / 3),
        (tagged(""), "dog", 0.0),
    ],
)
def test_released_scores_as_ulm_r1_does_for_both_kinds(text: str, right: str, expected: float) -> None:
    for row in ({"qa_type": "OE"}, {"qa_type": "MC", "options": OPTIONS}):
        assert one(text, right, "released", **row) == pytest.approx(expected)


def test_released_finds_the_block_that_its_regular_expression_finds() -> None:
    soup = ["<answer>", "</answer>", "\n", "cat", " "]
    for number in range(5**5):
        text = "".join(soup[number // 5**place % 5] for place in range(5))
        found = re.search(r"<answer>(.*?)</answer>", text)
        if found:
            expected = 1.0 if found.group(1).strip() == "cat" else soft_jaccard(found.group(1).strip(), "cat")
            assert one(text, "cat", "released") == expected, text


TEXTS = st.lists(st.sampled_from(["colour", "color", "colours", "cool", "a", "A", "dog", "dogs", "犬"]), max_size=6)
PHRASES = TEXTS.map(" ".join)


@given(PHRASES, PHRASES)
def test_soft_jaccard_is_bounded_and_symmetric(a: str, b: str) -> None:
    value = soft_jaccard(a, b)
    assert 0.0 <= value <= 1.0
    assert value == pytest.approx(soft_jaccard(b, a), abs=1e-12)
    assert soft_jaccard(a, b, threshold=1.0) <= value + 1e-12


@given(st.text())
def test_soft_jaccard_of_equal_texts_is_one(text: str) -> None:
    assert soft_jaccard(text, text.upper().lower()) == soft_jaccard(text.upper().lower(), text)
    assert soft_jaccard(text, text) == (1.0 if text.split() else 0.0)


def test_soft_jaccard_is_its_formula() -> None:
    likeness = SequenceMatcher(None, "color", "colour").ratio()
    assert soft_jaccard("red color", "Red colour") == pytest.approx((1 + likeness) / (4 - 1 - likeness))
    assert soft_jaccard("", "") == soft_jaccard("dog", "") == soft_jaccard("dog", "cat") == 0.0
    assert soft_jaccard("color colours", "colour") == pytest.approx(12 / 13 / (3 - 12 / 13)), "a word is matched once"


@given(st.text(), st.text(), st.sampled_from(["paper", "released"]), st.sampled_from(["MC", "OE", None]))
def test_accuracy_is_between_zero_and_one(text: str, answer: str, variant: str, kind: str | None) -> None:
    for completion in (text, tagged(text)):
        try:
            value = one(completion, answer, variant, qa_type=kind, options=(answer, "x"))
        except RewardError:
            assert not answer.strip() or kind == "MC" or "<answer>" in answer
        else:
            assert value is not None and 0.0 <= value <= 1.0


@given(st.text(alphabet=st.characters(exclude_characters="<")).filter(str.strip))
def test_the_ground_truth_itself_is_right_in_any_case(answer: str) -> None:
    assert one(tagged(answer), answer) == 1.0
    assert one(tagged(answer.upper()), answer.upper().lower()) in (0.0, 1.0)
    if answer.isascii():
        assert one(tagged(answer.upper()), answer) == one(tagged(answer.lower()), answer) == 1.0
