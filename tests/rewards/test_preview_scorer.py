"""preview_scorer.py: which rewards judge a partly drawn image, what they are shown, and what they say together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from syncr1.engine.records import Prompt
from syncr1.engine.rewards.ensemble import RewardSet
from syncr1.engine.rewards.preview_scorer import build_preview
from syncr1.engine.rollout.preview_gate import PreviewGate
from syncr1.engine.settings.train_config import TrainConfig

PROMPTS = [
    Prompt(id="a", task="gen", text="draw a", segments=("image",), extra={"style": "oil"}),
    Prompt(id="a", task="gen", text="draw a", segments=("image",), extra={"style": "oil"}),
    Prompt(id="anchor", task="gen", text="draw b", segments=("image",), rewarded=False, extra={"hidden": 1}),
    Prompt(id="c", task="gen", text="draw c", segments=("image",)),
]
TEXTS = ["it is red", "it is blue", "anchored", ""]
IMAGES = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2) / 4


class Watching:
    """A reward of the pictures' brightness that remembers what it was shown; `lacks` has none for some texts."""

    def __init__(self, lacks: str | None = None) -> None:
        self.lacks = lacks
        self.shown: list[dict[str, list[Any]]] = []

    def __call__(self, **columns: Any) -> list[float | None]:
        self.shown.append(columns)
        texts, images = columns["completions"], columns["images"]
        return [None if text == self.lacks else float(image.mean()) for text, image in zip(texts, images, strict=True)]


def gate_of(light: Watching, other: Watching, words: Watching, **changes: Any) -> PreviewGate | None:
    rewards = RewardSet(
        functions={"light": light, "other": other, "words": words},
        weights=(0.3, 0.1, 0.6),
        kinds=("image", "image", "text"),
    )
    return build_preview(TrainConfig(**changes), rewards)


def test_judges_are_shown_prompts_texts_and_pictures_of_what_is_rewarded() -> None:
    """The columns are those of finished trajectories; what is not there yet is empty. No text reward is asked."""
    light, other, words = (Watching() for _ in range(3))
    gate = gate_of(light, other, words)
    assert gate is not None and words.shown == []
    scores = gate.score(PROMPTS, TEXTS, IMAGES)
    torch.testing.assert_close(scores, torch.tensor([0.0, 0.25, math.nan, 0.75]), equal_nan=True)
    assert words.shown == []
    for columns in (light.shown[0], other.shown[0]):
        assert columns["id"] == ["a", "a", "c"] and columns["prompts"] == ["draw a", "draw a", "draw c"]
        assert columns["completions"] == ["it is red", "it is blue", ""] and columns["mode"] == ["u"] * 3
        assert [float(image.mean()) for image in columns["images"]] == [0.0, 0.25, 0.75]
        assert columns["completion_ids"] == [[], [], []] and columns["follow_up_completions"] == [""] * 3
        assert columns["style"] == ["oil", "oil", None] and "hidden" not in columns


def test_a_member_without_its_groups_reward_cannot_be_judged() -> None:
    """And a failure of one judge leaves the other's verdict, on its own scale."""
    gate = gate_of(Watching(), Watching(lacks="it is red"), Watching())
    assert gate is not None
    scores = gate.score(PROMPTS, TEXTS, IMAGES)
    torch.testing.assert_close(scores, torch.tensor([math.nan, 0.25, math.nan, 0.75]), equal_nan=True)

    class Fails(Watching):
        def __call__(self, **columns: Any) -> list[float | None]:
            raise OSError("the service is away")

    gate = gate_of(Watching(), Fails(), Watching())
    assert gate is not None
    torch.testing.assert_close(gate.score(PROMPTS, TEXTS, IMAGES)[[0, 1, 3]], torch.tensor([0.0, 0.25, 0.75]))


def test_what_stands_for_the_rewards_in_a_preview_is_asked_in_their_place() -> None:
    """Such as CLIP's score: on its own scale, whatever the rewards weigh; still only where drawings are rewarded."""
    light, clip = Watching(), Watching(lacks="it is red")
    rewards = RewardSet(functions={"light": light}, weights=(0.3,), kinds=("image",), preview=clip)
    gate = build_preview(TrainConfig(preview_dead_band=0.005), rewards)
    assert gate is not None and gate.dead_band == 0.005
    scores = gate.score(PROMPTS, TEXTS, IMAGES)
    torch.testing.assert_close(scores, torch.tensor([math.nan, 0.25, math.nan, 0.75]), equal_nan=True)
    assert not light.shown and clip.shown[0]["completions"] == ["it is red", "it is blue", ""]
    assert build_preview(TrainConfig(), RewardSet(functions={}, weights=(), kinds=(), preview=clip)) is None


def test_a_reward_that_asks_hears_which_step_is_drawn() -> None:
    """One that gives less as training goes on judges a preview as it will judge the drawing."""

    def fades(*, images: list[torch.Tensor], trainer_state: Any, **_: Any) -> list[float]:
        return [1 - trainer_state.global_step / trainer_state.max_steps] * len(images)

    config = TrainConfig(max_steps=8)
    gate = build_preview(config, RewardSet(functions={"fades": fades}, weights=(1.0,), kinds=("image",)))
    assert gate is not None and gate.score(PROMPTS[:1], TEXTS[:1], IMAGES[:1]).tolist() == [1.0]
    gate.step = 6
    assert gate.score(PROMPTS[:1], TEXTS[:1], IMAGES[:1]).tolist() == [0.25]


def test_anchors_alone_ask_nobody() -> None:
    light = Watching()
    gate = gate_of(light, Watching(), Watching())
    assert gate is not None and gate.score(PROMPTS[2:3], TEXTS[2:3], IMAGES[2:3]).isnan().all() and light.shown == []


@pytest.mark.parametrize("kinds", [("image", "image"), ("text", "text")])
def test_nothing_to_judge_by_is_no_preview(kinds: tuple[str, str]) -> None:
    """Without a reward of images that counts, or switched off."""
    weights = (0.0, 0.0) if kinds[0] == "image" else (1.0, 1.0)
    rewards = RewardSet(functions={"one": Watching(), "two": Watching()}, weights=weights, kinds=kinds)
    assert build_preview(TrainConfig(), rewards) is None
    assert gate_of(Watching(), Watching(), Watching(), preview_fraction=0.0) is None
