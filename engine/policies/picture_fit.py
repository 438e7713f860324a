"""How a picture comes to the size that a model sees, and from there to the numbers that it is given.

What the checkpoint's own image processor does is the law (`--picture_fit processor`); two others are there for those
who want them: `crop` covers the square and loses what stands over, `pad` shows all and fills the rest with grey.

    file -> open_picture -> fit -> [0, 1] pixels at the model's size -> Normalisation.pixels -> what the model is given

The engine keeps pictures in [0, 1], so a processor's rescaling and normalisation come last: pixel by pixel they are
what `processor(images=...)` gives, to the rounding of float32.

Dims: n images, H = W = size pixels of a side.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from PIL import Image
from torch import Tensor

from ..errors import ConfigError
from ..pictures import Fit, to_tensor
from ..settings.train_config import PictureFit

GREY = (127, 127, 127)
"""Around a picture where nothing says another colour; DeepSeek's processor has the same."""
OTHER_WAY = "pass --picture_fit pad or crop"


@dataclass(frozen=True)
class ByProcessor:
    """What an image processor makes of a picture, rescaling and normalisation apart.

    Raises:
        ConfigError: it fails, or what it makes is not of the model's size.
    """

    processor: Any = field(compare=False, repr=False)
    settings: str
    """Tells processors apart that would make other pictures."""

    @classmethod
    def of(cls, processor: Any) -> Self:
        return cls(processor, described(processor))

    def __call__(self, picture: Image.Image, size: int) -> Tensor:
        name = type(self.processor).__name__
        try:
            # As a list: some processors take a single picture for a batch of rows.
            made = self.processor([picture], do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
        except Exception as error:  # settings of any kind, in code of any kind
            raise ConfigError(
                f"picture_fit: the checkpoint's {name} cannot prepare a picture of {picture.width}x{picture.height} "
                f"({type(error).__name__}: {error}); correct its settings, or {OTHER_WAY}"
            ) from error
        pixels = made[0]
        if tuple(pixels.shape) != (3, size, size):
            raise ConfigError(
                f"picture_fit: expected [3, {size}, {size}] of the checkpoint's {name}, because the model sees "
                f"{size}x{size} pixels, got {list(pixels.shape)} for a picture of {picture.width}x{picture.height}; "
                f"correct its settings, or {OTHER_WAY}"
            )
        return pixels.float() / 255.0


@dataclass(frozen=True)
class Whole:
    """All of the picture, its longer side scaled to the size, centred on a background."""

    background: tuple[int, int, int] = GREY
    resample: int = int(Image.Resampling.BICUBIC)
    """Pillow's number of the filter."""

    def __call__(self, picture: Image.Image, size: int) -> Tensor:
        longer = max(picture.size)
        width, height = (max(1, round(side * size / longer)) for side in picture.size)
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling(self.resample))
        canvas = Image.new("RGB", (size, size), self.background)
        canvas.paste(picture, ((size - width) // 2, (size - height) // 2))
        return to_tensor(canvas, size)


def described(processor: Any) -> str:
    """An image processor's settings as a text, equal for equal ones."""
    return f"{type(processor).__name__} {json.dumps(processor.to_dict(), sort_keys=True, default=str)}"


def fit_of(kind: PictureFit, processor: Any, own: Fit | None = None) -> Fit:
    """The fit of a model.

    Args:
        kind: as in the setting.
        processor: the checkpoint's image processor; None: it has none, and `processor` is `crop`.
        own: in the place of the processor's, where that is for layouts that ours are not.
    """
    if kind == "pad":
        return Whole(background_of(processor))
    if kind == "crop" or (processor is None and own is None):
        return to_tensor
    return ByProcessor.of(processor) if own is None else own


def background_of(processor: Any) -> tuple[int, int, int]:
    """The colour of a processor's mean, as Janus pads; grey without one."""
    mean = getattr(processor, "image_mean", None)
    if mean is None:
        return GREY
    red, green, blue = (int(value * 255) for value in _three(mean))
    return red, green, blue


def _three(value: float | Sequence[float]) -> tuple[float, float, float]:
    """One number stands for all channels."""
    if isinstance(value, int | float):
        return (float(value),) * 3
    red, green, blue = map(float, value)
    return red, green, blue


@dataclass(frozen=True)
class Normalisation:
    """Pixels in [0, 1] to what a model is given, and back: `p = (scale * x - mean) / std`."""

    scale: float = 1.0
    """255 times the processor's rescale factor; 255 where it does not rescale."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @classmethod
    def of(cls, processor: Any) -> Self:
        """That of an image processor.

        Raises:
            ConfigError: it normalises, and has no mean or standard deviation, or one of 0.
        """
        scale = 255.0 * float(processor.rescale_factor) if processor.do_rescale else 255.0
        if not processor.do_normalize:
            return cls(scale)
        mean, std = processor.image_mean, processor.image_std
        if mean is None or std is None or 0.0 in _three(std) or not scale:
            raise ConfigError(
                f"{type(processor).__name__}: expected image_mean, image_std and rescale_factor other than 0 where "
                f"do_normalize is true, got {mean}, {std}, {processor.rescale_factor}; correct the checkpoint's "
                "preprocessor_config.json"
            )
        return cls(scale, _three(mean), _three(std))

    def pixels(self, images: Tensor) -> Tensor:
        """[n, 3, H, W] in [0, 1] -> the same shape as the model is given it."""
        scaled = images if self.scale == 1.0 else images * self.scale
        return (scaled - self._channels(self.mean, images)) / self._channels(self.std, images)

    def images(self, pixels: Tensor) -> Tensor:
        """What a model has drawn, [n, 3, H, W] -> in [0, 1], as the processor's `postprocess` before it rounds."""
        found = pixels * self._channels(self.std, pixels) + self._channels(self.mean, pixels)
        return (found if self.scale == 1.0 else found / self.scale).clamp(0, 1)

    @staticmethod
    def _channels(values: tuple[float, float, float], like: Tensor) -> Tensor:
        return like.new_tensor(values)[:, None, None]
