"""Reads the world's captions as scene graphs, for SPICE without a language model: the vocabulary is closed.

`a round red plain creature with a crown at the beach` holds the objects creature, crown and beach, the attributes
(creature, round), (creature, red) and (creature, plain), and the relations (creature, with, crown) and
(creature, at, beach). Word order does not matter, since captions come in many; words that the world does not have say
nothing. `no hat` is an attribute: a caption that names a crown instead then loses both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from ..rewards.builtin.spice import SceneGraph
from .attributes import COLOURS, CONCEPT_BY_NAME, HATS, PATTERNS, PLACES, SHAPES
from .texts import split_words

CREATURE: Final = "creature"
NO_HAT: Final = "no hat"
_ADJECTIVES: Final = frozenset((*SHAPES, *COLOURS, *PATTERNS))
_HATS: Final = frozenset(HATS) - {"none"}


def parse_caption(text: str) -> SceneGraph:
    """The scene graph of one caption or drawing prompt; empty for a text that mentions nothing of the world.

    A concept's token is its creature: `<bobo>` is the object bobo, and what is said belongs to it.
    """
    words = split_words(text.lower())
    named = [word.strip("<>") for word in words if word.strip("<>") in CONCEPT_BY_NAME]
    adjectives = {word for word in words if word in _ADJECTIVES}
    hats = {word for word in words if word in _HATS}
    places = {word for word in words if word in PLACES}
    bare = not hats and any(a == "no" and b == "hat" for a, b in pairwise(words))
    bare = bare or (not hats and "none" in words)  # the bare five-word description
    if not (named or adjectives or hats or places or bare or CREATURE in words):
        return SceneGraph()
    subject = named[0] if named else CREATURE
    return SceneGraph(
        frozenset((subject, *hats, *places)),
        frozenset((subject, word) for word in (*adjectives, *((NO_HAT,) if bare else ()))),
        frozenset([*((subject, "with", hat) for hat in hats), *((subject, "at", place) for place in places)]),
    )


def parse_captions(texts: Sequence[str]) -> list[SceneGraph]:
    """`parse_caption` of each text: the form in which SPICE takes a parser."""
    return [parse_caption(text) for text in texts]
