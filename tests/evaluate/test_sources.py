"""What can be evaluated on: each form is recognised and read, and what cannot be used is named with its remedy."""

from __future__ import annotations

import json
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
from benchmark_files import GENEVAL, dpg, geneval
from made import world_folder
from PIL import Image

from syncr1.engine.errors import DataError
from syncr1.engine.evaluate.sources import MAX_PROMPT_BYTES, form_of, load_dpg, load_geneval, load_items


def test_geneval(tmp_path: Path) -> None:
    path = geneval(tmp_path / "evaluation_metadata.jsonl")
    assert form_of(path) == "geneval"
    (task,) = load_items(path).items()
    assert task[0] == "geneval"
    first, second = task[1]
    assert first.text == first.target == "a photo of a bench" and first.segments == ("image",)
    assert (first.id, second.id) == ("geneval/00000", "geneval/00001")
    assert second.extra["geneval_metadata"] == GENEVAL[1] and second.extra["geneval_index"] == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "'prompt' must be text"),
        ('{"prompt": " ", "tag": "x"}', "'prompt' must be text"),
        ('{"prompt": "a"}', "'tag' must be text"),
        ("", "is empty"),
    ],
)
def test_geneval_that_cannot_be_used(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=said):
        load_geneval(path)
    with pytest.raises(DataError, match=r"evaluation_metadata\.jsonl"):
        load_geneval(tmp_path / "none.jsonl")


def test_dpg(tmp_path: Path) -> None:
    folder = dpg(tmp_path / "prompts")
    assert form_of(folder) == "dpg"
    prompts = load_items(folder)["dpg"]
    assert [p.extra["dpg_name"] for p in prompts] == ["1", "10", "COCOval2014000000019"]
    assert [p.text for p in prompts] == ["A red truck.", "é", "Two\nlines."]
    assert all(p.segments == ("image",) and p.target == p.text for p in prompts)


@pytest.mark.parametrize(
    ("name", "contents", "said"),
    [
        ("a.b.txt", b"x", "first dot"),
        ("a.txt", b" \n", "is empty"),
        ("a.txt", b"\xff", "UTF-8"),
        ("a.txt", b"x" * (MAX_PROMPT_BYTES + 1), "no prompt"),
        ("a.md", b"x", r"no \.txt"),
    ],
)
def test_dpg_that_cannot_be_used(name: str, contents: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(DataError, match=said):
        load_dpg(tmp_path)


def test_a_table_of_questions_and_captions(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    row = {
        "prompt": "a red square",
        "real_image": "a.png",
        "qa_problem": "which colour?",
        "qa_type": "OE",
        "qa_solution": "<answer>red</answer>",
    }
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    assert form_of(tmp_path) == "table" == form_of(tmp_path / "test.jsonl") == form_of(Path("org/name"))
    found = load_items(tmp_path)
    assert set(found) == {"t2i", "oe"} and found["oe"][0].answer == "red" and found["t2i"][0].text == "a red square"
    assert "<think>" in found["oe"][0].text and "<answer>" in found["oe"][0].text
    assert load_items(tmp_path, think=False)["oe"][0].text == "which colour?"
    with pytest.raises(DataError):
        load_items(tmp_path / "none.jsonl")


def test_unifybench() -> None:
    root = world_folder()
    assert form_of(root) == "unifybench"
    assert {"rec", "vqa", "rea", "pure_gen", "dense_gen"} <= set(load_items(root))


def test_a_split_of_what_has_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"prompt": "a cat"}\n', encoding="utf-8")
    (tmp_path / "dev.jsonl").write_text('{"prompt": "a dog"}\n', encoding="utf-8")
    (dog,) = load_items(tmp_path, split="dev")["t2i"]
    assert dog.text == "a dog"
    with pytest.raises(DataError, match=r"split: expected none for .*dev.jsonl, got 'test': a file has no splits"):
        load_items(tmp_path / "dev.jsonl", split="test")
    (tmp_path / "concept").mkdir()
    with pytest.raises(DataError, match="got 'dev': data of the form unifybench has no splits"):
        load_items(tmp_path, split="dev")


def test_a_table_of_chains_is_read_as_it_is_trained_on(tmp_path: Path) -> None:
    rows = [
        {"prompt": "which digit?", "segments": "text", "answer": "three", "task": "read"},
        {"prompt": "draw two and one.", "segments": "text+image", "answer": "three", "target": "a three"},
        {"prompt": "draw a three.", "segments": "image", "target": "a three"},
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = load_items(tmp_path)
    assert {task: (some[0].segments, some[0].answer, some[0].target) for task, some in found.items()} == {
        "read": (("text",), "three", None),
        "rea": (("text", "image"), "three", "a three"),
        "pure_gen": (("image",), None, "a three"),
    }
