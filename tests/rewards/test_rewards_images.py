"""R_id and R_vlm on real photographs and on the rendered world."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from syncr1.engine.errors import PictureError
from syncr1.engine.pictures import load_pictures
from syncr1.engine.rewards.builtin.identity import IdentityReward
from syncr1.engine.rewards.judge.attribute_judge import (
    AttributeJudge,
    CaptionJudge,
    Judge,
    index_scorer,
    posterior_scorer,
)
from syncr1.engine.world.attributes import LOOKS, VALUES
from syncr1.engine.world.checker import AttributeChecker

SIZE = 48


class ColourLayout:
    """Frozen features of any picture: its colours on a coarse grid, centred. Counts what it is asked."""

    def __init__(self) -> None:
        self.num_images = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.num_images += images.shape[0]
        return torch.nn.functional.adaptive_avg_pool2d(images, 6).flatten(1) - 0.5


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, ...]]:
    """Two photos each of a cat, an astronaut and a cup of coffee: the whole frame, and a part of it."""
    folder = tmp_path_factory.mktemp("photos")
    found = {}
    for name in ("cat", "astronaut", "coffee"):
        picture = Image.fromarray(getattr(data, name)())
        width, height = picture.size
        paths = (folder / f"{name}0.png", folder / f"{name}1.jpg")
        picture.resize((160, 160 * height // width)).save(paths[0])
        picture.crop((width // 20, height // 20, width * 19 // 20, height * 19 // 20)).resize((120, 90)).save(paths[1])
        found[name] = paths
    return found


def test_identity_tells_concepts_apart(photos: dict[str, tuple[Path, ...]]) -> None:
    reward = IdentityReward(ColourLayout(), SIZE)
    cat, astronaut = load_pictures([photos["cat"][0], photos["astronaut"][0]], SIZE)
    values = reward(images=[cat, cat, astronaut], references=[photos["cat"], photos["coffee"], photos["astronaut"]])
    own, other, own_too = (value if value is not None else math.nan for value in values)
    assert own > 0.7 and own_too > 0.7
    assert other < own - 0.2
    assert 0.0 <= other <= 1.0


def test_identity_of_identical_pictures_is_one(photos: dict[str, tuple[Path, ...]]) -> None:
    path = photos["coffee"][0]
    values = IdentityReward(ColourLayout(), SIZE)(images=[load_pictures([path], SIZE)[0]], references=[(path,)])
    assert values == [pytest.approx(1.0, abs=1e-5)]


def test_identity_without_image_or_references_is_none(photos: dict[str, tuple[Path, ...]]) -> None:
    features = ColourLayout()
    reward = IdentityReward(features, SIZE)
    image = torch.rand(3, SIZE, SIZE)
    assert reward(images=[None, image], references=[photos["cat"], ()]) == [None, None]
    assert reward(images=[], references=[]) == []
    assert features.num_images == 0


def test_identity_reads_each_reference_once(photos: dict[str, tuple[Path, ...]]) -> None:
    features = ColourLayout()
    reward = IdentityReward(features, SIZE, max_cached=3)
    images = [torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    first = reward(images=images, references=[photos["cat"]] * 4)
    assert features.num_images == 4 + 2
    assert reward(images=images, references=[photos["cat"]] * 4) == first
    assert features.num_images == 8 + 2
    reward(images=images[:1], references=[photos["coffee"]])  # one cat photo has to go
    assert len(reward.known) == 3


def test_identity_takes_images_of_different_sizes_in_any_order(photos: dict[str, tuple[Path, ...]]) -> None:
    reward = IdentityReward(ColourLayout(), SIZE)
    images = [load_pictures([photos[name][0]], size)[0] for name, size in (("cat", 48), ("coffee", 96), ("cat", 96))]
    together = reward(images=images, references=[photos["cat"]] * 3)
    alone = [reward(images=[image], references=[photos["cat"]])[0] for image in images]
    assert together == pytest.approx(alone)


def test_identity_names_what_is_wrong(photos: dict[str, tuple[Path, ...]], tmp_path: Path) -> None:
    broken = tmp_path / "0.png"
    broken.write_bytes(photos["cat"][0].read_bytes()[:200])
    image = torch.rand(3, SIZE, SIZE)
    with pytest.raises(PictureError, match=r"0\.png"):
        IdentityReward(ColourLayout(), SIZE)(images=[image], references=[(broken,)])
    with pytest.raises(ValueError, match="not finite"):
        IdentityReward(lambda images: images.flatten(1) * math.nan, SIZE)(images=[image], references=[photos["cat"]])
    with pytest.raises(ValueError, match=r"\[3, H, W\]"):
        IdentityReward(ColourLayout(), SIZE)(images=[torch.rand(SIZE, SIZE)], references=[photos["cat"]])


@pytest.fixture(scope="module")
def checker() -> AttributeChecker:
    return AttributeChecker(AttributeChecker.raw_table())


def test_attribute_judge_counts_named_attributes(checker: AttributeChecker) -> None:
    judge = AttributeJudge(index_scorer(checker.read_indices, VALUES))
    look = LOOKS[0]
    other = next(o for o in LOOKS if o.colour != look.colour and o.hat != look.hat and o.shape == look.shape)
    image = checker.table[0]
    right, partly = look.to_dict(), {"colour": other.colour, "shape": look.shape}
    values = judge(
        images=[image, image, image, None, image], attributes=[right, partly, {"hat": other.hat}, right, None]
    )
    assert values == [1.0, 0.5, 0.0, None, None]


def test_posterior_scorer_is_soft_and_agrees_on_clean_pictures(checker: AttributeChecker) -> None:
    hard, soft = index_scorer(checker.read_indices, VALUES), posterior_scorer(checker.posterior, VALUES)
    looks = LOOKS[::60]
    images = checker.table[::60]
    wanted = [look.to_dict() for look in looks]
    assert hard(images, wanted).eq(1.0).all()
    clean = soft(images, wanted)
    assert clean.shape == (len(looks), 5) and clean.min() > 0.5
    noisy = soft(
        (images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1), wanted
    )
    assert ((noisy > 0) & (noisy < 1)).any()


def test_scorers_refuse_unknown_values(checker: AttributeChecker) -> None:
    for scorer in (index_scorer(checker.read_indices, VALUES), posterior_scorer(checker.posterior, VALUES)):
        with pytest.raises(ValueError, match="pink"):
            scorer(checker.table[:1], [{"colour": "pink"}])
        with pytest.raises(ValueError, match="size"):
            scorer(checker.table[:1], [{"size": "big"}])
    with pytest.raises(ValueError, match="readings"):
        index_scorer(lambda images: torch.zeros(1, 2, dtype=torch.int64), VALUES)(checker.table[:1], [{"hat": "none"}])


def brightness_by_words(images: Tensor, texts: Sequence[str]) -> Tensor:
    """A scorer that can be computed by hand: bright pictures like long texts; none for a text without words."""
    rows = [1.0 / len(text.split()) if text.split() else math.nan for text in texts]
    return 1.0 - torch.tensor(rows) * (1.0 - images.flatten(1).mean(1))


def test_caption_judge_asks_for_what_has_a_picture_and_a_target() -> None:
    judge = CaptionJudge(brightness_by_words)
    bright, dark = torch.ones(3, 8, 8), torch.zeros(3, 4, 4)
    values = judge(images=[bright, dark, None, dark, dark], target=["a cat", "a cat", "a cat", None, "   "])
    assert values == [pytest.approx(1.0), pytest.approx(0.5), None, None, None]


def test_judge_prefers_attributes_and_falls_back_to_descriptions(checker: AttributeChecker) -> None:
    scorer = index_scorer(checker.read_indices, VALUES)
    image, wanted = checker.table[0], LOOKS[0].to_dict()
    images, attributes, target = [image, image, None], [wanted, None, wanted], ["a cat", "a cat", "a cat"]
    both = Judge(scorer, brightness_by_words)(images=images, attributes=attributes, target=target)
    assert both[0] == 1.0 and both[1] is not None and 0.0 < both[1] < 1.0 and both[2] is None
    assert Judge(scorer)(images=images, attributes=attributes, target=target) == [1.0, None, None]
    only_descriptions = Judge(None, brightness_by_words)(images=images, attributes=attributes, target=target)
    assert only_descriptions[0] == only_descriptions[1] is not None
    with pytest.raises(ValueError, match="neither"):
        Judge()
