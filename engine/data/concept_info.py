"""What info.json tells of a concept, and the questions in which the policy is told: Sync-R1's mode r.

    info        a line on how it looks; said where it is drawn (the drawing turn)
    extra_info  facts, one an item; listed in the question about a request, which means one of them, or none

Training asks for the item that the request means, and R_txt is the Brier score of BLEU over all items; evaluation asks
for the request rewritten in full, as UnifyBench++ does, and so does training where no item is known to be meant.  Which
item that is, the published data say by its place: item i is what request i of t2i_conditions.json means.

Source: Sync-R1's released trainer (`grpo.py`: `text_gt[r-1] = 1`) and evaluation (`evaluation/tasks.py`); own wording.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, shown

KNOWN = "This is known of {concept}:\n{items}\n\nSomebody asks for this picture: {request}\n"
RECALL = KNOWN + (
    "If it is about something on that list, answer with that item alone, word by word. If it is about none of it, "
    "answer with nothing."
)
REWRITE = KNOWN + (
    "Write the request again in full: put in what the list says of it, and leave it as it is where the list says "
    "nothing. Answer with the request alone."
)
WORD = re.compile(r"\w{3,}")
SMALL_WORDS = frozenset(("and", "are", "for", "from", "has", "her", "his", "its", "she", "the", "their", "was", "with"))
"""That say nothing of what is meant, though one item alone may have them."""


@dataclass(frozen=True, slots=True)
class Told:
    """What is told of a concept; nothing without info.json."""

    info: str = ""
    items: tuple[str, ...] = ()
    """Of `extra_info`, in its order; an empty one keeps its place."""

    @property
    def facts(self) -> tuple[str, ...]:
        """The items that say something."""
        return tuple(item for item in self.items if item)

    def __bool__(self) -> bool:
        return bool(self.info or self.facts)


def told_of(contents: Mapping[str, Any], path: Path) -> Told:
    """What an info.json tells.

    Raises:
        DataError: `info` is no text, or `extra_info` no list of texts.
    """
    info, items = contents.get("info", ""), contents.get("extra_info", [])
    if not isinstance(info, str):
        raise DataError(f"{path}: 'info' must be text, a line on how the concept looks, got {shown(info)}; rewrite it")
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise DataError(
            f"{path}: 'extra_info' must be a list of texts, a fact each, got {shown(items)}; write each fact as an item"
        )
    return Told(info.strip(), tuple(item.strip() for item in items))


def meant_by(told: Told, requests: Sequence[tuple[str, str]], *, by_place: bool) -> list[str]:
    """The item that each of [n] requests means, "" where none is known.

    Args:
        told: of the concept.
        requests: what is asked for, and what that means in full.
        by_place: they are the training half of a published list, whose order is that of the items.

    Without `by_place`, or with more requests than items, it is the one item that shares most words with what the second
    text says beyond the first, words of several items apart.
    """
    if by_place and len(requests) <= len(told.items):
        return list(told.items[: len(requests)])
    return [_by_words(told.facts, *request) for request in requests]


def _by_words(items: Sequence[str], request: str, full: str) -> str:
    words = [_words(item) for item in items]
    common = Counter(word for some in words for word in some)
    said = _words(full) - _words(request)
    shared = [sum(common[word] == 1 for word in some & said) for some in words]
    most = max(shared, default=0)
    return items[shared.index(most)] if most and shared.count(most) == 1 else ""


def _words(text: str) -> set[str]:
    return set(WORD.findall(text.casefold())) - SMALL_WORDS


def question(told: Told, concept: str, request: str, *, recall: bool) -> str:
    """What the policy is asked about a request: for the item that it means (`recall`), or for the request in full.

    Without facts it is the request, as it stands.
    """
    if not told.facts:
        return request
    items = "\n".join(f"- {item}" for item in told.facts)
    return (RECALL if recall else REWRITE).format(concept=f"<{concept}>", items=items, request=request)
