"""How answers are read: as the published programs read them, on texts with the verdicts that those programs gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import syncr1.engine.compat  # noqa: F401  # before transformers

import pytest

from syncr1.engine.evaluate.benchmarks.benchmark_outcome import f1_part, mean_part, weighted_part, yes_no
from syncr1.engine.evaluate.benchmarks.compbench import grade_of
from syncr1.engine.evaluate.benchmarks.dpg_bench import image_score
from syncr1.engine.evaluate.benchmarks.free_answers import MAX_TEXT, last_choice, said, says_yes, sure_choice
from syncr1.engine.evaluate.benchmarks.mathvista import judged, value_of
from syncr1.engine.evaluate.benchmarks.mmmu import open_right
from syncr1.engine.evaluate.benchmarks.wise import wiscore
from syncr1.engine.evaluate.store import Item
from syncr1.engine.records import Prompt
from syncr1.engine.show.measured import Measured

VERDICTS = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "support" / "published_verdicts.jsonl").read_text().splitlines()
]
"""What MMMU's `eval_utils.py` (its guess taken out), VLMEvalKit's `matching_util.py` and POPE's `evaluate.py` said."""


@pytest.mark.parametrize("rule", ["mmmu", "vlmevalkit", "mmmu_open", "pope"])
def test_verdicts_are_those_of_the_published_programs(rule: str) -> None:
    ours = {
        "mmmu": lambda row: last_choice(row["text"], row["options"]),
        "vlmevalkit": lambda row: sure_choice(row["text"], row["options"]),
        "mmmu_open": lambda row: open_right(row["text"], row["answer"]),
        "pope": lambda row: says_yes(row["text"]),
    }[rule]
    assert [row["text"] for row in VERDICTS if ours(row) != row[rule]] == []
    assert len({json.dumps(row[rule]) for row in VERDICTS}) > 1, "they differ"


def item(text: str, **more: Any) -> Item:
    return Item(prompt=Prompt(id="0", task="x", text="?", segments=("text",), **more), greedy=text)


def test_an_answer_in_tags_is_read_from_the_tags() -> None:
    assert said(item("<think>A, no B</think><answer> C </answer>")) == "C"
    assert said(item("the answer is D")) == "the answer is D"
    assert len(said(item("word " * 100_000))) == MAX_TEXT


def question(kind: str, answer: str, precision: int = 0, options: tuple[str, ...] = ()) -> Item:
    return item("", answer=answer, options=options, extra={"answer_type": kind, "precision": precision})


@pytest.mark.parametrize(
    ("kind", "precision", "text", "value"),
    [
        ("integer", 0, "14", 14.0),
        ("integer", 0, "The number missing in the sequence is 14.", 14.0),
        ("integer", 0, "1,000", 1000.0),
        ("integer", 0, "So there are 3 dogs and 4 cats", None),
        ("integer", 0, "the answer is 7 because 3 + 4 = 7", 7.0),
        ("integer", 0, "", None),
        ("float", 1, "1.24", 1.2),
        ("float", 2, "Luca needs $1.45", 1.45),
        ("float", 1, "answer: **0.6**", 0.6),
        ("float", 1, "It is about half", None),
        ("float", 1, "nan", None),
        ("list", 0, "between 2007 and 2008, so [2007, 2008]", (2007.0, 2008.0)),
        ("list", 0, "2007 to 2008", None),
        ("list", 0, "[1, [2]]", None),
    ],
)
def test_what_rules_read_of_mathvista(kind: str, precision: int, text: str, value: Any) -> None:
    assert value_of(text, question(kind, "1", precision), sure=True) == value


def test_any_of_mmmus_answers_that_stand_in_a_list_is_right() -> None:
    several = "['$MgS$', 'MgS', '24.32']"
    assert [open_right(text, several) for text in ("MgS", "it is $MgS$", "24.32", "MgO", "[")] == [True] * 3 + [
        False
    ] * 2
    assert open_right("the interval is [1, 2)", "[1, 2)") and open_right("[3]", "[3]")


