"""Trains the tiny Janus, or the tiny Show-o, that an embedded world's run starts from, and saves it as an ordinary
transformers checkpoint.

    python recipes/tiny_base.py --output_dir runs/tiny_base
    python recipes/tiny_base.py --world digits --output_dir runs/digits_base
    python recipes/tiny_base.py --policy show_o --output_dir runs/show_o_base
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
from typing import Annotated

from syncr1.engine.methods.early import loading, unix_habits
from syncr1.engine.methods.exit import run_to_exit
from syncr1.engine.methods.preflight import check_start
from syncr1.engine.settings.flags import parse
from syncr1.engine.settings.schema import Range, Settings
from syncr1.engine.settings.train_config import Seed, TinyPolicy, WorldName
from syncr1.engine.show.pulse import pulse


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyBaseConfig(Settings):
    """Settings of `recipes/tiny_base.py`."""

    # --- the training ---
    output_dir: Path = Path("runs/tiny_base")
    """Folder for the checkpoint."""
    world: WorldName = "rendered"
    """That it is to know."""
    policy: TinyPolicy = "janus"
    """Of which kind it is."""
    seed: Seed = 0
    """Of weights, data and noise."""
    steps: Annotated[int | None, Range("leave it out for the default", ge=1)] = None
    """Optimizer steps. None: as many as the base of the embedded run is trained for."""


def main() -> None:
    config = parse(TinyBaseConfig, description=__doc__)
    run_to_exit(check_start, config)
    run_to_exit(train, config, interrupted="stopped; the same command goes on from here")


def train(config: TinyBaseConfig) -> None:
    with loading():
        from dataclasses import asdict, replace
        from functools import partial

        from syncr1.engine.world.base_model import BaseSettings, train_base
        from syncr1.engine.world.digits.digits_base import DigitsBaseSettings, train_digits_base
        from syncr1.engine.world.embedded import digits_fingerprint, filled_fingerprint, fingerprint
        from syncr1.engine.world.filled.filled_bases import BASE, DIGITS_BASE, train_filled_base, train_filled_digits
        from syncr1.engine.world.kept import Kept

    more = {} if config.steps is None else {"steps": config.steps}
    filled = config.policy == "show_o"
    if config.world == "digits":
        digits = replace(DIGITS_BASE if filled else DigitsBaseSettings(), seed=config.seed, **more)
        make, steps = partial(train_filled_digits if filled else train_digits_base, digits), digits.steps
        name = (filled_fingerprint if filled else digits_fingerprint)(asdict(digits))
    else:
        settings = replace(BASE if filled else BaseSettings(), seed=config.seed, **more)
        make, steps = partial(train_filled_base if filled else train_base, settings), settings.steps
        name = (filled_fingerprint if filled else fingerprint)(asdict(settings))
    folder = config.output_dir
    folder.parent.mkdir(parents=True, exist_ok=True)
    kept = Kept(folder.with_name(f"{folder.name}.{name}.unfinished"))
    with pulse("training the tiny base", steps, kept.steps) as moved:
        policy = make(lambda step, loss: moved(step + 1, f"loss {loss:.3f}"), kept)
    policy.save(folder)
    kept.path.unlink(missing_ok=True)
    print(f"saved {folder}")


if __name__ == "__main__":
    with unix_habits():
        main()
