"""Every sentence of the world: question and prompt wordings, split into training and held-out ones.

Slots: `{s}` the subject (a concept's token or "the creature"), `{c}` a concept's token, and a look's words, with
`{a_hat}` for "a crown" or "no hat". A held-out wording is a new order of words that training wordings already hold,
so that it tests the reader and not an untrained embedding. Answers are one to three words of the closed sets.
"""

from __future__ import annotations

import re
from typing import Final, Literal

from .attributes import CONCEPTS, FOODS, OWNERS, SOUNDS, VALUES, Concept, Look

Split = Literal["train", "test"]
Wordings = dict[Split, tuple[str, ...]]

ATTRIBUTE_QUESTIONS: Final[dict[str, Wordings]] = {
    "shape": {
        "train": ("what shape is {s}?", "which shape does {s} have?", "name the shape of {s}."),
        "test": ("the shape of {s} is?", "which shape is {s}?"),
    },
    "colour": {
        "train": ("what colour is {s}?", "which colour does {s} have?", "name the colour of {s}."),
        "test": ("the colour of {s} is?", "which colour is {s}?"),
    },
    "hat": {
        "train": ("what hat does {s} wear?", "which hat is on {s}?", "name the hat of {s}."),
        "test": ("the hat of {s} is?", "what hat is on {s}?"),
    },
    "pattern": {
        "train": ("what pattern does {s} have?", "which pattern is on {s}?", "name the pattern of {s}."),
        "test": ("the pattern of {s} is?", "what pattern is on {s}?"),
    },
    "place": {
        "train": ("what place is {s} at?", "where is {s}?", "name the place of {s}."),
        "test": ("the place of {s} is?", "which place is {s} at?"),
    },
}
"""Asked about a photo; all but `place` also from memory."""

FACT_QUESTIONS: Final[dict[str, Wordings]] = {
    "food": {
        "train": ("what does {s} like to eat?", "which food does {s} like?", "name the food of {s}."),
        "test": ("the food of {s} is?", "what food does {s} like to eat?"),
    },
    "sound": {
        "train": ("what sound does {s} make?", "which sound does {s} have?", "name the sound of {s}."),
        "test": ("the sound of {s} is?", "which sound does {s} make?"),
    },
    "owner": {
        "train": ("who is the owner of {s}?", "which owner does {s} have?", "name the owner of {s}."),
        "test": ("the owner of {s} is?", "what owner does {s} have?"),
    },
    "friend": {
        "train": ("who is the friend of {s}?", "which friend does {s} have?", "name the friend of {s}."),
        "test": ("the friend of {s} is?", "what friend does {s} have?"),
    },
    "favourite": {
        "train": (
            "what is the favourite place of {s}?",
            "which place does {s} like?",
            "name the favourite place of {s}.",
        ),
        "test": ("the favourite place of {s} is?", "what place does {s} like?"),
    },
}
"""Asked without a photo: no picture shows the answer."""

WHO_QUESTIONS: Final[Wordings] = {
    "train": ("who is in the photo?", "which creature is in the photo?", "name the creature in the photo."),
    "test": ("the creature in the photo is?", "who is the creature in the photo?"),
}
RECOGNITION_QUESTIONS: Final[Wordings] = {
    "train": ("is {c} in the photo?", "does the photo show {c}?", "can you see {c}?"),
    "test": ("can you see {c} in the photo?", "does the photo have {c}?"),
}

