"""A folder in DeepSeek's layout, looked at without torch: its settings, and whether its weights are whole.

Pickles are not opened here: their names, their first bytes, and the end of the archive, which a download that was cut
off does not have, tell enough in a moment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..policies.kinds import SAFE, SAFE_INDEX
from .deepseek_config import THEIRS, refusal

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PUBLISHED_SAFE = "pytorch_model.safetensors"
"""What showlab's code calls safetensors."""
NEEDED = ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
SETTINGS = ("config.json", *NEEDED, "processor_config.json", "special_tokens_map.json")
"""DeepSeek's files beside the weights."""
RECORD = "conversion.json"
"""In a converted folder: what went in and what came out."""
FORMAT = 1
"""Of what a conversion writes: raised when that changes, so that older conversions are not taken up."""
_END = b"PK\x05\x06"
"""Where the list of an archive's contents ends."""
_END_WITHIN = 65_600
"""Bytes: the longest that it can be from the file's end."""


def is_theirs(folder: Path) -> bool:
    """Whether a folder is in DeepSeek's layout."""
    return config_in(folder).get("model_type") == THEIRS


def config_in(folder: Path) -> Mapping[str, Any]:
    """Its config.json; empty where there is none that can be read."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def weight_names(folder: Path) -> list[str]:
    """The files that hold the weights, as far as names tell: safetensors where there are any, else pickles; they need
    not be there, and it is empty where no name says what they are."""
    named = ((SAFE, SAFE_INDEX), (PUBLISHED_SAFE, f"{PUBLISHED_SAFE}.index.json"), (PICKLED, PICKLED_INDEX))
    for single, index in named:
        if (folder / index).is_file():
            try:
                return sorted({str(name) for name in json.loads((folder / index).read_bytes())["weight_map"].values()})
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                return []
        if (folder / single).is_file():
            return [single]
    return []


def theirs_problems(setting: str, folder: Path) -> list[str]:
    """What is wrong with a folder in DeepSeek's layout, in words."""
    found = []
    if why := refusal(config_in(folder)):
        found.append(f"{setting}: expected Janus or Janus-Pro, got {folder}, {why}")
    for name in NEEDED:
        if not (folder / name).is_file():
            found.append(f"{setting}: expected DeepSeek's {name} beside the weights, got none in {folder}; download it")
    return found


def pickled_problems(folder: Path) -> list[str]:
    """What is wrong with pickled weights; a sentence's end each, with the remedy."""
    names = weight_names(folder)
    if not names:
        return [f"{folder / PICKLED_INDEX}, which names no shards; download it again"]
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        return [f"{len(absent)} of {len(names)} shards missing in {folder} ({absent[0]}); download them again"]
    return [problem for name in names if (problem := _pickle_problem(folder / name))]


def has_pickles_alone(folder: Path) -> bool:
    """Whether the weights are pickles, with no safetensors beside them."""
    return not any(folder.glob("*.safetensors")) and any((folder / name).is_file() for name in (PICKLED, PICKLED_INDEX))


def _pickle_problem(path: Path) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(8)
            size = file.seek(0, 2)
            file.seek(max(0, size - _END_WITHIN))
            end = file.read()
    except OSError as error:
        return f"{path}, which cannot be read ({error.strerror}); change its permissions, or download it again"
    if start == b"version ":
        return f"{path}, a pointer of git-lfs and not the file; `git lfs pull` fetches it"
    if size == 0 or (start[:4] == b"PK\x03\x04" and _END not in end):
        return f"{path} of {size} bytes, which is cut off; download it again"
    return ""


def record_in(folder: Path) -> dict[str, Any] | None:
    """`conversion.json` of a folder whose weight files are as it says; None where something is amiss."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        whole = all((folder / name).stat().st_size == size for name, (size, _) in record["written"].items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return record if whole and record.get("format") == FORMAT else None
