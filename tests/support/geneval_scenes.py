"""500 rendered scenes with known objects, and what GenEval's published code says of them.

A scene is a picture of coloured boxes, what a detector says of it (scores, doubles, a mask for half of the scenes), and
one of GenEval's kinds of prompt that holds of it or nearly does.  `geneval_published.json` has the published verdicts;
`python tests/support/geneval_scenes.py CLONE/evaluation/evaluate_images.py` writes it anew from a clone of
github.com/djghosh13/geneval (af4902f), by its own `compute_iou`, `relative_position` and `evaluate`.
"""

from __future__ import annotations

import ast
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from syncr1.engine.rewards.images.detection import Detection

FIXTURE = Path(__file__).with_name("geneval_published.json")
NUMBER, HEIGHT, WIDTH, COLUMNS, ROWS = 500, 120, 160, 5, 4
NAMES = ("dog", "cat", "tv remote", "bench", "wine glass")
RELATIONS = ("left of", "right of", "above", "below")
RGB: Mapping[str, tuple[float, float, float]] = {
    "red": (0.9, 0.1, 0.1),
    "orange": (1.0, 0.6, 0.0),
    "yellow": (1.0, 1.0, 0.1),
    "green": (0.1, 0.7, 0.1),
    "blue": (0.1, 0.1, 0.9),
    "purple": (0.5, 0.0, 0.7),
    "pink": (1.0, 0.6, 0.8),
    "brown": (0.45, 0.25, 0.1),
    "black": (0.0, 0.0, 0.0),
    "white": (1.0, 1.0, 1.0),
}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@dataclass(frozen=True)
class Scene:
    """One picture and prompt."""

    image: Tensor
    """[3, HEIGHT, WIDTH]."""
    found: tuple[Detection, ...]
    colours: tuple[str, ...]
    """Of each that was found."""
    metadata: dict[str, Any]
    max_overlap: float


def scenes() -> list[Scene]:
    """The same ones every time: of Python's random numbers only `random()` is asked, which no version changes."""
    rng = random.Random(17)
    return [_scene(rng, TAGS[i % len(TAGS)]) for i in range(NUMBER)]


def _pick(rng: random.Random, items: Sequence[Any]) -> Any:
    return items[int(rng.random() * len(items))]


def _scene(rng: random.Random, tag: str) -> Scene:
    metadata = _metadata(rng, tag)
    asked = {c["class"]: c for c in metadata["include"]}
    cells = sorted(range(COLUMNS * ROWS), key=lambda _: rng.random())
    image, found, colours = torch.full((3, HEIGHT, WIDTH), 0.8), [], []
    with_masks, by_class = rng.random() < 0.5, sorted({*asked, _pick(rng, NAMES)})
    for name in by_class:
        clause = asked.get(name, {"count": 0})
        for _ in range(max(0, clause["count"] + _pick(rng, (0, 0, 0, 0, 1, -1)))):
            colour = clause.get("color") if rng.random() < 0.8 else None
            colour = colour or _pick(rng, list(RGB))
            box = _box(rng, cells.pop())
            left, top, right, bottom = map(int, box)
            image[:, top:bottom, left:right] = torch.tensor(RGB[colour])[:, None, None]
            mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
            mask[top:bottom, left:right] = True
            score = float(np.float32(0.9 + 0.1 * rng.random() if rng.random() < 0.85 else 0.9 * rng.random()))
            found.append(Detection(name, score, box, mask if with_masks else None))
            colours.append(colour)
            if rng.random() < 0.1:  # the detector says it twice
                again = (box[0] + 1, *box[1:])
                found.append(Detection(name, float(np.float32(score * 0.99)), again, mask if with_masks else None))
                colours.append(colour)
    return Scene(image, tuple(found), tuple(colours), metadata, _pick(rng, (1.0, 0.5)))


def _box(rng: random.Random, cell: int) -> tuple[float, float, float, float]:
    """Within a cell of the picture: whole pixels, at least 6 wide."""
    wide, tall = WIDTH // COLUMNS, HEIGHT // ROWS
    left, top = wide * (cell % COLUMNS), tall * (cell // COLUMNS)
    x, y = int(rng.random() * 8), int(rng.random() * 8)
    return (left + x, top + y, left + x + 6 + int(rng.random() * 16), top + y + 6 + int(rng.random() * 14))


def _metadata(rng: random.Random, tag: str) -> dict[str, Any]:
    names = sorted(NAMES, key=lambda _: rng.random())[:2]
    clauses: list[dict[str, Any]] = [{"class": name, "count": 1} for name in names]
    if tag in ("single_object", "colors", "counting"):
        clauses = clauses[:1]
    if tag in ("colors", "color_attr"):
        clauses = [{**clause, "color": _pick(rng, list(RGB))} for clause in clauses]
    row: dict[str, Any] = {"tag": tag, "include": clauses}
    if tag == "position":
        clauses[1]["position"] = [_pick(rng, RELATIONS), 0]
    if tag == "counting":
        clauses[0]["count"] = 2 + int(rng.random() * 3)
        row["exclude"] = [{"class": names[0], "count": clauses[0]["count"] + 1}]
    return {**row, "prompt": f"a photo of {tag}"}


# The published code ---------------------------------------------------------------------------------------------------


def published(path: Path) -> list[list[Any]]:
    """[correct, reason] of each scene, by the functions of the file at `path`; words of a set in their order there are
    sorted, since Python's are not."""
    wanted = ("compute_iou", "relative_position", "evaluate")
    body = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") in wanted]
    theirs: dict[str, Any] = {"np": np, "COLORS": list(RGB), "POSITION_THRESHOLD": 0.1}
    exec(compile(ast.Module(body, []), str(path), "exec"), theirs)
    theirs["color_classification"] = lambda image, objects, name: [colour for _, colour in objects]
    verdicts = []
    for scene in scenes():
        correct, reason = theirs["evaluate"](None, _their_objects(scene, theirs["compute_iou"]), scene.metadata)
        verdicts.append([bool(correct), in_order(reason)])
    return verdicts


def in_order(reason: str) -> str:
    """The words of two directions sorted."""
    lines = []
    for line in reason.split("\n"):
        head, found, tail = line.partition(", found ")
        if tail.endswith(" target"):
            tail = " and ".join(sorted(tail.removesuffix(" target").split(" and "))) + " target"
        lines.append(head + found + tail)
    return "\n".join(lines)


def _their_objects(scene: Scene, iou: Any) -> dict[str, list[Any]]:
    """As their `evaluate_image` keeps boxes: by score, above the threshold, 16 at most, without doubles."""
    threshold = 0.9 if scene.metadata["tag"] == "counting" else 0.3
    kept: dict[str, list[Any]] = {}
    for name in NAMES:
        rows = [i for i, one in enumerate(scene.found) if one.label == name]
        boxes = np.array([[*scene.found[i].box, scene.found[i].score] for i in rows], np.float32).reshape(-1, 5)
        order = np.argsort(boxes[:, 4])[::-1]
        order = order[boxes[order, 4] > threshold][:16].tolist()
        while order:
            best = order.pop(0)
            kept.setdefault(name, []).append((boxes[best], scene.colours[rows[best]]))
            if scene.max_overlap != 1:
                order = [i for i in order if iou(boxes[best], boxes[i]) < scene.max_overlap]
    return kept


if __name__ == "__main__":
    FIXTURE.write_text(json.dumps(published(Path(sys.argv[1])), indent=None, separators=(",", ":")) + "\n")
