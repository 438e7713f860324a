"""Data files of every kind: the same rows out of each, faults by name, pictures by path, bytes and base64."""

from __future__ import annotations

import base64
import io
import json
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_sources import PHOTOS, broken_in, encoded, write_lines, write_photos

from syncr1.engine.data.faults import Faults
from syncr1.engine.data.forms.unseen import OWN
from syncr1.engine.data.loaded import load_chains, load_pairs
from syncr1.engine.data.opened import pictures_of
from syncr1.engine.data.samples import load_prompts, load_samples
from syncr1.engine.data.table import open_table
from syncr1.engine.errors import DataError, NoSplitError, PictureError
from syncr1.engine.pictures import StoredImage, open_picture
from syncr1.engine.records import Prompt

CELL = pa.struct({"bytes": pa.binary(), "path": pa.string()})
ASKED = {"question": "What is it?", "answer": "x"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_photos(tmp_path / "album")
    return tmp_path / "album"


def read(source: Path, **options: Any) -> list[Prompt]:
    return [prompt for sample in load_samples(source, instruction=None, **options) for prompt in sample]


def tar_of(path: Path, members: Mapping[str, bytes], mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, contents in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    return path


def cells_of(path: Path, cells: Sequence[Any], kind: pa.DataType = CELL, column: str = "image") -> Path:
    rows = {"question": ["?"] * len(cells), "answer": ["x"] * len(cells), column: pa.array(cells, kind)}
    table = pa.table(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        opener = pa.ipc.new_file if path.suffix == ".feather" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, opener(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


# Tables of text -------------------------------------------------------------------------------------------------------


def test_a_table_of_text(folder: Path) -> None:
    path = folder / "train.csv"
    path.write_text('\ufeffquestion,answer,image\r\n"Red, or\nblue?",red,coffee.jpg\r\n\r\nHow many?,2,chelsea.jpg\r\n')
    first, second = read(folder)
    assert first.text == "Red, or\nblue?" and second.answer == "2"
    assert second.images == ((folder / "chelsea.jpg").resolve(),)
    assert open_table(path).where(1) == "train.csv, line 5"
    (folder / "test.tsv").write_text("question\tanswer\nWhy?\tso\n")
    assert [prompt.answer for prompt in read(folder, split="test")] == ["so"]


def test_blanks_around_the_names_of_columns_are_none_of_them(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question, answer\nWhich?, red\n")
    (prompt,) = read(tmp_path / "rows.csv")
    assert (prompt.text, prompt.answer) == ("Which?", "red")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question,answer\na,b,c\n", "line 2: expected 2 cells, got 3; put texts with separators into quotes"),
        ("question,answer\na\n", "line 2: expected 2 cells, got 1"),
        ("question,question\na,b\n", "'question' twice"),
        ("question;answer\na;b\n", "line 1: expected columns separated by commas, got 'question;answer'; save it with"),
        ("question\tanswer\na\tb\n", r"expected columns separated by commas, got .*, or call it \.tsv"),
        ("", "has no rows"),
        ("question,answer\n", "has no rows"),
        ('question,answer\n"a,b\n', "not readable as a table"),
        ("question,answer\na,\n", "line 2: column 'answer' is missing or None"),
    ],
)
def test_tables_of_text_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "rows.csv")


def test_every_bad_line_of_a_table_of_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer\na\nb,1\nc\nd,2\n")
    faults = Faults(keep=True)
    loaded = load_pairs(tmp_path / "rows.csv", "train", faults=faults)
    assert [prompt.answer for prompt in loaded.prompts] == ["1", "2"] and len(faults.found) == 2


def test_digits_in_a_table_of_text_are_indices_where_options_stand_in_columns(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,A,B,answer\nWhich?,red,blue,1\nHow many?,2,1,0\n")
    assert [prompt.answer for prompt in read(tmp_path / "rows.csv")] == ["B", "A"]
    (tmp_path / "rows.csv").write_text("question,A,B,answer\nHow many?,2,1,1\nHow many?,2,1,1\n")
    assert [prompt.answer for prompt in read(tmp_path / "rows.csv")] == ["B", "B"], "index and text agree"
    (tmp_path / "rows.csv").write_text("question,A,B,C,answer\nHow many?,2,3,1,1\n")
    with pytest.raises(DataError, match="1 is the text of option C and the index"):
        read(tmp_path / "rows.csv")


# Tars -----------------------------------------------------------------------------------------------------------------


def test_a_tar_is_read_where_it_lies(tmp_path: Path) -> None:
    row = json.dumps(ASKED).encode()
    members = {"a/0.jpg": encoded("coffee.jpg"), "a/0.json": row, "a/1.json": row, "a/1.JPG": encoded("chelsea.jpg")}
    tar_of(tmp_path / "train-000000.tar", {**members, "._x.jpg": b"", "a/1.cls": b" 3 \n"})
    first, second = read(tmp_path)
    assert first.images and open_picture(first.images[0]).size == (96, 64) and first.images[0] != second.images[0]
    assert second.extra["cls"] == "3" and second.extra["__key__"] == "a/1"
    assert pickle.loads(pickle.dumps(first.images[0])) == first.images[0]
    assert broken_in(pictures_of([first, second])) == []


def test_captions_and_several_pictures_of_a_tar(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", {"0.txt": b"a cup\n", "0.jpg": encoded("coffee.jpg")})
    (drawing,) = read(tmp_path / "a.tar")
    assert drawing.text == "a cup" and drawing.segments == ("image",) and drawing.real_image is not None
    tar_of(tmp_path / "b.tar", {"0.l.jpg": encoded("coffee.jpg"), "0.r.jpg": encoded("rocket.png"), "0.txt": b"x"})
    assert len(open_table(tmp_path / "b.tar").row(0)["images"]) == 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0.json": b"[1]"}, r"0\.json: expected an object"),
        ({"0.json": b"{"}, r"0\.json: not readable as UTF-8 text or JSON"),
        ({"0.txt": b"\xff"}, r"0\.txt: not readable as UTF-8 text"),
        ({}, "has no rows"),
    ],
)
def test_tars_that_cannot_be_used(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_table(tar_of(tmp_path / "a.tar", members))


def test_a_tar_that_is_compressed_cut_off_or_none(tmp_path: Path) -> None:
    members = {"0.json": json.dumps(ASKED).encode(), "0.jpg": encoded("coffee.jpg")}
    with pytest.raises(DataError, match="expected a tar that is not compressed"):
        open_table(tar_of(tmp_path / "a.tar", members, "w:gz"))
    whole = tar_of(tmp_path / "b.tar", members)
    (prompt,) = read(whole)
    whole.write_bytes(whole.read_bytes()[:2048])
    assert prompt.images
    with pytest.raises(PictureError, match="shorter than when it was opened"):
        open_picture(prompt.images[0])
    (tmp_path / "c.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match="not readable as a tar"):
        open_table(tmp_path / "c.tar")


# Cells that hold paths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_cells_hold_bytes_or_paths(folder: Path, suffix: str) -> None:
    held = {"bytes": encoded("rocket.png"), "path": "rocket.png"}
    paths = [{"bytes": None, "path": name} for name in ("coffee.jpg", str(folder / "chelsea.jpg"))]
    for cells in ([held, held, *paths], [*paths, held], paths, [held, paths[0], held, paths[1], held]):
        found = [prompt.images[0] for prompt in read(cells_of(folder / f"train{suffix}", cells))]
        assert [isinstance(ref, StoredImage) for ref in found] == [cell["bytes"] is not None for cell in cells]
        assert all(ref is not None and open_picture(ref).size == (96, 64) for ref in found)
        assert broken_in([ref for ref in found if ref is not None]) == []


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_lists_of_cells_hold_bytes_or_paths(folder: Path, suffix: str) -> None:
    held, named = {"bytes": encoded("rocket.png"), "path": "x"}, {"bytes": None, "path": "coffee.jpg"}
    path = cells_of(folder / f"a{suffix}", [[held], [], [named, held], None, [named]], pa.list_(CELL), "images")
    rows = [row["images"] for row in open_table(path)]
    kinds = [[isinstance(ref, StoredImage) for ref in refs or ()] for refs in rows]
    assert kinds == [[True], [], [False, True], [], [False]]
    assert all(open_picture(ref).size == (96, 64) for refs in rows for ref in refs or ())


def test_a_path_that_names_nothing_is_told_at_load(folder: Path) -> None:
    for path, message in (("no.png", "does not exist"), ("/etc/passwd", "is absolute and leads out")):
        cells_of(folder / "train.parquet", [{"bytes": None, "path": path}])
        with pytest.raises(DataError, match=rf"row 0, column 'image': .*{message}"):
            read(folder)


def test_paths_are_relative_to_the_folder_that_is_named(folder: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows" / "train.jsonl", [{**ASKED, "image": "coffee.jpg"}])
    with pytest.raises(DataError, match="does not exist"):
        read(source)
    assert read(source, image_folder=folder)[0].images[0] == (folder / "coffee.jpg").resolve()
    loaded = load_pairs(source.parent, "train", image_folder=folder, faults=Faults())
    assert loaded.prompts[0].images[0] == (folder / "coffee.jpg").resolve()
    chains = write_lines(tmp_path / "rows" / "chains.jsonl", [{"prompt": "?", "answer": "x", "image": "coffee.jpg"}])
    assert load_chains(chains, image_folder=folder, faults=Faults()).prompts[0].images
    write_lines(source, [{**ASKED, "image": str(folder / "coffee.jpg")}])
    with pytest.raises(DataError, match="or name the folder of the pictures as image_folder"):
        read(source)
    assert read(source, image_folder=folder)[0].images[0] == (folder / "coffee.jpg").resolve()


# Base64 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("dress", ["{}", "data:image/png;base64,{}", "data:;base64,{}"])
def test_base64_is_a_picture(tmp_path: Path, name: str, dress: str) -> None:
    text = dress.format(base64.b64encode(encoded(name)).decode())
    broken_lines = "\n".join(text[at : at + 76] for at in range(0, len(text), 76)) if dress == "{}" else text
    cells: list[Any] = [text, {"bytes": text, "path": None}, [text], broken_lines]
    source = write_lines(tmp_path / "a.jsonl", [{**ASKED, "image": c} for c in cells])
    found = [prompt.images[0] for prompt in read(source)]
    assert all(ref is not None and open_picture(ref).size == (96, 64) for ref in found)
    assert found[0] == found[1] and pickle.loads(pickle.dumps(found[0])) == found[0]


def test_base64_that_is_cut_off_is_found_at_the_start(tmp_path: Path) -> None:
    whole = base64.b64encode(encoded("coffee.jpg")).decode()
    for text in (whole[: len(whole) // 2], whole[:-1], "data:image/png;base64,AAAA"):
        prompts = read(write_lines(tmp_path / "a.jsonl", [{**ASKED, "image": text}]))
        (said,) = broken_in(pictures_of(prompts))
        assert "a.jsonl, line 1, column 'image'" in said


# Columns of pictures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["coffee.jpg", ["coffee.jpg"], "https://example.org/a.png?x=1", "my photo.JPEG"])
@pytest.mark.parametrize("load", [load_samples, load_prompts])
def test_pictures_that_nothing_reads_are_refused(folder: Path, load: Any, value: object) -> None:
    row = {**ASKED, "prompt": "What?", "picture": value}
    with pytest.raises(DataError, match="column 'picture' holds pictures and nothing reads it; call it 'image'"):
        load(write_lines(folder / "train.jsonl", [row, {**row, "picture": None}]))
    assert load(write_lines(folder / "train.jsonl", [{**row, "picture": "a dog"}])), "a word is no picture"
    mine = {name: item for name, item in row.items() if name != "picture"} | {f"{OWN}picture": value}
    assert load(write_lines(folder / "train.jsonl", [mine])), "a reward's own"
    beside = {**row, "image": "coffee.jpg"}
    assert load(write_lines(folder / "train.jsonl", [beside])), "where a picture was found stands beside many"


def test_encoded_pictures_that_nothing_reads_are_refused(folder: Path) -> None:
    cell = {"bytes": encoded("coffee.jpg"), "path": None}
    with pytest.raises(DataError, match="column 'mask' holds pictures and nothing reads it"):
        read(cells_of(folder / "train.parquet", [cell], column="mask"))
    assert read(cells_of(folder / "train.parquet", [None], column="mask")), "an empty one"


# Splits ---------------------------------------------------------------------------------------------------------------


def test_a_split_that_is_named_behind_the_source(tmp_path: Path) -> None:
    for name in ("train", "test", "dev"):
        write_lines(tmp_path / f"{name}.jsonl", [{"prompt": name}])
    assert open_table(f"{tmp_path}#dev").row(0)["prompt"] == "dev"
    assert open_table(tmp_path, "test").row(0)["prompt"] == "test"
    with pytest.raises(NoSplitError, match="nothing for the split 'x'"):
        open_table(f"{tmp_path}#x")
    loaded = load_chains(Path(f"{tmp_path}#dev"), eval_data=Path(f"{tmp_path}#test"), faults=Faults())
    assert [prompt.text for prompt in loaded.prompts] == ["dev"]
    assert [prompt.text for prompt in loaded.held_out["pure_gen"]] == ["test"]
    alone = load_chains(Path(f"{tmp_path}#dev"), faults=Faults())
    assert not alone.held_out and "a named split has no held-out part; give one by --eval_data" in alone.no_scores
    (tmp_path / "a#b").mkdir()
    write_lines(tmp_path / "a#b" / "train.jsonl", [{"prompt": "x"}])
    assert open_table(tmp_path / "a#b").row(0)["prompt"] == "x", "a name with the mark in it"
