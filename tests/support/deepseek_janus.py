"""A small Janus as DeepSeek publishes it: the layout `multi_modality`, names and shapes from its public class
definitions, weights drawn at random.

The original code builds its vision tower and its VQ model at sizes that it knows by name; here they are smaller, which
`params` say (`width`, `ch`, …; see engine/checkpoints/deepseek_config.py).

Source: github.com/deepseek-ai/Janus, janus/models: modeling_vlm.py, siglip_vit.py (timm's attention pooling),
projector.py, vq_model.py, processing_vlm.py, image_processing_vlm.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
IMAGE, BOI, EOI = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
ROLES = ("<|User|>", "<|Assistant|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of everything; the defaults are a Janus-Pro-1B in miniature."""

    hidden: int = 32
    intermediate: int = 48
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    vocabulary: int = 320
    width: int = 32
    vision_layers: int = 2
    select_layer: int = -1
    """-1: all of the tower's layers; -2: without the last one, which then is not in the checkpoint."""
    vision_heads: int = 2
    mlp_ratio: float = 2.0
    patch: int = 8
    image_size: int = 32
    ch: int = 32
    ch_mult: tuple[int, ...] = (1, 1, 2, 2)
    num_res_blocks: int = 1
    z_channels: int = 16
    codes: int = 64
    code_dim: int = 8
    depth: int = 2
    roles: bool = True
    """Whether `<|User|>` is a token, as in Janus-Pro; Janus-1.3B was trained with `User: `."""

    @property
    def kept_layers(self) -> int:
        return min(self.vision_layers, self.vision_layers + self.select_layer + 1)


THREE = {
    "pro_1b": Sizes(),
    "pro_7b": Sizes(hidden=48, intermediate=64, layers=3, heads=6, kv_heads=2, width=64, vision_heads=4, depth=3),
    "janus_1b": Sizes(
        roles=False, select_layer=-2, vision_layers=3, mlp_ratio=1.5, ch_mult=(1, 2), patch=2, image_size=8, codes=40
    ),
}
"""In miniature: one head size, grouped keys, a tower that loses its last layer and a VQ model of another depth."""
PRO_7B = Sizes(
    hidden=4096,
    intermediate=11008,
    layers=30,
    heads=32,
    kv_heads=32,
    vocabulary=102_400,
    width=1024,
    vision_layers=24,
    vision_heads=16,
    mlp_ratio=4.0,
    patch=16,
    image_size=384,
    ch=128,
    num_res_blocks=2,
    z_channels=256,
    codes=16_384,
    ch_mult=(1, 1, 2, 2, 4),
)
"""As published."""


def config_of(sizes: Sizes, dtype: str = "float32") -> dict[str, Any]:
    """config.json."""
    tower = {"width": sizes.width, "layers": sizes.vision_layers, "heads": sizes.vision_heads}
    tower |= {"patch_size": sizes.patch, "mlp_ratio": sizes.mlp_ratio}
    vq = {"ch": sizes.ch, "ch_mult": list(sizes.ch_mult), "num_res_blocks": sizes.num_res_blocks}
    vq |= {"z_channels": sizes.z_channels}
    mlp = {"depth": sizes.depth, "n_embed": sizes.hidden, "projector_type": "mlp_gelu"}
    codes = {"image_token_size": sizes.codes, "n_embed": sizes.code_dim}
    return {
        "model_type": "multi_modality",
        "architectures": ["MultiModalityCausalLM"],
        "torch_dtype": dtype,
        "language_config": {
            "model_type": "llama",
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.intermediate,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "vocab_size": sizes.vocabulary,
            "max_position_embeddings": 256,
            "torch_dtype": dtype,
        },
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": {
                "image_size": sizes.image_size,
                "model_name": f"siglip_{sizes.width}x{sizes.vision_layers}",
                "select_feature": "same",
                "select_layer": sizes.select_layer,
                **tower,
            },
        },
        "aligner_config": {
            "cls": "MlpProjector",
            "model_type": "aligner",
            "params": {**mlp, "input_dim": sizes.width},
        },
        "gen_vision_config": {"cls": "VQ-small", "model_type": "gen_vision", "params": {**codes, **vq}},
        "gen_aligner_config": {
            "cls": "MlpProjector",
            "model_type": "gen_aligner",
            "params": {**mlp, "input_dim": sizes.code_dim},
        },
        "gen_head_config": {
            "cls": "vision_head",
            "model_type": "gen_head",
            "params": {"image_token_embed": sizes.hidden, "image_token_size": sizes.codes, "n_embed": sizes.hidden},
        },
    }


Shapes = dict[str, tuple[int, ...]]


