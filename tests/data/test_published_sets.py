"""Sets as they are published: their columns and types, and what their rows become."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_sources import encoded

from syncr1.engine.data.samples import load_samples
from syncr1.engine.errors import DataError
from syncr1.engine.pictures import open_picture
from syncr1.engine.records import Prompt

Feature = dict[str, Any]
TEXT, PICTURE = datasets.Value("string"), datasets.Image()
CELL = {"bytes": encoded("coffee.jpg"), "path": None}


def published(folder: Path, features: Feature, rows: Sequence[dict[str, Any]]) -> Path:
    """A parquet shard with the set's own features; a row need not name what it leaves empty."""
    full = [{name: row.get(name) for name in features} for row in rows]
    path = folder / "train-00000-of-00001.parquet"
    datasets.Dataset.from_list(full, features=datasets.Features(features)).to_parquet(path)
    return folder


def read(source: Path) -> list[Prompt]:
    prompts = [prompt for (prompt,) in load_samples(source, instruction=None)]
    for prompt in prompts:
        if prompt.images:
            assert open_picture(prompt.images[0]).size == (96, 64)
    return prompts


SCIENCE_QA: Feature = {
    "image": PICTURE,
    "question": TEXT,
    "choices": datasets.Sequence(TEXT),
    "answer": datasets.Value("int8"),
    **dict.fromkeys(("hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"), TEXT),
}


def test_science_qa(tmp_path: Path) -> None:
    """Its `solution` explains, and is no truth, which other sets call it."""
    more = {"task": "closed choice", "solution": "Look at the compass rose.", "lecture": "Maps have four directions."}
    rows = [
        {"image": CELL, "question": "Which is farthest north?", "choices": ["Maine", "Ohio"], "answer": 0, **more},
        {
            "image": CELL,
            "question": "Which?",
            "choices": ["hard", "soft"],
            "answer": 1,
            "hint": "Select.",
            **more,
        },
        {"image": CELL, "question": "Which month?", "choices": ["1", "2", "5"], "answer": 2, "hint": "", **more},
    ]
    first, second, third = read(published(tmp_path, SCIENCE_QA, rows))
    assert first.text == "Which is farthest north?\nA. Maine\nB. Ohio" and first.answer == "A" and first.qa_type == "MC"
    assert second.text == "Select.\nWhich?\nA. hard\nB. soft" and second.answer == "B"
    assert first.extra["solution"] == more["solution"], "for rewards"
    assert third.answer == "C" and third.options == ("1", "2", "5"), "the other rows tell that numbers are indices"


def test_an_index_that_is_also_the_text_of_another_option_is_asked_about(tmp_path: Path) -> None:
    row = {"question": "How many?", "choices": ["1", "2", "3"], "answer": 1, "solution": "Count them."}
    with pytest.raises(DataError, match=r"row 0.*1 is the text of option A and the index \(from 0\) of B"):
        read(published(tmp_path, SCIENCE_QA, [row]))


A_OKVQA: Feature = {
    "image": PICTURE,
    "question_id": TEXT,
    "question": TEXT,
    "choices": datasets.Sequence(TEXT),
    "correct_choice_idx": datasets.Value("int8"),
    "direct_answers": TEXT,
    "difficult_direct_answer": datasets.Value("bool"),
    "rationales": datasets.Sequence(TEXT),
}


def test_a_okvqa(tmp_path: Path) -> None:
    row = {
        "image": CELL,
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "question": "What is the man by the bags awaiting?",
        "choices": ["skateboarder", "train", "delivery", "cab"],
        "correct_choice_idx": 3,
        "direct_answers": "['ride', 'ride', 'bus', 'taxi', 'travelling', 'traffic', 'taxi', 'cab', 'cab', 'his ride']",
        "rationales": ["A train would not be on the street."],
    }
    (prompt,) = read(published(tmp_path, A_OKVQA, [row]))
    assert prompt.answer == "D" and prompt.options[3] == "cab" and prompt.qa_type == "MC"
    source = tmp_path / "aokvqa_v1p0_val.json"  # the authors' own file, here without choices
    spoken = ["ride", "taxi", "cab", "cab"]
    source.write_text(json.dumps([{"question": row["question"], "direct_answers": spoken, "image_id": 299207}]))
    (prompt,) = read(source)
    assert prompt.answer == "cab" and set(prompt.right_answers) == set(spoken) and prompt.qa_type == "OE"
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="-1 is the index of none of the 4 options"):
        read(published(tmp_path / "test", A_OKVQA, [row | {"correct_choice_idx": -1}]))


