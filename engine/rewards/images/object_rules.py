"""T2I-R1's rules for a detector's boxes: are the nouns there, so many of them, where they should be?

Source: CaraJ7/T2I-R1, `reward_gdino.py` (Apache-2.0), expressed anew.  What differs: boxes are corners in pixels
everywhere (the released code drops doubles among boxes by centre and size, and measures "near" by 150 of a picture
whose side is 1, so that everything is near), "on top of" and "above" count as "on the top of" (they earned nothing),
"near" counts in shares of the picture's longer side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .detection import Box, Detection, apart

NEAR = ("next to", "on side of", "near")
DIRECTIONS = {
    **dict.fromkeys(("on the left of", "left of"), (0, 1)),
    **dict.fromkeys(("on the right of", "right of"), (0, -1)),
    **dict.fromkeys(("on the top of", "on top of", "top of", "above"), (1, 1)),
    **dict.fromkeys(("on the bottom of", "below"), (1, -1)),
}
"""Words -> axis, and the sign of the second object's place less the first's."""
NEAR_SHARE = 150 / 384
"""Of the longer side: T2I-R1's 150 in pictures of 384 pixels."""
MOST_OVERLAP = 0.1
PRESENT, COUNTED_WRONG = 0.2, 0.2
"""For each object of a relation that is there; for an object that is there in another number."""


def nouns_score(found: Sequence[Detection], nouns: Sequence[str]) -> float:
    """The share of nouns that are there."""
    there = {one.label for one in found}
    return sum(noun in there for noun in nouns) / len(nouns)


def numbers_score(found: Sequence[Detection], wanted: Sequence[Mapping[str, Any]], max_overlap: float = 0.5) -> float:
    """The mean over `{"num": 2, "obj_name": "dog"}`: 1 for the right number, .2 for another, 0 for none."""
    total = 0.0
    for one in wanted:
        number = len(apart([d for d in found if d.label == one["obj_name"]], max_overlap))
        total += 1.0 if number == int(one["num"]) else COUNTED_WRONG if number else 0.0
    return total / len(wanted)


def relation_score(found: Sequence[Detection], wanted: Mapping[str, Any], side: float) -> float:
    """`{"obj1": "dog", "obj2": "cat", "locality": "left of"}`: .2 for each object that is there, and half of how well
    the best of both lie to each other; at most .9. `side`: the picture's longer one, in pixels."""
    best = [next((d for d in found if d.label == wanted[key]), None) for key in ("obj1", "obj2")]
    first, second = best
    if first is None or second is None:
        return PRESENT * sum(one is not None for one in best)
    return 2 * PRESENT + place_score(str(wanted["locality"]), first.box, second.box, NEAR_SHARE * side) / 2


def place_score(locality: str, a: Box, b: Box, near: float) -> float:
    """In [0, 1]: 1 where the words hold of the first box to the second; less the more they overlap, or the farther
    apart they are; 0 for words that are not known."""
    offset = ((b[0] + b[2] - a[0] - a[2]) / 2, (b[1] + b[3] - a[1] - a[3]) / 2)
    apart_by = (abs(offset[0]), abs(offset[1]))
    if locality in NEAR:
        return 1.0 if min(apart_by) < near else near / max(apart_by)
    if locality not in DIRECTIONS:
        return 0.0
    axis, sign = DIRECTIONS[locality]
    if offset[axis] * sign <= 0 or apart_by[axis] <= apart_by[1 - axis]:
        return 0.0
    share = _overlap(a, b)
    return 1.0 if share < MOST_OVERLAP else MOST_OVERLAP / share


def _overlap(a: Box, b: Box) -> float:
    """Intersection over union of the areas."""
    both = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / either if either else 0.0
