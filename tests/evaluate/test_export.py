"""Exports, read back as the other benchmarks' scorers read them (their loops, rewritten from the files named)."""

from __future__ import annotations

import csv
import json
import os
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import numpy as np
import pytest
from benchmark_files import GENEVAL, dpg, geneval
from evaluate_cases import plain, written
from PIL import Image
from torch import Tensor

from syncr1.engine.errors import EvaluationError
from syncr1.engine.evaluate.export import export, grid
from syncr1.engine.evaluate.sources import load_items
from syncr1.engine.evaluate.store import Item
from syncr1.engine.records import Prompt

SIZE = 6


def shade(place: int, member: int) -> Tensor:
    return plain((place / 10, member / 10, 0.0), SIZE)


def drawn(source: Path, folder: Path, members: int) -> list[Item]:
    (prompts,) = load_items(source).values()
    rows = [
        (Item(prompt=prompt, member=member), shade(place, member))
        for place, prompt in enumerate(prompts)
        for member in range(members)
    ]
    return written(folder, rows)


def colour(picture: Image.Image) -> tuple[int, int]:
    """(place, member) of a picture of one colour."""
    pixels = np.asarray(picture.convert("RGB"))
    assert (pixels == pixels[0, 0]).all()
    return round(pixels[0, 0, 0] / 25.5), round(pixels[0, 0, 1] / 25.5)


def test_geneval_reads_it_back(tmp_path: Path) -> None:
    items = drawn(geneval(tmp_path / "evaluation_metadata.jsonl"), tmp_path / "run", 3)
    out = tmp_path / "export" / "geneval"
    how = export(items, tmp_path / "run", "geneval", out, model="tiny")
    assert str(out) in how and "evaluate_images.py" in how
    found = []
    for subfolder in os.listdir(out):  # evaluation/evaluate_images.py, main
        assert subfolder.isdigit()
        with open(out / subfolder / "metadata.jsonl") as file:
            metadata = json.load(file)  # one object, though the name says lines
        for name in os.listdir(out / subfolder / "samples"):
            assert re.match(r"\d+\.png", name)
            picture = Image.open(out / subfolder / "samples" / name)
            found.append((subfolder, metadata["prompt"], colour(picture)))
    assert sorted(found) == [
        (f"{place:05}", GENEVAL[place]["prompt"], (place, member)) for place in range(2) for member in range(3)
    ]


@pytest.mark.parametrize("members", [1, 2, 4])
def test_dpg_reads_it_back(members: int, tmp_path: Path) -> None:
    items = drawn(dpg(tmp_path / "prompts"), tmp_path / "run", members)
    out = tmp_path / "dpg"
    how = export(items, tmp_path / "run", "dpg", out, model="tiny")
    assert f"--resolution {SIZE} --pic-num {members}" in how
    asked = {"1": 0, "10": 1, "COCOval2014000000019": 2}  # the questions' keys, in the order of the prompts
    assert len(os.listdir(out)) == len(asked)
    for name in os.listdir(out):  # dpg_bench/compute_dpg_bench.py, compute_dpg_one_sample
        place = asked[name.split(".")[0]]
        corners = [(0, 0), (SIZE, 0), (0, SIZE), (SIZE, SIZE)][:members]
        picture = Image.open(out / name)
        crops = [picture.crop((x, y, x + SIZE, y + SIZE)) for x, y in corners]
        assert [colour(crop) for crop in crops] == [(place, member) for member in range(members)]


def test_a_grid_holds_four(tmp_path: Path) -> None:
    assert grid([Image.new("RGB", (3, 2))]).size == (3, 2) and grid([Image.new("RGB", (3, 2))] * 2).size == (6, 4)
    items = drawn(dpg(tmp_path / "prompts"), tmp_path / "run", 5)
    with pytest.raises(EvaluationError, match="lower images_per_prompt"):
        export(items, tmp_path / "run", "dpg", tmp_path / "dpg", model="tiny")


def answered(count: int = 3, task: str = "mcq", **more: Any) -> list[Item]:
    return [
        Item(
            prompt=Prompt(
                id=f"{task}/{i}",
                task=task,
                text=f"which {i}?",
                segments=("text",),
                answer="B",
                options=("red", "blue"),
                qa_type="MC",
                **more,
            ),
            greedy=f"<think> hm </think><answer> {'AB'[i % 2]} </answer>",
        )
        for i in range(count)
    ]


