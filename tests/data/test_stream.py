"""The stream of samples: every epoch whole, every step without repeats, resumable anywhere on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncr1.engine.data.samples import Sample
from syncr1.engine.data.stream import PromptStream, Shuffled
from syncr1.engine.records import Prompt


def sample(name: str, halves: Sequence[str] = ("t2i", "mm2t"), text: str = "x") -> Sample:
    return tuple(Prompt(id=f"{name}/{half}", task=half, text=text, sample=name) for half in halves)


def samples(count: int) -> list[Sample]:
    """Every third has one half only."""
    return [sample(f"s{i}", ("t2i",) if i % 3 == 0 else ("t2i", "mm2t")) for i in range(count)]


def shuffled(
    items: list[Sample], *, seed: int, prompts_per_step: int, rank: int = 0, world_size: int = 1
) -> PromptStream:
    return PromptStream(Shuffled(items, seed=seed, prompts_per_step=prompts_per_step), rank, world_size)


def names(prompts: Sequence[Prompt]) -> list[str]:
    """Of the samples, each once, in order."""
    return list(dict.fromkeys(str(prompt.sample) for prompt in prompts))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 23), step=st.integers(1, 23), seed=st.integers(0, 99))
def test_epochs_are_whole_and_steps_have_no_repeats(count: int, step: int, seed: int) -> None:
    if step > count:
        step, count = count, step
    stream = shuffled(samples(count), seed=seed, prompts_per_step=step)
    drawn = []
    for _ in range(4 * count):
        taken = names(stream.next_step())
        assert len(taken) == step == len(set(taken))
        drawn += taken
    epochs = [drawn[i : i + count] for i in range(0, len(drawn) - count + 1, count)]
    assert len(epochs) == 4 * step
    assert all(sorted(epoch) == sorted(f"s{i}" for i in range(count)) for epoch in epochs)


def test_epochs_differ_and_the_seed_decides() -> None:
    first, again, other = (shuffled(samples(12), seed=seed, prompts_per_step=4) for seed in (0, 0, 1))
    steps = [[names(stream.next_step()) for _ in range(9)] for stream in (first, again, other)]
    assert steps[0] == steps[1] != steps[2]
    assert len({tuple(chain(*steps[0][i : i + 3])) for i in (0, 3, 6)}) == 3


def test_samples_stay_whole() -> None:
    stream = shuffled(samples(7), seed=3, prompts_per_step=3)
    halves = {prompt.id for item in samples(7) for prompt in item}
    for _ in range(9):
        prompts = stream.next_step()
        wanted = {name for name in halves if name.split("/")[0] in names(prompts)}
        assert {prompt.id for prompt in prompts} == wanted
        assert [prompt.sample for prompt in prompts] == sorted(
            [str(prompt.sample) for prompt in prompts], key=names(prompts).index
        ), "the halves of a sample are neighbours"


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_out_the_same_step(world_size: int) -> None:
    whole = shuffled(samples(11), seed=5, prompts_per_step=6)
    ranks = [
        shuffled(samples(11), seed=5, prompts_per_step=6, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for _ in range(8):
        parts = [names(stream.next_step()) for stream in ranks]
        assert {len(part) for part in parts} == {6 // world_size}
        assert sorted(chain(*parts)) == sorted(names(whole.next_step()))


@settings(max_examples=40, deadline=None)
@given(count=st.integers(2, 15), steps=st.integers(0, 40))
def test_resume_continues_anywhere_even_on_other_ranks(count: int, steps: int) -> None:
    """Steps of 4 over e.g. 5 samples: most of them go over an epoch's end."""
    size = min(4, count) // 2 * 2
    stream = shuffled(samples(count), seed=1, prompts_per_step=size)
    for _ in range(steps):
        stream.next_step()
    state = json.loads(json.dumps(stream.state_dict()))
    expected = [names(stream.next_step()) for _ in range(12)]
    resumed = shuffled(samples(count), seed=1, prompts_per_step=size)
    resumed.load_state_dict(state)
    assert [names(resumed.next_step()) for _ in range(12)] == expected
    half = shuffled(samples(count), seed=1, prompts_per_step=size, rank=1, world_size=2)
    half.load_state_dict(state)
    assert [names(half.next_step()) for _ in range(12)] == [step[1::2] for step in expected]


