"""Photos as the checkpoint's own image processor prepares them, pixel for pixel; drawings as it takes them apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import numpy as np
import pytest
import torch
from helpers import sharp_policy
from PIL import Image
from small_emu3 import IMAGE_SIZE, sharp_emu3
from transformers import JanusImageProcessor
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from syncr1.engine.errors import ConfigError
from syncr1.engine.pictures import MemoryImage, load_pictures
from syncr1.engine.policies.base import Policy
from syncr1.engine.policies.inputs import check_fit
from syncr1.engine.policies.janus import JanusPolicy
from syncr1.engine.policies.picture_fit import Normalisation
from syncr1.engine.rewards.builtin.identity import IdentityReward

SHAPES = [(96, 32), (32, 96), (33, 32), (32, 32), (64, 64), (640, 480), (200, 7), (1, 50), (3, 3)]
"""Width and height."""
PUBLISHED = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PROCESSORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "as published": (JanusImageProcessor, PUBLISHED),
    "clip's colours": (JanusImageProcessor, {}),
    "pillow": (JanusImageProcessorPil, PUBLISHED),
    "bilinear": (JanusImageProcessor, {"resample": 2, **PUBLISHED}),
    "another factor": (JanusImageProcessor, {"rescale_factor": 1 / 127.5, "image_mean": [1] * 3, "image_std": [1] * 3}),
    "levels": (JanusImageProcessor, {"do_rescale": False, "image_mean": [0.5] * 3, "image_std": [60.0, 50.0, 70.0]}),
    "no normalisation": (JanusImageProcessor, {"do_normalize": False}),
    "colours of a grey": (JanusImageProcessorPil, {"image_mean": (0.2, 0.5, 0.9), "image_std": (0.25, 0.5, 1)}),
}


def photo(folder: Path, size: tuple[int, int]) -> Path:
    """Noise with a red left edge."""
    pixels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[:, : max(1, size[0] // 12)] = (255, 0, 0)
    path = folder / f"{size[0]}x{size[1]}.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    return [photo(folder, size) for size in SHAPES]


@pytest.fixture(scope="module")
def janus() -> JanusPolicy:
    return sharp_policy()


def with_processor(policy: JanusPolicy, kind: Any, settings: dict[str, Any]) -> JanusPolicy:
    """The same policy with another image processor."""
    made, processor = copy.copy(policy), copy.copy(policy.processor)
    processor.image_processor = kind(**{"size": {"height": 32, "width": 32}, "min_size": 14, **settings})
    made.processor = processor
    return made


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_the_processors(janus: JanusPolicy, photos: list[Path], name: str) -> None:
    """What the network is given of each photo, to the last places of float32; the levels before it exactly."""
    policy = with_processor(janus, *PROCESSORS[name])
    processor, images = policy.processor.image_processor, policy.load_images(photos)
    opened = [Image.open(path) for path in photos]
    levels = processor(opened, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(images * 255, levels.float())
    given = processor(opened, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(policy.normalisation().pixels(images), given, rtol=2e-6, atol=2e-6)
    with torch.no_grad():
        seen = policy.model.model.get_image_features(given, return_dict=True).pooler_output
        torch.testing.assert_close(policy.see(images), seen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PROCESSORS)
def test_drawings_are_taken_apart_as_the_processor_does(janus: JanusPolicy, name: str) -> None:
    """`postprocess`, whose levels are whole numbers; and the codes of given pictures are of what it would be given."""
    policy = with_processor(janus, *PROCESSORS[name])
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    normalisation, processor = policy.normalisation(), policy.processor.image_processor
    pixels = normalisation.pixels(images)
    torch.testing.assert_close(normalisation.images(pixels), images, rtol=0, atol=1e-6)
    if processor.do_rescale:
        made = processor.postprocess(list(pixels))["pixel_values"]
        for image, shown in zip(images, made, strict=True):
            levels = np.asarray(shown, dtype=np.float64)
            if processor.do_normalize:
                assert abs(image.numpy() * 255 - levels - 0.5).max() < 0.51, "it cuts off what is behind the point"
    codebook = policy.model.model.vqmodel
    assert torch.equal(policy.image_tokens(images), codebook.encode(pixels).image_tokens.view(2, -1))
    decoded = codebook.decode(policy.image_tokens(images))
    torch.testing.assert_close(policy.draw(policy.image_tokens(images)), normalisation.images(decoded))


def test_nothing_of_a_photo_is_lost(janus: JanusPolicy, photos: list[Path]) -> None:
    """The red edge of a 96 x 32 photo is there, at a third of the height; `crop` cuts it off, `pad` keeps it."""
    policy = copy.copy(janus)
    edge = {}
    for fit in ("processor", "crop", "pad"):
        policy.picture_fit = fit  # type: ignore[assignment]
        (image,) = policy.load_images(photos[:1])
        red = (image[0] > 0.6) & (image[1] < 0.4) & (image[2] < 0.4)
        edge[fit] = int(red[:, :2].sum())
        grey = (image * 255 == 127).all(0)
        assert int(grey[0].sum()) == (0 if fit == "crop" else 32)
    assert edge["crop"] < 10 and edge["processor"] > 19 and edge["pad"] > 19, "chance makes some pixels red"
    assert torch.equal(load_pictures(photos[:1], 32), load_pictures(photos[:1], 32)), "what is kept is kept by its fit"


def test_a_picture_that_was_drawn_is_seen_as_it_is(janus: JanusPolicy) -> None:
    """Neither rounded nor scaled; of another size it goes through the processor like a photo."""
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(janus.load_images([MemoryImage("x", image)])[0], image)
    larger = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    fitted = janus.load_images([MemoryImage("x", larger[0])])
    assert fitted.shape == (1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(janus.see(larger), janus.see(fitted))


@pytest.mark.parametrize("side", [32, 100, 45, 720, 8])
def test_emu3_scales_a_square_as_its_processor_does(tmp_path: Path, side: int) -> None:
    """Where that gives our size: the same filter, pixel for pixel, and the same codes."""
    policy = sharp_emu3()
    processor = policy.processor.image_processor
    picture = Image.open(photo(tmp_path, (side, side)))
    grid = copy.copy(processor)
    # Its own rounding of a square to that area may fall below it.
    grid.min_pixels, grid.max_pixels = IMAGE_SIZE**2, IMAGE_SIZE**2 + 1
    given = grid([picture], return_tensors="pt")["pixel_values"]
    assert given.shape[-2:] == (IMAGE_SIZE, IMAGE_SIZE)
    images = policy.load_images([tmp_path / f"{side}x{side}.png"])
    torch.testing.assert_close(policy.normalisation().pixels(images), given.float(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("size", [(96, 32), (640, 480), (200, 7), (1, 50)])
def test_emu3_shows_all_of_a_photo_on_its_square(tmp_path: Path, size: tuple[int, int]) -> None:
    """Its processor would give a grid of another shape, for which there are no places: the rest is its mean colour."""
    policy: Policy = sharp_emu3()
    policy.processor.image_processor.image_mean = [0.2, 0.4, 0.6]
    (image,) = policy.load_images([photo(tmp_path, size)])
    background = torch.tensor([51, 102, 153])[:, None, None]
    bare = ((image * 255).round() == background).all(0)
    width, height = (max(1, round(n * IMAGE_SIZE / max(size))) for n in size)
    assert int((~bare).sum()) == width * height
    inside = (~bare).nonzero()
    assert (inside.max(0).values - inside.min(0).values + 1).tolist() == [height, width]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no padding": ({"do_pad": False}, r"expected \[3, 32, 32\] of the checkpoint's JanusImageProcessor.*\[3, 21, 32\]"),
    "another size": ({"size": {"height": 48, "width": 48}}, r"got \[3, 48, 48\] for a picture of 48x32"),
    "no resizing": ({"do_resize": False}, r"got \[3, 48, 48\]"),
    "no square": ({"size": {"height": 32, "width": 40}}, r"cannot prepare a picture of 48x32 \(ValueError"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_processor_of_another_size_is_refused_by_name(janus: JanusPolicy, why: str) -> None:
    """When the model is loaded, with the ways out; one of which is taken."""
    settings, words = REFUSED[why]
    policy = with_processor(janus, JanusImageProcessor, PUBLISHED | settings)
    with pytest.raises(ConfigError, match=rf"picture_fit: .*{words}.*--picture_fit pad or crop"):
        check_fit(policy)
    for fit in ("pad", "crop"):
        policy.picture_fit = fit  # type: ignore[assignment]
        assert check_fit(policy) is policy


def test_emu3_without_resizing_takes_pictures_of_its_size_alone(tmp_path: Path) -> None:
    policy = sharp_emu3()
    policy.processor.image_processor.do_resize = False
    assert policy.load_images([photo(tmp_path, (32, 32))]).shape == (1, 3, 32, 32)
    with pytest.raises(ConfigError, match=r"expected \[3, 32, 32\] of the checkpoint's Emu3ImageProcessor"):
        policy.load_images([photo(tmp_path, (40, 32))])


@pytest.mark.parametrize("wrong", [{"image_std": [0.5, 0, 0.5]}, {"image_mean": None}, {"rescale_factor": 0.0}])
def test_a_normalisation_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    processor = JanusImageProcessor(**PUBLISHED)
    for name, value in wrong.items():
        setattr(processor, name, value)
    with pytest.raises(ConfigError, match="expected image_mean, image_std and rescale_factor other than 0"):
        Normalisation.of(processor)


def test_likeness_is_judged_of_photos_as_the_policy_sees_them(janus: JanusPolicy, photos: list[Path]) -> None:
    """A drawing that is the prepared photo is as like it as can be; prepared in another way it is not."""
    drawn = janus.load_images(photos[:1])[0]
    values = [
        IdentityReward(janus.vision_features, 32, **how)(images=[drawn], references=[(photos[0],)])[0]
        for how in ({"fit": janus.fit()}, {})
    ]
    assert values[0] == pytest.approx(1.0, abs=1e-5) and values[1] < 0.999


def test_the_fit_goes_with_copies(janus: JanusPolicy) -> None:
    policy: Policy = copy.copy(janus)
    policy.picture_fit, policy.template_kwargs = "pad", {"a": 1}
    frozen = policy.frozen_copy()
    assert (frozen.picture_fit, frozen.template_kwargs, frozen.fit()) == ("pad", {"a": 1}, policy.fit())
    assert janus.fit() == sharp_policy().fit() and hash(janus.fit()) == hash(sharp_policy().fit())
