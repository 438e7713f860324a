"""The image tokenizer of the tiny Show-o, of both worlds: a small MAGVIT-v2, 32x32 pixels to 4x4 codes of 8 bits.

Weights lie beside this file and come from `recipes/tiny_vq.py --kind magvit`. Pixels go in and out as an image
processor has them: `[n, 3, 32, 32]` in [-1, 1]; `round_trip` is the same in [0, 1].
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...policies.magvit import Magvit, MagvitConfig

FOLDER: Final = Path(__file__).parent
WEIGHTS: Final = "sign_vq.safetensors"
CONFIG: Final = "sign_vq_config.json"
SIDES: Final = (4, 4)


def sign_vq_config(folder: Path = FOLDER) -> MagvitConfig:
    """The stored sizes."""
    return MagvitConfig(**json.loads((folder / CONFIG).read_text()))


def load_sign_vq(folder: Path = FOLDER) -> Magvit:
    """The trained tokenizer, frozen, in eval mode; raises FileNotFoundError when the weights are missing."""
    vq = Magvit(sign_vq_config(folder))
    vq.load_state_dict(load_file(folder / WEIGHTS))
    return vq.requires_grad_(False).eval()


def save_sign_vq(vq: Magvit, folder: Path) -> None:
    """Writes the weights in half precision (1.4 MB) and the sizes to `folder`; the tables' numbers are exact in it."""
    halves = {name: value.half() if value.is_floating_point() else value for name, value in vq.state_dict().items()}
    save_file({name: value.contiguous() for name, value in halves.items()}, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors leaves the file readable by its owner alone
    (folder / CONFIG).write_text(json.dumps(asdict(vq.config), indent=2) + "\n")


@torch.no_grad()
def round_trip(vq: Magvit, images: Tensor, *, batch: int = 90) -> Tensor:
    """Encodes and decodes images `[n, 3, 32, 32]` in [0, 1]; same shape and range back."""
    parts = [vq.decode(vq.encode(part * 2.0 - 1.0), SIDES).clamp(-1.0, 1.0) for part in images.split(batch)]
    return (torch.cat(parts) + 1.0) / 2.0
