"""Rows that cannot be used: refused by name before the first step, or left out, counted, and left out again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest
from data_sources import PHOTOS, write_lines, write_photos
from PIL import Image

from syncr1.engine.corl.config import CorlConfig
from syncr1.engine.corl.training_data import TrainingData
from syncr1.engine.data.loaded import Loaded
from syncr1.engine.errors import DataError, PictureError
from syncr1.engine.methods import check_data, data_checks, first_pass
from syncr1.engine.methods.bad_rows import BadRows, skipped_by
from syncr1.engine.methods.check_data_config import CheckDataConfig
from syncr1.engine.methods.data_checks import checked_chains, found_in
from syncr1.engine.methods.sync_r1_config import SyncR1Config
from syncr1.engine.show.report import write_report
from syncr1.engine.show.run_files import DATA_FILE, DATA_SHEET
from syncr1.engine.world.worlds import WORLDS

ASKED = "Which animal is this?\nA. a dog\nB. a cat"
LONG = "what is red and round and hollow? " * 80
"""More than the tiny base has positions for."""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs are looked at with the tiny base's tokenizer, which a run refuses."""
    monkeypatch.setattr(data_checks, "check_own_world", lambda *_: None)
    policy = WORLDS["rendered"].bases["janus"].untrained()
    monkeypatch.setattr(first_pass, "policy_without_weights", lambda *_: policy)


def rows_of_eight() -> list[Any]:
    """Of eight rows, those at 1, 3, 5 and 6 are bad, each in its own way; the others are called 0, 2, 4 and 7."""
    rows: list[Any] = [
        {"prompt": ASKED, "answer": "B", "image": PHOTOS[index % 4], "options": ["a dog", "a cat"]}
        for index in range(8)
    ]
    rows[1] = {**rows[1], "answer": "a horse"}
    rows[3] = {**rows[3], "image": "cut.png"}
    rows[5] = {**rows[5], "prompt": LONG + ASKED}
    rows[6] = ["no object"]
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_photos(tmp_path)
    (tmp_path / "cut.png").write_bytes((tmp_path / PHOTOS[0]).read_bytes()[:5000])
    write_lines(tmp_path / "train.jsonl", rows_of_eight())
    return tmp_path


def corl(folder: Path, rows: BadRows | None = None, **changes: Any) -> TrainingData:
    config = CorlConfig(data=str(folder), max_completion_length=16, eval_samples=0, stage="refined", **changes)
    return TrainingData(config, folder, None, rows)


def sync_r1(folder: Path, rows: BadRows | None = None, said: list[str] | None = None, **changes: Any) -> Loaded:
    config = SyncR1Config(data=folder, eval_samples=0, **changes)
    return checked_chains(config, folder, (said if said is not None else []).append, rows)


def names(loaded: Loaded) -> list[str]:
    return [prompt.id.removesuffix("/mm2t").rpartition("/")[2] for prompt in loaded.prompts]


@pytest.mark.parametrize("recipe", ["sync_r1", "corl"])
def test_bad_rows_are_left_out_and_counted(folder: Path, recipe: str, tiny: None) -> None:
    said: list[str] = []
    if recipe == "corl":
        data = corl(folder, bad_rows="skip")
        data.check(said.append)
        kept, skipped = [s[0].id.split("/")[-2] for s in data.samples("mcq")], data.skipped
    else:
        loaded = sync_r1(folder, None, said, bad_rows="skip")
        kept, skipped = names(loaded), loaded.skipped
    assert kept == ["0", "2", "4", "7"], "rows keep their names, whatever lies between them"
    assert len(skipped) == 4
    for row, why in (("line 2", "a horse"), ("/3", "cut.png"), ("/5", "positions"), ("line 7", "got list")):
        assert [key for key, words in skipped.items() if key.endswith(row) and why in words], (row, skipped)
    assert "skipped: 4 rows that cannot be used; 4 are left" in " ".join(said)


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        (1, DataError, r"train.jsonl, line 2: .*a horse.*--bad_rows skip"),
        (3, PictureError, r"1 of \d pictures .*cut.png.*--bad_rows skip"),
        (5, DataError, r"/train/1(/mm2t)? has \d+ tokens .* positions.*--bad_rows skip"),
        (6, DataError, r"line 2: expected an object of columns, got list; --bad_rows skip"),
    ],
)
def test_each_kind_is_refused_by_name(folder: Path, row: int, kind: Any, words: str, tiny: None) -> None:
    good, bad = rows_of_eight()[0], rows_of_eight()[row]
    write_lines(folder / "train.jsonl", [good, bad, good])
    for read in (sync_r1, lambda folder: corl(folder).check(lambda line: None)):
        with pytest.raises(kind, match=words):
            read(folder)


