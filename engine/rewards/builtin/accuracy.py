"""R_acc: is the answer in the tags right?  Multiple choice (MC) by letter, open-ended (OE) by what it says.

Which answers are right is said in docs/answers.md. A question whose options are known is compared by option, whatever
its kind, so that the letter and the text of an option are worth the same.

`paper` is binary, as in CoRL's eq. 5. `released` is what ULM-R1's code computes: the first `<answer>` block, or without
one the text stripped of tags; 1 if equal up to case, a final stop or one number word, else soft-Jaccard, for *both*
kinds, because its `qa_type == "MC"` compares a list with a string and is never true.

Source: CoRL and ULM-R1's `rewards/r_base.py`, `rewards/r_utils.py`; rewritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, Literal

from ...answers.letter_sets import chosen_letters
from ...answers.letters import chosen_letter, true_letter
from ...answers.plain_texts import NUMBER_WORDS
from ...answers.same import same_answer
from ...errors import RewardError
from ...records import SegmentKind
from .tags import ANSWER, ANSWER_END, THINK, THINK_END, answer_of

Variant = Literal["paper", "released"]

MOST_PAIRS = 100_000
"""Of words that are compared letter by letter: beyond, only equal words count. 500 words against 200 are as many."""
MOST_LETTERS = 1000
"""Of such a word. Both bounds keep a text that a policy or a table fills without end from taking minutes."""


class AccuracyReward:
    """1 for a right answer, 0 for a wrong one; `released` also gives what lies between."""

    def __init__(self, variant: Variant = "paper") -> None:
        if variant not in ("paper", "released"):
            raise ValueError(f"accuracy reward: expected variant 'paper' or 'released', got {variant!r}")
        self.variant = variant
        self.__name__ = "accuracy"

    def __call__(
        self,
        *,
        completions: Sequence[str],
        answer: Sequence[str | None],
        segments: Sequence[tuple[SegmentKind, ...]],
        options: Sequence[Sequence[str]] | None = None,
        qa_type: Sequence[str | None] | None = None,
        right_answers: Sequence[Sequence[str]] | None = None,
        id: Sequence[str] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """One value in [0, 1] per trajectory; None without a text segment or without a question.

        Args:
            completions: the texts; the answer is read from their tags.
            answer: the ground truth: a letter (MC) or a text (OE), in `<answer>` tags or not.
            segments: what each prompt produces.
            options: the texts of A, B, C, …; may be empty: then MC compares letters, and OE texts.
            qa_type: per row; None with a ground truth is read as OE, None without one is no question.
            right_answers: per row, all that is right where it is several: texts of which any will do (OE), or the
                letters that must all be chosen and no other (MC).
            id: names of the prompts, for errors.

        Raises:
            RewardError: a question without a ground truth, an unknown `qa_type`, or an MC ground truth that is none of
                its options; with the row.
        """
        count = len(completions)
        choices: Sequence[Sequence[str]] = options or [()] * count
        kinds: Sequence[str | None] = qa_type or [None] * count
        several: Sequence[Sequence[str]] = right_answers or [()] * count
        rewards: list[float | None] = []
        for index, row in enumerate(zip(completions, answer, segments, choices, kinds, strict=True)):
            try:
                rewards.append(self._best(row, several[index]) if several[index] else self._score(*row))
            except ValueError as error:
                which = f" (prompt {id[index]!r})" if id else ""
                raise RewardError(self.__name__, index, f"{error}{which}") from None
        return rewards

    def _best(
        self,
        row: tuple[str, str | None, tuple[SegmentKind, ...], Sequence[str], str | None],
        several: Sequence[str],
    ) -> float | None:
        """Of a question with several right answers: the best of them, or whether all letters were chosen."""
        text, _, segments, options, kind = row
        if kind == "MC" and "text" in segments:
            return float(chosen_letters(answer_of(text) or "", options) == set(several))
        scores = [self._score(text, answer, segments, options, kind) for answer in several]
        return max((score for score in scores if score is not None), default=None)

    def _score(
        self,
        text: str,
        answer: str | None,
        segments: tuple[SegmentKind, ...],
        options: Sequence[str],
        qa_type: str | None,
    ) -> float | None:
        if "text" not in segments or (answer is None and qa_type is None):
            return None
        if qa_type not in ("MC", "OE", None):
            raise ValueError(f"expected qa_type 'MC', 'OE' or None, got {qa_type!r}")
        right = "" if answer is None else answer.strip()
        tagged = answer_of(right)
        right = right if tagged is None else tagged
        if not right:
            raise ValueError(f"a question ({qa_type}) whose ground truth is {answer!r}; give one or drop the row")
        if self.variant == "released":
            return _released(text, right)
        said = answer_of(text) or ""
        letter = true_letter(right, options) if options or qa_type == "MC" else None
        if letter is not None:
            return float(chosen_letter(said, options, letter) == letter)
        if qa_type == "MC":
            raise ValueError(f"the ground truth {right!r} is none of {len(options)} options; expected A, B, …")
        return float(same_answer(said, right))


def _released(text: str, right: str) -> float:
    said = _first_answer(text)
    if said is None:
        said = _without_tags(text)
    if _released_equal(said, right):
        return 1.0
    return soft_jaccard(said.rstrip(".,!?"), right)


def _first_answer(text: str) -> str | None:
    """What `<answer>(.*?)</answer>` finds first: a block within one line; line by line, so that it stays linear."""
    for line in text.split("\n"):
        start = line.find(ANSWER)
        end = line.find(ANSWER_END, start) if start >= 0 else -1
        if end >= 0:
            return line[start + len(ANSWER) : end].strip()
    return None


def _without_tags(text: str) -> str:
    """ULM-R1's fallback: the text without its thinking, tags and the word `Answer`."""
    parts, at = [], 0
    while (start := text.find(THINK, at)) >= 0 and (end := text.find(THINK_END, start)) >= 0:
        parts.append(text[at:start])
        at = end + len(THINK_END)
    text = "".join([*parts, text[at:]])
    for mark in (THINK, THINK_END, ANSWER, ANSWER_END, "Answer:", "Answer"):
        text = text.replace(mark, "")
    return text.strip()


