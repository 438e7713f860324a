"""The world's folder: complete, in UnifyBench++'s shapes, split by item, the same for the same seed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from syncr1.engine.world import disk
from syncr1.engine.world.attributes import CONCEPTS, HELD_OUT_LOOKS, UNSEEN_PLACE, Look

KEYS = {
    "personalized_driven_generation",
    "explicit_personalized_driven_generation",
    "dense_prompt_generation",
    "personalized_dense_prompt_generation",
    "explicit_personalized_dense_prompt_generation",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return disk.write_world(tmp_path_factory.mktemp("world") / "data", seed=0)


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def digest(root: Path) -> str:
    parts = [str(p.relative_to(root)).encode() + p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def test_layout_is_complete(world: Path) -> None:
    assert load(world / "concepts_list.json") == [concept.name for concept in CONCEPTS]
    assert set(load(world / "template.json")) == {"vqa", "text_only", "who", "rec", "t2i"}
    assert not np.asarray(Image.open(world / "black_512x512.png")).any()
    assert len(list((world / "random_images").glob("*.png"))) == disk.RANDOM_IMAGES
    listed = load(world / "concept" / "train" / "train_images.json")
    for concept in CONCEPTS:
        train, test = (world / "concept" / split / concept.name for split in ("train", "test"))
        assert sorted(listed[concept.name]) == sorted(path.name for path in train.glob("*.png"))
        assert [len(list(folder.glob("*.png"))) for folder in (train, test)] == [disk.TRAIN_PHOTOS, disk.TEST_PHOTOS]
        assert len(list((train / "negative_example").glob("*.png"))) == disk.NEGATIVE_EXAMPLES
        assert set(load(train / "negative_example" / "score.json")) == {
            f"{k}.png" for k in range(disk.NEGATIVE_EXAMPLES)
        }
        with Image.open(test / "0.png") as picture:
            assert picture.size == (32, 32) and picture.mode == "RGB"


def test_json_shapes(world: Path) -> None:
    for concept in CONCEPTS:
        train, test = (world / "concept" / split / concept.name for split in ("train", "test"))
        info = load(train / "info.json")
        assert {"class", "info", "extra_info", "conversation_type", "generation_type", "num_testing_info"} == set(info)
        assert info["generation_type"] in ("object", "live_subject") and len(info["extra_info"]) == 5
        talks = load(train / "conversations.json")
        assert set(talks) == {f"{k}.png" for k in range(disk.TRAIN_PHOTOS)} | {"text_only"}
        pairs = [pair for part in (talks, load(test / "vqa.json")) for some in part.values() for pair in some]
        pairs += load(test / "text_only.json")
        pairs += load(train / "positive_recognitions.json") + load(train / "random_recognitions.json")
        assert all(set(pair) == {"query", "answer"} for pair in pairs)
        for folder in (train, test):
            prompts = load(folder / "t2i_conditions.json")
            assert set(prompts) == KEYS
            for name in ("personalized_driven_generation", "personalized_dense_prompt_generation"):
                assert len(prompts[name]) == len(prompts[f"explicit_{name}"])
                assert all(f"<{concept.name}>" in prompt for prompt in prompts[name])
            assert all(prompt.count(",") >= 2 for prompt in prompts["dense_prompt_generation"])
        assert info["num_testing_info"] == len(load(test / "t2i_conditions.json")["personalized_driven_generation"])
        for item in load(world / "test_data" / f"{concept.name}.json"):
            assert item["type"] in ("rec", "vqa", "text_only") and (world / item["image"]).is_file()
            assert item["conversations"][0]["value"].startswith("<image>\n") and item["conversations"][1]["value"]


def test_attributes_name_every_picture_and_prompt(world: Path) -> None:
    for folder in [
        *world.glob("concept/*/*"),
        *world.glob("concept/train/*/negative_example"),
        world / "random_images",
    ]:
        if not folder.is_dir():
            continue
        attributes = load(folder / "attributes.json")
        assert set(attributes["images"]) == {path.name for path in folder.glob("*.png")}
        for look in attributes["images"].values():
            Look.from_dict(look)
        if (folder / "t2i_conditions.json").is_file():
            prompts = load(folder / "t2i_conditions.json")
            assert {k: len(v) for k, v in attributes["t2i"].items()} == {k: len(v) for k, v in prompts.items()}


def test_random_images_and_negative_examples_show_no_concept(world: Path) -> None:
    bodies = {concept.look.words()[:-1] for concept in CONCEPTS}
    for folder in [*world.glob("concept/train/*/negative_example"), world / "random_images"]:
        for values in load(folder / "attributes.json")["images"].values():
            assert Look.from_dict(values).words()[:-1] not in bodies


def test_train_and_test_share_no_item(world: Path) -> None:
    for concept in CONCEPTS:
        train, test = (world / "concept" / split / concept.name for split in ("train", "test"))
        photos = [{path.read_bytes() for path in folder.glob("*.png")} for folder in (train, test)]
        assert not photos[0] & photos[1]
        prompts = [load(folder / "t2i_conditions.json") for folder in (train, test)]
        assert not {p for v in prompts[0].values() for p in v} & {p for v in prompts[1].values() for p in v}
        asked = [{pair["query"] for some in load(train / "conversations.json").values() for pair in some}]
        asked += [{pair["query"] for some in load(test / "vqa.json").values() for pair in some}]
        asked += [{pair["query"] for pair in load(test / "text_only.json")}]
        assert not asked[0] & (asked[1] | asked[2])


def test_unseen_places_appear_in_test_alone(world: Path) -> None:
    for concept in CONCEPTS:
        places = []
        for split in ("train", "test"):
            attributes = load(world / "concept" / split / concept.name / "attributes.json")
            looks = [*attributes["images"].values(), *(look for some in attributes["t2i"].values() for look in some)]
            places.append({look["place"] for look in looks})
            if split == "train":
                assert not {Look.from_dict(look) for look in looks} & HELD_OUT_LOOKS
        unseen = UNSEEN_PLACE[concept.name]
        assert unseen not in places[0] and unseen in places[1]


def test_seed_fixes_every_byte_and_the_stamp_is_reused(world: Path, tmp_path: Path) -> None:
    before = digest(world)
    stamp = (world / disk.STAMP).stat().st_mtime_ns
    assert disk.write_world(world, seed=0) == world and (world / disk.STAMP).stat().st_mtime_ns == stamp
    assert digest(disk.write_world(tmp_path / "again", seed=0)) == before
    assert digest(disk.write_world(tmp_path / "again", seed=1)) != before
    assert digest(disk.write_world(tmp_path / "again", seed=0)) == before


def test_a_users_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "holiday.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="isn't empty"):
        disk.write_world(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.png"]
