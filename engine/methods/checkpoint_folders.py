"""What is wrong with the folders and names of checkpoints that a recipe reads, and with the folder that it makes.

What is in them is looked at later (preflight.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..checkpoints.model_card import is_hub_name
from ..errors import kind_of


def source_problems(named: Iterable[tuple[str, str | None]]) -> list[str]:
    """Of (setting, folder or hub name, with a revision or without); None is none."""
    return [
        f"{setting}: expected a folder or a hub name, got {name}, which is neither; check the path"
        for setting, name in named
        if name is not None and not os.path.isdir(name) and not is_hub_name(name.partition("@")[0])
    ]


def new_folder_problems(output: Path | None) -> list[str]:
    """Of a folder that is to be made; it may be there if it is empty."""
    if output is None:
        return ["output: expected a folder for the result, got none; name one"]
    if os.path.lexists(output) and not output.is_dir():
        return [f"output: expected a new or empty folder, got {output}, {kind_of(output)}; choose another name"]
    if _is_full(output):
        return [f"output: expected a new or empty folder, got {output} with files; choose another name"]
    return []


def _is_full(folder: Path) -> bool:
    """A folder with anything in it; one that may not be looked into is told of by preflight.py."""
    try:
        return folder.is_dir() and any(folder.iterdir())
    except OSError:
        return False
