"""A checkpoint's folder, looked at without torch: configuration, the headers of its weights, its tokenizer.

What is wrong with one (half a download, pickled weights, another model's files) is known from names, sizes and a few
kilobytes of JSON, long before anything is loaded.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from ..checkpoints.deepseek_config import THEIRS
from ..checkpoints.deepseek_files import (
    config_in,
    has_pickles_alone,
    is_theirs,
    pickled_problems,
    theirs_problems,
    weight_names,
)
from ..checkpoints.show_o_files import is_show_o, show_o_problems
from ..policies.kinds import DRAWING, SAFE, SAFE_INDEX

UNIFIED = ("chameleon", "emu3", "janus", "show_o")
"""`model_type` of the models that draw, as KNOWN of policies/auto.py has them."""
ORIGINALS = {
    "Emu3": "this is BAAI's own format; take transformers', such as BAAI/Emu3-Gen-hf",
}
"""`model_type` of formats that transformers reads by remote code alone, which is not run."""
TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt"),
    "tekken.json",
)
"""Files of which a tokenizer needs one."""
MAX_HEADER = 100_000_000
"""Bytes, as safetensors has it."""
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def folder_problems(
    setting: str, folder: Path, *, trained: bool = False, weights: bool = True, tokenizer: bool = True
) -> list[str]:
    """What is wrong with a checkpoint, in words.

    Args:
        setting: that names it.
        folder: which is there.
        trained: it is the model that is trained, for which a policy must be known.
        weights: False: they are not there yet, and not looked at.
        tokenizer: False: it needs none, or has it from elsewhere.
    """
    config = settings_in(folder / "config.json")
    if isinstance(config, str):
        return [f"{setting}: expected transformers' format, got {folder}, {config}"]
    if trained and is_show_o(folder):
        return show_o_problems(setting, folder) + (show_o_damage(setting, folder) if weights else [])
    theirs = trained and config.get("model_type") == THEIRS
    found = (
        [] if not trained else theirs_problems(setting, folder) if theirs else _kind_problems(setting, folder, config)
    )
    pickled = theirs and has_pickles_alone(folder)
    damage = [] if not weights else pickled_problems(folder) if pickled else weight_problems(folder)
    what = "whole files of torch.save" if pickled else "whole safetensors"
    found += [f"{setting}: expected {what}, got {problem}" for problem in damage]
    if tokenizer and not any((folder / name).is_file() for name in TOKENIZERS):
        found.append(
            f"{setting}: expected a tokenizer beside the weights (tokenizer.json), got none in {folder}; copy the "
            "base model's tokenizer files there"
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        told = settings_in(folder / name) if (folder / name).is_file() else {}
        if isinstance(told, str):
            found.append(f"{setting}: expected transformers' {name}, got {folder / name}, {told}")
    return found


def show_o_damage(setting: str, folder: Path) -> list[str]:
    """What is wrong with the weights of one of Show-o's published parts, by names, sizes and headers."""
    names = weight_names(folder)
    if not names:
        damage = [f"none in {folder}{_other_weights(folder)}"]
    elif names[0].endswith(".safetensors"):
        damage = [problem for name in names if (problem := _file_problem(folder / name))]
    else:
        damage = pickled_problems(folder)
    return [f"{setting}: expected whole weights, got {problem}" for problem in damage]


def settings_in(path: Path) -> dict[str, Any] | str:
    """A JSON file of a checkpoint; a sentence's end with the remedy where it cannot be used."""
    if not path.is_file():
        if path.name == "config.json" and (path.parent / "adapter_config.json").is_file():
            return "which holds an adapter alone; merge it into its base first (peft's merge_and_unload)"
        if (path.parent / "model_index.json").is_file():
            return f"which is a pipeline of diffusers; take {DRAWING}"
        return f"which has no {path.name}; {_meant(path.parent)}"
    try:
        text = path.read_bytes()
        found = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        return f"which is {_pointer(text) if isinstance(error, ValueError) else 'not readable'}; copy it again"
    return found if isinstance(found, dict) else "which is no object of settings; copy it again"


def _pointer(head: bytes) -> str:
    """Git leaves small texts in place of large files, where git-lfs is not installed."""
    is_pointer = head.startswith(b"version https://git-lfs")
    return "a pointer of git-lfs and not the file (`git lfs pull` fetches it)" if is_pointer else "no JSON"


def _meant(folder: Path) -> str:
    """The checkpoint that a folder without one most likely stands for."""
    near = [folder / "checkpoints" / "last", folder / "last", folder.parent / "last"]
    near += sorted(child for child in folder.iterdir() if child.is_dir())[:50]
    meant = next((path for path in near if path != folder and (path / "config.json").is_file()), None)
    return f"did you mean {meant}?" if meant else "name the folder that save_pretrained wrote, or a hub name"


