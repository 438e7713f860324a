"""The other half of Chameleon's VQGAN: transformers' class turns images into codes, and leaves out what draws them.

    codes -> codebook -> post_quant_conv -> conv_in -> mid -> up[L-1] ... up[0] -> norm_out -> conv_out -> pixels

Modules are named as the published file names their tensors, so that it loads as it is. What a resolution is made of is
what the encoder is made of, one block more at each: those classes are transformers' own.

Source: VQGAN (arXiv 2012.09841), Make-A-Scene (arXiv 2203.13131), Chameleon (arXiv 2405.09818).

Dims: n images, S pixels and H codes of a side, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonVQVAEEncoderAttnBlock,
    ChameleonVQVAEEncoderResnetBlock,
)

PIXELS_AT_ONCE = 1 << 20
"""Of images given to a VQGAN at a time: at full size each pixel has its hundred channels and more."""


class VQGANDecoder(nn.Module):
    """Latents [n, C, H, H] -> pixels [n, 3, S, S], S = H 2^(L-1) for L resolutions.

    Args:
        config: of the encoder, whose mirror image this is.
        blocks: residual blocks of each resolution, the finest first; None: everywhere one more than the encoder's.
    """

    def __init__(self, config: ChameleonVQVAEConfig, blocks: Sequence[int] | None = None) -> None:
        super().__init__()
        widths = [config.base_channels * factor for factor in config.channel_multiplier]
        attends = config.attn_type == "vanilla"
        resolution, width = config.resolution // factor_of(config), widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        attention = ChameleonVQVAEEncoderAttnBlock(width) if attends else nn.Identity()
        self.mid = nn.ModuleDict(
            {"block_1": _block(config, width, width), "attn_1": attention, "block_2": _block(config, width, width)}
        )
        levels = []
        for level in reversed(range(len(widths))):
            made, attentions = [], []
            for _ in range(config.num_res_blocks + 1 if blocks is None else blocks[level]):
                made.append(_block(config, width, widths[level]))
                width = widths[level]
                if attends and resolution in (config.attn_resolutions or ()):
                    attentions.append(ChameleonVQVAEEncoderAttnBlock(width))
            parts: dict[str, nn.Module] = {"block": nn.ModuleList(made), "attn": nn.ModuleList(attentions)}
            if level:
                parts["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})
                resolution *= 2
            levels.append(nn.ModuleDict(parts))
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, config.in_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = self.conv_in(latents)
        for name in ("block_1", "attn_1", "block_2"):
            hidden = self.mid[name](hidden)
        for level in cast(Any, reversed(self.up)):
            for index, block in enumerate(level["block"]):
                hidden = block(hidden)
                if level["attn"]:
                    hidden = level["attn"][index](hidden)
            if "upsample" in level:
                hidden = level["upsample"]["conv"](F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(hidden))))


def _block(config: ChameleonVQVAEConfig, width: int, new_width: int) -> nn.Module:
    return ChameleonVQVAEEncoderResnetBlock(config, width, new_width)


def factor_of(config: ChameleonVQVAEConfig) -> int:
    """Pixels of a code's side."""
    return int(2 ** (len(config.channel_multiplier) - 1))


def geometry_of(shapes: Mapping[str, torch.Size], resolution: int) -> ChameleonVQVAEConfig:
    """The configuration that a VQGAN's tensors have, as far as it decides shapes.

    Args:
        shapes: of its tensors, by their names in the published file.
        resolution: of the images that it was trained on, which no shape tells.

    Raises:
        KeyError: a tensor is not there that every VQGAN has.
    """
    base = shapes["encoder.conv_in.weight"][0]
    count = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.down."))
    blocks = {name.split(".")[4] for name in shapes if name.startswith("encoder.down.0.block.")}
    widths = [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(count)]
    attended = [level for level in range(count) if f"encoder.down.{level}.attn.0.q.weight" in shapes]
    codes, embed_dim = shapes["quantize.embedding.weight"]
    latent, out = shapes["post_quant_conv.weight"][0], shapes["encoder.conv_out.weight"][0]
    return ChameleonVQVAEConfig(
        embed_dim=embed_dim,
        num_embeddings=codes,
        double_latent=out != latent,
        latent_channels=latent,
        resolution=resolution,
        in_channels=shapes["encoder.conv_in.weight"][1],
        base_channels=base,
        channel_multiplier=[width // base for width in widths],
        num_res_blocks=len(blocks),
        attn_resolutions=[resolution >> level for level in attended],
        attn_type="vanilla" if "encoder.mid.attn_1.q.weight" in shapes else "none",
    )


# Both halves ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encoded(vqmodel: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 3, S, S] normalised -> ([n, H H] int64 codes, [n, C] float32 what the codes were chosen by)."""
    weight, codes, latents = vqmodel.quantize.embedding.weight, [], []
    for part in pixels.split(_at_once(pixels.shape[-1])):
        latent = vqmodel.quant_conv(vqmodel.encoder(part.to(device=weight.device, dtype=weight.dtype)))
        codes.append(vqmodel.quantize(latent)[2].view(len(part), -1))
        latents.append(latent.float().flatten(1))
    return torch.cat(codes), torch.cat(latents)


@torch.no_grad()
def decoded(vqmodel: Any, codes: Tensor, side: int) -> Tensor:
    """[n, H H] int64 codes, H = `side` -> [n, 3, S, S] float32, normalised as the encoder's input is."""
    pixels = []
    for part in codes.split(_at_once(side * factor_of(vqmodel.config))):
        latent = vqmodel.quantize.embedding(part.view(-1, side, side)).permute(0, 3, 1, 2).contiguous()
        pixels.append(vqmodel.decoder(vqmodel.post_quant_conv(latent)).float())
    return torch.cat(pixels)


def _at_once(side: int) -> int:
    return max(1, PIXELS_AT_ONCE // side**2)
