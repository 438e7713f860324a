"""loaded.py, faults.py, unused.py, opened.py: every fault at once, what is not used, pictures opened once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
from data_sources import PHOTOS, X2X_ROWS, broken_in, write_forms, write_lines, write_photos
from PIL import Image

from syncr1.engine.data import decoders
from syncr1.engine.data.decode_worker import problem_of
from syncr1.engine.data.faults import Faults
from syncr1.engine.data.loaded import load_chains, load_pairs, read_whole
from syncr1.engine.data.opened import broken_pictures, pictures_error, pictures_of
from syncr1.engine.data.samples import load_samples
from syncr1.engine.data.seen import Seen
from syncr1.engine.data.unused import unused_files
from syncr1.engine.errors import DataError, PictureError
from syncr1.engine.pictures import MemoryImage


def write(path: Path, contents: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(contents if isinstance(contents, str) else json.dumps(contents))


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Two concepts without a fault, one of them held out."""
    for folder in ("concept/train/bobo", "concept/train/mimi", "concept/test/bobo"):
        write(tmp_path / folder / "t2i_conditions.json", {"explicit_personalized_driven_generation": ["a dog"]})
        for number in range(2):
            Image.effect_noise((40, 30), 50).save(tmp_path / folder / f"{number}.png")
    write(tmp_path / "concept/train/bobo/conversations.json", {"0.png": [{"query": "what?", "answer": "a dog"}]})
    return tmp_path


def kept(root: Path) -> tuple[Any, list[str]]:
    faults = Faults(keep=True)
    return load_chains(root, faults=faults), faults.found


# Faults ---------------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_fault_is_read_whole(album: Path) -> None:
    loaded, found = kept(album)
    assert found == [] and loaded.unused == [] and not loaded.no_scores
    assert len(loaded.prompts) == 3 and set(loaded.held_out) == {"pure_gen", "rec"}
    shutil.rmtree(album / "concept" / "test")
    assert "has no held-out part; give one by --eval_data" in kept(album)[0].no_scores, "no error: it can be trained on"


def test_every_fault_of_a_folder_is_told_with_its_file_and_entry(album: Path) -> None:
    train, test = album / "concept" / "train", album / "concept" / "test"
    good = {"query": "what?", "answer": "a dog"}
    entries = [good, {"query": "?"}, {"query": 3, "answer": "x"}, "a text", {**good, "options": ["a cat"]}]
    write(train / "bobo" / "conversations.json", {"0.png": entries, "7.png": [good]})
    write(train / "mimi" / "info.json", [])
    write(test / "bobo" / "vqa.json", "{nope")
    write(album / "general" / "test" / "captions.json", [{"caption": "a car"}, {"captoin": "a car"}])
    write(album / "general" / "train" / "vqa.json", {"1.png": [{"query": "?", "answer": ""}]})
    loaded, found = kept(album)
    for said in (
        "bobo/conversations.json, entry 1: column 'answer' is missing; found ['query']",
        "bobo/conversations.json, entry 2: column 'query' must be text, got 3",
        "bobo/conversations.json, entry 3: expected an object with 'query' and 'answer', got str",
        "bobo/conversations.json, entry 4: 'answer' 'a dog' is not among 'options' ['a cat']; add it",
        "bobo/conversations.json, entry 5: names a picture that does not exist",
        "mimi/info.json: expected an object, got list",
        "bobo/vqa.json: not readable as JSON",
        "captions.json, entry 1: column 'caption' must be text, got None",
        "general/train/vqa.json, entry 0: column 'answer' must be text, got ''",
    ):
        assert [line for line in found if said in line], said
    assert len([prompt for prompt in loaded.prompts if prompt.task == "vqa"]) == 1, "what is good is read"


def test_a_run_is_told_the_first_and_how_many_more(album: Path) -> None:
    write(album / "concept/train/bobo/conversations.json", {"0.png": [{"query": "?"}, {}, {}]})
    with pytest.raises(
        DataError, match=r"entry 0: .*\(and 2 more: python recipes/check_data.py --data .* lists them\)"
    ):
        read_whole(album, lambda faults: load_chains(album, faults=faults))


@pytest.mark.parametrize("recipe", [load_chains, lambda source, faults: load_pairs(source, "train", faults=faults)])
def test_every_fault_of_a_table_is_told_with_its_line(tmp_path: Path, recipe: Any) -> None:
    lines = ['{"prompt": "a cat"}', "{bad", "[1]", '{"prompt": ""}', '{"prompt": "a", "references": ["x.png"]}']
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, '{"prompt": "a dog"}']))
    faults = Faults(keep=True)
    loaded = recipe(tmp_path / "rows.jsonl", faults=faults)
    assert [prompt.text for prompt in loaded.prompts] == ["a cat", "a dog"]
    for line in (2, 3, 4, 5):
        assert len([said for said in faults.found if f"line {line}" in said]) == 1, line
    with pytest.raises(DataError, match="line 2"):
        load_samples(tmp_path / "rows.jsonl")


