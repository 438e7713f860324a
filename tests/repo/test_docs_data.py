"""docs/data.md: its example row loads as it says, and the sources that it lists are those that are read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
from helpers import ROOT, own_process_group, rows_of, sharp_policy
from made import cache_folder
from PIL import Image
from recipe_cases import recipe_here

from syncr1.engine.data.prompts import load_benchmark, load_training_prompts
from syncr1.engine.data.questions import THINK_THEN_ANSWER
from syncr1.engine.data.rows import ANSWER_COLUMNS, QUESTION_COLUMNS
from syncr1.engine.data.samples import load_samples
from syncr1.engine.data.unused import GENERAL_NAMES, LISTS, ROOT_NAMES, TEST_NAMES, TRAIN_NAMES
from syncr1.engine.errors import DataError
from syncr1.engine.methods.sync_r1 import run
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.pictures import FORMATS, MAX_PIXELS
from syncr1.engine.settings.flags import parse

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


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's UnifyBench++ folder: its files, and the pictures that it lists."""
    root = tmp_path_factory.mktemp("example") / "unifybench"
    files = re.findall(r"```json title=\"(.+?)\"\n(.+?)```", PAGE, re.DOTALL)
    (pictures,) = re.findall(r"```text title=\"pictures\"\n(.+?)```", PAGE, re.DOTALL)
    for name, content in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    for line in pictures.splitlines():
        path = root / line.split()[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 30), 50).convert("RGB").save(path)
    return root


def test_the_example_has_every_file_that_is_read(example: Path) -> None:
    there = {path.name for path in example.rglob("*")}
    files = (*ROOT_NAMES, *TRAIN_NAMES, *TEST_NAMES, *GENERAL_NAMES)
    assert {name for name in files if name not in there} == {"attributes.json"}, "which is the rendered world's"
    lists = [name for path in example.rglob("t2i_conditions.json") for name in json.loads(path.read_text())]
    assert set(lists) == set(LISTS)


def test_the_example_is_read_without_a_fault(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = recipe_here(capsys, "check_data.py", "--data", example)
    assert "no fault" in out and "not used" not in out and "without a reward" not in out
    assert ", all can be read" in out
    assert "info of 2 and extra_info of 2 of 2; 2 of 2 requests mean one item of it" in out
    assert "'Draw <bobo> where it likes to be.' means '<bobo> likes the beach.'" in out
    counted = dict(re.findall(r"  ([a-z]+(?: [a-z]+)*?) +\d+ prompts: (.+)", out))
    tasks = {part: dict(re.findall(r"(\w+) (\d+)", said)) for part, said in counted.items()}
    assert tasks["to train on"] == {
        "rec": "4", "vqa": "2", "rea": "2", "pure_gen": "2", "qa": "1", "dense_rea": "1", "dense_gen": "1",
    }  # fmt: skip
    assert set(tasks["anchors"]) == {"general_image", "general_vqa"}
    held_out = {"vqa", "qa", "rec", "choice", "rea", "pure_gen", "general_image", "general_vqa"}
    assert set(tasks["held out"]) == held_out
    assert {p.extra.get("concept_class") for p in load_training_prompts(example) if p.task == "rea"} == {"dog", "cup"}
    assert load_benchmark(example)["pure_gen"][0].text == "A photo of <bobo> in the snow."


def test_a_run_takes_the_example(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of it, scored before and after."""
    sharp_policy().save(tmp_path / "model")
    monkeypatch.setenv("SYNCR1_CACHE", str(cache_folder()))
    flags = ["--model", tmp_path / "model", "--data", example, "--output_dir", tmp_path / "run", "--max_steps", 1]
    flags += ["--prompts_per_step", 4, "--num_generations", 2, "--max_completion_length", 4, "--eval_samples", 1]
    with own_process_group():
        run(parse(SyncR1Config, [str(flag) for flag in flags]))
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())["after"]
    assert scores["rea/num_items"] == 1 and len(rows_of(tmp_path / "run")) == 1


def test_faults_are_said_at_once_with_code_2(example: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(example, tmp_path / "mine")
    train = tmp_path / "mine" / "concept" / "train"
    (train / "bobo" / "1.jpg").write_bytes(b"\xff\xd8")
    (train / "mimi" / "info.json").write_text('{"num_testing_info": 7}')
    (train / "bobo" / "text_only.json").rename(train / "bobo" / "textonly.json")
    (tmp_path / "mine/general/test/attributes.json").write_text('{"images": {"None": {"animal": "dog"}}}')
    out, _ = recipe_here(capsys, "check_data.py", "--data", tmp_path / "mine", expected=2)
    assert "faults: 4" in out, out
    assert "num_testing_info must be 0 to 2" in out and "1.jpg: cannot be read" in out
    assert "expected those of the rendered world" in out and "textonly.json: not read; did you mean text_only" in out
    _, err = recipe_here(capsys, "check_data.py", expected=2)
    assert "data: expected a folder, a file or a hub name, got none" in err


def test_columns_and_limits_are_those_of_the_code() -> None:
    for name in (*QUESTION_COLUMNS, *(c for c in ANSWER_COLUMNS if c != "reward_model")):
        assert f"`{name}`" in PAGE, name
    assert all(name in PAGE for name in FORMATS) and MAX_PIXELS == 64 * 2**20 and "64 million" in PAGE
