"""The format reward: 1 or 0 for a text, None where no text was asked for."""

from __future__ import annotations

import pytest

from syncr1.engine.rewards.builtin.format import format_reward

GOOD = "<think>it barks</think><answer>dog</answer>"


@pytest.mark.parametrize(
    ("text", "kinds", "expected"),
    [
        (GOOD, ("text",), 1.0),
        (f"\n{GOOD} ", ("text", "image"), 1.0),
        ("dog", ("text",), 0.0),
        ("", ("text",), 0.0),
        (f"{GOOD} dog", ("text",), 0.0),
        (GOOD, ("image",), None),
        ("", ("image",), None),
    ],
)
def test_format(text: str, kinds: tuple[str, ...], expected: float | None) -> None:
    assert format_reward(completions=[text], segments=[kinds], prompts=["what is it?"]) == [expected]  # type: ignore[list-item]


def test_spam_of_every_sort_is_zero() -> None:
    spam = ["<think>" * 9600, "<think></think>" * 4500, "<think>" * 4500 + "</answer>" * 4000, GOOD * 1500]
    assert format_reward(completions=spam, segments=[("text",)] * len(spam)) == [0.0] * len(spam)


def test_rows_keep_their_order_and_must_match() -> None:
    assert format_reward(completions=[GOOD, "", "x"], segments=[("text",), ("image",), ("text",)]) == [1.0, None, 0.0]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        format_reward(completions=[GOOD, GOOD], segments=[("text",)])
