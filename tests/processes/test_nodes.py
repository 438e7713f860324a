"""nodes.py: nodes that are real processes on this machine; lost, stubborn, orphaned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from syncr1.engine.errors import FINAL
from syncr1.engine.processes.nodes import passed_environment, run_nodes
from syncr1.engine.processes.restarts import Restarts

AGENT = [sys.executable, "-m", "syncr1.engine.processes.nodes"]


def nodes(folder: Path, scripts: list[str], *, max_restarts: int = 0) -> tuple[int, list[str]]:
    """Runs a Python script on each node; it sees `ATTEMPT`."""
    said: list[str] = []
    code = run_nodes(
        [f"n{index}" for index in range(len(scripts))],
        lambda restarts: [[sys.executable, "-c", f"ATTEMPT = {restarts}\n" + script] for script in scripts],
        [AGENT] * len(scripts),
        folder=folder,
        environment={"NCCL_X": "passed"},
        restarts=Restarts(max_restarts),
        grace=20,
        say=said.append,
    )
    return code, said


def test_all_end_well_in_the_folder_with_the_environment(tmp_path: Path) -> None:
    script = "import os; open(f'out{os.getpid()}', 'w').write(os.environ['NCCL_X'])"
    assert nodes(tmp_path, [script, script]) == (0, [])
    assert [path.read_text() for path in tmp_path.glob("out*")] == ["passed"] * 2


def test_a_lost_node_starts_all_again(tmp_path: Path) -> None:
    """The other node, which would have gone on for ever, is ended first and started too."""
    lost = "import os, signal\nif ATTEMPT == 0: os.kill(os.getppid(), signal.SIGKILL)"
    other = "import time\nopen(f'other{ATTEMPT}', 'w')\nif ATTEMPT == 0: time.sleep(600)"
    start = time.monotonic()
    code, said = nodes(tmp_path, [other, lost], max_restarts=2)
    assert code == 0 and time.monotonic() - start < 15
    assert said == [
        "node n1 ended with signal 9",
        "starting all 2 nodes again: restart 1 of 2 without a new checkpoint",
    ]
    assert {path.name for path in tmp_path.iterdir()} >= {"other1"}


def test_restarts_end(tmp_path: Path) -> None:
    code, said = nodes(tmp_path, ["open(f'try{ATTEMPT}', 'w'); raise SystemExit(7)"], max_restarts=2)
    assert code == 7 and said[-1] == "giving up after 2 restarts without a new checkpoint"
    assert len(list(tmp_path.glob("try*"))) == 3


@pytest.mark.parametrize("code", FINAL)
def test_some_ends_are_final(tmp_path: Path, code: int) -> None:
    """Settings that cannot work do not work the second time, and who was asked to stop stays stopped."""
    assert nodes(tmp_path, [f"raise SystemExit({code})"], max_restarts=2) == (
        code,
        [f"node n0 ended with exit code {code}"],
    )


def test_an_executor_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run_nodes(
            ["a"],
            lambda _: [["true"]],
            [["no-such-program"]],
            folder=tmp_path,
            environment={},
            restarts=Restarts(3),
            grace=20,
            say=print,
        )


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


TREE = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open("pids.tmp", "w").write(f"{__import__('os').getpid()} {child.pid}")
__import__("os").rename("pids.tmp", "pids")
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["its input ends", "its child is killed"])
def test_an_agent_leaves_nothing_behind(tmp_path: Path, how: str) -> None:
    """A rank is in a session of its own, as torchrun's are, and still ends with its agent."""
    job = {"folder": str(tmp_path), "command": [sys.executable, "-c", TREE], "environment": {}, "grace": 20}
    agent = subprocess.Popen(AGENT, stdin=subprocess.PIPE)
    assert agent.stdin is not None
    try:
        agent.stdin.write(json.dumps(job).encode() + b"\n")
        agent.stdin.flush()
        deadline = time.monotonic() + 20
        while not (tmp_path / "pids").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        child, grandchild = map(int, (tmp_path / "pids").read_text().split())
        if how == "its input ends":
            agent.stdin.close()
        else:
            os.kill(child, signal.SIGKILL)
        assert agent.wait(20) in (128 + signal.SIGTERM, 128 + signal.SIGKILL)
        assert gone(child) and gone(grandchild)
    finally:
        agent.kill()


def test_torchrun_ends_with_its_killed_agent(tmp_path: Path) -> None:
    job = {"folder": str(tmp_path), "command": [sys.executable, "-c", TREE], "environment": {}, "grace": 20}
    agent = subprocess.Popen(AGENT, stdin=subprocess.PIPE)
    assert agent.stdin is not None
    agent.stdin.write(json.dumps(job).encode() + b"\n")
    agent.stdin.flush()
    deadline = time.monotonic() + 20
    while not (tmp_path / "pids").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    child, grandchild = map(int, (tmp_path / "pids").read_text().split())
    agent.kill()
    agent.wait()
    assert gone(child)  # by SIGTERM, upon which torchrun ends its ranks; this stand-in does not
    os.kill(grandchild, signal.SIGKILL)


def test_what_goes_to_other_machines() -> None:
    names = (
        "NCCL_DEBUG",
        "HF_TOKEN",
        "AWS_SECRET_KEY",
        "CUDA_VISIBLE_DEVICES",
        "JUDGE_KEY",
        "SSH_AUTH_SOCK",
        "PATH",
        "GLOO_SOCKET_IFNAME",
    )
    here = dict.fromkeys(names, "x")
    passed = {"NCCL_DEBUG", "HF_TOKEN", "GLOO_SOCKET_IFNAME"}
    assert set(passed_environment(here)) == passed
    assert set(passed_environment(here, ["JUDGE_KEY"])) == {*passed, "JUDGE_KEY"}


def test_nothing_of_the_job_shows_in_a_command_line(tmp_path: Path) -> None:
    """Environment and flags travel over standard input; `ps` shows the agent alone."""
    script = (
        "import os; open('line', 'w').write(open(f'/proc/{os.getppid()}/cmdline').read());"
        "open('seen', 'w').write(os.environ['NCCL_X'])"
    )
    assert nodes(tmp_path, [script])[0] == 0
    assert "NCCL_X" not in (tmp_path / "line").read_text() and "passed" not in (tmp_path / "line").read_text()
    assert (tmp_path / "seen").read_text() == "passed"
