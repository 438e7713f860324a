"""What a worked solution comes to: MATH's `\\boxed{…}`, GSM8K's last line `#### …`.

A policy says the answer and not the way to it: the way as a truth would be one that nobody's answer equals.
"""

from __future__ import annotations

import re

from ...answers.dress import closing_brace
from ...errors import DataError, shown

LAST_LINE = re.compile(r"(?:^|\n)[ \t]*####[ \t]*(\S[^\n]*?)\s*$")
BOX = re.compile(r"\\f?boxed\s*(\{|(?<=\s)[^\s{}$.,;]+)")
"""A box, or one of TeX's short ones: `\\boxed 3`."""


def final_answer(text: str, column: str) -> str:
    """What stands behind `####` in the last line, or in the boxes of a text; the text itself where it has neither.

    Raises:
        DataError: boxes hold different things.
    """
    if found := LAST_LINE.search(text):
        return found[1]
    held = list(dict.fromkeys(_boxed(text)))
    if len(held) > 1:
        raise DataError(
            f"column {column!r} must hold one boxed answer, got {len(held)} that differ, {shown(held, 200)}; write "
            "what is right alone, or several answers as a list"
        )
    return held[0] if held else text


def _boxed(text: str) -> list[str]:
    """The contents of all boxes that close, one within another left out."""
    found, at = [], 0
    while box := BOX.search(text, at):
        at = box.end()
        if box[1] != "{":
            found.append(box[1])
        elif (end := closing_brace(text, box.end() - 1)) > 0:
            found.append(text[box.end() : end].strip())
            at = end
        else:
            break  # each later brace would be searched to the end for nothing
    return [held for held in found if held]
