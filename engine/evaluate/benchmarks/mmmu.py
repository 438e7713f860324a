"""MMMU: questions of 30 college subjects, most of them multiple choice. Accuracy over all, and per discipline.

    layout      MMMU/MMMU on the hub: a configuration per subject with id, question, options (a list written in Python),
                image_1 … image_7, answer, question_type, subfield; downloaded: a folder per subject

Prompts are MMMU's own (`mmmu/configs/llava1.5.yaml`), answers are read by its rules (`mmmu/utils/eval_utils.py`), save
that nothing is guessed. Rewritten.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...data.forms.choices import list_in
from ...errors import DataError, shown
from ...records import Prompt
from ...show.measured import Measured
from ..graders import Graders, Kept
from ..store import Item
from .asking import BY_LETTER, BY_WORDS, Asked, lettered, question
from .benchmark_outcome import PER_CENT, Outcome, Scored, mean_part
from .free_answers import last_choice, said
from .layouts import Row, Source, table_rows

SUBJECTS: Mapping[str, tuple[str, ...]] = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
"""Disciplines and their subjects, which are the set's configurations."""
_ALL = [subject for subjects in SUBJECTS.values() for subject in subjects]
_OF_ID = re.compile(r"[a-z]+_(?P<subject>\w+)_\d+")


def load(source: Source) -> list[Prompt]:
    """Its questions.

    Raises:
        DataError: nothing of the split, a row that is none of its, or the split without answers (`test`).
    """
    return [_asked(row, source) for row in _rows(source)]


def _rows(source: Source) -> Iterator[Row]:
    if source.path.exists() or ":" in source.name:
        yield from table_rows(source, *_ALL)
        return
    for subject in _ALL:
        yield from table_rows(replace(source, name=f"{source.name}:{subject}"))


def _asked(row: Row, source: Source) -> Prompt:
    name, answer = row.text("id"), row.text("answer")
    if answer == "?":
        raise DataError(f"{row.where}: the split {source.split!r} has no answers; choose --split validation")
    options = _options(row)
    text = row.text("question")
    if options:
        if len(answer) != 1 or not 0 <= ord(answer) - ord("A") < len(options):
            raise DataError(f"{row.where}: the answer {answer!r} is no letter of {len(options)} options; correct it")
        asked = Asked(f"{text}\n{lettered(options, '({letter}) {text}')}\n", answer, options, BY_LETTER)
    else:
        asked = Asked(text, answer, (), BY_WORDS)
    pictures = [ref for place in range(1, 8) for ref in row.pictures(f"image_{place}")]
    subject = found["subject"] if (found := _OF_ID.fullmatch(name)) else ""
    group = next((group for group, subjects in SUBJECTS.items() if subject in subjects), "other")
    return question("mmmu", name, asked, pictures, group=group, think=source.think, subject=subject)


def _options(row: Row) -> tuple[str, ...]:
    """Of a multiple-choice question; () for an open one."""
    value: Any = row.values.get("options")
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise DataError(f"{row.where}: 'options' must be a list, got {shown(value)} ({error})") from error
    if value is None or not isinstance(value, list | tuple):
        raise DataError(f"{row.where}: 'options' must be a list, got {shown(value)}; download it again")
    if row.maybe("question_type") == "open" or not value:
        return ()
    if len(value) > 26:
        raise DataError(f"{row.where}: has {len(value)} options; letters name 26")
    return tuple(str(option) for option in value)


def score(items: Sequence[Item], folder: Path, graders: Graders, kept: Kept) -> Scored:
    """By MMMU's rules: letters where there are options, else by `open_right`."""
    right, unread = [], 0
    for item in items:
        if item.prompt.options:
            letter = last_choice(said(item), item.prompt.options)
            unread += letter is None
            right.append(float(letter == item.prompt.answer))
        else:
            right.append(float(open_right(said(item), item.prompt.answer or "")))
    ids = [item.prompt.id for item in items]
    accuracy = Measured.of(ids, right)
    parts = [mean_part("overall", [accuracy], PER_CENT)]
    for group in [*SUBJECTS, "other"]:
        of = [value if item.prompt.extra["group"] == group else None for item, value in zip(items, right, strict=True)]
        parts.append(mean_part(group, [Measured.of(ids, of)], PER_CENT))
    remarks = []
    if unread:
        remarks.append(f"{unread} answers name no option: wrong here, guessed by MMMU's own code")
    outcome = Outcome(
        benchmark="MMMU",
        parts=tuple(part for part in parts if part is not None),
        how="MMMU's own prompts and rules, here",
        remarks=tuple(remarks),
    )
    return Scored(outcome=outcome, measures={"accuracy": accuracy})


# Open questions -------------------------------------------------------------------------------------------------------

_TOLD_BY = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
"""With commas, in scientific writing, plain."""


def open_right(text: str, answer: str) -> bool:
    """Whether a text holds the answer: as a part of what it concludes, or as a number equal to two decimals.

    `answer` may be a list in text, as the hub has it (`['$MgS$', 'MgS']`), of which any is right.
    """
    written = list_in(answer) if answer.startswith("[") else None
    several = [one for one in written if isinstance(one, str)] if isinstance(written, list) else []
    wanted = [value for one in several or [answer] for value in _plain(one)]
    for one in {value for part in _conclusions(text) for value in _values(part)}:
        if isinstance(one, str):
            if any(isinstance(right, str) and right in one for right in wanted):
                return True
        elif one in wanted:
            return True
    return False


def _conclusions(text: str) -> list[str]:
    """Of each sentence or line the shortest end behind `is`, `so`, …; the whole text where there is none."""
    text = text.strip().strip(".").lower()
    parts = re.split(r"\.\s(?=[A-Z])|\n", text)
    found = []
    for place, part in enumerate(parts):
        told_by = (*_TOLD_BY, "=") if place == len(parts) - 1 else _TOLD_BY
        ends = [part.split(word)[-1].strip() for word in told_by if word in part]
        if ends and (end := _shortest(ends)) and end not in (":", ",", ".", "!", "?", ";", "'"):
            found.append(end)
    return found or [text]


def _shortest(ends: Sequence[str]) -> str:
    """The first of the shortest; an empty one is replaced by the next, as in MMMU's code."""
    best = ""
    for end in ends:
        if not best or len(end) < len(best):
            best = end
    return best


def _values(part: str) -> list[str | float]:
    found = [number for pattern in _NUMBERS for number in pattern.findall(part)]
    return [value for text in (part, *found) for value in _plain(text)]


def _plain(text: str) -> list[str | float]:
    """A number to two decimals; else small letters; a lone character with a blank on either side, so that it is one."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except (ValueError, OverflowError):
        small = text.lower()
        return [f" {small}", f"{small} "] if len(small) == 1 else [small]
