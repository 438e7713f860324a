"""Opening pictures that may come from anywhere: size checked before decoding, every mode turned into RGB.

A picture is named by an `ImageRef`: the path of a file, or a `StoredImage`, which lies inside a data file or in memory
and is read when it is needed. Images are [3, H, W] float32 in [0, 1] everywhere in the engine.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from .errors import PictureError

if TYPE_CHECKING:  # tables of data, which name pictures, are read before torch is loaded
    from torch import Tensor

MAX_PIXELS = 64 * 1024 * 1024
"""Larger pictures are refused before they are decoded (a decompression bomb is a small file)."""
PICTURE = "<image>"
"""Stands in `Prompt.text` where a picture goes; the words of a prompt that shows none may hold it."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow opens a phone's MPO as JPEG; named here, it would raise KeyError."""


class StoredImage(ABC):
    """A picture that is no file of its own. Hashable: equal ones are loaded, seen and embedded once."""

    name: str
    """Short text for logs and errors: where the picture is."""

    @abstractmethod
    def read(self) -> bytes | Image.Image:
        """The encoded file, not decoded, or a picture; whatever it raises becomes a PictureError."""


ImageRef = Path | StoredImage
Fit = Callable[[Image.Image, int], "Tensor"]
"""An RGB picture and a size -> [3, size, size] float32 in [0, 1]: `to_tensor`, or what a model's processor does."""


@dataclass(frozen=True, eq=False)
class MemoryImage(StoredImage):
    """A picture that somebody drew, shown without writing it anywhere. Equal to itself alone."""

    name: str
    image: Tensor
    """[3, H, W] float in [0, 1]."""

    def __post_init__(self) -> None:
        shape = tuple(self.image.shape)
        if len(shape) != 3 or shape[0] != 3 or 0 in shape or not self.image.is_floating_point():
            raise PictureError(f"{self.name}: expected a float image [3, H, W], got {self.image.dtype} {shape}")

    def pixels(self) -> Tensor:
        """[3, H, W] float32 on the CPU; PictureError when values are not finite or not in [0, 1]."""
        image = self.image.detach().float().cpu()
        if not (image.isfinite().all() and image.min() >= 0 and image.max() <= 1):
            raise PictureError(f"{self.name}: values must be finite and in [0, 1]; clamp the image")
        return image

    def read(self) -> Image.Image:
        return Image.fromarray((self.pixels() * 255.0).round().byte().permute(1, 2, 0).contiguous().numpy())


def open_picture(ref: ImageRef) -> Image.Image:
    """The picture as RGB, EXIF orientation applied, first frame of an animation, transparency on white.

    Raises:
        PictureError: missing, empty, truncated, of an unknown format, or above MAX_PIXELS.
    """
    with _opened(ref) as picture:
        picture.load()
        white = _white(picture) if picture.mode in DEEP_GREY else None
        return _rgb(ImageOps.exif_transpose(picture), white)


def check_picture(ref: ImageRef, *, whole: bool = True, contents: bytes | None = None) -> tuple[int, int]:
    """Width and height of a picture that can be read; nothing is kept of it.

    Args:
        ref: which one.
        whole: decode all of it, so that one which was cut off is found; else its header alone.
        contents: the encoded file, where it is at hand.

    Raises:
        PictureError: as for `open_picture`.
    """
    with _opened(ref, contents) as picture:
        size = picture.size
        if whole:
            picture.draft("RGB", (SMALL, SMALL))  # a JPEG is read to its end, but made no larger than this
            picture.load()
            if picture.mode in DEEP_GREY:
                _white(picture)
        return size


