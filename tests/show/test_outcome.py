"""outcome.py, run_status.py, live_page.py: how a run stands, told by itself and, once it is killed, by its folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from run_records import SCORES_BEFORE, make_metrics

from syncr1.engine.errors import NotFinite, Preempted
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.show import live_page
from syncr1.engine.show.outcome import lives, outcome_of, this_process
from syncr1.engine.show.run_files import read_json, read_run
from syncr1.engine.show.runlog import RunLog


def begun(folder: Path, steps: int, **settings: object) -> RunLog:
    log = RunLog(folder / "r", SyncR1Config(max_steps=3, **settings))  # type: ignore[arg-type]
    for step in range(steps):
        log.metrics(make_metrics(step))
    return log


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (None, "done", "all 3 steps done"),
        (KeyboardInterrupt(), "stopped", "interrupted after 3 steps; no checkpoint was saved"),
        (Preempted("SIGTERM"), "stopped", "stopped from outside after 3 steps"),
        (NotFinite("11 updates in a row"), "failed", "failed after 3 steps: NotFinite: 11 updates in a row"),
    ],
)
def test_how_a_run_ends_is_on_its_page(error: BaseException | None, kind: str, words: str, tmp_path: Path) -> None:
    log = begun(tmp_path, 3)
    assert outcome_of(read_run(log.folder)) == ("running", "running, 3 steps so far")
    log.__exit__(type(error) if error else None, error, None)
    outcome = outcome_of(read_run(log.folder))
    assert outcome.kind == kind and outcome.words.startswith(words)
    page = (log.folder / "report.html").read_text(encoding="utf-8")
    assert words in page and "this page reloads itself" not in page


def test_what_a_checkpoint_makes_of_the_remedy(tmp_path: Path) -> None:
    log = begun(tmp_path, 2)
    (log.folder / "checkpoints" / "step_000002").mkdir(parents=True)
    log.close("preempted")
    assert "--resume_from_checkpoint latest goes on" in outcome_of(read_run(log.folder)).words


def test_fewer_steps_than_planned_are_no_whole_run(tmp_path: Path) -> None:
    log = begun(tmp_path, 2)
    log.close()
    assert outcome_of(read_run(log.folder)) == ("stopped", "stopped after 2 of 3 steps")


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_outcome import begun
begun(Path(sys.argv[1]), 2)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_run_that_was_killed(tmp_path: Path) -> None:
    here = Path(__file__).parent
    paths = [str(here.parents[1]), str(here.parent / "support"), *sys.path]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), str(here)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    run = tmp_path / "r"
    assert outcome_of(read_run(run)).kind == "running"
    process.send_signal(signal.SIGKILL)
    process.wait()
    outcome = outcome_of(read_run(run))
    assert outcome.kind == "failed" and outcome.words.startswith("killed after 2 of 3 steps, without a word")


def test_a_later_process_of_the_same_number_is_another(tmp_path: Path) -> None:
    assert lives(this_process()) is True
    assert lives(this_process() | {"began": "1"}) is False
    assert lives(this_process() | {"machine": "elsewhere"}) is None, "it cannot be seen from here"
    for odd in ({}, {"pid": "x"}, {"pid": 10**30}, {"began": 3}, {"machine": []}):
        assert lives(this_process() | odd if odd else {}) in (None, False)


def test_parts_of_a_run_are_clocked_and_go_on_when_it_is_resumed(tmp_path: Path) -> None:
    log = begun(tmp_path, 0)
    log.scores(before=SCORES_BEFORE)
    log.metrics(make_metrics(0))
    log.close()
    status = read_json(log.folder / "status.json")
    assert list(status["seconds"]) == ["before training", "training"] and status["peak_bytes"]["memory"] > 1 << 20
    content = status | {"seconds": {"training": 100.0, "odd": "x"}, "started": "2026-01-01T00:00:00+0000"}
    (log.folder / "status.json").write_text(json.dumps(content))

    class Resumed:
        run_folder, step = log.folder, 1

    again = RunLog(tmp_path / "r", SyncR1Config(max_steps=3), Resumed())
    again.cut(1)
    again.metrics(make_metrics(1))
    again.close()
    status = read_json(log.folder / "status.json")
    assert status["seconds"]["training"] >= 100 and status["started"] == "2026-01-01T00:00:00+0000"


def test_pages_take_a_hundredth_of_the_time_and_are_as_rare_as_a_browser_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    written: list[float] = []

    def write(folder: Path) -> Path:
        clock[0] += cost[0]
        written.append(clock[0])
        return folder

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(live_page, "write_report", write)
    cost = [0.0]
    log = begun(tmp_path, 0)
    for _ in range(50):  # steps of a second
        clock[0] += 1
        log.metrics(make_metrics(len(written)))
    assert all(10 <= b - a <= 11 for a, b in pairwise(written)) and len(written) >= 5
    cost[0] = 0.5
    before, begin = len(written), clock[0]
    for _ in range(1000):
        clock[0] += 1
        log.metrics(make_metrics(0))
    spent = 0.5 * (len(written) - before)
    assert 0 < spent <= 0.0101 * (clock[0] - begin)


@pytest.mark.parametrize(("every", "pages"), [(0, 0), (1, 3), (2, 2)])
def test_report_steps(every: int, pages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_page, "RELOAD_SECONDS", 0)
    monkeypatch.setattr(live_page, "MOST_OF_TIME", 1e9)
    written: list[Path] = []
    monkeypatch.setattr(live_page, "write_report", lambda folder: written.append(folder) or folder)
    log = begun(tmp_path, 2, report_steps=every)
    assert len(written) == pages, "one when the run begins, then every so many steps"
    log.close()
    assert len(written) == pages + 1, "the last one in any case"


def test_a_page_that_cannot_be_written_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = live_page.write_report
    monkeypatch.setattr(live_page, "RELOAD_SECONDS", 0)
    monkeypatch.setattr(live_page, "MOST_OF_TIME", 1e9)
    monkeypatch.setattr(live_page, "write_report", lambda folder: 1 / 0)
    log = begun(tmp_path, 2)
    assert capsys.readouterr().err.count("report.html cannot be written while the run goes on") == 1
    monkeypatch.setattr(live_page, "write_report", real)
    log.metrics(make_metrics(2))
    log.close()
    assert "all 3 steps done" in (log.folder / "report.html").read_text(encoding="utf-8")
