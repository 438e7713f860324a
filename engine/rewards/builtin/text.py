"""R_txt: how well the text segment agrees with the ground truth.

    one answer       BLEU(answer, t)
    among options    p_i = BLEU(option_i, t) / sum;  d = sum_i (p_i - onehot_i)^2;  max(0, 2 ((2 - d) / 2 - 1/2))

BLEU is over characters (unigrams .7, bigrams .3, NLTK's smoothing method 1), so it works for any script, and half a
word right is worth something. Source: Sync-R1's released code (`grpo.py`, `utils.py:calculate_bleu`); rewritten.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ...records import SegmentKind

WEIGHTS = (0.7, 0.3)
_SMOOTHING = 0.1
"""Method 1's epsilon: the count that an n-gram order without any match is given."""

_PUNCTUATION = re.compile(r"(?<!\w)[^\w\s]+|[^\w\s]+(?!\w)")


def char_bleu(reference: str, candidate: str) -> float:
    """BLEU over characters, as `nltk.sentence_bleu([list(reference)], list(candidate), (.7, .3), method1)`.

    Returns:
        In [0, 1]; 0 for an empty text or one without a shared character. 1 only for equal texts of two characters or
        more: a single character has no bigram, so method 1 gives the equal text .1 ** .3 = .50.
    """
    if not candidate or not reference:
        return 0.0
    log_precision = 0.0
    for order, weight in enumerate(WEIGHTS, start=1):
        matched, total = _overlap(reference, candidate, order)
        if order == 1 and not matched:
            return 0.0
        log_precision += weight * math.log((matched or _SMOOTHING) / max(1, total))
    brevity = min(0.0, 1.0 - len(reference) / len(candidate))
    return math.exp(brevity + log_precision)


def _overlap(reference: str, candidate: str, order: int) -> tuple[int, int]:
    """Clipped number of the candidate's n-grams that the reference has, and their number in all."""
    found: Counter[Any] = Counter(candidate if order == 1 else pairwise(candidate))
    known: Counter[Any] = Counter(reference if order == 1 else pairwise(reference))
    return sum((found & known).values()), len(candidate) - order + 1


def brier_among(options: Sequence[str], right: int, text: str) -> float:
    """Sync-R1's mode `r`: how much of the BLEU mass over `options` lies on the right one, in [0, 1].

    0 when no option shares a character with `text`, or the mass is spread or lies elsewhere (d >= 1).
    """
    scores = [char_bleu(option, text) for option in options]
    total = sum(scores)
    if total == 0.0:
        return 0.0
    distance = sum((score / total - (index == right)) ** 2 for index, score in enumerate(scores))
    return max(0.0, 2.0 * ((2.0 - distance) / 2.0 - 0.5))


def text_reward(
    *,
    completions: Sequence[str],
    answer: Sequence[str | None],
    options: Sequence[tuple[str, ...]],
    segments: Sequence[tuple[SegmentKind, ...]],
    qa_type: Sequence[str | None] | None = None,
    **_: Any,
) -> list[float | None]:
    """R_txt of each trajectory; None without a ground truth or without a text segment, and where the truth is a letter
    (`qa_type` MC), which BLEU has nothing to say about.

    Raises:
        ValueError: a prompt has options, and its answer is not one of them.
    """
    kinds = qa_type or [None] * len(completions)
    rows = zip(completions, answer, options, segments, strict=True)
    return [None if kind == "MC" else _text_reward(*row) for row, kind in zip(rows, kinds, strict=True)]


def _text_reward(
    text: str, answer: str | None, options: tuple[str, ...], segments: tuple[SegmentKind, ...]
) -> float | None:
    if answer is None or "text" not in segments:
        return None
    if not options:
        return char_bleu(answer, text)
    if answer not in options:
        raise ValueError(f"text reward: the answer {answer!r} is not among the options {options!r}")
    return brier_among(options, options.index(answer), text)


def normalise(text: str) -> str:
    """Case, width (NFKC), outer punctuation and runs of white space removed; `3.5` and `don't` keep their inner
    mark."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_PUNCTUATION.sub(" ", plain).split())
