"""What takes seconds to make and is made once: a session's, or, until the code that makes it changes, for all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import torch
import transformers
from warm import session_folder as session_folder

from syncr1.engine.world.base_model import BaseSettings, train_base
from syncr1.engine.world.disk import write_world
from syncr1.engine.world.general import write_general
from syncr1.kernels.native.library import ISA_VARIABLE, LIBRARY

ROOT = Path(__file__).resolve().parents[2]


@cache
def kept_folder() -> Path:
    """Outlives the session, for what takes seconds to make: one folder per state of the code that it is made with."""
    digest = blake2b(digest_size=6)
    folders = ("kernels", "engine/world", "engine/policies", "engine/forward")
    files = [path for name in folders for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    for path in (*sorted(files), Path(__file__)):
        digest.update(path.name.encode() + path.read_bytes())
    processor = [os.environ.get(name) for name in ("ATEN_CPU_CAPABILITY", ISA_VARIABLE)]
    digest.update(repr((torch.__version__, transformers.__version__, LIBRARY.exists(), processor)).encode())
    folder = ROOT / "build" / "made" / digest.hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_folder() -> Path:
    """`SYNCR1_CACHE` of the tests' runs: where they keep the rendered world and the judge."""
    return kept_folder() / "cache"


def made_once(parent: Path, name: str, make: Callable[[Path], object]) -> Path:
    """A folder, made in full by whichever test of whichever process asks first."""
    folder = parent / name
    with folder.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            draft = folder.with_name(f"{name}.draft")
            shutil.rmtree(draft, ignore_errors=True)  # of a test that failed in the midst of it
            make(draft)
            draft.rename(folder)
    return folder


def world_folder() -> Path:
    """The rendered world, as a run without `--data` makes it."""
    return made_once(kept_folder(), "world", lambda folder: write_general(write_world(folder)))


def short_base() -> Path:
    """A checkpoint that has learnt a little: seconds instead of the whole base."""

    def make(folder: Path) -> None:
        losses: list[float] = []

        def told(step: int, loss: float) -> None:
            if step in (0, 25, 50, 59):
                losses.append(loss)

        train_base(BaseSettings(steps=60, photo_pool=400), told).save(folder)
        (folder.parent / "short_base.json").write_text(json.dumps(losses))

    return made_once(kept_folder(), "short_base", make)


def losses_of_short_base() -> list[float]:
    """Of steps 0, 25, 50 and 59."""
    losses: list[float] = json.loads(short_base().with_suffix(".json").read_text())
    return losses
