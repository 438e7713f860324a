"""A process beside: what goes to it and comes back, what it raises, and that none outlives the other."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from syncr1.engine.errors import ConfigError, MachineError, RankFailed, RewardError
from syncr1.engine.processes.beside import Beside, Message, OtherProcessFailed, SharedBytes, living
from syncr1.engine.processes.lifetimes import Lifetime
from syncr1.engine.processes.watchdog import Watchdog

PATH = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])


def started(memory: SharedBytes, stderr: Path = Path(os.devnull)) -> Beside:
    """One that was refused what it was told first."""
    process = Beside("beside_echo", "the echo", descriptors=[memory.descriptor], variables={"PYTHONPATH": PATH})
    process.send(Message({"refused": True}))
    with pytest.raises(ConfigError, match="expected a folder, got none; name one"):
        process.receive()
    process.send(Message({"size": 128, "descriptor": memory.descriptor, "stderr": str(stderr)}))
    assert process.receive().about["ready"] == process.pid
    return process


@pytest.fixture(scope="module")
def memory() -> SharedBytes:
    return SharedBytes(128)


@pytest.fixture(scope="module")
def stderr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("echo") / "stderr"


@pytest.fixture(scope="module")
def kept() -> Iterator[list[Beside]]:
    processes: list[Beside] = []
    yield processes
    for process in processes:
        process.close()
    assert not living()


@pytest.fixture
def echo(kept: list[Beside], memory: SharedBytes, stderr: Path, monkeypatch: pytest.MonkeyPatch) -> Beside:
    """The one of the test before, where it lives."""
    monkeypatch.setenv("RANK", "0")
    if not kept or Lifetime.of(kept[-1].pid).is_over:
        kept.append(started(memory, stderr))
    return kept[-1]


def test_messages_and_weights(echo: Beside, memory: SharedBytes, caplog: pytest.LogCaptureFixture) -> None:
    """Every dtype, nothing at all, and more than a pipe holds; what is logged there is logged here."""
    kinds = (torch.int64, torch.int32, torch.uint8, torch.float64, torch.float32, torch.float16, torch.bfloat16)
    tensors = {str(kind): torch.arange(40).to(kind) for kind in kinds} | {
        "none": torch.zeros(0),
        "bool": torch.ones(3) > 0,
    }
    tensors["large"] = torch.randn(1 << 18)
    memory.vector(torch.float32, 3, 64).copy_(torch.tensor([1.5, -2.0, float("inf")]))
    echo.send(Message({"do": "echo", "text": "\N{SNOWMAN}\ud83d", "nan": [1e-300, None, {"a": 2**62}]}, tensors))
    back = echo.receive()
    assert back.about["back"] == {"do": "echo", "text": "\N{SNOWMAN}\ud83d", "nan": [1e-300, None, {"a": 2**62}]}
    assert back.about["rank"] == [], "it is no rank of this one's group"
    assert back.tensors.pop("seen").tolist() == [1.5, -2.0, float("inf")]
    assert {name: t.dtype for name, t in back.tensors.items()} == {name: t.dtype for name, t in tensors.items()}
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in tensors.items())
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("there", "echo was told")]


def test_errors_are_those_of_this_process(echo: Beside) -> None:
    """A broken reward, a full disk in the one line that it has here, and what nobody knows, with its traceback."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # which a terminal sends to all: the first one decides
        os.kill(echo.pid, number)
    echo.send(Message({"do": "raise", "what": "reward"}))
    with pytest.raises(RewardError) as broken:
        echo.receive()
    assert (broken.value.index, str(broken.value)) == (3, "reward 'f' at index 3: got nan")
    echo.send(Message({"do": "raise", "what": "disk"}))
    with pytest.raises(MachineError, match=r"\(rollout\): expected .*free"):
        echo.receive()
    echo.send(Message({"do": "raise", "what": "other"}))
    with pytest.raises(OtherProcessFailed, match="the echo: KeyError: 'other'") as unknown:
        echo.receive()
    assert "beside_echo.py" in str(unknown.value.__cause__) and "Traceback" in str(unknown.value.__cause__)


def test_a_stall_shows_its_stacks_and_a_kill_is_told_at_once(echo: Beside, stderr: Path) -> None:
    """Also where a process that it has started holds its pipe open."""
    echo.send(Message({"do": "sleep", "child": True}))
    said: list[str] = []
    watchdog = Watchdog(60.0, say=said.append, end=lambda code: None)
    watchdog._over.wait = lambda seconds=None: False  # type: ignore[method-assign]
    time.sleep(0.5)
    watchdog._give_up("no progress", 124)
    assert f"stacks of the echo, process {echo.pid}:" in said
    deadline = time.monotonic() + 10
    while (shown := stderr.read_text()).count("beside_echo.py") < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert 'beside_echo.py", line' in shown and "in answer" in shown
    os.kill(echo.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RankFailed, match=r"the echo ended \(signal 9: out of memory, or somebody's kill\)") as ended:
        echo.receive()
    assert ended.value.code == 70 and time.monotonic() - began < 5
    with pytest.raises(RankFailed):
        echo.send(Message({"do": "echo"}))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends when it has answered")
def test_it_does_not_outlive_the_first_one(memory: SharedBytes) -> None:
    """Killed, in the middle of the other one's work."""
    read, write = os.pipe()
    parent = os.fork()
    if not parent:
        process = started(memory)
        process.send(Message({"do": "sleep", "child": False}))
        os.write(write, Lifetime.of(process.pid).text().encode())
        os.kill(os.getpid(), signal.SIGKILL)
    life = Lifetime.read(os.read(read, 200).decode())
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 10
    while life is not None and not life.is_over and time.monotonic() < deadline:
        time.sleep(0.05)
    assert life is not None and life.is_over
