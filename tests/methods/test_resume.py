"""A resumed run is the uninterrupted one, to the last bit; what cannot be resumed is refused, and says why."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import numpy as np
import pytest
import torch
import warm
import yaml
from helpers import ROOT, everything_partitioned, own_process_group, rows_of, sharp_policy
from made import world_folder as make_world
from resume_cases import FullDisk, HeldDisk, Training, assert_same, config_of, differences, kind_of, leave, rewritten

from syncr1.engine.checkpoints import sharded as checkpoint
from syncr1.engine.checkpoints.random_states import load_random_state, random_state
from syncr1.engine.checkpoints.sharded import folders, verified
from syncr1.engine.data.prompts import load_training_prompts
from syncr1.engine.errors import CheckpointError, ConfigError
from syncr1.engine.learn.schedule import learning_rate
from syncr1.engine.methods.resume import _check_fits, check_settings, resume_point
from syncr1.engine.methods.sync_r1_parts import build_reward_set
from syncr1.engine.rewards.ensemble import RewardSet
from syncr1.engine.settings.yaml_files import to_yaml
from syncr1.engine.show.runlog import RunLog

NORM = "model.model.language_model.norm.weight"
"""A small trained parameter."""
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    with own_process_group():
        from syncr1.engine.processes.group import init_distributed

        init_distributed()
        yield


@pytest.fixture(scope="module")
def world() -> Path:
    return make_world()


@pytest.fixture(scope="module")
def rewards(world: Path) -> RewardSet:
    return build_reward_set(config_of(), sharp_policy(), load_training_prompts(world))


# Exactly the same -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(world: Path, rewards: RewardSet, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Five steps over nine prompts, two updates each: more than an epoch, no cut at its end."""
    config = config_of(max_steps=5, num_iterations=2, save_total_limit=None)
    return Training(config, world, tmp_path_factory.mktemp("whole") / "checkpoints", rewards).to(5, saving=True)


@pytest.mark.parametrize("cut", [1, 3])
def test_every_cut_of_a_run(cut: int, whole: Training, world: Path, tmp_path: Path) -> None:
    """Within an epoch and at its end: losses, rewards, thresholds, tokens, weights and moments after the last step."""
    root = tmp_path / "checkpoints"
    shutil.copytree(whole.checkpoints.root, root, copy_function=os.link)
    resumed = Training(whole.trainer.config, world, root, whole.rewards).resume(cut)
    assert resumed.trainer.step == cut and list(resumed.to(5).record()) == list(range(cut, 5))
    assert_same(resumed, whole)
    thresholds = [step.values["rollout/preview_threshold"] for step, _, _ in whole.steps]
    assert len(set(thresholds)) > 2, "so that it had to be put back"


@pytest.mark.parametrize(
    "changes", [{"zero_stage": 2}, {"zero_stage": 3}, {"zero_stage": 0, "bf16": True}, {"lora_rank": 2}], ids=str
)
def test_every_kind_of_learner(changes: dict[str, Any], world: Path, rewards: RewardSet, tmp_path: Path) -> None:
    """ZeRO's flat shares, split parameters, bfloat16 with float32 masters, adapters."""
    config = config_of(max_steps=3, **changes)
    with everything_partitioned() if config.zero_stage == 3 else contextlib.nullcontext():
        run = Training(config, world, tmp_path, rewards).to(2, saving=True).to(3)
        resumed = Training(config, world, tmp_path, rewards).resume(2).to(3)
        assert_same(resumed, run)


def test_random_states_come_back() -> None:
    random.gauss(0, 1), np.random.standard_normal()  # both then hold a second number back
    state = random_state()
    first = random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist(), random.random()
    load_random_state(state)
    assert first == (random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist(), random.random())


def test_a_save_changes_nothing(world: Path, rewards: RewardSet, tmp_path: Path) -> None:
    saving = Training(config_of(), world, tmp_path / "a", rewards).to(2, saving=True)
    assert_same(saving, Training(config_of(), world, tmp_path / "b", rewards).to(2))


