"""What of the guided loss is refused before a start. Through the learner: tests/campaigns/test_guided_zero.py."""

from __future__ import annotations

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import text_models

from syncr1.engine.errors import ConfigError
from syncr1.engine.learn.from_settings import objective_of
from syncr1.engine.methods.dry_run import check_batch
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.settings.train_config import MaskedLogp, PolicyLogp


@pytest.mark.parametrize("how", ["guided", "guided_detached"])
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


@pytest.mark.parametrize(
    ("masked_logp", "masked_steps", "times"),
    [("committed", None, 1), ("committed", 2, 1), ("all", None, 5), ("all", 2, 5), ("random_mask", 3, 3)],
)
def test_the_longest_trajectory_has_every_state_of_its_image(
    masked_logp: MaskedLogp, masked_steps: int | None, times: int
) -> None:
    """dr_grpo divides by it: with masked_logp all a token counts in every step's state, chosen or not."""
    config = SyncR1Config(
        masked_logp=masked_logp, masked_steps=masked_steps, image_steps=5, loss_type="dr_grpo", max_completion_length=7
    )
    assert objective_of(config, 16).max_length == 7 + 16 * times
