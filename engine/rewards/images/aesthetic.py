"""LAION's aesthetic predictor: how much people like a picture's looks, 1 to 10, by linear layers on CLIP's features.

The published file (`sac+logos+ava1-l14-linearMSE.pth`, a pickle, which is not read here) holds five linear layers with
nothing between them but dropout.  Two forms are read: a folder of a CLIP vision tower whose safetensors hold the layers
too (`layers.0.weight`, …: shunk031's conversions), and the layers alone in a safetensors file, on CLIP ViT-L/14.

Dims: n images, D features.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection
from transformers.utils import cached_file

from ...errors import ConfigError
from ...reasons import reading
from ..builtin.batches import check_images
from ..builtin.pretrained import Preparation, frozen
from .drawing_asked import drawn_rows, filled
from .image_rewards import CLIP_L14
from .loading import load, parts

LAYER = re.compile(r"(?:layers|mlp|predictor)\.(?:(\d+)\.)?(weight|bias)")
MOST = 10.0
"""The best looks, which the reward divides by."""
Layers = list[tuple[Tensor, Tensor]]
"""Weight [out, in] and bias [out] of each, in order."""


class AestheticScorer:
    """Looks in about [1, 10].

    Args:
        model: CLIPVisionModelWithProjection.
        preparation: of its image processor.
        layers: on its features of length 1.
        batch_size: images in one pass.
    """

    def __init__(self, model: Any, preparation: Preparation, layers: Layers, *, batch_size: int = 64) -> None:
        self.model, self.preparation, self.batch_size = frozen(model), preparation, batch_size
        self.layers = [(weight.to(model.device), bias.to(model.device)) for weight, bias in layers]
        widths = [model.config.projection_dim, *(weight.shape[0] for weight, _ in layers)]
        if [weight.shape[1] for weight, _ in layers] != widths[:-1] or widths[-1] != 1:
            shapes = ", ".join(str(tuple(weight.shape)) for weight, _ in layers)
            raise ConfigError(
                f"reward_models: aesthetic: expected layers from {widths[0]} features to one number, got {shapes}; "
                "name the CLIP that they were made for, in one folder with them"
            )

    @classmethod
    def from_pretrained(cls, name: str, *, device: torch.device | str = "cpu") -> AestheticScorer:
        """A folder, a name on the hub, or a safetensors file of the layers alone; ConfigError where it is neither."""
        alone = name.endswith(".safetensors")
        tower = CLIP_L14 if alone else name
        model, processor = load(
            "aesthetic", CLIPVisionModelWithProjection, tower, processor_class=CLIPImageProcessor, device=device
        )
        with reading("reward_models: aesthetic", name):
            path = Path(name).expanduser() if alone else cached_file(name, "model.safetensors")
            layers = read_layers(Path(str(path)))
        return cls(model, Preparation.of(processor), layers)

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor]) -> list[float]:
        """One number for each image [3, H, W] in [0, 1]."""
        check_images("aesthetic", images)
        scores = [0.0] * len(images)
        for members in parts(images, self.batch_size):
            pixels = self.preparation(torch.stack([images[i] for i in members]).to(self.model.device).float())
            features = F.normalize(self.model(pixel_values=pixels.to(self.model.dtype)).image_embeds.float(), dim=-1)
            for weight, bias in self.layers:
                features = F.linear(features, weight, bias)
            for index, score in zip(members, features[:, 0].tolist(), strict=True):
                scores[index] = score
        return scores


def read_layers(path: Path) -> Layers:
    """The linear layers among a safetensors file's tensors, in the order of their numbers; ConfigError without any."""
    found: dict[int, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (no mapping)
            if match := LAYER.fullmatch(name):
                found.setdefault(int(match[1] or 0), {})[match[2]] = file.get_tensor(name).float()
    layers = [(found[i]["weight"], found[i]["bias"]) for i in sorted(found) if len(found[i]) == 2]
    if not layers:
        raise ConfigError(
            f"reward_models: aesthetic: expected layers.0.weight, layers.0.bias, … in {path.name}, got none of them; "
            "name LAION's predictor as safetensors (docs/image_rewards.md)"
        )
    return layers


class AestheticReward:
    """A tenth of the predicted looks; None without a drawing."""

    kind = "image"

    def __init__(self, scorer: AestheticScorer) -> None:
        self.scorer = scorer
        self.__name__ = "aesthetic"

    def __call__(self, *, images: Sequence[Tensor | None], **_: Any) -> list[float | None]:
        rows, drawn = drawn_rows(images)
        return filled(len(images), rows, [score / MOST for score in self.scorer(drawn)])
