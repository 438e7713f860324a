"""docs/data.md: its example row loads as it says, and the sources that it lists are those that are read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image

from syncr1.engine.data.prompts import load_anchors, load_benchmark, load_training_prompts
from syncr1.engine.data.questions import THINK_THEN_ANSWER
from syncr1.engine.data.rows import ANSWER_COLUMNS, QUESTION_COLUMNS
from syncr1.engine.data.samples import load_samples
from syncr1.engine.errors import DataError
from syncr1.engine.pictures import FORMATS, MAX_PIXELS

PAGE = (ROOT / "docs" / "data.md").read_text()


def test_the_example_is_a_sample_of_two_halves(tmp_path: Path) -> None:
    (row,) = re.findall(r"```json\n(.+?)```", PAGE, re.DOTALL)
    (tmp_path / "train.jsonl").write_text(row)
    Image.new("RGB", (40, 30), "brown").save(tmp_path / "cup.jpg")
    ((drawing, question),) = load_samples(tmp_path)
    assert drawing.segments == ("image",) and drawing.real_image == tmp_path / "cup.jpg"
    assert question.answer == "B" and question.options == ("tea", "coffee") and question.qa_type == "MC"
    assert drawing.sample == question.sample is not None
    assert "<think>" in question.text and "<think>" in THINK_THEN_ANSWER
    (tmp_path / "train.jsonl").write_text(row.replace("cup.jpg", "../cup.jpg"))
    with pytest.raises(DataError, match="lies outside"):
        load_samples(tmp_path)


def test_the_unifybench_folder_is_read_as_it_stands_there(tmp_path: Path) -> None:
    files = re.findall(r"```json title=\"(.+?)\"\n(.+?)```", PAGE, re.DOTALL)
    for name, content in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    for folder in ("concept/train/bobo", "concept/train/bobo/negative_example", "concept/test/bobo", "general/test"):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), "brown").save(tmp_path / folder / "0.png")
    prompts = load_training_prompts(tmp_path)
    assert sorted(prompt.task for prompt in prompts) == ["pure_gen", "qa", "rea", "rec", "rec", "vqa"]
    assert {prompt.answer for prompt in prompts if prompt.task == "rec"} == {"yes", "no"}
    assert {prompt.extra.get("concept_class") for prompt in prompts if prompt.task == "rea"} == {"dog"}
    held_out = {task: len(items) for task, items in load_benchmark(tmp_path).items()}
    assert held_out == {"vqa": 1, "rec": 1, "rea": 1, "pure_gen": 1, "general_vqa": 1}
    assert [anchor.task for anchor in load_anchors(tmp_path)] == ["general_image"]


def test_columns_and_limits_are_those_of_the_code() -> None:
    for name in (*QUESTION_COLUMNS, *(c for c in ANSWER_COLUMNS if c != "reward_model")):
        assert f"`{name}`" in PAGE, name
    assert all(name in PAGE for name in FORMATS) and MAX_PIXELS == 64 * 2**20 and "64 million" in PAGE
