"""A short night of `make soak`: ranks killed, under our launcher and under torchrun; strikes anywhere in a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, environment

pytestmark = pytest.mark.slow


def run(script: str, folder: Path, *flags: str) -> dict[str, Any]:
    """The figures that a campaign prints last, once it has found nothing wrong."""
    command = [sys.executable, str(ROOT / "tests" / "support" / script), str(folder), *flags]
    env = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return told


def test_a_disturbed_night_ends_like_a_quiet_one(tmp_path: Path) -> None:
    told = run("soak.py", tmp_path / "night", "--steps", "200", "--every", "15", "--zero_stage", "2")
    assert told["kills"] + told["refusals"] + told["asked"] + told["slow"] > 0


@pytest.mark.parametrize("how", [[], ["--plain"]], ids=["launcher", "torchrun"])
def test_every_lost_rank_is_replaced(tmp_path: Path, how: list[str]) -> None:
    flags = ["--steps", "100000", "--kills", "3", "--kinds", "killed", "--every", "5", "--zero_stage", "0", *how]
    assert run("soak.py", tmp_path / "kills", *flags)["restarts"] == 3


def test_a_request_to_end_is_heard_wherever_it_strikes(tmp_path: Path) -> None:
    assert run("strikes.py", tmp_path / "strikes", "--strikes", "8")["ends"] == {"75": 8}
