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
from syncr1.engine.data.stream import SampleStream
from syncr1.engine.records import Prompt


def sample(name: str, halves: Sequence[str] = ("t2i", "mm2t"), text: str = "x") -> Sample:
    return tuple(Prompt(id=f"{name}/{half}", task=half, text=text, sample=name) for half in halves)


def samples(count: int) -> list[Sample]:
    """Every third has one half only."""
    return [sample(f"s{i}", ("t2i",) if i % 3 == 0 else ("t2i", "mm2t")) for i in range(count)]


def names(prompts: Sequence[Prompt]) -> list[str]:
    """Of the samples, each once, in order."""
    return list(dict.fromkeys(str(prompt.sample) for prompt in prompts))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 23), step=st.integers(1, 23), seed=st.integers(0, 99))
def test_epochs_are_whole_and_steps_have_no_repeats(count: int, step: int, seed: int) -> None:
    if step > count:
        step, count = count, step
    stream = SampleStream(samples(count), seed=seed, samples_per_step=step)
    drawn = []
    for number in range(1, 4 * count + 1):
        taken = names(stream.next_step())
        assert len(taken) == step == len(set(taken))
        assert stream.epoch == pytest.approx(number * step / count)
        drawn += taken
    epochs = [drawn[i : i + count] for i in range(0, len(drawn) - count + 1, count)]
    assert len(epochs) == 4 * step
    assert all(sorted(epoch) == sorted(f"s{i}" for i in range(count)) for epoch in epochs)


def test_epochs_differ_and_the_seed_decides() -> None:
    first, again, other = (SampleStream(samples(12), seed=seed, samples_per_step=4) for seed in (0, 0, 1))
    steps = [[names(stream.next_step()) for _ in range(9)] for stream in (first, again, other)]
    assert steps[0] == steps[1] != steps[2]
    assert len({tuple(chain(*steps[0][i : i + 3])) for i in (0, 3, 6)}) == 3


def test_samples_stay_whole() -> None:
    stream = SampleStream(samples(7), seed=3, samples_per_step=3)
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
    whole = SampleStream(samples(11), seed=5, samples_per_step=6)
    ranks = [
        SampleStream(samples(11), seed=5, samples_per_step=6, rank=rank, world_size=world_size)
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
    stream = SampleStream(samples(count), seed=1, samples_per_step=size)
    for _ in range(steps):
        stream.next_step()
    state = json.loads(json.dumps(stream.state_dict()))
    expected = [names(stream.next_step()) for _ in range(12)]
    resumed = SampleStream(samples(count), seed=1, samples_per_step=size)
    resumed.load_state_dict(state)
    assert [names(resumed.next_step()) for _ in range(12)] == expected
    half = SampleStream(samples(count), seed=1, samples_per_step=size, rank=1, world_size=2)
    half.load_state_dict(state)
    assert [names(half.next_step()) for _ in range(12)] == [step[1::2] for step in expected]


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
    state = SampleStream(samples(6), seed=0, samples_per_step=2).state_dict()
    with pytest.raises(ValueError, match="other data"):
        SampleStream(other, seed=0, samples_per_step=2).load_state_dict(state)


def test_a_state_of_other_numbers_is_refused() -> None:
    state = SampleStream(samples(6), seed=0, samples_per_step=2).state_dict()
    with pytest.raises(ValueError, match="resume with 2"):
        SampleStream(samples(6), seed=0, samples_per_step=3).load_state_dict(state)
    with pytest.raises(ValueError, match="seed 0, this run 1"):
        SampleStream(samples(6), seed=1, samples_per_step=2).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples_per_step": 9}, "lower samples_per_step"),
        ({"samples_per_step": 0}, "multiple of the 1 ranks"),
        ({"samples_per_step": 3, "world_size": 2}, "take 4"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
        ({"samples": [*samples(4), sample("s1")]}, "2 ids are not unique"),
    ],
)
def test_numbers_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleStream(**{"samples": samples(8), "seed": 0, "samples_per_step": 4} | arguments)
