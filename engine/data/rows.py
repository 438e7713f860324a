"""What the rows of a table hold: which column plays which part, ids, pictures, options.

Errors name the source, the row, the column and the remedy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError, shown
from ..pictures import ImageRef
from ..records import Prompt
from ..settings.source_names import split_named
from .faults import STRICT, Faults
from .forms.choices import INDEX_COLUMNS, OPTION_COLUMNS, Meaning, choices_of, list_in, number_means, option_columns
from .forms.dialogue import has_reply, is_chat, read_chat, reply_of
from .forms.numbered import in_order
from .forms.truths import Truths, inner, is_empty, whole_number
from .table import SPLITS, Table

Row = Mapping[str, Any]

QUESTION_COLUMNS = ("qa_problem", "problem", "question", "query")
CHAT_COLUMNS = ("messages", "conversations")
"""Chats, whose last turn is what is right where no column of answers says it."""
ANSWER_COLUMNS = (
    *("qa_solution", "answer", "ground_truth", "answerKey", "reward_model", "solution", "answers", "direct_answers"),
)
"""`reward_model` is verl's: an object whose `ground_truth` is meant. A `solution` beside an `answer` is how it is
found (ScienceQA, MATH), and is not what a policy is to say."""
SHOWN_COLUMNS = ("image", "images", "image_path", "file_name", "real_image")
DRAWN_COLUMNS = ("real_image", "image", "images", "image_path", "file_name")
QA_TYPES: Mapping[str, Literal["MC", "OE"]] = {"MC": "MC", "MCQ": "MC", "OE": "OE", "VQA": "OE"}
OWN_COLUMNS = frozenset(item.name for item in fields(Prompt)) - {"info", "request"} | {"prompt", "image"}
"""What `Prompt` has fields for, and so is not in `extra`."""


class Reading:
    """A table as it is read row by row; rows with a fault are left out, where faults are kept."""

    def __init__(self, table: Table, faults: Faults = STRICT) -> None:
        self.table, self.faults = table, faults
        self.bad: set[int] = set()
        """Rows with a fault."""

    def place(self, index: int) -> str:
        """What names a row among all data, also when it is mended or others are."""
        return f"{self.table.source}: {self.table.where(index)}"

    def rows(self) -> list[Row]:
        """All rows; one that cannot be read, or whose pictures cannot be used, is empty and bad."""
        found: list[Row] = []
        for index in range(len(self.table)):
            row: Row = {}
            if self.place(index) in self.faults.without:
                self.bad.add(index)
                found.append(row)
                continue
            try:
                row = self.table.row(index)
            except DataError as error:
                self.bad.add(index)
                self.faults.add(error, self.place(index))
            with self.at(index):
                row = in_order(row)
            found.append({} if index in self.bad else row)
        return found

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """Puts source and row in front of a DataError that is raised inside, and hands it in."""
        try:
            yield
        except DataError as error:
            self.bad.add(index)
            told = DataError(f"{self.place(index)}: {error}")
            told.__cause__ = error
            self.faults.add(told, self.place(index))


@dataclass(frozen=True)
class Layout:
    """Which column plays which part, the same in all rows of a table."""

    drawing: str | None
    question: str | None
    answer: str | None

    @classmethod
    def of(cls, table: Table, rows: Sequence[Row]) -> Layout:
        """Columns that are empty in all rows come after those that are not."""
        filled = [name for name in table.columns if any(not is_empty(row.get(name)) for row in rows)]
        columns = (*filled, *(name for name in table.columns if name not in filled))
        prompt, chat = first_of(("prompt",), columns), first_of(CHAT_COLUMNS, filled)
        question = first_of(QUESTION_COLUMNS, filled) or first_of(QUESTION_COLUMNS, columns)
        answer = answers_in(filled, question) or answers_in(columns, question)
        if question is None and chat is not None:
            if answer is None and any(has_reply(chat_cell(row.get(chat))) for row in rows):
                answer = chat
            question, prompt = (chat, prompt) if answer is not None else (None, prompt or chat)
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
                f"{list(table.columns)}; add one of {[name for name in ANSWER_COLUMNS if name != 'reward_model']}"
            )
        return cls(prompt, question, answer)


def has_options(columns: Sequence[str]) -> bool:
    """Whether a table has columns of options."""
    return any(name in columns for name in OPTION_COLUMNS) or bool(option_columns(tuple(columns)))


def answers_in(columns: Sequence[str], question: str | None) -> str | None:
    """The column that says what is right."""
    names: tuple[str, ...] = ANSWER_COLUMNS
    if has_options(columns):
        names = ("qa_solution", *INDEX_COLUMNS, *names, "label")
    if question is None:
        names = (*names, "completion")  # TRL's prompt and completion
    if question == "query":
        names = (*names, "response", "label")  # ms-swift's; ChartQA's
    return first_of(names, columns)


def chat_cell(value: Any) -> Any:
    """A chat, also one that a table of texts holds as JSON."""
    return list_in(value) or value if isinstance(value, str) and value.lstrip()[:2] in ("[{", "[ ") else value


def asked_in(value: Any, column: str) -> Any:
    """A cell with a question; of a chat that has its answer as well, what is asked."""
    value = chat_cell(value)
    return read_chat(value, column).asked if column in CHAT_COLUMNS and is_chat(value) else value


def first_of(names: Iterable[str], columns: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def names_of(table: Table, rows: Sequence[Row], split: str) -> list[str]:
    """Ids of the rows: those of column `id` where they are unique, else numbers; the source's name comes first.

    Rows that are empty, and so bad, count as rows and have no say: the others are called as if those were good.
    """
    name, _ = split_named(table.source)
    path = Path(name).expanduser()
    if os.path.exists(path):
        name = path.resolve().parent.name if os.path.isfile(path) and path.stem in SPLITS else path.resolve().stem
    own = {index: row.get("id") for index, row in enumerate(rows) if row} if "id" in table.columns else {}
    usable = own and all(isinstance(k, str | int) and str(k).strip() and str(k).isprintable() for k in own.values())
    keys = {index: str(key) for index, key in own.items()}
    if not usable or len(set(keys.values())) != len(keys):
        keys = {}
    return [f"{name}/{split}/{keys.get(index, index)}" for index in range(len(rows))]


def answer_cell(row: Row, column: str) -> Any:
    """What is right, as the data have it; None where they do not say."""
    value = row.get(column)
    if column in CHAT_COLUMNS or (column == "completion" and is_chat(value)):
        return reply_of(chat_cell(value), column)
    return inner(value)


def truths_of(table: Table, rows: Sequence[Row], column: str) -> Truths:
    """How a table says what is right; what numbers are is told by rows that leave one meaning, if none contradicts.

    Where all answers are digits written as texts, and can be indices alone (AI2D), they are.
    """
    if not has_options(table.columns):
        return Truths(column, table.untyped)
    told: set[str | None] = set()
    digits = True
    for row in rows:
        with suppress(DataError):  # said where the row is read
            value = answer_cell(row, column)
            choices = None if value is None else choices_of(row)
            if choices is not None:
                number = whole_number(value, True)
                digits = digits and number is not None
                told.add(None if number is None else number_means(number, choices))
    told.discard(None)
    numbers: Meaning | None = "index" if told == {"index"} else "text" if told == {"text"} else None
    return Truths(column, table.untyped or (digits and numbers == "index"), numbers)


def pictures_of(
    reading: Reading, rows: Sequence[Row], columns: Sequence[str], needed: Sequence[bool], may_lack: Sequence[bool]
) -> list[tuple[ImageRef, ...]]:
    """The pictures of each row that needs any, from the first column that has any; where one has, only those that
    `may_lack` them have none. What a row shows may be in `image` here and in `images` there; `real_image` is another
    part than these."""
    chosen = [row for row, need in zip(rows, needed, strict=True) if need]
    first = next((name for name in columns if any(row.get(name) for row in chosen)), None)
    alike = [name for name in columns if (name == "real_image") == (first == "real_image")] if first else []
    found: list[tuple[ImageRef, ...]] = []
    for index, (row, need, lacks) in enumerate(zip(rows, needed, may_lack, strict=True)):
        column = next((name for name in alike if row.get(name)), first)
        value = row.get(column) if need and column else None
        pictures = value if isinstance(value, tuple) else () if value is None else (value,)
        with reading.at(index):
            if need and column and not pictures and not lacks:
                raise DataError(f"column {column!r} is empty while other rows have pictures; add one or drop the row")
        found.append(pictures)
    return found


def extra_of(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in OWN_COLUMNS}


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
