"""What is asked about handwritten digits, and what is to be drawn.

| task | asked | said | drawn |
|---|---|---|---|
| read | a digit is shown: which one is it? | its word | another hand's of the same |
| count | four are shown: how many are above five? | a word | |
| reckon | draw the sum of three and four | `seven` | a seven |
| write | draw a seven | | a seven |

Held out are pictures (handwriting.py) and wordings; what digits make together is learnt by heart, as a concept is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from .handwriting import NAMES, Picture, Split, alone, rows_of, sheet

Wordings = dict[Split, tuple[str, ...]]

READ: Final[Wordings] = {
    "train": ("which digit is this?", "what digit do you see?", "name the digit."),
    "test": ("which digit do you see?", "what digit is this?"),
}
COUNT: Final[Wordings] = {
    "train": ("how many are above {limit}?", "how many digits are greater than {limit}?", "count those above {limit}."),
    "test": ("how many digits are above {limit}?", "count the digits greater than {limit}."),
}
DRAW: Final[Wordings] = {
    "train": ("draw {a_digit}.", "write the digit {digit}.", "make a picture of {a_digit}."),
    "test": ("draw the digit {digit}.", "make {a_digit}."),
}
RECKON: Final[dict[str, Wordings]] = {
    "sum": {
        "train": ("draw the sum of {a} and {b}.", "write what {a} and {b} make.", "draw {a} plus {b}."),
        "test": ("write the sum of {a} and {b}.", "draw what {a} plus {b} make."),
    },
    "difference": {
        "train": ("draw {a} minus {b}.", "write what is left of {a} without {b}."),
        "test": ("write {a} minus {b}.", "draw what is left of {a} without {b}."),
    },
    "larger": {
        "train": ("draw the larger of {a} and {b}.", "write whichever of {a} and {b} is greater."),
        "test": ("write the larger of {a} and {b}.", "draw whichever of {a} and {b} is greater."),
    },
}
RESULT: Final[dict[str, Callable[[int, int], int]]] = {
    "sum": lambda a, b: a + b,
    "difference": lambda a, b: a - b,
    "larger": max,
}
LIMITS: Final = (3, 4, 5, 6)


@dataclass(frozen=True, eq=False)
class Item:
    """One prompt: `photo` is uint8 [32, 32, 3] or None, `answer` the word that is right or None, `digit` what a
    drawing must show or None."""

    task: str
    question: str
    photo: Picture | None = None
    answer: str | None = None
    digit: int | None = None


def pairs_of(kind: str) -> tuple[tuple[int, int], ...]:
    """The pairs of digits that are reckoned with: those with a result of one digit."""
    return tuple((a, b) for a in range(10) for b in range(10) if 0 <= RESULT[kind](a, b) <= 9)


def _one_of(rng: np.random.Generator, digit: int, split: Split) -> int:
    rows = rows_of(split)[digit]
    return rows[int(rng.integers(len(rows)))]


def _worded(rng: np.random.Generator, wordings: Wordings, split: Split, **words: str) -> str:
    return wordings[split][int(rng.integers(len(wordings[split])))].format(**words)


def read(rng: np.random.Generator, split: Split) -> Item:
    """A digit to read, and then to write."""
    digit = int(rng.integers(10))
    return Item("read", _worded(rng, READ, split), alone(_one_of(rng, digit, split)), NAMES[digit], digit)


def count(rng: np.random.Generator, split: Split) -> Item:
    """Four digits, of which some are above another; as often none as all."""
    limit, above = LIMITS[int(rng.integers(len(LIMITS)))], int(rng.integers(5))
    high = [int(rng.integers(limit + 1, 10)) for _ in range(above)]
    digits = rng.permutation([*high, *(int(rng.integers(limit + 1)) for _ in range(4 - above))])
    a, b, c, d = (_one_of(rng, int(digit), split) for digit in digits)
    return Item("count", _worded(rng, COUNT, split, limit=NAMES[limit]), sheet([a, b, c, d]), NAMES[above])


def reckon(rng: np.random.Generator, split: Split) -> Item:
    """A digit to reckon, and then to write."""
    kind = tuple(RECKON)[int(rng.integers(len(RECKON)))]
    pairs = pairs_of(kind)
    a, b = pairs[int(rng.integers(len(pairs)))]
    digit = RESULT[kind](a, b)
    question = _worded(rng, RECKON[kind], split, a=NAMES[a], b=NAMES[b])
    return Item("reckon", question, None, NAMES[digit], digit)


def draw(rng: np.random.Generator, split: Split) -> Item:
    """A digit to write."""
    digit = int(rng.integers(10))
    article = "an" if NAMES[digit] == "eight" else "a"
    question = _worded(rng, DRAW, split, digit=NAMES[digit], a_digit=f"{article} {NAMES[digit]}")
    return Item("write", question, None, None, digit)


TASKS: Final[dict[str, Callable[[np.random.Generator, Split], Item]]] = {
    "read": read,
    "count": count,
    "reckon": reckon,
    "write": draw,
}


def stream(mix: dict[str, float], seed: int, split: Split) -> Iterator[Item]:
    """Endless items, each task as often as its weight says."""
    rng = np.random.default_rng(seed)
    names, share = tuple(mix), np.array(list(mix.values()))
    while True:
        yield TASKS[names[int(rng.choice(len(names), p=share / share.sum()))]](rng, split)


def vocabulary() -> tuple[str, ...]:
    """Every word of the texts, sorted."""
    tables = [READ, COUNT, DRAW, *RECKON.values()]
    texts = [wording for table in tables for wordings in table.values() for wording in wordings]
    words = {word for text in texts for word in re.findall(r"[a-z]+|[?.,]", re.sub(r"\{\w+\}", " ", text))}
    return tuple(sorted(words | {"a", "an", *NAMES}))
