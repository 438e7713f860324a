"""Where the pictures of a row stand in its question: a sign for each place, and one picture needs none."""

from __future__ import annotations

from typing import Any

from ...errors import DataError
from ...pictures import PICTURE, ImageRef
from ..questions import text_of


def problem_of(value: Any, column: str, pictures: tuple[ImageRef, ...]) -> tuple[str, bool]:
    """The question, and whether the sign of a single picture stood before it, where it need not be said."""
    text = text_of(value, column)
    if len(pictures) == 1 and text.startswith(PICTURE):
        return text_of(text.removeprefix(PICTURE), column), True
    if not pictures and PICTURE in text:
        raise DataError(
            f"column {column!r} shows a picture ({PICTURE}), and 'image' or 'images' has none; add it, or take the "
            "sign out"
        )
    if pictures:
        text_of(text.replace(PICTURE, ""), column)  # which says so where there is nothing else
    return text, False


def check_places(text: str, leads: bool, pictures: tuple[ImageRef, ...], column: str) -> None:
    """As many signs as pictures, in the question or its options; a single picture needs none."""
    signs, count = text.count(PICTURE) + leads, len(pictures)
    if count and signs != count and (signs or count > 1):
        raise DataError(
            f"column {column!r} has {signs} sign{'s' * (signs != 1)} {PICTURE} and the row {count} "
            f"picture{'s' * (count != 1)}; write one sign where each picture goes"
        )
