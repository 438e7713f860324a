"""Saving beside the caller: one job at a time, errors where they are asked for, a process that ends in order."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from helpers import ROOT, environment

from syncr1.engine.checkpoints.saver import Saver
from syncr1.engine.checkpoints.sharded import verified


def test_one_job_at_a_time_and_beside_the_caller() -> None:
    saver, go, done = Saver(), threading.Event(), list[int]()

    def first() -> None:
        go.wait(30)
        done.append(1)

    saver.start(first)
    assert done == [] and not saver.failed
    go.set()
    saver.start(lambda: done.append(2))  # once the first has ended
    assert done[0] == 1
    saver.wait()
    saver.wait()
    assert done == [1, 2]


def test_an_error_is_raised_once_where_all_ranks_are() -> None:
    saver, begun = Saver(), list[int]()

    def broken() -> None:
        begun.append(1)
        raise ValueError("no room")

    saver.start(broken)
    while not saver.failed:
        pass
    with pytest.raises(ValueError, match="no room"):
        saver.start(lambda: begun.append(2))
    assert begun == [1] and not saver.failed
    saver.wait()
    saver.start(lambda: begun.append(3))
    saver.wait()
    assert begun == [1, 3]


END = """
    import os, sys, time
    from pathlib import Path
    import torch
    from syncr1.engine.checkpoints import saver, sharded as checkpoint
    saver.GRACE_SECONDS = 2.0
    class SlowDisk:
        def __getattr__(self, name):
            return getattr(os, name)
        def write(self, file, data):
            time.sleep({seconds})
            return os.write(file, data)
    checkpoint.os = SlowDisk()
    saving = saver.Saver()
    root = Path({root!r})
    saving.start(lambda: checkpoint.save(root, 1, {{"a": torch.ones(3)}}, {{}}))
    {end}
"""


@pytest.mark.parametrize(
    ("seconds", "end", "code", "left"),
    [
        (0.1, "raise RuntimeError('a reward broke')", 1, ["latest", "step_000001"]),
        (0.1, "sys.exit(7)", 7, ["latest", "step_000001"]),
        (99, "sys.exit(7)", 7, [".draft-step_000001"]),
        (99, "os._exit(9)", 9, [".draft-step_000001"]),
    ],
)
def test_the_process_ends_in_order(tmp_path: Path, seconds: float, end: str, code: int, left: list[str]) -> None:
    """With an exception or without: what can be saved is, and what hangs keeps nobody; the exit code is the run's."""
    script = textwrap.dedent(END).format(seconds=seconds, root=str(tmp_path), end=end)
    if "_exit" in end:
        script = script.replace(end, f"time.sleep(0.5)\n{end}")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), timeout=60, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == code, done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    if "step_000001" in left:
        assert verified(tmp_path / "step_000001").step == 1
    assert ("a reward broke" in done.stderr) == (code == 1)
