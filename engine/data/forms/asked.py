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

from ...errors import DataError, shown
from ..questions import letter_of
from .choices import Choices, choices_of
from .lettered import options_in, with_options
from .truths import answers_of, is_lone_letter, joined, letters_of, several_in

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


def read_question(
    row: Mapping[str, Any], text: str, value: Any, column: str, *, kind: Kind | None = None, untyped: bool = False
) -> Asked:
    """The question of a row.

    Args:
        row: where options and a hint may stand.
        text: the question.
        value: what is right, as the data have it.
        column: where that stands.
        kind: what the data call it; None: they do not say.
        untyped: the table has no numbers.

    Raises:
        DataError: the answer names none of the options, or what it means is not clear; names the column.
    """
    if kind == "OE":
        return _open(text, value, column)
    given = choices_of(row)
    if given is None:
        return _from_text(text, value, column, kind, untyped)
    letters = letters_of(value, given, column, untyped=untyped)
    if not letters:
        raise _none_of(value, column, given.texts)
    hint = row.get(HINT)
    if isinstance(hint, str) and hint.strip() and hint.strip().casefold() != "nan":
        text = f"{hint.strip()}\n{text}"
    if not options_in(text):
        text = with_options(text, given.texts)
    return _choice(text, letters, given.texts)


def _from_text(text: str, value: Any, column: str, kind: Kind | None, untyped: bool) -> Asked:
    """Options, if any, stand in the question."""
    options = options_in(text)
    if not options:
        if kind is None:
            return _open(text, value, column)
        letters = tuple(letter_of(answer, ()) or "" for answer in answers_of(value, column))
        if not all(letters):
            raise DataError(
                f"column {column!r}: the answer {shown(value)} is not among a letter, and the question lists no "
                "options; correct it"
            )
        return _choice(text, tuple(sorted(letters)), ())
    listed = Choices(options, tuple(chr(ord("A") + index) for index in range(len(options))), "question")
    _check_number(value, listed, column, untyped)
    letters = letters_of(value, listed, column) if not _is_number(value) else _by_text(value, listed)
    if letters:
        return _choice(text, letters, options)
    if kind == "MC" or is_lone_letter(answers_of(value, column)[0]):
        raise _none_of(value, column, options)
    return _open(text, value, column)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _by_text(value: Any, listed: Choices) -> tuple[str, ...]:
    letter = letter_of(f"{value:g}" if isinstance(value, float) else str(value), listed.texts)
    return () if letter is None else (letter,)


def _check_number(value: Any, listed: Choices, column: str, untyped: bool) -> None:
    """A number that could be the index of an option which a text lists, or an answer of its own, is asked about."""
    if untyped and isinstance(value, str) and value.strip().isdecimal() and len(value) < 3:
        value = int(value)
    if _is_number(value) and 0 <= value < len(listed.texts) and not _by_text(value, listed):
        raise DataError(
            f"column {column!r}: {value} may be the index of an option in the question, or an answer of its own; write "
            "the option's letter, or qa_type OE"
        )


def _open(text: str, value: Any, column: str) -> Asked:
    answers = answers_of(value, column)
    return Asked(text, "OE", answers[0], answers if len(answers) > 1 else ())


def _choice(text: str, letters: tuple[str, ...], options: tuple[str, ...]) -> Asked:
    return Asked(text, "MC", joined(letters), letters if len(letters) > 1 else (), options)


def _none_of(value: Any, column: str, options: tuple[str, ...]) -> DataError:
    told = value if len(several_in(value)) == 1 else list(several_in(value))
    return DataError(
        f"column {column!r}: the answer {shown(told)} is not among the options {shown(list(options), 200)}; "
        "correct it, or say qa_type OE if the question is open-ended"
    )
