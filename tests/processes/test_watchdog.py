"""watchdog.py on one rank, and a rank that dies beside another; all other faults over ranks are in test_faults.py."""

from __future__ import annotations

import json
import time
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import warm
from made import short_base, world_folder

from syncr1.engine.errors import EXIT_FAILED, EXIT_STALLED
from syncr1.engine.processes import watchdog
from syncr1.engine.processes.watchdog import Beat, Watchdog


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "POLL", 0.02)
    monkeypatch.setattr(watchdog, "GRACE", 0.2)


def watched(timeout: float = 0.1) -> tuple[Watchdog, list[str], list[int]]:
    said: list[str] = []
    ends: list[int] = []
    return Watchdog(timeout, say=said.append, end=ends.append), said, ends


def waits(ends: list[int], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not ends and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_stalled_stage_ends_the_process_with_stacks(capfd: pytest.CaptureFixture[str]) -> None:
    dog, said, ends = watched()
    with dog:
        dog.mark("rollout", 3)
        waits(ends)
    assert ends == [EXIT_STALLED]
    assert said[0] == "no progress within stage_timeout = 0.1 s at step 3, rollout" and "stacks follow" in said[1]
    err = capfd.readouterr().err
    assert "most recent call first" in err and "in waits" in err


def test_stages_that_go_on_and_those_without_a_limit_are_left_alone() -> None:
    dog, said, ends = watched()
    with dog:
        for step in range(20):
            dog.mark("rollout", step)
            time.sleep(0.02)
        dog.mark("scores")
        time.sleep(0.4)
    assert not said and not ends


def test_who_comes_out_by_himself_is_not_ended() -> None:
    dog, said, ends = watched()
    with dog:
        dog.mark("update", 0)
        while len(said) < 2:
            time.sleep(0.01)
    time.sleep(0.5)
    assert not ends


def test_an_error_passes_through() -> None:
    dog, said, ends = watched()
    with pytest.raises(ZeroDivisionError), dog:
        dog.mark("pack", 0)
        raise ZeroDivisionError
    time.sleep(0.3)
    assert not said and not ends


def test_beats_are_read_as_told() -> None:
    beat = Beat(7, 3, "step 1, rollout")
    assert Beat.read(beat.text().encode()) == beat


@pytest.mark.slow
def test_a_killed_rank_is_named_by_the_other(tmp_path: Path) -> None:
    """In a real run; what was saved before is whole."""
    cases = [("killed", ["--zero_stage", "2"], [("killed", 1, 1, "update")])]
    script = str(warm.ROOT / "tests" / "support" / "faults.py")
    folders = ("--base", str(short_base()), "--world", str(world_folder()))
    out, _ = warm.run(script, str(tmp_path), *folders, "--cases", json.dumps(cases))
    ((name, codes, _),) = [json.loads(line) for line in out.splitlines() if line.startswith("[")]
    assert name == "killed" and codes == [EXIT_FAILED, -9]
