"""What the rows of a table hold: which column plays which part, ids, the one picture, options.

Errors name the source, the row, the column and the remedy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError, shown
from ..pictures import ImageRef
from ..records import Prompt
from .faults import STRICT, Faults
from .questions import options_in, text_of
from .table import SPLITS, Table

Row = Mapping[str, Any]

QUESTION_COLUMNS = ("qa_problem", "problem", "question")
ANSWER_COLUMNS = ("qa_solution", "solution", "answer", "ground_truth", "reward_model")
"""The last is verl's: an object whose `ground_truth` is meant."""
SHOWN_COLUMNS = ("image", "images", "image_path", "file_name", "real_image")
DRAWN_COLUMNS = ("real_image", "image", "images", "image_path", "file_name")
QA_TYPES: Mapping[str, Literal["MC", "OE"]] = {"MC": "MC", "MCQ": "MC", "OE": "OE", "VQA": "OE"}
OWN_COLUMNS = frozenset(item.name for item in fields(Prompt)) - {"info", "request"} | {"prompt", "images"}
"""What `Prompt` has fields for, and so is not in `extra`."""


class Reading:
    """A table as it is read row by row; rows with a fault are left out, where faults are kept."""

    def __init__(self, table: Table, faults: Faults = STRICT) -> None:
        self.table, self.faults = table, faults
        self.bad: set[int] = set()
        """Rows with a fault."""

    def rows(self) -> list[Row]:
        """All rows; one whose pictures cannot be used is empty and bad."""
        found: list[Row] = []
        for index in range(len(self.table)):
            try:
                found.append(self.table.row(index))
            except DataError as error:
                self.bad.add(index)
                self.faults.add(error)
                found.append({})
        return found

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """Puts source and row in front of a DataError that is raised inside, and hands it in."""
        try:
            yield
        except DataError as error:
            self.bad.add(index)
            told = DataError(f"{self.table.source}: {self.table.where(index)}: {error}")
            told.__cause__ = error
            self.faults.add(told)


@dataclass(frozen=True)
class Layout:
    """Which column plays which part, the same in all rows of a table."""

    drawing: str | None
    question: str | None
    answer: str | None

    @classmethod
    def of(cls, table: Table) -> Layout:
        prompt = first_of(("prompt",), table.columns)
        question, answer = first_of(QUESTION_COLUMNS, table.columns), first_of(ANSWER_COLUMNS, table.columns)
        if question is None and answer is not None:
            question, prompt = prompt, None
        if question is None and prompt is None:
            raise DataError(
                f"{table.source}: has no column 'prompt', 'qa_problem', 'problem' or 'question'; found "
                f"{list(table.columns)}; rename the one that holds the text"
            )
        if question is not None and answer is None:
            raise DataError(
                f"{table.source}: has questions in {question!r} and no column of answers; found "
                f"{list(table.columns)}; add one of {list(ANSWER_COLUMNS[:-1])}"
            )
        return cls(prompt, question, answer)


def first_of(names: Iterable[str], columns: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def names_of(table: Table, rows: Sequence[Row], split: str) -> list[str]:
    """Ids of the rows: those of column `id` where they are unique, else numbers; the source's name comes first."""
    path = Path(table.source)
    name = table.source
    if os.path.exists(path):
        name = path.resolve().parent.name if os.path.isfile(path) and path.stem in SPLITS else path.resolve().stem
    own = [row.get("id") for row in rows] if "id" in table.columns else []
    usable = own and all(isinstance(key, str | int) and str(key).strip() and str(key).isprintable() for key in own)
    keys = [str(key) for key in own]
    if not usable or len(set(keys)) != len(keys):
        keys = [str(index) for index in range(len(rows))]
    return [f"{name}/{split}/{key}" for key in keys]


def answer_cell(row: Row, column: str) -> Any:
    value = row.get(column)
    return value.get("ground_truth") if isinstance(value, Mapping) else value


def pictures_of(
    reading: Reading, rows: Sequence[Row], columns: Sequence[str], needed: Sequence[bool]
) -> list[ImageRef | None]:
    """One picture of each row that needs one, from the first column that has any; all of them have one, or none has."""
    chosen = [row for row, need in zip(rows, needed, strict=True) if need]
    column = next((name for name in columns if any(row.get(name) for row in chosen)), None)
    found: list[ImageRef | None] = []
    for index, (row, need) in enumerate(zip(rows, needed, strict=True)):
        value, picture = row.get(column) if need and column else None, None
        with reading.at(index):
            picture = single(value, column)
            if need and column and picture is None:
                raise DataError(f"column {column!r} is empty while other rows have pictures; add one or drop the row")
        found.append(picture)
    return found


def single(value: Any, column: str | None) -> ImageRef | None:
    if not isinstance(value, tuple):
        return value
    if len(value) > 1:
        raise DataError(f"column {column!r} has {len(value)} pictures; a prompt shows one; keep one or join them")
    return value[0] if value else None


def extra_of(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in OWN_COLUMNS}


def options_of(row: Row) -> tuple[str, ...]:
    """The texts of a column `options` or `choices`, without letters in front."""
    for column in ("options", "choices"):
        value = row.get(column)
        if value is None or value in ("", [], ()):
            continue
        if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value) or len(value) > 26:
            raise DataError(f"column {column!r} must be a list of at most 26 texts, got {type(value).__name__}")
        lettered = options_in("\n".join(value))
        return lettered if len(lettered) == len(value) else tuple(text_of(text, column) for text in value)
    return ()


def qa_type_of(value: Any) -> Literal["MC", "OE"] | None:
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if value is None or value == "":
        return None
    if not isinstance(value, str) or value.strip().upper() not in QA_TYPES:
        raise DataError(f"column 'qa_type' must be MC or OE, got {shown(value)}; give one per row")
    return QA_TYPES[value.strip().upper()]


def references_of(row: Row) -> tuple[ImageRef, ...]:
    """The photos of column `references`, of which a row may have any number."""
    found = row.get("references")
    return () if found is None else found if isinstance(found, tuple) else (found,)


def attributes_of(row: Row) -> Mapping[str, str] | None:
    """What the image must show. Parquet gives every row the keys of all rows: those without a value are left out."""
    value = row.get("attributes")
    if value is None:
        return None
    if not isinstance(value, Mapping) or any(isinstance(item, list | tuple | Mapping) for item in value.values()):
        raise DataError(f"column 'attributes' must be an object of texts, got {type(value).__name__}")
    return {str(name): str(item) for name, item in value.items() if item is not None} or None
