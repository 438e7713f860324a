"""MMMU's pictures: columns `image_1`, `image_2`, …, and `<image 1>` in the text where each of them goes.

MathVision's one picture is `<image1>` in its text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from ...errors import DataError
from ...pictures import PICTURE

COLUMN = re.compile(r"image_(\d{1,2})")
NUMBERED = re.compile(r"<image[ _]?(\d{1,2})>")
ASKING = ("qa_problem", "problem", "question", "query", "prompt", "options", "choices")
"""Columns that a policy reads, in the order in which it does."""


@lru_cache(maxsize=64)
def numbered_columns(names: tuple[str, ...]) -> Mapping[int, str]:
    """Number -> column."""
    return {int(found[1]): name for name in sorted(names) if (found := COLUMN.fullmatch(name))}


def in_order(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row whose numbered pictures are `images`, in the order in which its texts show them, each by a plain sign.

    Without a sign all of them come in the order of their numbers. A picture that only an explanation names is left
    out, as a policy does not read that.

    Raises:
        DataError: a sign without its picture, or a picture that no text names while others are named.
    """
    columns = numbered_columns(tuple(row))
    if not columns and not row.get("images") and not row.get("image"):
        return row
    pictures = {number: row[name] for number, name in sorted(columns.items()) if row[name]}
    rest = {name: value for name, value in row.items() if name not in columns.values()}
    plain = next((name for name in ("images", "image") if rest.get(name)), None)
    if plain and pictures:
        raise DataError(f"columns {plain!r} and 'image_{min(pictures)}' both hold pictures; empty one of them")
    if plain:
        pictures = dict(enumerate(rest[plain] if isinstance(rest[plain], tuple) else (rest[plain],), 1))
    asked = {name: rest[name] for name in ASKING if isinstance(rest.get(name), str | list | tuple)}
    order = [int(number) for value in asked.values() for number in NUMBERED.findall(_plain(value))] if pictures else []
    if not pictures or (plain and not order):
        return row
    _check(order, pictures, [value for name, value in rest.items() if name not in asked and isinstance(value, str)])
    shown = tuple(pictures[number] for number in (order or pictures))
    column, value = ("image", shown[0]) if plain == "image" else ("images", shown)
    return {**rest, **{name: _signed(text) for name, text in asked.items()}, column: value}


def _check(order: Sequence[int], pictures: Mapping[int, Any], others: Sequence[str]) -> None:
    """Every sign has its picture, and every picture a sign if any has one; `others` are texts that no policy reads."""
    for number in order:
        if number not in pictures:
            raise DataError(f"column 'image_{number}' is empty, and the text shows <image {number}>; add the picture")
    elsewhere = {int(number) for text in others for number in NUMBERED.findall(text)}
    unseen = [number for number in pictures if number not in order and number not in elsewhere]
    if order and unseen:
        raise DataError(
            f"column 'image_{unseen[0]}' has a picture, and no text says <image {unseen[0]}> while others are named; "
            "say where it goes, or empty the column"
        )


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else " ".join(item for item in value if isinstance(item, str))


def _signed(value: Any) -> Any:
    if isinstance(value, str):
        return NUMBERED.sub(PICTURE, value)
    return [NUMBERED.sub(PICTURE, item) if isinstance(item, str) else item for item in value]
