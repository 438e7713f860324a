"""Opening sources: what is found where, paths that stay in their folder, and errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_sources import X2X_ROWS, write_forms, write_lines, write_photos

from syncr1.engine.data.table import HUB_NAME, Table, open_table
from syncr1.engine.errors import DataError
from syncr1.engine.pictures import StoredImage, open_picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "album"
    write_photos(root)
    return root


def texts(table: Table) -> list[str]:
    return [row["prompt"] for row in table]


def test_rows_by_index(folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_text('\ufeff{"prompt": "a", "image": "coffee.jpg"}\n\n{"prompt": "b", "images": []}\r\n', "utf-8")
    table = open_table(path)
    assert len(table) == 2 and table.columns == ("prompt", "image", "images")
    assert table.row(0) == {"prompt": "a", "image": (folder / "coffee.jpg").resolve(), "images": None}
    assert table.row(1) == {"prompt": "b", "image": None, "images": ()} and table.where(1) == "rows.jsonl, line 3"
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"row {index} of 2"):
            table.row(index)


def test_json_as_a_list_or_as_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=2))
    write_lines(tmp_path / "lines.json", rows)
    assert [texts(open_table(tmp_path / name)) for name in ("list.json", "lines.json")] == [["a", "b"]] * 2


def test_the_split_of_a_folder(tmp_path: Path) -> None:
    for name, text in (("train.jsonl", "a"), ("test.jsonl", "b"), ("dev/metadata.jsonl", "c")):
        write_lines(tmp_path / name, [{"prompt": text}])
    assert [texts(open_table(tmp_path, split)) for split in ("train", "test", "dev")] == [["a"], ["b"], ["c"]]
    with pytest.raises(DataError, match=r"nothing for the split 'val'; found \['test', 'train'\]; add val.jsonl"):
        open_table(tmp_path, "val")
    only = tmp_path / "only"
    write_lines(only / "metadata.jsonl", [{"prompt": "d"}])
    assert texts(open_table(only)) == ["d"]
    with pytest.raises(DataError, match="nothing for the split 'test'"):
        open_table(only, "test")


def test_shards_in_order_and_complete(tmp_path: Path) -> None:
    for index in (1, 0, 2):
        table = pa.table({"prompt": [f"{index}a", f"{index}b"]})
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / f"train-0000{index}-of-00003.parquet")
    pq.write_table(pa.table({"prompt": ["t"]}), tmp_path / "data" / "test-00000-of-00001.parquet")
    table = open_table(tmp_path)
    assert texts(table) == ["0a", "0b", "1a", "1b", "2a", "2b"]
    assert table.where(5) == "train-00002-of-00003.parquet, row 1"
    assert texts(open_table(tmp_path, "test")) == ["t"]
    with pytest.raises(DataError, match="nothing for the split 'dev'"):
        open_table(tmp_path, "dev")
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match=r"has 2 shards .* download the missing ones"):
        open_table(tmp_path)


def test_shards_whose_names_tell_no_split_are_training_data(tmp_path: Path) -> None:
    for name in ("0000.parquet", "0001.parquet"):
        pq.write_table(pa.table({"prompt": [name]}), tmp_path / name)
    assert texts(open_table(tmp_path)) == ["0000.parquet", "0001.parquet"]
    with pytest.raises(DataError, match="nothing for the split 'test'"):
        open_table(tmp_path, "test")


def test_saved_data_sets(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_photos(photos)
    forms = write_forms(photos, X2X_ROWS, "real_image")
    assert len(open_table(forms["splits"], "test")) == 1 and len(open_table(forms["saved"])) == 4
    with pytest.raises(DataError, match=r"no split 'dev'; it has \['test', 'train'\]"):
        open_table(forms["splits"], "dev")
    (forms["saved"] / "state.json").write_text("{")
    with pytest.raises(DataError, match="not readable as a saved data set"):
        open_table(forms["saved"])


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "link.png", "linked/secret.png"])
def test_a_path_that_leads_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    outside = folder.parent / "secret.png"
    outside.write_bytes((folder / "rocket.png").read_bytes())
    (folder / "a").mkdir()
    (folder / "link.png").symlink_to(outside)
    (folder / "linked").symlink_to(folder.parent)
    assert (folder / name).is_file()
    table = open_table(write_lines(folder / "train.jsonl", [{"prompt": "a", "image": name}]))
    with pytest.raises(DataError, match=r"line 1.*lies outside"):
        table.row(0)


def test_paths_that_are_none(folder: Path) -> None:
    (folder / "loop.png").symlink_to(folder / "loop.png")
    cases = {
        "/etc/passwd": "is absolute and leads out of .*; give it relative",
        "https://example.org/a.png": "is an address; download",
        "missing.png": "does not exist",
        ".": "does not exist",
        "loop.png": "no usable path|does not exist",
        "a\0b.png": "no usable path",
        "x" * 5000: "no usable path",
    }
    table = open_table(write_lines(folder / "train.jsonl", [{"image": name} for name in cases] + [{"image": 3}]))
    for index, message in enumerate([*cases.values(), "must be a path"]):
        with pytest.raises(DataError, match=f"line {index + 1}, column 'image'.*({message})"):
            table.row(index)


def test_paths_may_be_relative_to_another_folder(folder: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "elsewhere" / "rows.jsonl", [{"images": [{"path": "coffee.jpg"}, "chelsea.jpg"]}])
    found = open_table(path, image_folder=folder).row(0)["images"]
    assert [ref.name for ref in found] == ["coffee.jpg", "chelsea.jpg"]


def test_a_path_inside_data_is_confined_too(folder: Path) -> None:
    """Hugging Face's Image column may name a file instead of holding its bytes."""
    (folder.parent / "secret.png").write_bytes((folder / "rocket.png").read_bytes())
    cells = [{"bytes": None, "path": name} for name in ("coffee.jpg", "../secret.png", "/etc/passwd")]
    pq.write_table(
        pa.table({"image": pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))}),
        folder / "train.parquet",
    )
    table = open_table(folder)
    assert table.row(0)["image"] == (folder / "coffee.jpg").resolve()
    for index, message in ((1, "lies outside"), (2, "is absolute")):
        with pytest.raises(DataError, match=message):
            table.row(index)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": ', "line 2: expected a JSON object, got what is not readable"),
        ("a.jsonl", b'[{"prompt": "a"}]', "line 1: expected an object"),
        ("a.jsonl", b"[" * 100_000, "line 1: expected a JSON object, got what is not readable"),
        ("a.jsonl", b"\xff\xfe", "not readable as UTF-8"),
        ("a.jsonl", b"\n", "has no rows"),
        ("a.json", b'[{"prompt": "a"}, 3]', "entry 1: expected an object"),
        ("a.json", b"[}", "not readable as JSON"),
        ("a.parquet", b"PAR1 no parquet", "not readable as parquet"),
        ("a.parquet", b"", "not readable as parquet"),
        ("a.xls", b"prompt\na", "suffix '.xls' is not understood"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, contents: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(contents)
    with pytest.raises(DataError, match=message) as caught:
        open_table(path)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "source", ["../nothing", "nothing.jsonl", "a/b/c", "https://example.org/a", "x" * 5000, "a\0/b"]
)
def test_sources_that_are_nothing(source: str) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_table(source)


