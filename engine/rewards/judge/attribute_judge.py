"""R_vlm: does the image show what was asked for?

Where a record names its attributes (the rendered world), a checker reads them off the image.  Where it does not
(photographs), a frozen copy of the policy says whether it finds the explicit description truer of the image than others
like it (builtin/caption.py).  Sync-R1 asks a remote model for a number instead; a judge of that kind is a reward
function like any other, and may be `async`.

Dims: n images, A attributes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..builtin.batches import by_shape

AttributeScorer = Callable[[Tensor, Sequence[Mapping[str, str]]], Tensor]
"""Images [n, 3, H, W] in [0, 1] and the attributes wanted of each (possibly a part of all) to how right each is:
[n, A] float in [0, 1] (0 or 1 when the reading is hard); NaN for an attribute that is not named. The order of the
columns and their number are the scorer's own."""

CaptionScorer = Callable[[Tensor, Sequence[str]], Tensor]
"""Images [n, 3, H, W] in [0, 1] and n descriptions to how well each fits: [n] in [0, 1]; NaN = cannot be said."""


class AttributeJudge:
    """Share of the named attributes that are right; None without an image or without attributes."""

    def __init__(self, scorer: AttributeScorer) -> None:
        self.scorer = scorer
        self.__name__ = "judge"

    def __call__(
        self, *, images: Sequence[Tensor | None], attributes: Sequence[Mapping[str, str] | None], **_: Any
    ) -> list[float | None]:
        rows = [i for i, image in enumerate(images) if image is not None and attributes[i]]
        rewards: list[float | None] = [None] * len(images)
        if rows:
            wanted = [attributes[i] for i in rows]
            hits = self.scorer(torch.stack([images[i] for i in rows]), wanted)  # type: ignore[misc,arg-type]
            for row, value in zip(rows, hits.float().nanmean(-1).tolist(), strict=True):
                rewards[row] = value
        return rewards


class CaptionJudge:
    """How well `target` fits the image; None without an image or a target."""

    def __init__(self, scorer: CaptionScorer) -> None:
        self.scorer = scorer
        self.__name__ = "judge"

    def __call__(
        self, *, images: Sequence[Tensor | None], target: Sequence[str | None], **_: Any
    ) -> list[float | None]:
        rows = [i for i, image in enumerate(images) if image is not None and target[i]]
        rewards: list[float | None] = [None] * len(images)
        drawn = [image for i in rows if (image := images[i]) is not None]
        for members in by_shape(drawn):
            texts = [str(target[rows[i]]) for i in members]
            values = self.scorer(torch.stack([drawn[i] for i in members]), texts)
            for index, value in zip(members, values.tolist(), strict=True):
                rewards[rows[index]] = value if math.isfinite(value) else None  # a text without words has none
        return rewards


class Judge:
    """`AttributeJudge` for records with attributes, `CaptionJudge` for the others; either may be absent."""

    def __init__(self, scorer: AttributeScorer | None = None, captions: CaptionScorer | None = None) -> None:
        if scorer is None and captions is None:
            raise ValueError("Judge: expected an attribute scorer, a caption scorer, or both, got neither")
        self.by_attributes = None if scorer is None else AttributeJudge(scorer)
        self.by_caption = None if captions is None else CaptionJudge(captions)
        self.__name__ = "judge"

    @property
    def who(self) -> str:
        """Who decides, for people."""
        reader = "a reader of the attributes that a request names (how sure it is that each is right, their mean)"
        caption = "the starting model, frozen (how much truer of the image it finds what was asked than other requests)"
        if self.by_attributes is None:
            return caption
        return reader if self.by_caption is None else f"{reader}; where it names none by {caption}"

    def __call__(
        self,
        *,
        images: Sequence[Tensor | None],
        attributes: Sequence[Mapping[str, str] | None],
        target: Sequence[str | None],
        **_: Any,
    ) -> list[float | None]:
        checked = [bool(wanted) and self.by_attributes is not None for wanted in attributes]
        rewards: list[float | None] = [None] * len(images)
        if self.by_attributes is not None:
            rewards = self.by_attributes(images=images, attributes=attributes)
        if self.by_caption is not None:
            left = [None if done else image for image, done in zip(images, checked, strict=True)]
            described = self.by_caption(images=left, target=target)
            rewards = [
                first if done else second for first, second, done in zip(rewards, described, checked, strict=True)
            ]
        return rewards


def index_scorer(read_indices: Callable[[Tensor], Tensor], values: Mapping[str, Sequence[str]]) -> AttributeScorer:
    """A scorer with hits of 0 and 1, from a reader of images.

    Args:
        read_indices: images [n, 3, H, W] in [0, 1] to the position of each attribute's value, int64 [n, len(values)],
            such as `AttributeChecker.read_indices` or `JudgeCNN.read_indices` of the rendered world.
        values: attribute -> its values, in the order of those columns and positions (`world.attributes.VALUES`).

    Raises:
        ValueError: an attribute or a value that `values` does not have, or readings of another shape.
    """
    columns = list(values)

    def scorer(images: Tensor, wanted: Sequence[Mapping[str, str]]) -> Tensor:
        names = _names(wanted, values)
        read = read_indices(images).cpu()
        if read.shape != (len(wanted), len(columns)):
            raise ValueError(
                f"attribute scorer: expected readings [{len(wanted)}, {len(columns)}], got {tuple(read.shape)}"
            )
        hits = torch.full((len(wanted), len(names)), math.nan)
        for row, attributes in enumerate(wanted):
            for name, value in attributes.items():
                right = int(read[row, columns.index(name)]) == values[name].index(value)
                hits[row, names.index(name)] = float(right)
        return hits

    return scorer


def posterior_scorer(
    posterior: Callable[[Tensor], Mapping[str, Tensor]], values: Mapping[str, Sequence[str]]
) -> AttributeScorer:
    """A scorer whose hits are probabilities, which tells near misses apart where hard hits tie.

    Args:
        posterior: images [n, 3, H, W] to attribute -> [n, len(values[attribute])] probabilities, such as the world's
            `AttributeChecker.posterior`.
        values: attribute -> its values, in the order of those columns.

    Raises:
        ValueError: an attribute or a value that `values` does not have.
    """

    def scorer(images: Tensor, wanted: Sequence[Mapping[str, str]]) -> Tensor:
        names = _names(wanted, values)
        read = posterior(images)
        hits = torch.full((len(wanted), len(names)), math.nan)
        for row, attributes in enumerate(wanted):
            for name, value in attributes.items():
                hits[row, names.index(name)] = float(read[name][row, values[name].index(value)])
        return hits

    return scorer


def _names(wanted: Sequence[Mapping[str, str]], values: Mapping[str, Sequence[str]]) -> list[str]:
    """The attributes named anywhere in `wanted`, sorted; each value checked."""
    for attributes in wanted:
        for name, value in attributes.items():
            if value not in values.get(name, ()):
                raise ValueError(f"attribute scorer: {name}={value!r} is unknown; known: {dict(values)}")
    return sorted({name for attributes in wanted for name in attributes})
