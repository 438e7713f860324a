"""The embedded CoRL recipe's parts, each made on first use and kept: data, starting point, captioner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ..made_once import cache_dir, fingerprint, made_once
from .corl_base import CorlBaseSettings, train_corl_base
from .scene_graph import parse_captions
from .tiny_blip import BlipSettings, save_blip, train_blip
from .x2x import write_x2x

Report = Callable[[str], None]

world_parser = parse_captions
"""Captions to scene graphs, for SPICE."""


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
