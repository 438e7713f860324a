"""The embedded default: what a run uses without `--model` and `--data`, each made on first use and kept in a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file

from ..whole_files import cache_dir, made_once
from .base_model import BaseSettings, train_base
from .corl_base import CorlBaseSettings, train_corl_base
from .disk import write_world
from .general import write_general
from .judge_cnn import JudgeCNN, train_judge
from .tiny_blip import BlipSettings, save_blip, train_blip
from .vq import load_vq
from .x2x import write_x2x

Report = Callable[[str], None]

CORL_FILES = frozenset({"corl_base.py", "scene_graph.py", "tiny_blip.py", "x2x.py"})
"""Of CoRL's embedded default alone: what else is made does not depend on them."""


def fingerprint(*parts: object, corl: bool = False) -> str:
    """Names a cache entry: by its settings and by the code and weights that it is made with."""
    digest = hashlib.blake2b(digest_size=6)
    world = Path(__file__).parent
    kinds = ("*.py", "*.safetensors", "*.json")
    files = sorted(path for kind in kinds for path in world.glob(kind) if path != Path(__file__))
    for path in files if corl else [path for path in files if path.name not in CORL_FILES]:
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(repr(parts).encode())
    return digest.hexdigest()


# Sync-R1's ----------------------------------------------------------------------------------------------------------


def world_folder() -> Path:
    """Folder of the rendered world in UnifyBench++'s layout."""

    def write(folder: Path) -> None:
        write_world(folder)
        write_general(folder)

    return made_once(cache_dir() / f"world-{fingerprint('world')}", write)


def tiny_base(settings: BaseSettings, report: Report | None = None) -> Path:
    """Folder of the tiny base in transformers' format; trained when the cache has none for these settings."""
    folder = cache_dir() / f"tiny_base-{fingerprint(asdict(settings))}"
    return made_once(folder, lambda draft: train_base(settings, _spoken(report, settings.steps)).save(draft))


def judge_cnn() -> JudgeCNN:
    """The independent classifier, which no reward uses; trained in seconds at first use and kept."""

    def make(draft: Path) -> None:
        draft.mkdir()
        save_file(train_judge(load_vq()).state_dict(), draft / "judge.safetensors")

    folder = made_once(cache_dir() / f"judge-{fingerprint('judge')}", make)
    judge = JudgeCNN()
    judge.load_state_dict(load_file(folder / "judge.safetensors"))
    return judge.requires_grad_(False).eval()


# CoRL's -------------------------------------------------------------------------------------------------------------


def prepare_x2x(seed: int = 0) -> Path:
    """Folder of the rendered world in x2x_rft_22k's columns."""
    return made_once(cache_dir() / f"x2x-{fingerprint(seed, corl=True)}", lambda draft: write_x2x(draft, seed))


def corl_base(report: Report | None = None, settings: CorlBaseSettings | None = None) -> Path:
    """Folder of the tiny base in transformers' format; trained in about two minutes when the cache has none.

    Args:
        report: called with a line of progress now and then.
        settings: of the training.
    """
    s = settings or CorlBaseSettings()
    folder = cache_dir() / f"corl_base-{fingerprint(asdict(s), corl=True)}"
    return made_once(folder, lambda draft: train_corl_base(s, _spoken(report, s.steps)).save(draft))


def captioner_folder(report: Report | None = None, settings: BlipSettings | None = None) -> Path:
    """Folder of the tiny BLIP in transformers' format; trained in under a minute when the cache has none."""
    s = settings or BlipSettings()
    folder = cache_dir() / f"tiny_blip-{fingerprint(asdict(s), corl=True)}"
    return made_once(folder, lambda draft: save_blip(draft, *train_blip(s, _spoken(report, s.steps))))


def _spoken(report: Report | None, steps: int) -> Callable[[int, float], None] | None:
    if report is None:
        return None
    say = report
    return lambda step, loss: say(f"step {step + 1}/{steps}  loss {loss:.2f}")
