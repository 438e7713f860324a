"""Which tensor goes where in a conversion of Show-o between showlab's layout and transformers' (show_o_model.py).

No name changes but for a prefix: `showo.*` is the language model in both, the image tokenizer's tensors stand under
`vqmodel.` here. What the published folder does not say is read from shapes: rows of the table, sizes of the language
model and of the image tokenizer. Where the codes begin follows from the two, so an enlarged vocabulary converts as
well.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from safetensors import SafetensorError
from torch import dtype as Dtype
from transformers import AutoTokenizer, PhiConfig

from ..errors import CheckpointError, ConfigError
from ..policies.magvit import MagvitConfig
from ..policies.show_o_model import ShowOConfig, ShowOForUnifiedGeneration, ShowOProcessor
from ..reasons import reading
from .convert_plans import KeptWeights, Part, Plan, refuse
from .deepseek_files import PUBLISHED_SAFE, config_in
from .safetensors_stream import TensorInfo
from .show_o_files import MAGVIT, MODEL, SHOW_O, TEXT, TEXT_HOME, VQ, VQ_HOME, parts_of
from .weight_source import PickledWeights, Weights, weights_in

KEPT = "showlab"
"""In a converted folder: the published config.json."""
CODES, LAYER, TABLE = "vqmodel.", "showo.model.layers.", "showo.model.embed_tokens.weight"
NUM_TOKENS, VERSION = 256, "0.30.1"
"""`num_vq_tokens` where a configuration does not say; diffusers' version that the released code was written for."""
_FREQUENCIES = "rotary_emb.inv_freq"
"""Computed and not learnt, and in files of old versions of transformers alone."""
Moves = dict[TensorInfo, tuple[Part, ...]]
_NOT_SIZES = (
    "model_type",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
)


def into_show_o(folder: Path, vq: Path | None = None, text: Path | None = None) -> Plan:
    """Of a published folder into transformers' layout.

    Args:
        folder: with `_class_name` Showo.
        vq: its image tokenizer, a folder or a file; None: beside (show_o_files.py).
        text: folder of its text tokenizer; None: beside.

    Raises:
        CheckpointError: it cannot be converted.
    """
    place, words = parts_of(folder, vq, text)
    model, codes = _weights_at(folder), _weights_at(place)
    config, processor, lost = _settings_of(folder, place, words, model, codes)
    moved = _moves(folder, config, {"": model, CODES: codes})
    files = (*model.files, *codes.files, folder / "config.json", *words.glob("tokenizer*.json"))
    return Plan(moved, {}, files, partial(_write_ours, folder, config, processor, model.tensors[TABLE].dtype, lost))


