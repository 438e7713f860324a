"""The guided loss through the learner: ZeRO-3, adapters, recomputed activations, and what is refused before a start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import text_models
from guided_ranks import GUIDED, after_two_updates, batches_of, far_apart
from helpers import own_process_group

from syncr1.engine.errors import ConfigError
from syncr1.engine.learn.from_settings import objective_of
from syncr1.engine.methods.dry_run import check_batch
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.settings.train_config import PolicyLogp


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    with own_process_group():
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_zero_3_with_adapters_learns_the_same(tmp_path: Path) -> None:
    """Two passes through modules whose weights are gathered and split; the reference is the policy without its
    adapters, its free branch too: a KL of 0 at first. Other stages: tests/campaigns/test_guided_zero.py."""
    batches = batches_of(tmp_path)[1:2]
    plain, (first, second) = after_two_updates("guided_detached", 0, batches, lora=True)
    split, told = after_two_updates("guided_detached", 3, batches, lora=True, checkpointed=True)
    assert first["rollout/replay_logp_max_abs"] <= 1e-4 and first["kl/image"] <= 1e-7 < second["kl/image"]
    assert far_apart(split, plain) <= 1e-4
    for mine, theirs in zip(told, (first, second), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("how", GUIDED)
def test_a_model_that_draws_nothing_has_no_free_branch(how: PolicyLogp) -> None:
    config = SyncR1Config(policy_logp=how, cfg_weight=5.0)
    for refuse in (
        lambda: objective_of(config, 0),
        lambda: check_batch(config, text_models.policy("qwen3"), []),
    ):
        with pytest.raises(ConfigError, match=f"policy_logp: expected conditional .* got {how} with cfg_weight 5"):
            refuse()
    assert objective_of(config, 16).policy_logp == how
    for allowed in (SyncR1Config(policy_logp=how, cfg_weight=1.0), SyncR1Config(cfg_weight=5.0)):
        assert objective_of(allowed, 0).policy_logp == allowed.policy_logp
