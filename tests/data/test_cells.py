"""Pictures inside data files: opening reads none of them, a picture is read alone, varying forms are understood."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_sources import PHOTOS, encoded
from helpers import make_prompt, sharp_policy

from syncr1.engine.data.table import open_table
from syncr1.engine.errors import PictureError
from syncr1.engine.pictures import StoredImage, load_pictures, open_picture
from syncr1.engine.rollout.sampler import generate
from syncr1.engine.rollout.sampling import Sampling

NUM_ROWS, SIZE = 2000, 20_000


def bytes_read() -> int:
    """By this process through system calls, so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 MB of pictures, no two alike (what follows a JPEG's end is ignored), in row groups of 10 MB."""
    path = tmp_path_factory.mktemp("big") / "train.parquet"
    start = encoded("chelsea.jpg")
    cells = [{"bytes": start + os.urandom(SIZE - len(start)), "path": f"{i}.jpg"} for i in range(NUM_ROWS)]
    pq.write_table(pa.table({"prompt": [f"p{i}" for i in range(NUM_ROWS)], "image": cells}), path, row_group_size=500)
    assert path.stat().st_size > 0.98 * NUM_ROWS * SIZE
    return path


def test_opening_reads_no_picture(big: Path) -> None:
    before, held = bytes_read(), pa.total_allocated_bytes()
    table = open_table(big)
    refs = [row["image"] for row in table]
    assert len(set(refs)) == NUM_ROWS == len(refs)
    assert bytes_read() - before < 1_000_000
    assert pa.total_allocated_bytes() - held < 1_000_000


def test_a_picture_costs_no_more_than_its_row_group(big: Path) -> None:
    table, pool, usual = open_table(big), pa.system_memory_pool(), pa.default_memory_pool()
    ref, before = table.row(510)["image"], bytes_read()
    pa.set_memory_pool(pool)
    try:
        assert open_picture(ref).size == (96, 64)
    finally:
        pa.set_memory_pool(usual)
    assert bytes_read() - before < 600 * SIZE
    assert 0 < pool.max_memory() < 1200 * SIZE and pool.bytes_allocated() == 0


def test_several_threads_read_at_once(big: Path) -> None:
    table, found = open_table(big), dict[int, bytes]()

    def read(index: int) -> None:
        found[index] = table.row(index)["image"].read()

    threads = [threading.Thread(target=read, args=(index,)) for index in range(3, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    column = pq.read_table(big, columns=["image"])["image"]
    assert {index: column[index].as_py()["bytes"] for index in range(3, 12)} == found


FULL = pa.struct({"bytes": pa.binary(), "path": pa.string()})
BARE = pa.struct({"bytes": pa.large_binary()})


@pytest.mark.parametrize("form", ["struct", "without path", "binary", "large binary"])
@pytest.mark.parametrize("missing", [(), (1,), (0, 1, 2)])
def test_rows_without_a_picture(tmp_path: Path, form: str, missing: tuple[int, ...]) -> None:
    held = [None if i in missing else encoded("rocket.png") for i in range(3)]
    kind = {"struct": FULL, "without path": BARE, "binary": pa.binary(), "large binary": pa.large_binary()}[form]
    cells: list[Any] = list(held)
    if form in ("struct", "without path"):
        more = {"path": None} if form == "struct" else {}
        cells = [None if item is None else {"bytes": item, **more} for item in held]
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), tmp_path / "train.parquet", row_group_size=2)
    found = [row["image"] for row in open_table(tmp_path)]
    assert [ref is None for ref in found] == [i in missing for i in range(3)]
    assert all(np.asarray(open_picture(ref)).any() for ref in found if ref is not None)


@pytest.mark.parametrize("kind", [FULL, BARE, pa.binary()])
def test_lists_of_pictures(tmp_path: Path, kind: pa.DataType) -> None:
    pictures: list[Any] = [encoded(name) for name in PHOTOS]
    if kind != pa.binary():
        pictures = [{"bytes": item, **({"path": "x"} if kind == FULL else {})} for item in pictures]
    cells = pa.array([[pictures[0]], [], None, pictures[1:]], pa.list_(kind))
    pq.write_table(pa.table({"images": cells, "n": [1, 2, 3, 4]}), tmp_path / "train.parquet")
    rows = [row["images"] for row in open_table(tmp_path)]
    assert [len(refs) for refs in rows] == [1, 0, 0, 3]
    assert rows[3][2].name == "train.parquet, row 3, images[2]"
    expected = [np.asarray(open_picture(ref)) for ref in rows[3]]
    assert len({array.tobytes() for array in expected}) == 3


def test_a_cell_is_itself_wherever_it_is_opened(big: Path, tmp_path: Path) -> None:
    first, again = (open_table(big).row(7)["image"] for _ in range(2))
    assert first == again and hash(first) == hash(again) and first != open_table(big).row(8)["image"]
    copy = tmp_path / "train.parquet"
    pq.write_table(pq.read_table(big).slice(0, 10), copy)
    other = open_table(copy).row(7)["image"]
    assert other.name == first.name and other != first, "a file of the same name is another file"
    assert pickle.loads(pickle.dumps(first)) == first


def test_a_file_that_shrank(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    cells = pa.array([{"bytes": encoded("coffee.jpg"), "path": None}] * 9, FULL)
    pq.write_table(pa.table({"image": cells}), path)
    ref = open_table(path).row(8)["image"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PictureError, match=r"train\.parquet, row 8, image"):
        open_picture(ref)
    path.unlink()
    with pytest.raises(PictureError, match=r"train\.parquet, row 8, image"):
        open_picture(ref)
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"image": pa.array([{"bytes": None, "path": None}], FULL)}), empty)
    for row in open_table(empty):
        with pytest.raises(PictureError, match="neither bytes nor a path"):
            open_picture(row["image"])


def test_policies_see_stored_pictures_once(tmp_path: Path) -> None:
    """Two prompts that show the same cell share its embeddings; a file with the same pixels looks the same."""
    (tmp_path / "coffee.png").write_bytes(encoded("coffee.png"))
    cell = pa.array([{"bytes": encoded("coffee.png"), "path": None}], FULL)
    pq.write_table(pa.table({"image": cell}), tmp_path / "train.parquet")
    ref, same = (open_table(tmp_path).row(0)["image"] for _ in range(2))
    assert isinstance(ref, StoredImage) and ref is not same
    policy, seen = sharp_policy(), []
    prompts = [
        make_prompt(text, ("text",), image)
        for text, image in (("what is it?", ref), ("where?", same), ("what is it?", tmp_path / "coffee.png"))
    ]
    see = policy.see
    policy.see = lambda images: seen.append(len(images)) or see(images)  # type: ignore[assignment,func-returns-value]
    rollouts = generate(policy, prompts, Sampling(num_generations=1, max_text_tokens=4))
    assert seen == [2]
    shown = [rollout.prompt_image for rollout in rollouts]
    assert shown[0] is not None and shown[1] is not None and shown[2] is not None
    torch.testing.assert_close(shown[0], shown[2])
    assert torch.equal(shown[0], shown[1])
    assert load_pictures([ref, same], 48).shape == (2, 3, 48, 48)
