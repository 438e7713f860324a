"""credit.py: what halves of a sample share, what each token answers for, and the plan that comes of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from syncr1.engine.learn.credit import (
    Credit,
    StepPlan,
    credited_rewards,
    plan_of,
    shared_advantages,
    shared_within_samples,
)
from syncr1.engine.records import Prompt, Rollout
from syncr1.engine.rewards.ensemble import RewardSet, combine
from syncr1.engine.settings.train_config import TrainConfig
from syncr1.kernels.api import dgs_select, group_advantages

NAN = math.nan
REWARDS = RewardSet(
    functions=dict.fromkeys(("cycle", "tim", "accuracy", "format"), lambda **_: []),
    weights=(1.0, 1.0, 0.8, 0.8),
    kinds=("image", "image", "text", "text"),
)


def rollouts_of(num_samples: int, group: int, paired: bool = True) -> list[Rollout]:
    """Per sample the drawings of its group, then the answers."""
    made = []
    for sample in range(num_samples):
        for kind in ("image", "text"):
            prompt = Prompt(
                id=f"{sample}/{kind}", task=kind, text="x", segments=(kind,), sample=f"{sample}" if paired else None
            )
            made += [
                Rollout(prompt=prompt, member=m, prompt_tokens=torch.zeros(0), prompt_image=None, segments=())
                for m in range(group)
            ]
    return made


def halves(num_samples: int, group: int, seed: int) -> torch.Tensor:
    values = torch.rand(num_samples, 2, group, 4, generator=torch.Generator().manual_seed(seed))
    values[:, 0, :, 2:] = NAN
    values[:, 1, :, :2] = NAN
    return values.view(-1, 4)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_both_halves_of_a_pair_answer_for_the_papers_sum(num_samples: int, group: int, seed: int) -> None:
    values = halves(num_samples, group, seed)
    credit = credited_rewards(values, rollouts_of(num_samples, group), REWARDS, "shared")
    by_half = values.view(num_samples, 2, group, 4)
    drawn, said = by_half[:, 0, :, :2], by_half[:, 1, :, 2:]
    expected = drawn.sum(-1) + 0.8 * said.sum(-1)  # R_cycle + R_TIM + lambda (R_acc + R_format)
    for half in range(2):
        for column in range(2):
            got = credit.tokens_S2.view(num_samples, 2, group, 2)[:, half, :, column]
            torch.testing.assert_close(got, expected)
        torch.testing.assert_close(credit.total_S.view(num_samples, 2, group)[:, half], expected)


def test_prompts_without_a_sample_keep_their_own_rewards() -> None:
    values = halves(2, 3, 0)
    assert torch.equal(
        shared_within_samples(values, rollouts_of(2, 3, paired=False)).nan_to_num(-1), values.nan_to_num(-1)
    )


def test_a_pair_that_lacks_a_reward_is_left_out_whole() -> None:
    values = halves(1, 3, 0)
    values[1, 0] = NAN  # the second drawing has no cycle reward
    shared = shared_within_samples(values, rollouts_of(1, 3))
    assert shared[[1, 4]].isnan().all() and not shared[[0, 2, 3, 5]].isnan().any()


def test_a_reward_that_nobody_has_leaves_the_others() -> None:
    values = halves(1, 2, 0)
    values[:, 3] = NAN
    shared = shared_within_samples(values, rollouts_of(1, 2))
    assert shared[:, 3].isnan().all() and not shared[:, :3].isnan().any()


def test_one_advantage_is_the_sum_of_both_halves() -> None:
    group = 4
    values, rollouts = halves(2, group, 3), rollouts_of(2, group)
    credit = shared_advantages(values, rollouts, REWARDS, "group", 0.8)
    totals = combine(values, REWARDS.weight_tensor())
    own = group_advantages(totals, torch.arange(0, 17, group, dtype=torch.int32)).view(2, 2, group)
    expected = own[:, 0] + 0.8 * own[:, 1]
    got = credit.tokens_S2.view(2, 2, group, 2)
    torch.testing.assert_close(got, expected[:, None, :, None].expand(2, 2, group, 2))
    assert torch.equal(credit.total_S, credited_rewards(values, rollouts, REWARDS, "shared").total_S), "as reported"


def test_advantages_of_a_missing_half_are_left_out() -> None:
    values, rollouts = halves(1, 3, 1), rollouts_of(1, 3)
    values[5] = NAN
    got = shared_advantages(values, rollouts, REWARDS, "group", 0.8).tokens_S2
    assert got[[2, 5]].isnan().all() and got[[0, 1, 3, 4]].isfinite().all()


# The step's plan ------------------------------------------------------------------------------------------------------


def plan(earnings: Credit, rollouts: list[Rollout], ranks: int = 1, anchors: bool = True, **changes: Any) -> StepPlan:
    """`ranks`: as many that earned the same."""
    return plan_of(
        earnings,
        rollouts,
        TrainConfig(num_generations=4, **changes),
        step=0,
        holds_anchors=anchors,
        sum_over_ranks=lambda values: values * ranks,
    )


def earned(*rewards: float) -> Credit:
    values = torch.tensor(rewards)
    return Credit(total_S=values, tokens_S2=values[:, None].expand(-1, 2).contiguous())


def members(count: int, **changes: Any) -> list[Rollout]:
    return [replace(rollout, **changes) for rollout in rollouts_of(1, count)[:count]]


def test_the_plan_is_both_ops_on_the_credit() -> None:
    credit, rollouts = earned(0.0, 1.0, 0.5, 0.5, 0.2, 0.2, 0.2, 0.2), members(8)
    made = plan(credit, rollouts, dgs="variance_mass", dgs_mass=0.6)
    offsets = torch.tensor([0, 4, 8])
    expected = group_advantages(credit.total_S, offsets)
    assert torch.equal(made.advantages_S2, expected[:, None].expand(8, 2)) and not made.advantages_S2[4:].any()
    assert torch.equal(made.keep_S, dgs_select(credit.total_S, offsets, mass=0.6))
    assert made.keep_S.tolist() == [True, True] + [False] * 6


def test_each_modality_has_the_advantage_of_its_own_credit() -> None:
    tokens = torch.stack([torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.3, 0.1, 0.2, NAN])], 1)
    made = plan(Credit(total_S=tokens[:, 0], tokens_S2=tokens), members(4), credit="per_segment", dgs="none")
    offsets = torch.tensor([0, 4])
    for column in range(2):
        assert torch.equal(made.advantages_S2[:, column], group_advantages(tokens[:, column].contiguous(), offsets))
    assert made.advantages_S2[3, 1] == 0 and made.keep_S.all()


def test_the_batch_is_that_of_all_ranks() -> None:
    """As one call over both ranks' rewards, up to rounding."""
    credit = earned(0.0, 1.0, 0.5, 0.5, 0.2, 0.9, 0.2, 0.2)
    made = plan(credit, members(8), ranks=2, scale_rewards="batch", dgs="none")
    both = group_advantages(credit.total_S.repeat(2), torch.arange(0, 17, 4), scale="batch")
    torch.testing.assert_close(made.advantages_S2[:, 0], both[:8])


def test_credit_that_is_an_advantage_is_divided_no_more() -> None:
    credit = replace(earned(-0.5, 0.5, 0.0, 0.0), scale="none")
    torch.testing.assert_close(plan(credit, members(4)).advantages_S2[:, 0], credit.total_S)
    assert float(plan(earned(-0.5, 0.5, 0.0, 0.0), members(4)).advantages_S2.max()) > 1


def test_anchors_and_what_was_dropped() -> None:
    nothing, rewarded = earned(*[NAN] * 4), earned(0.0, 1.0, 0.2, NAN)
    anchors = [replace(r, prompt=replace(r.prompt, rewarded=False)) for r in members(4)]
    assert plan(nothing, anchors).keep_S.all() and not plan(nothing, anchors).advantages_S2.any()
    assert not plan(nothing, anchors, anchors=False).keep_S.any()
    dropped = [*members(2), *members(2, dropped=True)]
    assert plan(rewarded, dropped, dgs="none").keep_S.tolist() == [True, True, False, False]
