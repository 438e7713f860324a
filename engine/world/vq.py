"""The world's image tokenizer: a small `JanusVQVAE` (transformers' class) that turns 32x32 pixels into 4x4 = 16 tokens.

Weights lie beside this file and come from `recipes/tiny_vq.py`. Pixels go in and out as a Janus image processor has
them: `[n, 3, 32, 32]` in [-1, 1]; `round_trip` is the same in [0, 1]. Codebook rows have unit norm, because
`decode()` normalises them and `encode()` doesn't: with unit rows both read one codebook, and nearest row means
largest inner product.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import syncr1.engine.compat  # noqa: F401  # torchvision must import beside a CPU torch before transformers loads Janus

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from transformers.models.janus.modeling_janus import JanusVQVAE

FOLDER: Final = Path(__file__).parent
WEIGHTS: Final = "vq.safetensors"
CONFIG: Final = "vq_config.json"


def vq_config(folder: Path = FOLDER, **overrides: Any) -> Any:
    """The stored `JanusVQVAEConfig`; `overrides` replace fields, e.g. `projection_dim` to fit another hidden size."""
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig

    return JanusVQVAEConfig(**{**json.loads((folder / CONFIG).read_text()), **overrides})


def load_vq(folder: Path = FOLDER, *, dtype: torch.dtype = torch.float32) -> JanusVQVAE:
    """The trained tokenizer, frozen, in eval mode; raises FileNotFoundError when the weights are missing."""
    from transformers.models.janus.modeling_janus import JanusVQVAE

    vq = JanusVQVAE(vq_config(folder)).to(dtype)
    load_vq_into(vq, folder)
    return vq


def load_vq_into(vq: JanusVQVAE, folder: Path = FOLDER) -> None:
    """Fill `vq` (say a Janus model's `model.vqmodel`) with the trained weights, cast to its dtype, and freeze it."""
    from safetensors.torch import load_file

    vq.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    with torch.no_grad():  # half-precision storage moves rows off the unit sphere by 1e-3; encode() needs them on it
        rows = vq.quantize.embedding.weight
        rows.copy_(torch.nn.functional.normalize(rows.float(), dim=-1))
    vq.requires_grad_(False).eval()


def save_vq(vq: JanusVQVAE, folder: Path) -> None:
    """Write the weights in half precision (2.2 MB) and the config to `folder`."""
    from safetensors.torch import save_file

    state = {name: value.to(torch.float16).contiguous() for name, value in vq.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors leaves the file readable by its owner alone
    hidden = ("transformers_version", "architectures", "dtype", "model_type")
    config = {name: value for name, value in vq.config.to_diff_dict().items() if name not in hidden}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def to_pixels(pictures: NDArray[np.uint8]) -> Tensor:
    """uint8 `[n, H, W, 3]` to float32 `[n, 3, H, W]` in [-1, 1]."""
    return torch.tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0


@torch.no_grad()
def encode(vq: JanusVQVAE, pixels: Tensor) -> Tensor:
    """Pixels `[n, 3, 32, 32]` in [-1, 1] to token ids int64 `[n, 16]` (HF's `encode` returns them as one flat axis)."""
    return vq.encode(pixels).image_tokens.view(pixels.shape[0], -1)


@torch.no_grad()
def decode(vq: JanusVQVAE, ids: Tensor) -> Tensor:
    """Token ids `[n, 16]` to pixels `[n, 3, 32, 32]`, clipped to [-1, 1]."""
    return vq.decode(ids).clamp(-1.0, 1.0)


def round_trip(vq: JanusVQVAE, images: Tensor, *, batch: int = 90) -> Tensor:
    """Encode and decode images `[n, 3, 32, 32]` in [0, 1]; same shape and range back."""
    parts = [decode(vq, encode(vq, part * 2.0 - 1.0)) for part in images.split(batch)]
    return (torch.cat(parts) + 1.0) / 2.0
