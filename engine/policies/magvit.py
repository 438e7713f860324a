"""MAGVIT-v2's lookup-free tokenizer, as Show-o uses it: a code is the signs of a few numbers, so no codebook is learnt.

    pixels -> encoder (conv_in, down[0] ... down[L-1], mid, norm_out, conv_out, quant_conv) -> signs -> code
    code -> +-1 -> decoder (post_quant_conv, conv_in, mid, up[L-1] ... up[0], norm_out, conv_out) -> pixels

Modules are named as the published file (`showlab/magvitv2`) names its tensors, its two constant tables among them, so
that it loads as it is. Residual and attention blocks are those of every VQGAN: transformers' own.

Source: MAGVIT-v2 (arXiv 2310.05737); the open reimplementation that Show-o (arXiv 2408.12528) released.

Dims: n images, S pixels and h, w codes of the sides, C channels, N = h w, K = 2^bits codes, L resolutions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import (
    ChameleonVQVAEEncoderAttnBlock,
    ChameleonVQVAEEncoderResnetBlock,
)

from .vqgan_decoder import PIXELS_AT_ONCE, VQGANDecoder

HALVES = {"encoder": "down", "decoder": "up"}
"""And what their resolutions are called."""
GROUPS = 32
"""Of every group norm; the width of each resolution is a multiple of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MagvitConfig:
    """Sizes; the defaults are the published ones.

    Raises:
        ValueError: sizes that do not make a tokenizer.
    """

    bits: int = 13
    """Of a code."""
    channels: int = 128
    """C of the finest resolution, before its multiplier."""
    encoder_multipliers: Sequence[int] = (1, 2, 2, 4, 4)
    """Of `channels`, by resolution, the finest first."""
    encoder_blocks: Sequence[int] = (4, 3, 4, 3, 4)
    """Residual blocks of each resolution."""
    decoder_multipliers: Sequence[int] = (1, 1, 2, 2, 4)
    decoder_blocks: Sequence[int] = (4, 4, 3, 4, 3)

    def __post_init__(self) -> None:
        names = [f"{half}_{what}" for half in HALVES for what in ("multipliers", "blocks")]
        lists: list[list[int]] = [list(getattr(self, name)) for name in names]
        if len(set(map(len, lists))) > 1 or not lists[0] or min(map(min, lists)) < 1:
            raise ValueError(f"MagvitConfig: expected four lists of positive numbers, equally long, got {lists}")
        for name, value in zip(names, lists, strict=True):
            object.__setattr__(self, name, value)  # as JSON gives them, so that equal ones are equal
        if not 1 <= self.bits <= 24 or self.channels < 1 or self.channels % GROUPS:
            raise ValueError(
                f"MagvitConfig: expected bits from 1 to 24 and channels in a positive multiple of {GROUPS}, the groups "
                f"of a norm, got {self.bits} and {self.channels}"
            )

    @property
    def num_codes(self) -> int:
        """K."""
        return 1 << self.bits

    @property
    def factor(self) -> int:
        """Pixels of a code's side."""
        return 1 << (len(self.encoder_blocks) - 1)

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]]) -> Self:
        """The sizes that a tokenizer's tensors have, by their names in the published file.

        Raises:
            KeyError, ValueError: they are no such tokenizer's.
        """
        channels = shapes["encoder.conv_in.weight"][0]
        found: dict[str, list[int]] = {}
        for half, stem in HALVES.items():
            widths, blocks = list[int](), list[int]()
            while (first := f"{half}.{stem}.{len(widths)}.block.0.conv1.weight") in shapes:
                widths.append(shapes[first][0] // channels)
                blocks.append(sum(name.startswith(first[:-14]) and name.endswith("conv1.weight") for name in shapes))
            found |= {f"{half}_multipliers": widths, f"{half}_blocks": blocks}
        return cls(bits=shapes["encoder.quant_conv.weight"][0], channels=channels, **found)


class Magvit(nn.Module):
    """Pixels to codes and back.

    Args:
        config: sizes.
    """

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder, self.quantize = Encoder(config), Decoder(config), SignQuantizer(config.bits)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """[n, 3, H, W] in [-1, 1] -> [n, bits, h, w] what the codes are the signs of, in the weights' dtype.

        Raises:
            ValueError: sides that are no multiples of the factor.
        """
        factor, weight = self.config.factor, self.encoder.conv_in.weight
        height, width = pixels.shape[-2:]
        if pixels.dim() != 4 or pixels.shape[1] != 3 or height % factor or width % factor or not height * width:
            raise ValueError(
                f"Magvit: expected pixels [n, 3, H, W] with sides in multiples of {factor}, got {list(pixels.shape)}"
            )
        parts = pixels.to(device=weight.device, dtype=weight.dtype).split(_at_once(height * width))
        return torch.cat([self.encoder(part) for part in parts])

    def encode(self, pixels: Tensor) -> Tensor:
        """[n, 3, H, W] in [-1, 1] -> [n, N] int64 codes, row by row; ValueError as `latents`."""
        return self.quantize.codes(self.latents(pixels))

    @torch.no_grad()
    def decode(self, codes: Tensor, sides: tuple[int, int]) -> Tensor:
        """[n, N] int64 codes of `sides` (h, w) -> [n, 3, H, W] float32, about [-1, 1].

        Raises:
            ValueError: not so many codes.
        """
        height, width = sides
        if codes.dim() != 2 or codes.shape[1] != height * width:
            raise ValueError(f"Magvit: expected codes [n, {height} x {width}], got {list(codes.shape)}")
        signs = self.quantize.embedding[codes].to(self.decoder.conv_in.weight.dtype)
        signs = signs.unflatten(1, sides).permute(0, 3, 1, 2).contiguous()
        parts = signs.split(_at_once(height * width * self.config.factor**2))
        return torch.cat([self.decoder(part).float() for part in parts])


def _at_once(area: int) -> int:
    """Images of `area` pixels that are worked on at a time."""
    return max(1, PIXELS_AT_ONCE // area)


class SignQuantizer(nn.Module):
    """code = sum over i of 2^(bits - 1 - i) [z_i > 0]; its entry has +1 where a bit is set and -1 where it is not.

    Both tables are constants, and in the published file.
    """

    embedding: Tensor
    """[K, bits] entries."""
    power_vals: Tensor
    """[bits] int64 weights of the bits."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        places = torch.arange(bits - 1, -1, -1)
        set_bits = torch.arange(1 << bits)[:, None] >> places & 1
        self.register_buffer("embedding", set_bits.float() * 2 - 1)
        self.register_buffer("power_vals", 1 << places)

    def codes(self, latents: Tensor) -> Tensor:
        """[n, bits, h, w] -> [n, N] int64."""
        return ((latents > 0) * self.power_vals[:, None, None]).sum(1).flatten(1)


class Encoder(nn.Module):
    """[n, 3, H, W] -> [n, bits, h, w]."""

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        width, levels = config.channels, list[nn.Module]()
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        for multiplier, count in zip(config.encoder_multipliers, config.encoder_blocks, strict=True):
            new_width = config.channels * multiplier
            blocks = [_block(new_width if index else width, new_width) for index in range(count)]
            level, width = nn.ModuleDict({"block": nn.ModuleList(blocks)}), new_width
            if len(levels) + 1 < len(config.encoder_blocks):
                level["downsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, stride=2)})
            levels.append(level)
        self.down = nn.ModuleList(levels)
        # The only place with attention: the published code's list of attended sides holds none that occurs.
        attention = ChameleonVQVAEEncoderAttnBlock(width)
        parts = {"block_1": _block(width, width), "attn_1": attention, "block_2": _block(width, width)}
        self.mid = nn.ModuleDict(parts)
        self.norm_out = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, config.bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.bits, config.bits, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.conv_in(pixels)
        for level in cast(Any, self.down):
            for block in level["block"]:
                hidden = block(hidden)
            if "downsample" in level:  # one more row and column behind: a stride of 2 on even sides
                hidden = level["downsample"]["conv"](F.pad(hidden, (0, 1, 0, 1)))
        for block in self.mid.values():
            hidden = block(hidden)
        return cast(Tensor, self.quant_conv(self.conv_out(F.silu(self.norm_out(hidden)))))


class Decoder(VQGANDecoder):
    """[n, bits, h, w] -> [n, 3, H, W]."""

    def __init__(self, config: MagvitConfig) -> None:
        plain = ChameleonVQVAEConfig(
            base_channels=config.channels,
            channel_multiplier=list(config.decoder_multipliers),
            latent_channels=config.bits,
            attn_resolutions=None,
        )
        super().__init__(plain, config.decoder_blocks)
        self.post_quant_conv = nn.Conv2d(config.bits, config.bits, 1)

    def forward(self, latents: Tensor) -> Tensor:
        return super().forward(self.post_quant_conv(latents))


def _block(width: int, new_width: int) -> nn.Module:
    return ChameleonVQVAEEncoderResnetBlock(ChameleonVQVAEConfig(dropout=0.0), width, new_width)
