"""Which tensor goes where in a conversion of Janus, checked against the model that the configuration describes.

A plan needs the headers alone. Names that Janus does not have, names that are missing and other shapes are told
together, before a byte is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import syncr1.engine.compat  # noqa: F401  (before transformers: see there)

import torch
from transformers import AutoProcessor, JanusConfig, JanusForConditionalGeneration

from ..errors import CheckpointError, ConfigError
from ..reasons import reading
from .deepseek_config import THEIRS, refusal, to_ours, to_theirs
from .deepseek_files import SETTINGS
from .deepseek_janus import origin_of, place_of
from .deepseek_processor import generation_of, processor_to_ours, processor_to_theirs
from .safetensors_stream import TensorInfo
from .weight_source import Weights, weights_in

KEPT, EXTRA = "deepseek", "no_counterpart.safetensors"
"""In a converted folder: DeepSeek's own files, and the tensors that transformers' model has no place for."""
Shapes = dict[str, tuple[int, ...]]
HEAD = "lm_head.weight"
_SAMPLED = "model.language_model.embed_tokens.weight"


class Part(NamedTuple):
    """One of `num` equal parts of a tensor along its first axis."""

    weights: Weights
    name: str
    place: int = 0
    num: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion will write; made from headers alone, before anything is."""

    tensors: dict[TensorInfo, tuple[Part, ...]]
    """Each tensor of the result, and what it is made of, one behind the other; nothing: zeros."""
    kept: dict[TensorInfo, tuple[Part, ...]]
    """What goes into the file beside; as a rule tensors without a counterpart."""
    files: tuple[Path, ...]
    """That are read."""
    write_settings: Callable[[Path], list[str]]
    """Writes configuration, tokenizer and processor; returns, in words, what they lose."""
    single: str = ""
    """The one file of weights, where the layout has one of its own name."""
    beside: tuple[str, str] = (KEPT, EXTRA)
    """Folder and file for `kept`."""


