"""rollout_staleness 1: what is drawn when, with which weights, and that all of it comes back from a checkpoint.

The other process is here in this one (ahead_twin.py), behind the same messages; a real one is in
tests/processes/test_beside.py and, with whole runs, in tests/campaigns/test_ahead_ends.py.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import own_process_group, sharp_policy
from made import world_folder
from resume_cases import Training, assert_same, config_of

from syncr1.engine.data.prompts import load_anchors, load_training_prompts
from syncr1.engine.errors import DataError, RankFailed, RewardError, RewardsFailed
from syncr1.engine.learn.carried import carried, gathered_of
from syncr1.engine.learn.trajectories import Gathered, sampling_of
from syncr1.engine.methods.sync_r1_parts import build_reward_set, stream_of
from syncr1.engine.processes.beside import Message
from syncr1.engine.records import Rollout, Segment
from syncr1.engine.rewards.ensemble import RewardSet
from syncr1.engine.rewards.preview_scorer import build_preview
from syncr1.engine.rollout.sampler import RolloutEngine

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]
SMALL: dict[str, Any] = {"prompts_per_step": 2, "num_generations": 2, "anchor_fraction": 0.0}
STALE: dict[str, Any] = {"rollout_staleness": 1, "importance_correction": "truncate", "replay_check_steps": 1}


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    with own_process_group():
        from syncr1.engine.processes.group import init_distributed

        init_distributed()
        yield


@pytest.fixture(scope="module")
def world() -> Path:
    return world_folder()


@pytest.fixture(scope="module")
def rewards(world: Path) -> RewardSet:
    return build_reward_set(config_of(), sharp_policy(), load_training_prompts(world))


class Watched(Training):
    """Keeps the weights before each step."""

    def to(self, step: int, *, saving: bool = False) -> Training:
        self.weights = []
        while self.trainer.step < step:
            policy = self.learner.policy
            self.weights.append({name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad})
            super().to(self.trainer.step + 1, saving=saving)
        return self


@pytest.fixture(scope="module")
def whole(world: Path, rewards: RewardSet, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Three steps, a checkpoint after each."""
    config = config_of(max_steps=3, save_total_limit=None, **STALE)
    return Watched(config, world, tmp_path_factory.mktemp("ahead") / "checkpoints", rewards).to(3, saving=True)


