"""Trains the tiny Janus that the embedded default starts from, and saves it as an ordinary transformers checkpoint.

    python recipes/tiny_base.py --output_dir runs/tiny_base
    python recipes/sync_r1.py --model runs/tiny_base

The same settings give the same weights. `sync_r1.py` does this by itself and keeps the result in its cache.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from syncr1.engine.methods.exit import run_to_exit
from syncr1.engine.methods.preflight import check_start
from syncr1.engine.settings.flags import parse
from syncr1.engine.settings.schema import Range, Settings
from syncr1.engine.settings.train_config import Seed


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyBaseConfig(Settings):
    """Settings of `recipes/tiny_base.py`."""

    # --- the training ---
    output_dir: Path = Path("runs/tiny_base")
    """Folder for the checkpoint."""
    seed: Seed = 0
    """Of weights, data and noise."""
    steps: Annotated[int | None, Range("leave it out for the default", ge=1)] = None
    """Optimizer steps. None: as many as the base of the embedded run is trained for."""


def main() -> None:
    config = parse(TinyBaseConfig, description=__doc__)
    run_to_exit(check_start, config)
    run_to_exit(train, config)


def train(config: TinyBaseConfig) -> None:
    from syncr1.engine.world.base_model import BaseSettings, train_base

    settings = BaseSettings(seed=config.seed)
    if config.steps is not None:
        settings = replace(settings, steps=config.steps)
    train_base(
        settings, lambda step, loss: print(f"step {step + 1}/{settings.steps}  loss {loss:.3f}", flush=True)
    ).save(config.output_dir)
    print(f"saved {config.output_dir}")


if __name__ == "__main__":
    main()
