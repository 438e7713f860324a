"""MAGVIT-v2's tokenizer: published names and shapes, the released code's numbers, codes as they are defined."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import small_show_o as small
import torch

from syncr1.engine.policies.magvit import Magvit, MagvitConfig, SignQuantizer

PUBLISHED = json.loads((Path(small.__file__).parent / "show_o_published.json").read_text())
"""What showlab/Show-o's own code (commit 45a5a2d) gives with the weights of `small.fill`."""


def shapes_of(config: MagvitConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Magvit(config).state_dict().items()}


def tokenizer(config: MagvitConfig = small.VQ) -> Magvit:
    made = Magvit(config).eval()
    small.fill(made)
    return made


def test_the_published_one() -> None:
    """Names and shapes of the released file, counted and in part written out by hand, its two tables among them."""
    shapes = shapes_of(MagvitConfig())
    expected = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.block.3.conv2.weight": (128, 128, 3, 3),
        "encoder.down.0.downsample.conv.bias": (128,),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.3.block.0.conv1.weight": (512, 256, 3, 3),
        "encoder.down.4.block.3.norm1.weight": (512,),
        "encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "encoder.conv_out.weight": (13, 512, 3, 3),
        "encoder.quant_conv.weight": (13, 13, 1, 1),
        "decoder.post_quant_conv.bias": (13,),
        "decoder.conv_in.weight": (512, 13, 3, 3),
        "decoder.up.4.block.2.conv1.weight": (512, 512, 3, 3),
        "decoder.up.4.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.up.3.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "decoder.up.0.block.3.norm2.bias": (128,),
        "decoder.conv_out.weight": (3, 128, 3, 3),
        "quantize.embedding": (8192, 13),
        "quantize.power_vals": (13,),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    blocks = {name.rsplit(".", 2)[0] for name in shapes if ".block." in name}
    assert len(blocks) == sum((4, 3, 4, 3, 4)) + sum((4, 4, 3, 4, 3))
    assert not any(name.startswith(("decoder.up.0.upsample", "encoder.down.4.downsample")) for name in shapes)
    assert not any(".attn." in name for name in shapes)
    shortcuts = [name for name in shapes if "nin_shortcut.weight" in name]
    assert len(shortcuts) == 2 + 2
    assert MagvitConfig().num_codes == 8192 and MagvitConfig().factor == 16


@pytest.mark.parametrize("config", [MagvitConfig(), small.VQ, MagvitConfig(bits=1, channels=64)])
def test_sizes_are_read_from_shapes(config: MagvitConfig) -> None:
    assert MagvitConfig.of(shapes_of(config)) == config
    assert MagvitConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_another_tokenizers_shapes_are_none() -> None:
    with pytest.raises(KeyError):
        MagvitConfig.of({"encoder.conv_in.weight": (32, 3, 3, 3)})


def test_the_released_codes_numbers() -> None:
    made = tokenizer()
    codes = made.encode(small.pictures(4))
    assert codes.tolist() == PUBLISHED["codes"]
    assert codes.unique().numel() > 8
    pixels = made.decode(codes[:1], (4, 4))
    torch.testing.assert_close(pixels.flatten(), torch.tensor(PUBLISHED["pixels"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 5, 13])
def test_a_code_is_its_signs(bits: int) -> None:
    quantizer = SignQuantizer(bits)
    codes = torch.randint(1 << bits, (2, 6), generator=torch.Generator().manual_seed(0))
    for code in codes[0].tolist():
        signs = [1.0 if digit == "1" else -1.0 for digit in f"{code:0{bits}b}"]
        assert quantizer.embedding[code].tolist() == signs
    latents = quantizer.embedding[codes].permute(0, 2, 1).unflatten(2, (2, 3)) * torch.rand(2, bits, 2, 3).add(0.1)
    assert torch.equal(quantizer.codes(latents), codes)
    assert quantizer.codes(torch.zeros(1, bits, 1, 1)).item() == 0, "0 is not above 0"


def test_an_image_of_two_shapes_and_no_image() -> None:
    made = tokenizer()
    tall = small.noise(2 * 3 * 8 * 24, 3).view(2, 3, 24, 8).float()
    codes = made.encode(tall)
    assert codes.shape == (2, 12) and made.decode(codes, (6, 2)).shape == tall.shape
    torch.testing.assert_close(made.latents(tall)[:1], made.latents(tall[:1]), rtol=0, atol=1e-5)


def test_half_precision_draws() -> None:
    """Its tables stay as they are where transformers loads the weights in bfloat16, and are cast where all is."""
    made = tokenizer()
    whole = made.decode(torch.tensor([range(16)]), (4, 4))
    for parameter in made.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    drawn = made.decode(torch.tensor([range(16)]), (4, 4))
    assert drawn.dtype == torch.float32 and (drawn - whole).abs().max() < 0.1
    assert torch.equal(made.to(torch.bfloat16).decode(torch.tensor([range(16)]), (4, 4)), drawn)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"channels": 48}, "multiple of 32"),
        ({"bits": 0}, "bits from 1 to 24"),
        ({"bits": 40}, "bits from 1 to 24"),
        ({"encoder_blocks": (1, 2)}, "equally long"),
        ({"decoder_multipliers": (1, 1, 0, 1, 1)}, "positive numbers"),
    ],
)
def test_sizes_that_make_none(bad: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MagvitConfig(**bad)  # type: ignore[arg-type]


def test_what_is_no_picture() -> None:
    made = tokenizer()
    for shape in ((1, 3, 16, 18), (1, 1, 16, 16), (3, 16, 16), (1, 3, 0, 16)):
        with pytest.raises(ValueError, match="multiples of 4"):
            made.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"\[n, 4 x 4\]"):
        made.decode(torch.zeros(1, 15, dtype=torch.long), (4, 4))
