"""exit.py and crash.py: one line and exit code 2 for what users can mend; crash.txt and 1 for our own faults."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from syncr1.engine.errors import ConfigError, DataError, Preempted, RewardError, RolloutTooLarge, refuse
from syncr1.engine.methods.exit import run_to_exit
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.show import recent
from syncr1.engine.show.runlog import RunLog

Said = tuple[int, str]


@pytest.fixture
def ends(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """The exit code and stderr of a run that does `act`."""

    def run(act: Callable[[SyncR1Config], object], config: SyncR1Config) -> Said:
        code = 0
        try:
            run_to_exit(act, config)
        except SystemExit as ended:
            code = int(str(ended.code))
        return code, capsys.readouterr().err

    return run


def raiser(error: BaseException) -> Callable[[object], None]:
    def act(config: object) -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DataError("rows.jsonl, line 2:\n  expected an object"), 2, "rows.jsonl, line 2: expected an object"),
        (ConfigError.of(["a: expected 1, got 2; b"]), 2, "a: expected 1"),
        (RewardError("mine", 3, "expected a number, got 'x'"), 2, "docs/rewards.md"),
        (RolloutTooLarge("generate: expected less"), 2, "generate: expected less"),
        (OSError(28, "No space left on device", "m.safetensors"), 2, "m.safetensors: expected free space"),
        (MemoryError(), 2, "memory: expected room"),
        (Preempted("SIGTERM"), 75, "SIGTERM"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_what_a_user_can_mend_is_a_line(
    ends: Callable[..., Said], tmp_path: Path, error: BaseException, code: int, words: str
) -> None:
    ended, said = ends(raiser(error), SyncR1Config(output_dir=tmp_path / "run"))
    assert ended == code and words in said and len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_one_rank_of_a_machine_says_what_all_have_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for rank, by_all in (("0", False), ("1", False), ("1", True)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as ended:
            refuse(ConfigError("a: expected 1"), by_all=by_all)
        assert ended.value.code == 2
        said.append(len(capsys.readouterr().err.splitlines()))
    assert said == [1, 0, 1]


def test_two_settings_are_two_lines(ends: Callable[..., Said], tmp_path: Path) -> None:
    code, said = ends(raiser(ConfigError.of(["a: 1", "b: 2"])), SyncR1Config(output_dir=tmp_path / "run"))
    assert code == 2 and len(said.splitlines()) == 2


def test_our_own_fault_is_written_down(
    ends: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the run's folder, with what a report needs, without the user's keys; three lines on the terminal."""
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")

    def act(config: SyncR1Config) -> None:
        log = RunLog(config.output_dir, config)
        recent.begins("training")
        recent.said("  going on after 3 steps")
        logging.getLogger("syncr1.test").warning("odd, with correct-horse-battery")
        log.close()
        raise ValueError("from deep\ninside, correct-horse-battery")

    code, said = ends(act, SyncR1Config(output_dir=tmp_path / "run", seed=7))
    report = tmp_path / "run" / "crash.txt"
    text = report.read_text()
    assert code == 1 and "Traceback" not in said and str(report) in said and "ValueError: from deep inside" in said
    assert "please report it" in said
    for words in (
        "Traceback",
        "in act",
        "torch 2",
        "seed: 7",
        "going on after 3 steps",
        "odd, with",
        "while\n  training",
    ):
        assert words in text, words
    assert "correct-horse-battery" not in text
    assert not [handler for handler in logging.getLogger().handlers if type(handler).__name__ == "LogKept"]


def test_before_there_is_a_folder_it_lies_beside(ends: Callable[..., Said], tmp_path: Path) -> None:
    code, said = ends(raiser(KeyError("a")), SyncR1Config(output_dir=tmp_path / "run"))
    assert code == 1 and str(tmp_path / "run-crash.txt") in said
    assert "KeyError: 'a'" in (tmp_path / "run-crash.txt").read_text() and not (tmp_path / "run").exists()


def test_other_ranks_write_files_of_their_own(
    ends: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert ends(raiser(KeyError("a")), SyncR1Config(output_dir=tmp_path / "run"))[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run-crash-rank3.txt"]


def test_warnings_are_shown_as_without_the_keeper(
    ends: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A root logger without handlers prints warnings; one that only keeps lines must not silence them."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    act = lambda config: logging.getLogger("syncr1.test").warning("look at this")  # noqa: E731
    assert ends(act, SyncR1Config(output_dir=tmp_path / "run")) == (0, "look at this\n")
