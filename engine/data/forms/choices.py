"""Options in columns of their own, in every dress that published sets give them, and which of them are right.

| options | published by |
|---|---|
| `choices` or `options`: a list of texts or numbers, or one written as text | ScienceQA, A-OKVQA, MMMU, MathVista |
| an object, label -> text | M3Exam-like sets |
| `{"text": [...], "label": [...]}` | ARC, OpenBookQA, CommonsenseQA |
| columns `A`, `B`, `C`, … or `option_a`, `choice_b`, … | MMBench, SEED |

A truth is a letter, a label, an option's text, an index counted from 0, or several of these. A number that is both an
index and another option's text is asked about.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from ...errors import DataError, shown
from .lettered import LINE, options_in

OPTION_COLUMNS = ("options", "choices")
LINE_COLUMN = "option"
"""We-Math's: all options in one text."""
INDEX_COLUMNS = ("answer_index", "answer_idx", "correct_choice_idx", "correct_index", "correct_idx")
"""Answers that are indices, counted from 0, whatever the options are."""
LETTER_COLUMN = re.compile(r"(?:(?:option|choice|opt)_?([A-Za-z])|([A-Z]))")
"""A column that holds one option; its letter stands in one of the two groups."""
MOST = 26
EMPTY = ("", "nan", "none", "null")
"""What tables of texts write where a column of options has none."""
LONGEST_LIST = 20_000
"""Characters of a list that is written as text."""
QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
Meaning = Literal["index", "text"]
LETTERS = re.compile(r"[A-Z](?:(?:\s*(?:[,;/&、，；]|和|and)\s*|\s*)[A-Z])+")


@dataclass(frozen=True)
class Choices:
    """The options of one row."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    """What the data call each of them; `A`, `B`, … where they do not say."""
    column: str
    """What errors call them."""


def choices_of(row: Mapping[str, Any]) -> Choices | None:
    """The options of a row, without letters in front; None where it has none."""
    for column in OPTION_COLUMNS:
        if (found := _of_cell(row.get(column), column)) is not None:
            return found
    text = row.get(LINE_COLUMN)
    if isinstance(text, str) and (listed := options_in(text)):
        return Choices(listed, _letters(len(listed)), LINE_COLUMN)
    return _of_columns(row)


def _of_cell(value: Any, column: str) -> Choices | None:
    if isinstance(value, str):
        value = _written(value, column)
    if value is None or (isinstance(value, list | tuple | Mapping) and not value):
        return None
    if isinstance(value, Mapping):
        return _of_object(value, column)
    if not isinstance(value, list | tuple) or len(value) > MOST:
        raise DataError(f"column {column!r} must be a list of at most {MOST} texts, got {type(value).__name__}")
    texts = [_text(item, column) for item in value]
    marks = [found[1] for text in texts if (found := LINE.fullmatch(text))]
    if marks != sorted(marks) and tuple(sorted(marks)) == _letters(len(texts)):
        raise DataError(f"column {column!r} letters its options {', '.join(marks)}; write them in the order of letters")
    lettered = options_in("\n".join(texts))
    return Choices(lettered if len(lettered) == len(texts) else tuple(texts), _letters(len(texts)), column)


def _of_object(value: Mapping[str, Any], column: str) -> Choices | None:
    """Label -> text, or ARC's two lists. Parquet gives every row the keys of all rows: those without a value go."""
    texts, labels = value.get("text", value.get("texts")), value.get("label", value.get("labels"))
    if not (isinstance(texts, list | tuple) and isinstance(labels, list | tuple)):
        pairs = [(label, text) for label, text in value.items() if text is not None]
    elif len(texts) == len(labels):
        pairs = list(zip(labels, texts, strict=True))
    else:
        raise DataError(f"column {column!r} has {len(texts)} texts and {len(labels)} labels; give each option both")
    if len(pairs) > MOST:
        raise DataError(f"column {column!r} must hold at most {MOST} options, got {len(pairs)}")
    labels = tuple(str(label).strip().strip("().:") for label, _ in pairs)
    return Choices(tuple(_text(text, column) for _, text in pairs), labels, column) if pairs else None


@lru_cache(maxsize=64)
def option_columns(names: tuple[str, ...]) -> Mapping[str, str]:
    """Letter -> the column that holds its option; {} where there is no A and B of one kind."""
    kinds: dict[str, dict[str, str]] = {}
    for name in names:
        if found := LETTER_COLUMN.fullmatch(name):
            letter = found[1] or found[2]
            kinds.setdefault(name[: -len(letter)], {})[letter.upper()] = name
    return next((columns for columns in kinds.values() if {"A", "B"} <= set(columns)), {})


