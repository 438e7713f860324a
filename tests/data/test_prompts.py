"""Reading a UnifyBench++ folder (made by hand from photographs, and the rendered world)."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from skimage import data

from syncr1.engine.data.prompts import load_anchors, load_benchmark, load_training_prompts
from syncr1.engine.errors import DataError
from syncr1.engine.world.disk import write_world
from syncr1.engine.world.general import write_general

IMPLICIT, EXPLICIT = "personalized_driven_generation", "explicit_personalized_driven_generation"


def write(path: Path, contents: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents), encoding="utf-8")


def edit(path: Path, **changes: Any) -> None:
    write(path, json.loads(path.read_text()) | changes)


@pytest.fixture(scope="session")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder as UnifyBench++ publishes it: photographs, one t2i_conditions.json in test, no attributes."""
    root = tmp_path_factory.mktemp("album") / "data"
    for name, kind in (("chelsea", "cat"), ("eileen", "woman")):
        picture = Image.fromarray(data.cat() if kind == "cat" else data.astronaut())
        width, height = picture.size
        train, test = root / "concept" / "train" / name, root / "concept" / "test" / name
        train.mkdir(parents=True)
        test.mkdir(parents=True)
        for k in range(3):
            part = picture.crop((k * 8, k * 8, width - 8, height - 8)).resize((64, 48))
            part.save(train / f"{k}.png")
            part.rotate(3).save(test / f"{k}.jpg")
        token = f"<{name}>"
        facts = [
            f"{token} likes fish",
            f"{token} sleeps on a red sofa",
            f"{token} lives by the sea",
            f"{token} plays chess",
        ]
        write(
            train / "info.json",
            {"class": kind, "extra_info": facts, "num_testing_info": 1, "generation_type": "live_subject"},
        )
        write(
            train / "conversations.json",
            {
                "0.png": [{"query": f"What is {token} doing?", "answer": "Looking at the camera."}],
                "1": [{"query": "Is it day?", "answer": "Yes."}],
                "text_only": [{"query": f"What does {token} like?", "answer": "Fish."}],
            },
        )
        write(train / "positive_recognitions.json", [{"query": f"Can you see {token}?", "answer": "Yes."}])
        write(train / "random_recognitions.json", [{"query": f"Can you see {token}?", "answer": "No."}])
        write(test / "vqa.json", {"0.jpg": [{"question": "What colour are the eyes?", "answer": "Green."}]})
        write(test / "text_only.json", [{"query": f"Where does {token} live?", "answer": "By the sea."}])
        lists = {
            IMPLICIT: [f"{token} with its favourite food", f"{token} in bed", f"{token} at home", f"{token} at play"],
            EXPLICIT: [f"{token} with fish", f"{token} on a red sofa", f"{token} by the sea", f"{token} playing chess"],
            "dense_prompt_generation": [f"{token}, on a table, in the sun, facing left"],
            "personalized_dense_prompt_generation": [f"{token}, with its food, at home"],
            "explicit_personalized_dense_prompt_generation": [f"{token}, with fish, by the sea"],
        }
        write(test / "t2i_conditions.json", lists)
    (root / "random_images").mkdir()
    Image.fromarray(data.coffee()).resize((60, 40)).save(root / "random_images" / "0.png")
    write(root / "prompts_to_eval.json", {"live_subject": ["a <sks> in the snow", "a <sks> wearing a hat"]})
    write(root / "concepts_list.json", ["chelsea", "eileen"])
    return root


@pytest.fixture
def copy(album: Path, tmp_path: Path) -> Path:
    """A copy of the album that a test may spoil."""
    return Path(shutil.copytree(album, tmp_path / "data"))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_world(tmp_path_factory.mktemp("world") / "data")
    write_general(root, num_items=24)
    return root


# A user's folder ------------------------------------------------------------------------------------------------------


def test_training_prompts_of_an_album(album: Path) -> None:
    prompts = load_training_prompts(album)
    assert Counter(p.task for p in prompts) == {"rea": 6, "pure_gen": 6, "vqa": 4, "qa": 2, "rec": 12}
    assert len({p.id for p in prompts}) == len(prompts)
    by_id = {p.id: p for p in prompts}
    rea = by_id["train/chelsea/rea/0"]
    assert rea.text == "<chelsea> with its favourite food" and rea.answer == rea.target == "<chelsea> with fish"
    assert rea.segments == ("text", "image") and not rea.images and rea.attributes is None and rea.rewarded
    assert [path.name for path in rea.references] == ["0.png", "1.png", "2.png"]
    vqa = next(p for p in prompts if p.task == "vqa" and p.concept == "eileen")
    assert vqa.images and vqa.images[0].name == "0.png" and vqa.answer == "Looking at the camera."
    assert vqa.target == "a photo of <eileen>" and vqa.references and vqa.segments == ("text", "image")
    assert all(not p.images for p in prompts if p.task == "qa")


