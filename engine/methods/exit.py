"""How a run ends when it does not end well: its errors in a line, and the exit codes of errors.py."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, RunEnded

Config = TypeVar("Config")


def run_to_exit(run: Callable[[Config], object], config: Config) -> None:
    """A recipe's last line: `run(config)`, with its errors said in a line and turned into the exit codes of errors.py.

    Returns when all went well; else the process ends."""
    from ..errors import CheckpointError, ConfigError, DataError, PictureError, RewardSpecError
    from ..rewards.calling import still_running

    code = 0
    try:
        run(config)
    except (ConfigError, DataError, PictureError, RewardSpecError, CheckpointError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except RunEnded as ended:
        print(f"syncr1: {ended}", file=sys.stderr)
        code = ended.code
    except KeyboardInterrupt:  # during training `run` handles it itself: it scores, saves and reports what there is
        print("syncr1: stopped outside of training", file=sys.stderr)
        code = EXIT_INTERRUPTED
    if still_running():  # rewards that never came back; the interpreter would wait for the pools they are in
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)