def test_a_file_with_a_fault_is_refused_whatever_is_skipped(folder: Path, tiny: None) -> None:
    write_lines(folder / "train.jsonl", [{"picture": "a"}])
    with pytest.raises(DataError, match="has no column"):
        sync_r1(folder, bad_rows="skip")
    write_lines(folder / "train.jsonl", [rows_of_eight()[3], rows_of_eight()[1]])
    with pytest.raises(DataError, match=r"no row can be used; the first: .*cut.png"):
        sync_r1(folder, bad_rows="skip")


def test_a_run_that_goes_on_leaves_out_what_it_left_out(folder: Path, tmp_path: Path, tiny: None) -> None:
    """All is mended but a row that was good: the mended ones stay out, in silence; the other one ends the run."""
    begun = sync_r1(folder, bad_rows="skip")
    told = {"skipped": [{"row": row, "why": why} for row, why in begun.skipped.items()]}
    (tmp_path / DATA_FILE).write_text(json.dumps(told))
    config = SyncR1Config(data=folder, bad_rows="skip")
    write_lines(folder / "train.jsonl", [rows_of_eight()[0]] * 8)
    again = sync_r1(folder, BadRows.of(config, tmp_path), bad_rows="skip")
    assert names(again) == names(begun) and again.skipped == begun.skipped == skipped_by(tmp_path)
    write_lines(folder / "train.jsonl", [rows_of_eight()[1]] * 8)
    with pytest.raises(DataError, match=r"line 1: .*a horse.*the run that goes on has begun with them: mend them"):
        sync_r1(folder, BadRows.of(config, tmp_path), bad_rows="skip")
    (tmp_path / DATA_FILE).write_text("{}")
    with pytest.raises(DataError, match="put the file back"):
        skipped_by(tmp_path)
    assert skipped_by(folder / "nowhere") == {}


@pytest.mark.parametrize("recipe", ["sync_r1", "corl"])
def test_the_report_says_what_was_found(folder: Path, tmp_path: Path, recipe: str, tiny: None) -> None:
    """data.json, three examples to look at, and the page of the run, where text of the data is text."""
    rows = rows_of_eight()
    rows[6] = {**rows[0], "prompt": "<b>Which</b> colour?\nA. a dog\nB. a cat", "note": "x"}
    write_lines(folder / "train.jsonl", rows)
    if recipe == "corl":
        data = corl(folder, bad_rows="skip")
        data.check(lambda line: None)
        found = data.found()
    else:
        found = found_in(sync_r1(folder, bad_rows="skip"))
    run = tmp_path / "run"
    run.mkdir()
    found.write(run)
    told = json.loads((run / DATA_FILE).read_text())
    assert sum(told["tasks"]["to train on"].values()) == 5 and told["pictures"] == 3
    assert sorted(skipped_by(run)) == sorted(found.skipped) and len(told["skipped"]) == 3
    with Image.open(run / DATA_SHEET) as sheet:
        assert sheet.height > 300
    page = write_report(run).read_text()
    assert "3 rows left out" in page and "a horse" in page and "data:image/png" in page and "positions" in page
    assert page.count("(mcq) 5" if recipe == "corl" else "(vqa) 5") == 1


@pytest.mark.parametrize("recipe", ["sync_r1", "corl"])
def test_check_data_lists_all_and_counts_lengths(
    folder: Path, recipe: Any, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = WORLDS["rendered"].bases["janus"].untrained()
    monkeypatch.setattr(check_data, "policy_without_weights", lambda name: policy)
    said: list[str] = []
    asked = {"model": "any", "max_completion_length": 16} if recipe == "corl" else {"model": "any"}
    assert not check_data.check(CheckDataConfig(data=folder, recipe=recipe, **asked), said.append)
    for words in ("a horse", "cut.png", "positions", "got list", "--bad_rows skip trains on the other rows"):
        assert len([line for line in said if words in line]) == 1, (words, said)
    write_lines(folder / "train.jsonl", rows_of_eight()[4:6])
    said.clear()
    assert check_data.check(CheckDataConfig(data=folder, recipe=recipe), said.append) and said[-1] == "no fault"
