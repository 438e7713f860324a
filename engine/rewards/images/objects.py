"""The reward `detector`, T2I-R1's: are the nouns of a prompt in the drawing, so many, and where they should be?

Columns, as T2I-R1's data have them: `nouns` (a list), `task_type` (`spatial` reads `spatial_info`, `numeracy` reads
`numeracy_info`; any other asks whether the nouns are there).  Rules: object_rules.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...errors import DataError
from ..builtin.batches import check_images
from .detection import Detection, Detector
from .drawing_asked import filled, words_in
from .object_rules import nouns_score, numbers_score, relation_score


class DetectorReward:
    """In [0, 1]; None without a drawing, or where the data name no objects."""

    kind = "image"

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.__name__ = "detector"

    def __call__(self, *, images: Sequence[Tensor | None], **columns: Any) -> list[float | None]:
        labels = [_labels(columns, row) if image is not None else () for row, image in enumerate(images)]
        rows = [i for i, names in enumerate(labels) if names]
        drawn = [image for i in rows if (image := images[i]) is not None]
        check_images("detector", drawn)
        found = self.detector(drawn, [labels[i] for i in rows], self.detector.threshold)
        scores = [self._score(columns, row, found[k], drawn[k]) for k, row in enumerate(rows)]
        return filled(len(images), rows, scores)

    def _score(
        self, columns: Mapping[str, Sequence[Any]], row: int, found: Sequence[Detection], image: Tensor
    ) -> float:
        task, info = _task(columns, row)
        if task == "spatial":
            return relation_score(found, info, float(max(image.shape[1:])))
        if task == "numeracy":
            return numbers_score(found, info, self.detector.max_overlap)
        return nouns_score(found, words_in(columns, "nouns", row))


def _labels(columns: Mapping[str, Sequence[Any]], row: int) -> tuple[str, ...]:
    """What to look for, each once."""
    task, info = _task(columns, row)
    names: tuple[str, ...]
    if task == "spatial":
        names = (str(info["obj1"]), str(info["obj2"]))
    elif task == "numeracy":
        names = tuple(str(one["obj_name"]) for one in info)
    else:
        names = words_in(columns, "nouns", row)
    return tuple(dict.fromkeys(names))


def _task(columns: Mapping[str, Sequence[Any]], row: int) -> tuple[str, Any]:
    """`spatial` or `numeracy` with what is asked, or "" for nouns; DataError where its column does not say it."""
    task = columns["task_type"][row] if "task_type" in columns else None
    if task not in ("spatial", "numeracy"):
        return "", None
    name, keys = (
        ("spatial_info", {"obj1", "obj2", "locality"}) if task == "spatial" else ("numeracy_info", {"num", "obj_name"})
    )
    info = columns[name][row] if name in columns else None
    each = [info] if task == "spatial" else info
    if (
        not isinstance(each, list | tuple)
        or not each
        or not all(isinstance(one, Mapping) and keys <= set(one) for one in each)
    ):
        raise DataError(
            f"reward detector: {name}: expected {', '.join(sorted(keys))} for task_type {task}, got {info!r}; correct "
            "the row, or leave task_type empty to ask for its nouns alone"
        )
    return task, info
