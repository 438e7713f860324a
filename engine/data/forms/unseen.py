"""Columns that hold pictures and that nothing reads: a run would train without them, in silence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from ...errors import DataError
from ..readers.named import looks_like_picture
from ..rows import Row
from ..table import PICTURE_COLUMNS, Table
from .numbered import COLUMN

OWN = "reward_"
"""What the name of a column of pictures begins with which are for a user's own reward alone."""
LOOKED_AT = 200
"""Values of a column, by which it is told what it holds."""


def check_unseen(table: Table, rows: Sequence[Row]) -> None:
    """Raises DataError for a column of pictures that is none of `PICTURE_COLUMNS`.

    Of columns of text, which also say where a picture was found, only where rows have no picture that is read.
    """
    encoded = [name for name in table.encoded if not _known(name)]
    named: list[str] = []
    if not encoded and not any(row.get(name) for row in rows for name in PICTURE_COLUMNS):
        named = [name for name in table.columns if not _known(name) and _holds_pictures(rows, name)]
    for name in (*encoded, *named):
        if name in encoded and not any(row.get(name) for row in rows):
            continue
        raise DataError(
            f"{table.source}: column {name!r} holds pictures and nothing reads it; call it 'image' or 'images' to have "
            f"them shown, 'references' or 'real_image' to compare with them, '{OWN}{name}' if only your own reward "
            "reads it, or drop it"
        )


def _known(name: str) -> bool:
    return name in (*PICTURE_COLUMNS, "decoded_image") or name.startswith(OWN) or COLUMN.fullmatch(name) is not None


def _holds_pictures(rows: Sequence[Row], name: str) -> bool:
    values = list(islice((row[name] for row in rows if row.get(name)), LOOKED_AT))
    return bool(values) and all(looks_like_picture(value) for value in values)
