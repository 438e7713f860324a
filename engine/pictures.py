"""Opening pictures that may come from anywhere: size checked before decoding, every mode turned into RGB.

Images are [3, H, W] float32 in [0, 1] everywhere in the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MAX_PIXELS = 64 * 1024 * 1024
"""Larger pictures are refused before they are decoded (a decompression bomb is a small file)."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow opens a phone's MPO as JPEG; named here, it would raise KeyError."""


class PictureError(ValueError):
    """A picture that cannot be used; the message names the file and the reason."""


def open_picture(path: Path) -> Image.Image:
    """The picture as RGB, EXIF orientation applied, first frame of an animation, transparency on white.

    Raises:
        PictureError: missing, empty, truncated, of an unknown format, or above MAX_PIXELS.
    """
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise PictureError(
                    f"{path}: {picture.width}x{picture.height} pixels; at most {MAX_PIXELS} are read; shrink it"
                )
            picture.load()
            return _rgb(ImageOps.exif_transpose(picture))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise PictureError(
            f"{path}: cannot be read as a picture ({error}); expected one of {', '.join(FORMATS)}"
        ) from error


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, dtype=np.float64)
        top = 65535.0 if values.max() > 255 else 255.0
        return Image.fromarray((values.clip(0, top) * (255.0 / top)).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")


def to_tensor(picture: Image.Image, size: int) -> Tensor:
    """[3, size, size] float32 in [0, 1]: scaled to cover, then cropped at the centre."""
    if picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255.0).permute(2, 0, 1)


@lru_cache(maxsize=4096)
def _load_small(path: Path, size: int) -> Tensor:
    return to_tensor(open_picture(path), size)


def load_pictures(paths: Sequence[Path], size: int) -> Tensor:
    """[n, 3, size, size] float32 in [0, 1]."""
    return torch.stack(
        [_load_small(path, size) if size <= 64 else to_tensor(open_picture(path), size) for path in paths]
    )
