"""The nodes of a run from a hostfile: one agent each, watched from here, all restarted when one is lost.

    launcher ──ssh──► agent on host 1 ──► torchrun ──► ranks
             └─ssh──► agent on host 2 ──► torchrun ──► ranks

An agent (`python -m syncr1.engine.processes.nodes`) reads what it has to do from the first line of its standard input,
so that neither flags nor environment show in a command line, and ends with everything that it started when its standard
input ends: nothing is left behind on a machine whose launcher is gone.  Only the standard library is needed.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import FINAL, MachineError, refuse, shown_end
from .restarts import Restarts

_SUBREAPER, _PDEATHSIG = 36, 1  # of linux/prctl.h

_PASSED = (
    *("OMP_", "GOMP_", "MKL_", "NCCL_", "GLOO_", "UCX_", "FI_", "CUDA_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_"),
    *("TRITON_", "DS_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "WANDB_", "SYNCR1_"),
)
_NAMED = ("PYTHONPATH", "LD_LIBRARY_PATH", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_KEPT_HERE = ("CUDA_VISIBLE_DEVICES", "SYNCR1_HOSTFILE")
"""What is true of one machine only."""


def passed_environment(environ: Mapping[str, str], more: Sequence[str] = ()) -> dict[str, str]:
    """The variables that nodes get beside their own: those of the libraries that train, and those named in `more`."""
    wanted = {*_NAMED, *more}
    return {
        name: value
        for name, value in environ.items()
        if (name in wanted or name.startswith(_PASSED)) and name not in _KEPT_HERE
    }


def run_nodes(
    names: Sequence[str],
    commands: Callable[[int], Sequence[Sequence[str]]],
    executors: Sequence[Sequence[str]],
    *,
    folder: Path,
    environment: Mapping[str, str],
    restarts: Restarts,
    grace: float,
    say: Callable[[str], None],
) -> int:
    """Runs all nodes to the end, from the last checkpoint again when one is lost; returns the exit code.

    Args:
        names: of the nodes, for people.
        commands: the number of restarts so far to what each node runs.
        executors: for each node, what starts its agent there.
        folder: working directory on the nodes.
        environment: variables for what the nodes run.
        restarts: whether all of them are restarted once more.
        grace: seconds that a node has to end by itself before it is killed.
        say: takes lines for people.
    """
    for attempt in itertools.count():
        jobs = [
            {"folder": str(folder), "command": list(command), "environment": dict(environment), "grace": grace}
            for command in commands(attempt)
        ]
        lost, code = _attempt(executors, jobs, grace)
        if code == 0:
            return 0
        say(f"node {names[lost]} ended with {shown_end(code)}")
        if code in FINAL:
            return code
        if not restarts.again():
            break
        say(f"starting all {len(names)} nodes again: {restarts.words()}")
    say(f"giving up after {restarts.most} restarts without a new checkpoint")
    return code if code > 0 else 128 - code


def _attempt(executors: Sequence[Sequence[str]], jobs: Sequence[Mapping[str, Any]], grace: float) -> tuple[int, int]:
    """One start of all nodes: (which node failed first, its exit code), or (-1, 0) when all ended well."""
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for executor, job in zip(executors, jobs, strict=True):
            # A session of its own: Ctrl-C reaches this process alone, which then ends the nodes in order.
            node = subprocess.Popen(executor, stdin=subprocess.PIPE, start_new_session=True)
            nodes.append(node)
            assert node.stdin is not None
            with suppress(BrokenPipeError):  # it ended at once, which the loop below sees
                node.stdin.write(json.dumps(job).encode() + b"\n")
                node.stdin.flush()
        while True:
            codes = [node.poll() for node in nodes]
            failed = [index for index, code in enumerate(codes) if code]
            if failed:
                return failed[0], int(codes[failed[0]] or 0)
            if all(code == 0 for code in codes):
                return -1, 0
            time.sleep(0.1)
    finally:
        _end(nodes, grace)


def _end(nodes: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """Tells the agents to stop, by the end of their input; kills what does not."""
    for node in nodes:
        assert node.stdin is not None
        with suppress(OSError):
            node.stdin.close()
    deadline = time.monotonic() + grace + 5
    for node in nodes:
        try:
            node.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def agent() -> int:
    """A node's side: runs what the first line of standard input says, until it ends or standard input does."""
    job = _job()
    libc = ctypes.CDLL(None, use_errno=True)
    # Ranks whose torchrun was killed become children of this process, which ends them below.
    libc.prctl(_SUBREAPER, 1, 0, 0, 0)

    def follow_parent() -> None:
        libc.prctl(_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    try:
        child = subprocess.Popen(
            job["command"],
            cwd=job["folder"],
            env={**os.environ, **job["environment"]},
            stdin=subprocess.DEVNULL,
            preexec_fn=follow_parent,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise MachineError(
            f"nodes: expected {error.filename} on {socket.gethostname()}, as on the machine that starts the run, got "
            f"{error.strerror}; every machine needs the program and its folder at the same place"
        ) from error

    def stop_with_launcher() -> None:
        while sys.stdin.buffer.read(1 << 16):
            pass
        with suppress(ProcessLookupError):
            child.terminate()
        try:
            child.wait(job["grace"])
        except subprocess.TimeoutExpired:
            child.kill()

    threading.Thread(target=stop_with_launcher, daemon=True).start()
    # Ctrl-C and an orderly end of the machine: torchrun ends its ranks, then this process follows.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda *_: child.terminate())
    code = child.wait()
    _end_children()
    return code if code >= 0 else 128 - code


def _job() -> dict[str, Any]:
    """What the launcher writes; MachineError where it was not the launcher that started this process."""
    line = b"" if sys.stdin.isatty() else sys.stdin.buffer.readline()
    try:
        job = json.loads(line)
        if job.keys() >= {"command", "folder", "environment", "grace"}:
            return dict(job)
    except (ValueError, AttributeError):
        pass
    raise MachineError(
        f"nodes: expected a job from the launcher on standard input, got {len(line)} bytes that are none; this runs on "
        "the machines of a hostfile, start a recipe with --hostfile FILE instead"
    )


def _end_children() -> None:
    """Kills what is left below this process, generation by generation."""
    for _ in range(100):
        children: list[str] = []
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):  # the thread has just ended; its children belong to another one
                children += (task / "children").read_text().split()
        if not children:
            return
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(int(pid), 0)


if __name__ == "__main__":
    try:
        code = agent()
    except MachineError as error:
        refuse(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the thread that reads standard input never ends by itself
