"""The cycle reward from its parts, on small checkpoints and photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from PIL import Image
from skimage import data
from small_models import saved, small_bert, small_blip
from torch import Tensor

from syncr1.engine.errors import PictureError
from syncr1.engine.records import Prompt, Rollout
from syncr1.engine.rewards.builtin.batches import picture_pixels
from syncr1.engine.rewards.builtin.captioner import BlipCaptioner
from syncr1.engine.rewards.builtin.cycle import CycleReward
from syncr1.engine.rewards.builtin.perceptual import LpipsSimilarity, RmseSimilarity
from syncr1.engine.rewards.builtin.text_similarity import BertScore, SoftJaccard
from syncr1.engine.rewards.scoring import score

TEXTS = ["a cat on the table", "a woman in a red hat", "a cat on the table", "two dogs", "a table"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = []
    for name in ("cat", "astronaut"):
        paths.append(tmp_path_factory.mktemp("photos") / f"{name}.png")
        Image.fromarray(getattr(data, name)()).resize((64, 48)).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def images(photos: list[Path]) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, 32, 32, generator=generator)
    return [
        picture_pixels(photos[0]),
        picture_pixels(photos[1]),
        noise,
        None,
        torch.rand(3, 20, 30, generator=generator),
    ]


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> BlipCaptioner:
    return BlipCaptioner.from_pretrained(saved(small_blip, tmp_path_factory), max_new_tokens=8)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> BertScore:
    return BertScore.from_pretrained(saved(small_bert, tmp_path_factory))


def columns(images: list[Tensor | None], photos: list[Path], **more: Any) -> dict[str, Any]:
    real = [photos[0], photos[1], photos[0], photos[1], None]
    return {"images": images, "prompts": TEXTS, "target": [None] * 5, "real_image": real} | more


def test_both_directions_are_summed_or_averaged(
    images: list[Tensor | None], photos: list[Path], captioner: BlipCaptioner, bert: BertScore
) -> None:
    """Each part by its own function, one trajectory at a time; without a photo the text's direction is the reward."""
    lpips = LpipsSimilarity("alex", size=48, weights="random")
    given = columns(images, photos)
    raw = CycleReward(lpips, captioner, bert, normalise=False)(**given)
    mean = CycleReward(lpips, captioner, bert)(**given)
    assert raw[3] is None and mean[3] is None
    for row in (0, 1, 2, 4):
        image, ref = images[row], given["real_image"][row]
        assert image is not None
        parts = [bert(captioner(image[None]), [TEXTS[row]])[0]]
        if ref is not None:
            parts.append(lpips([image], [ref])[0])
        assert raw[row] == pytest.approx(sum(parts), abs=1e-5)
        assert mean[row] == pytest.approx(sum(parts) / len(parts), abs=1e-5)
    assert raw[0] is not None and raw[0] > 1.0 and all(value is None or 0.0 <= value <= 1.0 for value in mean)


def test_one_direction_alone(images: list[Tensor | None], photos: list[Path], captioner: BlipCaptioner) -> None:
    image_only = CycleReward(RmseSimilarity(size=48))(**columns(images, photos))
    assert image_only[0] == image_only[1] == 1.0 and image_only[3:] == [None, None]
    text_only = CycleReward(None, captioner, SoftJaccard())(**columns(images, photos))
    assert text_only[3] is None and None not in text_only[:3] and text_only[4] is not None
    needed = CycleReward(RmseSimilarity(size=48), captioner, SoftJaccard(), real_image_needed=True)
    assert [value is None for value in needed(**columns(images, photos))] == [False, False, False, True, True]


def test_the_target_is_what_the_caption_must_say(images: list[Tensor | None], photos: list[Path]) -> None:
    reward = CycleReward(None, lambda pictures: ["a cat"] * len(pictures), SoftJaccard())
    target = ["a cat", None, "two", "a cat", "a cat"]
    values = reward(**columns(images, photos, target=target))
    first = SoftJaccard()(["a cat"], [TEXTS[1]])[0]
    assert values == [1.0, pytest.approx(first), 0.0, None, 1.0]


def test_parts_are_held_to_one_only_when_normalised(images: list[Tensor | None], photos: list[Path]) -> None:
    def far_off(drawn: Any, _: Any) -> list[float]:
        return [-0.5, 1.5, 0.25][: len(drawn)]

    given = columns(images, photos)
    assert CycleReward(far_off)(**given)[:3] == [0.0, 1.0, 0.25]
    assert CycleReward(far_off, normalise=False)(**given)[:3] == [-0.5, 1.5, 0.25]


def test_nothing_drawn_costs_nothing(photos: list[Path]) -> None:
    def never(*_: Any) -> list[Any]:
        raise AssertionError("asked about nothing")

    reward = CycleReward(never, never, never)
    assert (
        reward(images=[None, None], prompts=["a", "b"], target=[None] * 2, real_image=[photos[0], None]) == [None] * 2
    )
    assert reward(images=[], prompts=[], target=[], real_image=[]) == []


def test_what_makes_no_sense_is_refused(photos: list[Path], captioner: BlipCaptioner, tmp_path: Path) -> None:
    for arguments in ((None,), (None, captioner, None), (RmseSimilarity(), None, SoftJaccard())):
        with pytest.raises(ValueError, match="CycleReward: expected"):
            CycleReward(*arguments)
    with pytest.raises(ValueError, match="real image is needed"):
        CycleReward(None, captioner, SoftJaccard(), real_image_needed=True)
    reward = CycleReward(RmseSimilarity())
    given = {"prompts": ["a"], "target": [None], "real_image": [tmp_path / "missing.png"]}
    with pytest.raises(PictureError, match=r"missing\.png"):
        reward(images=[torch.zeros(3, 9, 9)], **given)
    with pytest.raises(ValueError, match="found values in"):
        reward(images=[torch.zeros(3, 9, 9) - 1], **given)


def test_it_is_a_reward_function(photos: list[Path]) -> None:
    """Through the scorer that the trainer calls: two drawings of one prompt, and an answer that draws nothing."""
    nothing = torch.zeros(0, dtype=torch.long)
    draws = Prompt(id="draw", task="gen", text="a cat", target="a cat", real_image=photos[0], segments=("image",))
    answers = Prompt(id="say", task="vqa", text="what?", images=(photos[0],), answer="cat", segments=("text",))
    rollouts = [
        Rollout(prompt=prompt, member=member, prompt_tokens=nothing, prompt_image=None, segments=(), image=image)
        for prompt, member, image in (
            (draws, 0, picture_pixels(photos[0])),
            (draws, 1, torch.zeros(3, 48, 64)),
            (answers, 0, None),
        )
    ]
    table = score(rollouts, {"cycle": CycleReward(RmseSimilarity(size=32))})
    first, second, third = table.values[:, 0].tolist()
    assert first == 1.0 and 0.0 < second < 0.9 and third != third
