"""Identity by faces: the formula by hand, the fallback, and the packaged detector where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from syncr1.engine.errors import PictureError
from syncr1.engine.rewards.builtin.face import FaceIdentity, facenet
from syncr1.engine.rewards.builtin.identity import IdentityReward


class BrightFaces:
    """A picture whose middle is bright has a face; its embedding is the middle's colours. Counts what it is asked."""

    def __init__(self) -> None:
        self.num_images = 0

    def __call__(self, images: Tensor) -> list[Tensor | None]:
        self.num_images += len(images)
        height, width = images.shape[2:]
        middles = images[:, :, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4]
        means = middles.mean((2, 3))
        return [3.0 * mean if float(mean.max()) > 0.5 else None for mean in means]


def flat(*colour: float, size: int = 16) -> Tensor:
    return torch.tensor(colour, dtype=torch.float32)[:, None, None].expand(3, size, size).clone()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("faces")
    colours = {"red": (255, 0, 0), "orange": (255, 102, 0), "pink": (255, 204, 204), "dark": (40, 20, 10)}
    for name, colour in colours.items():
        Image.new("RGB", (20, 24), colour).save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in colours}


def likeness(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    first, second = torch.tensor(a).double(), torch.tensor(b).double()
    return max(0.0, 2 * (float(torch.nn.functional.cosine_similarity(first, second, dim=0)) - 0.5))


def test_the_mean_over_photos_of_the_released_formula(photos: dict[str, Path]) -> None:
    reward = FaceIdentity(BrightFaces())
    references = [(photos["red"], photos["pink"]), (photos["orange"],), (photos["red"], photos["dark"]), ()]
    drawn = [(1.0, 0.2, 0.0), (0.0, 0.0, 1.0), (0.8, 0.8, 0.0), (1.0, 0.0, 0.0)]
    values = reward(images=[flat(*c, size=8 + i) for i, c in enumerate(drawn)], references=references)
    pairs = [[(1.0, 0.0, 0.0), (1.0, 0.8, 0.8)], [(1.0, 0.4, 0.0)], [(1.0, 0.0, 0.0)]]
    for value, colour, known in zip(values, drawn, pairs, strict=False):
        assert value == pytest.approx(sum(likeness(colour, other) for other in known) / len(known), abs=1e-6)
    assert values[1] == 0.0 and values[3] is None  # a photo without a face is left out; no photos, no reward
    assert reward(images=[flat(1, 0, 0)], references=[(photos["red"],)]) == [pytest.approx(1.0, abs=1e-6)]


def test_without_a_face_the_fallback_speaks(photos: dict[str, Path]) -> None:
    other = IdentityReward(lambda images: images.flatten(1) - 0.5, 16)
    images = [flat(1, 0, 0), flat(0.1, 0, 0), flat(1, 0, 0), None, flat(0.1, 0, 0)]
    references = [(photos["red"],), (photos["red"],), (photos["dark"],), (photos["red"],), ()]
    alone = FaceIdentity(BrightFaces())(images=images, references=references)
    assert alone == [pytest.approx(1.0, abs=1e-6), None, None, None, None]
    both = FaceIdentity(BrightFaces(), other)(images=images, references=references, prompts=["x"] * 5)
    expected = other(images=images, references=references)
    assert both == [alone[0], expected[1], expected[2], None, None] and expected[1] is not None


def test_each_photo_is_embedded_once(photos: dict[str, Path]) -> None:
    embed = BrightFaces()
    reward = FaceIdentity(embed, max_cached=2)
    references = [(photos["red"], photos["dark"])] * 3
    first = reward(images=[flat(1, 0, 0)] * 3, references=references)
    assert embed.num_images == 3 + 2
    assert reward(images=[flat(1, 0, 0)] * 3, references=references) == first and embed.num_images == 3 + 2 + 3
    reward(images=[flat(1, 0, 0)], references=[(photos["pink"],)])
    assert len(reward.known) == 2
    assert reward(images=[None], references=[(photos["red"],)]) == [None] and reward(images=[], references=[]) == []


def test_faults_are_named(photos: dict[str, Path], tmp_path: Path) -> None:
    reward = FaceIdentity(BrightFaces())
    with pytest.raises(ValueError, match=r"face identity.*found values in"):
        reward(images=[flat(2, 0, 0)], references=[(photos["red"],)])
    with pytest.raises(PictureError, match=r"gone\.png"):
        reward(images=[flat(1, 0, 0)], references=[(tmp_path / "gone.png",)])


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps facenet-pytorch"):
        facenet()


@pytest.mark.slow
def test_facenet_finds_the_face_that_is_there(tmp_path: Path) -> None:
    """The package's detector, and its network with weights of our own; needs torchvision's compiled operators."""
    package = pytest.importorskip("facenet_pytorch")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(package.InceptionResnetV1(pretrained=None).state_dict(), tmp_path / "network.safetensors")
    try:
        embed = facenet(tmp_path / "network.safetensors", batch_size=2)
    except RuntimeError as error:
        assert "compiled operators" in str(error)
        pytest.skip(str(error))
    astronaut = torch.from_numpy(data.astronaut()).permute(2, 0, 1) / 255
    found = embed(torch.stack([astronaut, torch.full_like(astronaut, 0.5), astronaut.flip(2)]))
    assert found[1] is None and found[0] is not None and found[2] is not None
    assert found[0].shape == (512,) and float(found[0].norm()) == pytest.approx(1.0, abs=1e-4)