def test_training_goes_on_while_it_is_saved(
    whole: Training, world: Path, rewards: RewardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps after it was begun nothing is written yet; what then is, is the state at the end of its step."""
    config = whole.trainer.config
    training = Training(config, world, tmp_path, rewards).to(2)
    before = training.state()
    disk = HeldDisk()
    monkeypatch.setattr(checkpoint, "os", disk)
    training.checkpoints.save(training.trainer)
    assert disk.asked.wait(60)
    for _ in range(2):
        training.trainer.train_step()
    after = training.state()
    assert folders(tmp_path) == [] and not training.checkpoints.failed and training.trainer.step == 4
    disk.go.set()
    training.checkpoints.save(training.trainer)  # the next one waits for it
    assert (tmp_path / "step_000002").is_dir()
    training.checkpoints.wait()
    saved = verified(tmp_path / "step_000002").tensors(0)
    names = [name.removeprefix("optimizer ") for name in before if name.startswith("optimizer ")]
    assert names and all(torch.equal(saved[f"optimizer/{n}"], before[f"optimizer {n}"]) for n in names)
    assert not all(torch.equal(after[name], before[name]) for name in before)
    for step in (4, 2):
        assert_same(Training(config, world, tmp_path, rewards).resume(step).to(5), whole)


def test_a_failed_save_is_told_and_the_next_works(
    world: Path, rewards: RewardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(config_of(), world, tmp_path, rewards).to(1, saving=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "os", FullDisk())
        training.trainer.step = 2
        training.checkpoints.save(training.trainer)
        while not training.checkpoints.failed:
            time.sleep(0.01)
    with pytest.raises(CheckpointError, match="No space left"):
        training.checkpoints.save(training.trainer)
    assert [folder.name for folder in folders(tmp_path)] == ["step_000001"]
    training.checkpoints.save(training.trainer)
    training.checkpoints.wait()
    assert [verified(folder).step for folder in folders(tmp_path)] == [2, 1]


def test_two_ranks(whole: Training, world: Path, rewards: RewardSet, tmp_path: Path) -> None:
    """ZeRO 0, 2 and 3 on two ranks, resumed exactly, groups drawn anew among them; one rank's full disk ends both with
    the same error.  One rank goes on with what two have saved, and two with what one has, under another stage: the same
    tokens, and the same weights but for rounding; tests/campaigns/test_elastic.py has every pair."""
    shutil.copytree(world, tmp_path / "world")
    shutil.copytree(whole.checkpoints.root / "step_000004", tmp_path / "one" / "step_000004")
    warm.run(str(ROOT / "tests" / "support" / "resume_cases.py"), str(tmp_path), ranks=2)
    assert json.loads((tmp_path / "done.json").read_text()) == {"ranks": 2}
    leave(whole, tmp_path / "one")
    pairs = {"one_on_two": "one"}
    for before, now in ((2, 0), (3, 2)):
        config = config_of(zero_stage=now, **kind_of(before))
        training = Training(config, world, tmp_path / f"zero_{before}", rewards).resume(1).to(2)
        leave(training, tmp_path / f"zero_{before}_on_one")
        pairs[f"zero_{before}_on_one"] = f"after_zero_{before}"
    for one, other in pairs.items():
        found = differences(tmp_path / one, tmp_path / other)
        assert found["trajectories"] == 16 and found["others"] == 0, found
        assert found["reward"] < 1e-6 and found["weight"] < 1e-5, found


def test_other_ranks_and_stages_are_said(whole: Training, run_folder: Path) -> None:
    """In one line, which names both; a checkpoint of the older format says what to do."""
    said: list[str] = []
    point = resume_point(asked(whole, run_folder, zero_stage=3), said.append)
    assert point is not None and point.step == 5 and len(said) == 1
    assert said[0].startswith("saved by 1 rank (zero_stage 0), going on with 1 rank (zero_stage 3): ")
    older = replace(verified(point.checkpoint.folder), format=1)
    with pytest.raises(
        CheckpointError, match=r"saved by 1 rank \(zero_stage 0\) in an older format.*for one more step"
    ):
        _check_fits(asked(whole, run_folder, zero_stage=3), older, silent)
    _check_fits(asked(whole, run_folder), older, silent)


# What is refused ------------------------------------------------------------------------------------------------------


def silent(text: str) -> None:
    raise AssertionError(f"said: {text}")


@pytest.fixture
def run_folder(whole: Training, tmp_path: Path) -> Path:
    """The whole run's checkpoints in a run's folder of their own: links to its files, which are never written again."""
    shutil.copytree(whole.checkpoints.root, tmp_path / "run" / "checkpoints", copy_function=os.link)
    return tmp_path / "run"


def asked(whole: Training, run_folder: Path, what: str = "latest", **changes: Any) -> Any:
    return replace(whole.trainer.config, output_dir=run_folder, resume_from_checkpoint=what, **changes)


def test_which_checkpoint_is_meant(whole: Training, run_folder: Path) -> None:
    second = run_folder / "checkpoints" / "step_000002"
    for what, step in (("latest", 5), (str(run_folder), 5), (str(second), 2)):
        point = resume_point(asked(whole, run_folder, what), silent)
        assert point is not None and (point.step, point.run_folder) == (step, run_folder)
    assert resume_point(asked(whole, run_folder.with_name("new")), lambda text: None) is None
    assert resume_point(replace(whole.trainer.config, output_dir=run_folder), silent) is None


def test_latest_is_of_the_last_numbered_run(whole: Training, run_folder: Path) -> None:
    """`run-10` comes after `run-2`; `run-old` and a run without a checkpoint do not count."""
    for name in ("run-2", "run-10", "run-old"):
        shutil.copytree(run_folder, run_folder.with_name(name))
    (run_folder.with_name("run-11") / "checkpoints").mkdir(parents=True)
    point = resume_point(asked(whole, run_folder), silent)
    assert point is not None and point.run_folder.name == "run-10"


def test_a_damaged_checkpoint_is_passed_over_but_not_when_named(whole: Training, run_folder: Path) -> None:
    shard = run_folder / "checkpoints" / "step_000005" / "rank_0000.safetensors"
    damaged = shard.read_bytes()[:-1] + b"\x7f"
    shard.unlink()
    shard.write_bytes(damaged)
    said: list[str] = []
    point = resume_point(asked(whole, run_folder), said.append)
    assert point is not None and point.step == 4 and "SHA-256" in said[0]
    with pytest.raises(ConfigError, match="SHA-256"):
        resume_point(asked(whole, run_folder, str(shard.parent)), silent)
    for folder in folders(run_folder / "checkpoints"):
        (folder / "state.json").unlink()
    with pytest.raises(ConfigError, match="none of its checkpoints is whole"):
        resume_point(asked(whole, run_folder), said.append)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 7}, "seed is 0 in the checkpoint, 7 now"),
        ({"learning_rate": 0.5}, "learning_rate is 0.001 in the checkpoint, 0.5 now"),
        ({"prompts_per_step": 8, "num_generations": 2}, "num_generations is 4 .*; prompts_per_step is 4"),
        ({"lora_rank": 4}, "lora_rank is 0"),
    ],
)
def test_other_settings_are_refused(whole: Training, run_folder: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resume_point(asked(whole, run_folder, **changes), silent)


def test_another_model_is_refused(whole: Training, run_folder: Path, tmp_path: Path) -> None:
    """By its name before it is loaded, and by its weights and shapes afterwards."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="model is None in the checkpoint"):
        resume_point(asked(whole, run_folder, model=str(tmp_path / "model")), silent)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": None}, "expected config, of type str, got NoneType"),
        ({"config": "a: [b"}, "its config is no YAML"),
        ({"config": "[1, 2]"}, "expected config to be settings by name, got list"),
        ({"config": "[" * 9999}, "its config is no YAML"),
    ],
    ids=["absent", "not YAML", "a list", "deep"],
)
def test_a_state_without_settings_is_refused(
    whole: Training, run_folder: Path, change: dict[str, Any], said: str
) -> None:
    """Whole by its digests, but of another making."""
    folder = rewritten(run_folder / "checkpoints" / "step_000003", change)
    with pytest.raises(ConfigError, match=said):
        resume_point(asked(whole, run_folder, str(folder)), silent)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": None}, "expected step, of type int, got NoneType"),
        ({"step": 7}, "expected step 3, got 7"),
        ({"prompts": None}, "expected prompts, of type dict, got NoneType"),
        ({"prompts": {}}, "state.json: |other prompts"),
        ({"preview": {}}, "state.json: KeyError"),
        ({"frozen": None}, "frozen weights are others"),
        ({"random/torch": None}, "expected the random states ..torch.., which are absent"),
        ({"random/torch": torch.zeros(3)}, "RuntimeError|TypeError"),
        ({f"optimizer/exp_avg/{NORM}": torch.zeros(1)}, f"exp_avg of {NORM} has 1 elements there, 128 here"),
        ({f"optimizer/exp_avg/{NORM}": torch.zeros(129)}, f"exp_avg of {NORM} has 129 elements there, 128 here"),
        ({f"optimizer/exp_avg/{NORM}": torch.zeros(8, 8)}, "expected float32 of one dimension, got F32 .8, 8."),
        ({f"optimizer/master/{NORM}": torch.zeros(128).half()}, "expected float32 of one dimension, got F16 .128."),
        ({f"optimizer/master/{NORM}": None}, f"master of {NORM} has 0 elements there, 128 here"),
        ({f"optimizer/exp_avg_sq/{NORM}": None}, f"exp_avg_sq of {NORM} has 0 elements there, 128 here"),
        ({f"optimizer/step/{NORM}": None}, f"exp_avg of {NORM} has 128 elements there, 0 here"),
        ({"optimizer/master/other": torch.zeros(1)}, "master of other has 1 elements there, 0 here"),
        ({f"optimizer/momentum/{NORM}": torch.zeros(1)}, "it has 'optimizer/momentum/"),
        ({"optimizer/master.0": torch.zeros(1)}, "it has 'optimizer/master.0'"),
        ({f"optimizer/step/{NORM}": torch.zeros(1)}, "expected float32 of a number, got F32 .1."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_state_of_another_making_is_refused(
    whole: Training, world: Path, run_folder: Path, change: dict[str, Any], said: str
) -> None:
    rewritten(run_folder / "checkpoints" / "step_000003", change)
    training = Training(whole.trainer.config, world, run_folder / "checkpoints", whole.rewards)
    with pytest.raises(CheckpointError, match=f"resuming from .*step_000003: .*({said})"):
        training.resume(3)


def test_other_weights_are_refused(whole: Training, world: Path, run_folder: Path) -> None:
    other = sharp_policy()
    with torch.no_grad():
        next(p for p in other.parameters() if not p.requires_grad).add_(1e-3)
    training = Training(whole.trainer.config, world, run_folder / "checkpoints", whole.rewards, policy=other)
    with pytest.raises(CheckpointError, match="frozen weights are others"):
        training.resume(2)
    assert training.trainer.step == 0


def test_other_data_is_refused(whole: Training, world: Path, run_folder: Path) -> None:
    training = Training(whole.trainer.config, world, run_folder / "checkpoints", whole.rewards, num_prompts=8)
    before = training.state()
    with pytest.raises(CheckpointError, match="other prompts"):
        training.resume(2)
    after = training.state()
    assert training.trainer.step == 0 and all(torch.equal(before[name], after[name]) for name in before)


def test_what_may_differ(whole: Training, run_folder: Path) -> None:
    free = {"sample_steps": 1, "eval_samples": 3, "logging_steps": 5, "save_total_limit": 1}
    point = resume_point(asked(whole, run_folder, **free), silent)
    assert point is not None and point.step == 5
    said: list[str] = []
    assert resume_point(asked(whole, run_folder, max_tokens_per_microbatch=500), said.append) is not None
    assert len(said) == 1 and "other rounding" in said[0]


def test_a_longer_run_says_how_its_learning_rate_jumps(whole: Training, run_folder: Path) -> None:
    """At step 5 of 5 nothing but a tenth of the rate was left; of 9, half of the way is still to go."""
    said: list[str] = []
    point = resume_point(asked(whole, run_folder, max_steps=9), said.append)
    assert point is not None and point.step == 5
    config = whole.trainer.config
    before, now = (learning_rate(replace(config, max_steps=steps), 5) for steps in (5, 9))
    (told,) = said
    assert "max_steps is 5 in the checkpoint, 9 now" in told and f"{now:.3g} instead of {before:.3g}" in told
    assert now == pytest.approx(0.55e-3) and before == pytest.approx(1e-4)
    assert resume_point(asked(whole, run_folder, max_steps=5), said.append) is not None and len(said) == 1


# The run's folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
def test_the_log_goes_on_in_its_folder(whole: Training, run_folder: Path, first: int) -> None:
    """Metrics and samples of later steps, and half a line, are cut; config.yaml is a new run's, not a resumed one's. A
    folder in which steps counted from 0 goes on counting from 1."""
    lines = [json.dumps({"step": first + step, "loss": step / 3}) for step in range(5)]
    (run_folder / "metrics.jsonl").write_text("\n".join([*lines, f'{{"step": {first + 5}, "lo']))
    (run_folder / "samples").mkdir()
    for step, kind in ((0, "png"), (1, "png"), (1, "jsonl"), (2, "png"), (4, "jsonl")):
        (run_folder / "samples" / f"step_{first + step:06d}.{kind}").touch()
    (run_folder / "samples" / "notes.txt").touch()
    point = resume_point(asked(whole, run_folder, str(run_folder / "checkpoints" / "step_000002")), silent)
    with RunLog(run_folder, asked(whole, run_folder), point) as log:
        assert log.folder == run_folder and len((run_folder / "metrics.jsonl").read_text().splitlines()) == 6
        log.cut(2)
        log.metrics(replace(whole.steps[0][0], step=2))
    rows = rows_of(run_folder)
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[1]["loss"] == 1 / 3
    assert sorted(p.name for p in (run_folder / "samples").iterdir()) == [
        *("notes.txt", "step_000001.png", "step_000002.jsonl", "step_000002.png"),
    ]
    assert "resume_from_checkpoint: null" in (run_folder / "config.yaml").read_text()
    assert json.loads((run_folder / "environment.json").read_text())["resumed_at_step"] == 2


def test_newer_checkpoints_are_set_aside(whole: Training, world: Path, run_folder: Path) -> None:
    """Resumed from an older one, the newer ones are no longer what `latest` means, and are not removed."""
    root = run_folder / "checkpoints"
    Training(whole.trainer.config, world, root, whole.rewards).resume(3).to(4, saving=True)
    assert [verified(folder).step for folder in folders(root)] == [4, 3, 2, 1]
    assert {path.name for path in root.glob("aside*")} == {"aside_1-step_000004", "aside_1-step_000005"}


def test_a_checkpoint_may_be_older_than_a_setting() -> None:
    """One that it does not know counts as at its default; whoever changed it since is told."""
    config = config_of()
    before = yaml.safe_load(to_yaml(config, comments=False))
    del before["lr_scheduler_type"], before["eval_steps"]
    check_settings(before, replace(config, eval_steps=5), pytest.fail)
    with pytest.raises(CheckpointError, match="lr_scheduler_type is None in the checkpoint, 'cosine' now"):
        check_settings(before, replace(config, lr_scheduler_type="cosine"), pytest.fail)
