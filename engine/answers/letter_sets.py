"""Which options an answer to a question with several right ones chooses: `A, C`, `A and C`, `AC`, texts of options."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from .letters import bare_choice, chosen_letter
from .plain_texts import canonical

BETWEEN = re.compile(r"\s*(?:[,;/&、\n]|\band\b|和)\s*")
JOINED = re.compile(r"[A-Z](?:\s?[A-Z]){1,25}")
LEAD = re.compile(
    r"(?:the\s)?(?:(?:correct|right)\s)?(?:answers?|options?|choices?|letters?)\s?(?:(?:is|are)\s)?[:：]?\s?|both\s|[应该故]*选择?项?[:：]?",
    re.IGNORECASE,
)
BRACKETS = ("[]", "{}", "()")
LONGEST = 2000
"""Characters of an answer that is taken apart."""


def chosen_letters(said: str, options: Sequence[str]) -> set[str]:
    """The letters that an answer names; empty where a part of it names none, or names one twice.

    Args:
        said: what stands in the tags.
        options: the texts of A, B, C, …
    """
    if len(said) > LONGEST:
        return set()
    said = unicodedata.normalize("NFKC", said).strip()
    alone = chosen_letter(said, options)
    texts = {canonical(option) for option in options}
    if alone is not None and (not BETWEEN.search(said) or canonical(said) in texts):
        return {alone}
    said = _undressed(said)
    parts = re.findall("[A-Z]", said) if JOINED.fullmatch(said) else [part for part in BETWEEN.split(said) if part]
    found = [chosen_letter(part, options) for part in parts]
    named = {letter for letter in found if letter is not None}
    return named if len(named) == len(found) else set()


def _undressed(said: str) -> str:
    """`A, C` of `\\boxed{A, C}`, `The answers are {A, C}.`"""
    said = bare_choice(said)
    said = said[found.end() :] if (found := LEAD.match(said)) else said
    said = said.strip().rstrip(".。")
    inside = said[1:-1]
    return inside if said[:1] + said[-1:] in BRACKETS and not set("[](){}") & set(inside) else said
