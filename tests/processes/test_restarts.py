"""restarts.py: a budget that progress refills."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from syncr1.engine.processes.restarts import Restarts


def saved(folder: Path, time: int) -> None:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "latest").write_text("step\n")
    os.utime(folder / "checkpoints" / "latest", ns=(time, time))


def test_without_progress_it_is_spent(tmp_path: Path) -> None:
    restarts = Restarts(2, tmp_path / "run")
    assert [restarts.again() for _ in range(3)] == [True, True, False]
    assert [Restarts(0, tmp_path / "run").again(), Restarts(0).again()] == [False, False]


@pytest.mark.parametrize("where", ["run", "run-2", "run/unified", "run-2/mcq", "a[b"])
def test_a_new_checkpoint_refills_it(tmp_path: Path, where: str) -> None:
    """Of the run, of one numbered after it, of a training inside."""
    restarts = Restarts(2, tmp_path / (where if "[" in where else "run"))
    assert restarts.again() and restarts.again() and restarts.words() == "restart 2 of 2 without a new checkpoint"
    for number in range(5):
        saved(tmp_path / where, number)
        assert restarts.again() and restarts.in_a_row == 1
    assert restarts.again() and not restarts.again()


def test_checkpoints_that_are_there_are_not_new(tmp_path: Path) -> None:
    saved(tmp_path / "run", 7)
    restarts = Restarts(1, tmp_path / "run")
    assert restarts.again() and not restarts.again()


def test_other_runs_do_not_count(tmp_path: Path) -> None:
    restarts = Restarts(1, tmp_path / "run")
    assert restarts.again()
    saved(tmp_path / "other", 1)
    assert not restarts.again()
