"""LPIPS against the `lpips` package and torchmetrics, the windowed RMSE against torchmetrics; and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before lpips and torchmetrics

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from torch import Tensor
from torchmetrics.functional.image import root_mean_squared_error_using_sliding_window
from torchmetrics.functional.image.lpips import _LPIPS, ScalingLayer

from syncr1.engine.errors import PictureError
from syncr1.engine.pictures import MemoryImage
from syncr1.engine.rewards.builtin.batches import picture_pixels, stretched
from syncr1.engine.rewards.builtin.perceptual import LpipsSimilarity, RmseSimilarity, lpips_model, rmse_windows

NETS = ("vgg", "alex", "squeeze")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("photos")
    paths = {}
    for name in ("cat", "astronaut", "coffee"):
        paths[name] = folder / f"{name}.png"
        Image.fromarray(getattr(data, name)()).resize((90, 70)).save(paths[name])
    return paths


@pytest.fixture(scope="module")
def trunks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trunks of any weights, as torchvision's state dicts, a classifier beside them."""
    folder = tmp_path_factory.mktemp("trunks")
    for net in NETS:
        theirs = {"classifier.1.weight": torch.zeros(2, 2)}
        for name, value in lpips_model(net, "random").net.state_dict().items():
            bias = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * 0.1
            theirs["features." + name.split(".", 1)[1]] = value + bias if value.dim() == 1 else value
        save_file(theirs, folder / f"{net}.safetensors")
    return {net: folder / f"{net}.safetensors" for net in NETS}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def torchmetrics_lpips(net: Any, trunk: torch.nn.Module) -> torch.nn.Module:
    """Its network with its own trained layers over the given trunk, whose parameters come in the same order."""
    with torch.device("meta"):  # drawing VGG's classifier takes ten seconds
        oracle = _LPIPS(pretrained=False, net=net, pnet_rand=True)
    oracle = oracle.to_empty(device="cpu")
    oracle.scaling_layer = ScalingLayer()
    for mine, theirs in zip(oracle.net.parameters(), trunk.parameters(), strict=True):
        mine.data.copy_(theirs)
    layers = Path(torchmetrics.functional.image.lpips.__file__).parent / f"lpips_models/{net}.pth"
    oracle.load_state_dict(torch.load(layers, "cpu", weights_only=True), strict=False)
    return oracle.eval()


@pytest.mark.filterwarnings("ignore:The parameter:UserWarning", "ignore:Arguments other:UserWarning")
@pytest.mark.parametrize("net", NETS)
def test_lpips_is_that_of_the_package_and_of_torchmetrics(
    net: Any, trunks: dict[str, Path], photos: dict[str, Path]
) -> None:
    """The same trunk and trained layers: one batch from kept features, pair by pair there."""
    reward = LpipsSimilarity(net, size=64, weights=trunks[net], batch_size=2)
    images = [noise(3, 64, 64), picture_pixels(photos["cat"]), noise(3, 40, 96, seed=1)]
    refs = [photos["coffee"], photos["astronaut"], photos["coffee"]]
    ours = reward(images, refs)
    oracle = torchmetrics_lpips(net, reward.model.net)
    for value, image, ref in zip(ours, images, refs, strict=True):
        pair = [stretched(x[None], (64, 64)) for x in (image, picture_pixels(ref))]
        assert value == pytest.approx(1.0 - float(reward.model(*pair, normalize=True)), abs=1e-6)
        assert value == pytest.approx(1.0 - float(oracle(*pair, normalize=True)), abs=1e-6)
    assert max(ours) < 0.99 and reward.known.num_computed == 2


def test_lpips_in_float64(trunks: dict[str, Path], photos: dict[str, Path]) -> None:
    reward = LpipsSimilarity("vgg", size=48, weights=trunks["vgg"])
    value = reward([noise(3, 48, 48)], [photos["cat"]])[0]
    pair = [stretched(x[None].double(), (48, 48)) for x in (noise(3, 48, 48), picture_pixels(photos["cat"]))]
    assert value == pytest.approx(1.0 - float(reward.model.double()(*pair, normalize=True)), abs=1e-5)


@pytest.mark.parametrize("size", [None, 64])
@pytest.mark.parametrize("net", NETS)
def test_the_same_picture_gives_one(
    net: Any, size: int | None, trunks: dict[str, Path], photos: dict[str, Path]
) -> None:
    reward = LpipsSimilarity(net, size=size, weights=trunks[net])
    same = [picture_pixels(path) for path in photos.values()]
    assert reward(same, list(photos.values())) == pytest.approx([1.0] * 3, abs=1e-6)
    for black in (torch.zeros(3, 50, 50), torch.ones(3, 1, 1), torch.zeros(3, 1, 7)):
        assert reward([black], [MemoryImage("black", black)]) == [pytest.approx(1.0, abs=1e-6)]
        value = reward([black], [photos["cat"]])[0]
        assert math.isfinite(value) and value < 0.99


