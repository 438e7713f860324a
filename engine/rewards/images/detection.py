"""What detectors find: labelled boxes, with a mask where the detector has one; how boxes overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the picture; x1 and y1 lie behind the last pixel."""


class Detection(NamedTuple):
    """One object."""

    label: str
    score: float
    """In [0, 1]; of which kind is the detector's."""
    box: Box
    mask: Tensor | None = None
    """[H, W] bool on the CPU; None: the detector has boxes alone."""


class Detector(Protocol):
    """Finds objects by their names. The three numbers are GenEval's settings, published for Mask2Former alone."""

    threshold: float
    """Least score of an object."""
    counting_threshold: float
    """The same where objects are counted."""
    max_overlap: float
    """Boxes of one label with at least this overlap are one object; 1: all stay."""

    def __call__(
        self, images: Sequence[Tensor], labels: Sequence[Sequence[str]], least: float
    ) -> list[list[Detection]]:
        """For each image [3, H, W] in [0, 1]: the objects of its labels with a score above `least`, best first."""
        ...


def overlap(a: Box, b: Box) -> float:
    """Intersection over union as GenEval has it: a box's last pixel counts as inside."""
    both = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    either = _area(a) + _area(b) - both
    return both / either if either else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0] + 1, 0.0) * max(box[3] - box[1] + 1, 0.0)


def apart(detections: Sequence[Detection], max_overlap: float) -> list[Detection]:
    """Those of one label, best first, without what overlaps a better one by `max_overlap` or more; 1 keeps all."""
    if max_overlap == 1:
        return list(detections)
    found: list[Detection] = []
    for one in detections:
        if all(overlap(better.box, one.box) < max_overlap for better in found):
            found.append(one)
    return found