PROMPTS: Final[dict[str, Wordings]] = {
    "favourite": {
        "train": (
            "draw {c} at its favourite place.",
            "show {c} at the place it likes.",
            "make a photo of {c} at its favourite place.",
        ),
        "test": ("draw {c} at the place it likes.", "show a photo of {c} at its favourite place."),
    },
    "named": {
        "train": ("draw {c} at the {place}.", "show {c} at the {place}.", "make a photo of {c} at the {place}."),
        "test": ("draw a photo of {c} at the {place}.", "make {c} at the {place}."),
    },
    "explicit": {
        "train": (
            "draw a {shape} {colour} {pattern} creature with {a_hat} at the {place}.",
            "show a {colour} {shape} creature at the {place}, {pattern}, with {a_hat}.",
            "make a photo of a {pattern} {colour} {shape} creature with {a_hat} at the {place}.",
        ),
        "test": (
            "show a {colour} {pattern} {shape} creature with {a_hat} at the {place}.",
            "draw a photo of a {shape} {pattern} {colour} creature at the {place}, with {a_hat}.",
        ),
    },
    "dense": {
        "train": (
            "draw {c}, with {a_hat}, {pattern}, at the {place}.",
            "make a photo of {c}, {colour}, with {a_hat}, at the {place}.",
            "show {c}, {shape}, {colour}, at the {place}.",
        ),
        "test": (
            "draw {c}, {colour}, {pattern}, at the {place}.",
            "show a photo of {c}, {shape}, with {a_hat}, at the {place}.",
        ),
    },
    "personal_dense": {
        "train": (
            "draw {c}, with its hat, at its favourite place.",
            "show {c}, with its colour, with its pattern, at the place it likes.",
            "make a photo of {c}, with its hat, at its favourite place.",
        ),
        "test": (
            "draw {c}, with its pattern, with its hat, at the place it likes.",
            "show a photo of {c}, with its colour, at its favourite place.",
        ),
    },
    "explicit_dense": {
        "train": (
            "draw a {shape} creature, {colour}, {pattern}, with {a_hat}, at the {place}.",
            "show a creature, {shape}, {colour}, {pattern}, with {a_hat}, at the {place}.",
            "make a photo of a {colour} creature, {shape}, with {a_hat}, {pattern}, at the {place}.",
        ),
        "test": (
            "draw a creature, {colour}, {shape}, with {a_hat}, {pattern}, at the {place}.",
            "show a photo of a {pattern} creature, {colour}, {shape}, with {a_hat}, at the {place}.",
        ),
    },
}
"""What to draw: `favourite`, `personal_dense` need a fact; `named`, `dense` say the place; `explicit*` say all."""

CREATURE: Final = "the creature"
"""The subject of a question about a look that need not be a concept."""


def fill(wording: str, *, concept: Concept | None = None, look: Look | None = None) -> str:
    """Fill a wording's slots from `concept` (or "the creature") and `look`."""
    words = {"c": concept.token if concept else CREATURE, "s": concept.token if concept else CREATURE}
    if look is not None:
        words |= look.to_dict() | {"a_hat": "no hat" if look.hat == "none" else f"a {look.hat}"}
    return wording.format(**words)


def fact(concept: Concept, name: str) -> str:
    """The answer to a question of `FACT_QUESTIONS`, or of `ATTRIBUTE_QUESTIONS` from memory."""
    if name == "favourite":
        return concept.place
    if name == "friend":
        return f"<{concept.friend}>"
    return str(getattr(concept if name in FACT_QUESTIONS else concept.look, name))


def split_words(text: str) -> list[str]:
    """Words, concept tokens and punctuation marks, in order."""
    return re.findall(r"<[a-z]+>|[a-z]+|[?.,]", text)


def _vocabulary() -> tuple[str, ...]:
    words: set[str] = {"yes", "no", *FOODS, *SOUNDS, *OWNERS}
    words.update(concept.token for concept in CONCEPTS)
    for values in VALUES.values():
        words.update(values)
    tables = [*ATTRIBUTE_QUESTIONS.values(), *FACT_QUESTIONS.values(), WHO_QUESTIONS, RECOGNITION_QUESTIONS]
    for table in [*tables, *PROMPTS.values()]:
        for wordings in table.values():
            for wording in wordings:
                words.update(split_words(re.sub(r"\{\w+\}", " ", wording)))
    words.update(split_words(CREATURE))
    return tuple(sorted(words))


VOCABULARY: Final[tuple[str, ...]] = _vocabulary()
"""Every token of `split_words` that the world's texts can hold, sorted."""
