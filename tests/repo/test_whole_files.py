"""whole_files.py: whole or not at all, in two containers that share a cache, and after a kill in the midst of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

from syncr1.engine import whole_files
from syncr1.engine.whole_files import ABANDONED, cache_dir, made_once, whole_folder, write_atomically

MAKER = """
import fcntl, os, sys, time
from pathlib import Path
from syncr1.engine.whole_files import made_once
name, folder, locks, seconds = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "locks", float(sys.argv[4])
os.getpid = lambda: 1  # the first process of a container

def no_locks(*_):
    raise OSError(95, "this file system knows no locks")

if not locks:
    fcntl.flock = no_locks

def make(draft):
    draft.mkdir()
    for part in ("first", "second"):
        (draft / part).write_text(name)
        with (folder.parent / "calls").open("a") as calls:
            calls.write(f"{name} {part}\\n")
        time.sleep(seconds)

made_once(folder, make, lambda: print("waits", flush=True))
print((folder / "first").read_text(), (folder / "second").read_text())
"""


def maker(name: str, folder: Path, *, locks: bool = True, seconds: float = 0.3) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAKER, name, str(folder), "locks" if locks else "none", str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}, text=True, stdout=subprocess.PIPE)


def begun(folder: Path) -> bool:
    """Waits until somebody is making the folder."""
    deadline = time.monotonic() + 30
    while not (folder.parent / "calls").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return (folder.parent / "calls").exists()


@pytest.mark.parametrize("locks", [True, False])
def test_two_containers_with_one_cache(tmp_path: Path, locks: bool) -> None:
    """Both are process number 1; what is published is one maker's. With locks the other one waits and takes it."""
    folder = tmp_path / "made"
    processes = [maker(name, folder, locks=locks) for name in ("a", "b")]
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert said[0][-2:] == said[1][-2:] and said[0][-1] == said[0][-2]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == (2 if locks else 4) and ("waits" in [*said[0], *said[1]]) == locks
    assert sorted(path.name for path in tmp_path.iterdir()) == [".made.lock", "calls", "made"]


def test_what_a_kill_leaves_blocks_nobody_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "made"
    killed = maker("a", folder, seconds=60)
    waits = None
    try:
        assert begun(folder)
        waits = maker("b", folder, seconds=0)
        assert waits.stdout is not None and waits.stdout.readline() == "waits\n"
        killed.send_signal(signal.SIGKILL)
        assert waits.communicate(timeout=30)[0] == "b b\n" and waits.returncode == 0
    finally:
        for process in (killed, waits):
            if process is not None:
                process.kill()
    (left,) = tmp_path.glob(".made.draft-*")
    assert (left / "made" / "first").read_text() == "a"
    again = whole_files.time.time() + ABANDONED + 1
    monkeypatch.setattr(whole_files.time, "time", lambda: again)
    with whole_folder(tmp_path / "made2") as draft:  # another folder's drafts are not its own
        draft.mkdir()
    assert left.exists()
    (folder / "first").unlink()
    (folder / "second").unlink()
    folder.rmdir()
    made_once(folder, Path.mkdir)
    assert not left.exists()


def test_a_name_with_brackets_sweeps_its_own_drafts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".run[1].draft-old").mkdir()
    (tmp_path / ".run1.draft-old").mkdir()
    later = time.time() + ABANDONED + 1
    monkeypatch.setattr(whole_files.time, "time", lambda: later)
    made_once(tmp_path / "run[1]", Path.mkdir)
    assert sorted(path.name for path in tmp_path.glob(".run*draft*")) == [".run1.draft-old"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_what_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def make(draft: Path) -> None:
        draft.mkdir()
        (draft / "half").touch()
        raise error

    with pytest.raises(error):
        made_once(tmp_path / "made", make)
    assert [path.name for path in tmp_path.iterdir()] == [".made.lock"]
    with pytest.raises(IsADirectoryError):
        (tmp_path / "taken").mkdir()
        write_atomically(tmp_path / "taken", "text")
    assert not list(tmp_path.glob(".taken*"))


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    """A draft that only its maker may read must not be published as such."""
    before = os.umask(0o022)
    try:
        made_once(tmp_path / "made", Path.mkdir)
        write_atomically(tmp_path / "file", b"bytes")
    finally:
        os.umask(before)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o755 and (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own variable, then XDG's, then the home; XDG's specification has relative paths ignored."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for own, shared, expected in [
        ("", "", tmp_path / ".cache" / "syncr1"),
        ("", "/shared", Path("/shared/syncr1")),
        ("", "relative", tmp_path / ".cache" / "syncr1"),
        ("~/mine", "/shared", tmp_path / "mine"),
        ("/mine", "", Path("/mine")),
    ]:
        monkeypatch.setenv("SYNCR1_CACHE", own)
        monkeypatch.setenv("XDG_CACHE_HOME", shared)
        assert cache_dir() == expected


def test_nothing_is_named_by_a_process_number() -> None:
    """In a container it is 1, whoever asks. Here it is sent to, or compared with a process of this machine."""
    files = [path for folder in ("engine", "recipes", "kernels") for path in (ROOT / folder).rglob("*.py")]
    users = [str(path.relative_to(ROOT)) for path in files if "getpid" in path.read_text()]
    known = {f"engine/{name}.py" for name in ("rewards/yours/worker", "processes/lifetimes", "processes/beside")}
    known.add("engine/show/outcome.py")
    assert set(users) == known
