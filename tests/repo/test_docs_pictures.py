"""docs/make_pictures.py: the pictures of README.md and docs/ come from a run's folder by a command."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from run_folders import ASKED, prompts_in
from run_records import SCORES_AFTER, SCORES_BEFORE, make_group, make_rollout

from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.show.runlog import RunLog

ROOT = Path(__file__).resolve().parents[2]
WRONG = {"shape": "round", "colour": "blue"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_pictures", ROOT / "docs" / "make_pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_of_a_run(script: ModuleType, tmp_path: Path) -> None:
    prompt = prompts_in(tmp_path)[0]
    prompts = [replace(prompt, id=str(number), text=f"Draw number {number}") for number in range(5)]
    with RunLog(tmp_path / "run", SyncR1Config(output_dir=tmp_path / "run")) as log:
        log.samples(0, [rollout for one in prompts for rollout in make_group(one)], {"reward": [0.5] * 15})
        log.scores(
            before=SCORES_BEFORE,
            after=SCORES_AFTER,
            examples_before=[make_rollout(one, 0) for one in prompts],
            examples_after=[make_rollout(one, 1) for one in prompts],
            read_before=[ASKED, *[WRONG] * 4],  # the first was right before
            read_after=[ASKED] * 5,
        )
    whole = Image.open(log.folder / "samples" / "step_000001.png").convert("RGB")
    some = script.rows_of(whole, [0, 2])
    assert some.width == whole.width and 0.3 < some.height / whole.height < 0.6
    assert 4 * 128 < script.examples(log.folder).height < 5 * 300, "four of five"
    with pytest.raises(SystemExit, match="expected rows below 5, got"):
        script.rows_of(whole, [9])