@contextmanager
def _opened(ref: ImageRef, contents: bytes | None = None) -> Iterator[Image.Image]:
    """The picture, its size checked and not yet decoded; whatever goes wrong inside becomes a PictureError."""
    name = ref if isinstance(ref, Path) else ref.name
    try:
        with _undecoded(ref) if contents is None else Image.open(io.BytesIO(contents), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise PictureError(
                    f"{name}: {picture.width}x{picture.height} pixels; at most {MAX_PIXELS} are read; shrink it"
                )
            yield picture
    except PictureError:
        raise
    except Exception as error:  # a malformed file leads Pillow's parsers to almost any exception
        raise PictureError(
            f"{name}: cannot be read as a picture ({error}); expected one of {', '.join(FORMATS)}"
        ) from error


def _undecoded(ref: ImageRef) -> Image.Image:
    """The picture with its header read and nothing more."""
    contents = ref if isinstance(ref, Path) else ref.read()
    if isinstance(contents, Image.Image):
        return contents
    return Image.open(io.BytesIO(contents) if isinstance(contents, bytes) else contents, formats=FORMATS)


def _rgb(picture: Image.Image, white: float | None) -> Image.Image:
    if white is not None:
        values = np.asarray(picture, dtype=np.float64) * (255.0 / white)
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")


DEEP_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
"""Modes of grey pictures of more than 8 bits."""
BITS_PER_SAMPLE = 258
"""A TIFF's tag."""


def _white(picture: Image.Image) -> float:
    """The value that is white in a deep grey picture: by its mode and a TIFF's bits, not by what is in it.

    A dark photo of 16 bits is dark. Real numbers lie in [0, 1] or in [0, 255], as they are written; 32-bit integers
    have no white that all agree on.
    """
    (bits, *_) = getattr(picture, "tag_v2", {}).get(BITS_PER_SAMPLE, (16 if picture.mode != "I" else 32,))
    if picture.mode.startswith("I;16"):
        return float(2**bits - 1)
    if picture.mode == "I" and bits == 16:  # with a sign
        return 32767.0
    top = float(np.asarray(picture).max())
    if picture.mode == "F" and top <= 255:
        return 1.0 if top <= 1 else 255.0
    kind = "real numbers" if picture.mode == "F" else "integers of 32 bits"
    raise ValueError(f"grey {kind} up to {top:g}, whose white nobody knows: save it with 8 or 16 bits")


def to_tensor(picture: Image.Image, size: int) -> Tensor:
    """[3, size, size] float32 in [0, 1]: scaled to cover, then cropped at the centre."""
    if picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    import torch

    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255.0).permute(2, 0, 1)


SMALL = 64
"""Pictures loaded at no more pixels a side are kept: decoding them costs more than what is done with them."""


@lru_cache(maxsize=4096)
def _load_small(ref: ImageRef, size: int, fit: Fit, version: tuple[object, ...]) -> Tensor:
    import torch

    with torch.inference_mode(False):  # what is kept is trained on, too
        return fit(open_picture(ref), size)


def version_of(ref: object) -> tuple[object, ...]:
    """What tells a file from an earlier one under its path, for keeping what was made of it; () for anything else.

    A tuple's is that of its entries.
    """
    if isinstance(ref, tuple):
        return tuple(version_of(part) for part in ref)
    if not isinstance(ref, Path):
        return ()
    try:
        found = ref.stat()
    except (OSError, ValueError):  # opening it says why
        return ()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def load_pictures(refs: Sequence[ImageRef], size: int, fit: Fit = to_tensor) -> Tensor:
    """[n, 3, size, size] float32 in [0, 1]; PictureError as for `open_picture`.

    A `MemoryImage` of that size is taken as it is, without the rounding to 8 bits that a file would mean.

    Args:
        refs: which ones.
        size: pixels of a side.
        fit: brings a picture to that size; hashable, because small pictures are kept by it.
    """
    import torch

    return torch.stack([_load(ref, size, fit) for ref in refs])


def _load(ref: ImageRef, size: int, fit: Fit) -> Tensor:
    if isinstance(ref, MemoryImage):  # seen once, so not worth keeping
        exact = tuple(ref.image.shape[1:]) == (size, size)
        return ref.pixels() if exact else fit(open_picture(ref), size)
    return _load_small(ref, size, fit, version_of(ref)) if size <= SMALL else fit(open_picture(ref), size)
