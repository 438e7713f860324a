"""Whatever files and folders hold, only documented errors come back, and fast; as `test_fuzz.py`."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
import torch
from fuzz_cases import (
    JSON_PIECES,
    MEAN_SECONDS,
    Arguments,
    Draw,
    Trial,
    as_bytes,
    as_json_text,
    brackets,
    share,
)
from PIL import Image
from safetensors.torch import save

from syncr1.engine.checkpoints import sharded as checkpoint
from syncr1.engine.checkpoints.safetensors_stream import MappedCheckpoint
from syncr1.engine.data.prompts import load_benchmark, load_training_prompts
from syncr1.engine.data.samples import load_samples
from syncr1.engine.errors import CheckpointError, DataError, EvaluationError, PictureError
from syncr1.engine.evaluate.graders import KEPT, Kept
from syncr1.engine.evaluate.manifest import MANIFEST, claim
from syncr1.engine.evaluate.store import ITEMS, Store
from syncr1.engine.pictures import StoredImage, open_picture
from syncr1.engine.policies.kinds import SAFE, SAFE_INDEX
from syncr1.engine.show.report import write_report
from syncr1.engine.show.run_files import read_jsonl


@pytest.fixture
def trial() -> Iterator[Trial]:
    made = Trial()
    yield made
    print(made)
    assert made.count and made.seconds / made.count < MEAN_SECONDS


# Pictures -------------------------------------------------------------------------------------------------------------


class Bytes(StoredImage):
    name = "picture"

    def __init__(self, contents: bytes) -> None:
        self.contents = contents

    def read(self) -> bytes:
        return self.contents


def encoded(kind: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (6, 5)).save(buffer, kind)
    return buffer.getvalue()


FILES = [
    encoded("PNG", "P"),
    encoded("PNG", "I;16"),
    encoded("JPEG"),
    encoded("GIF", "P"),
    encoded("BMP"),
    encoded("TIFF"),
    encoded("WEBP"),
]


@pytest.mark.filterwarnings("ignore")
@share(3)
def test_pictures(trial: Trial, seed: int) -> None:
    def read(contents: bytes) -> None:
        assert open_picture(Bytes(contents)).mode == "RGB"

    trial.most_seconds = 5.0  # a few bytes may stand for 64 million pixels, which are read
    trial(seed, lambda draw: (draw.damaged(draw.choice(FILES)),), read, PictureError)


# Folders of concepts --------------------------------------------------------------------------------------------------

CONCEPT_FILES: dict[str, Any] = {
    "concept/train/bo/info.json": {"class": "dog", "num_testing_info": 1, "generation_type": "dog"},
    "concept/train/bo/conversations.json": [{"query": "What?", "answer": "a", "options": ["a", "b"]}],
    "concept/train/bo/text_only.json": {"text_only": [{"question": "What?", "answer": "a"}]},
    "concept/train/bo/positive_recognitions.json": [{"query": "Is it?", "answer": "Yes."}],
    "concept/train/bo/attributes.json": {"images": {"0.png": {"colour": "red"}}, "t2i": {}},
    "concept/test/bo/t2i_conditions.json": {
        "personalized_driven_generation": ["a", "b"],
        "explicit_personalized_driven_generation": ["a red dog", "b"],
    },
    "concept/test/bo/attributes.json": {"t2i": {"explicit_personalized_driven_generation": [{"colour": "red"}]}},
    "concept/test/bo/vqa.json": {"0.png": [{"query": "What?", "answer": "a"}]},
    "test_data/bo.json": [
        {"image": "concept/test/bo/0", "type": "rec", "conversations": [{"value": "<image>Is it?"}, {"value": "No"}]}
    ],
    "prompts_to_eval.json": {"dog": ["<sks> runs"]},
    "concepts_list.json": ["bo"],
    "general/test/captions.json": [{"caption": "a cup", "image": "0.png"}],
}
CONCEPT_NAMES = [
    *("images", "t2i", "text_only", "image", "type", "conversations", "value", "query", "answer", "options", "caption"),
    *("generation_type", "num_testing_info", "class", "dense_prompt_generation"),
]


def changed(draw: Draw, content: Any) -> Any:
    """`content` with one part of it replaced."""
    if isinstance(content, dict) and content and not draw.once_in(4):
        name = draw.choice(list(content))
        return {**content, name: changed(draw, content[name]), **draw.fields(CONCEPT_NAMES, 1)}
    if isinstance(content, list) and content and not draw.once_in(4):
        at = draw.randrange(len(content))
        return [*content[:at], changed(draw, content[at]), *content[at + 1 :]]
    return draw.value()


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("concepts")
    for name, content in CONCEPT_FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(content))
    for split in ("train", "test"):
        (root / "concept" / split / "bo" / "0.png").write_bytes(FILES[0])
    return root


CONCEPT_LOADERS = [load_training_prompts, load_benchmark, load_samples]


@pytest.mark.parametrize("load", CONCEPT_LOADERS)
def test_the_good_folder_of_concepts(concepts: Path, load: Callable[[Path], Any]) -> None:
    assert len(load(concepts)) > 3


def load_changed(root: Path, load: Callable[[Path], object], name: str, written: str) -> None:
    """Loads the folder with another content of one file."""
    good = (root / name).read_bytes()
    (root / name).write_bytes(as_bytes(written))
    try:
        load(root)
    finally:
        (root / name).write_bytes(good)


@share(2)
def test_folders_of_concepts(trial: Trial, concepts: Path, seed: int) -> None:

    def make(draw: Draw) -> Arguments:
        name = draw.choice(list(CONCEPT_FILES))
        good = CONCEPT_FILES[name]
        if draw.once_in(3):
            written = draw.mutated([json.dumps(good)], JSON_PIECES)
        else:
            written = as_json_text(changed(draw, good))
        if draw.once_in(20):
            written = written.replace(draw.choice(['"a"', "1", '"red"', "null", '"Is it?"']), brackets(draw.depth()), 1)
        return draw.choice(CONCEPT_LOADERS), name, written

    trial(seed, make, functools.partial(load_changed, concepts), DataError)


@pytest.mark.parametrize(
    ("load", "name", "written"),
    [
        (load_benchmark, "general/test/captions.json", "1"),
        (load_benchmark, "general/test/captions.json", '[{"caption": 1}]'),
        (load_benchmark, "test_data/bo.json", '[{"image": "\\udf5f", "query": "?", "answer": "o"}]'),
        (load_benchmark, "test_data/bo.json", f'[{{"image": "{"a/" * 30_000}", "query": "?", "answer": "o"}}]'),
        (load_benchmark, "test_data/bo.json", '[{"type": ["rec"], "query": "?", "answer": "o"}]'),
        (load_benchmark, "concept/train/bo/info.json", '{"generation_type": ["dog"]}'),
        (
            load_benchmark,
            "concept/test/bo/attributes.json",
            '{"t2i": {"explicit_personalized_driven_generation": [{"colour": 1}]}}',
        ),
        (load_benchmark, "prompts_to_eval.json", '{"dog": [["runs"]]}'),
        (load_training_prompts, "concept/train/bo/attributes.json", '{"images": {"0.png": null}}'),
        (load_training_prompts, "concept/train/bo/attributes.json", '{"images": {"0.png": {}, "1.png": ["c"]}}'),
        (load_training_prompts, "concept/train/bo/conversations.json", '[{"query": "?", "answer": "a", "options": 4}]'),
        (load_samples, "concept/train/bo/conversations.json", '[{"query": "?", "answer": "a", "options": ["a", []]}]'),
        (load_samples, "concepts_list.json", json.dumps(["x" * 300])),
        (load_samples, "concepts_list.json", '["\\udda8"]'),
    ],
)
def test_folders_that_were_found(concepts: Path, load: Callable[[Path], object], name: str, written: str) -> None:
    """Each once led to another error than this one, or to one that cannot be printed."""
    with pytest.raises(DataError) as caught:
        load_changed(concepts, load, name, written)
    str(caught.value).encode()


def test_a_caption_whose_picture_is_no_name(concepts: Path) -> None:
    """Only attributes are looked up by it."""
    load_changed(concepts, load_benchmark, "general/test/captions.json", '[{"caption": "a cup", "image": {"a": 1}}]')


# Manifests ------------------------------------------------------------------------------------------------------------

RUN = {"format": 1, "model": {"name": "m", "fingerprint": "f"}, "sampling": {"seed": 1}, "versions": {"torch": "2"}}
ITEM = {
    "id": "1",
    "task": "qa",
    "text": "x",
    "segments": ["text"],
    "options": [],
    "references": ["a.png"],
    "member": 0,
    "greedy": "a",
    "sampled": None,
    "follow_up_text": "",
    "drawn": None,
    "digest": None,
    "shown": None,
}
WEIGHTS = {"metadata": {"total_size": 4}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
MANIFEST_NAMES = ["format", "weight_map", "model", "step", "files"]


def deep(draw: Draw) -> str:
    depth = draw.depth()
    if draw.once_in(2):
        return brackets(depth, name=draw.choice(["format", "weight_map", "a"]))
    return f'{{"format": 1, "model": {brackets(depth)}, "weight_map": {brackets(depth, name="a")}}}'


def manifest(draw: Draw, good: dict[str, Any]) -> bytes:
    kind = draw.random()
    if kind < 0.1:
        return as_bytes(deep(draw))
    if kind < 0.2:
        return as_bytes(as_json_text(draw.fields(MANIFEST_NAMES, 3)))
    if kind < 0.5:
        return as_bytes(as_json_text(good | draw.fields([*good, *MANIFEST_NAMES], 3)))
    if kind < 0.7:
        return draw.damaged(json.dumps(good).encode())
    return as_bytes(draw.mutated([json.dumps(good)], [*JSON_PIECES, *map(json.dumps, good)]))


def file_of(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], None]:
    """Reads a folder in which `path` holds what is given."""

    def written(contents: bytes) -> None:
        path.write_bytes(contents)
        read(path.parent)

    return written


@share(1)
def test_manifests_of_evaluations(trial: Trial, tmp_path: Path, seed: int) -> None:
    read = file_of(tmp_path / MANIFEST, lambda folder: claim(folder, RUN))
    trial(seed, lambda draw: (manifest(draw, RUN),), read, EvaluationError)


def test_a_manifest_that_no_terminal_takes(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"format": 1, "model": {"\\udc01": ""}}')
    with pytest.raises(EvaluationError) as caught:
        claim(tmp_path, RUN)
    str(caught.value).encode()


@share(1)
def test_kept_scores(trial: Trial, tmp_path: Path, seed: int) -> None:
    row = {"key": "k", "metric": "m", "grader": "g", "value": 1.0}
    trial(seed, lambda draw: (manifest(draw, row) + b"\n",), file_of(tmp_path / KEPT, Kept), EvaluationError)


@share(1)
def test_stored_items(trial: Trial, tmp_path: Path, seed: int) -> None:
    read = file_of(tmp_path / ITEMS, lambda folder: Store(folder).read())
    trial(seed, lambda draw: (manifest(draw, ITEM) + b"\n",), read, EvaluationError)


def test_the_good_item(tmp_path: Path) -> None:
    (tmp_path / ITEMS).write_text(json.dumps(ITEM) + "\n")
    assert [item.key for item in Store(tmp_path).read()] == [("1", 0)]


@pytest.mark.parametrize(
    "odd", [{"member": {"a": 1}}, {"member": True}, {"drawn": {"a": 1}}, {"drawn": False}, {"greedy": 1}, {"id": [1]}]
)
def test_items_that_were_found(tmp_path: Path, odd: dict[str, Any]) -> None:
    (tmp_path / ITEMS).write_text(json.dumps(ITEM | odd) + "\n")
    with pytest.raises(EvaluationError, match="is not an item"):
        Store(tmp_path).read()


def test_an_item_whose_image_no_file_could_be(tmp_path: Path) -> None:
    """It is missing, as far as anyone can tell."""
    (tmp_path / ITEMS).write_text(json.dumps(ITEM | {"drawn": "x" * 300}) + "\n")
    assert Store(tmp_path).read() == []


@share(1)
def test_indices_of_shards(trial: Trial, tmp_path: Path, seed: int) -> None:
    read = file_of(tmp_path / SAFE_INDEX, MappedCheckpoint)
    trial(seed, lambda draw: (manifest(draw, WEIGHTS),), read, CheckpointError)


def test_a_shard_that_no_file_could_be(tmp_path: Path) -> None:
    (tmp_path / SAFE_INDEX).write_text(json.dumps({"weight_map": {"a": "\ud800.safetensors"}}))
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        MappedCheckpoint(tmp_path)


@share(1)
def test_weight_files(trial: Trial, tmp_path: Path, seed: int) -> None:
    good = save({"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.int8)})

    def read(contents: bytes) -> None:
        path = tmp_path / SAFE
        path.unlink(missing_ok=True)  # a map of the one before may still be open
        path.write_bytes(contents)
        opened = MappedCheckpoint(tmp_path)
        assert all(opened.flat(name).numel() == info.num_elements for name, info in opened.tensors.items())

    trial(seed, lambda draw: (draw.damaged(good),), read, CheckpointError)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.save(tmp_path_factory.mktemp("saved"), 3, {"a": torch.ones(2)}, {"config": "seed: 1"})


@share(1)
def test_checkpoints_of_runs(trial: Trial, saved: Path, seed: int) -> None:
    """Whatever is not as it was written is refused; the manifest's hash covers the manifest too."""
    names = [checkpoint.MANIFEST, checkpoint.STATE, checkpoint.shard_name(0)]
    contents = {name: (saved / name).read_bytes() for name in names}

    def read(name: str, bad: bytes) -> None:
        (saved / name).write_bytes(bad)
        try:
            checkpoint.verified(saved)
            assert bad == contents[name] or json.loads(bad) == json.loads(contents[name])
        finally:
            (saved / name).write_bytes(contents[name])

    def make(draw: Draw) -> Arguments:
        name = draw.choice(names)
        if draw.once_in(2) and name != checkpoint.shard_name(0):
            return name, manifest(draw, json.loads(contents[name]))
        return name, draw.damaged(contents[name])

    trial(seed, make, read, CheckpointError)


@share(1)
def test_reports_of_damaged_runs(trial: Trial, tmp_path: Path, seed: int) -> None:
    """A report shows what can be read, and fails on nothing."""

    def read(lines: bytes) -> None:
        (tmp_path / "metrics.jsonl").write_bytes(lines)
        assert all(isinstance(row, dict) for row in read_jsonl(tmp_path / "metrics.jsonl"))

    good = {"step": 1, "reward": 0.5, "kl/text": 0.1}
    trial(seed, lambda draw: (b"\n".join(draw.several(lambda: manifest(draw, good), 3)),), read)


def test_a_report_of_a_damaged_run(tmp_path: Path) -> None:
    """The whole page, once: drawing its curves takes most of the time."""
    odd = {"step": 10**400, "reward": "x", "kl/text": None, "rewards/a/mean": [1], "scores": brackets(5)}
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join([as_json_text(odd), '{"reward": 0.5}', brackets(3000), "9" * 5000])
    )
    (tmp_path / "config.yaml").write_text("seed: 2001-99-99\n")
    assert write_report(tmp_path).read_text().startswith("<!")
