"""GenEval: verdicts of the published code on rendered scenes, its colours by CLIP, metadata as tables hold it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from geneval_scenes import FIXTURE, RGB, Scene, in_order, scenes
from PIL import Image
from small_models import saved, small_clip
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from syncr1.engine.errors import DataError
from syncr1.engine.rewards.builtin.clip import ClipScorer
from syncr1.engine.rewards.images.colours import Colours, Cut, cut_out
from syncr1.engine.rewards.images.detection import Detection
from syncr1.engine.rewards.images.geneval import GenEval, GenEvalReward
from syncr1.engine.rewards.images.geneval_rules import COLOURS, Wanted, relations


class KnownBoxes:
    """Says of each picture what is known of it; the rules alone are tested with it."""

    threshold, counting_threshold, max_overlap = 0.3, 0.9, 1.0

    def __init__(self, known: Sequence[tuple[Tensor, tuple[Detection, ...]]]) -> None:
        self.known = {id(image): found for image, found in known}

    def __call__(
        self, images: Sequence[Tensor], labels: Sequence[Sequence[str]], least: float
    ) -> list[list[Detection]]:
        rows = zip(images, labels, strict=True)
        return [[d for d in self.known[id(i)] if d.label in asked and d.score > least] for i, asked in rows]


class PixelColours:
    """Reads the colour of a cut off its pixels: the one of RGB that most of those that are not grey are nearest to."""

    def __call__(self, cuts: Sequence[Cut]) -> list[str]:
        return [self.read(cut_out(cut.image, cut.found)) for cut in cuts]

    @staticmethod
    def read(pixels: Tensor) -> str:
        flat = pixels.flatten(1).T
        table = torch.tensor([*RGB.values(), (0.6, 0.6, 0.6), (0.8, 0.8, 0.8)])
        nearest = torch.cdist(flat, table).argmin(-1)
        counts = torch.bincount(nearest, minlength=len(table))[: len(RGB)]
        return list(RGB)[int(counts.argmax())]


def rules(known: Sequence[Scene], **settings: Any) -> GenEval:
    boxes = KnownBoxes([(scene.image, scene.found) for scene in known])
    return GenEval(boxes, PixelColours(), **settings)  # type: ignore[arg-type]


def test_verdicts_are_the_published_ones_on_500_rendered_scenes() -> None:
    """Verdict and reason, one by one; colours are read off the pictures, boxes and scores are known."""
    known, published = scenes(), json.loads(FIXTURE.read_text())
    assert len(known) == len(published) == 500 and 200 < sum(correct for correct, _ in published) < 300
    for overlap in (1.0, 0.5):
        rows = [i for i, scene in enumerate(known) if scene.max_overlap == overlap]
        geneval = rules(known, max_overlap=overlap)
        verdicts = geneval.verdicts([known[i].image for i in rows], [known[i].metadata for i in rows])
        ours = [[verdict.correct, in_order(verdict.reason)] for verdict in verdicts]
        assert ours == [published[i] for i in rows]
    counted = next(scene for scene in known if len(scene.found) > 3)
    (verdict,) = rules(known).verdicts([counted.image], [counted.metadata])
    assert {one.label for one in verdict.found} <= {clause["class"] for clause in counted.metadata["include"]}


def test_relations_by_hand() -> None:
    left, right = (0.0, 0.0, 10.0, 10.0), (40.0, 0.0, 50.0, 10.0)
    assert relations(left, right) == {"left of"} and relations(right, left) == {"right of"}
    assert relations((0.0, 0.0, 10.0, 10.0), (40.0, 40.0, 50.0, 50.0)) == {"left of", "above"}
    assert relations(left, (1.0, 0.0, 11.0, 10.0)) == set()  # within a tenth of both sizes
    assert relations(left, left) == set()


def test_colours_are_those_of_the_published_classifier(tmp_path_factory: pytest.TempPathFactory) -> None:
    """CLIP's own forward over PIL cuts, by the published steps, one object at a time."""
    folder = saved(small_clip, tmp_path_factory)
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    random = torch.Generator().manual_seed(0)
    cuts = []
    for index in range(6):
        image = (torch.rand(3, 60, 80, generator=random) * 255).round() / 255
        mask = torch.rand(60, 80, generator=random) > 0.3 if index % 2 else None
        box = (5.0 + index, 4.5, 37.4 + index, 36.4)  # a square: nothing else is cut off
        cuts.append(Cut(image, Detection("dog", 0.9, box, mask), ("dog", "wine glass")[index % 3 == 0]))
    assert Colours(ClipScorer.from_pretrained(folder))(cuts) == [_published(model, processor, cut) for cut in cuts]
    assert Colours(ClipScorer.from_pretrained(folder))([]) == []


