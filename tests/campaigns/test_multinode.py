"""Runs on several machines: network namespaces with their own addresses, the recipe over a hostfile, a node that dies.

Two nodes are among `make test-faults`; four are `make test-multinode`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, environment
from made import cache_folder, short_base
from namespaces import INTERFACE, Cluster, cluster, missing

REASON = missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
FOUR = pytest.mark.skipif("SYNCR1_FOUR_NODES" not in os.environ, reason="four nodes: make test-multinode")


@pytest.fixture(scope="module")
def base() -> Path:
    return short_base()


@pytest.fixture(scope="module")
def cache_dir() -> Path:
    return cache_folder()


def start(nodes: Cluster, base: Path, cache_dir: Path, folder: Path, *flags: str) -> subprocess.Popen[str]:
    """The recipe as a user starts it on this machine, over a hostfile; `ip netns exec` stands where ssh would."""
    hostfile = nodes.hostfile(folder.parent / "hostfile")
    command = [
        *(sys.executable, str(ROOT / "recipes" / "sync_r1.py"), "--model", str(base), "--output_dir", str(folder)),
        *("--nodes", str(len(nodes.addresses)), "--hostfile", str(hostfile), "--launcher", nodes.launcher),
        *("--prompts_per_step", "4", "--num_generations", "4", "--max_steps", "4", "--checkpointing_steps", "2"),
        *("--warmup_steps", "1", "--eval_samples", "0", "--sample_steps", "0", "--seed", "3", *flags),
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(cache_dir) | {"GLOO_SOCKET_IFNAME": INTERFACE},
    )


def finish(process: subprocess.Popen[str], timeout: float = 900) -> str:
    """Waits as long as four nodes on two busy cores may take; what hangs is the run's own to notice."""
    try:
        out, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, out[-6000:]
    return out


def rows_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def weights(folder: Path) -> bytes:
    return (folder / "checkpoints" / "last" / "model.safetensors").read_bytes()


def dies_and_comes_back(num_nodes: int, base: Path, cache_dir: Path, root: Path, *flags: str) -> None:
    """An undisturbed run, and one whose last node loses power after the third of four steps: the same weights."""
    with cluster(num_nodes) as nodes:
        out = finish(start(nodes, base, cache_dir, root / "whole", *flags))
        assert f"{num_nodes} ranks on {num_nodes} nodes" in out and "restart" not in out
        assert json.loads((root / "whole" / "environment.json").read_text())["ranks"] == num_nodes
        process = start(nodes, base, cache_dir, root / "killed", *flags)
        try:
            deadline = time.monotonic() + 600
            while process.poll() is None and len(rows_of(root / "killed")) < 3 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert nodes.kill(num_nodes - 1) >= 3  # agent, torchrun, rank
        finally:
            out = finish(process)
        assert "ended with signal 9" in out and "(1 of 3 restarts)" in out and "going on after 2 steps" in out
        assert [nodes.pids(index) for index in range(num_nodes)] == [[]] * num_nodes
    assert [row["step"] for row in rows_of(root / "killed")] == [1, 2, 3, 4]
    assert sorted(path.name for path in root.iterdir()) == ["hostfile", "killed", "whole"]
    assert weights(root / "killed") == weights(root / "whole")


def test_two_nodes_one_of_which_dies(base: Path, cache_dir: Path, tmp_path: Path) -> None:
    dies_and_comes_back(2, base, cache_dir, tmp_path, "--zero_stage", "2")


@FOUR
@pytest.mark.parametrize("stage", ["0", "3"])
def test_four_nodes_one_of_which_dies(base: Path, cache_dir: Path, tmp_path: Path, stage: str) -> None:
    dies_and_comes_back(4, base, cache_dir, tmp_path, "--zero_stage", stage)


def test_who_stops_the_launcher_loses_nothing(base: Path, cache_dir: Path, tmp_path: Path) -> None:
    """SIGTERM to the command on the first machine: all nodes finish their step, save and end, it ends with 75."""
    with cluster(2) as nodes:
        process = start(nodes, base, cache_dir, tmp_path / "run", "--max_steps", "50", "--checkpointing_steps", "0")
        try:
            deadline = time.monotonic() + 150
            while process.poll() is None and len(rows_of(tmp_path / "run")) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 75, out[-3000:]
        steps = len(rows_of(tmp_path / "run"))
        assert f"stopped after {steps} steps; go on with --resume_from_checkpoint latest" in out
        assert "all nodes have ended" in out and "restart" not in out
        assert [nodes.pids(index) for index in range(2)] == [[], []]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{steps:06d}\n"


def test_a_program_that_fails_everywhere_is_given_up(base: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Prompts that the ranks cannot share: the error is shown, and no restart helps."""
    with cluster(2) as nodes:
        process = start(nodes, base, cache_dir, tmp_path / "run", "--prompts_per_step", "3", "--max_restarts", "0")
        out, _ = process.communicate(timeout=600)
        assert process.returncode not in (0, None) and "giving up after 0 restarts" in out
        assert "prompts_per_step must be a multiple of the 2 ranks" in out
        assert [nodes.pids(index) for index in range(2)] == [[], []]
