"""The closed sets the world is made of: attributes, their values, the twelve concepts.

A `Look` is everything that can be seen in a picture; a `Concept` is a named creature: a look without a place, a
favourite place, and facts that no picture shows. Words are lower case and single, since the tiny model's tokenizer is
a word list.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import product
from typing import Final

SHAPES: Final = ("round", "square", "triangle")
COLOURS: Final = ("red", "green", "blue", "yellow", "purple")
HATS: Final = ("none", "crown", "tophat")
PATTERNS: Final = ("plain", "striped")
PLACES: Final = ("beach", "forest", "city", "moon")

ATTRIBUTES: Final = ("shape", "colour", "hat", "pattern", "place")
"""Attribute names in the fixed order of a description and of every `[..., 5]` array of hits."""
VALUES: Final[dict[str, tuple[str, ...]]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "hat": HATS,
    "pattern": PATTERNS,
    "place": PLACES,
}

FOODS: Final = ("pizza", "apple", "cake", "fish", "soup")
SOUNDS: Final = ("moo", "beep", "hum", "roar")
OWNERS: Final = ("anna", "ben", "carl", "dora")


@dataclass(frozen=True, order=True)
class Look:
    """What one picture shows; each field is a word of `VALUES`."""

    shape: str
    colour: str
    hat: str
    pattern: str
    place: str

    def __post_init__(self) -> None:
        for name in ATTRIBUTES:
            if getattr(self, name) not in VALUES[name]:
                raise ValueError(f"Look: {name} must be one of {VALUES[name]}, got {getattr(self, name)!r}")

    def words(self) -> tuple[str, str, str, str, str]:
        """The five values in the order of `ATTRIBUTES`."""
        return (self.shape, self.colour, self.hat, self.pattern, self.place)

    def description(self) -> str:
        """The canonical five-word description, e.g. `round red crown striped beach`."""
        return " ".join(self.words())

    def indices(self) -> tuple[int, ...]:
        """The position of each value in `VALUES`, in the order of `ATTRIBUTES`."""
        return tuple(VALUES[name].index(word) for name, word in zip(ATTRIBUTES, self.words(), strict=True))

    def at(self, place: str) -> Look:
        """The same creature at another place."""
        return replace(self, place=place)

    def to_dict(self) -> dict[str, str]:
        """Attribute name to word, the form kept in `attributes.json`."""
        return dict(zip(ATTRIBUTES, self.words(), strict=True))

    @classmethod
    def from_dict(cls, values: dict[str, str]) -> Look:
        """Inverse of `to_dict`; raises ValueError on a missing or unknown attribute."""
        if set(values) != set(ATTRIBUTES):
            raise ValueError(f"Look: expected the keys {ATTRIBUTES}, got {tuple(values)}")
        return cls(**values)


LOOKS: Final[tuple[Look, ...]] = tuple(Look(*words) for words in product(SHAPES, COLOURS, HATS, PATTERNS, PLACES))
"""All 360 looks; a look's position here is its row in every table of renders."""
LOOK_INDEX: Final[dict[Look, int]] = {look: row for row, look in enumerate(LOOKS)}


@dataclass(frozen=True)
class Concept:
    """A named creature: `look.place` is its favourite place; food, sound, owner and friend are never visible."""

    name: str
    look: Look
    food: str
    sound: str
    owner: str
    friend: str

    @property
    def token(self) -> str:
        """How texts write the name, e.g. `<bobo>`; folder names leave the brackets out."""
        return f"<{self.name}>"

    @property
    def place(self) -> str:
        """The favourite place."""
        return self.look.place


_TABLE = """
bobo  round    red    crown  striped beach  pizza moo  anna gigi
dudu  square   red    none   plain   city   apple beep ben  kiki
fifi  triangle red    tophat striped moon   cake  hum  carl lulu
gigi  round    green  tophat plain   forest fish  roar dora bobo
kiki  square   green  crown  striped city   soup  moo  anna dudu
lulu  triangle green  none   plain   beach  pizza beep ben  fifi
mimi  round    blue   none   striped moon   apple hum  carl nono
nono  square   blue   tophat plain   beach  cake  roar dora mimi
pipi  triangle blue   crown  plain   forest fish  moo  ben  titi
titi  round    yellow tophat striped city   soup  beep carl pipi
wawa  square   yellow crown  plain   moon   pizza hum  dora zuzu
zuzu  triangle purple none   striped forest apple roar anna wawa
"""


def _read_table() -> tuple[Concept, ...]:
    rows = [line.split() for line in _TABLE.strip().splitlines()]
    return tuple(Concept(row[0], Look(*row[1:6]), *row[6:]) for row in rows)


CONCEPTS: Final[tuple[Concept, ...]] = _read_table()
CONCEPT_BY_NAME: Final[dict[str, Concept]] = {concept.name: concept for concept in CONCEPTS}

UNSEEN_PLACE: Final[dict[str, str]] = {
    concept.name: PLACES[(PLACES.index(concept.place) + 1 + row % 3) % len(PLACES)]
    for row, concept in enumerate(CONCEPTS)
}
"""Per concept, the one place (never its favourite) where no training picture, question or prompt puts it."""


def _held_out_looks() -> frozenset[Look]:
    """Twelve concepts at their unseen place, then looks no concept has, ranked by a hash no library changes."""
    unseen = {concept.look.at(UNSEEN_PLACE[concept.name]) for concept in CONCEPTS}
    bodies = {concept.look.at(place) for concept in CONCEPTS for place in PLACES}
    ranked = sorted(set(LOOKS) - bodies, key=lambda look: sha256(look.description().encode()).hexdigest())
    return frozenset(unseen | set(ranked[: NUM_HELD_OUT - len(unseen)]))


NUM_HELD_OUT: Final = len(LOOKS) // 5
HELD_OUT_LOOKS: Final[frozenset[Look]] = _held_out_looks()
"""The fixed fifth of all looks that nothing trains on: not the tokenizer, not SFT, not RL."""
TRAIN_LOOKS: Final[tuple[Look, ...]] = tuple(look for look in LOOKS if look not in HELD_OUT_LOOKS)
