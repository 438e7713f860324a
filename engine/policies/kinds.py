"""Kinds of checkpoints that `model_type` does not tell apart, by files that are read without torch, or by a name.

Liquid is a plain language model, and its configuration says no more than that: `gemma`. What is its own are three
tokens of its tokenizer, and rows of its table behind all tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
"""What holds a checkpoint's weights, or says which files do; as transformers calls them."""
DRAWING = "a checkpoint that draws (Janus, Emu3, Anole, Liquid, Show-o)"
"""What messages name as a remedy where a model draws nothing."""
LIQUID_TOKENS = ("<boi>", "<eoi>", "<unconditional>")
_FILES = ("tokenizer_config.json", "tokenizer.json")
"""The first is short, but transformers 5 writes added tokens into the second alone."""


def is_liquid(find: Callable[[str], Path | None]) -> bool:
    """Whether a text decoder's tokenizer is Liquid's.

    Args:
        find: a file of the checkpoint by its name; None where there is none.
    """
    for name in _FILES:
        path = find(name)
        if path is not None and all(f'"{token}"'.encode() in path.read_bytes() for token in LIQUID_TOKENS):
            return True
    return False


def is_liquid_folder(folder: Path) -> bool:
    """The same of a folder."""
    return is_liquid(lambda name: folder / name if (folder / name).is_file() else None)


def called(name: str | Path) -> str:
    """What a checkpoint is called, in lower case: the last part of its hub name, also where it lies in the hub's cache
    (`models--org--name/snapshots/<commit>`), else its folder's name."""
    parts = [part for part in re.split(r"[/\\]", str(name)) if part]
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].rpartition("--")[2].lower()
    return parts[-1].partition("@")[0].lower() if parts else ""
