"""torchrun.py: torchrun whose ranks hear of SIGUSR1 and SIGTERM, and whose exit code is theirs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from helpers import ROOT, environment

from syncr1.engine.errors import EXIT_PREEMPTED

pytestmark = pytest.mark.slow
RANK = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
if os.environ["RANK"] == "1" and len(sys.argv) > 2:
    raise SystemExit(int(sys.argv[2]))
def end(number, frame):
    time.sleep(0.5)  # saving
    (folder / f"saved_{os.environ['RANK']}").write_text(signal.Signals(number).name)
    raise SystemExit(75)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGUSR1, end)
(folder / f"ready_{os.environ['RANK']}").touch()
time.sleep(120)
"""


LOST = """
import os, pathlib, signal, sys, time
attempt, ends = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), [int(word) for word in sys.argv[2].split(",")]
if os.environ["RANK"] == "0":
    pathlib.Path(sys.argv[1], f"attempt_{attempt}").touch()
while not pathlib.Path(sys.argv[1], f"attempt_{attempt}").exists():
    time.sleep(0.01)
end = ends[min(attempt, len(ends) - 1)]
if os.environ["RANK"] == "1" and end < 0:
    os.kill(os.getpid(), -end)
if os.environ["RANK"] == "1" and end:
    raise SystemExit(end)
time.sleep(0.1 if end == 0 else 120)
"""
"""Rank 1 ends as told, attempt by attempt; torchrun ends the other one with SIGTERM."""


def start(folder: Path, *more: str, flags: tuple[str, ...] = (), script: str = RANK) -> subprocess.Popen[str]:
    (folder / "rank.py").write_text(script)
    command = [
        sys.executable,
        "-m",
        "syncr1.engine.processes.torchrun",
        *flags,
        "--standalone",
        "--nproc-per-node=2",
        str(folder / "rank.py"),
        str(folder),
        *more,
    ]
    # What started the tests may have SIGINT ignored, as a shell does for what it puts into the background.
    heeded = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, stderr=subprocess.PIPE, preexec_fn=heeded)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_ranks_save_before_it_ends(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path)
    try:
        deadline = time.monotonic() + 90
        while len(list(tmp_path.glob("ready_*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (
        process.returncode == (130 if number == signal.SIGINT else EXIT_PREEMPTED)
        and f"syncr1: {number.name}: all ranks of this machine have ended" in err
    )
    assert [(tmp_path / f"saved_{rank}").read_text() for rank in range(2)] == [number.name] * 2


def test_a_ranks_exit_code_is_its_own(tmp_path: Path) -> None:
    process = start(tmp_path, "7")
    try:
        _, err = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 7 and "local rank 1 ended with exit code 7" in err


@pytest.mark.parametrize(
    ("ends", "code", "attempts", "told"),
    [
        ("2", 2, 1, "local rank 1 ended with exit code 2"),
        ("-9,70,0", 0, 3, "local rank 1 ended with exit code 70, first of all here; starting again, restart 2 of 2"),
    ],
)
def test_starts_again_what_that_helps(tmp_path: Path, ends: str, code: int, attempts: int, told: str) -> None:
    """A lost rank, so many times in a row; never what was refused, or asked to end."""
    flags = (f"--output_dir={tmp_path / 'run'}", "--max-restarts=2")
    process = start(tmp_path, ends, flags=flags, script=LOST)
    try:
        _, err = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == code, err[-2000:]
    assert len(list(tmp_path.glob("attempt_*"))) == attempts and told in err