MMMU: Feature = {
    **dict.fromkeys(("id", "question", "options", "explanation"), TEXT),
    **{f"image_{number}": PICTURE for number in range(1, 8)},
    **dict.fromkeys(("img_type", "answer", "topic_difficulty", "question_type", "subfield"), TEXT),
}


def test_mmmu(tmp_path: Path) -> None:
    rows = [
        {
            "id": "validation_Accounting_1",
            "question": "<image 1> Baxter Company has a relevant range. What is it?",
            "options": "['$6', '$7', '$8', \"Baxter's\"]",
            "image_1": CELL,
            "answer": "B",
            "question_type": "multiple-choice",
        },
        {
            "id": "validation_Architecture_and_Engineering_14",
            "question": "Find the current in <image 1>.",
            "options": "[]",
            "explanation": "As in <image 2>.",
            "image_1": CELL,
            "image_2": CELL,
            "answer": "['1.06', '1.07']",
            "question_type": "open",
        },
    ]
    choice, opened = read(published(tmp_path, MMMU, rows))
    assert choice.answer == "B" and choice.options == ("$6", "$7", "$8", "Baxter's") and choice.images
    assert opened.right_answers == ("1.06", "1.07") and opened.qa_type == "OE" and opened.images
    assert "<image" not in choice.text and "image_1" not in choice.extra
    with pytest.raises(DataError, match="column 'image_2' is empty, and the text shows <image 2>"):
        read(published(tmp_path, MMMU, [rows[0] | {"question": "Compare <image 1> with <image 2>."}]))
    both = MMMU | {"image": PICTURE}
    with pytest.raises(DataError, match="columns 'image' and 'image_1' both hold pictures"):
        read(published(tmp_path, both, [rows[0] | {"image": CELL}]))
    with pytest.raises(DataError, match="'image_3' has a picture, and no text says <image 3>"):
        read(published(tmp_path, MMMU, [rows[0] | {"image_3": CELL}]))


def test_mmbench_as_a_table_of_text(tmp_path: Path) -> None:
    """The TSV has pictures as base64; rows that show the same one name the `index` of the first."""
    names = ["index", "question", "hint", *"ABCD", "answer", "category", "image", "source", "l2-category", "split"]
    picture = base64.b64encode(encoded("coffee.jpg")).decode()
    soil = ("Identify the question.", "A student tests soil.")
    rows = [
        ["241", *soil, "Can roots?", "Does clay?", "", "", "B", "x", picture],
        ["1000241", *soil, "Does clay?", "Can roots?", "", "", "A", "x", "241"],
        ["252", "Which?", "nan", "red", "blue", "green", "nan", "C", "x", picture],
    ]
    lines = ["\t".join([*row, *[""] * (len(names) - len(row))]) for row in rows]
    (tmp_path / "MMBench_DEV_EN.tsv").write_text("\n".join(["\t".join(names), *lines]) + "\n")
    first, again, third = read(tmp_path / "MMBench_DEV_EN.tsv")
    assert first.answer == "B" and first.options == ("Can roots?", "Does clay?")
    assert first.text.startswith("A student tests soil.\nIdentify the question.\nA. Can roots?")
    assert again.images[0] == first.images[0] and again.answer == "A"
    assert third.options == ("red", "blue", "green") and third.text.startswith("Which?")


def test_mmbench_on_the_hub(tmp_path: Path) -> None:
    features: Feature = {"index": datasets.Value("int64"), "question": TEXT, "hint": TEXT, "answer": TEXT}
    features |= {**dict.fromkeys("ABCD", TEXT), "category": TEXT, "image": PICTURE, "L2-category": TEXT}
    row = {"index": 1, "question": "Which?", "hint": "nan", "A": "red", "B": "blue", "C": "nan", "D": "nan"}
    (prompt,) = read(published(tmp_path, features, [row | {"answer": "A", "image": CELL}]))
    assert prompt.answer == "A" and prompt.options == ("red", "blue") and prompt.text == "Which?\nA. red\nB. blue"


