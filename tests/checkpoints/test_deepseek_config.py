"""DeepSeek's config.json of Janus and transformers', both ways: sizes, defaults, and what has no counterpart."""

from __future__ import annotations

import json
from typing import Any

import pytest
from deepseek_janus import THREE, config_of

from syncr1.engine.checkpoints.deepseek_config import TOWERS, VQ_16, refusal, to_ours, to_theirs
from syncr1.engine.errors import ConfigError

PRO_7B: dict[str, Any] = {
    "model_type": "multi_modality",
    "torch_dtype": "bfloat16",
    "language_config": {"model_type": "llama", "max_position_embeddings": 16384, "num_hidden_layers": 30}
    | {"vocab_size": 102400, "torch_dtype": "bfloat16"},
    "vision_config": {"cls": "CLIPVisionTower", "params": {"image_size": 384, "select_layer": -1}}
    | {"model_type": "vision"},
    "aligner_config": {"params": {"depth": 2, "input_dim": 1024, "n_embed": 4096, "projector_type": "mlp_gelu"}},
    "gen_aligner_config": {"params": {"depth": 2, "input_dim": 8, "n_embed": 4096, "projector_type": "mlp_gelu"}},
    "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 16384, "n_embed": 8}},
    "gen_head_config": {"params": {"image_token_embed": 4096, "image_token_size": 16384, "n_embed": 4096}},
}


def test_what_a_config_leaves_out_is_what_its_class_had() -> None:
    ours = to_ours(PRO_7B)
    text, tower, vq = ours["text_config"], ours["vision_config"], ours["vq_config"]
    assert (text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]) == (4096, 11008, 32)
    assert (text["rms_norm_eps"], text["rope_parameters"]["rope_theta"]) == (1e-6, 10000.0)
    assert (tower["hidden_size"], tower["num_hidden_layers"], tower["num_image_tokens"]) == (1024, 24, 576)
    assert (vq["num_patches"], vq["channel_multiplier"], ours["dtype"]) == (24, [1, 1, 2, 2, 4], "bfloat16")
    assert ours["tie_word_embeddings"] is False  # transformers' JanusConfig has True
    without = {**PRO_7B, "vision_config": {"params": {"image_size": 384}}}  # DeepSeek's own default leaves a layer out
    assert to_ours(without)["vision_config"]["num_hidden_layers"] == 23


def test_published_sizes_go_back_under_the_names_that_the_original_code_knows() -> None:
    back = to_theirs(to_ours(PRO_7B), "bfloat16")
    assert back["vision_config"]["params"]["model_name"] == "siglip_large_patch16_384"
    assert back["gen_vision_config"] == {**PRO_7B["gen_vision_config"], "model_type": "gen_vision"}
    assert to_ours(back) == to_ours(PRO_7B)
    small = to_theirs(to_ours(config_of(THREE["pro_1b"])), "float32")
    assert small["vision_config"]["params"]["model_name"] not in TOWERS
    assert {name: small["gen_vision_config"]["params"][name] for name in VQ_16} == {
        "ch": 32,
        "ch_mult": [1, 1, 2, 2],
        "num_res_blocks": 1,
        "z_channels": 16,
    }


def changed(**parts: Any) -> dict[str, Any]:
    config = json.loads(json.dumps(PRO_7B))
    for name, value in parts.items():
        part, _, key = name.partition("__")
        place = config[part] if part == "language_config" else config[part]["params"]
        place[key] = value
    return config


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "multi_modality", "vision_gen_enc_config": {}, "language_config": {}}, "JanusFlow"),
        ({"model_type": "multi_modality", "vision_config": {}, "aligner_config": {}}, "DeepSeek-VL"),
        ({**PRO_7B, "quantization_config": {"quant_method": "bitsandbytes"}}, "quantised by bitsandbytes"),
        (changed(language_config__quantization_config={"quant_method": "gptq"}), "quantised by gptq"),
        (changed(language_config__model_type="qwen2"), "language_config.model_type of 'qwen2'"),
        (changed(aligner_config__projector_type="linear"), "aligner_config.projector_type of 'linear'"),
        (changed(gen_head_config__image_token_embed=2048), "gen_head_config.image_token_embed of 2048"),
        (changed(vision_config__model_name="sam_b_downsample"), "the vision tower 'sam_b_downsample'"),
        (changed(vision_config__pixel_mean=[0.5] * 3), "pixel_mean"),
        (changed(vision_config__model_name="siglip_so400m_patch14_384"), "input_dim of 1024"),
        (changed(gen_vision_config__image_token_size=None), "the VQ model 'VQ-16'"),
        (changed(aligner_config__depth="two"), "sizes are no numbers"),
        ({**PRO_7B, "aligner_config": None}, "without aligner_config"),
        ({**PRO_7B, "vision_config": {"params": 3}}, "a vision_config without params"),
    ],
)
def test_what_cannot_be_converted_is_told_by_name(config: dict[str, Any], words: str) -> None:
    why = refusal(config)
    assert why is not None and words in why


def test_scaled_positions_go_there_and_back() -> None:
    scaled = changed(language_config__rope_scaling={"type": "linear", "factor": 4.0}, language_config__rope_theta=5e5)
    rope = to_ours(scaled)["text_config"]["rope_parameters"]
    assert rope == {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    back = to_theirs(to_ours(scaled), "bfloat16")["language_config"]
    assert (back["rope_theta"], back["rope_scaling"]) == (5e5, {"rope_type": "linear", "factor": 4.0})


@pytest.mark.parametrize(
    ("part", "name", "value"), [("vision_config", "use_qk_norm", True), ("vq_config", "projection_dim", 9)]
)
def test_what_the_original_code_cannot_be_is_told(part: str, name: str, value: object) -> None:
    ours = to_ours(PRO_7B)
    ours[part][name] = value
    with pytest.raises(ConfigError, match=f"{part}.{name} of {value}"):
        to_theirs(ours, "float32")
