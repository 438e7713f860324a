"""What rewards of pictures share: drawings checked and taken together by shape, what was found in a picture kept.

Dims: n images.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...pictures import ImageRef, open_picture, version_of

TOLERANCE = 1e-3
"""How far outside [0, 1] rounding may bring a pixel."""

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def check_images(who: str, images: Sequence[Tensor]) -> None:
    """Refuses what is not [3, H, W] float in [0, 1]; one transfer from a GPU, however many images.

    Raises:
        ValueError: another shape, integers, NaN, or values outside [0, 1]; the message has the range found.
    """
    for image in images:
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"{who}: expected images [3, H, W], got {tuple(image.shape)}")
        if not image.is_floating_point():
            raise ValueError(f"{who}: expected float images in [0, 1], got {image.dtype}; divide bytes by 255")
    if not images:
        return
    low, high = torch.stack([torch.stack(torch.aminmax(image)).float() for image in images]).T
    least, most = float(low.min()), float(high.max())
    if not (least >= -TOLERANCE and most <= 1.0 + TOLERANCE):  # false for NaN
        hint = "; use (image + 1) / 2" if -1.0 - TOLERANCE <= least < 0 and most <= 1.0 + TOLERANCE else ""
        raise ValueError(f"{who}: expected images in [0, 1], found values in [{least:.4g}, {most:.4g}]{hint}")


def by_shape(images: Sequence[Tensor]) -> list[list[int]]:
    """Indices of images of one shape, for each shape: what can be stacked."""
    members: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        members.setdefault(tuple(image.shape), []).append(index)
    return list(members.values())


def picture_pixels(ref: ImageRef) -> Tensor:
    """[3, H, W] float32 in [0, 1], at the picture's own size and aspect."""
    return torch.from_numpy(np.array(open_picture(ref), dtype=np.float32)).permute(2, 0, 1) / 255.0


def stretched(images: Tensor, size: tuple[int, int]) -> Tensor:
    """[n, 3, *size] in [0, 1]: bilinear with antialiasing, the aspect given up, as torchvision's `Resize((h, w))`."""
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0.0, 1.0)


class Kept(Generic[Key, Value]):  # Python 3.11 has no other way
    """What was computed of a key, kept up to a number of bytes: the least recently used goes first. For many threads.

    A picture's path is a key for as long as its file stays what it is.

    Args:
        compute: keys -> their values, in one batch.
        size: bytes of a value.
        max_bytes: what is kept between calls; one call may hold more.
    """

    def __init__(
        self, compute: Callable[[list[Key]], Sequence[Value]], size: Callable[[Value], int], max_bytes: int
    ) -> None:
        self._compute, self._size, self.max_bytes = compute, size, max_bytes
        self._kept: OrderedDict[tuple[Key, tuple[object, ...]], Value] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes, self.num_computed = 0, 0

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, keys: Sequence[Key]) -> dict[Key, Value]:
        """The value of every key; an unknown one is computed once, even if two threads ask for it."""
        wanted = {key: (key, version_of(key)) for key in keys}
        with self._lock:
            new = [key for key, entry in wanted.items() if entry not in self._kept]
            if new:
                made = dict(zip((wanted[key] for key in new), self._compute(new), strict=True))
                self._kept.update(made)
                self.num_computed += len(made)
                self.num_bytes += sum(self._size(value) for value in made.values())
            for entry in wanted.values():
                self._kept.move_to_end(entry)
            found = {key: self._kept[entry] for key, entry in wanted.items()}
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._size(self._kept.popitem(last=False)[1])
        return found
