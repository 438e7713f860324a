"""The models that rewards ask: transformers' checkpoints, read as safetensors, frozen, and no code of theirs run.

Dims: n images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from ...errors import ConfigError
from ...reasons import reading


class Pretrained:
    """What is made of a checkpoint: its constructor takes the model, the tokenizer, where pictures are prepared a
    `Preparation`, and settings of its own."""

    model_class: ClassVar[Any]
    """Of transformers, such as `CLIPModel` or `AutoModel`."""
    processor_class: ClassVar[Any] = None
    """Of transformers' image processors; None: no picture is looked at."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        revision: str | None = None,
        prepared_as: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        **more: Any,
    ) -> Self:
        """The checkpoint of that name on the hub, or in that folder.

        Args:
            name_or_folder: with safetensors, and a tokenizer.
            revision: commit, branch or tag on the hub; None: main.
            prepared_as: where tokenizer and image processor are from, as for the model itself; None: from there.
            device: of the model.
            dtype: of its weights.
            more: settings of the constructor.

        Raises:
            ConfigError: nothing there, no safetensors, or an image processor with settings that `Preparation` cannot
                follow.
        """
        where = {"revision": revision or "main", "trust_remote_code": False}
        processor = None
        with reading(f"reward model {cls.__name__}", name_or_folder):
            model = cls.model_class.from_pretrained(name_or_folder, dtype=dtype, use_safetensors=True, **where)
            if prepared_as is not None:
                name_or_folder, where = prepared_as, where | {"revision": "main"}
            tokenizer = AutoTokenizer.from_pretrained(name_or_folder, **where)
            if cls.processor_class is not None:
                processor = cls.processor_class.from_pretrained(name_or_folder, **where)
        parts = [model.to(device), tokenizer]
        if processor is not None:
            parts.append(Preparation.of(processor))
        return cls(*parts, **more)


def frozen(model: Any) -> Any:
    """The same model, in eval mode and without gradients."""
    return model.eval().requires_grad_(False)


_MODES = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the ways to resample, which processors' files hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What a transformers image processor does to a picture, for tensors in [0, 1]."""

    size: tuple[int, int] | int
    """Height and width, or the shorter side alone, which keeps the aspect."""
    crop: tuple[int, int] | None
    """Height and width of the middle that stays."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str

    @classmethod
    def of(cls, processor: Any) -> Self:
        """From a `CLIPImageProcessor`, a `BlipImageProcessor`, or another that only resizes, crops and normalises.

        Raises:
            ConfigError: it has settings that this cannot follow; the message has them.
        """
        settings = processor.to_dict()
        size, crop = settings["size"], settings.get("crop_size")
        mode = _MODES.get(int(settings.get("resample", 3)))
        whole = "shortest_edge" in size or {"height", "width"} <= set(size)
        if not (whole and mode and settings.get("do_normalize", True) and settings.get("do_resize", True)):
            raise ConfigError(
                f"image processor: expected one that resizes and normalises, got {settings}; take another checkpoint"
            )
        edge = size.get("shortest_edge")
        target = int(edge) if edge else (int(size["height"]), int(size["width"]))
        cut = (int(crop["height"]), int(crop["width"])) if crop and settings.get("do_center_crop") else None
        smallest = (target, target) if isinstance(target, int) else target
        if cut is not None and (cut[0] > smallest[0] or cut[1] > smallest[1]):
            raise ConfigError(
                f"image processor: expected a crop within size {size}, got {cut}, which needs padding, which is not "
                "supported; take another checkpoint"
            )
        return cls(
            size=target,
            crop=cut,
            mean=tuple(settings["image_mean"]),
            std=tuple(settings["image_std"]),
            mode=mode,
        )

    def __call__(self, images: Tensor) -> Tensor:
        """[n, 3, H, W] float32 in [0, 1] -> [n, 3, *size or *crop] float32, normalised."""
        height, width = images.shape[2:]
        if isinstance(self.size, int):
            short, long = sorted((height, width))
            longer = int(self.size * long / short)
            size = (self.size, longer) if height <= width else (longer, self.size)
        else:
            size = self.size
        if size != (height, width):
            images = F.interpolate(images, size, mode=self.mode, antialias=True).clamp(0.0, 1.0)
        if self.crop is not None:
            top, left = (round((side - cut) / 2) for side, cut in zip(size, self.crop, strict=True))
            images = images[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std
