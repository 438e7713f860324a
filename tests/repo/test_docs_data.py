"""docs/data.md: its example row loads as it says, and the sources that it lists are those that are read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image

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


def test_columns_and_limits_are_those_of_the_code() -> None:
    for name in (*QUESTION_COLUMNS, *(c for c in ANSWER_COLUMNS if c != "reward_model")):
        assert f"`{name}`" in PAGE, name
    assert all(name in PAGE for name in FORMATS) and MAX_PIXELS == 64 * 2**20 and "64 million" in PAGE
