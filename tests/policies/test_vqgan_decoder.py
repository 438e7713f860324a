"""The VQGAN's drawing half: published names and shapes, another implementation's numbers, and where its tensors are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from safetensors.torch import save_file
from small_chameleon import vq_config
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

from syncr1.engine.errors import ConfigError
from syncr1.engine.policies.vqgan_decoder import VQGANDecoder, decoded, encoded, factor_of, geometry_of
from syncr1.engine.policies.vqgan_files import fill, own_tensors, published_tensors

PUBLISHED = ChameleonVQVAEConfig()
"""128 channels at 512 pixels, factors 1 1 2 2 4, two blocks, 8192 codes."""


def vqgan(config: ChameleonVQVAEConfig) -> Any:
    made: Any = ChameleonVQVAE(config)
    made.decoder = VQGANDecoder(config)
    return made.eval()


def shapes_of(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def test_the_published_one() -> None:
    """Names and shapes as the released file has them (written out by hand), and nothing more."""
    with torch.device("meta"):
        shapes = shapes_of(VQGANDecoder(PUBLISHED))
    expected = {"conv_in.weight": (512, 256, 3, 3), "norm_out.weight": (128,), "conv_out.weight": (3, 128, 3, 3)}
    expected |= {f"mid.attn_1.{name}.weight": (512, 512, 1, 1) for name in ("q", "k", "v", "proj_out")}
    widths = {4: 512, 3: 256, 2: 256, 1: 128, 0: 128}
    for level, width in widths.items():
        for block in range(3):
            came = widths.get(level + 1, 512) if block == 0 else width
            expected[f"up.{level}.block.{block}.conv1.weight"] = (width, came, 3, 3)
            if came != width:
                expected[f"up.{level}.block.{block}.nin_shortcut.weight"] = (width, came, 1, 1)
        if level:
            expected[f"up.{level}.upsample.conv.weight"] = (width, width, 3, 3)
    assert {name: tuple(shapes[name]) for name in expected} == expected
    rest = {name.rsplit(".", 1)[0] for name in shapes} - {name.rsplit(".", 1)[0] for name in expected}
    assert {name.rsplit(".", 1)[1] for name in rest} == {"norm1", "norm2", "conv2", "conv1", "norm"}
    blocks, ends, shortcuts, upsampling, attention = 2 + 15, 3, 2, 4, 5
    assert len(shapes) == 2 * (4 * blocks + ends + shortcuts + upsampling + attention), "a weight and a bias each"


def test_it_draws_as_another_implementation_of_the_same_architecture() -> None:
    """Janus's decoder in transformers: levels counted from the other end, attention at the lowest one alone."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "embed_dim": 8,
        "num_embeddings": 24,
        "latent_channels": 16,
        "base_channels": 32,
        "channel_multiplier": [1, 2, 2],
        "num_res_blocks": 2,
    }
    ours = VQGANDecoder(ChameleonVQVAEConfig(**sizes, resolution=32, attn_resolutions=[8])).eval()
    theirs = JanusVQVAEDecoder(JanusVQVAEConfig(**sizes, out_channels=3)).eval()
    for name, parameter in ours.named_parameters():
        if parameter.dim() == 1 and "norm" in name:
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    state = {}
    for name, tensor in ours.state_dict().items():
        parts = name.split(".")
        if parts[0] == "up":
            parts[1] = str(2 - int(parts[1]))
        state[".".join(parts)] = tensor
    theirs.load_state_dict(state)
    latents = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(latents), theirs(latents), rtol=0, atol=1e-5)
        assert float(ours(latents).std()) > 0.05


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"channel_multiplier": [1, 2], "attn_resolutions": [32, 16], "num_res_blocks": 2},
        {"attn_type": "none", "attn_resolutions": None},
        {"double_latent": False, "latent_channels": 32, "embed_dim": 4, "channel_multiplier": [1]},
    ],
)
def test_shapes_tell_the_geometry(settings: dict[str, Any]) -> None:
    config = ChameleonVQVAEConfig(**{**vq_config().to_dict(), **settings})
    made = vqgan(config)
    told = geometry_of(shapes_of(made), config.resolution)
    again = vqgan(told)
    assert shapes_of(again) == shapes_of(made)
    side = config.resolution // factor_of(config)
    again.load_state_dict(made.state_dict())
    pixels = torch.rand(2, 3, config.resolution, config.resolution) * 2 - 1
    codes, latents = encoded(made, pixels)
    assert codes.shape == (2, side * side) and latents.shape == (2, config.embed_dim * side * side)
    assert torch.equal(encoded(again, pixels)[0], codes)
    assert torch.equal(decoded(again, codes, side), decoded(made, codes, side))
    assert decoded(made, codes, side).shape == pixels.shape


