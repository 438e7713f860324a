"""T2I-R1's detector reward by hand, and text that is read off drawings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from small_detectors import small_trocr
from small_models import saved
from torch import Tensor
from transformers import TrOCRProcessor, VisionEncoderDecoderModel

from syncr1.engine.errors import DataError
from syncr1.engine.records import Prompt
from syncr1.engine.rewards.images.detection import Detection
from syncr1.engine.rewards.images.drawing_asked import quoted, text_to_write, wanted_text
from syncr1.engine.rewards.images.loading import as_bytes
from syncr1.engine.rewards.images.object_rules import NEAR_SHARE, place_score
from syncr1.engine.rewards.images.objects import DetectorReward
from syncr1.engine.rewards.images.ocr import OcrReward, TrOcrReader, edit_distance, strips, text_score

LEFT, RIGHT, LOW = (0.0, 40.0, 20.0, 60.0), (70.0, 40.0, 90.0, 60.0), (0.0, 75.0, 20.0, 95.0)


class Known:
    """Finds what it is told, of what is asked."""

    threshold, counting_threshold, max_overlap = 0.3, 0.3, 0.5

    def __init__(self, *found: Detection) -> None:
        self.found, self.asked = found, list[tuple[str, ...]]()

    def __call__(
        self, images: Sequence[Tensor], labels: Sequence[Sequence[str]], least: float
    ) -> list[list[Detection]]:
        self.asked += [tuple(row) for row in labels]
        return [[one for one in self.found if one.label in row] for row in labels]


def reward_of(row: Mapping[str, Any], *found: Detection) -> float | None:
    columns = {name: [value] for name, value in row.items()}
    (value,) = DetectorReward(Known(*found))(images=[torch.zeros(3, 100, 100)], prompts=["x"], **columns)
    return value


DOG, CAT = Detection("dog", 0.9, LEFT), Detection("cat", 0.8, RIGHT)
SPATIAL = {"obj1": "dog", "obj2": "cat", "locality": "on the left of"}


@pytest.mark.parametrize(
    ("row", "found", "value"),
    [
        ({"nouns": ["dog", "cat"]}, (DOG, CAT), 1.0),
        ({"nouns": ["dog", "cat"]}, (DOG,), 0.5),
        ({"nouns": ["dog", "cat"], "task_type": "color"}, (), 0.0),
        ({"nouns": [], "task_type": None}, (DOG,), None),
        ({}, (DOG,), None),
        ({"task_type": "spatial", "spatial_info": SPATIAL}, (DOG, CAT), 0.9),
        ({"task_type": "spatial", "spatial_info": SPATIAL}, (DOG,), 0.2),
        ({"task_type": "spatial", "spatial_info": SPATIAL}, (), 0.0),
        ({"task_type": "spatial", "spatial_info": {**SPATIAL, "locality": "right of"}}, (DOG, CAT), 0.4),
        ({"task_type": "numeracy", "numeracy_info": [{"num": 1, "obj_name": "dog"}]}, (DOG, CAT), 1.0),
        (
            {"task_type": "numeracy", "numeracy_info": [{"num": 2, "obj_name": "dog"}, {"num": 1, "obj_name": "cat"}]},
            (DOG, CAT),
            0.6,
        ),
        (
            {"task_type": "numeracy", "numeracy_info": [{"num": 1, "obj_name": "dog"}, {"num": 1, "obj_name": "cow"}]},
            (DOG, Detection("dog", 0.5, (1.0, 40.0, 20.0, 60.0))),  # the same dog twice
            0.5,
        ),
    ],
)
def test_the_detector_reward_by_hand(row: dict[str, Any], found: tuple[Detection, ...], value: float | None) -> None:
    assert reward_of(row, *found) == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize(
    ("words", "a", "b", "value"),
    [
        ("left of", LEFT, RIGHT, 1.0),
        ("left of", RIGHT, LEFT, 0.0),
        ("right of", RIGHT, LEFT, 1.0),
        ("on the right of", LEFT, RIGHT, 0.0),
        ("above", LEFT, LOW, 1.0),
        ("on top of", LEFT, LOW, 1.0),
        ("on the top of", LOW, LEFT, 0.0),
        ("below", LOW, LEFT, 1.0),
        ("on the bottom of", LEFT, LOW, 0.0),
        ("left of", LEFT, (0.0, 40.0, 20.0, 60.0), 0.0),  # one place
        ("left of", (0.0, 0.0, 20.0, 20.0), (10.0, 0.0, 30.0, 20.0), 0.1 / (200 / 600)),
        ("above", LEFT, RIGHT, 0.0),
        ("near", LEFT, RIGHT, 1.0),  # on one height
        ("next to", (0.0, 0.0, 10.0, 10.0), (80.0, 60.0, 90.0, 70.0), 100 * NEAR_SHARE / 80),
        ("inside", LEFT, RIGHT, 0.0),
    ],
)
def test_places_by_hand(words: str, a: Any, b: Any, value: float) -> None:
    assert place_score(words, a, b, 100 * NEAR_SHARE) == pytest.approx(value)


def test_only_rows_with_objects_are_looked_at() -> None:
    known = Known(DOG)
    images = [torch.zeros(3, 10, 10), None, torch.zeros(3, 10, 10)]
    values = DetectorReward(known)(images=images, prompts=[""] * 3, nouns=[["dog", "dog"], ["dog"], None])
    assert values == [1.0, None, None] and known.asked == [("dog",)]


@pytest.mark.parametrize(
    "row",
    [
        {"task_type": "spatial"},
        {"task_type": "spatial", "spatial_info": {"obj1": "dog"}},
        {"task_type": "numeracy", "numeracy_info": []},
        {"task_type": "numeracy", "numeracy_info": [{"num": 2}]},
    ],
)
def test_rows_that_do_not_say_what_is_asked_are_named(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"reward detector: (spatial|numeracy)_info: expected "):
        reward_of(row, DOG)


# Text -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "wanted", "value"),
    [
        ("OPEN 24 HOURS", "open 24 hours", 1.0),
        ("the sign says OPEN now", "Open", 1.0),
        ("OPEM", "OPEN", 0.75),
        ("", "OPEN", 0.0),
        ("something else entirely", "OK", 0.0),
        ("营业中", "营业", 1.0),
        ("ＯＰＥＮ", "open", 1.0),
        ("Straße", "STRASSE", 1.0),
        ("op en", "open", 1.0),
        ("anything", "", 0.0),
        ("pen", "open", 0.75),
    ],
)
def test_text_scores(read: str, wanted: str, value: float) -> None:
    assert text_score(read, wanted) == pytest.approx(value)


def test_edit_distances() -> None:
    for a, b, distance in (
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("flaw", "lawn", 2),
        ("a", "a", 0),
    ):
        assert edit_distance(a, b) == distance == edit_distance(b, a)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ('a shop with "Open" on it', "Open"),
        ('"Hello" over "World"', "Hello World"),
        ("a sign “Café 9” at night", "Café 9"),
        ("写着「营业中」的牌子", "营业中"),
        ("ein Schild „Halt“", "Halt"),
        ("un panneau « Arrêt »", "Arrêt"),
        ("a mug that says 'Best Dad'", "Best Dad"),
        ("a dog's bowl and the cats' house", ""),
        ("no text at all", ""),
        ('an inch is 1" long', ""),
    ],
)
def test_text_in_quotes(asked: str, found: str) -> None:
    assert quoted(asked) == found
    assert text_to_write(Prompt(id="a", task="t", text=asked)) == found
    assert wanted_text({"prompts": [asked], "ocr_text": ["Given"]}, 0) == "Given"


def test_strips_cover_the_picture_and_overlap_by_half() -> None:
    image = torch.arange(12.0)[None, :, None].expand(3, 12, 5)
    assert [tuple(strip.shape) for strip in strips(image, 1)] == [(3, 12, 5)]
    halves = strips(image, 2)
    assert [float(strip[0, 0, 0]) for strip in halves] == [0.0, 3.0, 6.0] and halves[0].shape == (3, 6, 5)
    assert torch.equal(torch.cat(halves[::2], 1), image)
    assert [strip.shape[1] for strip in strips(image[:, :1], 3)] == [1]


@torch.no_grad()
def test_trocr_reads_each_strip_as_its_own_generate(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved(small_trocr, tmp_path_factory)
    model, processor = VisionEncoderDecoderModel.from_pretrained(folder).eval(), TrOCRProcessor.from_pretrained(folder)
    random = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 40, 56, generator=random), torch.rand(3, 32, 32, generator=random)]
    reader = TrOcrReader.from_pretrained(str(folder))
    reader.max_new_tokens = 6
    for image, lines in zip(images, reader(images), strict=True):
        expected = []
        for number in (1, 2, 3):
            for strip in strips(image, number):
                pixels = processor(images=as_bytes(strip), return_tensors="pt").pixel_values
                tokens = model.generate(pixels, max_new_tokens=6, do_sample=False, num_beams=1)
                expected.append(processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip())
        assert lines[: len(expected)] == expected
        assert lines[len(expected) :] == [expected[0], " ".join(expected[1:4:2]), " ".join(expected[4::2])]


def test_the_reward_takes_the_reading_that_comes_nearest() -> None:
    class Reads:
        def __call__(self, images: Sequence[Tensor]) -> list[list[str]]:
            return [["??", "HELLO", "WORLD", "HELLO WORLD"], ["OPEM"]][: len(images)]

    image = torch.zeros(3, 4, 4)
    asked = ['"hello world"', 'a sign "Open"', "no text", '"never drawn"']
    values = OcrReward(Reads())(images=[image, image, image, None], prompts=asked)  # type: ignore[arg-type]
    assert values == [1.0, 0.75, None, None]