def _kind_problems(setting: str, folder: Path, config: dict[str, Any]) -> list[str]:
    """Of the model that is trained: its type, and numbers that are not weights."""
    kind, found = config.get("model_type"), []
    known = text_decoders()
    kind = kind if isinstance(kind, str) else str(kind)
    if kind not in UNIFIED and known and kind not in known:
        remedy = ORIGINALS.get(kind, "another unified model needs a policy (CONTRIBUTING.md, Add a model)")
        found.append(
            f"{setting}: expected a checkpoint of {' or '.join(UNIFIED)}, or a text decoder of transformers (llama, "
            f"qwen2, qwen3, gemma, …), got model_type {kind!r} in {folder}; {remedy}"
        )
    if config.get("quantization_config"):
        settings = config["quantization_config"]
        method = settings.get("quant_method", "some way") if isinstance(settings, dict) else settings
        found.append(
            f"{setting}: expected weights in bfloat16 or float32, got {folder}, quantised by {method}, which cannot be "
            "trained; take the checkpoint that it was made from"
        )
    return found


@cache
def text_decoders() -> frozenset[str]:
    """`model_type`s that transformers knows as causal language models, without emu3, which draws;
    read from its source, as importing it takes seconds; empty where its source is not as expected."""
    spec = importlib.util.find_spec("transformers")
    path = Path(spec.origin or "").parent / "models" / "auto" / "modeling_auto.py" if spec else Path()
    if not path.is_file():
        return frozenset()
    found = re.search(r"^MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = \w+\((.*?)^\)", path.read_text("utf-8"), re.S | re.M)
    return frozenset(re.findall(r'\(\s*"([\w-]+)"', found[1])).difference(UNIFIED) if found else frozenset()


def weight_problems(folder: Path) -> list[str]:
    """What is wrong with the weights, by names, sizes and headers; a sentence's end each, with the remedy."""
    files = weight_files(folder)
    if isinstance(files, str):
        return [files]
    return [problem for path in files if (problem := _file_problem(path))]


def weight_files(folder: Path) -> list[Path] | str:
    """The files that hold the weights, all there; a sentence's end with the remedy where they are not."""
    if (folder / SAFE_INDEX).is_file():
        index = settings_in(folder / SAFE_INDEX)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            return f"{folder / SAFE_INDEX}, which names no shards; download it again"
        names = sorted(set(shards.values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            return f"{len(absent)} of {len(names)} shards missing in {folder} ({absent[0]}); download them again"
        return [folder / name for name in names]
    if (folder / SAFE).is_file():
        return [folder / SAFE]
    return f"none in {folder}{_other_weights(folder)}"


def _other_weights(folder: Path) -> str:
    pickled = sorted(path.name for kind in _PICKLED for path in folder.glob(kind))
    if pickled:
        return f", but {pickled[0]}, whose loading would run code; convert it with save_pretrained where you trust it"
    if quantised := sorted(path.name for path in folder.glob("*.gguf")):
        return f", but {quantised[0]}; take the checkpoint that it was made from"
    parts = sorted(path.name for path in folder.glob("*.safetensors"))
    if parts:
        return f" under their usual names, but {parts[0]} without {SAFE_INDEX}; download the rest"
    return "; download them, or name the folder that holds them"


def _file_problem(path: Path) -> str:
    """Empty where a file is as long as its header says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == b"version ":
                return f"{path}, a pointer of git-lfs and not the file; `git lfs pull` fetches it"
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, MAX_HEADER):
                return f"{path}, which is cut off or no safetensors; download it again"
            header = json.loads(file.read(length))
        whole = 8 + length + max((entry["data_offsets"][1] for entry in _tensors(header)), default=0)
    except OSError as error:
        return f"{path}, which cannot be read ({error.strerror}); change its permissions, or download it again"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return f"{path}, whose header is no safetensors'; download it again"
    if size == whole:
        return ""
    return f"{path} of {size} bytes where its header says {whole}; the download was cut off, repeat it"


def _tensors(header: dict[str, Any]) -> Iterable[dict[str, Any]]:
    return (entry for name, entry in header.items() if name != "__metadata__")


def num_weights(folder: Path) -> int:
    """Numbers in the weights of a checkpoint that has no problems."""
    files, total = weight_files(folder), 0
    if is_show_o(folder) or (is_theirs(folder) and has_pickles_alone(folder)):
        half = "float32" not in str(config_in(folder).get("torch_dtype", "bfloat16"))
        return sum((folder / name).stat().st_size for name in weight_names(folder)) // (2 if half else 4)
    for path in files if isinstance(files, list) else []:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for entry in _tensors(header):
            count = 1
            for side in entry["shape"]:
                count *= side
            total += count
    return total


def positions(config: dict[str, Any]) -> int | None:
    """Longest sequence of a model, by its configuration; None where that does not say."""
    for part in (config.get("text_config"), config.get("language_config"), config):
        reach = part.get("max_position_embeddings") if isinstance(part, dict) else None
        if isinstance(reach, int) and not isinstance(reach, bool):
            return reach
    return None
