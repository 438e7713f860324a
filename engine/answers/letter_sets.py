"""Which options an answer to a question with several right ones chooses: `A, C`, `A and C`, `AC`, texts of options."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from .letters import chosen_letter

BETWEEN = re.compile(r"\s*(?:[,;/&、\n]|\band\b|和)\s*")
JOINED = re.compile(r"[A-Z]{2,26}")
LONGEST = 2000
"""Characters of an answer that is taken apart."""


def chosen_letters(said: str, options: Sequence[str]) -> set[str]:
    """The letters that an answer names; empty where a part of it names none, or names one twice.

    Args:
        said: what stands in the tags.
        options: the texts of A, B, C, …
    """
    said = unicodedata.normalize("NFKC", said).strip().strip("[]").rstrip(".")
    if len(said) > LONGEST:
        return set()
    alone = chosen_letter(said, options)
    if alone is not None and not BETWEEN.search(said):
        return {alone}
    parts = list(said) if JOINED.fullmatch(said) else [part for part in BETWEEN.split(said) if part]
    found = [chosen_letter(part, options) for part in parts]
    named = {letter for letter in found if letter is not None}
    return named if len(named) == len(found) else set()
