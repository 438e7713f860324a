"""Every benchmark's published layout is read: prompts, answers, pictures, categories; what is none is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import benchmark_layouts as made
import pytest

from syncr1.engine.errors import ConfigError, DataError, PictureError
from syncr1.engine.evaluate.benchmarks.data_sets import DATA_SETS, source_of, sources_of
from syncr1.engine.evaluate.benchmarks.known import KNOWN, benchmark_of, load_benchmark_prompts
from syncr1.engine.evaluate.benchmarks.layouts import EncodedImage
from syncr1.engine.evaluate.generate import select
from syncr1.engine.methods.evaluation import items_of
from syncr1.engine.methods.evaluation_config import EvaluateConfig
from syncr1.engine.pictures import open_picture
from syncr1.engine.records import Prompt
from syncr1.engine.settings.schema import settings_of


def read(name: str, data: Path, split: str | None = None, **more: Any) -> list[Prompt]:
    (found,) = load_benchmark_prompts(name, str(data), split, **more).values()
    assert all(benchmark_of(prompt) == name == prompt.task for prompt in found)
    assert len({prompt.id for prompt in found}) == len(found)
    return found


def shown(prompt: Prompt) -> tuple[int, int, int]:
    """The colour of the picture that a prompt shows."""
    assert prompt.images
    return open_picture(prompt.images[0]).getpixel((0, 0))  # type: ignore[return-value]


def test_the_flag_takes_what_is_known() -> None:
    (setting,) = [setting for setting in settings_of(EvaluateConfig) if setting.name == "benchmark"]
    assert KNOWN.keys() == DATA_SETS.keys()
    for name in (*KNOWN, "unifybench"):
        assert f"'{name}'" in str(setting.type)


def test_pope(tmp_path: Path) -> None:
    found = read("pope", made.pope_github(tmp_path / "pope"))
    assert [prompt.id for prompt in found[:2]] == ["pope/random/1", "pope/random/2"] and len(found) == 12
    assert found[0].text == "Is there a dog in the image?\nAnswer the question using a single word or phrase."
    assert [prompt.answer for prompt in found[:4]] == ["yes", "no", "yes", "no"]
    assert {prompt.extra["group"] for prompt in found} == {"random", "popular", "adversarial"}
    assert shown(found[0])[2] > 200 and shown(found[1])[1] > 100
    one = read("pope", tmp_path / "pope" / "coco_pope_popular.json")
    assert len(one) == 4 and one[0].id == "pope/popular/1"


def test_pope_of_the_hub(tmp_path: Path) -> None:
    found = read("pope", made.pope_hub(tmp_path / "pope"))
    assert [(prompt.answer, prompt.extra["group"]) for prompt in found] == [
        ("yes", "random"),
        ("no", "random"),
        ("yes", "popular"),
        ("no", "popular"),
    ]
    assert [shown(prompt) for prompt in found][3] == (255, 255, 255)
    with pytest.raises(DataError, match=r"has no val\*\.parquet.*test-00000-of-00001\.parquet.*--split"):
        read("pope", tmp_path / "pope", "val")


def test_a_split_of_what_has_none_is_refused(tmp_path: Path) -> None:
    for name, data in (
        ("pope", made.pope_github(tmp_path / "pope")),
        ("mmbench", made.mmbench_tsv(tmp_path / "a.tsv", circular=True)),
        ("dpg", made.dpg_clone(tmp_path / "dpg")),
    ):
        with pytest.raises(DataError, match=f"split: expected none for {name} .* got 'val': it has no splits"):
            read(name, data, "val")


def test_pictures_that_lie_elsewhere(tmp_path: Path) -> None:
    """COCO's are 6 GB, and seldom beside the questions."""
    folder = made.pope_github(tmp_path / "pope")
    (folder / "val2014").rename(tmp_path / "coco")
    with pytest.raises(DataError, match=r"line 1: there is no picture 'COCO_val2014_.*--image_folder"):
        read("pope", folder)
    assert len(read("pope", folder, image_folder=tmp_path / "coco")) == 12
    rows = [json.loads(line) for line in (folder / "coco_pope_random.json").read_text().splitlines()]
    (folder / "coco_pope_random.json").write_text(json.dumps([rows[0] | {"image": "../secret.png"}]))
    (tmp_path / "secret.png").write_bytes(made.encoded("red"))
    with pytest.raises(DataError, match="secret"):
        read("pope", folder, image_folder=tmp_path / "coco")


