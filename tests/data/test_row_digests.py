"""Rows may be mended while a run is interrupted, as long as they were not used: both orders, and both stores of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from syncr1.engine.data.mixture import Mixture
from syncr1.engine.data.stream import PromptStream, Shuffled
from syncr1.engine.records import Prompt

Make = Callable[[Sequence[Prompt]], PromptStream]


def prompts(count: int = 12) -> list[Prompt]:
    return [
        Prompt(id=f"p{i}", task=("vqa", "rea")[i % 2], text=f"what is {i}?", answer="a", options=("a", "b"))
        for i in range(count)
    ]


def shuffled(some: Sequence[Prompt]) -> PromptStream:
    return PromptStream(Shuffled([(prompt,) for prompt in some], seed=1, prompts_per_step=2))


def mixed(some: Sequence[Prompt]) -> PromptStream:
    anchors = [replace(prompt, id=f"a{prompt.id}", task="general_vqa", rewarded=False) for prompt in prompts(4)]
    return PromptStream(Mixture(some, anchors, seed=1, prompts_per_step=4, anchor_fraction=0.25))


def mended(some: Sequence[Prompt], index: int, **changes: Any) -> list[Prompt]:
    return [replace(prompt, **changes) if i == index else prompt for i, prompt in enumerate(some)]


@pytest.mark.parametrize("make", [shuffled, mixed])
def test_rows_that_were_not_used_may_be_mended(make: Make) -> None:
    begun = make(prompts())
    used = {prompt.id for _ in range(2) for prompt in begun.next_step()}
    state = json.loads(json.dumps(begun.state_dict()))
    coming = [[prompt.id for prompt in begun.next_step()] for _ in range(9)]
    for index, prompt in enumerate(prompts()):
        changes: list[dict[str, Any]] = [{"text": "else"}, {"answer": "b"}, {"options": ("a", "c")}, {"target": "t"}]
        changes += [{"right_answers": ("a", "b")}, {"attributes": {"crown": "red"}}]
        for change in changes:
            other = make(mended(prompts(), index, **change))
            if prompt.id in used:
                with pytest.raises(ValueError, match=rf"PromptStream: {prompt.id} has been trained on and is another"):
                    other.load_state_dict(state)
            else:
                other.load_state_dict(state)
                assert [[p.id for p in other.next_step()] for _ in range(9)] == coming
    assert 0 < len(used & {prompt.id for prompt in prompts()}) < 12


@pytest.mark.parametrize("make", [shuffled, mixed])
def test_after_an_epoch_all_are_used_and_all_that_changed_are_counted(make: Make) -> None:
    begun = make(prompts())
    for _ in range(20):
        begun.next_step()
    other = make([replace(prompt, answer="b") for prompt in prompts()])
    with pytest.raises(ValueError, match=r"p0, p1, p2 and 9 more has been trained on"):
        other.load_state_dict(begun.state_dict())


@pytest.mark.parametrize("make", [shuffled, mixed])
def test_places_stay(make: Make) -> None:
    """A row more or less, others of that number, or another order of them."""
    state = make(prompts()).state_dict()
    some = prompts()
    for others in (prompts(13), some[1:], mended(some, 3, id="q"), [*some[2:], *some[:2]]):
        counted = rf"{state['rows']['count']} rows then, {state['rows']['count'] - 12 + len(others)} now"
        with pytest.raises(ValueError, match=rf"of other prompts \({counted}\)"):
            make(others).load_state_dict(state)
    with pytest.raises(ValueError, match=r"digests of 1\d rows"):
        make(some).load_state_dict(state | {"rows": state["rows"] | {"digests": "AAAA"}})


@pytest.mark.parametrize("make", [shuffled, mixed])
def test_a_state_from_before_fits_the_very_same_prompts(make: Make) -> None:
    begun = make(prompts())
    begun.next_step()
    older = {name: value for name, value in begun.state_dict().items() if name != "rows"}
    again = make(prompts())
    again.load_state_dict(older)
    assert [p.id for p in again.next_step()] == [p.id for p in begun.next_step()]
    with pytest.raises(ValueError, match="of other prompts; resume"):
        make(mended(prompts(), 0, text="else")).load_state_dict(older)
