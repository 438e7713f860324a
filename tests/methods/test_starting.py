"""starting.py: where a rank goes on that replaces a lost one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
from torch.distributed import HashStore

from syncr1.engine.methods.resume import resume_point
from syncr1.engine.methods.starting import RUN_FOLDER, going_on
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.processes.meeting import Meeting
from syncr1.engine.show.runlog import RunLog


@pytest.fixture(autouse=True)
def _first_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def test_in_the_folder_that_the_first_start_made(tmp_path: Path) -> None:
    """Also where the first one had resumed an older checkpoint: what was learnt since counts."""
    (older := tmp_path / "older").mkdir()
    (tmp_path / "run-2").mkdir()
    first, store = SyncR1Config(output_dir=tmp_path / "run"), HashStore()
    meeting = Meeting(0, 2, kept=store)
    assert going_on(first, meeting) is first
    meeting.keep(RUN_FOLDER, str(tmp_path / "run-2"))
    meeting.keep(RUN_FOLDER, str(tmp_path / "run-2" / "unified"))  # the first one counts
    for asked in (None, "latest", str(older)):
        config = SyncR1Config(output_dir=tmp_path / "run", resume_from_checkpoint=asked)
        assert going_on(config, Meeting(1, 2, 2, kept=store)).resume_from_checkpoint == str(tmp_path / "run-2")


def test_lost_before_there_was_a_folder_it_starts_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """`latest` would be an older run of that name."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    config = SyncR1Config()
    assert going_on(config, Meeting(0, 2, 2, kept=HashStore())) is config


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_without_a_store_that_outlives_a_start_it_is_the_latest(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    assert going_on(SyncR1Config(), Meeting(0, 2)).resume_from_checkpoint == "latest"
    named = SyncR1Config(resume_from_checkpoint=str(tmp_path))
    assert going_on(named, Meeting(0, 2)).resume_from_checkpoint == str(tmp_path)
    alone = going_on(SyncR1Config(), Meeting(0, 1)).resume_from_checkpoint  # a job's other programs are not this one
    assert alone == ("latest" if name.startswith("TORCH") else None)


def test_a_run_without_a_checkpoint_begins_again_in_its_folder(tmp_path: Path) -> None:
    """What a launcher names when a rank is lost before the first save; metrics of before are kept aside."""
    run, config = tmp_path / "run", SyncR1Config(output_dir=tmp_path / "new")
    with RunLog(run, config) as log:
        log.cut(0)
    (run / "metrics.jsonl").write_text('{"step": 0}\n')
    assert not list(run.glob("aside_*"))
    said: list[str] = []
    point = resume_point(replace(config, resume_from_checkpoint=str(run)), said.append)
    assert point is not None and (point.checkpoint, point.run_folder, point.step) == (None, run, 0)
    assert said == [f"no checkpoint below {run} yet: from the beginning"]
    with RunLog(config.output_dir, config, point) as log:
        assert log.folder == run
        log.cut(point.step)
    assert (run / "metrics.jsonl").read_text() == ""
    assert (run / "aside_1-metrics.jsonl").read_text() == '{"step": 0}\n'