# Files ----------------------------------------------------------------------------------------------------------------


class _Runs:
    """Its unpickling would call something."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("ran",)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"weight_map": ["a"]}', '{"weight_map": null}', "\\xff"])
def test_an_index_that_names_no_shards_is_a_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match=r"expected JSON with a weight_map, got .*index\.json .*; download it again"):
        own_tensors(tmp_path, "model.vqmodel.")


def test_where_tensors_are_found(tmp_path: Path) -> None:
    """Of one file and of shards, with a prefix; beside the weights in each place; shapes alone on `meta`."""
    made = vqgan(vq_config()).state_dict()
    held = {f"vqmodel.{name}": tensor.clone() for name, tensor in made.items()} | {"lm_head.weight": torch.zeros(2)}
    save_file(held, tmp_path / "model.safetensors")
    found = own_tensors(tmp_path, "vqmodel.")
    assert found is not None and found.keys() == made.keys()
    assert torch.equal(found["decoder.conv_in.bias"], made["decoder.conv_in.bias"])
    assert own_tensors(tmp_path, "model.vqmodel.") == {}
    (tmp_path / "model.safetensors").unlink()
    assert own_tensors(tmp_path, "vqmodel.") is None
    names = sorted(held)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, inside in shards.items():
        save_file({name: held[name] for name in inside}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, inside in shards.items() for name in inside}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    bare = own_tensors(tmp_path, "vqmodel.decoder.", shapes_alone=True)
    assert bare is not None and all(tensor.is_meta for tensor in bare.values())
    assert {name: t.shape for name, t in bare.items()} == shapes_of(VQGANDecoder(vq_config()))
    assert published_tensors(tmp_path) is None
    whole = {"state_dict": made | {"loss.discriminator.main.0.weight": torch.zeros(1)}, "epoch": 3}
    for place in ("chameleon/vqgan.ckpt", "tokenizer/vqgan.ckpt", "vqgan.ckpt"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        torch.save(whole, tmp_path / place)
        for shapes_alone in (False, True):
            read = published_tensors(tmp_path, shapes_alone=shapes_alone)
            assert read is not None and read[0].keys() == made.keys() and read[1] == tmp_path / place
            assert {tensor.is_meta for tensor in read[0].values()} == {shapes_alone}
    save_file(made, tmp_path / "vqgan.safetensors")
    read = published_tensors(tmp_path)
    assert read is not None and read[1].name == "vqgan.safetensors" and read[0].keys() == made.keys()


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}, "callback": _Runs()}, tmp_path / "vqgan.ckpt")
    with pytest.raises(ConfigError, match=r"vqgan.ckpt: expected tensors alone.*weights_only=False"):
        published_tensors(tmp_path)
    assert "ran" not in capsys.readouterr().out
    (tmp_path / "vqgan.ckpt").write_bytes(b"half a download")
    with pytest.raises(ConfigError, match=r"vqgan.ckpt: expected files that its library can read.*fetch them again"):
        published_tensors(tmp_path)


def test_what_does_not_fit_is_refused_by_name() -> None:
    decoder = VQGANDecoder(vq_config())
    tensors = {name: tensor.clone() + 1 for name, tensor in decoder.state_dict().items()}
    fill(decoder, tensors, "x")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in decoder.state_dict().items())
    tensors["conv_out.bias"] = torch.zeros(4)
    with pytest.raises(ConfigError, match=r"x: expected a VQGAN's conv_out.bias of shape \[3\].*got one of \[4\]"):
        fill(decoder, tensors, "x")
    del tensors["conv_out.bias"]
    with pytest.raises(ConfigError, match=r"conv_out.bias of shape \[3\].*got none"):
        fill(decoder, tensors, "x")