def test_training_never_sees_test_pictures_or_held_out_prompts(album: Path) -> None:
    prompts = load_training_prompts(album)
    shown = {path for p in prompts for path in (*p.references, *p.images)}
    assert shown and not any("test" in path.relative_to(album.resolve()).parts for path in shown)
    trained, held_out = {p.text for p in prompts}, {p.text for p in load_benchmark(album)["rea"]}
    assert not trained & held_out and "<chelsea> at play" in held_out


def test_recognition_wordings_are_asked_about_own_and_other_pictures(album: Path) -> None:
    rec = [p for p in load_training_prompts(album) if p.task == "rec" and p.concept == "chelsea"]
    assert Counter(p.answer for p in rec) == {"Yes.": 3, "No.": 3}
    for prompt in rec:
        assert prompt.images
        assert (prompt.images[0].parent.name == "chelsea") == (prompt.answer == "Yes.")
    assert {p.images[0].parent.name for p in rec if p.images and p.answer == "No."} == {"eileen", "random_images"}


def test_understanding_without_the_drawing(album: Path) -> None:
    prompts = load_training_prompts(album, chain_understanding=False)
    assert {p.segments for p in prompts if p.task in ("vqa", "qa", "rec")} == {("text",)}
    assert {p.segments for p in prompts if p.task == "rea"} == {("text", "image")}


def test_benchmark_of_an_album(album: Path) -> None:
    benchmark = load_benchmark(album)
    counts = {task: len(prompts) for task, prompts in benchmark.items()}
    assert counts == {"vqa": 2, "qa": 2, "rec": 12, "rea": 2, "dense_rea": 2, "pure_gen": 4, "dense_gen": 2}
    everything = [p for prompts in benchmark.values() for p in prompts]
    assert len({p.id for p in everything}) == len(everything)
    assert all("test" in p.images[0].parts for p in everything if p.images)
    assert all("test" in path.parts for p in everything for path in p.references)
    assert benchmark["pure_gen"][0].text == "a <chelsea> in the snow"
    assert benchmark["pure_gen"][0].segments == ("image",) and benchmark["rea"][0].segments == ("text", "image")
    assert Counter(p.answer for p in benchmark["rec"]) == {"Yes.": 6, "No.": 6}
    assert load_anchors(album) == []


def test_generated_test_files_are_read(copy: Path) -> None:
    entry = {"type": "rec", "image": "concept/test/eileen/0.jpg"}
    talk = [{"from": "human", "value": "<image>\nIs <chelsea> here?"}, {"from": "gpt", "value": "No."}]
    choice = {
        "type": "choice_V",
        "image": "concept/test/chelsea/1.jpg",
        "conversations": [{"value": "A or B?"}, {"value": "A"}],
    }
    write(copy / "test_data" / "chelsea.json", [entry | {"conversations": talk}, choice])
    benchmark = load_benchmark(copy)
    (rec,) = [p for p in benchmark["rec"] if p.concept == "chelsea"]
    assert rec.text == "Is <chelsea> here?" and rec.images and rec.images[0].parent.name == "eileen"
    assert [p.answer for p in benchmark["choice"]] == ["A"]


def test_options_are_kept_and_checked(copy: Path) -> None:
    path = copy / "concept" / "train" / "chelsea" / "text_only.json"
    write(path, [{"query": "Which?", "answer": "b", "options": ["a", "b"]}])
    assert any(p.options == ("a", "b") for p in load_training_prompts(copy))
    write(path, [{"query": "Which?", "answer": "c", "options": ["a", "b"]}])
    with pytest.raises(DataError, match="options"):
        load_training_prompts(copy)


