"""One question brought together: its text, its options, what kind it is, and what is right.

| the data have | it becomes |
|---|---|
| a column of options, and an answer that names one (or several) | multiple choice; the options stand in the text |
| options in the text, and an answer that names one | multiple choice |
| an answer that names none of a column's options | an error, unless `qa_type` says OE |
| no options | open-ended |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...answers.plain_texts import canonical
from ...errors import DataError, shown
from ..questions import letter_of
from .choices import Choices, choices_of
from .lettered import options_in, shows_options, with_options
from .truths import Truths, answers_of, is_lone_letter, joined, letters_of, several_in, whole_number

Kind = Literal["MC", "OE"]
HINT = "hint"
"""ScienceQA's and MMBench's column of what must be known to choose; it goes before the question, as they publish it."""


@dataclass(frozen=True)
class Asked:
    """What a row asks."""

    text: str
    kind: Kind
    answer: str
    """The letter (MC; several, separated by commas) or the text that is right."""
    several: tuple[str, ...] = ()
    """All that is right, where it is more than one: letters that must all be chosen, texts of which any will do."""
    options: tuple[str, ...] = ()


def read_question(row: Mapping[str, Any], text: str, value: Any, truths: Truths, *, kind: Kind | None = None) -> Asked:
    """The question of a row.

    Args:
        row: where options and a hint may stand.
        text: the question.
        value: what is right, as the data have it.
        truths: where that stands.
        kind: what the data call it; None: they do not say.

    Raises:
        DataError: the answer names none of the options, or what it means is not clear; names the column.
    """
    column = truths.column
    if kind == "OE":
        return _open(text, value, column)
    given = choices_of(row)
    if given is None:
        return _from_text(text, value, truths, kind)
    letters = letters_of(value, given, truths)
    if not letters:
        raise _none_of(value, column, given.texts)
    hint = row.get(HINT)
    if isinstance(hint, str) and hint.strip() and hint.strip().casefold() != "nan":
        text = f"{hint.strip()}\n{text}"
    if not shows_options(text, given.texts, given.column):
        text = with_options(text, given.texts)
    return _choice(text, letters, given.texts)


def _from_text(text: str, value: Any, truths: Truths, kind: Kind | None) -> Asked:
    """Options, if any, stand in the question."""
    options, column = options_in(text), truths.column
    if not options:
        if kind is None:
            return _open(text, value, column)
        letters = tuple(letter_of(answer, ()) or "" for answer in answers_of(value, column))
        if not all(letters):
            raise DataError(
                f"column {column!r}: the answer {shown(value)} is no letter, and the question lists no options; "
                "write the letter, and the options into a column 'options'"
            )
        return _choice(text, tuple(sorted(letters)), ())
    listed = Choices(options, tuple(chr(ord("A") + index) for index in range(len(options))), "question")
    number = whole_number(value, truths.untyped)
    letters = _by_text(number, listed, column) if number is not None else letters_of(value, listed, truths)
    if letters:
        return _choice(text, letters, options)
    if kind == "MC" or is_lone_letter(answers_of(value, column)[0]):
        raise _none_of(value, column, options)
    return _open(text, value, column)


def _by_text(value: int, listed: Choices, column: str) -> tuple[str, ...]:
    """The option of a text whose text a number is; what could be an index or an answer is asked about."""
    letter = letter_of(str(value), listed.texts)
    if letter is None and 0 <= value < len(listed.texts):
        raise DataError(
            f"column {column!r}: {value} may be the index of an option in the question, or an answer of its own; write "
            "the option's letter, or qa_type OE"
        )
    return () if letter is None else (letter,)


def _open(text: str, value: Any, column: str) -> Asked:
    answers = answers_of(value, column)
    return Asked(text, "OE", answers[0], answers if len(answers) > 1 else ())


def _choice(text: str, letters: tuple[str, ...], options: tuple[str, ...]) -> Asked:
    return Asked(text, "MC", joined(letters), letters if len(letters) > 1 else (), options)


def _none_of(value: Any, column: str, options: tuple[str, ...]) -> DataError:
    told = value if len(several_in(value)) == 1 else list(several_in(value))
    plain = canonical(str(told))
    same = [chr(ord("A") + at) for at, option in enumerate(options) if plain and canonical(option) == plain]
    if len(same) > 1:
        return DataError(
            f"column {column!r}: the answer {shown(told)} is the text of the options {' and '.join(same)}; write the "
            "letter, or drop the row"
        )
    return DataError(
        f"column {column!r}: the answer {shown(told)} is not among the options {shown(list(options), 200)}; "
        "correct it, or say qa_type OE if the question is open-ended"
    )
