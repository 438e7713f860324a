"""Things that are made on first use and kept: where they lie, how they are named, and that they are whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def cache_dir() -> Path:
    """Where made things are kept: `SYNCR1_CACHE`, or `~/.cache/syncr1`."""
    return Path(os.environ.get("SYNCR1_CACHE") or Path.home() / ".cache" / "syncr1")


CORL_FILES = frozenset({"corl_base.py", "corl_parts.py", "scene_graph.py", "tiny_blip.py", "x2x.py"})
"""Of CoRL's embedded default alone: what else is made does not depend on them."""


def fingerprint(*parts: object, corl: bool = False) -> str:
    """Names a cache entry: by its settings and by the code and weights that it is made with."""
    digest = hashlib.blake2b(digest_size=6)
    world = Path(__file__).parent / "world"
    files = sorted([*world.glob("*.py"), *world.glob("*.safetensors"), *world.glob("*.json")])
    for path in files if corl else [path for path in files if path.name not in CORL_FILES]:
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(repr(parts).encode())
    return digest.hexdigest()


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, made on first use: in full, or not at all, even when two runs make it at the same time."""
    if not folder.is_dir():
        draft = folder.with_name(f"{folder.name}.{os.getpid()}")
        draft.parent.mkdir(parents=True, exist_ok=True)
        make(draft)
        try:
            draft.rename(folder)
        except OSError:  # another run was faster
            shutil.rmtree(draft)
    return folder
