"""meeting.py and watchdog.py over real ranks: starts that share a store, ranks that do not come, saves by one alone."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from starts import Starts

from syncr1.engine.errors import EXIT_BAD_INPUT, EXIT_FAILED, ConfigError, Preempted
from syncr1.engine.processes.group import join
from syncr1.engine.processes.meeting import meet
from syncr1.engine.processes.watchdog import Watchdog

pytestmark = pytest.mark.slow


@pytest.fixture
def starts(tmp_path: Path) -> Starts:
    return Starts(tmp_path)


def sum_of_all(rank: int) -> int:
    value = torch.tensor([rank + 1])
    dist.all_reduce(value)
    return int(value)


def work(rank: int, folder: Path) -> None:
    """Joins, computes together, and leaves the number of the start."""
    meeting = meet(20)
    with Watchdog(10, meeting):
        join(meeting, 20)
        assert sum_of_all(rank) == 3
        meeting.keep("first", str(meeting.start))
        (folder / f"done_{rank}").write_text(f"{meeting.start} {meeting.left('first')}")


def killed(rank: int, folder: Path) -> None:
    """Rank 1 is lost once the group stands; its neighbour waits for it in a collective."""
    meeting = meet(20)
    with Watchdog(10, meeting) as watchdog:
        join(meeting, 20)
        watchdog.mark("rollout", 3)
        sum_of_all(rank)
        if rank == 1:
            time.sleep(1.5)  # a beat
            os.kill(os.getpid(), signal.SIGKILL)
        sum_of_all(rank)


def test_a_lost_rank_is_named_at_once_and_replaced(starts: Starts) -> None:
    """Three starts over one store, in the second of which a rank is lost: the third knows nothing of it."""
    assert starts.start(work) == [0, 0]
    start = time.monotonic()
    assert starts.start(killed) == [EXIT_FAILED, -9]
    assert time.monotonic() - start < 10
    assert "rank 1 (last at step 3, rollout) gave no sign of life" in starts.said(0)
    assert starts.start(work) == [0, 0]
    assert [(starts.folder / f"done_{rank}").read_text() for rank in range(2)] == ["3 1", "3 1"]


def lost_before_joining(rank: int, folder: Path) -> None:
    """All have met, and one is lost before the process group stands: nobody waits for it there."""
    meeting = meet(20)
    with Watchdog(10, meeting):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        join(meeting, 600)


def test_joining_is_watched(starts: Starts) -> None:
    start = time.monotonic()
    assert starts.start(lost_before_joining) == [EXIT_FAILED, -9]
    assert time.monotonic() - start < 30
    assert "rank 1 (last at starting) gave no sign of life" in starts.said(0)


def meets(rank: int, folder: Path) -> None:
    """In a second, or not at all."""
    meet(1)


def test_who_does_not_come_is_named(tmp_path: Path) -> None:
    starts = Starts(tmp_path, ranks=3)
    assert starts.start(meets, without=(1,)) == [EXIT_FAILED, None, EXIT_FAILED]
    assert "of 3 ranks 1 (1) did not come: their programs end, or hang, before they join" in starts.said(0)
    assert "rank 2 has met rank 0, and others have not" in starts.said(2)
    assert starts.start(meets, without=(0,)) == [None, EXIT_FAILED, EXIT_FAILED]
    assert "rank 1 was not welcomed by rank 0" in starts.said(1)


def refused(rank: int, folder: Path) -> None:
    meeting = meet(20)
    with Watchdog(10, meeting) as watchdog:
        join(meeting, 20)
        watchdog.mark("loading")
        if rank == 1:
            raise ConfigError("no such folder")
        time.sleep(60)


def test_a_refusal_is_everybodys_and_final(starts: Starts) -> None:
    """Plain torchrun starts again whatever happened: the second start is refused for the first one's reason."""
    assert starts.start(refused) == [EXIT_BAD_INPUT, EXIT_BAD_INPUT]
    assert "rank 1 failed at loading: ConfigError: no such folder" in starts.said(0)
    assert starts.start(work) == [EXIT_BAD_INPUT, EXIT_BAD_INPUT]
    assert "this run was refused, and was started again all the same: rank 1 failed" in starts.said(0)


def asked_to_end(rank: int, folder: Path) -> None:
    meeting = meet(20)
    with Watchdog(10, meeting) as watchdog:
        watchdog.mark("loading")
        if rank == 1:
            raise Preempted("SIGTERM: nothing to save", together=False)
        time.sleep(60)


def test_who_is_asked_to_end_ends_all_with_its_code(starts: Starts) -> None:
    assert starts.start(asked_to_end) == [75, 75]


def saves_alone(rank: int, folder: Path) -> None:
    """Together first; then rank 0 alone, and rank 1 goes on to the next step, where it waits for rank 0."""
    meeting = meet(20)
    with Watchdog(600, meeting) as watchdog:
        join(meeting, 600)
        watchdog.mark("update", 0)
        if rank == 1:
            time.sleep(0.5)
        watchdog.gathering("saving the model")()
        watchdog.mark("update", 1)
        if rank == 0:
            watchdog.gathering("saving the model")()
        watchdog.mark("rollout", 2)
        sum_of_all(rank)


def test_a_save_by_one_alone_ends_at_once(starts: Starts) -> None:
    start = time.monotonic()
    assert starts.start(saves_alone) == [EXIT_BAD_INPUT, EXIT_BAD_INPUT]
    assert time.monotonic() - start < 15
    told = "rank 0 came to saving the model at step 1, update, and rank 1 went on without"
    assert told in starts.said(0) and told in starts.said(1)


def goes_on_alone(rank: int, folder: Path) -> None:
    meeting = meet(20)
    join(meeting, 20)
    meeting.keep("first", str(meeting.start))
    (folder / "done_0").write_text(f"{meeting.start} {meeting.left('first')} {dist.get_world_size()}")


def test_one_rank_knows_its_starts(tmp_path: Path) -> None:
    starts = Starts(tmp_path, ranks=1)
    assert starts.start(goes_on_alone) == starts.start(goes_on_alone) == [0]
    assert (tmp_path / "done_0").read_text() == "2 1 1"
