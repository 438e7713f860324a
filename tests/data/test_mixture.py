"""Sync-R1's order: every task's share in each step, anchors among them, resumable anywhere on any number of ranks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from syncr1.engine.data.mixture import Mixture
from syncr1.engine.data.stream import PromptStream
from syncr1.engine.records import Prompt


def make(task: str, num_items: int, **fields: Any) -> list[Prompt]:
    return [Prompt(id=f"{task}/{i}", task=task, text=f"{task} {i}", answer="x", **fields) for i in range(num_items)]


MIXED = [*make("rea", 10), *make("vqa", 40), *make("rec", 7)]
ANCHORS = make("general_vqa", 9, rewarded=False)


def mixed(
    prompts: Sequence[Prompt] = MIXED,
    anchors: Sequence[Prompt] = (),
    seed: int = 0,
    prompts_per_step: int = 8,
    anchor_fraction: float = 0.25,
    rank: int = 0,
    world_size: int = 1,
) -> PromptStream:
    order = Mixture(prompts, anchors, seed=seed, prompts_per_step=prompts_per_step, anchor_fraction=anchor_fraction)
    return PromptStream(order, rank, world_size)


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


def test_a_step_has_its_share_of_anchors_and_no_prompt_twice() -> None:
    stream = mixed(MIXED, ANCHORS, 0, 16, 0.125)
    for _ in range(50):
        step = stream.next_step()
        assert len(step) == len(set(ids(step))) == 16
        assert sum(not p.rewarded for p in step) == 2


def test_modes_are_half_and_half() -> None:
    steps = [p.task for stream in [mixed(MIXED, (), 0, 8)] for _ in range(50) for p in stream.next_step()]
    assert Counter(steps) == {"rea": 200, "vqa": 100, "rec": 100}


def test_every_prompt_once_per_epoch_and_reshuffled() -> None:
    prompts = make("vqa", 12)
    stream = mixed(prompts, (), 0, 4)
    epochs = [[name for _ in range(3) for name in ids(stream.next_step())] for _ in range(3)]
    assert all(sorted(epoch) == sorted(ids(prompts)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_seed_decides() -> None:
    first, again, other = (mixed(MIXED, ANCHORS, seed, 8, 0.25) for seed in (0, 0, 1))
    steps = [[ids(stream.next_step()) for _ in range(10)] for stream in (first, again, other)]
    assert steps[0] == steps[1] != steps[2]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_out_the_same_step(world_size: int) -> None:
    whole = mixed(MIXED, ANCHORS, 3, 8, 0.25)
    ranks = [mixed(MIXED, ANCHORS, 3, 8, 0.25, rank, world_size) for rank in range(world_size)]
    for _ in range(12):
        parts = [stream.next_step() for stream in ranks]
        assert {len(part) for part in parts} == {8 // world_size}
        assert sorted(name for part in parts for name in ids(part)) == sorted(ids(whole.next_step()))


def test_resume_continues_where_it_was_even_on_other_ranks() -> None:
    stream = mixed(MIXED, ANCHORS, 5, 8, 0.25)
    for _ in range(23):
        stream.next_step()
    state = json.loads(json.dumps(stream.state_dict()))
    expected = [ids(stream.next_step()) for _ in range(20)]
    resumed = mixed(MIXED, ANCHORS, 5, 8, 0.25)
    resumed.load_state_dict(state)
    assert [ids(resumed.next_step()) for _ in range(20)] == expected
    half = mixed(MIXED, ANCHORS, 5, 8, 0.25, rank=1, world_size=2)
    half.load_state_dict(state)
    assert [ids(half.next_step()) for _ in range(20)] == [step[1::2] for step in expected]


def test_more_of_a_step_is_rewarded_and_new_to_it() -> None:
    """Until the step has all prompts; anchors are never drawn anew, and a resumed run draws the same."""
    stream, resumed = mixed(MIXED, ANCHORS), mixed(MIXED, ANCHORS)
    had = ids(stream.next_step())
    while (more := stream.more([7])) is not None:
        assert all(prompt.rewarded for prompt in more) and not set(ids(more)) & set(had)
        had += ids(more)
    assert len(had) == len(MIXED) + 2 and len(ids(stream.next_step())) == 8
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    ahead = [[*ids(s.next_step()), *ids(s.more([3]) or [])] for s in (stream, resumed) for _ in range(5)]
    assert ahead[:5] == ahead[5:] and len(ahead[0]) == 11


def test_a_state_that_an_earlier_version_wrote() -> None:
    """Runs of before resume where they were, with the prompts that they would have drawn."""
    state = {
        "prompts": {"drawn": {"rea": 72, "rec": 35, "vqa": 34}, "credit": {"rea": 0.0, "rec": -0.5, "vqa": 0.5}},
        "anchors": {"drawn": {"general_vqa": 46}, "credit": {"general_vqa": 0.0}},
        "fingerprint": "5b689d040485e460",
    }
    stream = mixed(MIXED, ANCHORS, 5, 8, 0.25)
    stream.load_state_dict(state)
    assert {name: value for name, value in stream.state_dict().items() if name != "rows"} == state
    assert " ".join(ids(stream.next_step())) == "rea/8 rea/0 vqa/32 rea/1 rec/4 vqa/39 general_vqa/8 general_vqa/2"
    assert " ".join(ids(stream.next_step())) == "rea/5 rea/4 rec/1 vqa/33 rea/9 rec/2 general_vqa/7 general_vqa/5"


def test_a_state_of_other_prompts_is_refused() -> None:
    state = mixed(MIXED, (), 0, 4).state_dict()
    with pytest.raises(ValueError, match="other prompts"):
        mixed(MIXED[1:], (), 0, 4).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "at most 0 prompts, got 8"),
        ({"prompts_per_step": 99}, "lower prompts_per_step"),
        ({"prompts_per_step": 7, "world_size": 2}, "multiple of the 2 ranks"),
        ({"rank": 2, "world_size": 2}, "multiple of the 2 ranks"),
        ({"anchors": ANCHORS, "prompts_per_step": 30, "anchor_fraction": 0.5}, "anchors"),
        ({"prompts": [*MIXED, MIXED[0]]}, "an id of its own"),
    ],
)
def test_numbers_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixed(**arguments)
