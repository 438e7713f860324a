"""Draw a `Look` as a 32x32 picture: a big body with a face, a big hat, broad stripes, a two-tone place behind it.

Everything is large on purpose: a picture has to survive sixteen image tokens. Each layer is an anti-aliased coverage
mask (sampled 4x4 per pixel) over a transformed grid; masks are cached per (scale, shift), so a picture costs only a
few blends. `H = W = 32`; masks are float32 in [0, 1]; pictures are uint8 `[H, W, 3]`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .attributes import LOOKS, Look

SIZE: Final = 32
_OVERSAMPLE: Final = 4
_SCALES: Final = (0.94, 1.0, 1.06)
_MAX_SHIFT: Final = 2

Picture = NDArray[np.uint8]
Mask = NDArray[np.float32]

BODY_RGB: Final = {
    "red": (222, 44, 40),
    "green": (40, 176, 64),
    "blue": (40, 84, 226),
    "yellow": (250, 214, 30),
    "purple": (152, 50, 196),
}
_PLACE_RGB: Final = {  # sky, ground, scenery at the sides
    "beach": ((150, 218, 250), (240, 216, 160), (60, 150, 220)),
    "forest": ((196, 226, 178), (92, 112, 50), (30, 84, 44)),
    "city": ((206, 200, 204), (112, 112, 118), (150, 96, 78)),
    "moon": ((22, 20, 54), (84, 74, 120), (236, 236, 250)),
}
_OUTLINE_RGB: Final = (28, 22, 30)
_STRIPE_RGB: Final = (250, 250, 250)
_HAT_RGB: Final = {"crown": (255, 190, 0), "tophat": (24, 24, 28)}
_BAND_RGB: Final = {"crown": (214, 110, 0), "tophat": (236, 236, 236)}


def _grid(scale: float, shift_y: int, shift_x: int) -> tuple[Mask, Mask]:
    """Sample positions `[H*4, W*4]` in the creature's own frame: pixels, origin at the picture's centre."""
    steps = (np.arange(SIZE * _OVERSAMPLE, dtype=np.float32) + 0.5) / _OVERSAMPLE - SIZE / 2
    y = (steps - shift_y) / scale
    x = (steps - shift_x) / scale
    return np.meshgrid(y, x, indexing="ij")


def _coverage(inside: NDArray[np.bool_]) -> Mask:
    """Share of each pixel's samples inside: bool `[H*4, W*4]` to float32 `[H, W]`."""
    blocks = inside.reshape(SIZE, _OVERSAMPLE, SIZE, _OVERSAMPLE)
    return blocks.mean(axis=(1, 3), dtype=np.float32)


def _body(shape: str, y: Mask, x: Mask, grow: float) -> NDArray[np.bool_]:
    """Points inside the body grown by `grow` pixels; bodies span y from about -5 to 14, centred on y = 4.5."""
    v = y - 4.5
    if shape == "round":
        return v * v + x * x <= (9.6 + grow) ** 2
    if shape == "square":
        return np.maximum(abs(v), abs(x)) <= 8.9 + grow
    # An isosceles triangle, apex up; `slope` is half-width per unit of height, so its normal is hypot(1, slope) long.
    slope = 0.62
    left_right = abs(x) - slope * (v + 10.5)
    return (left_right <= grow * float(np.hypot(1.0, slope))) & (v <= 9.4 + grow)


