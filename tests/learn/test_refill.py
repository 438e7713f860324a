"""refill.py: what teaches nothing is drawn anew, from the source and in step with other ranks; the rest stays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from helpers import own_process_group, sharp_policy
from made import world_folder
from resume_cases import Training, config_of, is_dull, uneven
from torch import Tensor

from syncr1.engine.data.mixture import Mixture
from syncr1.engine.data.prompts import load_training_prompts
from syncr1.engine.data.stream import PromptStream, Shuffled
from syncr1.engine.learn.credit import shared_within_samples
from syncr1.engine.learn.metrics import COUNT
from syncr1.engine.learn.refill import Drawn, Waste, refilled, rows_by_sample, teaches_nothing
from syncr1.engine.methods.sync_r1_parts import build_reward_set
from syncr1.engine.records import Prompt, Rollout, Segment
from syncr1.engine.rewards.scoring import RewardTable
from syncr1.engine.rollout.sampling import RolloutStats

NAN = math.nan
GROUP = 2
Judge = Callable[[Prompt, int], float]
"""The reward of a prompt's member."""


def drawn_by(judge: Judge) -> Callable[[Sequence[Prompt]], Drawn]:
    """Trajectories of three tokens, two of each prompt."""
    segment = Segment(
        kind="text", tokens=torch.arange(3), logp=torch.zeros(3), logp_mixed=torch.zeros(3), entropy=torch.zeros(3)
    )

    def draw(prompts: Sequence[Prompt]) -> Drawn:
        rollouts = [
            Rollout(prompt=p, member=member, prompt_tokens=torch.arange(2), prompt_image=None, segments=(segment,))
            for p in prompts
            for member in range(GROUP)
        ]
        values = torch.tensor([[judge(r.prompt, r.member) if r.prompt.rewarded else NAN] for r in rollouts])
        table = RewardTable(values=values.view(-1, 1), names=("a",), failures={"a": 1}, errors={})
        return Drawn(rollouts=rollouts, table=table, stats=RolloutStats(text_tokens=3 * len(rollouts)))

    return draw


def shared_credit(drawn: Drawn) -> tuple[Tensor, Tensor]:
    total_S = shared_within_samples(drawn.table.values, drawn.rollouts)[:, 0]
    return total_S, total_S[:, None].expand(-1, 2)


def refill(
    stream: PromptStream, judge: Judge, rounds: int, wanted_by_ranks: Callable[[int], list[int]] = lambda own: [own]
) -> tuple[Drawn, Waste]:
    draw = drawn_by(judge)
    return refilled(
        draw(stream.next_step()),
        rounds,
        credit=shared_credit,
        wanted_by_ranks=wanted_by_ranks,
        more=stream.more,
        draw=draw,
        num_generations=GROUP,
    )


def ids(drawn: Drawn) -> list[str]:
    return list(dict.fromkeys(rollout.prompt.id for rollout in drawn.rollouts))


PROMPTS = [Prompt(id=f"rea/{i}", task="rea", text=f"{i}") for i in range(12)]
ANCHORS = [Prompt(id="general_vqa/0", task="general_vqa", text="?", rewarded=False)]


def stream() -> PromptStream:
    return PromptStream(Mixture(PROMPTS, ANCHORS, seed=0, prompts_per_step=5, anchor_fraction=0.2))


def even_is_flat(prompt: Prompt, member: int) -> float:
    return 0.5 if int(prompt.text) % 2 == 0 else float(member)


def test_flat_groups_are_replaced_until_all_vary() -> None:
    """Anchors, and groups that vary, stay as they were; the bill says what was given up for it."""
    first = ids(drawn_by(even_is_flat)(stream().next_step()))
    drawn, waste = refill(stream(), even_is_flat, 20)
    assert len(ids(drawn)) == 5 and len(drawn.rollouts) == drawn.table.values.shape[0] == 5 * GROUP
    stayed = [name for name in first if name.startswith("general") or int(name[4:]) % 2]
    assert ids(drawn)[: len(stayed)] == stayed and 0 < len(stayed) < 5
    assert all(int(name[4:]) % 2 for name in ids(drawn) if name.startswith("rea"))
    assert waste.rounds >= 2 and waste.groups >= 5 - len(stayed)
    assert drawn.stats.text_tokens == 3 * GROUP * (5 + waste.groups) and waste.tokens == 3 * GROUP * waste.groups
    assert drawn.table.failures == {"a": 1 + waste.rounds}
    told = waste.metrics(shared_credit(drawn)[0], 30)
    assert told["refill/groups_discarded"] == waste.groups and told["refill/rounds"] == waste.rounds
    assert told["refill/tokens_wasted_fraction"] == pytest.approx(6 * waste.groups / (30 + 6 * waste.groups))
    assert told["refill/reward_of_all"] == 0.5, "flat ones earn .5, the others 0 and 1"
    assert told[f"{COUNT}refill/reward_of_all"] == GROUP * (4 + waste.groups)


def test_the_cap_and_the_end_of_the_source() -> None:
    """What is without variance then is trained as it always is."""
    drawn, waste = refill(stream(), lambda prompt, member: 0.25, 2)
    assert (waste.rounds, waste.groups, len(ids(drawn))) == (2, 8, 5)
    drawn, waste = refill(stream(), lambda prompt, member: 0.25, 99)
    assert (waste.rounds, waste.groups, len(ids(drawn))) == (2, 8, 5), "twelve prompts, four at a time"
    few = PromptStream(Mixture(PROMPTS[:7], seed=0, prompts_per_step=5))
    drawn, waste = refill(few, lambda prompt, member: 0.25, 99)
    assert (waste.rounds, waste.groups, len(ids(drawn))) == (1, 2, 5), "two are left for five"


