"""Detectors of transformers: scores and boxes against the published post-processing and transformers' own."""

from __future__ import annotations

import re

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
import torch.nn.functional as F
from small_detectors import small_grounding_dino, small_mask2former, small_owlv2
from small_models import saved, small_clip
from torch import Tensor
from transformers import (
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    Owlv2ForObjectDetection,
    Owlv2Processor,
)

from syncr1.engine.errors import ConfigError, DataError
from syncr1.engine.rewards.images.detection import Detection, apart, overlap
from syncr1.engine.rewards.images.detectors import Mask2FormerDetector, load_detector
from syncr1.engine.rewards.images.loading import as_bytes

SIZES = ((40, 60), (64, 64), (40, 60))


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.rand(3, *size, generator=random) for size in SIZES]


def close(ours: list[Detection], expected: list[tuple[str, float, tuple[float, ...]]]) -> None:
    """The same objects, best first."""
    expected = sorted(expected, key=lambda one: -one[1])
    assert [one.label for one in ours] == [label for label, _, _ in expected]
    for one, (_, score, box) in zip(ours, expected, strict=True):
        assert one.score == pytest.approx(score, abs=1e-5) and one.box == pytest.approx(box, abs=1e-2)


@torch.no_grad()
def test_mask2former_is_mmdets_post_processing(images: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every query's mask brought to the picture's size, the 100 best pairs, class times mask score, the mask's box."""
    folder = saved(small_mask2former, tmp_path_factory)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    processor = Mask2FormerImageProcessor.from_pretrained(folder)
    detector = load_detector("geneval", folder)
    assert isinstance(detector, Mask2FormerDetector)
    assert detector.names == ["person", "dog", "computer mouse", "tv"]
    assert detector.size == {"shortest_edge": 800, "longest_edge": 1333}
    detector.size = None
    found = detector(images, [("computer mouse", "dog", "tv", "person")] * 3, 0.05)
    for image, ours in zip(images, found, strict=True):
        inputs = processor(images=as_bytes(image), return_tensors="pt")
        out = model(**inputs)
        seen = inputs["pixel_mask"][0].bool()
        masks = F.interpolate(out.masks_queries_logits, seen.shape, mode="bilinear")
        masks = masks[:, :, : int(seen.any(1).sum()), : int(seen.any(0).sum())]
        masks = F.interpolate(masks, image.shape[1:], mode="bilinear")[0]
        scores, places = out.class_queries_logits[0].softmax(-1)[:, :-1].flatten().topk(40)
        expected = []
        for score, place in zip(scores.tolist(), places.tolist(), strict=True):
            mask = masks[place // 4] > 0
            whole = score * float((masks[place // 4].sigmoid() * mask).sum() / (mask.sum() + 1e-6))
            if whole > 0.05:
                rows, columns = torch.where(mask)
                box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                expected.append((detector.names[place % 4], whole, tuple(map(float, box))))
        assert len(expected) > 3
        close(ours, expected)
        assert all(one.mask is not None and one.mask.shape == image.shape[1:] for one in ours)
    assert {one.label for one in detector(images, [("dog",)] * 3, 0.0)[0]} == {"dog"}
    assert all(one.score > 0.2 for row in detector(images, [("dog",)] * 3, 0.2) for one in row)
    with pytest.raises(DataError, match=r"expected classes that the checkpoint knows .*, got zebra"):
        detector(images, [("dog",), ("zebra",), ("dog",)], 0.3)


@torch.no_grad()
def test_owlv2_is_transformers_own(images: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved(small_owlv2, tmp_path_factory)
    model, processor = Owlv2ForObjectDetection.from_pretrained(folder).eval(), Owlv2Processor.from_pretrained(folder)
    labels = [("dog", "red bus"), ("cat",), ("man", "hat", "two dogs")]
    found = load_detector("detector", folder)(images, labels, 0.1)
    for image, names, ours in zip(images, labels, found, strict=True):
        texts = [[f"a photo of a {name}" for name in names]]
        inputs = processor(text=texts, images=as_bytes(image), return_tensors="pt")
        (theirs,) = processor.post_process_grounded_object_detection(
            model(**inputs), threshold=0.1, target_sizes=[tuple(image.shape[1:])], text_labels=[list(names)]
        )
        tall, wide = image.shape[1:]
        boxes = [torch.minimum(b.clamp(min=0), torch.tensor([wide, tall, wide, tall])) for b in theirs["boxes"]]
        rows = zip(theirs["text_labels"], theirs["scores"].tolist(), boxes, strict=True)
        expected = [(label, score, tuple(box.tolist())) for label, score, box in rows]
        assert expected
        close(ours, expected)


@torch.no_grad()
def test_grounding_dino_scores_a_label_by_its_words(
    images: list[Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The mean probability of the tokens of its first and last word (T2I-R1's map of positions), found by their ids."""
    folder = saved(small_grounding_dino, tmp_path_factory)
    model = GroundingDinoForObjectDetection.from_pretrained(folder).eval()
    processor = GroundingDinoProcessor.from_pretrained(folder)
    labels = [("dog", "red big bus"), ("surfboard",), ("man", "surfing dog")]
    words = {"dog": ["dog"], "red big bus": ["red", "bus"], "surfboard": ["surf", "##board"], "man": ["man"]}
    words |= {"surfing dog": ["surf", "##ing", "dog"]}
    found = load_detector("detector", folder)(images, labels, 0.0)
    for image, names, ours in zip(images, labels, found, strict=True):
        inputs = processor(images=as_bytes(image), text=" . ".join(names) + ".", return_tensors="pt")
        out, tokens = model(**inputs), processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
        x, y, wide, tall = (out.pred_boxes[0] * torch.tensor([*image.shape[:0:-1]] * 2)).unbind(-1)
        corners = torch.stack([x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2], -1)
        limits = torch.tensor([*image.shape[:0:-1]] * 2)
        for name in names:
            places = [tokens.index(word) for word in words[name]]
            scores = out.logits[0].sigmoid()[:, places].mean(-1).tolist()
            boxes = [tuple(torch.minimum(box.clamp(min=0), limits).tolist()) for box in corners]
            close(
                [one for one in ours if one.label == name],
                [(name, score, box) for score, box in zip(scores, boxes, strict=True) if score > 0],
            )


def test_another_model_is_refused_and_names_its_kind(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved(small_clip, tmp_path_factory)
    with pytest.raises(ConfigError, match=rf"detector: expected a mask2former, owlv2 .*{re.escape(str(folder))}.*clip"):
        load_detector("detector", folder)
    with pytest.raises(ConfigError, match="reward_models: geneval: "):
        load_detector("geneval", folder / "nothing")


def test_too_many_words_for_grounding_dino(images: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> None:
    detector = load_detector("detector", saved(small_grounding_dino, tmp_path_factory))
    with pytest.raises(ConfigError, match="labels of at most 64 tokens, got"):
        detector(images[:1], [[f"dog {i} {i}" for i in range(30)]], 0.3)
    assert detector(images[:1], [()], 0.3) == [[]]


def test_overlap_counts_the_last_pixel() -> None:
    assert overlap((0, 0, 9, 9), (0, 0, 9, 9)) == 1.0
    assert overlap((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert overlap((0, 0, 4, 4), (9, 9, 12, 12)) == 0.0
    one, two, far = (
        Detection("dog", s, b) for s, b in ((0.9, (0, 0, 9, 9)), (0.8, (1, 0, 9, 9)), (0.7, (50, 0, 59, 9)))
    )
    assert apart([one, two, far], 0.5) == [one, far] and apart([one, two, far], 1) == [one, two, far]
