"""SIGTERM at the n-th call of a function of a run, n drawn anew each time: it ends with 75, wherever that is.

python tests/support/strikes.py FOLDER --strikes 40

Each run is a fork of a process that has imported everything, so that most strikes hit what loads, reads, evaluates,
trains and writes.  One line of JSON at the end: how many ended with which code, and where those struck that did not end
with 75.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import kills
import torch
from made import short_base, world_folder

from syncr1.engine.errors import EXIT_PREEMPTED
from syncr1.engine.methods.exit import run_to_exit
from syncr1.engine.methods.sync_r1_config import SyncR1Config

SECONDS = 300
BEFORE = 500
"""Calls before anybody listens."""


def config_of(folder: Path) -> SyncR1Config:
    """Scores before and after, samples, a checkpoint, a model, a report: every stage of a run."""
    return SyncR1Config(
        model=str(short_base()),
        data=str(world_folder()),
        output_dir=folder,
        prompts_per_step=2,
        num_generations=2,
        max_steps=2,
        max_completion_length=4,
        eval_samples=1,
        sample_steps=1,
        checkpointing_steps=1,
    )


def rank(folder: Path, strikes_at: int) -> None:
    """The run, in this process; 0: nothing strikes, and the number of calls is told."""
    from syncr1.engine.methods.sync_r1 import run

    log = os.open(folder.with_suffix(".log"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(log, number)
    count = 0

    def called(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"
        if count == strikes_at and event == "call":
            sys.setprofile(None)
            where = "".join(traceback.format_stack(frame, 12))
            folder.with_suffix(".where").write_text(where)
            os.kill(os.getpid(), signal.SIGTERM)

    code = 0
    torch.set_num_threads(1)
    sys.setprofile(called)
    try:
        run_to_exit(run, config_of(folder))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.setprofile(None)
    if not strikes_at:
        folder.with_suffix(".calls").write_text(str(count))
    os._exit(code)


def struck(folder: Path, strikes_at: int) -> int | None:
    """The exit code, negative for signals; None where it had to be ended."""
    child = os.fork()
    if child == 0:
        rank(folder, strikes_at)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def strike(root: Path, strikes: int, seed: int) -> dict[str, Any]:
    """All of them; see atop."""
    root.mkdir(parents=True, exist_ok=True)
    chance, ends, wrong = random.Random(seed), Counter[str](), list[str]()
    assert struck(root / "whole", 0) == 0, (root / "whole.log").read_text()[-3000:]
    calls = int((root / "whole.calls").read_text())
    for number in range(strikes):
        folder = root / f"{number:03d}"
        code = struck(folder, chance.randrange(BEFORE, calls))
        ends[str(code)] += 1
        if code != EXIT_PREEMPTED:
            where = folder.with_suffix(".where")
            wrong.append(f"{number}: {code}\n{where.read_text() if where.exists() else 'not struck'}")
    return {"strikes": strikes, "calls": calls, "ends": dict(ends), "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strikes", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    short_base(), world_folder()
    torch.set_num_threads(1)
    for name in ("methods.sync_r1", "learn.learner", "show.runlog"):
        __import__(f"syncr1.engine.{name}")
    kills.preload()
    told = strike(asked.folder, asked.strikes, asked.seed)
    print(json.dumps(told, indent=1))
    raise SystemExit(bool(told["wrong"]))


if __name__ == "__main__":
    main()