def test_what_is_unknown_or_varies_stays() -> None:
    """A reward that failed says nothing of its group; one more round would not mend a server."""
    assert refill(stream(), lambda prompt, member: NAN, 3)[1].rounds == 0
    assert refill(stream(), lambda prompt, member: float(member), 3)[1].rounds == 0
    rows = torch.tensor([[0.3, NAN], [0.3, NAN], [NAN, NAN], [NAN, NAN]])
    assert teaches_nothing(rows[:2], 2) and teaches_nothing(rows, 2) and not teaches_nothing(rows[2:], 2)
    assert not teaches_nothing(torch.tensor([[0.3, 0.0], [0.3, 0.1]]), 2), "credit per segment: images vary"
    assert not teaches_nothing(torch.tensor([[0.3, 0.3], [NAN, NAN]]), 2), "one of two is known: the other failed"
    noise = torch.tensor([0.3, math.nextafter(0.3, 1)], dtype=torch.float64)[:, None].expand(-1, 2)
    assert teaches_nothing(noise, 2), "rounding is no variance"


def test_a_sample_of_two_halves_goes_as_a_whole() -> None:
    """CoRL's drawing and answer share their rewards: the pair varies when either half does."""
    pairs = [
        tuple(Prompt(id=f"{i}/{half}", task=half, text=f"{i}", sample=f"{i}") for half in ("t2i", "mm2t"))
        for i in range(9)
    ]

    def judge(prompt: Prompt, member: int) -> float:
        varies = prompt.task == "t2i" and int(prompt.text) % 3 == 0
        return float(member) if varies else 0.5

    drawn, waste = refill(PromptStream(Shuffled(pairs, seed=1, prompts_per_step=3)), judge, 9)
    assert ids(drawn) and waste.groups % 2 == 0
    assert sorted(ids(drawn)) == sorted(f"{i}/{half}" for i in (0, 3, 6) for half in ("t2i", "mm2t"))
    assert [len(rows) for rows in rows_by_sample(drawn.rollouts)] == [2 * GROUP] * 3


def test_ranks_take_part_in_the_same_rounds() -> None:
    """A rank that has enough draws nothing in a round, and is there; together they have what one rank would have."""
    streams = [PromptStream(Mixture(PROMPTS, seed=0, prompts_per_step=4), rank, 2) for rank in (0, 1)]
    whole = PromptStream(Mixture(PROMPTS, seed=0, prompts_per_step=4))
    one, _ = refill(whole, even_is_flat, 5)
    steps = [drawn_by(even_is_flat)(each.next_step()) for each in streams]
    rounds = [0, 0]
    for _ in range(5):
        idle = [
            [rows for rows in rows_by_sample(d.rollouts) if teaches_nothing(shared_credit(d)[1][rows], GROUP)]
            for d in steps
        ]
        wanted = [len(rows) for rows in idle]
        if not any(wanted):
            break
        for rank, each in enumerate(streams):
            # One round of this rank, told what both want.
            steps[rank], waste = refilled(
                steps[rank],
                1,
                credit=shared_credit,
                wanted_by_ranks=lambda own, told=tuple(wanted): list(told),
                more=each.more,
                draw=drawn_by(even_is_flat),
                num_generations=GROUP,
            )
            rounds[rank] += waste.rounds
    assert rounds[0] == rounds[1] > 0
    assert sorted(ids(steps[0]) + ids(steps[1])) == sorted(ids(one))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_training_that_draws_anew(tmp_path: Path) -> None:
    """With a preview and two updates: the same in every run, as many trajectories as without, and the bill. Of the
    prompts that seed 1 begins with two are dull."""
    world, changes = world_folder(), dict[str, Any](max_steps=1, num_iterations=2, seed=1)
    with own_process_group():
        rewards = uneven(build_reward_set(config_of(), sharp_policy(), load_training_prompts(world)))
        runs = [
            Training(config_of(refill=rounds, **changes), world, tmp_path / name, rewards, num_prompts=24).to(1)
            for name, rounds in (("first", 4), ("second", 4), ("without", 0))
        ]
    first, second, without = runs
    assert first.record() == second.record() != without.record()
    for metrics, rollouts, totals in first.steps:
        values = metrics.values
        assert len({rollout.prompt.id for rollout in rollouts}) == 4 and len(rollouts) == len(totals) == 16
        assert sum(not rollout.prompt.rewarded for rollout in rollouts) == 4, "the anchor"
        dull = [rollout.prompt.id for rollout in rollouts if rollout.prompt.rewarded and is_dull(rollout.prompt.id)]
        assert not dull or values["refill/rounds"] == 4
        kept = sum(segment.tokens.numel() for rollout in rollouts for segment in rollout.segments)
        wasted = values["num_tokens"] - kept
        assert values["refill/tokens_wasted_fraction"] == pytest.approx(wasted / values["num_tokens"])
    assert sum(step.values["refill/groups_discarded"] for step, _, _ in first.steps) > 0
    assert any(step.values["frac_reward_zero_std"] > 0 for step, _, _ in without.steps)
    assert "refill/rounds" not in without.steps[0][0].values
