"""An interrupted CoRL run goes on: finished trainings stay, the interrupted one resumes, the end is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
from helpers import rows_of, same_bits
from made import short_base
from test_corl_run import photographs, small_config, tensors  # noqa: F401  # a fixture

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.corl.run import run
from syncr1.engine.errors import ConfigError
from syncr1.engine.learn.trainer import Trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
TRAINED = ("unified", "t2i", "mcq", "oe")


@pytest.fixture(scope="module")
def base() -> Path:
    return short_base()


class PowerCut(Exception):
    """What no code catches."""


def cut_after(monkeypatch: pytest.MonkeyPatch, num_steps: int) -> list[str]:
    """The run ends with the beginning of step `num_steps` of all its trainings; the steps that were begun."""
    trained, begun = Trainer.train_step, list[str]()

    def step(self: Trainer) -> Any:
        if len(begun) == num_steps:
            raise PowerCut
        begun.append(f"{self.config.output_dir.name} {self.step}")
        return trained(self)

    monkeypatch.setattr(Trainer, "train_step", step)
    return begun


def config_of(photographs: Path, base: Path, folder: Path, **changes: Any) -> CorlConfig:  # noqa: F811
    more: dict[str, Any] = {"max_steps": 2, "refined_max_steps": 2, "checkpointing_steps": 1, "sample_steps": 0}
    return small_config(photographs, base, folder, resume_from_checkpoint="latest", **(more | changes))


@pytest.fixture(scope="module")
def whole(photographs: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A run without an interruption: two steps of every training."""
    folder = tmp_path_factory.mktemp("whole")
    run(config_of(photographs, base, folder))
    return folder / "run"


def assert_same(folder: Path, whole: Path) -> None:
    for name in (*(f"{training}/checkpoints/last" for training in TRAINED), "merged"):
        assert same_bits(tensors(folder / name), tensors(whole / name)), name
    for training in TRAINED:
        rows, expected = (rows_of(run_folder / training) for run_folder in (folder, whole))
        assert [(row["step"], row["loss"], row["reward"]) for row in rows] == [
            (row["step"], row["loss"], row["reward"]) for row in expected
        ]


@pytest.mark.parametrize(
    ("done", "again"),
    [
        (1, ["unified 1", "t2i 0", "t2i 1", "mcq 0", "mcq 1", "oe 0", "oe 1"]),
        (4, ["mcq 0", "mcq 1", "oe 0", "oe 1"]),
        (5, ["mcq 1", "oe 0", "oe 1"]),
    ],
)
def test_the_interrupted_training_goes_on(
    done: int, again: list[str], whole: Path, photographs: Path, base: Path, tmp_path: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Cut in the first training, between two of the second stage, and in the midst of one."""
    config = config_of(photographs, base, tmp_path)
    with monkeypatch.context() as patch:
        cut_after(patch, done)
        with pytest.raises(PowerCut):
            run(config)
    with monkeypatch.context() as patch:
        begun = cut_after(patch, 99)
        run(config)
    assert begun == again and [path.name for path in tmp_path.iterdir()] == ["run"]
    assert_same(tmp_path / "run", whole)


def test_a_finished_run_has_nothing_left_to_do(
    whole: Path, photographs: Path, base: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    written = {path: path.stat().st_mtime_ns for path in whole.glob("*/**/model.safetensors")}
    begun = cut_after(monkeypatch, 0)
    run(config_of(photographs, base, whole.parent))
    assert not begun and len(written) == 5
    assert written == {path: path.stat().st_mtime_ns for path in whole.glob("*/**/model.safetensors")}


@pytest.mark.parametrize("changes", [{"refined_beta": 0.5}, {"max_steps": 3}, {"seed": 4}], ids=str)
def test_other_settings_are_refused(
    changes: dict[str, Any], whole: Path, photographs: Path, base: Path  # noqa: F811
) -> None:  # fmt: skip
    (name,) = changes
    with pytest.raises(ConfigError, match=f"resume_from_checkpoint: .*{name} is"):
        run(config_of(photographs, base, whole.parent, **changes))


def test_a_folder_that_is_no_run_is_refused(photographs: Path, base: Path, tmp_path: Path) -> None:  # noqa: F811
    config = replace(config_of(photographs, base, tmp_path), resume_from_checkpoint=str(tmp_path))
    with pytest.raises(ConfigError, match="a CoRL run's folder"):
        run(config)
