"""R_id: is it the concept?  Mean over its photos of max(0, 2 (cos - 1/2)), cos between features of drawing and photo.

Works for any picture, rendered or photographed: what "features" are is the caller's choice (the policy's own frozen
vision tower, CLIP; a face embedder, as in the released code, does not come along).  Clamping per photo before the mean,
as the released code does for faces, keeps a signal where only some photos resemble the drawing: on the rendered world
with an untrained tower, 63 % of right drawings then beat one with a wrong hat, against 33 % when the mean cosine is
clamped (24 drawings; ties count as lost).
The released code's shift of every reward to mean 0.8 is left out: group advantages remove the mean anyway, and a group
of one became exactly 0.8 by it.  Source: Sync-R1's released code, rewritten.

Dims: n images, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...pictures import Fit, ImageRef, load_pictures, to_tensor
from .batches import Kept, by_shape

Features = Callable[[Tensor], Tensor]
"""Images [n, 3, H, W] float32 in [0, 1] to features [n, D]; must be frozen, or the reward drifts with the policy."""


class IdentityReward:
    """Likeness to the concept's reference photos, in [0, 1]; features of references are kept."""

    def __init__(self, features: Features, size: int, *, fit: Fit = to_tensor, max_cached: int = 4096) -> None:
        """
        Args:
            features: frozen feature extractor.
            size: reference photos are brought to this many pixels squared.
            fit: how; a policy's features want `Policy.fit()`, as it sees photos.
            max_cached: references whose features are kept; the least recently used goes first.
        """
        self.features, self.size, self.fit = features, size, fit
        self.__name__ = "identity"
        self.known: Kept[ImageRef, Tensor] = Kept(self._of_photos, lambda _: 1, max_cached)

    def __call__(
        self, *, images: Sequence[Tensor | None], references: Sequence[tuple[ImageRef, ...]], **_: Any
    ) -> list[float | None]:
        """One value per trajectory; None without an image or without references.

        Raises:
            PictureError: a reference photo cannot be read.
            ValueError: an image is not [3, H, W], or its features are not finite.
        """
        rows = [i for i, image in enumerate(images) if image is not None and references[i]]
        rewards: list[float | None] = [None] * len(images)
        if not rows:
            return rewards
        drawn = self._embed([image for i in rows if (image := images[i]) is not None])
        known = self.known([photo for i in rows for photo in references[i]])
        for row, feature in zip(rows, drawn, strict=True):
            cosines = torch.stack([known[photo] for photo in references[row]]) @ feature
            rewards[row] = float((2.0 * (cosines - 0.5)).clamp(0.0, 1.0).mean())
        return rewards

    def _of_photos(self, photos: list[ImageRef]) -> list[Tensor]:
        return self._embed(list(load_pictures(photos, self.size, self.fit)))

    def _embed(self, images: Sequence[Tensor]) -> list[Tensor]:
        """[D] of length 1 of each on the CPU; images of different sizes go through in one batch per size."""
        for image in images:
            if image.ndim != 3 or image.shape[0] != 3:
                raise ValueError(f"identity reward: expected images [3, H, W], got {tuple(image.shape)}")
        found: list[Tensor] = [torch.empty(0)] * len(images)
        with torch.no_grad():
            for members in by_shape(images):
                features = self.features(torch.stack([images[i] for i in members])).float().flatten(1).cpu()
                if not features.isfinite().all():
                    raise ValueError(
                        "identity reward: features of an image are not finite; check the feature extractor"
                    )
                for index, feature in zip(members, F.normalize(features, dim=-1), strict=True):
                    found[index] = feature.clone()  # a view would keep the whole batch in memory
        return found