def shapes_of(sizes: Sizes) -> Shapes:
    """Every tensor of the state dict."""
    shapes = _language(sizes) | _tower(sizes) | _pool(sizes) | _vq(sizes)
    for name, entry in (("aligner", sizes.width), ("gen_aligner", sizes.code_dim)):
        shapes |= _linear(f"{name}.layers.0", entry, sizes.hidden)
        for index in range(1, sizes.depth):
            shapes |= _linear(f"{name}.layers.{2 * index}", sizes.hidden, sizes.hidden)
    shapes["gen_embed.weight"] = (sizes.codes, sizes.code_dim)
    shapes |= _linear("gen_head.output_mlp_projector", sizes.hidden, sizes.hidden)
    return shapes | _linear("gen_head.vision_head", sizes.hidden, sizes.codes)


def _linear(name: str, entry: int, out: int) -> Shapes:
    return {f"{name}.weight": (out, entry), f"{name}.bias": (out,)}


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _conv(name: str, entry: int, out: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (out, entry, kernel, kernel), f"{name}.bias": (out,)}


def _language(sizes: Sizes) -> Shapes:
    hidden, keys = sizes.hidden, sizes.hidden // sizes.heads * sizes.kv_heads
    shapes: Shapes = {
        "language_model.model.embed_tokens.weight": (sizes.vocabulary, hidden),
        "language_model.model.norm.weight": (hidden,),
        "language_model.lm_head.weight": (sizes.vocabulary, hidden),
    }
    for index in range(sizes.layers):
        layer = f"language_model.model.layers.{index}"
        for name, out in (("q_proj", hidden), ("k_proj", keys), ("v_proj", keys), ("o_proj", hidden)):
            shapes[f"{layer}.self_attn.{name}.weight"] = (out, hidden)
        shapes[f"{layer}.mlp.gate_proj.weight"] = shapes[f"{layer}.mlp.up_proj.weight"] = (sizes.intermediate, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, sizes.intermediate)
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


