"""Trains the tiny Janus that the embedded default starts from, and saves it as an ordinary transformers checkpoint.

    python recipes/tiny_base.py --output_dir runs/tiny_base
    python recipes/sync_r1.py --model runs/tiny_base

The same settings give the same weights, also where it was cut off and started again. `sync_r1.py` does this by itself
and keeps the result in its cache.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from dataclasses import dataclass
from pathlib import Path

import tyro

from syncr1.engine.methods.early import loading, unix_habits
from syncr1.engine.show.pulse import pulse


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
    with loading():
        from dataclasses import asdict, replace

        from syncr1.engine.world.base_model import BaseSettings, train_base
        from syncr1.engine.world.embedded import fingerprint
        from syncr1.engine.world.kept import Kept

    settings = BaseSettings(seed=arguments.seed)
    if arguments.steps is not None:
        settings = replace(settings, steps=arguments.steps)
    folder = arguments.output_dir
    folder.parent.mkdir(parents=True, exist_ok=True)
    kept = Kept(folder.with_name(f"{folder.name}.{fingerprint(asdict(settings))}.unfinished"))
    with pulse("training the tiny base", settings.steps, kept.steps) as moved:
        policy = train_base(settings, lambda step, loss: moved(step + 1, f"loss {loss:.3f}"), kept)
    policy.save(folder)
    kept.path.unlink(missing_ok=True)
    print(f"saved {folder}")


if __name__ == "__main__":
    with unix_habits():
        main()
