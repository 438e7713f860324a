"""recipes/sync_r1.py, whose first reward function takes seconds longer while a file of the run's folder says so."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from syncr1.engine.methods.exit import run_to_exit
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.processes.launch import launch
from syncr1.engine.settings.flags import parse

SLOW = "slow_seconds"
"""The file, with the number of seconds."""


def slow_down(folder: Path) -> None:
    """From now on the first reward function looks for the file."""
    import syncr1.engine.compat  # noqa: F401  # before transformers

    from syncr1.engine.learn import trainer

    score = trainer.score

    def scored(rollouts: Any, functions: Any, **more: Any) -> Any:
        name, function = next(iter(functions.items()))

        def late(**columns: Any) -> Any:
            if (folder / SLOW).exists():
                time.sleep(float((folder / SLOW).read_text() or 0))
            return function(**columns)

        return score(rollouts, {**functions, name: late}, **more)

    trainer.score = scored


def main() -> None:
    config = launch(parse(SyncR1Config), __file__)
    slow_down(config.output_dir)
    from syncr1.engine.methods.sync_r1 import run

    run_to_exit(run, config)


if __name__ == "__main__":
    main()
