"""CLIP scores against transformers' own processor and logits, on a small checkpoint."""

from __future__ import annotations

from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from small_models import CLIP_SIZE, saved, small_clip
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from syncr1.engine.errors import ConfigError, PictureError
from syncr1.engine.pictures import open_picture
from syncr1.engine.rewards.builtin.batches import picture_pixels
from syncr1.engine.rewards.builtin.clip import ClipImageReward, ClipPreview, ClipScorer, ClipTextReward
from syncr1.engine.rewards.builtin.identity import IdentityReward
from syncr1.engine.rewards.builtin.pretrained import Preparation

TEXTS = ("a man riding a red surfboard", "two dogs", "Ein Hund. 一只狗 🐕", "", "a " * 5000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(small_clip, tmp_path_factory)


@pytest.fixture
def scorer(folder: Path) -> ClipScorer:
    return ClipScorer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> tuple[CLIPModel, CLIPProcessor]:
    return CLIPModel.from_pretrained(folder).eval().double(), CLIPProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = []
    for name, size in (("cat", (90, 70)), ("astronaut", (64, 64)), ("coffee", (40, 99))):
        paths.append(tmp_path_factory.mktemp("photos") / f"{name}.png")
        Image.fromarray(getattr(data, name)()).resize(size).save(paths[-1])
    return paths


def cosines(theirs: tuple[CLIPModel, CLIPProcessor], pixels: Tensor, texts: list[str]) -> Tensor:
    """[images, texts] in float64 by the model's own forward, the processor's own tokens."""
    model, processor = theirs
    tokens = processor.tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        return model(**tokens, pixel_values=pixels.double()).logits_per_image / model.logit_scale.exp()


def test_clip_t_is_the_models_own_logits(
    scorer: ClipScorer, theirs: tuple[CLIPModel, CLIPProcessor], photos: list[Path]
) -> None:
    """Photographs of three shapes and texts of any length, one pass here, PIL pictures through the processor there."""
    rows = [photos[i % 3] for i in range(len(TEXTS))]
    ours = scorer.clip_t([picture_pixels(path) for path in rows], TEXTS)
    prepared = torch.cat([scorer.preparation(picture_pixels(path)[None]) for path in rows])
    expected = cosines(theirs, prepared, list(TEXTS)).diagonal()
    assert ours == pytest.approx(expected.tolist(), abs=1e-5)
    pixels = theirs[1](images=[open_picture(path) for path in rows], return_tensors="pt").pixel_values
    assert ours == pytest.approx(cosines(theirs, pixels, list(TEXTS)).diagonal().tolist(), abs=0.02)  # 8-bit rounding
    assert len({round(value, 4) for value in ours}) == len(TEXTS)
    assert scorer.clip_t([], []) == []


def test_texts_are_cut_behind_77_tokens_and_the_end_mark_kept(scorer: ClipScorer) -> None:
    long, longer = "red " * 80, "red " * 300
    short = "red " * 10
    first, second, third = scorer.text_features([long, longer, short])
    assert torch.equal(first, second) and not torch.allclose(first, third)
    assert scorer.tokenizer(long, truncation=True, max_length=77)["input_ids"][-1] == scorer.tokenizer.eos_token_id
    assert scorer.text_features([]).shape == (0, 24)


@pytest.mark.parametrize("size", [(70, 90), (90, 70), (33, 200), (20, 31), (CLIP_SIZE, CLIP_SIZE), (1, 1)])
def test_preparation_is_the_processors(size: tuple[int, int], theirs: tuple[CLIPModel, CLIPProcessor]) -> None:
    """Exactly where nothing is resized; else within the rounding to 8 bits, which tensors are spared."""
    photo = Image.fromarray(data.astronaut()).resize(size[::-1])
    bytes_of = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    processor = theirs[1].image_processor
    ours = Preparation.of(processor)(bytes_of[None] / 255.0)
    expected = processor(images=bytes_of, return_tensors="pt").pixel_values
    assert ours.shape == expected.shape == (1, 3, CLIP_SIZE, CLIP_SIZE)
    levels = (ours - expected).abs() * 255 * min(processor.image_std)
    if size == (CLIP_SIZE, CLIP_SIZE):
        assert float(levels.max()) < 0.01
    else:
        assert float(levels.mean()) < 0.5 and float(levels.quantile(0.98)) < 2.0 and float(levels.max()) < 8.0
    smooth = torch.linspace(0.2, 0.8, size[1]).expand(3, *size)  # nothing to clamp: the float path is theirs
    floats = processor(images=smooth, do_rescale=False, return_tensors="pt").pixel_values
    torch.testing.assert_close(Preparation.of(processor)(smooth[None]), floats, rtol=0, atol=1e-5)


def test_preparation_refuses_what_it_cannot_follow(theirs: tuple[CLIPModel, CLIPProcessor]) -> None:
    class Settings(dict):  # type: ignore[type-arg]
        def to_dict(self) -> dict[str, object]:
            return dict(self)

    known = theirs[1].image_processor.to_dict()
    for change in ({"size": {"longest_edge": 9}}, {"do_normalize": False}, {"resample": 0}):
        with pytest.raises(ValueError, match="expected one that resizes and normalises"):
            Preparation.of(Settings(known | change))
    with pytest.raises(ValueError, match="a crop within size"):
        Preparation.of(Settings(known | {"crop_size": {"height": 99, "width": 99}}))


def test_clip_i_is_the_mean_cosine_over_references(
    scorer: ClipScorer, theirs: tuple[CLIPModel, CLIPProcessor], photos: list[Path]
) -> None:
    images = [picture_pixels(path) for path in photos]
    model = theirs[0]
    with torch.no_grad():
        pixels = torch.cat([scorer.preparation(image[None]) for image in images]).double()
        features = torch.nn.functional.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    between = features @ features.T
    ours = scorer.clip_i(images, [(photos[1],), (), (photos[0], photos[1])])
    assert ours[1] is None
    assert ours[0] == pytest.approx(float(between[0, 1]), abs=1e-5)
    assert ours[2] == pytest.approx(float(between[2, :2].mean()), abs=1e-5)
    assert scorer.clip_i([images[0]], [(photos[0],)]) == [pytest.approx(1.0, abs=1e-5)]
    assert scorer.clip_i([images[0]], [()]) == [None]


def test_what_was_embedded_is_not_embedded_again(scorer: ClipScorer, photos: list[Path]) -> None:
    images = [picture_pixels(path) for path in photos]
    for _ in range(3):
        scorer.clip_t(images, ["a dog", "a cat", "a dog"])
        scorer.clip_i(images, [(photos[0], photos[1])] * 3)
    assert scorer._texts.num_computed == 2 and scorer._pictures.num_computed == 2
    small = ClipScorer(scorer.model, scorer.tokenizer, scorer.preparation, batch_size=2, max_bytes=0)
    assert small.clip_t(images, TEXTS[:3]) == pytest.approx(scorer.clip_t(images, TEXTS[:3]), abs=1e-6)


def test_reward_takes_the_target_or_the_prompt(scorer: ClipScorer, photos: list[Path]) -> None:
    image = picture_pixels(photos[0])
    reward = ClipTextReward(scorer, scale=2.0)
    values = reward(images=[image, None, image], prompts=["two dogs", "x", "two dogs"], target=["a red bus", "y", None])
    first, third = scorer.clip_t([image, image], ["a red bus", "two dogs"])
    assert values == [pytest.approx(2 * first), None, pytest.approx(2 * third)] and first != third
    assert reward(images=[None], prompts=["x"], target=[None]) == [None]


def test_likeness_reward_needs_a_drawing_and_a_real_picture(scorer: ClipScorer, photos: list[Path]) -> None:
    images = [picture_pixels(photos[0]), None, picture_pixels(photos[1])]
    values = ClipImageReward(scorer)(images=images, real_image=[photos[2], photos[0], None])
    assert values == [*scorer.clip_i([images[0]], [(photos[2],)]), None, None]  # type: ignore[list-item]


def test_features_serve_the_identity_reward(scorer: ClipScorer, photos: list[Path]) -> None:
    image = picture_pixels(photos[1])
    value = IdentityReward(scorer.image_features, 64)(images=[image], references=[(photos[1], photos[2])])[0]
    similar = scorer.clip_i([image], [(photos[2],)])[0]
    assert value is not None and similar is not None and 0.5 < value <= 1.0
    with pytest.raises(ValueError, match="found values in"):
        scorer.image_features(image[None] * 255)


def test_loading_needs_safetensors_and_names_the_picture(folder: Path, tmp_path: Path, scorer: ClipScorer) -> None:
    copied = tmp_path / "pickled"
    copied.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (copied / path.name).write_bytes(path.read_bytes())
    torch.save(scorer.model.state_dict(), copied / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        ClipScorer.from_pretrained(copied)
    with pytest.raises(PictureError, match=r"missing\.png"):
        scorer.clip_i([torch.rand(3, 8, 8)], [(tmp_path / "missing.png",)])


def test_bfloat16_is_close(folder: Path, scorer: ClipScorer, photos: list[Path]) -> None:
    low = ClipScorer.from_pretrained(folder, dtype=torch.bfloat16)
    image = picture_pixels(photos[0])
    assert low.image_features(image[None]).dtype == torch.float32
    assert low.clip_t([image], ["two dogs"]) == pytest.approx(scorer.clip_t([image], ["two dogs"]), abs=0.05)


def test_a_preview_is_scored_as_released(scorer: ClipScorer, photos: list[Path]) -> None:
    """.65 CLIP-I + .35 CLIP-T of prompt and own words; None where one of them is missing, not another scale."""
    image = picture_pixels(photos[0])
    images, references = [image, image, None], [tuple(photos), (), tuple(photos)]
    values = ClipPreview(scorer)(
        images=images, references=references, prompts=["draw it"] * 3, completions=["a cat"] * 3
    )
    likeness, fit = scorer.clip_i([image], [photos])[0], scorer.clip_t([image], ["draw it a cat"])[0]
    assert likeness is not None
    assert values == [pytest.approx(0.65 * likeness + 0.35 * fit), None, None]
    assert ClipPreview(scorer)(images=[None], references=[()], prompts=[""], completions=[""]) == [None]


def test_a_text_that_is_cut_is_told_of_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sync-R1's released preview left CLIP-T out there, so that its score changed its scale in silence."""
    scorer = ClipScorer.from_pretrained(folder)
    long = "a very long request " * 40
    scorer.text_features(["two dogs"])
    assert not caplog.records
    features = scorer.text_features(["two dogs", long])
    scorer.text_features([long + "more"])
    (record,) = caplog.records
    assert "CLIP reads 77 tokens" in record.getMessage() and "a very long request" in record.getMessage()
    assert features.isfinite().all() and float(features.norm(dim=1)[1]) == pytest.approx(1.0)
