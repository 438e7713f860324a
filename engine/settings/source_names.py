"""How data are named on the command line: a file, a folder or a hub name, and behind `#` which split is meant."""

from __future__ import annotations

import os
from pathlib import Path


def split_named(source: str | Path) -> tuple[str, str | None]:
    """A source without the split that it names behind `#`, and that split; what exists by the whole name has none."""
    name = str(source)
    base, mark, split = name.rpartition("#")
    if not mark or not base or not split or "/" in split or os.path.exists(os.path.expanduser(name)):
        return name, None
    return base, split


def is_one_file(source: str | Path) -> bool:
    """A source that is one part of data and has no other to hold out: a file, or a split that is named."""
    base, split = split_named(source)
    return split is not None or os.path.isfile(os.path.expanduser(base))
