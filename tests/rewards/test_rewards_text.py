"""R_txt: character BLEU against NLTK, the option form against its formula, and odd texts."""

from __future__ import annotations

import random
import time

import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from syncr1.engine.rewards.builtin.text import brier_among, char_bleu, normalise, text_reward

CHAIN = ("text", "image")


def nltk_bleu(reference: str, candidate: str) -> float:
    method = SmoothingFunction().method1
    return float(sentence_bleu([list(reference)], list(candidate), weights=(0.7, 0.3), smoothing_function=method))


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        ("a red hat", "a red hat"),
        ("a red hat", "a red"),
        ("a red hat", "the red hat of bobo"),
        ("yes", "no"),
        ("yes", "y"),
        ("a", "a"),
        ("abab", "bbbb"),
        ("红色的帽子", "红帽子"),
        ("🎩 hat", "hat 🎩"),
    ],
)
def test_char_bleu_equals_nltk(reference: str, candidate: str) -> None:
    assert char_bleu(reference, candidate) == pytest.approx(nltk_bleu(reference, candidate), abs=1e-12)


def test_char_bleu_equals_nltk_on_random_texts() -> None:
    rng = random.Random(0)
    for _ in range(200):
        reference, candidate = ("".join(rng.choices("ab ", k=rng.randint(1, 12))) for _ in range(2))
        assert char_bleu(reference, candidate) == pytest.approx(nltk_bleu(reference, candidate), abs=1e-12)


def test_char_bleu_of_empty_texts_is_zero() -> None:
    assert char_bleu("red", "") == char_bleu("", "red") == char_bleu("", "") == 0.0


def test_char_bleu_is_quick_on_long_texts() -> None:
    start = time.perf_counter()
    value = char_bleu("red hat " * 1250, "blue cap " * 1250)
    assert 0.0 < value < 1.0
    assert time.perf_counter() - start < 0.2


def test_text_reward_on_answers_of_all_sorts() -> None:
    rewards = text_reward(
        completions=["red", "", "red", "红色", "x" * 10_000, "red"],
        answer=["red", "red", None, "红色", "red", "red"],
        options=[()] * 6,
        segments=[CHAIN] * 5 + [("image",)],
    )
    assert rewards[:4] == [pytest.approx(1.0), 0.0, None, pytest.approx(1.0)]
    assert rewards[4] == 0.0
    assert rewards[5] is None, "an image-only trajectory said nothing"


OPTIONS = ("likes red apples", "sleeps until noon", "lives by the sea")


def test_options_follow_the_released_formula() -> None:
    text = "it lives near the sea"
    scores = [nltk_bleu(option, text) for option in OPTIONS]
    shares = [value / sum(scores) for value in scores]
    distance = sum((share - target) ** 2 for share, target in zip(shares, (0, 0, 1), strict=True))
    expected = max(0.0, 2 * ((2 - distance) / 2 - 0.5))
    assert brier_among(OPTIONS, 2, text) == pytest.approx(expected)
    assert brier_among(OPTIONS, 2, text) > brier_among(OPTIONS, 0, text)


def test_options_edge_cases() -> None:
    assert brier_among(OPTIONS, 0, "") == 0.0
    assert brier_among(OPTIONS, 0, "红") == 0.0
    assert brier_among(("only one",), 0, "only one") == pytest.approx(1.0)
    rewards = text_reward(completions=["sleeps until noon"], answer=[OPTIONS[1]], options=[OPTIONS], segments=[CHAIN])
    assert 0.0 < rewards[0] <= 1.0  # type: ignore[operator]
    with pytest.raises(ValueError, match="not among the options"):
        text_reward(completions=["x"], answer=["elsewhere"], options=[OPTIONS], segments=[CHAIN])


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("dog", "Dog.", 1.0),
        ("dog", "  ＤＯＧ ", 1.0),
        ("dog", "o", 0.0),
        ("dog", "", 0.0),
        ("don't", "dont", 0.0),
        ("3.5", "35", 0.0),
        ("<bobo>", "<bobo>", 1.0),
        ("!", "?", 1.0),
    ],
)
def test_normalise(answer: str, text: str, expected: float) -> None:
    assert float(normalise(text) == normalise(answer)) == expected


def test_normalise_is_quick_on_punctuation() -> None:
    start = time.perf_counter()
    normalise("<" * 50_000 + "x")
    normalise("a<" * 50_000)
    assert time.perf_counter() - start < 0.5