def test_math_vista(tmp_path: Path) -> None:
    """`image` says where a picture once lay; `decoded_image` is it."""
    features: Feature = {"pid": TEXT, "question": TEXT, "image": TEXT, "decoded_image": PICTURE}
    features |= {"choices": datasets.Sequence(TEXT), "unit": TEXT, "precision": datasets.Value("float64")}
    features |= dict.fromkeys(("answer", "question_type", "answer_type", "query"), TEXT)
    asked = {"image": "images/1.jpg", "decoded_image": CELL, "query": "Hint: …\nQuestion: …"}
    rows = [
        {"pid": "1", "question": "How far?", "answer": "1.2", "precision": 1.0, "question_type": "free_form", **asked},
        {"pid": "2", "question": "Is it?", "choices": ["Yes", "No"], "answer": "No", **asked},
        {"pid": "3", "question": "x = ?", "choices": ["3", "2", "1"], "answer": "2", **asked},
    ]
    free, choice, number = read(published(tmp_path, features, rows))
    assert (free.qa_type, free.answer) == ("OE", "1.2")
    assert (choice.answer, number.answer) == ("B", "B"), "a text is a text"
    assert all(prompt.images for prompt in (free, choice, number))


def test_math_vision(tmp_path: Path) -> None:
    """Its one picture is `<image1>` in the text."""
    features: Feature = {"question": TEXT, "options": datasets.Sequence(TEXT), "image": TEXT, "decoded_image": PICTURE}
    row = {"question": "<image1> Which one?", "options": ["A", "B"], "image": "images/1.jpg", "decoded_image": CELL}
    features["answer"] = TEXT
    (prompt,) = read(published(tmp_path, features, [row | {"answer": "B"}]))
    assert prompt.answer == "B" and prompt.images and prompt.text == "Which one?\nA. A\nB. B"
    with pytest.raises(DataError, match="the text shows <image 2>"):
        read(published(tmp_path, features, [row | {"answer": "B", "question": "<image2> Which?"}]))


def test_geometry3k(tmp_path: Path) -> None:
    features: Feature = {"images": datasets.Sequence(PICTURE), "problem": TEXT, "answer": TEXT}
    rows = [{"images": [CELL], "problem": "<image>Find x.", "answer": r"2 \sqrt { 221 }"}]
    (prompt,) = read(published(tmp_path, features, rows))
    assert (prompt.text, prompt.answer, prompt.qa_type) == ("Find x.", r"2 \sqrt { 221 }", "OE")
    features |= {"id": datasets.Value("int64"), "choices": datasets.Sequence(TEXT), "ground_truth": TEXT}
    rows = [rows[0] | {"id": 7, "choices": ["30", r"2 \sqrt { 221 }", "28", "60"], "ground_truth": "B"}]
    (prompt,) = read(published(tmp_path, features, rows))
    assert prompt.answer == "B" and prompt.id.endswith("/7/mm2t") and prompt.options[0] == "30"


@pytest.mark.parametrize("name", ["file_name", "image_path"])
def test_where_an_encoded_picture_once_lay_is_no_other_picture(tmp_path: Path, name: str) -> None:
    features: Feature = {"question": TEXT, "answer": TEXT, "image": PICTURE, name: TEXT}
    row = {"question": "?", "answer": "x", name: "COCO_1.jpg"}
    (prompt,) = read(published(tmp_path, features, [row | {"image": CELL}]))
    assert prompt.images and prompt.images[0].name.endswith("image") and prompt.extra[name] == "COCO_1.jpg"
    with pytest.raises(DataError, match=f"column '{name}': names a picture that does not exist"):
        read(published(tmp_path, features, [row]))


def test_x2x_rft_22k(tmp_path: Path) -> None:
    names = ("prompt", "qa_problem", "qa_solution", "od_problem", "od_solution")
    features: Feature = {**dict.fromkeys(names, TEXT), "qa_type": TEXT, "real_image": PICTURE}
    row = {"prompt": "A cup.", "qa_problem": "What?\nA. tea\nB. coffee", "qa_solution": "<answer>B</answer>"}
    ((drawing, question),) = load_samples(published(tmp_path, features, [row | {"qa_type": "MC", "real_image": CELL}]))
    assert drawing.segments == ("image",) and drawing.real_image == question.images[0] and question.answer == "B"


def test_arc_and_medqa(tmp_path: Path) -> None:
    """Options with labels of their own, and an `answer_idx` that is a letter."""
    lines = [
        {"question": "Which?", "choices": {"text": ["a cat", "a dog"], "label": ["1", "2"]}, "answerKey": "2"},
        {"question": "Which?", "choices": {"text": ["a cat", "a dog"], "label": ["A", "B"]}, "answerKey": "A"},
    ]
    (tmp_path / "arc.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [prompt.answer for prompt in read(tmp_path / "arc.jsonl")] == ["B", "A"]
    row = {"question": "Which?", "options": {"A": "rest", "B": "ice"}, "answer": "ice", "answer_idx": "B"}
    (tmp_path / "medqa.jsonl").write_text(json.dumps(row))
    assert [prompt.answer for prompt in read(tmp_path / "medqa.jsonl")] == ["B"]
