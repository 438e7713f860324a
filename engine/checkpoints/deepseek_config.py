"""DeepSeek's config.json of Janus (`multi_modality`) and transformers' (`janus`), both ways, as plain dictionaries.

DeepSeek's code knows the sizes of two parts by name alone: SigLIP's tower by `model_name`, the VQ model by `VQ-16`.
Here and on the way back those of other sizes have them in `params` (`width`, `layers`, … and `ch`, `ch_mult`, …), under
names that the original code refuses, so that it never builds another model than is meant.

What is left out of a DeepSeek config has the default of the class that reads it: Janus-Pro-7B names neither hidden
size nor heads, which are those of LlamaConfig.

Source: janus/models/{modeling_vlm,clip_encoder,siglip_vit,projector,vq_model}.py of github.com/deepseek-ai/Janus.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

Config = dict[str, Any]
THEIRS, OURS = "multi_modality", "janus"
"""`model_type` of each."""
TOWERS: dict[str, Config] = {
    "siglip_large_patch16_384": {"width": 1024, "layers": 24, "heads": 16, "patch_size": 16, "mlp_ratio": 4.0},
    "siglip_so400m_patch14_384": {"width": 1152, "layers": 27, "heads": 16, "patch_size": 14, "mlp_ratio": 3.7362},
    "siglip_so400m_patch14_224": {"width": 1152, "layers": 27, "heads": 16, "patch_size": 14, "mlp_ratio": 3.7362},
}
VQ_16: Config = {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "z_channels": 256}
LLAMA: Config = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
"""LlamaConfig's own defaults, written out: a later version of transformers may have others."""
_OPTIONAL = ("num_key_value_heads", "head_dim", "pretraining_tp")
_PARTS = ("vision_config", "aligner_config", "gen_vision_config", "gen_aligner_config", "gen_head_config")


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why a checkpoint of `model_type` multi_modality is not one that can be converted: a sentence's end, with the
    remedy; None where it is Janus or Janus-Pro. Needs config.json alone."""
    if any(part in config for part in ("vision_gen_enc_config", "vision_gen_dec_config", "vision_und_enc_config")):
        return "JanusFlow, which draws by rectified flow and has no image tokens; take Janus or Janus-Pro"
    language = config.get("language_config")
    for settings in (config, language if isinstance(language, Mapping) else {}):
        if told := settings.get("quantization_config"):
            method = told.get("quant_method", "some way") if isinstance(told, Mapping) else told
            return f"weights quantised by {method}, which cannot be trained; take the checkpoint that it was made from"
    if not any(part in config for part in ("gen_vision_config", "gen_head_config", "gen_aligner_config")):
        return "DeepSeek-VL, which draws nothing and has another vision tower; take Janus or Janus-Pro"
    try:
        to_ours(config)
    except ConfigError as error:
        return str(error)
    except (TypeError, ValueError, KeyError, AttributeError):
        return "a config.json whose sizes are no numbers; download it again"
    return None


def to_ours(config: Mapping[str, Any]) -> Config:
    """transformers' configuration of a DeepSeek one, ids of tokens apart.

    Raises:
        ConfigError: a sentence's end, with the remedy: a part that transformers' Janus cannot express, or is not there.
    """
    absent = [part for part in (*_PARTS, "language_config") if not isinstance(config.get(part), Mapping)]
    if absent:
        raise ConfigError(f"a config.json without {', '.join(absent)}; download it again")
    vision, aligner, vq, gen_aligner, head = (_params(config, part) for part in _PARTS)
    text = _text(config["language_config"])
    tower = _tower(vision)
    codes = _vq(vq, str(config["gen_vision_config"].get("cls", "")))
    for name, params in (("aligner_config", aligner), ("gen_aligner_config", gen_aligner)):
        _is(f"{name}.projector_type", params.get("projector_type"), "mlp_gelu")
        _is(f"{name}.n_embed", params.get("n_embed"), text["hidden_size"])
    _is("aligner_config.input_dim", aligner.get("input_dim"), tower["hidden_size"])
    _is("gen_aligner_config.input_dim", gen_aligner.get("input_dim"), codes["embed_dim"])
    _is("gen_head_config.n_embed", head.get("n_embed"), text["hidden_size"])
    _is("gen_head_config.image_token_embed", head.get("image_token_embed"), text["hidden_size"])
    _is("gen_head_config.image_token_size", head.get("image_token_size"), codes["num_embeddings"])
    smaller = 2 ** (len(codes["channel_multiplier"]) - 1)
    _is(f"vision_config's patches (the VQ model's are {smaller} pixels wide)", tower["patch_size"], smaller)
    patches = tower["image_size"] // tower["patch_size"]
    codes |= {
        "num_patches": patches,
        "projection_dim": text["hidden_size"],
        "image_token_embed_dim": text["hidden_size"],
    }
    codes["num_hidden_layers"] = int(gen_aligner.get("depth", 1))  # of the aligner: the field's name in transformers
    tower |= {
        "projection_dim": text["hidden_size"],
        "depth": int(aligner.get("depth", 1)),
        "num_image_tokens": patches**2,
    }
    ours = {
        "model_type": OURS,
        "architectures": ["JanusForConditionalGeneration"],
        "text_config": text,
        "vision_config": tower,
        "vq_config": codes,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    dtype = config.get("torch_dtype") or config.get("dtype") or config["language_config"].get("torch_dtype")
    return ours | ({"dtype": str(dtype).removeprefix("torch.")} if dtype else {})


def _params(config: Mapping[str, Any], part: str) -> Config:
    found = config[part].get("params")
    if not isinstance(found, Mapping):
        raise ConfigError(f"a {part} without params; download config.json again")
    return dict(found)


def _is(what: str, got: Any, wanted: Any) -> None:
    if got != wanted:
        raise ConfigError(f"{what} of {got!r}, where transformers' Janus has {wanted!r}; there is no counterpart")


def _text(language: Mapping[str, Any]) -> Config:
    _is("language_config.model_type", language.get("model_type", "llama"), "llama")
    text = {name: language.get(name, default) for name, default in LLAMA.items()}
    text |= {name: language[name] for name in _OPTIONAL if language.get(name) is not None}
    if not isinstance(text["hidden_size"], int) or not isinstance(text["vocab_size"], int):
        raise ConfigError("a language_config with sizes that are no integers; download config.json again")
    theta, scaling = text.pop("rope_theta"), text.pop("rope_scaling")
    rope = dict(language.get("rope_parameters") or {})  # as transformers 5 writes them
    if scaling:
        rope |= {"rope_type" if name == "type" else name: value for name, value in scaling.items()}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, **rope}
    return {"model_type": "llama", **text}


def _tower(params: Config) -> Config:
    name = params.get("model_name", "siglip_large_patch16_384")
    sizes = TOWERS.get(name) or {key: params.get(key) for key in TOWERS["siglip_large_patch16_384"]}
    if not all(isinstance(value, int | float) for value in sizes.values()):
        known = ", ".join(TOWERS)
        raise ConfigError(f"the vision tower {name!r}, where one of {known} is known; there is no counterpart")
    if params.get("pixel_mean") is not None:
        raise ConfigError("a vision tower that normalises by itself (pixel_mean); there is no counterpart")
    chosen = int(params.get("select_layer", -2))  # DeepSeek's default leaves one out
    layers = min(sizes["layers"], sizes["layers"] + chosen + 1 if chosen <= 0 else chosen)
    return {
        "model_type": "janus_vision_model",
        "hidden_size": sizes["width"],
        "num_hidden_layers": layers,
        "num_attention_heads": sizes["heads"],
        "patch_size": sizes["patch_size"],
        "mlp_ratio": sizes["mlp_ratio"],
        "image_size": int(params.get("image_size", 336)),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "attention_bias": True,
        "use_qk_norm": False,
    }


def _vq(params: Config, cls: str) -> Config:
    sizes = VQ_16 if cls == "VQ-16" else {name: params.get(name) for name in VQ_16}
    if any(value is None for value in (*sizes.values(), params.get("n_embed"), params.get("image_token_size"))):
        raise ConfigError(f"the VQ model {cls!r}, where VQ-16 is known; there is no counterpart")
    return {
        "model_type": "janus_vqgan",
        "base_channels": sizes["ch"],
        "channel_multiplier": [*(sizes["ch_mult"] or ())],
        "num_res_blocks": sizes["num_res_blocks"],
        "latent_channels": sizes["z_channels"],
        "embed_dim": params["n_embed"],
        "num_embeddings": params["image_token_size"],
        "double_latent": False,
        "hidden_act": "gelu",
    }


def to_theirs(config: Mapping[str, Any], dtype: str) -> Config:
    """DeepSeek's configuration of transformers' Janus, every size written out.

    Args:
        config: with all its fields, as `JanusConfig.to_dict` gives them.
        dtype: of the weights.

    Raises:
        ConfigError: a sentence's end: something that DeepSeek's code cannot express.
    """
    text, tower, codes = config["text_config"], config["vision_config"], config["vq_config"]
    _theirs_can(text, tower, codes)
    language = {name: text.get(name, default) for name, default in LLAMA.items() if not name.startswith("rope_")}
    language |= {name: text[name] for name in _OPTIONAL if text.get(name) is not None}
    rope = dict(text.get("rope_parameters") or {})
    language["rope_theta"] = rope.pop("rope_theta", LLAMA["rope_theta"])
    language["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    language |= {"model_type": "llama", "torch_dtype": dtype, "tie_word_embeddings": False}
    sizes = {"width": tower["hidden_size"], "layers": tower["num_hidden_layers"], "heads": tower["num_attention_heads"]}
    sizes |= {"patch_size": tower["patch_size"], "mlp_ratio": float(tower["mlp_ratio"])}
    named = next((name for name, known in TOWERS.items() if known == sizes), None)
    vision = {"image_size": tower["image_size"], "select_feature": "same", "select_layer": -1}
    vision |= {"model_name": named} if named else {"model_name": f"siglip_{sizes['width']}x{sizes['layers']}", **sizes}
    vq = {"ch": codes["base_channels"], "ch_mult": list(codes["channel_multiplier"])}
    vq |= {"num_res_blocks": codes["num_res_blocks"], "z_channels": codes["latent_channels"]}
    params = {"image_token_size": codes["num_embeddings"], "n_embed": codes["embed_dim"]}
    hidden, mlp = text["hidden_size"], {"n_embed": text["hidden_size"], "projector_type": "mlp_gelu"}
    head = {
        "image_token_embed": codes["projection_dim"],
        "image_token_size": codes["num_embeddings"],
        "n_embed": hidden,
    }
    return {
        "model_type": THEIRS,
        "architectures": ["MultiModalityCausalLM"],
        "torch_dtype": dtype,
        "language_config": language,
        "vision_config": _part("CLIPVisionTower", "vision", vision),
        "aligner_config": _part(
            "MlpProjector", "aligner", {**mlp, "depth": tower["depth"], "input_dim": sizes["width"]}
        ),
        "gen_vision_config": _part(
            "VQ-16" if vq == VQ_16 else "VQ-small", "gen_vision", params | ({} if vq == VQ_16 else vq)
        ),
        "gen_aligner_config": _part(
            "MlpProjector", "gen_aligner", {**mlp, "depth": codes["num_hidden_layers"], "input_dim": codes["embed_dim"]}
        ),
        "gen_head_config": _part("vision_head", "gen_head", head),
    }


def _part(cls: str, kind: str, params: Config) -> Config:
    return {"cls": cls, "model_type": kind, "params": params}


def _theirs_can(text: Mapping[str, Any], tower: Mapping[str, Any], codes: Mapping[str, Any]) -> None:
    """What transformers' Janus can be and DeepSeek's cannot."""
    wanted = {
        "text_config.model_type": (text.get("model_type"), "llama"),
        "vision_config.use_qk_norm": (tower.get("use_qk_norm", False), False),
        "vision_config.attention_bias": (tower.get("attention_bias", True), True),
        "vision_config.hidden_act": (tower.get("hidden_act", "gelu"), "gelu"),
        "vision_config.layer_norm_eps": (tower.get("layer_norm_eps", 1e-6), 1e-6),
        "vision_config.projection_dim": (tower.get("projection_dim"), text["hidden_size"]),
        "vq_config.double_latent": (codes.get("double_latent", False), False),
        "vq_config.hidden_act": (codes.get("hidden_act", "gelu"), "gelu"),
        "vq_config.projection_dim": (codes.get("projection_dim"), text["hidden_size"]),
    }
    for name, (got, has) in wanted.items():
        if got != has:
            raise ConfigError(f"{name} of {got!r}, where DeepSeek's code has {has!r}; there is no counterpart")
