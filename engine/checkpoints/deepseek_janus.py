"""DeepSeek's names of Janus's tensors (`multi_modality`) and transformers' (`janus`), both ways.

Both hold the same numbers in the same row-major order. No tensor is transposed, scaled or cast: one is cut into three
(the vision tower's queries, keys and values) and one loses its leading axis of length 1 (the positions). Every move is
therefore a copy of a range of elements, which is why a checkpoint of any size passes through a small buffer.

Source: janus/models of github.com/deepseek-ai/Janus; transformers' models/janus/convert_janus_weights_to_hf.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache


@dataclass(frozen=True, slots=True)
class Rule:
    """`{i}` and `{j}` are numbers, `{rest}` is anything; what stands in one name stands in the other."""

    theirs: str
    """DeepSeek's."""
    ours: tuple[str, ...]
    """transformers': more than one where the tensor is cut into equal parts along its first axis."""
    why: str
    leading_axis: bool = field(default=False, kw_only=True)
    """DeepSeek's has another axis of length 1 in front."""


_TOWER, _VISION = "vision_model.vision_tower", "model.vision_model"
_BLOCK, _LAYER = f"{_TOWER}.blocks.{{i}}", f"{_VISION}.encoder.layers.{{i}}"

RULES: tuple[Rule, ...] = (
    # The language model is transformers' Llama in both.
    Rule(
        "language_model.model.{rest}", ("model.language_model.{rest}",), "a LlamaForCausalLM there, a LlamaModel here"
    ),
    Rule("language_model.lm_head.weight", ("lm_head.weight",), "the text head, beside the model here"),
    # SigLIP: timm's names there.
    Rule(
        f"{_TOWER}.pos_embed",
        (f"{_VISION}.embeddings.position_embedding.weight",),
        "a parameter [1, N, D] there, an embedding [N, D] here",
        leading_axis=True,
    ),
    Rule(
        f"{_TOWER}.patch_embed.proj.{{rest}}",
        (f"{_VISION}.embeddings.patch_embedding.{{rest}}",),
        "a convolution in both",
    ),
    Rule(f"{_BLOCK}.norm1.{{rest}}", (f"{_LAYER}.layer_norm1.{{rest}}",), "LayerNorm, eps 1e-6 in both"),
    Rule(f"{_BLOCK}.norm2.{{rest}}", (f"{_LAYER}.layer_norm2.{{rest}}",), "LayerNorm, eps 1e-6 in both"),
    Rule(
        f"{_BLOCK}.attn.qkv.{{rest}}",
        tuple(f"{_LAYER}.self_attn.{name}.{{rest}}" for name in ("q_proj", "k_proj", "v_proj")),
        "one matrix [3 D, D] there, queries first; three [D, D] here",
    ),
    Rule(f"{_BLOCK}.attn.proj.{{rest}}", (f"{_LAYER}.self_attn.projection_layer.{{rest}}",), "another name"),
    Rule(f"{_BLOCK}.mlp.{{rest}}", (f"{_LAYER}.mlp.{{rest}}",), "fc1, exact GELU, fc2 in both"),
    Rule(f"{_TOWER}.norm.{{rest}}", (f"{_VISION}.post_layernorm.{{rest}}",), "of the last layer, before the aligner"),
    # Two-layer perceptrons into the language model's width.
    Rule("aligner.layers.{2i}.{rest}", ("model.aligner.{mlp}.{rest}",), "Sequential with GELUs between there"),
    Rule(
        "gen_aligner.layers.{2i}.{rest}",
        ("model.generation_aligner.{mlp}.{rest}",),
        "Sequential with GELUs between there",
    ),
    # Image tokens.
    Rule("gen_embed.weight", ("model.generation_embeddings.weight",), "one row for each code"),
    Rule("gen_head.output_mlp_projector.{rest}", ("model.generation_head.proj_out.{rest}",), "another name"),
    Rule("gen_head.vision_head.{rest}", ("model.generation_head.vision_head.{rest}",), "the codes' head"),
    # The VQ model.
    Rule("gen_vision_model.quantize.embedding.weight", ("model.vqmodel.quantize.embedding.weight",), "the codebook"),
    Rule("gen_vision_model.quant_conv.{rest}", ("model.vqmodel.quant_conv.{rest}",), "the same"),
    Rule("gen_vision_model.post_quant_conv.{rest}", ("model.vqmodel.post_quant_conv.{rest}",), "the same"),
    Rule(
        "gen_vision_model.encoder.conv_blocks.{i}.res.{j}.{rest}",
        ("model.vqmodel.encoder.down.{i}.block.{j}.{rest}",),
        "residual blocks of a resolution, in the same order",
    ),
    Rule(
        "gen_vision_model.decoder.conv_blocks.{i}.res.{j}.{rest}",
        ("model.vqmodel.decoder.up.{i}.block.{j}.{rest}",),
        "residual blocks of a resolution, the lowest first in both",
    ),
    Rule(
        "gen_vision_model.encoder.conv_blocks.{rest}", ("model.vqmodel.encoder.down.{rest}",), "attention, downsampling"
    ),
    Rule("gen_vision_model.decoder.conv_blocks.{rest}", ("model.vqmodel.decoder.up.{rest}",), "attention, upsampling"),
    *(
        Rule(
            f"gen_vision_model.{half}.mid.{there}.{{rest}}",
            (f"model.vqmodel.{half}.mid.{here}.{{rest}}",),
            "a list there",
        )
        for half in ("encoder", "decoder")
        for there, here in enumerate(("block_1", "attn_1", "block_2"))
    ),
    *(
        Rule(f"gen_vision_model.{half}.{name}.{{rest}}", (f"model.vqmodel.{half}.{name}.{{rest}}",), "the same")
        for half in ("encoder", "decoder")
        for name in ("conv_in", "norm_out", "conv_out")
    ),
)

