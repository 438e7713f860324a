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
from transformers import CONFIG_MAPPING, AutoTokenizer, PretrainedConfig

from ...errors import ConfigError
from ...reasons import reading

POOLER = "pooler."
"""In names of a layer that BERT and ViT have behind their last one, which published checkpoints (TrOCR, RoBERTa) often
lack: no reward reads it."""


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
            ConfigError: nothing there, no safetensors, a model of another kind, or an image processor with settings
                that `Preparation` cannot follow.
        """
        where = {"revision": revision or "main", "trust_remote_code": False}
        processor = None
        setting = f"reward model {cls.__name__}"
        with reading(setting, name_or_folder):
            model = whole(setting, cls.model_class, name_or_folder, dtype=dtype, **where)
            if prepared_as is not None:
                name_or_folder, where = prepared_as, where | {"revision": "main"}
            tokenizer = AutoTokenizer.from_pretrained(name_or_folder, **where)
            if cls.processor_class is not None:
                processor = cls.processor_class.from_pretrained(name_or_folder, **where)
        parts = [model.to(device), tokenizer]
        if processor is not None:
            parts.append(Preparation.of(processor))
        return cls(*parts, **more)


def whole(setting: str, model_class: Any, name: str | Path, *, dtype: torch.dtype, **where: Any) -> Any:
    """The checkpoint as that class of transformers', all of its weights from the file: for a model of another kind
    transformers makes up those that are not there, at random, and says so in a warning.

    Args:
        setting: that names the files, for errors.
        where: revision and the like, as `from_pretrained` takes them.

    Raises:
        ConfigError: config.json is another kind's, or weights are missing.
    """
    wanted = getattr(model_class, "config_class", None)  # a class for any kind has none
    kind = PretrainedConfig.get_config_dict(name, **where)[0].get("model_type")
    known = None  # a kind of code of its own, which is not run
    if kind in CONFIG_MAPPING:  # a lazy mapping, whose `get` finds nothing
        known = CONFIG_MAPPING[kind]
    parts = getattr(known, "sub_configs", {}).values()  # a CLIP's picture half is one, too
    if wanted is not None and known is not None and not issubclass(known, wanted) and wanted not in parts:
        raise ConfigError(
            f"{setting}: expected a checkpoint of {wanted.model_type}, got {name}, whose config.json says {kind}; name "
            "another"
        )
    model, told = model_class.from_pretrained(
        name, dtype=dtype, use_safetensors=True, output_loading_info=True, **where
    )
    absent = sorted(key for key in dict(model.named_parameters()) if key in told["missing_keys"] and POOLER not in key)
    if absent:
        raise ConfigError(
            f"{setting}: expected all weights of {model_class.__name__}, got {name} without {len(absent)} of them "
            f"({absent[0]}, …); name a checkpoint that was trained as one"
        )
    return model


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