def from_log(folder: Path) -> dict[str, dict[Any, str]]:
    """lmms_eval/models/simple/from_log.py: task -> doc_id -> the answer that `generate_until` gives."""
    logs: dict[str, dict[Any, str]] = {}
    for root, _, names in os.walk(folder):
        for name in (name for name in names if name.endswith(".json")):
            log = json.loads((Path(root) / name).read_text())
            assert log["args"]["limit"] is None and "model" in log["args"] and "model_args" in log["args"]
            datetime.strptime(log["time"], "%m%d_%H%M")
            rows = {row["doc_id"]: row["resps"][0] for row in log["logs"]}
            logs[log["model_configs"]["task"]] = {number: response[0] for number, response in rows.items()}
    return logs


def test_lmms_eval_reads_it_back(tmp_path: Path) -> None:
    how = export(answered(), tmp_path, "lmms_eval", tmp_path / "out", model="a/b c", name="mmmu_val")
    assert from_log(tmp_path / "out") == {"mmmu_val": {0: "A", 1: "B", 2: "A"}}, "answers without their tags"
    assert f"--model_args logs={tmp_path / 'out'} --tasks mmmu_val" in how
    (samples,) = (tmp_path / "out").glob("*_samples_mmmu_val.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [row["doc_id"] for row in rows] == [0, 1, 2]
    assert rows[0]["resps"] == [["A"]] and rows[0]["filtered_resps"] == ["A"] and rows[0]["target"] == "B"


def test_lmms_eval_takes_the_data_sets_own_numbers(tmp_path: Path) -> None:
    items = [
        replace(item, prompt=replace(item.prompt, extra={"doc_id": 40 - place}))
        for place, item in enumerate(answered(2))
    ]
    export([*items, *answered(1, "oe")], tmp_path, "lmms_eval", tmp_path / "out", model="tiny")
    assert from_log(tmp_path / "out") == {"mcq": {40: "A", 39: "B"}, "oe": {0: "A"}}
    with pytest.raises(EvaluationError, match="same 'doc_id'"):
        export(answered(2, extra={"doc_id": 1}), tmp_path, "lmms_eval", tmp_path / "out", model="tiny")
    with pytest.raises(EvaluationError, match="choose one with --tasks"):
        export([*items, *answered(1, "oe")], tmp_path, "lmms_eval", tmp_path / "out", model="tiny", name="x")


def test_vlmevalkit_reads_it_back(tmp_path: Path) -> None:
    items = answered(2, extra={"category": 'a\t"b"\nc', "hint": None, "image": ["x"]})
    untagged = replace(items[1], greedy="no tags")
    how = export([items[0], untagged], tmp_path, "vlmevalkit", tmp_path / "out", model="a/b", name="MMBench_DEV_EN")
    assert "PRED_FORMAT=tsv" in how and "--model a_b --data MMBench_DEV_EN" in how
    with open(tmp_path / "out" / "a_b_MMBench_DEV_EN.tsv", newline="") as file:  # as pandas.read_csv(sep="\t") does
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert rows[0] == {
        "index": "0",
        "question": "which 0?",
        "A": "red",
        "B": "blue",
        "answer": "B",
        "category": 'a\t"b"\nc',
        "prediction": "A",
    }
    assert rows[1]["prediction"] == "no tags"


def test_nothing_of_the_kind_is_an_error(tmp_path: Path) -> None:
    for kind in ("geneval", "dpg"):
        with pytest.raises(EvaluationError, match=f"export {kind}: none"):
            export(answered(), tmp_path, kind, tmp_path / "out", model="tiny")  # type: ignore[arg-type]
    items = drawn(dpg(tmp_path / "prompts"), tmp_path / "run", 1)
    with pytest.raises(EvaluationError, match="evaluate on questions"):
        export(items, tmp_path, "lmms_eval", tmp_path / "out", model="tiny")
    assert sorted(os.listdir(tmp_path)) == ["prompts", "run"], "no half export is left"


def test_an_export_holds_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    export(answered(3), tmp_path, "lmms_eval", tmp_path / "out", model="tiny", name="first")
    export(answered(3), tmp_path, "lmms_eval", tmp_path / "out", model="tiny", name="second")
    assert set(from_log(tmp_path / "out")) == {"second"}
    (tmp_path / "file").touch()
    with pytest.raises(EvaluationError, match="is no folder"):
        export(answered(3), tmp_path, "lmms_eval", tmp_path / "file", model="tiny")
