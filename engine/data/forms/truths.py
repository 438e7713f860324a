"""What is right: one answer, several of which any will do, or the letters of one or more options.

A list of answers of an open-ended question (VQA's annotators, MMMU's spellings) is right by any of them; a list of
options is a question of which all must be chosen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import DataError, shown
from ..questions import answer_of, letter_of
from .choices import Choices, Meaning, by_number, letter_by_label, letters_in, list_in

INNER = ("ground_truth", "target", "answer", "text")
"""Where an object that is an answer has it: verl's `reward_model`, Search-R1, VQA's annotators, SQuAD."""
LONE_LETTER = re.compile(r"[(（]?[A-Za-z][)）]?[.:]?")
LONGEST = 200
"""Characters of an answer that may be several letters."""
DIGITS = 18
"""Of a whole number that a table of texts holds."""


@dataclass(frozen=True)
class Truths:
    """How a table says what is right."""

    column: str
    untyped: bool = False
    """It has no numbers: digits may be an index."""
    numbers: Meaning | None = None
    """What numbers are, where some rows leave only one meaning; None: each row must tell by itself."""


def inner(value: Any) -> Any:
    """An answer out of the objects that hold it; None for what stands for none: an empty text or list, NaN.

    An object that holds it under none of the known names stays, to be told of."""
    for _ in range(len(INNER)):
        if not isinstance(value, Mapping):
            break
        unknown = value if any(item is not None for item in value.values()) else None
        value = next((value[name] for name in INNER if name in value), unknown)
    if isinstance(value, float) and math.isnan(value):
        return None
    return None if isinstance(value, str | list | tuple) and len(value) == 0 else value


def is_empty(value: Any) -> bool:
    """Whether a cell of answers says nothing; a text of spaces says something wrong."""
    return inner(value) is None


def several_in(value: Any) -> list[Any]:
    """The entries of a list of answers, also of one that is written as text with quotes; [value] for any other."""
    value = inner(value)
    if isinstance(value, str) and any(mark in value for mark in "'\""):
        written = list_in(value)
        value = written if isinstance(written, list) and written else value
    return [inner(item) for item in value] if isinstance(value, list | tuple) else [value]


def answers_of(value: Any, column: str) -> tuple[str, ...]:
    """The right answers of an open-ended question, the one that is said most often first.

    Raises:
        DataError: one of them is no text or number, or there is none.
    """
    found = [answer_of(item, column) for item in several_in(value)]
    if not found:
        raise DataError(f"column {column!r} must be one answer, text or a number, got {shown(value)}")
    return tuple(sorted(dict.fromkeys(found), key=lambda answer: -found.count(answer)))


def letters_of(value: Any, choices: Choices, truths: Truths) -> tuple[str, ...]:
    """The letters of the right options, in their order; () where the answer names none of them.

    Args:
        value: a letter, a label, an option's text, an index, or a list of these.
        choices: the options.
        truths: where the answer stands, and what its numbers are.

    Raises:
        DataError: a number is the index of no option, or could mean two of them.
    """
    found: list[str] = []
    for item in several_in(value):
        letters = _letters_of(item, choices, truths)
        if not letters:
            return ()
        found += letters
    return tuple(sorted(set(found)))


def whole_number(value: Any, untyped: bool) -> int | None:
    """The whole number that a cell is; of a table without numbers, also digits."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if untyped and isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= DIGITS:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _letters_of(value: Any, choices: Choices, truths: Truths) -> tuple[str, ...]:
    number = whole_number(value, truths.untyped)
    if number is not None:
        return (by_number(number, choices, truths.column, truths.numbers),)
    answer = answer_of(value, truths.column)
    lettered = choices.labels == tuple(chr(ord("A") + index) for index in range(len(choices.labels)))
    letter = (None if lettered else letter_by_label(answer, choices)) or letter_of(answer, choices.texts)
    if letter is not None:
        return (letter,)
    return letters_in(answer, len(choices.texts)) if len(answer) <= LONGEST else ()


def is_lone_letter(answer: str) -> bool:
    """`B`, `(B)`, `b.`: what names an option and nothing else; a digit or a word may be an answer of its own."""
    return LONE_LETTER.fullmatch(answer.strip()) is not None


def joined(letters: Sequence[str]) -> str:
    """Several letters as one answer, for people to read."""
    return ", ".join(letters)
