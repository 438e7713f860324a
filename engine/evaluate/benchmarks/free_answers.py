"""Which option, or which of yes and no, a free text names: by each benchmark's own published rule, never by guessing.

Answers in <answer> tags are read from the tags. A text that names no option is wrong; MMMU's own code guesses one at
random there, so that its scores of models that do not answer are higher by a few points.

Sources, rewritten: MMMU `mmmu/utils/eval_utils.py`; VLMEvalKit `vlmeval/utils/matching_util.py`; POPE `evaluate.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...rewards.builtin.tags import answer_of
from ..store import Item

MAX_TEXT = 20_000
"""Characters of an answer that are read, its last ones: a policy may go on without end."""
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_VERBOSE = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
NEAR_THE_END = 5
"""Words from the end within which a lone letter counts as an answer."""


def said(item: Item) -> str:
    """What an item's text answers: the greedy one where there is one; what stands in its tags where it has tags."""
    text = item.text or ""
    tagged = answer_of(text)
    return (text if tagged is None else tagged)[-MAX_TEXT:]


def letters_of(options: Sequence[str]) -> list[str]:
    """A, B, C, … of the options."""
    return [chr(ord("A") + place) for place in range(len(options))]


def last_choice(text: str, options: Sequence[str]) -> str | None:
    """MMMU's rule: the last `(B)`; else the last ` B `; else, in more than five words, the last option's text."""
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text, letters = f" {text} ", letters_of(options)
    for form in ("({})", " {} "):
        found = [(text.rfind(form.format(letter)), letter) for letter in letters if form.format(letter) in text]
        if found:
            return max(found, key=lambda one: one[0])[1]
    if len(text.split()) > 5:
        small = text.lower()
        named = [(small.rfind(option.lower()), letter) for letter, option in zip(letters, options, strict=True)]
        named = [one for one in named if one[0] >= 0]
        if named:
            return max(named, key=lambda one: one[0])[1]
    return None


def sure_choice(text: str, options: Sequence[str]) -> str | None:
    """VLMEvalKit's rule of exact matching: the only letter, near the text's end; else the only option's text."""
    if any(refusal in text for refusal in _REFUSALS):
        return None
    letters, words = letters_of(options), text.translate(_MARKS).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - NEAR_THE_END:
        return named[0]
    if not named and "Z" in words:
        return None
    found = _VERBOSE.search(text)
    if found and found[1].upper() in letters:
        return found[1].upper()
    if len(text) > 2 * sum(map(len, options)):
        return None
    inside = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in text.lower()]
    return inside[0] if len(inside) == 1 else None


def says_yes(text: str) -> bool:
    """POPE's rule: no where `No`, `no` or `not` is a word of the first sentence, and else yes."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)
