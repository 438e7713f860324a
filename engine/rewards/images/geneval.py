"""GenEval without mmdet: does a drawing show the objects, numbers, colours and places that its prompt asks for?

The detector is transformers' Mask2Former (the published one's sizes and post-processing), OWLv2 or Grounding DINO; the
colours are CLIP's; the rules are the published ones.  With Mask2Former and CLIP ViT-L/14 all settings are published;
those of the others are ours.

Dims: n images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..builtin.batches import check_images
from ..builtin.clip import ClipScorer
from .colours import Colours, Cut
from .detection import Detection, Detector
from .detectors import load_detector
from .geneval_rules import Objects, Wanted, is_metadata, judged, kept


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one drawing."""

    correct: bool
    reason: str
    """What does not hold, a line each; "" where all does."""
    found: tuple[Detection, ...]
    """The objects that counted."""


class GenEval:
    """GenEval's verdicts.

    Args:
        detector: finds the objects.
        colours: tells their colours.
        threshold, counting_threshold, max_overlap: see `Detector`; None: the detector's own.
    """

    def __init__(
        self,
        detector: Detector,
        colours: Colours,
        *,
        threshold: float | None = None,
        counting_threshold: float | None = None,
        max_overlap: float | None = None,
    ) -> None:
        self.detector, self.colours = detector, colours
        self.threshold = detector.threshold if threshold is None else threshold
        self.counting_threshold = detector.counting_threshold if counting_threshold is None else counting_threshold
        self.max_overlap = detector.max_overlap if max_overlap is None else max_overlap

    @classmethod
    def from_pretrained(cls, detector: str, colours: str, *, device: torch.device | str = "cpu") -> GenEval:
        """Of two checkpoints, each a folder or a name on the hub; ConfigError where one cannot be had."""
        clip = ClipScorer.from_pretrained(colours, device=device)
        return cls(load_detector("geneval", detector, device=device), Colours(clip))

    def verdicts(self, images: Sequence[Tensor], metadata: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One for each image [3, H, W] in [0, 1] and row of GenEval's metadata (`tag`, `include`, `exclude`).

        Raises:
            DataError: metadata that cannot be understood, or a class that the detector does not know.
            ValueError: an image is not what `check_images` takes.
        """
        check_images("geneval", images)
        wanted = [Wanted.of(row) for row in metadata]
        least = min(self.threshold, self.counting_threshold)
        found = self.detector(images, [one.classes for one in wanted], least)
        objects = [self._kept(one, detections) for one, detections in zip(wanted, found, strict=True)]
        known = self._coloured(images, wanted, objects)
        verdicts = []
        for row, (one, there) in enumerate(zip(wanted, objects, strict=True)):
            correct, reason = judged(
                one,
                there,
                lambda cuts, _, row=row: [known[row, id(cut)] for cut in cuts],  # type: ignore[misc]
            )
            verdicts.append(Verdict(correct, reason, tuple(one for group in there.values() for one in group)))
        return verdicts

    def _kept(self, wanted: Wanted, detections: Sequence[Detection]) -> dict[str, list[Detection]]:
        threshold = self.counting_threshold if wanted.tag == "counting" else self.threshold
        return kept(detections, threshold, max_overlap=self.max_overlap)

    def _coloured(
        self, images: Sequence[Tensor], wanted: Sequence[Wanted], objects: Sequence[Objects]
    ) -> dict[tuple[int, int], str]:
        """Row and object -> its colour, for all whose colour a verdict rests on; one pass for all drawings."""
        asked: dict[tuple[int, int], Cut] = {}
        for row, (one, there) in enumerate(zip(wanted, objects, strict=True)):
            for clause in one.include:
                found = list(there.get(clause.name, ()))[: clause.count]
                if clause.colour is not None and len(found) == clause.count:
                    asked |= {(row, id(cut)): Cut(images[row], cut, clause.name) for cut in found}
        return dict(zip(asked, self.colours(list(asked.values())), strict=True))


class GenEvalReward:
    """1 where GenEval's verdict is right, else 0; None without a drawing, or where the data have no GenEval metadata.

    Metadata are the columns `include`, `exclude` and `tag`, or one column `metadata` that holds them.
    """

    kind = "image"

    def __init__(self, geneval: GenEval) -> None:
        self.geneval = geneval
        self.__name__ = "geneval"

    def __call__(self, *, images: Sequence[Tensor | None], **columns: Any) -> list[float | None]:
        metadata = [metadata_of(columns, row) for row in range(len(images))]
        rows = [i for i, image in enumerate(images) if image is not None and is_metadata(metadata[i])]
        rewards: list[float | None] = [None] * len(images)
        drawn = [image for i in rows if (image := images[i]) is not None]
        for row, verdict in zip(rows, self.geneval.verdicts(drawn, [metadata[i] for i in rows]), strict=True):
            rewards[row] = float(verdict.correct)
        return rewards


def metadata_of(columns: Mapping[str, Sequence[Any]], row: int) -> dict[str, Any]:
    """GenEval's metadata of a row, from columns of their own or from `metadata`; empty where there are none."""
    whole = columns.get("metadata")
    held = whole[row] if whole is not None and isinstance(whole[row], Mapping) else {}
    return {key: columns[key][row] if key in columns else held.get(key) for key in ("tag", "include", "exclude")}
