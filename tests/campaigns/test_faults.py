"""One rank of two fails, in every way and at a stage of a step: all end in time, say who it was, and lose nothing.

`python tests/support/faults.py` puts faults at random ranks, stages and steps, as many as wanted.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import BENIGN, KINDS, STAGE_TIMEOUT
from helpers import ROOT, environment
from made import short_base, world_folder
from safetensors.torch import load_file

from syncr1.engine.methods.stopping import SAVE

pytestmark = pytest.mark.slow
Case = tuple[str, list[str], list[tuple[str, int, int, str]]]
"""Folder, flags, and faults: kind, rank, step, stage."""


def end_as_documented(folder: Path, cases: list[Case]) -> None:
    """Runs the cases in a fresh process, which checks how they end."""
    script, base, world = ROOT / "tests" / "support" / "faults.py", short_base(), world_folder()
    command = [sys.executable, str(script), str(folder), "--base", str(base), "--world", str(world)]
    command += ["--cases", json.dumps(cases)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [name for name, _, _ in told] == [name for name, _, _ in cases]
    assert all(seconds < STAGE_TIMEOUT + 60 for _, _, seconds in told), told


def test_every_fault_ends_as_documented(tmp_path: Path) -> None:
    """The last case: NaN on one rank, all skip that update; a reward fails or hangs on one, it is counted."""
    survived = [("nan", 1, 1, "rollout"), ("reward raises", 1, 2, "reward"), ("reward hangs", 0, 3, "reward")]
    assert {kind for kind, *_ in survived} == set(BENIGN) < set(KINDS)
    cases: list[Case] = [
        ("killed", ["--zero_stage", "2"], [("killed", 1, 2, "update")]),
        ("raises", [], [("raises", 0, 1, "pack")]),
        ("stalls", ["--zero_stage", "3"], [("stalls", 1, 1, "rollout")]),
        ("survived", ["--zero_stage", "3"], survived),
    ]
    end_as_documented(tmp_path, cases)


def test_who_was_asked_to_end_goes_on_as_if_never_asked(tmp_path: Path) -> None:
    """SIGUSR1 to one rank in the second step, a second start with `latest`: the weights of an undisturbed run."""
    (tmp_path / "whole" / "run").mkdir(parents=True)
    (tmp_path / "whole" / "run" / SAVE).touch()
    zero = ["--zero_stage", "2"]
    cases: list[Case] = [
        ("whole", zero, []),
        ("asked", zero, [("SIGUSR1", 0, 1, "rollout")]),
        ("asked", [*zero, "--resume_from_checkpoint", "latest"], []),
        ("asked", [*zero, "--resume_from_checkpoint", "latest"], []),  # nothing is left to do
    ]
    end_as_documented(tmp_path, cases)
    weights = [
        (tmp_path / name / "run" / "checkpoints" / "last" / "model.safetensors").read_bytes()
        for name in ("whole", "asked")
    ]
    assert weights[0] == weights[1]
    assert "going on after 4 steps" in (tmp_path / "asked" / "rank_0.log").read_text()
    timing = re.compile("seconds|time|per_second")
    rows = [
        [
            {k: v for k, v in json.loads(line).items() if not timing.search(k)}
            for line in (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "asked")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    # What the file asked for, before the first step: the model as it was, and no more than once.
    start = load_file(short_base() / "model.safetensors")
    saved = load_file(tmp_path / "whole" / "run" / "checkpoints" / "model_000000" / "model.safetensors")
    assert saved.keys() == start.keys() and all(torch.equal(saved[name], start[name]) for name in saved)
    assert not (tmp_path / "whole" / "run" / SAVE).exists()
    assert len(list((tmp_path / "whole").glob("run/checkpoints/model_*"))) == 1
