"""early.py: a recipe ends as Unix programs end, from its first line on."""

from __future__ import annotations

import gc
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

from syncr1.engine.errors import EXIT_INTERRUPTED, EXIT_NO_READER, EXIT_PREEMPTED
from syncr1.engine.methods.early import loading

BARE = ("install.py", "grpo_trl.py", "tiny_vq.py")
"""Recipes that are no part of the engine's: one of Python alone, an example for TRL, and a tool of its makers."""
IMPORTS = """
import time
from syncr1.engine.methods.early import loading, unix_habits
with unix_habits():
    with loading("something large"):
        {in_the_midst}
    print("loaded")
"""
SLOW = "time.sleep(20)"
CAREFUL = """
        try:
            time.sleep(20)
        except BaseException:  # as some libraries do
            print("swallowed", flush=True)
"""
ASKED = """
import sys, time
from pathlib import Path
from syncr1.engine.processes.interrupts import Interrupts
with Interrupts(lambda line: print(line, flush=True)) as interrupts:
    print("ready", flush=True)
    while not interrupts.preempt:
        time.sleep(0.01)
    print("the terminal is gone, and this is no error", flush=True)
    Path(sys.argv[1]).write_text("saved")
raise SystemExit(75)
"""


def started(*command: str, ignored: tuple[signal.Signals, ...] = (), stdout: int = subprocess.PIPE) -> subprocess.Popen:
    """A process that hears signals as one in a terminal does, but for those that whoever started it has ignored."""

    def as_asked() -> None:
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "."},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=as_asked,
    )


@pytest.mark.parametrize("in_the_midst", [SLOW, CAREFUL])
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, EXIT_PREEMPTED),
        (signal.SIGHUP, EXIT_PREEMPTED),
        (signal.SIGUSR1, EXIT_PREEMPTED),
        (signal.SIGINT, EXIT_INTERRUPTED),
    ],
)
def test_signals_while_libraries_load(number: signal.Signals, code: int, in_the_midst: str) -> None:
    """One line, and the code that the documentation promises; also where an import would have caught an exception."""
    process = started("-c", IMPORTS.format(in_the_midst=in_the_midst))
    try:
        assert process.stdout is not None and process.stdout.readline() == "syncr1: loading something large ...\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == code and "loaded" not in out and "swallowed" not in out
    assert err == f"syncr1: {number.name}: stopped outside of training\n"


def test_nohup_is_respected() -> None:
    """While libraries load, while nothing is trained, and in the loop."""
    script = (
        "import os, signal\nfrom syncr1.engine.processes.interrupts import Interrupts, preemptible\n"
        + IMPORTS.format(in_the_midst="os.kill(os.getpid(), signal.SIGHUP)")
    )
    script += "with preemptible('outside'):\n    os.kill(os.getpid(), signal.SIGHUP)\n"
    script += (
        "with Interrupts() as interrupts:\n    os.kill(os.getpid(), signal.SIGHUP)\n    assert not interrupts.preempt\n"
    )
    process = started("-c", script, ignored=(signal.SIGHUP,))
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "") and out.endswith("loaded\n")


def test_a_terminal_that_is_gone_does_not_keep_a_run_from_saving(tmp_path: Path) -> None:
    """As when an ssh connection breaks: the kernel sends SIGHUP, and every write to the terminal fails."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", ASKED, str(tmp_path / "file")]

    def in_the_terminal() -> None:
        import fcntl
        import termios

        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "."},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=in_the_terminal,
    )
    os.close(theirs)
    try:
        said = b""
        while b"\n" not in said:  # a terminal takes a line in pieces: the rest of one would fail as it is written
            said += os.read(ours, 100)
        time.sleep(0.3)  # its write has not returned yet, and would fail: what is tested are those that come later
        os.close(ours)
        assert b"ready" in said
        assert process.wait(20) == EXIT_PREEMPTED
    finally:
        process.kill()
    assert (tmp_path / "file").read_text() == "saved"


@pytest.mark.parametrize(
    "recipe", [path.name for path in sorted((ROOT / "recipes").glob("*.py")) if path.name not in BARE]
)
def test_help_that_nobody_reads_on(recipe: str) -> None:
    """`--help | head -3`."""
    reader, writer = os.pipe()
    os.close(reader)
    process = started(f"recipes/{recipe}", "--help", stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (EXIT_NO_READER, "")


def test_a_broken_pipe_of_something_else_is_an_error() -> None:
    script = (
        "from syncr1.engine.methods.early import unix_habits\nwith unix_habits():\n    raise BrokenPipeError('a judge')"
    )
    process = started("-c", script)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1 and "BrokenPipeError: a judge" in err


@pytest.mark.slow
def test_sigterm_while_a_recipe_imports_torch(tmp_path: Path) -> None:
    """And its first line came within a second, but for what else the machine does."""
    began = time.monotonic()
    process = started("recipes/sync_r1.py", "--output_dir", str(tmp_path))
    try:
        assert process.stdout is not None and "loading torch" in process.stdout.readline()
        first = time.monotonic() - began
        process.terminate()
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == EXIT_PREEMPTED and "SIGTERM" in err
    print(f"first line after {first:.2f} s")


def test_what_is_loaded_is_never_looked_through() -> None:
    """Neither meanwhile nor later, which takes a third of the time of a start; and then all is as it was."""
    before = gc.get_freeze_count()
    with pytest.raises(ImportError), loading("something large"):
        loaded = [[] for _ in range(1000)]
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() >= before + len(loaded)
