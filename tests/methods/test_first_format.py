"""What versions before saved goes on, on the ranks and under the ZeRO stage that saved it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
from helpers import everything_partitioned, own_process_group, sharp_policy
from made import world_folder
from resume_cases import Training, assert_same, config_of

from syncr1.engine.checkpoints import sharded as checkpoint
from syncr1.engine.checkpoints.frozen_weights import fingerprint_of_format_1
from syncr1.engine.checkpoints.optimizer_state import masters_of, states_of
from syncr1.engine.checkpoints.sharded import verified
from syncr1.engine.data.prompts import load_training_prompts
from syncr1.engine.methods import resume
from syncr1.engine.methods.sync_r1_parts import build_reward_set

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    with own_process_group():
        from syncr1.engine.processes.group import init_distributed

        init_distributed()
        yield


@pytest.mark.parametrize("stage", [0, 3])
def test_a_checkpoint_of_the_first_format(stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masters and moments by number, as versions before wrote them: resumed to the last bit, and then saved by name."""
    config, world = config_of(max_steps=3, zero_stage=stage), world_folder()
    rewards = build_reward_set(config, sharp_policy(), load_training_prompts(world))
    with everything_partitioned():
        run = Training(config, world, tmp_path, rewards).to(1)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "FORMAT", 1)
            patch.setattr(resume, "optimizer_tensors", lambda optimizer, model: numbered_tensors(optimizer))
            run.checkpoints._frozen = fingerprint_of_format_1(run.learner.policy)
            run.checkpoints.save(run.trainer)
            run.checkpoints.wait()
        assert verified(tmp_path / "step_000001").format == 1
        resumed = Training(config, world, tmp_path, rewards).resume(1).to(2, saving=True)
        assert_same(resumed.to(3), run.to(3))
        assert verified(tmp_path / "step_000002").format == 2
        assert_same(Training(config, world, tmp_path, rewards).resume(2).to(3), run)


def numbered_tensors(optimizer: Any) -> dict[str, Any]:
    """What format 1 holds of an optimizer."""
    states, tensors = states_of(optimizer), dict[str, Any]()
    for index, master in enumerate(masters_of(optimizer)):
        tensors |= {f"{kind}.{index}": value for kind, value in {"master": master, **states[master]}.items()}
    return tensors
