"""Pictures from anywhere: every mode becomes RGB as an eye would see it, and what cannot be read says so by name."""

from __future__ import annotations

import gzip
import io
import os
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from syncr1.engine import pictures
from syncr1.engine.errors import PictureError
from syncr1.engine.pictures import MAX_PIXELS, MemoryImage, StoredImage, load_pictures, open_picture, to_tensor

RED = (200, 30, 40)
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Stored(StoredImage):
    """Bytes, or a picture, as a data file would give them."""

    name: str
    contents: bytes | Image.Image

    def read(self) -> bytes | Image.Image:
        return self.contents


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


def test_the_depth_of_grey_is_told_by_the_mode(tmp_path: Path) -> None:
    """A 16-bit scan is not a white sheet, and a dark one not a bright one: what is in a picture does not tell it."""
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(8, 0)
    read = np.asarray(open_picture(saved(Image.fromarray(ramp), tmp_path / "ramp.png")))[0, :, 0]
    assert read[0] == 0 and read[-1] == 255 and np.abs(read.astype(int) - np.linspace(0, 255, 64)).max() <= 1

    def grey(value: float, kind: type, name: str) -> tuple[int, ...]:
        return centre(saved(Image.fromarray(np.full((4, 4), value, dtype=kind)), tmp_path / name))

    for suffix in ("png", "tiff"):
        assert grey(200, np.uint16, f"dark.{suffix}") == (0, 0, 0), "200 of 65535"
        assert grey(200 * 257, np.uint16, f"light.{suffix}") == (200, 200, 200)
        assert grey(200, np.uint8, f"eight.{suffix}") == (200, 200, 200)
    assert grey(128.0, np.float32, "float.tiff") == (128, 128, 128)
    assert grey(0.5, np.float32, "unit.tiff") == (127, 127, 127)
    for value, kind in ((200, np.int32), (70_000.0, np.float32)):
        with pytest.raises(PictureError, match=r"deep\.tiff.*whose white nobody knows: save it with 8 or 16 bits"):
            grey(value, kind, "deep.tiff")
        with pytest.raises(PictureError, match="whose white nobody knows"):
            pictures.check_picture(tmp_path / "deep.tiff")


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


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bomb(side: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def fits_bomb() -> bytes:
    """A FITS file of 30,000 x 30,000 zeros in a gzip of some kilobytes per gigabyte; here 64 MB of them."""
    cards = {"SIMPLE": "T", "BITPIX": "8", "NAXIS": "2", "NAXIS1": "30000", "NAXIS2": "30000", "ZCMPTYPE": "'GZIP_1'"}
    header = "".join(f"{name:8}= {value:>20}".ljust(80) for name, value in cards.items()) + "END".ljust(80)
    return header.ljust(2880).encode() + gzip.compress(b"\0" * 64_000_000)


def claiming(picture_format: str, at: int, layout: str, *numbers: int) -> bytes:
    """A small animation or picture whose header claims another size."""
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    more = {"save_all": True, "append_images": frames[1:]} if picture_format in ("WEBP", "GIF") else {}
    frames[0].save(buffer, picture_format, **more)
    contents = bytearray(buffer.getvalue())
    struct.pack_into(layout, contents, at, *numbers)
    return bytes(contents)


def bombs() -> dict[str, bytes]:
    jpeg = claiming("JPEG", 0, "")
    size_at = jpeg.index(b"\xff\xc0") + 5
    return {
        "huge.png": png_bomb(30_000),
        "large.png": png_bomb(12_000),
        "larger.png": png_bomb(100_000),
        "stars.fits": fits_bomb(),
        "canvas.webp": claiming("WEBP", 24, "<HBHB", 16_382, 0, 16_382, 0),
        "screen.gif": claiming("GIF", 6, "<HH", 65_535, 65_535),
        "huge.bmp": claiming("BMP", 18, "<ii", 30_000, 30_000),
        "huge.jpg": claiming("JPEG", size_at, ">HH", 65_000, 65_000),
    }


WATCH = """
import sys, time
from pathlib import Path
from syncr1.engine.pictures import PictureError, StoredImage, open_picture

class Cell(StoredImage):
    def __init__(self, path):
        self.path, self.name = path, f"cell {path.name}"
    def read(self):
        return self.path.read_bytes()

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

open_picture(Path(sys.argv[1]) / "ok.png")
before, start = peak(), time.monotonic()
for path in sorted(Path(sys.argv[1]).glob("*.*")):
    for ref in (path, Cell(path)):
        try:
            open_picture(ref)
            print("opened", path.name)
        except PictureError as error:
            assert path.name in str(error), error
print("grew by MB", (peak() - before) // 1024, "seconds", int(time.monotonic() - start))
"""


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """A small file that claims to be enormous costs neither time nor memory, whether file or cell of a table."""
    saved(Image.new("RGB", (8, 8), RED), tmp_path / "ok.png")
    for name, contents in bombs().items():
        (tmp_path / name).write_bytes(contents)
        assert len(contents) < 100_000
    done = subprocess.run([sys.executable, "-c", WATCH, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    *opened, last = done.stdout.splitlines()
    assert opened == ["opened ok.png"] * 2
    words = last.split()
    assert int(words[3]) < 100 and int(words[5]) < 5, last
    assert MAX_PIXELS < 12_000**2


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
        with pytest.raises(PictureError, match=f"row 3 of {name}"):
            open_picture(Stored(f"row 3 of {name}", contents))
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


# Pictures that are no files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "png"), ("CMYK", "jpg"), ("L", "jpg"), ("RGBA", "png"), ("P", "gif"), ("I;16", "png"), ("1", "bmp")],
)
def test_bytes_are_read_like_the_file(tmp_path: Path, mode: str, suffix: str) -> None:
    photo = Image.fromarray(data.astronaut()).resize((40, 30))
    if mode == "I;16":
        photo = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    path = saved(photo if mode == "I;16" else photo.convert(mode), tmp_path / f"a.{suffix}")
    ref = Stored("cell", path.read_bytes())
    expected = np.asarray(open_picture(path))
    assert np.array_equal(np.asarray(open_picture(ref)), expected) and expected.shape == (30, 40, 3)
    for size in (24, 80):
        assert torch.equal(load_pictures([ref, path], size)[0], load_pictures([path], size)[0])


def test_a_decoded_picture_may_be_stored_and_stays_usable() -> None:
    picture = Image.new("RGBA", (6, 4), (*RED, 0))
    for _ in range(2):
        assert open_picture(Stored("cell", picture)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(PictureError, match="big: 9000x9000 pixels"):
        open_picture(Stored("big", Image.new("1", (9000, 9000))))


def test_what_a_stored_picture_raises_names_it() -> None:
    class Gone(StoredImage):
        name = "row 7"

        def read(self) -> bytes:
            raise OSError("disk is gone")

    with pytest.raises(PictureError, match=r"row 7: cannot be read as a picture \(disk is gone"):
        open_picture(Gone())


def test_a_drawn_picture_is_shown_as_it_is() -> None:
    """Exactly, where its size fits; and as a key of dicts it is itself, however many pixels it shares with another."""
    drawn = torch.rand(3, 24, 24, requires_grad=True)
    one, other = MemoryImage("first", drawn), MemoryImage("first", drawn)
    assert len({one, other, one}) == 2 and one != other
    loaded = load_pictures([one, other], 24)
    assert torch.equal(loaded[0], drawn.detach()) and not loaded.requires_grad
    loaded[0] = 0
    assert drawn.any()
    assert (load_pictures([one], 12)[0] - to_tensor(open_picture(one), 12)).abs().max() == 0
    assert np.abs(np.asarray(open_picture(one)) / 255 - drawn.detach().permute(1, 2, 0).numpy()).max() <= 0.5 / 255


@pytest.mark.parametrize(
    "image", [torch.rand(1, 4, 4), torch.rand(4, 4), torch.rand(3, 0, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)]
)
def test_what_is_no_image_is_refused(image: torch.Tensor) -> None:
    with pytest.raises(PictureError, match=r"drawn: expected a float image \[3, H, W\]"):
        MemoryImage("drawn", image)


@pytest.mark.parametrize("value", [float("nan"), 1.5, -0.1])
def test_values_out_of_range_are_refused(value: float) -> None:
    with pytest.raises(PictureError, match=r"drawn: values must be finite and in \[0, 1\]"):
        load_pictures([MemoryImage("drawn", torch.full((3, 4, 4), value))], 4)


def small_files() -> dict[str, bytes]:
    photo = Image.fromarray(data.coffee()).resize((12, 9))
    found = {}
    for name in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        photo.save(buffer, name, **({"exif": exif} if name in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
        found[name] = buffer.getvalue()
    return found


SMALL = small_files()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of what it skips
@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(SMALL)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0, 1) | st.just(1.0),
)
def test_a_damaged_file_gives_a_picture_or_a_picture_error(
    name: str, changes: list[tuple[float, int]], kept: float
) -> None:
    contents = bytearray(SMALL[name])
    for place, value in changes:
        contents[int(place * len(contents))] = value
    try:
        picture = open_picture(Stored("cell", bytes(contents[: int(kept * len(contents))])))
    except PictureError as error:
        assert str(error).startswith("cell: ")
    else:
        assert picture.mode == "RGB" and picture.width * picture.height <= MAX_PIXELS


@pytest.mark.parametrize("size", [16, 64, 65])
def test_a_picture_overwritten_under_its_path_is_seen(tmp_path: Path, size: int) -> None:
    """Rewritten in place, replaced by another file, and put back with another time of change."""
    path, other = tmp_path / "a.bmp", tmp_path / "b.bmp"

    def colour() -> list[int]:
        return (load_pictures([path], size)[0, :, 0, 0] * 255).round().int().tolist()

    for number, rgb in enumerate([(200, 30, 40), (30, 200, 40), (30, 40, 200)]):
        Image.new("RGB", (20, 20), rgb).save(path)  # of one size in bytes
        os.utime(path, ns=(number, number))
        assert colour() == list(rgb) == colour()
    Image.new("RGB", (20, 20), RED).save(other)
    other.replace(path)
    assert colour() == list(RED)
    path.unlink()
    with pytest.raises(PictureError, match=r"a\.bmp"):
        colour()


def test_a_picture_first_loaded_in_inference_mode_trains(tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (8, 8), RED), tmp_path / "a.png")
    with torch.inference_mode():
        first = load_pictures([path], 8)
    images = load_pictures([path], 8)
    weight = torch.ones(1, 3, 8, 8, requires_grad=True)
    torch.nn.functional.conv2d(images, weight).sum().backward()
    assert images.equal(first) and weight.grad is not None
    assert not pictures._load_small(path, 8, pictures.to_tensor, pictures.version_of(path)).is_inference()
