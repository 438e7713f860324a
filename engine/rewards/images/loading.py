"""Checkpoints of transformers' classes with their own processors: safetensors only, frozen, no code of theirs run.

Dims: n images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from torch import Tensor
from transformers import AutoConfig, AutoProcessor

from ...reasons import reading
from ..builtin.batches import by_shape
from ..builtin.pretrained import frozen, whole


class Loaded(NamedTuple):
    """A model in eval mode, and what prepares its inputs."""

    model: Any
    processor: Any


def model_type(key: str, name: str | Path) -> str:
    """`mask2former`, `blip`, …: what the checkpoint's own config says; ConfigError where there is none."""
    with reading(f"reward_models: {key}", name):
        return str(AutoConfig.from_pretrained(name, trust_remote_code=False).model_type)


def load(
    key: str,
    model_class: Any,
    name: str | Path,
    *,
    processor_class: Any = AutoProcessor,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Loaded:
    """A checkpoint of that class, on that device.

    Args:
        key: of `reward_models`, for errors.
        model_class, processor_class: of transformers.
        name: folder, or name on the hub.
        dtype: of the weights.

    Raises:
        ConfigError: nothing there, no safetensors, a model of another kind, or files that its library cannot read.
    """
    setting = f"reward_models: {key}"
    with reading(setting, name):
        model = whole(setting, model_class, name, dtype=dtype, trust_remote_code=False)
        processor = processor_class.from_pretrained(name, trust_remote_code=False)
    return Loaded(frozen(model.to(device)), processor)


def as_bytes(image: Tensor) -> Tensor:
    """[3, H, W] float in [0, 1] -> uint8 on the CPU, as a picture file holds it: what processors expect."""
    return (image.detach().float().clamp(0.0, 1.0) * 255.0).round().to("cpu", torch.uint8)


def parts(images: Sequence[Tensor], most: int) -> Iterator[list[int]]:
    """Indices of images of one shape, at most so many at once."""
    for members in by_shape(images):
        for start in range(0, len(members), most):
            yield members[start : start + most]
