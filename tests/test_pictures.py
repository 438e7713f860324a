"""Pictures from anywhere: every mode becomes RGB as an eye would see it, and what cannot be read says so by name."""

from __future__ import annotations

import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from syncr1.engine.pictures import MAX_PIXELS, PictureError, load_pictures, open_picture, to_tensor

RED = (200, 30, 40)


def saved(picture: Image.Image, path: Path, **options: object) -> Path:
    picture.save(path, **options)
    return path


def centre(path: Path) -> tuple[int, ...]:
    picture = open_picture(path)
    assert picture.mode == "RGB"
    return picture.getpixel((picture.width // 2, picture.height // 2))  # type: ignore[return-value]


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tiff"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, suffix: str) -> None:
    photo = Image.fromarray(data.coffee()).resize((60, 40))
    path = saved(photo, tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(np.asarray(open_picture(path)), np.asarray(photo))


def test_jpeg_in_grey_and_cmyk(tmp_path: Path) -> None:
    grey = open_picture(saved(Image.new("L", (8, 8), 90), tmp_path / "grey.jpg"))
    assert grey.mode == "RGB" and np.ptp(np.asarray(grey)) <= 2
    pixel = centre(saved(Image.new("RGB", (8, 8), RED).convert("CMYK"), tmp_path / "cmyk.jpg"))
    assert all(abs(a - b) <= 12 for a, b in zip(pixel, RED, strict=True))


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    """RGBA, LA and palettes: transparent is white and not whatever colour hides below, half is half way."""
    assert centre(saved(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), tmp_path / "a.png")) == (255, 255, 255)
    assert centre(saved(Image.new("RGBA", (4, 4), (*RED, 255)), tmp_path / "b.png")) == RED
    half = centre(saved(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), tmp_path / "c.png"))
    assert all(abs(value - 127) <= 1 for value in half)
    assert centre(saved(Image.new("LA", (4, 4), (0, 0)), tmp_path / "d.png")) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, *RED])
    assert centre(saved(palette, tmp_path / "e.png")) == RED
    assert centre(saved(palette, tmp_path / "f.png", transparency=1)) == (255, 255, 255)
    assert centre(saved(Image.new("1", (4, 4), 1), tmp_path / "g.png")) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    """A 16-bit scan is not a white sheet; low values of a 16-bit file that only uses 8 bits keep their meaning."""
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(8, 0)
    read = np.asarray(open_picture(saved(Image.fromarray(ramp), tmp_path / "ramp.png")))[0, :, 0]
    assert read[0] == 0 and read[-1] == 255 and np.abs(read.astype(int) - np.linspace(0, 255, 64)).max() <= 1
    small = np.full((4, 4), 200, dtype=np.uint16)
    assert centre(saved(Image.fromarray(small), tmp_path / "small.png")) == (200, 200, 200)
    deep = Image.fromarray(np.full((4, 4), 128.0, dtype=np.float32))
    assert centre(saved(deep, tmp_path / "float.tiff")) == (128, 128, 128)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    """A phone's portrait photo stands upright."""
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste((255, 255, 255), (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to show
    read = open_picture(saved(picture, tmp_path / "phone.png", exif=exif))
    assert read.size == (20, 40) and read.getpixel((10, 2)) == (255, 255, 255) and read.getpixel((10, 35)) == (0, 0, 0)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("white", "black")]
    assert centre(saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])) == (255, 255, 255)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """A small file that claims to be enormous costs neither time nor memory."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    for side in (12_000, 100_000):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        path = tmp_path / f"bomb{side}.png"
        path.write_bytes(
            b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
        )
        start = time.monotonic()
        with pytest.raises(PictureError, match=f"bomb{side}.png"):
            open_picture(path)
        assert side * side > MAX_PIXELS and time.monotonic() - start < 1


def test_what_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    whole = saved(Image.fromarray(data.coffee()), tmp_path / "whole.png").read_bytes()
    cases = {
        "truncated.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "text.png": b"not a picture",
        "script.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "broken.png": whole[:40] + b"\xff" * 200 + whole[240:],
    }
    for name, contents in cases.items():
        path = tmp_path / name
        path.write_bytes(contents)
        with pytest.raises(PictureError, match=name):
            open_picture(path)
    for path in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(PictureError, match="cannot be read as a picture"):
            open_picture(path)


@pytest.mark.parametrize("size", [(100, 50), (50, 100), (64, 64), (7, 300), (1, 1)])
def test_scaled_to_cover_and_cropped_at_the_centre(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, RED)
    tensor = to_tensor(picture, 32)
    assert tensor.shape == (3, 32, 32) and tensor.dtype == torch.float32
    expected = torch.tensor(RED)[:, None, None] / 255
    torch.testing.assert_close(tensor, expected.expand(3, 32, 32), rtol=0, atol=0.01)


def test_the_middle_is_what_stays() -> None:
    wide = Image.new("RGB", (96, 32), "black")
    wide.paste((255, 255, 255), (32, 0, 64, 32))
    assert to_tensor(wide, 32).mean() > 0.97


def test_loading_many(tmp_path: Path) -> None:
    photos = [
        saved(Image.fromarray(p), tmp_path / f"{i}.png")
        for i, p in enumerate((data.astronaut(), data.cat(), data.coffee()))
    ]
    for side in (32, 96):
        batch = load_pictures(photos, side)
        assert batch.shape == (3, 3, side, side) and 0.0 <= float(batch.min()) <= float(batch.max()) <= 1.0
        assert torch.equal(batch[1], to_tensor(open_picture(photos[1]), side))
        batch[0] = 0
        assert load_pictures(photos, side)[0].any(), "a caller's changes do not reach what is kept"
