"""GenEval's rules: which objects count, where they lie to each other, what a prompt's clauses ask of them.

The published rules (djghosh13/geneval, evaluation/evaluate_images.py, MIT) expressed anew: the same verdicts and
reasons.  No model is asked here.  A clause's empty cells count as absent: tables cannot leave a key out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import DataError
from .detection import Box, Detection, apart

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
MAX_OBJECTS = 16
"""Of one class, best first; the others are not looked at."""
POSITION_THRESHOLD = 0.1
"""Share of both objects' sizes that does not count as a distance."""
Objects = Mapping[str, Sequence[Detection]]
"""Class -> objects, best first."""
ColoursOf = Callable[[Sequence[Detection], str], Sequence[str]]
"""Objects of one class -> the colour of each."""


@dataclass(frozen=True, slots=True)
class Clause:
    """So many of one class, of one colour, to one side of what an earlier clause found."""

    name: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None
    """One of RELATIONS, and the number of the clause in `include` that it is to."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One prompt's clauses."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Wanted:
        """A row of GenEval's `evaluation_metadata.jsonl`: `tag`, `include`, `exclude`; lists may be JSON text.

        Raises:
            DataError: it names what cannot be understood.
        """
        include = tuple(_clause(row, i, "include") for i, row in enumerate(_rows(metadata, "include")))
        exclude = tuple(_clause(row, i, "exclude") for i, row in enumerate(_rows(metadata, "exclude")))
        if not include and not exclude:
            raise DataError(f"GenEval metadata: expected include or exclude with a clause, got {dict(metadata)}")
        return cls(str(metadata.get("tag") or ""), include, exclude)

    @property
    def classes(self) -> tuple[str, ...]:
        """Each once."""
        return tuple(dict.fromkeys(clause.name for clause in (*self.include, *self.exclude)))


def is_metadata(row: Mapping[str, Any]) -> bool:
    """Whether a row says anything of what GenEval looks for."""
    return bool(row.get("include") or row.get("exclude"))


def kept(
    detections: Sequence[Detection], threshold: float, *, most: int = MAX_OBJECTS, max_overlap: float = 1.0
) -> dict[str, list[Detection]]:
    """The objects that count, by class: those above the threshold, the `most` best of them, without doubles."""
    found: dict[str, list[Detection]] = {}
    for one in sorted(detections, key=lambda one: -one.score):
        if one.score > threshold:
            found.setdefault(one.label, []).append(one)
    return {label: apart(objects[:most], max_overlap) for label, objects in found.items()}


def relations(a: Box, b: Box, threshold: float = POSITION_THRESHOLD) -> set[str]:
    """Where the first box lies to the second, of RELATIONS: none where they are too near, two on a diagonal."""
    boxes = np.array([a, b], dtype=np.float32).reshape(2, 2, 2)
    centre_a, centre_b = boxes.mean(axis=-2)
    size_a, size_b = np.abs(np.diff(boxes, axis=-2))[..., 0, :]
    offset = centre_a - centre_b
    beyond = np.maximum(np.abs(offset) - threshold * (size_a + size_b), 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    x, y = beyond / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, is_so in holds.items() if is_so}


def judged(
    wanted: Wanted, objects: Objects, colours_of: ColoursOf, *, threshold: float = POSITION_THRESHOLD
) -> tuple[bool, str]:
    """Whether every `include` and no `exclude` holds, and what does not, a line each. Only the best objects of a
    class, as many as its clause counts, are looked at for colour and position."""
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in wanted.include:
        found = list(objects.get(clause.name, ()))[: clause.count]
        fault = _fault(clause, found, groups, colours_of, threshold)
        reasons += [fault] if fault else []
        groups.append(None if fault else found)
    for clause in wanted.exclude:
        number = len(objects.get(clause.name, ()))
        if number >= clause.count:
            reasons.append(f"expected {clause.name}<{clause.count}, found {number}")
    return not reasons, "\n".join(reasons)


def _fault(
    clause: Clause,
    found: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    colours_of: ColoursOf,
    threshold: float,
) -> str:
    """Why a clause does not hold; "" where it does."""
    if len(found) < clause.count:
        return f"expected {clause.name}>={clause.count}, found {len(found)}"
    if clause.colour is not None:
        colours = list(colours_of(found, clause.name))
        number = colours.count(clause.colour)
        if number < clause.count:
            seen = ", ".join(f"{colours.count(colour)} {colour}" for colour in COLOURS if colour in colours)
            return f"expected {clause.colour} {clause.name}>={clause.count}, found {number} {clause.colour}; and {seen}"
    if clause.position is None:
        return ""
    relation, group = clause.position
    targets = groups[group]
    if targets is None:
        return f"no target for {clause.name} to be {relation}"
    for one in found:
        for target in targets:
            there = relations(one.box, target.box, threshold)
            if relation not in there:
                shown = " and ".join(name for name in RELATIONS if name in there)
                return f"expected {clause.name} {relation} target, found {shown} target"
    return ""


# Reading metadata -----------------------------------------------------------------------------------------------------


def _rows(metadata: Mapping[str, Any], key: str) -> Sequence[Any]:
    rows = _decoded(metadata.get(key), key) or ()
    if not isinstance(rows, list | tuple):
        raise DataError(f"GenEval metadata: {key}: expected a list of clauses, got {rows!r}")
    return rows


def _decoded(value: Any, key: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        raise DataError(f"GenEval metadata: {key}: expected a list, as it is or as JSON, got {value!r}") from None


def _clause(row: Any, index: int, key: str) -> Clause:
    at = f"GenEval metadata: {key}[{index}]"
    if not isinstance(row, Mapping) or not isinstance(row.get("class"), str) or not row["class"]:
        raise DataError(f'{at}: expected a mapping with "class" and "count", got {row!r}')
    count, colour = row.get("count", 1), row.get("color")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise DataError(f"{at}: count: expected a whole number of at least 1, got {count!r}")
    if colour is not None and colour not in COLOURS:
        raise DataError(f"{at}: color: expected one of {', '.join(COLOURS)}, got {colour!r}")
    position = row.get("position")
    if position is not None:
        position = _position(_decoded(position, f"{key}[{index}].position"), index, at)
    return Clause(row["class"], count, colour, position)


def _position(value: Any, index: int, at: str) -> tuple[str, int]:
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] in RELATIONS:
        try:
            target = int(value[1])
        except (TypeError, ValueError):
            target = -1
        if 0 <= target < index:
            return value[0], target
    raise DataError(
        f"{at}: position: expected one of {', '.join(RELATIONS)} and the number of an earlier clause, got {value!r}"
    )
