"""What image rewards read of a step's columns: which rows have a drawing, and what it was to show."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...records import Prompt

QUOTED = re.compile(
    r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|「([^」]+)」|『([^』]+)』|‘([^’]+)’|(?<!\w)\'([^\']+)\'(?!\w)'
)
"""Text in quotation marks of any kind; an apostrophe is none."""


def drawn_rows(images: Sequence[Tensor | None]) -> tuple[list[int], list[Tensor]]:
    """The rows with a drawing, and those drawings."""
    rows = [i for i, image in enumerate(images) if image is not None]
    return rows, [image for i in rows if (image := images[i]) is not None]


def what_was_asked(columns: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> list[str]:
    """The text that each drawing is held against: the first of `target`, `request` and `prompts` that is there."""
    return [next(str(text) for text in _texts(columns, row) if text) for row in rows]


def _texts(columns: Mapping[str, Sequence[Any]], row: int) -> list[Any]:
    return [*(columns[name][row] for name in ("target", "request", "prompts") if name in columns), " "]


def words_in(columns: Mapping[str, Sequence[Any]], name: str, row: int) -> tuple[str, ...]:
    """The texts in a row's cell of a column; empty where the column or the cell is not there."""
    cell = columns[name][row] if name in columns else None
    return (cell,) if isinstance(cell, str) and cell else tuple(str(text) for text in cell or ())


def filled(number: int, rows: Sequence[int], values: Sequence[float | None]) -> list[float | None]:
    """The values at their rows, None elsewhere."""
    found: list[float | None] = [None] * number
    for row, value in zip(rows, values, strict=True):
        found[row] = value
    return found


def quoted(text: str) -> str:
    """What stands in quotation marks, one after another; "" where nothing does.

    >>> quoted('a sign that says "Open" and a dog\'s collar')
    'Open'
    """
    return " ".join(next(part for part in found if part).strip() for found in QUOTED.findall(text))


def wanted_text(columns: Mapping[str, Sequence[Any]], row: int) -> str:
    """What a drawing should say: its column `ocr_text`, or what is quoted in what was asked for; "" for none."""
    given = words_in(columns, "ocr_text", row)
    return " ".join(given) if given else quoted(what_was_asked(columns, [row])[0])


def text_to_write(prompt: Prompt) -> str:
    """The same of a prompt, before anything is drawn."""
    columns: dict[str, list[Any]] = {"target": [prompt.target], "request": [prompt.request], "prompts": [prompt.words]}
    return wanted_text(columns | {"ocr_text": [prompt.extra.get("ocr_text")]}, 0)
