"""credit.py: what halves of a sample share, and what each token answers for."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from syncr1.engine.learn.credit import credited_rewards, shared_advantages, shared_within_samples
from syncr1.engine.records import Prompt, Rollout
from syncr1.engine.rewards.ensemble import RewardSet, combine
from syncr1.kernels.api import group_advantages

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
