"""A training that is killed in the middle of a step, or with its process, ends like one that never was."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, environment
from made import cache_folder, short_base
from made import world_folder as make_world
from safetensors.torch import load_file

from syncr1.engine.checkpoints.sharded import folders


@pytest.mark.slow
def test_twenty_cuts(tmp_path: Path) -> None:
    """SIGKILL in the middle of a step, at some of twenty places; SYNCR1_ALL_CUTS=1 tries them all.

    tests/support/cuts.py does the same under ZeRO and on several ranks."""
    number = "20" if os.environ.get("SYNCR1_ALL_CUTS") else "2"
    script = ROOT / "tests" / "support" / "cuts.py"
    world = str(make_world())
    command = [sys.executable, str(script), str(tmp_path / "cuts"), "--cuts", number, "--world", world]
    told = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert f"{number} of {number} cuts the same" in told.stdout, told.stdout[-3000:] + told.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(
    "SYNCR1_ALL_CUTS" not in os.environ, reason="SYNCR1_ALL_CUTS=1 runs it; test_faults.py has the like"
)
def test_the_recipe_killed_and_resumed(tmp_path: Path) -> None:
    """SIGKILL, then the same command with `--resume_from_checkpoint latest`: one folder, the same metrics and model as
    without the kill; and the same command once more finds nothing left to do."""
    recipe = [sys.executable, str(ROOT / "recipes" / "sync_r1.py"), "--model", str(short_base()),
              "--max_steps", "5", "--eval_samples", "0", "--prompts_per_step", "4", "--num_generations", "4", "--seed",
              "3", "--checkpointing_steps", "1", "--resume_from_checkpoint", "latest", "--output_dir"]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def start(folder: Path) -> subprocess.Popen[str]:
        return subprocess.Popen([*recipe, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                env=environment(cache_folder()), text=True)  # fmt: skip

    def finish(folder: Path) -> str:
        process = start(folder)
        told, _ = process.communicate(timeout=200)
        assert process.returncode == 0, told[-5000:]
        return told

    finish(whole)
    process = start(killed)
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and not folders(killed / "checkpoints"):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "report.html").exists()
    assert re.search(r"going on after [1-4] steps", finish(killed))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]
    timing = re.compile("seconds|time|per_second")
    rows = [
        [{k: v for k, v in json.loads(line).items() if not timing.search(k)}
         for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, killed)
    ]  # fmt: skip
    assert rows[0] == rows[1] and len(rows[0]) == 5
    models = [load_file(folder / "checkpoints" / "last" / "model.safetensors") for folder in (whole, killed)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert "going on after 5 steps" in finish(killed)