def into_transformers(folder: Path) -> Plan:
    """Of a folder in DeepSeek's layout; CheckpointError where it cannot be converted."""
    config = ours_of(folder)
    weights = weights_in(folder)
    if config.tie_word_embeddings and "language_model.lm_head.weight" in weights.tensors:
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False  # both are there: both are taken
    wanted, moved, unknown = shapes_of(config), dict[TensorInfo, tuple[Part, ...]](), list[str]()
    kept: dict[TensorInfo, tuple[Part, ...]] = {}
    for info in weights.tensors.values():
        place = place_of(info.name)
        if place is None:
            unknown.append(info.name)
        elif not place.names:
            kept[info] = (Part(weights, info.name),)
        else:
            shape = info.shape[1:] if place.leading_axis and info.shape[:1] == (1,) else info.shape
            count = len(place.names)
            divided = (shape[0] // count, *shape[1:]) if shape and shape[0] % count == 0 else shape
            for index, name in enumerate(place.names):
                moved[TensorInfo(name, info.dtype, divided)] = (Part(weights, info.name, index, count),)
    got = {info.name: info.shape for info in moved}
    absent = {_theirs(name) for name in wanted if name not in got}
    odd = {_theirs(name): wanted[name] for name in got if name in wanted and got[name] != wanted[name]}
    shapes = [f"{name}: {list(weights.tensors[name].shape)} for {_whole(name, shape)}" for name, shape in odd.items()]
    extra = [_theirs(name) for name in got if name not in wanted]
    refuse(folder, len(wanted), [*unknown, *extra], absent, shapes, weights)
    files = (*weights.files, *(folder / name for name in SETTINGS if (folder / name).is_file()))
    return Plan(moved, kept, files, partial(write_ours, folder, config))


def ours_of(folder: Path) -> JanusConfig:
    """transformers' configuration of a folder in DeepSeek's layout, its ids of tokens apart."""
    told = json.loads((folder / "config.json").read_bytes())
    if why := refusal(told):
        raise CheckpointError(f"{folder}: expected Janus or Janus-Pro, got {why}")
    with reading("model", folder):
        return JanusConfig(**to_ours(told))


def shapes_of(config: JanusConfig) -> Shapes:
    """Every tensor of the model that a configuration describes, as its files hold them."""
    with reading("model", "config.json"), torch.device("meta"):
        state = JanusForConditionalGeneration(config).state_dict()
    return {name: tuple(value.shape) for name, value in state.items() if name != HEAD or not config.tie_word_embeddings}


def write_ours(folder: Path, config: JanusConfig, draft: Path) -> list[str]:
    """Configuration, tokenizer and processor in transformers' format, and DeepSeek's own files beside them."""
    tower = config.vision_config
    with reading("model", folder):
        processor = processor_to_ours(folder, tower.image_size, (tower.image_size // tower.patch_size) ** 2)
        tokenizer = processor.tokenizer
        config.image_token_id = tokenizer.convert_tokens_to_ids(tokenizer.image_token)
        text = config.text_config
        text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        text.pad_token_id = tokenizer.pad_token_id
        config.save_pretrained(draft)
        processor.save_pretrained(draft)
        generation_of(processor).save_pretrained(draft)
    last = max(tokenizer.get_vocab().values())
    if last >= text.vocab_size:
        raise CheckpointError(
            f"{folder}: expected a tokenizer of at most {text.vocab_size} ids, as the model has rows, got id {last}; "
            "take tokenizer and weights from one place"
        )
    (draft / KEPT).mkdir()
    for name in SETTINGS:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, draft / KEPT / name)
    return ["processor_config.json: mask_prompt and ignore_id, which DeepSeek's own training read"]


def into_deepseek(folder: Path, base: Path | None) -> Plan:
    """Of a folder in transformers' format; CheckpointError where it cannot be converted.

    Args:
        base: the folder in DeepSeek's layout that the training started from; None: what a conversion kept, if any."""
    with reading("model", folder):
        config = JanusConfig.from_pretrained(folder)
    weights = weights_in(folder)
    wanted = shapes_of(config)
    got = {info.name: info.shape for info in weights.tensors.values()}
    shapes = [
        f"{name}: {list(got[name])} for {list(wanted[name])}"
        for name in got
        if wanted.get(name, got[name]) != got[name]
    ]
    refuse(
        folder, len(wanted), [name for name in got if name not in wanted], wanted.keys() - got.keys(), shapes, weights
    )
    moved = _gathered(weights)
    if config.tie_word_embeddings:
        info = weights.tensors[_SAMPLED]
        moved[TensorInfo("language_model.lm_head.weight", info.dtype, info.shape)] = (Part(weights, _SAMPLED),)
    origin = _origin(folder, base)
    extra = _extra(base, folder)
    dtype = weights.tensors[_SAMPLED].dtype
    for name, shape in _unread(config).items():
        held = None if extra is None else extra.tensors.get(name)
        fits = held is not None and held.shape == shape
        info = held if held is not None and fits else TensorInfo(name, dtype, shape)
        moved[info] = (Part(extra, name),) if fits and extra is not None else ()
    return Plan(
        moved,
        {},
        tuple(weights.files),
        partial(write_theirs, folder, config, origin, str(dtype).removeprefix("torch.")),
    )


def _gathered(weights: Weights) -> dict[TensorInfo, tuple[Part, ...]]:
    """DeepSeek's tensors, each of the one or more of transformers' that it consists of."""
    parts: dict[str, dict[int, TensorInfo]] = {}
    axis: dict[str, bool] = {}
    for info in weights.tensors.values():
        found = origin_of(info.name)
        assert found is not None, info.name  # it is one of the model's
        theirs, index, axis[found[0]] = found
        parts.setdefault(theirs, {})[index] = info
    moved: dict[TensorInfo, tuple[Part, ...]] = {}
    for theirs, held in parts.items():
        first = held[0]
        shape = (first.shape[0] * len(held), *first.shape[1:])
        if {info.dtype for info in held.values()} != {first.dtype}:
            raise CheckpointError(f"{theirs}: expected one dtype of its {len(held)} parts; save the model in one")
        info = TensorInfo(theirs, first.dtype, (1, *shape) if axis[theirs] else shape)
        moved[info] = tuple(Part(weights, held[index].name) for index in sorted(held))
    return moved


def _unread(config: JanusConfig) -> Shapes:
    """What DeepSeek's state dict has beyond transformers': SigLIP's pooling head, and the codes' counter."""
    pool, width = "vision_model.vision_tower.attn_pool", config.vision_config.hidden_size
    mlp = int(width * config.vision_config.mlp_ratio)
    shapes: Shapes = {f"{pool}.latent": (1, 1, width)}
    layers = {"q": (width, width), "kv": (2 * width, width), "proj": (width, width)}
    for name, shape in {**layers, "mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp), "norm": (width,)}.items():
        shapes |= {f"{pool}.{name}.weight": shape, f"{pool}.{name}.bias": shape[:1]}
    return shapes | {"gen_vision_model.quantize.codebook_used": (65536,)}


def _origin(folder: Path, base: Path | None) -> Path | None:
    """Where DeepSeek's own settings files lie."""
    if base is not None:
        told = json.loads((base / "config.json").read_bytes()) if (base / "config.json").is_file() else {}
        if told.get("model_type") != THEIRS:
            raise CheckpointError(
                f"base: expected a folder in DeepSeek's layout (model_type {THEIRS}), got {base}; name the checkpoint "
                "as DeepSeek publishes it, or leave base out"
            )
        return base
    return folder / KEPT if (folder / KEPT / "config.json").is_file() else None


def _extra(base: Path | None, folder: Path) -> Weights | None:
    """Tensors that transformers' layout has no place for."""
    if base is not None:
        return weights_in(base)
    return KeptWeights(folder / KEPT / EXTRA) if (folder / KEPT / EXTRA).is_file() else None


def write_theirs(folder: Path, config: JanusConfig, origin: Path | None, dtype: str, draft: Path) -> list[str]:
    """DeepSeek's configuration, tokenizer and processor: its own files where they are this model's, else made."""
    with reading("model", folder):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    if origin is not None and _same(origin, config, processor):
        for name in SETTINGS:
            if (origin / name).is_file():
                shutil.copyfile(origin / name, draft / name)
        told = json.loads((draft / "config.json").read_bytes())
        if told.get("torch_dtype", dtype) != dtype:
            (draft / "config.json").write_text(json.dumps({**told, "torch_dtype": dtype}, indent=2) + "\n")
        return []
    try:
        made = to_theirs(config.to_dict(), dtype)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: expected what DeepSeek's code can be, got {error}") from error
    (draft / "config.json").write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tower = config.vision_config
    lost = processor_to_theirs(processor, draft, (tower.image_size // tower.patch_size) ** 2)
    if origin is not None:
        where = f"{KEPT}/" if origin.name == KEPT else "the base"
        lost.append(f"settings files of {where}: another model's sizes or vocabulary; they are made anew")
    params = made["vision_config"]["params"], made["gen_vision_config"]["cls"]
    if "width" in params[0] or params[1] != "VQ-16":
        lost.append("sizes: DeepSeek's code builds its vision tower and VQ model at sizes that it knows by name alone")
    return lost


def _same(origin: Path, config: JanusConfig, processor: Any) -> bool:
    """Whether DeepSeek's files are those of this model: its sizes and its vocabulary."""
    ours, own = ours_of(origin).to_dict(), config.to_dict()
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "tie_word_embeddings")
    for part in ("text_config", "vision_config", "vq_config"):
        if any(
            own[part].get(name) != value for name, value in ours[part].items() if name in _SIZES and name not in ids
        ):
            return False
    told = json.loads((origin / "tokenizer.json").read_bytes()) if (origin / "tokenizer.json").is_file() else {}
    words = {token["content"] for token in told.get("added_tokens", ())} | set(told.get("model", {}).get("vocab", ()))
    return words == set(processor.tokenizer.get_vocab())


_SIZES = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size"),
    *("num_key_value_heads", "rope_parameters", "rms_norm_eps", "image_size", "mlp_ratio", "depth", "embed_dim"),
    *("num_embeddings", "base_channels", "channel_multiplier", "num_res_blocks", "latent_channels", "projection_dim"),
}


def _whole(theirs: str, part: tuple[int, ...]) -> list[int]:
    """The shape of a tensor of DeepSeek's, by that of one of the parts that it is cut into."""
    place = place_of(theirs)
    assert place is not None and place.names
    whole = (part[0] * len(place.names), *part[1:])
    return [1, *whole] if place.leading_axis else list(whole)


def _theirs(name: str) -> str:
    found = origin_of(name)
    return name if found is None else found[0]


def refuse(
    folder: Path,
    wanted: int,
    unknown: Iterable[str],
    absent: Iterable[str],
    shapes: list[str],
    weights: Weights,
    what: str = "Janus",
) -> None:
    """CheckpointError with all that does not fit."""
    integers = [info.name for info in weights.tensors.values() if not info.dtype.is_floating_point]
    integers = [name for name in integers if not name.endswith(("codebook_used", "power_vals"))]
    odd = {"unknown": sorted(unknown), "missing": sorted(absent), "of another shape": sorted(shapes)}
    odd["of integers (quantised)"] = sorted(integers)
    found = [f"{len(names)} {kind} ({some(names)})" for kind, names in odd.items() if names]
    if found:
        raise CheckpointError(
            f"{folder}: expected the {wanted} tensors of the {what} that its config.json describes, got "
            f"{', '.join(found)}; take weights and config.json from one place"
        )


def some(names: list[str]) -> str:
    """The first few names, and how many more."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


class KeptWeights:
    """Of the one file that a conversion keeps beside its result."""

    def __init__(self, file: Path) -> None:
        from safetensors import safe_open

        self.files = [file]
        self._opened = safe_open(file, framework="pt")
        self.tensors: dict[str, TensorInfo] = {}
        for name in self._opened.offset_keys():
            tensor = self._opened.get_tensor(name)
            self.tensors[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape))

    def elements(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._opened.get_tensor(name).reshape(-1)[start:stop].clone()