@settings(max_examples=40, deadline=None)
@given(count=st.integers(4, 15), steps=st.integers(0, 12), seed=st.integers(0, 9), data=st.data())
def test_more_of_a_step(count: int, steps: int, seed: int, data: st.DataObject) -> None:
    """What a step gets in addition is new to it, is dealt out to the ranks that want it, ends where all samples are in
    the step, and is part of the state; on no rank differently."""
    ranks = [shuffled(samples(count), seed=seed, prompts_per_step=4, rank=rank, world_size=2) for rank in (0, 1)]
    alone = shuffled(samples(count), seed=seed, prompts_per_step=4)
    for _ in range(steps + 1):
        wanted = [data.draw(st.integers(0, 3)) for _ in ranks]
        had = names(alone.next_step())
        assert {*names(ranks[0].next_step()), *names(ranks[1].next_step())} == set(had)
        for _ in range(2):
            first, second, whole = ranks[0].more(wanted), ranks[1].more(wanted), alone.more([sum(wanted)])
            if whole is None:
                assert first is None and second is None and (not any(wanted) or len(had) == count)
                continue
            assert first is not None and second is not None
            got = names(whole)
            assert len(got) == len(set(got)) == min(sum(wanted), count - len(had)) and not set(got) & set(had)
            assert sorted(names(first) + names(second)) == sorted(got)
            shares = len(names(first)), len(names(second))
            assert shares == tuple(wanted) or (len(got) < sum(wanted) and all(map(int.__le__, shares, wanted)))
            had += got
    state = json.loads(json.dumps(alone.state_dict()))
    resumed = shuffled(samples(count), seed=seed, prompts_per_step=4)
    resumed.load_state_dict(state)
    ahead = [(names(s.next_step()), names(s.more([2]) or [])) for s in (alone, resumed) for _ in range(6)]
    assert ahead[:6] == ahead[6:]


def test_a_state_that_an_earlier_version_wrote() -> None:
    """Runs of before resume where they were, with the samples that they would have drawn."""
    place = {"epoch": 2, "drawn": 2, "carried": [3, 2], "samples_per_step": 4, "seed": 1}
    state = {**place, "fingerprint": "6a4fe9e4c9cd9d13"}
    stream = shuffled(samples(5), seed=1, prompts_per_step=4)
    stream.load_state_dict(state)
    assert {name: value for name, value in stream.state_dict().items() if name != "rows"} == state
    steps = [" ".join(names(stream.next_step())) for _ in range(3)]
    assert steps == ["s2 s3 s4 s0", "s1 s2 s4 s3", "s4 s2 s0 s1"]


@pytest.mark.parametrize(
    "other",
    [
        samples(5),
        [*samples(5), sample("s5", ("t2i",))],
        [*samples(5), sample("s5", text="y")],
        [sample("other"), *samples(6)[1:]],
    ],
)
def test_a_state_of_other_data_is_refused(other: list[Sample]) -> None:
    stream = shuffled(samples(6), seed=0, prompts_per_step=2)
    steps = [stream.next_step() for _ in range(3)]
    assert len(steps) == 3, "all are used"
    state = stream.state_dict()
    with pytest.raises(ValueError, match=r"other prompts|s5/t2i and s5/mm2t has been trained on"):
        shuffled(other, seed=0, prompts_per_step=2).load_state_dict(state)


def test_a_state_of_other_numbers_is_refused() -> None:
    state = shuffled(samples(6), seed=0, prompts_per_step=2).state_dict()
    with pytest.raises(ValueError, match="resume with 2"):
        shuffled(samples(6), seed=0, prompts_per_step=3).load_state_dict(state)
    with pytest.raises(ValueError, match="seed 0, this run 1"):
        shuffled(samples(6), seed=1, prompts_per_step=2).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts_per_step": 9}, "at most 8, .* got 9"),
        ({"prompts_per_step": 0}, "multiple of the 1 ranks"),
        ({"prompts_per_step": 3, "world_size": 2}, "take 4"),
        ({"rank": 2, "world_size": 2}, "multiple of the 2 ranks"),
        ({"items": [*samples(4), sample("s1")]}, "got 's1.*' twice"),
    ],
)
def test_numbers_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shuffled(**{"items": samples(8), "seed": 0, "prompts_per_step": 4} | arguments)
