"""How much a drawing looks like a given picture: 1 - LPIPS over a network's features, or 1 - RMSE over pixel windows.

    LPIPS  sum_l mean_hw sum_c w_lc (a_lchw - b_lchw)^2     a, b: features of layer l, scaled to length 1 over channels
    RMSE   mean over channels and windows of sqrt(mean over a window's pixels of (x - y)^2)

Given pictures are asked about again and again (every member of a group, every epoch), so their features are kept.
Source: Zhang et al. 2018 and the `lpips` package, whose networks and weights these are; the RMSE is that of `sewar` and
torchmetrics.  CoRL's released code takes LPIPS (VGG, 224 pixels) first and the RMSE (384 pixels, window 8) later.

Dims: n images, L layers, C channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import syncr1.engine.compat  # noqa: F401  (before lpips: see there)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...pictures import ImageRef
from ...reasons import reading
from .batches import Kept, by_shape, check_images, picture_pixels, stretched

ImageSimilarity = Callable[[Sequence[Tensor], Sequence[ImageRef]], list[float]]
"""Drawings [3, H, W] in [0, 1] of any sizes, and the picture that each is compared with, to likeness; 1 = the same."""

Net = Literal["vgg", "alex", "squeeze"]
Features = tuple[Tensor, ...]
"""Of one picture: [C_l, H_l, W_l] for each layer, of length 1 over channels."""

MIN_SIDE = 32
"""The networks halve a picture up to five times: smaller ones are scaled up."""
FeatureKey = tuple[ImageRef, tuple[int, int]]
"""A picture, and the height and width that it is stretched to."""


def num_bytes(features: Features) -> int:
    """What the features of one picture take."""
    return sum(layer.numel() * layer.element_size() for layer in features)


class LpipsSimilarity:
    """1 - LPIPS: 1 for the same picture, less for others, below 0 in principle.

    Args:
        net: the trunk; the released code takes "vgg", the most expensive of the three.
        size: drawing and picture are stretched to this many pixels squared; None: the picture to the drawing's size.
        weights: of the trunk. "torchvision": ImageNet's, which torchvision downloads at first use. A path: a
            safetensors file of torchvision's state dict. "random": a seeded trunk, for work without a connection;
            trained layer weights mean nothing over it, so layers and channels count alike, scaled such that values
            stay in [0, 1]. They are no LPIPS, but still order pictures by likeness.
        max_bytes: of pictures' features that stay on the device (VGG at 224 pixels: 24.5 MB a picture).
        batch_size: drawings in one pass.

    Raises:
        ValueError: an unknown net, or a weights file that is not of this trunk.
    """

    def __init__(
        self,
        net: Net = "vgg",
        *,
        size: int | None = 224,
        weights: str | Path = "torchvision",
        device: torch.device | str = "cpu",
        max_bytes: int = 1 << 28,
        batch_size: int = 16,
    ) -> None:
        self.model = lpips_model(net, weights).to(device)
        self.size, self.device, self.batch_size = size, torch.device(device), batch_size
        self.known: Kept[FeatureKey, Features] = Kept(self._of_pictures, num_bytes, max_bytes)

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], pictures: Sequence[ImageRef]) -> list[float]:
        """n drawings [3, H, W] float in [0, 1] and n pictures -> n values.

        Raises:
            ValueError: see `check_images`.
            PictureError: a picture cannot be read.
        """
        check_images("lpips", images)
        values = [0.0] * len(images)
        first = {ref: index for index, ref in reversed(list(enumerate(pictures)))}
        for members in by_shape(images):
            members.sort(key=lambda i: first[pictures[i]])  # a batch then needs few pictures
            for part in (members[i : i + self.batch_size] for i in range(0, len(members), self.batch_size)):
                distances = self._distances(torch.stack([images[i] for i in part]), [pictures[i] for i in part])
                for index, distance in zip(part, distances.tolist(), strict=True):
                    values[index] = 1.0 - distance
        return values

    def _distances(self, images: Tensor, pictures: Sequence[ImageRef]) -> Tensor:
        """[n] float32."""
        height, width = (self.size or max(side, MIN_SIDE) for side in images.shape[2:])
        keys: list[FeatureKey] = [(ref, (height, width)) for ref in pictures]
        known = self.known(keys)
        order = {key: row for row, key in enumerate(known)}
        rows = torch.tensor([order[key] for key in keys], device=self.device)
        drawn = self._features(stretched(images.to(self.device, torch.float32), (height, width)))
        distances = torch.zeros(len(keys), device=self.device)
        for layer, weigh in enumerate(self.model.lins):
            given = torch.stack([features[layer] for features in known.values()])
            distances += weigh((drawn[layer] - given[rows]).square_()).mean((1, 2, 3))
        return distances

    def _features(self, images: Tensor) -> Features:
        """Images [n, 3, H, W] in [0, 1] -> [n, C_l, H_l, W_l] of each layer, of length 1 over channels."""
        from lpips import normalize_tensor

        return tuple(normalize_tensor(out) for out in self.model.net(self.model.scaling_layer(2.0 * images - 1.0)))

    def _of_pictures(self, keys: list[FeatureKey]) -> list[Features]:
        found: list[Features] = []
        for part in (keys[i : i + self.batch_size] for i in range(0, len(keys), self.batch_size)):
            pixels = [stretched(picture_pixels(ref)[None].to(self.device), size) for ref, size in part]
            layers = self._features(torch.cat(pixels))
            # Views would keep the whole batch in memory.
            found += [tuple(layer[row].clone() for layer in layers) for row in range(len(part))]
        return found


def lpips_model(net: Net, weights: str | Path) -> Any:
    """The `lpips` package's `LPIPS` in eval mode on the CPU, without gradients; nothing is unpickled.

    Raises:
        ValueError: an unknown net, or a weights file that is not of this trunk.
    """
    import lpips

    if net not in _TORCHVISION:
        raise ValueError(f"lpips: unknown net {net!r}; expected one of {', '.join(_TORCHVISION)}")
    # VGG's classifier, 120 M weights to be dropped, is not even drawn; lpips calls torchvision by a deprecated name.
    with warnings.catch_warnings(action="ignore"), torch.device("meta"):
        model = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    model = model.to_empty(device="cpu")
    model.scaling_layer = lpips.ScalingLayer()
    if weights == "random":
        _draw_trunk(model)
    else:
        _load_trunk(model.net, net, weights)
        layers = torch.load(Path(lpips.__file__).parent / f"weights/v0.1/{net}.pth", "cpu", weights_only=True)
        loaded = model.load_state_dict(layers, strict=False)  # `lins` holds the same modules as `lin0`, `lin1`, ...
        if loaded.unexpected_keys or any(key.startswith("lin") and key[3] != "s" for key in loaded.missing_keys):
            raise ValueError(f"lpips: the package's layer weights for {net!r} do not fit its network: {loaded}")
    return model.eval().requires_grad_(False)


_TORCHVISION = {"vgg": "VGG16_Weights", "alex": "AlexNet_Weights", "squeeze": "SqueezeNet1_1_Weights"}


def _load_trunk(trunk: nn.Module, net: Net, weights: str | Path) -> None:
    if weights == "torchvision":
        from torchvision import models

        source = getattr(models, _TORCHVISION[net]).IMAGENET1K_V1
        with reading("lpips_weights", weights):
            found = source.get_state_dict(progress=False, check_hash=True, weights_only=True)
    else:
        from safetensors.torch import load_file

        with reading("lpips_weights", weights):
            found = load_file(weights)
    own = {}
    for name, value in trunk.state_dict().items():
        theirs = "features." + name.split(".", 1)[1]  # lpips cuts `features` into slices and keeps the numbers
        if theirs not in found or found[theirs].shape != value.shape:
            shape = tuple(found[theirs].shape) if theirs in found else "nothing"
            raise ConfigError(
                f"lpips_weights: expected torchvision's state dict for {net!r}, got {weights}: {theirs} should be "
                f"{tuple(value.shape)}, found {shape}; give that of lpips_net"
            )
        own[name] = found[theirs]
    trunk.load_state_dict(own)


def _draw_trunk(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.net.parameters():
        if parameter.dim() == 1:
            nn.init.zeros_(parameter)
        else:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
    for layer in model.lins:
        # Two vectors of length 1 without negative entries differ by at most 2 in square.
        nn.init.constant_(layer.model[1].weight, 1.0 / (2 * len(model.lins)))


def rmse_windows(images: Tensor, others: Tensor, window: int = 8) -> Tensor:
    """Root mean squared error within every window of pixels, averaged over windows and channels.

        F.avg_pool2d((images - others) ** 2, window, stride=1).sqrt().mean((1, 2, 3))   # less a window at the edge

    Args:
        images, others: [n, 3, H, W] float.
        window: pixels squared; the border left out is that of torchmetrics and `sewar`, which cut where they padded.

    Returns:
        [n], of the images' dtype and range.

    Raises:
        ValueError: shapes differ, or the window does not fit.
    """
    if images.shape != others.shape or images.ndim != 4:
        raise ValueError(f"rmse_windows: expected two [n, 3, H, W], got {tuple(images.shape)}, {tuple(others.shape)}")
    cut = round(window / 2)
    first = cut - window // 2
    if window < 2 or min(images.shape[2:]) <= 2 * cut:
        side = min(images.shape[2:])
        raise ValueError(f"rmse_windows: a window of {window} needs 2 or more and images above {2 * cut}, got {side}")
    errors = F.avg_pool2d((images - others).square(), window, stride=1).sqrt()
    height, width = (side - 2 * cut for side in images.shape[2:])
    return errors[:, :, first : first + height, first : first + width].mean((1, 2, 3))


class RmseSimilarity:
    """1 - RMSE over windows: 1 for the same picture, 0 for black and white.

    Args:
        size: both are stretched to this many pixels squared; None: the picture to the drawing's size.
        window: pixels squared.
        scale: of pixel differences. The released code measures in [-1, 1], which is 2, and may go down to -1.
        max_bytes: of pictures that are kept, on the CPU.
    """

    def __init__(
        self, *, size: int | None = 384, window: int = 8, scale: float = 1.0, max_bytes: int = 1 << 28
    ) -> None:
        self.size, self.window, self.scale = size, window, scale
        self.known: Kept[FeatureKey, Features] = Kept(self._of_pictures, num_bytes, max_bytes)

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], pictures: Sequence[ImageRef]) -> list[float]:
        """As `LpipsSimilarity`; drawings at or below the window's size are scaled up."""
        check_images("rmse", images)
        values = [0.0] * len(images)
        for members in by_shape(images):
            drawn = torch.stack([images[i] for i in members]).float()
            smallest = 2 * round(self.window / 2) + 1
            height, width = (self.size or max(side, smallest) for side in drawn.shape[2:])
            keys: list[FeatureKey] = [(pictures[i], (height, width)) for i in members]
            known = self.known(keys)
            given = torch.stack([known[key][0] for key in keys]).to(drawn.device)
            errors = rmse_windows(stretched(drawn, (height, width)), given, self.window)
            for index, error in zip(members, errors.tolist(), strict=True):
                values[index] = 1.0 - self.scale * error
        return values

    def _of_pictures(self, keys: list[FeatureKey]) -> list[Features]:
        return [(stretched(picture_pixels(ref)[None], size)[0],) for ref, size in keys]
