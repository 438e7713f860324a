"""A small training that can be stopped and resumed anywhere; as a script, one rank of two that does so.

`resume_cases.py OUT` on two ranks is the worker of `test_resume.py`; `elastic_cases.py` has more of other ranks.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import torch
import torch.distributed as dist
from ahead_twin import twin_of
from helpers import everything_partitioned, same_bits, sharp_policy, state_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from syncr1.engine.checkpoints import sharded as checkpoint
from syncr1.engine.checkpoints.sharded import folders, save, verified
from syncr1.engine.data.prompts import load_anchors, load_training_prompts
from syncr1.engine.errors import CheckpointError
from syncr1.engine.learn.ahead_worker import Side
from syncr1.engine.learn.from_settings import objective_of, sampler_of, settings_of
from syncr1.engine.learn.learner import Learner
from syncr1.engine.learn.trainer import Trainer
from syncr1.engine.methods.resume import Checkpoints
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.methods.sync_r1_parts import build_reward_set, stream_of
from syncr1.engine.policies.base import Policy
from syncr1.engine.policies.lora import add_lora
from syncr1.engine.processes.group import init_distributed
from syncr1.engine.records import Rollout, StepMetrics
from syncr1.engine.rewards.ensemble import RewardSet
from syncr1.engine.rewards.preview_scorer import build_preview

TIMES = {"step_time", "tokens_per_second", "ahead/rollout_seconds", "ahead/reward_seconds"}


def config_of(**changes: Any) -> SyncR1Config:
    """Few prompts, so that a few steps are more than an epoch; a preview, so that its threshold moves."""
    small: dict[str, Any] = {
        "max_steps": 4,
        "prompts_per_step": 4,
        "num_generations": 4,
        "warmup_steps": 1,
        "learning_rate": 1e-3,
        "max_completion_length": 6,
        "anchor_fraction": 0.25,
        "beta": 0.02,
        "preview_fraction": 0.25,
    }
    return SyncR1Config(**(small | changes))


def kind_of(stage: int) -> dict[str, Any]:
    """What two ranks train under a ZeRO stage, beside plain Sync-R1: several updates, or all that comes before one."""
    corrected = {"importance_correction": "truncate", "top_entropy_quantile": 0.7, "refill": 2}
    return {2: {"num_iterations": 2}, 3: corrected}.get(stage, {})


def is_dull(prompt_id: str) -> bool:
    """Half of all prompts are."""
    return hashlib.blake2b(prompt_id.encode()).digest()[0] % 2 == 1


def uneven(rewards: RewardSet) -> RewardSet:
    """The same, but that dull prompts earn all members alike."""

    def of(function: Any) -> Any:
        def dulled(*, id: Sequence[str], **columns: Any) -> list[float | None]:
            values = function(id=id, **columns)
            return [0.5 if is_dull(i) and value is not None else value for i, value in zip(id, values, strict=True)]

        return dulled

    return replace(rewards, functions={name: of(function) for name, function in rewards.functions.items()})


class Training:
    """A trainer with everything real around it, and what it did; where groups are drawn anew, some have to be."""

    def __init__(
        self,
        config: SyncR1Config,
        world: Path,
        root: Path,
        rewards: RewardSet,
        *,
        policy: Policy | None = None,
        num_prompts: int = 9,
    ) -> None:
        self.rewards = rewards = uneven(rewards) if config.refill else rewards
        policy, ahead = sharp_policy() if policy is None else policy, None
        if config.lora_rank:
            add_lora(policy, config.lora_rank, config.lora_alpha, seed=config.seed)
        self.learner = Learner(
            policy, objective_of(config, policy.num_image_tokens, config.anchor_beta), settings_of(config)
        )
        rank, world_size = dist.get_rank(), dist.get_world_size()
        prompts, anchors = load_training_prompts(world)[:: 97 // num_prompts][:num_prompts], load_anchors(world)[:3]
        stream = stream_of(config, prompts, anchors, rank, world_size)
        self.steps: list[tuple[StepMetrics, Sequence[Rollout], Tensor]] = []
        preview = build_preview(config, rewards)
        if config.rollout_staleness:
            other = sharp_policy()
            if config.lora_rank:
                add_lora(other, config.lora_rank, config.lora_alpha, seed=config.seed)
            own = stream_of(config, prompts, anchors)
            side = Side(config=config, policy=other.eval(), prompts=own, rewards=rewards)
            ahead = twin_of(side, policy, stream, preview)
        self.trainer = Trainer(
            config,
            self.learner,
            sampler_of(config, policy),
            stream,
            rewards,
            preview,
            lambda *step: self.steps.append(step),
            ahead=ahead,
        )
        self.checkpoints = Checkpoints(config, root, self.learner, stream)

    def to(self, step: int, *, saving: bool = False) -> Training:
        """Trains to `step`, saving after each if asked for."""
        while self.trainer.step < step:
            self.trainer.train_step()
            if saving:
                self.checkpoints.save(self.trainer)
        self.checkpoints.wait()
        return self

    def resume(self, step: int) -> Training:
        self.checkpoints.restore(self.trainer, verified(self.checkpoints.root / f"step_{step:06d}"))
        return self

    def record(self) -> dict[int, Any]:
        """Step -> everything that was measured, every token that was sampled, every reward, to the last bit."""
        told = {}
        for metrics, rollouts, totals in self.steps:
            values = {name: value for name, value in metrics.values.items() if name not in TIMES}
            sampled = [(r.uid, r.text, [(s.tokens.tolist(), s.logp.tolist()) for s in r.segments]) for r in rollouts]
            told[metrics.step] = repr((values, sampled, totals.tolist()))
        return told

    def state(self) -> dict[str, Tensor]:
        return state_of(self.learner)


def of_all_ranks(training: Training) -> dict[str, Any]:
    """What all ranks sampled and were rewarded for, by step and trajectory, as JSON; collective."""
    own = {
        f"{metrics.step} {rollout.uid}": [rollout.text, [s.tokens.tolist() for s in rollout.segments], repr(total)]
        for metrics, rollouts, totals in training.steps
        for rollout, total in zip(rollouts, totals.tolist(), strict=True)
    }
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return {name: told for part in found for name, told in part.items()}


def leave(training: Training, path: Path) -> None:
    """What came of a training, for `differences`; collective."""
    told, weights = of_all_ranks(training), weights_of(training)
    if dist.get_rank() == 0:
        save_file(weights, path.with_suffix(".safetensors"))
        path.with_suffix(".json").write_text(json.dumps(told))


def weights_of(training: Training) -> dict[str, Tensor]:
    return {name: value for name, value in training.state().items() if not name.startswith("optimizer ")}


def differences(one: Path, other: Path) -> dict[str, float]:
    """Between two trainings that were left: of the steps in both, trajectories that are others, the largest difference
    of a reward, and of a weight after the last step."""
    told = [json.loads(path.with_suffix(".json").read_text()) for path in (one, other)]
    weights = [load_file(path.with_suffix(".safetensors")) for path in (one, other)]
    both = told[0].keys() & told[1].keys()
    rewards = [abs(float(told[0][name][2]) - float(told[1][name][2])) for name in both]
    return {
        "trajectories": len(both),
        "others": sum(told[0][name][:2] != told[1][name][:2] for name in both),
        "reward": max((r for r in rewards if not math.isnan(r)), default=math.nan),
        "weight": max(float((weights[0][n].float() - weights[1][n].float()).abs().max()) for n in weights[0]),
    }


def assert_same(resumed: Training, whole: Training) -> None:
    """The resumed training did what the whole one did after the cut, bit by bit."""
    got, expected = resumed.record(), whole.record()
    assert got and all(expected[step] == told for step, told in got.items()), sorted(got)
    assert same_bits(resumed.state(), whole.state())


class HeldDisk:
    """`os` on a disk that writes nothing until it is let go."""

    def __init__(self) -> None:
        self.go, self.asked = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return self._write if name == "write" else getattr(os, name)

    def _write(self, *arguments: Any) -> int:
        self.asked.set()
        assert self.go.wait(60)
        return os.write(*arguments)


def rewritten(folder: Path, change: Mapping[str, Any]) -> Path:
    """The checkpoint with entries of its state, or with tensors ("kind/…"), changed; None: left out."""
    before = verified(folder)
    state, tensors = dict(before.state()), before.tensors(0)
    for name, value in change.items():
        into: dict[str, Any] = tensors if "/" in name else state
        into.pop(name, None)
        if value is not None:
            into[name] = value
    shutil.rmtree(folder)
    return save(folder.parent, before.step, tensors, state)


class FullDisk:
    """`os` on a disk that is full."""

    def __getattr__(self, name: str) -> Any:
        def write(*_: Any) -> int:
            raise OSError(28, "No space left on device")

        return write if name == "write" else getattr(os, name)


def fails_together(training: Training) -> None:
    """One rank's disk is full: both get the same error, and what was there stays."""
    before = [path.name for path in folders(training.checkpoints.root)]
    training.trainer.step += 1
    real = checkpoint.os
    try:
        if dist.get_rank() == 1:
            checkpoint.os = FullDisk()  # type: ignore[assignment]
        training.checkpoints.save(training.trainer)
        training.checkpoints.wait()
    except CheckpointError as error:
        assert "rank 1" in str(error) and "rank 0" not in str(error) and "No space left" in str(error)
    else:
        raise AssertionError("a full disk was not noticed")
    finally:
        checkpoint.os = real
    dist.barrier()
    assert [path.name for path in folders(training.checkpoints.root)] == before
    assert not list(training.checkpoints.root.glob(".draft-*"))


