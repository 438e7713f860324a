"""run_folder.py: one process writes to a run's folder; a second one is refused, whatever a kill has left is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

from syncr1.engine.errors import ConfigError
from syncr1.engine.processes import run_folder
from syncr1.engine.processes.lifetimes import Lifetime
from syncr1.engine.processes.run_folder import LOCK, FolderLock, Holder, check_free, numbered, unused_folder

HOLD = """
import sys, time
from pathlib import Path
from syncr1.engine.processes.run_folder import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that writes to the folder."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_refused_and_names_the_first(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    for refuse in (lambda: FolderLock(tmp_path, 0.1), lambda: check_free(tmp_path, 0.1)):
        with pytest.raises(ConfigError) as refused:
            refuse()
        told = str(refused.value)
        assert f"to which process {other.pid} on {os.uname().nodename}, since " in told
        assert str(tmp_path) in told and f"stop it (kill {other.pid})" in told
    other.send_signal(signal.SIGKILL)  # nothing that it leaves blocks anybody
    other.wait()
    check_free(tmp_path)
    FolderLock(tmp_path, 0).close()


def test_one_that_is_just_ending_is_waited_for(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    threading.Timer(0.3, other.kill).start()
    FolderLock(tmp_path, 20).close()


def test_a_child_does_not_hold_it(tmp_path: Path) -> None:
    """A process that was forked, a reward's say, may outlive the run that was killed."""
    lock = FolderLock(tmp_path)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        lock.close()
        FolderLock(tmp_path, 0).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_another_machines_signs_of_life_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network file system that locks for one machine alone: as long as the record is renewed."""
    monkeypatch.setattr(run_folder, "SILENCE", 0.6)
    record = Holder(Lifetime("another-boot/1", 7, 8), "node-2", "2026-01-01", "sync_r1.py")
    (tmp_path / LOCK).write_bytes(record.text())
    over = threading.Event()

    def renew() -> None:
        while not over.wait(0.05):
            os.utime(tmp_path / LOCK)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="process 7 on node-2") as refused:
            FolderLock(tmp_path, 0)
        assert "kill" not in str(refused.value)
    finally:
        over.set()
        thread.join()
    lock = FolderLock(tmp_path, 0)  # it stands still now
    held = Holder.read((tmp_path / LOCK).read_bytes())
    assert held is not None and held.life == Lifetime.own()
    lock.close()


def test_without_locks_the_record_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: subprocess.Popen[str]
) -> None:
    monkeypatch.setattr(run_folder, "_locked", lambda file: None)
    with pytest.raises(ConfigError, match=f"process {other.pid} "):
        FolderLock(tmp_path, 0.1)
    other.kill()
    other.wait()
    FolderLock(tmp_path, 0.1).close()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"life": 3}', b'{"life": "a b c"}', b"\xff" * 99])
def test_a_damaged_record_blocks_nobody(tmp_path: Path, text: bytes) -> None:
    (tmp_path / LOCK).write_bytes(text)
    check_free(tmp_path)
    FolderLock(tmp_path, 0).close()


def test_signs_of_life_are_given_until_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "BEAT", 0.02)
    lock = FolderLock(tmp_path)
    before = (tmp_path / LOCK).stat().st_mtime_ns
    deadline = time.monotonic() + 10
    while (tmp_path / LOCK).stat().st_mtime_ns == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert json.loads((tmp_path / LOCK).read_text())["life"] == Lifetime.own().text()
    lock.close()
    lock.close()
    assert (tmp_path / LOCK).read_bytes() == b""


def test_names_of_runs(tmp_path: Path) -> None:
    """The numbers of those that are there, the last first; the first one that is free."""
    wanted = tmp_path / "run"
    assert unused_folder(wanted) == wanted and numbered(wanted, Path.is_dir) == []
    for name in ("run", "run-3", "run-10", "run-x", "other"):
        (tmp_path / name).mkdir()
    assert [folder.name for folder in numbered(wanted, Path.is_dir)] == ["run-10", "run-3", "run"]
    (wanted / "config.yaml").touch()
    assert unused_folder(wanted).name == "run-2"