def test_names_on_the_hub() -> None:
    match = HUB_NAME.fullmatch("mm-vl/x2x_rft_22k@abc123:default")
    assert match is not None and match.groupdict() == {
        "name": "mm-vl/x2x_rft_22k",
        "revision": "abc123",
        "config": "default",
    }
    assert not HUB_NAME.fullmatch("../up") and not HUB_NAME.fullmatch("/abs/path")


def test_a_name_on_the_hub_goes_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` itself reads a local folder by a relative name of the same form, so all but the download is real."""
    photos = tmp_path / "photos"
    write_photos(photos)
    forms = write_forms(photos, X2X_ROWS, "real_image")
    from syncr1.engine.data import table as module

    source = tmp_path / "org" / "name"
    source.parent.mkdir()
    forms["shards"].rename(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    match = HUB_NAME.fullmatch("org/name")
    assert match is not None
    found = Table("org/name", [module._from_hub(match, "train", None)])
    assert len(found) == 4 and isinstance(found.row(0)["real_image"], StoredImage)
    assert found.row(0)["real_image"].name == "org/name, row 0, real_image"
    assert open_picture(found.row(3)["real_image"]).size == (96, 64)


def test_without_a_network_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for holder in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(holder, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="org/name: no such file or folder here") as caught:
        open_table("org/name")
    assert "download it where there is a network and give its folder" in str(caught.value)