def _weights_at(place: Path) -> Weights:
    """Of a folder, or of one file."""
    file = place if place.is_file() else place / PUBLISHED_SAFE
    if file.is_file() and file.suffix == ".safetensors":
        try:
            return KeptWeights(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a complete safetensors file ({error}); download it again") from error
    return PickledWeights(place) if place.is_file() else weights_in(place)


def _settings_of(
    folder: Path, place: Path, words: Path, model: Weights, codes: Weights
) -> tuple[ShowOConfig, ShowOProcessor, list[str]]:
    """Configuration, processor, and in words what is lost; CheckpointError where parts do not belong together."""
    told = config_in(folder)
    try:
        magvit = MagvitConfig.of({name: info.shape for name, info in codes.tensors.items()})
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{place}: expected MAGVITv2, got tensors without {error}; take {VQ}") from error
    wanted, count = told.get("codebook_size", magvit.num_codes), told.get("num_vq_tokens", NUM_TOKENS)
    side = math.isqrt(count)
    if wanted != magvit.num_codes or side**2 != count or not side:
        raise CheckpointError(
            f"{folder}: expected codebook_size {magvit.num_codes}, as {place} has it, and num_vq_tokens that make a "
            f"square, got {wanted} and {count}; take parts that belong together"
        )
    phi = _phi_of(folder, words, model)
    config = ShowOConfig(text_config=phi, vq_config=asdict(magvit), image_size=side * magvit.factor)
    with reading("model", words):
        tokenizer = AutoTokenizer.from_pretrained(words, trust_remote_code=False)
    processor = ShowOProcessor.made_of(tokenizer, config.image_size)
    extra, own = config.text_rows - len(tokenizer), told.get("llm_vocab_size")
    if extra and tokenizer.pad_token_id != own:
        raise CheckpointError(
            f"{words}: expected the tokenizer of {own} tokens that {folder} was trained with, got one of "
            f"{tokenizer.pad_token_id} before Show-o's own; take {TEXT}, or the enlarged one"
        )
    try:
        config.check()
        config.take_tokens(tokenizer)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    lost = f"{extra} rows of text have no token, and are never sampled: the tokenizer is not the enlarged one"
    return config, processor, [lost] if extra else []


def _phi_of(folder: Path, words: Path, model: Weights) -> PhiConfig:
    """The language model's configuration: sizes from shapes, the rest from the base's config.json, and where there is
    none, as Phi-1.5's, which is transformers' default."""
    base = config_in(words)
    told: Any = config_in(folder).get("text_config") or (base if base.get("model_type") == "phi" else {})
    shapes = {name: info.shape for name, info in model.tensors.items()}
    try:
        rows, hidden = shapes[TABLE]
        inner, keys = (shapes[f"{LAYER}0.{name}.weight"][0] for name in ("mlp.fc1", "self_attn.k_proj"))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{folder}: expected Show-o's tensors, got none called {error}; take {MODEL}") from error
    normed = shapes.get(f"{LAYER}0.self_attn.q_layernorm.weight")
    width = normed[0] if normed else hidden // int(told.get("num_attention_heads") or PhiConfig().num_attention_heads)
    sizes = {
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": len({name.split(".")[3] for name in shapes if name.startswith(LAYER)}),
        "num_attention_heads": hidden // width,
        "num_key_value_heads": keys // width,
        "qk_layernorm": normed is not None,
    }
    return PhiConfig(**{name: value for name, value in told.items() if name not in _NOT_SIZES} | sizes)


def _moves(folder: Path, config: ShowOConfig, parts: dict[str, Weights]) -> Moves:
    """Every tensor under its name in transformers' layout; CheckpointError where they are not the model's.

    Args:
        folder: for errors.
        config: of the model.
        parts: weights, by the prefix that their names get.
    """
    moved: Moves = {
        info._replace(name=f"{prefix}{info.name}"): (Part(weights, info.name),)
        for prefix, weights in parts.items()
        for info in weights.tensors.values()
        if not info.name.endswith(_FREQUENCIES)
    }
    with reading("model", folder), torch.device("meta"):
        state = ShowOForUnifiedGeneration(config).state_dict()
    got = {info.name: info.shape for info in moved}
    odd = [f"{name}: {list(got[name])}" for name in got if name in state and state[name].shape != got[name]]
    unknown = [name for name in got if name not in state]
    first = next(iter(parts.values()))
    refuse(folder, len(state), unknown, state.keys() - got.keys(), odd, first, "Show-o with its image tokenizer")
    return moved


def _write_ours(
    folder: Path, config: ShowOConfig, processor: ShowOProcessor, dtype: Dtype, lost: list[str], draft: Path
) -> list[str]:
    config.architectures, config.dtype = [ShowOForUnifiedGeneration.__name__], dtype
    config.save_pretrained(draft)
    processor.save_pretrained(draft)
    (draft / KEPT).mkdir()
    shutil.copyfile(folder / "config.json", draft / KEPT / "config.json")
    return lost


def into_showlab(folder: Path, base: Path | None = None) -> Plan:
    """Of a folder in transformers' layout into the published one, its tokenizers in folders of their own within.

    Args:
        folder: of `ShowOForUnifiedGeneration`.
        base: the published folder that the training started from, for its config.json; None: what a conversion kept.

    Raises:
        CheckpointError: it cannot be converted.
    """
    with reading("model", folder):
        config = ShowOConfig.from_pretrained(folder)
        processor = ShowOProcessor.from_pretrained(folder)
    weights = weights_in(folder)
    moved = _moves(folder, config, {"": weights})
    model = {info: part for info, part in moved.items() if not info.name.startswith(CODES)}
    codes = {
        info._replace(name=info.name.removeprefix(CODES)): part for info, part in moved.items() if info not in model
    }
    write = partial(_write_theirs, config, processor, dict(config_in(folder / KEPT if base is None else base)))
    return Plan(model, codes, tuple(weights.files), write, single=PUBLISHED_SAFE, beside=(VQ_HOME, PUBLISHED_SAFE))


def _write_theirs(config: ShowOConfig, processor: ShowOProcessor, told: dict[str, Any], draft: Path) -> list[str]:
    words, phi = processor.tokenizer, cast(PhiConfig, config.text_config)
    before = int(words.pad_token_id)
    told = {"llm_model_path": TEXT, "_diffusers_version": VERSION} | told
    told |= {"_class_name": SHOW_O, "w_clip_vit": False, "load_from_showo": True, "vocab_size": phi.vocab_size}
    told |= {"llm_vocab_size": before, "num_new_special_tokens": config.text_rows - before}
    told |= {"codebook_size": config.num_codes, "num_vq_tokens": config.num_image_tokens}
    told |= {"mask_token_id": config.mask_token_id}
    (draft / VQ_HOME).mkdir()
    words.save_pretrained(draft / TEXT_HOME)
    phi.save_pretrained(draft / TEXT_HOME)
    named = draft / TEXT_HOME / "tokenizer_config.json"  # by a class that transformers 4 has, which their code runs on
    settings = json.loads(named.read_bytes()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    codes = {"_class_name": MAGVIT, "_diffusers_version": VERSION}
    for path, content in ((draft / "config.json", told), (draft / VQ_HOME / "config.json", codes), (named, settings)):
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return []
