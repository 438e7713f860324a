"""The one door that every recipe's errors leave by: what a user can mend in a line with exit code 2, our own faults in
crash.txt with exit code 1, a run that ended early with its own code (errors.py)."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from ..errors import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    MachineError,
    Refused,
    RewardError,
    RolloutTooLarge,
    RunEnded,
    told,
)
from ..reasons import reason_of
from ..show import recent
from .crash import LogKept, crashed

Config = TypeVar("Config")
TOLD = (Refused, RewardError, RolloutTooLarge)
"""Errors whose message is written for the user."""


def run_to_exit(
    run: Callable[[Config], object], config: Config, interrupted: str = "stopped outside of training"
) -> None:
    """A recipe's last line: `run(config)`, with its errors said in a line and turned into the exit codes of errors.py.

    Returns when all went well; else the process ends.

    Args:
        run: imports what takes seconds itself, so that an import that fails is told like any other error.
        config: its settings.
        interrupted: what Ctrl-C means here, in words.
    """
    recent.forget()
    log = LogKept()
    try:
        code = _code_of(run, config, interrupted, log)
    finally:
        log.close()
    calling = sys.modules.get("syncr1.engine.rewards.calling")  # absent: no reward was called
    if calling is not None and calling.still_running():  # the interpreter would wait for the pools they are in
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)


def _code_of(run: Callable[[Config], object], config: Config, interrupted: str, log: LogKept) -> int:
    try:
        run(config)
    except TOLD as error:
        return _refused(error)
    except RunEnded as ended:
        print(f"syncr1: {ended}", file=sys.stderr)
        return ended.code
    except KeyboardInterrupt:  # during training `run` handles it itself: it scores, saves and reports what there is
        print(f"syncr1: {interrupted}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        reason = reason_of(error, recent.stage())
        return crashed(error, config, log.lines()) if reason is None else _refused(MachineError(reason))
    return 0


def _refused(error: Exception) -> int:
    print(*told(error), sep="\n", file=sys.stderr, flush=True)
    return EXIT_BAD_INPUT