def _released_equal(said: str, right: str) -> bool:
    said, right = said.rstrip(".").lower().strip(), right.lower().strip()
    as_digits = {word: str(value) for word, value in NUMBER_WORDS.items()}
    return said == right or as_digits.get(said, said) == right or as_digits.get(right, right) == said


def soft_jaccard(a: str, b: str, threshold: float = 0.8) -> float:
    """Jaccard index of two sets of words in which near-equal words count by their likeness.

        m / (|A| + |B| - m),   m = |A ∩ B| + sum of likenesses >= threshold, each word matched once

    Likeness is difflib's ratio. The released code pairs words in the order of a Python set, which differs from process
    to process; here the likest pair goes first, so that the value is the same on every rank, and symmetric.

    Args:
        a, b: texts; words are split at white space, case does not count.
        threshold: the least likeness that counts, in (0, 1].

    Returns:
        In [0, 1]; 1 for equal sets of words, 0 where both are empty.

    Source: ULM-R1's `r_utils.py:soft_jaccard`.
    """
    first, second = set(a.lower().split()), set(b.lower().split())
    shared = first & second
    matched = float(len(shared))
    left, right = first - shared, second - shared
    used: set[tuple[int, str]] = set()
    for likeness, one, other in sorted(_likenesses(left, right, threshold), key=lambda x: (-x[0], sorted(x[1:]))):
        if (0, one) not in used and (1, other) not in used:
            used |= {(0, one), (1, other)}
            matched += likeness
    union = len(first) + len(second) - matched
    return matched / union if union else 0.0


def _likenesses(left: set[str], right: set[str], threshold: float) -> list[tuple[float, str, str]]:
    """Pairs of words whose ratio reaches the threshold; difflib's ratio is not symmetric, so the greater one counts."""
    pairs: list[tuple[float, str, str]] = []
    if len(left) * len(right) > MOST_PAIRS:
        return pairs
    right = {word for word in right if len(word) <= MOST_LETTERS}
    for other in right:
        matcher, mirrored = SequenceMatcher(None, "", other), SequenceMatcher(None, other, "")
        for one in left:
            # Bounds from the lengths alone: nearly all pairs, and words of absurd length, skip the slow comparison.
            if 2 * min(len(one), len(other)) < threshold * (len(one) + len(other)):
                continue
            matcher.set_seq1(one)
            if matcher.quick_ratio() < threshold:
                continue
            mirrored.set_seq2(one)
            likeness = max(matcher.ratio(), mirrored.ratio())
            if likeness >= threshold:
                pairs.append((likeness, one, other))
    return pairs
