"""Which of GenEval's ten colours an object has: CLIP's choice among captions, as GenEval's published evaluation.

An object is cut out by its box; with a mask, all else in the box is #999.  Source: djghosh13/geneval
(`color_classification`) over clip_benchmark's zero-shot classifier: features of length 1, the mean over three
sentences brought to length 1 again, the greatest cosine.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..builtin.clip import ClipScorer
from .detection import Detection
from .geneval_rules import COLOURS

SENTENCES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
BACKGROUND = 0x99 / 255


class Cut(NamedTuple):
    """An object whose colour is asked for."""

    image: Tensor
    """[3, H, W] in [0, 1]."""
    found: Detection
    name: str
    """Its class in words."""


class Colours:
    """The colour of objects, many in a pass."""

    def __init__(self, clip: ClipScorer) -> None:
        self.clip = clip
        self._classifiers: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def __call__(self, cuts: Sequence[Cut]) -> list[str]:
        """One of COLOURS for each."""
        if not cuts:
            return []
        features = self.clip.features_of([cut_out(cut.image, cut.found) for cut in cuts])
        classifiers = torch.stack([self._classifier(cut.name) for cut in cuts])
        best = torch.einsum("nd,ncd->nc", features, classifiers).argmax(-1)
        return [COLOURS[index] for index in best.tolist()]

    def _classifier(self, name: str) -> Tensor:
        """[10, D] of length 1."""
        with self._lock:
            if name not in self._classifiers:
                texts = [form.format(colour=colour, name=name) for colour in COLOURS for form in SENTENCES]
                each = self.clip.text_features(texts).view(len(COLOURS), len(SENTENCES), -1)
                self._classifiers[name] = F.normalize(each.mean(1), dim=-1)
            return self._classifiers[name]


def cut_out(image: Tensor, found: Detection) -> Tensor:
    """[3, h, w]: the box's part of a picture, at least a pixel; what the mask leaves out is grey."""
    if found.mask is not None:
        if found.mask.shape != image.shape[1:]:
            raise ValueError(f"colours: expected a mask {tuple(image.shape[1:])}, got {tuple(found.mask.shape)}")
        image = torch.where(found.mask, image, image.new_tensor(BACKGROUND))
    left, top, right, bottom = map(round, found.box)
    height, width = image.shape[1:]
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return image[:, top : max(bottom, top + 1), left : max(right, left + 1)]