@torch.no_grad()
def _published(model: CLIPModel, processor: CLIPProcessor, cut: Cut) -> str:
    weights = []
    for colour in COLOURS:
        forms = (f"a photo of a {colour} {cut.name}", f"a photo of a {colour}-colored {cut.name}")
        texts = processor(text=[*forms, f"a photo of a {colour} object"], padding=True, return_tensors="pt")
        each = model.text_projection(model.text_model(**texts).pooler_output)
        mean = (each / each.norm(dim=-1, keepdim=True)).mean(0)
        weights.append(mean / mean.norm())
    picture = Image.fromarray((cut.image * 255).round().byte().permute(1, 2, 0).numpy())
    if cut.found.mask is not None:
        blank = Image.new("RGB", picture.size, color="#999")
        picture = Image.composite(picture, blank, Image.fromarray(cut.found.mask.numpy()))
    pixels = processor(images=picture.crop(cut.found.box), return_tensors="pt").pixel_values
    features = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
    return COLOURS[int((torch.stack(weights) @ features).argmax())]


def test_cuts_keep_a_pixel_at_least_and_stay_within_the_picture() -> None:
    image = torch.rand(3, 20, 30)
    for box, shape in (
        ((3.0, 4.0, 9.0, 11.0), (3, 7, 6)),
        ((-4.0, -4.0, 99.0, 99.0), (3, 20, 30)),
        ((29.6, 19.7, 30.0, 20.0), (3, 1, 1)),
        ((5.2, 5.2, 5.3, 5.3), (3, 1, 1)),
    ):
        assert cut_out(image, Detection("dog", 1.0, box)).shape == shape
    with pytest.raises(ValueError, match="expected a mask"):
        cut_out(image, Detection("dog", 1.0, (0, 0, 5, 5), torch.ones(3, 3, dtype=torch.bool)))


def test_metadata_as_tables_hold_it() -> None:
    """Empty cells are absent keys; a list may be JSON, as columns that must be of one type have it."""
    plain = {"tag": "position", "include": [{"class": "cat", "count": 1}]}
    plain["include"].append({"class": "dog", "count": 1, "position": ["left of", 0]})  # type: ignore[attr-defined]
    cells = [{"class": "cat", "count": 1, "color": None, "position": None}]
    cells.append({"class": "dog", "count": 1, "color": None, "position": '["left of", "0"]'})
    for row in ({"include": cells, "exclude": None}, {"include": json.dumps(plain["include"]), "exclude": "[]"}):
        assert Wanted.of({"tag": "position", **row}) == Wanted.of(plain)
    assert Wanted.of(plain).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"include": []}, "expected include or exclude with a clause"),
        ({"include": "dog"}, "as it is or as JSON, got 'dog'"),
        ({"include": {"class": "dog"}}, "expected a list of clauses"),
        ({"include": ["dog"]}, r"include\[0\]: expected a mapping"),
        ({"include": [{"class": "dog", "count": 0}]}, "count: expected a whole number of at least 1, got 0"),
        ({"include": [{"class": "dog", "count": 1.5}]}, "count: expected a whole number"),
        ({"include": [{"class": "dog", "count": 1, "color": "mauve"}]}, "color: expected one of red"),
        ({"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}, "number of an earlier clause"),
        ({"include": [{"class": "dog"}, {"class": "cat", "position": ["near", 0]}]}, "position: expected one of left"),
        ({"exclude": [{"count": 2}]}, r"exclude\[0\]: expected a mapping"),
    ],
)
def test_metadata_that_cannot_be_understood_is_named(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Wanted.of({"tag": "colors", **row})


def test_the_reward_is_one_or_zero_and_none_without_metadata() -> None:
    known = [scene for scene in scenes() if scene.max_overlap == 1.0][:40]
    right = [
        verdict.correct for verdict in rules(known).verdicts([s.image for s in known], [s.metadata for s in known])
    ]
    assert True in right and False in right
    reward = GenEvalReward(rules(known))
    images = [*(scene.image for scene in known), None, known[0].image]
    whole = [*(scene.metadata for scene in known), known[0].metadata, {}]
    columns = {key: [row.get(key) for row in whole] for key in ("tag", "include", "exclude")}
    expected = [*map(float, right), None, None]
    assert reward(images=images, prompts=[""] * 42, **columns) == expected
    assert reward(images=images, prompts=[""] * 42, metadata=whole) == expected
    assert reward(images=[None], prompts=[""]) == [None]


def test_names_are_what_evaluation_asks_for(tmp_path: Path) -> None:
    """`GenEval.verdicts` of an empty batch, and of pictures of several sizes."""
    known = scenes()[:2]
    assert rules(known).verdicts([], []) == []
    other = torch.zeros(3, 10, 10)
    boxes = KnownBoxes([(known[0].image, known[0].found), (other, ())])
    rows = [known[0].metadata, {"include": [{"class": "dog", "count": 1}], "tag": "single_object"}]
    first, second = GenEval(boxes, PixelColours()).verdicts([known[0].image, other], rows)  # type: ignore[arg-type]
    assert not second.correct and second.reason == "expected dog>=1, found 0" and second.found == ()
    assert isinstance(first.reason, str)