def test_optional_files_may_be_missing(copy: Path) -> None:
    for name in ("concepts_list.json", "prompts_to_eval.json", "concept/train/chelsea/info.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / "random_images")
    for name in ("positive_recognitions.json", "random_recognitions.json", "conversations.json"):
        (copy / "concept" / "train" / "chelsea" / name).unlink()
    prompts = load_training_prompts(copy)
    assert Counter(p.task for p in prompts if p.concept == "chelsea") == {"rea": 2, "pure_gen": 2}  # half is held out
    assert [p.text for p in load_benchmark(copy)["pure_gen"]][:2] == ["<chelsea> at home", "<chelsea> at play"]


# What cannot be used --------------------------------------------------------------------------------------------------


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    for load in (load_training_prompts, load_benchmark):
        with pytest.raises(DataError, match=r"concept/train.*missing.*UnifyBench"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("file", "contents", "message"),
    [
        ("conversations.json", "{", "conversations.json.*JSON"),
        ("conversations.json", '{"0.png": [{"answer": "x"}]}', "'query' or 'question' is missing"),
        ("conversations.json", '{"0.png": [{"query": "x"}]}', "'answer' is missing"),
        ("conversations.json", '{"0.png": [{"query": "x", "answer": 3}]}', "'answer' must be text"),
        ("conversations.json", '{"0.png": ["x"]}', "expected an object"),
        ("conversations.json", '{"9.png": [{"query": "x", "answer": "y"}]}', r"does not exist.*9\.png"),
        ("info.json", '{"num_testing_info": 99}', "num_testing_info"),
        ("info.json", "[]", "info.json: expected an object"),
        ("attributes.json", '{"images": []}', "attributes.json"),
    ],
)
def test_errors_name_the_file_and_the_column(copy: Path, file: str, contents: str, message: str) -> None:
    (copy / "concept" / "train" / "chelsea" / file).write_text(contents)
    with pytest.raises(DataError, match=message):
        load_training_prompts(copy)


def test_lists_that_do_not_match(copy: Path) -> None:
    edit(copy / "concept" / "test" / "chelsea" / "t2i_conditions.json", **{EXPLICIT: ["one"]})
    with pytest.raises(DataError, match=r"4 items.*1"):
        load_benchmark(copy)


def test_a_concept_without_photos_or_folder(copy: Path) -> None:
    write(copy / "concepts_list.json", ["chelsea", "../eileen"])
    with pytest.raises(DataError, match="no folder"):
        load_training_prompts(copy)
    write(copy / "concepts_list.json", ["chelsea"])
    for path in (copy / "concept" / "train" / "chelsea").glob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="no pictures"):
        load_training_prompts(copy)


@pytest.mark.parametrize("name", ["../../../../outside.png", "{root}/../outside.png", "link.png"])
def test_pictures_outside_the_folder_are_refused(copy: Path, name: str) -> None:
    outside = copy.parent / "outside.png"
    shutil.copy(copy / "random_images" / "0.png", outside)
    folder = copy / "concept" / "test" / "chelsea"
    (folder / "link.png").symlink_to(outside)
    write(folder / "vqa.json", [{"image": name.format(root=copy), "query": "x", "answer": "y"}])
    with pytest.raises(DataError, match="outside"):
        load_benchmark(copy)


# The rendered world ---------------------------------------------------------------------------------------------------


def test_world_prompts_carry_attributes(world: Path) -> None:
    prompts = load_training_prompts(world)
    rea = next(p for p in prompts if p.id == "train/bobo/rea/0")
    assert (
        rea.attributes is not None
        and rea.answer == " ".join(rea.attributes.values()) == "round red crown striped beach"
    )
    assert rea.target != rea.answer
    vqa = next(p for p in prompts if p.task == "vqa" and p.concept == "bobo")
    assert vqa.attributes == {"shape": "round", "colour": "red", "hat": "crown", "pattern": "striped"}
    assert {p.task for p in prompts} == {"rea", "dense_rea", "vqa", "qa", "rec", "pure_gen", "dense_gen"}
    drawn = [p for p in prompts if p.task in ("pure_gen", "dense_gen")]
    assert all(p.segments == ("image",) and p.answer is None and f"<{p.concept}>" in p.text for p in drawn)
    assert all(p.attributes is not None and "place" in p.attributes for p in drawn)


def test_world_benchmark_is_held_out(world: Path) -> None:
    benchmark, prompts = load_benchmark(world), load_training_prompts(world)
    tasks = {"vqa", "qa", "rec", "rea", "dense_rea", "pure_gen", "dense_gen", "general_vqa", "general_image"}
    assert set(benchmark) == tasks
    trained = {p.text for p in prompts}
    assert not trained & {p.text for task in tasks for p in benchmark[task]}
    assert all(
        p.attributes for task in ("rea", "dense_rea", "pure_gen", "dense_gen", "general_image") for p in benchmark[task]
    )


def test_general_material_has_two_splits_and_is_written_once(world: Path) -> None:
    anchors = load_anchors(world)
    assert Counter(p.task for p in anchors) == {"general_vqa": 24, "general_image": 24}
    assert not any(p.rewarded for p in anchors) and all(p.id.startswith("train/") for p in anchors)
    assert {p.segments for p in anchors} == {("text",), ("image",)}
    held_out = [p for p in load_benchmark(world)["general_image"] if p.attributes]
    looks = [{tuple(sorted(p.attributes.items())) for p in group if p.attributes} for group in (anchors, held_out)]
    assert not looks[0] & looks[1]
    file = world / "general" / "train" / "vqa.json"
    before = file.stat().st_mtime_ns
    write_general(world, num_items=24)
    assert file.stat().st_mtime_ns == before
