"""Chains, Sync-R1's prompts: which columns of a table ask and answer, and which text is right."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import DataError, shown
from ..rows import CHAT_COLUMNS, QUESTION_COLUMNS, Row, answer_cell, answers_in, chat_cell, first_of, truths_of
from ..table import Table
from .choices import Choices
from .dialogue import has_reply
from .truths import Truths, answers_of, letters_of


def chain_columns(table: Table, rows: Sequence[Row]) -> tuple[str, Truths | None]:
    """The column that asks, and the one that says what is right; a chat may be both."""
    column = first_of(("prompt", *CHAT_COLUMNS), table.columns)
    if column is None:
        asked = [name for name in QUESTION_COLUMNS if name in table.columns]
        remedy = "rename the one with the text"
        if asked:
            remedy += f", or train on {asked[0]!r} with recipes/corl.py"
        raise DataError(f"{table.source}: has no column 'prompt'; found {list(table.columns)}; {remedy}")
    answer = answers_in(table.columns, None)
    if answer is None and column in CHAT_COLUMNS and any(has_reply(chat_cell(row.get(column))) for row in rows):
        answer = column
    return column, None if answer is None else truths_of(table, rows, answer)


def chain_answers(row: Row, truths: Truths | None, choices: Choices | None) -> tuple[str, ...]:
    """What is right; of options the text, whatever the data name it by, for that is what rewards of chains compare."""
    value = None if truths is None else answer_cell(row, truths.column)
    if truths is None or value is None:
        return ()
    if choices is None:
        return answers_of(value, truths.column)
    if isinstance(value, str) and value in choices.texts:
        return (value,)  # as written, also where it looks like a letter
    letters = letters_of(value, choices, truths)
    if len(letters) != 1:
        what, options = ("names none" if not letters else f"names {len(letters)}"), shown(list(choices.texts), 200)
        raise DataError(
            f"column {truths.column!r}: the answer {shown(value)} {what} of the options {options}; a "
            "chain has one that is right; correct it"
        )
    return (choices.texts[ord(letters[0]) - ord("A")],)