def test_a_step_is_drawn_with_the_weights_of_the_step_before(whole: Watched, world: Path, rewards: RewardSet) -> None:
    """By hand: tokens, log-probabilities, pictures and the preview's threshold, to the last bit."""
    run, config = whole, whole.trainer.config
    prompts, anchors = load_training_prompts(world)[:: 97 // 9][:9], load_anchors(world)[:3]
    policy, stream, gate = sharp_policy().eval(), stream_of(config, prompts, anchors), build_preview(config, rewards)
    for step in range(3):
        with torch.no_grad():
            for name, weight in run.weights[max(0, step - 1)].items():
                policy.get_parameter(name).copy_(weight)
        expected = RolloutEngine(policy).generate(stream.next_step(), sampling_of(config, step), gate)
        assert gate is not None
        metrics, rollouts, _ = run.steps[step]
        assert_same_rollouts(rollouts, expected)
        assert metrics.values["rollout/preview_threshold"] == gate.threshold
        gate.adapt()


def test_the_metrics_say_how_stale_and_the_replay_is_not_misread(whole: Training) -> None:
    """Step 0 is drawn with its own weights: sampler and trainer agree. After it they do not, and that is no replay."""
    values = [metrics.values for metrics, _, _ in whole.steps]
    assert [row["rollout/staleness"] for row in values] == [0, 1, 1]
    assert values[0]["rollout/replay_logp_max_abs"] <= 1e-4
    assert not any("rollout/replay_logp_max_abs" in row for row in values[1:])
    assert all("rollout/guidance_logp_mean_abs" in row for row in values)
    moved = [row["sampling/sampling_logp_difference/max"] for row in values]
    assert moved[0] <= 1e-4 < min(moved[1:])
    for metrics, _, _ in whole.steps:
        assert {"wait", "pack", "score", "update/forward"} <= metrics.seconds.keys()
        assert not [name for name in metrics.seconds if name.startswith("rollout")]
        assert metrics.values["ahead/rollout_seconds"] > 0


def test_a_resumed_run_is_the_undisturbed_one(whole: Training, world: Path, tmp_path: Path) -> None:
    """To the last bit: what was under way when the checkpoint was taken is in it."""
    shutil.copytree(whole.checkpoints.root, root := tmp_path / "checkpoints", copy_function=os.link)
    resumed = Training(whole.trainer.config, world, root, whole.rewards).resume(1)
    assert list(resumed.to(3).record()) == [1, 2]
    assert_same(resumed, whole)


def test_a_checkpoint_is_that_of_a_run_that_draws_itself(whole: Training, world: Path, tmp_path: Path) -> None:
    """But for what is under way: one that does passes that over, and draws the same prompts with its own weights."""
    shutil.copytree(whole.checkpoints.root, root := tmp_path / "checkpoints", copy_function=os.link)
    config = dataclasses.replace(whole.trainer.config, rollout_staleness=0)
    (metrics, rollouts, _), before = (
        Training(config, world, root, whole.rewards).resume(2).to(3).steps[0],
        whole.steps[2],
    )
    assert [(r.prompt.id, r.member) for r in rollouts] == [(r.prompt.id, r.member) for r in before[1]]
    assert metrics.values["rollout/replay_logp_max_abs"] <= 1e-4 and "rollout/staleness" not in metrics.values
    assert metrics.values["rollout/preview_threshold"] == before[0].values["rollout/preview_threshold"]


def test_another_learner(world: Path, rewards: RewardSet, tmp_path: Path) -> None:
    """Adapters alone are handed over; several updates a step, top-k's kept sets, guidance, redrawn groups go along."""
    more = {"lora_rank": 2, "num_iterations": 2, "top_k": 12, "policy_logp": "guided", "cfg_weight": 3.0, "refill": 1}
    config = config_of(max_steps=2, save_total_limit=None, preview_fraction=0, **SMALL, **STALE, **more)
    run = Training(config, world, tmp_path, rewards).to(2, saving=True)
    assert run.steps[1][0].values["refill/rounds"] == 1, "so that it had to be gone through"
    ahead = run.trainer.ahead
    assert ahead is not None and all("lora" in name for name, _, _ in ahead.weights.layout)
    assert run.steps[0][0].values["rollout/replay_logp_max_abs"] <= 1e-4
    assert_same(Training(config, world, tmp_path, rewards).resume(1).to(2), run)


def test_a_broken_reward_ends_the_run_after_its_step(world: Path, rewards: RewardSet, tmp_path: Path) -> None:
    """As with rollout_staleness 0: the same words, with the step that it broke in."""
    calls = []

    def broken(*, id: Sequence[str], **columns: Any) -> list[Any]:
        calls.append(len(id))
        return [0.5 if len(calls) < 2 else "good"] * len(id)

    rewards = dataclasses.replace(rewards, functions={**rewards.functions, "text": broken})
    run = Training(config_of(preview_fraction=0, **SMALL, **STALE), world, tmp_path, rewards)
    with pytest.raises(RewardsFailed) as ended:
        run.to(4)
    assert len(run.steps) == 2 and str(ended.value).startswith("step 2: reward 'text' at index 0: expected a number")
    assert "(rank 0, step 2, prompt '" in str(ended.value)


def test_what_is_carried_is_what_comes_out(whole: Training) -> None:
    """Every field of trajectories, through JSON and vectors; shared tensors stay shared, empty ones empty."""
    rollouts = list(whole.steps[1][1])
    long = Segment(
        kind="text",
        lead=torch.tensor([3, 4]),
        lead_image=torch.randn(2, 4, dtype=torch.bfloat16),
        tokens=torch.zeros(0, dtype=torch.long),
        logp=torch.zeros(0),
        logp_mixed=torch.zeros(0),
        entropy=torch.zeros(0),
        support=torch.zeros(0, 3, dtype=torch.int32),
        truncated=True,
    )
    segments = (*rollouts[0].segments, long)
    rollouts[0] = dataclasses.replace(rollouts[0], segments=segments, follow_up_text="\ud83d \N{SNOWMAN}", dropped=True)
    prompts = list({rollout.prompt.id: rollout.prompt for rollout in rollouts}.values())
    trainer = whole.trainer
    drawn = trainer._gatherer._draw([], 0).and_then(_drawn(rollouts, whole))
    told = RewardError("f", 2, "got nan")
    told.where = "step 3"
    message = carried(Gathered(drawn=drawn, prompts=prompts, broken=told, preview={"a": float("nan")}, staleness=1))
    back = gathered_of(message, prompts)
    assert_same_rollouts(back.drawn.rollouts, rollouts)
    assert back.drawn.rollouts[1].prompt_tokens is back.drawn.rollouts[0].prompt_tokens
    assert_same_fields(back.drawn.table, drawn.table, type(drawn.table))
    older = {name: value for name, value in message.about["table"].items() if name not in ("metrics", "extras")}
    assert gathered_of(Message({**message.about, "table": older}, message.tensors), prompts).drawn.table.extras == {}
    assert str(back.broken) == str(told) and back.staleness == 1 and repr(back.preview) == "{'a': nan}"
    with pytest.raises(ValueError, match="expected trajectories of the prompts"):
        gathered_of(message, prompts[::-1])
    cut = {name: vector[:5] for name, vector in message.tensors.items()}
    with pytest.raises(ValueError, match=r"expected \d+ numbers of"):
        gathered_of(Message(message.about, cut), prompts)


def test_ends_of_the_other_process(world: Path, rewards: RewardSet, tmp_path: Path) -> None:
    """Its end is said at once, and no checkpoint comes of it; its error is raised where the step is taken, and the
    checkpoint before is saved without it. Other data there are refused."""
    run = Training(config_of(**SMALL, **STALE), world, tmp_path, rewards).to(1, saving=True)
    ahead = run.trainer.ahead
    assert ahead is not None

    def fails(error: BaseException) -> Any:
        def receive() -> Message:
            raise error

        return receive

    answer = ahead.settled()
    assert answer is not None
    ahead._answer, ahead.process.receive = None, fails(RankFailed("gone"))  # type: ignore[method-assign]
    with pytest.raises(RankFailed):
        ahead.settled()
    ahead.process.receive = fails(OSError(28, "full"))  # type: ignore[method-assign]
    assert ahead.settled() is None
    with pytest.raises(OSError, match="full"):
        run.trainer.train_step()

    ahead._error, ahead._answer = None, Message({**answer.about, "prompts": ["x"]}, answer.tensors)
    with pytest.raises(DataError, match="expected the same prompts in both processes"):
        run.trainer.train_step()


def _drawn(rollouts: Sequence[Rollout], whole: Training) -> Any:
    from syncr1.engine.learn.refill import Drawn
    from syncr1.engine.rewards.scoring import RewardTable
    from syncr1.engine.rollout.sampling import RolloutStats

    names = whole.rewards.names
    table = RewardTable(values=torch.rand(len(rollouts), len(names)), names=names, errors={"text": "late"})
    said = [None, *({"words": [rollout.text]} for rollout in rollouts[1:])]
    table = dataclasses.replace(table, metrics={"acc": [0.5, 1.0]}, extras={"said": said})
    return Drawn(rollouts=rollouts, table=table, stats=RolloutStats(kv_bytes=3, seconds={"text": 0.5}))


def assert_same_rollouts(got: Sequence[Rollout], expected: Sequence[Rollout]) -> None:
    """Every field of every segment, to the last bit."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert_same_fields(one, other, Rollout, ("segments",))
        for segment, wanted in zip(one.segments, other.segments, strict=True):
            assert_same_fields(segment, wanted, Segment)


def assert_same_fields(one: Any, other: Any, record: type, without: Sequence[str] = ()) -> None:
    for field in dataclasses.fields(record):
        if field.name not in without:
            a, b = getattr(one, field.name), getattr(other, field.name)
            if isinstance(a, torch.Tensor):
                assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b), field.name
            else:
                assert a == b, field.name