def test_random_weights_are_seeded_in_range_and_order_pictures(photos: dict[str, Path]) -> None:
    reward, again = (LpipsSimilarity("alex", size=64, weights="random") for _ in range(2))
    cat = picture_pixels(photos["cat"])
    blurred = (cat + 0.1 * torch.randn(cat.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    images = [blurred, picture_pixels(photos["coffee"]), torch.zeros(3, 9, 9), torch.ones(3, 9, 9)]
    values = reward(images, [photos["cat"]] * 4)
    assert values == again(images, [photos["cat"]] * 4)
    assert all(0.0 <= value <= 1.0 for value in values) and values[0] > max(values[1:])


def test_stretching_is_torchvisions_resize(photos: dict[str, Path]) -> None:
    """The released code resizes 8-bit pictures; here nothing is rounded on the way."""
    from torchvision import transforms

    resize = transforms.Compose([transforms.Resize((56, 56)), transforms.ToTensor()])
    with Image.open(photos["cat"]) as picture:
        theirs = resize(picture)
    difference = stretched(picture_pixels(photos["cat"])[None], (56, 56))[0] - theirs
    assert float(difference.abs().max()) <= 1.01 / 255


def test_features_are_computed_once_and_forgotten_above_the_limit(photos: dict[str, Path]) -> None:
    reward = LpipsSimilarity("squeeze", size=32, weights="random")
    images = [noise(3, 32, 32, seed=i) for i in range(5)]
    refs = [photos["cat"], photos["coffee"], photos["cat"], photos["cat"], photos["coffee"]]
    first = reward(images, refs)
    assert reward.known.num_computed == 2 and reward(images, refs) == first and reward.known.num_computed == 2
    per_picture = reward.known.num_bytes // 2
    small = LpipsSimilarity("squeeze", size=32, weights="random", max_bytes=per_picture)
    assert small(images, refs) == pytest.approx(first, abs=1e-6)
    assert len(small.known) == 1 and small.known.num_bytes == per_picture
    nothing = LpipsSimilarity("squeeze", size=32, weights="random", max_bytes=0, batch_size=1)
    assert nothing(images, refs) == pytest.approx(first, abs=1e-6) and len(nothing.known) == 0
    assert reward([], []) == []


@pytest.mark.parametrize("kind", [LpipsSimilarity, RmseSimilarity])
def test_images_out_of_range_are_refused(kind: Any, photos: dict[str, Path]) -> None:
    reward = RmseSimilarity() if kind is RmseSimilarity else LpipsSimilarity("alex", weights="random")
    with pytest.raises(ValueError, match=r"found values in \[-[01.].*image \+ 1"):
        reward([torch.zeros(3, 8, 8), torch.linspace(-1, 1, 192).view(3, 8, 8)], [photos["cat"]] * 2)


def test_what_cannot_be_loaded_says_so(tmp_path: Path, trunks: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="unknown net 'resnet'"):
        LpipsSimilarity("resnet", weights="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"torchvision's state dict for 'vgg', got .*features"):
        LpipsSimilarity("vgg", weights=trunks["alex"])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    with pytest.raises(PictureError, match=r"broken\.png"):
        RmseSimilarity()([noise(3, 8, 8)], [broken])


@given(window=st.integers(2, 11), height=st.integers(14, 30), width=st.integers(14, 30), seed=st.integers(0, 100))
def test_rmse_is_torchmetrics_per_image(window: int, height: int, width: int, seed: int) -> None:
    a, b = noise(2, 2, 3, height, width, seed=seed, dtype=torch.float64)
    ours = rmse_windows(a, b, window)
    for row in range(2):
        oracle = root_mean_squared_error_using_sliding_window(a[row : row + 1], b[row : row + 1], window)
        assert float(ours[row]) == pytest.approx(float(oracle), abs=1e-12)


def test_rmse_similarity(photos: dict[str, Path]) -> None:
    reward = RmseSimilarity(size=96)
    images = [noise(3, 96, 96), picture_pixels(photos["cat"]), noise(3, 20, 30, seed=1)]
    values = reward(images, [photos["cat"]] * 3)
    for value, image in zip(values, images, strict=True):
        pair = [stretched(x[None], (96, 96)) for x in (image, picture_pixels(photos["cat"]))]
        assert value == pytest.approx(1.0 - float(root_mean_squared_error_using_sliding_window(*pair)), abs=1e-6)
    assert values[1] == 1.0 and min(values) >= 0.0 and reward.known.num_computed == 1
    black_and_white = RmseSimilarity(size=None)
    white = MemoryImage("white", torch.ones(3, 8, 8))
    assert black_and_white([torch.zeros(3, 1, 1), torch.zeros(3, 40, 9)], [white] * 2) == [0.0, 0.0]
    assert RmseSimilarity(size=None, scale=2.0)([torch.zeros(3, 9, 9)], [white]) == [-1.0]
    assert np.isclose(RmseSimilarity(size=64)([torch.full((3, 9, 9), 0.25)], [white])[0], 0.25)


@pytest.mark.parametrize(("side", "window"), [(8, 8), (30, 1), (4, 4)])
def test_rmse_windows_that_do_not_fit(side: int, window: int) -> None:
    with pytest.raises(ValueError, match=f"a window of {window} needs"):
        rmse_windows(noise(1, 3, side, side), noise(1, 3, side, side), window)
    with pytest.raises(ValueError, match="expected two"):
        rmse_windows(noise(1, 3, 9, 9), noise(1, 3, 9, 8))
