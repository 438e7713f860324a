"""Reward functions in processes of their own: what reaches them, and what a hang or a crash costs."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_rewards import group, lengths

from syncr1.engine.errors import RewardError, RewardSpecError
from syncr1.engine.rewards.calling import still_running
from syncr1.engine.rewards.scoring import score
from syncr1.engine.rewards.yours.custom import load_reward
from syncr1.engine.rewards.yours.isolated import IsolatedReward
from syncr1.engine.settings.reward_specs import reward_name

SOURCE = '''
import ctypes, re

def odd(*, completions, **_):
    """What a completion says happens."""
    print("no reply")
    what = completions[0]
    if what == "backtrack":
        re.fullmatch("(a+)+b", "a" * 64)  # for ever, and under Python's lock
    if what == "segfault":
        ctypes.string_at(0)
    if what == "raise":
        raise KeyError("no such column")
    if what == "nan":
        return [1.0, float("nan")]
    return [None if text == "none" else len(text) for text in completions]

odd.kind = "text"

def brightness(*, images, real_image, style, **more):
    assert "sample" in more and "images" not in more
    assert all(path is None or path.name == "photo.png" for path in real_image) and style == ["oil", None]
    assert all(ids == list(text.encode()) for ids, text in zip(more["completion_ids"], more["completions"]))
    return [None if image is None else image.mul_(1).mean().item() for image in images]

def compute_score(data_source, solution_str, ground_truth, extra_info):
    return {"score": float(solution_str == ground_truth)}
'''


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("rewards") / "odd_rewards.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="module")
def odd(source: Path) -> Iterator[IsolatedReward]:
    reward = load_reward(f"isolated@{source}:odd")
    assert isinstance(reward, IsolatedReward)
    yield reward
    reward.close()


def test_it_is_called_as_in_this_process(odd: IsolatedReward) -> None:
    assert (odd.__name__, odd.kind) == ("odd", "text")
    assert reward_name(odd.spec) == "odd"
    assert odd(completions=["a", "none", "\ud7ff" * 3], images=[None] * 3) == [1.0, None, 3.0]


def test_a_hang_is_killed_and_the_next_call_works(odd: IsolatedReward) -> None:
    """Also one that keeps Python's lock, which no thread survives."""
    odd(completions=["a"], images=[None])
    first, threads = odd._worker.pid, threading.active_count()
    start = time.monotonic()
    table = score(group(["backtrack", "b"]), {"odd": odd, "length": lengths}, timeout=2.0)
    assert time.monotonic() - start < 30.0
    assert table.failures == {"odd": 1, "length": 0} and table.values[:, 1].tolist() == [9.0, 1.0]
    assert not gone(odd._worker.pid) and gone(first)
    assert score(group(["aa", "b"]), {"odd": odd}, timeout=100.0).values[:, 0].tolist() == [2.0, 1.0]
    assert threading.active_count() == threads and still_running() == []


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("segfault", "its process was killed by SIGSEGV"),
        ("raise", "KeyError: 'no such column', at "),
    ],
)
def test_a_crash_is_a_failure(odd: IsolatedReward, what: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    table = score(group([what, "b"]), {"odd": odd}, timeout=100.0)
    assert table.failures == {"odd": 1} and said in caplog.text
    assert odd(completions=["aaa"], images=[None]) == [3.0]


def test_a_broken_contract_is_one_here_too(odd: IsolatedReward) -> None:
    with pytest.raises(RewardError, match=r"'odd' at index 1: .* got nan.* \(rank 0, step 4, prompt 'p0'\)"):
        score(group(["nan", "b"]), {"odd": odd}, timeout=100.0, step=4)


def test_pictures_paths_and_columns_of_the_data_arrive(source: Path) -> None:
    """Not what lies inside a data file, which has no path."""
    reward = IsolatedReward(f"{source}:brightness")
    images = [torch.full((3, 4, 5), 0.25), None, torch.linspace(0, 1, 12).view(3, 2, 2).half()]
    rollouts = [*group(["abc"], drawn=images[0], real_image=source.with_name("photo.png"), extra={"style": "oil"})]
    rollouts += group(["b"], "p1")
    table = score(rollouts, {"brightness": reward}, timeout=100.0)
    assert table.values[0].tolist() == [0.25] and table.values[1].isnan().all() and not any(table.failures.values())
    columns = {
        "completions": ["", "b"],
        "completion_ids": [[], [98]],
        "images": images[1:],
        "real_image": [None] * 2,
        "style": ["oil", None],
        "sample": [None] * 2,
    }
    assert reward(**columns, inside=[object(), None]) == [None, pytest.approx(0.5, abs=1e-3)]
    reward.close()


def test_adapters_and_errors_of_loading(source: Path) -> None:
    reward = load_reward(f"isolated@verl@{source}:compute_score")
    assert reward(prompts=["p"] * 2, completions=["a", "b"], answer=["a", "a"], images=[None] * 2) == [1.0, 0.0]
    assert isinstance(reward, IsolatedReward)
    reward.close()
    with pytest.raises(RewardSpecError, match=r"process of its own: .*odd_rewards\.py has no 'evn'; it has: odd"):
        load_reward(f"isolated@{source}:evn")


def hang(path: Path, folder: Path) -> None:
    reward = IsolatedReward(f"{path}:odd")
    (folder / "pid").write_text(str(reward._worker.pid))
    reward(completions=["backtrack"], images=[None])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker that hangs outlives its run")
def test_a_worker_that_hangs_dies_with_the_run(source: Path, tmp_path: Path) -> None:
    run = multiprocessing.get_context("fork").Process(target=hang, args=(source, tmp_path))
    run.start()
    told = tmp_path / "pid"
    wait_until(lambda: told.is_file() and told.read_text() != "")
    time.sleep(1.0)  # the call has begun
    assert run.pid is not None and not gone(int(told.read_text()))
    os.kill(run.pid, signal.SIGKILL)
    run.join(60)
    wait_until(lambda: gone(int(told.read_text())))


def gone(pid: int) -> bool:
    """Ended, whether or not anybody has asked for its exit code."""
    try:
        return re.search(r"\) Z ", Path(f"/proc/{pid}/stat").read_text()) is not None
    except FileNotFoundError:
        return True


def wait_until(holds: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