def _of_columns(row: Mapping[str, Any]) -> Choices | None:
    columns = option_columns(tuple(row))
    there = {letter: row[name] for letter, name in sorted(columns.items()) if not _missing(row[name])}
    if not there:
        return None
    letters = _letters(len(there))
    if tuple(there) != letters:
        gap = next(letter for letter in letters if letter not in there)
        raise DataError(f"column {columns.get(gap, gap)!r} is empty and options follow it; fill it or move them up")
    return Choices(tuple(_text(there[x], columns[x]) for x in letters), letters, "/".join(columns[x] for x in letters))


def _letters(count: int) -> tuple[str, ...]:
    return tuple(chr(ord("A") + index) for index in range(count))


def _missing(value: Any) -> bool:
    if isinstance(value, float) and math.isnan(value):
        return True
    return value is None or (isinstance(value, str) and value.strip().casefold() in EMPTY)


def _text(value: Any, column: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"column {column!r} must hold texts, got {shown(value)}; write each option as text")
    if not value.strip():
        raise DataError(f"column {column!r} is empty in one option; fill it or drop the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"column {column!r} holds half of a surrogate pair ({error}); write it as UTF-8") from error
    return value.strip()


def _written(text: str, column: str) -> Any:
    """Options that stand in one text: a list or an object as JSON or Python writes it, or lettered lines."""
    if text.strip().casefold() in EMPTY:
        return None
    found = list_in(text)
    if found is None:
        found = options_in(text) or None
    if found is None:
        remedy = 'write ["red", "blue"], or lines "A. red", "B. blue"'
        raise DataError(f"column {column!r} must be a list of at most {MOST} texts, got {shown(text)}; {remedy}")
    return found


def list_in(text: str) -> Any:
    """The list or object that a text holds as JSON, Python or numpy writes it; None for any other text."""
    text = text.strip()
    if not (text[:1] in ("[", "{") and text[-1:] in ("]", "}")) or len(text) > LONGEST_LIST:
        return None
    quoted = QUOTED.findall(text[1:-1]) if text[0] == "[" else []
    try:
        if quoted and not QUOTED.sub("", text[1:-1]).strip(", \n\t"):
            return [ast.literal_eval(item) for item in quoted]  # numpy writes no commas: Python would join the texts
        return json.loads(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        pass
    try:
        found = ast.literal_eval(text)  # of constants alone: nothing is run
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None
    return found if isinstance(found, list | dict) else None


# Which are right ------------------------------------------------------------------------------------------------------


def number_means(value: int, choices: Choices) -> Meaning | None:
    """What a whole number can only be, of these options: an index, or an option's text; None where both are possible.

    A number that is a label, or that is neither, tells nothing.
    """
    if str(value) in choices.labels:
        return None
    same = [index for index, text in enumerate(choices.texts) if _number(text) == value]
    inside = 0 <= value < len(choices.texts)
    if bool(same) == inside:
        return None
    return "index" if inside else "text"


def by_number(value: int, choices: Choices, column: str, meant: Meaning | None = None) -> str:
    """The letter that a whole number means: a label, an option's text, or an index counted from 0.

    `meant`: which of the last two, where other rows of the table tell it.

    Raises:
        DataError: it is none of them, or an index and another option's text.
    """
    number, texts = str(value), choices.texts
    if number in choices.labels:
        return _letters(len(texts))[choices.labels.index(number)]
    same = [index for index, text in enumerate(texts) if _number(text) == value]
    inside = 0 <= value < len(texts)
    if column in INDEX_COLUMNS or meant == "index" or not same:
        if not inside:
            hint = "; indices count from 0" if value == len(texts) else ""
            raise DataError(
                f"column {column!r}: {value} is the index of none of the {len(texts)} options of column "
                f"{choices.column!r}{hint}; correct it, or write the option's letter or text"
            )
        return _letters(len(texts))[value]
    if len(same) > 1 or (inside and same != [value] and meant != "text"):
        first, other = _letters(len(texts))[same[0]], _letters(len(texts))[value] if inside else "none"
        raise DataError(
            f"column {column!r}: {value} is the text of option {first} and the index (from 0) of "
            f"{other}; write the letter, or call the column 'answer_index' if it holds indices"
        )
    return _letters(len(texts))[same[0]]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def letter_by_label(answer: str, choices: Choices) -> str | None:
    """The letter of the option whose label the answer is; None where it is none."""
    labels = [label.casefold() for label in choices.labels]
    folded = answer.strip().strip("().:").casefold()
    return _letters(len(labels))[labels.index(folded)] if labels.count(folded) == 1 else None


def letters_in(answer: str, count: int) -> tuple[str, ...]:
    """The letters of an answer that is several: `A, C`, `A and C`, `ACD`; () for any other."""
    if not LETTERS.fullmatch(answer.strip()):
        return ()
    found = re.findall(r"[A-Z]", re.sub(r"and", "", answer))
    rising = found == sorted(set(found))
    return tuple(found) if rising and all(ord(letter) - ord("A") < count for letter in found) else ()