# Errors that point to where the fault is ------------------------------------------------------------------------------


def test_a_folder_in_no_form_is_told_both(tmp_path: Path, album: Path) -> None:
    (tmp_path / "mine" / "bobo").mkdir(parents=True)
    faults = Faults()
    with pytest.raises(DataError, match=r"add train.jsonl .*, or lay photos of concepts out as concept/train/<name>/"):
        load_chains(tmp_path / "mine", faults=faults)
    for inside in ("concept", "concept/train"):
        with pytest.raises(DataError, match=f"did you mean the UnifyBench.. folder {album}"):
            load_chains(album / inside, faults=faults)


def test_photos_that_are_there_and_not_read_are_named(album: Path) -> None:
    for number in range(2):
        (album / "concept/train/mimi" / f"{number}.png").rename(album / "concept/train/mimi" / f"{number}.heic")
    (said,) = (line for line in kept(album)[1] if "mimi" in line)
    assert "has no pictures; found 0.heic, 1.heic, whose suffix is not one of .bmp .gif" in said
    for number, suffix in enumerate(("gif", "TIFF")):  # as docs/data.md says
        Image.new("RGB", (8, 8)).save(album / "concept/train/mimi" / f"{number}.{suffix}")
    assert kept(album)[1] == []


def test_lists_that_no_task_takes_are_named(album: Path) -> None:
    write(album / "concept/train/mimi/t2i_conditions.json", {"prompts": ["a dog"]})
    loaded, (said,) = kept(album)
    assert "nothing to train on" in said and "found lists ['prompts']" in said
    assert any("the list 'prompts' is not read; known are personalized_driven_generation" in u for u in loaded.unused)


# What is not used -----------------------------------------------------------------------------------------------------


def test_mistyped_and_strange_files_are_said(album: Path) -> None:
    train = album / "concept" / "train"
    write(train / "bobo" / "conversation.json", {})
    write(train / "bobo" / "notes.txt", "")
    write(album / "concepts_list.json", ["bobo"])
    write(album / "generals" / "x.json", {})
    (album / "concept" / "test" / "ghost").mkdir()
    assert unused_files(album) == [
        "generals: not read; did you mean general?",
        "concept/train/bobo/conversation.json: not read; did you mean conversations.json?",
        "concept/train/bobo/notes.txt: not read; a picture's suffix is one of "
        ".bmp .gif .jpeg .jpg .png .tif .tiff .webp",
        "concept/train/mimi: not used; concepts_list.json does not name it",
        f"concept/test/ghost: not used; no {train} beside it",
    ]


def test_columns_that_a_recipe_does_not_read_are_counted(tmp_path: Path) -> None:
    write_photos(tmp_path)
    write_lines(tmp_path / "x2x.jsonl", X2X_ROWS[:3])
    loaded, found = kept(tmp_path / "x2x.jsonl")
    said = " ".join(loaded.unused)
    assert found == [] and "column 'qa_problem': 2 questions are not asked" in said
    assert "column 'real_image' (3 rows): read by recipes/corl.py alone; photos of the subject go into" in said
    write_lines(tmp_path / "qa.jsonl", [{"prompt": "what is 1 + 1?", "answer": "2"}] * 2)
    (said,) = kept(tmp_path / "qa.jsonl")[0].unused
    assert "2 answers are not looked at" in said and '"segments": "text"' in said
    write_lines(tmp_path / "chain.jsonl", [{"prompt": "a cat", "segments": "text+image"}])
    pairs = load_pairs(tmp_path / "chain.jsonl", "train", faults=Faults())
    assert pairs.unused == ["column 'segments' (1 rows): read by recipes/sync_r1.py alone"]


# Pictures -------------------------------------------------------------------------------------------------------------


def test_broken_pictures_are_all_found(tmp_path: Path) -> None:
    """Cut off, empty, no picture at all, gone; good ones of every format are not among them."""
    noise = Image.effect_noise((200, 150), 50).convert("RGB")
    good = [tmp_path / f"good.{suffix}" for suffix in ("png", "jpg", "webp", "bmp", "gif", "tiff")]
    for path in good:
        noise.save(path)
    bad = [tmp_path / f"bad{path.suffix}" for path in good]
    for path, whole in zip(bad, good, strict=True):
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    bad += [tmp_path / "empty.png", tmp_path / "text.png", tmp_path / "gone.png"]
    bad[-3].write_bytes(b"")
    bad[-2].write_text("hello")
    found = broken_in([*good, *bad])
    assert len(found) == len(bad) and all(any(path.name in line for line in found) for path in bad), found
    with pytest.raises(PictureError, match=rf"{len(bad)} of {len(good) + len(bad)} pictures .* and 4 more"):
        raise pictures_error(found, len(good) + len(bad))