def test_what_nobody_can_read_is_not_right() -> None:
    assert judged("none", question("integer", "about seven")) == 0


def test_what_the_judge_reads_is_compared_by_rules() -> None:
    half = question("float", "0.5", 1)
    assert [judged(reply, half) for reply in ("0.5", ".5", "0.46", "none", "0.4", None)] == [1, 1, 1, 0, 0, None]
    chosen = question("text", "B", 0, ("3/11", "8/11"))
    assert [judged(reply, chosen) for reply in ("B", "(B)", "8/11", "A", "A or B")] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("consistency: 2\nrealism: 2\nbeauty: 2", 1.0),
        ("Consistency: 2\n**Realism**: 1\nBeauty - 0", 0.8),
        ("consistency: 0\nrealism: 0\nbeauty: 1", 0.05),
        ("consistency: 3\nrealism: 0\nbeauty: 1", None),
        ("consistency: 1\nrealism: 0", None),
        ("consistency: 1\nrealism: 0\nbeauty: 1\nconsistency: 2", None),
        ("consistency: 1.5\nrealism: 0\nbeauty: 1", None),
        (None, None),
    ],
)
def test_wiscore(reply: str | None, value: float | None) -> None:
    assert wiscore(reply) == (None if value is None else pytest.approx(value))


def test_grades_of_compbench() -> None:
    assert [grade_of(reply) for reply in ("5", "Score 3.", "1", "0", "6", "4 or 5", "4.5", "", None)] == [
        1.0,
        0.5,
        0.0,
        *[None] * 6,
    ]


def test_a_question_of_dpg_counts_where_its_parents_do() -> None:
    asked = [{"id": 1, "parents": []}, {"id": 2, "parents": [1]}, {"id": 3, "parents": [2]}, {"id": 4, "parents": []}]
    assert image_score(asked, {1: 1.0, 2: 1.0, 3: 1.0, 4: 0.0}) == 0.75
    assert image_score(asked, {1: 0.0, 2: 1.0, 3: 1.0, 4: 1.0}) == 0.25, "what hangs on a no is no, and so on"
    assert image_score(asked, {1: 1.0, 2: 1.0, 3: None, 4: 1.0}) is None


def test_numbers_of_saying_yes() -> None:
    said_yes, right = [True, True, True, False, False], [True, True, False, True, False]
    assert yes_no(said_yes, right) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert yes_no([False] * 3, [True] * 3) == (0.0, 0.0, 0.0) == yes_no([], []) == yes_no([False], [False])
    part = f1_part("F1", said_yes * 40, right * 40, 100)
    assert part is not None and part.interval is not None and part.percent and part.num_items == 200
    assert part.value == pytest.approx(200 / 3) and part.interval[0] < part.value < part.interval[1]
    assert part.interval[1] - part.interval[0] == pytest.approx(2 * 1.96 * 3.9, rel=0.25), "the delta method's, near"
    few = f1_part("F1", said_yes, right)
    assert few is not None and few.interval is None and f1_part("F1", [], []) is None


def test_means_with_weights() -> None:
    one, two = (Measured.of([f"{k}/{i}" for i in range(50)], [float(i < k) for i in range(50)]) for k in (40, 10))
    even, uneven = mean_part("x", [one, two], 100), weighted_part("x", [(one, 3), (two, 1)])
    assert even is not None and even.value == pytest.approx(50) and even.num_items == 100 and even.interval is not None
    assert uneven is not None and uneven.value == pytest.approx(0.65) and uneven.interval is not None
    assert even.interval[0] < 50 < even.interval[1] and uneven.interval[0] < 0.65 < uneven.interval[1]
    alone = weighted_part("x", [(one, 3), (Measured.of([], []), 1)])
    assert alone is not None and alone.value == pytest.approx(0.8), "what has no items has no weight"
    assert mean_part("x", [Measured.of([], [])]) is None and mean_part("x", []) is None