def _hat(hat: str, y: Mask, x: Mask) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Points inside the hat and inside its band; hats sit between y = -15 and y = -4."""
    if hat == "crown":
        spikes = -9.0 - 5.0 * abs(2.0 * abs((x + 7.5) / 5.0 % 1.0 - 0.5))  # three points, at the ends and in between
        inside = (abs(x) <= 7.5) & (y <= -4.2) & (y >= spikes)
        return inside, inside & (y >= -6.4)
    brim = (abs(x) <= 9.0) & (y <= -4.0) & (y >= -6.4)
    tube = (abs(x) <= 5.4) & (y <= -5.0) & (y >= -15.0)
    return brim | tube, tube & (y <= -6.4) & (y >= -9.0)


@lru_cache(maxsize=128)
def _masks(scale: float, shift_y: int, shift_x: int) -> dict[str, Mask]:
    """Coverage of every layer of the creature under one transform."""
    y, x = _grid(scale, shift_y, shift_x)
    masks: dict[str, Mask] = {}
    for shape in ("round", "square", "triangle"):
        inner = _body(shape, y, x, 0.0)
        masks[f"{shape}/outline"] = _coverage(_body(shape, y, x, 1.1))
        masks[shape] = _coverage(inner)
        # Horizontal stripes, 4 px apart and 2 px wide, so that every 8x8 patch of the body holds some.
        masks[f"{shape}/striped"] = _coverage(inner & ((y - 0.6) % 5.0 < 2.5))
    for hat in ("crown", "tophat"):
        whole, band = _hat(hat, y, x)
        masks[hat], masks[f"{hat}/band"] = _coverage(whole), _coverage(band)
    eyes = np.minimum((x - 3.0) ** 2, (x + 3.0) ** 2) + (y - 3.6) ** 2
    masks["eye"], masks["pupil"] = _coverage(eyes <= 4.4), _coverage(eyes <= 1.5)
    return masks


@lru_cache(maxsize=16)
def _place(place: str, shift_x: int) -> NDArray[np.float32]:
    """The place behind the creature, float32 `[H, W, 3]` in 0-255; parallax is half the creature's shift."""
    y, x = _grid(1.0, 0, shift_x)
    sky, ground, side = (np.array(rgb, np.float32) for rgb in _PLACE_RGB[place])
    below = _coverage(y >= 6.0)[..., None]
    if place == "beach":
        scenery = (y >= 1.5) & (y < 6.0)  # the sea
    elif place == "forest":
        scenery = (abs(abs(x) - 13.0) < (y + 13.0) * 0.32) & (y < 6.0)  # a fir on each side
    elif place == "city":
        scenery = (abs(abs(x) - 13.0) < 3.2) & (y >= -9.0 - 2.5 * np.sign(x)) & (y < 6.0)  # towers
    else:
        stars = ((-13, -12), (-4, -13), (12, -11), (13, -1), (-7, 12))
        scenery = np.zeros(y.shape, bool)
        for row, column in stars:
            scenery |= (y - row) ** 2 + (x - column) ** 2 < 1.4
    picture = sky * (1 - below) + ground * below
    side_cover = _coverage(scenery)[..., None]
    return picture * (1 - side_cover) + side * side_cover


def _compose(look: Look, scale: float, shift_y: int, shift_x: int) -> NDArray[np.float32]:
    """Blend the layers back to front, float32 `[H, W, 3]` in 0-255."""
    masks = _masks(scale, shift_y, shift_x)
    layers = [(f"{look.shape}/outline", _OUTLINE_RGB), (look.shape, BODY_RGB[look.colour])]
    if look.pattern == "striped":
        layers.append((f"{look.shape}/striped", _STRIPE_RGB))
    layers += [("eye", (255, 255, 255)), ("pupil", _OUTLINE_RGB)]
    if look.hat != "none":
        layers += [(look.hat, _HAT_RGB[look.hat]), (f"{look.hat}/band", _BAND_RGB[look.hat])]
    picture = _place(look.place, round(shift_x / 2))
    for name, rgb in layers:
        cover = masks[name][..., None]
        picture = picture * (1 - cover) + np.array(rgb, np.float32) * cover
    return picture


def render(look: Look, *, variation: np.random.Generator | None = None) -> Picture:
    """Draw `look`; canonical without a generator, photo-like with one.

    Args:
        look: what to show.
        variation: draws shift (up to 2 px each way), scale (6 %), brightness (12 %), tint (5 % per channel) and sensor
            noise (up to 6 grey levels).

    Returns:
        uint8 `[32, 32, 3]`.
    """
    if variation is None:
        return _to_uint8(_compose(look, 1.0, 0, 0))
    shift_y, shift_x = (int(v) for v in variation.integers(-_MAX_SHIFT, _MAX_SHIFT + 1, size=2))
    picture = _compose(look, _SCALES[int(variation.integers(len(_SCALES)))], shift_y, shift_x)
    gain = variation.uniform(0.88, 1.12) * variation.uniform(0.95, 1.05, size=3)
    noise = variation.normal(0.0, variation.uniform(0.0, 6.0), size=picture.shape)
    return _to_uint8(picture * gain + noise)


def _to_uint8(picture: NDArray[np.floating]) -> Picture:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def canonical_table() -> Picture:
    """All 360 canonical renders, uint8 `[360, 32, 32, 3]`, rows in the order of `LOOKS`; read-only."""
    table = np.stack([render(look) for look in LOOKS])
    table.setflags(write=False)
    return table