def main(folder: Path) -> None:
    """Under ZeRO 0, 2 and 3: two steps at a stretch, and the second again from a checkpoint, under 3 with groups that
    are drawn anew; then what one rank has left in `one`, under ZeRO 3. More steps: `elastic_cases.py`, and the tests of
    one rank."""
    torch.set_num_threads(1)
    init_distributed()
    world = folder / "world"
    rewards = build_reward_set(config_of(), sharp_policy(), load_training_prompts(world))
    for stage in (0, 2, 3):
        config, root = config_of(zero_stage=stage, **kind_of(stage)), folder / f"zero_{stage}"
        whole = Training(config, world, root, rewards).to(1, saving=True).to(2)
        resumed = Training(config, world, root, rewards).resume(1).to(2)
        assert_same(resumed, whole)
        rounds = [step.values.get("refill/rounds", 0) for step, _, _ in whole.steps]
        assert sum(rounds) > 1 if config.refill else not any(rounds), rounds
        fails_together(resumed)
        leave(whole, folder / f"after_zero_{stage}")
    there = Training(config_of(zero_stage=3, num_iterations=2, max_steps=5), world, folder / "one", rewards)
    leave(there.resume(4).to(5), folder / "one_on_two")
    if dist.get_rank() == 0:
        (folder / "done.json").write_text(json.dumps({"ranks": dist.get_world_size()}))


if __name__ == "__main__":
    with everything_partitioned():
        main(Path(sys.argv[1]))
