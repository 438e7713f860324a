"""What rewards of pictures share: checks, batches of one shape, and a cache for many threads."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from syncr1.engine.rewards.builtin.batches import Kept, by_shape, check_images, picture_pixels


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(3, 8, 8) * 2 - 1, r"found values in \[-[01.].*image \+ 1"),
        (torch.rand(3, 8, 8) * 255, "expected images in .0, 1., found values in"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.full((3, 8, 8), math.nan), "nan"),
        (torch.zeros(1, 8, 8), r"\(1, 8, 8\)"),
        (torch.zeros(3, 0, 8), r"\(3, 0, 8\)"),
        (torch.zeros(2, 3, 8, 8), r"\(2, 3, 8, 8\)"),
    ],
)
def test_images_out_of_range_are_refused(image: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"mine: .*{message}"):
        check_images("mine", [torch.zeros(3, 8, 8), image])


def test_rounding_is_no_fault_and_low_precision_is_read() -> None:
    check_images("x", [torch.tensor([-1e-4, 1.0 + 1e-4, 0.5]).reshape(3, 1, 1), torch.ones(3, 2, 2).bfloat16()])
    check_images("x", [])


def test_images_of_one_shape_go_together() -> None:
    shapes = [(3, 2, 4), (3, 4, 2), (3, 2, 4), (1, 2, 4)]
    assert by_shape([torch.zeros(shape) for shape in shapes]) == [[0, 2], [1], [3]] and by_shape([]) == []


def test_a_picture_keeps_its_size(tmp_path: Path) -> None:
    Image.new("RGB", (5, 3), (255, 51, 0)).save(tmp_path / "a.png")
    pixels = picture_pixels(tmp_path / "a.png")
    assert pixels.shape == (3, 3, 5) and pixels.dtype == torch.float32
    assert pixels[:, 0, 0].tolist() == pytest.approx([1.0, 0.2, 0.0])


def test_kept_computes_once_for_many_threads() -> None:
    asked: list[int] = []

    def compute(keys: list[int]) -> list[int]:
        asked.extend(keys)
        return [key * key for key in keys]

    kept = Kept(compute, lambda _: 1, 100)
    threads = [threading.Thread(target=lambda: [kept([i, i + 1]) for i in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(asked) == list(range(51)) and kept([7, 3]) == {7: 49, 3: 9} and kept.num_bytes == 51


def test_kept_forgets_what_was_asked_longest_ago() -> None:
    kept: Kept[str, str] = Kept(lambda keys: [2 * key for key in keys], len, 6)
    assert kept(["a", "b", "c"]) == {"a": "aa", "b": "bb", "c": "cc"} and kept.num_bytes == 6
    kept(["a"])
    kept(["d"])
    assert len(kept) == 3 and kept.num_computed == 4
    kept(["a", "c"])
    assert kept.num_computed == 4, "b went"
    assert kept(["eeee"]) == {"eeee": "eeeeeeee"} and len(kept) == 0, "more than fits is given, not kept"


def test_kept_survives_a_computation_that_fails() -> None:
    """A photo that cannot be read today: nothing is remembered of it, and the lock is free."""
    down = True

    def compute(keys: list[int]) -> list[int]:
        if down:
            raise OSError("the disk is away")
        return keys

    kept = Kept(compute, lambda _: 1, 10)
    with pytest.raises(OSError, match="away"):
        kept([1, 2])
    down = False
    assert kept([1]) == {1: 1} and kept.num_bytes == 1


def test_kept_of_a_picture_goes_with_the_files_bytes(tmp_path: Path) -> None:
    """A path is a key for as long as its file is what it was; so is a tuple with one."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"red")
    kept: Kept[object, bytes] = Kept(lambda keys: [path.read_bytes()] * len(keys), len, 100)
    for key in (path, (path, (2, 2))):
        path.write_bytes(b"red")
        assert kept([key]) == {key: b"red"}
        computed = kept.num_computed
        assert kept([key, key]) == {key: b"red"} and kept.num_computed == computed
        path.write_bytes(b"blue")
        assert kept([key]) == {key: b"blue"}
    path.unlink()
    missing = Kept(lambda keys: [b"gone"] * len(keys), len, 100)
    assert missing([path]) == {path: b"gone"}
