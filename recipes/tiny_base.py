"""Trains the tiny Janus that the embedded default starts from, and saves it as an ordinary transformers checkpoint.

    python recipes/tiny_base.py --output_dir runs/tiny_base
    python recipes/sync_r1.py --model runs/tiny_base

The same settings give the same weights. `sync_r1.py` does this by itself and keeps the result in its cache.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Trains the tiny base."""

    output_dir: Path = Path("runs/tiny_base")
    """Folder for the checkpoint."""
    seed: int = 0
    """Of weights, data and noise."""
    steps: int | None = None
    """Optimizer steps; None: the default that the embedded run uses."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__, config=(tyro.conf.FlagConversionOff,))
    from dataclasses import replace

    from syncr1.engine.world.base_model import BaseSettings, train_base

    settings = BaseSettings(seed=arguments.seed)
    if arguments.steps is not None:
        settings = replace(settings, steps=arguments.steps)
    train_base(
        settings, lambda step, loss: print(f"step {step + 1}/{settings.steps}  loss {loss:.3f}", flush=True)
    ).save(arguments.output_dir)
    print(f"saved {arguments.output_dir}")


if __name__ == "__main__":
    main()