def _tower(sizes: Sizes) -> Shapes:
    tower, width, mlp = "vision_model.vision_tower", sizes.width, int(sizes.width * sizes.mlp_ratio)
    shapes = _conv(f"{tower}.patch_embed.proj", 3, width, sizes.patch) | _norm(f"{tower}.norm", width)
    shapes[f"{tower}.pos_embed"] = (1, (sizes.image_size // sizes.patch) ** 2, width)
    for index in range(sizes.kept_layers):
        block = f"{tower}.blocks.{index}"
        shapes |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
        shapes |= _linear(f"{block}.attn.qkv", width, 3 * width) | _linear(f"{block}.attn.proj", width, width)
        shapes |= _linear(f"{block}.mlp.fc1", width, mlp) | _linear(f"{block}.mlp.fc2", mlp, width)
    return shapes


def _pool(sizes: Sizes) -> Shapes:
    pool, width, mlp = "vision_model.vision_tower.attn_pool", sizes.width, int(sizes.width * sizes.mlp_ratio)
    shapes: Shapes = {f"{pool}.latent": (1, 1, width)}
    shapes |= _linear(f"{pool}.q", width, width) | _linear(f"{pool}.kv", width, 2 * width)
    shapes |= _linear(f"{pool}.proj", width, width) | _norm(f"{pool}.norm", width)
    return shapes | _linear(f"{pool}.mlp.fc1", width, mlp) | _linear(f"{pool}.mlp.fc2", mlp, width)


def _vq(sizes: Sizes) -> Shapes:
    vq, last = "gen_vision_model", len(sizes.ch_mult) - 1
    shapes: Shapes = {f"{vq}.quantize.embedding.weight": (sizes.codes, sizes.code_dim)}
    shapes[f"{vq}.quantize.codebook_used"] = (65536,)
    shapes |= _conv(f"{vq}.quant_conv", sizes.z_channels, sizes.code_dim, 1)
    shapes |= _conv(f"{vq}.post_quant_conv", sizes.code_dim, sizes.z_channels, 1)
    top = sizes.ch * sizes.ch_mult[last]
    shapes |= _conv(f"{vq}.encoder.conv_in", 3, sizes.ch, 3) | _conv(f"{vq}.encoder.conv_out", top, sizes.z_channels, 3)
    shapes |= _conv(f"{vq}.decoder.conv_in", sizes.z_channels, top, 3) | _norm(f"{vq}.encoder.norm_out", top)
    entry = sizes.ch
    for level, factor in enumerate(sizes.ch_mult):
        block = f"{vq}.encoder.conv_blocks.{level}"
        entry = _level(shapes, block, entry, sizes.ch * factor, sizes.num_res_blocks, level == last)
        if level != last:
            shapes |= _conv(f"{block}.downsample.conv", entry, entry, 3)
    for index, level in enumerate(reversed(range(last + 1))):
        block = f"{vq}.decoder.conv_blocks.{index}"
        entry = _level(shapes, block, entry, sizes.ch * sizes.ch_mult[level], sizes.num_res_blocks + 1, level == last)
        if level != 0:
            shapes |= _conv(f"{block}.upsample.conv", entry, entry, 3)
    for half in ("encoder", "decoder"):
        shapes |= _residual(f"{vq}.{half}.mid.0", top, top) | _attention(f"{vq}.{half}.mid.1", top)
        shapes |= _residual(f"{vq}.{half}.mid.2", top, top)
    return shapes | _norm(f"{vq}.decoder.norm_out", entry) | _conv(f"{vq}.decoder.conv_out", entry, 3, 3)


def _level(shapes: Shapes, block: str, entry: int, out: int, count: int, attends: bool) -> int:
    for index in range(count):
        shapes |= _residual(f"{block}.res.{index}", entry, out)
        entry = out
        if attends:
            shapes |= _attention(f"{block}.attn.{index}", out)
    return entry


def _residual(name: str, entry: int, out: int) -> Shapes:
    shapes = _norm(f"{name}.norm1", entry) | _conv(f"{name}.conv1", entry, out, 3)
    shapes |= _norm(f"{name}.norm2", out) | _conv(f"{name}.conv2", out, out, 3)
    return shapes if entry == out else shapes | _conv(f"{name}.nin_shortcut", entry, out, 1)


def _attention(name: str, size: int) -> Shapes:
    shapes = _norm(f"{name}.norm", size)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= _conv(f"{name}.{part}", size, size, 1)
    return shapes


def tensors_of(sizes: Sizes, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """The state dict: every tensor differs from every other, norms lie around 1, nothing explodes."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, shape in shapes_of(sizes).items():
        fan = max(1, torch.Size(shape[1:]).numel())
        value = torch.randn(shape, generator=generator) / fan**0.5
        drawn[name] = (1 + 0.1 * value if "norm" in name and name.endswith("weight") else value).to(dtype)
    return drawn


def tokenizer_of(sizes: Sizes) -> Tokenizer:
    """Bytes, a few words, and DeepSeek's special tokens; as published, its file does not say that BOS comes first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [BOS, EOS, PAD, BOI, EOI, IMAGE, *(ROLES if sizes.roles else ())]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


def save_small(
    folder: Path,
    sizes: Sizes = THREE["pro_1b"],
    *,
    weights: str = "bin",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Writes the folder and returns its tensors.

    Args:
        weights: `bin`, `safetensors`, or either with `_shards` behind it.
    """
    save_settings(folder, sizes, dtype)
    tensors = tensors_of(sizes, dtype, seed)
    save_weights(folder, tensors, weights)
    return tensors


def save_settings(folder: Path, sizes: Sizes, dtype: torch.dtype = torch.float32) -> None:
    """Configuration, processor and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(sizes, str(dtype).removeprefix("torch."))
    picture = {"image_processor_type": "VLMImageProcessor", "processor_class": "VLChatProcessor"}
    picture |= {"background_color": [127] * 3, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    picture |= {"image_size": sizes.image_size, "min_size": 4, "rescale_factor": 1 / 255}
    slots = (sizes.image_size // sizes.patch) ** 2
    processor = {"add_special_token": False, "ignore_id": -100, "image_tag": IMAGE, "mask_prompt": True}
    processor |= {"num_image_tokens": slots, "processor_class": "VLChatProcessor", "sft_format": "deepseek"}
    words = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": False, "legacy": True}
    words |= {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": None, "model_max_length": 256}
    words |= {"clean_up_tokenization_spaces": False, "sp_model_kwargs": {}}
    more = {"additional_special_tokens": [IMAGE, *(ROLES if sizes.roles else ())]}
    files = {"config": config, "preprocessor_config": picture, "processor_config": processor}
    files |= {"tokenizer_config": words | more, "special_tokens_map": {"bos_token": BOS, "eos_token": EOS, **more}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False))
    tokenizer_of(sizes).save(str(folder / "tokenizer.json"))


def save_holes(folder: Path, sizes: Sizes) -> int:
    """Weights in bfloat16 that are zeros and take no room: a safetensors file of one hole; returns its bytes."""
    header, end = {}, 0
    for name, shape in shapes_of(sizes).items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def save_weights(folder: Path, tensors: dict[str, Tensor], weights: str) -> None:
    """One file of either form, or three shards with their index."""
    kind, _, sharded = weights.partition("_")
    stem = "pytorch_model" if kind == "bin" else "model"
    names = list(tensors)
    parts = [names[0::3], names[1::3], names[2::3]] if sharded else [names]
    placed = {}
    for number, part in enumerate(parts, 1):
        name = f"{stem}-{number:05d}-of-00003.{kind}" if sharded else f"{stem}.{kind}"
        held = {key: tensors[key] for key in part}
        if kind == "bin":
            torch.save(held, folder / name)
        else:
            save_file(held, folder / name, {"format": "pt"})
        placed |= dict.fromkeys(part, name)
    if sharded:
        content = {"metadata": {"total_size": 0}, "weight_map": placed}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(content))