@pytest.mark.parametrize("form", ["parquet", "shards", "binary", "saved"])
def test_pictures_inside_data_files_are_opened_too(tmp_path: Path, form: str) -> None:
    write_photos(tmp_path)
    cup = tmp_path / PHOTOS[2]
    source = write_forms(tmp_path, X2X_ROWS, "real_image")[form]
    prompts = [prompt for sample in load_samples(source) for prompt in sample]
    assert len(pictures_of(prompts)) == 4 and broken_in(pictures_of(prompts)) == []
    cup.write_bytes(cup.read_bytes()[:400])
    for folder in (tmp_path / name for name in ("jsonl", "parquet", "shards", "binary", "saved", "splits")):
        shutil.rmtree(folder)
    source = write_forms(tmp_path, X2X_ROWS, "real_image")[form]
    (said,) = broken_in(pictures_of([prompt for sample in load_samples(source) for prompt in sample]))
    assert "row 2, real_image" in said or "row 0, real_image" in said


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the pictures that are decoded from now on, in this process."""
    told: list[str] = []

    def looked_at(ref: Any, contents: bytes | None = None) -> str:
        told.append(ref.name)
        return problem_of(ref, contents)

    monkeypatch.setattr(decoders, "problem_of", looked_at)
    return told


def test_what_was_good_is_not_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that is cut off keeps what it has done; what changed, or was bad, is looked at again."""
    monkeypatch.setenv("SYNCR1_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decoders, "num_cores", lambda: 1)
    told = counted(monkeypatch)
    files = [tmp_path / f"{number}.png" for number in range(40)]
    for path in files:
        Image.new("RGB", (8, 8)).save(path)
    files[39].write_bytes(b"nothing")

    def cut(done: int) -> None:
        if done == 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_pictures(files, cut, Seen("a"))
    assert len(told) == 32
    moves: list[int] = []
    assert list(broken_pictures(files, moves.append, Seen("a"))) == [files[39]] and len(told) == 40
    assert moves == [40], "what was done before counts"
    Image.new("RGB", (9, 9)).save(files[3])
    told.clear()
    assert list(broken_pictures(files, seen=Seen("a"))) == [files[39]] and sorted(told) == ["3.png", "39.png"]
    told.clear()
    assert list(broken_pictures(files, seen=Seen("b"))) == [files[39]] and len(told) == 40, "of another source"


def test_a_file_of_what_was_seen_may_be_cut_off_or_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNCR1_CACHE", str(tmp_path))
    monkeypatch.setattr("syncr1.engine.data.seen.SPARE", 0)
    Seen("a").add(["0" * 32, "1" * 32])
    (file,) = tmp_path.glob("*/*.txt")
    file.write_bytes(file.read_bytes()[:-5])
    again = Seen("a")
    assert "0" * 32 in again and "1" * 32 not in again
    again.add(["2" * 32])
    later = Seen("a")
    assert "2" * 32 in later
    later.tidy()
    assert "2" * 32 in Seen("a") and "0" * 32 not in Seen("a"), "what nobody asks for is forgotten"
    file.unlink()
    file.mkdir()
    Seen("a").add(["3" * 32])
    assert "3" * 32 not in Seen("a")


@pytest.mark.parametrize("lost", [False, True])
def test_many_pictures_are_decoded_in_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool) -> None:
    """Files, cells and what lies in memory; a process that is lost takes nothing with it."""
    monkeypatch.setattr(decoders, "MANY", 1)
    monkeypatch.setattr(decoders, "num_cores", lambda: 1)
    if lost:
        monkeypatch.setattr(decoders.sys, "executable", "/bin/false")
    write_photos(tmp_path)
    source = write_forms(tmp_path, X2X_ROWS, "real_image")["parquet"]
    refs = pictures_of([prompt for sample in load_samples(source) for prompt in sample])
    (tmp_path / "cut.jpg").write_bytes((tmp_path / PHOTOS[1]).read_bytes()[:5000])
    drawn = MemoryImage("drawn", __import__("torch").zeros(3, 4, 4))
    told = counted(monkeypatch)
    broken = broken_pictures([*refs, tmp_path / PHOTOS[0], tmp_path / "cut.jpg", drawn])
    assert list(broken) == [tmp_path / "cut.jpg"] and "cut.jpg" in broken[tmp_path / "cut.jpg"]
    assert (len(told) > 1) is lost, "but for what is drawn"