NO_COUNTERPART = {
    f"{_TOWER}.attn_pool.{{rest}}": "SigLIP's pooling head, which neither code runs",
    "gen_vision_model.quantize.codebook_used": "counts codes while the VQ model itself is trained",
    "language_model.model.layers.{i}.self_attn.rotary_emb.inv_freq": "worked out from the configuration",
    "language_model.model.rotary_emb.inv_freq": "worked out from the configuration",
}
"""DeepSeek's tensors that transformers' model has no place for, and what they are. A conversion keeps them beside the
result, so that the way back gives every tensor."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of DeepSeek's goes."""

    names: tuple[str, ...]
    """transformers', one for each equal part along the first axis; empty: it has no counterpart."""
    leading_axis: bool = False


def place_of(theirs: str) -> Place | None:
    """Where a tensor of DeepSeek's goes; None: a name that Janus does not have."""
    if any(_pattern(name).fullmatch(theirs) for name in NO_COUNTERPART):
        return Place(())
    for rule in RULES:
        if found := _pattern(rule.theirs).fullmatch(theirs):
            values = found.groupdict()
            if "even" in values:
                if int(values["even"]) % 2:
                    return None
                number = int(values["even"]) // 2
                values["mlp"] = "fc1" if number == 0 else f"hidden_layers.{number - 1}"
            return Place(tuple(_filled(name, values) for name in rule.ours), rule.leading_axis)
    return None


def origin_of(ours: str) -> tuple[str, int, bool] | None:
    """The tensor of DeepSeek's that one of transformers' comes from, which part of it, and whether that has the leading
    axis; None: a name that Janus does not have."""
    for rule in RULES:
        for part, name in enumerate(rule.ours):
            if found := _pattern(name).fullmatch(ours):
                values = found.groupdict()
                if "mlp" in values:
                    named = values["mlp"]
                    values["even"] = "0" if named == "fc1" else str(2 * int(named.removeprefix("hidden_layers.")) + 2)
                return _filled(rule.theirs, values), part, rule.leading_axis
    return None


_FIELDS = {
    "{i}": r"(?P<i>\d+)",
    "{j}": r"(?P<j>\d+)",
    "{2i}": r"(?P<even>\d+)",
    "{mlp}": r"(?P<mlp>fc1|hidden_layers\.\d+)",
    "{rest}": r"(?P<rest>.+)",
}


@cache
def _pattern(name: str) -> re.Pattern[str]:
    pattern = re.escape(name)
    for written, expression in _FIELDS.items():
        pattern = pattern.replace(re.escape(written), expression)
    return re.compile(pattern)


def _filled(name: str, values: dict[str, str]) -> str:
    return name.replace("{2i}", values.get("even", "")).format_map(values)
