"""What is made on first use, cut off and killed at random: it ends with the same weights, to the last bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import numpy as np
import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file

from syncr1.engine.world.base_model import BaseSettings, train_base
from syncr1.engine.world.corl_base import CorlBaseSettings, train_corl_base
from syncr1.engine.world.kept import Kept
from syncr1.engine.world.tiny_blip import BlipSettings, train_blip

BASE = BaseSettings(steps=5, batch=8, photo_pool=16)
CORL = CorlBaseSettings(steps=5, batch=8, photo_pool=16)
BLIP = BlipSettings(steps=5, batch=8, photos=1, drawings=1)
KILLED = BaseSettings(steps=60, photo_pool=400)
MAKING = """
import sys
import syncr1.engine.compat
from syncr1.engine.world import embedded, kept
from syncr1.engine.world.base_model import BaseSettings
kept.Kept.__init__.__defaults__ = (0.5,)
print(embedded.tiny_base(BaseSettings(steps=60, photo_pool=400), lambda line: print(line, flush=True)))
"""
Train = Callable[..., Any]


class CutOff(Exception):
    """Stands for a signal that strikes between two steps."""


def cut_off_after(steps: int) -> Callable[[int, float], None]:
    def told(step: int, loss: float) -> None:
        if step + 1 == steps:
            raise CutOff

    return told


def weights(made: Any) -> dict[str, torch.Tensor]:
    return dict((made[0] if isinstance(made, tuple) else made).state_dict())


@pytest.mark.parametrize(
    ("train", "settings"),
    [(train_base, BASE), (train_corl_base, CORL), (train_blip, BLIP)],
    ids=["base", "corl", "blip"],
)
def test_cut_off_twice_it_ends_with_the_same_weights(train: Train, settings: Any, tmp_path: Path) -> None:
    """In CoRL's, before and after the noise begins (at step 2.75)."""
    whole = weights(train(settings))
    for steps in (2, 4):
        with pytest.raises(CutOff):
            train(settings, cut_off_after(steps), Kept(tmp_path / "kept", every=0.0))
        assert Kept(tmp_path / "kept").steps == steps
    torch.manual_seed(99)
    np.random.seed(99)
    again = weights(train(settings, None, Kept(tmp_path / "kept")))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_kills_at_random(tmp_path: Path) -> None:
    """SIGKILL, two processes at a time, until one of them comes to its end."""
    chance, kills = random.Random(0), 0
    environment = os.environ | {"SYNCR1_CACHE": str(tmp_path), "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    while not (made := [path for path in tmp_path.glob("tiny_base-*") if path.is_dir()]):
        both = [subprocess.Popen([sys.executable, "-c", MAKING], cwd=ROOT, env=environment) for _ in range(2)]
        deadline = time.monotonic() + chance.uniform(8, 25)
        while time.monotonic() < deadline and any(process.poll() is None for process in both):
            time.sleep(0.1)
        for process in both:
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert kills < 100
    train_base(KILLED).save(tmp_path / "whole")
    kept, whole = (load_file(path / "model.safetensors") for path in (made[0], tmp_path / "whole"))
    assert kills >= 2 and len(kept) > 100 and all(torch.equal(value, whole[name]) for name, value in kept.items())