def test_mmmu(tmp_path: Path) -> None:
    found = {prompt.id: prompt for prompt in read("mmmu", made.mmmu(tmp_path / "mmmu"))}
    art, maths = found["mmmu/validation_Art_1"], found["mmmu/validation_Math_1"]
    assert art.text == (
        "What is <image>?\n(A) a cat\n(B) a dog's\n(C) a bus\n(D) none of these\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert art.answer == "B" and art.options[1] == "a dog's" and art.extra["group"] == "Art and Design"
    assert maths.answer == "12" and maths.options == () and len(maths.images) == 2
    assert maths.text == "How long is it, <image> to <image>?\nAnswer the question using a single word or phrase."
    assert shown(maths) == (255, 0, 0), "the first of several"
    with pytest.raises(DataError, match="no answers; choose --split validation"):
        read("mmmu", tmp_path / "mmmu", "test")
    one = read("mmmu", tmp_path / "mmmu" / "Art" / "validation-00000-of-00001.parquet")
    assert len(one) == 6


def test_mmmu_from_the_hub_is_asked_subject_by_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    asked = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> Any:
        asked.append((name, config, split, revision))
        return Dataset.from_parquet(
            str(made.mmmu(tmp_path / str(config)) / "Art" / "validation-00000-of-00001.parquet")
        )

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("syncr1.engine.evaluate.benchmarks.mmmu._ALL", ["Art", "Math"])
    (prompts,) = load_benchmark_prompts("mmmu", None, None).values()
    assert asked == [("MMMU/MMMU", "Art", "validation", None), ("MMMU/MMMU", "Math", "validation", None)]
    assert len(prompts) == 12 and shown(prompts[1])[1] > 100
    load_benchmark_prompts("mmmu", "MMMU/MMMU@abc:Art", "dev")
    assert asked[-1] == ("MMMU/MMMU", "Art", "dev", "abc")


def test_mmbench_in_every_order(tmp_path: Path) -> None:
    """A table of first orders, and one that has all of them, ask the same."""
    some = read("mmbench", made.mmbench_tsv(tmp_path / "first.tsv", circular=False))
    whole = read("mmbench", made.mmbench_tsv(tmp_path / "MMBench_DEV_EN.tsv", circular=True))
    hub = read("mmbench", made.mmbench_hub(tmp_path / "hub"))
    for found in (some, whole, hub):
        assert [prompt.extra["index"] for prompt in found] == [0, 1_000_000, 2_000_000, 1, 1_000_001]
        assert [prompt.answer for prompt in found] == ["A", "C", "B", "B", "A"]
        assert [prompt.sample for prompt in found] == ["mmbench/0"] * 3 + ["mmbench/1"] * 2
        assert [shown(prompt) for prompt in found] == [(255, 0, 0)] * 5
    assert some[1].text == (
        "Hint: Look.\nWhat colour?\nA. green\nB. blue\nC. red\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert some[3].text.startswith("Which one?\nA. cat\nB. dog\n"), "pandas' nan is no hint"
    assert [prompt.extra["group"] for prompt in some] == ["coarse"] * 3 + ["fine"] * 2
    for count in (1, 2):
        chosen = select({"mmbench": some}, num_items=count)["mmbench"]
        assert {prompt.sample for prompt in chosen} and len({prompt.sample for prompt in chosen}) == count
        assert len(chosen) == sum(prompt.sample in {one.sample for one in chosen} for prompt in some), "whole questions"


def test_mathvista_asks_as_published(tmp_path: Path) -> None:
    github = read("mathvista", made.mathvista_github(tmp_path / "data"))
    hub = read("mathvista", made.mathvista_hub(tmp_path / "hub"))
    assert [prompt.text for prompt in github] == [prompt.text for prompt in hub]
    assert github[0].text == (
        "Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at "
        "the end.\nQuestion: What is the total volume? (Unit: g)"
    )
    assert github[2].text == (
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
        "Question: ∠BOC＝（）\nChoices:\n(A) 135°\n(B) 140°\n(C) 145°\n(D) 150°"
    )
    assert [prompt.answer for prompt in github] == ["1000", "1.2", "C", "[2007, 2008]"]
    assert [shown(prompt) for prompt in (*github, *hub)] == [(255, 0, 0)] * 8
    assert len(read("mathvista", tmp_path / "data" / "testmini.json")) == 4


def test_drawings(tmp_path: Path) -> None:
    clone = made.geneval_clone(tmp_path / "geneval")
    for place in (clone, clone / "prompts", clone / "prompts" / "evaluation_metadata.jsonl"):
        assert read("geneval", place)[0].text == "a photo of a bench"
    found = {prompt.extra["dpg_name"]: prompt for prompt in read("dpg", made.dpg_clone(tmp_path / "ella"))}
    assert found.keys() == {"1", "10", "COCOval2014000000019"}
    assert [one["parents"] for one in found["1"].extra["dpg_questions"]] == [[], [1], [2]]
    assert [one["category"] for one in found["1"].extra["dpg_questions"]] == ["entity", "attribute", "relation"]
    assert "dpg_questions" not in found["COCOval2014000000019"].extra
    prompts = read("t2i_compbench", made.compbench(tmp_path / "t2i"))
    assert [prompt.extra["group"] for prompt in prompts] == ["color", "color", "numeracy"]
    assert prompts[1].text == "a red/white car" == prompts[1].target and prompts[1].segments == ("image",)
    assert len(read("t2i_compbench", tmp_path / "t2i" / "examples" / "dataset" / "color_val.txt")) == 2


@pytest.mark.parametrize("limit", [1, 3, 5, 12, 100])
def test_a_limit_is_spread_over_the_categories(limit: int, tmp_path: Path) -> None:
    """A mean over categories of which some are missing would be another number."""
    asked = read("pope", made.pope_github(tmp_path / "pope"))
    (chosen,) = select({"pope": asked}, num_items=limit).values()
    counts = [sum(prompt.extra["group"] == kind for prompt in chosen) for kind in ("random", "popular", "adversarial")]
    assert len(chosen) == min(limit, 12) == sum(counts) and max(counts) - min(counts) <= 1
    assert chosen == [prompt for prompt in asked if prompt in chosen], "in their order"
    drawings = read("geneval", made.geneval_clone(tmp_path / "g"))
    twice = [replace(prompt, id=f"{prompt.id}/{n}") for n in range(3) for prompt in drawings]
    (some,) = select({"geneval": twice}, num_items=2).values()
    assert {prompt.extra["geneval_metadata"]["tag"] for prompt in some} == {"single_object", "color_attr"}


def test_both_editions_of_wise(tmp_path: Path) -> None:
    legacy = read("wise", made.wise(tmp_path / "clone" / "WISE_legacy" / "data"))
    assert [prompt.extra["prompt_id"] for prompt in legacy] == [1, 2, 401, 402, 999, 1000]
    assert [prompt.extra["group"] for prompt in legacy] == ["culture"] * 2 + ["time"] * 2 + ["chemistry"] * 2
    assert legacy[0].extra["explanation"] == "This refers to 1" and legacy[0].extra["edition"] == "legacy"
    assert len(read("wise", tmp_path / "clone")) == 6
    verified = read("wise", made.wise(tmp_path / "clone" / "data_verified", verified=True))
    assert {prompt.extra["edition"] for prompt in verified} == {"verified"}
    with pytest.raises(DataError, match="two editions; name"):
        read("wise", tmp_path / "clone")


def test_thinking_is_asked_for_in_tags_or_not_at_all(tmp_path: Path) -> None:
    folder = made.mmbench_hub(tmp_path / "hub")
    (plain, *_), (thinking, *_) = read("mmbench", folder), read("mmbench", folder, think=True)
    assert "<think>" not in plain.text
    assert "the letter of the right option alone" in thinking.text and "directly" not in thinking.text
    assert thinking.text.startswith("Hint: Look.\nWhat colour?\nA. red")


def test_what_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    assert source_of("pope", None) == "lmms-lab/POPE" and source_of("pope", "me/pope@1:Full") == "me/pope@1:Full"
    with pytest.raises(DataError, match=r"got none; get them by `git clone https://github\.com/djghosh13/geneval`"):
        source_of("geneval", None)
    with pytest.raises(DataError, match="which is not there; get them by `hf download --repo-type dataset MMMU/MMMU"):
        source_of("mmmu", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"git clone .*ELLA"):
        source_of("dpg", "org/name")


def test_several_are_read_from_one_folder_or_the_hub(tmp_path: Path) -> None:
    made.wise(tmp_path / "wise")
    made.mmmu(tmp_path / "mmmu")
    found = sources_of(("wise", "mmmu", "pope"), str(tmp_path))
    assert found == {"wise": str(tmp_path / "wise"), "mmmu": str(tmp_path / "mmmu"), "pope": "lmms-lab/POPE"}
    assert sources_of(("mmmu", "pope"), None) == {"mmmu": "MMMU/MMMU", "pope": "lmms-lab/POPE"}
    with pytest.raises(DataError, match=r"git clone .*geneval"):
        sources_of(("wise", "geneval"), str(tmp_path))
    with pytest.raises(DataError, match="a sub-folder for each of wise, pope"):
        sources_of(("wise", "pope"), "org/name")
    config = EvaluateConfig(benchmark=("wise", "mmmu"), data=str(tmp_path))
    items, source = items_of(config)
    assert {name: len(prompts) for name, prompts in items.items()} == {"wise": 6, "mmmu": 7}
    assert source == f"{tmp_path / 'wise'}, {tmp_path / 'mmmu'}"
    with pytest.raises(ConfigError, match="benchmark: expected each once, got pope twice"):
        EvaluateConfig(benchmark=("pope", "pope"))


def change(column: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda row: {**row, column: value}


MATHS = json.dumps(
    {
        "1": {
            "pid": "1",
            "question": "How many?",
            "image": "1.jpg",
            "choices": None,
            "answer": "3",
            "question_type": "free_form",
            "answer_type": "integer",
            "metadata": 7,
        }
    }
)


@pytest.mark.parametrize(
    ("name", "file", "text", "said"),
    [
        ("pope", "a_pope_random.json", '{"question_id": 1, "image": "x.jpg", "label": "yes"}', "there is no picture"),
        ("pope", "a_pope_random.json", "{", "line 1: not JSON"),
        ("pope", "a_pope_random.json", "", "is empty"),
        ("pope", "a_pope_random.json", "[1]", "expected objects"),
        ("wise", "a.json", '[{"Prompt": "x", "Explanation": "y", "prompt_id": 1001}]', "1 to 1000"),
        ("wise", "a.json", '[{"Prompt": "x", "prompt_id": 1}]', "expected text in 'Explanation'"),
        ("wise", "a.json", '[{"Prompt": "x", "Explanation": "y", "prompt_id": "z"}]', "whole number"),
        ("wise", "b.txt", "x", "none of WISE's files"),
        ("t2i_compbench", "colour_val.txt", "x", "expected <category>_val.txt"),
        ("t2i_compbench", "color_val.txt", " \n", "one prompt a line"),
        ("geneval", "other.jsonl", "{}", r"no evaluation_metadata\.jsonl"),
        ("dpg", "a.md", "x", r"no \.txt"),
        ("mmbench", "a.tsv", "", "is empty"),
        ("mmbench", "a.tsv", "index\tquestion\tA\tanswer\timage\n1\tq\tx\tA\t" + "Q" * 80, "1 options"),
        ("mmbench", "a.tsv", "index\tquestion\tA\tB\tanswer\timage\n1\tq\tx\ty\tC\t" + "Q" * 80, "--split dev"),
        ("mmbench", "a.tsv", "index\tquestion\tA\tB\tanswer\timage\n1\tq\tx\ty\tA\t7", "names no row that has"),
        ("mmbench", "a.tsv", "index\tquestion\n1\tq\tx\n", "more cells"),
        ("mathvista", "testmini.json", '{"1": {"question_type": "free_form", "answer_type": "float"}}', "no answer"),
        ("mathvista", "testmini.json", MATHS.replace('"choices": null', '"choices": 3'), "'choices' must be a list"),
        ("mathvista", "testmini.json", MATHS.replace('"integer"', '"date"'), "answer_type must be integer"),
        ("mathvista", "testmini.json", MATHS.replace("How many?", "\\ud800"), "is not UTF-8"),
        ("mathvista", "testmini.json", MATHS.replace('"1.jpg"', f'"{"x" * 3000}"'), "there is no picture"),
        ("geneval", "evaluation_metadata.jsonl", '{"prompt": "\\ud800", "tag": "x"}', "surrogate pair"),
        ("mmmu", "readme.md", "x", r"has no validation\*\.parquet"),
    ],
)
def test_what_cannot_be_used(name: str, file: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=said):
        read(name, tmp_path)


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    rows = [
        {"id": "validation_Art_1", "question": "?", "options": "['a', 'b']", "answer": "A", "image_1": made.cell("red")}
    ]
    for column, value, said in (
        ("answer", "E", "no letter of 2 options"),
        ("options", "__import__('os')", "must be a list"),
        ("options", "[" * 10_000, "must be a list"),
        ("question", "", "expected text in 'question'"),
    ):
        folder = tmp_path / f"{column}{said[:4]}"
        made.parquet(folder / "validation.parquet", [change(column, value)(row) for row in rows])
        with pytest.raises(DataError, match=said):
            read("mmmu", folder)
    half = made.parquet(tmp_path / "half" / "data" / "test-00000-of-00003.parquet", rows).parents[1]
    with pytest.raises(DataError, match="has 1 shards"):
        read("pope", half)
    with pytest.raises(PictureError, match=r"no base64"):
        open_picture(EncodedImage("a.tsv, index 1", "no base64!" * 10))
